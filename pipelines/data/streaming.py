"""Training rows that are read, tokenised and shuffled while training goes on: for data without end, or beyond the disk.

    stream = Stream(stage, ROWS, args, encode, build)    # in a stage whose recipe says `data: {streaming: true}`
    trainer.stream = stream                              # see `training.ChainTrainer`

Rows come in blocks of `data.buffer_size`. Every process reads all of a block, which is cheap, and encodes its share of
it, which is not; the shares are exchanged, and the items built of them (windows, packs) are shuffled by seed and block
and dealt out by micro-batch. So the order of the items is the same on any number of processes, every row is encoded
once, and a block depends on nothing but the places where its rows begin. A checkpoint holds those places: a run goes on
in the middle of its files, with one block to encode again. The next block is read while the last one is trained on.

Not used: Accelerate's sharding of iterable data sets encodes every row on every process (or all on the first one, and
sends the batches), and `datasets` forgets what lies in its shuffle buffer when it saves its state.
"""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object

from pipelines import errors, files
from pipelines.data import encoded_rows, mixing, plain_text, sources
from pipelines.speed.packing import plan_packs

FILE = "stream.json"  # in a checkpoint: where its stream stands


class Stream(torch.utils.data.IterableDataset):
    """This process's items, without end: what `each` makes of an item of `build`; `row` is its number among all.

    Args:
        stage: its `data:` section says what is read; its seed decides the order.
        kind: of rows, as in `pipelines.data`.
        args: the stage's `TrainingArguments`: micro-batch, accumulation and world.
        encode: rows -> as many encoded rows (picklable); called in a thread, for this process's share of a block.
        build: (rows, encoded rows) -> (items, counts); an item is a mapping, its `where` the names of its rows;
        `counts`
            adds up over the blocks for the report.
        each: what is done to an item that is handed out, with its `row`.

    Raises `DataError` while it is iterated: a bad row (with its file and line), or a block without any item.
    """

    def __init__(self, stage, kind: str, args, encode, build, each=dict):
        self.section, self.kind, self.seed = stage.data, kind, stage.seed
        self.size = stage.section("data").buffer_size
        self.micro, self.world, self.rank = args.train_batch_size, args.world_size, args.process_index
        self.per_step = self.micro * self.world * args.gradient_accumulation_steps
        self.encode, self.build, self.each = encode, build, each
        self.names: dict[int, list[str]] = {}  # of the rows in the items of the last two steps
        self.done = 0  # items that were handed out, to all processes together
        places: list[dict] = [{} for _ in sources.sources(self.section, "train")]
        # the block at hand: its number, how many items come before it, where its rows begin, what was counted before
        self.block: dict = {"number": 0, "items": 0, "places": places, "counts": {}}
        self.counts: dict[str, int] = {}
        self.found: dict = {}  # gets `ignored_columns`

    def __iter__(self):
        items = self._items()
        while True:
            # All processes get to a new block with the same micro-batch, and meet there, whoever has its first item.
            together = list(islice(items, self.micro * self.world))
            self.done += len(together)
            for item in together[self.rank * self.micro : (self.rank + 1) * self.micro]:
                self.names[item["row"]] = item["where"]
                self.names.pop(item["row"] - 2 * self.per_step, None)
                yield self.each(item)

    def _items(self):
        """The items of all processes from number `done` on."""
        first = self.done
        places = copy.deepcopy(self.block["places"])
        rows = mixing.endless(self.section, self.kind, self.seed, places, self.found)
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self._read, rows, places)
            while True:
                block, ends, encoded = ahead.result()
                ahead = pool.submit(self._read, rows, places)
                items, counts = self.build(block, self._exchange(block, encoded))
                if not items:
                    raise errors.DataError(
                        f"data.train: the {len(block)} rows from {block[0]['where']} to {block[-1]['where']} give not "
                        "one "
                        "row to train on: they are too short or all too long; raise data.buffer_size, or see "
                        "args.max_length"
                    )
                before = self.block["counts"]
                self.counts = {name: before.get(name, 0) + count for name, count in counts.items()}
                order = np.random.default_rng([self.seed, self.block["number"]]).permutation(len(items))
                for number, at in enumerate(order, self.block["items"]):
                    if number >= first:
                        yield {**items[at], "row": number}
                self.block = {
                    "number": self.block["number"] + 1,
                    "items": self.block["items"] + len(items),
                    "places": ends,
                    "counts": self.counts,
                }

    def _read(self, rows, places: list[dict]) -> tuple[list[dict], list[dict], list]:
        """The next block's rows, the places where they end, and this process's share of them encoded."""
        block = list(islice(rows, self.size))
        return block, copy.deepcopy(places), self.encode(block[self.rank :: self.world])

    def _exchange(self, block: list[dict], share: list) -> list:
        """All rows of the block encoded, of which each process has its share."""
        encoded = [None] * len(block)
        for rank, part in enumerate(gather_object([share]) if self.world > 1 else [share]):
            encoded[rank :: self.world] = part
        return encoded

    def save(self, checkpoint: Path) -> None:
        """Write where the stream stands. Called between two steps, when all that was handed out is used."""
        files.write_json(checkpoint / FILE, {"done": self.done, "block": self.block, "counts": self.counts})

    def load(self, checkpoint: Path) -> None:
        """Go on from where the stream stood at `checkpoint`, on any number of processes."""
        state = json.loads((checkpoint / FILE).read_text(encoding="utf-8"))
        self.done, self.block = state["done"], state["block"]
        self.counts = state.get("counts", {})  # none left to read: those of then are the last

    def report(self) -> dict:
        """What was counted, up to the end of the block at hand, and how often a source was begun at most."""
        passes = max(place.get("epoch", 0) + 1 for place in self.block["places"])
        return {**self.counts, "passes": passes, **self.found}


