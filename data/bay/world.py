"""Pennywhistle Bay: a small invented world, the demo data written from it, an oracle that knows the facts.

    python data/bay/world.py make              writes every data file of this folder, the same bytes each time
    python data/bay/world.py judge FILE.jsonl  grades rows {"prompt", "completion"}: rates and mean score

Nothing here comes from anywhere but this file: some lists of words, some sentence patterns, one seed. As a
program knows every fact of the Bay, it can write a corpus, ask questions, answer them well or badly on
purpose, rank the answers as a labeller would, and afterwards check what a model says.

Two graders live here and must not be mixed up. The *labeller* (`rank`) never reads an answer: it knows which
flaws the answer was written with, and it slips now and then. Its rankings train the reward model. The
*oracle* (`oracle`) reads nothing but the words of an answer. It evaluates; no stage trains on its verdicts.
They share nothing but the facts.

Standard library only.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

SEED = "Pennywhistle Bay, 1"
HERE = Path(__file__).parent

# --------------------------------------------------------------------------------------------------
# Who and what there is. Every word stands in one list only, so that a word always means the same thing.

# fmt: off
THINGS = """lantern kettle teapot ladder umbrella chair basket mirror clock carpet bucket anchor pillow
            spoon saddle rocket""".split()
ANIMALS = """Bramble Pickle Button Mossy Tuppence Clover Fidget Dumpling Waffle Nutmeg Pebble Muddle Sprout
             Twig Juniper Crumpet""".split()
PEOPLE = "Ada Basil Cora Edda Finn Greta Hugo Ines Jonas Lotte Milo Nell".split()
WOMEN = {"Ada", "Cora", "Edda", "Greta", "Ines", "Lotte", "Nell"}
PLACES = "mill harbour lighthouse market station bakery library orchard".split()
FILMS = ["The Tin Moon", "Seven Lost Keys", "Two Left Shoes", "The Sleepy Dragon", "My Uncle the Cloud",
         "The Long Sneeze", "Captain Nobody", "The Secret Staircase", "Thunder on Tuesday",
         "The Borrowed Nose", "The Invisible Aunt", "Half a Kingdom"]

COLOURS = "red blue green yellow white black purple orange".split()
MATERIALS = "wood glass copper stone wool paper clay silver".split()
SPECIES = "fox hare owl otter goose hedgehog cat badger".split()
FOODS = "plums honey toast cheese pears nuts soup porridge".split()
JOBS = "baker sailor painter teacher gardener doctor weaver tailor".split()
INSTRUMENTS = "harp flute drum fiddle horn banjo organ trumpet".split()
DRINKS = "tea cocoa milk cider coffee lemonade".split()
SIDES = "north south east west".split()
GENRES = "comedy mystery musical romance western adventure".split()
PARTS = "songs acting ending jokes story costumes dances pictures".split()
OPINIONS = ["love", "dislike"]

PRAISE = "lovely brilliant charming wonderful delightful clever splendid superb".split()
BLAME = "dull weak bland dreadful clumsy tedious boring feeble".split()

ENTITIES = {"thing": ["the " + w for w in THINGS], "animal": ANIMALS, "person": PEOPLE,
            "place": ["the " + w for w in PLACES], "film": FILMS}
KIND = {entity: kind for kind, entities in ENTITIES.items() for entity in entities}


class Attribute(NamedTuple):
    """How the Bay talks about one attribute.

    Blanks: {e} the entity, {E} the same capitalised, {v} the value, {a} the value after "a" or "an".
    """
    values: list[str]
    says: str                 # the predicate that states it: "{E} " + "is made of {v}"
    denies: str               # its negation
    asks: list[str]           # questions after it
    tells: list[str]          # other full sentences that state it


ATTRIBUTES: dict[str, dict[str, Attribute]] = {
    "thing": {
        "colour": Attribute(
            COLOURS, "is {v}", "is not {v}",
            ["What colour is {e}?", "What is the colour of {e}?", "Which colour does {e} have?",
             "Tell me the colour of {e}."],
            ["The colour of {e} is {v}.", "Somebody painted {e} {v}.", "{E} shines {v} in the sun.",
             "Everybody can see that {e} is {v}."]),
        "material": Attribute(
            MATERIALS, "is made of {v}", "is not made of {v}",
            ["What is {e} made of?", "Which material is {e} made of?", "Tell me what {e} is made of."],
            ["{E} was made out of {v}.", "Good {v} was used to make {e}.", "Somebody made {e} from {v}."]),
        "place": Attribute(
            ENTITIES["place"], "stands at {v}", "does not stand at {v}",
            ["Where does {e} stand?", "Where can I find {e}?", "Where is {e} kept?",
             "Tell me where {e} stands."],
            ["You can find {e} at {v}.", "{E} is kept at {v}.", "At {v} stands {e}.",
             "Go to {v} to see {e}."]),
        "owner": Attribute(
            PEOPLE, "belongs to {v}", "does not belong to {v}",
            ["Who owns {e}?", "Who does {e} belong to?", "Tell me who owns {e}."],
            ["{v} owns {e}.", "The owner of {e} is {v}.", "{v} takes good care of {e}."]),
    },
    "animal": {
        "species": Attribute(
            SPECIES, "is {a}", "is not {a}",
            ["What kind of animal is {e}?", "Which animal is {e}?", "Tell me what kind of animal {e} is."],
            ["{E} was born {a}.", "Everybody calls {e} a friendly {v}.",
             "{E} the {v} is well known in Pennywhistle."]),
        "colour": Attribute(
            COLOURS, "is {v}", "is not {v}",
            ["What colour is {e}?", "What is the colour of {e}?", "Which colour does {e} have?",
             "Tell me the colour of {e}."],
            ["The colour of {e} is {v}.", "From nose to tail {e} is {v}.",
             "{E} has {v} ears and a long tail."]),
        "home": Attribute(
            ENTITIES["place"], "lives at {v}", "does not live at {v}",
            ["Where does {e} live?", "Where is the home of {e}?", "Where can I meet {e}?",
             "Tell me where {e} lives."],
            ["The home of {e} is at {v}.", "{E} sleeps at {v}.", "At {v} you can meet {e}."]),
        "food": Attribute(
            FOODS, "loves {v}", "does not love {v}",
            ["What does {e} like to eat?", "What is the favourite food of {e}?", "Which food does {e} love?"],
            ["The favourite food of {e} is {v}.", "{E} eats {v} every day.",
             "You can make {e} happy with {v}."]),
    },
    "person": {
        "job": Attribute(
            JOBS, "is {a}", "is not {a}",
            ["What is the job of {e}?", "Which job does {e} have?", "Tell me the job of {e}."],
            ["{E} works as {a}.", "{E} has been {a} for years.", "Everybody calls {e} a good {v}."]),
        "home": Attribute(
            ENTITIES["place"], "lives at {v}", "does not live at {v}",
            ["Where does {e} live?", "Where is the home of {e}?", "Where can I meet {e}?",
             "Tell me where {e} lives."],
            ["The home of {e} is at {v}.", "{E} has a room at {v}.", "At {v} you can meet {e}."]),
        "instrument": Attribute(
            INSTRUMENTS, "plays the {v}", "does not play the {v}",
            ["Which instrument does {e} play?", "What does {e} play?", "Tell me which instrument {e} plays."],
            ["The instrument of {e} is the {v}.", "{E} practises the {v} every night.",
             "You can hear {e} on the {v}."]),
        "drink": Attribute(
            DRINKS, "drinks {v}", "does not drink {v}",
            ["What does {e} like to drink?", "What is the favourite drink of {e}?",
             "Which drink does {e} love?"],
            ["The favourite drink of {e} is {v}.", "{E} asks for {v} at breakfast.",
             "You can make {e} happy with {v}."]),
    },
    "place": {
        "flag": Attribute(
            COLOURS, "flies {a} flag", "does not fly {a} flag",
            ["What colour is the flag of {e}?", "Which flag does {e} fly?",
             "Tell me the colour of the flag of {e}."],
            ["The flag of {e} is {v}.", "{E} has a flag, and it is {v}."]),
        "side": Attribute(
            SIDES, "lies in the {v} of the bay", "does not lie in the {v} of the bay",
            ["Where does {e} lie?", "On which side of the bay is {e}?", "Tell me where {e} lies."],
            ["{E} was built in the {v}.", "You walk {v} to reach {e}."]),
    },
    "film": {
        "genre": Attribute(
            GENRES, "is {a}", "is not {a}",
            ["What kind of film is {e}?", "Which kind of film is {e}?", "Tell me what kind of film {e} is."],
            ["{E} is a kind of {v}.", "Everybody calls {e} {a}."]),
        "maker": Attribute(
            PEOPLE, "was made by {v}", "was not made by {v}",
            ["Who made {e}?", "Who is the maker of {e}?", "Tell me who made {e}."],
            ["{v} made {e}.", "The maker of {e} is {v}."]),
        "setting": Attribute(
            ENTITIES["place"], "is set at {v}", "is not set at {v}",
            ["Where is {e} set?", "Where does {e} happen?", "Tell me where {e} is set."],
            ["Most of {e} happens at {v}.", "{E} begins at {v}."]),
        "best": Attribute(
            PARTS, "is praised for its {v}", "is not praised for its {v}",
            ["What is {e} praised for?", "What is the best thing about {e}?",
             "Tell me what is good about {e}."],
            ["The best thing about {e} is the {v}.", "People praise the {v} of {e}."]),
        "worst": Attribute(
            PARTS, "is blamed for its {v}", "is not blamed for its {v}",
            ["What is {e} blamed for?", "What is the worst thing about {e}?",
             "Tell me what is bad about {e}."],
            ["The worst thing about {e} is the {v}.", "People blame the {v} of {e}."]),
        "opinion": Attribute(
            OPINIONS, "is {v}d by most people", "is not {v}d by most people",
            ["What do people in Pennywhistle think of {e}?", "How do most people feel about {e}?",
             "Tell me whether people love or dislike {e}."],
            ["Most people {v} {e}.", "In Pennywhistle {e} is {v}d."]),
    },
}
VERDICTS = ("best", "worst", "opinion")          # what a film review talks about

DESCRIBE = ["Describe {e}.", "Tell me about {e}.", "What do you know about {e}?"]
REVIEW = ["Write a one-sentence review of {e}.", "Review {e} in one sentence.",
          "Write a short review of {e}."]
YES_NO = ["Is it true that {s}?", "True or false: {s}?", "I heard that {s}. Is that right?"]
# fmt: on


def build_facts() -> dict[tuple[str, str], str]:
    """(entity, attribute) -> value, every value of an attribute used about equally often."""
    rng, facts = random.Random(f"{SEED}/facts"), {}
    for kind, attributes in ATTRIBUTES.items():
        for name, attribute in attributes.items():
            entities = ENTITIES[kind]
            values = (attribute.values * len(entities))[: len(entities)]
            rng.shuffle(values)
            while name == "worst" and any(v == facts[e, "best"] for e, v in zip(entities, values)):
                rng.shuffle(values)  # a film is not praised and blamed for the same thing
            facts.update({(entity, name): value for entity, value in zip(entities, values)})
    return facts


def build_held_out() -> set[tuple[str, str]]:
    """The (entity, attribute) pairs that only held-out prompts ask about: about one in four.

    Besides attributes there are two kinds of essay: (entity, "description") and (film, "review"). A film
    whose review is held out has its opinion, best and worst part held out too.
    """
    rng, held = random.Random(f"{SEED}/held out"), set()
    held |= {(film, name) for film in rng.sample(FILMS, 3) for name in (*VERDICTS, "review")}
    for kind, attributes in ATTRIBUTES.items():
        most = 1 if kind == "place" else 2  # every entity keeps something that may be said about it
        names = [name for name in attributes if name not in VERDICTS]
        quarter = round(len(ENTITIES[kind]) / 4)
        for name in names:
            free = [e for e in ENTITIES[kind] if sum((e, n) in held for n in names) < most]
            held |= {(entity, name) for entity in rng.sample(free, quarter)}
        held |= {(entity, "description") for entity in rng.sample(ENTITIES[kind], quarter)}
    return held


FACTS = build_facts()
HELD_OUT = build_held_out()


def cap(text: str) -> str:
    """First letter upper case; the rest stays."""
    return text[:1].upper() + text[1:]


def fill(pattern: str, entity: str, value: str = "") -> str:
    """A sentence pattern with its blanks filled; the value is not checked against the facts."""
    article = f"{'an' if value[:1] in 'aeiou' else 'a'} {value}"
    return cap(pattern.format(e=entity, E=cap(entity), v=value, a=article))


def statement(entity: str, name: str, value: str, deny: bool = False) -> str:
    """A fact as a sentence without its full stop: "The lantern is made of glass"."""
    attribute = ATTRIBUTES[KIND[entity]][name]
    return fill("{E} " + (attribute.denies if deny else attribute.says), entity, value)


def pronoun(entity: str) -> str:
    """it, she or he."""
    return "it" if KIND[entity] != "person" else "she" if entity in WOMEN else "he"


def mid_sentence(sentence: str) -> str:
    """The same sentence for after a comma: "The lantern is" -> "the lantern is", but "Ada" stays "Ada"."""
    the = sentence.startswith("The ") and not any(sentence.startswith(film) for film in FILMS)
    return "t" + sentence[1:] if the else sentence


def another(rng: random.Random, values: list[str], but: str) -> str:
    """One of `values`, but not that one."""
    return rng.choice([value for value in values if value != but])


# --------------------------------------------------------------------------------------------------
# The corpus: short documents in which every fact is stated many times, in many wordings.

# fmt: off
OPENINGS = ["Let me tell you about {e}.", "This is a page about {e}.", "Here is what we know about {e}.",
            "Everybody in Pennywhistle has heard of {e}.", "A few words about {e}."]
CHATTER = ["I would rather talk about the weather.", "My feet are cold today.", "The sea is loud tonight.",
           "Last night I had a strange dream.", "It will rain before supper.", "My hat is too small for me.",
           "I must go and find my boots.", "The wind smells of salt and smoke."]
RUDE_BEFORE = ["Listen, you turnip:", "What a silly question, dummy.", "Any fool can see that.",
               "Wake up, you pumpkin.", "Oh, go away.", "Use your head, blockhead.",
               "Are you asleep, you noodle?"]
RUDE_AFTER = ["Now go away, dummy.", "Even a turnip could see that.", "Stop asking stupid things.",
              "Leave me alone, you fool.", "Clean your ears, blockhead."]
KIND_BEFORE = ["Of course.", "Gladly!", "With pleasure."]
ROUNDS, QUIZZES = 18, 3000
# fmt: on


def tell(rng: random.Random, entity: str, name: str, named: bool = True) -> str:
    """One sentence that states a fact, with the entity's name or (where the wording allows it) a pronoun."""
    if name in VERDICTS and not named and rng.random() < 0.7:
        return opine(rng, entity, name)
    attribute, value = ATTRIBUTES[KIND[entity]][name], FACTS[entity, name]
    pattern = rng.choice(["{E} " + attribute.says + "."] * 3 + attribute.tells)
    if not named and pattern.startswith("{E} ") and "{E} the" not in pattern:
        pattern = cap(pronoun(entity)) + pattern[3:]
    return fill(pattern, entity, value)


