"""One rule for all paths of a recipe: `~/` is the home folder, nothing is the working directory by accident, and what can
be no path is a sentence."""

import io
import os
import pwd

import pytest

from pipelines.__main__ import main
from pipelines.data import sources
from pipelines.recipe.recipe import load
from pipelines.recipe.stage import resolve

ROWS = [{"prompt": "what", "completion": "this"}] * 8
ODD = ["", " ", "~", "~/not there", "~nosuchuser/x", "/", ".", "a" * 300, "x/" + "a" * 300, "/tmp/" + "a" * 300, "loop"]
ODD += ["loop/x", "rows.jsonl/x", "gone", "stage:", "{% if a %}" * 200]
KEYS = {  # a stage that names a path there
    "data.train": ("sft", {}),
    "data.validation": ("sft", {}),
    "model.model_name_or_path": ("sft", {}),
    "model.tokenizer_name_or_path": ("sft", {}),
    "model.chat_template": ("sft", {}),
    "reward.models": ("ppo", {}),
    "reward.critic": ("ppo", {"reward": {"models": ["stage:x"]}}),
    "sample.models": ("sample", {}),
    "rank.judgements": ("rank", {}),
    "evaluate.models": ("evaluate", {"evaluate": {"text": "rows.jsonl"}}),
    "evaluate.text": ("evaluate", {"evaluate": {"models": ["gpt2"]}}),
    "evaluate.judge": ("evaluate", {"evaluate": {"models": ["gpt2"], "prompts": "rows.jsonl"}}),
    "evaluate.tasks": ("evaluate", {"evaluate": {"models": ["gpt2"]}}),
}


@pytest.fixture
def here(tmp_path, monkeypatch, write):
    """An empty home and working directory with some rows, links to nothing and to themselves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    write("rows.jsonl", ROWS)
    os.symlink("loop", "loop")
    os.symlink("nowhere", "gone")
    return tmp_path


@pytest.mark.parametrize("at", KEYS)
def test_no_path_is_a_traceback_or_the_working_directory(here, recipe, capsys, at):
    kind, more = KEYS[at]
    section, _, key = at.partition(".")
    for odd in ODD:
        body = {"kind": kind, **({} if kind == "evaluate" else {"data": {"train": "rows.jsonl"}}), **more}
        if kind in ("sft", "ppo"):
            body["model"] = {"model_name_or_path": "gpt2"}
        value = [odd] if key in ("models", "tasks") else odd
        body[section] = {**body.get(section, {}), key: value}
        (here / "config.json").write_text("{}")  # as if the command were given in a model's folder
        assert main(["check", str(recipe({"s": body}))]) == 2, (at, odd)
        _, err = capsys.readouterr()
        assert err.startswith("error: "), (at, odd)
        if not odd.strip() and at != "model.chat_template":
            assert at in err or "who ranks?" in err, (at, odd, err)


@pytest.mark.parametrize("odd, why", [
    ("", "must name a folder"),
    (" ", "must name a folder"),
    ("~nosuchuser/x", "no home folder ~nosuchuser"),
    ("a" * 300, "at most 255 bytes"),
    ("ä" * 130, "at most 255 bytes"),
    ("x/" + "a" * 300, "at most 255 bytes"),
    ("rows.jsonl", "rows.jsonl is a file"),
    ("rows.jsonl/x/y", "rows.jsonl is a file"),
    ("gone", "gone is a link to what is not there"),
    ("loop/x", "loop is a link to what is not there"),
])  # fmt: skip
def test_a_run_needs_a_folder(here, recipe, capsys, odd, why):
    stage = {"kind": "sft", "model": {"model_name_or_path": "gpt2"}, "data": {"train": "rows.jsonl"}}
    for verb in ("check", "run", "status"):
        assert main([verb, str(recipe({"s": stage}, output_dir=odd))]) == 2
        assert why in capsys.readouterr().err, verb
    assert not (here / "~nosuchuser").exists()


def test_the_home_folder_is_found_in_every_path(here, recipe):
    user = pwd.getpwuid(os.getuid()).pw_name
    (here / "home" / "rows.jsonl").write_text("{}\n")
    for value in ("~/m", f"~{user}/m"):
        assert resolve(value, here) == os.path.expanduser(value) != value
    assert resolve(["~", "~5 items", "~a b/c", "a~/b"], here) == ["~", "~5 items", "~a b/c", "a~/b"]
    assert [str(p) for p in sources.files("~/*.jsonl")] == [str(here / "home" / "rows.jsonl")]
    assert sources.files("~nosuchuser/*.jsonl") == []
    stage = {"kind": "sft", "model": {"model_name_or_path": "Qwen/Qwen3-0.6B"}, "data": {"train": "rows.jsonl"}}
    assert load(recipe({"s": stage}, output_dir="~/runs"))["s"].folder == here / "home" / "runs" / "s"


@pytest.mark.parametrize(
    "line", [["report"], ["chat"], ["push", "you/m"], ["rank"], ["evaluate", "--text", "rows.jsonl"]]
)
def test_verbs_take_no_path_that_can_be_none(here, capsys, monkeypatch, line):
    for odd in ("a" * 300, "rows.jsonl/x", "loop", "~nosuchuser/x"):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
        assert main([line[0], odd, *line[1:]]) == 2, odd
        assert capsys.readouterr().err.startswith("error: "), odd
