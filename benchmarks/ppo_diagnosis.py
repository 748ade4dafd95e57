"""PPO's diagnosis in tiny worlds: does it find what was made wrong on purpose, and is it silent where nothing is?

    python benchmarks/ppo_diagnosis.py                                # 15 CPU minutes
    python benchmarks/ppo_diagnosis.py --seeds 11 12 --only healthy --curves runs/curves.jsonl
    python benchmarks/ppo_diagnosis.py --replay runs/curves.jsonl     # the same runs after a change of diagnosis.py

The language is a Markov chain of 48 words, each with a few usual successors, and a GPT-2 of 60,000 parameters (or a
larger one) has learned it. Every word has a worth, on average 0, and the usual reward is, as a classifier's, the
probability that the sum of an answer's words is good. The judge, of weight 0, also minds whether it is still the
language. A world says what is wrong with it, hence
which diagnosis must come; a healthy one, none. The table has a line per world: in how many seeds each diagnosis came
and at which update (median), and from what to what went the score, the judge, and the KL per token.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
)

from pipelines.generation.decode import generate
from pipelines.ppo.config import PPOConfig, has_critic
from pipelines.ppo.diagnosis import CHECKS, USED, Watch
from pipelines.ppo.trainer import PPOTrainer

WORDS, EOS, PAD, GOAL = 48, 48, 49, 7
UPDATES, EVALUATED, BATCH, LENGTH = 40, 5, 64, 16
RARELY = 0.02  # how often a word is the last one where answers are long; usually 0.08


# --- the language -------------------------------------------------------------------------------------------

_draw = np.random.default_rng(0)
SUCCESSORS = np.stack([_draw.permutation(WORDS)[:6] for _ in range(WORDS)])
NEXT = np.full((WORDS, WORDS), 0.1 / WORDS)  # P(next word | word), where the text goes on
for _word in range(WORDS):
    NEXT[_word, SUCCESSORS[_word]] += 0.9 * _draw.dirichlet(np.ones(6))
WORTH = _draw.normal(size=WORDS)
WORTH -= WORTH @ np.linalg.matrix_power(NEXT, 100)[0]
RARE = int(np.linalg.matrix_power(NEXT, 100)[0].argmin())  # the rarest word
PHRASE = (GOAL, int(SUCCESSORS[GOAL][NEXT[GOAL, SUCCESSORS[GOAL]].argmin()]))  # two words, the second a rare successor


def text(draw, ends: float, longest: int) -> list[int]:
    """Words of the chain, and EOS with probability `ends` after each."""
    words = [int(draw.integers(WORDS))]
    while len(words) < longest and draw.random() >= ends:
        words.append(int(draw.choice(WORDS, p=NEXT[words[-1]])))
    return [*words, EOS] if len(words) < longest else words


def prompts(seed: int, count: int) -> Dataset:
    draw = np.random.default_rng((seed, 1))
    rows = [text(draw, 0.0, int(draw.integers(1, 5))) for _ in range(count)]
    return Dataset.from_dict({"prompt": [" ".join(f"w{word}" for word in row) for row in rows]})


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(WORDS)} | {"<eos>": EOS, "<pad>": PAD}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


@cache
def speaker(width: int, layers: int, ends: float) -> GPT2LMHeadModel:
    """A GPT-2 that has learned the language."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=WORDS + 2,
        n_positions=80,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        num_labels=1,
    )
    model, draw = GPT2LMHeadModel(config), np.random.default_rng(1)
    texts = [text(draw, ends, 68 if ends < 0.08 else 24) for _ in range(2000)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    steps = 250
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        rows = [torch.tensor(texts[i]) for i in draw.integers(len(texts), size=32)]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == PAD, -100)).loss
        loss.backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    return model


# --- what answers are worth ---------------------------------------------------------------------------------


def _words(ids: list[int]) -> list[int]:
    return [word for word in ids if word < WORDS]


def good(completion_ids, worth=WORTH, **_):
    return [1 / (1 + math.exp(-sum(worth[word] for word in _words(ids)))) for ids in completion_ids]


def judge(completion_ids, **_):
    """Is it good, less how much less likely its words are in the language than usual (nats per word)."""
    usual = (NEXT * np.log(NEXT)).sum(1).mean()
    scores = []
    for value, ids in zip(good(completion_ids), map(_words, completion_ids), strict=True):
        likely = np.log(NEXT[ids[:-1], ids[1:]]).mean() if len(ids) > 1 else usual
        scores.append(value + min(0.0, float(likely - usual)))
    return scores


def has_goal(completion_ids, **_):
    return [float(GOAL in ids) for ids in completion_ids]


def great(completion_ids, **_):
    """Good, and far better with one rare word in it, as a classifier believes to which that word is decisive."""
    return [value + 2.0 * (RARE in ids) for value, ids in zip(good(completion_ids), completion_ids, strict=True)]


