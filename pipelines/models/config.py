"""The `model:` section: TRL's `ModelConfig` plus the few fields a recipe adds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl.trainer.model_config import ModelConfig


@dataclass
class ModelSection(ModelConfig):
    """`model:` which weights a stage starts from (TRL's `ModelConfig` plus what follows)."""

    config: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Without model_name_or_path: the config of a new model, `model_type` and any key of its config "
            "class (`{model_type: gpt2, n_layer: 4}`). With it: overrides of the loaded config (`{attn_pdrop: 0}`); "
            "one "
            "that names a model_type is then not used, so that one override swaps a public model in."
        },
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer to use when it does not lie beside the model's weights."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "sft, reward, ppo: `chatml`, `plain` (prompt and answer as they stand, closed by EOS), a path to a "
            ".jinja file, or null (the tokenizer's own; sft and reward give chatml to one that has none). Saved with "
            "the tokenizer, used by every later stage."
        },
    )
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "sft, reward, ppo: values of the chat template's own variables (`{enable_thinking: false}`). "
            "Written "
            "into the template that is saved, so that training, later stages and any other program use them alike."
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type in which the weights are loaded; null: float32 (training then runs in bf16 autocast where "
            "the "
            "GPUs have it). With load_in_4bit also the type in which they are multiplied; null: bfloat16 where the GPU "
            "has it, else float32.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "With use_peft: keep the base in 4 bits (QLoRA, nf4). Adapters are merged into the base loaded "
            "again "
            "at full precision, so the folder holds no 4-bit weights. Needs the extra `quantization`."
        },
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "With use_peft: as load_in_4bit, in 8 bits."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that the model's repository brings. Only for code you read."}
    )

    def __post_init__(self):
        """As TRL's, but a list of one LoRA target stays a list (as a string peft reads it as a regex)."""
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("model.load_in_8bit and model.load_in_4bit cannot both be true: keep one")
