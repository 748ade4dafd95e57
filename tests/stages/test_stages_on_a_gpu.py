"""Every kind of stage on a simulated GPU: no tensor on the wrong device, no more waits and operators than are stated.

The device is `simulated_gpu`'s; what a real one does beside that (speed, memory, kernels, NCCL) is not tested here.
"""

from __future__ import annotations

import collections
import itertools
import json
import shutil

import pytest
import torch
import varlen_on_cpu
from safetensors.torch import load_file
from simulated_gpu import on_gpu, simulated_gpu
from tiny_words import WORDS
from transformers import AttentionInterface, AttentionMaskInterface, GPT2LMHeadModel, modeling_utils
from transformers.masking_utils import flash_attention_mask

from pipelines import launch
from pipelines.chain import chain
from pipelines.generation import decode, logprobs, with_vllm
from pipelines.generation.decode import generate
from pipelines.generation.speaker import Settings, Speaker
from pipelines.ppo import trainer as ppo_trainer
from pipelines.ppo.update import Learner
from pipelines.recipe.recipe import load
from pipelines.speed import varlen
from pipelines.training import loop
from pipelines.training.reference import REFERENCE
from pipelines.training.trainer import ChainTrainer

PAIRS = [(a, b) for a in WORDS[:6] for b in WORDS[8:14]]
LORA = {"use_peft": True, "lora_r": 2, "lora_alpha": 4}
BERT = {
    "model_type": "bert",
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
}
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
ARGS = {
    "global_batch_size": 8,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "logging_steps": 4,
    "save_steps": 4,
    "eval_steps": 4,
}


def reward(prompts, completions, **columns):
    """Long answers are worth more."""
    return [float(len(text)) for text in completions]


def labeller(prompt, completions):
    return [len(c) for c in completions], [["long"] if len(c) > 12 else [] for c in completions]


