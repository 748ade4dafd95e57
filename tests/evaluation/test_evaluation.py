"""What models are worth: figures against closed forms, intervals that cover, pairs that are paired; stage and verb
alike.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_words import WORDS

from pipelines.chain import chain
from pipelines.commands import evaluate
from pipelines.data.labels import class_id
from pipelines.errors import DataError, SetupError
from pipelines.evaluation import measure as evaluation_measure
from pipelines.evaluation.figures import CLASSES, Items, confusion, figures, interval, matrices, table, wins
from pipelines.evaluation.judges import judge, ranked_values
from pipelines.generation.answers import translations
from pipelines.generation.speaker import Settings, Speaker
from pipelines.models import chat_template
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.recipe import load
from pipelines.recipe.sections import EvaluateSection

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
    """Two models that differ by the same small amount on items of very different worth: pairing sees it, means
    do not.
    """
    worth = list(np.random.default_rng(0).normal(size=50))
    found = figures({"sft": {"score": worth}, "policy": {"score": [w + 0.1 for w in worth]}})
    assert found["policy over sft/win_rate"] == (1.0, 1.0, 1.0)
    assert found["policy over sft/score"] == pytest.approx((0.1, 0.1, 0.1))
    assert found["policy/score"][1] < found["sft/score"][0]
    assert wins([1, 2, 3], [1, 3, 2]) == [0.5, 0.0, 1.0]
    assert "win_rate" in table(found) and "100.0%" in table(found)


def test_judges_give_numbers_or_named_numbers():
    answers = {"m": [[("a cat", True), ("dog", True)], [("", True), ("abc", False)]]}
    assert judge("tests.evaluation.test_evaluation:length", [{"prompt": "p"}, {"prompt": "q"}], answers) == {
        "m": {"score": [-4.0, -1.5], "empty": [0.0, 0.5]}
    }
    assert judge("tests.evaluation.test_evaluation:starts_with_a", [{"prompt": "p"}, {"prompt": "q"}], answers) == {
        "m": {"score": [0.5, 0.5]}
    }


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
        "judge": "tests.evaluation.test_evaluation:length",
        "samples": 2,
        "response_length": 8,
        "max_length": 32,
    }
    row = {"prompt": "a", "completion": "it is red"}
    sft = {
        "kind": "sft",
        "model": {"model_name_or_path": str(tiny_gpt2), "chat_template": "plain"},
        "data": {"train": write("s.jsonl", [row] * 8)},
        "args": {"max_steps": 1, "global_batch_size": 8, "max_length": 64, "learning_rate": 1e-2},
    }
    path = recipe(
        {"sft": sft, "scores": {"kind": "evaluate", "evaluate": {"models": [str(tiny_gpt2), "stage:sft"], **settings}}},
        seed=3,
    )
    loaded = load(path)
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
        windows = [w for w in windows if w.shape[1] > 1]
        nats = [model(w, labels=w).loss.item() * (w.shape[1] - 1) for w in windows]
    per_token = sum(nats) / sum(w.shape[1] - 1 for w in windows)
    per_byte = per_token * len(ids) / sum(len(t) for t in texts)
    per_word = per_token * len(ids) / sum(len(t.split()) for t in texts)
    for measure, value in {
        "loss_per_token": per_token,
        "perplexity": math.exp(per_token),
        "bits_per_byte": per_byte / math.log(2),
        "perplexity_per_byte": math.exp(per_byte),
        "perplexity_per_word": math.exp(per_word),
    }.items():
        figure = metrics[f"sft/{measure}"]
        assert figure["value"] == pytest.approx(value, rel=1e-4) and figure["low"] < value < figure["high"]
    assert metrics["sft/tiny/acc"]["value"] == 1.0
    score = metrics["sft/score"]
    assert score["low"] <= score["value"] <= score["high"]

    words = [[f"--{k.replace('_', '-')}", *map(str, v if isinstance(v, list) else [v])] for k, v in settings.items()]
    figures_file = tmp_path / "f.json"
    argv = [str(tiny_gpt2), str(folder), *sum(words, []), "--seed", "3", "--json", str(figures_file)]
    assert evaluate.main(argv) == 0
    found = json.loads(figures_file.read_text())
    assert found["sft/perplexity"]["value"] == pytest.approx(metrics["sft/perplexity"]["value"])
    assert found["sft/score"] == score


def test_a_reward_model_as_judge_scores_what_ppo_would_score(tiny_gpt2, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tiny_gpt2, num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    answers = {"m": [[("it is red", True), ("it is", False)], [("blue", True), ("a b c d", True)]]}
    found = judge(
        str(tmp_path / "reward"), [{"prompt": p} for p in ("what colour", "which one of the birds")], answers
    )["m"]["score"]
    scores = []
    for prompt, group in zip(["what colour", "which one of the birds"], answers["m"]):
        for text, ended in group:
            before, ids = chat_template.encode_answer(tokenizer, prompt, text)
            with torch.no_grad():
                scores.append(model(torch.tensor([before + (ids if ended else ids[:-1])])).logits.item())
    assert found == pytest.approx([(scores[0] + scores[1]) / 2, (scores[2] + scores[3]) / 2], abs=1e-5)


def test_mistakes_are_found_before_anything_runs(recipe, write, tiny_gpt2):
    reward = {
        "kind": "reward",
        "model": {"model_name_or_path": str(tiny_gpt2)},
        "data": {"train": write("r.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])},
    }
    stages = {
        "reward": reward,
        "a": {"kind": "evaluate", "evaluate": {"models": ["stage:reward"], "text": "nowhere.txt"}},
        "b": {"kind": "evaluate", "evaluate": {"models": [str(tiny_gpt2)]}},
        "c": {
            "kind": "evaluate",
            "evaluate": {"models": [str(tiny_gpt2)], "prompts": write("p.jsonl", PROMPTS), "samples": 0},
        },
        "d": {"kind": "evaluate", "evaluate": {"tasks": ["nowhere.yaml"]}},
    }
    with pytest.raises(RecipeError) as error:
        load(recipe(stages))
    text = str(error.value)
    for words in [
        "this stage is of kind reward",
        "no such file",
        "nothing to measure",
        "goes with prompts",
        "must be at least 1",
        "at least one language model",
    ]:
        assert words in text
    with pytest.raises(SetupError, match="nothing to measure"):
        evaluate.main([str(tiny_gpt2)])


def test_what_a_model_cannot_do_is_refused(recipe, write, tiny_gpt2, tiny_t5, classifiers):
    labelled, text = write("l.jsonl", [{"text": "a cat", "label": 1}]), write("t.jsonl", [{"text": "a cat"}])
    pairs = write("p.jsonl", [{"prompt": "a", "completion": "cat"}])
    sft = {"kind": "sft", "model": {"model_name_or_path": str(tiny_gpt2)}, "data": {"train": pairs}}
    stages = {
        "sft": sft,
        "classes": {"kind": "classify", "model": {"model_name_or_path": str(tiny_gpt2)}, "data": {"train": labelled}},
        "a": {"kind": "evaluate", "evaluate": {"models": ["stage:sft"], "labelled": labelled}},
        "b": {"kind": "evaluate", "evaluate": {"models": ["stage:classes"], "pairs": pairs, "temperature": -1}},
        "c": {"kind": "evaluate", "evaluate": {"models": ["stage:classes"], "labelled": labelled, "text": text}},
    }
    with pytest.raises(RecipeError) as error:
        load(recipe(stages))
    for words in [
        "must be a classifier (classify), this stage is of kind sft",
        "must be a language model (pretrain, sft,",
        "must be at least 0",
        "measure them apart",
    ]:
        assert words in str(error.value)
    for model, what, needed in [
        (tiny_gpt2, ["--labelled", labelled], "labelled needs a sequence classifier, and this is a GPT2LMHeadModel"),
        (tiny_t5, ["--text", text], "text needs a causal language model, and this is a T5ForConditionalGeneration"),
        (classifiers["one"], ["--pairs", pairs], "pairs needs .* and this is a BertForSequenceClassification"),
    ]:
        with pytest.raises(SetupError, match=needed):
            evaluate.main([str(model), *what])
    wrong = write("w.jsonl", [{"text": "a cat", "label": "good"}, {"text": "a dog", "label": "nice"}])
    with pytest.raises(DataError, match=r"w\.jsonl:2: label 'nice' is no class of the model: bad, middling, good"):
        evaluate.main([classifiers["one"], "--labelled", wrong])


# --- classification and generation -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory):
    """Folders of two BERTs of three classes with random weights: `one`, `two`."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder = tmp_path_factory.mktemp("classifiers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    for seed, name in enumerate(["one", "two"]):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
            initializer_range=0.5,
            id2label={0: "bad", 1: "middling", 2: "good"},
            label2id={"bad": 0, "middling": 1, "good": 2},
            pad_token_id=0,
        )
        BertForSequenceClassification(config).save_pretrained(folder / name)
        BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("one", "two")}


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory, tokenizer):
    """A folder with a T5 of random weights whose stage put "is it " before every source."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        initializer_factor=2.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = {"record": {"sections": {"task": {"prefix": "is it "}}}}
    (folder / "stage.json").write_text(json.dumps(made))
    return folder


def test_classification_is_scikit_learns_on_the_models_own_classes(recipe, write, classifiers, tmp_path, capsys):
    import sklearn.metrics
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    names, chance = ["bad", "middling", "good"], np.random.default_rng(5)
    texts = [" ".join(chance.choice(WORDS, size=n)) for n in chance.integers(2, 20, 40)]  # some are cut at 16 tokens
    labels = chance.integers(0, 3, 40).tolist()
    rows = [{"text": t, "label": i if n % 2 else names[i]} for n, (t, i) in enumerate(zip(texts, labels))]
    file = write("l.jsonl", rows)
    stage = {"kind": "evaluate", "evaluate": {"models": list(classifiers.values()), "labelled": file, "batch_size": 7}}
    loaded = load(recipe({"scores": stage}))
    chain.run(loaded)
    metrics = json.loads((loaded["scores"].folder / "stage.json").read_text())["metrics"]
    found, by_hand = metrics["figures"], {}
    for path in classifiers.values():
        model, tokenizer = (
            AutoModelForSequenceClassification.from_pretrained(path).eval(),
            AutoTokenizer.from_pretrained(path),
        )
        with torch.no_grad():
            guesses = [
                model(**tokenizer(t, truncation=True, max_length=16, return_tensors="pt")).logits.argmax().item()
                for t in texts
            ]
        assert len(set(guesses)) > 1
        by_hand[path] = {
            "accuracy": sklearn.metrics.accuracy_score(labels, guesses),
            "f1_macro": sklearn.metrics.f1_score(labels, guesses, average="macro"),
            "matthews": sklearn.metrics.matthews_corrcoef(labels, guesses),
        }
        for measure, value in by_hand[path].items():
            figure = found[f"{path}/labelled/{measure}"]
            assert figure["value"] == pytest.approx(value) and figure["low"] < value < figure["high"]
        right = [float(a == b) for a, b in zip(labels, guesses)]
        assert tuple(found[f"{path}/labelled/accuracy"].values()) == pytest.approx(interval(right))
        matrix = metrics["confusion_matrices"][path]
        expected = sklearn.metrics.confusion_matrix(
            [names[i] for i in labels], [names[i] for i in guesses], labels=matrix["labels"]
        )
        assert matrix["counts"] == expected.tolist() and sorted(matrix["labels"]) == sorted(names)
    one, two = classifiers.values()
    for measure, value in by_hand[two].items():
        assert found[f"{two} over {one}/labelled/{measure}"]["value"] == pytest.approx(value - by_hand[one][measure])
    assert "rows of each class, and what they were taken for" in capsys.readouterr().out

    assert evaluate.main([*classifiers.values(), "--labelled", file, "--json", str(tmp_path / "f.json")]) == 0
    said = json.loads((tmp_path / "f.json").read_text())
    assert said["two over one/labelled/f1_macro"] == pytest.approx(found[f"{two} over {one}/labelled/f1_macro"])
    assert said["one/labelled/confusion_matrix"] == metrics["confusion_matrices"][one]


def test_classifiers_are_compared_row_by_row():
    """Pairing: a model that is right wherever another is differs from itself by nothing in every resample."""
    of = {"labelled/label": ["x", "y", "z", "y", "x"] * 4, "labelled/guess": ["x", "y", "y", "x", "x"] * 4}
    found = figures({"one": of, "same": dict(of)})
    assert found["one/labelled/f1_macro"][1] < found["one/labelled/f1_macro"][2]
    assert [found[f"same over one/labelled/{m}"] for m in ("accuracy", "f1_macro", "matthews")] == [(0.0, 0.0, 0.0)] * 3


def test_labels_are_names_before_they_are_ids():
    names = ["neg", "pos"]
    assert [class_id({"label": x, "where": "f:1"}, names) for x in (0, 1, "pos", "neg")] == [0, 1, 1, 0]
    assert [class_id({"label": x, "where": "f:1"}, ["1", "2", "3"]) for x in (1, 3)] == [0, 2]
    for label, known in [("good", names), (2, names), (0, ["1", "2", "3"])]:
        with pytest.raises(DataError, match="f:1: label .* is no class"):
            class_id({"label": label, "where": "f:1"}, known)


def check_generation(name, path, file, texts, references):
    """The figures of greedy `pairs` are sacreBLEU's and rouge_score's of `texts`, which the model wrote one by one."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    settings = EvaluateSection(models=[path], pairs=file, response_length=6)
    of = evaluation_measure.measure({name: path}, settings, 3)[name]
    assert of["pairs/sacrebleu"] == pytest.approx([sacrebleu.corpus_bleu(texts, [references]).score])
    assert of["pairs/chrf"] == pytest.approx([sacrebleu.corpus_chrf(texts, [references]).score])
    assert of["pairs/sentence_chrf"] == pytest.approx(
        [sacrebleu.sentence_chrf(t, [r]).score for t, r in zip(texts, references)]
    )
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    assert of["pairs/rougeL"] == pytest.approx(
        [100 * scorer.score(r, t)["rougeL"].fmeasure for t, r in zip(texts, references)]
    )
    assert of["pairs/chrf"][0] > 1 and 100 in of["pairs/sentence_chrf"] and min(of["pairs/sentence_chrf"]) < 90
    found = figures({name: of, "worse": {**of, "pairs/sentence_chrf": [v - 1 for v in of["pairs/sentence_chrf"]]}})
    assert found[f"worse over {name}/pairs/sentence_chrf"] == pytest.approx((-1, -1, -1))
    assert f"worse over {name}/pairs/sacrebleu" not in found  # one figure of all rows: nothing to pair
    settings.temperature = 1.0
    sampled = [evaluation_measure.measure({name: path}, settings, seed)[name] for seed in (3, 3, 4)]
    assert sampled[0] == sampled[1] != sampled[2] and sampled[0] != of


