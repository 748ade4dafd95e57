"""What every training stage shares: arguments for the hardware at hand, and a Trainer that loses nothing.

`ChainTrainer` is mixed into transformers' and TRL's trainers. It adds what users of those miss: the same data order
and global batch at any world size, checkpoints that are whole or not used, a clean stop on Ctrl-C, and a stop on NaN
that names the rows.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from pipelines import SetupError, artifact, corpus, launch, masking, models
from pipelines.packing import PackedCollator

logger = logging.getLogger(__name__)

COMPLETE = "complete"  # an empty file in a checkpoint, written when every process has written its part


class Interrupted(Exception):
    """The user stopped a stage; its last step is saved, and the same command resumes it."""


class NotFinite(ArithmeticError):
    """The loss is NaN or infinite; the message names the step, the rows and the last good checkpoint."""


def build_args(stage, **defaults):
    """The stage's `args:` as its dataclass, with what the chain sets and what the hardware suggests filled in.

    Order of precedence: the recipe, the stage module's `defaults`, the hardware (`silent_precision`), the class.
    """
    state = PartialState()
    values = {"report_to": ["tensorboard"], "save_total_limit": 2, "save_steps": 0.1, "logging_steps": 10}
    values |= {"eval_strategy": "steps", "eval_steps": 0.1} if stage.sections.get("data", {}).get("validation") else {}
    values |= {"ddp_find_unused_parameters": False, "gradient_checkpointing": False}
    zero = state.distributed_type.value == "DEEPSPEED"
    if state.device.type == "cpu":
        values |= {"dataloader_pin_memory": False} | ({"ddp_backend": "gloo"} if zero else {"use_cpu": True})
    values |= defaults
    said = stage.sections.get("args", {})
    values |= {"bf16": False} | said  # TRL's default would be bf16 anywhere
    why = "as the recipe says"
    if said.keys().isdisjoint(("bf16", "fp16")):
        chosen, why = silent_precision(stage)
        values |= {"bf16": chosen == "bf16", "fp16": chosen == "fp16"}
    values |= {"output_dir": str(stage.checkpoints), "seed": stage.seed, "remove_unused_columns": False}
    values |= accumulation(values, state.num_processes)
    asked = values.get("fp16")
    _fit_to_cpu(values, state.device.type)
    why = "fp16 needs a GPU" if asked and not values["fp16"] else why
    if zero:  # DeepSpeed divides by the steps of its own config, which `accelerate launch` sets to 1
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(values.get("gradient_accumulation_steps", 1))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(stage.folder / "logs")
    module, _, name = stage.module.SECTIONS["args"].partition(":")
    cls = getattr(__import__(module, fromlist=[name]), name)
    try:
        args = cls(**values)
    except SetupError:
        raise
    except (ValueError, ImportError) as error:  # settings that exclude each other, a package that is missing
        raise SetupError(f"stages.{stage.name}.args: {error}") from error
    args.mixed_precision = {"fp32": "no"}.get(precision(args), precision(args))  # else the launcher's would win unseen
    stage.resolved = {k: v for k, v in args.to_dict().items() if v is not None}
    if PartialState().is_main_process:
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * state.num_processes
        logger.info(
            "%s: %s (%s) on %d x %s, %d rows per step (%d per device x %d accumulated x %d processes)",
            stage.name, precision(args), why, state.num_processes, state.device.type, per_step,
            args.per_device_train_batch_size, args.gradient_accumulation_steps, state.num_processes,
        )  # fmt: skip
    return args


def precision(args) -> str:
    """What the matrix products of a training are computed in: bf16, fp16 (both by autocast) or fp32."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


def silent_precision(stage) -> tuple[str, str]:
    """`(bf16, fp16 or fp32, why)` where the recipe says nothing; every process calls it and gets the same.

    A run that goes on stays with what it began in. Else the launcher's word counts (`--mixed_precision`), else bf16 is
    taken where the GPUs of all processes compute in it themselves. fp16 is never taken without a word: it overflows where
    the others do not, and its loss scaling skips steps.
    """
    state, asked = PartialState(), os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked in ("bf16", "fp16"):
        chosen, why = asked, "as the launcher says"
    elif state.device.type == "cpu":
        chosen, why = "fp32", "the default on CPUs" + ("; bf16 may be faster here" if models.native_bf16("cpu") else "")
    elif all(gather_object([models.native_bf16(state.device.type)])):
        chosen, why = "bf16", "the GPUs compute in it"
    else:
        chosen, why = "fp32", "not every GPU here computes in bf16"
    begun = [artifact.begun_in(stage.checkpoints) if state.is_main_process else None]
    broadcast_object_list(begun)
    if begun[0] not in (None, chosen):
        return begun[0], f"as this run began; from the start it would be {chosen} here: {why}"
    return chosen, why