def chains(write, base: str) -> dict[str, dict]:
    """Recipes by name; together they have all kinds and what changes their path on a device."""
    text = write("text.jsonl", [{"text": f"the {a} is {b} and {b} is not {a}"} for a, b in PAIRS * 8])
    asked = write("asked.jsonl", [{"prompt": f"what is {a} {b}", "completion": f"{a} is {b}"} for a, b in PAIRS])
    ranked = write(
        "ranked.jsonl",
        [
            {
                "prompt": f"what is {a}",
                "completions": [f"{a} is {b}", b, a],
                "ranks": [1, 2, 2],
                "tags": [["rude"], [], []],
            }
            for a, b in PAIRS
        ],
    )
    labelled = write("labelled.jsonl", [{"text": f"{a} is {b}", "label": int(b == WORDS[8])} for a, b in PAIRS])
    translated = write("translated.jsonl", [{"source": f"{a} is {b}", "target": f"{b} {a}"} for a, b in PAIRS])
    model, words = {"model_name_or_path": base}, {"train": "wordpiece", "vocab_size": 250}
    plain = {**model, "chat_template": "plain"}
    held_out = {"validation": 0.2}

    def stage(kind, rows, args=None, **more):
        return {
            "kind": kind,
            "model": model,
            "data": {"train": rows, **held_out},
            "args": {**ARGS, **(args or {})},
        } | more

    length = {"max_length": 32}
    once = {**length, "max_steps": 1, "save_steps": 1}
    judge = stage("reward", ranked, {"tags": ["rude"], **length}, model=plain)
    online = {
        "response_length": 8,
        "num_ppo_epochs": 2,
        "num_mini_batches": 1,
        "allow_no_eos": True,
        "max_steps": 2,
        "allow_constant_scores": True,
        "eval_steps": 2,
        "save_steps": 1,
    }
    scored = {"functions": [f"{__name__}:reward"]}
    ppo = stage("ppo", asked, online, model=plain, reward=scored)
    both = {"model": {**plain, **LORA}}
    return {
        "pretrain": {"x": stage("pretrain", text, length)},
        "pretrain streamed": {"x": stage("pretrain", text, length, data={"train": text, "streaming": True})},
        "mlm": {"x": stage("mlm", text, length, model={"config": BERT}, tokenizer=words)},
        "sft packed": {"x": stage("sft", asked, {"packing": True, "global_batch_size": 2, **length})},
        "sft lora": {"x": stage("sft", asked, length, **both)},
        "reward": {"x": stage("reward", ranked, length)},
        "reward lora, tags": {"x": judge | both},
        "dpo": {"x": stage("dpo", ranked, {"ranking_loss": "plackett_luce", "save_steps": 3, **length}, model=plain)},
        "dpo lora, pairs": {"x": stage("dpo", ranked, length) | both},
        "kto": {"x": stage("kto", ranked, length, model=plain)},
        "kto lora": {"x": stage("kto", ranked, length, **both)},
        "classify": {
            "m": stage("mlm", text, length, model={"config": BERT}, tokenizer=words),
            "x": stage("classify", labelled, model={"model_name_or_path": "stage:m"}),
        },
        "classify weighted": {
            "m": stage("mlm", text, length, model={"config": BERT}, tokenizer=words),
            "x": stage(
                "classify", labelled, task={"class_weights": "balanced"}, model={"model_name_or_path": "stage:m"}
            ),
        },
        "classify a causal model": {"x": stage("classify", labelled)},
        "seq2seq": {
            "x": stage(
                "seq2seq",
                translated,
                {"max_target_length": 8},
                model={"config": T5},
                tokenizer={**words, "lowercase": True},
            ),
            "pairs": {
                "kind": "evaluate",
                "evaluate": {"models": ["stage:x"], "pairs": translated, "response_length": 4},
            },
        },
        "ppo": {"x": ppo},
        "ppo reward model, tags, ptx": {
            "j": judge,
            "x": ppo
            | {
                "reward": {"models": ["stage:j"], "min_accuracy": 0.0, "tag_penalties": {"rude": 0.5}},
                "data": {"train": asked, "ptx": text},
                "args": {**ppo["args"], "ptx_coef": 0.5, "ptx_length": 16},
            },
        },
        "ppo lora, critic shared": {"x": ppo | both | {"reward": {**scored, "critic": "shared"}}},
        "ppo lora": {"x": ppo | both},
        "ppo vllm": {"x": ppo | {"args": {**ppo["args"], "use_vllm": True}}},
        "ppo grpo": {
            "x": ppo | {"args": {**ppo["args"], "advantage": "grpo", "num_generations": 4, "loss_type": "grpo"}}
        },
        "ppo rloo, scores normalised": {
            "x": ppo
            | {
                "args": {
                    **ppo["args"],
                    **{"advantage": "rloo", "normalize_advantages": True, "normalize_scores": True, "score_clip": 2.0},
                    **{"kl_target": 1.0, "missing_eos_penalty": 1.0, "entropy_coef": 0.01},
                }
            }
        },
        "sample, rank, evaluate": {
            "s": stage("sft", asked, length, model=plain),
            "samples": {
                "kind": "sample",
                "data": {"train": asked},
                "sample": {"models": ["stage:s", base], "completions": 2, "response_length": 6},
            },
            "rankings": {
                "kind": "rank",
                "rank": {"labeller": f"{__name__}:labeller"},
                "data": {"train": "stage:samples/samples.jsonl"},
            },
            "x": {
                "kind": "evaluate",
                "evaluate": {
                    "models": ["stage:s", base],
                    "text": text,
                    "prompts": asked,
                    "judge": f"{__name__}:judge",
                    "response_length": 6,
                },
            },
        },
        "sample, rank, evaluate by models": {
            "s": stage("sft", asked, once, model=plain, data={"train": asked}),
            "d": stage("dpo", ranked, once, model={"model_name_or_path": "stage:s"}, data={"train": ranked}),
            "j": stage("reward", ranked, {**once, "tags": ["rude"]}, model=plain, data={"train": ranked}),
            "c": stage("classify", labelled, once, data={"train": labelled}),
            "samples": {
                "kind": "sample",
                "data": {"train": asked},
                "sample": {"models": [base], "completions": 2, "response_length": 6},
            },
            "rankings": {
                "kind": "rank",
                "rank": {"judge": "stage:j"},
                "data": {"train": "stage:samples/samples.jsonl"},
            },
            "preferences": {"kind": "evaluate", "evaluate": {"models": ["stage:j", "stage:d"], "preferences": ranked}},
            "labels": {"kind": "evaluate", "evaluate": {"models": ["stage:c"], "labelled": labelled}},
            "x": {
                "kind": "evaluate",
                "evaluate": {
                    **{"models": [base], "prompts": asked, "pairs": asked, "judge": "stage:c", "label": "1"},
                    **{"best_of": 2, "oracle": "stage:d", "response_length": 6},
                },
            },
        },
    }


