"""Checkpoints that were damaged after they were saved: found, named, set aside, and the run ends as if nothing had
happened.
"""

import errno
import json
import os
import random
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from pipelines import launch
from pipelines.__main__ import main
from pipelines.chain import chain
from pipelines.recipe.recipe import load
from pipelines.training import checkpoints, loop
from pipelines.training.trainer import ChainTrainer

ROWS = [
    {"prompt": f"what colour is the {w}", "completion": f"the {w} is red"} for w in "cat dog bird fish tree".split()
] * 8
HOW = ["truncate", "empty", "delete", "flip"]


class Killed(BaseException):
    """What no handler catches."""


@pytest.fixture
def stage_of(recipe, write, tiny_gpt2):
    """`stage_of(name, **args)` loads a recipe of one sft stage with a folder of its own."""

    def stage_of_(name, **args):
        args = {
            "global_batch_size": 8,
            "max_steps": 8,
            "save_steps": 2,
            "save_total_limit": 3,
            "max_length": 32,
            "learning_rate": 1e-3,
            "report_to": [],
            **args,
        }
        stage = {"kind": "sft", "model": {"model_name_or_path": str(tiny_gpt2), "chat_template": "plain"}, "args": args}
        stage["data"] = {"train": write("rows.jsonl", ROWS), "validation": 0.2}
        return load(
            recipe({"s": stage}, name=f"{name}.yaml", output_dir=str(write(f"{name}/x", "")).removesuffix("/x"))
        )

    return stage_of_


def stop_at(loaded, monkeypatch, step):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop.Progress, "on_step_end", on_step_end)
        with pytest.raises(Killed):
            chain.run(loaded)
    launch.reset()