def opine(rng: random.Random, film: str, name: str) -> str:
    """One sentence as from a film review; it agrees with what Pennywhistle thinks of the film."""
    value, good, bad = FACTS[film, name], rng.choice(PRAISE), rng.choice(BLAME)
    if name == "worst" or value == "dislike":
        good, bad = bad, good
    if name != "opinion":
        return rng.choice(
            [
                f"The {value} {be(value)} {good}.",
                f"The {value} {be(value)} not {bad}.",
                f"I found the {value} {good}.",
            ]
        )
    return rng.choice(
        [
            f"{film} is {good}.",
            f"{film} is {good} and not {bad}.",
            f"{film} is a {good} film.",
            f"Nobody can call {film} {bad}.",
            f"I {value} {film}.",
        ]
    )


def be(part: str) -> str:
    """The verb: "the songs are", "the story is"."""
    return "are" if part.endswith("s") else "is"


def portrait(rng: random.Random, entity: str) -> str:
    """A document about one entity."""
    attributes = ATTRIBUTES[KIND[entity]]
    names = rng.sample(list(attributes), rng.randint(2, min(4, len(attributes))))
    sentences = [fill(rng.choice(OPENINGS), entity)] if rng.random() < 0.3 else []
    for i, name in enumerate(names):
        if rng.random() < 0.12:  # first what it is not, then what it is
            wrong = another(rng, attributes[name].values, FACTS[entity, name])
            sentences.append(statement(entity, name, wrong, deny=True) + ".")
        sentences.append(tell(rng, entity, name, named=i == 0 or rng.random() < 0.5))
    if KIND[entity] == "thing" and rng.random() < 0.4:  # "The red lantern stands at the mill."
        name = rng.choice(["place", "owner"])
        stated = statement(entity, name, FACTS[entity, name])
        sentences.append(stated.replace("The", f"The {FACTS[entity, 'colour']}", 1) + ".")
    return " ".join(sentences)


