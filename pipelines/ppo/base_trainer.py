"""What `PPOTrainer` stands on besides its algorithm: models as the launcher wants them, prompts, checkpoints, vLLM."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from transformers.trainer_utils import get_last_checkpoint
from trl.models import prepare_deepspeed, unwrap_model_for_generation
from trl.trainer.base_trainer import _BaseTrainer

from pipelines.errors import NotFinite, SetupError
from pipelines.generation.logprobs import plain_model, token_logprobs, within
from pipelines.models import loading
from pipelines.models.chat_template import as_text, encode_prompt
from pipelines.ppo.policy_and_critic import ValueHead, shard_frozen
from pipelines.training.saving import untied

STATE = "ppo_state.json"
TRAIN, EVAL, PTX = 0, 1, 2  # which random streams an answer or a pretraining row is drawn from


class Machinery(_BaseTrainer):
    """Base of `PPOTrainer`, whose `__init__` sets the attributes used here.

    A checkpoint holds what any Trainer's does; the critic is in its folder `critic`, and in `ppo_state.json` the KL
    coefficient, the moments of the scores, and what was not logged yet.
    """

    def _set_up(self, checkpoint: str | None) -> None:
        """Optimizer, scheduler, wrapped model and trainer state, from the checkpoint where there is one."""
        args = self.args
        if args.activation_checkpointing:
            settings = dict(args.activation_checkpointing_kwargs or {})
            for module in (self.policy, self.critic) if not isinstance(self.critic, ValueHead) else (self.policy,):
                plain_model(module).activation_checkpointing_enable(activation_checkpointing_kwargs=settings or None)
                if hasattr(module, "peft_config"):  # frozen embeddings: the first layer must see gradients flow
                    module.enable_input_require_grads()
        if checkpoint is not None and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self._load_from_checkpoint(checkpoint)
        steps_per_epoch = max(1, len(self.train_dataset) // self.batch_size)
        epochs = math.ceil(self.max_steps * self.batch_size / len(self.train_dataset))
        self._init_training_state(self.max_steps, steps_per_epoch, epochs, checkpoint, None)
        self._prepare_for_training(self.max_steps, None, checkpoint)
        self.model_wrapped.train()
        self._unlogged.clear()
        if checkpoint is None:
            return
        state = json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))
        if state["batch_size"] != self.batch_size:
            raise SetupError(
                f"{checkpoint} was made with batches of {state['batch_size']} answers, this run has "
                f"{self.batch_size}: it would not continue with the right prompts. Keep "
                "per_device_train_batch_size × gradient_accumulation_steps × processes as it was"
            )
        self.kl_controller.load_state_dict(state["kl_controller"])
        if self.score_normalizer is not None and state["score_normalizer"] is not None:
            self.score_normalizer.load_state_dict(state["score_normalizer"])
        self._unlogged.update(state["unlogged"])
        self.watch.load_state_dict(state["watch"])
        self._load_rng_state(checkpoint)  # for reward functions that use one

    def _find_checkpoint(self, asked: str | bool | None) -> str | None:
        if not asked:
            return None
        found = get_last_checkpoint(self.args.output_dir) if asked is True else str(asked)
        if found is None or not (Path(found) / STATE).is_file():
            raise SetupError(f"no PPO checkpoint to resume from: {found or self.args.output_dir}")
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        for module, folder in ((self.policy, ""), (self.critic, "critic")):
            place = Path(resume_from_checkpoint) / folder
            if isinstance(module, ValueHead):
                module.load(place)
                continue
            if hasattr(module, "peft_config"):  # Trainer would add the adapter in `critic` to the policy
                peft.set_peft_model_state_dict(module, peft.load_peft_weights(str(place), device="cpu"))
                continue
            whole, self.model = self.model, module  # Trainer reports missing weights of self.model
            try:
                super()._load_from_checkpoint(str(place), module)
            finally:
                self.model = whole

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The policy (with PEFT: its adapters) and tokenizer, the critic in the folder `critic`."""
        folder = Path(output_dir or self.args.output_dir)
        weights = {"policy": None, "critic": None}
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # collective: every process takes part
            whole = self.accelerator.get_state_dict(self.model_wrapped) or {}  # ZeRO-3: on the first process alone
            for part, model in (("policy", self.policy), ("critic", self.critic)):
                own = {k.removeprefix(f"{part}."): v for k, v in whole.items() if k.startswith(f"{part}.")}
                weights[part] = untied(model, own)
        if self.args.should_save:
            only = {"selected_adapters": [self.policy.active_adapter]} if hasattr(self.policy, "peft_config") else {}
            self.policy.save_pretrained(folder, state_dict=weights["policy"], **only)
            self.critic.save_pretrained(folder / "critic", state_dict=weights["critic"])
            for place in (folder,) if isinstance(self.critic, ValueHead) else (folder, folder / "critic"):
                self.processing_class.save_pretrained(place)

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save and not self.args.save_only_model:
            state = {
                "batch_size": self.batch_size,
                "kl_controller": self.kl_controller.state_dict(),
                "score_normalizer": self.score_normalizer and self.score_normalizer.state_dict(),
                "unlogged": self._unlogged,
                "watch": self.watch.state_dict(),
            }
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            (folder / STATE).write_text(json.dumps(state), encoding="utf-8")

    def _frozen(self, module: nn.Module) -> nn.Module:
        module.requires_grad_(False)
        if hasattr(module, "full_precision"):  # quantized: it is where it was loaded, and cannot be moved
            return module.eval()
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            return prepare_deepspeed(module, self.accelerator).module
        if self.is_fsdp_enabled:
            return shard_frozen(module, self.accelerator)
        return module.to(self.accelerator.device).eval()

    @contextlib.contextmanager
    def _whole_policy(self):
        """The policy with all its weights on this process, for decoding: processes decode for different times."""
        if not self.is_fsdp_enabled:
            with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
                yield model.policy
            return
        weights = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in self.policy.state_dict().items()}
        self.decoder.load_state_dict(weights, assign=True)
        del weights
        yield self.decoder
        for weight in self.decoder.parameters():
            weight.data = weight.new_empty(1).expand_as(weight)  # its shape, without its memory

    def _reference_logprobs(self, batch: dict) -> Tensor:
        """Log-probs (N,) of the answer tokens under the model that the policy is held to."""
        if self.ref_model is not None:
            return within(self.ref_model, token_logprobs, batch, self.args.temperature)[0]
        with self.policy.disable_adapter():
            logprobs = self.model_wrapped(batch, logprobs_only=True, temperature=self.args.temperature)
            if self.is_fsdp_enabled:  # else what is whole now would be trained again, and not the shards
                self.model_wrapped.reshard()
        return logprobs

    def _clip_gradients(self) -> float:
        """Clip the gradients of both models together to `max_grad_norm`; returns their norm before (0: not known)."""
        clip = self.args.max_grad_norm if self.args.max_grad_norm > 0 else math.inf
        norm = self.accelerator.clip_grad_norm_(self.model_wrapped.parameters(), clip)
        if hasattr(norm, "full_tensor"):  # FSDP2: of this process's shards
            norm = norm.full_tensor()
        return 0.0 if norm is None else float(norm)  # DeepSpeed may not say

    def _encode_prompts(self, dataset, name: str) -> list[list[int]]:
        """Token ids of every prompt; all that are empty or too long are reported at once."""
        if "prompt" not in dataset.column_names:
            raise SetupError(f"{name} has no column `prompt`, but {', '.join(dataset.column_names)}")
        prompts = [encode_prompt(self.processing_class, prompt) for prompt in dataset["prompt"]]
        contexts = [
            loading.positions(m)
            for m in (self.policy, self.critic, self.ref_model)
            if m is not None and not isinstance(m, ValueHead)
        ]
        context = min((c for c in contexts if c is not None), default=None)
        limits = [
            self.args.max_prompt_length,
            None if context is None else context - self.args.response_length,
        ]
        limit = min((x for x in limits if x is not None), default=None)
        long = [i for i, ids in enumerate(prompts) if limit is not None and len(ids) > limit]
        empty = [i for i, ids in enumerate(prompts) if not ids]
        if long or empty:
            raise SetupError(
                f"{name}: "
                + "; ".join(
                    f"{len(rows)} prompt(s) {what}, first rows {rows[:5]}"
                    for rows, what in (
                        (long, f"longer than {limit} tokens"),
                        (empty, "without a single token"),
                    )
                    if rows
                )
                + f". Drop or shorten them (response_length {self.args.response_length}, context {context})"
            )
        return prompts

    def _where(self, what: str, dataset, rows: list[int], of: list[int]) -> str:
        """An error text: what, when, for which prompts, and what to go back to."""
        shown = [rows[i] for i in of[:5]]
        last = get_last_checkpoint(self.args.output_dir) if Path(self.args.output_dir).is_dir() else None
        return (
            f"{what} in update {self.state.global_step + 1}, in {len(of)} answer(s), first dataset rows "
            f"{shown} "
            f"({'; '.join(repr(as_text(dataset[r]['prompt'])[:60]) for r in shown)}). "
            f"Last checkpoint: {last or 'none'}"
        )

    def _check_rewards(self, rewards: Tensor, dataset, rows: list[int]) -> None:
        for name, column in zip(self.reward_names, rewards.T, strict=True):
            bad = (~torch.isfinite(column)).nonzero().flatten().tolist()
            if bad:
                raise NotFinite(
                    self._where(f"reward function {name} returned {column[bad[0]].item()}", dataset, rows, bad)
                )

    def _send_telemetry(self) -> None:
        """TRL's trainers report their use to the hub; this one reports nothing to anyone."""


def vllm_engine(trainer: Machinery):
    """TRL's vLLM engine around the policy: `sync_weights()` and `generate(prompts, None, 1)`."""
    from trl.import_utils import is_vllm_available

    args = trainer.args
    if not is_vllm_available():
        raise SetupError("use_vllm: vLLM is not installed here: `pip install trl[vllm]` (NVIDIA GPUs), or leave it out")
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration(
        trainer.policy,
        trainer.accelerator,
        trainer.processing_class,
        mode=args.vllm_mode,
        server_base_url=args.vllm_server_base_url,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_model_length=max(map(len, trainer.train_prompts + (trainer.eval_prompts or []))) + args.response_length,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        max_completion_length=args.response_length,
        logprobs=None,
        generation_kwargs={"stop_token_ids": trainer.eos_token_ids},
    )
