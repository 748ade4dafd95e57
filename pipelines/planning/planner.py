"""Memory, work and time of one stage under any setup: the formulae of `pipelines.planning.costs` filled in with a
`Job`'s numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import peft
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, get_peft_config

from pipelines import launch
from pipelines.generation.logprobs import KEPT
from pipelines.kinds import KINDS
from pipelines.planning import costs, devices
from pipelines.planning.anatomy import activations, examine
from pipelines.planning.costs import Memory
from pipelines.planning.job import Job
from pipelines.speed import fused_head


@dataclass(frozen=True)
class Setup:
    """Where and how a stage runs: what the command line and the recipe say, and what a suggestion may change."""

    gpu: str | None = None  # None: the CPU
    strategy: str = "single"
    world: int = 1
    offload: str = "none"  # "optimizer" or "all" (weights too) on the host
    micro: int = 8
    rollout: int = 64  # answers that PPO decodes at once
    checkpointing: bool = False
    lora: bool = False
    quantize: bool = False
    size: int = 4  # bytes of a stored weight
    bf16: bool = False
    optim: str = "adamw_torch_fused"

    @property
    def compute(self) -> int:
        """Bytes of a number in the matrix products."""
        return 2 if self.bf16 else 4

    @property
    def precision(self) -> str:
        """As `anatomy.activations` takes it."""
        if not self.bf16:
            return "fp32"
        return "autocast" if self.size == 4 and self.strategy in ("single", "ddp") else "bf16"

    @property
    def sharded(self) -> bool:
        """Whether a launcher cuts up weights or optimizer."""
        return self.strategy not in ("single", "ddp")


def micro_batch(job: Job, setup: Setup) -> tuple[int, int]:
    """`(rows, tokens of each)` of the largest micro-batch of one device."""
    micro = setup.micro
    if job.shape == "text" or job.packs:
        return micro, job.context
    if job.layout != "padded" and job.lengths and job.rows:  # no padding: the most tokens that come together
        tokens = job.laid or job.lengths
        tokens = np.resize(tokens, max(len(tokens), micro))
        order = np.random.default_rng([job.stage.seed, 0]).permutation(len(tokens))  # as training.GlobalOrder
        batches = order[: len(order) // micro * micro].reshape(-1, micro)
        longest = max(job.laid, default=job.longest)
        return math.ceil(int(tokens[batches].sum(1).max()) / longest), longest
    if job.branches:
        return micro * job.answers, job.longest
    if job.kind == "ppo":
        return micro, job.longest + job.target
    return micro, job.longest


def adapter(stage, quantize: bool = False):
    """What wraps a model in LoRA as the recipe says, or with TRL's defaults on all linear layers."""
    said = {
        k: v for k, v in stage.sections.get("model", {}).items() if k.startswith(("lora_", "use_rslora", "use_dora"))
    }

    def wrap(model):

        config = get_peft_config(ModelConfig(use_peft=True, **said))
        config.task_type = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
        if not said.get("lora_target_modules") or said["lora_target_modules"] == ["all-linear"]:
            config.target_modules = "all-linear"
        config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
        return peft.get_peft_model(model, config, autocast_adapter_dtype=False)

    return wrap


