"""Reward model: learns from rankings which answers people prefer, and gives any answer a score.

    reward:
      kind: reward
      model: {model_name_or_path: stage:sft}          # or any causal model or encoder; the score head is new
      data: {train: rankings.jsonl, validation: 0.05}           # prompt, completions, ranks; or prompt, chosen, rejected
      args: {global_batch_size: 32, learning_rate: 1e-5, num_train_epochs: 1, tags: [inappropriate, inaccurate]}

A ranking of K answers is one element of a batch: the prompt and each answer are encoded once, and the loss is the mean of
-log sigmoid(r_better - r_worse) over the pairs that the ranking decides (Ouyang et al. 2022, section 3.4,
https://arxiv.org/abs/2203.02155). K may differ from row to row, equals share a rank, and K = 2 is TRL's own loss.

Rows may have a `margin`, a number for each answer: a better answer must be better by the difference, -log sigmoid(r_b -
r_w - (m_b - m_w)) (Touvron et al. 2023, section 3.2.2, https://arxiv.org/abs/2307.09288); `args.rank_margin` takes it
from the ranks. With `args.tags` the score head has one more output for each tag, learned by binary cross-entropy from
the rows' `tags` (a list for each answer). The folder holds a plain one-score model all the same, and the rows of the
head that tell tags beside it in `tags.safetensors`.

The score is read at the last token, which is EOS (PAD is a token of its own). The head starts with deviation
1/sqrt(width + 1) (Stiennon et al. 2020, https://arxiv.org/abs/2009.01325), and scores are kept around zero by
`center_rewards_coefficient` (Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

logger = logging.getLogger(__name__)

SECTIONS = {
    "model": "pipelines.sections:ModelSection",
    "data": "pipelines.sections:DataSection",
    "args": "pipelines.sections:RewardArguments",
}
ROWS = "rankings"
DEFAULTS = {
    "learning_rate": 1e-5,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "center_rewards_coefficient": 0.01,
}


def problems(stage, kinds) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the stage as a whole: `(key path, message, value)`."""
    model = stage.sections.get("model", {})
    if not model.get("model_name_or_path"):
        yield "model.model_name_or_path", "a reward model starts from a model: stage:NAME, a folder or a hub id", None
    args = stage.sections.get("args", {})
    if (args.get("rank_margin") or 0) < 0:
        yield "args.rank_margin", "must not be negative", args["rank_margin"]
    if len(set(args.get("tags") or [])) < len(args.get("tags") or []):
        yield "args.tags", "names a tag twice", args["tags"]


