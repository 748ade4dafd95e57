"""The tokenizer, config and shape of a stage's model before anything is made: no weights are read, nothing is trained.

What an earlier stage will make is taken from where that stage starts.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
import transformers

from pipelines.data import mixing, sources
from pipelines.errors import PlanError, SetupError
from pipelines.recipe.stage import Stage, resolve

logger = logging.getLogger(__name__)

SMALL = 2**24  # bytes of text of which a tokenizer is trained in seconds
_made: dict[str, object] = {}  # tokenizers that were trained here, by the stage's folder and sections


def rows_here(stage: Stage) -> tuple[Stage, list[str]]:
    """The stage without the sources of rows that earlier stages have yet to write, and those sources."""
    section, left_out = dict(stage.sections.get("data", {})), []
    for side in mixing.SIDES:
        if section.get(side) is None or isinstance(section[side], (int, float)):
            continue
        kept = []
        for item in section[side] if isinstance(section[side], list) else [section[side]]:
            path = item if isinstance(item, str) else item["path"]
            made = not path.startswith("stage:") or Path(resolve(path, stage.folder.parent)).exists()
            kept.append(item) if made else left_out.append(path)
        section[side] = kept or None
    return replace(stage, sections={**stage.sections, "data": section}), left_out


def tokenizer_of(stage: Stage, *, train: bool = False):
    """A copy of the tokenizer that the stage will train with, its template and tokens in place.

    With `train`, one that the stage (or the one it builds on) trains on its text is trained here, and not kept.
    Raises `SetupError` where it is not at hand.
    """
    found = copy.deepcopy(_before(stage, train))
    ready = getattr(stage.module, "ready", None)
    return ready(stage, found) if ready else found


def _before(stage: Stage, train: bool):
    """The tokenizer as the stage gets it."""
    section = stage.sections.get("model", {})
    path = section.get("tokenizer_name_or_path") or section.get("model_name_or_path")
    path = path or next(iter(stage.sections.get("sample", {}).get("models") or []), None)
    if path is None:
        return _own(stage, train)
    if not path.startswith("stage:"):
        return _from_folder(os.path.expanduser(path), section.get("model_revision") or "main")
    name = path.removeprefix("stage:").split("/")[0]
    folder = Path(resolve(f"stage:{name}", stage.folder.parent))
    if (folder / "config.json").is_file():
        return _from_folder(str(folder), "main")
    return tokenizer_of(stage.earlier[name], train=train)


def _own(stage: Stage, train: bool):
    """The tokenizer that the stage trains: as an earlier run left it, else made here, once, and thrown away.

    Without `train` that is done only where it takes a moment: from at most `SMALL` bytes on this disk.
    """
    own = getattr(stage.module, "own_tokenizer", None)
    if own is None or not stage.sections.get("tokenizer", {}).get("train"):
        raise SetupError(f"stages.{stage.name}: no tokenizer is named; set model.tokenizer_name_or_path")
    key = json.dumps([str(stage.folder), stage.sections], sort_keys=True, default=str)
    kept = stage.folder.parent / ".tokens" / stage.name / "tokenizer"
    if key not in _made:
        if not train and not (kept / "key").is_file() and not _is_small(stage):
            raise SetupError(f"stages.{stage.name}: its tokenizer is not trained yet")
        with tempfile.TemporaryDirectory() as folder:
            if kept.is_dir():
                shutil.copytree(kept, Path(folder) / "tokenizer")
            else:
                logger.warning("the tokenizer of %s is not trained yet: it is made for this, and not kept", stage.name)
            _made[key] = own(stage, Path(folder))
    return _made[key]


def _is_small(stage: Stage) -> bool:
    """Whether all training text is on this disk, and little."""
    paths = [source["path"] for source in sources.sources(stage.data, "train")]
    found = [path for name in paths if sources.is_local(name) for path in sources.files(name)]
    here = all(map(sources.is_local, paths)) and all(path.is_file() for path in found)
    return here and sum(path.stat().st_size for path in found) <= SMALL


@lru_cache(None)
def _from_folder(path: str, revision: str):
    try:
        return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, revision=revision)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SetupError(
            f"no tokenizer of {path!r} at hand ({reason}). It must be a folder with one, or in the hub's cache: "
            "`hf download ID --include 'tokenizer*'`."
        ) from error


def config_of(stage: Stage, path: str | None, tokenizer, settings: dict, overrides: bool = True):
    """The config of the model at `path` (a stage's will be what that stage starts from), or of a new one.

    Args:
        path: as `model_name_or_path` has it; None: the new model of `model.config`.
        tokenizer: the vocabulary grows to it; None: as it is.
        settings: values of the config that the stage sets (num_labels=1, …).
        overrides: whether `model.config` changes it.

    Raises:
        PlanError: there is no such config at hand.
    """
    section = stage.sections.get("model", {})
    changes = dict(section.get("config") or {}) if overrides else {}
    if path and path.startswith("stage:"):
        folder = Path(resolve(path, stage.folder.parent))
        parent = stage.earlier[path.removeprefix("stage:").split("/")[0]]
        if (folder / "config.json").is_file():
            config = transformers.AutoConfig.from_pretrained(folder)
        else:
            source = parent.sections.get("model", {}).get("model_name_or_path")
            if path.endswith("/critic"):
                source = (parent.sections.get("reward", {}).get("models") or [source])[0]
            config = config_of(parent, source, at_hand(parent), {})
    elif path:
        if "model_type" in changes:
            changes = {}
        try:
            config = transformers.AutoConfig.from_pretrained(
                path,
                revision=section.get("model_revision") or "main",
                trust_remote_code=section.get("trust_remote_code", False),
            )
        except (OSError, ValueError) as error:
            raise PlanError(
                f"stages.{stage.name}.model: no config of {path!r} ({str(error).splitlines()[0]}). A hub id needs "
                "network "
                "access or the hub's cache; a folder needs a config.json (no weights are read)."
            ) from error
    else:
        asked = stage.sections.get("tokenizer", {})
        vocabulary = len(tokenizer) if tokenizer else asked.get("vocab_size", 8192) if asked.get("train") else 0
        changes["vocab_size"] = max(changes.get("vocab_size", 0), vocabulary)
        if not changes["vocab_size"]:
            del changes["vocab_size"]
        names = [f"{name}_token_id" for name in ("bos", "eos", "pad")] if tokenizer else []
        special = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
        return transformers.AutoConfig.for_model(changes.pop("model_type"), **{**special, **changes, **settings})
    for key, value in (changes | settings).items():
        setattr(config, key, value)
    if tokenizer is not None and len(tokenizer) > config.get_text_config().vocab_size:  # as `tokenizer_setup.fit_model`
        config.get_text_config().vocab_size = len(tokenizer)
    return config


def at_hand(stage: Stage):
    """`tokenizer_of`, or None where it is not there yet."""
    try:
        return tokenizer_of(stage)
    except SetupError:
        return None


def empty_model(stage: Stage, tokenizer):
    """The stage's model without any memory: its positions and shapes can be asked for."""
    sampled = stage.sections.get("sample", {}).get("models")
    path = sampled[0] if sampled else stage.sections.get("model", {}).get("model_name_or_path")
    config = config_of(stage, path, tokenizer, {})
    with torch.device("meta"):
        return getattr(transformers, stage.spec.auto_class or "AutoModelForCausalLM").from_config(config)
