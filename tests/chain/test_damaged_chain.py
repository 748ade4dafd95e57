"""What happened to a run's folder behind its back is said truly, by name, with the way out; the rest goes on."""

import errno
import json
import os
import shutil

import pytest

from pipelines import files
from pipelines.__main__ import main
from pipelines.chain import chain, record
from pipelines.commands import status
from pipelines.commands.run_here import draw, run_and_report
from pipelines.errors import ChainError, RecordError, StorageError


def actions(recipe, *args, **kwargs):
    return [(s.stage.name, s.action) for s in chain.plan(recipe, *args, **kwargs)]


def edit(path, text="edited"):
    path.write_text(text)
    os.utime(path, ns=(1, 1))


def test_edited_files_of_a_finished_stage_are_refused_by_name(two):
    chain.run(two.load())
    folder = two.load()["one"].folder
    edit(folder / "README.md")  # the card is for people to edit
    assert actions(two.load()) == [("one", "finished"), ("two", "finished")]
    edit(folder / "model.txt", "2")  # as many bytes as before
    for names in ([], ["two"]):
        with pytest.raises(ChainError) as error:
            chain.plan(two.load(), names)
        text = str(error.value)
        assert text.count(str(folder / "model.txt")) == 1 and "changed since the stage was finished" in text
        assert "--redo one" in text and "made again since" not in text
    (folder / "model.txt").unlink()
    with pytest.raises(ChainError, match="model.txt is missing: changed since"):
        chain.plan(two.load())
    chain.run(two.load(), redo=["one"])
    assert two.runs == ["one", "two", "one", "two"]


def test_a_flip_that_leaves_size_and_time_is_found_when_a_stage_is_built_on_it(two):
    chain.run(two.load(), names=["one"])
    path = two.load()["one"].folder / "model.txt"
    before = path.stat()
    path.write_text("7")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert actions(two.load()) == [("one", "finished"), ("two", "start")]  # a look does not read gigabytes
    with pytest.raises(RecordError, match="two: .*model.txt holds other bytes than were written"):
        chain.run(two.load())
    assert two.runs == ["one"]
    with pytest.raises(ChainError, match="holds other bytes"):
        status.main([str(two.path), "--verify"])


def test_verify_reads_everything(two, capsys):
    chain.run(two.load())
    assert status.main([str(two.path), "--verify"]) == 0
    assert "one: 3 files" in capsys.readouterr().out
    folder = two.load()["one"].folder
    (folder / "adapter_model.bin").write_text("x")
    (folder / "history.jsonl").write_text("{}\n")
    final = json.loads((folder / "stage.json").read_text())
    (folder / "stage.json").write_text(json.dumps({**final, "metrics": {"loss": 0.1}}))
    with pytest.raises(ChainError) as error:
        status.main([str(two.path), "--verify"])
    for word in ("adapter_model.bin was added", "history.jsonl has", "stage.json was edited"):
        assert word in str(error.value)


def test_what_became_of_a_parent_is_said_truly(two):
    chain.run(two.load())
    folder = two.load()["one"].folder
    shutil.move(folder, folder.with_name("elsewhere"))
    with pytest.raises(ChainError, match="it builds on one, whose folder is gone"):
        chain.plan(two.load())
    shutil.move(folder.with_name("elsewhere"), folder)
    assert actions(two.load()) == [("one", "finished"), ("two", "finished")]
    final = json.loads((folder / "stage.json").read_text())
    edited = {**final, "record": {**final["record"], "seed": 42, "note": "mine"}}
    (folder / "stage.json").write_text(json.dumps(edited))
    with pytest.raises(ChainError, match="it builds on one, whose stage.json was edited since"):
        chain.plan(two.load(), ["two"])
    (folder / "stage.json").write_text(json.dumps({**final, "finished": files.now()}))
    with pytest.raises(ChainError, match="it builds on one, made again since"):
        chain.plan(two.load(), ["two"])


def test_a_record_without_checksums_is_of_an_earlier_version_and_passes(two):
    chain.run(two.load())
    path = two.load()["one"].folder / "stage.json"
    final = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in final.items() if k not in ("files", "checksum")}))
    assert actions(two.load()) == [("one", "finished"), ("two", "finished")]
    assert status.main([str(two.path), "--verify"]) == 0


BROKEN = {"empty": b"", "half": b'{"record": {"kind"', "binary": b"\xff\x00\xfe", "other": b"[]"}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("name", ["stage.json", "started.json", "chain.json", "history.jsonl", "log.jsonl"])
def test_damaged_records_are_named_everywhere_and_nothing_is_overwritten(two, capsys, name, how):
    chain.run(two.load(), names=["one"])
    two.fail.append("two")
    with pytest.raises(RuntimeError):
        chain.run(two.load())
    one, other = two.load()["one"].folder, two.load()["two"].folder
    files.append_rows(other / "checkpoints" / files.LOG, [{"step": 0, "max_steps": 4, "time": 1.0}])
    path = {
        "stage.json": one,
        "started.json": other,
        "chain.json": one.parent,
        "history.jsonl": one,
        "log.jsonl": other / "checkpoints",
    }[name] / name
    broken = BROKEN[how] + (b"\n" if name.endswith("jsonl") and how != "empty" else b"")
    path.write_bytes(broken)
    capsys.readouterr()
    verdict = main(["report", str(one.parent)])
    out, err = capsys.readouterr()
    assert verdict == 0 and "Traceback" not in err
    page = (one.parent / "report.html").read_text()
    assert ">one <" in page and ">two <" in page
    harmless = how == "empty" and name.endswith("jsonl")  # a log without any line
    if not harmless:
        assert str(path) in page and f"{path} is damaged" in (err + page)
    code = main(["status", str(two.path)])
    out, err = capsys.readouterr()
    assert "one  " in out and "two  " in out and "Traceback" not in err
    if name in ("stage.json", "started.json"):
        assert code == 2 and f"{path} is damaged" in err and "--redo" in err and err.count(str(path)) == 1
    two.fail.clear()
    try:
        chain.run(two.load())
    except RecordError as error:
        assert str(path) in str(error)
        assert path.read_bytes() == broken
    except ChainError as error:
        assert str(path) in str(error) and "made again since" not in str(error)
        assert path.read_bytes() == broken
    else:
        assert harmless or name in ("chain.json", "history.jsonl")
        if name == "chain.json":
            (kept,) = (one.parent / ".damaged").iterdir()
            assert kept.read_bytes() == broken


