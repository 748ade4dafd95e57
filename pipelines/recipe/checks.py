"""The rules that a recipe must keep: keys, types, ranges, references, models, packages, and what each stage adds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from transformers.integrations import integration_utils

from pipelines import errors, ranges
from pipelines.kinds import KINDS
from pipelines.recipe import data_checks, model_checks, schema
from pipelines.recipe.problems import SECRET, SECRET_KEYS, Problem
from pipelines.recipe.stage import Recipe, Stage, references, section_class
from pipelines.training import arguments, best_checkpoint

NAME = 255  # bytes that a file system allows
TOP_KEYS = {"output_dir", "seed", "stages"}

# Keys that the chain sets itself, and keys that transformers 5 dropped: what to write instead.
SET_BY_CHAIN = {
    "output_dir": "set the recipe's top-level `output_dir`; each stage gets a folder in it",
    "resume_from_checkpoint": "an interrupted stage resumes by itself: run the same command again",
    "seed": "set the recipe's top-level `seed`",
    "data_seed": "set the recipe's top-level `seed`",
    "local_rank": "the launcher sets it: `accelerate launch` or torchrun",
    "deepspeed": "hardware is Accelerate's: use `accelerate launch --config_file accelerate_configs/zero2.yaml`",
    "fsdp": "hardware is Accelerate's: use `accelerate launch --config_file accelerate_configs/fsdp2.yaml`",
    "fsdp_config": "hardware is Accelerate's: use `accelerate launch --config_file accelerate_configs/fsdp2.yaml`",
    "push_to_hub": "a stage never uploads while it trains; upload it when it is finished: `pipelines push`",
    "dataset_kwargs": "rows are prepared by the stage from the recipe's `data:` section",
    "chat_template_path": "set `chat_template` in the stage's `model:` section",
    "remove_unused_columns": "columns are chosen by the stage; map them with `data.columns`",
}
HUB = (
    "a stage never uploads while it trains; log in once with `hf auth login`, and upload a finished stage with "
    "`pipelines push`"
)
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
LOGIN = (
    "do not write it into a recipe, which is copied into every result: log in with `hf auth login` (or set HF_TOKEN)"
)


def check_recipe(file: Path, tree: dict, problems: list[Problem], read_data: bool) -> Recipe:
    """The recipe in `tree`; whatever is wrong with it is added to `problems`."""

    def bad(path, message, value=None):
        problems.append(Problem(path, message, value))

    for key in sorted(tree.keys() - TOP_KEYS):
        bad(key, f"unknown key{errors.meant(key, TOP_KEYS)}; a recipe has {', '.join(sorted(TOP_KEYS))}")
    for path, message in _secrets(tree, ""):
        bad(path, message)
    output = tree.get("output_dir", f"runs/{file.stem}")
    if wrong := _no_folder(output):
        bad("output_dir", wrong, output)
        output = "runs"
    seed = tree.get("seed", 42)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed not in ranges.SEED:
        bad("seed", f"must be a whole number, {ranges.SEED}", seed)
        seed = 42
    recipe = Recipe(file, Path(os.path.expanduser(output)), seed)
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


def _no_folder(output) -> str | None:
    """Why a run cannot have this `output_dir`; None where it can."""
    if not isinstance(output, str) or not output.strip() or "\0" in output:
        return "must name a folder (a folder of that name in your home: ~/NAME)"
    path = os.path.expanduser(output)
    if path.startswith("~"):
        return f"this machine has no home folder {path.split('/')[0]} (a folder of that name: ./{output})"
    if any(len(os.fsencode(part)) > NAME for part in Path(path).parts):
        return f"a folder's name has at most {NAME} bytes"
    for above in (path, *map(str, Path(path).parents)):
        if os.path.lexists(above):
            return None if os.path.isdir(above) else f"{above} is {_what(above)}: name a folder"
    return None


def _what(path: str) -> str:
    return "a file" if os.path.exists(path) else "a link to what is not there"


def _check_stage(recipe, name, body, kinds, bad, read_data) -> Stage | None:
    at = f"stages.{name}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", name):
        bad(at, "a stage is named with at most 100 letters, digits, - and _: its folder gets the same name")
    if not isinstance(body, dict):
        bad(at, "a stage is a mapping with `kind` and its sections", body)
        return None
    kind = body.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        bad(f"{at}.kind", f"must be one of {', '.join(KINDS)}{errors.meant(kind, KINDS)}", kind)
        return None
    spec = KINDS[kind]
    found: list[str] = []  # what was found below the stage, so that nothing is reported twice

    def note(path, message, value=None):
        beside = any(path == other or other.startswith(f"{path}.") for other in found)
        if value is not None or not beside:  # a key that is wrong is not also missing
            found.append(path)
            bad(f"{at}.{path}" if path else at, message, value)

    sections: dict[str, dict] = {}
    for key, section in body.items():
        if key == "kind":
            continue
        if key not in spec.sections:
            note(key, f"unknown section{errors.meant(key, spec.sections)}; {kind} has {', '.join(spec.sections)}")
        elif section is not None and not isinstance(section, dict):
            note(key, "must be a mapping of keys to values", section)
        else:
            sections[key] = _check_section(key, section_class(spec.sections[key]), section or {}, note)
    parents = list(dict.fromkeys(references(sections)))
    for reference in parents:
        if reference not in kinds:
            bad(at, f"`stage:{reference}` names no earlier stage{errors.meant(reference, kinds)}")
    earlier = {stage.name: stage for stage in recipe.stages}
    stage = Stage(name, kind, recipe.output_dir / name, sections, recipe.seed, parents, str(recipe.file), earlier)
    checks = [stage.module.problems(stage, kinds)]
    if "model" in spec.sections:
        checks.insert(0, model_checks.problems(stage, kinds))
    if "data" in spec.sections:
        checks += [_data(stage, read_data), data_checks.streaming_problems(kind, sections)]
    if "args" in spec.sections:
        checks.append(_args_alone(stage))
    for check in checks:
        for path, message, value in check:
            note(path, message, value)
    per_step = 1
    if "args" in spec.sections:  # what is known to be wrong is left out: the rest is built all the same
        whole, hardware = sections.get("args", {}), arguments.expected_hardware()
        sections["args"] = {key: value for key, value in whole.items() if f"args.{key}" not in found}
        args, wrong = arguments.problems(stage, hardware)
        for path, message, value in wrong:
            note(path, message, value)
        by_row = spec.rows not in ("text", "prompts") and not getattr(args, "packing", False)
        if args is not None and by_row and args.train_sampling_strategy == "random":  # as `GlobalOrder` does
            per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * hardware.processes
        sections["args"] = whole
    if read_data and "data" in sections and not any(path.startswith("data") for path in found):
        for path, message in data_checks.too_few_rows(stage, per_step):
            note(path, message)
        for path, message in getattr(stage.module, "row_problems", lambda _: ())(stage):
            note(path, message)
    return stage


def _check_section(at: str, target: type, section: dict, bad) -> dict:
    """The values of a section in their types; those that are wrong are reported and left out."""
    known, out = schema.fields(target), {}
    for key, value in section.items():
        path = f"{at}.{key}"
        if at == "args" and key in SET_BY_CHAIN:
            bad(path, f"not for a recipe: {SET_BY_CHAIN[key]}", value)
        elif at == "args" and key.startswith("hub_"):
            bad(path, f"not for a recipe: {HUB}")
        elif key not in known and key in REMOVED:
            bad(path, f"transformers 5 has no such key; use {REMOVED[key]}", value)
        elif key not in known:
            bad(path, f"unknown key{errors.meant(key, known)}", value)
        else:
            value, wrong = schema.check_value(known[key], value)
            outside = [] if wrong else list(ranges.problems({key: value}, at))
            if wrong:
                bad(path, wrong, value)
            elif outside:
                for inner, message, number in outside:
                    bad(f"{at}.{inner}", message, number)
            else:
                out[key] = value
    return out


def _data(stage: Stage, read_data: bool) -> Iterator[tuple[str, str, object]]:
    """What is wrong with `data:`, rows included."""
    section, task = stage.sections.get("data", {}), stage.sections.get("task")
    for path, message, value in data_checks.problems(section, stage.spec.rows, task, read_data):
        yield f"data{'.' if path and path[0] != '[' else ''}{path}", message, value


def _args_alone(stage: Stage) -> Iterator[tuple[str, str, object]]:
    """What is wrong with `args:` beside what their dataclass refuses: contradictions, metrics, loggers."""
    args = stage.sections.get("args", {})
    if args.get("global_batch_size") and args.get("gradient_accumulation_steps"):
        message = "follows from global_batch_size and the number of processes: give one of the two"
        yield "args.gradient_accumulation_steps", message, args["gradient_accumulation_steps"]
    held_out = bool(stage.sections.get("data", {}).get("validation"))
    yield from best_checkpoint.problems(args, held_out, best_checkpoint.reported(stage))
    loggers = args.get("report_to") or []
    for name in [loggers] if isinstance(loggers, str) else loggers:
        known = integration_utils.INTEGRATION_TO_CALLBACK
        if name in ("all", "none"):
            continue
        if name not in known:
            yield "args.report_to", f"must be of {', '.join(known)}, all, none{errors.meant(name, known)}", name
        elif name not in integration_utils.get_available_reporting_integrations():
            yield "args.report_to", f"{name} is not installed: pip install {name}, or take tensorboard", name


def _secrets(value, path: str) -> Iterator[tuple[str, str]]:
    """Key paths at which a token or password is, wherever in the recipe; the value itself is never shown."""
    if isinstance(value, dict):
        for key, inner in value.items():
            at = f"{path}.{key}".lstrip(".")
            if SECRET.search(str(key)):
                yield path, f"a key that looks like a token: {LOGIN}"
            elif isinstance(inner, str) and inner and SECRET_KEYS.search(str(key)):
                yield at, f"holds a token or password: {LOGIN}"
            else:
                yield from _secrets(inner, at)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _secrets(inner, f"{path}[{i}]")
    elif isinstance(value, str) and SECRET.search(value):
        yield path, f"looks like a token or password: {LOGIN}"
