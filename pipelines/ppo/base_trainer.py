"""A Trainer of two models: the policy and its critic, prepared, saved, loaded and clipped together; or of one."""

from __future__ import annotations

import math
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from transformers.trainer_utils import get_last_checkpoint
from trl.trainer.base_trainer import _BaseTrainer

from pipelines.errors import SetupError
from pipelines.generation.logprobs import plain_model
from pipelines.ppo.policy_and_critic import PolicyAndCritic, ValueHead
from pipelines.training.saving import untied

STATE = "ppo_state.json"


class TwoModelTrainer(_BaseTrainer):
    """transformers' Trainer around a `PolicyAndCritic`.

    A checkpoint holds what any Trainer's does, of the policy; the critic, if there is one, is in its folder `critic`.
    """

    def __init__(self, policy: nn.Module, critic: nn.Module | None, **trainer):
        super().__init__(model=PolicyAndCritic(policy, critic), **trainer)
        self.policy, self.critic = policy, critic
        self._parts = {"policy": policy} | ({} if critic is None else {"critic": critic})

    def _begin(self, max_steps: int, prompts: int, checkpoint: str | None) -> None:
        """Optimizer, scheduler, wrapped model and trainer state, from the checkpoint where there is one.

        Args:
            prompts: that one update answers.
        """
        args = self.args
        if args.activation_checkpointing:
            settings = dict(args.activation_checkpointing_kwargs or {})
            for module in (part for part in self._parts.values() if not isinstance(part, ValueHead)):
                plain_model(module).activation_checkpointing_enable(activation_checkpointing_kwargs=settings or None)
                if hasattr(module, "peft_config"):  # frozen embeddings: the first layer must see gradients flow
                    module.enable_input_require_grads()
        if checkpoint is not None and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self._load_from_checkpoint(checkpoint)
        steps_per_epoch = max(1, len(self.train_dataset) // prompts)
        epochs = math.ceil(max_steps * prompts / len(self.train_dataset))
        self._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, None)
        self._prepare_for_training(max_steps, None, checkpoint)
        self.model_wrapped.train()

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
        for name, module in self._parts.items():
            place = Path(resume_from_checkpoint) / ("critic" if name == "critic" else "")
            if isinstance(module, ValueHead):
                module.load(place)
                continue
            if hasattr(module, "peft_config"):  # Trainer would add the adapter in `critic` to the policy
                peft.set_peft_model_state_dict(module, peft.load_peft_weights(str(place), device="cpu"))
                continue
            both, self.model = self.model, module  # Trainer reports missing weights of self.model
            try:
                super()._load_from_checkpoint(str(place), module)
            finally:
                self.model = both

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The policy (with PEFT: its adapters) and tokenizer, the critic in the folder `critic`."""
        folder = Path(output_dir or self.args.output_dir)
        weights = dict.fromkeys(self._parts)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # collective: every process takes part
            whole = self.accelerator.get_state_dict(self.model_wrapped) or {}  # ZeRO-3: on the first process alone
            for part, model in self._parts.items():
                own = {k.removeprefix(f"{part}."): v for k, v in whole.items() if k.startswith(f"{part}.")}
                weights[part] = untied(model, own)
        if self.args.should_save:
            only = {"selected_adapters": [self.policy.active_adapter]} if hasattr(self.policy, "peft_config") else {}
            self.policy.save_pretrained(folder, state_dict=weights["policy"], **only)
            self.processing_class.save_pretrained(folder)
            if self.critic is not None:
                self.critic.save_pretrained(folder / "critic", state_dict=weights["critic"])
                if not isinstance(self.critic, ValueHead):
                    self.processing_class.save_pretrained(folder / "critic")

    def _clip_gradients(self) -> Tensor:
        """Clip the gradients of both models together to `max_grad_norm`; returns their norm before (0: not known)."""
        clip = self.args.max_grad_norm if self.args.max_grad_norm > 0 else math.inf
        norm = self.accelerator.clip_grad_norm_(self.model_wrapped.parameters(), clip)
        if hasattr(norm, "full_tensor"):  # FSDP2: of this process's shards
            norm = norm.full_tensor()
        norm = 0.0 if norm is None else norm  # DeepSpeed may not say
        return torch.as_tensor(norm, device=self.accelerator.device)

    def _send_telemetry(self) -> None:
        """TRL's trainers report their use to the hub; this one reports nothing to anyone."""
