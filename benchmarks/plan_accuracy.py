"""Peak memory that `plan` predicts beside the peak that the stages really reach on this CPU, and their ratio.

    python benchmarks/plan_accuracy.py [--only sft reward] [--again measured.json]

Every row is one stage run by the chain in a process of its own, in the fast environment, for three optimizer steps,
checkpoint and saving included: random GPT-2- and Llama-shaped models on random words. `measured` is the peak resident
memory of that process (ru_maxrss) less what it held when everything was imported and no model was there, `predicted`
what `plan` says of the same recipe without its process row. `--again` predicts anew for runs measured before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MB = 1e6

# kind, what kind of model, its size, rows per device, tokens per row
GPT2 = {"model_type": "gpt2", "n_positions": 512, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
LLAMA = {"model_type": "llama", "max_position_embeddings": 512, "tie_word_embeddings": False}
BERT = {"model_type": "bert", "max_position_embeddings": 512}


def gpt2(layers: int, width: int, vocabulary: int) -> dict:
    """A config of GPT-2's shape."""
    return {**GPT2, "n_layer": layers, "n_embd": width, "n_head": width // 64, "vocab_size": vocabulary}


def llama(layers: int, width: int, vocabulary: int) -> dict:
    """A config of Llama's shape: gated feed-forward of 8/3 of the width, two query heads to a key head, untied."""
    return {
        **LLAMA, "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // 64,
        "num_key_value_heads": width // 128, "intermediate_size": width * 8 // 3 // 64 * 64, "vocab_size": vocabulary,
    }  # fmt: skip


def bert(layers: int, width: int, vocabulary: int) -> dict:
    """A config of BERT's shape."""
    return {
        **BERT, "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // 64,
        "intermediate_size": 4 * width, "vocab_size": vocabulary,
    }  # fmt: skip


# kind, config, rows per device, words per row, further args
CASES = [
    ("pretrain", gpt2(6, 384, 8192), 8, 128, {}),
    ("pretrain", gpt2(8, 512, 32768), 4, 128, {}),
    ("pretrain", llama(8, 768, 16384), 4, 128, {}),
    ("pretrain", gpt2(12, 768, 50304), 2, 128, {}),
    ("sft", gpt2(6, 384, 8192), 16, 120, {}),
    ("sft", llama(8, 512, 32768), 4, 120, {}),
    ("sft", gpt2(8, 768, 16384), 4, 120, {}),
    ("sft", gpt2(12, 768, 50304), 2, 100, {"packing": True, "max_length": 256}),
    ("reward", gpt2(6, 384, 8192), 4, 60, {}),
    ("reward", llama(8, 512, 32768), 2, 60, {}),
    ("reward", gpt2(8, 768, 16384), 2, 60, {}),
    ("reward", gpt2(12, 768, 50304), 1, 60, {}),
    ("ppo", gpt2(4, 384, 8192), 8, 40, {"response_length": 24}),
    ("ppo", llama(6, 512, 16384), 4, 40, {"response_length": 24}),
    ("ppo", gpt2(6, 640, 16384), 4, 40, {"response_length": 24}),
    ("classify", bert(6, 384, 8192), 16, 60, {}),
    ("classify", bert(8, 512, 30522), 8, 60, {}),
    ("classify", bert(12, 768, 30522), 4, 60, {}),
    ("classify", gpt2(8, 768, 16384), 4, 60, {}),
    # from here on with two processes (DDP over gloo); the larger of the two is shown
    ("pretrain", gpt2(8, 512, 32768), 4, 128, {}),
    ("reward", gpt2(8, 768, 16384), 2, 60, {}),
]
FIRST_OF_TWO = 19  # number of the first case with two processes


def processes(number: int) -> int:
    """Processes that run the case."""
    return 2 if number >= FIRST_OF_TWO else 1


def prepare(work: Path) -> None:
    """Models and data below `work`, one folder per case; run as a process of its own, since its memory would show."""
    import torch
    import transformers

    from pipelines import chat
    from pipelines.corpus import train_bpe

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(60)]
    text = lambda n: " ".join(draw.choices(words, k=n))  # noqa: E731
    tokenizer = train_bpe([" ".join(words)] * 50, vocab_size=600)
    for number, (kind, config, rows, length, extra) in enumerate(CASES):
        folder = work / str(number)
        if not folder.is_dir():
            continue
        steps, args = 3, {"report_to": "none", "per_device_train_batch_size": rows, "save_steps": 2, **extra}
        count = rows * steps * 2
        cut = lambda n: " ".join(draw.choices(words, k=n))  # noqa: E731
        model = {"model_name_or_path": str(folder / "model")}
        world = processes(number)
        args |= {"max_steps": steps, "global_batch_size": rows * world}
        count *= world
        stage = {"kind": kind, "model": model, "data": {"train": str(folder / "rows.jsonl")}, "args": args}
        if kind == "pretrain":
            stage |= {"model": {"config": config, "tokenizer_name_or_path": str(work / "tokenizer")}}
            args["max_length"] = length
            rows_ = [{"text": text(length)} for _ in range(count)]
        elif kind == "sft":
            rows_ = [{"prompt": text(length // 2), "completion": text(length // 2)} for _ in range(count)]
        elif kind == "reward":
            rows_ = [{"prompt": text(length // 2), "completions": [cut(length // 2) for _ in range(4)], "ranks": [1, 2, 3, 4]} for _ in range(count)]  # fmt: skip
        elif kind == "ppo":
            stage["reward"] = {"models": [str(folder / "reward")]}
            stage["model"]["chat_template"] = "plain"
            args |= {"allow_no_eos": True, "num_ppo_epochs": 1, "global_batch_size": 4 * rows}
            rows_ = [{"prompt": text(length)} for _ in range(count * 4)]
        else:
            rows_ = [{"text": text(length), "label": i % 3} for i in range(count)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_))
        recipe = {"output_dir": str(folder / "out"), "stages": {"stage": stage}}
        (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
        tokenizer.save_pretrained(work / "tokenizer")
        for name, auto in (("model", "AutoModelForCausalLM"), ("reward", "AutoModelForSequenceClassification")):
            if kind == "pretrain" or (name == "reward" and kind != "ppo"):
                continue
            if kind == "classify":
                auto = "AutoModelForSequenceClassification"
            settings = {"num_labels": 1} if name == "reward" else {}
            config_ = transformers.AutoConfig.for_model(**{**config, **settings})
            made = getattr(transformers, auto).from_config(config_, dtype=torch.float32)
            chat.fit_model(made, tokenizer)
            made.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)


def measure(recipe: str) -> None:
    """Run the recipe in this process as the command line does; prints what was held before any model, and the peak."""
    import resource

    from pipelines import chain, launch
    from pipelines import recipe as recipes

    launch.start()
    loaded = recipes.load(recipe)
    import torch
    import trl.trainer.reward_trainer  # noqa: F401
    import trl.trainer.sft_trainer  # noqa: F401
    from transformers import Trainer, models  # noqa: F401

    import pipelines.ppo.trainer  # noqa: F401
    from pipelines import data, kernels, lm, packing, training  # noqa: F401

    if loaded.stages[0].kind == "classify":
        from pipelines import metrics

        metrics.MacroF1().compute(predictions=[0, 1], references=[0, 1])  # loads scikit-learn

    small = torch.nn.Linear(512, 512)
    small(torch.ones(64, 512)).sum().backward()
    torch.optim.AdamW(small.parameters(), fused=True).step()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    chain.run(loaded)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("MEASURED", before, peak)


def run(command: list[str], env: dict) -> str:
    """What the command prints; stops the benchmark where it fails."""
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="these kinds, or numbers of cases")
    parser.add_argument("--folder", help="keep models, recipes and measurements here")
    parser.add_argument(
        "--again", action="store_true", help="with --folder: predict anew, measure only what is missing"
    )
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare:
        return prepare(Path(args.prepare))
    if args.measure:
        return measure(args.measure)
    sys.path.insert(0, str(ROOT))
    from pipelines.launch import FAST, SWITCH

    env = {**os.environ, **FAST, SWITCH: "set", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.folder or temporary)
        chosen = [n for n, case in enumerate(CASES) if not args.only or case[0] in args.only or str(n) in args.only]
        missing = [n for n in chosen if not (args.again and (work / str(n) / "measured.json").is_file())]
        for n in missing:
            (work / str(n)).mkdir(parents=True, exist_ok=True)
        me = [sys.executable, str(Path(__file__).resolve())]
        if missing:
            run([*me, "--prepare", str(work)], env)
        for n in missing:
            command = [*me, "--measure", str(work / str(n) / "recipe.yaml")]
            if processes(n) > 1:
                launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file"]
                command = [*launch, "accelerate_configs/cpu_2.yaml", *command[1:]]
            found = [part.split()[:2] for part in run(command, env).split("MEASURED")[1:]]
            before, peak = max(([int(word) for word in words] for words in found), key=lambda sizes: sizes[1])
            (work / str(n) / "measured.json").write_text(json.dumps([before, peak]))
        table(work, chosen)


def table(work: Path, chosen: list[int]) -> None:
    """Print predicted beside measured, one row per case, and the parts that the prediction is made of."""
    from dataclasses import fields

    from pipelines import plan
    from pipelines import recipe as recipes

    head = "| stage | model | parameters | rows x tokens | predicted MB | measured MB | ratio | with process |"
    print(head + "\n|" + " --- |" * 8)
    ratios, apart = [], []
    for n in chosen:
        before, peak = json.loads((work / str(n) / "measured.json").read_text())
        loaded = recipes.load(work / str(n) / "recipe.yaml", read_data=False)
        job = plan.describe(loaded, loaded.stages[0])
        planner = plan.Planner(job)
        setup = plan.setup_of(job, plan.parser().parse_args([str(loaded.file), "--processes", str(processes(n))]))
        memory = planner.memory(setup)
        predicted, measured = memory.without_process().total, peak - before
        ratios.append(predicted / measured)
        anatomy, (rows, length) = planner.anatomy("model"), plan.micro_batch(job, setup)
        kind = job.kind if setup.world == 1 else f"{job.kind}, {setup.world} processes"
        print(
            f"| {kind} | {job.models['model'].config.model_type} {anatomy.layers} x {anatomy.hidden} "
            f"| {anatomy.parameters / 1e6:.1f} M | {rows} x {length} | {predicted / MB:.0f} | {measured / MB:.0f} "
            f"| {ratios[-1]:.2f} | {memory.total / peak:.2f} |"
        )
        parts = {f.name: round(getattr(memory, f.name) / MB) for f in fields(memory) if getattr(memory, f.name)}
        apart.append(f"{n} {job.kind}: before {before / MB:.0f}, " + ", ".join(f"{k} {v}" for k, v in parts.items()))
    inside = sum(abs(ratio - 1) <= 0.15 for ratio in ratios)
    print(f"\n{inside} of {len(ratios)} within 15 %; ratios from {min(ratios):.2f} to {max(ratios):.2f}")
    print("parts predicted, MB:", *apart, sep="\n  ")


if __name__ == "__main__":
    main()
