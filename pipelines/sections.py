"""The sections of a stage as dataclasses: TRL's and transformers' own configs plus the few fields a recipe adds.

`check` reads this file as text (see `schema.py`); it is imported only when a stage runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments
from trl.trainer.model_config import ModelConfig
from trl.trainer.reward_config import RewardConfig
from trl.trainer.sft_config import SFTConfig

from pipelines.ppo.config import PPOConfig


@dataclass
class ModelSection(ModelConfig):
    """`model:` which weights a stage starts from (TRL's `ModelConfig` plus what follows)."""

    config: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Without model_name_or_path: the config of a new model, `model_type` and any key of its config "
            "class (`{model_type: gpt2, n_layer: 4}`). With it: overrides of the loaded config (`{attn_pdrop: 0}`); one "
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
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type in which the weights are loaded; null: float32 (training then runs in bf16 autocast where the "
            "hardware has it). With load_in_4bit also the type in which they are multiplied; null: bfloat16 where the GPU "
            "has it, else float32.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "With use_peft: keep the base in 4 bits (QLoRA, nf4). Adapters are merged into the base loaded again "
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


@dataclass
class TokenizerSection:
    """`tokenizer:` train one from the stage's raw text, or take an existing one."""

    train: str | None = field(
        default=None,
        metadata={
            "help": "Train a tokenizer on the training text: `bpe` (byte-level, as GPT-2's) or `wordpiece` (as BERT's). "
            "Not used where the model is loaded: it brings its own.",
            "choices": ["bpe", "wordpiece"],
        },
    )
    vocab_size: int = field(
        default=8192, metadata={"help": "Entries of a trained vocabulary, special tokens included."}
    )
    lowercase: bool = field(
        default=True, metadata={"help": "wordpiece only: fold case and strip accents, as uncased BERT."}
    )
    max_documents: int | None = field(
        default=None, metadata={"help": "Train the tokenizer on the first so many documents only (null: on all)."}
    )


@dataclass
class DataSection:
    """`data:` where rows come from. A source is a path, a hub id, or a mapping with the keys of `SourceSection`."""

    train: Any = field(default=None, metadata={"help": "A source, or a list of sources that are mixed."})
    validation: Any = field(
        default=None,
        metadata={
            "help": "A source, a list of sources, or a fraction (0.05) of the training rows, split by prompt so that "
            "the same prompt is never on both sides. null: no validation."
        },
    )
    columns: dict[str, str] | None = field(
        default=None,
        metadata={"help": "Names of the columns, ours to theirs: `{prompt: question, completion: answer}`."},
    )
    too_long: str = field(
        default="drop",
        metadata={
            "help": "Rows longer than the context: `drop` or `truncate` them (both counted, logged and recorded), or "
            "stop with an `error`.",
            "choices": ["drop", "truncate", "error"],
        },
    )


@dataclass
class SourceSection:
    """One source of rows inside `data.train` or `data.validation`."""

    path: str = field(
        default="",
        metadata={"help": "Local .jsonl, .json, .csv, .parquet, .txt (each also .gz), a glob of them, or a hub id."},
    )
    name: str | None = field(default=None, metadata={"help": "Hub only: the configuration of the data set."})
    split: str = field(default="train", metadata={"help": "Hub only: the split to read."})
    revision: str | None = field(default=None, metadata={"help": "Hub only: branch, tag or commit to pin."})
    columns: dict[str, str] | None = field(default=None, metadata={"help": "As `data.columns`, for this source only."})
    weight: float = field(
        default=1.0,
        metadata={"help": "How often each row is seen per epoch: 2 twice, 0.5 every second row (a seeded choice)."},
    )
    rows: int | None = field(default=None, metadata={"help": "Read at most so many rows."})
    sample_by: str = field(
        default="line",
        metadata={
            "help": "Text files only: what a document is, `line`, `paragraph` (blank lines between) or `document`.",
            "choices": ["line", "paragraph", "document"],
        },
    )


@dataclass
class Batching:
    """What every stage's `args:` add to the trainer's own."""

    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows per optimizer step over all processes. Gradient accumulation follows from it, so a recipe "
            "trains the same on 1 and on 8 devices; per_device_train_batch_size then only bounds memory."
        },
    )


