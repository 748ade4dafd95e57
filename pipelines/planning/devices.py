"""What devices can do: memory, arithmetic, bandwidth, and how much of it training reaches. Each figure with
its source.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines import errors
from pipelines.errors import PlanError


@dataclass(frozen=True)
class Device:
    """One accelerator as its maker describes it. `bf16` None: it has no bf16 units, fp32 is assumed."""

    name: str
    memory: float  # bytes, nominal decimal gigabytes: the few per cent more that are there cover fragmentation
    bf16: float | None  # dense FLOP/s with float32 sums
    fp32: float
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s in each direction to its neighbours in the machine (NVLink, else PCIe)
    source: str

    @property
    def flops(self) -> float:
        """FLOP/s of the precision that the stages choose on it."""
        return self.bf16 or self.fp32


_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
DEVICES = {
    d.name: d
    for d in (
        Device("h100", 80e9, 989e12, 67e12, 3.35e12, 450e9, _NVIDIA + "h100/"),
        Device("h200", 141e9, 989e12, 67e12, 4.8e12, 450e9, _NVIDIA + "h200/"),
        Device("b200", 180e9, 2250e12, 75e12, 7.7e12, 900e9, _NVIDIA + "hgx/"),
        Device("a100", 80e9, 312e12, 19.5e12, 2.04e12, 300e9, _NVIDIA + "a100/"),
        Device("a100-40gb", 40e9, 312e12, 19.5e12, 1.56e12, 300e9, _NVIDIA + "a100/"),
        Device("l40s", 48e9, 362e12, 91.6e12, 0.864e12, 32e9, _NVIDIA + "l40s/"),
        Device("l4", 24e9, 121e12, 30.3e12, 0.3e12, 32e9, _NVIDIA + "l4/"),
        Device("a10", 24e9, 125e12, 31.2e12, 0.6e12, 32e9, _NVIDIA + "products/a10-gpu/"),
        Device("v100", 32e9, None, 15.7e12, 0.9e12, 150e9, _NVIDIA + "v100/"),
        Device("t4", 16e9, None, 8.1e12, 0.32e12, 16e9, _NVIDIA + "tesla-t4/"),
        Device("rtx4090", 24e9, 165e12, 82.6e12, 1.01e12, 32e9, "NVIDIA Ada GPU architecture whitepaper"),
        Device("rtx3090", 24e9, 71e12, 35.6e12, 0.94e12, 32e9, "NVIDIA GA102 GPU architecture whitepaper"),
    )
}
NETWORK = 50e9  # bytes/s of each GPU to other machines: one 400 Gb/s port a GPU, as in DGX H100
PER_MACHINE = 8  # GPUs of a machine
MFU = 0.40  # share of the peak that a training step reaches; llm.c: 0.406 on H100, nanochat: 0.41 to 0.46 (their logs)
DECODE = 0.50  # share of the memory bandwidth that decoding reaches; an assumption
CPU_SHARE = 0.35  # share of a measured matrix product's speed that a whole step reaches; an assumption

# What a process holds before any model: Python and the libraries (measured, 2 cores, torch 2.13), and on a GPU the
# CUDA context and the libraries' workspaces (an assumption: 0.5 to 1 GB are seen with current drivers).
CPU_PROCESS, GPU_PROCESS = 0.58e9, 0.8e9


def device(name: str) -> Device:
    """The device called `name`; `PlanError` with the nearest name otherwise."""
    if name.lower() not in DEVICES:
        raise PlanError(f"--gpu {name}: unknown{errors.meant(name.lower(), DEVICES)}; known: {', '.join(DEVICES)}")
    return DEVICES[name.lower()]
