"""A script that stands in for a person who ranks what models of the demo wrote: for the `rank` stage.

    rank: {labeller: data.bay.labeller:script_labeller}

It is no person and no oracle. It looks for a few words, as someone in a hurry does: is the one who was asked about
named, do the values that are named agree with the facts of the Bay, is there a rude word. It shares the facts and the
wish list (rude is bad, wrong is worse, beside the point is worst) with the labeller in world.py, and nothing with the
oracle, which reads clause by clause; the two disagree now and then (tests/test_labeller.py says how often). It knows
the questions of the training side alone: asked about anything else, so about every held-out prompt, it raises.
"""

from __future__ import annotations

import random
import re
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import world  # noqa: E402  beside this file

RUDE = re.compile(
    r"turnip|dummy|pumpkin|blockhead|noodle|\bfool|silly|stupid|go away|leave me|wake up|use your head|clean "
    r"your|asleep"
)


def script_labeller(prompt: str, completions: list[str]) -> tuple[list[int], list[list[str]]]:
    """Ranks (1 is best, equals share one) and tags of the answers. ValueError for a prompt of the held-out side."""
    if prompt not in questions():
        raise ValueError(f"the labeller is asked about training prompts only, not about {prompt!r}")
    tags = [flaws(questions()[prompt], answer) for answer in completions]
    worth = [world.severity(t) + (0.5 if stutters(a) else 0.0) for t, a in zip(tags, completions)]
    return world.rank(worth), [list(t) for t in tags]


@cache
def questions() -> dict[str, world.Query]:
    """Every training prompt (data/bay/prompts.jsonl and data/bay/prompts_validation.jsonl) and what it asks."""
    return world.prompts(random.Random(f"{world.SEED}/prompts"), 1100, held_out=False)


def flaws(query: world.Query, answer: str) -> tuple[str, ...]:
    """What is wrong with an answer, by the words that stand in it."""
    text = " ".join(re.findall("[a-z']+", answer.lower()))
    rude = ("inappropriate",) if RUDE.search(text) else ()
    verdict = {"choice": choice, "yesno": yes_or_no, "review": review}.get(query.form, statement)(query, text)
    return (*rude, verdict) if verdict else rude


def stutters(answer: str) -> bool:
    """Whether the answer says the same thing twice, which nobody likes, though there is no tag for it."""
    clauses = [" ".join(re.findall("[a-z]+", c)) for c in re.split(r"[.,;:!?]|\b(?:but|and)\b", answer.lower())]
    clauses = [clause for clause in clauses if clause]
    return len(set(clauses)) < len(clauses)


def named(text: str, entity: str) -> bool:
    """Whether the entity's name stands in the text."""
    return re.search(rf"\b{entity.lower()}\b", text) is not None


def wrong_values(entity: str, text: str, about: str = "") -> tuple[bool, bool]:
    """`(some value is named, one of them is not the entity's)`, over its attributes or `about` one of them.

    What films are praised and blamed for is too much for someone in a hurry: only looked at when asked about.
    """
    attributes = world.ATTRIBUTES[world.KIND[entity]]
    names = [about] if about else [name for name in attributes if name not in world.VERDICTS]
    said = [
        value == world.FACTS[entity, name]
        for name in names
        for value in attributes[name].values
        if named(text, value.removesuffix("s") + "s?" if name != "opinion" else value + "d?") and value != entity
    ]
    return bool(said), not all(said)


def statement(query: world.Query, text: str) -> str:
    """A plain question, or "describe"."""
    about = "" if query.form == "describe" else query.attribute
    said, wrong = wrong_values(query.entity, text, about)
    if not named(text, query.entity) or not said:
        return "irrelevant"
    return "inaccurate" if wrong or wrong_values(query.entity, text)[1] else ""


def yes_or_no(query: world.Query, text: str) -> str:
    yes, no = named(text, "yes"), named(text, "no")
    said, wrong = wrong_values(query.entity, text, query.attribute)
    if not (yes or no or said) or not named(text, query.entity) and "that is true" not in text:
        return "irrelevant"
    true = world.FACTS[query.entity, query.attribute] == query.value
    if " not " in text:  # "no, the lantern is not made of wood": the value is the wrong one, and rightly so
        wrong = said and not wrong
    return "inaccurate" if wrong or (yes and not true) or (no and true) else ""


def choice(query: world.Query, text: str) -> str:
    places = {e: match.start() for e in (query.entity, query.other) if (match := re.search(rf"\b{e.lower()}\b", text))}
    if not places:
        return "irrelevant"
    first = min(places, key=places.get)
    wrong = len(places) == 1 and wrong_values(first, text, query.attribute)[1]
    return "" if first == query.right and not wrong else "inaccurate"


def review(query: world.Query, text: str) -> str:
    moods = [
        word in world.PRAISE or word == "love"
        for word in text.split()
        if word in {*world.PRAISE, *world.BLAME, "love", "dislike"}
    ]
    if not named(text, query.entity) or not moods:
        return "irrelevant"
    return "" if moods[0] == (world.FACTS[query.entity, "opinion"] == "love") else "inaccurate"
