"""Writes the questions of the two lm-eval tasks here, from the demo world: the same bytes each time.

    python data/bay/tasks/make.py

bay_grammar.yaml  minimal pairs as in BLiMP (Warstadt et al. 2020, https://arxiv.org/abs/1912.00582): a sentence of the
                  Bay's language and the same with one mistake; is the right one the likelier? Zero-shot.
bay_quiz.yaml     a held-out question and four answers that differ in one word; other questions, with their answers,
                  stand before it as examples (`num_fewshot`). Those may be asked in training, the questions never are.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import world  # noqa: E402  in the folder above


def grammar(rng: random.Random) -> list[dict]:
    """25 pairs for each of four mistakes: the article, the verb's number, the pronoun, the order of words."""
    rows = {}
    while len(rows) < 25:
        person, job = rng.choice(world.PEOPLE), rng.choice(world.JOBS + world.SPECIES)
        good = world.fill("{E} met {a}.", person, job)
        rows[good] = ("article", good.replace(" an ", " a ") if " an " in good else good.replace(" a ", " an "))
    while len(rows) < 50:
        film, part = rng.choice(world.FILMS), rng.choice(world.PARTS)
        good = f"The {part} of {film} {world.be(part)} {rng.choice(world.PRAISE)}."
        rows[good] = ("number", good.replace(" are ", " is ") if " are " in good else good.replace(" is ", " are "))
    while len(rows) < 75:
        person = rng.choice(world.PEOPLE)
        first, second = rng.sample(list(world.ATTRIBUTES["person"]), 2)
        good = world.statement(person, first, world.FACTS[person, first]) + ". "
        says = world.statement(person, second, world.FACTS[person, second]).removeprefix(person)
        right, wrong = ("She", "He") if person in world.WOMEN else ("He", "She")
        rows[f"{good}{right}{says}."] = ("pronoun", f"{good}{wrong}{says}.")
    while len(rows) < 100:
        entity, name = rng.choice([pair for pair in world.SAYABLE if pair[1] in ("place", "owner", "home", "drink")])
        words = world.statement(entity, name, world.FACTS[entity, name]).split()
        i = len(world.cap(entity).split())  # the verb stands after the name; the mistake puts it at the end
        rows[" ".join(words) + "."] = ("order", " ".join([*words[:i], *words[i + 1 :], words[i]]) + ".")
    return [{"sentence_good": g, "sentence_bad": b, "mistake": kind} for g, (kind, b) in rows.items()]


def quiz(rng: random.Random, held_out: bool, count: int) -> list[dict]:
    """Plain questions about one side of the held-out line with four values of the attribute, the right one
    among them.
    """
    rows = {}
    pairs = [p for p in world.all_pairs("ask", held_out) if p[1] not in world.VERDICTS]
    while len(rows) < count:
        entity, name = rng.choice(pairs)
        query = world.Query("ask", entity, name)
        truth, values = world.FACTS[entity, name], world.ATTRIBUTES[world.KIND[entity]][name].values
        choices = [truth, *rng.sample([v for v in values if v not in (truth, entity)], 3)]
        rng.shuffle(choices)
        answers = [world.statement(entity, name, value) + "." for value in choices]
        rows[world.question(rng, query)] = {"choices": answers, "answer": choices.index(truth)}
    return [{"question": question, **row} for question, row in rows.items()]


if __name__ == "__main__":
    files = {
        "bay_grammar.jsonl": grammar(random.Random(f"{world.SEED}/grammar")),
        "bay_quiz.jsonl": quiz(random.Random(f"{world.SEED}/quiz task"), True, 100),
        "bay_quiz_examples.jsonl": quiz(random.Random(f"{world.SEED}/quiz examples"), False, 20),
    }
    for file, rows in files.items():
        (HERE / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
