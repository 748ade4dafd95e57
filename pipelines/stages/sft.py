"""Supervised fine-tuning: the model learns from labellers' answers, with loss on the answers only.

    sft:
      kind: sft
      model: {model_name_or_path: stage:base, chat_template: chatml}    # or any hub id or folder
      data: {train: answers.jsonl, validation: 0.05}                    # prompt+completion | messages | instruction…
      args: {global_batch_size: 32, learning_rate: 2e-5, num_train_epochs: 3, packing: true, max_length: 1024}

Rows of a batch are laid end to end, never padded; with `packing: true` each row is a pack of short examples that fills
`max_length`. Examples never see each other (tests/test_packing.py shows packed equals separate). An architecture that
cannot be packed exactly is found out and padded, and logged. Rows are encoded once and kept
(`pipelines.data.encoded_rows`), or with `data.streaming` read and encoded while training goes on
(pipelines/data/streaming.py).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from functools import partial

import numpy as np
from transformers import Trainer, set_seed
from trl import SFTTrainer

from pipelines import IGNORE_INDEX, errors
from pipelines.data import encoded_rows, mixing, plain_text, streaming
from pipelines.models import adapters, chat_template, loading, tokenizer_setup
from pipelines.speed import fast_model, packed_attention, packing
from pipelines.training import arguments, language_model, loop, saving
from pipelines.training.trainer import ChainTrainer, RowCollator

logger = logging.getLogger(__name__)

DEFAULTS = {
    "learning_rate": 2e-5,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
}

# TRL options that would change what our own preparation of the rows does.
NOT_HERE = {
    "assistant_only_loss": "the loss is always on the assistant's answers only",
    "completion_only_loss": "the loss is always on the answers only",
    "padding_free": "batches hold no padding wherever the architecture allows it",
    "dataset_text_field": "map the columns with data.columns",
    "eos_token": "EOS comes from the chat template: set model.chat_template",
    "pad_token": "PAD is always a token of its own",
    "packing_strategy": "packs are always best-fit and never cut an example",
}


def reported(stage) -> tuple[str, ...]:
    """What an evaluation reports; the first decides about the best model where the recipe names none."""
    return ("loss", "perplexity")


def problems(stage, kinds) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the stage as a whole: `(key path, message, value)`."""
    for key, reason in NOT_HERE.items():
        if key in stage.sections.get("args", {}):
            yield f"args.{key}", f"not needed: {reason}", stage.sections["args"][key]
    if not stage.sections.get("model", {}).get("model_name_or_path"):
        yield "model.model_name_or_path", "sft starts from a model: a hub id, a folder or stage:NAME", None


