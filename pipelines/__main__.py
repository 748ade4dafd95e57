"""The command line: `pipelines VERB …`, `python -m pipelines VERB …`, `accelerate launch -m pipelines RECIPE …`."""

from __future__ import annotations

import errno
import gc
import importlib
import os
import sys
from pathlib import Path

from pipelines import __version__, launch
from pipelines.errors import SetupError, StorageError, meant
from pipelines.files import storage_error

ABOUT = """\
One recipe file takes a language model from raw text to an RLHF-tuned policy.

  pipelines init [NAME]                          copy a recipe that comes with the package here; alone: list them
  pipelines check RECIPE                         find every mistake in it, start nothing
  pipelines show RECIPE STAGE                    the rows of a stage as its model will see them
  pipelines plan RECIPE                          will it fit, how long will it take
  pipelines run RECIPE [STAGE ...]               train; finished stages are skipped
  pipelines sweep RECIPE KEY=a,b,c ...           train with each of these values, compare what comes out
  pipelines status RECIPE                        what is finished, due or changed
  pipelines report RUN                           one HTML file: chain, curves, samples, costs
  pipelines chat RUN[/STAGE] ...                 talk to a stage, or to several side by side
  pipelines rank FILE_OR_STAGE ...               a page where people rank sampled answers
  pipelines evaluate MODEL ...                   perplexity, tasks, win rates of any models
  pipelines push RUN/STAGE HUB_ID                upload a finished stage to the hub
  pipelines keys KIND [SECTION]                  every key that a kind of stage accepts, with its meaning
  pipelines env [RECIPE]                         versions, GPUs and extras, for bug reports

`pipelines VERB --help` has the options and examples of each; `python -m pipelines` is the same command. Keys of a
recipe can be changed on the command line: stages.sft.args.learning_rate=1e-4 output_dir=runs/hot
"""
MORE = """\
examples
  pipelines init demo && pipelines run demo.yaml
  pipelines run recipes/qwen3_rlhf.yaml --on ddp --gpus 4
  accelerate launch --config_file accelerate_configs/ddp.yaml -m pipelines recipes/demo.yaml    the same by Accelerate

A run that was stopped or killed goes on from its last checkpoint when the same command is given again. A stage whose
settings or data changed is refused until --redo STAGE; its old folder is kept. Exit codes: 0 done, 1 it
failed (disk, network, NaN), 2 the recipe, data or command is wrong, 130 stopped by the user.
"""
# Each is a module of `pipelines.commands`, imported only when asked for: `--help` and `report` need no torch.
VERBS = (
    "run",
    "check",
    "show",
    "sweep",
    "status",
    "keys",
    "plan",
    "rank",
    "evaluate",
    "chat",
    "report",
    "push",
    "init",
    "env",
)
NO_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)  # what was given as a path can be none
COMPUTE = ("run", "evaluate", "chat", "plan")  # verbs that compute: they start again in the fast environment


def verb_of(argv: list[str]) -> str:
    """The verb of a command line; a recipe without one is run. Raises `SetupError` for a word that is neither."""
    word = argv[0]
    if word in VERBS:
        return word
    if word.startswith("-") or word.endswith((".yaml", ".yml")) or "/" in word or Path(word).is_file():
        return "run"
    near = meant(word, VERBS) or (f" (did you mean {word}.yaml?)" if Path(f"{word}.yaml").is_file() else "")
    raise SetupError(f"no verb {word!r}{near}, and no file of that name; `pipelines --help` lists the verbs")


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(ABOUT + "\n" + MORE, end="")
        return 0 if argv else 2
    if argv[0] in ("--version", "-V"):
        print(f"finetune-pipelines {__version__}")
        return 0
    try:
        # modules make millions of objects that stay: looking for garbage among them takes a fifth of the start
        gc.disable()
        command = importlib.import_module(f"pipelines.commands.{verb_of(argv)}")
        gc.freeze()
        gc.enable()
        return command.main(argv[argv[0] in VERBS :])
    except SetupError as error:
        launch.last_words(f"error: {error}")
        return 2
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_PATH and error.filename:
            shown = os.fsdecode(error.filename)
            launch.last_words(f"error: {shown[:60]}{'…' * (len(shown) > 60)}: {os.strerror(error.errno)}: no such path")
            return 2
        problem = error if isinstance(error, StorageError) else storage_error(error)
        if problem is None:
            raise
        launch.last_words(f"error: {problem}")
        return 1


def entry() -> None:
    """The console command and `python -m pipelines`."""
    if len(sys.argv) > 1 and sys.argv[1][0:1] != "-" and sys.argv[1] not in set(VERBS) - set(COMPUTE):
        launch.fast_environment()
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: a recipe's `module:function` is looked for here
    try:
        try:
            code = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # who read our output has had enough (`| head`): Python's `signal` docs, "Note on SIGPIPE"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when the interpreter ends
        code = 1
    except KeyboardInterrupt:
        launch.last_words("stopped")
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    entry()