def judge(prompt, answer):
    return float(len(answer))


NAMES = list(chains(lambda name, rows: name, "base"))


class Killed(BaseException):
    """What no handler catches."""


class Engine:
    """In vLLM's place: it answers from the policy's own weights."""

    def __init__(self, policy, *_):
        self.policy = policy

    def sync_weights(self):
        """The weights are the policy's own."""

    def generate(self, prompts, images, num_generations):
        seeds = list(range(len(prompts)))
        ids, logprobs = generate(self.policy, prompts, max_new_tokens=8, eos_token_ids=[0], seeds=seeds)
        return prompts, ids, [[[value] for value in values.tolist()] for values in logprobs], None


@pytest.fixture
def run(recipe, write, tiny_gpt2, tmp_path, monkeypatch):
    """`run(name, **model)` runs one of `chains`, with more in the section `model` of its last stage, on a simulated GPU;
    `(the SimulatedGPU, stage.json of its last stage)`. With `stop` it is killed after that step, `Killed` being raised.
    """
    monkeypatch.setenv("PIPELINES_FAST_ENV", "0")
    varlen_on_cpu.install()
    monkeypatch.setattr(with_vllm, "problems", lambda section: ())  # as if it were installed
    number = itertools.count()

    def run_(name, folder=None, stop=None, **model):
        varlen._trial.cache_clear(), varlen.log_blocks.cache_clear()
        stages = chains(write, str(tiny_gpt2))[name]
        stages["x"] |= {"model": stages["x"]["model"] | model} if model else {}
        loaded = load(recipe(stages, output_dir=str(folder or tmp_path / f"out{next(number)}")))
        with pytest.MonkeyPatch.context() as patch, simulated_gpu(patch) as gpu:
            gpu.watch(patch, ChainTrainer, "training_step")
            gpu.watch(patch, decode, "lean_decode", "decode")
            gpu.watch(patch, logprobs, "has_plain_head")  # once per model
            gpu.watch(patch, Learner, "backward")
            gpu.watch(patch, ppo_trainer.PPOTrainer, "_update")
            gpu.watch(patch, ppo_trainer.PPOTrainer, "_rollout")
            patch.setattr(ppo_trainer, "vllm_engine", Engine)
            gpu.at_step = {}  # waits before the end of each step of the last stage

            def on_step_end(self, args, state, control, real=loop.Progress.on_step_end, **kwargs):
                gpu.at_step[state.global_step] = sum(counts["wait"] for counts in gpu.counts.values())
                real(self, args, state, control, **kwargs)
                if state.global_step == stop:
                    raise Killed

            patch.setattr(loop.Progress, "on_step_end", on_step_end)
            chain.run(loaded)
            assert not torch.is_autocast_enabled("cpu"), "a stage left autocast on for those that follow"
        return gpu, json.loads((loaded["x"].folder / "stage.json").read_text())

    return run_


