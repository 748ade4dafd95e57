"""One decoding step of fixed shape and fixed addresses, which a GPU records once and replays for each token.

A small model's step is hundreds of operators of microseconds each: launching them from Python costs more than they do.
A CUDA graph launches all of them at once. Whatever changes from step to step is a tensor on the device: where the keys
are written, which positions are seen, which uniform numbers are drawn.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines import launch

logger = logging.getLogger(__name__)

KEYS = 256  # a step attends to a multiple of so many keys, those to come masked; behind it another one is recorded


@dataclass
class State:
    """What a step reads and changes in place; b rows are still decoding, B began."""

    ids: Tensor  # (b, 1) the last tokens
    position: Tensor  # (b, 1) theirs
    mask: Tensor  # (b, room) 0 on padding
    place: Tensor  # (1,) of their keys and values in the buffers
    step: Tensor  # (1,) which token of the answers comes next
    rows: Tensor  # (b,) which of the B answers each row is
    ended: Tensor  # (b,) bool
    tokens: Tensor  # (B, T)
    logprobs: Tensor  # (B, T)
    ends: Tensor  # (e,) the tokens that end an answer
    keys: int  # that are attended to, some of them masked
    cache: dict  # the keyword argument of `forward`


def advance(model, draw, state: State) -> None:
    """One more token of each row. Nothing is copied from the host, nothing waited for, nothing allocated that stays."""
    seen = torch.arange(state.keys, device=state.mask.device) <= state.place
    output = model(
        input_ids=state.ids,
        attention_mask=((state.mask[:, : state.keys] > 0) & seen)[:, None, None],
        position_ids=state.position,
        use_cache=True,
        logits_to_keep=1,
        **state.cache,
    )
    chosen, logprob = draw(output.logits[:, -1], state.step, state.rows)
    state.tokens[state.rows, state.step] = chosen
    state.logprobs[state.rows, state.step] = logprob
    state.ended |= (chosen[:, None] == state.ends).any(-1)
    state.ids.copy_(chosen[:, None])
    for counter in (state.position, state.place, state.step):
        counter += 1


def obstacle(model, plain_masks: bool) -> str | None:
    """Why steps of this model are not recorded; None where they are. `plain_masks`: `decode.takes_ready_masks`."""
    if model.device.type != "cuda":
        return "it needs a GPU"
    if not launch.chosen_on_gpu("graphs"):
        return f"{launch.OFF_ON_GPU} says so"
    if not plain_masks:
        return "its attention masks are made anew for each token"
    return vars(model).get("not_recorded")


class Recorded:
    """`advance` as a CUDA graph: the first call runs it as it is, the second records it, all others replay that."""

    def __init__(self, model, draw, state: State):
        self.model, self.state = model, state
        self.step = functools.partial(advance, model, draw, state)
        self.graph, self.called = None, False

    def __call__(self) -> None:
        """One more token of each row."""
        if self.called and self.graph is None and "not_recorded" not in vars(self.model):
            self._record()
        self.called = True
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()

    def _record(self) -> None:
        stream = torch.cuda.current_stream()
        try:
            graph = torch.cuda.CUDAGraph()
            # other threads (NCCL's watchdog) may use the device meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.step()
            self.graph = graph
            log_recorded(type(self.model).__name__)
        except RuntimeError as error:  # a wait for the device, a copy from the host: nothing of it has been computed
            torch.cuda.set_stream(stream)
            self.model.not_recorded = str(error).splitlines()[0]
            log_eager(type(self.model).__name__, self.model.not_recorded)


@functools.cache
def log_recorded(architecture: str) -> None:
    """Say once that a model decodes with CUDA graphs."""
    logger.info("%s is decoded with CUDA graphs (switch off with %s=graphs)", architecture, launch.OFF_ON_GPU)


@functools.cache
def log_eager(architecture: str, reason: str) -> None:
    """Say once why a model on a GPU decodes operator by operator."""
    logger.info("%s is decoded without CUDA graphs: %s", architecture, reason)
