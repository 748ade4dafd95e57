"""Will it fit, how long will it take: `python -m pipelines plan RECIPE` says so for every stage before anything runs.

    python -m pipelines plan recipes/tldr_pythia1b.yaml --gpus 8 --gpu h100 --config_file accelerate_configs/zero2.yaml
    python -m pipelines plan recipes/demo.yaml policy --calibrate                       # this CPU, measured for a second
    python -m pipelines plan recipes/qwen3_rlhf.yaml --gpus 1 --gpu a100 --price-per-hour 1.5
    python -m pipelines plan --scaling                                                  # the tables of docs/scaling.md

No weights are read: models come from their config (a local folder, the hub or its cache, or what an earlier stage will
make), are counted and traced without numbers (`pipelines.anatomy`), and the formulae are in `pipelines.costs`. What does
not fit is tried again with one change after the other, and the changes that make it fit are named.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

from pipelines import costs, recipe, schema
from pipelines.costs import Memory, PlanError

SAMPLE = 2000  # rows whose tokens are counted; the rest are taken to be like them
CHARACTERS = 4  # to a token, where no tokenizer is at hand (English under the tokenizers of GPT-2 and later)
TEMPLATE = 8  # tokens that a chat template adds to a row, where no tokenizer is at hand
AUTO = {
    "mlm": "AutoModelForMaskedLM",
    "reward": "AutoModelForSequenceClassification",
    "classify": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
LAUNCHERS = {  # strategy -> its file, for suggestions
    "ddp": "accelerate_configs/ddp.yaml",
    "zero2": "accelerate_configs/zero2.yaml",
    "fsdp2": "accelerate_configs/fsdp2.yaml",
    "zero3": "accelerate_configs/zero3.yaml",
}


@dataclass(frozen=True)
class Setup:
    """Where and how a stage runs: what the command line and the recipe say, and what a suggestion may change."""

    gpu: str | None = None  # None: the CPU
    strategy: str = "single"
    world: int = 1
    offload: str = "none"  # "optimizer" or "all" (weights too) on the host
    micro: int = 8
    checkpointing: bool = False
    lora: bool = False
    quantize: bool = False
    size: int = 4  # bytes of a stored weight
    bf16: bool = False
    optim: str = "adamw_torch_fused"

    @property
    def precision(self) -> str:
        """As `anatomy.activations` takes it."""
        if not self.bf16:
            return "fp32"
        return "autocast" if self.size == 4 and self.strategy in ("single", "ddp") else "bf16"

    @property
    def sharded(self) -> bool:
        """Whether a launcher cuts up weights or optimizer: then there are no adapters (`models.adapt`)."""
        return self.strategy not in ("single", "ddp")


@dataclass
class Model:
    """One model of a stage: what it is built from."""

    config: object
    auto_class: str


@dataclass
class Job:
    """What is known of a stage before it runs."""

    stage: object
    kind: str
    values: dict  # args of the recipe over the stage's defaults
    models: dict[str, Model]  # "model", and of ppo "critic" and "reward 0", …
    rows: int | None  # training rows; None: not known without the hub
    lengths: list[int]  # tokens of rows (of a sample), cut to the context; empty: not known
    context: int
    answers: int = 1  # reward: answers to a ranking
    target: int = 0  # seq2seq: tokens of a target; ppo: of an answer
    notes: list[str] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """Tokens of the longest row: the context where nothing is known of the rows."""
        return max(self.lengths, default=self.context)

    @property
    def mean(self) -> float:
        """Tokens of a row on average."""
        if self.kind in ("pretrain", "mlm") or not self.lengths:
            return self.context
        return sum(self.lengths) / len(self.lengths)


# --- the recipe --------------------------------------------------------------------------------------------------


def describe(loaded, stage) -> Job:
    """What the stage will train on and with; raises `PlanError` where that cannot be known."""
    values = {"per_device_train_batch_size": 8, "num_train_epochs": 3.0, **stage.module.DEFAULTS}
    values |= stage.sections.get("args", {})
    tokenizer = _tokenizer(loaded, stage)
    notes = [] if tokenizer else [f"no tokenizer at hand yet: {CHARACTERS} characters are taken for a token"]
    section = stage.sections.get("model", {})
    texts, rows, count, labels = _texts(stage)
    settings = {}
    if stage.kind == "classify":
        settings["num_labels"] = len(stage.sections.get("task", {}).get("labels") or labels) or 2
    elif stage.kind == "reward":
        settings["num_labels"] = 1
    config = _config(loaded, stage, section.get("model_name_or_path"), tokenizer, settings)
    models = {"model": Model(config, AUTO.get(stage.kind, "AutoModelForCausalLM"))}
    if stage.kind == "ppo":
        reward = stage.sections.get("reward", {})
        scorers = reward.get("models") or []
        start = reward.get("critic") or (scorers or [section["model_name_or_path"]])[0]
        named = {"critic": start} if start != "shared" else {}  # a value head weighs nothing
        named |= {f"reward {i}": path for i, path in enumerate(scorers)}
        for name, path in named.items():
            of_it = _config(loaded, stage, path, None, {"num_labels": 1}, overrides=False)
            models[name] = Model(of_it, AUTO["reward"])
    context = _context(config, values, stage.kind)
    target = 0
    if stage.kind == "seq2seq":
        context, target = values.get("max_source_length", 512), values.get("max_target_length", 128)
    elif stage.kind == "ppo":
        target = values.get("response_length", 53)
        context = min(values.get("max_prompt_length") or context, context) - target
    lengths = _lengths(stage, texts, tokenizer)
    drop = stage.sections.get("data", {}).get("too_long", "drop") == "drop" and stage.kind in ("sft", "reward")
    fitting = [n for n in lengths if n <= context]
    if drop and rows and fitting:
        rows = rows * len(fitting) // len(lengths)
    if rows is None and not lengths:
        notes.append("the rows of hub data are not counted: each is taken to fill the context")
    lengths = fitting if drop else [min(n, context) for n in lengths]
    if stage.kind in ("pretrain", "mlm") and rows:
        rows = max(1, round(rows * (sum(lengths) / len(lengths) + 1) / context))  # windows of the text laid end to end
    return Job(stage, stage.kind, values, models, rows, lengths, context, count, target, notes)


def _config(loaded, stage, path: str | None, tokenizer, settings: dict, overrides: bool = True):
    """The config of the model at `path` (a stage's will be what that stage starts from), or of a new one."""
    import transformers

    section = stage.sections.get("model", {})
    changes = dict(section.get("config") or {}) if overrides else {}
    if path and path.startswith("stage:"):
        name = path.removeprefix("stage:").split("/")[0]
        folder = loaded.output_dir / path.removeprefix("stage:")
        parent = loaded[name]
        if (folder / "config.json").is_file():
            config = transformers.AutoConfig.from_pretrained(folder)
        else:
            source = parent.sections.get("model", {}).get("model_name_or_path")
            if path.endswith("/critic"):
                source = (parent.sections.get("reward", {}).get("models") or [source])[0]
            config = _config(loaded, parent, source, _tokenizer(loaded, parent), {})
    elif path:
        if "model_type" in changes:
            changes = {}
        try:
            config = transformers.AutoConfig.from_pretrained(
                path,
                revision=section.get("model_revision") or "main",
                trust_remote_code=section.get("trust_remote_code", False),
            )
        except (OSError, ValueError) as error:
            raise PlanError(
                f"stages.{stage.name}.model: no config of {path!r} ({str(error).splitlines()[0]}). A hub id needs network "
                "access or the hub's cache; a folder needs a config.json (no weights are read)."
            ) from error
    else:
        asked = stage.sections.get("tokenizer", {})
        vocabulary = len(tokenizer) if tokenizer else asked.get("vocab_size", 8192) if asked.get("train") else 0
        changes["vocab_size"] = max(changes.get("vocab_size", 0), vocabulary)
        if not changes["vocab_size"]:
            del changes["vocab_size"]
        return transformers.AutoConfig.for_model(changes.pop("model_type"), **changes, **settings)
    for key, value in (changes | settings).items():
        setattr(config, key, value)
    if tokenizer is not None and len(tokenizer) > config.get_text_config().vocab_size:  # as chat.fit_model
        config.get_text_config().vocab_size = len(tokenizer)
    return config


@lru_cache(None)
def _from_folder(path: str):
    """The tokenizer in a folder or the hub's cache, or None."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError):
        return None


def _tokenizer(loaded, stage):
    """A copy of the stage's tokenizer with its chat template, or None where it is not there yet."""
    import copy

    from pipelines import chat

    section = stage.sections.get("model", {})
    path = section.get("tokenizer_name_or_path") or section.get("model_name_or_path")
    if path is None:
        return None
    if path.startswith("stage:"):
        name = path.removeprefix("stage:").split("/")[0]
        folder = loaded.output_dir / name
        found = _from_folder(str(folder)) if (folder / "config.json").is_file() else _tokenizer(loaded, loaded[name])
    else:
        found = _from_folder(str(Path(path).expanduser()))
    if found is None:
        return None
    tokenizer, template = copy.deepcopy(found), section.get("chat_template")
    if stage.kind in ("sft", "reward") or template:
        chat.dress(tokenizer, template)
    elif stage.kind in ("pretrain", "classify") and tokenizer.eos_token:
        chat.ensure_pad(tokenizer)
    return tokenizer


def _texts(stage) -> tuple[list, int | None, int, set]:
    """`(a sample of rows, rows in all, answers to a ranking at most, labels seen)` of the training data."""
    from pipelines import data

    section = stage.sections["data"]
    if not all(data.is_local(source["path"]) for source in data.sources(section, "train")):
        return [], None, 2, set()
    if section.get("streaming"):
        found = data.endless(section, stage.module.ROWS, stage.seed, [{} for _ in data.sources(section, "train")])
        return list(islice(found, SAMPLE)), None, 1, set()
    rows, answers, labels = [], 1, set()
    count = 0
    for row in data.stream(section, "train", stage.module.ROWS, stage.seed, stage.sections.get("task")):
        count += 1
        if len(rows) < SAMPLE:
            rows.append(row)
        answers = max(answers, len(row.get("completions", [0])))
        if stage.kind == "classify":
            label = row["label"]
            labels.update(label if isinstance(label, list) else [label])
    return rows, count, answers, labels


def _lengths(stage, rows: list[dict], tokenizer) -> list[int]:
    """Tokens of each row (of its longest answer; ppo: of the prompt), counted or estimated from the characters."""
    from pipelines import chat

    def tokens(text: str) -> int:
        return len(tokenizer(text)["input_ids"]) if tokenizer else math.ceil(len(text) / CHARACTERS)

    def chatted(prompt, answer: str) -> int:
        if tokenizer and tokenizer.chat_template:
            return sum(map(len, chat.encode_answer(tokenizer, prompt, answer)))
        return tokens(chat.as_text(prompt)) + tokens(answer) + TEMPLATE

    out = []
    for row in rows:
        if "completions" in row:
            out.append(max(chatted(row["prompt"], answer) for answer in row["completions"]))
        elif "completion" in row:
            out.append(chatted(row["prompt"], row["completion"]))
        elif "messages" in row:
            out.append(
                len(chat.encode_messages(tokenizer, row["messages"])[0])
                if tokenizer and tokenizer.chat_template
                else sum(tokens(m["content"]) + TEMPLATE for m in row["messages"])
            )
        elif stage.kind == "ppo":
            known = tokenizer and tokenizer.chat_template
            prompt = row["prompt"]
            out.append(len(chat.encode_prompt(tokenizer, prompt)) if known else tokens(chat.as_text(prompt)) + TEMPLATE)
        elif "source" in row:
            out.append(tokens(row["source"]))
        else:
            out.append(tokens(row["text"]) + (tokens(row["text_pair"]) if row.get("text_pair") else 0))
    return out


def _context(config, values: dict, kind: str) -> int:
    """The longest row in tokens, as `models.context_length`."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 1024
    asked = values.get("max_length")
    return min(limit, asked) if asked else limit if kind == "ppo" else min(limit, 1024)


# --- memory ------------------------------------------------------------------------------------------------------


def micro_batch(job: Job, setup: Setup) -> tuple[int, int]:
    """`(rows, tokens of each)` of the largest micro-batch of one device."""
    micro = setup.micro
    if job.kind in ("pretrain", "mlm"):
        return micro, job.context
    if job.kind == "sft" and job.values.get("packing"):
        return micro, job.context
    if job.kind == "sft" and job.lengths and job.rows:
        import numpy as np

        lengths = np.resize(job.lengths, max(len(job.lengths), micro))
        order = np.random.default_rng([job.stage.seed, 0]).permutation(len(lengths))  # as training.GlobalOrder
        batches = order[: len(order) // micro * micro].reshape(-1, micro)
        tokens = int(lengths[batches].sum(1).max())
        return math.ceil(tokens / job.longest), job.longest
    if job.kind == "reward":
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
        from unittest import mock

        import peft
        import torch
        from transformers.pytorch_utils import Conv1D
        from trl import ModelConfig, get_peft_config

        config = get_peft_config(ModelConfig(use_peft=True, **said))
        config.task_type = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
        if not said.get("lora_target_modules") or said["lora_target_modules"] == ["all-linear"]:
            config.target_modules = "all-linear"
        config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
        # peft moves adapters to the device where they are already, which fake tensors cannot.
        with mock.patch.object(torch.nn.Module, "to", lambda module, *args, **kwargs: module):
            return peft.get_peft_model(model, config, autocast_adapter_dtype=False)

    return wrap


class Planner:
    """Memory, work and time of one stage under any setup. Models are examined and traced once for each question."""

    def __init__(self, job: Job):
        self.job = job
        self.known: dict = {}

    def anatomy(self, name: str, lora: bool = False):
        """Counts of the stage's model called `name`."""
        from pipelines import anatomy

        key = (name, lora)
        if key not in self.known:
            model = self.job.models[name]
            self.known[key] = anatomy.examine(model.config, model.auto_class, adapter(self.job.stage) if lora else None)
        return self.known[key]

    def traced(self, name: str, setup: Setup) -> float:
        """Activations of `name` for the largest micro-batch, with checkpointing what is left of them, and their gradients."""
        from pipelines import anatomy

        rows, length = micro_batch(self.job, setup)
        key = (name, rows, length, setup.precision, setup.lora)
        if key not in self.known:
            model, kind = self.job.models[name], self.job.kind
            kept, exact = anatomy.activations(
                model.config,
                model.auto_class,
                rows,
                length,
                precision=setup.precision,
                padded=kind in ("classify", "seq2seq"),
                decoder_length=self.job.target if kind == "seq2seq" else 0,
                dropout=kind != "ppo",
                fast_gelu=kind in ("pretrain", "sft", "reward", "ppo"),
                adapt=adapter(self.job.stage) if setup.lora else None,
            )
            note = f"activations of {self.anatomy(name).architecture} by formula: it cannot be run without numbers"
            if not exact and note not in self.job.notes:
                self.job.notes.append(note)
            self.known[key] = kept
        kept, a = self.known[key], self.anatomy(name)
        work = costs.backward_work(kept, a.layers)
        if setup.checkpointing:
            kept = costs.checkpointed(kept, rows * length, a.hidden, a.layers, 4 if setup.precision == "fp32" else 2)
        return kept + work

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
        )

    def memory(self, setup: Setup) -> Memory:
        """Bytes on one device at the peak of the stage."""
        job, kind = self.job, self.job.kind
        model = self.states("model", setup)
        out = Memory(
            process=costs.GPU_PROCESS if setup.gpu else costs.CPU_PROCESS,
            weights=model.weights,
            gradients=model.gradients,
            optimizer=model.optimizer,
            activations=self.traced("model", setup),
            head=self.head(setup),
            buffers=model.buffers,
        )
        if kind != "ppo":
            return out
        critic = self.states("critic", setup) if "critic" in job.models else costs.States(0.0)
        scorers = [name for name in job.models if name.startswith("reward")]
        return replace(
            out,
            activations=out.activations + (self.traced("critic", setup) if "critic" in job.models else 0.0),
            critic=critic.total - critic.buffers,
            reference=0.0 if setup.lora else self.states("model", setup, trained=False).weights,
            rewards=sum(self.states(name, setup, trained=False).weights for name in scorers),
            kv_cache=self.cache(setup),
            rollouts=self.rollouts(setup),
        )

    def decoded(self, setup: Setup) -> int:
        """Answers that one process of PPO decodes and scores at once; 64 prompts are tried before the first update."""
        share = math.ceil(max(self.per_step(setup), 64) / setup.world)
        return min(self.job.values.get("local_rollout_forward_batch_size", 64), share)

    def cache(self, setup: Setup) -> float:
        """KV cache of the answers that are decoded at once."""
        a, tokens = self.anatomy("model"), self.decoded(setup) * (self.job.longest + self.job.target)
        return costs.kv_cache(tokens, a.layers, a.kv, 2 if setup.bf16 else 4)

    def rollouts(self, setup: Setup) -> float:
        """What scoring the answers of one batch takes beside weights and cache, and sampling's float32 probabilities."""
        a, rows = self.anatomy("model"), self.decoded(setup)
        tokens, answers = rows * (self.job.longest + self.job.target), rows * self.job.target
        chunk = self.chunk(setup) if a.fusable and setup.strategy not in costs.SHARDED else answers
        sampling = 3 * rows * a.vocabulary * 4
        return sampling + costs.scoring(tokens, a.widest, answers, a.vocabulary, chunk, 2 if setup.bf16 else 4)

    def chunk(self, setup: Setup) -> int:
        """Rows of logits that the fused head holds at once, as `kernels.chunk_rows`."""
        from pipelines import kernels

        size, vocabulary = 2 if setup.bf16 else 4, self.anatomy("model").vocabulary
        if setup.gpu:
            return max(kernels.GPU_ROWS, kernels.GPU_BYTES // (vocabulary * size))
        return max(kernels.CPU_ROWS * 4 // size, kernels.CPU_BYTES // (vocabulary * size))

    def head(self, setup: Setup) -> float:
        """What comes of the hidden states: chunks of logits, or all of them where the head cannot be fused."""
        from pipelines import kernels

        a, kind = self.anatomy("model"), self.job.kind
        rows, length = micro_batch(self.job, setup)
        tokens, size = rows * length, 2 if setup.bf16 else 4
        if not a.vocabulary or kind in ("reward", "classify"):
            return 0.0
        if kind == "seq2seq":
            return costs.full_logits(rows * self.job.target, a.vocabulary, size)
        if kind == "mlm":
            hidden = math.ceil(tokens * self.job.values.get("mlm_probability", 0.15))
            return costs.full_logits(hidden, a.vocabulary, size)
        if kind == "ppo":
            tokens = rows * self.job.target
        if setup.strategy in costs.SHARDED or not a.fusable:
            return costs.full_logits(tokens, a.vocabulary, size)
        chunk = self.chunk(setup)
        return costs.fused_head(
            tokens, a.vocabulary, a.hidden, chunk, size, chunk if setup.gpu else kernels.CPU_WIDE_ROWS
        )

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
        rows = self.job.rows
        if self.job.kind == "sft" and values.get("packing"):
            rows = max(1, math.ceil(rows * self.job.mean / self.job.context))
        if self.job.kind == "ppo":
            return math.ceil(math.ceil(values["num_train_epochs"] * rows) / per_step)
        return costs.steps(rows, per_step, values["num_train_epochs"])

    def tokens_per_step(self, setup: Setup) -> float:
        """Tokens that go through the model in a step: those of packs and windows, of all answers, of prompt and answer."""
        job, per_step = self.job, self.per_step(setup)
        if job.kind in ("pretrain", "mlm") or (job.kind == "sft" and job.values.get("packing")):
            return per_step * job.context
        return per_step * job.answers * job.mean + per_step * job.target

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
            return train, 0.0
        train += costs.train_flops(forward.get("critic", 0.0), setup.lora, setup.checkpointing)
        scoring = forward["model"] + sum(flops for name, flops in forward.items() if name != "model")
        return train * job.values.get("num_ppo_epochs", 4) + scoring, forward["model"]

    def micro_batches(self, setup: Setup) -> int:
        """Forwards and backwards of one device in a step."""
        return max(1, math.ceil(self.per_step(setup) / (setup.micro * setup.world)))

    def seconds_per_step(self, setup: Setup, flops: float, bandwidth: float) -> dict[str, float]:
        """Compute, decoding and traffic of a step on devices that reach `flops` FLOP/s and read `bandwidth` bytes/s."""
        train, decoding = self.flops_per_step(setup)
        out = {"compute": train / (flops * setup.world), "decode": 0.0, "traffic": 0.0}
        if decoding:
            a, values = self.anatomy("model"), self.job.values
            share = math.ceil(self.per_step(setup) / setup.world)
            batches = math.ceil(share / values.get("local_rollout_forward_batch_size", 64))
            size = 2 if setup.bf16 else 4
            reading = costs.decode_seconds(a.products * size, self.cache(setup), self.job.target, bandwidth) * batches
            out["decode"] = max(reading, decoding / (flops * setup.world))
        if setup.gpu and setup.world > 1:
            a = self.anatomy("model", setup.lora)
            updates, micro = 1, self.micro_batches(setup)
            if self.job.kind == "ppo":
                minis = self.job.values.get("num_mini_batches", 1)
                updates, micro = self.job.values.get("num_ppo_epochs", 4) * minis, math.ceil(micro / minis)
            models = 2 if "critic" in self.job.models else 1  # the critic is as large as the policy
            sent = costs.traffic(a.parameters, a.trainable, setup.strategy, setup.world, micro) * updates * models
            out["traffic"] = sent / costs.bus(costs.DEVICES[setup.gpu], setup.world)
        return out


# --- what would fit ----------------------------------------------------------------------------------------------


def suggestions(planner: Planner, setup: Setup, room: float) -> list[tuple[str, Setup, Memory]]:
    """Changes that make the stage fit into `room` bytes, the smallest first: `(what to set, setup, its memory)`.

    Each change is tried alone; where none suffices, on top of those before it.
    """
    kind = planner.job.kind
    tried = [c for c in _changes(kind, setup)]
    alone = _fitting(planner, [[change] for change in tried], setup, room)
    if alone:
        return alone
    shrunk = [tried[0]] if setup.micro > 1 else []
    if not setup.checkpointing:
        shrunk.append(next(c for c in tried if "checkpointing" in c[0]))
    return _fitting(planner, [[*shrunk, change] for change in tried if change not in shrunk] + [shrunk], setup, room)


def _changes(kind: str, setup: Setup) -> list[tuple[str, dict]]:
    """`(what to set, the fields of the setup that it changes)`."""
    out: list[tuple[str, dict]] = []
    if setup.micro > 1:
        out.append(("args.per_device_train_batch_size={micro}", {"micro": 1}))
    if not setup.checkpointing:
        out.append(("args.activation_checkpointing=true", {"checkpointing": True}))
    if kind in recipe.ADAPTED and not setup.lora and not setup.sharded:
        out.append(("model.use_peft=true", {"lora": True}))
    if kind in recipe.ADAPTED and not setup.sharded and not setup.quantize:
        out.append(("model.use_peft=true and model.load_in_4bit=true", {"lora": True, "quantize": True}))
    if not setup.gpu:
        return out
    shards = {} if setup.lora else {k: v for k, v in LAUNCHERS.items() if k not in ("ddp", setup.strategy)}
    if setup.world > 1:
        out += [(f"--config_file {file}", {"strategy": name, "quantize": False}) for name, file in shards.items()]
    if setup.world > 1 and not setup.lora:
        for what in ("optimizer", "all"):
            keys = "offload_optimizer_device: cpu" + (" and offload_param_device: cpu" if what == "all" else "")
            out.append((f"{LAUNCHERS['zero3']} with {keys}", {"strategy": "zero3", "offload": what}))
    if not setup.lora:
        for factor in (2, 4, 8, 16, 32, 64):
            more = setup.world * factor
            strategy = setup.strategy if setup.strategy in costs.SHARDED else "fsdp2"
            out.append((f"--gpus {more} with {LAUNCHERS[strategy]}", {"strategy": strategy, "world": more}))
    return out


def _fitting(planner: Planner, combinations: list, setup: Setup, room: float) -> list[tuple[str, Setup, Memory]]:
    found: list[tuple[str, Setup, Memory]] = []
    for combination in combinations:
        if any("--gpus" in c[0] for c in combination) and any("--gpus" in words for words, *_ in found):
            continue  # the fewest that suffice are enough
        fields_ = {k: v for _, change in combination for k, v in change.items()}
        changed = replace(setup, **fields_)
        if "micro" in fields_:  # the largest micro-batch that fits, not the smallest
            changed = replace(changed, micro=max(1, setup.micro // 2))
            while planner.memory(changed).total > room and changed.micro > 1:
                changed = replace(changed, micro=changed.micro // 2)
        memory = planner.memory(changed)
        if memory.total <= room:
            words = " and ".join(words.format(micro=changed.micro) for words, _ in combination)
            found.append((words, changed, memory))
    return found


# --- the command -------------------------------------------------------------------------------------------------


def launcher(file: str) -> dict:
    """Strategy, offload, processes and bf16 that an Accelerate config file asks for."""
    import yaml

    path = Path(file)
    if not path.is_file():
        near = sorted(p.as_posix() for p in Path("accelerate_configs").glob("*.yaml"))
        raise PlanError(f"--config_file {file}: no such file{schema.meant(path.as_posix(), near)}")
    told = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    kind, world = str(told.get("distributed_type", "NO")).upper(), int(told.get("num_processes", 1))
    strategy, offload = "ddp" if world > 1 else "single", "none"
    if kind == "DEEPSPEED":
        deepspeed = told.get("deepspeed_config", {})
        stage = int(deepspeed.get("zero_stage", 2))
        if stage == 0:
            strategy = "ddp"
        else:
            strategy = f"zero{stage}"
        if deepspeed.get("offload_param_device", "none") != "none":
            offload = "all"
        elif deepspeed.get("offload_optimizer_device", "none") != "none":
            offload = "optimizer"
    elif kind == "FSDP":
        strategy = "fsdp2"
        offload = "all" if (told.get("fsdp_config") or {}).get("fsdp_offload_params") else "none"
    return {"strategy": strategy, "offload": offload, "world": world, "cpu": bool(told.get("use_cpu")),
            "bf16": told.get("mixed_precision") == "bf16"}  # fmt: skip


def setup_of(job: Job, args: argparse.Namespace) -> Setup:
    """The setup that the command line and the recipe ask for."""
    from pipelines.training import accumulation

    told = launcher(args.config_file) if args.config_file else {}
    gpu = costs.device(args.gpu or "h100").name if args.gpu or args.gpus else None
    world = args.gpus or args.processes or told.get("world") or 1
    strategy = told.get("strategy", "ddp")
    if strategy in ("single", "ddp"):
        strategy = "ddp" if world > 1 else "single"
    values, section = job.values, job.stage.sections.get("model", {})
    batch = accumulation(values, world)
    if job.kind == "ppo" and values.get("global_batch_size"):
        batch = {"per_device_train_batch_size": batch["per_device_train_batch_size"]}
    checkpointing = values.get("activation_checkpointing")
    if checkpointing is None:
        checkpointing = values.get("gradient_checkpointing")
    lora = bool(section.get("use_peft"))
    setup = Setup(
        gpu=gpu,
        strategy=strategy,
        world=world,
        offload=told.get("offload", "none"),
        micro=batch.get("per_device_train_batch_size", values["per_device_train_batch_size"]),
        checkpointing=bool(checkpointing),
        lora=lora,
        quantize=bool(section.get("load_in_4bit")),
        size=2 if section.get("dtype") in ("bfloat16", "float16") else 4,
        bf16=values.get("fp16") or values.get("bf16", bool(gpu and costs.DEVICES[gpu].bf16) or told.get("bf16", False)),
        optim=str(values.get("optim", "adamw_torch_fused")),
    )
    if setup.lora and setup.sharded:
        raise PlanError(f"stages.{job.stage.name}.model.use_peft: adapters run on one process or plain data parallelism "
                        f"(accelerate_configs/ddp.yaml), not under {setup.strategy}")  # fmt: skip
    return setup


def calibrate() -> tuple[float, float]:
    """`(FLOP/s of a float32 matrix product, bytes/s read and written)` of this machine, the best of a second's tries."""
    import torch

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    products, big = [], torch.empty(2**26, dtype=torch.uint8)
    copies, until = [], time.perf_counter() + 1
    target = torch.empty_like(big)
    while time.perf_counter() < until or len(copies) < 3:
        begin = time.perf_counter()
        a @ b
        products.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        target.copy_(big)
        copies.append(time.perf_counter() - begin)
    return 2 * 1024**3 / min(products), 2 * big.numel() / min(copies)


def parser() -> argparse.ArgumentParser:
    """The verb's command line."""
    out = argparse.ArgumentParser(
        prog="pipelines plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("recipe", nargs="?", help="a YAML file; see recipes/")
    out.add_argument("words", nargs="*", metavar="STAGE | KEY=VALUE", help="stages to plan (default: all); overrides")
    out.add_argument("--gpus", type=int, help="number of GPUs, one process each (default: the config file's, or 1)")
    out.add_argument("--gpu", help=f"one of {', '.join(costs.DEVICES)} (default with --gpus: h100)")
    out.add_argument("--processes", type=int, help="without GPUs: processes on this machine's CPU")
    out.add_argument("--config_file", "--config-file", help="the file that `accelerate launch` will get")
    out.add_argument("--price-per-hour", type=float, help="of one GPU (or of the machine without GPUs)")
    out.add_argument(
        "--mfu", type=float, default=costs.MFU, help="share of the peak FLOP/s reached (default %(default)s)"
    )
    out.add_argument("--calibrate", action="store_true", help="measure this CPU for a second, to say how long")
    out.add_argument("--scaling", action="store_true", help="print the tables of docs/scaling.md instead")
    return out


def main(argv: list[str]) -> int:
    """Print the plan of a recipe; returns 1 where a stage does not fit."""
    args = parser().parse_intermixed_args(argv)
    if args.scaling:
        from pipelines import scaling

        return scaling.main()
    if not args.recipe:
        raise PlanError("plan needs a recipe (or --scaling); see recipes/")
    names = [word for word in args.words if "=" not in word]
    loaded = recipe.load(args.recipe, [word for word in args.words if "=" in word], read_data=False)
    known = [stage.name for stage in loaded.stages]
    for name in names:
        if name not in known:
            raise PlanError(f"no stage {name!r} in {args.recipe}{schema.meant(name, known)}; it has {', '.join(known)}")
    if args.gpu:
        costs.device(args.gpu)  # what is wrong with the command is said before models are looked at
    if args.config_file:
        launcher(args.config_file)
    machine = calibrate() if args.calibrate else None
    total_seconds, unknown, too_big = 0.0, False, False
    for stage in loaded.stages:
        if names and stage.name not in names:
            continue
        job = describe(loaded, stage)
        fits, seconds = report(Planner(job), setup_of(job, args), args, machine)
        too_big |= not fits
        unknown |= seconds is None
        total_seconds += seconds or 0.0
    if not unknown and (len(names) or len(known)) > 1:
        print(f"all: {_time(total_seconds)}")
    return 1 if too_big else 0


def room_of(setup: Setup) -> float:
    """Bytes that one process may use."""
    if setup.gpu:
        return costs.DEVICES[setup.gpu].memory
    import psutil

    return psutil.virtual_memory().total / setup.world


def report(planner: Planner, setup: Setup, args, machine: tuple[float, float] | None) -> tuple[bool, float | None]:
    """Print one stage; returns whether it fits and the seconds it takes (None: not known)."""
    job, memory, room = planner.job, planner.memory(setup), room_of(setup)
    a = planner.anatomy("model", setup.lora)
    where = f"{setup.world} x {setup.gpu or 'CPU process'}"
    how = {"fp32": "float32", "autocast": "bf16 autocast", "bf16": "bf16"}[setup.precision]
    how += (", LoRA" if setup.lora else "") + (", 4 bits" if setup.quantize else "")
    how += (", checkpointing" if setup.checkpointing else "") + (
        f", {setup.offload} offloaded" if setup.offload != "none" else ""
    )
    print(f"{job.stage.name} ({job.kind}) on {where}, {setup.strategy}, {how}")
    line("model", f"{a.architecture}: {a.parameters:,} parameters, {a.trainable:,} trained")
    for name in job.models:
        if name != "model":
            shares = planner.shares_base
            other = planner.anatomy(name, setup.lora and (shares or name == "critic"))
            trained = f", {other.trainable:,} trained" if name == "critic" else ", frozen"
            size = other.trainable if shares else other.parameters
            where = " on the policy's base" if shares else ""
            line("", f"{name}: {other.architecture}: {size:,} parameters{where}{trained}")
    rows, length = micro_batch(job, setup)
    steps, per_step, tokens = planner.steps(setup), planner.per_step(setup), planner.tokens_per_step(setup)
    unit = "updates" if job.kind == "ppo" else "steps"
    line("steps", f"{'unknown' if steps is None else f'{steps:,}'} {unit} of {per_step:,} rows "
         f"({setup.micro} a device at once: up to {rows} x {length} tokens)")  # fmt: skip
    train, decoding = planner.flops_per_step(setup)
    count = steps or 1
    line("work", f"{_si(tokens * count)} tokens, {_si((train + decoding) * count)}FLOPs" + ("" if steps else " a step"))
    parts = [(f.name, getattr(memory, f.name)) for f in fields(memory)]
    line("memory", f"{memory.total / 1e9:.2f} GB a device: "
         + ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.2f}" for name, size in parts if size))  # fmt: skip
    fits = memory.total <= room
    line("", f"{'fits' if fits else 'DOES NOT FIT'} into {room / 1e9:.1f} GB")
    if not fits:
        found = suggestions(planner, setup, room)
        for words, _, changed in found:
            line("", f"  would fit with {words}: {changed.total / 1e9:.2f} GB")
        if not found:
            line("", "  nothing tried makes it fit: a smaller model, or GPUs with more memory")
    seconds = _report_time(planner, setup, args, machine, steps)
    for note in job.notes:
        line("note", note)
    return fits, seconds


def _report_time(planner: Planner, setup: Setup, args, machine, steps: int | None) -> float | None:
    if setup.gpu:
        hardware = costs.DEVICES[setup.gpu]
        peak = hardware.bf16 if setup.bf16 and hardware.bf16 else hardware.fp32
        flops, bandwidth = peak * args.mfu, hardware.bandwidth
        basis = f"assuming {args.mfu:.0%} of {peak / 1e12:.0f} TFLOP/s"
    elif machine:
        flops, bandwidth = machine[0] * costs.CPU_SHARE / setup.world, machine[1] / setup.world
        basis = f"assuming {costs.CPU_SHARE:.0%} of the {machine[0] / 1e9:.0f} GFLOP/s measured here"
    else:
        line("time", "not estimated: --calibrate measures this CPU, --gpu names another device")
        return None
    parts = planner.seconds_per_step(setup, flops, bandwidth)
    step = parts["compute"] + parts["decode"] + parts["traffic"]
    detail = ", ".join(f"{name} {_time(value)}" for name, value in parts.items() if value)
    if steps is None:
        line("time", f"{_time(step)} a step ({detail}), {basis}; how many steps is not known")
        return None
    cost = ""
    if args.price_per_hour is not None:
        count = setup.world if setup.gpu else 1
        cost = f"; costs {step * steps / 3600 * count * args.price_per_hour:,.2f} at {args.price_per_hour:g} an hour"
    line("time", f"{_time(step * steps)} ({_time(step)} a step: {detail}), {basis}{cost}")
    return step * steps


def line(head: str, text: str) -> None:
    """One line of the report."""
    print(f"  {head:<8}{text}")


def _si(value: float) -> str:
    for power, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:.3g} {letter}"
    return f"{value:.3g} "


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"
