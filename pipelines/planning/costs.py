"""What training costs, as formulae: bytes, operations, traffic, seconds. Pure functions; no torch, no files.

`pipelines.planning.planner` fills them in with a recipe's numbers. Sizes are bytes, FLOPs count a multiply-add as two.
Sources:

    Kaplan 2020      https://arxiv.org/abs/2001.08361    section 2.1: 2N FLOPs a token forward, 6N with backward
    Hoffmann 2022    https://arxiv.org/abs/2203.15556    appendix F: attention's own FLOPs (Chinchilla)
    Rajbhandari 2020 https://arxiv.org/abs/1910.02054    ZeRO: what each stage shards, and its traffic (section 7)
    Korthikanti 2022 https://arxiv.org/abs/2205.05198    equation 2: activations of a transformer layer
    Chen 2016        https://arxiv.org/abs/1604.06174    activation checkpointing
    Dettmers 2023    https://arxiv.org/abs/2305.14314    QLoRA: NF4 with double quantization
    Pope 2022        https://arxiv.org/abs/2211.05102    decoding is bound by reading weights and KV cache
    Patarasuk 2009   https://doi.org/10.1016/j.jpdc.2008.09.002    ring all-reduce moves 2 (n-1)/n of the data
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from pipelines import errors
from pipelines.errors import PlanError
from pipelines.planning.devices import DECODE, NETWORK, PER_MACHINE, Device

SHARDED = ("zero3", "fsdp2")  # the strategies that cut up weights
STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
# DeepSpeed's defaults, in elements (https://www.deepspeed.ai/docs/config-json/): the buffer gradients are reduced in,
# and the most gathered weights that ZeRO-3 keeps
ZERO_BUCKET, ZERO_LIVE = 5e8, 1e9
# Bytes of optimizer state for each byte of a float32 weight, by the beginning of `optim`.
OPTIMIZERS = {
    "adamw_bnb_8bit": 2 * (1 + 4 / 256) / 4,  # two moments of a byte, a float32 scale for each block of 256
    "adamw_8bit": 2 * (1 + 4 / 256) / 4,
    "paged_adamw_8bit": 2 * (1 + 4 / 256) / 4,
    "adamw": 2.0,
    "paged_adamw": 2.0,
    "adafactor": 0.01,  # a row and a column for each matrix
    "lion_8bit": (1 + 4 / 256) / 4,
    "lion": 1.0,
    "sgd": 0.0,
    "rmsprop": 1.0,
    "adagrad": 1.0,
}
NF4 = 0.5 + 0.127 / 8  # bytes a weight with double quantization (Dettmers 2023, section 3)


@dataclass(frozen=True)
class States:
    """Bytes on one device: weights, their gradients, the optimizer's states, and buffers of the launcher."""

    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    buffers: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.buffers


def optimizer_share(optim: str) -> float:
    """Bytes of state for each byte of a trained weight."""
    for name in sorted(OPTIMIZERS, key=len, reverse=True):
        if optim.startswith(name):
            return OPTIMIZERS[name]
    raise PlanError(f"args.optim {optim}: its states are not known here{errors.meant(optim, OPTIMIZERS)}")


