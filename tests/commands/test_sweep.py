"""A sweep trains what differs and nothing else, goes on after a kill, and compares what came out."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipelines import __main__, files, launch
from pipelines.chain import chain, points
from pipelines.commands import run_here, sweep
from pipelines.recipe import recipe as recipe_recipe
from pipelines.recipe.yaml_with_lines import split_values
from pipelines.report import sweeps
from pipelines.report.sweeps import Row, Sweep
from pipelines.stages import sft

ROWS = [{"prompt": f"what is {i}", "completion": "a fish"} for i in range(20)]
EVIL = '</td><script>alert(1)</script><img src="http://evil.test/x.png">'
RATE, BETA = "stages.two.args.learning_rate", "stages.three.args.weight_decay"


class Killed(BaseException):
    """The machine went down."""


@pytest.fixture
def three(recipe, write, monkeypatch, tiny_gpt2, tmp_path):
    """A recipe of three stages that only write a file, each on the one before; `three.sweep(*words)` is the verb.

    `runs` lists what was trained: (folder of the run, stage). The loss is lowest where learning_rate is 0.002.
    """
    data = write("a.jsonl", ROWS)
    stage = lambda base, **args: {
        "kind": "sft",
        "model": {"model_name_or_path": base},
        "data": {"train": data, "validation": 0.2},
        "args": args,
    }
    path = recipe(
        {
            "one": stage(str(tiny_gpt2)),
            "two": stage("stage:one", learning_rate=1e-3),
            "three": stage("stage:two", weight_decay=0.1),
        }
    )
    out = types.SimpleNamespace(runs=[], fail={}, path=path, out=tmp_path / "out", root=tmp_path / "out" / "sweep")

    def run(stage):
        out.runs.append((stage.folder.parent.name, stage.name))
        stage.folder.mkdir(exist_ok=True)
        error = out.fail.get(out.runs[-1])
        if error:
            raise error
        parents = [float((stage.folder.parent / p / "loss.txt").read_text()) for p in stage.parents]
        args = stage.sections["args"]
        loss = (
            sum(parents) + abs(args.get("learning_rate", 2e-3) - 2e-3) + args.get("weight_decay", 0) + stage.seed / 1e6
        )
        (stage.folder / "loss.txt").write_text(str(loss))
        (stage.folder / "model.txt").write_text(f"{stage.name} {len(out.runs)}")
        return {"eval_loss": loss, "eval_kl": args.get("learning_rate", 5.0), "size": loss, "history": []}

    def start(words):
        try:
            return run_here.run(words[0], list(words[1:]), []), "", False
        except Exception as error:
            return 1, str(error), False

    fake = types.SimpleNamespace(**{k: getattr(sft, k) for k in ("DEFAULTS", "problems")}, run=run)
    monkeypatch.setattr("pipelines.recipe.stage.Stage.module", fake)
    monkeypatch.setattr(sweep, "start", start)
    monkeypatch.chdir(tmp_path)
    out.sweep = lambda *words: __main__.main(["sweep", str(path), *words])
    return out


def found(folder):
    return json.loads((folder / "sweep.json").read_text())


def state_of(folder):
    """Name, content and time of every file below a folder."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_only_what_differs_is_trained_and_earlier_stages_are_linked(three, capsys):
    chain.run(recipe_recipe.load(three.path))
    three.runs.clear()
    before = {name: state_of(three.out / name) for name in ("one", "two", "three")}
    assert three.sweep(f"{RATE}=1e-3,2e-3,4e-3") == 0
    # the first value is the recipe's own, which is finished; `one` is nobody's difference
    assert three.runs == [("2e-3", "two"), ("2e-3", "three"), ("4e-3", "two"), ("4e-3", "three")]
    folder = three.root / "two.learning_rate"
    assert (folder / "1e-3" / "three").resolve() == three.out / "three"
    assert os.readlink(folder / "4e-3" / "one") == "../../../one"  # relative: the run may move
    for name, files_ in before.items():
        assert state_of(three.out / name) == files_
    # the record of a trained stage names what it was really built on, and the point is a run like any other
    point = recipe_recipe.load(three.path, [f"{RATE}=2e-3", f"output_dir={folder / '2e-3'}"])
    assert [s.action for s in chain.plan(point)] == ["finished"] * 3
    assert [p["metric"] for p in found(folder)["points"]] == pytest.approx([0.101042 + 8.4e-5, 0.100126, 0.102126])
    shown = capsys.readouterr().out
    table = [line.split() for line in shown.splitlines() if line.startswith("  0.00")]
    assert [row[0] for row in table] == ["0.002", "0.001", "0.004"] and table[0][-1] == "best"
    assert '"log10 of' not in (page := (folder / "sweep.html").read_text()) and "three/eval_loss against" in page


