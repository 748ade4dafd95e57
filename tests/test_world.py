"""The demo world: the committed files are what the script makes, nothing leaks, the oracle can be trusted."""

import collections
import gzip
import importlib.util
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).parents[1] / "data" / "bay"
spec = importlib.util.spec_from_file_location("world", DATA / "world.py")
world = importlib.util.module_from_spec(spec)
sys.modules["world"] = world
spec.loader.exec_module(world)

FLAWS = [
    (),
    ("inappropriate",),
    ("irrelevant",),
    ("inaccurate",),
    ("inappropriate", "inaccurate"),
    ("inappropriate", "irrelevant"),
]


def read(name: str, folder: Path = DATA) -> bytes:
    """A file's bytes, unpacked: compressed bytes may differ between versions of zlib."""
    data = (folder / name).read_bytes()
    return gzip.decompress(data) if name.endswith(".gz") else data


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in read(name).decode().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, world.make(folder)


# Files


def test_committed_files_are_what_the_script_makes(made):
    folder, counts = made
    for name in counts:
        assert read(name) == read(name, folder), f"{name}: run `python data/bay/world.py make`"
        assert len(rows(name)) == counts[name]


def test_make_writes_the_same_bytes_in_another_process(made, tmp_path):
    folder, counts = made
    subprocess.run(
        [sys.executable, DATA / "world.py", "make", tmp_path],
        check=True,
        capture_output=True,
        env={"PYTHONHASHSEED": "7"},
    )
    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in counts)


def test_files_are_small_and_have_the_promised_columns():
    assert sum(path.stat().st_size for path in DATA.iterdir() if path.is_file()) < 3_000_000
    columns = {
        "corpus.jsonl.gz": {"text"},
        "corpus_validation.jsonl.gz": {"text"},
        "instructions.jsonl": {"prompt", "completion"},
        "dialogues.jsonl": {"messages"},
        "rankings.jsonl.gz": {"prompt", "completions", "ranks", "tags", "labeller"},
        "preferences.jsonl.gz": {"prompt", "chosen", "rejected"},
        "prompts.jsonl": {"prompt"},
        "heldout_prompts.jsonl": {"prompt"},
        "reviews.jsonl": {"text", "label"},
    }
    for name, wanted in columns.items():
        assert all(set(row) == wanted for row in rows(name)), name


def test_readme_states_the_rows_of_every_file_and_shows_real_ones(made):
    readme = (DATA / "README.md").read_text()
    for name, count in made[1].items():
        assert f"| `{name}` | {count:,} |" in readme, name
    samples = re.findall(r"`([\w.]+)`\n```json\n(.*)\n```", readme)
    assert len(samples) == 8
    for name, sample in samples:
        assert json.loads(sample) in rows(name), f"{name}: the sample is no row of it"


def test_the_oracle_needs_nothing_but_the_standard_library():
    code = f"import sys; sys.path.insert(0, {str(DATA)!r}); import world; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# Facts


def test_every_fact_has_one_value_and_films_are_not_praised_and_blamed_for_the_same():
    for (entity, name), value in world.FACTS.items():
        assert value in world.ATTRIBUTES[world.KIND[entity]][name].values
    assert all(world.FACTS[film, "best"] != world.FACTS[film, "worst"] for film in world.FILMS)


def test_no_word_means_two_things():
    families = [values for name, values in world.FAMILIES.items() if name not in ("place", "person")]
    families += [world.THINGS, world.PLACES, world.PARTS, [n.lower() for n in world.ANIMALS + world.PEOPLE]]
    words = [word for family in families for word in family]
    assert [word for word, n in collections.Counter(words).items() if n > 1] == []
    titles = {word.lower() for film in world.FILMS for word in film.split()}
    assert titles & {*words, *world.PRAISE, *world.BLAME} == set()


def test_the_corpus_states_every_fact_often_and_never_a_false_one():
    stated = collections.Counter()
    for row in rows("corpus.jsonl.gz"):
        pages = row["text"].replace("\nA: ", "\n").removeprefix("Q: ").split("\nQ: ")  # of a quiz
        for page in pages:
            *question, answer = page.splitlines()
            question = question[0] if question else ""
            query = world.parse_question(question) if question else None
            about = query.entity if query and query.form != "choice" else ""
            for claim in world.claims(answer, about):
                assert claim.true, (claim, row["text"])
                stated[claim.entity, claim.attribute] += not claim.denied
    assert min(stated[fact] for fact in world.FACTS) >= 20
    assert 2 <= min(row["text"].count(".") + row["text"].count("?") for row in rows("corpus.jsonl.gz"))