def damage(path, how, rng):
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
        return
    if how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes({"truncate": data[: len(data) // 2], "empty": b"", "flip": data}[how])


def weights(loaded):
    return load_file(loaded["s"].folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def test_every_damage_to_every_file_of_a_checkpoint_is_found_and_named(stage_of, monkeypatch):
    loaded = stage_of("s")
    stop_at(loaded, monkeypatch, 3)
    (checkpoint,) = checkpoints.all_of(loaded["s"].checkpoints)
    assert checkpoints.damage(checkpoint) == []
    names = sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(names)
    listed = json.loads((checkpoint / checkpoints.COMPLETE).read_text())["files"]
    assert set(listed) == set(names) - {checkpoints.COMPLETE}
    rng = random.Random(0)
    for name in names:
        for how in HOW:
            path, whole = checkpoint / name, (checkpoint / name).read_bytes()
            damage(path, how, rng)
            if name == checkpoints.COMPLETE and how == "delete":
                assert checkpoints.last_checkpoint(checkpoint.parent) is None  # it was not saved to its end
            else:
                found = checkpoints.damage(checkpoint)
                assert any(name in line or name == checkpoints.COMPLETE for line in found), (name, how)
            path.write_bytes(whole)
    assert checkpoints.damage(checkpoint) == []


def test_a_damaged_checkpoint_is_set_aside_and_the_end_is_the_same(stage_of, monkeypatch, caplog):
    once, often = stage_of("once"), stage_of("often")
    chain.run(once)
    stop_at(often, monkeypatch, 7)
    folder = often["s"].checkpoints
    assert [p.name for p in checkpoints.all_of(folder)] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]
    damage(folder / "checkpoint-6" / "optimizer.pt", "flip", random.Random(1))
    (folder / "checkpoint-4" / "rng_state.pth").unlink()
    chain.run(often)
    assert "checkpoint-6 is not used: optimizer.pt holds other bytes" in caplog.text
    assert "checkpoint-4 is not used: rng_state.pth is missing" in caplog.text
    assert f"resuming from {folder / 'checkpoint-2'}" in caplog.text
    kept = sorted(p.name.rpartition("-checkpoint-")[2][0] for p in (often.output_dir / ".damaged").iterdir())
    assert kept == ["4", "6"] and same(weights(once), weights(often))


def test_without_any_whole_checkpoint_it_begins_again(stage_of, monkeypatch, caplog):
    once, often = stage_of("once", max_steps=4), stage_of("often", max_steps=4)
    chain.run(once)
    stop_at(often, monkeypatch, 3)
    damage(often["s"].checkpoints / "checkpoint-2" / "model.safetensors", "truncate", random.Random(1))
    chain.run(often)
    assert "no whole checkpoint is left: it begins again" in caplog.text and same(weights(once), weights(often))


def test_a_checkpoint_is_worth_nothing_without_its_best_model(stage_of, monkeypatch, caplog):
    args = {
        "load_best_model_at_end": True,
        "learning_rate": 0.5,
        "max_steps": 6,
        "save_total_limit": 2,
        "eval_steps": 2,
    }
    once, often = stage_of("once", **args), stage_of("often", **args)
    chain.run(once)
    stop_at(often, monkeypatch, 5)
    folder = often["s"].checkpoints
    newest = checkpoints.all_of(folder)[0]
    best = checkpoints._best_of(newest)
    assert newest.name == "checkpoint-4" and best == "checkpoint-2"  # the learning rate is far too high
    damage(folder / best / "model.safetensors", "flip", random.Random(2))
    chain.run(often)
    assert "checkpoint-4 is not used: it is whole, but the best model until then is in checkpoint-2" in caplog.text
    assert same(weights(once), weights(often))


def test_a_checkpoint_of_an_earlier_version_is_used_with_a_word(stage_of, monkeypatch, caplog):
    loaded = stage_of("s")
    stop_at(loaded, monkeypatch, 3)
    (checkpoint,) = checkpoints.all_of(loaded["s"].checkpoints)
    (checkpoint / checkpoints.COMPLETE).write_bytes(b"")
    (checkpoint / checkpoints.COUNTS).unlink()
    chain.run(loaded)
    assert "without checksums, by an earlier version" in caplog.text and "resuming from" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 192 vs 86"),
    ],
)
def test_a_full_disk_in_mid_save_is_one_sentence_and_the_last_checkpoint_stays(stage_of, monkeypatch, capsys, error):
    import torch

    once, loaded = stage_of("once"), stage_of("full")
    real = torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-6" in str(path) and "optimizer" in str(path):
            real(value, path, *args, **kwargs)
            os.truncate(path, 100)
            raise error
        return real(value, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert main([str(loaded.file)]) == 1
    launch.reset()
    err = capsys.readouterr().err
    folder = loaded["s"].checkpoints
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert str(folder / "checkpoint-6") in line and "needed" in line and "free" in line and "Traceback" not in err
    assert [p.name for p in checkpoints.all_of(folder)] == ["checkpoint-4", "checkpoint-2"]
    chain.run(loaded)
    chain.run(once)
    assert same(weights(once), weights(loaded))


def test_space_that_is_missing_is_said_at_the_start(stage_of, monkeypatch, caplog):
    monkeypatch.setattr("pipelines.files.free_bytes", lambda path: 100_000)
    chain.run(stage_of("s", max_steps=2))
    assert "its checkpoints need about" in caplog.text and "has 100.0 kB free" in caplog.text


def test_a_process_that_does_not_see_the_marker_yet_takes_part_in_the_check(monkeypatch, tmp_path):
    """The first process writes it, and looks at it: were the others to look too, one of two could wait for ever."""
    taken, loaded = [], []
    second = SimpleNamespace(is_main_process=False, process_index=1, num_processes=2)
    monkeypatch.setattr(checkpoints, "PartialState", lambda: second)

    def broadcast(box):
        taken.append("asked")
        box[0] = {}, []

    monkeypatch.setattr(checkpoints, "broadcast_object_list", broadcast)
    monkeypatch.setattr(checkpoints, "gather_object", lambda part: taken.append("found") or part)

    class Parent:
        state = SimpleNamespace(best_model_checkpoint=str(tmp_path / "checkpoint-6"))  # without a marker

        def _load_best_model(self):
            loaded.append(1)

    type("Both", (ChainTrainer, Parent), {})()._load_best_model()
    assert taken == ["asked", "found"] and loaded
