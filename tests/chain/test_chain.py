"""Finished stages are skipped, changed ones refused by name, interrupted ones resumed; nothing of others is touched."""

import json

import pytest

from pipelines import files
from pipelines.chain import chain, record
from pipelines.commands.run_here import run_and_report
from pipelines.errors import ChainError


def actions(recipe, *args, **kwargs):
    return [(s.stage.name, s.action) for s in chain.plan(recipe, *args, **kwargs)]


def test_stages_run_in_order_once(two):
    chain.run(two.load())
    assert two.runs == ["one", "two"]
    chain.run(two.load())
    assert two.runs == ["one", "two"]
    assert actions(two.load()) == [("one", "finished"), ("two", "finished")]


def test_the_record_says_what_a_stage_was_made_from(two):
    chain.run(two.load())
    one, two_ = (json.loads((two.load()[n].folder / "stage.json").read_text()) for n in ("one", "two"))
    assert one["record"]["sections"]["args"]["learning_rate"] == 1e-3
    (data,) = one["record"]["data"].values()  # under the file's name: the record is published
    assert data["bytes"] > 0 and one["versions"]["torch"] and one["world_size"] == 1
    assert two_["record"]["parents"] == {"one": record.identity(one)}
    assert "learning_rate" in (two.load()["one"].folder / "README.md").read_text()


def test_a_changed_setting_is_refused_by_name_until_redo(two):
    chain.run(two.load())
    with pytest.raises(ChainError) as error:
        chain.plan(two.load("stages.one.args.learning_rate=5e-3"))
    assert "args.learning_rate (0.001 then, 0.005 now)" in str(error.value) and "--redo one" in str(error.value)
    chain.run(two.load("stages.one.args.learning_rate=5e-3"), redo=["one"])
    assert two.runs == ["one", "two", "one", "two"]
    kept = list((two.load().output_dir / ".replaced").iterdir())
    assert len(kept) == 2 and all((k / "model.txt").exists() for k in kept)


def test_a_stage_that_failed_before_its_first_checkpoint_takes_other_settings(two):
    two.fail.append("one")
    with pytest.raises(RuntimeError):
        chain.run(two.load())
    mended = two.load("stages.one.args.learning_rate=5e-3")
    folder = mended["one"].checkpoints
    folder.mkdir()
    (folder / files.LOG).write_text('{"max_steps": 5, "step": 0, "time": 1.0}\n')
    (folder / "checkpoint-1").mkdir()  # stopped while it was written
    assert actions(mended)[0] == ("one", "start") and actions(two.load())[0] == ("one", "resume")
    (folder / "checkpoint-1" / "complete").touch()
    with pytest.raises(ChainError, match="resume with other settings"):
        chain.plan(mended)
    (folder / "checkpoint-1" / "complete").unlink()
    (folder / "answers.jsonl").write_text("{}\n")  # answers that a stage of kind sample had written
    with pytest.raises(ChainError, match="resume with other settings"):
        chain.plan(mended)
    (folder / "answers.jsonl").unlink()
    two.fail.clear()
    chain.run(mended)
    made = json.loads((mended["one"].folder / "stage.json").read_text())
    assert made["record"]["sections"]["args"]["learning_rate"] == 5e-3 and not folder.exists()


def test_the_chain_is_complete_only_when_it_is(two, caplog):
    caplog.set_level("INFO", "pipelines")
    chain.run(two.load(), ["one"])
    assert "still to come: two" in caplog.text and "chain is complete" not in caplog.text
    caplog.clear()
    chain.run(two.load())
    assert "the chain is complete" in caplog.text
    caplog.clear()
    chain.run(two.load("stages.two.args.learning_rate=1e-4"), ["one"])
    assert "not up to date" in caplog.text and "--redo two" in caplog.text and "chain is complete" not in caplog.text


def test_settings_that_cannot_change_the_result_are_not_a_change(two):
    chain.run(two.load())
    harmless = two.load(
        "stages.one.args.logging_steps=1", "stages.one.args.report_to=none", "stages.two.args.save_steps=5"
    )
    assert actions(harmless) == [("one", "finished"), ("two", "finished")]


