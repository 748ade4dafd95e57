"""Each pathology is found in a history that has it, once per occurrence, and none in a healthy one."""

import gzip
import json
import random
from pathlib import Path

import pytest

from pipelines.ppo import diagnosis, phrases
from pipelines.ppo.diagnosis import WINDOW, Watch


def healthy(n=60):
    """Updates as of a run that goes well: KL and score rise slowly, the critic learns, all with noise."""
    noise = random.Random(0)
    return [
        {
            "objective/kl": 8 * i / n + noise.gauss(0, 0.2),
            "objective/kl_sem": 0.2,
            "objective/raw_scores": i / n + noise.gauss(0, 0.1),
            "objective/scores_std": 0.8,
            "policy/entropy_avg": 2.5 - i / n + noise.gauss(0, 0.05),
            "response_length": 40 + 8 * i / n + noise.gauss(0, 1),
            "val/explained_variance": -0.5 if i < 5 else 0.3 + noise.gauss(0, 0.1),
            "val/first_ratio_rms": 1e-6,
            "val/surprise_gap": noise.gauss(0, 0.03),
            "val/surprise_sem": 0.03,
            "phrase/share": 0.1 + 0.3 * i / n,
            "phrase/reference_share": 0.05,
            "phrase/distinct": 0.8 - 0.1 * i / n,
        }
        for i in range(n)
    ]


def run(updates, evaluations=None):
    """`(step, name)` of what is said in a run; `evaluations` maps steps to held-out scores."""
    watch, said = Watch(), []
    for step, metrics in enumerate(updates, 1):
        watch.add_update(step, metrics | {"lr": 1.0})
        if evaluations and step in evaluations:
            watch.add_evaluation({"score": evaluations[step]})
        said += [(finding.step, finding.name) for finding in watch.new_findings()]
    assert [(f["step"], f["name"]) for f in watch.said] == said
    return said


def test_a_healthy_run_is_left_alone():
    assert run(healthy(), {20: (0.3, 0.05), 40: (0.6, 0.05), 60: (0.55, 0.05)}) == []


@pytest.mark.parametrize(
    "name, broken",
    [
        ("ratio_not_one", {"val/first_ratio_rms": 0.3}),
        ("sampled_otherwise", {"val/surprise_gap": -0.3}),
        ("sampled_otherwise", {"val/surprise_gap": 0.3}),
        ("negative_kl", {"objective/kl": -1.0}),
        ("kl_running_away", {"objective/kl": 60.0}),
        ("entropy_collapse", {"policy/entropy_avg": 0.3}),
        ("one_phrase_takes_over", {"phrase/share": 0.75, "phrase/reference_share": 0.02, "phrase/distinct": 0.5}),
        ("length_drift", {"response_length": 90.0}),
        ("length_drift", {"response_length": 12.0}),
        ("constant_scores", {"objective/scores_std": 0.0}),
        ("critic_explains_nothing", {"val/explained_variance": -1.0}),
    ],
)
def test_each_pathology_is_said_once_with_its_remedy(name, broken):
    rows = healthy()
    rows = rows[:30] + [row | broken for row in rows[30:]]
    said = run(rows)
    assert [n for _, n in said] == [name]
    assert 30 < said[0][0] <= 30 + WINDOW
    watch = Watch()
    for step, row in enumerate(rows[:45], 1):
        watch.add_update(step, row)
    (finding,) = watch.new_findings()
    text = str(finding)
    assert text.startswith(f"PPO diagnosis after update 45, {name.replace('_', ' ')}: ")
    assert finding.remedy in text and finding.remedy.endswith(".")


def test_the_phrase_that_took_over_is_named():
    """Of the phrases that the reference rarely wrote, the one in most answers; the longest of those in as many."""
    reference = [[1, 2, 3, i] for i in range(10, 30)]
    answers = [[1, 2, 3, 7, 8]] * 15 + [[1, 2, 3, 9]] * 5
    found = phrases.commonest(answers, reference)
    assert found == phrases.Phrase((2, 3, 7, 8), 0.75, 0.0)  # 1, 2, 3 is in all of them, but it always was
    assert phrases.commonest([[], []], reference) is None
    assert phrases.distinct([[1, 2, 1, 2], [1, 2]]) == 0.5 and phrases.distinct([[1]]) == 1.0
    watch = Watch()
    for step, row in enumerate(healthy(20), 1):
        watch.add_update(step, row | {"phrase/share": 0.75, "phrase/distinct": 0.8 / step**0.2}, " great")
    (finding,) = watch.new_findings()
    assert "' great' is in 75% of the answers, in 5% of the reference's own" in finding.what