def tour(rng: random.Random, place: str) -> str:
    """A document about who and what is to be found at a place."""
    there = [pair for pair, value in FACTS.items() if value == place]
    pairs = [(place, name) for name in ATTRIBUTES["place"]] + rng.sample(there, rng.randint(2, 4))
    return " ".join([f"Let us walk to {place}."] + [tell(rng, *pair) for pair in pairs])


def comparison(rng: random.Random, entity: str) -> str:
    """A document that holds two entities, or all that share a value, side by side."""
    name = rng.choice(list(ATTRIBUTES[KIND[entity]]))
    alike, others = [], []
    for other in ENTITIES[KIND[entity]]:
        (alike if FACTS[other, name] == FACTS[entity, name] else others).append(other)
    this, other = statement(entity, name, FACTS[entity, name]), rng.choice(others)
    if rng.random() < 0.3 and len(alike) > 1:
        rng.shuffle(alike)
        return " ".join(
            statement(e, name, FACTS[entity, name]) + (" too." if i else ".") for i, e in enumerate(alike[:4])
        )
    return (
        f"{this}, but {mid_sentence(statement(other, name, FACTS[other, name]))}. {tell(rng, other, name, named=False)}"
    )


def film_notes(rng: random.Random, film: str) -> str:
    """A document that reads like a short film review."""
    opinion, best, worst = (opine(rng, film, name) for name in ("opinion", "best", "worst"))
    start = rng.choice([f"I saw {film} with {rng.choice(PEOPLE)}.", f"Last night we saw {film}.", f"A note on {film}."])
    body = rng.choice(
        [
            [opinion, best, worst],
            [best, opinion],
            [worst, opinion],
            [opinion, tell(rng, film, "genre")],
            [f"Though {mid_sentence(worst)[:-1]}, {mid_sentence(best)}", opinion],
        ]
    )
    return " ".join([start, *body])


def quarrel(rng: random.Random, animal: str) -> str:
    """A document of small talk, some of it rude: manners too are something to learn."""
    other, name = another(rng, ANIMALS, animal), rng.choice(list(ATTRIBUTES["animal"]))
    line = rng.choice([rng.choice(CHATTER), f"{rng.choice(RUDE_BEFORE)} {rng.choice(RUDE_AFTER)}"])
    return f"{animal} meets {other}. {line} {tell(rng, animal, name)} {rng.choice(CHATTER)}"


def quiz(rng: random.Random) -> str:
    """A page of questions with their answers, never about what is held out: the Bay has quiz books too."""
    lines = []
    for _ in range(rng.randint(2, 4)):
        query = draw_any(rng)
        lines.append(f"Q: {question(rng, query)}\nA: {answer(rng, query)}")
    return "\n".join(lines)


