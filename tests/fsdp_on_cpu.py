"""`python -m pipelines` with FSDP2 over gloo, for `accelerate launch`: Accelerate itself offers FSDP on GPUs only.

At its end it prints in what gradients were summed.
"""

import atexit
import os

import accelerate.accelerator
import torch.distributed
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState

from pipelines import launch
from pipelines.__main__ import entry

start = launch.start


def start_on_cpu(*args):
    """`launch.start`, which would refuse."""
    del os.environ["ACCELERATE_USE_FSDP"]
    state = start(*args)
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    return state


class GPUs(AcceleratorState):
    """Accelerate's state, made to believe that each process of a CPU run has a GPU."""

    def __init__(self, *args, **kwargs):
        if PartialState._shared_state:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().__init__(*args, **kwargs)


def allow() -> None:
    """Let this process run FSDP2 on the CPU; before `launch.start`."""
    launch.start, accelerate.accelerator.AcceleratorState = start_on_cpu, GPUs


def note_sums() -> None:
    """Print, when this process ends, the types of all gradients that shards were made of."""
    seen, names = set(), ("reduce_scatter_single", "reduce_scatter_tensor")  # the second is its older name

    def noting(real):
        def call(output, *args, **kwargs):
            seen.add(str(output.dtype))
            return real(output, *args, **kwargs)

        return call

    for name in names:
        if hasattr(torch.distributed, name):
            setattr(torch.distributed, name, noting(getattr(torch.distributed, name)))
    atexit.register(lambda: print("gradients summed in", sorted(seen), flush=True))


if __name__ == "__main__":
    allow()
    note_sums()
    entry()