def test_stages_that_no_key_changes_are_trained_once_in_the_recipes_own_run(three):
    assert three.sweep(f"{BETA}=0,0.1") == 0
    assert three.runs == [("out", "one"), ("out", "two"), ("0", "three"), ("0.1", "three")]
    result = found(three.root / "three.weight_decay")
    assert result["shared"] == ["one", "two"] and result["metric"] == "three/eval_loss" and result["lower_is_better"]


def test_a_product_shares_what_some_points_have_in_common(three):
    assert three.sweep(f"{RATE}=1e-3,2e-3", f"{BETA}=0,0.2") == 0
    assert [run for run in three.runs if run[1] == "two"] == [("1e-3,0", "two"), ("2e-3,0", "two")]
    assert len([run for run in three.runs if run[1] == "three"]) == 4
    folder = three.root / "two.learning_rate,three.weight_decay"
    assert (folder / "1e-3,0.2" / "two").resolve() == folder / "1e-3,0" / "two"
    assert (
        found(folder)["spent"] <= sum(p["seconds"] for p in found(folder)["points"]) + found(folder)["shared_seconds"]
    )
    three.runs.clear()
    assert three.sweep(f"{BETA}=0,0.2,0.3", f"{RATE}=2e-3") == 0  # another sweep finds what this one made
    assert [run for run in three.runs if run[1] == "two"] == []
    assert [run[0] for run in three.runs if run[1] == "three"] == ["0.3"]


def test_only_the_stages_named_and_what_they_build_on_are_trained(three):
    assert three.sweep("two", f"{RATE}=1e-3,2e-3") == 0
    assert {name for _, name in three.runs} == {"one", "two"}
    assert found(three.root / "two.learning_rate")["metric"] == "two/eval_loss"
    three.runs.clear()
    assert three.sweep("three", f"{RATE}=1e-3,2e-3") == 0
    assert three.runs == [("1e-3", "three"), ("2e-3", "three")]
    assert three.sweep("three", f"{RATE}=3e-3,4e-3") == 0  # what it builds on differs, too
    assert three.runs[2:] == [("3e-3", "two"), ("3e-3", "three"), ("4e-3", "two"), ("4e-3", "three")]


def test_the_same_command_goes_on_after_a_kill(three):
    three.fail["2e-3", "three"] = Killed()
    with pytest.raises(Killed):
        three.sweep(f"{RATE}=1e-3,2e-3,4e-3")
    assert [p["state"] for p in found(three.root / "two.learning_rate")["points"]] == ["finished", "due", "due"]
    kept = state_of(three.root / "two.learning_rate" / "1e-3" / "three")
    three.fail.clear()
    three.runs.clear()
    assert three.sweep(f"{RATE}=1e-3,2e-3,4e-3") == 0
    assert three.runs == [("2e-3", "three"), ("4e-3", "two"), ("4e-3", "three")]
    assert state_of(three.root / "two.learning_rate" / "1e-3" / "three") == kept
    three.runs.clear()
    assert three.sweep(f"{RATE}=1e-3,2e-3,4e-3") == 0 and three.runs == []


