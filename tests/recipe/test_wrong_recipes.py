"""Wrong recipes by the hundred, made from right ones: none is accepted, none ends in a traceback or hangs.

A new key, kind or range is covered when it is there: the numbers come from the table of ranges, the keys from the
sections.
"""

import copy
import importlib
import json
import time
import typing

import pytest
import yaml

from pipelines import ranges
from pipelines.kinds import KINDS
from pipelines.recipe import recipe as recipe_recipe
from pipelines.recipe import schema
from pipelines.recipe.checks import SET_BY_CHAIN
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.stage import section_class

# What `check` does not find, and why. No recipe below is one of these.
FOUND_LATER = {
    "a data set of the hub that does not exist": "only models are asked for; `check` would have to download rows to read them",
    "a name of lm-eval's tasks that does not exist": "its index is thousands of files; task files (.yaml) are looked for",
    "rows that are too long for the model": "known when they are encoded: counted, or an error with file and row",
    "rows that an earlier stage writes": "they are checked when they are read",
    "special tokens of a new model's config that are not its tokenizer's": "the tokenizer is trained when the stage runs",
    "weights in a folder that do not fit its config": "no weights are read",
    "a reward model under another chat template": "templates are compared when both are loaded",
}

STAGE_MODULES = [importlib.import_module(kind.module or f"pipelines.stages.{name}") for name, kind in KINDS.items()]
ROWS = {
    "text": [{"text": f"the cat sees {i} red fish"} for i in range(40)],
    "sft": [{"prompt": f"what is {i}", "completion": "a fish"} for i in range(40)],
    "rankings": [{"prompt": f"what is {i}", "chosen": "a fish", "rejected": "a cat"} for i in range(40)],
    "unpaired": [{"prompt": f"what is {i}", "completion": "a fish", "label": i % 2 == 0} for i in range(40)],
    "prompts": [{"prompt": f"what is {i}"} for i in range(40)],
    "labelled": [{"text": f"text {i}", "label": i % 2} for i in range(40)],
    "seq2seq": [{"source": f"text {i}", "target": "a fish"} for i in range(40)],
    "samples": [{"prompt": f"what is {i}", "completions": ["a fish", "a cat"]} for i in range(40)],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_gpt2):
    """Paths by name: a file of rows of each shape, a language model, and what is wrong with others."""
    folder = tmp_path_factory.mktemp("files")
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "functions.py").write_text(
        "value = 3\ndef reward(prompts, completions, **columns): return [0.0 for _ in prompts]\n"
        "def short(prompts): return []\ndef judge(prompt, completion): return 1.0\ndef rank(prompt, completions): "
        "return [1, 2], [[], []]\n"
    )
    (folder / "labels_only.jsonl").write_text('{"label": 1}\n')
    (folder / "broken.jinja").write_text("{% for m in messages %}{{ m.content }")
    (folder / "no_answer.jinja").write_text("{{ messages[0].content }}")
    (folder / "broken.py").write_text("raise RuntimeError('this module is broken')\n")
    (folder / "empty").mkdir()
    for name, config in {
        "no_weights": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        "unknown": {"model_type": "gtp2"},
        "bert": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        "t5": {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        "scorer": {"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"], "num_labels": 1},
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        if name != "no_weights":
            (folder / name / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (folder / "bad_json").mkdir()
    (folder / "bad_json" / "config.json").write_text("{")
    (folder / "bad_json" / "model.safetensors").write_bytes(b"")
    return {"gpt2": str(tiny_gpt2), "folder": str(folder)} | {p.stem: str(p) for p in folder.iterdir()}


@pytest.fixture
def stages(files, monkeypatch):
    """A right recipe with a stage of each kind."""
    monkeypatch.syspath_prepend(files["folder"])
    new = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
    bert = {
        "model_type": "bert",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    t5 = {"model_type": "t5", "num_layers": 1, "d_model": 32, "num_heads": 2, "d_kv": 16, "d_ff": 64}
    short = {"max_steps": 2}

    def data(shape, **more):
        return {"train": files[shape], **more}

    return {
        "base": {
            "kind": "pretrain",
            "model": {"config": new},
            "tokenizer": {"train": "bpe", "vocab_size": 400},
            "data": data("text", validation=0.2),
            "args": {**short, "max_length": 16},
        },
        "encoder": {
            "kind": "mlm",
            "model": {"config": bert},
            "tokenizer": {"train": "wordpiece", "vocab_size": 300},
            "data": data("text", validation=0.2),
            "args": {**short, "max_length": 16},
        },
        "sft": {
            "kind": "sft",
            "model": {"model_name_or_path": files["gpt2"]},
            "data": data("sft", validation=0.2),
            "args": dict(short),
        },
        "reward": {
            "kind": "reward",
            "model": {"model_name_or_path": "stage:sft"},
            "data": data("rankings", validation=0.2),
            "args": dict(short),
        },
        "policy": {
            "kind": "ppo",
            "model": {"model_name_or_path": "stage:sft"},
            "reward": {"models": ["stage:reward"]},
            "data": data("prompts", validation=0.2),
            "args": {**short, "response_length": 8},
        },
        "preferred": {
            "kind": "dpo",
            "model": {"model_name_or_path": "stage:sft"},
            "data": data("rankings", validation=0.2),
            "args": dict(short),
        },
        "unpaired": {
            "kind": "kto",
            "model": {"model_name_or_path": "stage:sft"},
            "data": data("unpaired", validation=0.2),
            "args": dict(short),
        },
        "labels": {
            "kind": "classify",
            "model": {"model_name_or_path": "stage:encoder"},
            "data": data("labelled", validation=0.2),
            "args": dict(short),
        },
        "translate": {
            "kind": "seq2seq",
            "model": {"config": t5},
            "tokenizer": {"train": "bpe", "vocab_size": 400},
            "data": data("seq2seq", validation=0.2),
            "args": dict(short),
        },
        "samples": {"kind": "sample", "sample": {"models": ["stage:sft"]}, "data": data("prompts")},
        "ranks": {"kind": "rank", "rank": {"labeller": "functions:rank"}, "data": data("samples")},
        "scores": {"kind": "evaluate", "evaluate": {"models": ["stage:sft"], "text": files["text"]}},
    }


def verdict(path, text: str) -> str:
    """ "found", or what `check` did instead with this text of a recipe."""
    path.write_text(text)
    began = time.monotonic()
    try:
        recipe_recipe.load(path)
    except RecipeError as error:
        slow = time.monotonic() - began > 20
        lines = str(error).splitlines()
        return (
            "slow" if slow else "found" if len(lines) > 1 and "Traceback" not in str(error) else f"no sentence: {error}"
        )
    except BaseException as error:  # noqa: BLE001  any other error is what is looked for
        return f"{type(error).__name__}: {error}"
    return "accepted"


def alone(stages: dict, name: str) -> dict:
    """The stage `name` and those it builds on: checking fewer is faster."""
    needed, text = {name}, json.dumps(stages[name])
    for other in stages:
        if f"stage:{other}" in text:
            needed |= set(alone(stages, other))
    return {key: stages[key] for key in stages if key in needed}


def changed(stages: dict, name: str, path: tuple, value) -> dict:
    """The part of a recipe around the stage `name`, with `value` at `path` in it."""
    found = copy.deepcopy(alone(stages, name))
    here = found[name]
    for key in path[:-1]:
        here[key] = here.get(key) or {}
        here = here[key]
    here[path[-1]] = value
    return found


def numbers(field) -> bool:
    """Whether a key takes a number."""
    options = {part for option in schema._options(field.hint) for part in (option, *typing.get_args(option))}
    return bool(options & {int, float}) and bool not in schema._options(field.hint)


def outside(known: ranges.Range, whole: bool) -> list:
    """Numbers that a range does not hold."""
    step = 1 if whole else 0.5
    tried = [
        -(10**6),
        known.low - step,
        known.high + step,
        known.low if known.over else None,
        known.high if known.under else None,
        float("nan"),
        float("inf"),
        -float("inf"),
        10**400,
    ]
    finite = [int(n) if whole and n not in (None, float("inf"), -float("inf")) and n == n else n for n in tried]
    return [
        n for n in dict.fromkeys(finite) if n is not None and (isinstance(n, int) and n > 10**300 or n not in known)
    ]


def keys(stages: dict):
    """`(stage, section, field)` of every key of every section; one that many kinds have is taken from one of them."""
    found = {}
    for name, stage in stages.items():
        for section, target in KINDS[stage["kind"]].sections.items():
            for field in schema.fields(section_class(target)).values():
                found.setdefault((section, field.name), []).append((name, section, field))
    for i, alike in enumerate(found.values()):
        yield alike[i % len(alike)]


def bad_numbers(stages: dict):
    """Every numeric key of every section, with numbers out of its range."""
    for name, section, field in keys(stages):
        if not numbers(field) or field.name in SET_BY_CHAIN:
            continue
        known = ranges.RANGES.get(f"{section}.{field.name}") or ranges.RANGES.get(field.name, ranges.ANY)
        whole = int in schema._options(field.hint) and float not in schema._options(field.hint)
        tried = outside(known, whole)
        for value in [*tried[:2], *tried[-1:]]:
            if dict[str, float] in schema._options(field.hint):
                value = {"bad": value}
            elif list[float] in schema._options(field.hint):
                value = [value]
            yield name, (section, field.name), value


def wrong_types(stages: dict):
    """A mapping and a word where something else belongs, and sections that are none."""
    for name, stage in stages.items():
        for section in KINDS[stage["kind"]].sections:
            yield name, (section,), 7
            yield name, (section,), [1]
            yield name, (section, "no_such_key"), 1
    for i, (name, section, field) in enumerate(keys(stages)):
        options = schema._options(field.hint)
        if options and set(options) <= {int, float, bool, str, type(None)}:
            yield name, (section, field.name), "nonsense" if i % 2 and str not in options else {"a": [1]}


CONTRADICTIONS = [
    ("sft", {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "steps"}),
    ("sft", {"load_best_model_at_end": True, "eval_steps": 10, "save_steps": 15}),
    ("sft", {"load_best_model_at_end": True, "eval_strategy": "no"}),
    ("sft", {"load_best_model_at_end": True, "save_strategy": "no"}),
    ("sft", {"metric_for_best_model": "f1"}),
    ("sft", {"metric_for_best_model": "perplexity", "greater_is_better": True}),
    ("base", {"metric_for_best_model": "accuracy"}),
    ("encoder", {"metric_for_best_model": "perplexity"}),
    ("reward", {"metric_for_best_model": "score"}),
    ("policy", {"metric_for_best_model": "loss"}),
    ("labels", {"metric_for_best_model": "mse"}),
    ("translate", {"metric_for_best_model": "bleu"}),
    ("translate", {"metric_for_best_model": "chrf", "predict_with_generate": False}),
    ("labels", {"early_stopping_patience": 2, "eval_strategy": "no"}),
    ("sft", {"bf16": True, "fp16": True}),
    ("sft", {"bf16_full_eval": True, "fp16_full_eval": True}),
    ("sft", {"global_batch_size": 8, "gradient_accumulation_steps": 2}),
    ("sft", {"dataloader_prefetch_factor": 2}),
    ("sft", {"lr_scheduler_type": "cosine_with_min_lr"}),
    ("sft", {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"nonsense": 1}}),
    ("sft", {"optim_args": "nonsense=1"}),
    ("sft", {"optim": "adamw", "learning_rate": 1e-4}),
    ("sft", {"report_to": ["wandbb"]}),
    ("sft", {"debug": "nonsense"}),
    ("sft", {"accelerator_config": {"nonsense": 1}}),
    ("sft", {"accelerator_config": "no/such.json"}),
    ("sft", {"lr_scheduler_kwargs": "{not json"}),
    ("sft", {"logging_steps": 2.5}),
    ("sft", {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "no"}),
    ("sft", {"hub_token": "something"}),
    ("sft", {"hub_model_id": "me/mine"}),
    ("sft", {"push_to_hub": True}),
    ("sft", {"run_name": "hf_" + "a" * 34}),
    ("sft", {"packing_strategy": "wrapped"}),
    ("reward", {"tags": ["rude", "rude"]}),
    ("policy", {"kl_coef": 0, "kl_target": 3}),
    ("policy", {"num_mini_batches": 3}),
    ("policy", {"advantage": "rloo", "num_generations": 1}),
    ("policy", {"advantage": "grpo", "num_generations": 5}),
    ("policy", {"advantage": "grpo", "vf_coef": 0.5}),
    ("policy", {"advantage": "grpo", "normalize_advantages": True}),
    ("policy", {"advantage": "rloo", "lam": 0.9}),
    ("policy", {"advantage": "rloo", "loss_type": "dapo"}),
    ("policy", {"advantage": "reinforce", "critic_warmup_steps": 2}),
    ("policy", {"scale_rewards": "group"}),
    ("policy", {"advantage": "ppo"}),
    ("policy", {"ptx_coef": 0.5}),
    ("policy", {"ptx_length": 16}),
    ("policy", {"vllm_server_base_url": "http://localhost:8000"}),
    ("policy", {"use_vllm": True}),  # which is not installed
    ("policy", {"vllm_tensor_parallel_size": 2}),
    ("policy", {"vllm_enable_sleep_mode": True}),
    ("policy", {"use_vllm": True, "vllm_mode": "server", "vllm_enable_sleep_mode": True}),
    ("policy", {"use_vllm": True, "vllm_importance_sampling_clip_min": 4}),
    ("policy", {"use_liger_kernel": True, "neftune_noise_alpha": 5}),
    ("policy", {"best_kl_cap": 5}),
    ("encoder", {"max_length": 5}),
    ("sft", {"global_batch_size": 64}),  # more than there are rows
    ("reward", {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 8}),
]
WITHOUT_VALIDATION = [
    {"eval_strategy": "steps"},
    {"load_best_model_at_end": True},
    {"metric_for_best_model": "loss"},
    {"eval_on_start": True},
    {"do_eval": True},
    {"save_strategy": "best"},
    {"lr_scheduler_type": "reduce_lr_on_plateau"},
]


def references(files: dict):
    """Models, functions, files and stages that are not there, or are of the wrong kind."""
    model = ("model", "model_name_or_path")
    for path in (
        "stage:none",
        "stage:",
        "stage:labels",
        "stage:samples",
        "stage:reward",
        "./none",
        "/no/such",
        "~/none",
        "",
        "a b",
        files["empty"],
        files["no_weights"],
        files["unknown"],
        files["bad_json"],
        files["scorer"],
        files["bert"],
        files["t5"],
        files["sft"],
        7,
        ["gpt2"],
    ):
        yield "sft", model, path
    for path in ("stage:sft", files["gpt2"], files["t5"], files["unknown"]):
        yield "encoder", model, path
    yield "translate", model, "stage:sft"
    yield "translate", model, files["gpt2"]
    yield "labels", model, files["empty"]
    for models in (
        ["stage:sft"],
        [files["gpt2"]],
        [files["empty"]],
        ["./none"],
        ["stage:samples"],
        ["stage:none"],
        [7],
        "x",
        [],
    ):
        yield "policy", ("reward", "models"), models
    for critic in (
        "none",
        "stage:none",
        "stage:none/critic",
        "stage:sft/critic",
        files["gpt2"],
        files["empty"],
        "./none",
        "stage:samples",
    ):
        yield "policy", ("reward", "critic"), critic
    for function in (
        "functions",
        "functions:none",
        "functions:value",
        "functions:short",
        "broken:f",
        "no_such_module:f",
        "pipelines.none:f",
        "functions.py:reward",
        ":",
        "a:b:c",
        "",
    ):
        yield "policy", ("reward", "functions"), [function]
        yield "ranks", ("rank", "labeller"), function or ":"
    for judge in (
        *(5, [], "", [5], {}, "./none", "stage:sft", "functions:judge", files["gpt2"], files["empty"]),
        *(
            {"model": 5},
            {"modle": "x"},
            {"model": "stage:reward"},
            {"model": "./none"},
            {"endpoint": "x", "model": "m"},
        ),
        *({"endpoint": "http://x/v1"}, {"endpoint": "http://x/v1", "model": "m", "timeout": -1}, ["stage:none"]),
    ):
        yield "ranks", ("rank",), {"judge": judge}
    yield "scores", ("evaluate", "judge"), "functions:judge"  # without prompts
    yield "scores", ("evaluate", "oracle"), "functions:judge"  # without best_of
    yield "scores", ("evaluate", "best_of"), 4  # without prompts
    for section, name in (("sample", "samples"), ("evaluate", "scores")):
        for models in (
            ["stage:reward"],
            ["stage:samples"],
            ["./none"],
            [files["empty"]],
            [files["scorer"]],
            [files["bert"]],
            [],
            ["stage:sft", "stage:sft"],
            None,
        ):
            yield name, (section, "models"), models
    yield "policy", ("reward", "weights"), [1.0, 2.0]
    yield "policy", ("reward", "tag_penalties"), {"rude": 1.0}
    yield "policy", ("reward", "share_base"), True
    yield "policy", ("reward", "label"), 5
    for value in (
        "none.jsonl",
        "",
        5,
        True,
        [],
        [5],
        [[1]],
        {"name": "x"},
        {"path": 5},
        {"path": files["sft"], "weight": 0},
        {"path": files["sft"], "weight": 1e9},
        {"path": files["sft"], "rows": 0},
        {"path": files["sft"], "row": 1},
        {"path": files["sft"], "columns": {"prompt": "none"}},
        {"path": files["sft"], "sample_by": "page"},
        files["text"],
        "~/none.jsonl",
        "none/*.jsonl",
        "a b c",
        None,
        "0.5",
        {"path": files["sft"], "columns": [1]},
    ):
        yield "sft", ("data", "train"), value
    for value in (0.001, 0, 1, -0.5, 1.5, True, "0.05", "none.jsonl", [], {}, float("nan")):
        yield "sft", ("data", "validation"), value
    for key, value in (
        ("too_long", "cut"),
        ("streaming", "yes please"),
        ("columns", 5),
        ("columns", {"prompt": 5}),
        ("buffer_size", 5),
        ("streaming", True),
    ):
        yield "labels", ("data", key), value
    for key in ("text", "labelled", "pairs", "prompts", "rankings"):
        yield "scores", ("evaluate", key), "none.jsonl"
    yield "scores", ("evaluate", "text"), files["labels_only"]
    yield "scores", ("evaluate", "tasks"), ["none.yaml"]
    for key, value in (
        ("chat_template", "chatlm"),
        ("chat_template", "no/such.jinja"),
        ("chat_template", f"{files['folder']}/broken.jinja"),
        ("dtype", "fp8"),
        ("lora_r", 8),
        ("load_in_4bit", True),
        ("bnb_4bit_quant_type", "nf4"),
        ("tokenizer_name_or_path", "./none"),
        ("tokenizer_name_or_path", files["empty"]),
        ("config", 5),
        ("attn_implementation", "flash_attention_3"),
    ):
        yield "sft", ("model", key), value
    for key, value in (("train", "bp"), ("train", None), ("train", "wordpiece"), ("vocab_size", 250)):
        yield "base", ("tokenizer", key), value
    for key, value in (
        ("problem_type", "regresion"),
        ("labels", ["a"]),
        ("labels", ["a", "a"]),
        ("class_weights", "even"),
    ):
        yield "labels", ("task", key), value
    yield "translate", ("task", "metrics"), ["blue"]
    for key in ("kind",):
        for value in ("sftt", None, 5, ["sft"], {"sft": 1}, True):
            yield "sft", (key,), value


NEW_MODELS = [
    {"n_layer": 0},
    {"n_layer": -1},
    {"n_head": 3},
    {"n_head": 0},
    {"n_embd": 0},
    {"n_embd": -32},
    {"n_embd": 31},
    {"n_positions": 0},
    {"vocab_size": -1},
    {"vocab_size": 0},
    {"resid_pdrop": 2},
    {"attn_pdrop": -0.1},
    {"embd_pdrop": 1},
    {"layer_norm_epsilon": 0},
    {"initializer_range": -1},
    {"n_layers": 2},
    {"activation_function": "none"},
    {"n_embd": "wide"},
    {"n_layer": 1.5},
    {"model_type": "gtp2"},
    {"model_type": None},
    {"model_type": ["gpt2"]},
    {"model_type": "bert"},
    {"model_type": "t5"},
    {"n_embd": float("nan")},
    {"n_inner": -4},
    {"num_hidden_layers": 0},
    {"hidden_size": 0},
]
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
NEW_LLAMAS = [
    {"num_key_value_heads": 3},
    {"num_attention_heads": 5},
    {"hidden_act": "none"},
    {"num_hidden_layers": 0},
    {"intermediate_size": 0},
    {"num_key_value_heads": 0},
    {"rms_norm_eps": 0},
    {"attention_dropout": 3},
]

TEXTS = [
    "",
    "a: [",
    "- 1\n",
    "stages",
    "stages: 5",
    "stages: []",
    "stages: {}",
    "stages: {a: 5}",
    "stages: {a: }",
    "stages: {a: []}",
    "stages: {1: {kind: sft}}",
    "stages: {no: {kind: sft}}",
    "stages: {a b: {kind: sft}}",
    "stages: {../a: {kind: sft}}",
    "stages: {a: {kind: sft}, a: {kind: sft}}",
    "? [a]\n: b",
    "? {a: b}\n: c",
    "null: 1",
    "a: &a [*a]",
    "stages: &a {b: *a}",
    "stages: " + "[" * 5000,
    "stages: " + "{a: " * 60 + "}" * 60,
    "a: 2024-13-45",
    "a: !!int x",
    "a: !!python/object:os.system x",
    "a: !!bool maybe",
    "a: *none",
    "a: 1\n---\nb: 2",
    "a: \x00",
    'output_dir: "a\\0b"',
    "x: {<<: 5}",
    "a: " + "9" * 5000,
    "\ta: 1",
    "a: b: c",
    "a: !foo x",
    "output_dir: ''",
    "output_dir: '  '",
    "output_dir: 5",
    "output_dir: ~",
    "output_dir: [a]",
    "seed: x",
    "seed: -1",
    "seed: 1.5",
    "seed: true",
    "seed: 4294967296",
    "seed: 1e400",
    "seeds: 1",
    "stages: {a: {kind: sft, kind: ppo}}",
    "stages: {a: {kind: sft, args: {<<: {max_steps: 0}}}}",
    "stages: {a: {}}",
    "!!set {a, b}",
    "stages: !!set {a, b}",
    "7",
    "''",
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)),
    "output_dir: https://me:pass-word@host/x",
    "x: ghp_" + "a" * 36,
    "stages: {a: {kind: sft, token: abc}}",
]


