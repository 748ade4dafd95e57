"""The command line: `accelerate launch -m pipelines RECIPE [STAGE …] [section.key=value …]` and the other verbs."""

from __future__ import annotations

import importlib
import os
import sys

from pipelines import __version__
from pipelines.errors import SetupError
from pipelines.launch import fast_environment

ABOUT = """\
One recipe file takes a language model from raw text to an RLHF-tuned policy.

  accelerate launch -m pipelines RECIPE [STAGE ...] [KEY=VALUE ...]    run a recipe
  python -m pipelines check RECIPE [KEY=VALUE ...]                     find every mistake in it, start nothing
  python -m pipelines status RECIPE                                    what is finished, due or changed
  python -m pipelines keys KIND [SECTION]                              every key a stage accepts, with its meaning
  python -m pipelines rank FILE_OR_STAGE ...                           a page where people rank sampled answers
  python -m pipelines evaluate MODEL ... [--tasks T] [--prompts P]     perplexity, tasks, win rates of any models
  python -m pipelines plan RECIPE [--gpus 8 --gpu h100]                will it fit, how long will it take
  python -m pipelines report RUN [--watch]                             one HTML file: chain, curves, samples, costs
  python -m pipelines chat RUN[/STAGE] [RUN/STAGE ...]                 talk to a stage, or to several side by side
  python -m pipelines push RUN/STAGE HUB_ID [--private] [--dry-run]    upload a finished stage to the hub
"""
MORE = """\
examples
  python -m pipelines check recipes/demo.yaml
  accelerate launch -m pipelines recipes/demo.yaml                     all stages, finished ones are skipped
  accelerate launch -m pipelines recipes/demo.yaml sft reward          only these
  accelerate launch --config_file accelerate_configs/cpu_2.yaml -m pipelines recipes/demo.yaml
  accelerate launch -m pipelines recipes/demo.yaml stages.sft.args.learning_rate=1e-4 output_dir=runs/hot
  accelerate launch -m pipelines recipes/demo.yaml stages.sft.model.model_name_or_path=Qwen/Qwen3-0.6B
  accelerate launch -m pipelines recipes/demo.yaml --redo sft          again, with all that builds on it

A run that was stopped or killed goes on from its last checkpoint when the same command is given again. A stage whose
settings or data changed is refused until --redo STAGE; its old folder is kept. Exit codes: 0 done, 2 the recipe, data
or command is wrong, 130 stopped by the user.
"""
# Each is a module of `pipelines.commands`, imported only when asked for: `--help` and `report` need no torch.
VERBS = ("run", "check", "status", "keys", "plan", "rank", "evaluate", "chat", "report", "push")
COMPUTE = ("run", "evaluate", "chat", "plan")  # verbs that compute: they start again in the fast environment


def verb_of(argv: list[str]) -> str:
    """The verb of a command line; a recipe without one is run."""
    return argv[0] if argv[0] in VERBS else "run"


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(ABOUT + "\n" + MORE, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"finetune-pipelines {__version__}")
        return 0
    try:
        command = importlib.import_module(f"pipelines.commands.{verb_of(argv)}")
        return command.main(argv[argv[0] in VERBS :])
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def entry() -> None:
    """The console command and `python -m pipelines`."""
    if len(sys.argv) > 1 and sys.argv[1][0:1] != "-" and verb_of(sys.argv[1:]) in COMPUTE:
        fast_environment()
    try:
        try:
            code = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # who read our output has had enough (`| head`): Python's `signal` docs, "Note on SIGPIPE"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when the interpreter ends
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    entry()
