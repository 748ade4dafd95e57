"""PPOTrainer against TRL 1.12's: the same answers give the same rewards, advantages, losses and weights to 1e-5.

The reference's numbers are in ppo_reference/trl_1_12.npz, written by ppo_reference/make.py in an environment of its
own. Where the two differ on purpose (see pipelines/ppo/algorithm.py), the difference is undone here, by name, and the
rest must then be equal.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from datasets import Dataset
from ppo_reference.make import CASES, END, FIXTURE, PAD, SETTINGS, new_models, tokenizer
from torch.nn.utils import parameters_to_vector

from pipelines.generation import decode
from pipelines.generation.logprobs import collate, token_logprobs
from pipelines.ppo import algorithm
from pipelines.ppo.config import PPOConfig
from pipelines.ppo.trainer import PPOTrainer
from pipelines.ppo.update import STATISTICS

STATS = {  # TRL's name: ours
    "pg_loss": "loss/policy_avg",
    "vf_loss": "loss/value_avg",
    "pg_clipfrac": "policy/clipfrac_avg",
    "vf_clipfrac": "val/clipfrac_avg",
    "approxkl": "policy/approxkl_avg",
    "ratio": "val/ratio",
    "entropy": "policy/entropy_avg",
}


@pytest.fixture(scope="module")
def reference():
    """`reference("full/k1/rewards")` is that array as a tensor; float32, or int64."""
    with np.load(FIXTURE, allow_pickle=False) as file:
        arrays = {
            name: torch.from_numpy(file[name].astype(np.int64 if file[name].dtype == np.int16 else np.float32))
            for name in file.files
        }
    return arrays.__getitem__


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def answers_of(reference, lengths: str) -> tuple[list, list]:
    """Prompts and answers (token ids) of the reference's batch, without their padding; EOS is kept."""
    rows = (reference(f"{lengths}/{name}").tolist() for name in ("queries", "responses"))
    return tuple([[token for token in row if token != PAD] for row in part] for part in rows)


def our_trainer(reference, lengths: str, folder, **settings) -> PPOTrainer:
    """Our trainer with the reference's models, prompts and order of minibatches."""
    four = new_models()
    for name, model in four.items():
        for key, weight in model.named_parameters():
            weight.data = reference(f"{name}/{key}").clone()
    texts = [" ".join(f"w{token}" for token in prompt) for prompt in answers_of(reference, lengths)[0]]
    trainer = PPOTrainer(
        model=four["policy"],
        ref_model=four["ref"],
        value_model=four["value"],
        reward_funcs=four["reward"],
        args=PPOConfig(**SETTINGS | {"max_grad_norm": 0.0} | settings, output_dir=str(folder)),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer(END[lengths]),
    )
    trainer._set_up(None)
    return trainer


def roll_out(trainer, reference, lengths: str, responses: list, monkeypatch):
    """Our rollouts, but for the sampling: these responses, with the log-probs that the reference sampled them with."""
    logprobs = [row[: len(response)] for row, response in zip(reference(f"{lengths}/logprobs"), responses, strict=True)]
    monkeypatch.setattr(decode, "generate", lambda *args, **kwargs: (responses, logprobs))
    rows = list(range(len(responses)))
    return trainer._rollout(trainer.train_dataset, trainer.train_prompts, rows, rows)


def update(trainer, rollouts, orders, monkeypatch) -> dict:
    """One update. What it computed: rewards, advantages (before and after whitening), returns, STATISTICS by step."""
    seen, gae, backward = {"stats": []}, algorithm.gae, trainer.learner.backward

    def recorded_gae(rewards, *rest):
        seen["rewards"] = rewards
        seen["raw_advantages"], seen["returns"] = gae(rewards, *rest)
        return seen["raw_advantages"], seen["returns"]

    def recorded_backward(model, rollouts, goal, *rest, **more):
        seen["advantages"] = goal.advantages
        seen["stats"].append(backward(model, rollouts, goal, *rest, **more))
        return seen["stats"][-1]

    monkeypatch.setattr(algorithm, "gae", recorded_gae)
    monkeypatch.setattr(trainer.learner, "backward", recorded_backward)
    monkeypatch.setattr(trainer.learner, "order", lambda update, epoch: orders[epoch].tolist())
    seen["metrics"] = trainer._update(rollouts)
    monkeypatch.setattr(algorithm, "gae", gae)
    table = torch.stack(seen["stats"]).view(len(orders), -1, len(STATISTICS))
    seen |= {theirs: table[..., STATISTICS.index(ours)] for theirs, ours in STATS.items()}
    return seen