# Operators on the device, at most: of a training step (of one micro-batch), of the update of one PPO minibatch, and of
# one decoded token, all of models with one or two layers. Each is what it is now and a tenth more. What a new version
# of PyTorch or transformers adds is looked at, then put here.
STEP = {
    "pretrain": 185,
    "pretrain streamed": 185,
    "mlm": 200,
    "sft packed": 185,
    "sft lora": 180,
    "reward": 235,
    "reward lora, tags": 230,
    "dpo": 255,
    "dpo lora, pairs": 240,
    "kto": 240,
    "kto lora": 220,
    "classify": 200,
    "classify weighted": 205,
    "classify a causal model": 215,
    "seq2seq": 585,
}
MINIBATCH = {
    "ppo": 910,
    "ppo reward model, tags, ptx": 945,
    "ppo lora, critic shared": 555,
    "ppo lora": 820,
    "ppo vllm": 915,
    "ppo grpo": 570,
    "ppo rloo, scores normalised": 595,
}
# (of eight decoded tokens three are computed operator by operator, the last of these recorded, and five replayed)
TOKEN = {"ppo lora, critic shared": 41, "ppo lora": 41, "ppo vllm": 34}
# Waits of a whole chain, evaluations, checkpoints and logs too, and no more: most are weights that are read to be saved.
WAITS = {
    "pretrain": 63,
    "pretrain streamed": 61,
    "mlm": 58,
    "sft packed": 67,
    "sft lora": 52,
    "reward": 74,
    "reward lora, tags": 60,
    "dpo": 107,
    "dpo lora, pairs": 60,
    "kto": 85,
    "kto lora": 69,
    "classify": 121,
    "classify weighted": 122,
    "classify a causal model": 71,
    "seq2seq": 109,
    "ppo": 252,
    "ppo reward model, tags, ptx": 300,
    "ppo lora, critic shared": 123,
    "ppo lora": 169,
    "ppo vllm": 252,
    "ppo grpo": 165,
    "ppo rloo, scores normalised": 169,
    "sample, rank, evaluate": 94,
    "sample, rank, evaluate by models": 362,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_runs_on_the_device(run, name):
    """It raises nothing of what a GPU raises; and it neither waits nor computes more than it should."""
    gpu, final = run(name)
    if final["kind"] != "evaluate":
        assert final["args"]["bf16"]
    if name in STEP:
        quiet = gpu.at_step[3] - gpu.at_step[1]  # two steps without log, evaluation or checkpoint
        assert quiet == 0, gpu.places
        assert per_call(gpu, "training_step", "operators") <= STEP[name]
    if final["kind"] == "ppo":
        assert gpu.counts["backward"]["wait"] == 0, gpu.places["backward"]
        assert per_call(gpu, "backward", "operators") <= MINIBATCH[name]
        metrics = 10 + ("ptx" in name) + 2 * ("normalised" in name)  # read once an update
        assert per_call(gpu, "_update", "wait") <= metrics, gpu.places["_update"]
        assert per_call(gpu, "_rollout", "wait") <= 3 + ("reward model" in name), gpu.places["_rollout"]
        assert per_call(gpu, "decode", "operators") / 8 <= TOKEN.get(name, 37)
    else:
        assert gpu.counts["decode"]["operators"] > 0 or final["kind"] != "evaluate"  # it was not done on the CPU
    assert per_call(gpu, "decode", "wait") <= 1, gpu.places["decode"]  # eight tokens each
    waits = sum(counts["wait"] for counts in gpu.counts.values())
    assert waits <= WAITS[name], sum(gpu.places.values(), collections.Counter()).most_common(20)


@pytest.mark.parametrize("name, stop", [("dpo", 4), ("ppo", 2)])
def test_a_killed_stage_goes_on_on_the_device(run, tmp_path, name, stop):
    run(name, tmp_path / "whole")
    with pytest.raises(Killed):
        run(name, tmp_path / "killed", stop)
    launch.reset()
    if name == "dpo":  # under autocast as they are, log-probs come in float32 and are kept in it
        kept = load_file(tmp_path / "killed" / "x" / "checkpoints" / REFERENCE)["train"]
        assert kept.dtype == torch.float32 and not torch.equal(kept, kept.bfloat16().float())
    gpu, _ = run(name, tmp_path / "killed")
    assert min(gpu.at_step) == stop  # from the checkpoint of the step before
    whole, killed = (load_file(tmp_path / run / "x" / "model.safetensors") for run in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[weight], killed[weight]) for weight in whole)


