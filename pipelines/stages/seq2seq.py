"""Translation and summarisation: an encoder-decoder (T5, BART, Marian …) learns to write a target for each source.

    translate:
      kind: seq2seq
      model: {model_name_or_path: google-t5/t5-small}   # or config: {model_type: t5, …} and tokenizer: {train: bpe}
      task: {prefix: "translate English to German: ", metrics: [sacrebleu, chrf]}
      data: {train: train.jsonl, validation: validation.jsonl}                  # source, target
      args: {global_batch_size: 32, learning_rate: 3e-4, max_source_length: 128, max_target_length: 128}

Validation generates every target and compares it with the text of the data (sacreBLEU, chrF, ROUGE); the last round
is written to samples.jsonl. Texts that are too long are truncated unless data.too_long says otherwise, and counted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Seq2SeqTrainer, set_seed

from pipelines import IGNORE_INDEX, errors
from pipelines.data import encoded_rows, fingerprint, mixing, plain_text, train_tokenizer
from pipelines.data.plain_text import tokenize
from pipelines.errors import ModelError
from pipelines.generation.answers import read_generated
from pipelines.models import loading
from pipelines.training import arguments, best_checkpoint, loop, saving
from pipelines.training.trainer import ChainTrainer, RowCollator

logger = logging.getLogger(__name__)

DEFAULTS = {
    "learning_rate": 1e-4,
    "num_train_epochs": 3,
    "warmup_steps": 0.05,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "predict_with_generate": True,
}
METRICS = {"sacrebleu": ("sacrebleu",), "chrf": ("chrf",), "rouge": ("rouge1", "rouge2", "rougeL")}
SAMPLES = 100  # rows of samples.jsonl
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
    if not stage.sections.get("args", {}).get("predict_with_generate", True):
        return ("loss",)
    names = stage.sections.get("task", {}).get("metrics", ["sacrebleu", "chrf"])
    return ("loss", *(figure for name in names for figure in METRICS.get(name, ())), "ended")


def problems(stage, kinds) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the stage as a whole: `(key path, message, value)`."""

    model, tokenizer, task = (stage.sections.get(name, {}) for name in ("model", "tokenizer", "task"))
    for key in model.keys() - set(USED):
        yield f"model.{key}", "seq2seq trains all weights on plain text; drop this key", model[key]
    named = model.get("model_name_or_path") or model.get("tokenizer_name_or_path")
    if not named and not tokenizer.get("train"):
        yield "tokenizer", "a new model needs a tokenizer: `train: bpe`, or model.tokenizer_name_or_path", None
    if tokenizer.get("train") and model.get("tokenizer_name_or_path"):
        yield (
            "tokenizer.train",
            "model.tokenizer_name_or_path names another tokenizer; drop one of them",
            tokenizer["train"],
        )
    if tokenizer.get("train") == "wordpiece" and "lowercase" not in tokenizer:
        yield "tokenizer.lowercase", "say true (the model then writes lower case only) or false, or train bpe", None
    least = 300 if tokenizer.get("train") == "bpe" else 200
    if tokenizer.get("train") and tokenizer.get("vocab_size", 8192) < least:
        yield "tokenizer.vocab_size", f"{tokenizer['train']} needs at least {least} entries", tokenizer["vocab_size"]
    names = task.get("metrics", ["sacrebleu", "chrf"])
    for name in names:
        if name not in METRICS:
            yield "task.metrics", f"must be any of {', '.join(METRICS)}{errors.meant(name, METRICS)}", name