def test_documents_are_two_to_nine_sentences_and_about_a_megabyte():
    texts = [row["text"] for row in rows("corpus.jsonl.gz")]
    assert 600_000 < sum(map(len, texts)) < 1_200_000
    assert max(len(text.split(". ")) for text in texts) <= 9
    assert len({word for text in texts for word in world.words_of(text.lower())}) < 700
    assert set(texts).isdisjoint(row["text"] for row in rows("corpus_validation.jsonl.gz"))


# Held-out prompts


def trained_texts() -> list[str]:
    """Every prompt, answer and turn that a stage after pretraining is trained on."""
    found = [turn["content"] for row in rows("dialogues.jsonl") for turn in row["messages"]]
    for name in (
        "instructions.jsonl",
        "rankings.jsonl.gz",
        "rankings_validation.jsonl",
        "preferences.jsonl.gz",
        "preferences_validation.jsonl",
        "prompts.jsonl",
    ):
        for row in rows(name):
            found += [row[key] for key in ("prompt", "completion", "chosen", "rejected") if key in row]
            found += row.get("completions", [])
    return found


def test_held_out_prompts_ask_only_what_no_stage_has_seen():
    held_out = [row["prompt"] for row in rows("heldout_prompts.jsonl")]
    assert len(held_out) == len(set(held_out)) >= 200
    for prompt in held_out:
        assert set(world.parse_question(prompt).pairs) <= world.HELD_OUT, prompt
    texts = {world.bare(text) for text in trained_texts()}
    assert texts.isdisjoint(map(world.bare, held_out))
    corpus = "\n".join(world.bare(row["text"]) for row in rows("corpus.jsonl.gz"))
    assert not any(world.bare(prompt) in corpus for prompt in held_out)


def test_no_stage_asks_about_a_held_out_fact():
    prompts = [
        (name, row["prompt"])
        for name in (
            "instructions.jsonl",
            "rankings.jsonl.gz",
            "rankings_validation.jsonl",
            "prompts.jsonl",
            "prompts_validation.jsonl",
        )
        for row in rows(name)
    ]
    prompts += [
        ("corpus", line[3:])
        for row in rows("corpus.jsonl.gz")
        for line in row["text"].splitlines()
        if line[:3] == "Q: "
    ]
    for row in rows("dialogues.jsonl"):
        first, _, second, _ = (turn["content"] for turn in row["messages"])
        entity = world.parse_question(first).entity
        said = re.sub(r"\bit\b", entity.replace("The ", "the "), second.removeprefix("And "))
        prompts += [("dialogues.jsonl", first), ("dialogues.jsonl", said)]
    for name, prompt in prompts:
        assert world.HELD_OUT.isdisjoint(world.parse_question(prompt).pairs), (name, prompt)
    assert len(prompts) > 15_000


def test_about_a_fifth_of_the_facts_is_held_out_of_every_attribute():
    for kind, attributes in world.ATTRIBUTES.items():
        for name in attributes:
            held = sum((entity, name) in world.HELD_OUT for entity in world.ENTITIES[kind])
            assert 0.1 < held / len(world.ENTITIES[kind]) < 0.3, (kind, name)


# The oracle


def test_every_prompt_is_understood():
    rng = random.Random(0)
    for _ in range(3000):
        query = world.draw_any(rng, held_out=rng.random() < 0.3)
        assert world.parse_question(world.question(rng, query)) == query


@pytest.mark.parametrize("flaws", FLAWS, ids=lambda flaws: "+".join(flaws) or "good")
def test_oracle_sees_exactly_the_flaws_an_answer_was_written_with(flaws):
    rng = random.Random(1)
    for _ in range(1000):
        query = world.draw_any(rng, held_out=rng.random() < 0.3)
        prompt, answer = world.question(rng, query), world.answer(rng, query, flaws)
        relevant, accurate, polite, score = world.oracle(prompt, answer)
        wanted = ("irrelevant" not in flaws, flaws in ((), ("inappropriate",)), "inappropriate" not in flaws)
        assert (relevant, accurate, polite) == wanted, (prompt, answer)
        assert (score == 1.0) == (flaws == ())


def ask(name: str, *answers: str) -> list[tuple[bool, bool, bool]]:
    """The oracle on answers to a question about the lantern: (relevant, accurate, polite) each."""
    prompt = world.fill(world.ATTRIBUTES["thing"][name].asks[0], "the lantern")
    return [tuple(world.oracle(prompt, answer)[:3]) for answer in answers]


