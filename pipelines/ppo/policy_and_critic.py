"""The policy and the critic, if there is one, as one module, the value head, and frozen models on shards."""

from __future__ import annotations

import logging
import types
from pathlib import Path

from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trl.models import prepare_deepspeed

from pipelines import launch
from pipelines.generation.logprobs import plain_model, states_of, token_logprobs, token_values
from pipelines.models.scorers import Classifier
from pipelines.speed.fast_model import float32_head
from pipelines.speed.half_products import hold_half

logger = logging.getLogger(__name__)


class ValueHead(nn.Module):
    """A critic on the policy's own trunk: half the memory, one forward for both. Starts at value 0 everywhere."""

    FILE = "value_head.safetensors"

    def __init__(self, policy: nn.Module):
        super().__init__()
        width = plain_model(policy).config.get_text_config().hidden_size
        self.score = nn.Linear(width, 1, bias=False, device=policy.device)
        nn.init.zeros_(self.score.weight)
        float32_head(self)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (N,), float32, of the policy's last hidden states (N, H)."""
        return self.score(hidden).squeeze(-1)

    def save_pretrained(self, folder, state_dict: dict | None = None) -> None:
        """Write the head into `folder`, which is made."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        weights = {k: v.contiguous().cpu() for k, v in (state_dict or self.state_dict()).items()}
        save_file(weights, Path(folder) / self.FILE)

    def load(self, folder) -> None:
        """Read what `save_pretrained` wrote, in place."""
        self.load_state_dict(load_file(Path(folder) / self.FILE))


def runs_on_fsdp(accelerator) -> bool:
    """Whether the trained model is cut up by FSDP."""
    return getattr(accelerator.state, "fsdp_plugin", None) is not None


def place_frozen(model: nn.Module, accelerator) -> nn.Module:
    """A model that is only read, without gradients, where the launcher wants it; in place."""
    model.requires_grad_(False)
    if hasattr(model, "full_precision"):  # quantized: it is where it was loaded, and cannot be moved
        return model.eval()
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        return prepare_deepspeed(model, accelerator).module
    if runs_on_fsdp(accelerator):
        return shard_frozen(model, accelerator)
    adapted = any(isinstance(module, BaseTunerLayer) for module in model.modules())  # on the base of another model
    on_gpu, bf16 = accelerator.device.type == "cuda", accelerator.mixed_precision == "bf16"
    if on_gpu and bf16 and not adapted and launch.chosen_on_gpu("bf16_frozen"):
        hold_half(model.model if isinstance(model, Classifier) else model)
        logger.info("%s, frozen: the weights of its products are held in bfloat16", type(model).__name__)
    return model.to(accelerator.device).eval()


def shard_frozen(model: nn.Module, accelerator) -> nn.Module:
    """Cut a model that is only read into shards (FSDP2), in place; `within` puts it together."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.fsdp import register_fsdp_forward_method

    model.within = types.MethodType(lambda self, function, *args: function(self, *args), model)
    plugin = accelerator.state.fsdp_plugin
    policy, blocks = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    model = fsdp2_prepare_model(accelerator, model)
    plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = policy, blocks  # the next one has other blocks
    register_fsdp_forward_method(model, "within")
    return model.eval()


class PolicyAndCritic(nn.Module):
    """All that is trained as one module: one optimizer, one gradient norm, one `accelerator.prepare`.

    `critic` may be None: RLOO, GRPO and REINFORCE have none.
    """

    is_gradient_checkpointing = False  # asked by TRL before it generates; in eval mode none is active

    def __init__(self, policy: nn.Module, critic: nn.Module | None):
        super().__init__()
        self.policy, self.critic = policy, critic
        blocks = (getattr(model, "_no_split_modules", None) or () for model in (policy, critic))
        self._no_split_modules = {name for names in blocks for name in names}  # for FSDP
        self.config = policy.config  # what the Trainer, DeepSpeed and callbacks look at

    def tie_weights(self, *args, **kwargs):
        """Called by FSDP, which moves weights from device to device: tied ones come apart there."""
        self.policy.tie_weights(*args, **kwargs)
        if self.critic is not None and not isinstance(self.critic, ValueHead):
            self.critic.tie_weights(*args, **kwargs)

    def forward(
        self,
        batch: dict,
        values_only: bool = False,
        logprobs_only: bool = False,
        hold_trunk: bool = False,
        **how,
    ):
        """`(logprobs, entropies or None, values or None)`, each (N,) float32, or the values or log-probs alone.

        `how`: temperature, entropy and grad_entropy of `token_logprobs`. With `hold_trunk` the values of a
        `ValueHead` send no gradient into the policy.
        """
        if logprobs_only:
            return token_logprobs(self.policy, batch, **how)[0]
        hidden = values = None
        if isinstance(self.critic, ValueHead):
            hidden = states_of(self.policy, batch)
            values = self.critic(hidden.detach() if hold_trunk else hidden)
        elif self.critic is not None:
            values = token_values(self.critic, batch)
        return values if values_only else (*token_logprobs(self.policy, batch, **how, hidden=hidden), values)
