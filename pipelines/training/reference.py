"""Training a policy on answers that are there, against the model it started from: what dpo and kto have in common.

The reference is the model that the stage starts from: its log-probs are computed once, before the first step, and kept
with the checkpoints; no second model is held in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, set_seed

from pipelines import IGNORE_INDEX
from pipelines.data import encoded_rows
from pipelines.errors import CannotPack, SetupError
from pipelines.generation.logprobs import can_share, disable_dropout
from pipelines.models import adapters, loading, tokenizer_setup
from pipelines.speed import fast_model, packed_attention
from pipelines.training import arguments, best_checkpoint, loop, saving
from pipelines.training.preferences import collate_rankings, enable_answer_logprobs
from pipelines.training.trainer import ChainTrainer

logger = logging.getLogger(__name__)

REFERENCE = "reference.safetensors"  # log-probs of every answer under the model that training began with

DEFAULTS = {
    "learning_rate": 1e-6,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "train_sampling_strategy": "random",
}

# Options of TRL's configs that are done otherwise here, or are not done.
NOT_HERE = {
    "precompute_ref_log_probs": "the reference's log-probs are always computed once and kept",
    "precompute_ref_batch_size": "args.per_device_eval_batch_size is used",
    "model_init_kwargs": "set the keys of `model:`",
    "trust_remote_code": "set model.trust_remote_code",
    "dataset_num_proc": "the first process encodes the rows once, and they are kept",
    "activation_offloading": "set args.activation_checkpointing to save memory",
    "pad_to_multiple_of": "batches hold no padding wherever the architecture allows it",
    "sync_ref_model": "the reference stays what the stage started from",
    "ref_model_mixup_alpha": "the reference stays what the stage started from",
    "ref_model_sync_steps": "the reference stays what the stage started from",
    "router_aux_loss_coef": "the model's own value is used",
}


def problems(stage, not_here: dict[str, str]) -> Iterator[tuple[str, str, object]]:
    """What is wrong with a stage that has a reference: `(key path, message, value)`."""
    args = stage.sections.get("args", {})
    for key, reason in not_here.items():
        if key in args:
            yield f"args.{key}", f"not for this stage: {reason}; drop the key", args[key]
    if args.get("train_sampling_strategy") == "group_by_length":
        yield "args.train_sampling_strategy", "must be random or sequential: batches hold no padding", "group_by_length"
    if not stage.sections.get("model", {}).get("model_name_or_path"):
        yield "model.model_name_or_path", "the policy starts from a model: stage:NAME, a folder or a hub id", None


class AnswerRows:
    """Collates encoded rows {"prompts", "answers": K lists of ids each, "row", …} to a batch.

    `answers` is as `collate_rankings` gives it, `numbers` and `row` (rows,) are the rows' numbers, and `told` gives
    tensors of what the rows tell about their answers.
    """

    answers = ("answers",)  # columns of answers behind prompts, each a part of the batch

    def __init__(self, packed: bool, share: bool):
        self.packed, self.share = packed, share

    def __call__(self, features: list[dict]) -> dict:
        """One batch."""
        parts = {name: self.part(features, name) for name in self.answers}
        numbers = [feature["row"] for feature in features]
        return {**parts, **self.told(features), "numbers": numbers, "row": torch.tensor(numbers)}

    @staticmethod
    def told(features: list[dict]) -> dict[str, torch.Tensor]:
        """What rows tell about their answers."""
        raise NotImplementedError

    def part(self, features: list[dict], name: str) -> dict:
        """The answers of one of the columns."""
        return collate_rankings([self.pairs(feature, name) for feature in features], self.packed, self.share)

    def pairs(self, feature: dict, name: str) -> dict:
        """The prompts and answers (K lists of ids each) of the row's column `name`."""
        return {"prompts": feature["prompts"], "answers": feature[name]}


