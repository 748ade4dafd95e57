"""Writes trl_1_12.npz: what TRL 1.12's PPOTrainer computes in one full update, for tests/test_ppo_parity.py.

In an environment of its own (TRL 1.13 dropped the trainer), from the repository's root:

    python3.11 -m venv REFERENCE
    REFERENCE/bin/pip install trl==1.12.0 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
    ACCELERATE_USE_CPU=true REFERENCE/bin/python tests/ppo_reference/make.py

TRL's trainer runs unchanged: nothing is copied from it and nothing replaced in it. What it computes is read from
the local variables of its `train` when it logs, which is after the last epoch of the update.

Contents (float32 unless said; B = 16 answers, T = 10 tokens, all padding as TRL has it):
- `policy/…, ref/…, value/…, reward/…`: the weights of the four models before the update.
- `LENGTHS/queries` (B, L) int, left-padded; `/responses` (B, T) int; `/logprobs, /ref_logprobs, /values` (B, T);
  `/scores` (B,) as the reward model gave them. LENGTHS: `full` or `eos`.
- `LENGTHS/CASE/rewards, advantages, returns` (B, T); `/scores` (B,) less the penalty; `/orders` (epochs, B) int;
  `/pg_loss, vf_loss, entropy, approxkl, pg_clipfrac, vf_clipfrac, ratio` (epochs, minibatches);
  `/policy_after, value_after`: all parameters after the update, end to end. CASE: e.g. `k3-whiten-penalty`.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

FIXTURE = Path(__file__).with_name("trl_1_12.npz")
VOCABULARY, NEVER, EOS, PAD = 32, 29, 30, 31
END = {"full": NEVER, "eos": EOS}  # what ends an answer: a token that is never sampled, or one that often is
SETTINGS = dict(  # the same names in TRL's PPOConfig and in ours
    per_device_train_batch_size=16,
    gradient_accumulation_steps=1,
    num_ppo_epochs=2,
    num_mini_batches=2,
    response_length=10,
    temperature=0.7,
    learning_rate=1e-3,
    adam_epsilon=1e-5,
    kl_coef=0.2,
    vf_coef=0.3,
    cliprange=0.05,
    cliprange_value=0.05,
    gamma=0.97,
    lam=0.9,
    total_episodes=16,
    num_sample_generations=0,
    use_cpu=True,
    bf16=False,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    seed=1,
)
CASES = {
    "-".join([kl, *(["whiten"] if white else []), *(["penalty"] if penalty else [])]): dict(
        kl_estimator=kl, whiten_rewards=white, missing_eos_penalty=penalty
    )
    for kl, white, penalty in itertools.product(("k1", "k3"), (False, True), (None, 1.5))
}


def model(kind) -> torch.nn.Module:
    """A GPT-2 of about 2,300 parameters with weights large enough that nothing is near uniform."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=24,
        n_embd=8,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        num_labels=1,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return kind(config).eval()


def new_models() -> dict[str, torch.nn.Module]:
    """Policy, a reference near it, critic and reward model; the policy's PAD and NEVER have no probability."""
    torch.manual_seed(0)
    policy, value, reward = map(model, (GPT2LMHeadModel, *[GPT2ForSequenceClassification] * 2))
    with torch.no_grad():
        # Behind a layer norm the states have mean 0, so along (1, …, 1) only its bias counts: an offset of the logit.
        policy.transformer.ln_f.bias.fill_(1.0)
        for token, offset in ((PAD, -40.0), (NEVER, -40.0), (EOS, -1.0)):
            policy.transformer.wte.weight[token] += offset / policy.config.n_embd
        ref = model(GPT2LMHeadModel)
        for weight, near in zip(ref.parameters(), policy.parameters(), strict=True):
            weight.copy_(near + 0.03 * torch.randn_like(near))
    return {"policy": policy, "ref": ref, "value": value, "reward": reward}


def tokenizer(end: int) -> PreTrainedTokenizerFast:
    """Words w0, w1, … whose ids are their numbers; w<end> is EOS."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token=f"w{PAD}"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=f"w{end}", pad_token=f"w{PAD}", padding_side="left"
    )


def prompts() -> list[str]:
    """16 prompts of 1 to 6 words."""
    return [" ".join(f"w{(7 * i + 3 * j) % NEVER}" for j in range(1 + i % 6)) for i in range(16)]


def run(end: int, case: dict) -> dict[str, np.ndarray]:
    """One update of TRL's trainer; what its `train` holds when it logs, and the weights then."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    seen, orders, permutation = {}, [], np.random.permutation

    class Recorded(PPOTrainer):
        def log(self, logs, *rest):
            seen.update(sys._getframe(1).f_locals)
            return super().log(logs, *rest)

    def recorded(n):
        orders.append(permutation(n))
        return orders[-1]

    four, words = new_models(), tokenizer(end)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Recorded(
            args=PPOConfig(**SETTINGS, **case, stop_token="eos", gradient_checkpointing=False, output_dir=folder),
            processing_class=words,
            model=four["policy"],
            ref_model=four["ref"],
            reward_model=four["reward"],
            value_model=four["value"],
            train_dataset=Dataset.from_list([dict(words(text)) for text in prompts()]),
        )
        np.random.seed(0)
        np.random.permutation = recorded
        try:
            trainer.train()
        finally:
            np.random.permutation = permutation
    names = "queries responses logprobs ref_logprobs values scores rewards advantages returns contain_eos_token"
    found = {name: seen[name].numpy().copy() for name in names.split()}
    for name in "pg_loss vf_loss entropy approxkl pg_clipfrac vf_clipfrac ratio".split():
        found[name] = seen[f"{name}_stats"][:, :, 0].numpy().copy()
    found["orders"] = np.stack(orders)
    for name in ("policy", "value"):
        found[f"{name}_after"] = torch.nn.utils.parameters_to_vector(four[name].parameters()).detach().numpy().copy()
    return found


def main() -> None:
    arrays = {
        f"{m}/{name}": w.detach().numpy() for m, four in new_models().items() for name, w in four.named_parameters()
    }
    for lengths, end in END.items():
        for case, settings in CASES.items():
            found = run(end, settings)
            ended, penalty = found.pop("contain_eos_token"), settings["missing_eos_penalty"] or 0.0
            shared = {name: found.pop(name) for name in "queries responses logprobs ref_logprobs values".split()}
            if case == "k1":
                shared["scores"] = found["scores"]
                arrays |= {f"{lengths}/{name}": array for name, array in shared.items()}
            for name, array in shared.items():  # the settings of a case change nothing before the rewards
                assert np.array_equal(array, arrays[f"{lengths}/{name}"]), (case, name)
            assert np.allclose(found["scores"], arrays[f"{lengths}/scores"] - penalty * ~ended)
            arrays |= {f"{lengths}/{case}/{name}": array for name, array in found.items()}
            lengths_seen = sorted((found["rewards"] != 0).sum(1).tolist())
            print(lengths, case, "clipped", found["pg_clipfrac"].max(), found["vf_clipfrac"].max(), lengths_seen)
    narrow = {name: a.astype(np.int16) if a.dtype == np.int64 else a for name, a in arrays.items()}
    np.savez_compressed(FIXTURE, **narrow)
    print(FIXTURE, FIXTURE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
