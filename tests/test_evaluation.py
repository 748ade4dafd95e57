"""What models are worth: figures against closed forms, intervals that cover, pairs that are paired; stage and verb alike."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import SetupError, chain, evaluation
from pipelines import recipe as recipes
from pipelines.evaluation import figures, interval, judge, ranked_values, wins
from pipelines.recipe import RecipeError
from tests.conftest import WORDS

PROMPTS = [{"prompt": f"what colour is the {w}"} for w in ("cat", "dog", "tree", "fish", "bird")]


def length(prompt, answer):
    """A judge: shorter is better; it also says whether an answer is empty."""
    return {"score": -len(answer), "empty": not answer}


def starts_with_a(prompt, answer):
    return answer.startswith("a")


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = [low <= 0.3 <= high for _, low, high in (interval(rng.random(60) < 0.3) for _ in range(300))]
    assert 0.90 < np.mean(covered) < 0.98
    mean, low, high = interval([1.0, 1.0, 1.0])
    assert mean == low == high == 1.0
    values = list(rng.normal(size=400))
    _, low, high = interval(values)
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(values) / math.sqrt(400), rel=0.1)


def test_pairs_are_compared_item_by_item():
    """Two models that differ by the same small amount on items of very different worth: pairing sees it, means do not."""
    worth = list(np.random.default_rng(0).normal(size=50))
    found = figures({"sft": {"score": worth}, "policy": {"score": [w + 0.1 for w in worth]}})
    assert found["policy over sft/win_rate"] == (1.0, 1.0, 1.0)
    assert found["policy over sft/score"] == pytest.approx((0.1, 0.1, 0.1))
    assert found["policy/score"][1] < found["sft/score"][0]
    assert wins([1, 2, 3], [1, 3, 2]) == [0.5, 0.0, 1.0]
    assert "win_rate" in evaluation.table(found) and "100.0%" in evaluation.table(found)


def test_judges_give_numbers_or_named_numbers():
    answers = {"m": [[("a cat", True), ("dog", True)], [("", True), ("abc", False)]]}
    assert judge("tests.test_evaluation:length", ["p", "q"], answers) == {
        "m": {"score": [-4.0, -1.5], "empty": [0.0, 0.5]}
    }
    assert judge("tests.test_evaluation:starts_with_a", ["p", "q"], answers) == {"m": {"score": [0.5, 0.5]}}


def test_people_decide_by_their_rankings(write):
    rows = [
        {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 2], "models": ["new", "old", "old"]},
        {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 1], "models": ["old", "new"]},
        {"prompt": "r", "completions": ["a", "b"], "ranks": [1, 2], "models": ["old", "new"]},
        {"prompt": "s", "completions": ["a", "b"], "ranks": [1, 2], "models": ["old", "old"]},
    ]
    values = ranked_values(write("r.jsonl", rows), ["old"])
    assert values == {"old": {"rank/new": [0.0, 0.5, 1.0]}, "new": {"rank/old": [1.0, 0.5, 0.0]}}
    found = figures(values)
    assert list(found) == ["new over old/ranked_win_rate"] and found["new over old/ranked_win_rate"][0] == 0.5
    with pytest.raises(ValueError, match="column `models`"):
        ranked_values(write("n.jsonl", [{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}]), [])


@pytest.fixture
def task(write, tmp_path):
    """`tiny.yaml`: is "a a" likelier than an answer of 40 words? (It is, to any model that is near to uniform.)"""
    rows = [{"q": " ".join(WORDS[i : i + 3]), "c": ["a a", " ".join(WORDS[i:] + WORDS) + " a"]} for i in range(6)]
    data = write("tiny.jsonl", rows)
    write(
        "tiny.yaml",
        f"task: tiny\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: c\ndoc_to_target: 0\nmetric_list:\n'
        "  - {metric: acc, aggregation: mean, higher_is_better: true}\n",
    )
    return str(tmp_path / "tiny.yaml")


def test_stage_and_verb_say_the_same(recipe, write, tiny_gpt2, task, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = [" ".join(WORDS[i:]) for i in range(12)]
    settings = {
        "text": write("text.jsonl", [{"text": t} for t in texts]),
        "tasks": [task],
        "prompts": write("p.jsonl", PROMPTS),
        "judge": "tests.test_evaluation:length",
        "samples": 2,
        "response_length": 8,
        "max_length": 32,
    }
    row = {"prompt": "a", "completion": "it is red"}
    sft = {"kind": "sft", "model": {"model_name_or_path": str(tiny_gpt2), "chat_template": "plain"}, "data": {"train": write("s.jsonl", [row] * 8)}, "args": {"max_steps": 1, "global_batch_size": 8, "max_length": 64, "learning_rate": 1e-2}}  # fmt: skip
    path = recipe({"sft": sft, "scores": {"kind": "evaluate", "evaluate": {"models": [str(tiny_gpt2), "stage:sft"], **settings}}}, seed=3)  # fmt: skip
    loaded = recipes.load(path)
    chain.run(loaded)
    metrics = json.loads((loaded["scores"].folder / "stage.json").read_text())["metrics"]["figures"]
    out = capsys.readouterr().out
    assert "sft/perplexity" in out and f"sft over {tiny_gpt2}/win_rate" in out

    # perplexity, by hand
    folder = loaded["sft"].folder
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = [t for text in texts for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    windows = [torch.tensor([ids[i : i + 32]]) for i in range(0, len(ids), 32)]
    with torch.no_grad():
        nats = [model(w, labels=w).loss.item() for w in windows if w.shape[1] > 1]
    assert metrics["sft/perplexity"]["value"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    per_byte = np.mean(nats) * len(ids) / sum(len(t) for t in texts) / math.log(2)
    assert metrics["sft/bits_per_byte"]["value"] == pytest.approx(per_byte, rel=1e-4)
    assert metrics["sft/tiny/acc"]["value"] == 1.0
    score = metrics["sft/score"]
    assert score["low"] <= score["value"] <= score["high"]

    words = [[f"--{k.replace('_', '-')}", *map(str, v if isinstance(v, list) else [v])] for k, v in settings.items()]
    figures_file = tmp_path / "f.json"
    argv = [str(tiny_gpt2), str(folder), *sum(words, []), "--seed", "3", "--json", str(figures_file)]
    assert evaluation.main(argv) == 0
    found = json.loads(figures_file.read_text())
    assert found["sft/perplexity"]["value"] == pytest.approx(metrics["sft/perplexity"]["value"])
    assert found["sft/score"] == score


def test_a_reward_model_as_judge_scores_what_ppo_would_score(tiny_gpt2, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from pipelines import chat

    model = AutoModelForSequenceClassification.from_pretrained(tiny_gpt2, num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    answers = {"m": [[("it is red", True), ("it is", False)], [("blue", True), ("a b c d", True)]]}
    found = judge(str(tmp_path / "reward"), ["what colour", "which one of the birds"], answers)["m"]["score"]
    scores = []
    for prompt, group in zip(["what colour", "which one of the birds"], answers["m"]):
        for text, ended in group:
            before, ids = chat.encode_answer(tokenizer, prompt, text)
            with torch.no_grad():
                scores.append(model(torch.tensor([before + (ids if ended else ids[:-1])])).logits.item())
    assert found == pytest.approx([(scores[0] + scores[1]) / 2, (scores[2] + scores[3]) / 2], abs=1e-5)


def test_mistakes_are_found_before_anything_runs(recipe, write, tiny_gpt2):
    reward = {"kind": "reward", "model": {"model_name_or_path": str(tiny_gpt2)}, "data": {"train": write("r.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])}}  # fmt: skip
    stages = {
        "reward": reward,
        "a": {"kind": "evaluate", "evaluate": {"models": ["stage:reward"], "text": "nowhere.txt"}},
        "b": {"kind": "evaluate", "evaluate": {"models": [str(tiny_gpt2)]}},
        "c": {"kind": "evaluate", "evaluate": {"models": [str(tiny_gpt2)], "prompts": write("p.jsonl", PROMPTS), "samples": 0}},
        "d": {"kind": "evaluate", "evaluate": {"tasks": ["nowhere.yaml"]}},
    }  # fmt: skip
    with pytest.raises(RecipeError) as error:
        recipes.load(recipe(stages))
    text = str(error.value)
    for words in ["this stage is of kind reward", "no such file", "nothing to measure", "goes with prompts", "must be above 0", "at least one language model"]:  # fmt: skip
        assert words in text
    with pytest.raises(SetupError, match="nothing to measure"):
        evaluation.main([str(tiny_gpt2)])


def test_the_demos_tasks_ask_what_no_stage_asks_and_are_what_the_script_makes(tmp_path):
    import random

    folder = Path(__file__).parent.parent / "data" / "tasks"
    sys.path.insert(0, str(folder))
    import make

    world = make.world
    rows = {p.name: [json.loads(line) for line in open(p, encoding="utf-8")] for p in folder.glob("*.jsonl")}
    assert rows["bay_grammar.jsonl"] == make.grammar(random.Random(f"{world.SEED}/grammar"))
    assert rows["bay_quiz.jsonl"] == make.quiz(random.Random(f"{world.SEED}/quiz task"), True, 100)
    for name, held_out in (("bay_quiz.jsonl", True), ("bay_quiz_examples.jsonl", False)):
        for row in rows[name]:
            assert (world.parse_question(row["question"]).pairs[0] in world.HELD_OUT) == held_out
            verdicts = [world.oracle(row["question"], choice).accurate for choice in row["choices"]]
            assert [i for i, right in enumerate(verdicts) if right] == [row["answer"]]
    assert all(row["sentence_good"] != row["sentence_bad"] for row in rows["bay_grammar.jsonl"])
