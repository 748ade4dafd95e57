"""What is published of a finished stage tells nothing of the machine it was made on, nor of who worked there."""

import getpass
import json
import os
import socket
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipelines import files
from pipelines.chain.record import differences
from pipelines.commands import push
from pipelines.commands.run_here import run_and_report
from pipelines.errors import ModelError
from pipelines.files import portable
from pipelines.kinds import KINDS, LANGUAGE_MODEL
from pipelines.models import loading
from pipelines.models.config import ModelSection
from pipelines.recipe.recipe import load

FACTS = [(w, c) for w in "cat dog bird fish tree".split() for c in ("red", "green", "blue", "red")]
ROWS = {
    "text": [{"text": f"the {w} is {c} and the {c} {w} likes a {w}"} for w, c in FACTS * 3],
    "sft": [{"prompt": f"what colour is the {w}", "completion": f"the {w} is {c}"} for w, c in FACTS],
    "pairs": [{"prompt": f"what is {w} {i}", "chosen": c, "rejected": "eats"} for i, (w, c) in enumerate(FACTS)],
    "labelled": [{"text": f"the {w} is {c}", "label": int(c == "red")} for w, c in FACTS],
    "seq2seq": [{"source": f"{w} {c}", "target": f"{c} {w}"} for w, c in FACTS],
    "prompts": [{"prompt": f"what colour is the {w} {i}"} for i, (w, _) in enumerate(FACTS)],
}
BERT = {"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
BERT |= {"intermediate_size": 64, "max_position_embeddings": 32}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
LORA = {"use_peft": True, "lora_r": 2, "lora_dropout": 0.0}
PLANTED = {"HF_TOKEN": "hf_" + "Planted" * 5, "WANDB_API_KEY": "k" * 40, "SOME_SECRET": "correct-horse-battery"}


def many_e(prompts, completions, **columns):
    """A reward function."""
    return [float(c.count("e")) for c in completions]


def by_length(prompt, completions):
    """A labeller."""
    return [len(c) for c in completions], [[] for _ in completions]


def stages(base: str, write) -> dict[str, dict]:
    """One stage of every kind; with adapters on a folder, on another stage, and on the base that rewards share."""
    paths = {name: write(f"{name}.jsonl", rows) for name, rows in ROWS.items()}
    args = {"global_batch_size": 4, "max_steps": 2, "report_to": ["tensorboard"]}
    short, data = {**args, "max_length": 32}, lambda name: {"train": paths[name], "validation": 0.2}
    on = lambda name, **more: {"model_name_or_path": name, "chat_template": "plain", **more}
    sampled = {**args, "response_length": 4, "num_ppo_epochs": 1, "num_mini_batches": 1, "allow_no_eos": True}
    rewards = {"models": ["stage:reward"], "functions": ["tests.chain.test_published:many_e"], "min_accuracy": 0}
    return {
        "base": {
            "kind": "pretrain",
            "model": {"model_name_or_path": base},
            "data": data("text"),
            "args": {**short, "max_length": 16},
        },
        "words": {
            "kind": "mlm",
            "model": {"config": BERT},
            "tokenizer": {"train": "wordpiece", "vocab_size": 200},
            "data": data("text"),
            "args": short,
        },
        "sft": {"kind": "sft", "model": on(base, **LORA), "data": data("sft"), "args": short},
        "sft2": {"kind": "sft", "model": on("stage:base", **LORA), "data": data("sft"), "args": short},
        "reward": {"kind": "reward", "model": on("stage:sft", **LORA), "data": data("pairs"), "args": short},
        "dpo": {"kind": "dpo", "model": on("stage:sft", **LORA), "data": data("pairs"), "args": short},
        "kto": {"kind": "kto", "model": on("stage:sft", **LORA), "data": data("pairs"), "args": short},
        "classify": {
            "kind": "classify",
            "model": {"model_name_or_path": base, **LORA},
            "data": data("labelled"),
            "args": short,
        },
        "translate": {
            "kind": "seq2seq",
            "model": {"config": T5},
            "tokenizer": {"train": "bpe", "vocab_size": 360},
            "data": data("seq2seq"),
            "args": {**args, "max_source_length": 24, "max_target_length": 24},
        },
        "policy": {
            "kind": "ppo",
            "model": on("stage:sft", **LORA),
            "reward": {**rewards, "share_base": True},
            "data": {"train": paths["prompts"]},
            "args": sampled,
        },
        "samples": {
            "kind": "sample",
            "sample": {"models": ["stage:sft", "stage:policy"], "completions": 2, "response_length": 4},
            "data": {"train": paths["prompts"]},
        },
        "rankings": {
            "kind": "rank",
            "rank": {"labeller": "tests.chain.test_published:by_length"},
            "data": {"train": "stage:samples/samples.jsonl"},
        },
        "scores": {"kind": "evaluate", "evaluate": {"models": ["stage:base", "stage:sft"], "text": paths["text"]}},
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_gpt2):
    """A finished chain of all kinds, and words of the machine and the person that made it."""
    folder = tmp_path_factory.mktemp("published")

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / name)

    path = folder / "recipe.yaml"
    recipe = {"output_dir": str(folder / "out"), "stages": stages(str(tiny_gpt2), write)}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PLANTED.items():
            patch.setenv(name, value)
        patch.setenv("USER", "ada-of-the-lab")
        patch.setattr(socket, "gethostname", lambda: "machine-of-ada")
        loaded = load(path)
        run_and_report(loaded, [], [])
    words = [*PLANTED.values(), "ada-of-the-lab", "machine-of-ada", str(folder), str(tiny_gpt2), str(Path.cwd())]
    words += [str(Path.home()) + "/", str(Path(push.__file__).parents[2])]
    words += [word for word in (getpass.getuser(), os.uname().nodename) if len(word) > 4]  # `root` stands in many texts
    return loaded, words