@dataclass
class PretrainArguments(Batching, TrainingArguments):
    """`args:` of pretrain: transformers' `TrainingArguments` plus the context length."""

    max_length: int | None = field(
        default=None, metadata={"help": "Context window in tokens (null: what the model's positions allow)."}
    )


@dataclass
class MlmArguments(PretrainArguments):
    """`args:` of mlm: as pretrain, plus the masking."""

    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens that are hidden (BERT: 0.15)."})
    whole_word_mask: bool = field(
        default=False,
        metadata={"help": "Hide whole words instead of single pieces: a harder task, often a better encoder."},
    )


@dataclass
class SFTArguments(Batching, SFTConfig):
    """`args:` of sft: TRL's `SFTConfig`."""


@dataclass
class RewardArguments(Batching, RewardConfig):
    """`args:` of reward: TRL's `RewardConfig`."""


@dataclass
class PPOArguments(Batching, PPOConfig):
    """`args:` of ppo: our `PPOConfig`; global_batch_size is the number of answers per update."""


@dataclass
class ClassifyArguments(Batching, TrainingArguments):
    """`args:` of classify: transformers' `TrainingArguments` plus early stopping."""

    max_length: int | None = field(
        default=None, metadata={"help": "Truncate texts to so many tokens (null: the model's limit)."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a better metric_for_best_model (null: never)."},
    )


@dataclass
class TaskSection:
    """`task:` of classify: what is predicted."""

    problem_type: str = field(
        default="single_label_classification",
        metadata={
            "help": "As in transformers' configs.",
            "choices": ["single_label_classification", "multi_label_classification", "regression"],
        },
    )
    labels: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the classes in the order of their ids (null: taken from the data, sorted)."},
    )
    class_weights: str | None = field(
        default=None,
        metadata={
            "help": "`balanced` weighs each class by rows / (classes x rows of the class), for unbalanced data.",
            "choices": ["balanced"],
        },
    )


@dataclass
class Seq2SeqArguments(Batching, Seq2SeqTrainingArguments):
    """`args:` of seq2seq: transformers' `Seq2SeqTrainingArguments` plus lengths."""

    max_source_length: int = field(default=512, metadata={"help": "Longest input in tokens."})
    max_target_length: int = field(
        default=128, metadata={"help": "Longest output in tokens, in training and generation."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a better metric_for_best_model (null: never)."},
    )


@dataclass
class TranslationSection:
    """`task:` of seq2seq: what is generated, and how it is measured."""

    prefix: str = field(default="", metadata={"help": "Put before every input (T5: `translate English to German: `)."})
    metrics: list[str] = field(
        default_factory=lambda: ["sacrebleu", "chrf"], metadata={"help": "Any of sacrebleu, chrf, rouge."}
    )


@dataclass
class RewardSection:
    """`reward:` of ppo: what an answer is worth. At least one model or function."""

    models: list[str] | None = field(
        default=None, metadata={"help": "Reward models: `stage:NAME`, folders or hub ids, each with its own tokenizer."}
    )
    functions: list[str] | None = field(
        default=None,
        metadata={"help": "Python functions `package.module:name` taking (prompts, completions, **columns) -> floats."},
    )
    weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per model, then per function (null: all 1)."}
    )
    critic: str | None = field(
        default=None, metadata={"help": "What the critic starts from (null: the first reward model, else the policy)."}
    )
    min_accuracy: float = field(
        default=0.55,
        metadata={"help": "Refuse a reward stage whose held-out pair accuracy is below this (0: no check)."},
    )