def test_a_stage_with_a_damaged_record_can_be_made_again(two):
    chain.run(two.load())
    (two.load()["one"].folder / "stage.json").write_bytes(b"")
    with pytest.raises(ChainError, match="stage.json is damaged .it is empty.: .*--redo one"):
        chain.plan(two.load())
    chain.run(two.load(), redo=["one"])
    assert two.runs == ["one", "two", "one", "two"]


def test_the_same_redo_goes_on_where_it_was_killed(two):
    chain.run(two.load())
    two.fail.append("two")
    for _ in range(2):
        with pytest.raises(RuntimeError):
            chain.run(two.load(), redo=["one"])
    assert two.runs == ["one", "two", "one", "two", "two"]  # "one" is made again once
    assert len(list((two.load().output_dir / ".replaced").iterdir())) == 2
    two.fail.clear()
    chain.run(two.load(), redo=["one"])
    assert two.runs[5:] == ["two"] and not (two.load().output_dir / files.REDO).exists()
    chain.run(two.load(), redo=["one"])  # a new one
    assert two.runs[6:] == ["one", "two"]


def test_a_redo_that_was_killed_between_its_steps_goes_on(two, monkeypatch):
    chain.run(two.load())
    real, calls = files.write_json, []

    def write(path, value):
        calls.append(path.name)
        if len(calls) == number:
            raise KeyboardInterrupt
        real(path, value)

    for number in range(1, 9):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(files, "write_json", write)
            patch.setattr(record, "write_json", write)
            try:
                chain.run(two.load(), redo=["one"])
            except KeyboardInterrupt:
                pass
        ran = len(two.runs)
        chain.run(two.load(), redo=["one"])
        assert len(two.runs) - ran <= 2 and not (two.load().output_dir / files.REDO).exists(), (number, calls)
        assert actions(two.load()) == [("one", "finished"), ("two", "finished")]


def test_a_redo_with_other_settings_than_the_one_that_was_killed_begins_again(two):
    chain.run(two.load())
    two.fail.append("one")
    with pytest.raises(RuntimeError):
        chain.run(two.load(), redo=["one"])
    two.fail.clear()
    chain.run(two.load("stages.one.args.learning_rate=5e-3"), redo=["one"])
    assert two.runs == ["one", "two", "one", "one", "two"]


def test_a_finished_run_that_is_read_only_is_skipped_and_reported(two, monkeypatch, capsys, tmp_path):
    loaded = two.load()
    chain.run(loaded)
    real = open

    def closed(path, mode="r", *args, **kwargs):
        if set(mode) & set("wax+") and str(path).startswith(str(loaded.output_dir)):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", closed)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    run_and_report(two.load(), [], [])
    assert two.runs == ["one", "two"]
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(loaded.output_dir)]) == 0
    assert "out-report.html" in capsys.readouterr().out and (tmp_path / "out-report.html").is_file()
    with pytest.raises(StorageError, match="cannot be written to, and one, two must be made there"):
        chain.run(two.load(), redo=["one"])


def test_a_report_on_a_full_disk_is_a_word_and_no_failure(two, monkeypatch, caplog):
    chain.run(two.load())

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "report.html")

    monkeypatch.setattr("pipelines.report.page.write", full)
    draw(two.load().output_dir)
    assert "the disk is full" in caplog.text and "Traceback" not in caplog.text


def test_what_a_kill_after_the_record_left_is_cleaned(two):
    chain.run(two.load())
    stage = two.load()["one"]
    (stage.checkpoints / "checkpoint-4").mkdir(parents=True)
    (stage.checkpoints / "checkpoint-4" / "weights").write_text("x")
    (stage.folder / files.STARTED).write_text((stage.folder / files.FINISHED).read_text())
    chain.run(two.load())
    assert two.runs == ["one", "two"]
    assert not stage.checkpoints.exists() and not (stage.folder / files.STARTED).exists()


def test_what_a_killed_run_had_not_written_whole_is_cleaned(two):
    chain.run(two.load())
    stage = two.load()["one"]
    half, tokens = stage.folder / ".samples.jsonl.22477", stage.folder.parent / ".tokens" / "one" / ".tokens.bin.7"
    tokens.parent.mkdir(parents=True, exist_ok=True)
    for path in (half, tokens, kept := stage.folder / ".hidden"):
        path.write_text("x")
    (stage.folder / files.FINISHED).rename(stage.folder / files.STARTED)  # as before its end
    chain.run(two.load(), ["one"])
    assert not half.exists() and not tokens.exists() and kept.exists()
    half.write_text("x")
    chain.run(two.load(), ["one"])  # finished, skipped
    assert not half.exists()
