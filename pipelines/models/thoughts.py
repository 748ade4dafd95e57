"""Thoughts of reasoning models: what a model writes before its answer, which is not what people or judges rank."""

from __future__ import annotations

from pipelines.errors import TemplateError
from pipelines.models.chat_template import opened_thought, render_template

# How public models mark a thought: Qwen, DeepSeek and others; Magistral; Command; Seed.
MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
)


# gpt-oss writes one message after another, each in a channel (OpenAI's harmony format): thoughts are in `analysis`.
CHANNEL, MESSAGE = "<|channel|>", "<|message|>"


def split(tokenizer, responses: list[list[int]]) -> tuple[list[str], list[bool]]:
    """The answers in `responses` (token ids) as text without their thoughts, and whether a thought was taken from each.

    A thought that did not come to its end leaves an empty answer; an empty thought is none. Special tokens are left
    out.
    """
    always = opens_thought(tokenizer)
    found = [_split(tokenizer, ids, always) for ids in responses]
    return [text for text, _ in found], [thought for _, thought in found]


def opens_thought(tokenizer) -> bool:
    """Whether the template begins every answer with a thought, so that the model does not write its first mark."""
    try:
        prompt = render_template(tokenizer, [{"role": "user", "content": "x"}], True)
    except TemplateError:
        return False
    return bool(opened_thought(prompt))


def _split(tokenizer, ids: list[int], always: bool) -> tuple[str, bool]:
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    channel, message = _token(tokenizer, CHANNEL), _token(tokenizer, MESSAGE)
    if channel is not None and channel in ids:
        at = len(ids) - 1 - ids[::-1].index(channel)  # of the last message
        name, has_text, text = ids[at + 1 :], message in ids[at:], []
        if has_text:
            cut = at + ids[at:].index(message)
            name, text = ids[at + 1 : cut], ids[cut + 1 :]
        if decode(name).strip().startswith("analysis") or not has_text:
            return "", True  # it broke off
        return decode(text), ids.index(channel) < at
    for first, last in MARKS:  # where they are tokens, perhaps special ones, which a decoded text does not show
        begin, end = (_token(tokenizer, mark) for mark in (first, last))
        if end is not None and end in ids:
            at = len(ids) - 1 - ids[::-1].index(end)
            thought = decode([i for i in ids[:at] if i != begin]).strip()
            return decode(ids[at + 1 :]), bool(thought)
        if begin is not None and ids[:1] == [begin]:
            return "", True
    text = decode(ids)
    for first, last in MARKS:
        thought, ended, answer = text.rpartition(last)
        if ended:
            return answer, bool(thought.replace(first, "").strip())
        if text.lstrip().startswith(first):
            return "", True
    return ("", True) if always else (text, False)


def _token(tokenizer, mark: str) -> int | None:
    return tokenizer.get_added_vocab().get(mark)
