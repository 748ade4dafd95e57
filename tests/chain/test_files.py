"""The records of a run: damaged ones are named with the way out, whatever the damage; listed files are compared."""

import errno
import json
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import files
from pipelines.errors import RecordError

STAGE = {
    "stage": "one",
    "kind": "sft",
    "rows": {"train": 3},
    "metrics": {"train_loss": 0.5},
    "args": {},
    "versions": {},
    "record": {"kind": "sft", "seed": 1, "sections": {"args": {}}, "data": {}, "parents": {"base": "abc"}},
    "started": "2026",
    "finished": "2027",
    "seconds": 1.5,
    "world_size": 1,
    "files": {"a": {"bytes": 1, "xxh3": "0"}},
}
VALUES = {
    files.FINISHED: STAGE,
    files.STARTED: {"record": STAGE["record"], "started": "2026"},
    files.CHAIN: {"recipe": "x", "stages": [{"name": "one", "kind": "sft", "parents": []}]},
    files.REDO: {"asked": ["one"], "open": [], "aside": []},
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("how", ["truncated", "empty", "binary", "list", "deep"])
def test_a_damaged_record_is_one_sentence_with_file_and_remedy(tmp_path, name, how):
    path = tmp_path / "one" / name
    files.write_json(path, VALUES[name])
    whole = path.read_bytes()
    assert files.read_record(path) == VALUES[name]
    broken = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "binary": b"\xff\xfe\x00" + whole,
        "list": b"[1]",
        "deep": b"[" * 200_000,
    }[how]
    path.write_bytes(broken)
    with pytest.raises(RecordError) as error:
        files.read_record(path)
    text = str(error.value)
    assert str(path) in text and "damaged" in text and "\n" not in text and ("copy" in text or "away" in text)
    assert path.read_bytes() == broken


def parts(value, at=()):
    """The paths of all values in a nested one."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from parts(inner, (*at, key))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(VALUES)), st.randoms(), st.sampled_from([None, 3, "x", [], {}, [[]], True]))
def test_a_record_with_any_part_replaced_is_read_or_named(tmp_path_factory, name, rng, other):
    """Never another exception: what passes has all that readers rely on in the type that they rely on."""
    value = json.loads(json.dumps(VALUES[name]))
    at = rng.choice([p for p in parts(value) if p])
    inner = value
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = other
    path = tmp_path_factory.mktemp("r") / name
    files.write_json(path, value)
    try:
        files.read_record(path)
    except RecordError as error:
        assert str(at[0]) in str(error)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_as_a_log_are_rows_or_named(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("r")
    (folder / files.LOG).write_bytes(data)
    try:
        files.read_log(folder)
    except RecordError as error:
        assert files.LOG in str(error) and "line" in str(error)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(), max_size=4), st.integers(0, 200), st.lists(st.text(), min_size=1, max_size=3))
def test_what_is_appended_after_a_torn_line_is_read_back(tmp_path_factory, first, cut, more):
    path = tmp_path_factory.mktemp("r") / "log.jsonl"
    files.append_rows(path, [{"a": x} for x in first])
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    whole = data.count(b"\n")
    files.append_rows(path, [{"a": x} for x in more])
    assert [row["a"] for row in files.read_rows(path)] == [*first[:whole], *more]


@pytest.mark.parametrize("size", [0, 1, 5000, 3 * 2**20])
@pytest.mark.parametrize("how", ["truncate", "empty", "delete", "flip", "grow"])
def test_every_damage_to_a_listed_file_is_found(tmp_path, size, how):
    rng = random.Random(size)
    path = tmp_path / "sub" / "weights"
    path.parent.mkdir()
    path.write_bytes(rng.randbytes(size))
    listed = files.contents(tmp_path, ["sub/weights"], sync=True)
    assert files.damage(tmp_path, listed) == [] == files.damage(tmp_path, listed, quick=True)
    times = os.stat(path)
    if size == 0 and how in ("truncate", "empty", "flip"):
        return
    damage(path, how, rng)
    (line,) = files.damage(tmp_path, listed)
    assert line.startswith("sub/weights ")
    if how == "flip":  # what only a full reading finds
        assert files.damage(tmp_path, listed, quick=True) == [line]
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert files.damage(tmp_path, listed, quick=True) == [] and files.damage(tmp_path, listed) == [line]


def damage(path, how, rng):
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
        return
    if how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes({"truncate": data[: len(data) // 2], "empty": b"", "flip": data, "grow": data + b"x"}[how])


def test_two_set_asides_in_one_moment_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "now", lambda: "2026-11-29T10:00:00.000001+00:00")
    kept = []
    for number in range(3):
        (tmp_path / "one").mkdir()
        (tmp_path / "one" / "weights").write_text(str(number))
        kept.append(files.set_aside(tmp_path / "one", tmp_path / ".replaced", "one"))
    assert [(k / "weights").read_text() for k in kept] == ["0", "1", "2"]


def test_files_get_the_rights_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        for name, mode in (("weights", 0o600), ("open", 0o644)):
            (tmp_path / name).write_text("x")
            (tmp_path / name).chmod(mode)
        files.follow_umask(tmp_path)
        assert [(tmp_path / n).stat().st_mode & 0o777 for n in ("weights", "open")] == [0o640, 0o644]
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_errors_of_the_disk_are_one_sentence(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "w"))
    text = str(files.storage_error(full, needed=3 * 10**9))
    assert text.startswith(f"{tmp_path / 'w'}: the disk is full (3.0 GB needed, ") and "free" in text
    rust = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = rust
    assert "the disk is full" in str(files.storage_error(wrapped, tmp_path))
    torch_ = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 192 vs 86")
    assert "writing failed" in str(files.storage_error(torch_, tmp_path))
    for free, needed in ((0, None), (900, 2000), (4096, None)):
        monkeypatch.setattr(files, "free_bytes", lambda path, free=free: free)
        assert "the disk is full" in str(files.storage_error(torch_, tmp_path, needed)), free
    assert "not allowed" in str(files.storage_error(PermissionError(errno.EACCES, "x", "/a/b")))
    assert files.storage_error(ValueError("no")) is None and files.storage_error(FileNotFoundError(2, "x")) is None
