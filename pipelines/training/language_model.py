"""A causal language model's validation as the mean over its tokens, and rows or packs of rows as a data set."""

from __future__ import annotations

import math

import torch
from accelerate import PartialState
from datasets import Dataset, Features, List, Value

from pipelines import IGNORE_INDEX
from pipelines.speed.packing import plan_packs


class LanguageModelTrainer:
    """Mixin: evaluation as the mean over all validation tokens, each counted once, at any world and batch size."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        state, args = PartialState(), self.args
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        model = self.model_wrapped if sharded else self.model
        was_training = model.training
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device="cpu" if args.device.type == "mps" else args.device)
        size = args.per_device_eval_batch_size
        # A sharded model needs every process in every forward, so each does as many batches as the first.
        for start in range(0, math.ceil(len(dataset) / state.num_processes), size):
            mine = range(state.process_index + start * state.num_processes, len(dataset), state.num_processes)
            rows = [dataset[i] for i in mine[:size]]
            batch = self.data_collator(rows or [dataset[0]])
            if not rows:
                batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
            batch = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                tokens = batch["labels"][:, 1:].ne(IGNORE_INDEX).sum()
                loss = model(**batch, num_items_in_batch=torch.ones((), device=args.device)).loss
            total += torch.stack([loss.double(), tokens.double()]).to(total.device)
        if state.num_processes > 1:
            torch.distributed.all_reduce(total)
        model.train(was_training)
        loss = (total[0] / total[1]).item()
        prefix = metric_key_prefix
        metrics = {
            f"{prefix}_loss": loss,
            f"{prefix}_perplexity": math.exp(min(loss, 700)),
            f"{prefix}_tokens": int(total[1]),
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics


def rows_dataset(rows: list[dict], packs: list[list[int]] | None = None):
    """A `datasets.Dataset` whose items are rows, or the rows of one pack laid end to end with `seq_lengths`.

    `rows` hold `input_ids`, `labels` and `where`; item i carries `row` = i, and in `where` the names of its rows.
    """

    packs = [[i] for i in range(len(rows))] if packs is None else packs
    columns = {
        "input_ids": [[t for i in pack for t in rows[i]["input_ids"]] for pack in packs],
        "labels": [[t for i in pack for t in rows[i]["labels"]] for pack in packs],
        "seq_lengths": [[len(rows[i]["input_ids"]) for i in pack] for pack in packs],
        "row": list(range(len(packs))),
        "where": [[rows[i]["where"] for i in pack] for pack in packs],
    }
    kinds = dict.fromkeys(("input_ids", "labels", "seq_lengths"), List(Value("int32")))
    return Dataset.from_dict(columns, Features({**kinds, "row": Value("int64"), "where": List(Value("string"))}))


def packed_dataset(rows: list[dict], capacity: int):
    """As `rows_dataset`, with the rows packed best-fit into items of at most `capacity` tokens."""
    return rows_dataset(rows, plan_packs([len(r["input_ids"]) for r in rows], capacity))
