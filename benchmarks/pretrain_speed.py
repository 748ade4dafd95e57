"""Pretraining speed: our trainer, transformers' Trainer at its defaults, and a compiled nanoGPT loop, in one
run.

    python benchmarks/pretrain_speed.py                          # tiny GPT-2 (4 layers, 256 wide), fp32 and
    bf16 python benchmarks/pretrain_speed.py --size gpt2 --steps 8    # GPT-2 124M

Every candidate is a process of its own, all loaded before the first measured step, and stepped in turn, a few
steps each, so that a change of the machine's mood hits all alike. Reported is the median step in wall time
and in CPU time (which other load on the machine disturbs least), and tokens per second relative to the
default Trainer. Each peer runs both in the environment it would find by default and in the one `python -m
pipelines` sets (allocator, threads that sleep when they wait). All but the default Trainer (dropout 0.1)
start from the same weights and see the same batches without dropout, so their losses must agree: the largest
difference is shown.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from pipelines.launch import FAST
from pipelines.speed.fast_model import fast_model

ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    # layers, width, heads, vocabulary, rows, context
    "tiny": (4, 256, 4, 8192, 4, 256),
    "gpt2": (12, 768, 12, 50257, 4, 256),
}
CANDIDATES = {  # name: (what runs, in the fast environment)
    "Trainer, defaults": ("trainer", False),
    "Trainer, fast env": ("trainer", True),
    "Trainer, fast env, dropout 0": ("trainer_plain", True),
    "nanoGPT compiled": ("nanogpt", False),
    "nanoGPT compiled, fast env": ("nanogpt", True),
    "ours": ("ours", True),
    "ours, torch_compile": ("ours_compiled", True),
    "ours, always fp32": ("ours_fp32", True),
}


# ------------------------------------------------------------------------------------------------------------
# Shared by the benchmarks: candidates as processes that step when told
# ------------------------------------------------------------------------------------------------------------


def environment(fast: bool, threads: int) -> dict[str, str]:
    """The process environment of a candidate: bare, or with what pipelines.launch sets."""
    sys.path.insert(0, str(ROOT))

    bare = {k: v for k, v in os.environ.items() if k not in FAST}
    bare |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return bare | (FAST if fast else {}) | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


class Candidate:
    """A child process; `step(n)` lets it do n steps and returns their (wall s, CPU s, loss, work)."""

    def __init__(self, name: str, command: list[str], env: dict[str, str]):
        self.name, self.times = name, []
        self.child = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self, n: int) -> list[tuple[float, float, float, float]]:
        self.child.stdin.write(f"{n}\n")
        self.child.stdin.flush()
        line = self.child.stdout.readline()
        while line and not line.startswith("STEPS "):
            line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with exit code {self.child.wait()}")
        return json.loads(line[6:])

    def close(self) -> None:
        self.child.stdin.close()
        self.child.terminate()
        self.child.wait()


class Metronome:
    """The child's end: `tick(loss)` after each step, which waits for the next order when the last is
    fulfilled."""

    def __init__(self):
        self.left, self.done = 0, []
        self._order()

    def _order(self) -> None:
        line = sys.stdin.readline()
        if not line.strip():
            sys.exit(0)
        self.left = int(line)
        self.start = time.perf_counter(), time.process_time()

    def tick(self, loss: float, work: float = 0.0) -> None:
        now = time.perf_counter(), time.process_time()
        self.done.append((now[0] - self.start[0], now[1] - self.start[1], float(loss), work))
        self.start, self.left = now, self.left - 1
        if self.left == 0:
            print("STEPS " + json.dumps(self.done), flush=True)
            self.done = []
            self._order()


def machine() -> str:
    """One line that says what was measured on."""
    import torch

    cpu = flags = "unknown"
    if Path("/proc/cpuinfo").exists():
        info = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        info = {k.strip(): v.strip() for k, v in info.items()}
        cpu, flags = info.get("model name", "unknown"), info.get("flags", "").split()
    has = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    model = "family {} model {}".format(info.get("cpu family", "?"), info.get("model", "?"))
    return f"{cpu} ({model}), {os.cpu_count()} cores, {' '.join(has)}; torch {torch.__version__}"


def take_turns(candidates: list[Candidate], warm: int, steps: int, per_turn: int) -> None:
    """Warm each up, then let them step in turn until each has done `steps`; results go to `times`."""
    for candidate in candidates:
        candidate.warm = candidate.step(warm)
    for turn in range(math.ceil(steps / per_turn)):
        # a different one begins each time
        first = turn % len(candidates)
        for candidate in candidates[first:] + candidates[:first]:
            candidate.times += candidate.step(per_turn)


# ------------------------------------------------------------------------------------------------------------
# The candidates
# ------------------------------------------------------------------------------------------------------------


def batches(vocabulary: int, rows: int, context: int):
    """Endless (rows, context) int64 ids with word-like frequencies; the same for every candidate."""
    import torch

    generator = torch.Generator().manual_seed(0)
    weights = 1.0 / torch.arange(1, vocabulary + 1)
    while True:
        yield torch.multinomial(weights, rows * context, replacement=True, generator=generator).view(rows, context)


def hf_model(size: str, dropout: float | None):
    """GPT-2 with transformers' defaults, its weights from seed 0."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, width, heads, vocabulary, _, context = SIZES[size]
    extra = {} if dropout is None else dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=layers,
            n_embd=width,
            n_head=heads,
            vocab_size=vocabulary,
            n_positions=context,
            **extra,
            **special,
        )
    )