SOURCES = [" ".join(WORDS[i : i + 1 + i % 4]) for i in range(8)]


def references_of(texts):
    """What is there (so that some n-grams match) for every second text, something else for the rest."""
    return [text if i % 2 and text else "a red bird sees the tree" for i, text in enumerate(texts)]


def test_generation_of_a_causal_model(write, tiny_gpt2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_gpt2).eval(), AutoTokenizer.from_pretrained(tiny_gpt2)
    texts = []
    for source in SOURCES:
        ids = tokenizer(source, return_tensors="pt")["input_ids"]
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    references = references_of(texts)
    rows = [{"prompt": s, "completion": r} for s, r in zip(SOURCES, references)]
    turns = [{"role": "user", "content": SOURCES[0]}, {"role": "assistant", "content": references[0]}]
    check_generation("gpt2", str(tiny_gpt2), write("p.jsonl", [{"messages": turns}, *rows[1:]]), texts, references)


def test_generation_of_an_encoder_decoder_with_its_prefix(write, tiny_t5, tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.generation import utils

    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5).eval(), AutoTokenizer.from_pretrained(tiny_t5)
    ids = [tokenizer(f"is it {source}")["input_ids"] for source in SOURCES]
    out = [model.generate(input_ids=torch.tensor([i]), do_sample=False, max_new_tokens=6)[0] for i in ids]
    texts = [tokenizer.decode(o, skip_special_tokens=True).strip() for o in out]
    references = references_of(texts)
    rows = [{"source": s, "target": r} for s, r in zip(SOURCES, references)]
    check_generation("t5", str(tiny_t5), write("p.jsonl", rows), texts, references)
    one, all_ = (
        translations(
            model, tokenizer, ids, [(3, i) for i in range(8)], response_length=6, temperature=1.0, batch_size=size
        )
        for size in (1, 8)
    )
    assert one == all_  # a text does not depend on those beside it
    assert "writing: 100%" in capsys.readouterr().err
    stage = tmp_path / "stage"  # whose config names a length, as our seq2seq stages leave it
    shutil.copytree(tiny_t5, stage)
    (stage / "generation_config.json").write_text(json.dumps({**model.generation_config.to_dict(), "max_length": 25}))
    warned = []
    monkeypatch.setattr(utils.logger, "warning", lambda text, *args: warned.append(text))
    evaluation_measure.measure({"t": str(stage)}, EvaluateSection(pairs=write("p.jsonl", rows), response_length=6), 3)
    Speaker(str(stage)).answer("the cat", Settings(max_new_tokens=4), str, str)
    assert warned == []