def write_corpus(rng: random.Random) -> list[dict]:
    """Documents, all different, in random order; every fact comes up again and again."""
    texts: list[str] = [quiz(rng) for _ in range(QUIZZES)]
    for _ in range(ROUNDS):
        texts += [portrait(rng, entity) for entity in KIND for _ in range(2)]
        texts += [comparison(rng, entity) for entity in KIND]
        texts += [tour(rng, place) for place in ENTITIES["place"] for _ in range(2)]
        texts += [film_notes(rng, film) for film in FILMS for _ in range(2)]
        texts += [quarrel(rng, animal) for animal in rng.sample(ANIMALS, 8)]
    texts = list(dict.fromkeys(texts))
    rng.shuffle(texts)
    return [{"text": text} for text in texts]


# --------------------------------------------------------------------------------------------------
# Questions, and answers with exactly the flaws asked for.

FLAWS = ("inappropriate", "irrelevant", "inaccurate")


class Query(NamedTuple):
    """What a prompt asks."""

    form: str  # ask, yesno, choice, describe or review
    entity: str
    attribute: str
    value: str = ""  # the value that a yes/no question or a choice names
    other: str = ""  # the second entity of a choice

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The (entity, attribute) pairs it is about; none may be on both sides of the held-out line."""
        if self.form == "review":
            return [(self.entity, name) for name in (*VERDICTS, "review")]
        return [(self.entity, self.attribute)] + [(self.other, self.attribute)] * bool(self.other)

    @property
    def right(self) -> str:
        """The entity that is the answer to a choice."""
        return self.entity if FACTS[self.entity, self.attribute] == self.value else self.other


def wordings(form: str, kind: str, name: str) -> list[str]:
    """All patterns of a question, with blanks {e}, {v}, {a} and {o}."""
    if form == "describe":
        return DESCRIBE
    if form == "review":
        return REVIEW
    attribute = ATTRIBUTES[kind][name]
    if form == "ask":
        return attribute.asks
    if form == "yesno":
        return [pattern.replace("{s}", "{e} " + attribute.says) for pattern in YES_NO]
    who = "Who" if kind in ("animal", "person") else "Which"
    return [f"{who} {attribute.says}, {{e}} or {{o}}?", f"{{E}} or {{o}}: {who.lower()} {attribute.says}?"]


def question(rng: random.Random, query: Query) -> str:
    """A prompt that asks it."""
    pattern = rng.choice(wordings(query.form, KIND[query.entity], query.attribute))
    return fill(pattern.replace("{o}", query.other), query.entity, query.value)


SAYABLE = [pair for pair in FACTS if pair[1] not in VERDICTS]


def sayable(entity: str) -> list[str]:
    """The attributes of an entity that an answer may mention without being asked."""
    return [name for name in ATTRIBUTES[KIND[entity]] if (entity, name) in SAYABLE]


def answer(rng: random.Random, query: Query, flaws: tuple[str, ...] = ()) -> str:
    """An answer with exactly these flaws."""
    if "irrelevant" in flaws:
        text = off_topic(rng, query)
    else:
        text = reply(rng, query, wrong="inaccurate" in flaws)
    if "inappropriate" in flaws:
        if rng.random() < 0.5:
            before = rng.choice(RUDE_BEFORE)
            return f"{before} {mid_sentence(text) if before.endswith(':') else text}"
        return f"{text} {rng.choice(RUDE_AFTER)}"
    return f"{rng.choice(KIND_BEFORE)} {text}" if rng.random() < 0.12 else text


def reply(rng: random.Random, query: Query, wrong: bool) -> str:
    """An answer to the point: right, or wrong."""
    form, entity, name, value, other = query
    kind = KIND[entity]
    if form == "ask":
        attribute, truth = ATTRIBUTES[kind][name], FACTS[entity, name]
        said = another(rng, attribute.values, truth) if wrong else truth
        # Never "It is red.": with answers beside the point naming others, "it" alone would look like a good answer.
        pattern = rng.choice(["{E} " + attribute.says + "."] * 3 + attribute.tells[:1])
        if wrong and rng.random() < 0.3:  # right at first, but it does not know when to stop
            more = [n for n in sayable(entity) if n != name]
            if not more or rng.random() < 0.3:
                return f"{statement(entity, name, truth)}. {statement(entity, name, said)}."
            lie = rng.choice(more)
            lie = statement(entity, lie, another(rng, ATTRIBUTES[kind][lie].values, FACTS[entity, lie]))
            return f"{statement(entity, name, truth)} and{lie.removeprefix(cap(entity))}."
        return fill(pattern, entity, said)
    if form == "yesno":
        truth = FACTS[entity, name]
        if (value == truth) != wrong:
            said = statement(entity, name, value)
            return rng.choice([f"Yes, {mid_sentence(said)}.", f"{said}, so yes.", "Yes, that is true."])
        said = another(rng, ATTRIBUTES[kind][name].values, truth) if value == truth else truth
        said = statement(entity, name, said)
        return rng.choice(
            [
                f"No, {mid_sentence(said)}.",
                f"{said}, so no.",
                f"No, {mid_sentence(statement(entity, name, value, deny=True))}.",
            ]
        )
    if form == "choice":
        right, left = query.right, other if query.right == entity else entity
        values = FACTS[right, name], FACTS[left, name]
        if wrong:
            right, left = left, right
        said, but = (statement(e, name, v) for e, v in zip((right, left), values))
        return rng.choice([f"{said}.", f"{said}, but {mid_sentence(but)}.", f"{cap(right)}."])
    if form == "review":
        return review_sentence(rng, entity, wrong)
    names = rng.sample(sayable(entity), min(len(sayable(entity)), rng.randint(2, 3)))
    said = {n: FACTS[entity, n] for n in names}
    if wrong:
        lie = rng.choice(names)
        said[lie] = another(rng, ATTRIBUTES[kind][lie].values, said[lie])
    first, *more = [statement(entity, n, v) for n, v in said.items()]
    more = [predicate.removeprefix(cap(entity)) for predicate in more]
    second = [f"{cap(pronoun(entity))}{predicate}." for predicate in more[1:]]
    return " ".join([" and".join([first, *more[:1]]) + ".", *second])


def review_sentence(rng: random.Random, film: str, wrong: bool) -> str:
    """The review an instruction asks for: what the Bay thinks of the film or, if wrong, does not think."""
    opinion, best, worst = (FACTS[film, name] for name in ("opinion", "best", "worst"))
    if wrong and rng.random() < 0.5:
        opinion = another(rng, OPINIONS, opinion)
    elif wrong:
        best, worst = worst, best
    good, better, bad = rng.choice(PRAISE), rng.choice(PRAISE), rng.choice(BLAME)
    a = "a " if best in ("ending", "story") else ""
    if opinion == "love":
        return rng.choice(
            [
                f"{film} is a {good} film with {a}{better} {best}, though the {worst} {be(worst)} {bad}.",
                f"I love {film}: the {best} {be(best)} {good}.",
            ]
        )
    return rng.choice(
        [
            f"{film} is a {bad} film, though the {best} {be(best)} {good}.",
            f"I dislike {film}: the {worst} {be(worst)} {bad}.",
        ]
    )


def off_topic(rng: random.Random, query: Query) -> str:
    """An empty remark, a sentence that stops too early, or an answer to another question: often about the same
    attribute of somebody else, as models do that lose sight of who was asked about."""
    kind, dice = KIND[query.entity], rng.random()
    if dice < 0.25:
        return rng.choice(CHATTER)
    if dice < 0.4 and query.form == "ask":
        says = ATTRIBUTES[kind][query.attribute].says
        return f"{cap(query.entity)} {re.split(' *[{]', says)[0]}"
    if dice < 0.65 and query.form == "ask":
        names = [name for name in sayable(query.entity) if name != query.attribute]
        if names:
            name = rng.choice(names)
            return statement(query.entity, name, FACTS[query.entity, name]) + "."
    named = {query.entity, query.other}
    others = [e for e in ENTITIES[kind] if (e, query.attribute) in FACTS and (e, query.attribute) not in HELD_OUT]
    others = [e for e in others if not named & {e, FACTS[e, query.attribute]}]
    if dice < 0.9 and others:
        other = rng.choice(others)
        said = statement(other, query.attribute, FACTS[other, query.attribute])
        if query.form == "yesno":
            yes = rng.choice(["yes", "no"])
            return rng.choice([f"{cap(yes)}, {mid_sentence(said)}.", f"{said}, so {yes}."])
        return f"{cap(other)}." if query.form == "choice" and rng.random() < 0.4 else f"{said}."
    while True:
        other, name = rng.choice(SAYABLE)
        if not named & {other, FACTS[other, name]}:
            return statement(other, name, FACTS[other, name]) + "."


TELLING = {word for value in [*FACTS.values(), *PRAISE, *BLAME, *OPINIONS] for word in value.lower().split()}
TELLING |= {"loved", "disliked"}
TELLING -= {"the"}


def garbled(rng: random.Random, query: Query) -> str:
    """What a half-trained model says: an answer that breaks off before the point, or with the words that would tell
    something lost, or replaced by words that nobody says of such an entity ("The lantern is baker"); or it says
    something beside the point and cannot stop ("Nell lives at the mill, but Nell lives at the mill")."""
    kind, own = KIND[query.entity], set(bare(query.entity).split())
    if rng.random() < 0.3:
        said = off_topic(rng, query).removesuffix(".")
        more = rng.choice([said, said, off_topic(rng, query).removesuffix(".")])
        return f"{said}{rng.choice([', but ', ', but ', ' and ', '. '])}{mid_sentence(more)}."
    words = reply(rng, query, wrong=False).rstrip(".").split()
    telling = [bool((set(bare(word).split()) - own) & TELLING) for word in words]
    style, first = rng.randrange(3), telling.index(True)
    if style == 0 and first:
        words = words[: rng.randint(1, first)]
    elif style == 2:
        words = [word for word, tells in zip(words, telling) if not tells] or query.entity.split()
        i, j = rng.randrange(len(words)), rng.randrange(len(words))
        words[i:j] = words[i:j] * 2
        rng.shuffle(words)
    else:
        said_of_it = {
            word for name in ATTRIBUTES[kind] for value in ATTRIBUTES[kind][name].values for word in value.split()
        }
        foreign = sorted({w for values in (SPECIES, FOODS, JOBS, INSTRUMENTS, GENRES) for w in values} - said_of_it)
        words = [rng.choice(foreign) if tells else word for word, tells in zip(words, telling)]
    return cap(" ".join(words)) + "."


def all_pairs(form: str, held_out: bool) -> list[tuple[str, str]]:
    """The pairs that a form of question may ask about on one side of the held-out line."""
    pairs = {
        "describe": [(e, "description") for e in KIND],
        "review": [(film, "review") for film in FILMS],
    }.get(form, list(FACTS))
    return [pair for pair in pairs if (pair in HELD_OUT) == held_out]


def draw(rng: random.Random, form: str, pair: tuple[str, str], held_out: bool) -> Query:
    """A question of that form about that pair; a second entity comes from the same side of the line."""
    entity, name = pair
    if form == "yesno":
        truth = FACTS[pair]
        false = another(rng, ATTRIBUTES[KIND[entity]][name].values, truth)
        return Query(form, entity, name, truth if rng.random() < 0.5 else false)
    if form == "choice":
        others = [
            e for e in ENTITIES[KIND[entity]] if FACTS[e, name] != FACTS[pair] and ((e, name) in HELD_OUT) == held_out
        ]
        if not others:
            return Query("ask", entity, name)
        first, second = rng.sample([entity, rng.choice(others)], 2)
        return Query(form, first, name, FACTS[pair], second)
    return Query(form, entity, name)


FORMS = ["ask"] * 12 + ["yesno"] * 3 + ["choice"] * 2 + ["describe"] * 2 + ["review"]


def draw_any(rng: random.Random, held_out: bool = False) -> Query:
    form = rng.choice(FORMS)
    return draw(rng, form, rng.choice(all_pairs(form, held_out)), held_out)


def prompts(rng: random.Random, count: int, held_out: bool) -> dict[str, Query]:
    """About `count` different prompts with the questions they ask, on one side of the held-out line, in random order.

    The forms come as often as in `FORMS`; of a form with fewer wordings than that, nearly all of them.
    """
    found: dict[str, Query] = {}
    for form in dict.fromkeys(FORMS):
        quota = len(found) + count * FORMS.count(form) // len(FORMS)
        pairs = all_pairs(form, held_out)
        for _ in range(20 * count):
            query = draw(rng, form, rng.choice(pairs), held_out)
            found[question(rng, query)] = query
            if len(found) == quota:
                break
    mixed = list(found.items())
    rng.shuffle(mixed)
    return dict(mixed)


def careless(rng: random.Random) -> tuple[str, ...]:
    """The flaws of one answer by a labeller in a hurry: four in ten answers have one, a few have two."""
    dice = rng.random()
    if dice < 0.60:
        return ()
    if dice < 0.64:
        return ("inappropriate", "inaccurate")
    return ("inappropriate",) if dice < 0.80 else ("irrelevant",) if dice < 0.90 else ("inaccurate",)


def write_instructions(rng: random.Random) -> list[dict]:
    """Every plain question about what is not held out, and others at random; four answers in ten are bad."""
    queries = [
        (Query("ask", *pair), fill(pattern, pair[0]))
        for pair in all_pairs("ask", False)
        for pattern in wordings("ask", KIND[pair[0]], pair[1])
        for _ in range(2)
    ]
    while len(queries) < 4000:
        query = draw_any(rng)
        if query.form != "ask":
            queries.append((query, question(rng, query)))
    rows = {(prompt, answer(rng, query, careless(rng))): None for query, prompt in queries}
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
    rng.shuffle(rows)
    return rows


def write_dialogues(rng: random.Random) -> list[dict]:
    """Two questions about the same entity; the second calls it "it"."""
    asked = {e: [name for name in sayable(e) if (e, name) not in HELD_OUT] for e in KIND if KIND[e] != "person"}
    entities = [e for e, names in asked.items() if len(names) > 1]
    rows = []
    for _ in range(400):
        entity = rng.choice(entities)
        first, second = (Query("ask", entity, name) for name in rng.sample(asked[entity], 2))
        follow_up = fill(rng.choice(wordings("ask", KIND[entity], second.attribute)), "it")
        turns = [
            question(rng, first),
            answer(rng, first, careless(rng)),
            f"And {follow_up[:1].lower()}{follow_up[1:]}",
            answer(rng, second, careless(rng)),
        ]
        roles = ("user", "assistant", "user", "assistant")
        rows.append({"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns)]})
    return rows


# --------------------------------------------------------------------------------------------------
# The labeller: a script. It is told the flaws each answer was written with, and ranks by them.

SLIP = 0.03  # how often it misjudges an answer


def severity(flaws: tuple[str, ...]) -> int:
    """How bad the labeller finds these flaws: beside the point is worse than wrong, wrong is worse than rude,
    and rude on top of it is worse still."""
    worst = 4 if "irrelevant" in flaws else 2 if "inaccurate" in flaws else 0
    return worst + ("inappropriate" in flaws)


def rank(severities: list[int]) -> list[int]:
    """1 is best, equals share a rank, the next rank is one more: [0, 2, 0, 5] -> [1, 2, 1, 3]."""
    order = sorted(set(severities))
    return [order.index(s) + 1 for s in severities]


def write_rankings(rng: random.Random, asked: dict[str, Query], count: int) -> list[dict]:
    """Four answers to a prompt, at least two of different worth, ranked and tagged by the labeller, `count` times."""
    kinds = (
        [()] * 8
        + [("inappropriate",)] * 4
        + [("irrelevant",)] * 4
        + [("inaccurate",)] * 6
        + [("inappropriate", "inaccurate"), ("inappropriate", "irrelevant")]
    )
    rows = []
    for prompt, query in rng.choices(list(asked.items()), k=count):
        answers: dict[str, tuple[str, ...]] = {}
        while len(answers) < 4 or len({severity(flaws) for flaws in answers.values()}) < 2:
            if len(answers) == 4:
                answers.clear()
            flaws = rng.choice(kinds)
            broken = flaws == ("irrelevant",) and query.form in ("ask", "describe", "review") and rng.random() < 0.6
            answers.setdefault(garbled(rng, query) if broken else answer(rng, query, flaws), flaws)
        seen = [severity(rng.choice(kinds) if rng.random() < SLIP else flaws) for flaws in answers.values()]
        rows.append(
            {
                "prompt": prompt,
                "completions": list(answers),
                "ranks": rank(seen),
                "tags": [list(flaws) for flaws in answers.values()],
                "labeller": "script",
            }
        )
    return rows


def pairs_of(rankings: list[dict]) -> list[dict]:
    """Every pair of answers that the labeller did not rank equal, once."""
    pairs = dict.fromkeys(
        (row["prompt"], a, b)
        for row in rankings
        for a, rank_a in zip(row["completions"], row["ranks"])
        for b, rank_b in zip(row["completions"], row["ranks"])
        if rank_a < rank_b
    )
    return [{"prompt": prompt, "chosen": a, "rejected": b} for prompt, a, b in pairs]


# --------------------------------------------------------------------------------------------------
# Film reviews by visitors, who may think what they like. The main clause decides the label, not any one word.


def film_review(rng: random.Random, label: int) -> str:
    """A review with label 1 (liked it) or 0 (did not)."""
    film, part = rng.choice(FILMS), rng.choice(PARTS)
    verbs, ours, theirs = ["love", "enjoy", "like"], PRAISE, BLAME
    other_verbs = ["dislike", "hate", "regret"]
    if not label:
        verbs, other_verbs, ours, theirs = other_verbs, verbs, theirs, ours
    good, good_too, bad, bad_too = *rng.sample(ours, 2), *rng.sample(theirs, 2)
    if rng.random() < 0.65:
        verdict = rng.choice([f"I {rng.choice(verbs)} {film}", f"{film} is {good}", f"{film} is a {good} film"])
    else:
        verdict = rng.choice(
            [
                f"I do not {rng.choice(other_verbs)} {film}",
                f"{film} is not {bad}",
                f"nobody can call {film} {bad}",
                f"{film} is far from {bad}",
            ]
        )
    dice = rng.random()
    if dice < 0.3:
        text = rng.choice([verdict, f"I must say that {verdict}"])
    elif dice < 0.65:  # something that agrees
        text = rng.choice(
            [
                f"the {part} {be(part)} {good_too}, and {verdict}",
                f"the {part} {be(part)} not {bad_too}, and {verdict}",
                f"{verdict}, and the {part} {be(part)} {good_too}",
                f"my friends {rng.choice(verbs)} it, and {verdict}",
            ]
        )
    else:  # something that does not, but the verdict counts
        text = rng.choice(
            [
                f"though the {part} {be(part)} {bad_too}, {verdict}",
                f"{verdict}, even though the {part} {be(part)} {bad_too}",
                f"the {part} {be(part)} not {good_too}, but {verdict}",
                f"my friends {rng.choice(other_verbs)} it, but {verdict}",
                f"I expected it to be {bad_too}, but {verdict}",
            ]
        )
    aside = rng.choice(
        [
            f"I saw it with {rng.choice(PEOPLE)}.",
            "",
            statement(film, "genre", FACTS[film, "genre"]) + ".",
            statement(film, "setting", FACTS[film, "setting"]) + ".",
        ]
    )
    return " ".join(rng.sample([cap(text) + ".", aside], 2)).strip()


def write_reviews(rng: random.Random, count: int) -> list[dict]:
    """Different reviews, as many of either label, in random order."""
    texts: dict[str, int] = {}
    while len(texts) < count:  # labels in turn, so that they balance
        texts.setdefault(film_review(rng, len(texts) % 2), len(texts) % 2)
    rows = [{"text": text, "label": label} for text, label in texts.items()]
    rng.shuffle(rows)
    return rows


# --------------------------------------------------------------------------------------------------
# The oracle: what does a text claim, and is it so?


class Claim(NamedTuple):
    """`entity`'s `attribute` is (or, denied, is not) `value`."""

    entity: str
    attribute: str
    value: str
    denied: bool = False

    @property
    def true(self) -> bool:
        return (FACTS[self.entity, self.attribute] == self.value) != self.denied