def test_the_chain_has_every_kind(made):
    assert {stage.kind for stage in made[0].stages} == set(KINDS)


def test_no_file_of_a_finished_stage_holds_a_secret_or_a_place(made):
    loaded, words = made
    found = {}
    for path in [p for p in loaded.output_dir.rglob("*") if p.is_file()]:
        inside = path.relative_to(loaded.output_dir)
        if not inside.parts[0].startswith(".") and inside.parts[0] != files.CHAIN:  # what is not of one stage
            found[str(inside)] = [word for word in words if word.encode() in path.read_bytes() or word in str(inside)]
    assert any(name.startswith("policy/logs/events.out.tfevents.") for name in found)
    assert {"report.html", "sft/README.md", "sft/stage.json", "policy/critic/adapter/README.md"} <= found.keys()
    assert not any(found.values()), {name: wrong for name, wrong in found.items() if wrong}
    stage = json.loads((loaded["sft"].folder / "stage.json").read_text())
    message = f"{stage['stage']} ({stage['kind']}) of {stage['recipe']}"  # of `push`
    assert message == "sft (sft) of recipe.yaml"


def test_adapters_find_their_bases(made, tiny_gpt2):
    """Those on another stage wherever the run lies; of another folder only the name is published, and it is told."""
    loaded, _ = made
    adapter = lambda name: loaded.output_dir / name / "adapter"
    for name, base in (
        ("sft2", "base"),
        ("reward", "sft"),
        ("dpo", "sft"),
        ("policy", "sft"),
        ("policy/critic", "sft"),
    ):
        assert loading.adapter_base(str(adapter(name))) == str(loaded[base].folder), name
    with pytest.raises(ModelError, match="set base_model_name_or_path to where it lies here, or use the merged model"):
        loading.adapter_base(str(adapter("sft")))
    merged = load_file(loaded["sft2"].folder / "model.safetensors")
    model = loading.load_model(ModelSection(model_name_or_path=str(adapter("sft2"))), LANGUAGE_MODEL)
    ours = {name: weight for name, weight in model.state_dict().items() if name in merged}
    assert ours and all(torch.allclose(weight, merged[name]) for name, weight in ours.items())
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_gpt2), adapter("sft"))
    whole = AutoModelForCausalLM.from_pretrained(loaded["sft"].folder)
    ids = torch.tensor([[5, 9, 30, 7]])
    assert torch.allclose(theirs.eval()(ids).logits, whole.eval()(ids).logits, atol=1e-4)


def test_absolute_paths_are_short_and_told_apart():
    one, two = {"data": {"/a/x.jsonl": {"sha256": "1"}}}, {"data": {"/b/x.jsonl": {"sha256": "1"}}}
    assert list(portable(one)["data"])[0].startswith("…/x.jsonl (") and "/a/" not in json.dumps(portable(one))
    assert differences(one, portable(one)) == [] and differences(one, two)
    assert portable({"a": ["stage:x/y", "data/x.jsonl", "/", "a /b", 3]}) == {
        "a": ["stage:x/y", "data/x.jsonl", "/", "a /b", 3]
    }