class ReferenceTrainer(ChainTrainer, Trainer):
    """transformers' Trainer; `reference[side, part]` holds a tensor (K,) of log-probs for each row.

    `side` is "train" or "validation", `part` one of the collator's `answers`.
    """

    FIGURES: tuple[str, ...] = ()  # what `note` is given of each micro-batch

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.reference: dict[tuple[str, str], list[torch.Tensor]] = {}
        self._figures: list[torch.Tensor] = []  # of micro-batches, (FIGURES,) each, on the device
        self._metrics: dict[str, dict[str, list[float]]] = {"train": {name: [] for name in self.FIGURES}}  # not logged

    def logratios(self, model, inputs: dict, part: str = "answers") -> torch.Tensor:
        """log pi - log pi_ref (answers,) of a training batch, float32."""
        reference = torch.cat([self.reference["train", part][i] for i in inputs["numbers"]])
        return model(answers=inputs[part]) - reference.to(self.args.device, non_blocking=True)

    def note(self, *figures: torch.Tensor) -> None:
        """Keep figures of a micro-batch, scalars in the order of `FIGURES`, for the next log entry."""
        self._figures.append(torch.stack([figure.detach().float() for figure in figures]))

    def log(self, logs: dict, *args, **kwargs) -> None:
        self.read_figures()
        kept = self._metrics["train"]
        if "loss" in logs and all(kept.values()):
            logs |= self.summary({name: sum(values) / len(values) for name, values in kept.items()})
            for values in kept.values():
                values.clear()
        super().log(logs, *args, **kwargs)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged, from the means over micro-batches of what was noted."""
        return means

    def read_figures(self) -> None:
        if self._figures:
            figures, self._figures = self.accelerator.reduce(torch.stack(self._figures), "mean"), []
            for name, values in zip(self.FIGURES, figures.T.tolist(), strict=True):
                self._metrics["train"][name] += values

    @torch.no_grad()
    def answer_logprobs(self, dataset, part: str = "answers") -> list[torch.Tensor]:
        """Log-probs (K,) of the answers of every row under the model as it is, float32; the same on every process.

        Each process reads its share; rows go through in order of length, so that batches are alike.
        """
        args, sharded = self.args, self.is_fsdp_enabled or self.is_deepspeed_enabled
        model = self.model_wrapped if sharded else self.model
        order = np.argsort([sum(map(len, row[part])) for row in dataset], kind="stable")
        mine, found, was_training = order[args.process_index :: args.world_size], [], model.training
        model.eval()
        # A sharded model needs every process in every forward, so each does as many batches as the first.
        for start in range(0, -(-len(order) // args.world_size), args.per_device_eval_batch_size):
            chunk = [int(i) for i in mine[start : start + args.per_device_eval_batch_size]]
            rows = [dataset[i] for i in chunk or order[:1].tolist()]
            answers = self._prepare_input(self.data_collator.part(rows, part))
            with self.compute_loss_context_manager():
                logprobs = model(answers=answers).float().cpu()
            found += zip(chunk, logprobs.split([len(row[part]) for row in rows]), strict=False)
        model.train(was_training)
        found = gather_object(found) if args.world_size > 1 else found
        return [values for _, values in sorted(found, key=lambda item: item[0])]

    def validation_logratios(self, part: str = "answers") -> list[torch.Tensor]:
        """log pi - log pi_ref (K,) of the answers of every validation row."""
        own = self.answer_logprobs(self.eval_dataset, part)
        return [ours - reference for ours, reference in zip(own, self.reference["validation", part], strict=True)]

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The figures of `measure`, each row counted once at any world size."""
        metrics = {
            f"{metric_key_prefix}_{name}": value
            for name, value in self.measure().items()
            if not isinstance(value, (list, dict))
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self) -> dict:
        """Figures of the validation rows."""
        raise NotImplementedError


