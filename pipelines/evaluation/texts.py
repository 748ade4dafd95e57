"""How well a model predicts texts: the loss per token, perplexities and bits that compare across tokenizers."""

from __future__ import annotations

import hashlib
import logging
import math

import numpy as np
import torch

from pipelines import files
from pipelines.data import mixing
from pipelines.data.plain_text import tokenize
from pipelines.errors import DataError
from pipelines.evaluation.batches import by_length, rows_of
from pipelines.evaluation.figures import Items, ratio
from pipelines.generation.logprobs import answer_nats
from pipelines.models import chat_template, loading

logger = logging.getLogger(__name__)


def text_values(name: str, model, tokenizer, settings, seed: int) -> dict[str, Items]:
    """Loss and perplexity per token, bits and perplexity per byte, perplexity per word of `settings.text`.

    The texts are laid end to end and cut into windows of the context, which do not overlap; the first token of each is
    not predicted, as in the pretrain stage. An EOS is put after every row of the file (every line of plain text); with
    `settings.running_text` the file is one text without any EOS. A word is what white space parts. Bytes and words are
    those of the texts alone; that an EOS costs nats and no byte makes rows look worse than running text.
    """
    texts = (
        running(settings.text, seed)
        if settings.running_text
        else [r["text"] for r in rows_of(settings.text, "text", seed)]
    )
    end = [] if settings.running_text or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for start in range(0, len(texts), 1000):
        for text in tokenize(tokenizer, texts[start : start + 1000], add_special_tokens=False)["input_ids"]:
            ids += text + end
    size = loading.context_length(model, settings.max_length)
    windows = [w for w in (ids[i : i + size] for i in range(0, len(ids), size)) if len(w) > 1]
    if not windows:
        raise DataError(f"{settings.text}: has {len(ids)} tokens: nothing to predict")
    logger.info(
        "%s: text is %s, %s; %s tokens in %d windows of %d",
        name,
        "one running text" if settings.running_text else f"{len(texts):,} rows",
        f"with {tokenizer.eos_token} after each" if end else "no EOS anywhere",
        f"{len(ids):,}",
        len(windows),
        size,
    )

    def work(some: list[int]) -> list[float]:
        return answer_nats(model, [(windows[i][:1], windows[i][1:]) for i in some])

    nats = by_length([len(w) for w in windows], settings.batch_size, work, f"{name}: text")
    tokens = np.array([len(w) - 1 for w in windows])
    # Of a window's bytes and words only the mean is known: tokens do not end where words do.
    per_byte = tokens * (sum(len(text.encode()) for text in texts) / len(ids))
    per_word = tokens * (sum(len(text.split()) for text in texts) / len(ids))
    same = hashlib.blake2b(np.array(ids).tobytes() + size.to_bytes(8, "big"), digest_size=8).hexdigest()
    return {
        "loss_per_token": ratio(nats, tokens, same=same),
        "perplexity": ratio(nats, tokens, np.exp, same),
        "bits_per_byte": ratio(nats, per_byte * math.log(2), same=same),
        "perplexity_per_byte": ratio(nats, per_byte, np.exp, same),
        "perplexity_per_word": ratio(nats, per_word, np.exp, same),
    }


def running(path: str, seed: int) -> list[str]:
    """The file as one text: plain text as it is, line ends and all; rows of other files with a blank line between."""
    source = {"path": path, "sample_by": "document"}
    texts = [row["text"] for row in mixing.stream({"train": source}, "train", "text", seed)]
    if not texts:
        raise DataError(f"{path}: no text")
    return ["\n\n".join(texts)]


def pair_losses(name: str, path: str, model, tokenizer, settings, rows: list[dict]) -> dict[str, Items]:
    """Loss and perplexity per token of the rows' own answers (EOS included), given their prompts or sources.

    Dialogues are read by the chat template, as in training; an encoder-decoder finds its stage's prefix. Where prompt
    and answer are longer than the context the prompt is cut at its beginning, a source at its end; counted and logged.
    """
    context = loading.context_length(model, settings.max_length)
    if model.config.is_encoder_decoder:
        encoded, long = _sources(path, tokenizer, rows, context)
        loss = _seq2seq_loss
    else:
        encoded, long = _answers(tokenizer, rows, context)
        loss = lambda model, _, some: answer_nats(model, some)
    if long:
        logger.warning(
            "%s: %d of %d pairs are longer than %d tokens: prompts are cut at their beginning, sources at their end "
            "(the first: %s)",
            name,
            len(long),
            len(rows),
            context,
            rows[long[0]]["where"],
        )
    work = lambda some: loss(model, tokenizer, [encoded[i] for i in some])
    lengths = [len(before) + len(answer) for before, answer in encoded]
    nats = by_length(lengths, settings.batch_size, work, f"{name}: pairs")
    tokens = [len(answer) for _, answer in encoded]
    return {"loss_per_token": ratio(nats, tokens), "perplexity": ratio(nats, tokens, np.exp)}


def split_row(row: dict) -> tuple:
    """`(prompt, answer)` of an sft row; of a dialogue the last answer, and what stands before it.

    Raises `DataError` for a dialogue without an answer.
    """
    if "messages" not in row:
        return row["prompt"], row["completion"]
    last = max((i for i, m in enumerate(row["messages"]) if m["role"] == "assistant"), default=0)
    if not last:
        raise DataError(f"{row['where']}: no answer to compare with")
    return row["messages"][:last], row["messages"][last : last + 1]


def text_of_answer(row: dict) -> str:
    """The text of an sft row's answer; `DataError` for one that calls tools, which is nothing to compare texts with."""
    _, answer = split_row(row)
    if isinstance(answer, str):
        return answer
    if any(message.get("tool_calls") for message in answer):
        raise DataError(f"{row['where']}: its answer calls tools; pairs compares texts, so leave such rows out")
    return chat_template.as_text(answer)


def _answers(tokenizer, rows: list[dict], context: int):
    encoded, long = [], []
    for i, row in enumerate(rows):
        with chat_template.naming(row):
            before, ids = chat_template.encode_answer(tokenizer, *split_row(row), row.get("tools"))
        if len(before) + len(ids) > context:
            long.append(i)
            ids = ids[: context - 1]  # of an answer that fills the context alone, what can be predicted
            before = before[-(context - len(ids)) :]
        encoded.append((before, ids))
    return encoded, long


def _sources(path: str, tokenizer, rows: list[dict], context: int):
    sources = tokenize(tokenizer, [files.source_prefix(path) + row["source"] for row in rows])["input_ids"]
    long = [i for i, ids in enumerate(sources) if len(ids) > context]
    for i in long:
        text = files.source_prefix(path) + rows[i]["source"]
        sources[i] = tokenize(tokenizer, text, truncation=True, max_length=context)["input_ids"]
    targets = tokenize(tokenizer, text_target=[row["target"] for row in rows])["input_ids"]
    return list(zip(sources, targets, strict=True)), long


def _seq2seq_loss(model, tokenizer, some) -> list[float]:
    batch = tokenizer.pad({"input_ids": [source for source, _ in some]}, return_tensors="pt").to(model.device)
    width = max(len(target) for _, target in some)
    labels = torch.tensor([target + [-100] * (width - len(target)) for _, target in some], device=model.device)
    logits = model(**batch, labels=labels).logits.float()
    every = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return every.double().sum(1).tolist()