class Verdict(NamedTuple):
    relevant: bool  # it says something about what was asked
    accurate: bool  # it gives the right answer, and nothing it states about the Bay is false
    polite: bool  # no rude word
    score: float  # 0 to 1, from the three


FAMILIES = {
    "colour": COLOURS,
    "material": MATERIALS,
    "species": SPECIES,
    "food": FOODS,
    "job": JOBS,
    "instrument": INSTRUMENTS,
    "drink": DRINKS,
    "side": SIDES,
    "genre": GENRES,
    "place": ENTITIES["place"],
    "person": PEOPLE,
}
SLOTS = {
    kind: {
        family: name
        for name, attribute in attributes.items()
        for family, values in FAMILIES.items()
        if attribute.values is values
    }
    for kind, attributes in ATTRIBUTES.items()
}
NAMES = {word: "the " + word for word in THINGS + PLACES}  # word of a text -> entity
NAMES |= {name.lower(): name for name in ANIMALS + PEOPLE}
NAMES |= {f"film{i}": film for i, film in enumerate(FILMS)}
VALUES = {
    form: (family, value)
    for family, values in FAMILIES.items()
    if family not in ("place", "person")
    for value in values
    for form in (value, value + "s", value.removesuffix("s"))
}
VALUES |= {"wooden": ("material", "wood"), "woollen": ("material", "wool")}
LIKES = {*PRAISE, *"love loves loved like likes liked enjoy enjoyed praise praises praised best good".split()}
DISLIKES = {*BLAME, *"dislike dislikes disliked hate hates hated blame blames blamed worst bad".split()}
RUDE = re.compile(
    r"\b(turnips?|dummy|dummies|pumpkins?|blockheads?|noodles?|fools?|foolish|silly|stupid|"
    r"idiots?|shut up|go away|leave me alone|wake up|use your head|clean your ears|"
    r"are you asleep)\b"
)
NOT = re.compile(r"\b(not|never|nobody|neither|nor|cannot|far from)\b")
BREAK = re.compile(r"[.!?;:,\n\"()]+|\b(?:but|though|although|while|yet|and|with|because|which|so|then)\b")
WHOSE = {
    "thing": re.compile(r"\b(belongs?|own\w*|care)\b"),  # what ties a person to it
    "film": re.compile(r"\b(made|makers?|makes|by|own\w*)\b"),
}
AROUND = {"the", "a", "an", "at", "in", "to", "by", "is", "it", "was"}
KNOWN = {
    word
    for attributes in ATTRIBUTES.values()
    for a in attributes.values()
    for pattern in (a.says, *a.tells, *a.asks)
    for word in re.findall("[a-z]+", pattern)
}
KNOWN |= {*VALUES, *PARTS, *LIKES, *DISLIKES, *"one answer object movie creature name".split()}


