"""RLOO and GRPO against TRL 1.16's trainers: the same answers give the same advantages, losses and weights to 1e-5.

The reference's numbers are in ppo_reference/trl_1_16.npz, written by ppo_reference/make_methods.py: two minibatches,
two passes. Nothing has to be undone.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from ppo_reference.make import EOS, PAD, new_models, tokenizer
from ppo_reference.make_methods import CASES, FIXTURE, SETTINGS, prompts
from torch.nn.utils import parameters_to_vector

from pipelines.generation import decode
from pipelines.generation.logprobs import collate, token_logprobs
from pipelines.ppo.config import PPOConfig
from pipelines.ppo.trainer import PPOTrainer
from pipelines.ppo.update import STATISTICS

OURS = dict(num_ppo_epochs=2, num_mini_batches=2, response_length=10, cliprange=0.05, num_sample_generations=0)


@pytest.fixture(scope="module")
def reference():
    """`reference("grpo/loss")` is that array as a tensor; float32, or int64."""
    with np.load(FIXTURE, allow_pickle=False) as file:
        arrays = {
            name: torch.from_numpy(file[name].astype(np.int64 if file[name].dtype == np.int16 else np.float32))
            for name in file.files
        }
    return arrays.__getitem__


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def ours(case: str, reference, folder, monkeypatch, micro: int = 16, packed: bool = True):
    """Our trainer after the update that TRL made: `(trainer, Targets, STATISTICS of its optimizer steps)`."""
    method, theirs = CASES[case]
    models = new_models()
    for name in ("policy", "ref"):
        for key, weight in models[name].named_parameters():
            weight.data = reference(f"{name}/{key}").clone()
    scores = iter(reference("scores").tolist())
    settings = SETTINGS | OURS | {"kl_coef": theirs.get("beta", 0.0), "advantage": method}
    settings |= {name: value for name, value in theirs.items() if name != "beta"}
    trainer = PPOTrainer(
        model=models["policy"],
        ref_model=models["ref"],
        value_model=None,
        reward_funcs=lambda prompts, **columns: [next(scores) for _ in prompts],
        args=PPOConfig(
            **settings,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=16 // micro,
            max_steps=1,
            output_dir=str(folder),
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts()}),
        processing_class=tokenizer(EOS),
    )
    trainer.learner.packed = trainer.rollout_maker.packed = packed
    trainer._set_up(None)
    queries, responses = (
        [[t for t in row if t != PAD] for row in reference(n).tolist()] for n in ("queries", "responses")
    )
    with torch.no_grad():  # as TRL, which asks the policy for the log-probs of what it has generated
        batch = collate(list(zip(queries, responses, strict=True)), False, "cpu")
        logprobs, _ = token_logprobs(trainer.policy, batch, SETTINGS["temperature"])
    logprobs = list(logprobs.split([len(r) for r in responses]))
    monkeypatch.setattr(decode, "generate", lambda *args, **kwargs: (responses, logprobs))
    monkeypatch.setattr(trainer, "_row_of", lambda number: number)
    rollouts = trainer._train_rollout(range(16))
    assert rollouts.prompts == queries and rollouts.values is None

    goals, steps, backward = [], [], trainer.learner.backward

    def recorded(model, rollouts, goal, *rest, **more):
        goals.append(goal)
        steps.append(backward(model, rollouts, goal, *rest, **more))
        return steps[-1]

    orders = reference(f"{case}/orders").view(2, 16)
    monkeypatch.setattr(trainer.learner, "backward", recorded)
    monkeypatch.setattr(trainer.learner, "order", lambda update, epoch: orders[epoch].tolist())
    metrics = trainer._update(rollouts)
    assert not {"loss/value_avg", "val/explained_variance", "val/bias"} & metrics.keys()
    return trainer, goals[0], rollouts, torch.stack(steps)


@pytest.mark.parametrize("case", CASES)
def test_the_same_answers_give_the_same_update(case, reference, tmp_path, monkeypatch):
    trainer, goal, rollouts, steps = ours(case, reference, tmp_path, monkeypatch)
    advantages = reference(f"{case}/advantages")
    close(goal.advantages, torch.where(rollouts.mask, advantages[:, None], 0.0))
    method, theirs = CASES[case]
    if method == "rloo" or "beta" not in theirs:  # else their loss has the KL in it, and our statistic has not
        close(steps[:, STATISTICS.index("loss/policy_avg")], reference(f"{case}/loss"))
    assert steps[:, STATISTICS.index("policy/clipfrac_avg")].max() > 0.1
    before = parameters_to_vector(new_models()["policy"].parameters())
    after = parameters_to_vector(trainer.policy.parameters())
    close(after, reference(f"{case}/policy_after"))
    assert (after - before).abs().max() > 2e-3  # two hundred times the tolerance


@pytest.mark.parametrize("case", ["rloo", "grpo-kl", "grpo-answers"])
@pytest.mark.parametrize("packed", [True, False])
def test_neither_micro_batches_nor_padding_change_it(case, packed, reference, tmp_path, monkeypatch):
    trainer, *_ = ours(case, reference, tmp_path, monkeypatch, micro=2, packed=packed)
    close(parameters_to_vector(trainer.policy.parameters()), reference(f"{case}/policy_after"))