def test_chat_answers_on_the_device(tiny_gpt2, monkeypatch):
    monkeypatch.setenv("PIPELINES_FAST_ENV", "0")
    with pytest.MonkeyPatch.context() as patch, simulated_gpu(patch) as gpu:
        speaker, written = Speaker(str(tiny_gpt2)), []
        with gpu.phase("answer"):
            answer = speaker.answer("what is red", Settings(max_new_tokens=6, seed=1), written.append, print)
        assert all(on_gpu(weight) for weight in speaker.model.parameters()) and answer == "".join(written)
        assert gpu.counts["answer"]["operators"] > 6 * 20
        waits, copies = gpu.counts["answer"]["wait"], gpu.counts["answer"]["copy"]  # of transformers' own `generate`
        assert waits <= 23 and copies <= 14, gpu.places["answer"]


def flash_attention(module, query, key, value, attention_mask, **kwargs):
    """In flash attention's place: it refuses what that refuses, and knows rows only by their seams or their padding."""
    if not on_gpu(query) or {query.dtype, key.dtype, value.dtype} - {torch.bfloat16, torch.float16}:
        raise RuntimeError("FlashAttention only supports fp16 and bf16 on a GPU")
    (queries, keys), seams = (query.shape[2], key.shape[2]), kwargs.get("cu_seq_lens_q")
    seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    if seams is not None:
        row = torch.bucketize(torch.arange(queries, device=query.device), seams[1:], right=True)
        seen = seen & (row[:, None] == row)
    elif attention_mask is not None:
        seen = seen & attention_mask[:, None, None, :].bool()
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=kwargs.get("scaling"))
    return output.transpose(1, 2).contiguous(), None


@pytest.fixture
def flash(monkeypatch):
    """The stand-in as an implementation of attention that a recipe may name."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_stand_in", flash_attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "flash_stand_in", flash_attention_mask)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *_, **__: None)  # nothing to import
    return {"attn_implementation": "flash_stand_in"}


@pytest.mark.parametrize("name", ["pretrain", "reward", "dpo", "ppo"])
def test_flash_attention_is_given_what_it_takes(run, flash, name):
    """Packed, padded and decoding token by token, it sees the device and bf16 only."""
    run(name, **flash)


def test_packs_are_attended_to_alike_by_every_kernel_and_without(run, flash, monkeypatch, caplog, tiny_gpt2, tmp_path):
    """PyTorch's kernel, flash attention, and the blocks where the card refuses the kernel or a model does not fit it."""
    losses = {}

    def train(how, **model):
        _, final = run("sft packed", **model)
        losses[how] = final["metrics"]["eval_loss"]

    with caplog.at_level("INFO", logger="pipelines"):
        train("kernel")
        assert len(varlen_on_cpu.calls) > 8 and "not by varlen_attn" not in caplog.text
        train("flash", **flash)
        heads = GPT2LMHeadModel.from_pretrained(tiny_gpt2, n_head=16)  # of 2, which it does not take
        shutil.copytree(tiny_gpt2, tmp_path / "heads")
        heads.save_pretrained(tmp_path / "heads")
        varlen_on_cpu.calls.clear()
        run("sft packed", model_name_or_path=str(tmp_path / "heads"))
        assert "in blocks, not by varlen_attn: head size 2" in caplog.text
        assert {heads for _, _, heads, *_ in varlen_on_cpu.calls} == {4}  # of the trial
        monkeypatch.setattr(varlen.varlen, "varlen_attn", refuse)
        train("refused")
        assert "no kernel image is available" in caplog.text
    assert losses["flash"] == pytest.approx(losses["kernel"], rel=2e-3)
    assert losses["refused"] == pytest.approx(losses["kernel"], rel=2e-3)


def refuse(*_, **__):
    raise RuntimeError("no kernel image is available")


def per_call(gpu, phase, kind):
    """How many of `kind` there were in each call of what is watched as `phase`."""
    return gpu.counts[phase][kind] / max(gpu.counts[phase]["calls"], 1)
