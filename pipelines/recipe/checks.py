"""The rules that a recipe must keep: keys, types, references, models, packages, and what each stage adds."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from pipelines import errors
from pipelines.kinds import KINDS, of_kind
from pipelines.models import hub
from pipelines.recipe import data_checks, schema
from pipelines.recipe.problems import Problem
from pipelines.recipe.stage import Recipe, Stage, references, section_class

TOP_KEYS = {"output_dir", "seed", "stages"}

# Keys that the chain sets itself, and keys that transformers 5 dropped: what to write instead.
SET_BY_CHAIN = {
    "output_dir": "set the recipe's top-level `output_dir`; each stage gets a folder in it",
    "resume_from_checkpoint": "an interrupted stage resumes by itself: run the same command again",
    "seed": "set the recipe's top-level `seed`",
    "deepspeed": "hardware is Accelerate's: use `accelerate launch --config_file accelerate_configs/zero2.yaml`",
    "fsdp": "hardware is Accelerate's: use `accelerate launch --config_file accelerate_configs/fsdp2.yaml`",
    "fsdp_config": "hardware is Accelerate's: use `accelerate launch --config_file accelerate_configs/fsdp2.yaml`",
    "push_to_hub": "a stage never uploads while it trains; upload its folder when it is finished",
    "dataset_kwargs": "rows are prepared by the stage from the recipe's `data:` section",
    "chat_template_path": "set `chat_template` in the stage's `model:` section",
    "remove_unused_columns": "columns are chosen by the stage; map them with `data.columns`",
}
REMOVED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps with a value below 1 (a share of all steps)",
    "no_cuda": "use_cpu",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "half_precision_backend": "bf16 or fp16 alone",
    "save_safetensors": "nothing: safetensors is always used",
    "overwrite_output_dir": "--redo STAGE on the command line",
    "logging_dir": "nothing: logs lie beside the stage's checkpoints",
    "tokenizer": "model.tokenizer_name_or_path",
    "max_seq_length": "max_length",
    "torch_dtype": "model.dtype",
}
HUB_ID = r"[\w.-]+(/[\w.-]+)?"
TEMPLATES = ("chatml", "plain")  # chat templates that are there by name; any other is a path
LORA = ("use_peft", "lora_", "use_rslora", "use_dora", "load_in_4bit", "load_in_8bit")  # quantized only under adapters
BITS4 = ("bnb_", "use_bnb_")


def check_recipe(file: Path, tree: dict, problems: list[Problem], read_data: bool) -> Recipe:
    def bad(path, message, value=None):
        problems.append(Problem(path, message, value))

    for key in set(tree) - TOP_KEYS:
        bad(key, f"unknown key{errors.meant(key, TOP_KEYS)}; a recipe has {', '.join(sorted(TOP_KEYS))}")
    output = tree.get("output_dir", f"runs/{file.stem}")
    if not isinstance(output, str):
        bad("output_dir", "must be a folder name", output)
        output = "runs"
    seed = tree.get("seed", 42)
    if not isinstance(seed, int) or isinstance(seed, bool):
        bad("seed", "must be a whole number", seed)
        seed = 42
    recipe = Recipe(file, Path(output), seed)
    stages = tree.get("stages")
    if not isinstance(stages, dict) or not stages:
        bad("stages", "a recipe needs `stages:`, a mapping of stage names to stages")
        return recipe
    kinds: dict[str, str] = {}
    for name, body in stages.items():
        stage = _check_stage(recipe, str(name), body, kinds, bad, read_data)
        kinds[str(name)] = stage.kind if stage else "?"
        if stage:
            recipe.stages.append(stage)
    return recipe


def _check_stage(recipe, name, body, kinds, bad, read_data) -> Stage | None:
    at = f"stages.{name}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        bad(at, "a stage is named with letters, digits, - and _: its folder gets the same name")
    if not isinstance(body, dict):
        bad(at, "a stage is a mapping with `kind` and its sections", body)
        return None
    kind = body.get("kind")
    if kind not in KINDS:
        bad(f"{at}.kind", f"must be one of {', '.join(KINDS)}{errors.meant(kind, KINDS)}", kind)
        return None
    spec = KINDS[kind]
    sections: dict[str, dict] = {}
    for key, section in body.items():
        if key == "kind":
            continue
        if key not in spec.sections:
            bad(f"{at}.{key}", f"unknown section{errors.meant(key, spec.sections)}; "
                f"{kind} has {', '.join(spec.sections)}")  # fmt: skip
        elif section is not None and not isinstance(section, dict):
            bad(f"{at}.{key}", "must be a mapping of keys to values", section)
        else:
            sections[key] = _check_section(f"{at}.{key}", section_class(spec.sections[key]), section or {}, bad)
    for reference in references(sections):
        if reference not in kinds:
            bad(at, f"`stage:{reference}` names no earlier stage{errors.meant(reference, kinds)}")
    parents = list(dict.fromkeys(references(sections)))
    earlier = {stage.name: stage for stage in recipe.stages}
    stage = Stage(name, kind, recipe.output_dir / name, sections, recipe.seed, parents, str(recipe.file), earlier)
    if "model" in spec.sections:
        _check_model(at, kind, sections.get("model", {}), bad)
        _check_installed(at, sections.get("model", {}), sections.get("args", {}), bad)
        base = str(sections.get("model", {}).get("model_name_or_path"))
        if base.startswith("stage:") and (made := kinds.get(base.removeprefix("stage:"))) in of_kind(
            leaves_model=False
        ):
            bad(f"{at}.model.model_name_or_path", f"that stage is of kind {made} and leaves no model", base)
    args = sections.get("args", {})
    if args.get("global_batch_size") and args.get("gradient_accumulation_steps"):
        message = "follows from global_batch_size and the number of processes: give one of the two"
        bad(f"{at}.args.gradient_accumulation_steps", message, args["gradient_accumulation_steps"])
    for path, message, value in stage.module.problems(stage, kinds):
        bad(f"{at}.{path}", message, value)
    if "data" in spec.sections:
        rows = data_checks.problems(sections.get("data", {}), spec.rows, sections.get("task"), read_data)
        for path, message, value in rows:
            bad(f"{at}.data{'.' if path and path[0] != '[' else ''}{path}", message, value)
        for path, message, value in data_checks.streaming_problems(kind, sections):
            bad(f"{at}.{path}", message, value)
    return stage


def _check_section(at: str, target: type, section: dict, bad) -> dict:
    known, out = schema.fields(target), {}
    for key, value in section.items():
        path = f"{at}.{key}"
        if at.endswith(".args") and key in SET_BY_CHAIN:
            bad(path, f"not for a recipe: {SET_BY_CHAIN[key]}", value)
        elif key not in known and key in REMOVED:
            bad(path, f"transformers 5 has no such key; use {REMOVED[key]}", value)
        elif key not in known:
            bad(path, f"unknown key{errors.meant(key, known)}", value)
        elif references(value):
            out[key] = value
        else:
            out[key], wrong = schema.check_value(known[key], value)
            if wrong:
                bad(path, wrong, value)
    return out


def _check_model(at: str, kind: str, model: dict, bad) -> None:
    path, config = model.get("model_name_or_path"), model.get("config")
    if path is None and config is None:
        bad(
            f"{at}.model", "needs `model_name_or_path` (a hub id, a folder or stage:NAME) or, for a new model, `config`"
        )
    if isinstance(path, str):
        _check_folder(f"{at}.model.model_name_or_path", path, bad)
    template = model.get("chat_template")
    if isinstance(template, str) and template not in TEMPLATES and not Path(template).is_file():
        bad(f"{at}.model.chat_template", f"is neither {' nor '.join(TEMPLATES)} nor a file"
            f"{errors.meant(template, TEMPLATES)}; paths count from where the command is given", template)  # fmt: skip
    for key in model:
        if key.startswith((*LORA, *BITS4)) and not KINDS[kind].adapters:
            message = f"adapters are for {', '.join(of_kind(adapters=True))}; this stage trains all weights"
            bad(f"{at}.model.{key}", message, model[key])
        elif key.startswith(LORA) and not model.get("use_peft"):
            bad(f"{at}.model.{key}", "is used only with `use_peft: true`", model[key])
        elif key.startswith(BITS4) and not model.get("load_in_4bit"):
            bad(f"{at}.model.{key}", "is used only with `load_in_4bit: true`", model[key])
    if model.get("load_in_4bit") and model.get("load_in_8bit"):
        bad(f"{at}.model.load_in_8bit", "and load_in_4bit cannot both be true: keep one", True)
    if isinstance(config, dict) and path is None:
        architecture = config.get("model_type")
        keys, types = schema.model_config_keys(str(architecture))
        if architecture is None:
            bad(f"{at}.model.config.model_type", "a new model needs `model_type`, e.g. gpt2, llama, bert, t5")
        elif not keys:
            bad(
                f"{at}.model.config.model_type",
                f"transformers knows no such model{errors.meant(architecture, types)}",
                architecture,
            )
        else:
            for key in set(config) - keys - {"model_type"}:
                bad(
                    f"{at}.model.config.{key}",
                    f"unknown key of {architecture}'s config{errors.meant(key, keys)}",
                    config[key],
                )


BNB = "pip install -e '.[quantization]'"
OPTIMIZERS = (  # names of optimizers, the module that they need and where it comes from; the others need none
    ("torch_(8|4)bit", "torchao", "pip install torchao"),
    ("galore", "galore_torch", "pip install git+https://github.com/jiaweizzhao/GaLore"),
    ("lomo", "lomo_optim", "pip install lomo-optim"),
    ("grokadamw", "grokadamw", "pip install grokadamw"),
    ("schedule_free", "schedulefree", "pip install schedulefree"),
    ("apollo", "apollo_torch", "pip install git+https://github.com/zhuhanqing/APOLLO"),
    ("stable_adamw", "optimi", "pip install torch-optimi"),
    ("anyprecision", "torchdistx", "take adamw_torch_fused"),
    ("xla", "torch_xla", "it is for TPUs"),
    ("npu", "torch_npu", "it is for Ascend NPUs"),
    ("bnb|8bit|paged|lion|ademamix", "bitsandbytes", BNB),
)


def _check_installed(at: str, model: dict, args: dict, bad) -> None:
    """What a setting needs must be installed: found out here, not after the stages before it have run."""
    installed = importlib.util.find_spec
    quantized = next((key for key in ("load_in_4bit", "load_in_8bit") if model.get(key)), None)
    if quantized and not installed("bitsandbytes"):
        bad(f"{at}.model.{quantized}", f"needs bitsandbytes: {BNB}", True)
    optimizer = str(args.get("optim", ""))
    needed = next(((m, how) for pattern, m, how in OPTIMIZERS if re.search(pattern, optimizer)), None)
    if needed and not installed(needed[0]):
        bad(f"{at}.args.optim", f"needs {needed[0]}: {needed[1]}", optimizer)
    attention = model.get("attn_implementation") or ""
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(attention)
    package = (
        "kernels" if "/" in attention else package
    )  # `kernels` downloads attention from the hub, flash attention too
    if package and not installed(package) and not installed("kernels"):
        bad(f"{at}.model.attn_implementation", f"needs the package {package}; drop the key (packed batches need no flash"
            " attention)", attention)  # fmt: skip
    if args.get("use_liger_kernel") and not installed("liger_kernel"):
        bad(f"{at}.args.use_liger_kernel", "needs the package liger-kernel; drop the key (the loss is fused without it)",
            True)  # fmt: skip


def _check_folder(at: str, path: str, bad) -> None:
    """A local folder must hold a model; what is no folder must look like a hub id."""
    if path.startswith("stage:"):
        return
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
            bad(at, "this folder holds no model (no config.json)", path)
    elif path.startswith(("/", ".", "~")) or not re.fullmatch(HUB_ID, path):
        bad(at, "no such folder, and not a hub id (name or owner/name) either", path)


def check_hub(stage: Stage, problems: list[Problem]) -> None:
    """Hub ids of models that are neither cached nor can be downloaded."""

    model, reward = stage.sections.get("model", {}), stage.sections.get("reward", {})
    asked = [("model.model_name_or_path", model.get("model_name_or_path"), "config.json")]
    asked += [("model.tokenizer_name_or_path", model.get("tokenizer_name_or_path"), "tokenizer_config.json")]
    asked += [(f"reward.models[{i}]", path, "config.json") for i, path in enumerate(reward.get("models") or [])]
    critic = None if reward.get("critic") == "shared" else reward.get("critic")
    asked += [("reward.critic", critic, "config.json")]
    for key, path, file in asked:
        if not isinstance(path, str) or path.startswith("stage:") or Path(path).expanduser().is_dir():
            continue
        if not re.fullmatch(HUB_ID, path):
            continue  # said already
        revision = model.get("model_revision", "main") if key == "model.model_name_or_path" else "main"
        reason = hub.unreachable(path, revision, file)
        if reason:
            problems.append(Problem(f"stages.{stage.name}.{key}", reason, path))