def with_a_phrase(completion_ids, **_):
    """Good, and better with two words one after the other that are rarely so."""
    held = [PHRASE in zip(ids, ids[1:]) for ids in completion_ids]
    return [value + 2.0 * has for value, has in zip(good(completion_ids), held, strict=True)]


def only_goal(completion_ids, **_):
    return [ids.count(GOAL) / len(ids) for ids in completion_ids]


def mean_worth(completion_ids, worth=WORTH, **_):
    """Best where the best word is said and no other."""
    return [float(worth[_words(ids)].mean()) if _words(ids) else -1.0 for ids in completion_ids]


def with_a_hole(completion_ids, **_):
    """The mean worth, but two of the worst words are believed to be among the best."""
    return mean_worth(completion_ids, np.where(WORTH <= np.sort(WORTH)[1], 2.5, WORTH))


def of_prompt(prompts, completions, **_) -> list[float]:
    """What every answer to a prompt gets."""
    return [float(sum(map(ord, prompt)) % 5) for prompt in prompts]


def constant(completion_ids, **_):
    return [1.0] * len(completion_ids)


def noisy(completion_ids, **_):
    """Good or not as someone says who is mostly guessing: the noise depends on the answer alone."""
    noise = [np.random.default_rng(ids).normal() for ids in completion_ids]
    return [value + e for value, e in zip(good(completion_ids), noise, strict=True)]


def a_hundredfold(completion_ids, **_):
    return [100 * value for value in good(completion_ids)]


def likes_length(completion_ids, **_):
    return [value + len(ids) / 8 for value, ids in zip(good(completion_ids), completion_ids, strict=True)]


def likes_brevity(completion_ids, **_):
    return [value - len(ids) / 8 for value, ids in zip(good(completion_ids), completion_ids, strict=True)]


def last_word(completion_ids, **_):
    return [float(WORTH[_words(ids)[-1]]) if _words(ids) else -1.0 for ids in completion_ids]


# --- what is broken -----------------------------------------------------------------------------------------


def dropout(trainer: PPOTrainer) -> None:
    """Left on in the update."""
    for module in trainer.policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1


def sampled_colder(trainer: PPOTrainer) -> None:
    """Sampled at temperature 0.8, trained at 1."""
    sample = trainer.rollout_maker._sample

    def colder(*args):
        trainer.args.temperature = 0.8
        answers = sample(*args)
        trainer.args.temperature = 1.0
        return answers

    trainer.rollout_maker._sample = colder


def engine_behind(trainer: PPOTrainer) -> None:
    """Sampled, with log-probs, from the weights of one update before."""
    sample, behind = trainer.rollout_maker._sample, copy.deepcopy(trainer.policy.state_dict())

    def old(*args):
        nonlocal behind
        now = copy.deepcopy(trainer.policy.state_dict())
        trainer.policy.load_state_dict(behind)
        answers, behind = sample(*args), now
        trainer.policy.load_state_dict(now)
        return answers

    trainer.rollout_maker._sample = old


class Engine:
    """A generation engine beside the trainer, as vLLM is: its answers count, their log-probs are computed anew."""

    def __init__(self, trainer: PPOTrainer, temperature: float = 1.0, tries: int = 1, old: bool = False):
        self.args, self.temperature, self.tries, self.calls = trainer.args, temperature, tries, 0
        self.policy = copy.deepcopy(trainer.policy) if old else trainer.policy

    def sync_weights(self) -> None:
        self.calls += 1

    def generate(self, prompts, images, n):
        args, tries = self.args, self.tries
        answers, _ = generate(
            self.policy,
            [p for p in prompts for _ in range(tries)],
            max_new_tokens=args.response_length,
            eos_token_ids=[EOS],
            temperature=self.temperature,
            seeds=[(args.seed, self.calls, i) for i in range(len(prompts) * tries)],
        )
        return prompts, [max(answers[i : i + tries], key=len) for i in range(0, len(answers), tries)]


def hotter_engine(trainer: PPOTrainer) -> None:
    trainer.rollout_maker.vllm = Engine(trainer, temperature=1.4)


def eos_held_back(trainer: PPOTrainer) -> None:
    """Of four answers the longest is taken, much as a minimal length does."""
    trainer.rollout_maker.vllm = Engine(trainer, tries=4)


def forgotten_engine(trainer: PPOTrainer) -> None:
    """It never gets the new weights."""
    trainer.rollout_maker.vllm = Engine(trainer, old=True)


def frozen_critic(trainer: PPOTrainer) -> None:
    trainer.critic.requires_grad_(False)
    nn.init.normal_(trainer.critic.score.weight, std=0.3)


# --- the worlds ---------------------------------------------------------------------------------------------

HEALTHY = ""


