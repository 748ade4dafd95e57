"""A dialogue in the terminal: typed lines are prompts or commands, and one speaker or several answer side by side."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import fields

from pipelines import errors
from pipelines.errors import SetupError
from pipelines.generation.speaker import Settings, Speaker

NARROW = 36  # columns of a terminal that one of several answers needs to stand beside the others
HELP = """\
/system TEXT      what the model is told before the dialogue (alone: nothing); starts over
/reset            forget the dialogue
/regenerate       another answer to the last prompt
/set KEY=VALUE    {keys}; alone: show them
/help             this
/quit             leave (so does Ctrl-D); Ctrl-C stops an answer
"""


def talk(speakers: list[Speaker], settings: Settings, lines: Iterable[str], out, system: str = "") -> None:
    """The dialogue: each of `lines` is a prompt or a command; answers and remarks go to the text stream `out`."""

    def write(text: str) -> None:
        out.write(text)
        out.flush()

    def say(text: str) -> None:
        write(f"({text})\n")

    last = None
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        try:
            if not word:
                continue
            if not word.startswith("/"):
                last = line
                _answers(speakers, line, settings, write, say)
            elif word == "/quit":
                return
            elif word == "/help":
                write(HELP.format(keys=", ".join(f.name for f in fields(settings))))
            elif word == "/set":
                for pair in rest.split():
                    key, _, value = pair.partition("=")
                    settings.set(key, value)
                say(shown(settings))
            elif word in ("/reset", "/system"):
                told = rest.strip() if word == "/system" else system
                for speaker in speakers:
                    speaker.reset(told)
                system, last = told, None
                say("a new dialogue" + (f"; told beforehand: {system}" if system else ""))
            elif word == "/regenerate":
                if last is None:
                    raise SetupError("there is no prompt yet to answer again")
                for speaker in speakers:
                    while speaker.messages and speaker.messages[-1]["role"] != "user":
                        speaker.messages.pop()
                    speaker.messages = speaker.messages[:-1]
                settings.seed += settings.seed >= 0  # the same seed would give the same answer
                _answers(speakers, last, settings, write, say)
            else:
                known = ("/system", "/reset", "/regenerate", "/set", "/help", "/quit")
                raise SetupError(f"no command {word}{errors.meant(word, known)}; /help lists them")
        except SetupError as error:
            say(str(error))


def shown(settings: Settings) -> str:
    """The settings as they are typed."""
    return " ".join(f"{f.name}={getattr(settings, f.name)}" for f in fields(settings))


def _answers(speakers: list[Speaker], text: str, settings: Settings, write, say) -> None:
    """One speaker streams; several stand side by side where the terminal is wide enough, else below each other."""
    width = shutil.get_terminal_size().columns // len(speakers)
    if len(speakers) == 1 or width < NARROW:
        for speaker in speakers:
            if len(speakers) > 1:
                write(f"{speaker.name}:\n")
            speaker.answer(text, settings, write, say)
            write("\n")
        return
    answers = [speaker.answer(text, settings, lambda _: None, say) for speaker in speakers]
    write(side_by_side([s.name for s in speakers], answers, width))


def side_by_side(names: list[str], answers: list[str], width: int) -> str:
    """Answers as columns of `width` characters under their names."""
    columns = []
    for name, answer in zip(names, answers, strict=True):
        wrapped = [part for line in answer.splitlines() for part in textwrap.wrap(line, width - 3) or [""]]
        columns.append([name[: width - 3], "-" * min(len(name), width - 3), *wrapped])
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    return "".join("".join(cell.ljust(width) for cell in row).rstrip() + "\n" for row in rows) + "\n"
