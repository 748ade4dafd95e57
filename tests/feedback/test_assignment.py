"""Who gets which prompt: everybody everything, or a share for everybody and the rest once; nobody waits, nothing is
left.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import __main__
from pipelines.feedback import results
from pipelines.feedback.assignment import left_over, next_key, shared_keys, start

KEYS = [f"{n:020x}" for n in range(100)]


class Team:
    """Labellers who are given prompts by `next_key` and rank each as soon as they have it."""

    def __init__(self, keys, overlap):
        self.keys, self.shared = keys, shared_keys(keys, overlap)
        self.done: dict[str, list[str]] = {}

    def step(self, name):
        """One prompt for `name`; None when there is nothing left."""
        mine = self.done.setdefault(name, [])
        taken = {key for who, had in self.done.items() if who != name for key in had}
        key = next_key(self.keys, self.shared, mine, taken=taken, arrival=list(self.done).index(name))
        assert (key is None) == (left_over(self.keys, self.shared, mine, taken) == 0)
        if key is not None:
            assert key not in mine
            mine.append(key)
        return key


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(1, 4), st.randoms(use_true_random=False))
def test_every_prompt_is_ranked_by_one_and_the_shared_ones_by_all(count, overlap, people, chance):
    team, names = Team(KEYS[:count], overlap), [f"labeller {n}" for n in range(people)]
    working = list(names)
    while working:
        name = chance.choice(working)
        if team.step(name) is None:
            working.remove(name)
    times = {key: sum(key in had for had in team.done.values()) for key in team.keys}
    assert times == {key: people if key in team.shared else 1 for key in team.keys}


def test_labellers_begin_at_different_places():
    assert [start(n, 100) for n in range(6)] == [0, 50, 25, 75, 12, 62]
    team = Team(KEYS, 1.0)
    firsts = [team.step(f"labeller {n}") for n in range(8)]
    assert len(set(firsts)) == 8 and firsts[0] == KEYS[0]
    assert [team.step("labeller 1") for _ in range(3)] == KEYS[51:54]


def test_after_any_number_of_prompts_people_share_the_same_ones():
    team = Team(KEYS, 0.1)
    for _ in range(30):
        team.step("Ann")
        team.step("Ben")
    common = set(team.done["Ann"]) & set(team.done["Ben"])
    assert common == set(team.shared[:3])  # a tenth of 30
    assert len(shared_keys(KEYS, 0.001)) == 1 and shared_keys(KEYS, 0) == []


def test_what_is_shown_elsewhere_comes_last():
    keys = KEYS[:3]
    assert next_key(keys, keys, [], elsewhere={keys[0]}) == keys[1]
    assert next_key(keys, keys, keys[:2], elsewhere={keys[2]}) == keys[2]  # twice is better than not at all
    assert next_key(keys, keys, [], others={keys[0]}) == keys[0]  # for everybody
    assert next_key(keys, [], [], others={keys[0]}) == keys[1]
    assert next_key(keys, [], keys[:2], others={keys[2]}) == keys[2]
    assert next_key(keys, [], keys[:2], taken={keys[2]}) is None


def test_the_overlap_is_a_share(capsys):
    for wrong in ("1.1", "-0.1", "nan"):
        assert __main__.main(["rank", "x.jsonl", "--overlap", wrong]) == 2
        assert "from 0 to 1" in capsys.readouterr().err


# --- the quality of the labelling -----------------------------------------------------------------------------------


def judgement(item, ranks, labeller="Ann", seconds=20.0, tags=None, prompt="which?"):
    answers = [f"answer {n} " + "x" * 50 for n in range(3)]
    return {
        "item": item,
        "labeller": labeller,
        "ranks": ranks,
        "tags": tags or [[], [], []],
        "seconds": seconds,
        "ideal": "",
        "prompt": prompt,
        "completions": answers,
    }


def test_the_quality_of_each_labeller():
    found = results.summary(
        [judgement(f"{n:020x}", [1, 2, 3]) for n in range(6)]
        + [judgement(f"{n:020x}", [1, 2, 3] if n else [3, 2, 1], "Ben", seconds=0.5) for n in range(3)]
        + [judgement("9" * 20, None, "Ben"), judgement("8" * 20, [1, 1, 2], "Cleo", seconds=None)],
        [],
    )
    ann, ben, cleo = found["labellers"]
    assert (ann["rankings"], ann["compared"], ann["tau"]) == (6, 3, pytest.approx(1 / 3)) and ann["tau"] == ben["tau"]
    assert ann["tau_interval"][0] <= ann["tau"] <= ann["tau_interval"][1]
    assert (ben["skipped"], ben["hasty"], ann["hasty"]) == (1, 3, 0)  # 3 x 59 characters in half a second
    assert (cleo["ties"], cleo["seconds"], cleo["tau"], cleo["compared"]) == (1 / 3, None, None, 0)
    assert found["several"] == 3 and ann["as_shown_by_chance"] == pytest.approx(1 / 6)


def test_who_leaves_the_answers_as_they_were_shown_is_seen():
    lazy = []
    for n in range(40):
        row = judgement(f"{n:020x}", None)
        row["ranks"] = [results.shuffled(row, row["item"], "Ann").index(i) + 1 for i in range(3)]
        lazy.append(row)
    careful = [judgement(f"{n:020x}", np.random.default_rng(n).permutation(3) + 1, "Ben") for n in range(200)]
    for row in careful:
        row["ranks"] = row["ranks"].tolist()
    ann, ben = results.summary(lazy + careful, [])["labellers"]
    assert ann["as_shown"] == 1 and abs(ben["as_shown"] - 1 / 6) < 0.08


def test_prompts_worth_a_second_look_come_with_reasons():
    key = [f"{n:020x}" for n in range(7)]
    found = results.summary(
        [
            judgement(key[0], [1, 2, 3]),
            judgement(key[0], [3, 2, 1], "Ben"),
            judgement(key[1], [1, 2, 3], tags=[["inaccurate"], [], []]),
            judgement(key[2], [1, 1, 1]),
            judgement(key[3], [1, 2, 3], seconds=0.2),
            judgement(key[4], None),
            judgement(key[4], [1, 2, 3], "Ben"),
            judgement(key[5], None, prompt=[{"role": "user", "content": "long " * 100}]),
            judgement(key[6], [1, 2, 3], tags=[[], [], ["inaccurate"]]),
        ],
        [],
    )["second_look"]
    reasons = {look["item"]: look["reasons"] for look in found}
    assert reasons == {
        key[0]: ["Ann and Ben put the answers in different orders (τ −1.00)"],
        key[1]: ["Ann put an answer tagged inaccurate above all without a tag"],
        key[2]: ["Ann left all answers tied"],
        key[3]: ["Ann took 0.2 s for 183 characters"],
        key[4]: ["skipped by Ann, others ranked it"],
        key[5]: ["skipped by Ann"],
    }
    assert found[0]["item"] == key[0] and found[-1]["item"] == key[5]
    assert len(found[-1]["prompt"]) == 160 and found[-1]["prompt"].endswith("…")