def test_rollout_numbers(reference, tmp_path, monkeypatch):
    """Log-probs, reference log-probs, values and scores; TRL pads on both sides where we pack."""
    for lengths in END:
        trainer = our_trainer(reference, lengths, tmp_path)
        prompts, responses = answers_of(reference, lengths)
        out = roll_out(trainer, reference, lengths, responses, monkeypatch)
        assert out.mask.sum() == reference(f"{lengths}/responses").ne(PAD).sum()
        for name in ("ref_logprobs", "values"):
            close(getattr(out, name)[out.mask], reference(f"{lengths}/{name}")[out.mask])
        close(out.scores, reference(f"{lengths}/scores"))
        batch = collate(list(zip(prompts, responses, strict=True)), trainer.packed, trainer.accelerator.device)
        found, _ = token_logprobs(trainer.policy, batch, SETTINGS["temperature"])
        close(found, reference(f"{lengths}/logprobs")[out.mask])


@pytest.mark.parametrize("case", CASES)
def test_answers_of_full_length_give_the_same_update(reference, tmp_path, monkeypatch, case):
    """Nothing to undo but the clipping of gradients, which TRL does not have."""
    trainer = our_trainer(reference, "full", tmp_path, **CASES[case])
    rollouts = roll_out(trainer, reference, "full", answers_of(reference, "full")[1], monkeypatch)
    ours = update(trainer, rollouts, reference(f"full/{case}/orders"), monkeypatch)
    for name in ("rewards", "advantages", "returns", *STATS.keys() - {"entropy"}):
        close(ours[name], reference(f"full/{case}/{name}"))
    close(ours["entropy"][0], reference(f"full/{case}/entropy")[0])  # we look at it in the first epoch only
    assert (reference(f"full/{case}/pg_clipfrac") > 0.1).any() and (reference(f"full/{case}/vf_clipfrac") > 0.1).any()
    for name, model in (("policy", trainer.policy), ("value", trainer.critic)):
        before = torch.cat([w.flatten() for w in new_models()[name].parameters()])
        after = parameters_to_vector(model.parameters())
        close(after, reference(f"full/{case}/{name}_after"))
        assert (after - before).abs().max() > 2e-3  # two hundred times the tolerance


def test_neither_micro_batches_nor_padding_change_it(reference, tmp_path, monkeypatch):
    """The update above in micro-batches of a quarter of the batch, and with padded instead of packed forwards."""
    for packed in (True, False):
        split = dict(per_device_train_batch_size=4, gradient_accumulation_steps=4)
        trainer = our_trainer(reference, "full", tmp_path, **split)
        trainer.learner.packed = trainer.rollout_maker.packed = packed
        trainer.rollout_maker.scorer.packed = [packed]
        rollouts = roll_out(trainer, reference, "full", answers_of(reference, "full")[1], monkeypatch)
        ours = update(trainer, rollouts, reference("full/k1/orders"), monkeypatch)
        for name in ("pg_loss", "vf_loss"):
            close(ours[name], reference(f"full/k1/{name}"))
        for name, model in (("policy", trainer.policy), ("value", trainer.critic)):
            close(parameters_to_vector(model.parameters()), reference(f"full/k1/{name}_after"))


