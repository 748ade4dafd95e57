"""The head of a language model with its loss: ours, PyTorch's and TRL's on the same numbers, in one run.

    python benchmarks/head_speed.py              # on the GPU where there is one, else on the CPU; one Markdown table
    python benchmarks/head_speed.py --dtype fp32 --sizes tiny --repeats 5

Forward and backward of the loss of some hidden states, gradients of states and weights, under autocast in bf16. Times
are the least CPU seconds (GPU: seconds) of `--repeats` runs in this process, the candidates in turn, and one in a
process of its own, whose peak of memory above what its inputs take is the memory. `loss` and `gradients` say how far
each is from `whole` in float32: the loss relative to it, of the gradients the largest difference relative to the
largest number (of the states' or the weights', whichever is further).

    ours    pipelines.speed.fused_head.linear_cross_entropy
    torch   torch.nn.functional.linear_cross_entropy with LinearCrossEntropyOptions() (PyTorch 2.13)
    torch+  the same with as many rows in a chunk as ours has
    TRL     the kernel of trl's add_fused_lm_head (TRL 1.16)
    whole   cross_entropy(linear(hidden, weight), labels)
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional

from pipelines.speed.fused_head import chunk_rows, linear_cross_entropy

SIZES = {  # states, their width, vocabulary
    "tiny": (1024, 256, 8192),
    "SmolLM2 135M": (2048, 576, 49152),
    "GPT-2 124M": (1024, 768, 50257),
    "1B, large vocabulary": (1024, 2048, 128256),
}
ON_CPU = ("tiny", "SmolLM2 135M", "GPT-2 124M")  # without --sizes; the last takes minutes there


def torchs(hidden, weight, labels, rows=None):
    """PyTorch's, which knows nothing of autocast."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden, weight = (x.to(torch.get_autocast_dtype(kind)) for x in (hidden, weight))
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return functional.linear_cross_entropy(hidden, weight, labels, options=options)


def torchs_in_our_chunks(hidden, weight, labels):
    """PyTorch's in chunks as large as ours."""
    return torchs(hidden, weight, labels, chunk_rows(len(weight), hidden))


def trls(hidden, weight, labels):
    """The function that TRL's head applies to states and labels."""
    from trl.trainer import utils

    outputs = utils._ChunkedLogProbFunction.apply(
        hidden, weight, None, labels, 1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",)
    )
    return -outputs[0].mean()


def whole(hidden, weight, labels):
    """All logits at once."""
    return functional.cross_entropy(functional.linear(hidden, weight).float(), labels)


CANDIDATES = {
    "ours": linear_cross_entropy,
    "torch": torchs,
    "torch+": torchs_in_our_chunks,
    "TRL": trls,
    "whole": whole,
}


def inputs(size: str, device: torch.device) -> list[torch.Tensor]:
    """Hidden states, weights, labels."""
    rows, width, vocabulary = SIZES[size]
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=device, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=device) * 0.02).requires_grad_()
    return [hidden, weight, torch.randint(vocabulary, (rows,), device=device)]


def step(name: str, parts: list[torch.Tensor], dtype: str) -> tuple[float, list[torch.Tensor]]:
    """`(loss, gradients)` of one forward and backward."""
    autocast = torch.autocast(parts[0].device.type, torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext()
    with autocast:
        loss = CANDIDATES[name](*parts)
    return loss.item(), torch.autograd.grad(loss, parts[:2])


def alone(name: str, size: str, dtype: str, device: torch.device) -> tuple[float, int]:
    """Seconds, and bytes above the inputs at the peak, of one step in a process of its own."""
    hidden, weight, labels = parts = inputs(size, device)
    # a few rows, so that libraries have loaded what they need
    step(name, [hidden[:8].detach().requires_grad_(), weight[:64].detach().requires_grad_(), labels[:8] % 64], dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return timed(name, parts, dtype)[0], torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    before = resident("VmRSS")
    return timed(name, parts, dtype)[0], resident("VmHWM") - before


def timed(name: str, parts: list[torch.Tensor], dtype: str) -> tuple[float, tuple[float, list[torch.Tensor]]]:
    """Seconds of a `step`, and what it gave."""
    clock = time.process_time if parts[0].device.type == "cpu" else time.perf_counter
    began = clock()
    found = step(name, parts, dtype)
    if parts[0].device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began, found


def resident(what: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def apart(found: tuple[float, list[torch.Tensor]], right: tuple[float, list[torch.Tensor]]) -> tuple[float, float]:
    """How far a loss and its gradients are from the right ones, as the docstring above says."""
    gradients = [(a - b).abs().max() / b.abs().max() for a, b in zip(found[1], right[1], strict=True)]
    return abs(found[0] / right[0] - 1), max(gradients).item()


def measure(size: str, dtype: str, heads: list[str], repeats: int, device: torch.device) -> None:
    """Print a row of the table for each of the heads."""
    parts, seconds, errors = inputs(size, device), {name: [] for name in heads}, {}
    right = step("whole", parts, "fp32")
    for _ in range(repeats):
        for name in heads:
            took, found = timed(name, parts, dtype)
            seconds[name].append(took)
            errors[name] = apart(found, right)
            del found
    del parts, right
    rows, width, vocabulary = SIZES[size]
    for name in heads:
        command = [sys.executable, __file__, "--alone", name, size, dtype]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        took, memory = json.loads(done.stdout.split("ALONE ")[1])
        loss, gradients = errors[name]
        figures = f"{min(took, *seconds[name]):.2f} | {memory / 1e6:.0f} | {loss:.0e} | {gradients:.0e}"
        print(f"| {size}: {rows} x {width} x {vocabulary} | {dtype} | {name} | {figures} |", flush=True)
        assert max(loss, gradients) < (1e-4 if dtype == "fp32" else 5e-2), f"{name} computes something else"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--sizes", nargs="+", choices=SIZES)
    parser.add_argument("--heads", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.alone:
        print("ALONE", json.dumps(alone(*args.alone, device)))
        return
    trl = importlib.metadata.version("trl")
    print(f"{datetime.date.today()}, {machine(device)}; torch {torch.__version__}, trl {trl}\n")
    print("| states x width x vocabulary | dtype | head | seconds | MB | loss | gradients |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for size in args.sizes or (ON_CPU if device.type == "cpu" else SIZES):
        for dtype in args.dtype:
            measure(size, dtype, args.heads, args.repeats, device)


def machine(device: torch.device) -> str:
    """What computes, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    half = "" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ", no bf16 instructions"
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}{half}), {torch.get_num_threads()} thread(s)"


if __name__ == "__main__":
    main()
