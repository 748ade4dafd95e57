"""The sections of a stage as dataclasses: TRL's and transformers' own configs plus the few fields a recipe adds.

`check` reads this file as text (see `schema.py`); it is imported only when a stage runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.kto_config import KTOConfig
from trl.trainer.reward_config import RewardConfig
from trl.trainer.sft_config import SFTConfig

from pipelines.ppo.config import PPOConfig


@dataclass
class TokenizerSection:
    """`tokenizer:` train one from the stage's raw text, or take an existing one."""

    train: str | None = field(
        default=None,
        metadata={
            "help": "Train a tokenizer on the training text: `bpe` (byte-level, as GPT-2's) or `wordpiece` (as "
            "BERT's). "
            "Not used where the model is loaded: it brings its own.",
            "choices": ["bpe", "wordpiece"],
        },
    )
    vocab_size: int = field(
        default=8192, metadata={"help": "Entries of a trained vocabulary, special tokens included."}
    )
    lowercase: bool = field(default=True, metadata={"help": "wordpiece only: fold case, strip accents, as BERT."})
    max_documents: int | None = field(
        default=None, metadata={"help": "Train the tokenizer on the first so many documents only (null: on all)."}
    )


@dataclass
class SourceSection:
    """One source of rows inside `data.train` or `data.validation`."""

    path: str = field(
        default="",
        metadata={
            "help": "Local .jsonl, .json, .csv, .parquet, .arrow, .txt (also .gz), a glob, a folder of save_to_disk, "
            "or a hub id; see docs/data-formats.md."
        },
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
            "help": "Text files only: what a document is, `paragraph` with blank lines between.",
            "choices": ["line", "paragraph", "document"],
        },
    )