def test_a_point_whose_folder_is_deleted_is_made_again_and_no_other(three, capsys):
    words = (f"{RATE}=1e-3,2e-3", f"{BETA}=0,0.2")
    assert three.sweep(*words) == 0
    folder = three.root / "two.learning_rate,three.weight_decay"
    kept = state_of(folder / "1e-3,0")
    three.runs.clear()
    shutil.rmtree(folder / "2e-3,0.2")  # its `two` is a link into the point before it
    assert three.sweep(*words) == 0 and three.runs == [("2e-3,0.2", "three")]
    assert state_of(folder / "1e-3,0") == kept
    three.runs.clear()
    shutil.rmtree(folder / "2e-3,0")  # where the other point's link leads to
    assert three.sweep(*words) == 2 and three.runs == []
    shown = capsys.readouterr().err
    assert "2e-3,0.2: three" in shown and "two, whose folder is gone" in shown and "move the folder of a point" in shown
    shutil.rmtree(folder / "2e-3,0.2")
    assert three.sweep(*words) == 0 and three.runs == [("2e-3,0", "two"), ("2e-3,0", "three"), ("2e-3,0.2", "three")]


def test_a_point_that_fails_is_recorded_and_the_others_go_on(three, capsys):
    three.fail["2e-3", "two"] = RuntimeError("the loss is NaN at step 7")
    assert three.sweep(f"{RATE}=1e-3,2e-3,4e-3") == 1
    result = found(three.root / "two.learning_rate")
    assert [p["state"] for p in result["points"]] == ["finished", "failed", "finished"]
    assert result["points"][1]["error"] == "the loss is NaN at step 7" and result["points"][1]["metric"] is None
    assert "the loss is NaN at step 7" in capsys.readouterr().out
    assert "the loss is NaN" in (three.root / "two.learning_rate" / "sweep.html").read_text()
    three.fail.clear()
    assert three.sweep(f"{RATE}=1e-3,2e-3,4e-3") == 0


def test_a_stage_of_all_points_that_fails_ends_the_sweep(three, capsys):
    three.fail["out", "one"] = RuntimeError("no memory")
    assert three.sweep(f"{RATE}=1e-3,2e-3") == 1
    assert "no point was started: no memory" in capsys.readouterr().err and three.runs == [("out", "one")]


def test_a_run_with_other_settings_in_the_output_folder_is_left_alone(three, capsys):
    chain.run(recipe_recipe.load(three.path))
    before = state_of(three.out / "two")
    three.runs.clear()
    assert three.sweep(f"{RATE}=2e-3", f"{BETA}=0,0.2") == 0
    assert three.runs == [("0", "two"), ("0", "three"), ("0.2", "three")] and state_of(three.out / "two") == before
    assert "learning_rate (0.001 then, 0.002 now)" in capsys.readouterr().out
    assert (three.root / "three.weight_decay" / "0.2" / "one").resolve() == three.out / "one"


