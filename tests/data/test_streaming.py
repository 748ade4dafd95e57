"""Rows that are read while training goes on: one order at any world size, resumed in place, bad rows named."""

import csv
import gzip
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines.__main__ import main
from pipelines.chain import chain
from pipelines.data import mixing, readers, streaming
from pipelines.data import sources as data_sources
from pipelines.errors import DataError
from pipelines.planning import job
from pipelines.recipe import data_checks, problems
from pipelines.recipe.recipe import load
from pipelines.training import trainer

TEXT = [
    f"the {a} is {c} and the {a} likes {n} fish"
    for a in ("cat", "dog", "bird")
    for c in ("red", "blue")
    for n in range(20)
]


# --- places


def sources(folder):
    """Sources of the same 20 texts, and of what a streamed one may be."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": f"number {i}, a\nline"} for i in range(20)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "a.jsonl").write_text("\n" + lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "a.json").write_text(json.dumps(rows, indent=1))
    with open(folder / "a.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, ["text"])
        writer.writeheader()
        writer.writerows(rows)
    (folder / "lines.txt").write_text("\n\n".join(f"number {i}, ä" for i in range(20)))
    (folder / "paragraphs.txt").write_text("\n\n".join(row["text"] for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", row_group_size=3)
    (folder / "parts").mkdir()
    for part in range(4):
        (folder / f"parts/{part}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in rows[5 * part : 5 * part + 5])
        )
    names = ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "lines.txt", "a.parquet", "parts", "parts/*.jsonl"]
    return [{"path": str(folder / name)} for name in names] + [
        {"path": str(folder / "paragraphs.txt"), "sample_by": "paragraph"},
        {"path": str(folder / "a.jsonl"), "rows": 7},
    ]


def test_reading_goes_on_at_any_place_of_any_source(tmp_path):
    for source in sources(tmp_path):
        whole = list(data_sources.read(source, {}, "order"))
        assert len(whole) == source.get("rows", 20), source
        plain = [row["text"] for _, row in data_sources.read(source)]
        assert sorted(row["text"] for _, row in whole) == sorted(plain), source
        for stop in (0, 1, 6, 10, len(whole) - 1, len(whole)):
            place = {}
            first = list(itertools.islice(data_sources.read(source, place, "order"), stop))
            place = json.loads(json.dumps(place))  # as a checkpoint keeps it
            assert first + list(data_sources.read(source, place, "order")) == whole, (source, stop)


def test_what_lies_before_the_place_is_not_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"number {i:06}"}) + "\n" for i in range(2000)))
    place = {}
    list(itertools.islice(data_sources.read({"path": str(path)}, place), 1500))
    content = path.read_bytes()
    path.write_bytes(b"\xff" * place["byte"] + content[place["byte"] :])  # whoever reads it is told "not UTF-8"
    assert [row["text"] for _, row in data_sources.read({"path": str(path)}, place)] == [
        f"number {i:06}" for i in range(1500, 2000)
    ]


def test_sources_are_mixed_by_weight_and_begin_again_in_another_order(tmp_path, write):
    for part in range(6):
        write(f"many/{part}.jsonl", [{"text": f"a{part}"}])
    section = {"train": [{"path": str(tmp_path / "many/*.jsonl"), "weight": 3}, write("one.jsonl", [{"text": "b"}])]}
    rows = list(itertools.islice(mixing.endless(section, "text", 0, [{}, {}]), 48))
    for start in range(0, 48, 8):  # of any 8 rows 6 come from the first, all of it
        texts = [row["text"] for row in rows[start : start + 8]]
        assert texts.count("b") == 2 and {*texts} == {"b", *(f"a{i}" for i in range(6))}
    passes = [tuple(row["text"] for row in rows[s : s + 8] if row["text"] != "b") for s in range(0, 48, 8)]
    assert len({*passes}) > 1
    other = list(itertools.islice(mixing.endless(section, "text", 1, [{}, {}]), 48))
    assert other != rows
    with pytest.raises(DataError, match="empty.jsonl: no rows"):
        next(mixing.endless({"train": write("empty.jsonl", [])}, "text", 0, [{}]))


# --- the order of the items


class Alone(streaming.Stream):
    """Encodes the shares of the processes that are not there."""

    met = ()  # how many items were handed out when the processes met

    def _exchange(self, block, share):
        self.met += (self.done,)
        assert len(share) == len(block[self.rank :: self.world])
        return self.encode(block)


def stream(path, world=1, rank=0, batch=8, micro=2, size=16, context=4):
    section = {"train": path, "streaming": True, "buffer_size": size}
    stage = SimpleNamespace(data=section, seed=3, section=lambda name: SimpleNamespace(buffer_size=size))
    args = SimpleNamespace(
        train_batch_size=micro,
        world_size=world,
        process_index=rank,
        gradient_accumulation_steps=batch // micro // world,
    )
    encode = lambda rows: [np.arange(n, n + 5) for n in (1000 * int(row["text"]) for row in rows)]
    return Alone(stage, "text", args, encode, streaming.windows(context))


def steps(path, count, world, checkpoint=None, save=None, **settings):
    """The rows' ids of each of `count` steps, on `world` processes one after the other."""
    found = [[] for _ in range(count)]
    for rank in range(world):
        own = stream(path, world, rank, **settings)
        if checkpoint:
            own.load(checkpoint)
        items = iter(own)
        for step in range(count):
            found[step] += [(item["row"], *item["input_ids"].tolist()) for item in itertools.islice(items, 8 // world)]
        if rank == 0 and save:
            save.mkdir()
            own.save(save)
    return [sorted(step) for step in found]


def test_every_world_sees_the_same_steps_and_resumes_in_place(tmp_path, write):
    path = write("numbers.jsonl", [{"text": str(i)} for i in range(50)])
    whole = steps(path, 30, 1)
    rows = [row for step in whole for row in step]
    assert [row[0] for row in rows] == list(range(240))  # each item once, whatever the world
    assert whole == steps(path, 30, 2) == steps(path, 30, 4)
    assert steps(path, 30, 4, micro=1) == whole
    # 16 texts of 5 tokens are 20 windows: all of a block come before any of the next, in another order
    first = [row[1] // 1000 for row in rows[:20]]
    assert {*first} == set(range(16)) and first != sorted(first)
    assert len({row[1:] for row in rows[:60]}) == 60 and len({row[1:] for row in rows}) < 240  # it began again
    for stop, before, after in ((1, 1, 2), (2, 2, 4), (7, 4, 1), (19, 2, 1)):
        save = tmp_path / f"at{stop}"
        assert steps(path, stop, before, save=save) == whole[:stop]
        assert steps(path, 30 - stop, after, save) == whole[stop:]


def test_processes_meet_at_the_same_micro_batch(write):
    """Whoever is alone in exchanging a block waits for ever: blocks of 18 windows end in the midst of a step of 8."""
    path, met = write("numbers.jsonl", [{"text": str(i)} for i in range(50)]), []
    for rank in range(4):
        own = stream(path, 4, rank, size=15)
        list(itertools.islice(own, 30))
        met.append(own.met)
    assert met[0] == met[1] == met[2] == met[3] and len(met[0]) == 7


def test_names_follow_the_items(tmp_path, write):
    own = stream(write("numbers.jsonl", [{"text": str(i)} for i in range(50)]))
    for item in itertools.islice(own, 100):
        numbers = {int(n) // 1000 for n in item["input_ids"]}
        lines = {int(name.rpartition(":")[2]) - 1 for name in own.names[item["row"]]}
        assert numbers == lines
    assert len(own.names) == 16  # of two steps, on one process


def test_packs_hold_whole_examples_and_count_what_they_leave_out():
    rows = [{"where": f"r:{i}"} for i in range(4)]
    array = lambda n: np.full(n, n, np.int32)
    examples = [
        ([(array(3), -array(3))], False),
        ([], True),
        ([(array(5), -array(5))], True),
        ([(array(2), -array(2)), (array(1), -array(1))], False),  # a dialogue learned from two sequences
    ]
    items, counts = streaming.packs(5, True)(rows, examples)
    assert sorted(item["seq_lengths"] for item in items) == [[1], [3, 2], [5]]
    for item in items:
        assert (item["labels"] == -item["input_ids"]).all() and len(item["where"]) == len(item["seq_lengths"])
    assert counts == {"rows": 4, "used": 3, "too_long": 2, "packs": 3}
    assert len(streaming.packs(5, False)(rows, examples)[0]) == 4


# --- stages


GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.1}
ARGS = {
    "global_batch_size": 8,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "max_steps": 12,
    "save_steps": 4,
    "logging_steps": 1,
    "report_to": [],
}


def stage_of(kind, write, tiny_gpt2):
    if kind == "sft":
        rows = [{"prompt": "what is it", "completion": text} for text in TEXT]
        model, more = {"model_name_or_path": str(tiny_gpt2)}, {"packing": True, "max_length": 64}
    else:
        rows = [{"text": text} for text in TEXT]
        model, more = {"config": GPT2}, {"max_length": 16}
    section = {"train": write("rows.jsonl", rows), "streaming": True, "buffer_size": 8}
    section["validation"] = {"path": section["train"], "rows": 9}
    stage = {"kind": kind, "model": model, "data": section, "args": ARGS | more}
    return stage | ({} if kind == "sft" else {"tokenizer": {"train": "bpe", "vocab_size": 300, "max_documents": 50}})


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_a_stopped_stage_goes_on_bit_for_bit_without_reading_from_the_beginning(
    kind, recipe, write, tiny_gpt2, tmp_path, monkeypatch
):
    from safetensors.torch import load_file

    loaded = lambda name: load(
        recipe({"s": stage_of(kind, write, tiny_gpt2)}, f"{name}.yaml", output_dir=str(tmp_path / name))
    )
    read = []
    parse = readers._parse
    monkeypatch.setattr(readers, "_parse", lambda line, path, number: read.append(number) or parse(line, path, number))
    whole, stopped, again = loaded("whole"), loaded("stopped"), loaded("stopped")
    read.clear()  # by `check`
    chain.run(whole)
    all_read = len(read)
    step = trainer.ChainTrainer.training_step

    def dying(self, *args, **kwargs):
        if self.state.global_step == 10:
            raise RuntimeError("killed")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.ChainTrainer, "training_step", dying)
        with pytest.raises(RuntimeError, match="killed"):
            chain.run(stopped)
    read.clear()
    chain.run(again)
    # the block at step 8, those up to the end and one read ahead; validation rows and tokenizer were kept
    assert 0 < len(read) < all_read / 2 and read[0] > 24
    a, b = (load_file(tmp_path / name / "s/model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    histories = [
        [json.loads(line) for line in (tmp_path / name / "s/history.jsonl").read_text().splitlines()]
        for name in ("whole", "stopped")
    ]
    losses = [[(e["step"], e["loss"], round(e["epoch"], 9)) for e in history if "loss" in e] for history in histories]
    assert losses[0] == losses[1] and len(losses[0]) == 12 and losses[0][-1][1] < losses[0][0][1]
    records = [json.loads((tmp_path / name / "s/stage.json").read_text()) for name in ("whole", "stopped")]
    assert (
        records[0]["rows"] == records[1]["rows"]
        and records[0]["metrics"]["eval_loss"] == records[1]["metrics"]["eval_loss"]
    )
    assert records[0]["rows"]["train"]["passes"] in (1, 2)


def test_a_bad_row_ends_the_training_with_its_file_and_line(recipe, write, tiny_gpt2, monkeypatch, capsys):

    stage = stage_of("pretrain", write, tiny_gpt2)
    with open(stage["data"]["train"], "a") as stream_:
        stream_.write('{"text": "fine"}\n{"text": 3}\n')
    monkeypatch.setattr(data_sources, "TRIED", 100)  # `check` looks at the beginning of a stream only
    assert main([str(recipe({"s": stage}))]) == 2
    said = capsys.readouterr().err
    assert "rows.jsonl:122: text must be text, not int" in said and "Traceback" not in said


# --- check


def test_check_says_what_does_not_go_with_streaming(recipe, write, tiny_gpt2):
    stage = stage_of("pretrain", write, tiny_gpt2)
    stage["data"] |= {"validation": 0.1, "buffer_size": 0}
    stage["tokenizer"].pop("max_documents")
    stage["args"] = {"num_train_epochs": 3, "dataloader_num_workers": 2, "save_strategy": "epoch"}
    labelled = {
        "kind": "classify",
        "model": {"model_name_or_path": str(tiny_gpt2)},
        "data": {"train": write("l.jsonl", [{"text": "a", "label": i} for i in (0, 1)]), "streaming": True},
    }
    buffered = {
        "kind": "sft",
        "model": labelled["model"],
        "data": {"train": write("p.jsonl", [{"prompt": "a", "completion": "b"}]), "buffer_size": 5},
    }
    with pytest.raises(problems.RecipeError) as error:
        load(recipe({"s": stage, "c": labelled, "b": buffered}))
    said = {problem.path: problem.message for problem in error.value.problems}
    assert said.keys() == {
        "stages.s.args.max_steps",
        "stages.s.data.validation",
        "stages.s.data.buffer_size",
        "stages.s.tokenizer.max_documents",
        "stages.s.args.num_train_epochs",
        "stages.s.args.dataloader_num_workers",
        "stages.s.args.save_strategy",
        "stages.c.data.streaming",
        "stages.b.data.buffer_size",
    }
    assert "nobody knows how long a stream is" in said["stages.s.args.max_steps"]
    assert "pretrain, mlm, sft" in said["stages.c.data.streaming"]


def test_check_reads_only_the_beginning_of_a_stream(recipe, write, tiny_gpt2, monkeypatch):
    monkeypatch.setattr(data_checks, "TRIED", 5)
    stage = stage_of("pretrain", write, tiny_gpt2)
    lines = Path(stage["data"]["train"]).read_text().splitlines(keepends=True)
    stage["data"]["train"] = write("bad.jsonl", "".join(lines[:5]) + "{\n")
    load(recipe({"s": stage}))
    stage["data"]["train"] = write("worse.jsonl", "".join(lines[:4]) + "{\n")
    with pytest.raises(problems.RecipeError, match="worse.jsonl:5: not JSON"):
        load(recipe({"s": stage}))


def test_plan_reads_a_sample_of_a_stream(recipe, write, tiny_gpt2, monkeypatch):

    monkeypatch.setattr(job, "SAMPLE", 7)
    loaded = load(recipe({"s": stage_of("sft", write, tiny_gpt2)}), read_data=False)
    Path(loaded["s"].data["train"]).write_text(
        "".join(Path(loaded["s"].data["train"]).read_text().splitlines(True)[:7]) + "{"
    )
    found = job._read(loaded["s"])
    assert len(found.sample) == 7 and found.rows is None