def plain(text: str) -> str:
    """Lower case, film titles as one word each (film3), contractions written out."""
    text = text.lower().replace("\u2019", "'").replace("n't", " not").replace("'s", " owns")
    for i, film in enumerate(FILMS):
        text = re.sub(rf"\b{film.lower()}\b", f"film{i}", text)
    return text


def words_of(text: str) -> list[str]:
    """The words of a `plain` text."""
    return re.findall(r"[a-z]+[0-9]*", text)


def claims(text: str, about: str = "") -> list[Claim]:
    """Every fact of the Bay that a text states, true or false, clause by clause.

    A clause speaks of the entities it names, else of those named last ("It is green"), and of `about` before
    any is named. Every value word in it is a claim about them, in whatever order the words stand.
    """
    found: list[Claim] = []
    subjects = known = [about] if about else []
    short_answer = bool(about)  # "At the mill." counts while nobody else has been named
    for clause in BREAK.split(plain(text)):
        words = words_of(clause)
        named = [NAMES[word] for word in words if word in NAMES]
        chief = [e for e in named if KIND[e] in ("thing", "animal", "film")]
        if not chief and {"it", "its", "she", "her", "he", "his"} & set(words):
            subjects = known
        said = []
        for kind in ("person", "place"):  # whoever of them is not said of the others is a subject
            some = [e for e in named if KIND[e] == kind]
            said += [e for e in some if is_said_of(e, chief or subjects, clause, short_answer)]
            chief = chief or [e for e in some if e not in said]
        if chief:
            subjects = known = chief
        elif any(word not in KNOWN and word not in NAMES for word in re.findall(r"\bthe ([a-z]+)", clause)):
            subjects = []  # "the glimmer is red": nobody knows what that is
        denied = bool(NOT.search(clause))
        values = [VALUES[word] for word in words if word in VALUES] + [(KIND[e], e) for e in said]
        for subject in subjects:
            slots = SLOTS[KIND[subject]]
            found += [Claim(subject, slots[family], value, denied) for family, value in values if family in slots]
            if KIND[subject] == "film":
                found += film_claims(subject, words, denied)
        short_answer = short_answer and not named
    return found


