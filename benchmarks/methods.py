"""recipes/methods.yaml over several seeds: what each method makes of the same SFT model and the same rankings.

    python benchmarks/methods.py --seeds 1 2 3 --output runs/methods_seeds

One process, one thread, into a new folder (a stage's CPU seconds are counted where it is trained, and kept). Every
model answers the prompts four times at temperature 1; the oracle of data/bay, which trains nothing, judges. Prints a
table and writes figures.json, answers_METHOD.jsonl of each seed and score_against_kl.svg (needs matplotlib). Further
words are the methods to look at and KEY=VALUE, as behind `pipelines run`.

Prompts: of data/bay/heldout_prompts.jsonl, which ask for facts that no prompt in training asks for, those about one
half of the world; those about the other half are for choosing settings (`--settings`). prompts_validation.jsonl would
not do for that: 96 of its 100 prompts ask for facts that other prompts in training ask for, too.

KL: of the policy from sft, in nats for each answer, estimated on the answers (log p / p_sft, their sum over tokens).
Best of n at writing time (the dashed line) keeps the answer of sft that the reward model likes most, of n = 1 to 16.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402  after the number of threads
from matplotlib import pyplot  # noqa: E402  pip install matplotlib

from data.bay import world  # noqa: E402
from pipelines import files  # noqa: E402
from pipelines.chain import chain  # noqa: E402
from pipelines.evaluation import best_of, judges  # noqa: E402
from pipelines.evaluation.figures import interval, wins  # noqa: E402
from pipelines.generation import answers, logprobs  # noqa: E402
from pipelines.models import chat_template  # noqa: E402
from pipelines.recipe.recipe import load  # noqa: E402

METHODS = ("ppo", "rloo", "grpo", "dpo_pairs", "dpo_kwise", "kto", "best_of_n")
ONLINE = ("ppo", "rloo", "grpo")  # these need the reward model: its cost is theirs
SAMPLES, BEST_OF = 4, 16  # answers to each prompt
KEYS = ("score", "accurate", "polite", "kl", "length", "distinct")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path("runs/methods_seeds"), help="a new folder")
    parser.add_argument("--settings", action="store_true", help="the prompts that settings are chosen on")
    parser.add_argument("words", nargs="*", help="methods (default: all), KEY=VALUE")
    args = parser.parse_args()
    overrides = [word for word in args.words if "=" in word]
    methods = [word for word in args.words if "=" not in word] or list(METHODS)
    prompts = half(args.settings)
    found: dict[str, list[dict]] = {}  # model -> its figures in each seed
    for seed in args.seeds:
        spent, folder = train(args.output / str(seed), [*overrides, f"seed={seed}"], methods)
        for name, figures in measure(folder, ["sft", *methods], prompts).items():
            cost = spent.get(name, 0.0) + (spent["reward"] if name in ONLINE else 0.0)
            found.setdefault(name, []).append(figures | {"cpu_seconds": cost})
    files.write_json(args.output / "figures.json", found)
    machine = platform.processor() or platform.machine()
    print(f"{datetime.date.today()}, {machine}, one process and thread, torch {torch.__version__}")
    which = "for choosing settings" if args.settings else "that no setting was chosen on"
    print(f"{len(prompts)} held-out prompts {which}, seeds {args.seeds}\n\n{table(found)}")
    draw(found, args.output / "score_against_kl.svg")


def half(settings: bool) -> list[str]:
    """The held-out prompts about every other entity of the world, for choosing settings, or those about the rest.

    Questions that compare one of each are in neither.
    """
    prompts = [row["prompt"] for row in files.read_rows(Path("data/bay/heldout_prompts.jsonl"))]
    asked = [world.parse_question(prompt) for prompt in prompts]
    second = sorted({query.entity for query in asked})[1::2]
    about = [{(entity in second) == settings for entity in (query.entity, query.other) if entity} for query in asked]
    return [prompt for prompt, mine in zip(prompts, about) if mine == {True}]


def train(folder: Path, overrides: list[str], methods: list[str]) -> tuple[dict[str, float], Path]:
    """CPU seconds of each stage, and the folder of the run; what is finished is not trained again."""
    recipe = load("recipes/methods.yaml", [*overrides, f"output_dir={folder}"])
    kept = folder / "cpu_seconds.json"
    spent: dict[str, float] = json.loads(kept.read_text()) if kept.is_file() else {}
    for stage in recipe.stages:
        if stage.name in METHODS and stage.name not in methods:
            continue
        began = time.process_time()
        chain.run(recipe, [stage.name])
        spent.setdefault(stage.name, time.process_time() - began)
        kept.write_text(json.dumps(spent))
    return spent, folder


@torch.no_grad()
def measure(folder: Path, names: list[str], prompts: list[str]) -> dict[str, dict]:
    """Figures of each model: lists with a value for each prompt; `best_of` of sft: pairs of KL and score."""
    reference, _ = answers.load(str(folder / "sft"))
    found: dict[str, dict] = {}
    for name in names:
        model, tokenizer = answers.load(str(folder / name))
        count = BEST_OF if name == "sft" else SAMPLES
        seeds = [[(0, i * BEST_OF + k) for k in range(count)] for i in range(len(prompts))]
        groups = answers.answers(model, tokenizer, prompts, seeds, response_length=40, temperature=1.0)
        scores = [[world.oracle(p, text).score for text, _ in group] for p, group in zip(prompts, groups)]
        first = [group[:SAMPLES] for group in groups]
        kl, length = [], []
        for prompt, group in zip(prompts, first):
            ids = [encoded(tokenizer, prompt, *answer) for answer in group]
            ratios = zip(logprobs.answer_nats(reference, ids), logprobs.answer_nats(model, ids))
            kl.append(statistics.mean(there - here for there, here in ratios))
            length.append(statistics.mean(len(answer) for _, answer in ids))
        verdicts = [
            judges.mean_verdict([world.oracle(p, text) for text, _ in group]) for p, group in zip(prompts, first)
        ]
        found[name] = {key: [v[key] for v in verdicts] for key in ("score", "accurate", "polite", "relevant")}
        found[name] |= {"kl": kl, "length": length}
        found[name]["distinct"] = [len({text for text, _ in group}) / SAMPLES for group in first]
        found[name]["preferred"] = wins(found[name]["score"], found["sft"]["score"])
        rows = ({"prompt": p, "completions": [text for text, _ in group]} for p, group in zip(prompts, first))
        files.write_rows(folder / f"answers_{name}.jsonl", rows)
        if name == "sft":
            liked = judges.model_scores(str(folder / "reward"), [{"prompt": p} for p in prompts], groups)
            values = best_of.values(BEST_OF, liked, scores)
            found[name]["best_of"] = [
                (best_of.kl_bound(n), statistics.mean(values[f"{best_of.NAME}{n}/oracle"]))
                for n in best_of.sizes(BEST_OF)
            ]
    return found


def encoded(tokenizer, prompt: str, text: str, ended: bool) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids); what broke off has no EOS."""
    prompt_ids, answer_ids = chat_template.encode_answer(tokenizer, prompt, text)
    return prompt_ids, answer_ids if ended else answer_ids[:-1]


