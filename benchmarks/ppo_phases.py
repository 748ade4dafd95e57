"""PPO phase by phase: decoding, scoring and updating against their floors, and decoding against HF's generate.

    python benchmarks/ppo_phases.py                                   # 32 answers that end at about 24 of 64 tokens
    python benchmarks/ppo_phases.py --lengths full --prompts 64 --precision bf16

The floor of decoding is a bare loop: GPT-2 written out here on the policy's own weights, keys and values in place,
one inverse-CDF draw per token, ended rows dropped. The floors of scoring and updating are the bare forwards, and the
forwards and backwards with optimizer steps, of the same packed tokens, head and cross-entropy on answer tokens only,
by plain PyTorch. All in one process, in turn; reported are mean CPU seconds of one update's share.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from ppo_speed import EPOCHS, RESPONSE, our_trainer
from pretrain_speed import ROOT, environment, machine

from pipelines.generation.decode import inverse_cdf, left_padded
from pipelines.generation.logprobs import collate, states_of


def bare_decode(model, prompts: list[list[int]], uniforms, end: int):
    """Tokens (b, RESPONSE) sampled after left-padded prompts: GPT-2's equations and nothing else."""
    import torch
    from torch.nn import functional as F

    trunk, heads = model.transformer, model.config.n_head
    ids, seen = left_padded(prompts, "cpu")
    position = seen.cumsum(1).sub(1).clamp(min=0)
    seen = torch.cat([seen, seen.new_ones(len(ids), RESPONSE)], 1).bool()
    shape = len(ids), heads, seen.shape[1], model.config.n_embd // heads
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    caches = [(torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)) for _ in trunk.h]
    rows, used, tokens = torch.arange(len(ids)), 0, torch.full((len(ids), RESPONSE), end)
    norm = lambda x, layer: F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)
    product = lambda x, layer: torch.addmm(layer.bias, x.flatten(0, 1), layer.weight).view(*x.shape[:2], -1)
    for step in range(RESPONSE):
        b, n = ids.shape
        x, end_of = trunk.wte.weight[ids] + trunk.wpe.weight[position], used + n
        mask = seen[:, None, None, :end_of]
        if n > 1:
            mask = mask & torch.ones(n, n, dtype=torch.bool).tril()
        for block, (keys, values) in zip(trunk.h, caches, strict=True):
            q, k, v = product(norm(x, block.ln_1), block.attn.c_attn).view(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
            keys[:, :, used:end_of], values[:, :, used:end_of] = k, v
            y = F.scaled_dot_product_attention(q, keys[:, :, :end_of], values[:, :, :end_of], mask)
            x = x + product(y.transpose(1, 2).reshape(b, n, -1), block.attn.c_proj)
            h = F.gelu(product(norm(x, block.ln_2), block.mlp.c_fc), approximate="tanh")
            x = x + product(h, block.mlp.c_proj)
        used = end_of
        probabilities = torch.softmax((norm(x[:, -1], trunk.ln_f) @ trunk.wte.weight.T).float(), -1)
        chosen = inverse_cdf(probabilities, uniforms[rows, step])
        tokens[rows, step] = chosen
        left = (chosen != end).nonzero()[:, 0]
        if not len(left):
            break
        ids, position = chosen[:, None], position[:, -1:] + 1
        if len(left) * 4 <= b * 3:
            ids, position, seen, rows = ids[left], position[left], seen[left], rows[left]
            caches = [(keys[left], values[left]) for keys, values in caches]
    return tokens


def bare_scoring(trainer, batch: dict, autocast) -> None:
    """Critic, reference with its head, reward model: one forward each."""
    import torch
    from torch.nn import functional as F

    with torch.no_grad(), autocast():
        trainer.critic.score(states_of(trainer.critic, batch))
        F.cross_entropy(states_of(trainer.ref_model, batch) @ trainer.ref_model.lm_head.weight.T, batch["labels"])
        trainer.rollout_maker.scorer.functions[0].score(states_of(trainer.rollout_maker.scorer.functions[0], batch))


def bare_update(trainer, batch: dict, autocast) -> None:
    """As many forwards, backwards and steps of policy and critic as an update has."""
    from torch.nn import functional as F

    for _ in range(EPOCHS):
        with autocast():
            logits = states_of(trainer.policy, batch) @ trainer.policy.lm_head.weight.T
            loss = F.cross_entropy(logits, batch["labels"])
            loss = loss + trainer.critic.score(states_of(trainer.critic, batch)).square().mean()
        loss.backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()


def measure(args, folder: str) -> None:
    import numpy as np
    import torch
    from transformers import GenerationConfig

    from pipelines.generation import decode as decoding

    trainer = our_trainer(args.precision, args.vocabulary, args.lengths, args.prompts, folder)
    trainer._set_up(None)
    policy, end, generate = trainer.policy, trainer.rollout_maker.eos_token_ids[0], decoding.generate
    autocast = trainer.accelerator.autocast
    spent, tokens, same = {}, {}, []

    def timed(name, function, count=None):
        began = time.process_time()
        out = function()
        spent.setdefault(name, []).append(time.process_time() - began)
        if count is not None:
            tokens.setdefault(name, []).append(count(out))
        return out

    def hf_generate(batch):
        config = GenerationConfig(
            max_new_tokens=RESPONSE, do_sample=True, top_k=0, top_p=1.0, eos_token_id=end, pad_token_id=end + 1
        )
        width = max(map(len, batch))
        ids = torch.tensor([[end + 1] * (width - len(p)) + p for p in batch])
        with torch.no_grad(), autocast():
            out = policy.generate(input_ids=ids, attention_mask=(ids != end + 1).long(), generation_config=config)
        return out[:, width:]

    for turn in range(args.steps + 1):
        if turn == 1:  # the first was to warm up
            spent.clear(), tokens.clear()
        rows = [trainer._row_of(turn * args.prompts + i) for i in range(args.prompts)]
        seeds = [(0, turn, i) for i in range(args.prompts)]
        batch = [trainer.train_prompts[row] for row in rows]

        def decode(batch=batch, seeds=seeds):
            with torch.no_grad(), autocast():
                how = dict(
                    max_new_tokens=RESPONSE, eos_token_ids=trainer.rollout_maker.eos_token_ids, batch_size=args.prompts
                )
                return generate(policy, batch, seeds=seeds, **how)

        def bare(batch=batch, seeds=seeds):
            uniforms = np.stack([np.random.default_rng(seed).random(RESPONSE, np.float32) for seed in seeds])
            with torch.no_grad(), autocast():
                return bare_decode(policy, batch, torch.from_numpy(uniforms), end)

        policy.eval()
        answers = timed("decode", decode, lambda out: sum(map(len, out[0])))
        said = timed("decode, bare", bare).tolist()
        same.append(sum(a == b[: len(a)] for a, b in zip(answers[0], said, strict=True)) / len(said))
        timed("decode, HF generate", lambda batch=batch: hf_generate(batch), lambda out: int((out != end + 1).sum()))
        decoding.generate = lambda *_, answers=answers, **__: answers
        rollouts = timed(
            "score", lambda rows=rows: trainer._rollout(trainer.train_dataset, trainer.train_prompts, rows, rows)
        )
        packed = collate(list(zip(rollouts.prompts, rollouts.responses, strict=True)), True, "cpu")
        timed("score, bare", lambda packed=packed: bare_scoring(trainer, packed, autocast))
        timed("update", lambda rollouts=rollouts: trainer._update(rollouts))
        timed("update, bare", lambda packed=packed: bare_update(trainer, packed, autocast))

    mean = {name: sum(times) / len(times) for name, times in spent.items()}
    rate = {name: sum(tokens[name]) / sum(spent[name]) for name in tokens}
    ours, floor = (sum(mean[f"{phase}{kind}"] for phase in ("decode", "score", "update")) for kind in ("", ", bare"))
    for phase in ("decode", "score", "update"):
        bare = mean[f"{phase}, bare"]
        print(f"{phase:10}{mean[phase]:8.3f} CPU s   floor {bare:8.3f}   over it {mean[phase] / bare - 1:7.1%}")
    print(f"{'together':10}{ours:8.3f} CPU s   floor {floor:8.3f}   over it {ours / floor - 1:7.1%}")
    ratio = rate["decode"] / rate["decode, HF generate"]
    print(
        f"decoding: {rate['decode']:.0f} tokens per CPU second, HF generate {rate['decode, HF generate']:.0f}: "
        f"{ratio:.2f} x; {sum(same) / len(same):.0%} of the answers are those of the bare loop"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", choices=["natural", "full"], default="natural")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if os.environ.get("PPO_PHASES") != "1":  # the allocator's settings are read when a process starts
        env = environment(True, args.threads) | {"ACCELERATE_USE_CPU": "true", "PPO_PHASES": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], env)
    sys.path.insert(0, str(ROOT))
    print(f"{args.prompts} answers, {args.lengths} lengths, vocabulary {args.vocabulary}, {args.precision}")
    print(f"{args.threads} threads, {machine()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        measure(args, str(Path(folder)))


if __name__ == "__main__":
    main()
