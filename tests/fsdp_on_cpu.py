"""`python -m pipelines` with FSDP2 over gloo, for `accelerate launch`: Accelerate itself offers FSDP on GPUs only."""

import os

import accelerate.accelerator
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


if __name__ == "__main__":
    allow()
    entry()
