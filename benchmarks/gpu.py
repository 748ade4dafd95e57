"""Ten minutes on a real GPU: every kind on CUDA beside the CPU, a kill and a resume, then the figures that need a card.

    python benchmarks/gpu.py                         # or `make test-gpu`; writes gpu.json, prints one table
    python benchmarks/gpu.py --only kinds pretrain   # these parts
    python benchmarks/gpu.py --tiny                  # everything in miniature, on a CPU too: proves that the script
    runs

It needs nothing but the installed project: models are random ones of public shapes, texts are random words. Each part
is a process of its own with a time box; what fails or runs out of time is a row that says so, and the next part begins.

    kinds      all trained kinds in bf16 on CUDA against the CPU in float32: losses, relative difference
    resume     killed in mid-training on CUDA, resumed: largest difference of the weights to an uninterrupted run
    talk       sample and chat on CUDA
    fast       what is chosen on a GPU (docs/gpus.md) against the way of a CPU: gradients, tokens, seconds
    pretrain   GPT-2 124M: tokens/s and MFU (goal 45 %; llm.c reports 40.6 % on an H100, Karpathy 2024)
    sft        rows of uneven lengths, packed: useful tokens/s against TRL's packing and padding in the same process
    reward     rankings of 4: pairs/s against TRL's RewardTrainer on all pairs
    ppo        updates of a 135 M policy: seconds, share of generation (goal at most 40 %)
    qlora      a 7B-shaped random model in 4 bits: tokens/s
    plan       peak memory of the parts above against `plan`
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BOXES = {  # seconds that a part may take on an H100-class card
    "kinds": 110,
    "resume": 60,
    "talk": 40,
    "fast": 60,
    "pretrain": 75,
    "sft": 60,
    "reward": 50,
    "ppo": 100,
    "qlora": 95,
}
GPT2 = {"model_type": "gpt2", "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
SMOL = {  # the shape of SmolLM2-135M
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
SEVEN = {  # the shape of Llama-2-7B
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
SMALL = {  # every kind in miniature, head size 16
    "gpt2": {**GPT2, "n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 128},
    "bert": {
        "model_type": "bert",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 128,
    },
    "t5": {
        "model_type": "t5",
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0,
    },
}
PEAKS = (("H200", 989e12), ("H100", 989e12), ("A100", 312e12), ("L40S", 362e12), ("4090", 165e12), ("B200", 2250e12))
LORA = {"use_peft": True, "lora_target_modules": ["all-linear"]}
WORDS = ["".join(random.Random(i).choices("abcdefghijklmno", k=4)) for i in range(400)]


def text(draw: random.Random, words: int) -> str:
    """Random words: nothing is learned from them but their frequencies."""
    return " ".join(draw.choices(WORDS, k=words))


def write(folder: Path, tiny: bool) -> dict[str, str]:
    """The data of all parts as JSON lines; returns their paths by name."""
    draw, few = random.Random(0), 1 if tiny else 8
    rows: dict[str, list[dict]] = {
        "corpus": [{"text": text(draw, 200)} for _ in range(60 if tiny else 40_000)],
        "texts": [{"text": text(draw, 40)} for _ in range(120 * few)],
        "answers": [{"prompt": text(draw, 8), "completion": text(draw, draw.randint(4, 30))} for _ in range(96 * few)],
        "uneven": [
            {"prompt": text(draw, 8), "completion": text(draw, max(4, min(220, round(draw.lognormvariate(4, 0.8)))))}
            for _ in range(64 if tiny else 8000)
        ],
        "rankings": [
            {
                "prompt": text(draw, 20),
                "completions": [text(draw, 20) for _ in range(4)],
                "ranks": [1, 2, 3, 4],
                "tags": [["rude"], [], [], []],
            }
            for _ in range(48 if tiny else 2000)
        ],
        "prompts": [{"prompt": text(draw, 12)} for _ in range(64 if tiny else 2000)],
        "labels": [{"text": text(draw, 20), "label": i % 3} for i in range(96 * few)],
        "pairs": [{"source": (t := text(draw, 8)), "target": t} for _ in range(96 * few)],
    }
    paths = {}
    for name, some in rows.items():
        paths[name] = str(folder / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return paths


def recipe(folder: Path, name: str, stages: dict) -> Path:
    """A recipe file of these stages (JSON is YAML)."""
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"output_dir": str(folder / name), "seed": 1, "stages": stages}), encoding="utf-8")
    return path


def run(path: Path, *words: str, cuda: bool = True, box: float = 600) -> str:
    """Run a recipe in a process of its own, as a user would; returns what it printed, raises with its end on
    failure.
    """
    env = os.environ | ({} if cuda else {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"})
    command = [sys.executable, "-m", "pipelines", str(path), *words]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=box)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])}: exit code {done.returncode}: {done.stderr[-1500:]}")
    return done.stdout + done.stderr


def finished(path: Path, stage: str) -> dict:
    """stage.json of a finished stage."""
    folder = json.loads(path.read_text())["output_dir"]
    return json.loads((Path(folder) / stage / "stage.json").read_text())


def all_kinds(data: dict[str, str]) -> dict:
    """A recipe of every trained kind, LoRA, a shared critic, none, tags and pretraining text among them."""
    args = {"global_batch_size": 8, "learning_rate": 1e-3, "max_steps": 4, "logging_steps": 1, "report_to": []}
    valid = lambda name: {"train": data[name], "validation": 0.2}  # noqa: E731
    ppo = {**args, "response_length": 16, "temperature": 1.0, "max_steps": 2}
    return {
        "base": {
            "kind": "pretrain",
            "model": {"config": SMALL["gpt2"]},
            "tokenizer": {"train": "bpe", "vocab_size": 600},
            "data": valid("texts"),
            "args": {**args, "max_length": 64},
        },
        "sft": {
            "kind": "sft",
            "model": {"model_name_or_path": "stage:base", "chat_template": "chatml"},
            "data": valid("answers"),
            "args": {**args, "packing": True, "max_length": 128, "global_batch_size": 2},
        },
        "lora": {
            "kind": "sft",
            "model": {"model_name_or_path": "stage:sft", **LORA},
            "data": valid("answers"),
            "args": {**args, "max_length": 128},
        },
        "reward": {
            "kind": "reward",
            "model": {"model_name_or_path": "stage:sft"},
            "data": valid("rankings"),
            "args": {**args, "tags": ["rude"]},
        },
        "policy": {
            "kind": "ppo",
            "model": {"model_name_or_path": "stage:sft"},
            "reward": {"models": ["stage:reward"], "min_accuracy": 0},
            "data": {**valid("prompts"), "ptx": data["texts"]},
            "args": {**ppo, "ptx_coef": 0.5},
        },
        "shared": {
            "kind": "ppo",
            "model": {"model_name_or_path": "stage:sft", **LORA},
            "reward": {"models": ["stage:reward"], "critic": "shared", "min_accuracy": 0},
            "data": valid("prompts"),
            "args": ppo,
        },
        "group": {
            "kind": "ppo",
            "model": {"model_name_or_path": "stage:sft"},
            "reward": {"models": ["stage:reward"], "min_accuracy": 0},
            "data": valid("prompts"),
            "args": {**ppo, "advantage": "grpo", "num_generations": 4},
        },
        "preferred": {
            "kind": "dpo",
            "model": {"model_name_or_path": "stage:sft"},
            "data": valid("rankings"),
            "args": {**args, "ranking_loss": "plackett_luce"},
        },
        "desired": {
            "kind": "kto",
            "model": {"model_name_or_path": "stage:sft", **LORA},
            "data": valid("rankings"),
            "args": args,
        },
        "encoder": {
            "kind": "mlm",
            "model": {"config": SMALL["bert"]},
            "tokenizer": {"train": "wordpiece", "vocab_size": 400},
            "data": valid("texts"),
            "args": {**args, "max_length": 64},
        },
        "labels": {
            "kind": "classify",
            "model": {"model_name_or_path": "stage:encoder"},
            "data": valid("labels"),
            "args": args,
        },
        "copy": {
            "kind": "seq2seq",
            "model": {"config": SMALL["t5"]},
            "tokenizer": {"train": "bpe", "vocab_size": 600},
            "data": valid("pairs"),
            "args": {**args, "predict_with_generate": False},
        },
    }


def kinds(folder: Path, data: dict, tiny: bool) -> list[dict]:
    """Every kind on the GPU in bf16 and on the CPU in float32, from the same seeds."""
    paths = {device: recipe(folder, f"kinds_{device}", all_kinds(data)) for device in ("gpu", "cpu")}
    for device, path in paths.items():
        run(path, cuda=device == "gpu")
    rows = []
    for stage in all_kinds(data):
        ours, theirs = (finished(paths[device], stage)["metrics"] for device in ("gpu", "cpu"))
        key = next((k for k in ("eval_loss", "loss", "eval_score") if k in ours), "train_loss")
        apart = abs(ours[key] - theirs[key]) / max(abs(theirs[key]), 1e-6)
        # PPO's answers differ from the first token whose probability rounds otherwise: its score is no check of bf16
        good = math.isfinite(ours[key]) and (apart < 0.03 or key == "eval_score")
        rows.append(
            {
                "what": f"{stage}: {key}, bf16 on the GPU / fp32 on the CPU",
                "value": f"{ours[key]:.4g} / {theirs[key]:.4g}",
                "good": good,
            }
        )
    return rows


def resume(folder: Path, data: dict, tiny: bool) -> list[dict]:
    """kill -9 in the middle of a training on the GPU, then the same command; against one that was left alone."""
    import torch
    from safetensors.torch import load_file

    args = {
        "global_batch_size": 8,
        "learning_rate": 1e-3,
        "max_steps": 24 if tiny else 60,
        "save_steps": 4,
        "report_to": [],
    }
    stage = {
        "kind": "pretrain",
        "model": {"config": SMALL["gpt2"]},
        "tokenizer": {"train": "bpe", "vocab_size": 600},
        "data": {"train": data["texts"]},
        "args": {**args, "max_length": 64},
    }
    whole, killed = (recipe(folder, f"resume_{name}", {"base": stage}) for name in ("whole", "killed"))
    run(whole)
    checkpoints = folder / "resume_killed" / "base" / "checkpoints"
    process = subprocess.Popen([sys.executable, "-m", "pipelines", str(killed)], cwd=ROOT, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while (
        not list(checkpoints.glob("checkpoint-*/complete*"))
        and process.poll() is None
        and time.monotonic() < began + 60
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    printed = run(killed)
    a, b = (load_file(folder / f"resume_{name}" / "base" / "model.safetensors") for name in ("whole", "killed"))
    apart = max((x.float() - b[name].float()).abs().max().item() for name, x in a.items())
    same = all(torch.equal(x, b[name]) for name, x in a.items())
    return [
        {
            "what": "killed and resumed: largest difference of a weight",
            "value": "none, bit for bit" if same else f"{apart:.2e}",
            "good": "resuming from" in printed and apart < 1e-3,
        }
    ]


def talk(folder: Path, data: dict, tiny: bool) -> list[dict]:
    """A stage answers prompts, and a person."""
    stages = {k: v for k, v in all_kinds(data).items() if k in ("base", "sft")}
    stages["answers"] = {
        "kind": "sample",
        "sample": {"models": ["stage:sft"], "completions": 4, "response_length": 32},
        "data": {"train": data["prompts"]},
    }
    path = recipe(folder, "talk", stages)
    run(path)
    began = time.monotonic()
    chat = [sys.executable, "-m", "pipelines", "chat", str(folder / "talk" / "sft")]
    said = subprocess.run(chat, cwd=ROOT, input="hello\n", text=True, capture_output=True, timeout=120)
    metrics = finished(path, "answers")["metrics"]
    return [
        {"what": "sample: prompts with answers", "value": metrics["rows"], "good": metrics["rows"] > 0},
        {"what": "chat answers (seconds)", "value": round(time.monotonic() - began, 1), "good": said.returncode == 0},
    ]


def child(part: str, settings: dict, box: float) -> dict:
    """Run `inside(part, settings)` in a process of its own, in which the peak memory of the GPU is that part's
    alone.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--inside", part, json.dumps(settings)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=box)
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if done.returncode or not found:
        raise RuntimeError(f"{part}: exit code {done.returncode}: {done.stderr[-1500:]}")
    return json.loads(found[-1].removeprefix("FOUND "))


