"""Running a trainer: from the last whole checkpoint to the end, with a clean stop on Ctrl-C and one line per
log entry.
"""

from __future__ import annotations

import copy
import json
import logging
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback

from pipelines import files, launch
from pipelines.data import token_file
from pipelines.errors import Interrupted
from pipelines.models import adapters, loading
from pipelines.speed import packed_attention, varlen
from pipelines.speed.packing import PackedCollator
from pipelines.training import checkpoints, masked_words
from pipelines.training.arguments import precision

logger = logging.getLogger(__name__)


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


class _Size(TrainerCallback):
    """Says before the first step how many steps the run has and what they are made of; few of them learn little."""

    FEW = 100

    def __init__(self, stage):
        self.stage = stage

    def on_train_begin(self, args, state, control, **kwargs):
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        rows, packs = self.stage.report.get("train", {}).get("used"), self.stage.report.get("packs")
        what = "packs" if packs else "windows" if "windows" in self.stage.report.get("train", {}) else "rows"
        each = f" (about {per_step * rows / packs:.0f} examples)" if packs and rows else ""
        logger.info("%s: %d optimizer steps of %d %s each%s", self.stage.name, state.max_steps, per_step, what, each)
        if state.max_steps < self.FEW:
            logger.warning(
                "%s: only %d optimizer steps of %d %s%s, which is little to learn from: lower args.global_batch_size%s "
                "or "
                "raise args.%s",
                self.stage.name,
                state.max_steps,
                per_step,
                what,
                each,
                ", set args.packing: false" if packs else "",
                "max_steps" if args.max_steps > 0 else "num_train_epochs",
            )


class _GoOn(TrainerCallback):
    """Where the training goes on from a checkpoint: its figures do too."""

    def __init__(self, trainer, checkpoint: str):
        self.trainer, self.checkpoint = trainer, Path(checkpoint)

    def on_train_begin(self, args, state, control, **kwargs):
        checkpoints.load_counts(self.trainer, self.checkpoint)


class _EpochOfStream(TrainerCallback):
    """The epoch of a stream is the share of its steps: the same number in every launch, to the last digit."""

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / state.max_steps


class _TensorBoard(TensorBoardCallback):
    """Transformers' own, but it writes no place on this machine into its logs: they may be published (`push`)."""

    def on_train_begin(self, args, state, control, **kwargs):
        shown = copy.copy(args)
        shown.to_json_string = lambda: json.dumps(files.portable(args.to_dict()), indent=2)
        kwargs.pop("model", None)  # whose config lies in the stage's folder
        super().on_train_begin(shown, state, control, **kwargs)


class Progress(TrainerCallback):
    """One bar per stage, and a line per log entry with what matters; replaces transformers' bar and raw dicts.

    Every entry also goes to `log.jsonl` beside the checkpoints, for the report of a running stage.
    """

    SHOWN = (
        "loss",
        "accuracy",
        "masked_accuracy",
        "perplexity",
        "f1_macro",
        "matthews",
        "bleu",
        "chrf",
        "rougeL",
        "margin",
        "score",
        "kl",
        "eos_rate",
        "length",
        "objective/scores",
        "objective/kl",
        "policy/clipfrac_avg",
        "grad_norm",
        "learning_rate",
    )

    bar = None

    def on_train_begin(self, args, state, control, **kwargs):
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
            row = {**entry, "step": state.global_step, "time": time.time()}
            files.append_rows(Path(args.output_dir) / files.LOG, [row], sync=False)

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
        self.close()

    def close(self) -> None:
        """The bar ends, so that what is printed next begins on a line of its own."""
        if self.bar is not None:
            self.bar.close()