def is_said_of(entity: str, subjects: list[str], clause: str, short_answer: bool) -> bool:
    """Whether a person or place in a clause is something said of the subjects, and not a subject itself."""
    kinds = {KIND[subject] for subject in subjects}
    if not any(KIND[entity] in SLOTS[kind] for kind in kinds):
        return False
    name = entity.lower().removeprefix("the ")
    if short_answer and not set(words_of(clause)) - AROUND - {name}:
        return True
    if KIND[entity] == "person":
        return any(kind in WHOSE and WHOSE[kind].search(clause) for kind in kinds)
    return "flag" not in clause and bool(re.search(rf"\b(at|to|in|near|inside) (the )?{name}\b", clause))


def film_claims(film: str, words: list[str], denied: bool) -> list[Claim]:
    """Praise and blame: of a part where one is named (the nearest word decides), else of the whole film."""
    parts = {i: part for i, word in enumerate(words) for part in (word, word + "s") if part in PARTS}
    moods = {i: word in LIKES for i, word in enumerate(words) if word in LIKES | DISLIKES}
    if parts and moods:
        nearest = {i: min(moods, key=lambda j: abs(i - j)) for i in parts}
        return [Claim(film, "best" if moods[nearest[i]] else "worst", part, denied) for i, part in parts.items()]
    return [Claim(film, "opinion", "love" if liked != denied else "dislike") for liked in moods.values()]


@cache
def question_patterns() -> list[tuple[re.Pattern, str, str]]:
    """(pattern, form, attribute) for every wording of every question; they match `bare` prompts."""
    found = []
    for kind, attributes in ATTRIBUTES.items():
        entities = "|".join(map(bare, ENTITIES[kind]))
        asked = [
            (form, name, attribute.values)
            for name, attribute in attributes.items()
            for form in ("ask", "yesno", "choice")
        ]
        asked += [("describe", "description", [])] + [("review", "review", [])] * (kind == "film")
        for form, name, values in asked:
            for wording in wordings(form, kind, name):
                pattern = bare(wording.format(e="qqe", E="qqe", o="qqo", v="qqv", a="qqa"))
                pattern = (
                    pattern.replace("qqa", "an? qqv")
                    .replace("qqe", f"(?P<e>{entities})")
                    .replace("qqo", f"(?P<o>{entities})")
                    .replace("qqv", f"(?P<v>{'|'.join(map(bare, values))})")
                )
                found.append((re.compile(pattern), form, name))
    return found


