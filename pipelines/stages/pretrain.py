"""Pretraining: a causal language model learns the next token of raw text, from scratch or from a base model.

    base:
      kind: pretrain
      model: {config: {model_type: gpt2, n_layer: 4, n_embd: 256, n_head: 4}}   # or model_name_or_path: gpt2
      tokenizer: {train: bpe, vocab_size: 8192}                                 # or model.tokenizer_name_or_path
      data: {train: corpus.jsonl.gz, validation: 0.01}
      args: {max_length: 256, global_batch_size: 16, learning_rate: 1e-3, max_steps: 800}

Documents are streamed once into a memory map of token ids, an EOS after each, and cut into full windows: no padding,
no corpus in memory. The map stays in `.tokens/` of the output folder, so that the same text is tokenized once. With
`data.streaming` the training text is read while training goes on instead (pipelines/data/streaming.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from accelerate import PartialState
from transformers import Trainer, set_seed

from pipelines.data import mixing, streaming, token_file
from pipelines.models import loading, tokenizer_setup
from pipelines.speed import fast_model
from pipelines.training import arguments, language_model, loop, raw_text, saving
from pipelines.training.trainer import ChainTrainer

logger = logging.getLogger(__name__)

DEFAULTS = {
    "learning_rate": 6e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
}


def reported(stage) -> tuple[str, ...]:
    """What an evaluation reports; the first decides about the best model where the recipe names none."""
    return ("loss", "perplexity")


def problems(stage, kinds) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the stage as a whole: `(key path, message, value)`."""
    model, tokenizer = stage.sections.get("model", {}), stage.sections.get("tokenizer", {})
    named = model.get("model_name_or_path") or model.get("tokenizer_name_or_path")
    if not named and not tokenizer.get("train"):
        yield "tokenizer", "a new model needs a tokenizer: `train: bpe`, or model.tokenizer_name_or_path", None
    if tokenizer.get("train") == "wordpiece":
        yield "tokenizer.train", "wordpiece is for encoders (kind mlm); a language model takes bpe", "wordpiece"
    if tokenizer.get("train") and tokenizer.get("vocab_size", 8192) < 258:
        message = "byte-level BPE needs at least 258 entries: the 256 bytes, EOS and padding"
        yield "tokenizer.vocab_size", message, tokenizer["vocab_size"]
    if model.get("chat_template"):
        yield "model.chat_template", "pretraining reads plain text; set it in the sft stage", model["chat_template"]


class TextTrainer(language_model.LanguageModelTrainer, ChainTrainer, Trainer):
    """transformers' Trainer with exact evaluation; the model computes the loss."""


def run(stage) -> dict:
    """Train, evaluate, save; returns the metrics."""

    set_seed(stage.seed)
    section = stage.section("model")
    args = arguments.build_args(stage)
    args.prediction_loss_only = True
    with PartialState().main_process_first():
        tokenizer = ready(stage, raw_text.load_tokenizer(stage))
        raw_text.tokenize(stage, tokenizer, tokenizer.eos_token_id)
    model = loading.load_model(section, "AutoModelForCausalLM", tokenizer)
    tokenizer_setup.fit_model(model, tokenizer)
    context = loading.context_length(model, args.max_length)
    windows = {side: token_file.Windows(raw_text.home(stage) / side, context) for side in raw_text.kept_sides(stage)}
    for side in windows:
        stage.report[side] = {**windows[side].index, "windows": len(windows[side]), "context": context}
        logger.info(
            "%s: %d tokens in %d windows of %d", side, stage.report[side]["tokens"], len(windows[side]), context
        )
    fast_model.fast_model(model)
    stream = None
    if stage.section("data").streaming:
        encode = streaming.text_encoder(tokenizer, tokenizer.eos_token_id)
        stream = streaming.Stream(stage, stage.spec.rows, args, encode, streaming.windows(context), streaming.window)

    trainer = TextTrainer(
        model=model,
        args=args,
        train_dataset=stream or windows["train"],
        eval_dataset=windows.get("validation"),
        processing_class=tokenizer,
        data_collator=token_file.stack_windows,
    )
    trainer.stream = stream
    trainer.where = stream.names if stream else windows["train"].where
    loop.fit(stage, trainer)
    if stream:
        tokens = trainer.state.global_step * stream.per_step * context
        stage.report["train"] = {**stream.report(), "context": context, "tokens": tokens}
    metrics = saving.final_metrics(trainer, reuse=True)
    saving.save(trainer, stage.folder, tokenizer)
    return {"parameters": model.num_parameters(), **metrics}


def ready(stage, tokenizer):
    """The tokenizer as the stage trains with it."""
    tokenizer_setup.ensure_pad(tokenizer)
    return tokenizer


def shown(stage, tokenizer, model) -> Iterator[dict]:
    """The windows that the model is given, for `pipelines show`; counts go to `stage.report`."""
    context = loading.context_length(model, stage.sections.get("args", {}).get("max_length"))
    for side in mixing.given(stage.data):
        for item in raw_text.windows(stage, side, tokenizer, tokenizer.eos_token_id, context):
            batch = token_file.stack_windows([streaming.window(item)])
            yield {
                "side": side,
                "where": item["where"],
                "input_ids": batch["input_ids"][0].tolist(),
                "labels": batch["labels"][0].tolist(),
            }


own_tokenizer = raw_text.own_tokenizer
