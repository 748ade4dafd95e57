"""A Trainer that loses nothing: the same data order and global batch at any world size, and whole checkpoints.

`ChainTrainer` is mixed into transformers' and TRL's trainers. It adds what users of those miss: checkpoints that are
whole or not used, evaluation losses that count every row once, and a stop on NaN that names the rows.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_utils import rotate_checkpoints

from pipelines import files
from pipelines.errors import NotFinite, SetupError, StorageError
from pipelines.models import sharding
from pipelines.speed.fast_model import masks_made
from pipelines.training import checkpoints
from pipelines.training.saving import untied

UNSEEN = 64  # losses and norms that an accelerator is asked about at once, at most


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

    `self.stream` (a `pipelines.data.streaming.Stream`) is trained on instead of `train_dataset`, where there is one.
    """

    where: list | None = None
    stream = None
    structure = None  # of a model with adapters, before it was cut into shards
    seconds_before = 0.0  # spent in earlier launches of this training
    _unseen: list = []  # losses and norms not looked at yet, with their rows and step; replaced, never added to
    _to_come: int | None = None  # rows of all processes that an evaluation under way has not seen yet

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        sharding.float32_sums(self.accelerator)

    def get_train_dataloader(self):
        if self.stream is None:
            return super().get_train_dataloader()
        # As it is: prepared by Accelerate it would be sharded once more, and read one batch ahead of what is trained
        # on.
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
        with sharding.embeddings_for_fsdp(self.model) if self.is_fsdp_enabled else contextlib.nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def _init_training_state(self, max_steps, *args, **kwargs):
        found = super()._init_training_state(max_steps, *args, **kwargs)
        best = self.state.best_global_step  # the path in the state is that of then: the run's folder may have moved
        if best and (folder := Path(self.args.output_dir) / f"checkpoint-{best}").is_dir():
            self.state.best_model_checkpoint = str(folder)
        return found

    def _run_epoch(self, *args, **kwargs):
        # Killed between the last checkpoint and the end: nothing is left to train, and no step more is taken.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self.stream is not None:  # it is where it was (see `fit`), in the middle of its only epoch
            kwargs["epoch"] = kwargs["epochs_trained"] = self.state.global_step / self.state.max_steps
        kwargs["start_time"] -= self.seconds_before
        super()._run_epoch(*args, **kwargs)
        self._look()

    def _finalize_training(self, trial, num_train_samples, start_time):
        return super()._finalize_training(trial, num_train_samples, start_time - self.seconds_before)

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
        with masks_made(self.args.device):
            loss = super().training_step(*args, **kwargs)
        self._note("the loss", loss.detach())
        return loss

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        if norm is not None and self.accelerator.scaler is None:  # fp16 overflows are skipped by the scaler
            self._note("the gradient norm", norm)
        return norm

    def _note(self, what: str, value: torch.Tensor | float) -> None:
        """Look at a number that must be finite: on an accelerator later, because looking makes the host wait for it."""
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        self._unseen = [*self._unseen, (what, value, getattr(self, "_rows", None), self.state.global_step + 1)]
        if not isinstance(value, torch.Tensor) or value.device.type == "cpu" or len(self._unseen) >= UNSEEN:
            self._look()

    def read_figures(self) -> None:
        """Count what was left on the device since the last log entry: before the next one, and before a checkpoint.

        Only there, as reading makes the host wait for the device.
        """

    def _look(self) -> None:
        """Raise `NotFinite` for the first of the numbers not looked at yet that is not finite."""
        unseen, self._unseen = self._unseen, []
        values = [torch.as_tensor(value, device=self.args.device).float() for _, value, *_ in unseen]
        for (what, _, rows, step), value in zip(unseen, torch.stack(values).tolist() if values else (), strict=True):
            if not np.isfinite(value):
                raise NotFinite(self._explain(what, value, rows, step))

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self._look()  # nothing of a model that is broken is logged as if it were not, or saved
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _explain(self, what: str, value: float, rows: torch.Tensor | None, step: int) -> str:
        names = [self.where[i] for i in rows.tolist()] if rows is not None and self.where else []
        flat = [n for name in names for n in (name if isinstance(name, list) else [name])]
        return (
            f"{what} is {value} at step {step}.\n"
            f"  rows of this batch: {', '.join(flat[:16]) or 'not recorded'}{' …' if len(flat) > 16 else ''}\n"
            f"  last good checkpoint: {self._last() or 'none yet'}\n"
            "  usual causes: a learning rate that is too high, fp16 overflow (use bf16 or fp32), a broken row"
        )

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict and untied(self.model, state_dict))

    def _save_checkpoint(self, model, trial):
        """As the parent's, but the checkpoint is marked when all of it is on disk, and older ones go only then.

        Raises `StorageError` where the disk is full: what was written of it is deleted, the last whole one stays.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (checkpoint / checkpoints.COMPLETE).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
            if self.stream is not None and self.args.should_save:
                self.stream.save(checkpoint)
            checkpoints.save_counts(self, checkpoint)
            checkpoints.seal(checkpoint)
        except Exception as error:
            problem = files.storage_error(error, checkpoint, checkpoints.bytes_to_save(self))
            if problem is None:
                raise
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise StorageError(f"{problem}: it goes on from {self._last() or 'the beginning'}") from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _load_best_model(self):
        best = self.state.best_model_checkpoint
        if wrong := checkpoints.damage(Path(best)):
            raise StorageError(
                f"{best}, the best model of this training, is damaged: {'; '.join(wrong[:3])}. "
                "The same command goes on from what is whole"
            )
        super()._load_best_model()

    def _last(self) -> str | None:
        return checkpoints.last_checkpoint(Path(self.args.output_dir))