@dataclass
class DataSection:
    """`data:` where rows come from. A source is a path, a hub id, or a mapping with the keys of `SourceSection`."""

    train: Any = field(
        default=None, metadata={"help": "A source, or a list of sources that are mixed.", "keys": SourceSection}
    )
    validation: Any = field(
        default=None,
        metadata={
            "help": "A source, a list of sources, or a fraction (0.05) of the training rows, split by prompt so that "
            "the same prompt is never on both sides. null: no validation.",
            "keys": SourceSection,
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
    bad_rows: str = field(
        default="error",
        metadata={
            "help": "Rows that cannot be read as what the stage learns from, such as two dialogues without a common "
            "beginning: stop with an `error` that names the first, or `drop` them (counted, logged and recorded).",
            "choices": ["error", "drop"],
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "pretrain, mlm, sft: read and tokenise rows while training goes on, for data larger than the disk. "
            "Needs args.max_steps; a source that ends begins again; its `weight` is its share of the rows."
        },
    )
    buffer_size: int = field(
        default=10000,
        metadata={
            "help": "With streaming: so many rows are read at a time and shuffled (as packs or windows) among "
            "themselves. "
            "More: better shuffled, more memory, and as much to encode again when a run is resumed."
        },
    )


@dataclass
class PPODataSection(DataSection):
    """`data:` of ppo: prompts, and pretraining text for PPO-ptx."""

    ptx: Any = field(
        default=None,
        metadata={
            "help": "Sources of rows with `text`, mixed into every step with the weight args.ptx_coef.",
            "keys": SourceSection,
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
class EarlyStopping(Batching):
    """What stages add that can stop before their last step."""

    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a better metric_for_best_model (null: never)."},
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
    """`args:` of reward: TRL's `RewardConfig` plus what a ranking holds beside its order."""

    rank_margin: float | None = field(
        default=None,
        metadata={
            "help": "Rows without a `margin` get one from their ranks: an answer must be better by this much for every "
            "rank between it and the worse one (Llama 2, section 3.2.2). null: no margin."
        },
    )
    tags: list[str] | None = field(
        default=None,
        metadata={
            "help": "Learn these of the rows' `tags` too, each as one more output of the score head: the probability "
            "that an answer is inappropriate, irrelevant, … Kept in tags.safetensors; PPO can take them as penalties."
        },
    )


@dataclass
class DPOArguments(EarlyStopping, DPOConfig):
    """`args:` of dpo: TRL's `DPOConfig` plus what a ranking of more than two answers is learned as."""

    ranking_loss: str = field(
        default="pairs",
        metadata={
            "help": "`pairs`: the mean of loss_type over the pairs that a ranking decides; `plackett_luce`: the "
            "ranking as "
            "a whole (DPO's appendix A.3). For two answers and `sigmoid` they are the same.",
            "choices": ["pairs", "plackett_luce"],
        },
    )


@dataclass
class KTOArguments(EarlyStopping, KTOConfig):
    """`args:` of kto: TRL's `KTOConfig`."""


@dataclass
class PPOArguments(Batching, PPOConfig):
    """`args:` of ppo: our `PPOConfig`; global_batch_size is the number of answers per update."""

    ptx_length: int | None = field(
        default=None,
        metadata={"help": "Tokens per row of data.ptx (null: what the model's positions allow). More costs memory."},
    )


@dataclass
class ClassifyArguments(EarlyStopping, TrainingArguments):
    """`args:` of classify: transformers' `TrainingArguments` plus early stopping."""

    max_length: int | None = field(
        default=None, metadata={"help": "Truncate texts to so many tokens (null: the model's limit)."}
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
class Seq2SeqArguments(EarlyStopping, Seq2SeqTrainingArguments):
    """`args:` of seq2seq: transformers' `Seq2SeqTrainingArguments` plus lengths."""

    max_source_length: int = field(default=512, metadata={"help": "Longest input in tokens."})
    max_target_length: int = field(
        default=128, metadata={"help": "Longest output in tokens, in training and generation."}
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
        default=None,
        metadata={
            "help": "Reward models, classifiers, policies of dpo or kto (their implicit reward): `stage:NAME`, folders "
            "or hub ids, each with its own tokenizer."
        },
    )
    functions: list[str] | None = field(
        default=None,
        metadata={"help": "Python functions `package.module:name` taking (prompts, completions, **columns) -> floats."},
    )
    weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per model, then per function (null: all 1)."}
    )
    combine: str = field(
        default="sum",
        metadata={
            "help": "How the models' scores, each times its weight, become one (functions are added to it): `sum`; "
            "`mean`; `min`, the most sceptical; `uncertainty`, the mean less uncertainty_coef times their deviation. "
            "Against over-optimisation: several models of one task, trained apart.",
            "choices": ["sum", "mean", "min", "uncertainty"],
        },
    )
    uncertainty_coef: float = field(
        default=1.0, metadata={"help": "With combine: uncertainty. Higher avoids answers on which the models disagree."}
    )
    tag_penalties: dict[str, float] | None = field(
        default=None,
        metadata={
            "help": "Taken from the score for each tag, times the probability that the answer has it: "
            "`{inappropriate: 1.0}`. The reward models must have been trained with these in args.tags."
        },
    )
    critic: str | None = field(
        default=None,
        metadata={
            "help": "What the critic starts from: a reward model, or the policy's (null: the first reward model, else "
            "the policy's), or `shared`: a value head on the policy's own trunk, half the memory. `none`: there is no "
            "critic, as with args.advantage: rloo, grpo or reinforce."
        },
    )
    share_base: bool = field(
        default=False,
        metadata={
            "help": "With model.use_peft: reward stages that trained adapters on the policy's base are loaded as "
            "adapters on it, and the critic is one more: one network in memory."
        },
    )
    label: str | None = field(
        default=None,
        metadata={"help": "For a classifier among models: the label whose log-odds are the score."},
    )
    allow_other_template: bool = field(
        default=False,
        metadata={
            "help": "Accept a reward model that reads dialogues under another chat template than the policy's although "
            "it has the same tokens, or that has none (it then reads prompt and answer as plain text)."
        },
    )
    min_accuracy: float = field(
        default=0.55,
        metadata={"help": "Refuse a reward stage whose held-out pair accuracy is below this (0: no check)."},
    )


@dataclass
class SampleSection:
    """`sample:` which models answer, how often and how."""

    models: list[str] | None = field(
        default=None,
        metadata={"help": "Language models: `stage:NAME`, folders or hub ids. Each has its own tokenizer."},
    )
    completions: int = field(
        default=4,
        metadata={
            "help": "Answers to each prompt, from all models together: a multiple of their number. 4 to 9 are usual."
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits. Higher: more different answers."})
    top_k: int = field(default=0, metadata={"help": "Sample among the k likeliest tokens, 0: all."})
    top_p: float = field(
        default=1.0, metadata={"help": "Sample among the likeliest tokens that hold this much probability, 1: all."}
    )
    response_length: int = field(default=128, metadata={"help": "Longest answer in tokens."})
    keep_thoughts: bool = field(
        default=False, metadata={"help": "Keep what a model thinks before an answer (`<think>`) as part of it."}
    )
    batch_size: int = field(default=64, metadata={"help": "Answers written at once by each process: memory and speed."})
    use_vllm: bool = field(
        default=False,
        metadata={
            "help": "Write with vLLM (NVIDIA GPUs; `pip install trl[vllm]`), faster, from random streams of its own."
        },
    )


@dataclass
class EvaluateSection:
    """`evaluate:` which models are measured, and by what. Every measurement that is not asked for is left out."""

    models: list[str] | None = field(
        default=None,
        metadata={
            "help": "Language models, classifiers for `labelled`, reward models for `preferences`: `stage:NAME`, "
            "folders or "
            "hub ids. Differences and win rates: later ones over earlier."
        },
    )
    text: str | None = field(
        default=None,
        metadata={
            "help": "Loss per token, perplexity per token, word and byte, bits per byte: a file with the column `text` "
            "(any format that `data:` reads). An EOS is put after every row, in plain text after every line."
        },
    )
    running_text: bool = field(
        default=False,
        metadata={"help": "Read the file of `text` as one text, line ends and all, without any EOS (WikiText, books)."},
    )
    preferences: str | None = field(
        default=None,
        metadata={
            "help": "Reward models, or models made by dpo or kto: a file of pairs or rankings, in any form that a "
            "reward stage reads. Accuracy per pair and per ranking, margin, loss, calibration error, and whether it "
            "only likes long answers."
        },
    )
    labelled: str | None = field(
        default=None,
        metadata={
            "help": "Classifiers: a file with `text` (and `text_pair`) and `label`, a name or an id of the model's "
            "config. Accuracy, macro F1, Matthews correlation, confusion matrix."
        },
    )
    pairs: str | None = field(
        default=None,
        metadata={
            "help": "Models that write: a file with `prompt` and `completion`, for encoder-decoders `source` and "
            "`target`. What it writes is compared with the text: BLEU, chrF, ROUGE; and its loss, given the prompt."
        },
    )
    tasks: list[str] | None = field(
        default=None,
        metadata={"help": "Tasks of lm-eval: its own names, or paths of task files (.yaml), which need no network."},
    )
    shots: int | None = field(
        default=None, metadata={"help": "Examples put before each question of a task (null: what the task says)."}
    )
    limit: int | None = field(default=None, metadata={"help": "Only so many questions of each task (null: all)."})
    prompts: str | None = field(
        default=None,
        metadata={"help": "A file with the column `prompt`; every model answers it, and the judge judges."},
    )
    judge: str | None = field(
        default=None,
        metadata={
            "help": "Who judges the answers: a Python function `package.module:name` taking (prompt, completion) and "
            "giving a number, or named numbers of which `score` decides; or a reward model, classifier or "
            "policy of dpo or kto (`stage:NAME`, folder, hub id)."
        },
    )
    label: str | None = field(
        default=None, metadata={"help": "For a classifier as judge: the label whose log-odds are the score."}
    )
    samples: int = field(default=1, metadata={"help": "Answers of each model to each prompt; their mean counts."})
    best_of: int | None = field(
        default=None,
        metadata={
            "help": "What the best of 1, 2, 4, … and so many answers by the judge's score is worth; so many answers "
            "are written at least (`samples` may be more, for less noise)."
        },
    )
    oracle: str | None = field(
        default=None, metadata={"help": "With best_of: a second judge, who scores what the first one picked."}
    )
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "Divides the logits when answering; 0 takes the likeliest token (null: 1 for prompts, 0 for pairs)."
        },
    )
    response_length: int = field(default=128, metadata={"help": "Longest answer in tokens."})
    keep_thoughts: bool = field(
        default=False,
        metadata={"help": "Judge and compare what a model thinks before an answer (`<think>`) as part of it."},
    )
    rankings: str | None = field(
        default=None,
        metadata={
            "help": "Win rates by people: a file of rankings whose rows say which model wrote each answer (column "
            "`models`), such as stage:NAME/rankings.jsonl or an export of the ranking page."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a window (text), or at which a text (labelled, preferences) or source (pairs) is cut "
            "(null: where training cut them, of a stage's model; else what the model reads, at most 1024)."
        },
    )
    batch_size: int = field(default=16, metadata={"help": "Rows in memory at once: memory and speed."})
    use_vllm: bool = field(
        default=False,
        metadata={
            "help": "Answers to prompts and pairs are written with vLLM (NVIDIA GPUs; `pip install trl[vllm]`), "
            "faster, from random streams of its own."
        },
    )
