"""Language-model heads that never hold a batch's logits: loss and log-probabilities, chunk by chunk.

The head and its cross-entropy are the largest single cost of a small language model (60 % of a lean step of a
4-layer, 256-wide GPT-2) and its largest tensor (tokens x vocabulary, several times over). Both functions here
walk over the rows in chunks that reuse one buffer and overwrite it in place: logits, then probabilities, then
gradient. `fast_model.fuse_loss` puts the first into a transformers model. Computing the gradient already in the forward
is Liger-Kernel's idea (https://arxiv.org/abs/2410.10989); this is plain PyTorch, so it runs on any device.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import torch

from pipelines import IGNORE_INDEX

# Bytes of the logits buffer, and the fewest rows (of float32) in it: each chunk reads and writes all of
# d_weight once. Measured on CPU in float32: 128 rows cost 5 to 18 % more than 1024, from 256 on it is flat.
# Faster arithmetic (AMX, GPUs; not measured) needs more rows to hide that traffic.
CPU_BYTES, CPU_ROWS = 2**26, 512
GPU_BYTES, GPU_ROWS = 2**28, 1024
# What takes a second buffer (half-precision logits become float32, an entropy) takes so many rows at a time, to stay in
# the cache.
CPU_WIDE_ROWS = 64


def chunk_rows(vocabulary: int, hidden: torch.Tensor) -> int:
    """Rows per chunk for this vocabulary and the device and dtype these hidden states are multiplied in."""
    size = _compute_dtype(hidden).itemsize
    if hidden.device.type == "cpu":
        return max(CPU_ROWS * 4 // size, CPU_BYTES // (vocabulary * size))
    return max(GPU_ROWS, GPU_BYTES // (vocabulary * size))


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where it is on, else that of the hidden states.

    On CPUs without instructions for half precision float32, whose products took a twentieth of the time
    (benchmarks/head_speed.py).
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return torch.float32 if kind == "cpu" and _is_emulated(dtype) else dtype


@functools.cache
def _is_emulated(dtype: torch.dtype) -> bool:
    """Whether this CPU's products of half precision are loops over numbers that are converted one by one."""
    has = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return torch.backends.mkldnn.is_available() and dtype in has and not getattr(torch.ops.mkldnn, has[dtype])()


def _no_autocast(device: torch.device):
    """We cast by hand, once per call; autocast would cast the weight once per chunk."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class _Chunk:
    """The buffers of one walk over the rows: logits (rows, v), overwritten by whatever comes of them.

    Half-precision logits get a float32 buffer of a few rows beside them: `pieces` hands out one piece of rows
    at a time in float32, and `put_back` writes it over the half-precision logits.
    """

    def __init__(self, rows: int, weight: torch.Tensor, bias: torch.Tensor | None, scratch: bool = False):
        self.weight, self.bias = weight, bias
        vocabulary, wide = weight.size(0), {"device": weight.device, "dtype": torch.float32}
        self.logits = torch.empty(rows, vocabulary, device=weight.device, dtype=weight.dtype)
        self.piece = rows
        if weight.device.type == "cpu" and (scratch or weight.dtype != torch.float32):
            self.piece = min(rows, CPU_WIDE_ROWS)
        if weight.dtype != torch.float32:
            self.wide = torch.empty(self.piece, vocabulary, **wide)
        if scratch:
            self.scratch = torch.empty(self.piece, vocabulary, **wide)

    def pieces(self, hidden: torch.Tensor, temperature: float = 1.0):
        """Compute the logits of hidden (n, h); yields (span, float32 logits of these rows), with bias and
        temperature.
        """
        logits = self.logits[: hidden.size(0)]
        torch.mm(hidden, self.weight.T, out=logits)
        for start in range(0, hidden.size(0), self.piece):
            span = slice(start, min(start + self.piece, hidden.size(0)))
            part = logits[span]
            if part.dtype != torch.float32:
                part = self.wide[: part.size(0)].copy_(part)
            if self.bias is not None:
                part.add_(self.bias)
            if temperature != 1.0:
                part.div_(temperature)
            yield span, part

    def put_back(self, span: slice, part: torch.Tensor) -> None:
        """Write float32 rows over the logits they came from; nothing to do where they are the same memory."""
        if self.logits.dtype != torch.float32:
            self.logits[span].copy_(part)


def in_head(head: torch.nn.Linear, function, hidden: torch.Tensor):
    """`function(hidden, weight, bias)` of the head's weights, called as its own forward.

    There FSDP2 and ZeRO-3 gather the weights, again before the backward, and reduce their gradients after it.
    """
    before = vars(head).get("forward")
    head.forward = lambda hidden: function(hidden, head.weight, head.bias)
    try:
        return head(hidden)
    finally:
        del head.forward
        if before is not None:
            head.forward = before


# A probability this small may have lost its precision: the log is then taken from the logits.
UNDERFLOW = 1e-30


def _before_softmax(logits: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What `_log_probability` needs of logits (n, v) that softmax is about to overwrite: `(logit at - largest, its
    place)`.

    None on a CPU, which may look at the probabilities instead.
    """
    if logits.device.type == "cpu":
        return None
    top, where = logits.max(-1, keepdim=True)
    return logits.gather(1, at) - top, where