class Planner:
    """Memory, work and time of one stage under any setup. Models are examined and traced once for each question."""

    def __init__(self, job: Job):
        self.job = job
        self.known: dict = {}

    def anatomy(self, name: str, lora: bool = False):
        """Counts of the stage's model called `name`."""

        key = (name, lora)
        if key not in self.known:
            model = self.job.models[name]
            self.known[key] = examine(model.config, model.auto_class, adapter(self.job.stage) if lora else None)
        return self.known[key]

    def traced(self, name: str, setup: Setup) -> float:
        """Activations of `name` for the largest micro-batch, with checkpointing what is left of them, and their
        gradients.
        """

        rows, length = micro_batch(self.job, setup)
        key = (name, rows, length, setup.precision, setup.lora)
        if key not in self.known:
            job, model, kind = self.job, self.job.models[name], self.job.kind
            kept, exact = activations(
                model.config,
                model.auto_class,
                rows,
                length,
                precision=setup.precision,
                mask=self.mask(),
                decoder_length=self.job.target if kind == "seq2seq" else 0,
                dropout=kind != "ppo" and not (self.refers and job.values.get("disable_dropout", True)),
                fast_gelu=kind in ("pretrain", "sft", "reward", "dpo", "kto", "ppo"),
                adapt=adapter(self.job.stage) if setup.lora else None,
            )
            note = f"activations of {self.anatomy(name).architecture} by formula: it cannot be run without numbers"
            if not exact and note not in self.job.notes:
                self.job.notes.append(note)
            self.known[key] = kept
        kept, a = self.known[key], self.anatomy(name)
        work = costs.backward_work(kept, a.layers)
        if setup.checkpointing:
            kept = costs.checkpointed(kept, rows * length, a.hidden, a.layers, setup.compute)
        return kept + work

    def mask(self) -> str | None:
        """The attention mask that a forward keeps, as `anatomy.activations` takes it."""
        job = self.job
        if job.branches and job.layout == "shared" and job.laid:
            return "branches"
        padded = job.kind in ("classify", "seq2seq") or (
            (job.branches or job.shape == "sft") and job.layout == "padded"
        )
        return "padding" if padded else None

    @property
    def refers(self) -> bool:
        """Whether the model learns against the log-probs that it had at the beginning (dpo, kto)."""
        return KINDS[self.job.kind].implicit_reward

    @property
    def shares_base(self) -> bool:
        """Whether critic and reward models are adapters on the policy's base."""
        return bool(self.job.stage.sections.get("reward", {}).get("share_base"))

    def states(self, name: str, setup: Setup, trained: bool = True) -> costs.States:
        """Weights, gradients, optimizer states of one model on one device; of PPO's adapters on one base they alone."""
        shares = name != "model" and self.shares_base
        a = self.anatomy(name, setup.lora and (trained or shares))
        strategy = setup.strategy
        if not trained and strategy in ("zero1", "zero2"):
            strategy = "zero1"  # DeepSpeed keeps a frozen model whole
        if shares:
            optim, own = costs.optimizer_share(setup.optim), a.trainable
            return costs.states(own, own if trained else 0, setup.strategy, setup.world, optim=optim)
        return costs.states(
            a.parameters,
            a.trainable if trained else 0,
            strategy,
            setup.world,
            setup.size,
            costs.optimizer_share(setup.optim),
            a.largest,
            a.outside,
            a.linear if setup.quantize and trained else 0,
            setup.offload,
            setup.compute,
            setup.gpu is None,
        )

    def memory(self, setup: Setup) -> Memory:
        """Bytes on one device at the peak of the stage."""
        job, kind = self.job, self.job.kind
        model = self.states("model", setup)
        out = Memory(
            process=devices.GPU_PROCESS if setup.gpu else devices.CPU_PROCESS,
            weights=model.weights,
            gradients=model.gradients,
            optimizer=model.optimizer,
            activations=self.traced("model", setup),
            head=self.head(setup),
            buffers=model.buffers,
        )
        if kind != "ppo":
            return replace(out, saving=self.saving(setup, out))
        critic = self.states("critic", setup) if "critic" in job.models else costs.States(0.0)
        scorers = [name for name in job.models if name.startswith("reward")]
        out = replace(
            out,
            activations=out.activations + (self.traced("critic", setup) if "critic" in job.models else 0.0),
            critic=critic.total - critic.buffers,
            reference=0.0 if setup.lora else self.frozen("model", setup),
            rewards=sum(self.frozen(name, setup) for name in scorers),
            kv_cache=self.cache(setup),
            rollouts=self.rollouts(setup),
        )
        return replace(out, saving=self.saving(setup, out))

    def saving(self, setup: Setup, held: Memory) -> float:
        """What the first process holds beside `held` when it writes the model: a merged copy, or what it gathers.

        Both lie on the CPU. There, only rollouts leave free pieces of its heap that are large enough.
        """
        if setup.gpu:
            return 0.0
        n = self.anatomy("model").parameters
        if setup.lora:
            return max(0.0, n * setup.size - held.kv_cache - held.rollouts)
        return n * 4.0 if setup.sharded else 0.0

    def decoded(self, setup: Setup) -> int:
        """Answers that one process of PPO decodes and scores at once; 64 prompts are tried before the first update."""
        share = math.ceil(max(self.per_step(setup), 64) / setup.world)
        return min(setup.rollout, share)

    def halved(self, name: str, setup: Setup, choice: str) -> float:
        """Bytes of `name`'s linear maps in bf16, where autocast on a GPU would cast them for each product; else 0."""
        autocast = setup.gpu and setup.bf16 and setup.size == 4 and not setup.sharded
        if not autocast or not launch.chosen_on_gpu(choice):
            return 0.0
        a = self.anatomy(name)
        return 2.0 * ((0 if setup.quantize else a.linear) + a.vocabulary * a.hidden)

    def frozen(self, name: str, setup: Setup) -> float:
        """Bytes of a reference or reward model: its linear maps in bf16 where the policy trains in it on a GPU."""
        weights, a = self.states(name, setup, trained=False).weights, self.anatomy(name)
        half = 0.0 if self.shares_base else self.halved(name, replace(setup, quantize=False), "bf16_frozen")
        copied = 4.0 * a.vocabulary * a.hidden if half and a.tied else 0.0  # a head that shares the embeddings' weights
        return weights - half + copied

    def cache(self, setup: Setup) -> float:
        """KV cache of the answers that are decoded at once, allocated for their full length."""
        a, tokens = self.anatomy("model"), self.decoded(setup) * (self.job.longest + self.job.target)
        return costs.kv_cache(tokens, a.layers, a.kv, setup.compute)

    def rollouts(self, setup: Setup) -> float:
        """What scoring the answers of one batch takes beside weights and cache, sampling's float32 probabilities, and
        the weights that are held in bf16 for decoding.
        """
        a, rows = self.anatomy("model"), self.decoded(setup)
        tokens, answers = rows * (self.job.longest + self.job.target), rows * self.job.target
        chunk = self.chunk(setup) if a.fusable else answers
        sampling = 3 * rows * a.vocabulary * 4
        sampling += self.halved("model", setup, "bf16_decoding")
        return sampling + costs.scoring(tokens, a.widest, answers, a.vocabulary, chunk, setup.compute)

    def chunk(self, setup: Setup) -> int:
        """Rows of logits that the fused head holds at once, as `fused_head.chunk_rows`."""

        size, vocabulary = setup.compute, self.anatomy("model").vocabulary
        if setup.gpu:
            return max(fused_head.GPU_ROWS, fused_head.GPU_BYTES // (vocabulary * size))
        return max(fused_head.CPU_ROWS * 4 // size, fused_head.CPU_BYTES // (vocabulary * size))

    def head(self, setup: Setup) -> float:
        """What comes of the hidden states: chunks of logits, or all of them where the head cannot be fused."""

        a, kind = self.anatomy("model"), self.job.kind
        rows, length = micro_batch(self.job, setup)
        tokens, size = rows * length, setup.compute
        if not a.vocabulary or kind in ("reward", "classify"):
            return 0.0
        tied = a.hidden if a.tied and not setup.lora else 0
        if kind == "seq2seq":
            return costs.full_logits(rows * self.job.target, a.vocabulary, size, tied)
        if kind == "mlm":
            hidden = math.ceil(tokens * self.job.values.get("mlm_probability", 0.15))
            return costs.full_logits(hidden, a.vocabulary, size, tied)
        if kind == "ppo":
            tokens = rows * self.job.target
        elif self.refers:
            tokens = math.ceil(tokens * self.job.learned)
        if not a.fusable:
            return costs.full_logits(tokens, a.vocabulary, size, tied)
        chunk = self.chunk(setup)
        wide = chunk if setup.gpu else fused_head.CPU_WIDE_ROWS
        if (kind == "ppo" or self.refers) and tokens * a.vocabulary <= KEPT:  # then the probabilities of all are kept
            chunk = wide = tokens
        return costs.fused_head(tokens, a.vocabulary, a.hidden, chunk, size, wide, not setup.lora)

    # --- work ---

    def per_step(self, setup: Setup) -> int:
        """Rows of an optimizer step (PPO: answers of an update) over all processes."""
        asked = self.job.values.get("global_batch_size")
        return asked or setup.micro * setup.world * self.job.values.get("gradient_accumulation_steps", 1)

    def steps(self, setup: Setup) -> int | None:
        """Optimizer steps (PPO: updates) of the whole stage; None where the rows are not known."""
        values, per_step = self.job.values, self.per_step(setup)
        if values.get("max_steps", -1) > 0:
            return values["max_steps"]
        if self.job.kind == "ppo" and values.get("total_episodes"):
            return math.ceil(values["total_episodes"] / per_step)
        if self.job.rows is None:
            return None
        rows = self.job.rows * (self.job.values.get("num_generations") or 1)
        if self.job.packs:
            rows = max(1, math.ceil(rows * self.job.mean / self.job.context))
        if self.job.kind == "ppo":
            return math.ceil(math.ceil(values["num_train_epochs"] * rows) / per_step)
        return costs.steps(rows, per_step, values["num_train_epochs"])

    def tokens_per_step(self, setup: Setup) -> float:
        """Tokens that go through the model in a step: those of packs and windows, of all answers, of prompt
        and answer.
        """
        job, per_step = self.job, self.per_step(setup)
        if job.shape == "text" or job.packs:
            return per_step * job.context
        return per_step * (job.of_row + job.target)

    def flops_per_step(self, setup: Setup) -> tuple[float, float]:
        """`(of forwards and backwards, of PPO's decoding)` in one step over all devices."""
        job, tokens = self.job, self.tokens_per_step(setup)
        attended = (job.mean + job.target) * (1.0 if job.kind in ("mlm", "classify", "seq2seq") else 0.5)
        forward = {}
        for name in job.models:
            a = self.anatomy(name)
            forward[name] = costs.forward_flops(tokens, a.products, a.layers, a.attention, attended)
        train = costs.train_flops(forward["model"], setup.lora, setup.checkpointing)
        if job.kind != "ppo":
            return train + self.reference_flops(setup, forward["model"]), 0.0
        train += costs.train_flops(forward.get("critic", 0.0), setup.lora, setup.checkpointing)
        scoring = forward["model"] + sum(flops for name, flops in forward.items() if name != "model")
        return train * job.values.get("num_ppo_epochs", 4) + scoring, forward["model"]

    def reference_flops(self, setup: Setup, forward: float) -> float:
        """What the forwards of dpo and kto take that nothing is learned from, a step's share, where `forward` is a
        step's forward: once all rows before the first step, and of kto in every step answers to other prompts too.
        """
        if not self.refers:
            return 0.0
        others = self.job.kind == "kto" and self.job.values.get("loss_type", "kto") == "kto"
        steps, rows = self.steps(setup), self.job.rows
        epochs = steps * self.per_step(setup) / rows if steps and rows else self.job.values["num_train_epochs"]
        return forward * ((2 if others else 1) / epochs + others)

    def micro_batches(self, setup: Setup) -> int:
        """Forwards and backwards of one device in a step."""
        return max(1, math.ceil(self.per_step(setup) / (setup.micro * setup.world)))

    def seconds_per_step(self, setup: Setup, flops: float, bandwidth: float) -> dict[str, float]:
        """Compute, decoding and traffic of a step on devices that reach `flops` FLOP/s and read `bandwidth` bytes/s."""
        train, decoding = self.flops_per_step(setup)
        out = {"compute": train / (flops * setup.world), "decode": 0.0, "traffic": 0.0}
        if decoding:
            a = self.anatomy("model")
            share = math.ceil(self.per_step(setup) / setup.world)
            batches = math.ceil(share / setup.rollout)
            size = setup.compute
            reading = costs.decode_seconds(a.products * size, self.cache(setup), self.job.target, bandwidth) * batches
            out["decode"] = max(reading, decoding / (flops * setup.world))
        if setup.gpu and setup.world > 1:
            out["traffic"] = self.traffic(setup) / costs.bus(devices.DEVICES[setup.gpu], setup.world)
        return out

    def traffic(self, setup: Setup) -> float:
        """Bytes that each device sends in a step (PPO: in an update)."""
        if setup.world == 1:
            return 0.0
        values, updates, micro = self.job.values, 1, self.micro_batches(setup)
        trained = ["model"]
        if self.job.kind == "ppo":
            minis = values.get("num_mini_batches", 1)
            updates, micro = values.get("num_ppo_epochs", 4) * minis, math.ceil(micro / minis)
            trained += ["critic"] if "critic" in self.job.models else []
        sent = 0.0
        for name in trained:
            a = self.anatomy(name, setup.lora)
            size = 4 if setup.lora else setup.size
            how = (setup.strategy, setup.world, micro, setup.compute, size, a.outside)
            sent += costs.traffic(a.parameters, a.trainable, *how)
        return sent * updates