@pytest.mark.parametrize("case", CASES)
def test_answers_that_end_give_the_same_update_with_the_score_where_trl_puts_it(reference, tmp_path, monkeypatch, case):
    """Undone: we put the score on the last token, TRL on the first PAD after EOS.

    That gives its critic one more state to value, the one behind EOS. So our critic is given answers with one PAD
    more; and our policy the answers as they are, with the advantages that come from that critic.
    """
    expected = lambda name: reference(f"eos/{case}/{name}")
    _, responses = answers_of(reference, "eos")
    trainer = our_trainer(reference, "eos", tmp_path, **CASES[case])
    plain = roll_out(trainer, reference, "eos", responses, monkeypatch)
    room = SETTINGS["response_length"]
    longer = roll_out(trainer, reference, "eos", [(r + [PAD])[:room] for r in responses], monkeypatch)
    extra = longer.mask & ~plain.mask
    assert extra.sum() == sum(len(r) < room for r in responses) > 4
    longer = dataclasses.replace(
        longer,
        logprobs=longer.logprobs.masked_fill(extra, 0.0),  # the PAD is no action: no KL,
        ref_logprobs=longer.ref_logprobs.masked_fill(extra, 0.0),
        rewards=plain.rewards,  # and the reward model reads up to EOS, as in TRL
        scores=plain.scores,
        ended=plain.ended,
    )
    close(longer.values, torch.where(longer.mask, reference("eos/values"), 0.0))

    ours = update(trainer, longer, expected("orders"), monkeypatch)
    for name in ("rewards", "returns"):
        close(ours[name], expected(name))
    for name in ("vf_loss", "vf_clipfrac"):
        close(ours[name], expected(name))
    close(parameters_to_vector(trainer.critic.parameters()), expected("value_after"))

    trainer = our_trainer(reference, "eos", tmp_path, **CASES[case])
    given = ours["raw_advantages"], ours["returns"]
    monkeypatch.setattr(algorithm, "gae", lambda *_: given)
    ours = update(trainer, plain, expected("orders"), monkeypatch)
    for name in ("advantages", "pg_loss", "pg_clipfrac"):
        close(ours[name], expected(name))
    close(parameters_to_vector(trainer.policy.parameters()), expected("policy_after"))
    # Undone: its approximate KL and ratio are means over padding too, where they are 0 and 1.
    rows = expected("orders").view(*ours["approxkl"].shape, -1)
    real = plain.mask.float()[rows].mean((-2, -1))
    assert (real < 0.9).all()
    close(ours["approxkl"] * real, expected("approxkl"))
    close(ours["ratio"] * real + 1 - real, expected("ratio"))


@pytest.mark.parametrize("case", ["k1", "k3-penalty"])
def test_our_score_is_one_token_earlier_where_an_answer_ends(reference, tmp_path, monkeypatch, case):
    """The difference itself (trl issue 3750): only the score has moved, from the PAD behind EOS onto EOS."""
    trainer = our_trainer(reference, "eos", tmp_path, **CASES[case])
    rollouts = roll_out(trainer, reference, "eos", answers_of(reference, "eos")[1], monkeypatch)
    ours = update(trainer, rollouts, reference(f"eos/{case}/orders"), monkeypatch)
    theirs, early = reference(f"eos/{case}/rewards"), 0
    for row, n in enumerate(rollouts.mask.sum(1).tolist()):
        moved = theirs[row].clone()
        if n < len(moved):
            early += 1
            close(moved[n], reference(f"eos/{case}/scores")[row])
            moved[n - 1], moved[n] = moved[n - 1] + moved[n], 0.0
        close(ours["rewards"][row], moved)
    assert early > 4
    assert not torch.allclose(ours["advantages"], reference(f"eos/{case}/advantages"), atol=1e-2)


def test_our_gradients_are_clipped(reference, tmp_path, monkeypatch):
    """What `max_grad_norm=0` undoes in the tests above."""
    trainer = our_trainer(reference, "full", tmp_path, max_grad_norm=0.01)
    rollouts = roll_out(trainer, reference, "full", answers_of(reference, "full")[1], monkeypatch)
    ours = update(trainer, rollouts, reference("full/k1/orders"), monkeypatch)
    assert ours["metrics"]["grad_norm"] > 0.01
    close(ours["pg_loss"][0, 0], reference("full/k1/pg_loss")[0, 0])  # before the first step nothing has changed
    difference = parameters_to_vector(trainer.policy.parameters()) - reference("full/k1/policy_after")
    assert difference.abs().max() > 1e-4
