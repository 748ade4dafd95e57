"""`torch.nn.attention.varlen` on a CPU, where it has no kernel: PyTorch's own function and autograd, over SDPA of each
sequence, which refuses what the kernel of a GPU refuses.
"""

import torch
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

calls = []  # (is_causal, scale, heads, key heads, dtype) of each forward


def sees(queries, keys, causal):
    """(queries, keys), True attends: the last query is at the last key, where the kernel has it."""
    seen = torch.ones(queries, keys, dtype=torch.bool)
    return seen.tril(keys - queries) if causal else seen


def attend(query, key, value, lengths, key_lengths, causal, scale):
    """(tokens, heads, d), computed in float32."""
    parts = [query.float().transpose(0, 1).split(lengths, 1)]
    parts += [x.float().transpose(0, 1).split(key_lengths, 1) for x in (key, value)]
    out = []
    for q, k, v in zip(*parts, strict=True):
        mask = sees(q.size(1), k.size(1), causal)
        out.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True))
    return torch.cat(out, 1).transpose(0, 1).to(query.dtype).contiguous()


def forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *rest):
    for x in (query, key, value):
        assert x.dim() == 3 and x.dtype in (torch.bfloat16, torch.float16) and x.size(-1) % 8 == 0, (x.shape, x.dtype)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and len(cu_seq_q) == len(cu_seq_k)
    assert cu_seq_q[-1] == len(query) and cu_seq_k[-1] == len(key) == len(value)
    lengths, key_lengths = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert max(lengths) <= max_q and max(key_lengths) <= max_k, "the kernel would leave tokens out"
    assert is_causal == (list(window_size) == [-1, 0])
    calls.append((is_causal, scale, query.size(1), key.size(1), query.dtype))
    out = attend(query, key, value, lengths, key_lengths, is_causal, scale)
    return out, query.new_zeros(query.shape[1::-1], dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


def backward(grad, query, key, value, out, lse, cu, cu_k, max_q, max_k, is_causal, rng_state, scale=None, window=None):
    """By the formulae: autograd does not look into PyTorch's custom operators."""
    groups, grads = query.size(1) // key.size(1), ([], [], [])
    scale = query.size(-1) ** -0.5 if scale is None else scale
    wide = [x.float().transpose(0, 1) for x in (grad, query, key, value)]
    wide[2:] = [x.repeat_interleave(groups, 0) for x in wide[2:]]
    lengths = [cu.diff().tolist()] * 2 + [cu_k.diff().tolist()] * 2
    for d, q, k, v in zip(*(x.split(n, 1) for x, n in zip(wide, lengths, strict=True)), strict=True):
        scores = (q @ k.mT * scale).masked_fill(~sees(q.size(1), k.size(1), is_causal), -torch.inf)
        weights = scores.softmax(-1)
        of_weights = d @ v.mT
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
        for parts, part in zip(grads, (of_scores @ k, of_scores.mT @ q, weights.mT @ d), strict=True):
            parts.append(part)
    dq, dk, dv = (torch.cat(parts, 1) for parts in grads)
    dk, dv = (x.unflatten(0, (-1, groups)).sum(1) for x in (dk, dv))
    return tuple(x.transpose(0, 1).to(query.dtype).contiguous() for x in (dq, dk, dv))


def install() -> None:
    """From now on this process has the kernel; `calls` begins anew."""
    varlen._varlen_attn.register_kernel("cpu", forward)
    varlen._varlen_attn_backward.register_kernel("cpu", backward)
    calls.clear()