def stage_figures(path: str, stage: str) -> dict:
    """Run one stage of a recipe in this process; seconds per step (median, the first steps left out) and peak
    memory.
    """
    import torch
    import transformers

    from pipelines.chain import chain
    from pipelines.launch import start
    from pipelines.recipe.recipe import load

    class Steps(transformers.TrainerCallback):
        """The moment at the end of every step, when its work is done."""

        moments: list[float] = []

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.moments.append(time.perf_counter())

    transformers.trainer.DEFAULT_CALLBACKS.append(Steps)
    start()
    loaded = load(path)
    chain.run(loaded, [stage])
    steps = [b - a for a, b in zip(Steps.moments, Steps.moments[1:])]
    final = json.loads((loaded[stage].folder / "stage.json").read_text())
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "step": statistics.median(steps[len(steps) // 3 :]),
        "peak": peak,
        "metrics": final["metrics"],
        "rows": final["rows"],
    }


def planned(path: Path, stage: str) -> float:
    """Bytes that `plan` predicts for the stage on this GPU."""
    from pipelines.planning.job import describe
    from pipelines.planning.planner import Planner, Setup
    from pipelines.recipe.recipe import load

    loaded = load(path)
    job = describe(loaded[stage])
    model, values = job.stage.sections["model"], job.values
    setup = Setup(
        gpu="h100",
        micro=values["per_device_train_batch_size"],
        rollout=values.get("local_rollout_forward_batch_size", 64),
        checkpointing=bool(values.get("activation_checkpointing")),
        bf16=True,
        lora=bool(model.get("use_peft")),
        quantize=bool(model.get("load_in_4bit")),
    )
    return Planner(job).memory(setup).total


def memory_row(path: Path, stage: str, peak: float) -> dict:
    """Peak memory against the plan; a plan that cannot be made is a row that says why."""
    try:
        wanted = planned(path, stage)
    except Exception as error:  # a figure, not the training: it must not end the part
        return {"what": f"plan: memory of {stage}", "value": f"no plan: {error!r:.120}", "good": False}
    value = f"{peak / 2**30:.2f} / {wanted / 2**30:.2f} GiB = {peak / wanted:.2f}"
    return {
        "what": f"plan: peak memory of {stage} / planned",
        "value": value,
        "good": not peak or 0.7 < peak / wanted < 1.3,
    }


def peak_flops() -> float | None:
    """Dense bf16 FLOP/s of this card by its data sheet; None for one that is not listed."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for key, flops in PEAKS if key in name), None)


def pretrain(folder: Path, data: dict, tiny: bool) -> list[dict]:
    """GPT-2 124M on windows of 1024 tokens."""
    shape = {**GPT2, "n_positions": 1024, "vocab_size": 50304}
    shape |= {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 1024} if tiny else {}
    length, rows = (64, 2) if tiny else (1024, 32)
    args = {
        "max_length": length,
        "global_batch_size": rows,
        "per_device_train_batch_size": rows,
        "learning_rate": 1e-4,
        "max_steps": 6 if tiny else 40,
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 1000,
    }
    stage = {
        "kind": "pretrain",
        "model": {"config": shape},
        "tokenizer": {"train": "bpe", "vocab_size": 1024},
        "data": {"train": data["corpus"]},
        "args": args,
    }
    path = recipe(folder, "pretrain", {"base": stage})
    found = child("stage", {"path": str(path), "stage": "base"}, 300)
    tokens = length * rows / found["step"]
    layers, width = shape.get("n_layer", 12), shape.get("n_embd", 768)
    work = (
        6 * found["metrics"]["parameters"] + 6 * layers * width * length
    )  # causal attention, Hoffmann 2022 appendix F
    peak = peak_flops()
    mfu = f"{work * tokens / peak:.1%} of {peak / 1e12:.0f} TFLOP/s" if peak else "no peak known for this device"
    return [
        {"what": "pretrain: tokens/s", "value": f"{tokens:,.0f}", "good": True},
        {
            "what": "pretrain: MFU (goal 45 %, llm.c 40.6 %)",
            "value": mfu,
            "good": bool(peak and work * tokens / peak >= 0.406),
        },
        memory_row(path, "base", found["peak"]),
    ]


def tokenizer_and_rows(data: dict, name: str):
    """A tokenizer trained on the words, and the rows of a file."""
    from pipelines.data.train_tokenizer import train_bpe

    rows = [json.loads(line) for line in Path(data[name]).read_text().splitlines()]
    return train_bpe([" ".join(WORDS)] * 20, vocab_size=1024), rows


def timed(step, batches: list, device) -> float:
    """Median seconds of `step(batch)` over the batches but the first three."""
    import torch

    seconds = []
    for batch in batches:
        began = time.perf_counter()
        step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[min(3, len(seconds) - 1) :])


def inside_sft(data: dict, tiny: bool) -> dict:
    """Useful tokens/s of the sft stage's batches, and of TRL's collators and loss, on the same rows and model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pipelines.speed import fast_model, packed_attention
    from pipelines.speed.packing import PackedCollator, plan_packs

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, rows = tokenizer_and_rows(data, "uneven")
    ids = [tokenizer(row["prompt"] + " " + row["completion"])["input_ids"][:1000] for row in rows]
    shape = SMALL["gpt2"] | {"n_positions": 1024} if tiny else SMOL
    config = AutoConfig.for_model(**shape, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
    steps, found = 6 if tiny else 24, {}
    for name in ("ours", "TRL padded"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
        if name == "ours":
            fast_model.fast_model(model)
            packed_attention.enable_packed_attention(model)
            packs = plan_packs([len(row) for row in ids], 1024)
            batches = [
                PackedCollator()([{"input_ids": ids[i]} for pack in packs[k : k + 8] for i in pack])
                for k in range(0, max(1, len(packs) - 7), 8)
            ]
            useful = lambda batch: batch["input_ids"].numel()  # noqa: E731
        else:
            from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

            collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
            batches = [
                collate([{"input_ids": row} for row in ids[k : k + 32]]) for k in range(0, max(1, len(ids) - 31), 32)
            ]
            useful = lambda batch: int(batch["attention_mask"].sum())  # noqa: E731
        batches = (batches * steps)[:steps]

        def step(batch, model=model, optimizer=optimizer):
            moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            with torch.autocast(device.type, torch.bfloat16):
                model(**moved, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds = timed(step, batches, device)
        found[name] = statistics.median(useful(batch) for batch in batches) / seconds
        del model, optimizer
    return found


def sft(folder: Path, data: dict, tiny: bool) -> list[dict]:
    """Packed against padded on rows of uneven lengths."""
    found = child("sft", {"data": data, "tiny": tiny}, 300)
    ratio = found["ours"] / found["TRL padded"]
    value = f"{found['ours']:,.0f} / {found['TRL padded']:,.0f} = {ratio:.2f}"
    return [{"what": "sft: useful tokens/s, ours / TRL's padded batches", "value": value, "good": ratio > 1.5}]


def inside_reward(data: dict, tiny: bool) -> dict:
    """Pairs/s of rankings whose answers are encoded once, and of TRL's loss over all their pairs."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from pipelines.speed import fast_model, packed_attention
    from pipelines.training.rankings import RankingCollator, ranking_loss

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, rows = tokenizer_and_rows(data, "rankings")
    features = [
        {"ids": [tokenizer(row["prompt"] + " " + c)["input_ids"] for c in row["completions"]], "ranks": row["ranks"]}
        for row in rows
    ]
    shape = SMALL["gpt2"] if tiny else SMOL
    config = AutoConfig.for_model(**shape, vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id)
    steps, found, size = 6 if tiny else 24, {}, 8 if tiny else 32
    batches = [features[k : k + size] for k in range(0, len(features) - size + 1, size)]
    batches = (batches * steps)[:steps]
    collate = RankingCollator(tokenizer.pad_token_id, packed=True)
    for name in ("ours", "TRL pairs"):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
        if name == "ours":
            fast_model.fast_gelu(model)
            collate.share = packed_attention.enable_packed_scores(model)

        def loss_of(batch, name=name, model=model, collate=collate):
            if name == "ours":
                made = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in collate(batch).items()}
                wanted = {k: made.pop(k) for k in ("better", "worse", "weight", "margin", "tags")}
                scores = model(**made, use_cache=False).logits[:, 0]
                return ranking_loss(scores[wanted["better"]], scores[wanted["worse"]], wanted["weight"])
            pairs = [(f["ids"][i], f["ids"][j]) for f in batch for i in range(4) for j in range(i + 1, 4)]
            both = tokenizer.pad({"input_ids": [a for a, _ in pairs] + [b for _, b in pairs]}, return_tensors="pt").to(
                device
            )
            chosen, rejected = model(**both, use_cache=False).logits[:, 0].chunk(2)
            return -torch.nn.functional.logsigmoid(chosen - rejected).mean()  # as trl.RewardTrainer's

        def step(batch, model=model, optimizer=optimizer, loss_of=loss_of):
            with torch.autocast(device.type, torch.bfloat16):
                loss = loss_of(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        found[name] = 6 * size / timed(step, batches, device)
        del model, optimizer
    return found


def reward(folder: Path, data: dict, tiny: bool) -> list[dict]:
    """Rankings of 4 answers: six pairs each."""
    found = child("reward", {"data": data, "tiny": tiny}, 300)
    ratio = found["ours"] / found["TRL pairs"]
    value = f"{found['ours']:,.0f} / {found['TRL pairs']:,.0f} = {ratio:.2f}"
    return [{"what": "reward: pairs/s, ours / all pairs padded as TRL", "value": value, "good": ratio > 2}]


def inside_fast(tiny: bool) -> dict:
    """What is chosen on a GPU beside the way of a CPU: packed attention, and decoding with CUDA graphs."""
    import copy

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pipelines.generation.decode import generate
    from pipelines.speed import fast_model, packed_attention, varlen
    from pipelines.speed.packing import pack

    device, draw, found = torch.device("cuda" if torch.cuda.is_available() else "cpu"), random.Random(0), {}
    shape = SMALL["gpt2"] | {"n_positions": 1024} if tiny else SMOL
    config = AutoConfig.for_model(**shape, vocab_size=1000, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(device)
    packed_attention.enable_packed_attention(model)
    fast_model.fast_model(model)
    lengths = [draw.randint(3, 200 if tiny else 700) for _ in range(8 if tiny else 24)]
    batch = pack([[draw.randrange(1, 1000) for _ in range(n)] for n in lengths])
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    found["reason"] = varlen.why_not(device, torch.bfloat16)
    norms = {}
    for way in ("varlen", ""):
        os.environ["PIPELINES_GPU_OFF"] = way

        def step(_, model=model):
            with torch.autocast(device.type, torch.bfloat16):
                model(**batch, use_cache=False).loss.backward()

        model.zero_grad()
        step(None)
        norms[way] = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
        found["blocks" if way else "kernel"] = timed(step, [None] * (4 if tiny else 12), device)
    found["apart"] = max(
        ((a - b).norm() / b.norm()).item() for a, b in zip(norms[""].values(), norms["varlen"].values())
    )
    prompts = [[draw.randrange(1, 1000) for _ in range(draw.randint(3, 30))] for _ in range(4 if tiny else 64)]
    how = {"max_new_tokens": 12 if tiny else 200, "eos_token_ids": [0], "seeds": list(range(len(prompts)))}
    answers, model = {}, copy.deepcopy(model).eval()
    for way in ("graphs,bf16_decoding", "graphs", ""):
        os.environ["PIPELINES_GPU_OFF"] = way

        def decode(_, way=way):
            with torch.autocast(device.type, torch.bfloat16):
                answers[way] = generate(model, prompts, **how)

        found[way or "all"] = timed(decode, [None] * 3, device)
    plain, ours = answers["graphs,bf16_decoding"], answers[""]
    found["cast"] = answers["graphs"][0] == plain[0]
    found["same"] = statistics.mean(a[:8] == b[:8] for a, b in zip(plain[0], ours[0], strict=True))
    found["not recorded"] = vars(model).get("not_recorded", "")
    return found


def fast(folder: Path, data: dict, tiny: bool) -> list[dict]:
    """The choices of docs/gpus.md: right beside the way of a CPU, and faster."""
    found = child("fast", {"tiny": tiny}, 200)
    speed = found["blocks"] / found["kernel"]
    decoding = found["graphs,bf16_decoding"] / found["all"]
    on_card = card()["device"] != "cpu"
    return [
        {
            "what": "packed attention: largest difference of a gradient, varlen_attn / blocks",
            "value": f"{found['apart']:.1%}" + (f" (blocks: {found['reason']})" if found["reason"] else ""),
            "good": found["apart"] < 0.05 and not (on_card and found["reason"]),
        },
        {"what": "packed step: blocks / varlen_attn", "value": f"{speed:.2f}", "good": speed > 0.9},
        {
            "what": "decoding: answers whose first 8 tokens are the same with graphs and without",
            "value": f"{found['same']:.0%} {found['not recorded']}".strip(),
            "good": found["same"] > 0.8 and found["cast"] and not found["not recorded"],
        },
        {"what": "decoding: operator by operator / graphs", "value": f"{decoding:.2f}", "good": decoding > 0.9},
    ]


def random_model(folder: Path, shape: dict, tokenizer, half: bool = False) -> str:
    """A folder with a random model of this shape and the tokenizer beside it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{"vocab_size": len(tokenizer), **shape})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if half else torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def inside_make(folder: str, shape: dict, half: bool, data: dict) -> dict:
    """Make a random model in a process of its own: its memory is not that of the part."""
    tokenizer, _ = tokenizer_and_rows(data, "answers")
    return {"path": random_model(Path(folder), shape, tokenizer, half)}


def ppo(folder: Path, data: dict, tiny: bool) -> list[dict]:
    """Updates of a 135 M policy, critic and reference of the same size, rewarded by a function."""
    shape = SMALL["gpt2"] if tiny else SMOL
    base = child("make", {"folder": str(folder / "smol"), "shape": shape, "half": False, "data": data}, 120)["path"]
    answers, length = (8, 16) if tiny else (128, 128)
    args = {
        "global_batch_size": answers,
        "per_device_train_batch_size": 8 if tiny else 32,
        "max_steps": 3 if tiny else 6,
        "response_length": length,
        "learning_rate": 1e-6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "temperature": 1.0,
        "local_rollout_forward_batch_size": answers,
    }
    stage = {
        "kind": "ppo",
        "model": {"model_name_or_path": base, "chat_template": "plain"},
        "reward": {"functions": ["pipelines.ppo.rewards:length_penalty"]},
        "data": {"train": data["prompts"]},
        "args": args,
    }
    path = recipe(folder, "ppo", {"policy": stage})
    found = child("stage", {"path": str(path), "stage": "policy"}, 400)
    history = [json.loads(line) for line in (folder / "ppo" / "policy" / "history.jsonl").read_text().splitlines()]
    phases = [{k: v for k, v in e.items() if k.startswith("seconds/")} for e in history if "seconds/generate" in e][1:]
    share = statistics.median(p["seconds/generate"] / sum(p.values()) for p in phases)
    return [
        {
            "what": f"ppo: seconds an update of {answers} answers of {length} tokens",
            "value": f"{found['step']:.2f}",
            "good": True,
        },
        {"what": "ppo: share of generation (goal at most 40 %)", "value": f"{share:.0%}", "good": share <= 0.4},
        memory_row(path, "policy", found["peak"]),
    ]


def qlora(folder: Path, data: dict, tiny: bool) -> list[dict]:
    """LoRA on a 7B-shaped random model in 4 bits, packed rows of 2048 tokens."""
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        return [
            {"what": "qlora", "value": "bitsandbytes is not installed: pip install '.[quantization]'", "good": False}
        ]
    shape = (
        {
            **SMOL,
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        }
        if tiny
        else SEVEN
    )
    base = child("make", {"folder": str(folder / "seven"), "shape": shape, "half": True, "data": data}, 200)["path"]
    length = 128 if tiny else 2048
    args = {
        "max_length": length,
        "packing": True,
        "global_batch_size": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 5 if tiny else 10,
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "report_to": [],
        "activation_checkpointing": True,
    }
    stage = {
        "kind": "sft",
        "model": {"model_name_or_path": base, "chat_template": "plain", "load_in_4bit": True, **LORA},
        "data": {"train": data["uneven"]},
        "args": args,
    }
    path = recipe(folder, "qlora", {"adapter": stage})
    found = child("stage", {"path": str(path), "stage": "adapter"}, 400)
    rows = [
        {"what": "qlora: tokens/s, 7B shape, 4 bits", "value": f"{2 * length / found['step']:,.0f}", "good": True},
        memory_row(path, "adapter", found["peak"]),
    ]
    return rows


def card() -> dict:
    """The device, its driver and the versions of the libraries."""
    import torch

    from pipelines.chain.record import versions

    there = torch.cuda.is_available()
    found = {
        "device": torch.cuda.get_device_name() if there else "cpu",
        "memory": torch.cuda.get_device_properties(0).total_memory if there else 0,
    }
    if there:
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(ask, capture_output=True, text=True).stdout.strip().splitlines()[0]
    return {**found, "cuda": torch.version.cuda, "versions": versions(), "date": time.strftime("%Y-%m-%d")}


PARTS = {f.__name__: f for f in (kinds, resume, talk, fast, pretrain, sft, reward, ppo, qlora)}
INSIDE = {"stage": stage_figures, "fast": inside_fast, "sft": inside_sft, "reward": inside_reward, "make": inside_make}


def main() -> int:
    """The command line; returns 1 where a part failed or missed its mark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts")
    parser.add_argument("--tiny", action="store_true", help="in miniature, on a CPU too: only that the script runs")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)  # name, folder, "tiny" or "full"
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        print("FOUND", json.dumps(INSIDE[args.inside[0]](**json.loads(args.inside[1]))), flush=True)
        return 0
    if args.part:
        name, folder, size = args.part
        data = json.loads((Path(folder) / "data.json").read_text())
        print("FOUND", json.dumps(PARTS[name](Path(folder), data, size == "tiny")), flush=True)
        return 0
    about, rows = card(), []
    if about["device"] == "cpu" and not args.tiny:
        parser.error("no GPU here; --tiny runs everything in miniature on the CPU")
    try:
        args.out.write_text("{}")  # before the minutes on a card
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "data.json").write_text(json.dumps(write(folder, args.tiny)))
        for name in args.only or PARTS:
            began, me = time.monotonic(), [sys.executable, str(Path(__file__).resolve())]
            command = [*me, "--part", name, str(folder), "tiny" if args.tiny else "full"]
            box = BOXES[name] * (10 if args.tiny else 1)
            try:
                process = subprocess.Popen(
                    command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
                )
                out, err = process.communicate(timeout=box)
                found = [line for line in out.splitlines() if line.startswith("FOUND ")]
                if process.returncode or not found:
                    raise RuntimeError(err.strip()[-1500:])
                part = json.loads(found[-1].removeprefix("FOUND "))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                part = [{"what": name, "value": f"not done in its {box} s", "good": False}]
            except RuntimeError as error:
                last = (str(error).strip() or "no output").splitlines()[-1]
                part = [{"what": name, "value": f"failed: {last[:160]}", "detail": str(error), "good": False}]
            for row in part:
                print(f"{'  ok ' if row['good'] else '  -- '} {row['what']:<66} {row['value']}", flush=True)
            rows += [{"part": name, "seconds": round(time.monotonic() - began, 1), **row} for row in part]
            args.out.write_text(json.dumps({**about, "tiny": args.tiny, "rows": rows}, indent=1))
    print(f"{sum(row['good'] for row in rows)} of {len(rows)} good; {about['device']}; written to {args.out}")
    return 0 if all(row["good"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
