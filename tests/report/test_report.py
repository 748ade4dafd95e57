"""The report shows what the chain's files say, for finished, running, stopped and coming stages, and nothing can break
out.
"""

import fcntl
import json
import re
import types
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from pipelines import __main__, files
from pipelines.chain.record import identity
from pipelines.commands import report as commands_report
from pipelines.evaluation.metrics import preference_metrics
from pipelines.report import charts, run_folder
from pipelines.report import page as report_page
from pipelines.report.charts import Series
from pipelines.report.figures import _histogram
from pipelines.report.page import headline, rows_trained, tokens_trained, write

EVIL = '</td><script>alert(1)</script><img src="http://evil.test/x.png">'


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def finished(folder, kind, metrics, rows=None, history=(), samples=None, parents=None, **more):
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "kind": kind,
        "seed": 1,
        "sections": {"data": {"train": f"data/{folder.name}.jsonl"}, "args": {}},
        "data": {f"data/{folder.name}.jsonl": {"sha256": "ab" * 32, "bytes": 12}},
        "parents": parents or {},
    }
    final = {
        "stage": folder.name,
        "kind": kind,
        "recipe": "r.yaml",
        "record": record,
        "rows": rows or {},
        "metrics": metrics,
        "args": {"use_cpu": True},
        "seed": 1,
        "world_size": 2,
        "started": f"2026-01-0{len(list(folder.parent.iterdir()))}",
        "finished": "2026-01-09T00:00:00",
        "seconds": 100.0,
        "git_commit": "abc",
        "versions": {"torch": "2"},
        **more,
    }
    files.write_json(folder / files.FINISHED, final)
    lines(folder / files.HISTORY, history)
    if samples:
        lines(folder / "samples.jsonl", samples)
    return identity(final)


@pytest.fixture
def run(tmp_path):
    """A run with a finished sft, reward, ppo and classify stage, a stopped one and one that is still to come."""
    run = tmp_path / "run"
    history = [{"loss": 3 / n, "epoch": n / 10, "step": n} for n in range(1, 11)] + [{"eval_loss": 0.4, "step": 10}]
    sft = finished(
        run / "sft", "sft", {"eval_perplexity": 1.5}, {"train": {"rows": 9, "used": 8, "tokens": 500}}, history
    )
    scores = preference_metrics(np.array([2.0, 1.0, 3.0]), np.array([0.0, 1.5, -1.0]))
    reward = finished(run / "reward", "reward", scores, parents={"sft": sft})
    samples = [
        {
            "step": step,
            "split": "eval",
            "prompt": f"who? {EVIL}",
            "completion": f"answer {step} {EVIL}",
            "score": 1.0,
            "kl": 0.5,
            "ended": True,
            "tags": ["rude"],
        }
        for step in (5, 10)
    ]
    steps = [
        {"objective/kl": n / 10, "objective/scores": n, "response_length": 7.0, "episode": 8 * n, "step": n}
        for n in (5, 10)
    ]
    finished(
        run / "policy",
        "ppo",
        {"eval_score": 2.5},
        {"prompts": {"train": 963, "validation": 4}},
        steps,
        samples,
        {"sft": sft, "reward": reward},
    )
    matrix = {"eval_accuracy": 0.75, "labels": ["bad", "good"], "confusion_matrix": [[30, 2], [14, 18]]}
    finished(run / "films", "classify", matrix, parents={"encoder": "0123"})
    files.write_json(
        run / "late" / files.STARTED, {"record": {"kind": "sft", "parents": {"sft": sft}}, "started": "2026-01-08"}
    )
    log = [
        {"max_steps": 40, "step": 0, "time": 10.0},
        {"loss": 5.0, "step": 10, "time": 20.0},
        {"loss": 4.0, "step": 20, "time": 30.0},
    ]
    log += [{"max_steps": 40, "step": 10, "time": 1000.0}, {"loss": 4.5, "step": 20, "time": 1015.0}]  # resumed from 10
    lines(run / "late" / "checkpoints" / files.LOG, log)
    stages = [
        ("sft", "sft", []),
        ("reward", "reward", ["sft"]),
        ("policy", "ppo", ["sft", "reward"]),
        ("films", "classify", []),
        ("late", "sft", ["sft"]),
        ("next", "ppo", ["late"]),
    ]
    files.write_json(
        run / files.CHAIN, {"recipe": "r.yaml", "stages": [dict(zip(("name", "kind", "parents"), s)) for s in stages]}
    )
    return run


