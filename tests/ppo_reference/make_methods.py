"""Writes trl_1_16.npz: what TRL 1.16's RLOOTrainer and GRPOTrainer compute on one batch, for
tests/ppo/test_methods_parity.py.

From the repository's root, in an environment with TRL 1.16: `ACCELERATE_USE_CPU=true PYTHONPATH=tests python
tests/ppo_reference/make_methods.py`.

TRL's trainers run unchanged. What they computed is read from what `_generate_and_score_completions` returns and
`_compute_loss` is given and returns. The models are those of make.py. All prompts are of one length: these trainers
count positions from the left padding, and a GPT-2 then computes something else for a shorter prompt.

Contents (float32 unless said; B = 16 answers, 4 to each of 4 prompts, T = 10 tokens):
- `policy/…, ref/…`: the weights before the update.
- `queries` (B, L) int; `responses` (B, T) int; `scores` (B,); the same for all cases.
- `CASE/advantages` (B,); `/orders` (steps, B / 2) int, the answers of each optimizer step; `/loss` (steps,);
  `/policy_after`: all parameters after the steps, end to end.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from ppo_reference.make import EOS, NEVER, PAD, new_models, tokenizer

FIXTURE = Path(__file__).with_name("trl_1_16.npz")
GROUP = 4
SETTINGS = dict(  # the same names in TRL's configs and in ours
    temperature=0.7,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    adam_epsilon=1e-5,
    num_generations=GROUP,
    use_cpu=True,
    bf16=False,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    seed=1,
)
THEIRS = dict(
    per_device_train_batch_size=8,
    steps_per_generation=2,
    num_iterations=2,
    max_steps=4,
    max_completion_length=10,
    epsilon=0.05,
    disable_dropout=True,
    gradient_checkpointing=False,
    shuffle_dataset=False,
)
CASES = {  # name: (method, their settings)
    "rloo": ("rloo", {"beta": 0.1}),
    "rloo-without-kl": ("rloo", {"beta": 0.0}),
    "rloo-normalized": ("rloo", {"beta": 0.1, "normalize_advantages": True}),
    "grpo": ("grpo", {}),
    "grpo-kl": ("grpo", {"beta": 0.2}),
    "grpo-batch": ("grpo", {"beta": 0.2, "scale_rewards": "batch"}),
    "grpo-unscaled": ("grpo", {"scale_rewards": "none"}),
    "grpo-answers": ("grpo", {"beta": 0.2, "loss_type": "grpo"}),
    "grpo-bnpo": ("grpo", {"beta": 0.2, "loss_type": "bnpo"}),
    "grpo-dr": ("grpo", {"beta": 0.2, "loss_type": "dr_grpo", "scale_rewards": "none"}),
}


def prompts() -> list[str]:
    """4 prompts of 4 words."""
    return [" ".join(f"w{(7 * i + 3 * j) % NEVER}" for j in range(4)) for i in range(4)]


def score(prompts, completions, completion_ids, **columns) -> list[float]:
    """A number for each answer, of the right size for advantages of about 1."""
    return [sum(7 * token % 11 for token in ids) / 20 for ids in completion_ids]


def run(method: str, case: dict) -> dict[str, np.ndarray]:
    """One batch of TRL's trainer: what it generated, its advantages, losses and the weights at the end."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    trainer_class, config_class = {"rloo": (RLOOTrainer, RLOOConfig), "grpo": (GRPOTrainer, GRPOConfig)}[method]
    batches, steps = [], []

    class Recorded(trainer_class):
        def _generate_and_score_completions(self, inputs):
            batches.append(super()._generate_and_score_completions(inputs))
            return batches[-1]

        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            steps.append((inputs["prompt_ids"], inputs["completion_ids"], inputs["advantages"], loss.item()))
            return loss

    models = new_models()
    with tempfile.TemporaryDirectory() as folder:
        models["ref"].save_pretrained(folder)  # TRL loads the reference from where the policy's config says it is from
        models["policy"].config._name_or_path = folder
        trainer = Recorded(
            model=models["policy"],
            reward_funcs=score,
            args=config_class(**SETTINGS, **THEIRS, **case, output_dir=folder),
            train_dataset=Dataset.from_dict({"prompt": prompts()}),
            processing_class=tokenizer(EOS),
        )
        trainer.train()
    (batch,) = batches
    ids = [tuple(row) for row in torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1).tolist()]
    orders = []
    for prompt_ids, completion_ids, advantages, _ in steps:
        taken = []
        for row, advantage in zip(torch.cat([prompt_ids, completion_ids], 1).tolist(), advantages, strict=True):
            same = (i for i in range(len(ids)) if i not in taken and ids[i] == tuple(row))
            taken.append(next(i for i in same if batch["advantages"][i] == advantage))
        orders.append(taken)
    answers = [[t for t in row if t != PAD] for row in batch["completion_ids"].tolist()]
    return {
        "queries": batch["prompt_ids"].numpy(),
        "responses": batch["completion_ids"].numpy(),
        "scores": np.array(score(None, None, answers), np.float32),
        "advantages": batch["advantages"].numpy(),
        "orders": np.array(orders),
        "loss": np.array([loss for *_, loss in steps], np.float32),
        "policy_after": torch.nn.utils.parameters_to_vector(models["policy"].parameters()).detach().numpy(),
    }


def main() -> None:
    arrays = {
        f"{m}/{name}": w.detach().numpy()
        for m, model in new_models().items()
        if m in ("policy", "ref")
        for name, w in model.named_parameters()
    }
    for case, (method, settings) in CASES.items():
        found = run(method, settings)
        for name in ("queries", "responses", "scores"):
            same = found.pop(name)
            assert np.array_equal(same, arrays.setdefault(name, same)), (case, name)
        arrays |= {f"{case}/{name}": array for name, array in found.items()}
        print(case, found["advantages"].round(2)[:8], found["loss"])
    narrow = {name: a.astype(np.int16) if a.dtype == np.int64 else a for name, a in arrays.items()}
    np.savez_compressed(FIXTURE, **narrow)
    print(FIXTURE, FIXTURE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