def table(found: dict[str, list[dict]]) -> str:
    """Markdown: means over the seeds, of the score with the range of the seeds' means, of the preference with the 95 %
    interval over the prompts.
    """
    lines = [
        "| | score (seeds) | preferred to sft | accurate | polite | KL | tokens | distinct of 4 | CPU seconds |",
        "| --- |" + " ---: |" * 8,
    ]
    for name, seeds in found.items():
        of = {key: [statistics.mean(one[key]) for one in seeds] for key in KEYS}
        score = f"{statistics.mean(of['score']):.3f} ({min(of['score']):.3f} to {max(of['score']):.3f})"
        mean, low, high = interval([statistics.mean(of_prompt) for of_prompt in zip(*(s["preferred"] for s in seeds))])
        better = f"{mean:.1%} [{low:.1%}, {high:.1%}]" if name != "sft" else ""
        shares = " | ".join(f"{statistics.mean(of[key]):.1%}" for key in ("accurate", "polite"))
        rest = " | ".join(f"{statistics.mean(of[key]):.2f}" for key in ("kl", "length", "distinct"))
        cost = f"{statistics.mean(one['cpu_seconds'] for one in seeds):.0f}" if name != "sft" else ""
        lines.append(f"| {name} | {score} | {better} | {shares} | {rest} | {cost} |")
    return "\n".join(lines)


def draw(found: dict[str, list[dict]], path: Path) -> None:
    """Score against KL: a dot for each method and seed, and best of n when answers are written."""
    figure, axes = pyplot.subplots(figsize=(8, 5))
    curves = [seed["best_of"] for seed in found["sft"]]
    line = [[statistics.mean(values) for values in zip(*points)] for points in zip(*curves)]
    axes.plot(*zip(*line), "k--", linewidth=1, label="sft, best of 1 to 16 by the reward model")
    for (name, seeds), color in zip(found.items(), ("black", *pyplot.colormaps["tab10"].colors)):
        points = [(statistics.mean(seed["kl"]), statistics.mean(seed["score"])) for seed in seeds]
        axes.plot(*zip(*points), "o", color=color, label=name)
    axes.set(xlabel="KL from sft (nats for each answer)", ylabel="the oracle's score on held-out prompts")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