def states(
    parameters: int,
    trainable: int,
    strategy: str = "single",
    world: int = 1,
    size: int = 4,
    optim: float = 2.0,
    largest: int = 0,
    outside: int = 0,
    quantized: int = 0,
    offload: str = "none",
    compute: int = 2,
    on_cpu: bool = False,
) -> States:
    """Weights, gradients and optimizer of one model on one device of `world` (Rajbhandari 2020, figure 1).

    `size`: bytes of a stored weight. Plain and data-parallel training keeps what is stored and casts on the fly
    (autocast); DDP holds each gradient twice, in its own tensor and in the bucket that is reduced. FSDP2 cuts stored
    weights, gradients and states into `world` parts and gathers copies of two blocks (`largest` parameters each, one
    computing, one on its way) and of what lies `outside` the blocks, with the gradients of one block and of that, in
    `compute` bytes a number; gradients pass through a flat buffer of their size. DeepSpeed trains a copy of so many
    bytes from float32 weights and moments (12 bytes with Adam): ZeRO-1 cuts up those 12, ZeRO-2 the gradients too,
    ZeRO-3 the weights too; gradients lie flat in its bucket, and once more to be sent. `on_cpu`: only the used part of
    a bucket takes memory, gloo (no reduce-scatter) sends a copy, and the buffer that weights were gathered in is not
    used again. `quantized` of the parameters lie there as NF4. `offload`: what is on the host, "none", "optimizer" or
    "all".
    """
    part = 1 / world
    trained = 4 if trainable < parameters else size  # peft keeps adapters in float32
    if strategy in ("single", "ddp"):
        weights = (parameters - trainable - quantized) * size + quantized * NF4 + trainable * trained
        copies = 2 if strategy == "ddp" and world > 1 else 1
        return States(weights, trainable * trained * copies, trainable * trained * optim)
    if strategy == "fsdp2":
        whole = largest + outside  # at work at once, beside the block that is on its way
        copies = (3 if trainable else 1) + ((2 if trainable else 1) if on_cpu else 0)
        gathered = compute * (largest + copies * whole)
        held = States(parameters * size * part, trainable * size * part, trainable * size * optim * part, gathered)
        return States(0.0, 0.0, 0.0, gathered) if offload == "all" else held
    stage = {"zero1": 1, "zero2": 2, "zero3": 3}[strategy]
    weights = parameters * compute * (part if stage == 3 else 1)
    gradients = trainable * compute * (part if stage >= 2 else 1)
    optimizer = trainable * 4 * (1 + optim) * part
    used = min(ZERO_BUCKET, trainable)
    bucket = (used if on_cpu else ZERO_BUCKET if trainable else 0) + used + (used if on_cpu and stage == 3 else 0)
    buffers = compute * (bucket + (min(parameters, ZERO_LIVE) if stage == 3 else 0))
    if offload == "all":
        weights = 0.0
    return States(weights, gradients, optimizer if offload == "none" else 0.0, buffers)


def korthikanti(tokens: int, hidden: int, layers: int, size: int = 2) -> float:
    """Activations of `layers` transformer layers without attention matrices (flash attention): 34 s b h bytes a layer.

    Equation 2 of Korthikanti 2022 less its 5 a s^2 b term; it counts 2-byte numbers, so `size` scales it. Used where a
    model cannot be traced.
    """
    return 34 * tokens * hidden * layers * size / 2


def backward_work(activations: float, layers: int) -> float:
    """What backward holds beside the activations: their gradients within the layer it is at, which are of their size.

    Found by measuring (benchmarks/plan_accuracy.py).
    """
    return activations / layers


def checkpointed(activations: float, tokens: int, hidden: int, layers: int, size: int = 4) -> float:
    """Activations that remain with checkpointing: the input of each layer, and one layer at work (Chen 2016)."""
    return min(activations, layers * tokens * hidden * size + activations / layers)


def fused_head(
    tokens: int, vocabulary: int, hidden: int, rows: int, size: int = 4, wide_rows: int = 0, trained: bool = True
) -> float:
    """Buffers of `fused_head.linear_cross_entropy`, which never holds the logits of a batch.

    One chunk of `rows` logits (half precision: `wide_rows` of it in float32 beside), the gradient of the hidden states
    and, where it is `trained`, that of the head (float32, and for half precision one product before it is summed).
    """
    rows = min(rows, tokens)
    chunk = rows * vocabulary * size + (min(wide_rows, rows) * vocabulary * 4 if size < 4 else 0)
    gradient = vocabulary * hidden * (4 + (size if size < 4 else 0)) if trained else 0
    return chunk + tokens * hidden * size + gradient


def full_logits(tokens: int, vocabulary: int, size: int = 4, tied: int = 0) -> float:
    """Logits, their float32 copy (half precision), log-softmax and gradient, of a head that is not fused.

    `tied`: the width of a head that is the input embeddings and trained. Its gradients of both uses lie there before
    they are summed (found by measuring, benchmarks/plan_accuracy.py).
    """
    return tokens * vocabulary * (size + 4 + 4 + (4 if size < 4 else 0)) + 2 * vocabulary * tied * size