@pytest.mark.parametrize(
    "words, hints",
    [
        (["stages.two.args.lerning_rate=1,2"], ["1 problem", "did you mean learning_rate", "(so with 2)"]),
        (["stages.two.args.learning_rate=1e-3,-1,-2"], ["1 problem", "learning_rate = -1", "(so with -2"]),
        ([f"{RATE}=1e-3,abc"], ["1 problem", "'abc'", "must be a number"]),
        (["stages.tow.args.learning_rate=1,2"], ["no 'tow'", "did you mean two"]),
        (["tow", f"{RATE}=1e-3,2e-3"], ["no stage 'tow'", "did you mean two"]),
        ([f"{RATE}=1e-3"], ["nothing to sweep"]),
        (["two"], ["nothing to sweep"]),
        ([f"{RATE}=1e-3,,2"], ["no values with commas"]),
        ([f"{RATE}=1,2,1"], ["1 stands there twice"]),
        ([f"{RATE}=1e-3,0.001"], ["would train the same"]),
        (["stages.two.args.logging_steps=1,2"], ["would train the same"]),
        (["two", f"{BETA}=0.1,0.2"], ["would train the same"]),
        ([f"{RATE}=1,2", f"{RATE}=3"], ["given twice"]),
        (["output_dir=a,b"], ["output_dir cannot be swept"]),
        ([f"{RATE}=1e-3,2e-3", "--metric", "tow/loss"], ["--metric", "did you mean two"]),
        ([f"{RATE}=1e-3,2e-3", "--metric", "one/loss"], ["no key changes one"]),
        ([f"{RATE}=1e-3,2e-3", "--metric", "three/politeness"], ["--better higher or --better lower"]),
        ([f"{RATE}=1e-3,2e-3", "--metric", "three/loss", "--better", "higher"], ["better when lower", "drop"]),
        ([f"{RATE}=1e-3,2e-3", "--better", "higher"], ["--better higher is for a --metric"]),
        ([f"{RATE}=1e-3,2e-3", "--random", "0"], ["--random 0"]),
        ([f"{RATE}=1e-3,2e-3", "--on", "cpu_22"], ["did you mean cpu_2"]),
        ([f"seed={','.join(map(str, range(501)))}"], ["501 points are too many"]),
    ],
)
def test_what_is_wrong_is_one_error_before_anything_starts(three, capsys, words, hints):
    assert three.sweep(*words) == 2
    shown = capsys.readouterr().err
    assert all(hint in shown for hint in hints), shown
    assert three.runs == [] and not three.out.exists()


def test_points_made_with_other_settings_are_refused_before_anything_starts(three, capsys):
    assert three.sweep(f"{RATE}=1e-3,2e-3") == 0
    three.runs.clear()
    assert three.sweep(f"{RATE}=1e-3,2e-3", f"{BETA}=0.3") == 2
    assert "weight_decay (0.1 then, 0.3 now)" in (shown := capsys.readouterr().err) and "move the folder" in shown
    assert three.runs == []


def test_a_run_that_outlived_a_killed_sweep_is_waited_for(three, capsys):
    folder = three.root / "two.learning_rate" / "2e-3"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert three.sweep(f"{RATE}=1e-3,2e-3") == 2
    assert f"still working in {folder}" in capsys.readouterr().err and three.runs == []


def test_a_metric_that_is_not_there_is_named_after_the_runs_and_found_by_the_next_command(three, capsys):
    assert three.sweep(f"{RATE}=1e-3,2e-3", "--metric", "three/los", "--better", "lower") == 2
    assert "did you mean loss" in capsys.readouterr().err
    three.runs.clear()
    assert three.sweep(f"{RATE}=1e-3,2e-3", "--metric", "three/loss") == 0 and three.runs == []
    assert [p["kl"] for p in found(three.root / "two.learning_rate")["points"]] == [5.0, 5.0]
    assert three.sweep(f"{RATE}=1e-3,2e-3", "--metric", "two/loss") == 0  # the KL is that of the stage compared
    assert [p["kl"] for p in found(three.root / "two.learning_rate")["points"]] == [1e-3, 2e-3]


def test_what_is_better_of_a_metric_that_does_not_say_is_an_option(three):
    for better in ("higher", "lower"):
        assert three.sweep(f"{RATE}=1e-3,2e-3", "--metric", "three/size", "--better", better) == 0
        result = found(three.root / "two.learning_rate")
        assert result["lower_is_better"] == (better == "lower") and result["metric"] == "three/size"
        best = next(
            line for line in (three.root / "two.learning_rate" / "sweep.html").read_text().split("<tr>") if "★" in line
        )
        assert ("0.002" in best) == (better == "lower"), best
    page = (three.root / "two.learning_rate" / "sweep.html").read_text()
    headings = re.findall(r"<h[12]>(.*?)</h[12]>", page)
    assert len(set(headings)) == len(headings) == 2 and sum("two.learning_rate" in one for one in headings) == 1