@dataclass(frozen=True)
class World:
    """One line of the table. `finds`: the diagnosis that must come, HEALTHY: none may."""

    name: str
    finds: str = HEALTHY
    reward: Callable = good
    settings: dict = field(default_factory=dict)  # of `PPOConfig`
    spoil: Callable[[PPOTrainer], None] | None = None
    model: tuple = (48, 2, 0.08)  # arguments of `speaker`
    lora: bool = False
    critic: str = "model"


ALIKE = {"advantage": "rloo", "num_generations": 4, "allow_constant_scores": True}
WORLDS = [
    World("good words"),
    World("… slowly", settings={"learning_rate": 2e-4}),
    World("… fast, held by the KL", settings={"learning_rate": 3e-3, "kl_coef": 0.2}),
    World("… four epochs", settings={"num_ppo_epochs": 4}),
    World("… temperature 0.7", settings={"temperature": 0.7}),
    World("… an adaptive KL", settings={"kl_target": 4.0, "kl_horizon": 500}),
    World("… KL in the loss, k2", settings={"kl_placement": "loss", "kl_estimator": "k2", "kl_coef": 0.3}),
    World("… bfloat16", settings={"bf16": True}),
    World("… LoRA", settings={"learning_rate": 1e-2}, lora=True),
    World("… shared critic", critic="shared", settings={"vf_coef": 1.0}),
    World("… 230,000 parameters", settings={"learning_rate": 5e-4}, model=(96, 2, 0.08)),
    World("… long answers, cut", settings={"response_length": 48, "allow_no_eos": True}, model=(48, 2, 0.0)),
    World("… scores of ±100, normalised", reward=a_hundredfold, settings={"normalize_scores": True}),
    World("… RLOO", settings={"advantage": "rloo", "num_generations": 4}),
    World("… GRPO", settings={"advantage": "grpo", "num_generations": 4}),
    World("… REINFORCE", settings={"advantage": "reinforce"}),
    World("one word somewhere", reward=has_goal, settings={"kl_coef": 0.1}),
    World("the last word counts", reward=last_word, settings={"kl_coef": 0.3}),
    World("noisy reward", reward=noisy, settings={"kl_coef": 0.3}),
    World("dropout left on", "ratio_not_one", spoil=dropout),
    World("sampled colder", "ratio_not_one", spoil=sampled_colder),
    World("engine one update behind", "ratio_not_one", spoil=engine_behind),
    World("top_k 3", "sampled_otherwise", settings={"top_k": 3}),
    World("top_p 0.9", "sampled_otherwise", settings={"top_p": 0.9}),
    World("an engine at temperature 1.4", "sampled_otherwise", spoil=hotter_engine),
    World("EOS held back", "sampled_otherwise", reward=likes_brevity, spoil=eos_held_back),
    World("an engine never updated", "negative_kl", spoil=forgotten_engine),
    World("lr times 20, no KL", "kl_running_away", settings={"learning_rate": 2e-2, "kl_coef": 0.0}),
    World("lr times 5, no KL", "kl_running_away", settings={"learning_rate": 5e-3, "kl_coef": 0.0}),
    World("one word only", "entropy_collapse", reward=only_goal, settings={"kl_coef": 0.01}),
    World("the best word only", "entropy_collapse", reward=mean_worth),
    World("length is liked", "length_drift", reward=likes_length, settings={"response_length": 32}),
    World("brevity is liked", "length_drift", reward=likes_brevity),
    World("stops while it is ahead", "length_drift", settings={"response_length": 64}, model=(48, 2, RARELY)),
    World(
        "learns to end, as asked",
        "length_drift",
        settings={"missing_eos_penalty": 1.0, "response_length": 24},
        model=(48, 2, RARELY),
    ),
    World("one word decides", "one_phrase_takes_over", reward=great),
    World("a phrase is liked", "one_phrase_takes_over", reward=with_a_phrase),
    World(
        "a hole in the reward", "held_out_falls", reward=with_a_hole, settings={"learning_rate": 2e-3, "kl_coef": 0.01}
    ),
    World("critic frozen", "critic_explains_nothing", spoil=frozen_critic),
    World("critic not trained", "critic_explains_nothing", settings={"vf_coef": 0.0}),
    World("shared critic, vf_coef 0.1", "critic_explains_nothing", critic="shared"),
    World("scores of ±100", "critic_explains_nothing", reward=a_hundredfold),
    World("the prompt decides", "answers_score_alike", reward=of_prompt, settings=ALIKE),
    World("a constant reward", "constant_scores", reward=constant, settings={"allow_constant_scores": True}),
]


