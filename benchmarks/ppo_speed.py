"""PPO speed: one update of our trainer against TRL 1.12's PPOTrainer and TRL's GRPO and RLOO, in one run.

    python benchmarks/ppo_speed.py --reference-python REFERENCE/bin/python        # answers end at about 24 of 64 tokens
    python benchmarks/ppo_speed.py --reference-python REFERENCE/bin/python --lengths full
    python benchmarks/ppo_speed.py --reference-python REFERENCE/bin/python --vocabulary 50257 --prompts 16

REFERENCE is an environment with trl==1.12.0 (tests/ppo_reference/make.py says how to make it); without it TRL 1.12 is
left out. An update is: sample an answer to each prompt, score it, 4 epochs in one minibatch. Models, prompts, batch,
epochs, threads and optimizer are the same for all; dropout and activation checkpointing are off (TRL 1.12 has the
latter on by default, which is slower still). GRPO and RLOO have no critic, so they do less.

Candidates are processes that step in turn (see pretrain_speed.py). Reported are the mean CPU and wall seconds of an
update, sampled tokens per update (the work: equal up to the luck of sampling), the CPU time of a sampled token and
its ratio (which that luck does not touch), and peak memory, in all and above what the process held before training.
That the quality is the same is what tests/test_ppo_parity.py shows: the same answers give the same weights.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import sys
import tempfile
from pathlib import Path

from pretrain_speed import ROOT, Candidate, Metronome, environment, machine, take_turns

from pipelines.ppo.config import PPOConfig
from pipelines.ppo.trainer import PPOTrainer

CANDIDATES = {  # name: (what runs, precision, in the fast environment)
    "TRL 1.12 PPO, plain env": ("trl112", "fp32", False),
    "TRL 1.12 PPO": ("trl112", "fp32", True),
    "TRL 1.12 PPO, AMP": ("trl112", "bf16", True),
    "TRL GRPO": ("grpo", "fp32", True),
    "TRL RLOO": ("rloo", "fp32", True),
    "ours": ("ours", "fp32", True),
    "ours, bf16": ("ours", "bf16", True),
    "ours, GRPO": ("our grpo", "fp32", True),
    "ours, RLOO": ("our rloo", "fp32", True),
}
LAYERS, WIDTH, HEADS, RESPONSE, EPOCHS = 4, 256, 4, 64, 4


def gpt2(kind, vocabulary: int, lengths: str, seed: int):
    """A GPT-2; as a policy it ends its answers after 24 tokens on average, or never (`lengths`)."""
    import torch
    from transformers import GPT2Config

    torch.manual_seed(seed)
    model = kind(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=128,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            num_labels=1,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 2,
            pad_token_id=vocabulary - 1,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        )
    )
    if hasattr(model, "lm_head"):
        # Behind a layer norm the states have mean 0: along (1, …, 1) only its bias counts, an offset of the logit.
        offset = math.log(vocabulary / 23) if lengths == "natural" else -40.0
        with torch.no_grad():
            model.transformer.ln_f.bias.fill_(1.0)
            model.transformer.wte.weight[-2] += offset / WIDTH
            model.transformer.wte.weight[-1] -= 40.0 / WIDTH
    return model


def tokenizer(vocabulary: int):
    """Words w0, w1, …; the last two are EOS and PAD."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token=f"w{vocabulary - 1}"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"eos_token": f"w{vocabulary - 2}", "pad_token": f"w{vocabulary - 1}", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **ends)


def prompts(vocabulary: int, count: int = 512) -> list[str]:
    """Prompts of 8 to 24 words."""
    import random

    rng = random.Random(0)
    return [" ".join(f"w{rng.randrange(vocabulary - 2)}" for _ in range(rng.randint(8, 24))) for _ in range(count)]


def peak_mb() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def common_settings(folder: str, rows: int) -> dict:
    """What every trainer is told; the names are those of `TrainingArguments` and of all PPO configs."""
    return dict(
        output_dir=folder,
        per_device_train_batch_size=rows,
        learning_rate=3e-6,
        temperature=1.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
    )


def models(vocabulary: int, lengths: str) -> dict:
    """Policy, reference equal to it, critic and reward model, all of one size."""
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

    policy, ref = (gpt2(GPT2LMHeadModel, vocabulary, lengths, 0) for _ in range(2))
    value, reward = (gpt2(GPT2ForSequenceClassification, vocabulary, lengths, seed) for seed in (1, 2))
    return {"policy": policy, "ref": ref, "value": value, "reward": reward}


def our_trainer(
    precision: str, vocabulary: int, lengths: str, rows: int, folder: str, callbacks=(), advantage: str = "gae"
):
    """Our trainer, one update of which is `rows` answers, without a critic 4 to each prompt."""
    from datasets import Dataset

    sys.path.insert(0, str(ROOT))

    four = models(vocabulary, lengths)
    config = PPOConfig(
        **common_settings(folder, rows),
        response_length=RESPONSE,
        advantage=advantage,
        num_generations=1 if advantage == "gae" else 4,
        num_ppo_epochs=EPOCHS,
        total_episodes=10**4 * rows,
        bf16=precision == "bf16",
        num_sample_generations=0,
        allow_no_eos=True,
    )
    return PPOTrainer(
        args=config,
        processing_class=tokenizer(vocabulary),
        model=four["policy"],
        ref_model=four["ref"],
        reward_funcs=four["reward"],
        value_model=four["value"] if advantage == "gae" else None,
        train_dataset=Dataset.from_dict({"prompt": prompts(vocabulary)}),
        callbacks=list(callbacks),
    )