GOOD, WRONG, BESIDE, RUDE = (True, True, True), (True, False, True), (False, False, True), (True, True, False)
COLOUR, OWNER, PLACE = (world.FACTS["the lantern", name] for name in ("colour", "owner", "place"))
OTHER = world.another(random.Random(0), world.COLOURS, COLOUR)


def test_oracle_is_tolerant_of_wording_case_and_punctuation():
    answers = [
        f"the lantern is {COLOUR}",
        f"IT IS {COLOUR.upper()}!!",
        f"{COLOUR}",
        f"  it's {COLOUR} ",
        f"Well, I think that the colour of the lantern would be {COLOUR}.",
        f"The lantern isn't {OTHER}, it is {COLOUR}.",
        f"The lantern is {COLOUR}. My feet are cold today.",
    ]
    assert ask("colour", *answers) == [GOOD] * len(answers)
    assert ask("owner", OWNER, f"It's {OWNER}'s.", f"{OWNER} owns it.") == [GOOD] * 3
    assert ask("place", PLACE, f"At {PLACE}.", f"It is at {PLACE}") == [GOOD] * 3


def test_oracle_finds_what_is_wrong():
    rambling = f"The lantern is {COLOUR}. The lantern is {OTHER}. The lantern is the lantern is {OTHER}"
    assert ask("colour", OTHER, rambling, f"It is {COLOUR} and {OTHER}.", f"It is not {COLOUR}.") == [WRONG] * 4
    material = world.another(random.Random(0), world.MATERIALS, world.FACTS["the lantern", "material"])
    assert ask("colour", f"The lantern is {COLOUR} and it is made of {material}.") == [WRONG]
    beside = [
        "",
        " ... ",
        "The lantern is",
        "The kettle is",
        "I do not know.",
        "the the the lantern lantern",
        f"The kettle is {world.FACTS['the kettle', 'colour']}.",
        f"The glimmer is {COLOUR}.",
        "My feet are cold today.",
    ]
    assert ask("colour", *beside) == [BESIDE] * len(beside)
    assert ask("colour", f"It is {COLOUR}, you turnip.", f"Stupid! {COLOUR}") == [RUDE] * 2
    assert world.oracle("What colour is the lantern?", "").score == 0


def test_oracle_on_yes_no_questions():
    true, false = (f"Is it true that the lantern is {colour}?" for colour in (COLOUR, OTHER))
    for prompt, good, bad in [
        (true, "yes", "no"),
        (true, f"It is {COLOUR}", f"No, it is {OTHER}"),
        (false, "No.", "Yes!"),
        (false, f"No, the lantern is {COLOUR}.", "That is true."),
        (false, "That is not true.", f"Yes, the lantern is {COLOUR}."),
        (true, "That is right.", f"Yes. No. The lantern is {COLOUR}."),
    ]:
        assert tuple(world.oracle(prompt, good)[:3]) == GOOD, good
        assert tuple(world.oracle(prompt, bad)[:3]) == WRONG, bad
    assert tuple(world.oracle(true, f"Yes, the kettle is {world.FACTS['the kettle', 'colour']}.")[:3]) == BESIDE


def test_oracle_refuses_a_prompt_it_cannot_understand():
    with pytest.raises(ValueError, match="bare prompt"):
        world.oracle("What is the capital of France?", "Paris.")


def test_score_orders_flaws_as_the_labeller_does():
    rng, scores = random.Random(2), {}
    query = world.Query("ask", "the lantern", "colour")
    for flaws in FLAWS:
        answer = world.answer(rng, query, flaws)
        scores[world.severity(flaws)] = world.oracle("What colour is the lantern?", answer).score
    assert list(map(scores.get, sorted(scores))) == sorted(scores.values(), reverse=True)
    assert len(set(scores.values())) == len(FLAWS)


# Instructions and rankings


def test_four_instruction_answers_in_ten_are_flawed():
    verdicts = [world.oracle(row["prompt"], row["completion"]) for row in rows("instructions.jsonl")]
    flawed = sum(v.score < 1 for v in verdicts) / len(verdicts)
    assert 0.37 < flawed < 0.46
    for wrong in ("relevant", "accurate", "polite"):
        assert sum(not getattr(v, wrong) for v in verdicts) / len(verdicts) > 0.06, wrong


