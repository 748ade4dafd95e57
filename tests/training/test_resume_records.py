"""What stage.json and the history tell of a run does not depend on how often it was stopped: field by field, every
kind.
"""

import json
import random

import pytest
from safetensors.torch import load_file

from pipelines import launch
from pipelines.chain import chain
from pipelines.recipe.recipe import load
from pipelines.training import loop, saving

WORDS, COLOURS = "cat dog bird fish tree".split(), "red green blue".split()
TIMES = ("seconds", "runtime", "_per_second", "started", "finished", "tokens_per_second", "created")
ARGS = {
    "global_batch_size": 8,
    "max_steps": 12,
    "save_steps": 4,
    "eval_steps": 4,
    "logging_steps": 3,
    "report_to": [],
    "learning_rate": 1e-3,
}


class Killed(BaseException):
    """What no handler catches: the nearest to a kill that one process can show."""


def count_of_the(prompts, completions, **columns):
    """A reward function."""
    return [float(c.count("e")) + len(p) / 50 for p, c in zip(prompts, completions)]


def rows():
    rng = random.Random(0)
    facts = [(rng.choice(WORDS), rng.choice(COLOURS)) for _ in range(80)]
    return {
        "text": [{"text": f"the {w} is {c} and the {c} {w} likes a {w}"} for w, c in facts],
        "sft": [{"prompt": f"what colour is the {w}", "completion": f"the {w} is {c}"} for w, c in facts],
        "pairs": [
            {"prompt": f"what is {w} {i}", "chosen": f"{w} is {c}", "rejected": f"{c} eats"}
            for i, (w, c) in enumerate(facts)
        ],
        "labelled": [{"text": f"the {w} is {c}", "label": int(c == "red")} for w, c in facts],
        "seq2seq": [{"source": f"{w} {c}", "target": f"{c} {w}"} for w, c in facts],
        "prompts": [{"prompt": f"what colour is the {w} {i}"} for i, (w, _) in enumerate(facts[:24])],
    }


T5 = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.1}
BERT = {
    "model_type": "bert",
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
LORA = {"use_peft": True, "lora_r": 4}
BEST = {"load_best_model_at_end": True, "learning_rate": 3e-2}
CASES = {  # kind, rows, model (None: tiny GPT-2), other sections, arguments
    "pretrain": ("pretrain", "text", {}, {}, {"max_length": 16}),
    "pretrain_stream": (
        "pretrain",
        "text",
        {},
        {"data": {"streaming": True, "buffer_size": 16, "validation": None}},
        {"max_length": 16, "eval_strategy": "no", "include_num_input_tokens_seen": "all"},
    ),
    "mlm": (
        "mlm",
        "text",
        {"model_name_or_path": None, "config": BERT},
        {"tokenizer": {"train": "wordpiece", "vocab_size": 200}},
        {"max_length": 32},
    ),
    "sft": ("sft", "sft", {"chat_template": "plain"}, {}, {"max_length": 32}),
    "sft_packed": ("sft", "sft", {"chat_template": "plain"}, {}, {"max_length": 32, "packing": True, "max_steps": 9}),
    "sft_lora": ("sft", "sft", {"chat_template": "plain", **LORA}, {}, {"max_length": 32}),
    "sft_best": ("sft", "sft", {"chat_template": "plain"}, {}, {"max_length": 32, **BEST}),
    "reward": ("reward", "pairs", {"chat_template": "plain"}, {}, {"max_length": 32}),
    "dpo": ("dpo", "pairs", {"chat_template": "plain"}, {}, {"max_length": 32}),
    "kto": ("kto", "pairs", {"chat_template": "plain"}, {}, {"max_length": 32, **BEST}),
    "classify": ("classify", "labelled", {}, {}, {"max_length": 32}),
    "seq2seq": (
        "seq2seq",
        "seq2seq",
        {"model_name_or_path": None, "config": T5},
        {"tokenizer": {"train": "bpe", "vocab_size": 360}},
        {"max_source_length": 24, "max_target_length": 24},
    ),
    "ppo": (
        "ppo",
        "prompts",
        {"chat_template": "plain"},
        {"reward": {"functions": ["tests.training.test_resume_records:count_of_the"]}},
        {
            "max_steps": 8,
            "response_length": 6,
            "num_ppo_epochs": 1,
            "num_mini_batches": 2,
            "kl_target": 0.5,
            "kl_horizon": 100,
            "normalize_scores": True,
            "allow_no_eos": True,
        },
    ),
}


@pytest.fixture
def stage_of(recipe, write, tiny_gpt2):
    """`stage_of(case, name)` loads a recipe of one stage with a folder of its own."""

    def stage_of_(case, name):
        kind, of, model, sections, args = CASES[case]
        model = {"model_name_or_path": str(tiny_gpt2), **model}
        data = {"train": write(f"{of}.jsonl", rows()[of]), "validation": 0.2, **sections.get("data", {})}
        stage = {"kind": kind, "model": {k: v for k, v in model.items() if v is not None}, **sections}
        stage |= {"data": {k: v for k, v in data.items() if v is not None}, "args": {**ARGS, **args}}
        return load(
            recipe({"s": stage}, name=f"{name}.yaml", output_dir=str(write(f"{name}/x", "")).removesuffix("/x"))
        )

    return stage_of_


def killed(loaded, monkeypatch, what: str, owner, step: int) -> None:
    """Run until `owner.what` is called at (or after) `step`, and no further."""
    real = getattr(owner, what)

    def function(*args, **kwargs):
        state = args[2] if owner is loop.Progress else args[0].state
        if state.global_step >= step:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, what, function)
        with pytest.raises(Killed):
            chain.run(loaded)
    launch.reset()


def timeless(value, at=""):
    """A record without its times and rates; nan is nan."""
    if isinstance(value, dict):
        return {k: timeless(v, k) for k, v in value.items() if not any(t in k for t in TIMES)}
    if isinstance(value, list):
        return [timeless(v) for v in value]
    return repr(value) if isinstance(value, float) else value


def told(loaded):
    folder = loaded["s"].folder
    record = json.loads((folder / "stage.json").read_text())
    history = [json.loads(line) for line in open(folder / "history.jsonl")]
    return record, history


@pytest.mark.parametrize("case", CASES)
def test_records_and_weights_are_those_of_a_run_that_was_never_stopped(case, stage_of, monkeypatch):
    once, often = stage_of(case, "once"), stage_of(case, "often")
    chain.run(once)
    steps = CASES[case][4].get("max_steps", ARGS["max_steps"])
    killed(often, monkeypatch, "on_step_end", loop.Progress, 7)  # between two checkpoints and two log entries
    killed(often, monkeypatch, "save", saving, 0)  # trained to the end, not written
    chain.run(often)
    (record, history), (record_, history_) = told(once), told(often)
    for of in (record, record_):
        for key in ("output_dir", "logging_dir", "run_name", "eval_on_start"):
            of["args"].pop(key, None)
        of.pop("recipe")
        of.pop("files", None)
        of.pop("checksum", None)
    assert timeless(history_) == timeless(history)
    assert timeless(record_) == timeless(record)
    for name in ("model.safetensors", "critic/model.safetensors"):
        if (once["s"].folder / name).exists():
            a, b = load_file(once["s"].folder / name), load_file(often["s"].folder / name)
            assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a), name
    if "train_samples_per_second" in record["metrics"]:  # of the whole run, not of its last part
        end = next(e for e in reversed(history_) if "train_runtime" in e)
        samples = end["train_samples_per_second"] * end["train_runtime"]
        assert samples == pytest.approx(ARGS["global_batch_size"] * steps, rel=0.02)