def kv_cache(tokens: int, layers: int, width: int, size: int = 4) -> float:
    """Keys and values of `tokens` in each of `layers`, each of `width` numbers (key-value heads x head size)."""
    return 2.0 * tokens * layers * width * size


def scoring(tokens: int, widest: int, answer_tokens: int, vocabulary: int, rows: int, size: int = 4) -> float:
    """What PPO's scoring of `tokens` holds at once without gradients, of which `answer_tokens` go through the head:

    the feed-forward of one layer before and after its activation, and a chunk of at most `rows` logits.
    """
    chunk = min(rows, answer_tokens) * vocabulary
    return 2 * tokens * widest * size + chunk * (size + (4 if size < 4 else 0))


def forward_flops(tokens: float, products: int, layers: int = 0, width: int = 0, attended: float = 0) -> float:
    """One forward over `tokens`: 2 FLOPs a weight that is multiplied (`products`: all but looked-up embeddings), and

    4 FLOPs for each of the `attended` positions a token sees, of `width` numbers, in each layer (query times key and
    probability times value; Hoffmann 2022, appendix F). A causal token sees half of its sequence on average.
    """
    return tokens * (2 * products + 4 * layers * width * attended)


def train_flops(forward: float, frozen: bool = False, checkpointing: bool = False) -> float:
    """Forward and backward: backward is two forwards (Kaplan 2020), one where the weights themselves are frozen (LoRA).

    Checkpointing computes the forward again.
    """
    return forward * (1 + (1 if frozen else 2) + checkpointing)


def traffic(
    parameters: int,
    trainable: int,
    strategy: str,
    world: int,
    micro_batches: int = 1,
    compute: int = 2,
    size: int = 4,
    outside: int = 0,
) -> float:
    """Bytes that each device sends in an optimizer step (ring collectives, Patarasuk 2009; ZeRO, section 7).

    DDP reduces gradients of `size` bytes once: 2 (n-1)/n of them. ZeRO-1 and 2 gather the trained weights, of `compute`
    bytes a number, once; their gradients DeepSpeed reduces everywhere (its default `use_multi_rank_bucket_allreduce`;
    to scatter them, as in the paper, is half of that), ZeRO-2 those of every micro-batch. ZeRO-3 and FSDP2 gather
    weights for every forward and again for every backward, and scatter the gradients of every micro-batch. What stays
    gathered from the forward to the backward goes once: in FSDP2 all that lies `outside` the blocks, in ZeRO-3 as much
    as `ZERO_LIVE`. Checked in runs: docs/planning.md.
    """
    ring = (world - 1) / world
    if strategy in ("single", "ddp"):
        return 2 * ring * trainable * size
    if strategy in ("zero1", "zero2"):
        return ring * trainable * compute * (2 * (micro_batches if strategy == "zero2" else 1) + 1)
    again = max(0, parameters - (outside if strategy == "fsdp2" else ZERO_LIVE))
    return ring * micro_batches * (parameters + again + trainable) * compute


def bus(hardware: Device, world: int) -> float:
    """Bytes/s at which one device sends: within its machine, or the network once there are several machines."""
    return hardware.link if world <= PER_MACHINE else min(hardware.link, NETWORK)


def decode_seconds(weights: float, cache: float, steps: int, bandwidth: float) -> float:
    """`steps` tokens for one batch: each reads all weights and half of the final KV cache on average (Pope 2022)."""
    return steps * (weights + cache / 2) / (bandwidth * DECODE)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a stage, part by part. They add up: what one part frees is mostly not reused

    by another, since their tensors differ in size (seen on the heap of the CPU; on a GPU this is an upper bound).
    """

    process: float = 0.0
    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    head: float = 0.0
    kv_cache: float = 0.0
    rollouts: float = 0.0
    critic: float = 0.0
    reference: float = 0.0
    rewards: float = 0.0
    buffers: float = 0.0
    saving: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))

    def without_process(self) -> Memory:
        """The same less the libraries, which is what a measurement after the imports sees."""
        return replace(self, process=0.0)


def steps(rows: int, per_step: int, epochs: float) -> int:
    """Optimizer steps of `epochs` over `rows`: whole steps only, as `training.GlobalOrder` cuts them."""
    return math.ceil((rows // per_step) * epochs)