def _log_probability(probs, at, before, hidden: torch.Tensor, target: torch.Tensor, chunk: _Chunk, temperature=1.0):
    """log of the softmax's probabilities (n,) at `at` (n, 1), exact even where they underflow.

    Taking the log of the one entry needed saves the passes over the logits that a logsumexp costs. Where it underflowed
    it is computed again; an accelerator, which would have to be waited for, takes the log of the largest probability,
    which never underflows, and the distance to it.
    """
    if before is not None:
        below, where = before
        return (below + probs.gather(1, where).log())[:, 0]
    chosen = probs.gather(1, at)[:, 0]
    log = chosen.log()
    lost = chosen < UNDERFLOW
    if lost.any():
        logits = (hidden[lost] @ chunk.weight.T).float()
        logits = (logits if chunk.bias is None else logits + chunk.bias) / temperature
        log[lost] = logits.log_softmax(-1).gather(1, target[lost, None])[:, 0]
    return log


class _WeightGradient:
    """Sum over chunks of g^T h, in float32 whatever the products' dtype."""

    def __init__(self):
        self.total = None

    def add(self, grad: torch.Tensor, hidden: torch.Tensor) -> None:
        if self.total is None:
            self.total = torch.mm(grad.T, hidden).float()
        elif grad.dtype == torch.float32:
            self.total.addmm_(grad.T, hidden)
        else:
            self.total.add_(torch.mm(grad.T, hidden))


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of valid rows x scale; the gradients are already there when backward comes."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, rows, train, learned):
        # needs_input_grad stays true under no_grad, hence `train`
        need_hidden, need_weight, need_bias = (train and need for need in ctx.needs_input_grad[:3])
        count, dtype = hidden.size(0), _compute_dtype(hidden)
        loss = torch.zeros((), device=hidden.device, dtype=torch.float32)
        with _no_autocast(hidden.device):
            x, w = hidden.to(dtype), weight.to(dtype)
            grad_hidden = torch.empty_like(x) if need_hidden else None
            grad_weight = _WeightGradient() if need_weight else None
            grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
            chunk = _Chunk(min(rows, count), w, bias)
            for start in range(0, count, rows):
                here = slice(start, start + rows)
                part, target = x[here], labels[here]
                for span, probs in chunk.pieces(part):
                    at = target[span, None]
                    before = _before_softmax(probs, at)
                    torch.softmax(probs, -1, out=probs)
                    log = _log_probability(probs, at, before, part[span], target[span], chunk)
                    mine = None if learned is None else learned[here][span]
                    loss -= (log if mine is None else log * mine).sum()
                    if need_hidden or need_weight or need_bias:
                        # d loss / d logits = softmax - onehot
                        _take_one_from(probs, at)
                        if mine is not None:
                            probs.mul_(mine[:, None])
                        if need_bias:
                            grad_bias += probs.sum(0)
                        chunk.put_back(span, probs)
                grad = chunk.logits[: part.size(0)]
                if need_hidden:
                    torch.mm(grad, w, out=grad_hidden[here])
                if need_weight:
                    # scaling these few rows scales the whole (v, h) product
                    grad_weight.add(grad, part * scale)
        ctx.grads = (
            grad_hidden.mul_(scale).to(hidden.dtype) if need_hidden else None,
            grad_weight.total.to(weight.dtype) if need_weight else None,
            grad_bias.mul_(scale).to(bias.dtype) if need_bias else None,
        )
        return loss * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        if ctx.grads is None:
            raise RuntimeError("linear_cross_entropy keeps its gradients for one backward only.")
        grads, ctx.grads = ctx.grads, None
        # In place: these tensors are ours alone. An incoming gradient of one leaves nothing to do (comparing
        # on an accelerator would wait for it, so there the multiplication is simply done).
        if grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:
            for grad in grads:
                if grad is not None:
                    grad.mul_(grad_loss)
        return *grads, None, None, None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    divisor: float | torch.Tensor | None = None,
    rows: int | None = None,
    targets: int | None = None,
) -> torch.Tensor:
    """`cross_entropy(linear(hidden, weight, bias), labels)` without the logits.

    Loss *and* gradients are computed chunk by chunk in the forward; backward only scales them, and runs once.
    Rows whose label is `ignore_index` cost nothing, but on an accelerator that would have to be asked how many there
    are (`targets` says it): there they are computed and weighed 0. Products run in autocast's dtype (or that of
    `hidden`), softmax, loss and the sums over chunks in float32. Under `no_grad` only the loss is computed.

    Args:
        hidden: (..., h) last hidden states, already aligned with `labels` (shift before calling).
        weight: (v, h) output embedding; may be tied to the input embedding.
        labels: (...) int64 token ids, `ignore_index` where there is nothing to learn.
        bias: (v,) or None.
        ignore_index: label of rows left out.
        reduction: "mean" over the valid rows (0 where there is none, unlike torch's NaN) or "sum".
        divisor: divide the sum by this instead, such as the valid rows of all processes and micro-batches; the
            gradients are then scaled where it costs nothing. Overrides `reduction`.
        rows: rows per chunk; None picks a measured one.
        targets: how many labels are not `ignore_index`, where the host knows it.

    Returns:
        float32 scalar in nats, differentiable even when every row is ignored (all gradients zero then).

    Raises:
        ValueError: shapes that do not fit or an unknown reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", not {reduction!r}.')
    if hidden.shape[:-1] != labels.shape:
        shapes = f"hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)}"
        raise ValueError(f"{shapes} do not belong together.")
    hidden, labels = hidden.reshape(-1, hidden.size(-1)), labels.reshape(-1)
    valid, learned = labels != ignore_index, None
    waits = hidden.device.type != "cpu"
    count = targets if waits else int(valid.sum())
    if count == 0:
        # A zero that reaches every input, so that DDP and backward() find what they expect
        return sum(x[:0].sum().float() for x in (hidden, weight, bias) if x is not None)
    if count is None:
        learned, labels = valid.float(), labels.clamp(min=0)
        count = learned.sum().clamp(min=1)
    elif count < labels.numel():
        chosen = torch.nonzero_static(valid, size=count)[:, 0] if waits else valid
        hidden, labels = hidden[chosen], labels[chosen]
    rows = rows or chunk_rows(weight.size(0), hidden)
    divisor = (count if reduction == "mean" else 1.0) if divisor is None else divisor
    scale = 1.0 / divisor
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, scale, rows, torch.is_grad_enabled(), learned)


class _LinearLogprobs(torch.autograd.Function):
    """Log-probability of one label per row and the entropy of the row.

    Backward computes the logits again, or finds what they became where the forward kept it (`keep`).
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, temperature, entropy, keep, rows):
        count, dtype = hidden.size(0), _compute_dtype(hidden)
        logprob = torch.empty(count, device=hidden.device, dtype=torch.float32)
        spread = torch.empty_like(logprob) if entropy else None
        lse = torch.empty_like(logprob) if entropy else None
        rows = count if keep else min(rows, count)
        with _no_autocast(hidden.device):
            x, w = hidden.to(dtype), weight.to(dtype)
            chunk = _Chunk(rows, w, bias, scratch=entropy)
            for start in range(0, count, rows):
                part = x[start : start + rows]
                for span, probs in chunk.pieces(part, temperature):
                    here = slice(start + span.start, start + span.stop)
                    at = labels[here, None]
                    if entropy:
                        logits = chunk.scratch[: probs.size(0)].copy_(probs)
                    before = _before_softmax(probs, at)
                    torch.softmax(probs, -1, out=probs)
                    log = _log_probability(probs, at, before, part[span], labels[here], chunk, temperature)
                    logprob[here] = log
                    if entropy:
                        lse[here] = logits.gather(1, at)[:, 0] - log
                        spread[here] = lse[here] - logits.mul_(probs).sum(-1)  # H = logsumexp - sum p z
                    if keep:
                        _take_one_from(probs, at)
                        chunk.put_back(span, probs)
        ctx.save_for_backward(hidden, weight, bias, labels, lse, spread, chunk.logits if keep else None)
        ctx.temperature, ctx.rows, ctx.dtype = temperature, rows, dtype
        ctx.set_materialize_grads(False)
        if keep and entropy:
            ctx.mark_non_differentiable(spread)
        return logprob, spread

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, bias, labels, lse, spread, kept = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        if grad_logprob is None and grad_entropy is None:
            return (None,) * 8
        count, rows = hidden.size(0), ctx.rows
        with _no_autocast(hidden.device):
            x, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
            grad_hidden = torch.empty_like(x) if need_hidden else None
            grad_weight = _WeightGradient() if need_weight else None
            grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
            # d logprob / d z = onehot - p;   d entropy / d z = -p (z - lse + H)
            # Through the log-probability alone, each row of p - onehot has one factor: it goes to the narrow side.
            if grad_entropy is None:
                factor = (grad_logprob / -ctx.temperature)[:, None]
            else:
                factor = torch.full_like(lse[:, None], 1 / ctx.temperature)
            chunk = None if kept is not None else _Chunk(rows, w, bias, scratch=grad_entropy is not None)
            for start in range(0, count, rows):
                block = slice(start, start + rows)
                part = x[block]
                for span, logits in () if chunk is None else chunk.pieces(part, ctx.temperature):
                    here = slice(start + span.start, start + span.stop)
                    if grad_entropy is None:
                        torch.softmax(logits, -1, out=logits)
                        _take_one_from(logits, labels[here, None])
                    else:
                        probs = chunk.scratch[: logits.size(0)]
                        torch.softmax(logits, -1, out=probs)
                        slope = -grad_entropy[here, None]
                        offset = (spread[here] - lse[here])[:, None] * slope
                        if grad_logprob is not None:
                            offset = offset - grad_logprob[here, None]
                        logits.mul_(slope).add_(offset).mul_(probs)
                        if grad_logprob is not None:
                            logits.scatter_add_(1, labels[here, None], grad_logprob[here, None])
                    chunk.put_back(span, logits)
                grad = (chunk.logits if kept is None else kept)[: part.size(0)]
                if need_hidden:
                    torch.mm(grad, w, out=grad_hidden[block])
                if need_weight:
                    grad_weight.add(grad, (part * factor[block]).to(part.dtype))
                if need_bias:
                    grad_bias += grad.T @ factor[block, 0].to(grad.dtype)
        return (
            (grad_hidden * factor).to(hidden.dtype) if need_hidden else None,
            grad_weight.total.to(weight.dtype) if need_weight else None,
            grad_bias.to(bias.dtype) if need_bias else None,
            *(None,) * 5,
        )