def run_trainer(size: str, precision: str, kind: str) -> None:
    """transformers' Trainer; "ours" is the same Trainer on what our pretrain stage gives it."""
    import tempfile

    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    *_, vocabulary, rows, context = SIZES[size]
    model = hf_model(size, None if kind == "trainer" else 0.0)
    stream = batches(vocabulary, rows, context)

    class Corpus(torch.utils.data.Dataset):
        """Row i of the stream, read in order (one batch is kept)."""

        def __len__(self):
            return rows * 10**6

        def __getitem__(self, i):
            if i % rows == 0:
                self.batch = next(stream)
            return {"input_ids": self.batch[i % rows]}

    def collate(items):
        ids = torch.stack([item["input_ids"] for item in items])
        labels = ids.clone()
        if kind != "trainer":
            labels[:, 0] = -100  # or Trainer counts it as a target and reports a loss too low by 1/context
        return {"input_ids": ids, "labels": labels}

    if kind.startswith("ours"):
        fast_model(model)

    class Wait(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.metronome = Metronome()

        def on_step_end(self, args, state, control, **kwargs):
            self.metronome.tick(loss.last)

    class Trainer_(Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            loss.last = super().training_step(*args, **kwargs)
            return loss.last

    class loss:
        last = None

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=10**6,
            per_device_train_batch_size=rows,
            bf16=precision == "bf16" and kind != "ours_fp32",
            torch_compile=kind == "ours_compiled",
            use_cpu=True,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer_(model=model, args=args, train_dataset=Corpus(), data_collator=collate, callbacks=[Wait()]).train()


def run_nanogpt(size: str, precision: str, clone: str | None) -> None:
    """A compiled loop in nanoGPT's manner (github.com/karpathy/nanoGPT): its model, fused AdamW, clip,
    torch.compile.

    The model is written here from its description, or taken from a clone (`--nanogpt`). Weights are those of
    `hf_model`, so that losses can be compared.
    """
    import contextlib

    import torch

    layers, width, heads, vocabulary, rows, context = SIZES[size]
    source = hf_model(size, 0.0).state_dict()
    if clone:
        sys.path.insert(0, clone)
        from model import GPT, GPTConfig

        model = GPT(
            GPTConfig(
                n_layer=layers,
                n_head=heads,
                n_embd=width,
                block_size=context,
                vocab_size=vocabulary,
                dropout=0.0,
                bias=True,
            )
        )
    else:
        model = nano_gpt(layers, width, heads, vocabulary, context)
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            value = source[name]
            parameter.copy_(value.t() if value.shape != parameter.shape or is_conv1d(name) else value)
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    stream = batches(vocabulary, rows, context)
    metronome = Metronome()
    while True:
        ids = next(stream)
        with autocast:
            # nanoGPT's targets are shifted by the data loader; the last position has none here, as in the
            # others
            targets = torch.cat([ids[:, 1:], ids.new_full((rows, 1), -1)], 1)
            _, loss = compiled(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        metronome.tick(loss.item())


def is_conv1d(name: str) -> bool:
    """transformers' GPT-2 stores these matrices transposed."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def nano_gpt(layers: int, width: int, heads: int, vocabulary: int, context: int):
    """GPT-2 as nanoGPT runs it without dropout; parameter names are those of transformers' GPT-2."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = self.c_attn(x).view(b, t, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.c_proj(y.transpose(1, 2).reshape(b, t, width))

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.attn = nn.LayerNorm(width), Attention()
            self.ln_2, self.mlp = nn.LayerNorm(width), Mlp()

        def forward(self, x):
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
            self.h = nn.ModuleList(Block() for _ in range(layers))
            self.ln_f = nn.LayerNorm(width)

        def forward(self, ids):
            x = self.wte(ids) + self.wpe(torch.arange(ids.size(1), device=ids.device))
            for block in self.h:
                x = block(x)
            return self.ln_f(x)

    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = Transformer()
            self.lm_head = nn.Linear(width, vocabulary, bias=False)
            self.lm_head.weight = self.transformer.wte.weight

        def forward(self, ids, targets):
            logits = self.lm_head(self.transformer(ids))
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    return Gpt()


# ------------------------------------------------------------------------------------------------------------


def report(candidates: list[Candidate], tokens: int) -> dict:
    """Print the table of one precision; returns it as numbers."""
    base = (
        statistics.median(t[0] for t in candidates[0].times),
        statistics.median(t[1] for t in candidates[0].times),
    )
    reference = next(c for c in candidates if c.name == "ours")
    rows = {}
    print(f"{'':32}{'ms/step':>9}{'CPU ms':>9}{'tokens/s':>10}{'x wall':>8}{'x CPU':>8}{'loss diff':>11}")
    for c in candidates:
        wall, cpu = (statistics.median(t[i] for t in c.times) for i in (0, 1))
        losses, wanted = ([t[2] for t in x.warm + x.times] for x in (c, reference))
        diff = max(abs(a - b) for a, b in zip(losses, wanted, strict=True))
        drops = c.name in ("Trainer, defaults", "Trainer, fast env")
        rows[c.name] = {
            "wall_ms": wall * 1e3,
            "cpu_ms": cpu * 1e3,
            "x_wall": base[0] / wall,
            "x_cpu": base[1] / cpu,
        }
        shown = "dropout" if drops else f"{diff:.1e}"
        print(
            f"{c.name:32}{wall * 1e3:9.1f}{cpu * 1e3:9.1f}{tokens / wall:10.0f}"
            f"{base[0] / wall:8.2f}{base[1] / cpu:8.2f}{shown:>11}"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--precision", choices=["fp32", "bf16"], action="append", help="default: both")
    parser.add_argument("--steps", type=int, default=30, help="measured steps of each candidate")
    parser.add_argument("--warm", type=int, default=4, help="unmeasured steps before")
    parser.add_argument("--per-turn", type=int, default=3, help="steps before the next candidate's turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compile", action="store_true", help="also ours with torch_compile (a slow start)")
    parser.add_argument("--only", help="comma-separated parts of candidates' names (the first is the base)")
    parser.add_argument("--nanogpt", metavar="PATH", help="a clone of nanoGPT to take its model from")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, precision = args.child.split(":")
        if kind == "nanogpt":
            return run_nanogpt(args.size, precision, args.nanogpt)
        return run_trainer(args.size, precision, kind)

    wanted = args.only.split(",") if args.only else [""]
    names = [name for name in CANDIDATES if name == "ours" or any(part in name for part in wanted)]
    names = [name for name in names if args.compile or name != "ours, torch_compile"]
    *_, rows, context = SIZES[args.size]
    print(f"{args.size}: {rows} x {context} tokens a step, {args.threads} threads, median of {args.steps} steps")
    print(machine())
    results = {}
    for precision in args.precision or ["fp32", "bf16"]:
        candidates = []
        # what a machine without bf16 arithmetic should do instead
        for name in names if precision == "bf16" else [n for n in names if n != "ours, always fp32"]:
            kind, fast = CANDIDATES[name]
            command = [sys.executable, __file__, "--size", args.size, "--child", f"{kind}:{precision}"]
            command += ["--nanogpt", args.nanogpt] if args.nanogpt else []
            candidates.append(Candidate(name, command, environment(fast, args.threads)))
        try:
            take_turns(candidates, args.warm, args.steps, args.per_turn)
        finally:
            for candidate in candidates:
                candidate.close()
        print(f"\n{precision}")
        results[precision] = report(candidates, rows * context)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine(), "size": args.size, **results}, indent=1))


if __name__ == "__main__":
    main()
