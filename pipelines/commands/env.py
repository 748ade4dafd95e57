"""`pipelines env [RECIPE]`: versions, devices and extras of this machine, and what a recipe would use: for bug
reports.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re

import psutil
import torch

from pipelines import __version__, launch
from pipelines.chain.record import git_commit
from pipelines.commands import command_line
from pipelines.models.loading import native_bf16
from pipelines.recipe import recipe

EXAMPLES = """
  pipelines env                          paste what it prints into a bug report: no paths of yours, no names, no keys
  pipelines env recipes/demo.yaml        also what this recipe would use here
"""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    about = "Versions, devices and extras of this machine, for bug reports."
    parser = command_line("env", about, EXAMPLES)
    parser.add_argument("recipe", nargs="?", help="say what its stages would use, too")
    args = parser.parse_args(argv)
    rows = [("finetune-pipelines", f"{__version__} ({git_commit()})"), ("python", platform.python_version())]
    rows += [("system", f"{platform.system()} {platform.release()} {platform.machine()}")]
    memory = psutil.virtual_memory().total / 1e9
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows += [("cpu", f"{cores} cores, {memory:.0f} GB, {'bf16' if native_bf16('cpu') else 'no bf16'}")]
    rows += _accelerators()
    required, extras = _requirements()
    rows += [(name, _version(name) or "MISSING") for name in required]
    print("\n".join(f"{name:<20} {value}" for name, value in rows))
    for extra, names in extras.items():
        missing = [name for name in names if _version(name) is None]
        print(f"{f'[{extra}]':<20} {'installed' if not missing else 'not installed: ' + ', '.join(missing)}")
    if args.recipe:
        loaded = recipe.load(args.recipe, read_data=False)
        device = (
            "one process on the CPU" if not launch.available() else f"{launch.available()} processes by ddp, one a GPU"
        )
        print(f"\n{args.recipe}: `pipelines run` takes {device}")
        for stage in loaded.stages:
            args_ = stage.sections.get("args", {})
            half = next((key for key in ("bf16", "fp16") if args_.get(key)), None)
            silent = "bf16" if launch.available() and native_bf16("cuda") else "float32"
            base = stage.sections.get("model", {}).get("model_name_or_path") or "a new model"
            if "model" in stage.spec.sections:
                print(f"  {stage.name:<16} {stage.kind:<10} {half or silent:<8} from {base}")
    return 0


def _accelerators() -> list[tuple[str, str]]:
    """A row for each GPU, or one that there is none; and what torch was built for."""
    built = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU"
    )
    rows = [("torch built for", built)]
    for i in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(i)
        rows.append((f"gpu {i}", f"{of.name}, {of.total_memory / 1e9:.0f} GB, compute {of.major}.{of.minor}"))
    return rows if len(rows) > 1 else [*rows, ("gpu", "none")]


def _requirements() -> tuple[list[str], dict[str, list[str]]]:
    """Names of the packages that this one needs, and for each extra those that it adds; from its own metadata."""
    required: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("finetune-pipelines") or []:
        name, extra = re.match(r"[\w.-]+", line)[0], re.search(r"extra == [\"'](\w[\w-]*)", line)
        (extras.setdefault(extra[1], []) if extra else required).append(name)
    return required, {extra: names for extra, names in extras.items() if extra != "test"}


def _version(name: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