def run(stage) -> dict:
    """Train, evaluate, save; returns the metrics."""
    import numpy as np
    import torch
    from transformers import set_seed
    from trl import RewardTrainer

    from pipelines import chat, corpus, data, kernels, models, tag_heads, training

    class Trainer_(training.ChainTrainer, RewardTrainer):
        """TRL's trainer in the chain's order, on rankings."""

        def _prepare_dataset(self, dataset, *_):
            return dataset  # `_encode` made it

        def _set_signature_columns_if_needed(self):
            self._signature_columns = ["ids", "ranks", "margin", "tags"]

        def loss_of(self, logits, wanted):
            """The loss of logits (answers, 1 + T), given what `RankingCollator.wanted` tells of the answers."""
            scores = logits[:, 0]
            better, worse = scores[wanted["better"]], scores[wanted["worse"]]
            center = self.args.center_rewards_coefficient
            loss = ranking_loss(better, worse, wanted["weight"], center, wanted["margin"])
            return loss + tag_heads.loss(logits[:, 1:], wanted["tags"]) if wanted["tags"].numel() else loss

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            wanted = {name: inputs.pop(name) for name in ("better", "worse", "weight", "margin", "tags")}
            outputs = model(**inputs, use_cache=False)
            loss = self.loss_of(outputs.logits, wanted)
            tokens = (inputs["attention_mask"] if "attention_mask" in inputs else inputs["position_ids"] >= 0).sum()
            self._total_train_tokens += self.accelerator.gather(tokens).sum().item()
            scores = outputs.logits[:, 0].detach()
            margin = scores[wanted["better"]] - scores[wanted["worse"]]
            batch = {
                "accuracy": (wanted["weight"] * (margin > 0)).sum(),
                "margin": (wanted["weight"] * margin).sum(),
                "mean_reward": scores.mean(),
            }
            for name, value in batch.items():
                self._metrics["train"][name].append(self.accelerator.gather(value).mean().item())
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            return (loss, outputs) if return_outputs else loss

        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
            """The training loss and the figures of `preference_metrics`, each ranking counted once at any world size."""
            dataset = self.eval_dataset if eval_dataset is None else eval_dataset
            was_training = self.model.training
            self.model.eval()  # TRL logs the figures of training with what is logged in between
            logits = answer_logits(self, dataset, collate)
            found = preference_metrics(*pair_scores(dataset, logits))
            found["loss"] = self.loss_of(torch.from_numpy(np.concatenate(logits)), collate.wanted(list(dataset))).item()
            shown = ("loss", "accuracy", "margin", "mean_score")
            metrics = {f"{metric_key_prefix}_{name}": found[name] for name in shown}
            self.log(dict(metrics))
            self.model.train(was_training)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    set_seed(stage.seed)
    section = stage.section("model")
    args = training.build_args(stage, **DEFAULTS)
    tags = args.tags or []
    tokenizer = models.load_tokenizer(section)
    model = models.load_model(
        section, "AutoModelForSequenceClassification", new_head=True, num_labels=1, problem_type="regression"
    )
    if tags:
        tag_heads.add(model, len(tags))
    if tags or model.new_weights:  # a model that already is a reward model goes on with its head
        head = models.last_layer(model)
        with torch.no_grad(), models.whole(head.weight):
            head.weight.normal_(std=1 / math.sqrt(head.weight.shape[-1] + 1))
    added = chat.install_template(model, tokenizer, section.chat_template)
    kernels.fast_gelu(model)
    collate = RankingCollator(tokenizer.pad_token_id, **_packs(model))
    context = models.context_length(model, stage.sections.get("args", {}).get("max_length"))

    too_long = stage.section("data").too_long

    def make():
        train, validation = data.load(stage.data, ROWS, stage.seed)
        for row in [*train, *validation]:
            if "margin" not in row and args.rank_margin:
                row["margin"] = [-args.rank_margin * rank for rank in row["ranks"]]
        for tag in tags:
            if not any(tag in answer for row in train for answer in row.get("tags", [])):
                raise data.DataError(f"data.train: no answer has the tag {tag!r} (args.tags), so it cannot be learned")
        sides = {"train": train, "validation": validation}
        return {
            side: _encode(stage, side, rows, tags, tokenizer, context, too_long) for side, rows in sides.items() if rows
        }

    settings = {"context": context, "rank_margin": args.rank_margin, "tags": tags}
    sets = corpus.encoded_rows(stage, tokenizer, settings, make)
    (train_set, where), (validation_set, _) = sets["train"], sets["validation"]

    model = models.adapt(model, section, "SEQ_CLS", tokenizer.convert_tokens_to_ids(added))
    args.max_length = None  # rows that are too long are already dealt with, and counted
    trainer = Trainer_(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=validation_set,
        processing_class=tokenizer,
        data_collator=training.RowCollator(collate),
    )
    trainer.where = where
    training.fit(stage, trainer)
    metrics = {}
    if validation_set is not None:
        logits = answer_logits(trainer, validation_set, collate)
        metrics |= preference_metrics(*pair_scores(validation_set, logits)) | tag_heads.metrics(
            validation_set["tags"], logits, tags
        )
    training.save(trainer, stage.folder, tokenizer)
    if tags and args.should_save:
        tag_heads.split(stage.folder, tags)
    return {**metrics, **training.final_metrics(trainer, evaluate=False)}


def _packs(model) -> dict[str, bool]:
    """Make the model read batches without padding where its architecture can; what the collator may do then."""
    from pipelines import SetupError, packing

    try:
        return {"packed": True, "share": packing.enable_packed_scores(model)}
    except SetupError as reason:
        logger.info("%s Its batches are padded.", str(reason).partition(" Set `packing")[0])
        return {"packed": False}


