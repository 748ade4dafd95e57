"""The head of a language model with its loss: ours, PyTorch's and TRL's on the same numbers, in one run.

    python benchmarks/head_speed.py              # on the GPU where there is one, else on the CPU; one table
    python benchmarks/head_speed.py --dtype fp32 --repeats 5

Forward and backward of the loss of `rows` hidden states, gradients of states and weights. Times are medians of CPU
seconds (GPU: seconds), the candidates in turn; memory is the peak of a process of its own above what its inputs take.

    ours    pipelines.speed.fused_head.linear_cross_entropy
    torch   torch.nn.functional.linear_cross_entropy with LinearCrossEntropyOptions() (PyTorch 2.13)
    TRL     the kernel of trl's add_fused_lm_head (TRL 1.16)
    whole   cross_entropy(linear(hidden, weight), labels)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional

from pipelines.speed.fused_head import linear_cross_entropy

SIZES = {"tiny": (1024, 256, 8192), "GPT-2 124M": (1024, 768, 50257), "1B, large vocabulary": (1024, 2048, 128256)}


def torchs(hidden, weight, labels):
    """PyTorch's, which knows nothing of autocast."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden, weight = (x.to(torch.get_autocast_dtype(kind)) for x in (hidden, weight))
    options = torch.nn.LinearCrossEntropyOptions()
    return functional.linear_cross_entropy(hidden, weight, labels, options=options)


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


CANDIDATES = {"ours": linear_cross_entropy, "torch": torchs, "TRL": trls, "whole": whole}


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


def peak(name: str, size: str, dtype: str, device: torch.device) -> int:
    """Bytes above the inputs at the peak; in a process of its own."""
    parts = inputs(size, device)
    if device.type == "cuda":
        step(name, parts, dtype)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(name, parts, dtype)
        return torch.cuda.max_memory_allocated() - before
    small = inputs("tiny", device)
    step(name, [small[0][:8].detach().requires_grad_(), small[1], small[2][:8]], dtype)  # libraries load what they need
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    before = resident("VmRSS")
    step(name, parts, dtype)
    return resident("VmHWM") - before


def resident(what: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.peak:
        print("PEAK", json.dumps(peak(*args.peak, device)))
        return
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    print(f"{device.type}, torch {torch.__version__}, {torch.get_num_threads()} threads; seconds and MB at the peak")
    for size in args.sizes:
        for dtype in args.dtype:
            parts, seconds, loss = inputs(size, device), {name: [] for name in CANDIDATES}, {}
            reference = None
            for turn in range(args.repeats + 1):
                for name in CANDIDATES:
                    began = clock()
                    loss[name], gradients = step(name, parts, dtype)
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    if turn:
                        seconds[name].append(clock() - began)
                    elif name == "ours":
                        reference = gradients
                    else:
                        apart = max(
                            ((a - b).norm() / b.norm()).item() for a, b in zip(gradients, reference, strict=True)
                        )
                        assert apart < (1e-4 if dtype == "fp32" else 2e-2), f"{name}: gradients differ by {apart:.1e}"
                    del gradients
            del parts, reference
            for name in CANDIDATES:
                command = [sys.executable, __file__, "--peak", name, size, dtype]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                memory = json.loads(done.stdout.split("PEAK ")[1])
                print(
                    f"{size:<22} {dtype}  {name:<6} {statistics.median(seconds[name]):7.3f} s  {memory / 1e6:7.0f} MB  "
                    f"loss {loss[name]:.5f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
