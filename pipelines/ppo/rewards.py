"""Ready-made rewards: functions to name in `reward.functions`, a classifier or an adapter as a reward model."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from pipelines import SetupError


def length_penalty(prompts, completions, completion_ids, **columns) -> list[float]:
    """Minus the number of tokens of each answer: with a weight of 0.01, a hundred tokens cost 1."""
    return [-float(len(ids)) for ids in completion_ids]


@torch.no_grad()
def log_odds(model: nn.Module, label: str) -> nn.Module:
    """A classifier of two labels as a reward model, in place: its score is the log-odds of `label`.

    The logits are linear in the last features, so their difference is one linear head (H,) -> 1.
    """
    ids = {str(name): i for i, name in model.config.id2label.items()}
    if label not in ids or len(ids) != 2:
        raise SetupError(f"reward.label: {label!r} must be one of a classifier's two labels; it has {', '.join(ids)}")
    name = next((n for n in ("score", "classifier") if type(getattr(model, n, None)) is nn.Linear), None)
    if name is None:
        raise SetupError(
            f"reward.label: the head of {type(model).__name__} is not one linear layer; score it in a reward function"
        )
    old, sign = getattr(model, name), torch.tensor([1.0 if i == ids[label] else -1.0 for i in range(2)])
    new = nn.Linear(old.in_features, 1, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
    new.weight.copy_((sign[:, None].to(old.weight) * old.weight).sum(0, keepdim=True))
    if old.bias is not None:
        new.bias.copy_((sign.to(old.bias) * old.bias).sum(0, keepdim=True))
    setattr(model, name, new)
    model.config.num_labels = model.num_labels = 1
    model.config.problem_type = None  # as a critic it is saved, and a classification of one label is no valid config
    model.config.id2label, model.config.label2id = {0: label}, {label: 0}
    return model


class AdapterScorer(nn.Module):
    """A reward model that is an adapter on the policy's own base: no second network in memory. Never trained.

    Args:
        policy: a PEFT model; the adapter is added to it beside its own.
        folder: the adapter of a sequence classifier of one label, trained from the base that `policy` adapts, as a
            reward stage with `use_peft` leaves it in `adapter/`.
        name: of the adapter inside `policy`.
    """

    def __init__(self, policy, folder: str | Path, name: str):
        super().__init__()
        import peft

        weights = load_file(Path(folder) / "adapter_model.safetensors")
        heads = [key for key in weights if key.endswith("score.weight")]
        config = peft.PeftConfig.from_pretrained(str(folder))
        if len(heads) != 1 or len(weights[heads[0]]) != 1 or config.trainable_token_indices:
            raise SetupError(
                f"{folder} is not an adapter with one score on unchanged tokens: reward.share_base cannot use it"
            )
        head = weights.pop(heads[0])
        config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, True
        policy.add_adapter(name, config)
        missing = peft.set_peft_model_state_dict(policy, weights, adapter_name=name).unexpected_keys
        if missing:
            raise SetupError(f"{folder} adapts what the policy does not have: {', '.join(missing[:3])}")
        self.score = nn.Linear(head.shape[1], 1, bias=False)
        self.score.weight.data.copy_(head)
        self.config = copy.deepcopy(policy.get_base_model().config)
        self.config.num_labels, self.config._name_or_path = 1, str(Path(folder).parent)
        self.name, self._policy = name, [policy]  # in a list: its weights are not this module's

    def base_model(self, **inputs):
        """The output of the policy's trunk with this adapter in place of the policy's own."""
        (policy,) = self._policy
        own = policy.active_adapter
        policy.set_adapter(self.name)
        try:
            return policy.get_base_model().base_model(**inputs)
        finally:
            policy.set_adapter(own)
