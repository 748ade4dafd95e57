"""The forwards that PPO needs: log-probs, entropies and values of response tokens, and scores of whole answers.

Heads are applied at response positions only, so no logits over the vocabulary exist for prompts or padding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def collate(sequences: list[tuple[list[int], list[int]]], device) -> dict[str, Tensor]:
    """(prompt ids, response ids) pairs as one right-padded batch.

    `input_ids`, `attention_mask`, `position_ids`: (b, L). `states` (N,): where, in the flattened (b·L), the
    state before each response token is; `labels` (N,): that token. N counts all response tokens, row after
    row.
    """
    width = max(len(p) + len(r) for p, r in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    states, labels = [], []
    for row, (prompt, response) in enumerate(sequences):
        n = len(prompt) + len(response)
        ids[row, :n] = torch.tensor(prompt + response)
        mask[row, :n] = 1
        first = row * width + len(prompt) - 1
        states += range(first, first + len(response))
        labels += response
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": torch.arange(width).expand_as(ids),
        "states": torch.tensor(states),
        "labels": torch.tensor(labels),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def plain_model(model: nn.Module) -> nn.Module:
    """The transformers model itself: what PEFT has wrapped, adapters inside its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def states_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Last hidden states (N, H) before each response token."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    hidden = plain_model(model).base_model(**inputs, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[batch["states"]]


def token_logprobs(
    model: nn.Module, batch: dict[str, Tensor], temperature: float, grad_entropy: bool = False
):
    """Log-probs (N,) of the response tokens under softmax(logits / temperature), and that distribution's entropies (N,).

    The entropy carries gradients only with `grad_entropy`.
    """
    logits = plain_model(model).get_output_embeddings()(states_of(model, batch)).float() / temperature
    log_total = torch.logsumexp(logits, -1)
    logprobs = logits.gather(-1, batch["labels"][:, None]).squeeze(-1) - log_total
    with torch.set_grad_enabled(grad_entropy and torch.is_grad_enabled()):
        entropies = log_total - (torch.exp(logits - log_total[:, None]) * logits).sum(-1)
    return logprobs, entropies


def token_values(critic: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The critic's value (N,) of the state before each response token."""
    return plain_model(critic).score(states_of(critic, batch)).squeeze(-1).float()


class PolicyAndCritic(nn.Module):
    """Both trained models as one module: one optimizer, one gradient norm, one `accelerator.prepare`."""

    is_gradient_checkpointing = False  # asked by TRL before it generates; in eval mode none is active

    def __init__(self, policy: nn.Module, critic: nn.Module):
        super().__init__()
        self.policy, self.critic = policy, critic
        self.config = policy.config  # what the Trainer, DeepSpeed and callbacks look at

    def forward(self, batch: dict[str, Tensor], temperature: float, grad_entropy: bool = False):
        """`(logprobs, entropies, values)`, each (N,) float32."""
        return *token_logprobs(self.policy, batch, temperature, grad_entropy), token_values(
            self.critic, batch
        )


@torch.no_grad()
def sequence_scores(model: nn.Module, sequences: list[list[int]], device) -> Tensor:
    """Scores (b,) of a one-label sequence classifier for token sequences, read at the last real token of each."""
    ids, mask, _ = right_padded(sequences, device)
    if not hasattr(model, "score"):  # an encoder (BERT …): its own head knows where to look
        return model(input_ids=ids, attention_mask=mask).logits[:, 0].float()
    position_ids = torch.arange(ids.shape[1], device=device).expand_as(ids)
    hidden = model.base_model(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
    last = hidden.last_hidden_state[torch.arange(len(ids), device=device), mask.sum(1) - 1]
    return model.score(last)[:, 0].float()


def right_padded(sequences: list[list[int]], device) -> tuple[Tensor, Tensor, int]:
    """Ids and attention mask (b, longest), both int64, padding on the right; and the longest length."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device), width


def disable_dropout(model: nn.Module) -> None:
    """Turn every dropout off, also those that attention modules hold as a number; the config keeps its values.

    With dropout the log-prob of one token differs from forward to forward, and the ratio of an unchanged
    policy from 1.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
