"""Text to training windows: pipelines.data.token_file against `datasets.map` as run_clm does it, first and second
time.

    python benchmarks/tokenize_speed.py --data corpus.jsonl.gz      # column "text"; or a .txt, a document per
    line python benchmarks/tokenize_speed.py                             # 20 MB of made-up text

Each runs in a process of its own, twice over the same folder: the second time it should find its work done.
Reading the texts and loading the tokenizer are not counted; threads of the tokenizer are counted in the CPU
seconds.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pretrain_speed import ROOT, environment, machine

from pipelines.data import token_file, train_tokenizer

CONTEXT = 256


def read(path: str | None, megabytes: float) -> list[str]:
    """The documents: of a file, or made up with word-like frequencies."""
    if path is None:
        rng = random.Random(0)
        words = ["".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(2, 9))) for _ in range(20_000)]
        weights = [1 / (i + 1) for i in range(len(words))]
        count = int(megabytes * 1e6 / 3200)
        return [" ".join(rng.choices(words, weights, k=500)) + ".\n" for _ in range(count)]
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as lines:
        if ".jsonl" in path:
            return [json.loads(line)["text"] for line in lines]
        return [line for line in lines if line.strip()]


def child(kind: str, home: str, texts: list[str]) -> None:
    """Prepare the windows in `home`; prints wall seconds, CPU seconds, tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(f"{home}/tokenizer")
    dataset = None
    if kind != "ours":
        from datasets import load_dataset

        dataset = load_dataset("json", data_files=f"{home}/texts.jsonl", split="train", cache_dir=f"{home}/datasets")
    else:
        pass
    start = time.perf_counter(), time.process_time()
    if kind == "ours":
        token_file.tokenize_corpus(
            iter(texts), tokenizer, f"{home}/ours", separator_id=tokenizer.eos_token_id, key="benchmark"
        )
        windows = token_file.Windows(f"{home}/ours", CONTEXT)
        tokens = len(windows) * CONTEXT
    else:

        def tokenize(batch):
            return tokenizer([text + tokenizer.eos_token for text in batch["text"]])

        def group(batch):
            joined = {k: [x for row in batch[k] for x in row] for k in batch}
            length = len(joined["input_ids"]) // CONTEXT * CONTEXT
            cut = {k: [v[i : i + CONTEXT] for i in range(0, length, CONTEXT)] for k, v in joined.items()}
            return {**cut, "labels": list(cut["input_ids"])}

        windows = dataset.map(tokenize, batched=True, remove_columns=["text"]).map(group, batched=True)
        tokens = len(windows) * CONTEXT
    windows[len(windows) - 1]
    print("RESULT", time.perf_counter() - start[0], time.process_time() - start[1], tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a .jsonl[.gz] with a column text, or a .txt")
    parser.add_argument("--megabytes", type=float, default=20, help="of made-up text, without --data")
    parser.add_argument("--tokenizer", help="folder or hub id; default: a BPE of 8192 trained on 5 MB of the text")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    texts = read(args.data, args.megabytes)
    if args.child:
        kind, home = args.child.split(":", 1)
        return child(kind, home, texts)

    sys.path.insert(0, str(ROOT))

    print(f"{sum(map(len, texts)) / 1e6:.1f} million characters, {len(texts)} documents, {args.threads} threads")
    print(machine())
    env = environment(True, args.threads) | {
        "TOKENIZERS_PARALLELISM": "true",
        "RAYON_NUM_THREADS": str(args.threads),
    }
    results: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    for _ in range(args.repeat):
        with tempfile.TemporaryDirectory() as home:
            if args.tokenizer:
                from transformers import AutoTokenizer

                AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(f"{home}/tokenizer")
            else:
                share = max(1, int(len(texts) * min(1, 5e6 / sum(map(len, texts)))))
                train_tokenizer.train_bpe(texts[:share], 8192).save_pretrained(f"{home}/tokenizer")
            with open(f"{home}/texts.jsonl", "w") as out:
                out.writelines(json.dumps({"text": text}) + "\n" for text in texts)
            for when in ("first", "second"):
                for kind in ("datasets.map", "ours"):
                    command = [sys.executable, str(Path(__file__)), "--child", f"{kind}:{home}"]
                    command += ["--megabytes", str(args.megabytes)] + (["--data", args.data] if args.data else [])
                    done = subprocess.run(command, env=env, capture_output=True, text=True)
                    if done.returncode:
                        sys.exit(done.stderr)
                    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
                    wall, cpu, tokens = line.split()[1:]
                    results.setdefault((kind, when), []).append((float(wall), float(cpu), int(tokens)))
    print(f"{'':22}{'wall s':>9}{'CPU s':>9}{'tokens/s':>11}{'per CPU s':>11}{'x wall':>8}{'x CPU':>8}")
    for (kind, when), runs in sorted(results.items(), key=lambda item: (item[0][1], item[0][0])):
        wall, cpu, tokens = sorted(runs)[len(runs) // 2]
        base = sorted(results["datasets.map", when])[len(runs) // 2]
        print(
            f"{kind + ', ' + when:22}{wall:9.2f}{cpu:9.2f}{tokens / wall:11.0f}{tokens / cpu:11.0f}"
            f"{base[0] / wall:8.2f}{base[1] / cpu:8.2f}"
        )


if __name__ == "__main__":
    main()