def _take_one_from(probs: torch.Tensor, at: torch.Tensor) -> None:
    """probs (n, v) becomes probs - onehot(at), at (n, 1), in place: the gradient of the cross-entropy."""
    probs.scatter_add_(1, at, probs.new_full((1, 1), -1.0).expand_as(at))


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = True,
    keep: bool = False,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of each label and entropy of each row of `softmax(linear(hidden) / temperature)`.

    Gradients flow through both results; backward computes each chunk's logits again (a third more products
    than keeping them, and n x v less memory; see `keep`). Select the rows you need before calling: prompt and
    padding rows would be computed too.

    Args:
        hidden: (n, h) last hidden states, aligned with `labels`.
        weight: (v, h) output embedding.
        labels: (n,) int64 token ids, all within the vocabulary.
        bias: (v,) or None.
        temperature: logits are divided by it.
        entropy: False skips the entropy (None is returned in its place).
        keep: keep (n, v) numbers for backward instead of computing them again; the entropy is then only to look at.
        rows: rows per chunk; None picks a measured one.

    Returns:
        (logprob, entropy), each (n,) float32 in nats.

    Raises:
        ValueError: shapes that do not fit or a temperature that is not positive.
    """
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1]:
        got = f"{tuple(hidden.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"linear_logprobs takes hidden (n, h) and labels (n,), not {got}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}.")
    if hidden.size(0) == 0:
        empty = hidden[:, 0].float()
        return empty, empty.clone() if entropy else None
    rows = rows or chunk_rows(weight.size(0), hidden)
    return _LinearLogprobs.apply(hidden, weight, bias, labels, float(temperature), entropy, keep, rows)
