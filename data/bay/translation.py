"""Writes translation.jsonl: sentences and what they are in Velm, a language invented here (verb last, adjective after).

    python data/bay/translation.py

Velm has no articles. A noun takes -en in the plural and its adjective follows with the same ending; the place comes
first; the object precedes the verb, which takes ma- in the past. Made from a seed: the file is always the same.
"""

import json
import random
from pathlib import Path

NOUNS = {
    "otter": "lurra",
    "owl": "hoot",
    "baker": "pantim",
    "king": "regul",
    "child": "nim",
    "horse": "tagal",
    "goat": "kapro",
}
PLURALS = {"child": "children"}
ADJECTIVES = {"old": "gram", "small": "pik", "red": "rosk", "happy": "lieb", "tired": "duv"}
VERBS = {
    "see": ("sees", "saw", "vid"),
    "like": ("likes", "liked", "amo"),
    "carry": ("carries", "carried", "port"),
    "follow": ("follows", "followed", "sek"),
    "feed": ("feeds", "fed", "nur"),
}
PLACES = {"at the mill": "molu-na", "on the bridge": "pontu-na", "in the garden": "hortu-na"}


def phrase(chance: random.Random) -> tuple[str, str, bool]:
    """A noun phrase in English and in Velm, and whether it is plural."""
    noun, several = chance.choice(list(NOUNS)), chance.random() < 0.4
    english = PLURALS.get(noun, noun + "s") if several else noun
    velm = NOUNS[noun] + ("en" if several else "")
    if chance.random() < 0.5:
        adjective = chance.choice(list(ADJECTIVES))
        english, velm = f"{adjective} {english}", f"{velm} {ADJECTIVES[adjective]}{'en' if several else ''}"
    return f"the {english}", velm, several


def pair(chance: random.Random) -> dict:
    """One sentence: source in English, target in Velm."""
    (subject, subject_velm, several), (thing, thing_velm, _) = phrase(chance), phrase(chance)
    verb, past = chance.choice(list(VERBS)), chance.random() < 0.5
    singular, before, velm = VERBS[verb]
    english = f"{subject} {before if past else verb if several else singular} {thing}"
    velm = f"{subject_velm} {thing_velm} {'ma' if past else ''}{velm}"
    if chance.random() < 0.4:
        place = chance.choice(list(PLACES))
        english, velm = f"{english} {place}", f"{PLACES[place]} {velm}"
    return {"source": english, "target": velm}


if __name__ == "__main__":
    chance, rows = random.Random(7), {}
    while len(rows) < 1500:
        row = pair(chance)
        rows[row["source"]] = row
    path = Path(__file__).parent / "translation.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