def test_dialogues_alternate_and_the_second_question_says_it():
    for row in rows("dialogues.jsonl"):
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * 2
        assert row["messages"][2]["content"].startswith("And ") and " it" in row["messages"][2]["content"]


def test_rankings_agree_with_the_oracle_but_for_the_labellers_slips():
    wrong = pairs = 0
    for row in rows("rankings.jsonl.gz") + rows("rankings_validation.jsonl"):
        assert row["labeller"] == "script" and len(set(row["completions"])) == 4
        assert sorted(set(row["ranks"])) == list(range(1, max(row["ranks"]) + 1))
        scores = []
        for completion, tags in zip(row["completions"], row["tags"]):
            relevant, accurate, polite, score = world.oracle(row["prompt"], completion)
            assert ("irrelevant" in tags, "inappropriate" in tags) == (not relevant, not polite)
            assert ("inaccurate" in tags) == (relevant and not accurate)
            scores.append(score)
        for i in range(4):
            for j in range(i):
                pairs += 1
                better = (scores[i] > scores[j]) - (scores[i] < scores[j])
                wrong += better != (row["ranks"][i] < row["ranks"][j]) - (row["ranks"][i] > row["ranks"][j])
    assert 0.005 < wrong / pairs < 2 * world.SLIP


def test_preferences_are_the_rankings_flattened_and_split_by_prompt():
    for part in (".jsonl.gz", "_validation.jsonl"):
        flat = [tuple(row.values()) for row in rows(f"preferences{part}")]
        wanted = {
            (row["prompt"], a, b)
            for row in rows(f"rankings{part}")
            for a, i in zip(row["completions"], row["ranks"])
            for b, j in zip(row["completions"], row["ranks"])
            if i < j
        }
        assert len(flat) == len(set(flat)) and set(flat) == wanted
    prompts, validation = (
        {world.bare(row["prompt"]) for row in rows(f"preferences{part}")} for part in (".jsonl.gz", "_validation.jsonl")
    )
    assert prompts.isdisjoint(validation)


# Reviews


def test_review_labels_balance_and_are_split_without_overlap():
    train, validation = rows("reviews.jsonl"), rows("reviews_validation.jsonl")
    for part in (train, validation):
        assert abs(sum(row["label"] for row in part) / len(part) - 0.5) < 0.05
    assert {row["text"] for row in train}.isdisjoint(row["text"] for row in validation)


def test_no_single_word_gives_a_review_away():
    train = rows("reviews.jsonl")
    counts = collections.Counter(
        (word, row["label"]) for row in train for word in set(world.words_of(row["text"].lower()))
    )
    ones = sum(row["label"] for row in train)
    best = max(abs(counts[word, 1] / ones - counts[word, 0] / (len(train) - ones)) for word, _ in counts)
    assert 0.5 + best / 2 < 0.65  # accuracy of the best rule "has the word" / "has it not"


def test_negation_and_contrast_turn_the_label_round():
    films, seen = "|".join(world.FILMS).lower(), collections.Counter()
    for row in rows("reviews.jsonl") + rows("reviews_validation.jsonl"):
        for adjectives, liked in ((world.PRAISE, 1), (world.BLAME, 0)):
            adjective = f"({'|'.join(adjectives)})\\b"
            for kind, pattern, label in [
                ("plain", f"({films}) is (a )?{adjective}", liked),
                ("negated", f"({films}) is (not|far from) {adjective}", 1 - liked),
                ("contrast", f"(though|expected it to be|even though) [^,.]*{adjective}", 1 - liked),
            ]:
                if re.search(pattern, row["text"].lower()):
                    seen[kind] += 1
                    assert row["label"] == label, row
    assert len(seen) == 3 and min(seen.values()) > 100


# The command line


def test_judge_prints_rates_and_names_a_bad_row(tmp_path):
    path = tmp_path / "answers.jsonl"
    good = {"prompt": "What colour is the lantern?", "completion": f"It is {COLOUR}."}
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | {"completion": "Go away."}) + "\n")
    done = subprocess.run([sys.executable, DATA / "world.py", "judge", path], capture_output=True, text=True)
    assert done.returncode == 0 and "50.0% accurate" in done.stdout and "0.525 mean score" in done.stdout
    path.write_text(json.dumps(good) + "\n{}\n")
    done = subprocess.run([sys.executable, DATA / "world.py", "judge", path], capture_output=True, text=True)
    assert done.returncode == 1 and "line 2" in done.stderr and "Traceback" not in done.stderr
