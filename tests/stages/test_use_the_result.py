"""A finished stage in other programs, as docs/use-the-result.md has them: a pipeline, peft, `transformers serve`."""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

from pipelines.chain import chain
from pipelines.models import chat_template
from pipelines.recipe.recipe import load
from tests.stages.test_stage_rank import constant_model, ranked

ROWS = [{"prompt": "what colour is the bird", "completion": "the bird is green"}]


@pytest.fixture(scope="module")
def run(tiny_gpt2, tmp_path_factory):
    """The folder of a run: an sft stage that knows one answer, and one that trains adapters on it."""
    import yaml

    root = tmp_path_factory.mktemp("run")
    (root / "rows.jsonl").write_text((json.dumps(ROWS[0]) + "\n") * 32)
    data, args = {"train": str(root / "rows.jsonl")}, {"global_batch_size": 8, "max_length": 64}
    model = {"model_name_or_path": str(tiny_gpt2), "chat_template": "plain"}
    lora = {"model_name_or_path": "stage:sft", "use_peft": True, "lora_target_modules": ["c_attn", "c_proj"]}
    stages = {
        "sft": {"kind": "sft", "model": model, "data": data, "args": {**args, "learning_rate": 5e-3, "max_steps": 100}},
        "adapted": {
            "kind": "sft",
            "model": lora,
            "data": data,
            "args": {**args, "learning_rate": 1e-3, "max_steps": 2},
        },
    }
    (root / "r.yaml").write_text(yaml.safe_dump({"output_dir": str(root / "out"), "stages": stages}, sort_keys=False))
    chain.run(load(root / "r.yaml"))
    return root / "out"


@pytest.fixture(scope="module")
def finished(run):
    return run / "sft"


def dialogue():
    return [{"role": "user", "content": ROWS[0]["prompt"]}]


def test_a_pipeline_answers_as_it_was_trained(finished):
    from transformers import pipeline

    write = pipeline("text-generation", str(finished))
    out = write(dialogue(), max_new_tokens=20, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert out == ROWS[0]["completion"]


def test_the_adapter_alone_gives_the_logits_of_the_merged_folder(run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "adapted")
    ids = torch.tensor([chat_template.encode_prompt(tokenizer, dialogue())])
    base = AutoModelForCausalLM.from_pretrained(run / "sft").eval()
    with torch.no_grad():
        before = base(ids).logits
        expected = AutoModelForCausalLM.from_pretrained(run / "adapted").eval()(ids).logits
        alone = PeftModel.from_pretrained(base, run / "adapted" / "adapter").eval()
        assert torch.allclose(alone(ids).logits, expected, atol=1e-4) and not torch.allclose(
            before, expected, atol=1e-4
        )
        assert torch.allclose(alone.merge_and_unload()(ids).logits, expected, atol=1e-4)


@contextlib.contextmanager
def served(folder, log):
    """`transformers serve` of a folder, on this machine; yields its address up to /v1."""
    if importlib.util.find_spec("openai") is None:
        pytest.skip("pip install 'transformers[serving]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    with open(log, "w") as out:
        server = subprocess.Popen(
            [*command, "--device", "cpu"], stdout=out, stderr=out, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
def test_transformers_serve_answers_with_a_finished_folder(finished, tmp_path):
    with served(finished, tmp_path / "log") as url:
        body = {"model": str(finished), "messages": dialogue(), "max_tokens": 20, "temperature": 0}
        request = urllib.request.Request(
            f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            assert json.load(reply)["choices"][0]["message"]["content"] == ROWS[0]["completion"]


@pytest.mark.slow
def test_transformers_serve_judges(recipe, write, tmp_path):
    """A model that always writes the same prefers a place: every pair is a tie, and the bias is seen."""
    folder = tmp_path / "constant"
    constant_model(folder, '{"ranks": {"A": 1, "B": 2, "C": 3}, "tags": {"A": ["inaccurate"]}}')
    with served(folder, tmp_path / "log") as url:
        rows, made = ranked(recipe, write, {"judge": {"endpoint": url, "model": str(folder), "name": "served"}})
    assert [(row["ranks"], row["tags"], row["labeller"]) for row in rows] == [([1, 1, 1], [[], [], []], "served")] * 4
    counts = made["metrics"]["judges"]["served"]
    assert counts["first_preferred"] == counts["orders_disagree"] == 1 and counts["replies_unparsed"] == 0