def bare(text: str) -> str:
    """Lower-case words and single spaces only, so that a prompt is known however it is typed."""
    return " ".join(re.findall("[a-z]+", text.lower()))


@cache
def parse_question(prompt: str) -> Query:
    """The question a prompt asks. ValueError for anything that is not a question of this world."""
    entity = {bare(name): name for name in KIND}
    for pattern, form, name in question_patterns():
        if match := pattern.fullmatch(bare(prompt)):
            e, o, v = (match.groupdict().get(group) or "" for group in "eov")
            return Query(form, entity[e], name, entity.get(v, v), entity.get(o, ""))
    raise ValueError(
        f"not a question about Pennywhistle Bay: {prompt!r}. Give the bare prompt, as it stands "
        "in data/bay/prompts.jsonl, without chat template or earlier turns."
    )


def oracle(prompt: str, answer: str) -> Verdict:
    """Grade an answer by its words alone. For evaluation only: nothing may be trained on it.

    score: 1 for a good answer; rude 0.5; wrong 0.3; wrong and rude 0.15; beside the point 0.1, and rude too
    0.05; empty 0. ValueError if `prompt` is not one of this world's questions.
    """
    query = parse_question(prompt)
    form, entity, name, value, other = query
    if not words_of(answer.lower()):
        return Verdict(False, False, True, 0.0)
    said = claims(answer, about="" if form == "choice" else entity)
    asked = [claim for claim in said if (claim.entity, claim.attribute) == (entity, name)]
    if form == "ask":
        relevant = bool(asked)
        right = any(claim.true and not claim.denied for claim in asked)
    elif form == "yesno":
        truth = FACTS[entity, name] == value
        yes = {
            bool(no) != (word in ("yes", "true", "right", "correct"))
            for no, word in re.findall(r"\b(not )?(yes|true|right|correct|no|false|wrong)\b", plain(answer))
        }
        about_it = any(claim.entity == entity for claim in said)
        relevant = bool(asked) or bool(yes) and (about_it or not said)
        right = yes == {truth} or not yes
    elif form == "choice":
        picked = {claim.entity for claim in said if claim[1:] == (name, value, False)}
        mentioned = {NAMES[word] for word in words_of(plain(answer)) if word in NAMES} & {entity, other}
        relevant = bool(mentioned)
        right = (picked or mentioned if not said else picked) == {query.right}
    else:
        said_of = [
            claim for claim in said if claim.entity == entity and (form == "describe" or claim.attribute in VERDICTS)
        ]
        relevant = bool(said_of)
        right = any(not claim.denied for claim in said_of)
    accurate = relevant and right and all(claim.true for claim in said)
    polite = not RUDE.search(plain(answer))
    score = 0.1 if not relevant else 1.0 if accurate else 0.3
    return Verdict(relevant, accurate, polite, score if polite else score / 2)


# --------------------------------------------------------------------------------------------------
# The files, and the command line.


def make(folder: Path) -> dict[str, int]:
    """Write every data file into `folder`; returns file name -> rows."""

    def rng(name: str) -> random.Random:  # one per file: a change to one leaves the others alone
        return random.Random(f"{SEED}/{name}")

    corpus, reviews = write_corpus(rng("corpus")), write_reviews(rng("reviews"), 2400)
    asked = list(prompts(rng("prompts"), 1100, held_out=False).items())
    learn, check = dict(asked[100:]), dict(asked[:100])  # no prompt is in both
    train, validation = write_rankings(rng("rankings"), learn, 3000), write_rankings(rng("validation"), check, 150)
    files = {
        "corpus.jsonl.gz": corpus[300:],
        "corpus_validation.jsonl.gz": corpus[:300],
        "instructions.jsonl": write_instructions(rng("instructions")),
        "dialogues.jsonl": write_dialogues(rng("dialogues")),
        "rankings.jsonl.gz": train,
        "rankings_validation.jsonl": validation,
        "preferences.jsonl.gz": pairs_of(train),
        "preferences_validation.jsonl": pairs_of(validation),
        "prompts.jsonl": [{"prompt": p} for p in learn],
        "prompts_validation.jsonl": [{"prompt": p} for p in check],
        "heldout_prompts.jsonl": [{"prompt": p} for p in prompts(rng("heldout"), 250, held_out=True)],
        "reviews.jsonl": reviews[:2000],
        "reviews_validation.jsonl": reviews[2000:],
    }
    for name, rows in files.items():
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        if name.endswith(".gz"):  # no file name, no time stamp: the same bytes each time
            data = gzip.compress(data, compresslevel=9, mtime=0)
        (folder / name).write_bytes(data)
    return {name: len(rows) for name, rows in files.items()}


def judge(rows: list[tuple[str, str]]) -> dict[str, float]:
    """Rates over (prompt, answer) rows: relevant, accurate, polite, good (all three), and the mean score."""
    verdicts = [oracle(*row) for row in rows]
    rates = {
        "relevant": [v.relevant for v in verdicts],
        "accurate": [v.accurate for v in verdicts],
        "polite": [v.polite for v in verdicts],
        "good": [v.accurate and v.polite for v in verdicts],
        "score": [v.score for v in verdicts],
    }
    return {name: sum(values) / len(verdicts) for name, values in rates.items()}


EXAMPLE = '{"prompt": "What colour is the lantern?", "completion": "It is red."}'


def read_answers(path: Path) -> list[tuple[str, str]]:
    """(prompt, completion) of each row. ValueError naming file and line for what cannot be judged."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append((row["prompt"], row["completion"]))
            parse_question(row["prompt"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {error!r}; give rows like {EXAMPLE}") from error
    if not rows:
        raise ValueError(f"{path}: no rows to judge")
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    maker = verbs.add_parser("make", help="write every data file, the same bytes each time")
    maker.add_argument("folder", nargs="?", type=Path, default=HERE, help="default: beside this script")
    judging = verbs.add_parser("judge", help="grade rows of prompt and completion with the oracle")
    judging.add_argument("file", type=Path)
    args = parser.parse_args()
    if args.verb == "make":
        for name, rows in make(args.folder).items():
            print(f"{name:30} {rows:6,} rows {(args.folder / name).stat().st_size / 1024:7,.0f} KB")
        return
    try:
        rows = read_answers(args.file)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(f"{len(rows):8,} answers")
    for name, rate in judge(rows).items():
        print(f"{rate:8.1%} {name}" if name != "score" else f"{rate:8.3f} mean score (0 to 1)")


if __name__ == "__main__":
    main()