def test_a_judge_that_applies_only_at_times_is_no_matter():
    watch = Watch()
    for step, row in enumerate(healthy(30), 1):
        watch.add_update(step, row)
        if step % 5 == 0:
            watch.add_evaluation({"score": (0.5, 0.1), **({"reward/judge": (1.0, 0.1)} if step != 10 else {})})
        assert watch.new_findings() == []


def test_noise_around_a_kl_of_nothing_is_no_finding():
    noise = random.Random(1)
    still = {"response_length": 40.0, "policy/entropy_avg": 2.5, "val/explained_variance": 0.1}
    still |= {"objective/kl_sem": 0.2, "objective/raw_scores": 0.0, "objective/scores_std": 1.0}
    rows = [still | {"objective/kl": noise.gauss(0, 0.2)} for _ in range(500)]
    assert run(rows) == []


def test_a_kl_that_grows_fast_is_no_finding_while_it_is_small():
    rows = [row | {"objective/kl": 0.5 * 1.15 ** min(i, 30)} for i, row in enumerate(healthy(40))]
    assert rows[-1]["objective/kl"] > 30 and run(rows) == []


def test_a_critic_that_is_off_by_a_constant():
    rows = [row | {"val/bias": -1.5} for row in healthy(40)]
    assert run(rows) == [(20, "critic_explains_nothing")]
    assert run([row | {"val/bias": -1.5 if i < 10 else 0.5} for i, row in enumerate(rows)]) == []


def test_reward_up_while_held_out_falls():
    falling = {10: (0.5, 0.02), 20: (0.7, 0.02), 40: (0.5, 0.02), 50: (0.4, 0.02)}
    assert run(healthy(), falling) == [(50, "held_out_falls")]
    within_noise = {step: (mean, 0.2) for step, (mean, _) in falling.items()}
    assert run(healthy(), within_noise) == []
    fell_together = [row | {"objective/raw_scores": 1 - row["objective/raw_scores"]} for row in healthy()]
    assert run(fell_together, falling) == []


def test_what_comes_again_is_said_again_and_what_lasts_is_not():
    rows = healthy(90)
    for i in [*range(20, 45), *range(70, 80)]:
        rows[i] = rows[i] | {"val/first_ratio_rms": 0.2}
    assert run(rows) == [(21, "ratio_not_one"), (71, "ratio_not_one")]


def test_a_watch_continues_from_its_state():
    rows = [row | {"val/first_ratio_rms": 0.2} for row in healthy()]
    watch = Watch()
    for step, row in enumerate(rows[:30], 1):
        watch.add_update(step, row)
        watch.new_findings()
    again = Watch()
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    for step, row in enumerate(rows[30:], 31):
        again.add_update(step, row)
        assert again.new_findings() == []
    assert len(again.said) == 1 and len(again.updates) == WINDOW + diagnosis.KEPT


def recorded():
    """Runs of benchmarks/ppo_diagnosis.py (`--curves`): what they logged, and which diagnosis must come, if any."""
    with gzip.open(Path(__file__).parents[1] / "ppo_diagnosis_curves.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("curve", recorded(), ids=lambda curve: f"{curve['world']}, seed {curve['seed']}")
def test_recorded_runs(curve):
    """What was made sick on purpose is found; healthy runs are left alone."""
    watch, held_out = Watch(), iter(curve["evaluations"])
    watch.add_evaluation(next(held_out))
    every = len(curve["updates"]) // (len(curve["evaluations"]) - 1)
    for step, metrics in enumerate(curve["updates"], 1):
        watch.add_update(step, metrics)
        if step % every == 0:
            watch.add_evaluation(next(held_out))
        watch.new_findings()
    said = [finding["name"] for finding in watch.said]
    assert curve["finds"] in said if curve["finds"] else said == []
