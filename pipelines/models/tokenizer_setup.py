"""Tokenizers made ready: a chat template and its tokens, a PAD of its own, embeddings that fit."""

from __future__ import annotations

import inspect
import logging
import re
from pathlib import Path

import transformers

from pipelines.errors import TemplateError, meant
from pipelines.models.chat_template import TEMPLATES, encode_answer, render_template
from pipelines.models.loading import vocabulary

logger = logging.getLogger(__name__)

# What a template is given for each dialogue.
GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token")


def install_template(model, tokenizer, template: str | None, variables: dict | None = None) -> list[str]:
    """Give `tokenizer` the chat template `template` and `model` the tokens it needs; returns the tokens added.

    `template` is "chatml", "plain" (text as it stands), a path to a .jinja file, or None: keep the tokenizer's own, or
    chatml where it has none. chatml's markers are added where the vocabulary lacks them, and `<|im_end|>` becomes EOS;
    so does the token with which any other template closes an answer (Gemma's `<end_of_turn>`, Phi's `<|end|>`).
    In every case PAD is made a token of its own (pad == eos means that EOS is never learned).
    """
    added = dress(tokenizer, template, variables)
    fit_model(model, tokenizer)
    _end_with_the_template(model, tokenizer)
    return added


def _end_with_the_template(model, tokenizer) -> None:
    """Let generation end with the token that closes a learned answer where it is not EOS (GLM's `<|user|>`)."""
    generation = getattr(model, "generation_config", None)
    try:
        last = encode_answer(tokenizer, "Is it?", "It is.")[1][-1]
    except TemplateError:
        return  # the stage's own rows will say why
    if generation is not None and last != tokenizer.eos_token_id:
        ends = generation.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        generation.eos_token_id = list(dict.fromkeys([*ends, last]))


def dress(tokenizer, template: str | None, variables: dict | None = None) -> list[str]:
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
    if variables:
        set_variables(tokenizer, variables)
    end = closing_token(tokenizer)
    if end is not None and end != tokenizer.eos_token:
        logger.info("EOS is %s, with which the chat template closes an answer (it was %s)", end, tokenizer.eos_token)
        tokenizer.eos_token = end
    return added + ensure_pad(tokenizer)


def set_variables(tokenizer, variables: dict) -> None:
    """Write values of its own variables into the chat template, so that everybody who uses it has them alike.

    Whoever passes another value to the template still gets that. Raises `TemplateError` for what it does not use.
    """
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {"": tokenizer.chat_template}
    used = {name for template in named.values() for name in re.findall(r"[A-Za-z_]\w*", template)}
    for name in variables:
        if name in GIVEN or name not in used:
            raise TemplateError(
                f"model.chat_template_kwargs: {name!r} is no variable of the chat template"
                f"{meant(name, used - {*GIVEN})}; drop it"
            )
    head = "".join(
        f"{{%- if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif -%}}"
        for name, value in variables.items()
    )
    named = {key: template if template.startswith(head) else head + template for key, template in named.items()}
    tokenizer.chat_template = named if isinstance(tokenizer.chat_template, dict) else named[""]


def _literal(value) -> str:
    """A value of a recipe as Jinja writes it."""
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return (
        {True: "true", False: "false", None: "none"}[value]
        if value is None or value is True or value is False
        else str(value)
    )


def closing_token(tokenizer) -> str | None:
    """The special token that the chat template puts right after an answer; None where there is none.

    Many instruction-tuned models name another EOS in their tokenizer, and list this one in their generation config.
    """
    question = {"role": "user", "content": "Is it?"}
    text = render_template(tokenizer, [question, {"role": "assistant", "content": "It is."}], False)
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


def fit_vocabulary(model, tokenizer) -> None:
    """Give a finished model embeddings of all tokens that its tokenizer can write; logged, for it never
    learned them.
    """
    if (missing := len(tokenizer) - vocabulary(model)) > 0:
        logger.warning(
            "%s: its tokenizer writes %d tokens that the model never learned; they are read as an average token",
            model.name_or_path,
            missing,
        )
        _grow(model, len(tokenizer))


def _grow(model, size: int) -> None:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it announces that new embeddings start near the others' mean
    try:
        model.resize_token_embeddings(size, mean_resizing=True)
    finally:
        transformers.logging.set_verbosity(verbosity)


def fit_model(model, tokenizer) -> None:
    """Grow the embeddings to the tokenizer (mean-initialised, never shrunk) and agree on PAD and EOS."""

    if len(tokenizer) > vocabulary(model):
        _grow(model, len(tokenizer))
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


def read_by_model(model, tokenizer) -> None:
    """Let the tokenizer write only what the model reads: not every encoder knows segments (`token_type_ids`)."""

    known = inspect.signature(model.forward).parameters
    segments = getattr(model.config, "type_vocab_size", 2) > 1
    tokenizer.model_input_names = [
        name for name in tokenizer.model_input_names if name in known and (segments or name != "token_type_ids")
    ]