def trl112_trainer(vocabulary: int, lengths: str, rows: int, folder: str, callbacks):
    """TRL 1.12's PPOTrainer. Its logs get the mean length of the answers, read where it logs."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Counting(PPOTrainer):
        def log(self, logs, *rest):
            lengths = sys._getframe(1).f_locals["sequence_lengths"] + 1
            super().log(logs | {"response_length": lengths.float().mean().item()}, *rest)

    four, words = models(vocabulary, lengths), tokenizer(vocabulary)
    config = PPOConfig(
        **common_settings(folder, rows),
        response_length=RESPONSE,
        num_ppo_epochs=EPOCHS,
        total_episodes=10**4 * rows,
        stop_token="eos",
        bf16=False,
        gradient_checkpointing=False,
        num_sample_generations=0,
    )
    return Counting(
        args=config,
        processing_class=words,
        model=four["policy"],
        ref_model=four["ref"],
        reward_model=four["reward"],
        value_model=four["value"],
        train_dataset=Dataset.from_list([dict(words(text)) for text in prompts(vocabulary)]),
        callbacks=callbacks,
    )


def group_trainer(name: str, vocabulary: int, lengths: str, rows: int, folder: str, callbacks):
    """Today's TRL's GRPOTrainer or RLOOTrainer; they log once in as many steps as there are epochs in an update."""
    import trl
    from datasets import Dataset
    from transformers import GPT2LMHeadModel

    four, words = models(vocabulary, lengths), tokenizer(vocabulary)
    four["policy"].save_pretrained(folder)  # they load their reference from the policy's folder
    config = getattr(trl, f"{name}Config")(
        **common_settings(folder, rows) | {"logging_steps": EPOCHS},
        max_completion_length=RESPONSE,
        num_iterations=EPOCHS,
        num_generations=4,
        beta=0.05,
        steps_per_generation=1,
        bf16=False,
        activation_checkpointing=False,
        max_steps=10**5,
    )
    return getattr(trl, f"{name}Trainer")(
        args=config,
        processing_class=words,
        model=GPT2LMHeadModel.from_pretrained(folder),
        reward_funcs=four["reward"],
        reward_processing_classes=words,
        train_dataset=Dataset.from_dict({"prompt": prompts(vocabulary)}),
        callbacks=callbacks,
    )


def run(kind: str, precision: str, args) -> None:
    """One candidate: a trainer that does an update when told."""
    import torch
    from transformers import TrainerCallback

    class Wait(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.metronome = Metronome()
            self.metronome.tick(peak_mb())  # the first "step" reports the memory held before training

        def on_log(self, _, state, control, logs, **__):
            length = logs.get("response_length", logs.get("completions/mean_length"))
            if length is not None:
                self.metronome.tick(peak_mb(), length * args.prompts)

    with tempfile.TemporaryDirectory() as folder:
        size = args.vocabulary, args.lengths, args.prompts, folder, [Wait()]
        if kind == "ours":
            trainer = our_trainer(precision, *size)
        elif kind.startswith("our "):
            trainer = our_trainer(precision, *size, advantage=kind.removeprefix("our "))
        elif kind == "trl112":
            trainer = trl112_trainer(*size)
        else:
            trainer = group_trainer(kind.upper(), *size)
        torch.manual_seed(0)
        trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference-python", help="the python of an environment with trl==1.12.0")
    parser.add_argument("--lengths", choices=["natural", "full"], default="natural")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=32, help="answers in an update, and rows in a forward")
    parser.add_argument("--steps", type=int, default=4, help="measured updates of each candidate")
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--skip", default="", help="comma-separated parts of the names of candidates to leave out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run(*args.child.split(":"), args)

    print(f"{args.prompts} answers, {args.lengths} lengths, vocabulary {args.vocabulary}, {args.threads} threads")
    print(machine(), flush=True)
    candidates = []
    for name, (kind, precision, fast) in CANDIDATES.items():
        if any(part and part in name for part in args.skip.split(",")):
            continue
        if kind == "trl112" and not args.reference_python:
            continue
        python = args.reference_python if kind == "trl112" else sys.executable
        command = [python, str(Path(__file__)), "--child", f"{kind}:{precision}"]
        for option in ("lengths", "vocabulary", "prompts"):
            command += [f"--{option}", str(getattr(args, option))]
        env = environment(fast, args.threads) | {"ACCELERATE_USE_CPU": "true"}
        if kind == "trl112" and precision == "bf16":
            env["ACCELERATE_MIXED_PRECISION"] = "bf16"  # its own `bf16: true` does nothing
        candidates.append(Candidate(name, command, env))
    try:
        held = [candidate.step(1)[0][2] for candidate in candidates]
        take_turns(candidates, args.warm, args.steps, 1)
    finally:
        for candidate in candidates:
            candidate.close()

    print(
        f"{'':26}{'CPU s':>8}{'wall s':>8}{'tokens':>8}{'x CPU':>8}{'ms/token':>10}{'x':>6}{'peak MB':>9}{'above':>8}"
        f"{'x peak':>8}"
    )
    rows = []
    for c, before in zip(candidates, held, strict=True):
        wall, cpu, _, tokens = (sum(column) / len(c.times) for column in zip(*c.times, strict=True))
        peak = max(t[2] for t in c.times)
        rows.append((c.name, cpu, wall, tokens, peak, peak - before))
    first = next((r for r in rows if r[0] == "TRL 1.12 PPO"), rows[0])  # the peer, in our environment
    for name, cpu, wall, tokens, peak, above in rows:
        each, of_first = cpu / tokens, first[1] / first[3]
        print(
            f"{name:26}{cpu:8.2f}{wall:8.2f}{tokens:8.0f}{first[1] / cpu:8.2f}{1000 * each:10.3f}{of_first / each:6.2f}"
            f"{peak:9.0f}{above:8.0f}{peak / first[4]:8.2f}"
        )


if __name__ == "__main__":
    main()
