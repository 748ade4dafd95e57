"""YAML text to a checked `Recipe`: every problem of every stage at once, each with file, line, key, value and fix."""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from pipelines import data, schema
from pipelines.stage import Stage, references
from pipelines.stages import KINDS, NO_MODEL

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
ADAPTED = ("sft", "reward", "ppo", "classify")  # the kinds that can train adapters


@dataclass
class Problem:
    """One thing wrong with a recipe: where it stands, the value found there, and what to do."""

    path: str
    message: str
    value: object = None
    line: int | None = None

    def __str__(self) -> str:
        where = f"line {self.line}" if self.line else "command line" if self.line == 0 else "recipe"
        shown = "" if self.value is None else f" = {_short(self.value)}"
        return f"  {where:<12} {self.path}{shown}\n{'':15}{self.message}"


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, in one message."""

    def __init__(self, file, problems: list[Problem]):
        self.file, self.problems = file, problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{file}: {count}\n" + "\n".join(map(str, problems)))


@dataclass
class Recipe:
    """A checked recipe: its stages in file order, and the folder that holds one folder per stage."""

    file: Path
    output_dir: Path
    seed: int
    stages: list[Stage] = field(default_factory=list)

    def __getitem__(self, name: str) -> Stage:
        return next(s for s in self.stages if s.name == name)


def load(file, overrides: list[str] = (), *, read_data: bool = True, ask_hub: bool = False) -> Recipe:
    """Read and check the recipe `file` with `overrides` (`stages.sft.args.max_steps=10`) applied.

    `read_data` also reads every local data file and checks every row; `ask_hub` also asks for every hub id whether it
    is in the hub's cache or can be had. Raises `RecipeError` with all problems.
    """
    file = Path(file)
    tree, lines = _read(file)
    problems: list[Problem] = []
    for override in overrides:
        _override(tree, lines, override, problems)
    recipe = _check(file, tree, problems, read_data)
    if ask_hub:
        for stage in recipe.stages:
            _ask_hub(stage, problems)
    if problems:
        for problem in problems:
            problem.line = _line(lines, problem.path)
        raise RecipeError(file, problems)
    return recipe


# --- reading -----------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but `2e-5` is a number (YAML 1.2) and a key that stands twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$|^[-+]?\.(inf|Inf)$|^\.nan$|^[-+]?[0-9]*\.[0-9]+$"
    ),
    list("-+0123456789."),
)


def _read(file: Path) -> tuple[dict, dict[str, int]]:
    """The recipe as plain values, and the line of every key path."""
    if not file.is_file():
        near = sorted(p.as_posix() for p in Path("recipes").glob("**/*.yaml"))
        raise RecipeError(file, [Problem("", f"no such file{schema.meant(file.as_posix(), near)}")])
    lines: dict[str, int] = {}
    problems: list[Problem] = []
    try:
        loader = _Loader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(file, [Problem("", "the file is empty; see recipes/ for examples")])
        _walk(node, "", lines, problems)
        tree = loader.construct_document(node)
    except UnicodeDecodeError as error:
        raise RecipeError(file, [Problem("", f"not UTF-8 at byte {error.start}: save the file as UTF-8")]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        text = getattr(error, "problem", None) or str(error)
        raise RecipeError(file, [Problem("", f"not YAML: {text}", line=mark.line + 1 if mark else None)]) from None
    if problems:
        raise RecipeError(file, problems)
    if not isinstance(tree, dict):
        raise RecipeError(file, [Problem("", "a recipe is a mapping with `output_dir` and `stages`")])
    return tree, lines


def _walk(node, path: str, lines: dict[str, int], problems: list[Problem]) -> None:
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            inner = f"{path}.{key.value}".lstrip(".")
            if key.value in seen:
                problems.append(Problem(inner, "this key stands twice; keep one", line=key.start_mark.line + 1))
            seen.add(key.value)
            _walk(value, inner, lines, problems)
            lines[inner] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _walk(value, f"{path}[{i}]", lines, problems)


def _line(lines: dict[str, int], path: str) -> int | None:
    """The line of the nearest enclosing key that stands in the file (0: the command line)."""
    while path and path not in lines:
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    return lines.get(path) if path else None


def _override(tree: dict, lines: dict, override: str, problems: list[Problem]) -> None:
    path, sep, text = override.partition("=")
    keys = path.split(".")
    if not sep or not path:
        problems.append(Problem(override, "an override is written section.key=value"))
        return
    here = tree
    for i, key in enumerate(keys[:-1]):
        at_stage = i == 1 and keys[0] == "stages"
        if not isinstance(here.get(key), dict):
            if at_stage or (i == 0 and key not in tree):
                known = tree.get("stages") or {} if at_stage else tree
                problems.append(Problem(path, f"no {key!r} in this recipe{schema.meant(key, known)}"))
                return
            here[key] = {}
        here[key] = dict(here[key])  # a mapping that other stages share by a YAML alias stays theirs
        here = here[key]
    try:
        here[keys[-1]] = yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader
    except yaml.YAMLError as error:
        problems.append(Problem(path, f"the value is not YAML: {error}", text))
    lines[path] = 0


# --- checking ----------------------------------------------------------------------------------------------------


def _check(file: Path, tree: dict, problems: list[Problem], read_data: bool) -> Recipe:
    def bad(path, message, value=None):
        problems.append(Problem(path, message, value))

    for key in set(tree) - TOP_KEYS:
        bad(key, f"unknown key{schema.meant(key, TOP_KEYS)}; a recipe has {', '.join(sorted(TOP_KEYS))}")
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
        bad(f"{at}.kind", f"must be one of {', '.join(KINDS)}{schema.meant(kind, KINDS)}", kind)
        return None
    module = importlib.import_module(f"pipelines.stages.{kind}")
    sections: dict[str, dict] = {}
    for key, section in body.items():
        if key == "kind":
            continue
        if key not in module.SECTIONS:
            bad(f"{at}.{key}", f"unknown section{schema.meant(key, module.SECTIONS)}; "
                f"{kind} has {', '.join(module.SECTIONS)}")  # fmt: skip
        elif section is not None and not isinstance(section, dict):
            bad(f"{at}.{key}", "must be a mapping of keys to values", section)
        else:
            sections[key] = _check_section(f"{at}.{key}", module.SECTIONS[key], section or {}, bad)
    for reference in references(sections):
        if reference not in kinds:
            bad(at, f"`stage:{reference}` names no earlier stage{schema.meant(reference, kinds)}")
    parents = list(dict.fromkeys(references(sections)))
    earlier = {stage.name: stage for stage in recipe.stages}
    stage = Stage(name, kind, recipe.output_dir / name, sections, recipe.seed, parents, str(recipe.file), earlier)
    if "model" in module.SECTIONS:
        _check_model(at, kind, sections.get("model", {}), bad)
        _check_installed(at, sections.get("model", {}), sections.get("args", {}), bad)
        base = str(sections.get("model", {}).get("model_name_or_path"))
        if base.startswith("stage:") and (made := kinds.get(base.removeprefix("stage:"))) in NO_MODEL:
            bad(f"{at}.model.model_name_or_path", f"that stage is of kind {made} and leaves no model", base)
    args = sections.get("args", {})
    if args.get("global_batch_size") and args.get("gradient_accumulation_steps"):
        message = "follows from global_batch_size and the number of processes: give one of the two"
        bad(f"{at}.args.gradient_accumulation_steps", message, args["gradient_accumulation_steps"])
    for path, message, value in module.problems(stage, kinds):
        bad(f"{at}.{path}", message, value)
    if "data" in module.SECTIONS:
        rows = data.problems(sections.get("data", {}), module.ROWS, sections.get("task"), read_data)
        for path, message, value in rows:
            bad(f"{at}.data{'.' if path and path[0] != '[' else ''}{path}", message, value)
        for path, message, value in data.streaming_problems(kind, sections):
            bad(f"{at}.{path}", message, value)
    return stage


def _check_section(at: str, target: str, section: dict, bad) -> dict:
    known, out = schema.fields(target), {}
    for key, value in section.items():
        path = f"{at}.{key}"
        if at.endswith(".args") and key in SET_BY_CHAIN:
            bad(path, f"not for a recipe: {SET_BY_CHAIN[key]}", value)
        elif key not in known and key in REMOVED:
            bad(path, f"transformers 5 has no such key; use {REMOVED[key]}", value)
        elif key not in known:
            bad(path, f"unknown key{schema.meant(key, known)}", value)
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
            f"{schema.meant(template, TEMPLATES)}; paths count from where the command is given", template)  # fmt: skip
    for key in model:
        if key.startswith((*LORA, *BITS4)) and kind not in ADAPTED:
            message = f"adapters are for {', '.join(ADAPTED)}; this stage trains all weights"
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
                f"transformers knows no such model{schema.meant(architecture, types)}",
                architecture,
            )
        else:
            for key in set(config) - keys - {"model_type"}:
                bad(
                    f"{at}.model.config.{key}",
                    f"unknown key of {architecture}'s config{schema.meant(key, keys)}",
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


def _ask_hub(stage: Stage, problems: list[Problem]) -> None:
    """Hub ids of models that are neither cached nor can be downloaded."""
    from pipelines import models

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
        reason = models.unreachable(path, revision, file)
        if reason:
            problems.append(Problem(f"stages.{stage.name}.{key}", reason, path))


def adapters(stage: Stage) -> list[str]:
    """What a stage's adapters sit on and merge into, for people to read; empty where it trains all weights."""
    model, reward = stage.sections.get("model", {}), stage.sections.get("reward", {})
    if not model.get("use_peft"):
        return []
    bits = 4 if model.get("load_in_4bit") else 8 if model.get("load_in_8bit") else None
    base, into = model.get("model_name_or_path"), "the base, loaded again at full precision" if bits else "the base"
    scorers, shares = reward.get("models") or [], reward.get("share_base")
    critic = reward.get("critic") or (scorers or [base])[0]
    on = f"{base} ({'policy' if stage.kind == 'ppo' else 'frozen'})"
    own_critic = stage.kind == "ppo" and critic != "shared"
    if own_critic and not shares:
        on += f" and {critic} (critic)"
    lines = [f"LoRA, r {model.get('lora_r', 16)}, on {on}" + (f", in {bits} bits" if bits else "")]
    if shares:
        adapted = [f"of {path} (reward)" for path in scorers]
        adapted += [f"{'a new one' if critic == base else 'of ' + critic} (critic, trained on)"] if own_critic else []
        lines.append(f"adapters on the same base, which is held once: {', '.join(adapted)}")
    if stage.kind == "ppo":
        lines.append("the reference is the policy without its adapter")
    lines.append(f"merged into {into} -> {stage.folder}; the adapter alone -> {stage.folder}/adapter")
    if own_critic:
        lines.append(f"the critic likewise -> {stage.folder}/critic; its adapter -> {stage.folder}/critic/adapter")
    return lines


def _short(value) -> str:
    text = repr(value)
    return text if len(text) < 70 else text[:67] + "…"
