"""Supervised fine-tuning: the model learns from labellers' answers, with loss on the answers only.

    sft:
      kind: sft
      model: {model_name_or_path: stage:base, chat_template: chatml}    # or any hub id or folder
      data: {train: answers.jsonl, validation: 0.05}                    # prompt+completion | messages | instruction…
      args: {global_batch_size: 32, learning_rate: 2e-5, num_train_epochs: 3, packing: true, max_length: 1024}

Rows of a batch are laid end to end, never padded; with `packing: true` each row is a pack of short examples that fills
`max_length`. Examples never see each other (tests/test_packing.py shows packed equals separate). An architecture that
cannot be packed exactly is found out and padded, and said.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

logger = logging.getLogger(__name__)

SECTIONS = {
    "model": "pipelines.sections:ModelSection",
    "data": "pipelines.sections:DataSection",
    "args": "pipelines.sections:SFTArguments",
}
ROWS = "sft"
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


def problems(stage, kinds) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the stage as a whole: `(key path, message, value)`."""
    for key, reason in NOT_HERE.items():
        if key in stage.sections.get("args", {}):
            yield f"args.{key}", f"not needed: {reason}", stage.sections["args"][key]
    if not stage.sections.get("model", {}).get("model_name_or_path"):
        yield "model.model_name_or_path", "sft starts from a model: a hub id, a folder or stage:NAME", None


def run(stage) -> dict:
    """Train, evaluate, save; returns the metrics."""
    from transformers import Trainer, set_seed
    from trl import SFTTrainer

    from pipelines import SetupError, chat, data, kernels, lm, models, packing, training

    class Trainer_(lm.LanguageModelTrainer, training.ChainTrainer, SFTTrainer):
        """TRL's trainer on packed batches, with the model's own (fast, packed) loss."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    set_seed(stage.seed)
    section = stage.section("model")
    args = training.build_args(stage, **DEFAULTS)
    tokenizer = models.load_tokenizer(section)
    model = models.load_model(section, "AutoModelForCausalLM")
    added = chat.install_template(model, tokenizer, section.chat_template)
    if added:
        logger.info("tokens added: %s (embeddings start at the mean of the others)", " ".join(added))
    context = models.context_length(model, stage.sections.get("args", {}).get("max_length"))

    train, validation = data.load(stage.data, ROWS, stage.seed)
    too_long = stage.section("data").too_long
    train = _encode(stage, "train", train, tokenizer, context, too_long)
    validation = _encode(stage, "validation", validation, tokenizer, context, too_long) if validation else []
    if args.packing:
        train_set, where = lm.packed_dataset(train, context)
        logger.info("%d examples in %d packs of up to %d tokens", len(train), len(train_set), context)
        stage.report["packs"] = len(train_set)
    else:
        train_set, where = lm.rows_dataset(train)
    kernels.fast_model(model)
    collator = packing.PackedCollator()
    try:
        packing.enable_packed_attention(model)
    except SetupError as reason:
        if args.packing:
            raise
        logger.warning("%s Its batches are padded instead.", str(reason).partition(" Set `packing")[0])
        collator = packing.PaddedCollator(tokenizer.pad_token_id)
    model = models.adapt(model, section, "CAUSAL_LM", tokenizer.convert_tokens_to_ids(added))

    args.prediction_loss_only = True
    args.packing = False  # the packs are made; TRL would otherwise pack them again
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    trainer = Trainer_(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=lm.rows_dataset(validation)[0] if validation else None,
        processing_class=tokenizer,
        data_collator=training.RowCollator(collator),
    )
    trainer.where = where
    training.fit(stage, trainer)
    metrics = training.final_metrics(trainer)
    training.save(trainer, stage.folder, tokenizer)
    return metrics


def _encode(stage, side: str, rows: list[dict], tokenizer, context: int, too_long: str) -> list[dict]:
    """Rows as `{"input_ids", "labels", "where"}`; what exceeds the context is counted, said and recorded."""
    from pipelines import chat, data

    out, long = [], []
    for row in rows:
        if "messages" in row:
            ids, labels = chat.encode_messages(tokenizer, row["messages"])
        else:
            prompt, answer = chat.encode_answer(tokenizer, row["prompt"], row["completion"])
            ids, labels = prompt + answer, [chat.IGNORED] * len(prompt) + answer
        if len(ids) > context:
            long.append(row["where"])
            if too_long == "drop" or all(label == chat.IGNORED for label in labels[:context]):
                continue
            ids, labels = ids[:context], labels[:context]
        out.append({"input_ids": ids, "labels": labels, "where": row["where"]})
    data.report_length(
        stage,
        side,
        len(rows),
        len(out),
        long,
        f"{context} tokens",
        too_long,
        "cut (what held no answer token was dropped)",
    )
    stage.report[side]["tokens"] = sum(len(row["input_ids"]) for row in out)
    return out
