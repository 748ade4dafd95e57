"""The tables of docs/planning.md: memory, traffic and time as the model and the world grow, from `plan`'s formulae.

    python benchmarks/scaling.py

Four shapes stand for all: GPT-2 124M, and Llama's at 1.2 B, 8 B and 70 B. Nothing here was run on GPUs.
"""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace

from pipelines.kinds import KINDS
from pipelines.planning import costs, devices
from pipelines.planning.job import Job, Model
from pipelines.planning.planner import Planner, Setup

LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
SHAPES = {
    "GPT-2 124M": {"model_type": "gpt2", "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "n_positions": 8192},
    "Llama 1.2B": {
        **LLAMA,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
    "Llama 8B": {
        **LLAMA,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 14336,
    },
    "Llama 70B": {
        **LLAMA,
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "intermediate_size": 28672,
    },
}
GPU, LENGTH, ANSWER, BATCH = "h100", 2048, 512, 512
WORLDS = (1, 8, 64, 512)
STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")


@lru_cache(None)
def planner(shape: str, kind: str) -> Planner:
    """A stage on rows of `LENGTH` tokens; an update of PPO has `BATCH` answers, `ANSWER` of those tokens long."""
    import transformers

    config = transformers.AutoConfig.for_model(**SHAPES[shape])
    scorer = transformers.AutoConfig.for_model(**SHAPES[shape], num_labels=1)
    models = {
        "model": Model(scorer, KINDS[kind].auto_class) if kind == "reward" else Model(config, "AutoModelForCausalLM")
    }
    if kind == "ppo":
        models |= {name: Model(scorer, KINDS["reward"].auto_class) for name in ("critic", "reward 0")}
    answer = ANSWER if kind == "ppo" else 0
    values = {"num_train_epochs": 1, "packing": True} | ({"global_batch_size": BATCH} if answer else {})
    stage = SimpleNamespace(name=kind, seed=0, sections={})
    prompt = LENGTH - answer
    return Planner(Job(stage, kind, values, models, 10**6, [prompt], prompt, target=answer, layout="packed"))


def setup(strategy: str, world: int, **changes) -> Setup:
    """One row of `LENGTH` tokens at once on each of `world` GPUs, bf16, checkpointing."""
    strategy = "single" if strategy == "ddp" and world == 1 else strategy
    values = {"gpu": GPU, "strategy": strategy, "world": world, "micro": 1, "checkpointing": True, "bf16": True}
    return Setup(**(values | changes))


def table(head: list[str], rows: list[list[str]]) -> None:
    """A Markdown table."""
    for cells in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(cells) + " |")
    print()


def gigabytes(size: float) -> str:
    """As "12.3", in bold where one device of the kind cannot hold it."""
    text = f"{size / 1e9:.1f}" if size < 1e11 else f"{size / 1e9:.0f}"
    return text if size <= devices.DEVICES[GPU].memory else f"**{text}**"


def memory(kind: str) -> None:
    """GB per device, by shape and launcher down and world across."""
    print(f"### Memory of `{kind}`, GB a device ({LENGTH} tokens a device at once, bf16, checkpointing)\n")
    rows = []
    for shape in SHAPES:
        planned = planner(shape, kind)
        for strategy in STRATEGIES:
            cells = [gigabytes(planned.memory(setup(strategy, world)).total) for world in WORLDS]
            rows.append([shape, strategy, *cells])
    table(["model", "launcher", *(f"{world} GPUs" if world > 1 else "1 GPU" for world in WORLDS)], rows)


def adapters() -> None:
    """GB on one GPU: all weights, LoRA, QLoRA."""
    print(f"### One GPU: all weights, LoRA (r 16, all linear maps) and QLoRA, GB ({LENGTH} tokens, checkpointing)\n")
    rows = []
    for shape in SHAPES:
        for kind in ("sft", "reward", "ppo"):
            planned = planner(shape, kind)
            ways = ({}, {"lora": True, "size": 2}, {"lora": True, "quantize": True, "size": 2})
            rows.append([shape, kind, *(gigabytes(planned.memory(setup("ddp", 1, **way)).total) for way in ways)])
    table(["model", "stage", "all weights", "LoRA on bf16 weights", "QLoRA"], rows)


def traffic() -> None:
    """GB sent by a device in a step, and the time of that as a share of computing."""
    print(
        f"### Traffic of `sft`: GB sent by each device in a step, and its time against computing (1 row of {LENGTH} "
        "tokens"
    )
    print(
        f"a device and step; {devices.MFU:.0%} of the peak; NVLink within 8 GPUs, {devices.NETWORK / 1e9:.0f} GB/s "
        "beyond; nothing overlapped)\n"
    )
    rows = []
    for shape in SHAPES:
        for strategy in STRATEGIES:
            cells = []
            for world in WORLDS[1:]:
                planned = planner(shape, "sft")
                where = setup(strategy, world)
                sent, hardware = planned.traffic(where), devices.DEVICES[GPU]
                parts = planned.seconds_per_step(where, hardware.bf16 * devices.MFU, hardware.bandwidth)
                cells.append(f"{sent / 1e9:.1f} GB, {parts['traffic'] / parts['compute']:.2f}x")
            rows.append([shape, strategy, *cells])
    table(["model", "launcher", *(f"{world} GPUs" for world in WORLDS[1:])], rows)


def enough() -> None:
    """Tokens a device and step at which traffic takes a tenth of the computing: beyond, nothing need be overlapped."""
    print("### Tokens that a device must compute in a step before traffic is a tenth of it, across machines\n")
    rows, hardware = [], devices.DEVICES[GPU]
    for shape in SHAPES:
        planned = planner(shape, "sft")
        a, cells = planned.anatomy("model"), []
        for strategy in STRATEGIES:
            seconds = planned.traffic(setup(strategy, 64)) / devices.NETWORK
            forward = costs.forward_flops(1, a.products, a.layers, a.attention, LENGTH / 2)
            each = costs.train_flops(forward, checkpointing=True) / (hardware.bf16 * devices.MFU)
            cells.append(f"{seconds / (0.1 * each):,.0f}")
        rows.append([shape, *cells])
    table(["model", *STRATEGIES], rows)


def rollouts() -> None:
    """Where the time of a PPO update goes on one machine."""
    print(f"### One PPO update on 8 GPUs: 512 answers of {ANSWER} tokens, 4 epochs, ZeRO-3; seconds if all fits\n")
    rows, hardware = [], devices.DEVICES[GPU]
    for shape in SHAPES:
        planned = planner(shape, "ppo")
        where = setup("zero3", 8)
        parts = planned.seconds_per_step(where, hardware.bf16 * devices.MFU, hardware.bandwidth)
        total = sum(parts.values())
        rows.append(
            [shape, *(f"{parts[name]:.1f} ({parts[name] / total:.0%})" for name in ("decode", "compute", "traffic"))]
        )
    table(["model", "decoding", "scoring and training", "traffic"], rows)


def main() -> int:
    """Print all tables."""
    for kind in ("sft", "reward", "ppo"):
        memory(kind)
    adapters()
    traffic()
    enough()
    rollouts()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
