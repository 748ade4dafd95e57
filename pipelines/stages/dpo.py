"""DPO: a policy learns from rankings directly, without a reward model.

    preferred:
      kind: dpo
      model: {model_name_or_path: stage:sft}                     # the policy, and as it is now the reference
      data: {train: rankings.jsonl, validation: 0.05}            # prompt, completions, ranks; or prompt, chosen,
      rejected
      args: {global_batch_size: 32, learning_rate: 1e-6, beta: 0.1, ranking_loss: plackett_luce}

`args` is TRL's `DPOConfig`. A ranking of K answers is one element of a batch, in which the answers stand behind one
copy of their prompt. With `ranking_loss: pairs` it is learned from as the pairs that it decides, under TRL's
`loss_type`; with `plackett_luce` as a whole (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, appendix A.3). For
two answers and `sigmoid` both are `trl.DPOTrainer`'s loss (tests/stages/test_stage_dpo.py).

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
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, set_seed

from pipelines import IGNORE_INDEX
from pipelines.data import encoded_rows, mixing
from pipelines.errors import CannotPack, DataError, SetupError, meant
from pipelines.generation.logprobs import can_share, disable_dropout
from pipelines.models import adapters, chat_template, loading, tokenizer_setup
from pipelines.speed import fast_model, packed_attention
from pipelines.training import arguments, loop, saving
from pipelines.training.preferences import PAIR_LOSSES, collate_rankings, enable_answer_logprobs, rankings_loss
from pipelines.training.rankings import decided, pair_scores
from pipelines.training.trainer import ChainTrainer

logger = logging.getLogger(__name__)

DEFAULTS = {
    "learning_rate": 1e-6,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
}
REFERENCE = "reference.safetensors"  # log-probs of every answer under the model that training began with

# TRL options that this stage does otherwise, or does not do.
NOT_HERE = {
    "precompute_ref_log_probs": "the reference's log-probs are always computed once and kept",
    "precompute_ref_batch_size": "args.per_device_eval_batch_size is used",
    "padding_free": "batches hold no padding wherever the architecture allows it",
    "truncation_mode": "set data.too_long",
    "model_init_kwargs": "set the keys of `model:`",
    "pad_token": "PAD is always a token of its own",
    "pad_to_multiple_of": "batches hold no padding wherever the architecture allows it",
    "ld_alpha": "every token of an answer counts alike here",
    "f_divergence_type": "the divergence is the reverse KL",
    "f_alpha_divergence_coef": "the divergence is the reverse KL",
    "use_weighting": "rankings weigh alike",
    "discopop_tau": "the loss `discopop` is not among those of this stage",
    "sync_ref_model": "the reference stays what the stage started from",
    "ref_model_mixup_alpha": "the reference stays what the stage started from",
    "ref_model_sync_steps": "the reference stays what the stage started from",
    "router_aux_loss_coef": "the model's own value is used",
}


def reported(stage) -> tuple[str, ...]:
    """What an evaluation reports; the first decides about the best model where the recipe names none."""
    return ("loss", "accuracy", "margin")


def problems(stage, kinds) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the stage as a whole: `(key path, message, value)`."""
    args = stage.sections.get("args", {})
    for key, reason in NOT_HERE.items():
        if key in args:
            yield f"args.{key}", f"not for this stage: {reason}; drop the key", args[key]
    if not stage.sections.get("model", {}).get("model_name_or_path"):
        yield "model.model_name_or_path", "the policy starts from a model: stage:NAME, a folder or a hub id", None
    names = args.get("loss_type") or ["sigmoid"]
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name not in PAIR_LOSSES:
            yield "args.loss_type", f"must be of {', '.join(PAIR_LOSSES)}{meant(name, PAIR_LOSSES)}", name
    if args.get("loss_weights") is not None and len(args["loss_weights"]) != len(names):
        yield "args.loss_weights", f"needs one number for each loss_type: {len(names)}", args["loss_weights"]
    if args.get("ranking_loss") == "plackett_luce" and names != ["sigmoid"]:
        yield "args.loss_type", "is for ranking_loss: pairs; drop one of the two", args["loss_type"]