def _fit_to_cpu(values: dict, device: str) -> None:
    """What only a GPU can do is left out on a CPU, and said, so that one recipe runs on both."""
    if device != "cpu":
        return
    instead = {
        "fp16": "fp32",
        "fp16_full_eval": "evaluation as training",
        "tf32": "fp32",
        "use_liger_kernel": "our own fused loss, on any device",
    }
    for key, other in instead.items():
        if values.get(key):
            logger.warning("args.%s needs a GPU; on this CPU: %s", key, other)
            values[key] = None if key == "tf32" else False
    compiled = any(values.get(f"torch_compile{key}") for key in ("", "_backend", "_mode"))
    if compiled and values.get("torch_compile_backend") in (None, "inductor") and not _has_compiler():
        logger.warning("args.torch_compile needs a C++ compiler and Python's headers; without them here: off")
        values |= {"torch_compile": False, "torch_compile_backend": None, "torch_compile_mode": None}
    if (values.get("bf16") or values.get("bf16_full_eval")) and not models.native_bf16("cpu"):
        logger.warning("args.bf16: this CPU has no bf16 arithmetic and emulates it, slowly; bf16: false is faster")


def _has_compiler() -> bool:
    """Whether inductor, which writes C++ for a CPU, finds what turns it into code."""
    import sysconfig

    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()


def accumulation(values: dict, world: int) -> dict:
    """Micro-batch and accumulation that give `global_batch_size` rows per step on `world` processes."""
    total, micro = values.get("global_batch_size"), values.get("per_device_train_batch_size", 8)
    if total is None:
        return {}
    if total % world:
        raise SetupError(
            f"args.global_batch_size {total} cannot be split over {world} processes: use a multiple of {world}"
        )
    share = total // world
    steps = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= micro)
    return {"per_device_train_batch_size": share // steps, "gradient_accumulation_steps": steps}


class GlobalOrder(Sampler):
    """Row indices of one epoch, shuffled by (seed, epoch) alone and cut to whole global batches.

    Every world size and every resumed run sees the same order. Rows left over at the end of an epoch (fewer than one
    global batch) are other ones in each epoch.
    """

    def __init__(self, trainer, rows: int):
        args = trainer.args
        self.trainer, self.rows = trainer, rows
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.length = rows - rows % per_step
        if self.length == 0:
            raise SetupError(
                f"{rows} training rows do not fill one step of {per_step}: lower args.global_batch_size "
                "(or per_device_train_batch_size x gradient_accumulation_steps), or add data"
            )

    def __iter__(self):
        epoch = int((self.trainer.state.epoch or 0) + 1e-6)
        order = np.random.default_rng([self.trainer.args.seed, epoch]).permutation(self.rows)
        return iter(order[: self.length].tolist())

    def __len__(self) -> int:
        return self.length


class RowCollator:
    """A collator that carries each feature's `row` (its index in the data set) past the one it wraps."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, features: list[dict]) -> dict:
        """A batch of the wrapped collator plus `row`, a tensor of shape (rows,)."""
        rows = torch.tensor([f["row"] for f in features])
        return {**self.collator([{k: v for k, v in f.items() if k != "row"} for f in features]), "row": rows}


class ChainTrainer:
    """Mixin before `Trainer` (or a TRL trainer). `self.where` names the rows: a list of strings or of lists of them.

    `self.stream` (a `pipelines.streaming.Stream`) is trained on instead of `train_dataset`, where there is one.
    """

    where: list | None = None
    stream = None
    structure = None  # of a model with adapters, before it was cut into shards
    _to_come: int | None = None  # rows of all processes that an evaluation under way has not seen yet

    def get_train_dataloader(self):
        if self.stream is None:
            return super().get_train_dataloader()
        # As it is: prepared by Accelerate it would be sharded once more, and read one batch ahead of what is trained on.
        return DataLoader(
            self.stream,
            batch_size=self.args.train_batch_size,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # it draws a number when it begins: not from the generator of dropout
        )

    def _get_train_sampler(self, train_dataset=None):
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.train_sampling_strategy == "random" and hasattr(dataset, "__len__"):
            return GlobalOrder(self, len(dataset))
        return super()._get_train_sampler(train_dataset)

    def _prepare_for_training(self, *args, **kwargs):
        with models.embeddings_for_fsdp(self.model) if self.is_fsdp_enabled else contextlib.nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        # Killed between the last checkpoint and the end: nothing is left to train, and no step more is taken.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self.stream is not None:  # it is where it was (see `fit`), in the middle of its only epoch
            kwargs["epoch"] = kwargs["epochs_trained"] = self.state.global_step / self.state.max_steps
        super()._run_epoch(*args, **kwargs)

    def _prepare_inputs(self, inputs):
        if isinstance(inputs, dict) and "row" in inputs:
            self._rows = inputs["row"]
            inputs = {k: v for k, v in inputs.items() if k != "row"}
            if self._to_come is not None:
                mine = max(self._to_come - self.args.process_index * self.args.eval_batch_size, 1)
                inputs = {k: v[:mine] for k, v in inputs.items()}
        return super()._prepare_inputs(inputs)

    def evaluation_loop(self, dataloader, *args, **kwargs):
        """As the parent's, but a row counts once in the loss at any number of processes.

        Accelerate fills up the last batches with the first rows. The parent leaves out what is gathered of those, but
        not what they add to the mean loss of a batch in which they stand beside others: so they are taken out of it.
        """
        self._to_come = len(dataloader.dataset)
        try:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self._to_come = None

    def prediction_step(self, *args, **kwargs):
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        if self._to_come is not None:
            self._to_come -= self.args.world_size * self.args.eval_batch_size
            if self._to_come < 0:  # all give the parent as many rows: it leaves out those at the end
                pad = self.accelerator.pad_across_processes
                logits, labels = (None if x is None else pad(x) for x in (logits, labels))
        return loss, logits, labels

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss).all():
            raise NotFinite(self._explain("the loss", loss.item()))
        return loss

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        scaled = self.accelerator.scaler is not None  # fp16 overflows are skipped by the scaler
        if norm is not None and not scaled and not np.isfinite(float(norm)):
            raise NotFinite(self._explain("the gradient norm", float(norm)))
        return norm

    def _explain(self, what: str, value: float) -> str:
        rows = getattr(self, "_rows", None)
        names = [self.where[int(i)] for i in rows] if rows is not None and self.where else []
        flat = [n for name in names for n in (name if isinstance(name, list) else [name])]
        last = last_checkpoint(Path(self.args.output_dir))
        return (
            f"{what} is {value} at step {self.state.global_step + 1}.\n"
            f"  rows of this batch: {', '.join(flat[:16]) or 'not recorded'}{' …' if len(flat) > 16 else ''}\n"
            f"  last good checkpoint: {last or 'none yet'}\n"
            "  usual causes: a learning rate that is too high, fp16 overflow (use bf16 or fp32), a broken row"
        )

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict and untied(self.model, state_dict))

    def _save_checkpoint(self, model, trial):
        """As the parent's, but the checkpoint is marked when all of it is written, and older ones go only then."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        PartialState().wait_for_everyone()
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            checkpoint = folder / f"checkpoint-{self.state.global_step}"
            if self.stream is not None:
                self.stream.save(checkpoint)
            (checkpoint / COMPLETE).touch()
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )


class _StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM: save at the end of the running step and stop, on every process at the same step."""

    def __init__(self):
        self.asked = False
        self.stopped = False

    def catch(self):
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}

    def release(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: stop at once; the last whole checkpoint remains
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        flag = self.asked
        if args.world_size > 1:
            told = torch.tensor([float(flag)], device=args.device)
            torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
            flag = bool(told.item())
        if flag and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save, control.should_training_stop = True, True
            control.should_evaluate = False


class Progress(TrainerCallback):
    """One bar per stage, and a line per log entry with what matters; replaces transformers' bar and raw dicts.

    Every entry also goes to `log.jsonl` beside the checkpoints, for the report of a running stage.
    """

    SHOWN = (
        "loss", "accuracy", "masked_accuracy", "perplexity", "f1_macro", "matthews", "bleu", "chrf", "rougeL", "margin",
        "score", "kl", "eos_rate", "length", "objective/scores", "objective/kl", "policy/clipfrac_avg", "grad_norm",
        "learning_rate",
    )  # fmt: skip

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = None
        self._note(args, state, {"max_steps": state.max_steps, "precision": precision(args)})
        if state.is_world_process_zero and not args.disable_tqdm:
            name = Path(args.output_dir).parent.name
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=name, unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def _note(self, args, state, entry: dict):
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            with open(Path(args.output_dir) / artifact.LOG, "a", encoding="utf-8") as stream:
                stream.write(json.dumps({**entry, "step": state.global_step, "time": time.time()}) + "\n")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs:
            self._note(args, state, logs)
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        short = {k: v for k, v in logs.items() if isinstance(v, (int, float)) and k.removeprefix("eval_") in self.SHOWN}
        if short:
            line = f"  step {state.global_step}: " + "  ".join(f"{k.split('/')[-1]} {v:.4g}" for k, v in short.items())
            tqdm.write(line, file=sys.stderr)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole; None when there is none."""
    whole = [p.parent for p in folder.glob(f"checkpoint-*/{COMPLETE}")] if folder.is_dir() else []
    return str(max(whole, key=lambda p: int(p.name.rpartition("-")[2]))) if whole else None


