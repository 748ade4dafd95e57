"""Verbs that use a finished stage: nothing edited passes for what was trained, and nothing needs to be writable."""

import io
import json
import os
import shutil
import subprocess

import pytest

from pipelines import files
from pipelines.__main__ import main
from pipelines.commands.run_here import run_and_report
from pipelines.errors import RecordError
from pipelines.models import loading
from pipelines.models.config import ModelSection
from pipelines.recipe.recipe import load

ROWS = [{"prompt": f"what colour is the {w}", "completion": f"the {w} is red"} for w in "cat dog bird fish".split()] * 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_gpt2):
    """`(recipe, folder of its run)` of a finished sft stage."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "text.txt").write_text("the cat is red and the dog is blue\n" * 4)
    stage = {
        "kind": "sft",
        "model": {"model_name_or_path": str(tiny_gpt2), "chat_template": "plain"},
        "data": {"train": str(folder / "rows.jsonl")},
        "args": {"global_batch_size": 4, "max_steps": 1, "max_length": 32, "report_to": []},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"output_dir": str(folder / "out"), "stages": {"sft": stage}}))
    run_and_report(load(path), [], [])
    return path, folder / "out"


def flip(path, keep_time):
    before, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def verbs(stage, recipe):
    """Command lines that use the weights of a stage."""
    return [
        ["chat", str(stage), "--max-new-tokens", "2", "--temperature", "0"],
        ["evaluate", str(stage), "--text", str(recipe.parent / "text.txt")],
        ["push", str(stage), "you/model", "--dry-run"],
    ]


@pytest.mark.parametrize("keep_time", [False, True])
def test_edited_weights_are_refused_by_name_wherever_they_are_used(finished, tmp_path, monkeypatch, capsys, keep_time):
    recipe, out = finished
    stage = tmp_path / "run" / "sft"
    shutil.copytree(out / "sft", stage)
    flip(stage / "model.safetensors", keep_time)
    for line in verbs(stage, recipe):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
        assert main(line) == 2, line
        _, err = capsys.readouterr()
        assert f"{stage}: changed since the stage was finished: model.safetensors holds other bytes" in err, line
        assert "--redo sft" in err and "Traceback" not in err
    if not keep_time:  # by its path in another recipe: size and time are looked at
        with pytest.raises(RecordError, match="model.safetensors holds other bytes"):
            loading.load_model(ModelSection(model_name_or_path=str(stage)), "AutoModelForCausalLM")
    (stage / "stage.json").unlink()  # a folder of its own now
    loading.load_model(ModelSection(model_name_or_path=str(stage)), "AutoModelForCausalLM")


def test_every_file_that_is_read_with_a_model_is_looked_at(finished, tmp_path):
    _, out = finished
    stage = tmp_path / "sft"
    shutil.copytree(out / "sft", stage, copy_function=shutil.copyfile)  # other times, the same bytes
    files.refuse_edited(stage)
    read = sorted(p.name for p in stage.iterdir() if p.is_file() and p.name not in ("stage.json", "history.jsonl"))
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(read)
    for name in read:
        whole = (stage / name).read_bytes()
        for damage in (whole[:-1], b"", bytes([whole[0] ^ 1]) + whole[1:], None):
            (stage / name).unlink() if damage is None else (stage / name).write_bytes(damage)
            if name == "README.md":  # for people to edit
                files.refuse_edited(stage)
            else:
                with pytest.raises(RecordError, match=name):
                    files.refuse_edited(stage)
            (stage / name).write_bytes(whole)
    files.refuse_edited("gpt2")
    files.refuse_edited(tmp_path)


@pytest.fixture
def read_only():
    """`read_only(folder)` lets nobody write there: by rights, or by a read-only mount for root, whom rights do not
    bind.
    """
    undo = []

    def read_only_(folder):
        for path in [folder, *folder.rglob("*")]:
            path.chmod(path.stat().st_mode & ~0o222)
        undo.append(lambda: [p.chmod(p.stat().st_mode | 0o200) for p in [folder, *folder.rglob("*")]])
        if os.access(folder, os.W_OK):
            bind = ["mount", "--bind", str(folder), str(folder)]
            if not shutil.which("mount") or subprocess.run(bind, capture_output=True).returncode:
                pytest.skip("root may write everywhere, and this machine allows no mounts")
            undo.append(lambda: subprocess.run(["umount", "-l", str(folder)], check=True))
            subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)

    yield read_only_
    for step in reversed(undo):
        step()


def test_a_read_only_run_can_be_used(finished, tmp_path, monkeypatch, capsys, read_only):
    recipe, out = finished
    monkeypatch.chdir(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    read_only(out)
    with pytest.raises(OSError):
        (out / "x").write_text("x")
    lines = verbs(out / "sft", recipe)
    lines += [[verb, str(recipe)] for verb in ("run", "check", "status", "plan")]
    lines += [["report", str(out)], ["status", str(recipe), "--verify"], ["show", str(recipe), "sft"]]
    lines += [["chat", str(out), "--max-new-tokens", "2"]]
    for line in lines:
        monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
        assert main(line) == 0, (line, capsys.readouterr())
        _, err = capsys.readouterr()
        assert "Traceback" not in err and "not allowed" not in err, line
    assert (tmp_path / "out-report.html").is_file()
    assert main(["run", str(recipe), "--redo", "sft"]) == 1
    assert f"{out} cannot be written to, and sft must be made there" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
