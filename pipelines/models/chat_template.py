"""Turns prompts, answers and dialogues into token ids: the one place, so that training and inference see the same.

A sequence is tokenized in *segments*: everything the model reads before an answer, then the answer itself with its
EOS. At inference the prompt is tokenized alone and the answer is generated after it, so tokenizing the segments
apart gives exactly the ids of inference, for any template, and the loss mask is exact without `{% generation %}`.

A plain string prompt is one user message. The template `plain` (also what a tokenizer without a template gets) puts
nothing around a message, so that prompt and completion are text that follow each other, closed by EOS.
"""

from __future__ import annotations

from pathlib import Path

from pipelines import IGNORE_INDEX
from pipelines.errors import TemplateError

TEMPLATES = Path(__file__).parent / "templates"


def as_messages(prompt) -> list[dict]:
    """A prompt in any accepted form (text, or a list of `{"role", "content"}`) as a list of messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def as_text(prompt) -> str:
    """A prompt for people to read: its last message, or itself when it is text."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def encode_prompt(tokenizer, prompt) -> list[int]:
    """Token ids that the model sees before it begins its answer (with the template's generation prompt)."""
    return _ids(tokenizer, render_template(tokenizer, as_messages(prompt), True), first=True)


def encode_answer(tokenizer, prompt, completion) -> tuple[list[int], list[int]]:
    """`(prompt_ids, answer_ids)`: the answer ends in EOS, and nothing that the template puts after it is kept."""
    completion = completion if isinstance(completion, str) else completion[-1]["content"]
    segments = _segments(tokenizer, as_messages(prompt) + [{"role": "assistant", "content": completion}])
    return [i for ids, _ in segments[:-1] for i in ids], segments[-1][0]


def encode_messages(tokenizer, messages) -> tuple[list[int], list[int]]:
    """`(input_ids, labels)` of a whole dialogue: labels are the ids of every assistant answer incl. EOS, else -100."""
    ids, labels = [], []
    for segment, is_answer in _segments(tokenizer, messages):
        ids += segment
        labels += segment if is_answer else [IGNORE_INDEX] * len(segment)
    return ids, labels


def _segments(tokenizer, messages) -> list[tuple[list[int], bool]]:
    """The dialogue cut into (ids, is_answer): context, answer, context, answer … A tail after the last answer is cut."""
    out, done = [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render_template(tokenizer, messages[:i], True)
        after = render_template(tokenizer, messages[: i + 1], False)
        if not (before.startswith(done) and after.startswith(before)):
            raise TemplateError(
                "the chat template rewrites what came before an answer (it is not prefix-preserving), so the answer "
                "cannot be told apart. Use a template that only appends, e.g. `chat_template: chatml`."
            )
        answer = after[len(before) :]
        end = answer.find(tokenizer.eos_token, len(message["content"].strip()))
        if end < 0:
            raise TemplateError(
                f"the chat template does not end an answer with the EOS token {tokenizer.eos_token!r}: the model "
                "would never learn to stop. Use `chat_template: chatml`, or set the tokenizer's EOS to the token "
                "with which the template closes an answer."
            )
        answer = answer[: end + len(tokenizer.eos_token)]
        out.append((_ids(tokenizer, before[len(done) :], first=not out), False))
        out.append((_ids(tokenizer, answer), True))
        done = before + answer
    return out


def render_template(tokenizer, messages, add_generation_prompt: bool) -> str:
    template = None if tokenizer.chat_template else (TEMPLATES / "plain.jinja").read_text()
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def _ids(tokenizer, text: str, first: bool = False) -> list[int]:
    """Ids of one segment. A template writes its own BOS; plain text gets the tokenizer's, at its very beginning."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if first and (not tokenizer.chat_template or tokenizer.chat_template == (TEMPLATES / "plain.jinja").read_text()):
        bos = tokenizer.bos_token_id
        if bos is not None and tokenizer("x")["input_ids"][:1] == [bos]:
            return [bos, *ids]
    return ids
