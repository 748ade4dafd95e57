"""`python -m pipelines chat RUN[/STAGE] …`: talk to what was trained, in the terminal, under its own chat template.

A model with a template keeps the dialogue; one without (a base model) continues each text as it stands; an
encoder-decoder gets each text by itself. Several models answer the same prompt side by side, each with its own
dialogue. From a pipe there is one prompt, and only the answer goes to stdout.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from pipelines import SetupError, artifact, schema

TALKERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # how architectures that write text are called
NARROW = 36  # columns of a terminal that one of several answers needs to stand beside the others
HELP = """\
/system TEXT      what the model is told before the dialogue (alone: nothing); starts over
/reset            forget the dialogue
/regenerate       another answer to the last prompt
/set KEY=VALUE    {keys}; alone: show them
/help             this
/quit             leave (so does Ctrl-D); Ctrl-C stops an answer
"""


@dataclass
class Settings:
    """How answers are sampled."""

    temperature: float = 0.7  # 0: always the likeliest token
    top_p: float = 0.95
    top_k: int = 0  # 0: all tokens
    max_new_tokens: int = 256
    seed: int = -1  # -1: another answer every time

    def set(self, key: str, value: str) -> None:
        """Set one field from text; raises `SetupError` that says what is allowed."""
        types_ = {f.name: {"float": float, "int": int}[f.type] for f in fields(self)}
        if key not in types_:
            raise SetupError(f"no setting {key!r}{schema.meant(key, types_)}; there are {', '.join(types_)}")
        least = {"temperature": 0, "top_p": 0.001, "top_k": 0, "max_new_tokens": 1, "seed": -1}[key]
        try:
            number = types_[key](value)
        except ValueError:
            number = None
        if number is None or not least <= number <= (1 if key == "top_p" else 2**31):
            kind = "a whole number" if types_[key] is int else "a number"
            raise SetupError(f"{key}={value}: must be {kind} {'from 0.001 to 1' if key == 'top_p' else f'>= {least}'}")
        setattr(self, key, number)


def find(word: str) -> str:
    """The folder or hub id that `word` names; a run's folder names its last finished stage that writes text.

    Raises `SetupError` for a stage that is not finished or does not write text, and for a name that is nearly one.
    """
    folder = Path(word).expanduser()
    if not folder.is_dir():
        stages = _stages(folder.parent)
        if folder.parent != Path(".") and stages:
            known = ", ".join(stages)
            raise SetupError(f"{word}: no such stage{schema.meant(folder.name, stages)}; {folder.parent} has {known}")
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
    return str(folder / max(talkers, key=lambda n: artifact.read_json(folder / n / artifact.FINISHED)["finished"]))


def _stages(folder: Path) -> list[str]:
    return sorted(p.parent.name for name in (artifact.FINISHED, artifact.STARTED) for p in folder.glob(f"*/{name}"))


def _architecture(folder: Path) -> str:
    return ((artifact.read_json(folder / "config.json") or {}).get("architectures") or ["?"])[0]


def _talks(folder: Path) -> bool:
    return _architecture(folder).endswith(TALKERS)


class Speaker:
    """One model with its tokenizer, and the dialogue held with it so far."""

    def __init__(self, path: str, trust_remote_code: bool = False):
        import torch
        import transformers

        from pipelines import models

        transformers.utils.logging.disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        section = types.SimpleNamespace(
            model_name_or_path=path, tokenizer_name_or_path=None, model_revision=None, config=None,
            trust_remote_code=trust_remote_code, dtype="auto" if device == "cuda" else None, attn_implementation=None,
            load_in_4bit=False, load_in_8bit=False,
        )  # fmt: skip
        self.path, self.name = path, Path(path).name
        self.tokenizer = models.load_tokenizer(section)
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        self.translates = config.is_encoder_decoder
        auto = "AutoModelForSeq2SeqLM" if self.translates else "AutoModelForCausalLM"
        self.model = models.load_model(section, auto).to(device).eval()
        self.limit = None if self.translates else models.positions(self.model)
        self.keeps = bool(self.tokenizer.chat_template) and not self.translates
        self.messages: list[dict] = []
        self.prefix = artifact.prefix(path)

    def reset(self, system: str = "") -> None:
        """Begin a new dialogue; raises `SetupError` where the model cannot be told `system`."""
        import jinja2

        messages = [{"role": "system", "content": system}] if system else []
        if system:
            if not self.keeps:
                raise SetupError(f"{self.name} has no chat template: it cannot be told anything beforehand")
            try:
                self._encode([*messages, {"role": "user", "content": "x"}])
            except jinja2.TemplateError as error:
                raise SetupError(f"{self.name}: its chat template takes no system message ({error})") from error
        self.messages = messages

    def answer(self, text: str, settings: Settings, write: Callable[[str], None], say: Callable[[str], None]) -> str:
        """Answer `text`, streaming the answer to `write` and remarks to `say`; both sides join the dialogue.

        Ctrl-C ends the answer where it is. Raises `SetupError` for a text that is longer than the model reads.
        """
        import torch
        from transformers import TextStreamer, set_seed

        self.messages = (self.messages if self.keeps else []) + [{"role": "user", "content": text}]
        try:
            ids, room = self._fit(settings.max_new_tokens, say)
        except SetupError:
            self.messages.pop()
            raise
        parts: list[str] = []

        class Streamer(TextStreamer):
            def on_finalized_text(_, new, stream_end=False):
                # What answers begin with after a template belongs to the template; a base model continues a line.
                new = new.lstrip() if self.keeps and not parts else new
                if new:
                    parts.append(plain(new))
                    write(parts[-1])

        if settings.seed >= 0:
            set_seed(settings.seed)
        how = {"do_sample": settings.temperature > 0, "max_new_tokens": room}
        if how["do_sample"]:
            how |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        if self.model.generation_config.pad_token_id is None:
            how["pad_token_id"] = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id
        ids = torch.tensor([ids], device=self.model.device)
        streamer = Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer, **how)
        except KeyboardInterrupt:
            streamer.end()
            say("stopped")
        answer = "".join(parts)
        self.messages.append({"role": "assistant", "content": answer.strip()})
        return answer

    def _encode(self, messages: list[dict]) -> list[int]:
        from pipelines import chat

        if self.translates:
            return self.tokenizer(self.prefix + messages[-1]["content"])["input_ids"]
        return chat.encode_prompt(self.tokenizer, messages)

    def _fit(self, wanted: int, say) -> tuple[list[int], int]:
        """`(ids, tokens left for the answer)`; the oldest turns go until a quarter of the context, or `wanted`, is free."""
        ids, forgotten = self._encode(self.messages), 0
        if self.limit is None:
            return ids, wanted
        while self.limit - len(ids) < min(wanted, self.limit // 4):
            turns = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
            if len(turns) < 2:
                break
            self.messages = self.messages[: turns[0]] + self.messages[turns[1] :]
            ids, forgotten = self._encode(self.messages), forgotten + 1
        if forgotten:
            turns = "turn is" if forgotten == 1 else f"{forgotten} turns are"
            say(f"{self.name} reads {self.limit} tokens: the oldest {turns} forgotten")
        if len(ids) >= self.limit:
            raise SetupError(f"{self.name} reads {self.limit} tokens, and this prompt has {len(ids)}: shorten it")
        return ids, min(wanted, self.limit - len(ids))


def plain(text: str) -> str:
    """`text` without control characters: what a model writes must not command the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


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
                raise SetupError(f"no command {word}{schema.meant(word, known)}; /help lists them")
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
    parser = argparse.ArgumentParser(
        prog="pipelines chat",
        description="Talk to stages, folders or hub models; several answer side by side. "
        "From a pipe (echo … | python -m pipelines chat RUN/STAGE) only the answer goes to stdout.",
        epilog=HELP.format(keys=", ".join(f.name for f in fields(Settings))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", metavar="RUN[/STAGE]", help="a run (its last stage that writes), a stage, "
                        "a folder or a hub id")  # fmt: skip
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
        raise SetupError("nothing came through the pipe: echo PROMPT | python -m pipelines chat RUN/STAGE")
    speakers = [Speaker(path, args.trust_remote_code) for path in paths]
    for speaker, speaker.name in zip(speakers, _names(paths), strict=True):
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
