"""Control tokens: only what a chat template writes is one; the same characters in somebody's text stay text.

A tokenizer finds `<|im_end|>` wherever it stands, so a row, or a person in `chat`, could forge turns. transformers' own
`sanitize_control_tokens` marks such texts before the template sees them and tokenizes what is marked as plain text. Its
two halves are used here apart, because training needs the rendered text in between. Dialogues that hold no such text,
nearly all, are tokenized in one piece as ever.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator

from transformers.utils.chat_template_utils import (
    _CONTROL_TOKEN_END,
    _CONTROL_TOKEN_START,
    encode_marked_chat,
    mark_control_tokens,
)

from pipelines.data.plain_text import one_of, special_texts
from pipelines.errors import TemplateError

_MADE: weakref.WeakKeyDictionary = (
    weakref.WeakKeyDictionary()
)  # tokenizer -> (the state it was made for, ControlTokens)


def control_tokens(tokenizer, around_a_turn: Callable[[], str]) -> ControlTokens:
    """The control tokens of a tokenizer with its template; `around_a_turn` renders what stands around a user's text."""
    state = len(tokenizer), tokenizer.eos_token, str(tokenizer.chat_template)
    made = _MADE.get(tokenizer)
    if made is None or made[0] != state:
        made = _MADE[tokenizer] = (state, ControlTokens(tokenizer, around_a_turn))
    return made[1]


class ControlTokens:
    """Finds and marks the texts of control tokens.

    Control are the special tokens and, as in transformers, other added tokens that the template names (`<tool_call>`);
    of an assistant's message only those that stand around turns, for it may hold the model's own markup (`<think>`).
    """

    def __init__(self, tokenizer, around_a_turn: Callable[[], str]):
        added = tokenizer.added_tokens_decoder.values()
        special = special_texts(tokenizer)
        others = [token.content for token in added if not token.special and token.content.strip()]
        named = {text for text in others if text in str(tokenizer.chat_template)}
        around = around_a_turn() if named else ""
        self.turns = one_of({*special, *(text for text in named if text in around)})  # what can begin or end a turn
        self.all = one_of({*special, *named})
        texts = {*special, *named}
        self.beginnings = {text[:n] for text in texts for n in range(1, len(text))}
        self.longest = max(map(len, texts), default=0)
        self.known: set[tuple] = set()  # roles and keys that the template was seen to show

    def pattern(self, message: dict) -> re.Pattern:
        """What must not be control in the texts of a message (a tool's description counts as one without a role)."""
        return self.turns if message.get("role") == "assistant" else self.all

    def found_in(self, messages: list[dict]) -> bool:
        """Whether any text in the messages holds the text of a control token."""
        return any(self.pattern(message).search(text) for message in messages for text in _texts(message))

    def marked(self, messages: list[dict]) -> list[dict]:
        """The messages (or tools) with control tokens' texts marked; the same objects where there are none."""
        texts = list(_texts(messages))
        if not self.found_in(messages) and not any(map(self._breaks_off, texts)):
            return messages
        if any(mark in text for text in texts for mark in (_CONTROL_TOKEN_START, _CONTROL_TOKEN_END)):
            raise TemplateError(
                "holds a control token's text and one of the characters U+F0000 and U+F0001, with which such texts are "
                "marked: take one of them out"
            )
        return [self._closed(mark_control_tokens(message, self.pattern(message))) for message in messages]

    def _breaks_off(self, text: str) -> bool:
        """Whether a text ends in the beginning of a control token, which the next text could complete."""
        text = text.rstrip()
        return any(text[-n:] in self.beginnings for n in range(1, min(len(text), self.longest) + 1))

    def _closed(self, value):
        if isinstance(value, str):
            return value + _CONTROL_TOKEN_END if self._breaks_off(value) else value
        if isinstance(value, dict):
            return {key: self._closed(item) for key, item in value.items()}
        return [self._closed(item) for item in value] if isinstance(value, list) else value


def encode_rendered(tokenizer, text: str) -> list[int]:
    """Ids of a rendered dialogue whose contents were `marked`; nothing is put before or after it."""
    if _CONTROL_TOKEN_START not in text and _CONTROL_TOKEN_END not in text:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    try:
        return encode_marked_chat(tokenizer, text)
    except ValueError:  # a vocabulary that holds a control token's text as an ordinary piece, too: cut it in two
        marked = re.compile(f"{_CONTROL_TOKEN_START}(.)([^{_CONTROL_TOKEN_END}]+){_CONTROL_TOKEN_END}")
        return encode_marked_chat(tokenizer, marked.sub(rf"\1{_CONTROL_TOKEN_END}\2", text))


def _texts(value) -> Iterator[str]:
    """Every text inside a list or mapping, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