def _encode(stage, side: str, rows: list[dict], tags: list[str], tokenizer, context: int, too_long: str):
    """`Dataset` of ids, ranks, margin, tags, row and where; what is left out is counted, said and recorded.

    Of each answer `tags` holds 1 or 0 for each of the tags, or -1 where the row says nothing about tags.
    """
    from datasets import Dataset

    from pipelines import chat, data

    columns, long = {name: [] for name in ("ids", "ranks", "margin", "tags", "row", "where")}, []
    ranked = [row for row in rows if decided(row["ranks"])]
    for row in ranked:
        encoded = [sum(chat.encode_answer(tokenizer, row["prompt"], c), []) for c in row["completions"]]
        if max(map(len, encoded)) > context:
            long.append(row["where"])
            if too_long == "drop":
                continue
            encoded = [
                ids[-context:] for ids in encoded
            ]  # the answer and its EOS are what is scored: cut the beginning
        columns["ids"].append(encoded)
        columns["ranks"].append([float(r) for r in row["ranks"]])
        columns["margin"].append([float(m) for m in row.get("margin", [0] * len(encoded))])
        given = row.get("tags", [None] * len(encoded))
        columns["tags"].append([[-1.0 if g is None else float(tag in g) for tag in tags] for g in given])
        columns["row"].append(len(columns["row"]))
        columns["where"].append(row["where"])
    used = len(columns["row"])
    data.report_length(stage, side, len(rows), used, long, f"{context} tokens", too_long, "cut at their beginning")
    if len(ranked) < len(rows):
        stage.report[side]["undecided"] = len(rows) - len(ranked)
        logger.warning(
            "%s: %d of %d rankings decide nothing (all ranks equal): left out", side, len(rows) - len(ranked), len(rows)
        )
    if not used:
        raise data.DataError(f"{side}: no ranking is left to learn from")
    return Dataset.from_dict(columns)


def decided(ranks: list[float]) -> list[tuple[int, int]]:
    """The pairs `(better, worse)` of positions that a ranking decides: 1 is best, equals decide nothing."""
    return [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]


class RankingCollator:
    """Rankings {"ids": K lists of ids, "ranks": K numbers} -> one batch of all their answers.

    Gives `input_ids` and `attention_mask` (answers, longest), or with `packed` one row without padding, in which (with
    `share`) the answers to a prompt stand behind one copy of it (`pipelines.packing.pack_branches`). For the P decided
    pairs of the batch `better` and `worse` (P,), numbers of its answers, `weight` (P,): every ranking weighs the same,
    and they sum to 1, and `margin` (P,), by how much the better one must be better. `tags` (answers, T) are the rows'
    own; T may be 0.
    """

    def __init__(self, pad_token_id: int, packed: bool = False, share: bool = True):
        self.pad_token_id, self.packed, self.share = pad_token_id, packed, share

    def __call__(self, features: list[dict]) -> dict:
        """One batch; the answers stand in the order of the rankings."""
        return self.inputs([f["ids"] for f in features]) | self.wanted(features)

    def wanted(self, features: list[dict]) -> dict:
        """What the loss needs beside the scores of the answers."""
        import torch

        better, worse, weight, margin, start = [], [], [], [], 0
        for f in features:
            pairs = decided(f["ranks"])
            better += [start + i for i, _ in pairs]
            worse += [start + j for _, j in pairs]
            weight += [1 / (len(pairs) * len(features))] * len(pairs)
            worth = f.get("margin") or [0.0] * len(f["ids"])
            margin += [worth[i] - worth[j] for i, j in pairs]
            start += len(f["ids"])
        return {
            "better": torch.tensor(better),
            "worse": torch.tensor(worse),
            "weight": torch.tensor(weight),
            "margin": torch.tensor(margin),
            "tags": torch.tensor([answer for f in features for answer in f.get("tags") or [[]] * len(f["ids"])]),
        }

    def inputs(self, rankings: list[list[list[int]]]) -> dict:
        """What the model is given of the ids of the answers of each ranking."""
        import torch
        from trl.trainer.utils import pad

        from pipelines.packing import pack_branches

        if self.packed:
            return pack_branches(rankings, self.share)
        ids = [torch.tensor(answer) for answers in rankings for answer in answers]
        return {
            "input_ids": pad(ids, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(i) for i in ids], padding_value=0),
        }


