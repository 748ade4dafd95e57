"""What a reward model tells of an answer beside its score: the probability of each tag (rude, beside the point, wrong
…).

While it is trained the tags are further outputs of the score head. Afterwards they lie beside a plain one-score model
in `tags.safetensors`: `weight` (tags, width), in the order of the list `tags` of the file's metadata. The logits of the
tags are the state at an answer's last token times it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from pipelines.errors import ModelError

FILE = "tags.safetensors"


def add(model, count: int) -> None:
    """Widen the score head of a sequence classifier by `count` outputs; its config keeps saying one, as TRL
    wants it.
    """

    if not hasattr(model, "score"):
        raise ModelError(
            f"args.tags: {type(model).__name__} has no `score` head over each position; use a causal model"
        )
    old = model.score
    model.score = nn.Linear(old.in_features, 1 + count, bias=False, dtype=old.weight.dtype)


def loss(logits: Tensor, tags: Tensor) -> Tensor:
    """Binary cross-entropy of logits (answers, T) against tags (answers, T): 1, 0, or -1 for unknown (left out)."""
    losses = nn.functional.binary_cross_entropy_with_logits(logits.float(), tags.clamp(min=0), reduction="none")
    known = tags >= 0
    return (losses * known).sum() / known.sum().clamp(min=1)


def metrics(tags: list, logits: list, names: list[str]) -> dict[str, float]:
    """For each tag: accuracy at probability one half, share of answers that have it, and area under the ROC curve.

    `tags`: (K, T) numbers for each ranking, as in `loss`; `logits`: arrays (K, 1 + T), the score first. The area is
    left out where all answers have the tag or none has it.
    """

    found = {}
    for i, name in enumerate(names):
        true = np.array([answer[i] for ranking in tags for answer in ranking])
        said = np.concatenate(logits)[:, 1 + i]
        true, said = true[true >= 0], said[true >= 0]
        if len(true):
            found[f"tag_{name}_accuracy"] = float(((said > 0) == (true > 0)).mean())
            found[f"tag_{name}_share"] = float(true.mean())
        if len(set(true)) == 2:
            found[f"tag_{name}_auc"] = float(roc_auc_score(true, said))
    return found


def split(folder: Path, names: list[str]) -> None:
    """Turn the model in `folder`, whose head has 1 + T outputs, into a one-score model with the tags beside it."""

    for path in folder.glob("model*.safetensors"):
        weights = load_file(path)
        if "score.weight" in weights:
            head = weights["score.weight"]
            save_file({"weight": head[1:].clone()}, folder / FILE, metadata={"tags": json.dumps(names)})
            save_file({**weights, "score.weight": head[:1].clone()}, path, metadata={"format": "pt"})


class TagPenalty(nn.Module):
    """Sum over tags of penalty × P(the answer has the tag), from states (b, H) at the answers' last tokens.

    `folder`: a reward model with `tags.safetensors`; `penalties`: tag -> number. Raises `ModelError` for a tag that the
    model does not tell.
    """

    def __init__(self, folder: str | Path, penalties: dict[str, float]):

        super().__init__()
        path = Path(folder) / FILE
        if not path.is_file():
            raise ModelError(f"reward.tag_penalties: {folder} tells no tags: set args.tags in its reward stage")
        with safe_open(path, "pt") as file:
            known, weight = json.loads(file.metadata()["tags"]), file.get_tensor("weight")
        if missing := [tag for tag in penalties if tag not in known]:
            raise ModelError(f"reward.tag_penalties: {path} tells {', '.join(known)}, not {', '.join(missing)}")
        # not persistent: Accelerate's FSDP2 takes whatever is in a state dict for a shard
        self.weight: Tensor
        self.penalties: Tensor
        self.register_buffer("weight", weight[[known.index(tag) for tag in penalties]], persistent=False)
        self.register_buffer("penalties", torch.tensor(list(penalties.values())), persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """What is taken off the scores, (b,) float32."""
        return torch.sigmoid(states.float() @ self.weight.float().T) @ self.penalties.float()