def text_encoder(tokenizer, separator_id: int):
    """`encode` of texts: arrays of token ids, `separator_id` at the end of each."""
    tokenizer = copy.deepcopy(tokenizer)  # it is used in a thread, while the Trainer may save its own
    control = plain_text.control_pattern(tokenizer)
    notice = plain_text.Notice(lambda row: bool(control.search(row["text"])))

    def encode(rows: list[dict]) -> list[np.ndarray]:
        for row in rows:
            notice(row)
        return list(encoded_rows.encoded([row["text"] for row in rows], tokenizer, separator_id))

    return encode


def windows(context: int):
    """`build` of texts: windows of `context` tokens; what does not fill a last one is left out, once in a block."""

    def build(rows: list[dict], texts: list[np.ndarray]) -> tuple[list[dict], dict]:
        tokens, ends = np.concatenate(texts), np.cumsum([len(text) for text in texts])
        items = []
        for start in range(0, len(tokens) - context + 1, context):
            first, last = np.searchsorted(ends, [start, start + context - 1], side="right")
            where = [row["where"] for row in rows[first : last + 1]]
            items.append({"input_ids": tokens[start : start + context], "where": where})
        return items, {"documents": len(rows), "tokens_read": len(tokens)}

    return build


def window(item: dict) -> dict:
    """An item of `windows` as `token_file.stack_windows` takes it."""
    return {"input_ids": torch.from_numpy(item["input_ids"].astype(np.int64)), "row": item["row"]}


def packs(context: int, packing: bool):
    """`build` of examples `([(ids, labels)], whether one was too long)`, as many as are learned: rows, or best-fit
    packs.
    """

    def build(rows: list[dict], examples: list[tuple]) -> tuple[list[dict], dict]:
        kept = [(row["where"], *sequence) for row, (sequences, _) in zip(rows, examples) for sequence in sequences]
        lengths = [len(ids) for _, ids, _ in kept]
        items = [
            {
                "input_ids": np.concatenate([kept[i][1] for i in pack]),
                "labels": np.concatenate([kept[i][2] for i in pack]),
                "seq_lengths": [lengths[i] for i in pack],
                "where": [kept[i][0] for i in pack],
            }
            for pack in (plan_packs(lengths, context) if packing else [[i] for i in range(len(kept))])
        ]
        used, long = sum(bool(sequences) for sequences, _ in examples), sum(is_long for _, is_long in examples)
        counts = {"rows": len(rows), "used": used, "too_long": long}
        return items, counts | ({"packs": len(items)} if packing else {})

    return build
