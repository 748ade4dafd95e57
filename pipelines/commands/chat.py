"""`pipelines chat RUN[/STAGE] …`: talk to what was trained, in the terminal, under its own chat template.

A model with a template keeps the dialogue; one without (a base model) continues each text as it stands; an
encoder-decoder gets each text by itself. Several models answer the same prompt side by side, each with its own
dialogue. From a pipe there is one prompt, and only the answer goes to stdout.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from pipelines import errors, files
from pipelines.commands import command_line
from pipelines.errors import SetupError
from pipelines.generation.dialogue import HELP, shown, talk
from pipelines.generation.speaker import Settings, Speaker

TALKERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # how architectures that write text are called
ABOUT = """\
Talk to stages, folders or hub models; several answer side by side. From a pipe there is one prompt, and only the answer
goes to stdout. In a dialogue:

"""
EXAMPLES = """
pipelines chat runs/demo   its last finished stage that writes text
pipelines chat runs/demo/sft runs/demo/policy   side by side
pipelines chat Qwen/Qwen3-0.6B --system "Answer in one word." --temperature 0
echo "Where is the lighthouse?" | pipelines chat runs/demo/sft
"""


def find(word: str) -> str:
    """The folder or hub id that `word` names; a run's folder names its last finished stage that writes text.

    Raises `SetupError` for a stage that is not finished or does not write text, and for a name that is nearly one.
    """
    folder = Path(os.path.expanduser(word))
    if not folder.is_dir():
        stages = _stages(folder.parent)
        if folder.parent != Path(".") and stages:
            known = ", ".join(stages)
            raise SetupError(f"{word}: no such stage{errors.meant(folder.name, stages)}; {folder.parent} has {known}")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", word):
            raise SetupError(f"{word}: no such folder, and not a hub id (name or owner/name) either")
        return word
    stages = _stages(folder)
    if not stages:
        if not (folder / "config.json").is_file():
            raise SetupError(f"{folder}: no model here (no config.json); a stage can be talked to when it is finished")
        if not _talks(folder):
            raise SetupError(
                f"{folder}: {_architecture(folder)} does not write text: it judges or fills in what is there"
            )
        return str(folder)
    talkers = [name for name in stages if _talks(folder / name)]
    if not talkers:
        raise SetupError(f"{folder}: none of its stages writes text and is finished ({', '.join(stages)})")
    return str(folder / max(talkers, key=lambda n: files.read_json(folder / n / files.FINISHED)["finished"]))


def _stages(folder: Path) -> list[str]:
    return sorted(p.parent.name for name in (files.FINISHED, files.STARTED) for p in folder.glob(f"*/{name}"))


def _architecture(folder: Path) -> str:
    return ((files.read_json(folder / "config.json") or {}).get("architectures") or ["?"])[0]


def _talks(folder: Path) -> bool:
    return _architecture(folder).endswith(TALKERS)


def _typed() -> Iterator[str]:
    """Lines from the terminal, with editing and history, until Ctrl-D."""
    import readline  # noqa: F401  its import is what gives `input` line editing

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def main(argv: list[str]) -> int:
    """`chat RUN[/STAGE] … [--system TEXT] [--temperature T] …`; returns the exit code."""
    parser = command_line("chat", ABOUT + HELP.format(keys=", ".join(f.name for f in fields(Settings))), EXAMPLES)
    parser.add_argument(
        "models",
        nargs="+",
        metavar="RUN[/STAGE]",
        help="a run (its last stage that writes), a stage, a folder or a hub id",
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told beforehand")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that a hub model brings")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", metavar="N", help=f"default {field.default}")
    args = parser.parse_args(argv)
    settings = Settings()
    for field in fields(settings):
        if getattr(args, field.name) is not None:
            settings.set(field.name, getattr(args, field.name))
    paths = [find(word) for word in args.models]
    piped = not sys.stdin.isatty()
    text = sys.stdin.read().rstrip("\n") if piped else ""
    if piped and not text.strip():
        raise SetupError("nothing came through the pipe: echo PROMPT | pipelines chat RUN/STAGE")
    for path in paths:
        files.refuse_edited(path)
    speakers = [Speaker(path, args.trust_remote_code) for path in paths]
    for speaker, name in zip(speakers, _names(paths), strict=True):
        speaker.name = name
        speaker.reset(args.system)
        kind = "with its chat template" if speaker.keeps else "text by text" if speaker.translates else "completes text"
        print(f"{speaker.name}: {speaker.path}, {kind}", file=sys.stderr)
    if piped:
        remark = lambda said: print(f"({said})", file=sys.stderr)
        for speaker in speakers:
            if len(speakers) > 1:
                print(f"{speaker.name}:")
            speaker.answer(text, settings, lambda new: print(new, end="", flush=True), remark)
            print()
        return 0
    print(f"{shown(settings)}; /help", file=sys.stderr)
    try:
        talk(speakers, settings, _typed(), sys.stdout, args.system)
    except KeyboardInterrupt:
        print()
    return 0


def _names(paths: list[str]) -> list[str]:
    """The folders' own names, or the whole paths where two are called the same."""
    short = [Path(path).name for path in paths]
    return short if len(set(short)) == len(short) else paths
