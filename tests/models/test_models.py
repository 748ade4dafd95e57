"""Models in and out: what cannot be loaded is said with its fix, revisions are pinned, positions are counted right."""

import http.server
import json
import threading
import time

import pytest
from tiny_words import WORDS

from pipelines.__main__ import main
from pipelines.errors import ModelError
from pipelines.models import loading, tokenizer_setup
from pipelines.models.config import ModelSection
from pipelines.models.hub import _ask, unreachable
from pipelines.stages import ppo


def test_positions_are_those_that_can_be_used():
    from transformers import AutoConfig, AutoModel

    small = {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 20,
    }
    for kind, more, expected in (
        ("bert", {"max_position_embeddings": 30}, 30),
        ("roberta", {"max_position_embeddings": 30, "pad_token_id": 1}, 28),
        ("xlm-roberta", {"max_position_embeddings": 30, "pad_token_id": 0}, 29),
        ("llama", {"max_position_embeddings": 30}, 30),
        ("bloom", {"n_layer": 1, "n_head": 2}, None),
    ):
        model = AutoModel.from_config(AutoConfig.for_model(kind, **small, **more))
        assert loading.positions(model) == expected, kind
        assert loading.context_length(model) == (expected or 1024)
    with pytest.raises(ModelError, match="31 is more than the model's 30 positions"):
        loading.context_length(
            AutoModel.from_config(AutoConfig.for_model("bert", **small, max_position_embeddings=30)), 31
        )


def test_a_revision_pins_the_model_and_its_own_tokenizer_only(monkeypatch, tiny_gpt2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = []
    for cls in (AutoTokenizer, AutoModelForCausalLM):
        load = cls.from_pretrained

        def spy(path, *args, load=load, **kwargs):
            asked.append(kwargs.get("revision"))
            return load(path, *args, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", spy)
    section = ModelSection(model_name_or_path=str(tiny_gpt2), model_revision="abc")
    loading.load_tokenizer(section)
    loading.load_model(section, "AutoModelForCausalLM")
    loading.load_tokenizer(
        ModelSection(model_name_or_path="x/y", tokenizer_name_or_path=str(tiny_gpt2), model_revision="abc")
    )
    assert asked == ["abc", "abc", "main"]
    assert ppo._of(section, "reward/model").model_revision == "main"  # another repository has other revisions
    assert ppo._of(section, str(tiny_gpt2)).model_revision == "abc"


def test_code_of_a_repository_runs_only_by_the_recipes_word(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}})
    )
    (tmp_path / "own.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(ModelError, match="model.trust_remote_code: true"):
        loading.load_model(ModelSection(model_name_or_path=str(tmp_path)), "AutoModelForCausalLM")


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine that knows four repositories; `hub.requests` are the paths asked for."""
    from huggingface_hub import constants

    known = {"open/model": (200, ""), "gated/model": (401, "GatedRepo"), "gone/model": (404, "RepoNotFound")}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            server.requests.append(self.path)
            code, reason = known.get("/".join(self.path.split("/")[1:3]), (200, ""))
            if "/resolve/typo/" in self.path:
                code, reason = 404, "RevisionNotFound"
            self.send_response(code)
            self.send_header("X-Error-Code", reason)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    _ask.cache_clear()
    yield server
    server.shutdown()
    server.server_close()
    _ask.cache_clear()


def test_what_the_hub_will_not_give_is_known_before_anything_starts(hub):
    assert unreachable("open/model") is None
    assert hub.requests[-1] == "/open/model/resolve/main/config.json"
    assert "ask for access" in unreachable("gated/model") and "hf auth login" in unreachable("gated/model")
    assert "check the spelling" in unreachable("gone/model")
    assert "no revision 'typo'" in unreachable("open/model", "typo")


def test_without_a_network_only_the_cache_counts(hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    hub.shutdown()
    hub.server_close()
    start = time.monotonic()
    assert "gives no answer" in unreachable("open/model") and "gives no answer" in unreachable("b/c")
    assert time.monotonic() - start < 3
    snapshot = tmp_path / "models--open--model" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    from huggingface_hub import file_download

    for place in (constants, getattr(file_download, "constants", constants)):
        monkeypatch.setattr(place, "HF_HUB_CACHE", str(tmp_path))
    assert unreachable("open/model") is None


def test_check_names_the_hub_id_that_cannot_be_had(recipe, write, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    rows = [{"prompt": w, "completion": w} for w in WORDS]
    stage = {
        "kind": "sft",
        "model": {"model_name_or_path": "no-one/nothing"},
        "data": {"train": write("a.jsonl", rows)},
    }
    assert main(["check", str(recipe({"sft": stage}))]) == 2
    text = capsys.readouterr().err
    assert (
        "stages.sft.model.model_name_or_path = 'no-one/nothing'" in text and "HF_HUB_OFFLINE is set: unset it" in text
    )


def test_the_token_that_closes_an_answer_becomes_eos(tokenizer):
    import copy

    ours = copy.deepcopy(tokenizer)
    ours.add_tokens(["<end_of_turn>"], special_tokens=True)
    ours.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    assert tokenizer_setup.closing_token(ours) == "<end_of_turn>" != ours.eos_token
    plain = copy.deepcopy(tokenizer)
    assert tokenizer_setup.closing_token(plain) == plain.eos_token  # the template `plain`
    plain.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert tokenizer_setup.closing_token(plain) is None