def _set_up(trainer) -> str:
    """In words, how a trainer that is ready computes: what was asked for and what became of it on this hardware."""
    args, model = trainer.args, getattr(trainer, "policy", trainer.model)
    collator = getattr(trainer.data_collator, "collator", trainer.data_collator)
    if getattr(trainer, "packed", False) or getattr(collator, "packed", isinstance(collator, PackedCollator)):
        batches = f"packed{_way_of_packs(model, args)}"
    else:
        batches = "full windows" if collator in (token_file.stack_windows, masked_words.stack) else "padded"
    fused = getattr(model, "loss_is_fused", None)
    loss = "" if fused is None else f", loss {'fused with the head' if fused else 'of the model'}"
    compiled = f"on ({args.torch_compile_backend})" if args.torch_compile else "off"
    checkpointing = "on" if args.activation_checkpointing else "off"
    return (
        f"{loading.described(model)}, batches {batches}{loss}, optimizer {getattr(args.optim, 'value', args.optim)}, "
        f"activation checkpointing {checkpointing}, torch.compile {compiled}"
    )


def _way_of_packs(model, args) -> str:
    """On a GPU, how packs are attended to, and why not by its kernel; empty where it is the attention that is named."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if args.device.type == "cpu" or model.config.get_text_config()._attn_implementation != packed_attention.NAME:
        return ""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    reason = varlen.why_not(args.device, half.get(precision(args), model.dtype))
    return " (attended to by varlen_attn)" if reason is None else f" (attended to in blocks, not varlen_attn: {reason})"


def _warn_of_space(stage, trainer) -> None:
    """Say at the start what would otherwise fail hours later: checkpoints that the disk cannot hold."""
    free = files.free_bytes(stage.folder)
    limit = trainer.args.save_total_limit
    one = checkpoints.bytes_to_save(trainer)
    missing = max(0, (limit or 1) + 1 - len(checkpoints.all_of(stage.checkpoints)))  # a new one before an old one goes
    if trainer.args.save_strategy != "no" and free is not None and one * missing > free:
        logger.warning(
            "%s: its checkpoints need about %s more (%d of %s), but %s has %s free: make room, or lower "
            "args.save_total_limit",
            stage.name,
            files.size(one * missing),
            missing,
            files.size(one),
            stage.folder,
            files.size(free),
        )


def fit(stage, trainer) -> None:
    """Train from the last whole checkpoint (or from the start) to the end; raises `Interrupted` on Ctrl-C."""
    folder, args = stage.checkpoints, trainer.args
    resume = checkpoints.newest_whole(stage.name, folder, with_best=args.load_best_model_at_end)
    if resume and args.save_only_model:
        logger.warning("%s: its checkpoints hold no optimizer (args.save_only_model): it begins again", stage.name)
        resume = None
    if resume:
        logger.warning("%s: resuming from %s", stage.name, resume)
        args.eval_on_start = False  # it was evaluated when it started
        trainer.add_callback(_GoOn(trainer, resume))
    trainer.seconds_before = files.read_log(folder)[2]
    _warn_of_space(stage, trainer)
    PartialState().wait_for_everyone()
    adapters.adapters_in_float32(trainer.model)
    if trainer.stream is not None:
        trainer.add_callback(_EpochOfStream())
        trainer.args.ignore_data_skip = True  # the Trainer would read, and throw away, all that was trained on
        if resume:
            trainer.stream.load(Path(resume))
    if launch.sharded() and any(hasattr(module, "peft_config") for module in trainer.model.modules()):
        trainer.structure = adapters.structure(trainer.model)  # for `save`
    logger.info("%s: %s", stage.name, _set_up(trainer))
    stopper = _StopOnSignal()
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    if trainer.pop_callback(TensorBoardCallback) is not None:
        trainer.add_callback(_TensorBoard())
    if not hasattr(trainer, "policy"):  # an update of PPO is many optimizer steps
        trainer.add_callback(_Size(stage))
    progress = Progress()
    trainer.add_callback(progress)
    trainer.add_callback(stopper)
    stopper.catch()
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        stopper.release()
        progress.close()
    if stopper.stopped:
        raise Interrupted(
            f"stage {stage.name} stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, saved in "
            f"{checkpoints.last_checkpoint(folder)}. Run the same command to go on."
        )