def recipes(stages: dict, files: dict):
    """`(name, text of a wrong recipe)`, each wrong in one way."""
    for make in (bad_numbers, wrong_types):
        for name, path, value in make(stages):
            yield f"{name}.{'.'.join(path)}={str(value)[:20]}", changed(stages, name, path, value)
    for name, args in CONTRADICTIONS:
        both = {**stages[name]["args"], **args}
        yield f"{name}.args={args}", changed(stages, name, ("args",), both)
    for name in ("base", "encoder", "sft", "reward", "policy", "labels", "translate"):
        for args in WITHOUT_VALIDATION:
            found = changed(stages, name, ("args",), {**stages[name]["args"], **args})
            del found[name]["data"]["validation"]
            yield f"{name} without validation, {args}", found
        yield f"{name} without data", {key: value for key, value in changed(stages, name, ("data",), None).items()}
    for name, path, value in references(files):
        every = name in ("sft", "policy", "samples", "scores") and isinstance(value, (str, list))
        around = changed(stages, name, path, value)
        if every and "stage:" in str(value):  # what is named must come first
            around = {key: copy.deepcopy(stages[key]) for key in stages if key != name} | {name: around[name]}
            for other in list(around):
                if other != name and f"stage:{name}" in json.dumps(around[other]):
                    around[other] = json.loads(json.dumps(around[other]).replace(f"stage:{name}", files["gpt2"]))
        yield f"{name}.{'.'.join(path)}={str(value)[-30:]}", around
    for change in NEW_MODELS:
        yield (
            f"new gpt2 {change}",
            changed(stages, "base", ("model", "config"), stages["base"]["model"]["config"] | change),
        )
    for change in NEW_LLAMAS:
        yield f"new llama {change}", changed(stages, "base", ("model", "config"), LLAMA | change)


