"""CPU seconds of one update of GRPO with the answers to a prompt behind one copy of it, and each behind its own.

    OMP_NUM_THREADS=1 python benchmarks/shared_prompts.py

The same 32 answers in both, a GPT-2 of 4 layers and width 384, the better of two updates of each. Lengths of answers
are means: they end where the model, of random weights, draws EOS.
"""

from __future__ import annotations

import datetime
import platform
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/ppo")]

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from test_ppo_trainer import make  # noqa: E402  a trainer on random models
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel  # noqa: E402

BATCH = 32


def update(prompt: int, answer: int, group: int) -> None:
    """Print a row: prompts of `prompt` tokens, at most `answer` tokens in an answer, `group` answers to a prompt."""
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "n_positions": 1024, "n_embd": 384, "n_layer": 4, "n_head": 6}
    shape |= {"bos_token_id": 30, "eos_token_id": 30, "pad_token_id": 31}
    texts = [" ".join(f"w{random.randrange(30)}" for _ in range(prompt)) for _ in range(16)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(
            folder,
            models=(GPT2LMHeadModel(GPT2Config(**shape)), None),
            reward_funcs=[GPT2ForSequenceClassification(GPT2Config(**shape, num_labels=1))],
            data=Dataset.from_dict({"prompt": texts}),
            advantage="grpo",
            num_generations=group,
            num_mini_batches=1,
            num_ppo_epochs=1,
            per_device_train_batch_size=BATCH // 2,
            gradient_accumulation_steps=2,
            response_length=answer,
            allow_no_eos=True,
        )
        trainer._set_up(None)
        width, rollout = trainer.learner.share, trainer._train_rollout(range(BATCH))
        spent: dict[int, list[float]] = {0: [], width: []}
        for share in (0, width, 0, width):
            trainer.learner.share = share
            began = time.process_time()
            trainer._update(rollout)
            spent[share].append(time.process_time() - began)
    own, shared = min(spent[0]), min(spent[width])
    length = rollout.mask.sum(1).float().mean()
    print(f"| {prompt} | {length:.0f} | {group} | {own:.2f} | {shared:.2f} | {own / shared:.1f} |", flush=True)


def main() -> None:
    """The table."""
    print(
        f"{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print("| prompt | answer | answers to it | each its own, CPU s | one copy, CPU s | times less |")
    print("|" + " ---: |" * 6)
    for prompt, answer, group in ((128, 32, 4), (128, 32, 8), (256, 32, 8), (64, 64, 8), (32, 128, 8)):
        update(prompt, answer, group)


if __name__ == "__main__":
    random.seed(0)
    main()
