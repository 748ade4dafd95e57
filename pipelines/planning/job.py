"""What is known of a stage before it runs: the configs of its models, its rows and their tokens.

No weights are read: a model's config is that of a local folder, of the hub or its cache, or what an earlier stage of the
recipe will make. Rows that are local are read, and their tokens counted where the tokenizer is at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from pipelines.data import mixing, sources
from pipelines.kinds import CLASSIFIER
from pipelines.models import chat_template
from pipelines.planning import anatomy, unmade
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
    laid: list[int] = field(default_factory=list)  # reward: tokens of each ranking in a batch; empty: not known
    notes: list[str] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """Tokens of the longest row: the context where nothing is known of the rows."""
        return max(self.lengths, default=self.context)

    @property
    def mean(self) -> float:
        """Tokens of a sequence on average."""
        if self.kind in ("pretrain", "mlm") or not self.lengths:
            return self.context
        return sum(self.lengths) / len(self.lengths)

    @property
    def of_row(self) -> float:
        """Tokens that go through the model for a row on average: of a ranking all answers, however they are laid."""
        return sum(self.laid) / len(self.laid) if self.laid else self.mean * self.answers


def describe(loaded, stage) -> Job:
    """What the stage will train on and with; raises `PlanError` where that cannot be known."""
    values = {"per_device_train_batch_size": 8, "num_train_epochs": 3.0, **stage.module.DEFAULTS}
    values |= stage.sections.get("args", {})
    tokenizer = unmade.at_hand(stage)
    notes = [] if tokenizer else [f"no tokenizer at hand yet: {CHARACTERS} characters are taken for a token"]
    section = stage.sections.get("model", {})
    texts, rows, count, labels = _texts(stage, notes)
    settings = {}
    if stage.kind == "classify":
        settings["num_labels"] = len(stage.sections.get("task", {}).get("labels") or labels) or 2
    elif stage.kind == "reward":
        settings["num_labels"] = 1
    config = unmade.config_of(stage, section.get("model_name_or_path"), tokenizer, settings)
    models = {"model": Model(config, stage.spec.auto_class)}
    if stage.kind == "ppo":
        reward = stage.sections.get("reward", {})
        scorers = reward.get("models") or []
        start = reward.get("critic") or (scorers or [section["model_name_or_path"]])[0]
        named = {"critic": start} if start != "shared" else {}  # a value head weighs nothing
        named |= {f"reward {i}": path for i, path in enumerate(scorers)}
        for name, path in named.items():
            of_it = unmade.config_of(stage, path, None, {"num_labels": 1}, overrides=False)
            models[name] = Model(of_it, CLASSIFIER)
    context = _context(config, values, stage.kind)
    target = 0
    if stage.kind == "seq2seq":
        context, target = values.get("max_source_length", 512), values.get("max_target_length", 128)
    elif stage.kind == "ppo":
        target = values.get("response_length", 53)
        context = min(values.get("max_prompt_length") or context, context) - target
    layout = "padded"
    if stage.kind in ("sft", "reward"):
        layout = anatomy.layout(config, models["model"].auto_class)
    sequences = _sequences(stage, texts, tokenizer)
    if stage.kind == "seq2seq":
        target = min(target, max((len(goal) for _, goal in sequences), default=target))
        sequences = [[source] for source, _ in sequences]
    if rows and stage.kind in (
        "pretrain",
        "mlm",
    ):  # windows of the text laid end to end, something between the documents
        window = context - 2 if stage.kind == "mlm" else context
        rows = max(1, round(rows * (sum(len(text) + 1 for [text] in sequences) / len(sequences)) / window))
    drop = stage.sections.get("data", {}).get("too_long", "drop") == "drop" and stage.kind in ("sft", "reward")
    fitting = [row for row in sequences if max(map(len, row)) <= context]
    if drop and rows and fitting:
        rows = rows * len(fitting) // len(sequences)
    sequences = fitting if drop else [[ids[-context:] for ids in row] for row in sequences]
    lengths = [max(map(len, row)) for row in sequences]
    laid = [_laid(row, layout) for row in sequences] if stage.kind == "reward" else []
    return Job(stage, stage.kind, values, models, rows, lengths, context, count, target, layout, laid, notes)


def _texts(stage, notes: list[str]) -> tuple[list, int | None, int, set]:
    """`(a sample of rows, rows in all, answers to a ranking at most, labels seen)` of the training data."""

    said, found = stage.sections["data"], sources.sources(stage.data, "train")
    ours = [source["path"].startswith("stage:") for source in sources.sources(said, "train")]
    here = [source for source, made in zip(found, ours) if not made or Path(source["path"]).exists()]
    if len(here) < len(found):
        notes.append("rows that an earlier stage will write are not counted")
    if not here or not all(sources.is_local(source["path"]) for source in here):
        notes.append("rows that are not here are taken to fill the context")
        return [], None, 2, set()
    section = {**stage.data, "train": here}
    if section.get("streaming"):
        return (
            list(islice(mixing.endless(section, stage.spec.rows, stage.seed, [{} for _ in here]), SAMPLE)),
            None,
            1,
            set(),
        )
    rows, answers, labels = [], 1, set()
    count = 0
    for row in mixing.stream(section, "train", stage.spec.rows, stage.seed, stage.sections.get("task")):
        count += 1
        if len(rows) < SAMPLE:
            rows.append(row)
        answers = max(answers, len(row.get("completions", [0])))
        if stage.kind == "classify":
            label = row["label"]
            labels.update(label if isinstance(label, list) else [label])
    return rows, count, answers, labels


def _sequences(stage, rows: list[dict], tokenizer) -> list[list[list[int]]]:
    """The ids of each row's sequences: of a ranking all answers, of a translation both sides, else one (ppo: the prompt).

    Without a tokenizer as many ids are made up, the same for the same text, so that shared beginnings show.
    """

    made: dict[str, int] = {}

    def tokens(text: str) -> list[int]:
        if tokenizer:
            return tokenizer(text)["input_ids"]
        return [made.setdefault(text, len(made))] * math.ceil(len(text) / CHARACTERS)

    def chatted(prompt, answer, tools) -> list[int]:
        if tokenizer and tokenizer.chat_template:
            return sum(chat_template.encode_answer(tokenizer, prompt, answer, tools), [])
        return tokens(chat_template.as_text(prompt)) + [-1] * TEMPLATE + tokens(chat_template.as_text(answer))

    out = []
    for row in rows:
        if "completions" in row:
            with chat_template.naming(row):
                out.append([chatted(row["prompt"], answer, row.get("tools")) for answer in row["completions"]])
        elif "completion" in row:
            with chat_template.naming(row):
                out.append([chatted(row["prompt"], row["completion"], row.get("tools"))])
        elif "messages" in row:
            out.append(
                [ids for ids, _ in chat_template.encode_row(tokenizer, row)]
                if tokenizer and tokenizer.chat_template
                else [[i for m in row["messages"] for i in tokens(m.get("content") or "") + [-1] * TEMPLATE]]
            )
        elif stage.kind == "ppo":
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
    return out


def _laid(answers: list[list[int]], layout: str) -> int:
    """Tokens of a ranking in a batch: of all its answers, with what they begin with once where it is shared."""

    every = sum(map(len, answers))
    return every - (len(answers) - 1) * packing.alike(answers) if layout == "shared" else every


def _context(config, values: dict, kind: str) -> int:
    """The longest row in tokens, as `models.context_length`."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 1024
    asked = values.get("max_length")
    return min(limit, asked) if asked else limit if kind == "ppo" else min(limit, 1024)
