"""Tasks of lm-eval: on tasks of every kind our figures are those of its own table, with intervals that hold them."""

import pytest
from tiny_words import WORDS

pytest.importorskip("lm_eval", reason="tasks need the extra `evaluate`")

from lm_eval.tasks import TaskManager  # noqa: E402

from pipelines.evaluation.figures import figures  # noqa: E402
from pipelines.evaluation.measure import measure  # noqa: E402
from pipelines.recipe.sections import EvaluateSection  # noqa: E402

HEAD = "task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
KINDS = {
    "choices": """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: c
doc_to_target: y
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: brier_score, higher_is_better: false}
""",
    "labels": """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["the", "a"]
doc_to_target: y
metric_list:
  - {metric: f1}
  - {metric: mcc}
""",
    "last_word": """output_type: loglikelihood
doc_to_text: "{{q}}"
doc_to_target: " {{w}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}} {{w}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
""",
    "writing": """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{w}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
filter_list:
  - {name: first, filter: [{function: take_first}]}
  - {name: lower, filter: [{function: lowercase}, {function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: chrf, aggregation: chrf, higher_is_better: true}
""",
}


@pytest.fixture
def tasks(write, tmp_path, monkeypatch):
    """Paths of a task of every kind, and the name of a group of two, in a folder that lm-eval knows."""
    rows = [
        {
            "q": " ".join(WORDS[i : i + 3]),
            "w": " ".join(WORDS[i : i + 1 + i % 3]),
            "c": ["a a", WORDS[i], "not red"],
            "y": i % 2,
        }
        for i in range(12)
    ]
    data = write("rows.jsonl", rows)
    paths = [write(f"{name}.yaml", HEAD.format(name=name, data=data) + text) for name, text in KINDS.items()]
    for name, count in (("first", 12), ("second", 5)):
        text = HEAD.format(name=name, data=write(f"{name}.jsonl", rows[:count])) + KINDS["choices"]
        write(f"known/{name}.yaml", text)
    mean = "  - {metric: acc, aggregation: mean, weight_by_size: true}\n"
    write("known/both.yaml", f"group: both\ntask: [first, second]\naggregate_metric_list:\n{mean}")
    begin = TaskManager.__init__
    known = lambda self, **_: begin(self, include_path=str(tmp_path / "known"), include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", known)
    return [*paths, "both"]


def own_table(path, tasks):
    """lm-eval's results, asked without this project: {task: {"metric,filter": value}}."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(path), device="cpu", batch_size=4)
    known = TaskManager()
    return simple_evaluate(model=lm, tasks=tasks, bootstrap_iters=0, task_manager=known)["results"]


def test_every_metric_is_what_lm_evals_own_table_says(tiny_gpt2, tasks):
    of = measure({"m": str(tiny_gpt2)}, EvaluateSection(tasks=tasks, batch_size=4), 0)["m"]
    found, seen = figures({"m": of}), set()
    for task, metrics in own_table(tiny_gpt2, tasks).items():
        for key, value in metrics.items():
            metric, _, way = key.partition(",")
            if not way or "stderr" in metric:
                continue
            name = f"m/{task}/{metric}" if way == "none" else f"m/{task}/{metric},{way}"
            figure, low, high = found[name]
            assert figure == pytest.approx(float(value), rel=1e-4), name
            assert low <= figure <= high and (low < high or low == figure), name
            seen.add(name)
    assert seen == set(found)
    assert {
        "m/last_word/perplexity",
        "m/rolling/word_perplexity",
        "m/labels/mcc",
        "m/writing/chrf,first",
        "m/both/acc",
    } <= seen
    assert found["m/last_word/perplexity"][0] > 1 and found["m/rolling/bits_per_byte"][1] > 0


def test_two_models_are_paired_question_by_question(tiny_gpt2, tasks):
    of = measure({"m": str(tiny_gpt2)}, EvaluateSection(tasks=tasks[2:4], batch_size=4), 0)["m"]
    found = figures({"a": of, "b": dict(of)})
    assert found["b over a/last_word/perplexity"] == found["b over a/rolling/word_perplexity"] == (0.0, 0.0, 0.0)