class KeepReference(TrainerCallback):
    """Before the first step: the log-probs of all answers under the model that training begins with, kept on disk."""

    def __init__(self, trainer: ReferenceTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, path = self.trainer, Path(args.output_dir) / REFERENCE
        sets = {"train": trainer.train_dataset, "validation": trainer.eval_dataset}
        names = {  # in the file
            (side, part): side if part == "answers" else f"{side}_{part}"
            for side, rows in sets.items()
            for part in trainer.data_collator.answers
            if rows is not None
        }
        if state.global_step == 0:
            flat = {name: torch.cat(trainer.answer_logprobs(sets[side], part)) for (side, part), name in names.items()}
            if state.is_world_process_zero:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(flat, path)
            trainer.accelerator.wait_for_everyone()
        if not path.is_file():
            raise SetupError(
                f"{path} is gone: the reference's log-probs are not known without it. Make the stage again with --redo."
            )
        flat = load_file(path)
        for (side, part), name in names.items():
            trainer.reference[side, part] = list(flat[name].split([len(row[part]) for row in sets[side]]))


def train(stage, trainer_class: type[ReferenceTrainer], collator: type[AnswerRows], encode, settings: dict) -> dict:
    """Train, evaluate, save; returns the metrics.

    `encode(stage, tokenizer, context)` gives the encoded rows of each side, and `settings` is what decides about them
    beside the data, the model and the context.
    """
    set_seed(stage.seed)
    section = stage.section("model")
    args = arguments.build_args(stage)
    tokenizer = loading.load_tokenizer(section)
    model = loading.load_model(section, "AutoModelForCausalLM")
    added = tokenizer_setup.install_template(model, tokenizer, section.chat_template, section.chat_template_kwargs)
    context = loading.context_length(model, stage.sections.get("args", {}).get("max_length"))
    if args.disable_dropout:
        disable_dropout(model)
    fast_model.fast_gelu(model)
    collate = collator(*_packs(model))
    make = lambda: encode(stage, tokenizer, context)
    sets = encoded_rows.encoded_rows(stage, tokenizer, {"context": context, **settings}, make)
    (train_set, where), (validation_set, _) = sets["train"], sets["validation"]
    enable_answer_logprobs(model)
    model = adapters.adapt(model, section, "CAUSAL_LM", tokenizer.convert_tokens_to_ids(added))
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=validation_set,
        processing_class=tokenizer,
        data_collator=collate,
        callbacks=best_checkpoint.callbacks(args),
    )
    trainer.add_callback(KeepReference(trainer))
    trainer.where = where
    loop.fit(stage, trainer)
    metrics = trainer.measure() if validation_set is not None else {}
    saving.save(trainer, stage.folder, tokenizer)
    return {**metrics, **saving.final_metrics(trainer, evaluate=False)}


def _packs(model) -> tuple[bool, bool]:
    """Make the model read batches without padding where its architecture can: `(packed, answers share their
    prompt)`.
    """
    try:
        packed_attention.enable_packed_attention(model)
    except CannotPack as error:
        logger.info("%s cannot be packed (%s): its batches are padded.", error.model, error.reason)
        return False, False
    return True, bool(can_share(model))


def ready(stage, tokenizer):
    """The tokenizer as the stage trains with it."""
    tokenizer_setup.dress(tokenizer, stage.section("model").chat_template, stage.section("model").chat_template_kwargs)
    return tokenizer


def shown(stage, tokenizer, model, encode, beside: str) -> Iterator[dict]:
    """The rows that the model is given, for `pipelines show`: prompt, answers, and the column `beside`."""
    context = loading.context_length(model, stage.sections.get("args", {}).get("max_length"))
    for side, rows in encode(stage, tokenizer, context).items():
        for row in rows:
            prompt, answers = row["prompts"][0], row["answers"]
            yield {
                "side": side,
                "where": row["where"],
                "input_ids": prompt,
                "labels": [IGNORE_INDEX] * len(prompt),
                "learned": [tokenizer.decode(ids) for ids in answers],
                "completion_ids": answers,
                beside: row[beside],
            }
