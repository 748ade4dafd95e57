"""What is known of a stage before it runs: the configs of its models, its rows and their tokens.

No weights are read: a model's config is that of a local folder, of the hub or its cache, or what an earlier stage of
the recipe will make. Rows that are local are read, and their tokens counted where the tokenizer is at hand.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from pipelines import files
from pipelines.data import mixing, sources
from pipelines.kinds import CLASSIFIER, KINDS, of_kind
from pipelines.models import chat_template
from pipelines.planning import anatomy, unmade
from pipelines.ppo.config import METHODS, has_critic
from pipelines.speed import packing

SAMPLE = 2000  # rows whose tokens are counted; the rest are taken to be like them
CHARACTERS = 4  # to a token, where no tokenizer is at hand (English under the tokenizers of GPT-2 and later)
TEMPLATE = 8  # tokens that a chat template adds to a row, where no tokenizer is at hand


@dataclass
class Model:
    """One model of a stage: what it is built from."""

    config: object
    auto_class: str


@dataclass
class Job:
    """What is known of a stage before it runs."""

    stage: object
    kind: str
    values: dict  # args of the recipe over the stage's defaults
    models: dict[str, Model]  # "model", and of ppo "critic" and "reward 0", …
    rows: int | None  # training rows; None: not known without the hub
    lengths: list[
        int
    ]  # tokens of rows (of a sample; reward: of the longest answer), cut to the context; empty: not known
    context: int
    answers: int = 1  # reward: answers to a ranking
    target: int = 0  # seq2seq: tokens of a target; ppo: of an answer
    layout: str = "padded"  # how the sequences of a batch lie: "padded", "packed" or "shared" (see `anatomy.layout`)
    laid: list[int] = field(default_factory=list)  # tokens of each row of several answers in a batch; empty: not known
    learned: float = 1.0  # dpo, kto: share of the tokens in a batch that are answers, of which log-probs are taken
    notes: list[str] = field(default_factory=list)
    spared: Model | None = None  # the critic that a ppo stage without one would train with `advantage: gae`

    @property
    def shape(self) -> str:
        """The shape of its rows, as `kinds.Kind.rows` has it."""
        return KINDS[self.kind].rows

    @property
    def branches(self) -> bool:
        """Whether a row is several answers to one prompt."""
        return self.shape in ("rankings", "unpaired")

    @property
    def packs(self) -> bool:
        """Whether rows are packs of examples."""
        return self.shape == "sft" and bool(self.values.get("packing"))

    @property
    def longest(self) -> int:
        """Tokens of the longest row: the context where nothing is known of the rows."""
        return max(self.lengths, default=self.context)

    @property
    def mean(self) -> float:
        """Tokens of a sequence on average."""
        if self.shape == "text" or not self.lengths:
            return self.context
        return sum(self.lengths) / len(self.lengths)

    @property
    def of_row(self) -> float:
        """Tokens that go through the model for a row on average: of a ranking all answers, however they are laid."""
        return sum(self.laid) / len(self.laid) if self.laid else self.mean * self.answers


def describe(stage) -> Job:
    """What the stage will train on and with; raises `PlanError` where that cannot be known."""
    values = {"per_device_train_batch_size": 8, "num_train_epochs": 3.0, **stage.module.DEFAULTS}
    values |= stage.sections.get("args", {})
    tokenizer, shape = unmade.at_hand(stage), stage.spec.rows
    data = _read(stage)
    if tokenizer is None:
        data.notes.insert(0, f"no tokenizer at hand yet: {CHARACTERS} characters are taken for a token")
    models = _models(stage, tokenizer, data.labels)
    spared = None
    if "reward" in stage.spec.sections:
        values = {**METHODS.get(values.get("advantage", "gae"), {}), **values}
        if not has_critic(values.get("advantage")):
            spared = _models(stage, tokenizer, data.labels, critic=True).get("critic")
    config = models["model"].config
    context, target = _limits(stage, config, values)
    (sequences, behind), rows = _sequences(stage, data.sample, tokenizer), data.rows
    if shape == "sft" and rows and sequences:  # a dialogue may be several sequences, each a row of training
        rows = round(rows * sum(map(len, sequences)) / len(sequences))
        sequences = [[ids] for row in sequences for ids in row]
    elif shape == "seq2seq":
        target = min(target, max((len(goal) for _, goal in sequences), default=target))
        sequences = [[source] for source, _ in sequences]
    elif shape == "text" and rows:  # windows of the text laid end to end, something between the documents
        window = context - 2 if stage.spec.auto_class == "AutoModelForMaskedLM" else context
        tokens = sum(len(text) + 1 for [text] in sequences) / len(sequences)
        rows = max(1, round(rows * tokens / window))
    branches = shape in ("rankings", "unpaired")
    learns = branches or shape == "sft"
    if learns and stage.sections.get("data", {}).get("too_long", "drop") == "drop":
        fitting = [row for row in sequences if max(map(len, row)) <= context]
        rows = rows * len(fitting) // len(sequences) if rows and fitting else rows
        sequences = fitting
    else:
        sequences = [[ids[-context:] for ids in row] for row in sequences]
    layout = anatomy.layout(config, models["model"].auto_class, branches) if learns else "padded"
    laid = [_laid(row, layout) for row in sequences] if branches else []
    learned = behind / sum(laid) if laid else 1.0
    return Job(
        stage,
        stage.kind,
        values,
        models,
        rows,
        [max(map(len, row)) for row in sequences],
        context,
        data.answers,
        target,
        layout,
        laid,
        min(learned, 1.0),
        data.notes,
        spared,
    )


def _models(stage, tokenizer, labels: set, critic: bool | None = None) -> dict[str, Model]:
    """The stage's model, and of one with a `reward:` section its critic and reward models.

    `critic`: whether the critic is among them; None: if it trains one.
    """
    spec, section = stage.spec, stage.sections.get("model", {})
    settings = {}
    if spec.auto_class == CLASSIFIER:
        named = stage.sections.get("task", {}).get("labels") or labels
        settings["num_labels"] = (len(named) or 2) if spec.rows == "labelled" else 1
    path = section.get("model_name_or_path")
    models = {"model": Model(unmade.config_of(stage, path, tokenizer, settings), spec.auto_class)}
    if "reward" in spec.sections:
        reward = stage.sections.get("reward", {})
        scorers = reward.get("models") or []
        critic = has_critic(stage.sections.get("args", {}).get("advantage")) if critic is None else critic
        start = reward.get("critic") if reward.get("critic") != "none" else None
        start = start or (path if not scorers or _implicit(stage, scorers[0]) else scorers[0])
        others = {"critic": start} if critic and start != "shared" else {}  # a value head weighs nothing
        others |= {f"reward {i}": scorer for i, scorer in enumerate(scorers)}
        others |= {f"reward {i}, its reference": s for i, s in enumerate(scorers) if _implicit(stage, s)}
        for name, of in others.items():
            models[name] = Model(unmade.config_of(stage, of, None, {"num_labels": 1}, overrides=False), CLASSIFIER)
    return models


def _implicit(stage, scorer: str) -> bool:
    """Whether a reward model is a policy whose reward is implicit, measured against a second model."""
    earlier = stage.earlier.get(scorer.removeprefix("stage:")) if scorer.startswith("stage:") else None
    return (earlier.kind if earlier else files.kind_of(scorer)) in of_kind(implicit_reward=True)


def _limits(stage, config, values: dict) -> tuple[int, int]:
    """`(most tokens of a row, most tokens that are written behind it)`, from what the stage's arguments know of
    lengths.
    """
    of = stage.section_class("args")
    if hasattr(of, "max_source_length"):
        return tuple(values.get(key, getattr(of, key)) for key in ("max_source_length", "max_target_length"))
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 1024
    if hasattr(of, "response_length"):
        target = values.get("response_length", of.response_length)
        return min(values.get("max_prompt_length") or limit, limit) - target, target
    return min(limit, values.get("max_length") or 1024), 0  # as `loading.context_length`


@dataclass
class _Data:
    """A sample of the training rows, their number (None: not known), answers to a ranking at most, labels, notes."""

    sample: list[dict] = field(default_factory=list)
    rows: int | None = None
    answers: int = 1
    labels: set = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def _read(stage) -> _Data:
    """The training rows that are here: counted, and `SAMPLE` of them drawn evenly from all sources."""
    data, (stage, left_out) = _Data(), unmade.rows_here(stage)
    here = sources.sources(stage.data, "train")
    if left_out:
        data.notes.append("rows that an earlier stage will write are not counted")
    if not here or not all(sources.is_local(source["path"]) for source in here):
        data.notes.append("rows that are not here are taken to fill the context")
        data.answers = 2
        return data
    if stage.data.get("streaming"):
        data.sample = mixing.first_block(stage.data, stage.spec.rows, stage.seed, SAMPLE)
        return data
    data.rows, draw = 0, random.Random(stage.seed)
    for row in mixing.stream(stage.data, "train", stage.spec.rows, stage.seed, stage.sections.get("task")):
        if stage.spec.rows == "unpaired":  # only answers with a label are read
            row["completions"] = [c for c, label in zip(row["completions"], row["labels"]) if label is not None]
            if not row["completions"]:
                continue
        data.rows += 1
        if len(data.sample) < SAMPLE:
            data.sample.append(row)
        elif (
            place := draw.randrange(data.rows)
        ) < SAMPLE:  # every row is as likely in the sample (Vitter's algorithm R)
            data.sample[place] = row
        data.answers = max(data.answers, len(row.get("completions", [0])))
        label = row.get("label", [])
        data.labels.update(label if isinstance(label, list) else [label])
    return data


def _sequences(stage, rows: list[dict], tokenizer) -> tuple[list[list[list[int]]], int]:
    """The ids of each row's sequences: of a ranking all answers, of a translation both sides, else one (ppo: the
    prompt). And of rankings how many of these are tokens of answers.

    Without a tokenizer as many ids are made up, the same for the same text, so that shared beginnings show.
    """

    made: dict[str, int] = {}

    def tokens(text: str) -> list[int]:
        if tokenizer:
            return tokenizer(text)["input_ids"]
        return [made.setdefault(text, len(made))] * math.ceil(len(text) / CHARACTERS)

    def chatted(prompt, answer, tools) -> tuple[list[int], list[int]]:
        if tokenizer and tokenizer.chat_template:
            return chat_template.encode_answer(tokenizer, prompt, answer, tools)
        return tokens(chat_template.as_text(prompt)) + [-1] * TEMPLATE, tokens(chat_template.as_text(answer))

    out, behind = [], 0
    for row in rows:
        if "completions" in row:
            with chat_template.naming(row):
                pairs = [chatted(row["prompt"], answer, row.get("tools")) for answer in row["completions"]]
            out.append([asked + answer for asked, answer in pairs])
            behind += sum(len(answer) for _, answer in pairs)
        elif "completion" in row:
            with chat_template.naming(row):
                out.append([sum(chatted(row["prompt"], row["completion"], row.get("tools")), [])])
        elif "messages" in row:
            out.append(
                [ids for ids, _ in chat_template.encode_row(tokenizer, row)]
                if tokenizer and tokenizer.chat_template
                else [[i for m in row["messages"] for i in tokens(m.get("content") or "") + [-1] * TEMPLATE]]
            )
        elif stage.spec.rows == "prompts":
            known = tokenizer and tokenizer.chat_template
            prompt = row["prompt"]
            out.append(
                [
                    chat_template.encode_prompt(tokenizer, prompt)
                    if known
                    else tokens(chat_template.as_text(prompt)) + [-1] * TEMPLATE
                ]
            )
        elif "source" in row:
            out.append(
                [tokens(stage.sections.get("task", {}).get("prefix", "") + row["source"]), tokens(row["target"])]
            )
        else:
            out.append([tokens(row["text"]) + (tokens(row["text_pair"]) if row.get("text_pair") else [])])
    return out, behind


def _laid(answers: list[list[int]], layout: str) -> int:
    """Tokens of a ranking in a batch: of all its answers, with what they begin with once where it is shared."""

    every = sum(map(len, answers))
    return every - (len(answers) - 1) * packing.alike(answers) if layout == "shared" else every
