"""Turns prompts, answers and dialogues into token ids: the one place, so that training and inference see the same.

A sequence is tokenized in *segments*: everything the model reads before an answer, then the answer itself with its
EOS. At inference the prompt is tokenized alone and the answer is generated after it, so tokenizing the segments
apart gives exactly the ids of inference, for any template, and the loss mask is exact without `{% generation %}`.

A plain string prompt is one user message. The template `plain` (also what a tokenizer without a template gets) puts
nothing around a message, so that prompt and completion are text that follow each other, closed by EOS.
"""

from __future__ import annotations

import logging
from pathlib import Path

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"

IGNORED = -100


class TemplateError(ValueError):
    """A chat template whose answers cannot be told apart from what surrounds them, with the fix."""


def as_messages(prompt) -> list[dict]:
    """A prompt in any accepted form (text, or a list of `{"role", "content"}`) as a list of messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def as_text(prompt) -> str:
    """A prompt for people to read: its last message, or itself when it is text."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def encode_prompt(tokenizer, prompt) -> list[int]:
    """Token ids that the model sees before it begins its answer (with the template's generation prompt)."""
    return _ids(tokenizer, _render(tokenizer, as_messages(prompt), True), first=True)


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
        labels += segment if is_answer else [IGNORED] * len(segment)
    return ids, labels


def _segments(tokenizer, messages) -> list[tuple[list[int], bool]]:
    """The dialogue cut into (ids, is_answer): context, answer, context, answer … A tail after the last answer is cut."""
    out, done = [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:i], True)
        after = _render(tokenizer, messages[: i + 1], False)
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


def _render(tokenizer, messages, add_generation_prompt: bool) -> str:
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


def install_template(model, tokenizer, template: str | None) -> list[str]:
    """Give `tokenizer` the chat template `template` and `model` the tokens it needs; returns the tokens added.

    `template` is "chatml", "plain" (text as it stands), a path to a .jinja file, or None: keep the tokenizer's own, or
    chatml where it has none. chatml's markers are added where the vocabulary lacks them, and `<|im_end|>` becomes EOS;
    so does the token with which any other template closes an answer (Gemma's `<end_of_turn>`, Phi's `<|end|>`).
    In every case PAD is made a token of its own (pad == eos means that EOS is never learned).
    """
    added = dress(tokenizer, template)
    fit_model(model, tokenizer)
    return added


def dress(tokenizer, template: str | None) -> list[str]:
    """The tokenizer's half of `install_template`; returns the tokens added."""
    added: list[str] = []
    if template is None:
        template = "chatml" if tokenizer.chat_template is None else "keep"
    if template == "chatml":
        tokenizer.chat_template = (TEMPLATES / "chatml.jinja").read_text()
        added += _add(tokenizer, ["<|im_start|>", "<|im_end|>"])
        tokenizer.eos_token = "<|im_end|>"
    elif template == "plain":
        tokenizer.chat_template = (TEMPLATES / "plain.jinja").read_text()
    elif template != "keep":
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    end = closing_token(tokenizer)
    if end is not None and end != tokenizer.eos_token:
        logger.info("EOS is %s, with which the chat template closes an answer (it was %s)", end, tokenizer.eos_token)
        tokenizer.eos_token = end
    return added + ensure_pad(tokenizer)


def closing_token(tokenizer) -> str | None:
    """The special token that the chat template puts right after an answer; None where there is none.

    Many instruction-tuned models name another EOS in their tokenizer, and list this one in their generation config.
    """
    question = {"role": "user", "content": "Is it?"}
    text = _render(tokenizer, [question, {"role": "assistant", "content": "It is."}], False)
    tail = text[text.rindex("It is.") + len("It is.") :] if "It is." in text else ""
    ids = tokenizer(tail.lstrip(), add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return tokenizer.convert_ids_to_tokens(ids[0]) if ids and ids[0] in special else None


def ensure_pad(tokenizer) -> list[str]:
    """PAD becomes a token of its own where it is missing or equals EOS; returns the tokens added."""
    if tokenizer.eos_token is None:
        raise TemplateError("the tokenizer has no EOS token: set `eos_token` in its tokenizer_config.json.")
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return []
    added = _add(tokenizer, ["<|pad|>"])
    tokenizer.pad_token = "<|pad|>"
    return added


def fit_model(model, tokenizer) -> None:
    """Grow the embeddings to the tokenizer (mean-initialised, never shrunk) and agree on PAD and EOS."""
    from pipelines.models import vocabulary

    if len(tokenizer) > vocabulary(model):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    config = model.config.get_text_config()
    config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = tokenizer.eos_token_id
    if config is not model.config:
        model.config.pad_token_id, model.config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        ends = generation.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        ends = [tokenizer.eos_token_id] + [e for e in ends if e != tokenizer.eos_token_id]
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
        generation.pad_token_id = tokenizer.pad_token_id


def _add(tokenizer, tokens: list[str]) -> list[str]:
    known = tokenizer.get_vocab()
    new = [t for t in tokens if t not in known]
    if new:
        tokenizer.add_tokens(new, special_tokens=True)
    return new