class TranslationTrainer(ChainTrainer, Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer with losses that are means over target tokens, at any batch and world size.

    The losses inside T5 and BART ignore `num_items_in_batch`: gradient accumulation and several processes would
    train something else.
    """

    loss_is_scaled_for_ga = True  # divided by the tokens of the whole step
    validation_tokens = 0

    def _get_num_items_in_batch(self, batch_samples, device):
        count = sum(batch["labels"].ne(IGNORE_INDEX).sum() for batch in batch_samples)
        return self.accelerator.reduce(torch.as_tensor(count, device=device), "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        loss = torch.nn.functional.cross_entropy(
            outputs.logits.float().flatten(0, 1),
            inputs["labels"].flatten(),
            reduction="sum",
            label_smoothing=self.args.label_smoothing_factor,
        )
        if model.training:
            loss = loss / num_items_in_batch * self.accelerator.num_processes  # DDP averages over processes
        else:
            loss = loss / inputs["labels"].ne(IGNORE_INDEX).sum()
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args, **kwargs):
        # The parent's `evaluate` also counts the rows that only fill up the last batch.
        self.gather_function = self.accelerator.gather_for_metrics
        if self.is_fsdp_enabled:  # processes decode for different times, and transformers knows of ZeRO-3 alone
            self._gen_kwargs["synced_gpus"] = True
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **settings):
        inputs = self._prepare_inputs(inputs)
        loss, generated, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **settings)
        # The parent averages these over rows: weighed so, the result is the mean over all validation tokens.
        loss = loss * inputs["labels"].ne(IGNORE_INDEX).sum() / len(inputs["labels"])
        return loss * len(self.eval_dataset) / self.validation_tokens, generated, labels


def run(stage) -> dict:
    """Train, evaluate, save; returns the metrics."""

    set_seed(stage.seed)
    section, task = stage.section("model"), stage.section("task")
    args = arguments.build_args(stage)
    with PartialState().main_process_first():
        tokenizer = load_tokenizer(stage, section)
    new = {} if section.model_name_or_path else new_settings(section.config, tokenizer)
    model = loading.load_model(section, "AutoModelForSeq2SeqLM", tokenizer, **new)
    check(model, tokenizer, args)
    limits = {"source": args.max_source_length, "target": args.max_target_length}
    sets = encoded_rows.encoded_rows(stage, tokenizer, limits, lambda: encode(stage, tokenizer, limits))
    (train_set, where), (validation_set, _) = sets["train"], sets["validation"]
    texts = ["source", "target"]
    train_set, kept = train_set.remove_columns(texts), None
    if validation_set is not None:
        kept, validation_set = validation_set.select_columns(texts), validation_set.remove_columns(texts)
    args.generation_max_length = args.generation_max_length or args.max_target_length + 1  # and the start token
    model.generation_config.max_length = args.generation_max_length

    references = list(kept["target"]) if kept else []
    measure = Measure(tokenizer, references, task.metrics) if args.predict_with_generate else None
    trainer = TranslationTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=validation_set,
        processing_class=tokenizer,
        data_collator=RowCollator(DataCollatorForSeq2Seq(tokenizer, model=model)),
        compute_metrics=measure,
        callbacks=best_checkpoint.callbacks(args),
    )
    trainer.where = where
    trainer.validation_tokens = stage.report.get("validation", {}).get("target_tokens", 0)
    loop.fit(stage, trainer)
    metrics = saving.final_metrics(trainer, reuse=measure is None or bool(measure.generated))
    if measure and measure.generated and PartialState().is_main_process:
        with open(stage.folder / "samples.jsonl", "w", encoding="utf-8") as stream:
            for row, text in list(zip(kept, measure.generated, strict=True))[:SAMPLES]:
                sample = {"source": row["source"], "target": row["target"], "generated": text}
                stream.write(json.dumps(sample, ensure_ascii=False) + "\n")
    model.config.use_cache = True  # off while training; whoever loads the model wants it
    saving.save(trainer, stage.folder, tokenizer)
    return {"parameters": model.num_parameters(), **metrics}


def load_tokenizer(stage, section):
    """The model's tokenizer, or one trained on sources and targets that ends every text with EOS."""
    words = stage.section("tokenizer")
    if words.train and section.model_name_or_path:
        logger.warning("tokenizer.train is not used: %s brings its tokenizer", section.model_name_or_path)
    if not words.train or section.model_name_or_path:
        return loading.load_tokenizer(section)
    return own_tokenizer(stage, stage.folder.parent / ".tokens" / stage.name)


def own_tokenizer(stage, folder: Path):
    """The tokenizer that `tokenizer.train` asks for, kept in `folder` and taken from there while the data is
    the same.
    """
    words, prefix = stage.section("tokenizer"), stage.section("task").prefix
    rows = mixing.stream(stage.data, "train", stage.spec.rows, stage.seed)
    sections = {name: stage.sections.get(name) for name in ("data", "task")}
    key = {"data": fingerprint.content(stage.data), "sections": sections, "seed": stage.seed}
    texts = (text for row in rows for text in (prefix + row["source"], row["target"]))
    tokenizer = train_tokenizer.trained_tokenizer(folder, words, texts, key)
    if words.train == "wordpiece":
        tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
        return tokenizer
    # GPT-2's class puts nothing around a text. Its merges stay, but an EOS follows each text, here and after loading.
    end = tokenizer.eos_token
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end,
        unk_token=end,
        pad_token=tokenizer.pad_token,
        clean_up_tokenization_spaces=False,
    )


def new_settings(config: dict, tokenizer) -> dict:
    """Config values without which a new encoder-decoder would start and end with ids of another vocabulary."""

    settings = {"decoder_start_token_id": config.get("decoder_start_token_id", tokenizer.pad_token_id)}  # as T5
    if getattr(AutoConfig.for_model(config["model_type"]), "forced_eos_token_id", None) is not None:  # as BART
        settings["forced_eos_token_id"] = config.get("forced_eos_token_id", tokenizer.eos_token_id)
    return settings