def ranking_loss(better, worse, weight, center: float | None = None, margin=0.0):
    """Weighted mean of -log sigmoid(better - worse - margin) over scores (P,), plus `center` times that of their sums
    squared.

    With pairs only (K = 2) it is the loss of `trl.RewardTrainer`, centring and margin included.
    """
    from torch.nn.functional import softplus

    loss = (weight * softplus(worse - better + margin)).sum()
    return loss + center * (weight * (better + worse) ** 2).sum() if center is not None else loss


def answer_logits(trainer, dataset, collate: RankingCollator) -> list:
    """What the model says of the answers of every ranking: float32 arrays (K, 1 + T), the same on every process.

    Each process reads its share; rankings go through in order of length, so that there is little padding.
    """
    import numpy as np
    import torch
    from accelerate.utils import gather_object

    args = trainer.args
    model = trainer.model_wrapped if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled else trainer.model
    order = np.argsort([max(map(len, r["ids"])) for r in dataset], kind="stable")
    mine = order[args.process_index :: args.world_size]
    was_training, found = model.training, []
    model.eval()
    # A sharded model needs every process in every forward, so each does as many batches as the first.
    for start in range(0, math.ceil(len(order) / args.world_size), args.per_device_eval_batch_size):
        chunk = [int(i) for i in mine[start : start + args.per_device_eval_batch_size]]
        rows = [dataset[i] for i in chunk or order[:1].tolist()]
        batch = trainer._prepare_input(collate.inputs([row["ids"] for row in rows]))
        with torch.no_grad(), trainer.compute_loss_context_manager():
            logits = model(**batch, use_cache=False).logits.float().cpu().numpy()
        parts = np.split(logits, np.cumsum([len(row["ids"]) for row in rows])[:-1])
        found += zip(chunk, parts, strict=False)  # no chunk: the row is there for the others alone
    model.train(was_training)
    found = gather_object(found) if args.world_size > 1 else found
    return [logits for _, logits in sorted(found, key=lambda item: item[0])]


def pair_scores(dataset, logits: list):
    """Scores of the better and the worse answer of every decided pair, two float32 arrays, from `answer_logits`."""
    import numpy as np

    pairs = [(own[a, 0], own[b, 0]) for row, own in zip(dataset, logits) for a, b in decided(row["ranks"])]
    return tuple(np.array(side, np.float32) for side in zip(*pairs))


def preference_metrics(chosen, rejected) -> dict:
    """Accuracy, margin, calibration and level of the scores (n,) of n chosen and n rejected answers.

    `calibration_error` is the expected calibration error over ten bins (Guo et al. 2017, 1706.04599) of the
    Bradley–Terry probability sigma(|chosen - rejected|) that the preferred-by-score answer is the one people chose.
    `histogram` counts both kinds of scores between 25 equally distant `edges`.
    """
    import numpy as np

    margin = chosen.astype(np.float64) - rejected
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    right = (margin > 0) + 0.5 * (margin == 0)
    bins = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
    table = [
        {"confidence": float(confidence[bins == b].mean()), "accuracy": float(right[bins == b].mean()), "pairs": int((bins == b).sum())}
        for b in range(10)
        if (bins == b).any()
    ]  # fmt: skip
    edges = np.histogram_bin_edges(np.concatenate([chosen, rejected]), 24)
    histogram = {"edges": edges.tolist()}
    for side, scores in (("chosen", chosen), ("rejected", rejected)):
        histogram[side] = np.histogram(scores, edges)[0].tolist()
    return {
        "accuracy": float(right.mean()),
        "margin": float(margin.mean()),
        "loss": float(np.logaddexp(0, -margin).mean()),
        "calibration_error": sum(abs(t["confidence"] - t["accuracy"]) * t["pairs"] for t in table) / len(margin),
        "mean_score": float((chosen.mean() + rejected.mean()) / 2),
        "score_std": float(np.concatenate([chosen, rejected]).std()),
        "pairs": len(margin),
        "calibration": table,
        "histogram": histogram,
    }
