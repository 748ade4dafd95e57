"""What gives an answer one number: a reward model, or a classifier that was trained on texts.

A reward model (of a reward stage, or a public one with a chat template) reads prompt and answer as a dialogue. A
classifier reads text as *it* was trained to: by its own tokenizer, between its own special tokens (`[CLS] … [SEP]`), as
pairs where it was trained on pairs, cut where training cut. PPO and `evaluate --judge` score by the same code.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines import files
from pipelines.data.labels import MULTI, encode
from pipelines.errors import SetupError
from pipelines.models import chat_template, loading, tokenizer_setup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reads:
    """How a classifier's texts were put to it in training (`stage.json`, rows.reads); as given here where
    nobody knows.
    """

    pairs: bool = False  # text and text_pair
    tokens: int | None = None  # the longest text, special tokens included
    too_long: str | None = None  # what became of longer ones: truncate, drop or error


def trained_reading(folder: str | Path) -> Reads:
    """What the classify stage in `folder` wrote down; nothing is known of other models."""
    made = files.read_json(Path(folder) / files.FINISHED) or {}
    return Reads(**made.get("rows", {}).get("reads", {}))


def continues(tokenizer) -> bool:
    """Whether a policy goes on with the text of its prompt (no template, or `plain`), or answers it with one of its
    own.
    """
    return tokenizer.chat_template in (None, "", (chat_template.TEMPLATES / "plain.jinja").read_text())


class Classifier(nn.Module):
    """A sequence classifier whose score of an answer is the log-odds of one label; frozen.

    Of two labels or more it is the logit of `label` less the log-sum-exp of the others, of a multi-label classifier the
    logit of `label`, of a regression (one output, no label) the number itself.

    What it reads: where a policy continues its prompt, prompt and answer as one text; where it answers under a chat
    template, the answer alone; (prompt, answer) where it was trained on pairs, the turns of a dialogue on lines of
    their own.

    Args:
        model: of `AutoModelForSequenceClassification`, with a trained head.
        tokenizer: its own; made ready to pad on the right and to write only what the model reads, in place.
        label: one of the model's labels.
        reads: how it was trained to read.

    Raises `SetupError` for a label that a model of several does not have; one of a single output has no use for it.
    """

    def __init__(self, model: nn.Module, tokenizer, label: str | None = None, reads: Reads = Reads()):
        super().__init__()
        self.model, self.tokenizer, self.reads = model.eval().requires_grad_(False), tokenizer, reads
        config: Any = model.config
        self.config = config  # what launchers and logs look at
        self._no_split_modules = getattr(model, "_no_split_modules", None)
        names = [str(config.id2label[i]) for i in range(config.num_labels)]
        if len(names) > 1 and label not in names:
            asked = "name one of them, whose log-odds are the score" if label is None else f"{label!r} is none of them"
            raise SetupError(f"label: {model.name_or_path} is a classifier of {', '.join(names)}: {asked}")
        self.label = names.index(label) if len(names) > 1 else 0
        make_readable(model, tokenizer)
        limits = [x for x in (reads.tokens, loading.positions(model)) if x is not None]
        self.context, self._cut_is_known = min(limits, default=None), False

    def features(self, prompts: list, completions: list[str], continued: bool) -> list[dict]:
        """What the tokenizer gives for each answer; `continued`: see `continues`.

        Raises `SetupError` for a text longer than any it was trained on, where training did not cut texts.
        """
        if self.reads.pairs:
            rows = [{"text": _text(p, "\n"), "text_pair": c} for p, c in zip(prompts, completions, strict=True)]
        else:
            before = [_text(prompt, "") if continued else "" for prompt in prompts]
            rows = [{"text": p + c} for p, c in zip(before, completions, strict=True)]
        rows = [{**row, "where": f"answer {i + 1}"} for i, row in enumerate(rows)]
        found, long = encode(self.tokenizer, rows, self.context)
        if long and self.reads.too_long in ("drop", "error"):
            raise SetupError(
                f"{self.model.name_or_path} was trained on texts of up to {self.context} tokens, longer ones were left "
                f"out (data.too_long: {self.reads.too_long}); {len(long)} of {len(rows)} answers are longer. Train it "
                "with data.too_long: truncate or a longer max_length, or lower response_length."
            )
        if long and not self._cut_is_known:
            self._cut_is_known = True
            how = "as in its training" if self.reads.too_long else "the most that it reads"
            logger.warning(
                "%s: %d of %d texts are cut at %d tokens, %s",
                self.model.name_or_path,
                len(long),
                len(rows),
                self.context,
                how,
            )
        return found

    @torch.no_grad()
    def forward(self, features: list[dict]) -> Tensor:
        """Scores (b,), float32, of some of `features`."""
        batch = self.tokenizer.pad(features, return_tensors="pt").to(self.model.device)
        logits = self.model(**batch).logits.float()
        own = logits[:, self.label]
        if self.config.num_labels == 1 or self.config.problem_type == MULTI:
            return own
        others = torch.arange(logits.shape[1], device=logits.device) != self.label
        return own - logits[:, others].logsumexp(1)


def make_readable(model, tokenizer) -> None:
    """Let a classifier's tokenizer pad on the right with a token of its own, and write only what the model reads; in
    place.
    """
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer_setup.ensure_pad(tokenizer)
    tokenizer_setup.fit_model(model, tokenizer)
    tokenizer_setup.read_by_model(model, tokenizer)
    tokenizer.padding_side = "right"  # causal models read the score at the last token before the padding


def load_scorer(section, label: str | None = None) -> tuple[nn.Module, object]:
    """`(model, its tokenizer)` of a `model:` section: a `Classifier`, or a sequence classifier of one score that reads
    dialogues.

    A missing (random) score head is a `ModelError`.
    """
    path, auto = section.model_name_or_path, "AutoModelForSequenceClassification"
    tokenizer, count = loading.load_tokenizer(section), outputs(section)
    made = files.read_json(Path(path) / files.FINISHED) or {}
    if count > 1 or made.get("kind") == "classify":
        return Classifier(loading.load_model(section, auto), tokenizer, label, trained_reading(path)), tokenizer
    model = loading.load_model(section, auto, num_labels=1)
    if tokenizer.chat_template is None and not hasattr(model, "score"):  # an encoder that never saw a dialogue
        return Classifier(model, tokenizer), tokenizer
    return model, tokenizer


def outputs(section) -> int:
    """How many outputs the head of a trained classifier has; 1 for models without one, whose loading is refused."""
    config = loading.config_of(section.model_name_or_path, section.model_revision, section.trust_remote_code)
    classifies = any("ForSequenceClassification" in name for name in config.architectures or [])
    return config.num_labels if classifies else 1


def _text(prompt, between: str) -> str:
    """A prompt, text or messages, as one text."""
    return prompt if isinstance(prompt, str) else between.join(message["content"] for message in prompt)
