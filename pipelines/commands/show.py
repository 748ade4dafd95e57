"""`pipelines show RECIPE STAGE`: the rows of a stage as its model will see them, and what they amount to."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby

from pipelines import IGNORE_INDEX
from pipelines.commands import command_line, split_words
from pipelines.errors import SetupError, meant
from pipelines.generation.speaker import plain
from pipelines.planning import unmade
from pipelines.recipe import recipe
from pipelines.recipe.stage import Stage

ABOUT = """\
The rows of a stage as its model will see them: the text that its tokens stand for, their ids, and which of them are
learned (green in a terminal); for reward the answers behind their prompt, for ppo the prompt as it is fed. Below them
counts, lengths, what is cut or dropped, how full the packs are, how the labels are distributed. The rows are made by
the stage's own code; nothing is trained or written, and no earlier stage need have run.

--json prints one object a row, {"where", "text", "input_ids", "labels", "learned"} (reward: completions,
completion_ids, ranks, margin and tags beside them), and last {"summary": …}.
"""
EXAMPLES = """
pipelines show recipes/demo.yaml sft
pipelines show recipes/demo.yaml reward --rows 1
pipelines show recipes/demo.yaml sft --rows 100000 --json > rows.jsonl   every row
pipelines show recipes/demo.yaml sft stages.sft.model.chat_template=chatml   with a key changed, as `run` would have it
"""
GREEN, FAINT, OFF = "\033[32m", "\033[2m", "\033[0m"


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = command_line("show", ABOUT, EXAMPLES)
    parser.add_argument("recipe", help="a YAML file; see recipes/, or `pipelines init`")
    parser.add_argument("stage", help="the name of one of its stages")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="overrides")
    parser.add_argument(
        "--rows", type=int, default=3, metavar="N", help="so many rows (default: 3; 0: only the counts)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a row, then one with the summary")
    args = parser.parse_intermixed_args(argv)
    if args.rows < 0:
        raise SetupError(f"--rows {args.rows}: must be 0 or more")
    names, overrides = split_words([args.stage, *args.words])
    if len(names) != 1:
        raise SetupError(f"show takes one stage, not {len(names)}: {', '.join(names)}")
    loaded = recipe.load(args.recipe, overrides, read_data=False)
    known = [stage.name for stage in loaded.stages]
    if names[0] not in known:
        raise SetupError(f"no stage {names[0]!r} in {args.recipe}{meant(names[0], known)}; it has {', '.join(known)}")
    stage = loaded[names[0]]
    if not hasattr(stage.module, "shown"):
        raise SetupError(f"{stage.name}: a stage of kind {stage.kind} gives no rows of its own to a model")
    stage, left_out = unmade.rows_here(stage)
    if not stage.data.get("train"):
        raise SetupError(f"{stage.name}: its rows are still to be written: run {', '.join(stage.parents)} first")
    if left_out:
        print(f"not shown, for an earlier stage will write it: {', '.join(left_out)}", file=sys.stderr)
    lengths: dict[str, list[int]] = defaultdict(list)
    tokenizer = unmade.tokenizer_of(stage, train=True)
    for i, (side, row) in enumerate(rows(stage, tokenizer)):
        lengths[side] += [len(row["input_ids"]) + len(part) for part in row.get("completion_ids", [[]])]
        if i < args.rows:
            print(json.dumps(row, ensure_ascii=False) if args.json else _for_people(row, tokenizer), flush=True)
    found = summary(stage, lengths)
    print(json.dumps({"summary": found}, ensure_ascii=False) if args.json else _table(found))
    return 0


def rows(stage: Stage, tokenizer) -> Iterator[tuple[str, dict]]:
    """`(side, row)` for every row of a stage, train before validation, a row being what `--json` prints.

    Raises `SetupError` where config or data are not at hand, or a row cannot be encoded (with its place).
    """
    for row in stage.module.shown(stage, tokenizer, unmade.empty_model(stage, tokenizer)):
        side, where, ids, labels = (row.pop(key) for key in ("side", "where", "input_ids", "labels"))
        if not isinstance(where, str):
            where = where[0] if len(where) == 1 else f"{where[0]} to {where[-1]}"
        learned = row.pop("learned", None)
        if learned is None:
            learned = [tokenizer.decode(part) for part, wanted in _runs(labels, labels) if wanted]
        if "completion_ids" in row:
            row["completions"] = [tokenizer.decode(part) for part in row["completion_ids"]]
        yield (
            side,
            {
                "where": where,
                "text": tokenizer.decode(ids),
                "input_ids": ids,
                "labels": labels,
                "learned": learned,
                **row,
            },
        )


def _runs(ids: list[int], labels: list[int]) -> list[tuple[list[int], bool]]:
    """`ids` cut into stretches `(ids, whether they are learned)`."""
    pairs = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORE_INDEX)
    return [([i for i, _ in part], wanted) for wanted, part in pairs]


def summary(stage: Stage, lengths: dict[str, list[int]]) -> dict:
    """What the rows amount to: of each side the counts that the stage records, and the lengths of its sequences."""
    found: dict = {"stage": stage.name, "kind": stage.kind}
    for key, counts in stage.report.items():
        found[key] = counts
        if key in lengths and lengths[key]:
            counts = found[key] = dict(counts)
            if "used" in counts:
                counts["dropped"] = counts["rows"] - counts["used"]
                counts["cut"] = max(0, counts["too_long"] - counts["dropped"]) if "too_long" in counts else 0
            of = sorted(lengths[key])
            counts["sequences"] = len(of)
            counts["length"] = {
                "mean": round(sum(of) / len(of), 2),
                "p95": of[math.ceil(0.95 * len(of)) - 1],
                "longest": of[-1],
            }
    return found


def _for_people(row: dict, tokenizer) -> str:
    """A row for the terminal: what is learned in green, the rest as it is; without colours it is listed below."""
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    of = {True: GREEN, False: FAINT} if colours else {True: "", False: ""}
    aligned = len(row["input_ids"]) == len(row["labels"])
    runs = _runs(row["input_ids"], row["labels"]) if aligned else [(row["input_ids"], False)]
    text = "".join(of[wanted] + plain(tokenizer.decode(part)) + (OFF if colours else "") for part, wanted in runs)
    learned = sum(label != IGNORE_INDEX for label in row["labels"])
    head = f"{row['where']}: {len(row['input_ids'])} tokens, {learned} learned"
    if "completions" in row:
        head = f"{row['where']}: a prompt of {len(row['input_ids'])} tokens, {len(row['completions'])} answers"
    lines = [head, *("    " + line for line in text.split("\n")), f"    ids {_short(row['input_ids'])}"]
    for i, answer in enumerate(row.get("completions", [])):
        tags = f", tags {', '.join(row['tags'][i])}" if row.get("tags") and row["tags"][i] else ""
        margin = f", margin {row['margin'][i]:g}" if any(row.get("margin", [])) else ""
        place = f"rank {row['ranks'][i]:g}" if "ranks" in row else "desirable" if row["desirable"][i] else "undesirable"
        lines.append(f"  {place}{margin}{tags}:")
        lines += [f"    {of[True]}{line}{OFF if colours else ''}" for line in plain(answer).split("\n")]
        lines.append(f"    ids {_short(row['completion_ids'][i])}")
    if row["learned"] and "completions" not in row and not (colours and aligned):
        lines += [f"  learned: {_cut(plain(part))!r}" for part in row["learned"][:20]]
    return "\n".join(lines) + "\n"


def _cut(text: str) -> str:
    return text if len(text) <= 200 else text[:199] + "…"


def _short(ids: list[int]) -> str:
    return " ".join(map(str, ids[:24])) + (f" … ({len(ids)} in all)" if len(ids) > 24 else "")


def _table(found: dict) -> str:
    """The summary as a table: a line for each side, then what belongs to the whole stage."""
    sides = {key: value for key, value in found.items() if isinstance(value, dict) and "length" in value}
    lines = []
    for side, counts in sides.items():
        length = counts["length"]
        told = {key: value for key, value in counts.items() if key not in ("length", "labels") and value is not None}
        words = ", ".join(
            f"{key.replace('_', ' ')} {value:,}" if isinstance(value, int) else f"{key} {value}"
            for key, value in told.items()
        )
        lines.append(f"{side:<12}{words}")
        lines.append(
            f"{'':<12}tokens of a sequence: mean {length['mean']:g}, p95 {length['p95']}, longest {length['longest']}"
        )
        if counts.get("labels"):
            every = sum(counts["labels"].values()) or 1
            shares = (f"{name} {n:,} ({n / every:.1%})" for name, n in counts["labels"].items())
            lines.append(f"{'':<12}labels: {', '.join(shares)}")
    known = ("stage", "kind", "packs", "packing_efficiency", *sides)
    for key, value in found.items():  # what else the stage records: columns that are not read, …
        if key not in known:
            told = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append(f"{key.replace('_', ' ')}: {told}")
    if "packs" in found:
        lines.append(f"{'packs':<12}{found['packs']:,}, {found['packing_efficiency']:.1%} filled")
    return "\n".join(lines)