class RankingRows:
    """Collates encoded rankings {"prompts", "answers", "ranks", "row"} to `answers` (see `collate_rankings`) and the
    rest.
    """

    def __init__(self, packed: bool, share: bool):
        self.packed, self.share = packed, share

    def __call__(self, features: list[dict]) -> dict:
        """One batch; `rankings` holds the ranks, `numbers` and `row` (rows,) the rows' numbers."""
        answers = collate_rankings(features, self.packed, self.share)
        rankings = [{"ranks": feature["ranks"]} for feature in features]
        numbers = [feature["row"] for feature in features]
        return {"answers": answers, "rankings": rankings, "numbers": numbers, "row": torch.tensor(numbers)}


class PreferenceTrainer(ChainTrainer, Trainer):
    """transformers' Trainer on rankings; `reference[side]` holds a tensor (K,) of log-probs for each row."""

    # The loss is a mean over the rankings of a micro-batch, and these are of one size: the mean over them is exact.
    model_accepts_loss_kwargs = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.reference: dict[str, list[torch.Tensor]] = {}
        self._figures: list[torch.Tensor] = []  # (accuracy, margin) of micro-batches, on the device
        self._metrics: dict[str, dict[str, list[float]]] = {"train": {"accuracy": [], "margin": []}}  # not logged yet

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        reference = torch.cat([self.reference["train"][i] for i in inputs["numbers"]]).to(self.args.device)
        answers = inputs["answers"]
        ratios = model(answers=answers) - reference
        with torch.no_grad():
            self._figures.append(self._accuracy_and_margin(ratios, inputs["rankings"]))
        return rankings_loss(ratios, inputs["rankings"], answers["lengths"], self.args)

    def _accuracy_and_margin(self, ratios, rankings) -> torch.Tensor:
        """Accuracy and margin (2,) of the implicit rewards over the decided pairs, each ranking weighing alike."""
        found, start = [], 0
        for ranking in rankings:
            first, second = (list(side) for side in zip(*decided(ranking["ranks"]), strict=True))
            own = ratios[start : start + len(ranking["ranks"])] * self.args.beta
            margin = own[first] - own[second]
            found.append(torch.stack([(margin > 0).float().mean(), margin.mean()]))
            start += len(ranking["ranks"])
        return torch.stack(found).mean(0)

    def log(self, logs: dict, *args, **kwargs) -> None:
        self.read_figures()
        if "loss" in logs:
            for name, values in self._metrics["train"].items():
                if values:
                    logs[name] = sum(values) / len(values)
                    values.clear()
        super().log(logs, *args, **kwargs)

    def read_figures(self) -> None:
        if self._figures:
            figures, self._figures = self.accelerator.reduce(torch.stack(self._figures), "mean"), []
            for name, values in zip(("accuracy", "margin"), figures.T.tolist()):
                self._metrics["train"][name] += values

    @torch.no_grad()
    def answer_logprobs(self, dataset) -> list[torch.Tensor]:
        """Log-probs (K,) of the answers of every row under the model as it is, float32; the same on every process.

        Each process reads its share; rankings go through in order of length, so that batches are alike.
        """
        args, sharded = self.args, self.is_fsdp_enabled or self.is_deepspeed_enabled
        model = self.model_wrapped if sharded else self.model
        order = np.argsort([sum(map(len, row["answers"])) for row in dataset], kind="stable")
        mine, found, was_training = order[args.process_index :: args.world_size], [], model.training
        model.eval()
        # A sharded model needs every process in every forward, so each does as many batches as the first.
        for start in range(0, -(-len(order) // args.world_size), args.per_device_eval_batch_size):
            chunk = [int(i) for i in mine[start : start + args.per_device_eval_batch_size]]
            rows = [dataset[i] for i in chunk or order[:1].tolist()]
            answers = self._prepare_input(self.data_collator(rows)["answers"])
            with self.compute_loss_context_manager():
                logprobs = model(answers=answers).float().cpu()
            found += zip(chunk, logprobs.split([len(row["ranks"]) for row in rows]), strict=False)
        model.train(was_training)
        found = gather_object(found) if args.world_size > 1 else found
        return [values for _, values in sorted(found, key=lambda item: item[0])]

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Loss, accuracy and margin of the implicit rewards, each ranking counted once at any world size."""
        metrics = {
            f"{metric_key_prefix}_{name}": value
            for name, value in self.measure().items()
            if not isinstance(value, (list, dict))
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self) -> dict:
        """`preference_metrics` of the implicit rewards of the validation rankings, and the training loss on them."""
        from pipelines.evaluation.metrics import preference_metrics  # late: takes a second, and `check` does without

        dataset = self.eval_dataset
        ratios = [
            own - reference for own, reference in zip(self.answer_logprobs(dataset), self.reference["validation"])
        ]
        rewards = [(self.args.beta * ratio)[:, None].numpy() for ratio in ratios]
        found = preference_metrics(*pair_scores(dataset, rewards))
        lengths = torch.tensor([len(answer) for row in dataset for answer in row["answers"]])
        found["loss"] = rankings_loss(torch.cat(ratios), list(dataset), lengths, self.args).item()
        return found


class KeepReference(TrainerCallback):
    """Before the first step: the log-probs of all answers under the model that training begins with, kept on disk."""

    def __init__(self, trainer: PreferenceTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, path = self.trainer, Path(args.output_dir) / REFERENCE
        sets = {"train": trainer.train_dataset, "validation": trainer.eval_dataset}
        if state.global_step == 0:
            flat = {side: torch.cat(trainer.answer_logprobs(rows)) for side, rows in sets.items() if rows is not None}
            if state.is_world_process_zero:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(flat, path)
            trainer.accelerator.wait_for_everyone()
        if not path.is_file():
            raise SetupError(
                f"{path} is gone: the reference's log-probs are not known without it. Make the stage again with --redo."
            )
        for side, flat in load_file(path).items():
            trainer.reference[side] = list(flat.split([len(row["ranks"]) for row in sets[side]]))


def run(stage) -> dict:
    """Train, evaluate, save; returns the metrics."""
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
    collate = RankingRows(*_packs(model))
    make = lambda: encode(stage, tokenizer, context)
    sets = encoded_rows.encoded_rows(stage, tokenizer, {"context": context}, make)
    (train_set, where), (validation_set, _) = sets["train"], sets["validation"]
    enable_answer_logprobs(model)
    model = adapters.adapt(model, section, "CAUSAL_LM", tokenizer.convert_tokens_to_ids(added))
    trainer = PreferenceTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=validation_set,
        processing_class=tokenizer,
        data_collator=collate,
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


def encode(stage, tokenizer, context: int) -> dict[str, Dataset]:
    """The encoded rankings of each side, as `_encode` gives them."""
    sides = zip(("train", "validation"), mixing.load(stage.data, stage.spec.rows, stage.seed, report=stage.report))
    too_long = stage.section("data").too_long
    return {side: _encode(stage, side, rows, tokenizer, context, too_long) for side, rows in sides if rows}


def shown(stage, tokenizer, model) -> Iterator[dict]:
    """The rankings that the model is given, for `pipelines show`: the prompt, and the answers that stand behind it."""
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
                "ranks": row["ranks"],
            }


def _encode(stage, side: str, rows: list[dict], tokenizer, context: int, too_long: str) -> Dataset:
    """`Dataset` of prompts, answers, ranks, row and where; what is left out is counted, logged and recorded."""
    columns, long = {name: [] for name in ("prompts", "answers", "ranks", "row", "where")}, []
    ranked = [row for row in rows if decided(row["ranks"])]
    if rows and not ranked:
        raise DataError(f"{side}: all {len(rows)} rankings are ties: there is nothing to learn from")
    for row in ranked:
        with chat_template.naming(row):
            pairs = [
                chat_template.encode_answer(tokenizer, row["prompt"], c, row.get("tools")) for c in row["completions"]
            ]
        if max(len(prompt) + len(answer) for prompt, answer in pairs) > context:
            long.append(row["where"])
            if too_long == "drop" or max(len(answer) for _, answer in pairs) >= context:
                continue
            pairs = [(prompt[len(answer) - context :], answer) for prompt, answer in pairs]
        columns["prompts"].append([prompt for prompt, _ in pairs])
        columns["answers"].append([answer for _, answer in pairs])
        columns["ranks"].append([float(r) for r in row["ranks"]])
        columns["row"].append(len(columns["row"]))
        columns["where"].append(row["where"])
    used = len(columns["row"])
    mixing.report_length(stage, side, len(rows), used, long, f"{context} tokens", too_long, "cut at their beginning")
    if len(ranked) < len(rows):
        stage.report[side]["undecided"] = len(rows) - len(ranked)
        logger.warning(
            "%s: %d of %d rankings decide nothing (all ranks equal): left out", side, len(rows) - len(ranked), len(rows)
        )
    if not used:
        raise DataError(f"{side}: no ranking is left to learn from")
    return Dataset.from_dict(columns)