class AnswerTrainer(language_model.LanguageModelTrainer, ChainTrainer, SFTTrainer):
    """TRL's trainer on packed batches, with the model's own (fast, packed) loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


def run(stage) -> dict:
    """Train, evaluate, save; returns the metrics."""

    set_seed(stage.seed)
    section = stage.section("model")
    args = arguments.build_args(stage)
    tokenizer = loading.load_tokenizer(section)
    model = loading.load_model(section, "AutoModelForCausalLM")
    added = tokenizer_setup.install_template(model, tokenizer, section.chat_template, section.chat_template_kwargs)
    if added:
        logger.info("tokens added: %s (embeddings start at the mean of the others)", " ".join(added))
    context = loading.context_length(model, stage.sections.get("args", {}).get("max_length"))

    too_long, streamed = stage.section("data").too_long, stage.section("data").streaming

    def make():
        sets = {}
        for side, rows in encode(stage, tokenizer, context).items():
            packed = args.packing and side == "train"
            sets[side] = language_model.packed_dataset(rows, context) if packed else language_model.rows_dataset(rows)
        return sets

    settings = {"context": context, "packing": args.packing}
    sets = encoded_rows.encoded_rows(stage, tokenizer, settings, make)
    (train_set, where), (validation_set, _) = sets["train"], sets["validation"]
    stream = None
    if streamed:
        encoder = _encoder(tokenizer, context, too_long)
        stream = streaming.Stream(stage, stage.spec.rows, args, encoder, streaming.packs(context, args.packing))
        where = stream.names
        # TRL looks at a row of the training set, which must be one of `datasets`; the stream takes its place.
        train_set = language_model.rows_dataset([{"input_ids": [0], "labels": [0], "where": ""}])
    elif args.packing:
        stage.report["packs"] = len(train_set)
        used = stage.report["train"]["used"]
        logger.info("%d examples in %d packs of up to %d tokens", used, len(train_set), context)
    fast_model.fast_model(model)
    collator = packing.PackedCollator()
    try:
        packed_attention.enable_packed_attention(model)
    except errors.CannotPack as error:
        if args.packing:
            raise
        logger.warning("%s cannot be packed (%s): its batches are padded instead.", error.model, error.reason)
        collator = packing.PaddedCollator(tokenizer.pad_token_id)
    model = adapters.adapt(model, section, "CAUSAL_LM", tokenizer.convert_tokens_to_ids(added))

    args.prediction_loss_only = True
    args.packing = False  # the packs are made; TRL would otherwise pack them again
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    trainer = AnswerTrainer(
        model=model,
        args=args,
        train_dataset=train_set.with_format("numpy"),
        eval_dataset=validation_set.with_format("numpy") if validation_set else None,
        processing_class=tokenizer,
        data_collator=RowCollator(collator),
    )
    trainer.stream, trainer.where = stream, where
    loop.fit(stage, trainer)
    if stream:
        stage.report["train"] = stream.report()
    metrics = saving.final_metrics(trainer, reuse=True)
    saving.save(trainer, stage.folder, tokenizer)
    return metrics


def ready(stage, tokenizer):
    """The tokenizer as the stage trains with it."""
    tokenizer_setup.dress(tokenizer, stage.section("model").chat_template, stage.section("model").chat_template_kwargs)
    return tokenizer


def encode(stage, tokenizer, context: int) -> dict[str, list[dict]]:
    """The encoded rows of each side, those of a stream left out: `{"input_ids", "labels", "where"}`, not packed yet."""
    sides = zip(("train", "validation"), mixing.load(stage.data, stage.spec.rows, stage.seed, report=stage.report))
    too_long = stage.section("data").too_long
    return {side: _encode(stage, side, rows, tokenizer, context, too_long) for side, rows in sides if rows}


def shown(stage, tokenizer, model) -> Iterator[dict]:
    """The rows that the model is given, before they are packed, for `pipelines show`; counts go to `stage.report`."""
    section, args = stage.section("data"), stage.sections.get("args", {})
    context = loading.context_length(model, args.get("max_length"))
    sides = {}
    if section.streaming:
        block = mixing.first_block(stage.data, stage.spec.rows, stage.seed, section.buffer_size, stage.report)
        sides["train"] = _encode(stage, "train", block, tokenizer, context, section.too_long)
    sides |= encode(stage, tokenizer, context)
    if args.get("packing"):
        packs = packing.plan_packs([len(row["input_ids"]) for row in sides["train"]], context)
        stage.report["packs"] = len(packs)
        filled = stage.report["train"]["tokens"] / (len(packs) * context)
        stage.report["packing_efficiency"] = round(filled, 4)
    yield from ({"side": side, **row} for side, rows in sides.items() for row in rows)


def _encode(stage, side: str, rows: list[dict], tokenizer, context: int, too_long: str) -> list[dict]:
    """Rows as `{"input_ids", "labels", "where"}`, a dialogue as one or several of them.

    What exceeds the context, has nothing to learn or holds a control token's text is counted, logged and recorded.
    """
    out, long, used, split, unlearned = [], [], 0, 0, []
    for row in rows:
        sequences, is_long, found = _example(row, tokenizer, context, too_long)
        if is_long:
            long.append(row["where"])
        elif not sequences:
            unlearned.append(row["where"])
        used, split = used + bool(sequences), split + (found > 1)
        out += [{"input_ids": ids, "labels": labels, "where": row["where"]} for ids, labels in sequences]
    if len(unlearned) == len(rows):
        raise errors.DataError(f"{side}: no row has an answer that is to be learned (the first: {unlearned[0]})")
    mixing.report_length(
        stage,
        side,
        len(rows),
        used,
        long,
        f"{context} tokens",
        too_long,
        "cut (what held no answer token was dropped)",
    )
    report = stage.report[side]
    report["tokens"] = sum(len(row["input_ids"]) for row in out)
    report["dialogues"] = (
        f"{split} of {len(rows)} as {chat_template.PER_ANSWER}" if split else chat_template.ONE_SEQUENCE
    )
    logger.info("%s: %s", side, report["dialogues"])
    plain_text.report(stage.report, side, rows, partial(chat_template.holds_control_text, tokenizer))
    if unlearned:
        report["nothing_to_learn"] = len(unlearned)
        what = "have no answer that is to be learned: left out"
        logger.warning("%s: %d of %d rows %s (the first: %s)", side, len(unlearned), len(rows), what, unlearned[0])
    return out


def _example(row: dict, tokenizer, context: int, too_long: str) -> tuple[list[tuple], bool, int]:
    """`([(ids, labels)], whether any exceeds the context, how many there were)` of what can be learned of a row."""
    sequences = chat_template.encode_row(tokenizer, row)
    kept = []
    for ids, labels in sequences:
        if len(ids) <= context:
            kept.append((ids, labels))
        elif too_long != "drop" and any(label != IGNORE_INDEX for label in labels[:context]):
            kept.append((ids[:context], labels[:context]))
    return kept, any(len(ids) > context for ids, _ in sequences), len(sequences)


def _encoder(tokenizer, context: int, too_long: str):
    """`encode` of a `streaming.Stream`: `_example` of each row, as arrays; raises `DataError` where `too_long`
    says so.
    """

    tokenizer = copy.deepcopy(tokenizer)  # it is used in a thread, while the Trainer may save its own

    said = False
    notice = plain_text.Notice(partial(chat_template.holds_control_text, tokenizer))

    def encode(rows: list[dict]) -> list[tuple]:
        nonlocal said
        out = []
        for row in rows:
            notice(row)
            sequences, is_long, _ = _example(row, tokenizer, context, too_long)
            if is_long and too_long == "error":
                raise errors.DataError(
                    f"{row['where']}: longer than {context} tokens; set data.too_long to drop or truncate, or raise "
                    "the length"
                )
            if is_long and not said:
                said = True
                logger.warning(
                    "rows longer than %d tokens: data.too_long %s (first: %s)", context, too_long, row["where"]
                )
            arrays = [(np.array(ids, np.int32), np.array(labels, np.int32)) for ids, labels in sequences]
            out.append((arrays, is_long))
        return out

    return encode