def test_a_report_is_written_at_the_end_of_a_run_and_of_a_failed_one(two):
    two.fail.append("two")
    with pytest.raises(RuntimeError):
        run_and_report(two.load(), [], [])
    page = two.load().output_dir / "report.html"
    assert "1 of 2" in page.read_text() and "stopped" in page.read_text()
    two.fail.clear()
    run_and_report(two.load(), [], [])
    assert "2 of 2" in page.read_text() and 'http-equiv="refresh"' not in page.read_text()


def test_a_report_that_cannot_be_drawn_is_said_and_the_run_goes_on(two, monkeypatch, caplog):
    monkeypatch.setattr("pipelines.report.page.page", lambda *args: 1 / 0)
    run_and_report(two.load(), [], [])
    assert two.runs == ["one", "two"] and actions(two.load()) == [("one", "finished"), ("two", "finished")]
    warning = next(r for r in caplog.records if "report.html" in r.getMessage())
    assert warning.levelname == "WARNING" and warning.exc_info[0] is ZeroDivisionError


def test_the_time_of_a_stopped_session_counts(two):
    two.fail.append("one")
    with pytest.raises(RuntimeError):
        chain.run(two.load())
    log = two.load()["one"].checkpoints / files.LOG
    log.parent.mkdir()
    log.write_text("".join(json.dumps({"step": 0, "max_steps": 9, "time": t}) + "\n" for t in (0, 50)))
    with open(log, "a") as stream:
        stream.write(json.dumps({"step": 4, "loss": 1.0, "time": 1050}) + "\n" + '{"step": 5, "lo')
    two.fail.clear()
    chain.run(two.load())
    assert 1000 <= json.loads((two.load()["one"].folder / "stage.json").read_text())["seconds"] < 1030


def test_changed_data_is_refused(two):
    chain.run(two.load())
    with open(two.data, "a") as stream:
        stream.write(json.dumps({"prompt": "what is 0", "completion": "a fish"}) + "\n")
    with pytest.raises(ChainError, match="data.*sha256"):
        chain.plan(two.load())


def test_a_parent_made_again_makes_the_child_stale(two):
    chain.run(two.load())
    chain.run(two.load(), names=["one"], redo=["one"])
    folder = two.load()["two"].folder
    assert two.runs == ["one", "two", "one", "two"]  # redo takes what builds on it along
    (folder.parent / "one" / "stage.json").unlink()
    (folder.parent / "one" / "model.txt").unlink()
    (folder.parent / "one" / "README.md").unlink()
    with pytest.raises(ChainError, match="it builds on one, whose stage.json is gone"):
        chain.plan(two.load())


def test_an_interrupted_stage_resumes_and_a_changed_one_does_not(two):
    two.fail.append("two")
    with pytest.raises(RuntimeError):
        chain.run(two.load())
    assert actions(two.load()) == [("one", "finished"), ("two", "resume")]
    checkpoint = two.load()["two"].checkpoints / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete").touch()
    with pytest.raises(ChainError, match="resume with other settings: args.learning_rate"):
        chain.plan(two.load("stages.two.args.learning_rate=1"))
    two.fail.clear()
    chain.run(two.load())
    assert two.runs == ["one", "two", "two"]


def test_a_single_stage_needs_what_it_builds_on(two):
    with pytest.raises(ChainError, match="two: it needs one, not made yet"):
        chain.plan(two.load(), ["two"])
    assert actions(two.load(), ["one", "two"]) == [("one", "start"), ("two", "start")]
    with pytest.raises(ChainError, match="did you mean two?"):
        chain.plan(two.load(), ["twoo"])


def test_a_folder_of_somebody_else_is_never_touched(two):
    folder = two.load()["one"].folder
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ChainError, match="was not made by this chain"):
        chain.run(two.load())
    assert (folder / "thesis.txt").read_text() == "years of work" and two.runs == []


def test_two_runs_in_one_folder_are_refused(two):
    with files.lock(two.load().output_dir, True):
        with pytest.raises(ChainError, match="another run is working"):
            chain.run(two.load())


def test_stage_json_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "stage.json"
    files.write_json(path, {"a": 1})

    def crash(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(OSError):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