def test_the_demos_tasks_ask_what_no_stage_asks_and_are_what_the_script_makes(tmp_path):
    import random

    folder = Path(__file__).parents[2] / "data" / "bay" / "tasks"
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


def test_many_classes_are_listed_in_label_order_with_the_worst_confusions():
    names = [f"class {n}" for n in range(77)]
    labels = [n for n in range(77) for _ in range(3)]
    guesses = [76 if n == 2 else n for n in labels]
    guesses[0] = 5
    of = {key: Items([names[i] for i in ids], names=names) for key, ids in zip(CLASSES, (labels, guesses))}
    assert confusion({"m": of})["m"]["labels"] == names  # not by the alphabet: class 10 would come second
    text = matrices({"m": of})
    lines = [line.strip() for line in text.splitlines()]
    assert max(map(len, lines)) < 80 and lines[1] == "m: 77 classes in the order of their labels"
    assert lines[3].split() == ["class", "0", "3", "0.667", "1.000", "0.800"]
    assert lines[5].split() == ["class", "2", "3", "0.000", "–", "0.000"]
    at = lines.index("m: the worst confusions")
    assert lines[at + 1 : at + 3] == ["3 of 3 class 2 were taken for class 76", "1 of 3 class 0 were taken for class 5"]
    assert len(lines) == at + 3
    few = {"m": {"labelled/label": ["a", "b"], "labelled/guess": ["a", "a"]}}
    assert "rows of each class, and what they were taken for" in matrices(few)


def test_texts_are_cut_where_training_cut_them(write, classifiers, tmp_path, caplog, capsys):
    """A text whose end would change its class: the folder of a stage says how much of it was read."""
    import shutil

    folder = tmp_path / "stage"
    shutil.copytree(classifiers["one"], folder)
    chance = np.random.default_rng(5)
    rows = [{"text": " ".join(chance.choice(WORDS, size=14)), "label": 0} for _ in range(30)]
    file = write("l.jsonl", rows)
    guesses = lambda **more: evaluation_measure.measure({"m": str(folder)}, EvaluateSection(labelled=file, **more), 0)[
        "m"
    ]["labelled/guess"]
    whole = guesses()
    assert "are cut" not in caplog.text
    (folder / "stage.json").write_text(json.dumps({"record": {"sections": {"args": {"max_length": 6}}}}))
    cut = guesses()
    assert "m: 30 of 30 texts are cut at their end to 6 tokens, as in training (the first: " in caplog.text
    assert cut != whole and cut == guesses(max_length=6) and whole == guesses(max_length=16)
    assert "m: labelled: 100%" in capsys.readouterr().err  # progress
    assert "sequence length is longer" not in caplog.text
