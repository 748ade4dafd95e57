"""The kinds of stages, one row each: everything the rest of the program knows about a kind without running it.

A kind is a module in `pipelines/stages/` (`DEFAULTS`, `problems(stage, kinds)`, `run(stage)`, and where it gives rows
to a model `ready` and `shown`, from which `pipelines show` has them) and a row in `KINDS`; nothing else spells kinds
out. docs/extending.md adds one step by step.
"""

from __future__ import annotations

from dataclasses import dataclass

LANGUAGE_MODEL, CLASSIFIER = "AutoModelForCausalLM", "AutoModelForSequenceClassification"


@dataclass(frozen=True)
class Kind:
    """What is known of a kind of stage. Plain values only: this table is imported for `--help`, too."""

    title: str  # one line for people
    sections: dict[
        str, str
    ]  # its keys in a recipe: a dataclass of `pipelines.recipe.sections`, or "package.module:Class"
    rows: str | None = None  # the shape of its rows (`pipelines.data.rows`); None: it has no `data:` section
    auto_class: str | None = None  # the class of transformers that loads the model it leaves; None: rows or figures
    hub_task: str | None = None  # what the hub calls the task of that model
    headline: tuple[
        tuple[str, str], ...
    ] = ()  # (metric, its name for people): the first that a stage has stands for it
    files: tuple[tuple[str, str], ...] = ()  # (section, key) whose values name files that decide the result
    adapters: bool = False  # can train LoRA adapters
    implicit_reward: bool = False  # its log-probs less those of the model it started from are a reward
    streams: bool = False  # can read its rows while it trains
    module: str = ""  # where `run` is, if not in pipelines.stages.NAME

    @property
    def leaves_model(self) -> bool:
        """Whether a finished stage is a folder with weights."""
        return self.auto_class is not None

    @property
    def writes_text(self) -> bool:
        """Whether it leaves a causal language model, which answers prompts."""
        return self.auto_class == LANGUAGE_MODEL


LOSS = (("eval_loss", "loss"), ("train_loss", "training loss"))
MODEL = {"model": "pipelines.models.config:ModelSection"}

KINDS: dict[str, Kind] = {
    "pretrain": Kind(
        "next-token prediction on raw text, from a new model or a base model",
        {**MODEL, "tokenizer": "TokenizerSection", "data": "DataSection", "args": "PretrainArguments"},
        rows="text",
        auto_class=LANGUAGE_MODEL,
        hub_task="text-generation",
        headline=(("eval_perplexity", "perplexity"), *LOSS),
        streams=True,
    ),
    "mlm": Kind(
        "masked words in raw text, for an encoder",
        {**MODEL, "tokenizer": "TokenizerSection", "data": "DataSection", "args": "MlmArguments"},
        rows="text",
        auto_class="AutoModelForMaskedLM",
        hub_task="fill-mask",
        headline=(("eval_pseudo_perplexity", "pseudo-perplexity"), *LOSS),
        streams=True,
    ),
    "sft": Kind(
        "answers to instructions, learned from examples",
        {**MODEL, "data": "DataSection", "args": "SFTArguments"},
        rows="sft",
        auto_class=LANGUAGE_MODEL,
        hub_task="text-generation",
        headline=(("eval_perplexity", "perplexity"), *LOSS),
        adapters=True,
        streams=True,
    ),
    "reward": Kind(
        "a score for any answer, learned from rankings",
        {**MODEL, "data": "DataSection", "args": "RewardArguments"},
        rows="rankings",
        auto_class=CLASSIFIER,
        hub_task="text-classification",
        headline=(("accuracy", "accuracy"), *LOSS),
        adapters=True,
    ),
    "dpo": Kind(
        "a policy learned from rankings directly, without a reward model",
        {**MODEL, "data": "DataSection", "args": "DPOArguments"},
        rows="rankings",
        auto_class=LANGUAGE_MODEL,
        hub_task="text-generation",
        headline=(("accuracy", "accuracy"), *LOSS),
        adapters=True,
        implicit_reward=True,
    ),
    "kto": Kind(
        "a policy learned from answers that are desirable or not: labels, or rankings with tags",
        {**MODEL, "data": "DataSection", "args": "KTOArguments"},
        rows="unpaired",
        auto_class=LANGUAGE_MODEL,
        hub_task="text-generation",
        headline=(("accuracy", "accuracy"), *LOSS),
        adapters=True,
        implicit_reward=True,
    ),
    "ppo": Kind(
        "a policy optimised against reward models and functions",
        {**MODEL, "reward": "RewardSection", "data": "PPODataSection", "args": "PPOArguments"},
        rows="prompts",
        auto_class=LANGUAGE_MODEL,
        hub_task="text-generation",
        headline=(("eval_score", "score"), ("objective/scores", "score in training"), *LOSS),
        adapters=True,
    ),
    "classify": Kind(
        "one label, several, or a number for each text",
        {**MODEL, "task": "TaskSection", "data": "DataSection", "args": "ClassifyArguments"},
        rows="labelled",
        auto_class=CLASSIFIER,
        hub_task="text-classification",
        headline=(("eval_accuracy", "accuracy"), ("eval_f1_micro", "micro F1"), ("eval_mse", "mse"), *LOSS),
        adapters=True,
    ),
    "seq2seq": Kind(
        "translation and summarisation by an encoder-decoder",
        {
            **MODEL,
            "tokenizer": "TokenizerSection",
            "task": "TranslationSection",
            "data": "DataSection",
            "args": "Seq2SeqArguments",
        },
        rows="seq2seq",
        auto_class="AutoModelForSeq2SeqLM",
        hub_task="text2text-generation",
        headline=(("eval_bleu", "BLEU"), ("eval_chrf", "chrF"), ("eval_rougeL", "ROUGE-L"), *LOSS),
    ),
    "sample": Kind(
        "several answers to each prompt, for people to rank",
        {"sample": "SampleSection", "data": "DataSection"},
        rows="prompts",
    ),
    "rank": Kind(
        "rankings of answers, by people or a script",
        {"rank": "pipelines.feedback.language_judge:RankSection", "data": "DataSection"},
        rows="samples",
        files=(("rank", "judgements"),),
    ),
    "evaluate": Kind(
        "perplexity, classification, generation, tasks and win rates of the chain's models",
        {"evaluate": "EvaluateSection"},
        files=tuple(
            ("evaluate", key) for key in ("text", "labelled", "preferences", "pairs", "tasks", "prompts", "rankings")
        ),
    ),
}


def of_kind(**wanted) -> tuple[str, ...]:
    """Names of the kinds that have these values: `of_kind(adapters=True)`."""
    return tuple(name for name, kind in KINDS.items() if all(getattr(kind, k) == v for k, v in wanted.items()))
