"""Masked-word pretraining: an encoder learns to fill in hidden words of raw text, from scratch or from a public one.

    encoder:
      kind: mlm
      model: {config: {model_type: bert, num_hidden_layers: 4, hidden_size: 256, num_attention_heads: 4}}
      tokenizer: {train: wordpiece, vocab_size: 8192}          # or model: {model_name_or_path: roberta-base}
      data: {train: corpus.jsonl.gz, validation: 0.01}
      args: {max_length: 128, global_batch_size: 32, learning_rate: 5e-4, max_steps: 5000, whole_word_mask: true}

Documents are streamed once into a memory map of token ids, a [SEP] after each, and cut into full windows
[CLS] … [SEP] without regard to where documents end (RoBERTa's FULL-SENTENCES, https://arxiv.org/abs/1907.11692).
Other words are hidden in every epoch; validation always hides the same ones, and its `pseudo_perplexity` is exp(loss
on the hidden words). With `data.streaming` the training text is read while training goes on
(pipelines/data/streaming.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from accelerate import PartialState
from transformers import Trainer, set_seed

from pipelines.data import mixing, streaming, token_file
from pipelines.models import loading, tokenizer_setup
from pipelines.training import arguments, loop, masked_words, raw_text, saving
from pipelines.training.trainer import ChainTrainer

logger = logging.getLogger(__name__)

DEFAULTS = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.05,
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
}
USED = (
    "model_name_or_path",
    "model_revision",
    "tokenizer_name_or_path",
    "config",
    "dtype",
    "attn_implementation",
    "trust_remote_code",
)


def reported(stage) -> tuple[str, ...]:
    """What an evaluation reports; the first decides about the best model where the recipe names none."""
    return ("loss", "accuracy", "pseudo_perplexity")


def problems(stage, kinds) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the stage as a whole: `(key path, message, value)`."""

    model, tokenizer, args = (stage.sections.get(name, {}) for name in ("model", "tokenizer", "args"))
    for key in model.keys() - set(USED):
        yield f"model.{key}", "mlm trains all weights on plain text; drop this key", model[key]
    named = model.get("model_name_or_path") or model.get("tokenizer_name_or_path")
    if not named and not tokenizer.get("train"):
        yield "tokenizer", "a new model needs a tokenizer: `train: wordpiece`, or model.tokenizer_name_or_path", None
    if tokenizer.get("train") and model.get("tokenizer_name_or_path"):
        yield (
            "tokenizer.train",
            "model.tokenizer_name_or_path names another tokenizer; drop one of them",
            tokenizer["train"],
        )
    if tokenizer.get("train") == "bpe":
        yield "tokenizer.train", "has no [MASK] token; masked words need `wordpiece`", "bpe"
    if tokenizer.get("train") and tokenizer.get("vocab_size", 8192) < 200:
        yield "tokenizer.vocab_size", "WordPiece needs at least 200 entries", tokenizer["vocab_size"]
    if args.get("max_length") is not None and args["max_length"] < 8:
        yield "args.max_length", "a window needs at least 8 tokens", args["max_length"]


class MlmTrainer(masked_words.MaskedWordTrainer, ChainTrainer, Trainer):
    """transformers' Trainer with the loss and the evaluation on hidden words alone."""


def run(stage) -> dict:
    """Train, evaluate, save; returns the metrics."""

    set_seed(stage.seed)
    section = stage.section("model")
    args = arguments.build_args(stage)
    with PartialState().main_process_first():
        tokenizer = raw_text.load_tokenizer(stage)
        separator = masked_words.edges(tokenizer)[1]
        raw_text.tokenize(stage, tokenizer, separator)
    model = loading.load_model(section, "AutoModelForMaskedLM", tokenizer, new_head=True)
    tokenizer_setup.fit_model(model, tokenizer)
    context = loading.context_length(model, args.max_length)
    sets = {}
    for side in raw_text.kept_sides(stage):
        windows = token_file.Windows(raw_text.home(stage) / side, context - 2)  # [CLS] and [SEP] come to it
        sets[side] = masked_words.MaskedWindows(
            windows, tokenizer, args.mlm_probability, args.whole_word_mask, seed=stage.seed, dynamic=side == "train"
        )
        stage.report[side] = {**windows.index, "windows": len(windows), "context": context}
        logger.info("%s: %d tokens in %d windows of %d", side, windows.index["tokens"], len(windows), context)
    stream = None
    if stage.section("data").streaming:
        masker = masked_words.Masker(tokenizer, args.mlm_probability, args.whole_word_mask, stage.seed)
        stream = streaming.Stream(
            stage,
            stage.spec.rows,
            args,
            streaming.text_encoder(tokenizer, separator),
            streaming.windows(context - 2),
            lambda item: masker(streaming.window(item)["input_ids"], 0, item["row"]),
        )

    trainer = MlmTrainer(
        model=model,
        args=args,
        train_dataset=stream or sets["train"],
        eval_dataset=sets.get("validation"),
        processing_class=tokenizer,
        data_collator=masked_words.stack,
    )
    trainer.stream = stream
    trainer.where = stream.names if stream else sets["train"].windows.where
    loop.fit(stage, trainer)
    if stream:
        tokens = trainer.state.global_step * stream.per_step * context
        stage.report["train"] = {**stream.report(), "context": context, "tokens": tokens}
    metrics = saving.final_metrics(trainer, reuse=True)
    saving.save(trainer, stage.folder, tokenizer)
    return {"parameters": model.num_parameters(), **metrics}


def shown(stage, tokenizer, model) -> Iterator[dict]:
    """The windows that the model is given in its first epoch, for `pipelines show`; counts go to `stage.report`."""
    args, of = stage.sections.get("args", {}), stage.section_class("args")
    context = loading.context_length(model, args.get("max_length"))
    probability, whole = (args.get(key, getattr(of, key)) for key in ("mlm_probability", "whole_word_mask"))
    masker = masked_words.Masker(tokenizer, probability, whole, stage.seed)
    for side in mixing.given(stage.data):
        for item in raw_text.windows(stage, side, tokenizer, masked_words.edges(tokenizer)[1], context - 2):
            row = masker(streaming.window(item)["input_ids"], 0, item["row"])
            yield {
                "side": side,
                "where": item["where"],
                "input_ids": row["input_ids"].tolist(),
                "labels": row["labels"].tolist(),
            }


own_tokenizer = raw_text.own_tokenizer