def test_a_report_shows_the_sweeps_of_its_run(three):
    assert three.sweep(f"{RATE}=1e-3,2e-3") == 0
    assert "Sweep of two.learning_rate" in (three.out / "report.html").read_text()
    (three.root / "two.learning_rate" / "sweep.json").write_text('{"recipe": 3}')
    run_here.draw(three.out)
    assert "sweep.json is damaged" in (three.out / "report.html").read_text()


# --- the points ---


@pytest.mark.parametrize(
    "text, values",
    [
        ("1,2", ["1", "2"]),
        ("1e-4, 2e-4", ["1e-4", "2e-4"]),
        ("[0.9, 0.95],[0.9, 0.99]", ["[0.9, 0.95]", "[0.9, 0.99]"]),
        ("\"a,b\",'c'", ['"a,b"', "'c'"]),
        ("{a: 1, b: 2},null", ["{a: 1, b: 2}", "null"]),
        ("", [""]),
        ("runs/x", ["runs/x"]),
        ("1,", None),
        (",1", None),
        ("a],[b", None),
        ("a] #", None),
        ("[1,2", None),
    ],
)
def test_values_are_split_as_yaml_splits_a_list(text, values):
    assert split_values(text) == values


def test_random_draws_the_same_points_every_time_and_more_of_them_with_a_larger_number():
    values = {"a": [str(i) for i in range(100)], "b": [str(i) for i in range(100)], "c": ["x", "y"]}
    ten, twenty = points.product(values, 10), points.product(values, 20)
    assert ten == points.product(values, 10) and len(ten) == 10
    assert all(point in twenty for point in ten) and len({tuple(p.values()) for p in twenty}) == 20
    assert (
        points.product({"a": ["1", "2"], "b": ["3", "4"]}, 9)
        == [{"a": a, "b": b} for a in "12" for b in "34"]
        == points.product({"a": ["1", "2"], "b": ["3", "4"]})
    )


def test_folders_are_safe_and_tell_values_apart():
    words = ["1e-4", ".5", "-1", "a/b", "a b", "../..", "", "null ", "ä", "x" * 300, "x" * 301, '"a,b"', "$(rm)", "~"]
    names = [points.folder_name([word]) for word in words]
    assert len(set(names)) == len(names) and names[0] == "1e-4"
    assert all(re.fullmatch(r"[\w+-][\w.,+-]{0,110}", name, re.ASCII) for name in names), names
    assert points.folder_name(["a-b", "c"]) != points.folder_name(["a", "b-c"])
    keys = ["stages.policy.args.kl_coef", "stages.sft.data.train", "seed", "stages.sft.model"]
    assert [points.short(key) for key in keys] == ["policy.kl_coef", "sft.data.train", "seed", "sft.model"]


# --- what is shown ---


def test_names_cannot_break_out_of_the_page(tmp_path):
    rows = [Row(EVIL, {EVIL: EVIL, "n": n}, "finished", n / 7, kl=n / 3, error="") for n in (1, 2)]
    rows.append(Row("bad", {EVIL: 1, "n": 3}, "failed", error=EVIL))
    sweeps.write(tmp_path, Sweep(EVIL, [EVIL, "n"], metric=f"a/{EVIL}", shared=[EVIL], points=rows))
    page = (tmp_path / "sweep.html").read_text()
    tags = set()

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.add(tag)
            assert not any(name in ("src", "href") or name.startswith("on") for name, _ in attrs)

    Tags().feed(page)
    assert not {"script", "img", "link", "iframe"} & tags and "default-src 'none'" in page
    ET.fromstring(re.search(r"<svg.*?</svg>", page, re.S).group())
    assert sweeps.read(tmp_path / "sweep.json").points == rows


