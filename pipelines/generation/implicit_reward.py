"""A policy of DPO or KTO as a reward model: how much likelier it finds an answer than the model it started from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pipelines import files
from pipelines.errors import SetupError
from pipelines.generation.logprobs import answer_nats, make_ready, within
from pipelines.kinds import of_kind
from pipelines.models import loading, scorers

BETA = 0.1  # of `trl.DPOConfig`, where a recipe gives none


class ImplicitReward(nn.Module):
    """beta (log pi(answer | prompt) - log pi_reference(answer | prompt)), in nats; frozen.

    The reward under which the policy is optimal (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, section 4).
    """

    def __init__(self, policy: nn.Module, reference: nn.Module, beta: float):
        super().__init__()
        self.model, self.reference = policy.eval().requires_grad_(False), reference.eval().requires_grad_(False)
        self.beta, self.packed = beta, False
        self.config = policy.config  # what logs look at

    def place(self, put: Callable[[nn.Module], nn.Module]) -> None:
        """Make both models ready for many answers, and let `put` place each where the launcher wants it; in place."""
        self.packed = all([make_ready(self.model), make_ready(self.reference)])
        self.model, self.reference = put(self.model), put(self.reference)

    @torch.no_grad()
    def forward(self, answers: list[tuple[list[int], list[int]]]) -> Tensor:
        """Rewards (b,), float64 on the CPU, of `(prompt ids, answer ids)`."""
        own, reference = (
            torch.tensor(within(model, answer_nats, answers, self.packed), dtype=torch.float64)
            for model in (self.model, self.reference)
        )
        return self.beta * (reference - own)


def implicit_reward(path: str | Path, policy: nn.Module, tokenizer, load: Callable[[str], nn.Module]) -> ImplicitReward:
    """The reward that the stage in the folder `path` learned.

    Args:
        policy: the model in that folder.
        tokenizer: the one in that folder.
        load: gives the model at a path: that which the stage started from, which its record names.

    Raises `SetupError` where that is gone, is not known, or has not all the tokens of the policy.
    """
    start = files.recorded(path, "model", "model_name_or_path")
    if start.startswith(files.HERE):
        raise SetupError(
            f"{path}: its reference is the folder {start}, and a record does not tell where that lies: name it in the "
            "recipe by a hub id, a relative path or stage:NAME to use what a policy prefers"
        )
    base = str(Path(path).parent / start.removeprefix("stage:")) if start.startswith("stage:") else start
    if start.startswith("stage:") and not Path(base).is_dir():
        raise SetupError(
            f"{path}: its implicit reward is measured against the model that it was trained from, and {base} is gone"
        )
    reference, beta = load(base), files.recorded(path, "args", "beta")
    if loading.vocabulary(reference) < len(tokenizer):
        raise SetupError(
            f"{path}: the stage gave its model tokens that {base} does not have, so what it was trained from is in no "
            "folder, and its implicit reward is not known. Add the tokens in an sft stage, and train dpo from that."
        )
    return ImplicitReward(policy, reference, BETA if beta is None else beta)


def load_reward(section, label: str | None = None) -> tuple[nn.Module, object]:
    """`(model, its tokenizer)` of a `model:` section: a policy of dpo or kto, or what `scorers.load_scorer` loads."""
    path = section.model_name_or_path
    if files.kind_of(path) not in of_kind(implicit_reward=True):
        return scorers.load_scorer(section, label)

    def load(path: str) -> nn.Module:
        revision = section.model_revision if path == section.model_name_or_path else "main"
        one = dataclasses.replace(section, model_name_or_path=path, model_revision=revision)
        return loading.load_model(one, "AutoModelForCausalLM")

    tokenizer = loading.load_tokenizer(section)
    return implicit_reward(path, load(path), tokenizer, load), tokenizer