def test_the_recipe_that_wrong_ones_are_made_from_is_right(stages, tmp_path):
    assert (
        verdict(tmp_path / "r.yaml", yaml.safe_dump({"output_dir": str(tmp_path), "stages": stages}, sort_keys=False))
        == "accepted"
    )


def test_every_number_has_a_range():
    """A numeric key of any section, new ones of TRL and transformers included, is in the table of ranges or set by the
    chain.
    """
    fields = [
        f for kind in KINDS.values() for t in kind.sections.values() for f in schema.fields(section_class(t)).values()
    ]
    named = {f.name for f in fields if numbers(f)} - SET_BY_CHAIN.keys()
    refused = {key for stage in STAGE_MODULES for key in getattr(stage, "NOT_HERE", ())}
    missing = named - refused - {key.rpartition(".")[2] for key in ranges.RANGES}
    assert missing == set(), "give each a row in pipelines/ranges.py"


def test_no_wrong_recipe_is_accepted_and_none_crashes(stages, files, tmp_path):
    found = {}
    for name, body in recipes(stages, files):
        text = yaml.safe_dump({"output_dir": str(tmp_path / "out"), "stages": body}, sort_keys=False)
        found[name] = verdict(tmp_path / "r.yaml", text)
    for text in TEXTS:
        found[f"text {text[:40]!r}"] = verdict(tmp_path / "r.yaml", text)
    assert len(found) >= 350
    wrong = {name: what for name, what in found.items() if what != "found"}
    assert wrong == {}, f"{len(wrong)} of {len(found)}: " + "\n".join(f"{k}: {v}" for k, v in wrong.items())