def test_the_best_is_the_highest_or_the_lowest_and_never_nan():
    rows = [Row(str(m), {"k": i}, "finished", m) for i, m in enumerate([2.0, float("nan"), 1.0, 3.0])]
    rows.append(Row("none", {"k": 9}, "failed", error="x"))
    order = lambda lower: [p.name for p in Sweep("r", ["k"], "s/m", lower, points=rows).best_first()]
    assert order(True) == ["1.0", "2.0", "3.0", "nan", "none"] and order(False) == ["3.0", "2.0", "1.0", "nan", "none"]


def test_means_over_seeds():
    rows = [
        Row("", {"k": k, "seed": s}, "finished", m) for k, s, m in [(1, 1, 1.0), (1, 2, 3.0), (2, 1, 5.0), (2, 2, 5.0)]
    ]
    head, table = sweeps.over_seeds(Sweep("r", ["k", "seed"], "s/m", points=rows))
    assert head == ["k", "mean s/m", "standard deviation", "seeds"]
    assert table == [["2", "5", "0", "2"], ["1", "2", "1.41", "2"]]
    assert sweeps.over_seeds(Sweep("r", ["k"], "s/m", points=rows))[1] == []


# --- the process of a point ---


def python(code):
    return launch.run_apart([sys.executable, "-c", code])


def test_why_a_run_failed_is_its_last_error_in_one_line(capfd):
    code = "import sys; print('loss 1', file=sys.stderr); print('error: a\\n  b', file=sys.stderr); sys.exit(2)"
    assert python(code) == (2, "a b", False)
    assert "loss 1" in capfd.readouterr().err  # shown while it runs
    assert python("raise RuntimeError('no memory')")[:2] == (1, "RuntimeError: no memory")
    assert python("import os; os.kill(os.getpid(), 9)")[1] == "killed by SIGKILL (out of memory?)"
    assert python("print(1)") == (0, "", False)
    assert python("raise SystemExit(3)")[1] == "exit code 3"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_reaches_the_run_once_and_waits_for_it(number):
    code = (
        "import signal, sys, time; n = []\n"
        "for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, lambda *a: n.append(a))\n"
        "print('ready', file=sys.stderr, flush=True)\n"
        "for _ in range(3000): n or time.sleep(0.01)\n"
        "time.sleep(0.3); sys.exit(100 + len(n))"
    )
    before = signal.signal(number, handler := lambda *_: None)  # a job in the background ignores SIGINT
    try:
        threading.Timer(3.0, lambda: os.kill(os.getpid(), number)).start()
        assert python(code)[::2] == (101, True)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


@pytest.mark.slow
def test_a_real_sweep(recipe, write, tiny_gpt2, tmp_path):
    data = write("a.jsonl", ROWS)
    stage = lambda base: {
        "kind": "sft",
        "model": {"model_name_or_path": base},
        "data": {"train": data, "validation": 0.2},
        "args": {"max_steps": 2, "global_batch_size": 4, "learning_rate": 1e-3},
    }
    path = recipe({"one": stage(str(tiny_gpt2)), "two": stage("stage:one")})
    root = Path(__file__).parents[2]
    line = [sys.executable, "-m", "pipelines", "sweep", str(path), "stages.two.args.learning_rate=1e-4,1e-2"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(line, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "out" / "sweep" / "two.learning_rate"
    assert [p["state"] for p in found(folder)["points"]] == ["finished", "finished"]
    assert len({p["metric"] for p in found(folder)["points"]}) == 2 and "★ best" in done.stdout
    assert (folder / "1e-4" / "one" / "model.safetensors").samefile(tmp_path / "out" / "one" / "model.safetensors")
    assert files.read_record(folder / "1e-2" / "two" / files.FINISHED)["record"]["parents"].keys() == {"one"}