def _set_up(trainer) -> str:
    """In words, how a trainer that is ready computes: what was asked for and what became of it on this hardware."""
    args, model = trainer.args, getattr(trainer, "policy", trainer.model)
    collator = getattr(trainer.data_collator, "collator", trainer.data_collator)
    if getattr(trainer, "packed", False) or getattr(collator, "packed", isinstance(collator, PackedCollator)):
        batches = "packed"
    else:
        batches = "full windows" if collator in (corpus.stack_windows, masking.stack) else "padded"
    fused = getattr(model, "loss_is_fused", None)
    loss = "" if fused is None else f", loss {'fused with the head' if fused else 'of the model'}"
    compiled = f"on ({args.torch_compile_backend})" if args.torch_compile else "off"
    checkpointing = "on" if args.activation_checkpointing else "off"
    return (
        f"{models.described(model)}, batches {batches}{loss}, optimizer {getattr(args.optim, 'value', args.optim)}, "
        f"activation checkpointing {checkpointing}, torch.compile {compiled}"
    )


def fit(stage, trainer) -> None:
    """Train from the last whole checkpoint (or from the start) to the end; raises `Interrupted` on Ctrl-C."""
    folder = stage.checkpoints
    resume = last_checkpoint(folder)
    newest = get_last_checkpoint(folder) if folder.is_dir() else None
    if PartialState().is_main_process:
        if newest and newest != resume:
            logger.warning("%s: %s is incomplete (stopped while saving)", stage.name, Path(newest).name)
            for broken in folder.glob("checkpoint-*"):
                if not (broken / COMPLETE).exists():
                    shutil.rmtree(broken)
        if resume:
            logger.warning("%s: resuming from %s", stage.name, resume)
    PartialState().wait_for_everyone()
    models.adapters_in_float32(trainer.model)
    if trainer.stream is not None:
        trainer.args.ignore_data_skip = True  # the Trainer would read, and throw away, all that was trained on
        if resume:
            trainer.stream.load(Path(resume))
    if launch.sharded() and any(hasattr(module, "peft_config") for module in trainer.model.modules()):
        trainer.structure = models.structure(trainer.model)  # for `save`
    logger.info("%s: %s", stage.name, _set_up(trainer))
    stopper = _StopOnSignal()
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(Progress())
    trainer.add_callback(stopper)
    stopper.catch()
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        stopper.release()
    if stopper.stopped:
        raise Interrupted(
            f"stage {stage.name} stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, saved in "
            f"{last_checkpoint(folder)}. Run the same command to go on."
        )


def untied(model, weights: dict) -> dict:
    """`weights` without the second names of tied ones, under each of which FSDP and DeepSpeed gather a copy."""
    tied = getattr(model, "all_tied_weights_keys", ())  # PPO's value head is no transformers model
    return {name: weight for name, weight in weights.items() if name not in tied}


def save(trainer, folder: Path, tokenizer) -> None:
    """Write the model as a folder that `from_pretrained` reads, with the tokenizer and chat template beside it.

    Adapters are merged (at full precision, see `models.merge`), so that every stage leaves a plain model; as they are they
    lie in the folder `adapter` beside it. From shards the first process gathers the whole model for that.
    """
    model = trainer.model
    if trainer.structure is not None:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # by all processes, for the first
        model = models.filled(trainer.structure, weights) if PartialState().is_main_process else trainer.structure
    parts = {"": getattr(model, "policy", model), "critic": getattr(model, "critic", None)}
    if any(hasattr(model, "peft_config") for model in parts.values()):
        if PartialState().is_main_process:
            for name, model in parts.items():
                if hasattr(model, "peft_config"):
                    model.save_pretrained(folder / name / "adapter", selected_adapters=[model.active_adapter])
                    model = models.merge(model, tokenizer)
                if model is not None:
                    model.save_pretrained(folder / name)
                    tokenizer.save_pretrained(folder / name)
    else:
        trainer.save_model(str(folder))
    if PartialState().is_main_process:
        tokenizer.save_pretrained(folder)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, and stage.json says the same
    PartialState().wait_for_everyone()


def final_metrics(trainer, evaluate: bool = True) -> dict:
    """Metrics of a finished training for stage.json: a last evaluation where there is validation data, and the log."""
    state = trainer.state
    metrics = trainer.evaluate() if evaluate and trainer.eval_dataset is not None else {}
    metrics = {k: v for k, v in metrics.items() if not k.endswith(("epoch", "_runtime", "_per_second"))}
    end = next((e for e in reversed(state.log_history) if "train_runtime" in e), {})
    for key in ("train_loss", "train_samples_per_second"):
        if key in end:
            metrics[key] = end[key]
    return {**metrics, "steps": state.global_step, "history": state.log_history}
