"""One model in a dialogue: its template, its context, and answers that stream as they are written."""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import transformers
from transformers import TextStreamer, set_seed

from pipelines import errors, files
from pipelines.data.plain_text import tokenize
from pipelines.errors import SetupError
from pipelines.generation.answers import end_tokens, length_as_asked
from pipelines.models import chat_template, loading, tokenizer_setup


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
            raise SetupError(f"no setting {key!r}{errors.meant(key, types_)}; there are {', '.join(types_)}")
        least = {"temperature": 0, "top_p": 0.001, "top_k": 0, "max_new_tokens": 1, "seed": -1}[key]
        try:
            number = types_[key](value)
        except ValueError:
            number = None
        if number is None or not least <= number <= (1 if key == "top_p" else 2**31):
            kind = "a whole number" if types_[key] is int else "a number"
            raise SetupError(f"{key}={value}: must be {kind} {'from 0.001 to 1' if key == 'top_p' else f'>= {least}'}")
        setattr(self, key, number)


class Speaker:
    """One model with its tokenizer, and the dialogue held with it so far."""

    def __init__(self, path: str, trust_remote_code: bool = False):

        transformers.utils.logging.disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        section = types.SimpleNamespace(
            model_name_or_path=path,
            tokenizer_name_or_path=None,
            model_revision=None,
            config=None,
            trust_remote_code=trust_remote_code,
            dtype="auto" if device == "cuda" else None,
            attn_implementation=None,
            load_in_4bit=False,
            load_in_8bit=False,
        )
        self.path, self.name = path, Path(path).name
        self.tokenizer = loading.load_tokenizer(section)
        config = loading.config_of(path, trust_remote_code=trust_remote_code)
        self.translates = config.is_encoder_decoder
        auto = "AutoModelForSeq2SeqLM" if self.translates else "AutoModelForCausalLM"
        model = loading.load_model(section, auto)
        tokenizer_setup.fit_vocabulary(model, self.tokenizer)
        length_as_asked(model)
        self.model = model.to(device).eval()
        self.limit = None if self.translates else loading.positions(self.model)
        self.keeps = bool(self.tokenizer.chat_template) and not self.translates
        self.messages: list[dict] = []
        self.prefix = files.source_prefix(path)

    def reset(self, system: str = "") -> None:
        """Begin a new dialogue; raises `SetupError` where the model takes no `system`."""

        messages = [{"role": "system", "content": system}] if system else []
        if system:
            if not self.keeps:
                raise SetupError(f"{self.name} has no chat template: it cannot be told anything beforehand")
            try:
                self._encode([*messages, {"role": "user", "content": "x"}])
            except errors.TemplateError as error:
                raise SetupError(f"{self.name}: its chat template takes no system message ({error})") from error
        self.messages = messages

    def answer(self, text: str, settings: Settings, write: Callable[[str], None], say: Callable[[str], None]) -> str:
        """Answer `text`, streaming the answer to `write` and remarks to `say`; both sides join the dialogue.

        Ctrl-C ends the answer where it is. Raises `SetupError` for a text that is longer than the model reads.
        """

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
        if not self.translates and self.tokenizer.eos_token_id is not None:
            how["eos_token_id"] = end_tokens(self.model, self.tokenizer)
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

        if self.translates:
            return tokenize(self.tokenizer, self.prefix + messages[-1]["content"])["input_ids"]
        return chat_template.encode_prompt(self.tokenizer, messages)

    def _fit(self, wanted: int, say) -> tuple[list[int], int]:
        """`(ids, tokens left for the answer)`; the oldest turns go until a quarter of the context, or `wanted`, is
        free.
        """
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