def check(model, tokenizer, args) -> None:
    """Raises `ModelError` for a model or tokenizer that would learn or generate something else without a word."""

    config = model.config
    if (
        model.generation_config.decoder_start_token_id is None
        and getattr(config, "decoder_start_token_id", None) is None
    ):
        raise ModelError(
            "the model's config names no decoder_start_token_id; set it with model.config, e.g. the PAD id"
        )
    if tokenizer.eos_token_id not in tokenizer("x")["input_ids"]:
        raise ModelError("the tokenizer does not end a text with EOS: the model would never learn to stop")
    if hasattr(tokenizer, "tgt_lang"):
        raise ModelError(
            f"{type(tokenizer).__name__} needs the codes of both languages, which this stage does not set: use a model "
            "for one pair of languages (Marian) or with the task in its prefix (T5)"
        )
    limit = getattr(config, "max_position_embeddings", None)  # T5's n_positions is no limit: its positions are relative
    for key in ("max_source_length", "max_target_length"):
        if limit and getattr(args, key) > limit:
            raise ModelError(
                f"args.{key} {getattr(args, key)} is more than the model's {limit} positions; use {limit} or less"
            )


def encode(stage, tokenizer, limits: dict[str, int]) -> dict[str, Dataset]:
    """The encoded rows of each side, as `_encode` gives them; `limits` are the most tokens of source and target."""
    prefix, too_long = stage.section("task").prefix, stage.data.get("too_long", "truncate")
    train, validation = mixing.load(stage.data, stage.spec.rows, stage.seed, report=stage.report)
    for row in [*train, *validation]:
        row["source"] = prefix + row["source"]
    sides = {"train": train, "validation": validation}
    return {side: _encode(stage, side, rows, tokenizer, limits, too_long) for side, rows in sides.items() if rows}


def shown(stage, tokenizer, model) -> Iterator[dict]:
    """The sources that the model is given and the targets that it learns, for `pipelines show`."""
    args, of = stage.sections.get("args", {}), stage.section_class("args")
    keys = {"source": "max_source_length", "target": "max_target_length"}
    limits = {name: args.get(key, getattr(of, key)) for name, key in keys.items()}
    for side, rows in encode(stage, tokenizer, limits).items():
        for row in rows:
            learned = [tokenizer.decode(row["labels"])]
            yield {"side": side, **{key: row[key] for key in ("where", "input_ids", "labels")}, "learned": learned}


def _encode(stage, side: str, rows: list[dict], tokenizer, limits: dict[str, int], too_long: str):
    """`Dataset` of input_ids, attention_mask, labels, row, source, target, where; long rows are counted and
    recorded.
    """

    sources, targets = [row["source"] for row in rows], [row["target"] for row in rows]
    encoded = tokenize(tokenizer, sources)["input_ids"]
    labels = tokenize(tokenizer, text_target=targets)["input_ids"]
    features, long = [], []
    for row, ids, goal in zip(rows, encoded, labels, strict=True):
        if len(ids) > limits["source"] or len(goal) > limits["target"]:
            long.append(row["where"])
            if too_long == "drop":
                continue
            cut = partial(tokenize, tokenizer, truncation=True)
            ids = cut(row["source"], max_length=limits["source"])["input_ids"]
            goal = cut(text_target=row["target"], max_length=limits["target"])["input_ids"]
        encoding = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": goal}
        features.append(
            {**encoding, "row": len(features), **{name: row[name] for name in ("source", "target", "where")}}
        )
    limit = f"{limits['source']} tokens in the source or {limits['target']} in the target"
    mixing.report_length(stage, side, len(rows), len(features), long, limit, too_long, "cut at their end")
    plain_text.report_texts(stage.report, side, rows, tokenizer, "source", "target")
    stage.report[side]["source_tokens"] = sum(len(f["input_ids"]) for f in features)
    stage.report[side]["target_tokens"] = sum(len(f["labels"]) for f in features)
    return Dataset.from_list(features)


class Measure:
    """`compute_metrics` of the Trainer: generated ids against the texts of the data; `generated` are the last texts."""

    def __init__(self, tokenizer, references: list[str], names: list[str]):

        import evaluate  # late: takes a second, and `check` does without

        from pipelines.evaluation.metrics import GENERATION

        self.tokenizer, self.references, self.generated = tokenizer, references, []
        self.combined = evaluate.combine([GENERATION[name]() for name in names])

    def __call__(self, prediction) -> dict:
        """Metrics of generated ids (rows, tokens), padded with PAD or -100, in the order of the validation rows."""
        self.generated, ends = read_generated(self.tokenizer, prediction.predictions)
        scores = self.combined.compute(predictions=self.generated, references=self.references)
        return {**scores, "ended": float(ends.mean())}
