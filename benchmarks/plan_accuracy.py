"""What `plan` predicts beside what the stages really do on this CPU: peak memory, and with several processes their
traffic.

    python benchmarks/plan_accuracy.py [--only sft reward] [--folder work --again]

Every row is one stage run by the chain in processes of its own, in the fast environment, for a few optimizer steps,
checkpoint and saving included: random models of the usual shapes on random words. `measured` is the peak resident
memory of a process (ru_maxrss) less what it held when everything was imported and no model was there, `predicted`
what `plan` says of the same recipe without its process row; of several processes the largest is compared and the
smallest named. Several processes run in a network namespace of their own (`unshare --net`, needs root), whose loopback
then carries nothing but what they send: the bytes of a step, all processes together, beside `costs.traffic` (and for
FSDP2 and ZeRO-3 half as much more as their scattered gradients: gloo knows no reduce-scatter).
`--again` predicts anew for runs measured before. ZeRO needs DeepSpeed; FSDP2 runs on the CPU as in
tests/fsdp_on_cpu.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.chain import chain
from pipelines.commands import plan
from pipelines.data.train_tokenizer import train_bpe, train_wordpiece
from pipelines.evaluation import metrics
from pipelines.kinds import KINDS
from pipelines.launch import FAST, SWITCH, start
from pipelines.models import tokenizer_setup
from pipelines.planning import costs, setups
from pipelines.planning.job import describe
from pipelines.planning.planner import Planner, micro_batch
from pipelines.recipe.recipe import load

ROOT = Path(__file__).resolve().parents[1]
MB = 1e6
LOOPBACK = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "-")

GPT2 = {"model_type": "gpt2", "n_positions": 512, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
LLAMA = {"model_type": "llama", "max_position_embeddings": 512, "tie_word_embeddings": False}
BERT = {"model_type": "bert", "max_position_embeddings": 512}
T5 = {"model_type": "t5", "d_kv": 64}


def gpt2(layers: int, width: int, vocabulary: int) -> dict:
    """A config of GPT-2's shape."""
    return {**GPT2, "n_layer": layers, "n_embd": width, "n_head": width // 64, "vocab_size": vocabulary}


def llama(layers: int, width: int, vocabulary: int) -> dict:
    """A config of Llama's shape: gated feed-forward of 8/3 of the width, two query heads to a key head, untied."""
    return {
        **LLAMA,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 128,
        "intermediate_size": width * 8 // 3 // 64 * 64,
        "vocab_size": vocabulary,
    }


def bert(layers: int, width: int, vocabulary: int) -> dict:
    """A config of BERT's shape."""
    return {
        **BERT,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
        "vocab_size": vocabulary,
    }


def t5(layers: int, width: int, vocabulary: int) -> dict:
    """A config of T5's shape, so many layers in the encoder and in the decoder."""
    return {
        **T5,
        "num_layers": layers,
        "d_model": width,
        "num_heads": width // 64,
        "d_ff": 4 * width,
        "vocab_size": vocabulary,
    }


@dataclass
class Case:
    """One row: what is trained on how many rows at once of how many words, and by how many processes."""

    kind: str
    config: dict
    rows: int
    words: int
    args: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    world: int = 1
    launcher: str = "cpu_2"  # the file in accelerate_configs/ for several processes


LORA = {"use_peft": True}
CASES = [
    Case("pretrain", gpt2(6, 384, 8192), 8, 128),
    Case("pretrain", gpt2(8, 512, 32768), 4, 128),
    Case("pretrain", llama(8, 768, 16384), 4, 128),
    Case("pretrain", gpt2(12, 768, 50304), 2, 128),
    Case("sft", gpt2(6, 384, 8192), 16, 120),
    Case("sft", llama(8, 512, 32768), 4, 120),
    Case("sft", gpt2(8, 768, 16384), 4, 120),
    Case("sft", gpt2(12, 768, 50304), 2, 100, {"packing": True, "max_length": 256}),
    Case("reward", gpt2(6, 384, 8192), 4, 60),
    Case("reward", llama(8, 512, 32768), 2, 60),
    Case("reward", gpt2(8, 768, 16384), 2, 60),
    Case("reward", gpt2(12, 768, 50304), 1, 60),
    Case("ppo", gpt2(4, 384, 8192), 8, 40, {"response_length": 24}),
    Case("ppo", llama(6, 512, 16384), 4, 40, {"response_length": 24}),
    Case("ppo", gpt2(6, 640, 16384), 4, 40, {"response_length": 24}),
    Case("classify", bert(6, 384, 8192), 16, 60),
    Case("classify", bert(8, 512, 30522), 8, 60),
    Case("classify", bert(12, 768, 30522), 4, 60),
    Case("classify", gpt2(8, 768, 16384), 4, 60),
    Case("pretrain", gpt2(8, 512, 32768), 4, 128, world=2),
    Case("reward", gpt2(8, 768, 16384), 2, 60, world=2),
    Case("mlm", bert(8, 512, 30522), 8, 128),
    Case("mlm", bert(12, 768, 30522), 4, 128),
    Case("seq2seq", t5(6, 512, 32128), 8, 60),
    Case("seq2seq", t5(8, 640, 16384), 4, 60),
    Case("sft", gpt2(12, 768, 50304), 4, 120, model=LORA),
    Case("sft", llama(8, 768, 16384), 8, 120, model=LORA),
    Case("ppo", gpt2(8, 768, 16384), 4, 40, {"response_length": 24}, LORA),
    Case("ppo", llama(8, 512, 32768), 8, 40, {"response_length": 24}, LORA),
    Case("sft", llama(8, 512, 32768), 4, 120, world=2),
    Case("ppo", gpt2(4, 512, 16384), 4, 40, {"response_length": 24}, world=2),
    Case("pretrain", gpt2(8, 512, 32768), 2, 128, world=4),
    Case("sft", gpt2(8, 512, 32768), 4, 120, world=2, launcher="fsdp2"),
    Case("sft", gpt2(8, 512, 32768), 4, 120, world=4, launcher="fsdp2"),
    Case("sft", gpt2(8, 512, 32768), 4, 120, world=2, launcher="zero2"),
    Case("sft", gpt2(8, 512, 32768), 4, 120, world=4, launcher="zero2"),
    Case("sft", gpt2(8, 512, 32768), 4, 120, world=2, launcher="zero3"),
    Case("sft", gpt2(8, 512, 32768), 4, 120, world=4, launcher="zero3"),
    Case("dpo", gpt2(8, 768, 16384), 2, 60),
    Case("dpo", llama(8, 512, 32768), 2, 60, model=LORA),
    Case("kto", gpt2(8, 768, 16384), 2, 60),
    Case("pretrain", gpt2(8, 512, 32768), 8, 128),  # as many rows a step as on two and on four processes
    # little but a head
    Case("pretrain", gpt2(2, 256, 49152), 16, 128),
    Case("sft", llama(2, 256, 49152), 8, 120),
    Case("ppo", gpt2(2, 256, 49152), 8, 40, {"response_length": 48}),
    Case("dpo", gpt2(2, 256, 49152), 4, 60),
]
STEPS, SAVED = 5, 4  # optimizer steps of a case, and after which of them a checkpoint is written


def prepare(work: Path) -> None:
    """Models and data below `work`, one folder per case; run as a process of its own, since its memory would show."""
    import torch
    import transformers

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(60)]
    text = lambda n: " ".join(draw.choices(words, k=n))  # noqa: E731
    tokenizer = train_bpe([" ".join(words)] * 50, vocab_size=600)
    word_tokenizer = train_wordpiece([" ".join(words)] * 50, vocab_size=300)
    for number, case in enumerate(CASES):
        folder, kind, length = work / str(number), case.kind, case.words
        if not folder.is_dir() or (folder / "recipe.yaml").is_file():
            continue
        count = case.rows * case.world * STEPS * 2
        model = {"model_name_or_path": str(folder / "model"), **case.model}
        args = {
            "report_to": "none",
            "per_device_train_batch_size": case.rows,
            "save_steps": SAVED,
            "max_steps": STEPS,
            "global_batch_size": case.rows * case.world,
            **case.args,
        }
        stage = {"kind": kind, "model": model, "data": {"train": str(folder / "rows.jsonl")}, "args": args}
        if kind in ("pretrain", "mlm"):
            named = word_tokenizer if kind == "mlm" else tokenizer
            named.save_pretrained(folder / "tokenizer")
            stage["model"] = {"config": case.config, "tokenizer_name_or_path": str(folder / "tokenizer")}
            args["max_length"] = length
            rows = [{"text": text(length)} for _ in range(count)]
        elif kind == "sft":
            rows = [{"prompt": text(length // 2), "completion": text(length // 2)} for _ in range(count)]
        elif kind == "seq2seq":
            named = ending(tokenizer)
            rows = [{"source": text(length), "target": text(length // 2)} for _ in range(count)]
        elif KINDS[kind].rows in ("rankings", "unpaired"):
            rows = [
                {
                    "prompt": text(length // 2),
                    "completions": [text(length // 2) for _ in range(4)],
                    "ranks": [1, 2, 3, 4],
                }
                for _ in range(count)
            ]
        elif kind == "ppo":
            stage["reward"] = {"models": [str(folder / "reward")]}
            stage["model"]["chat_template"] = "plain"
            args |= {"allow_no_eos": True, "num_ppo_epochs": 1, "global_batch_size": 4 * case.rows * case.world}
            rows = [{"prompt": text(length)} for _ in range(count * 4)]
        else:
            rows = [{"text": text(length), "label": i % 3} for i in range(count)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = {"output_dir": str(folder / "out"), "stages": {"stage": stage}}
        (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
        for name in {"pretrain": (), "mlm": (), "ppo": ("model", "reward")}.get(kind, ("model",)):
            auto = KINDS["reward" if name == "reward" else kind].auto_class
            settings = {"num_labels": 1} if auto == KINDS["reward"].auto_class and kind != "classify" else {}
            config = transformers.AutoConfig.for_model(**{**case.config, **settings})
            made = getattr(transformers, auto).from_config(config, dtype=torch.float32)
            told = named if kind == "seq2seq" else tokenizer
            if kind == "seq2seq":
                made.config.decoder_start_token_id = made.generation_config.decoder_start_token_id = told.pad_token_id
            else:
                tokenizer_setup.fit_model(made, told)
            made.save_pretrained(folder / name)
            told.save_pretrained(folder / name)


def ending(tokenizer):
    """The tokenizer with an EOS after every text, as encoder-decoders want it."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend, end = tokenizer.backend_tokenizer, tokenizer.eos_token
    backend.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, unk_token=end, pad_token=tokenizer.pad_token
    )


def measure(recipe: str) -> None:
    """Run the recipe in this process as the command line does; prints what it held and what it did.

    Held: before any model was there, at most until training began, until the last step before the checkpoint, and in
    all. Done, in each step before the checkpoint but the first: bytes over the loopback, CPU seconds of this process.
    """
    import resource

    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        sys.path.insert(0, str(ROOT / "tests"))
        import fsdp_on_cpu

        fsdp_on_cpu.allow()
    start()
    loaded = load(recipe)
    import torch
    import transformers.trainer
    import trl.trainer.reward_trainer  # noqa: F401
    import trl.trainer.sft_trainer  # noqa: F401
    from transformers import Seq2SeqTrainer, models  # noqa: F401

    kind = loaded.stages[0].kind
    if kind == "classify":
        metrics.MacroF1().compute(predictions=[0, 1], references=[0, 1])  # loads scikit-learn
    elif kind == "seq2seq":
        metrics.GENERATION["sacrebleu"]()
    if loaded.stages[0].sections["model"].get("use_peft"):
        import peft  # noqa: F401
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed  # noqa: F401

    def peak_so_far() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    class Steps(transformers.TrainerCallback):
        """Bytes sent in this network, CPU seconds and peak of this process, at the end of every step; the peak
        before.
        """

        seen, loaded = [], 0

        def on_train_begin(self, args, state, control, **kwargs):
            Steps.loaded = peak_so_far()

        def on_step_end(self, args, state, control, **kwargs):
            line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if "lo:" in line)
            self.seen.append((int(line.split(":")[1].split()[8]), time.process_time(), peak_so_far()))

    transformers.trainer.DEFAULT_CALLBACKS.append(Steps)
    small = torch.nn.Linear(512, 512)
    small(torch.ones(64, 512)).sum().backward()
    torch.optim.AdamW(small.parameters(), fused=True).step()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    chain.run(loaded)
    counted = Steps.seen[: SAVED - 1]  # none of these is followed by a checkpoint
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(counted, counted[1:])]
    found = {"before": before, "loaded": Steps.loaded, "trained": counted[-1][2], "peak": peak_so_far(), "steps": steps}
    print("MEASURED", json.dumps({"rank": int(os.environ.get("RANK", "0")), **found}), flush=True)


def run(command: list[str], env: dict) -> str:
    """What the command prints; raises `CalledProcessError` with the end of what it said where it fails."""
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    if done.returncode:
        print(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}", file=sys.stderr)
    done.check_returncode()
    return done.stdout


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="these kinds, or numbers of cases")
    parser.add_argument("--folder", help="keep models, recipes and measurements here")
    parser.add_argument(
        "--again", action="store_true", help="with --folder: predict anew, measure only what is missing"
    )
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare:
        return prepare(Path(args.prepare))
    if args.measure:
        return measure(args.measure)
    sys.path.insert(0, str(ROOT))

    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    env |= {**FAST, SWITCH: "set", "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    alone = LOOPBACK if shutil.which("ip") and os.geteuid() == 0 else ()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.folder or temporary)
        chosen = [n for n, case in enumerate(CASES) if not args.only or case.kind in args.only or str(n) in args.only]
        missing = [n for n in chosen if not (args.again and (work / str(n) / "measured.json").is_file())]
        for n in missing:
            shutil.rmtree(work / str(n), ignore_errors=True)
            (work / str(n)).mkdir(parents=True)
        me = [sys.executable, str(Path(__file__).resolve())]
        if missing:
            run([*me, "--prepare", str(work)], env)
        for n in missing:
            command, case = [*me, "--measure", str(work / str(n) / "recipe.yaml")], CASES[n]
            if case.world > 1:
                launch = [*alone, str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file"]
                launch += [f"accelerate_configs/{case.launcher}.yaml", "--num_processes", str(case.world)]
                command = [*launch, *command[1:]]
            try:
                printed = run(command, env)
            except subprocess.CalledProcessError:  # said; the other cases go on
                continue
            found = [json.JSONDecoder().raw_decode(part.lstrip())[0] for part in printed.split("MEASURED")[1:]]
            if not alone and case.world > 1:
                found = [{**process, "steps": []} for process in found]
            (work / str(n) / "measured.json").write_text(json.dumps(found))
        table(work, [n for n in chosen if (work / str(n) / "measured.json").is_file()])


def table(work: Path, chosen: list[int]) -> None:
    """Print predicted beside measured, one row per case, and the parts that the prediction is made of."""
    from dataclasses import fields

    head = "| stage | model | parameters | rows x tokens | predicted MB | measured MB | ratio | with process |"
    print(head + "\n|" + " --- |" * 8)
    ratios, apart, sent = [], [], []
    for n in chosen:
        case, found = CASES[n], json.loads((work / str(n) / "measured.json").read_text())
        before, peak = max(((one["before"], one["peak"]) for one in found), key=lambda sizes: sizes[1] - sizes[0])
        loaded = load(work / str(n) / "recipe.yaml", read_data=False)
        job = describe(loaded.stages[0])
        planner, command = Planner(job), [str(loaded.file), "--processes", str(case.world)]
        if case.world > 1:
            command += ["--config_file", str(ROOT / f"accelerate_configs/{case.launcher}.yaml")]
        setup = setups.setup_of(job, plan.parser().parse_args(command))
        memory = planner.memory(setup)
        predicted, measured = memory.without_process().total, peak - before
        ratios.append(predicted / measured)
        anatomy, (rows, length) = planner.anatomy("model"), micro_batch(job, setup)
        kind = job.kind + (" with LoRA" if setup.lora else "")
        kind += f", {setup.world} x {setup.strategy}" if setup.world > 1 else ""
        least = min(one["peak"] - one["before"] for one in found)
        print(
            f"| {kind} | {job.models['model'].config.model_type} {anatomy.layers} x {anatomy.hidden} "
            f"| {anatomy.parameters / 1e6:.1f} M | {rows} x {length} | {predicted / MB:.0f} "
            f"| {measured / MB:.0f}{f' (least {least / MB:.0f})' if setup.world > 1 else ''} "
            f"| {ratios[-1]:.2f} | {memory.total / peak:.2f} |"
        )
        held = {
            key: max(one[key] - one["before"] for one in found) / MB for key in ("loaded", "trained") if key in found[0]
        }
        parts = {f.name: round(getattr(memory, f.name) / MB) for f in fields(memory) if getattr(memory, f.name)}
        measured = f"before {before / MB:.0f}" + "".join(f", {key} {size:.0f}" for key, size in held.items())
        apart.append(f"{n} {kind}: measured {measured}; " + ", ".join(f"{k} {v}" for k, v in parts.items()))
        if found[0]["steps"] and job.kind == "pretrain" or setup.world > 1:
            steps = len(found[0]["steps"])
            told = planner.traffic(setup) * setup.world
            if setup.strategy in costs.SHARDED:  # PyTorch's gloo reduces everywhere where a scatter is asked for
                told += (setup.world - 1) * anatomy.trainable * setup.compute
            real = sum(step[0] for step in found[0]["steps"]) / steps
            seconds = sum(step[1] for one in found for step in one["steps"]) / steps
            ratio = f"{told / real:.3f}" if real else ""
            where = f"{kind} | {case.rows * case.world} x {length}"
            sent.append(f"| {where} | {told / MB:.1f} | {real / MB:.1f} | {ratio} | {seconds:.2f} |")
    inside = sum(abs(ratio - 1) <= 0.15 for ratio in ratios)
    print(f"\n{inside} of {len(ratios)} within 15 %; ratios from {min(ratios):.2f} to {max(ratios):.2f}")
    if sent:
        print("\n| a step, all processes | rows x tokens | predicted MB sent | measured | ratio | CPU seconds |")
        print("|" + " --- |" * 6)
        print(*sent, sep="\n")
    print("\nparts predicted, MB:", *apart, sep="\n  ")


if __name__ == "__main__":
    main()