def run(world: World, seed: int) -> dict:
    """The numbers of one run: `updates` as logged, `evaluations` as `Watch` takes them."""
    policy = copy.deepcopy(speaker(*world.model))
    torch.manual_seed(seed)
    critic = GPT2ForSequenceClassification(policy.config)
    critic.transformer.load_state_dict(policy.transformer.state_dict())
    if world.lora:
        adapters = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        policy = get_peft_model(policy, adapters)
    settings = dict(
        per_device_train_batch_size=BATCH,
        response_length=LENGTH,
        temperature=1.0,
        learning_rate=1e-3,
        num_ppo_epochs=2,
        num_mini_batches=2,
        max_steps=UPDATES,
        eval_strategy="steps",
        eval_steps=EVALUATED,
        eval_on_start=True,
        lr_scheduler_type="constant",
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        num_sample_generations=0,
    )
    advantage = world.settings.get("advantage")
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            model=policy,
            value_model=("shared" if world.critic == "shared" else critic) if has_critic(advantage) else None,
            args=PPOConfig(folder, **settings | world.settings),
            reward_funcs=[world.reward, judge],
            reward_weights=[1.0, 0.0],
            train_dataset=prompts(seed, 512),
            eval_dataset=prompts(seed + 1000, 128),
            processing_class=tokenizer(),
        )
        trainer.remove_callback(PrinterCallback)
        if world.spoil is not None:
            world.spoil(trainer)
        trainer.train()
    rows = trainer.state.log_history
    shown = ("eval_score", "eval_reward/judge", "eval_kl", "eval_length")
    short = lambda row, names: {name: float(f"{row[name]:.4g}") for name in names if name in row}
    return {
        "world": world.name,
        "finds": world.finds,
        "seed": seed,
        "updates": [short(row, USED) for row in rows if "objective/kl" in row],
        "evaluations": [e["held_out"] for e in trainer.monitor.watch.evaluations],
        "evaluated": [short(row, shown) for row in rows if "eval_score" in row],
    }


def replay(curve: dict) -> dict[str, int]:
    """Diagnosis -> the update at which it first came."""
    watch, held_out = Watch(), iter(curve["evaluations"])
    watch.add_evaluation(next(held_out))
    for step, metrics in enumerate(curve["updates"], 1):
        watch.add_update(step, metrics)
        if step % EVALUATED == 0:
            watch.add_evaluation(next(held_out))
        watch.new_findings()
    return {finding["name"]: finding["step"] for finding in reversed(watch.said)}


def table(curves: list[dict]) -> None:
    """Print the confusion table of `curves`, and what it comes to."""
    names = [check.__name__ for check, _ in CHECKS]
    print(f"{'world':32} {'must come':24}{'came in seeds, at update':60} score, judge, KL per token")
    found = missed = false = extra = 0
    for name in dict.fromkeys(curve["world"] for curve in curves):
        group = [curve for curve in curves if curve["world"] == name]
        must, said = group[0]["finds"], [replay(curve) for curve in group]
        came = {n: [one[n] for one in said if n in one] for n in names}
        shown = ", ".join(f"{n} {len(at)}/{len(group)} @{statistics.median(at):.0f}" for n, at in came.items() if at)
        first, last = ([curve["evaluated"][i] for curve in group] for i in (0, -1))
        mean = lambda rows, key: statistics.mean(row[key] for row in rows)
        went = "  ".join(f"{mean(first, k):.2f} → {mean(last, k):.2f}" for k in ("eval_score", "eval_reward/judge"))
        per_token = mean(last, "eval_kl") / mean(last, "eval_length")
        print(f"{name:32} {must or 'none':24}{shown or '–':60} {went}  {per_token:.2f}")
        if must:
            found += sum(must in one for one in said)
            missed += sum(must not in one for one in said)
            extra += sum(len(one.keys() - {must}) for one in said)
        else:
            false += sum(bool(one) for one in said)
    healthy = sum(curve["finds"] == HEALTHY for curve in curves)
    print(
        f"found {found} of {found + missed} sick runs ({extra} other diagnoses in them); false alarms in {false} of "
        f"{healthy} healthy runs"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", help="a part of the worlds' names, or of what must come; `healthy`: those")
    parser.add_argument("--curves", type=Path, help="append every run's numbers to this file")
    parser.add_argument("--replay", type=Path, help="judge the runs in this file anew instead of running any")
    args = parser.parse_args()
    if args.replay:
        return table([json.loads(line) for line in open(args.replay)])
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # the models are too small for more
    curves = []
    chosen = [w for w in WORLDS if not args.only or args.only in w.name or args.only in (w.finds or "healthy")]
    for seed in args.seeds:
        for world in chosen:
            curves.append(run(world, seed))
            print(f"{world.name}, seed {seed}: {time.process_time():.0f} CPU seconds so far", file=sys.stderr)
            if args.curves:
                args.curves.parent.mkdir(parents=True, exist_ok=True)
                with open(args.curves, "a") as file:
                    file.write(json.dumps(curves[-1]) + "\n")
    table(curves)


if __name__ == "__main__":
    main()