def text_of(page, name):
    """The section of one stage."""
    return page.split(f'<section id="{name}">')[1].split("</section>")[0]


def test_it_reads_what_each_stage_is_doing(run):
    stages = {s.name: s for s in run_folder.read(run)}
    assert list(stages) == ["sft", "reward", "policy", "films", "late", "next"]
    assert [s.state for s in stages.values()] == ["finished"] * 4 + ["stopped", "due"]
    late = stages["late"]  # what was logged after the checkpoint it resumed from is gone; both sessions count
    assert [(e["step"], e["loss"]) for e in late.history] == [(10, 5.0), (20, 4.5)]
    assert (late.step, late.total, late.seconds) == (20, 40, 35.0)
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert [s.state for s in run_folder.read(run)][4] == "running"
    assert tokens_trained(stages["sft"]) == 500  # one epoch of its tokens
    assert tokens_trained(stages["policy"]) == 80 * 7
    assert headline(stages["policy"]) == (2.5, "score") and headline(late) == (None, "")


def test_speeds_are_of_all_sessions(tmp_path):
    """A stage that was stopped at step 30 of 40 and resumed: nothing is divided by the last session's time alone."""
    history = [{"num_tokens": n, "step": s} for s, n in ((10, 1000), (20, 2000), (30, 3000), (40, 900))]
    metrics = {"steps": 40, "train_samples_per_second": 99.0}
    args = {"use_cpu": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    finished(tmp_path / "run" / "reward", "reward", metrics, history=history, args=args)
    (stage,) = run_folder.read(tmp_path / "run")
    assert rows_trained(stage) == 40 * 4 * 2 * 2  # world_size 2
    assert tokens_trained(stage) == 3900
    page = write(tmp_path / "run").read_text()
    assert re.search(r"<td[^>]*>39</td><td[^>]*>6.4</td>", page)  # in 100 s


def test_the_page_shows_curves_tables_and_samples(run):
    page = write(run, price=2.0).read_text()
    assert write(run) == run / "report.html"
    assert "500 tokens" in text_of(page, "sft") and "9 rows, 8 used" in text_of(page, "sft")
    assert "scores of held-out answers" in text_of(page, "reward") and "calibration" in text_of(page, "reward")
    policy = text_of(page, "policy")
    assert (
        "reward against KL" in policy and "answer at step 5" in policy and "rude" in policy and "963 prompts" in policy
    )
    assert re.search(r"bad</th><td[^>]*>30</td><td[^>]*>2</td>", text_of(page, "films"))
    assert "step 20 of 40" in text_of(page, "late") and "waits for late" in text_of(page, "next")
    # 100 s on 2 processes: 50 W x 2 x 100 s = 0.00278 kWh, 2 x 2 x 100/3600 = 0.111
    assert "0.00278" in page and "0.111" in page and "an assumption" in page
    assert "0.0111" in report_page.page(
        run, run_folder.read(run), watts=200
    ) and "an assumption" not in report_page.page(run, run_folder.read(run), watts=200)
    assert "made again since" not in page
    again = files.read_json(run / "sft" / files.FINISHED)
    files.write_json(run / "sft" / files.FINISHED, {**again, "finished": "later"})
    assert "made again since" in text_of(write(run).read_text(), "reward")


def test_feedback_and_evaluation_are_shown_side_by_side(tmp_path):
    run = tmp_path / "run"
    answers = {
        "prompt": [{"role": "user", "content": "who?"}],
        "completions": ["me", "you", "<b>"],
        "models": ["sft", "policy", "sft"],
    }
    finished(
        run / "answers",
        "sample",
        {"rows": 1},
        {"prompts": {"rows": 5, "used": 5}},
        samples=[answers],
        args={},
        versions={"torch": "2.13.0+cpu"},
    )
    ranked = {
        "prompt": "who?",
        "completions": ["me", "you"],
        "ranks": [2, 1],
        "tags": [["rude"], []],
        "models": ["sft", "ppo"],
    }
    finished(run / "ranked", "rank", {"rankings": 1, "tagged_rude": 3})
    lines(run / "ranked" / "rankings.jsonl", [ranked])
    finished(run / "reward", "reward", {"tag_rude_accuracy": 0.75, "tag_rude_auc": 0.5})
    finished(
        run / "policy", "ppo", {"diagnosis": [{"name": "negative_kl", "step": 7, "what": "below 0", "remedy": "top_p"}]}
    )
    figures = {"policy over sft/win_rate": {"value": 0.63, "low": 0.59, "high": 0.68}}
    finished(run / "judged", "evaluate", {"figures": figures}, args={}, versions={"torch": "2.13.0+cpu"})
    files.write_json(
        run / "judged" / "values.json", {"sft": {"score": [0.0, 1.0]}, "policy": {"score": [1.0, 2.0, 2.0, 2.0]}}
    )
    page = write(run).read_text()
    assert "<td>who?</td><td>me\n\n&lt;b&gt;</td><td>you</td>" in text_of(page, "answers")
    assert "1. you [ppo]\n2. me [sft, rude]" in text_of(
        page, "ranked"
    ) and '<td>rude</td><td class="n">3</td>' in text_of(page, "ranked")
    assert '<td>rude</td><td class="n">0.75</td><td class="n">0.5</td>' in text_of(page, "reward")
    assert "negative_kl" in text_of(page, "policy") and "0.59 to 0.68" in text_of(page, "judged")
    shares = {
        s.name: [y for _, y in s.points] for s in _histogram({"sft": [0.0, 1.0], "policy": [1.0, 2.0, 2.0, 2.0]}, 2)
    }
    assert shares == {"sft": [0.5, 0.5, 0], "policy": [0, 1.0, 0]}
    assert "scores of the models&#x27; answers" in text_of(page, "judged")
    assert "GPU" not in page.split("Energy =")[1].split("</p>")[0]  # a stage without arguments ran where its torch says


def test_nothing_of_a_model_or_a_recipe_becomes_markup_and_nothing_is_fetched(run):
    page = write(run).read_text()
    seen = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.append((tag, dict(attrs)))

    Reader().feed(page)
    assert not {tag for tag, _ in seen} & {"script", "img", "link", "iframe", "object", "base"}
    assert not [
        a
        for _, a in seen
        for key, value in a.items()
        if key == "src" or key.startswith("on") or (key == "href" and value[0] != "#")
    ]
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page
    assert "alert(1)" in page and "url(" not in page
    for drawing in re.findall(r"<svg.*?</svg>", page, re.S):
        ET.fromstring(drawing)


def test_it_reloads_only_while_a_run_is_running(run):
    refresh = 'http-equiv="refresh" content="3"'
    assert refresh not in write(run, every=3).read_text()
    assert refresh in write(run, every=3, running=True).read_text()
    assert 'http-equiv="refresh"' not in write(run, running=True).read_text()


def test_watch_writes_until_every_stage_is_finished(run, monkeypatch, capsys):
    pages = []

    def sleep(seconds):
        pages.append((run / "out.html").read_text())
        if len(pages) == 2:
            finished(run / "late", "sft", {"eval_perplexity": 9.75})
            finished(run / "next", "ppo", {"eval_score": 8.25})

    monkeypatch.setattr(commands_report, "time", types.SimpleNamespace(sleep=sleep))
    assert __main__.main(["report", str(run), "--watch", "5", "--out", str(run / "out.html")]) == 0
    assert len(pages) == 2 and "9.75" not in pages[1] and "8.25" in (run / "out.html").read_text()
    assert capsys.readouterr().out.strip() == str(run / "out.html")


@pytest.mark.parametrize(
    "argv, said",
    [
        (["nowhere"], "nowhere: no such folder"),
        (["."], "no stage was started here"),
        ([".", "--watch", "0"], "above 0"),
    ],
)
def test_what_cannot_be_reported_is_said(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert __main__.main(["report", *argv]) == 2
    assert said in capsys.readouterr().err


def test_a_chart_has_its_values_at_their_places():
    drawing = ET.fromstring(
        charts.chart([Series("a", [(0, 0), (10, 50), (20, 100)], "both")], "step", "loss").split("<p class")[0]
    )
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in drawing.iter("circle")]
    assert dots[0] == (charts.LEFT, charts.HEIGHT - charts.BOTTOM) and dots[2] == (
        charts.WIDTH - charts.RIGHT,
        charts.TOP,
    )
    assert dots[1] == pytest.approx(np.mean([dots[0], dots[2]], axis=0))
    words = [t.text for t in drawing.iter("text")]
    assert {"0", "50", "100", "step", "loss"} <= set(words)


def test_charts_of_hard_values():
    assert (
        charts.chart([Series("a", [])], "x", "y") == ""
        and charts.chart([Series("a", [(1, float("nan"))])], "x", "y") == ""
    )
    assert "1 values are not finite" in charts.chart([Series("a", [(1, 2.0), (2, float("inf"))])], "x", "y")
    for points in ([(1, 0.0)], [(1, 3.0), (2, 3.0)], [(1, -2e-7), (2, 5e9)], [(1, -1e-12), (2, 1e-12)]):
        ET.fromstring(charts.chart([Series("a", points, "both")], "x", "y").split("<p class")[0])
    long = charts.chart([Series("a", [(i, 1.0) for i in range(10_000)])], "x", "y")
    assert len(long) < 12_000 and "the mean of up to 34" in long
    assert [charts.number(v) for v in (1, 2.5, 12345, 2.5e6, 0.0002, 0.12345, True)] == [
        "1",
        "2.5",
        "12.3k",
        "2.5M",
        "2e-4",
        "0.123",
        "True",
    ]


def test_the_picture_has_a_box_per_stage_and_no_box_on_another(run):
    nodes = [
        charts.Node(n, ["x", "y"], "due", p, "d", "r")
        for n, p in [("a", []), ("b", ["a"]), ("c", ["a"]), ("d", ["b", "c"]), ("e", []), ("f", ["e", "a"])]
    ]
    for drawing in re.findall(r"<svg.*?</svg>", charts.picture(nodes)):
        boxes = []
        for rect in ET.fromstring(drawing).iter("rect"):
            boxes.append([float(rect.get(k)) for k in ("x", "y", "width", "height")])
        assert len(boxes) == 12
        for i, (x, y, w, h) in enumerate(boxes):
            assert not any(x < X + W and X < x + w and y < Y + H and Y < y + h for X, Y, W, H in boxes[:i])


def test_a_long_chain_stands_below_each_other_on_every_screen():
    chain_of = lambda n: [charts.Node(str(i), ["x"], "due", [str(i - 1)] if i else []) for i in range(n)]
    assert charts.picture(chain_of(5)).count("<svg") == 2 and charts.picture(chain_of(6)).count("<svg") == 1


def test_the_histogram_of_a_reward_stage_counts_every_answer():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(1, 1, 50).astype(np.float32), rng.normal(0, 1, 50).astype(np.float32)
    histogram = preference_metrics(chosen, rejected)["histogram"]
    assert sum(histogram["chosen"]) == sum(histogram["rejected"]) == 50 and len(histogram["edges"]) == 25
    assert histogram["edges"][0] == min(chosen.min(), rejected.min())
    assert preference_metrics(np.zeros(3), np.zeros(3))["histogram"]["chosen"]


def test_answers_may_hold_what_python_takes_for_line_ends(tmp_path):
    row = {"completion": "a\x85b\u2028c"}
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + '\n{"complet')
    assert files.read_rows(path) == [row] and files.read_rows(tmp_path / "none") == []
