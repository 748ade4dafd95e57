"""The command line: `accelerate launch -m pipelines RECIPE [STAGE …] [section.key=value …]` and the other verbs."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import warnings

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
# Verbs with a module of their own, which has `main(argv) -> exit code`; imported only when asked for.
TOOLS: dict[str, str] = {
    "rank": "pipelines.feedback.rank",
    "evaluate": "pipelines.evaluation",
    "plan": "pipelines.plan",
    "report": "pipelines.report",
    "chat": "pipelines.talk",
    "push": "pipelines.push",
}
VERBS = ("check", "status", "keys", *TOOLS)
COMPUTE = ("evaluate", "chat", "plan")  # verbs that run models, or time this machine: in the fast environment, too


def parser(verb: str) -> argparse.ArgumentParser:
    """The parser of one verb ("run" is the verb without a name)."""
    name = "pipelines" if verb == "run" else f"pipelines {verb}"
    out = argparse.ArgumentParser(
        prog=name,
        description=ABOUT if verb == "run" else None,
        epilog=MORE if verb == "run" else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if verb == "keys":
        out.add_argument("kind", help="pretrain, mlm, sft, reward, ppo, classify, seq2seq, sample, rank or evaluate")
        out.add_argument("section", nargs="?", help="only this section, e.g. args")
        return out
    out.add_argument("recipe", help="a YAML file; see recipes/")
    out.add_argument("words", nargs="*", metavar="STAGE | KEY=VALUE", help="stages to run (default: all); overrides")
    if verb == "run":
        out.add_argument("--redo", action="append", default=[], metavar="STAGE", help="make this stage again")
    return out


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    verb = argv[0] if argv and argv[0] in VERBS else "run"
    if not argv:
        print(ABOUT + "\n" + MORE, end="")
        return 2
    try:
        if verb in TOOLS:
            return importlib.import_module(TOOLS[verb]).main(argv[1:])
        args = parser(verb).parse_intermixed_args(argv[verb != "run" :])
        return {"run": _run, "check": _check, "status": _status, "keys": _keys}[verb](args)
    except ValueError as error:
        if type(error).__module__.split(".")[0] != "pipelines":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    return [w for w in words if "=" not in w], [w for w in words if "=" in w]


def _run(args) -> int:
    _log()
    from pipelines import chain, launch, recipe
    from pipelines.recipe import RecipeError

    names, overrides = _split(args.words)
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        loaded = recipe.load(args.recipe, overrides, read_data=first, ask_hub=first)
    except RecipeError:
        if first:
            raise
        return 2
    timeouts = [s.sections["args"]["ddp_timeout"] for s in loaded.stages if "ddp_timeout" in s.sections.get("args", {})]
    launch.start(max(timeouts, default=1800))  # before anything else creates Accelerate's state
    from pipelines.training import Interrupted, NotFinite

    try:
        chain.run(loaded, names, args.redo)
    except (Interrupted, KeyboardInterrupt) as stop:
        print(stop if str(stop) else "stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except NotFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not launch.lost(error):
            raise
        print(
            f"error: process {os.environ.get('RANK')} lost the others, or the network to them: "
            f"{str(error).splitlines()[0]}\nThe same command (on every machine) goes on from the last checkpoint.",
            file=sys.stderr,
        )
        return 1
    return 0


def _check(args) -> int:
    from pipelines import recipe

    names, overrides = _split(args.words)
    loaded = recipe.load(args.recipe, overrides, ask_hub=True)
    for name in names:
        loaded[name]
    for stage in loaded.stages:
        base = stage.sections.get("model", {}).get("model_name_or_path") or ", ".join(stage.parents) or "a new model"
        print(f"  {stage.name:<12} {stage.kind:<9} from {base}  ->  {stage.folder}")
        print("".join(f"{'':25}{line}\n" for line in recipe.adapters(stage)), end="")
    print(f"{args.recipe}: {len(loaded.stages)} stages, no problems")
    return 0


def _status(args) -> int:
    from pipelines import chain, recipe

    names, overrides = _split(args.words)
    for step in chain.plan(recipe.load(args.recipe, overrides, read_data=False), names):
        print(f"  {step.stage.name:<12} {step.action:<9} {step.stage.folder}")
    return 0


def _keys(args) -> int:
    import textwrap

    from pipelines import schema
    from pipelines.stages import KINDS

    if args.kind not in KINDS:
        print(
            f"error: no kind {args.kind!r}{schema.meant(args.kind, KINDS)}; there are {', '.join(KINDS)}",
            file=sys.stderr,
        )
        return 2
    module = importlib.import_module(f"pipelines.stages.{args.kind}")
    print(module.__doc__)
    for section, target in module.SECTIONS.items():
        if args.section in (None, section):
            print(f"{section}:   ({target.rpartition(':')[2]})")
            defaults = module.DEFAULTS if section == "args" else {}
            for field in schema.fields(target).values():
                default = f"{defaults[field.name]!r} here" if field.name in defaults else field.default
                print(f"  {field.name}: {field.annotation} = {default}")
                if field.help:
                    print(textwrap.fill(field.help, 110, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return 0


def _log() -> None:
    """One line per event, from the first process only; warnings from every process."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("pipelines").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # bars are for long work; the trainers have theirs
    # TRL still sets gradient_checkpointing, which transformers renamed: nothing the user could do about it
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated")


def entry() -> None:
    """The console command and `python -m pipelines`."""
    if len(sys.argv) > 1 and sys.argv[1] not in {*VERBS, "-h", "--help"} - {*COMPUTE}:
        from pipelines.launch import fast_environment

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
