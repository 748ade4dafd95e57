"""Ranking: samples become rankings for the reward stage, by a person's judgements or by a script that stands in.

    rankings:
      kind: rank
      rank: {labeller: my_labeller:rank}             # (prompt, completions) -> ranks, tags
      data: {train: stage:samples/samples.jsonl}     # prompt, completions

Writes `rankings.jsonl`: prompt, completions, ranks (1 is best, equals share a rank), tags, labeller, and who wrote each
answer where the samples say so. With `rank: {judgements: FILE.jsonl}` people rank instead: the chain stops here and
says how until the file is there, and goes on by the same command. Several people may have ranked the same answers:
each judgement is a row. A file that grows later makes the stage stale: `--redo` it, and what builds on it.

Beside it stands `best.jsonl`, the winners as rows for sft (best of n): `data: {train: stage:rankings/best.jsonl}`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState

from pipelines import errors, files, functions
from pipelines.data import mixing, sources
from pipelines.data.rows import normalise
from pipelines.errors import DataError, SetupError

logger = logging.getLogger(__name__)

DEFAULTS: dict = {}
RANKINGS, BEST = "rankings.jsonl", "best.jsonl"


def problems(stage, kinds) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the stage as a whole: `(key path, message, value)`."""
    rank = stage.sections.get("rank", {})
    labeller, judgements = rank.get("labeller"), rank.get("judgements")
    if not labeller and not judgements:
        yield (
            "rank",
            "who ranks? Give `judgements: FILE.jsonl` (people) or `labeller: module:function` (a script)",
            None,
        )
    if labeller and (wrong := functions.problem(labeller, "prompt", "completions")):
        yield "rank.labeller", wrong, labeller
    if judgements and not judgements.removesuffix(".gz").endswith((".jsonl", ".json", ".parquet")):
        yield "rank.judgements", "must be a .jsonl, .json or .parquet file (each also .gz)", judgements
    if stage.sections.get("data", {}).get("validation") is not None:
        yield "data.validation", "all samples are ranked: give them in data.train alone", None


def run(stage) -> dict:
    """Rank, or read the judgements; write the file; returns the counts."""

    if not PartialState().is_main_process:
        return {}
    settings = stage.section("rank")
    samples, _ = mixing.load(stage.data, stage.spec.rows, stage.seed, report=stage.report)
    if settings.judgements:
        if settings.labeller:
            logger.info("%s: people ranked, so the labeller %s is not asked", stage.name, settings.labeller)
        rankings = judged(stage, settings.judgements, samples)
    else:
        rankings = scripted(settings.labeller, samples)
    files.write_rows(stage.folder / RANKINGS, rankings)
    won = files.write_rows(stage.folder / BEST, winners(rankings))
    ties = sum(len(set(row["ranks"])) == 1 for row in rankings)
    tags = [tag for row in rankings for answer in row.get("tags") or [] for tag in answer]
    return {
        "samples": len(samples),
        "rankings": len(rankings),
        "undecided": ties,
        "winners": won,
        **{f"tagged_{tag}": tags.count(tag) for tag in sorted(set(tags))},
    }


def winners(rankings: list[dict]) -> list[dict]:
    """The best answer of every ranking that decides something, as rows `prompt, completion`.

    Of answers that share the first rank the first without a tag; a ranking whose best answers all have tags gives none.
    """
    rows = []
    for ranking in rankings:
        ranks, tags = ranking["ranks"], ranking.get("tags") or [[]] * len(ranking["ranks"])
        clean = [i for i, rank in enumerate(ranks) if rank == min(ranks) and not tags[i]]
        if clean and len(set(ranks)) > 1:
            rows.append({"prompt": ranking["prompt"], "completion": ranking["completions"][clean[0]]})
    return rows


def scripted(labeller: str, samples: list[dict]) -> list[dict]:
    """A ranking of every sample by the function `package.module:name`."""

    function, name, rows = functions.load(labeller), labeller.partition(":")[2], []
    for sample in samples:
        ranks, tags = function(sample["prompt"], sample["completions"])
        row = {"prompt": sample["prompt"], "completions": sample["completions"], "ranks": ranks, "tags": tags}
        row |= {"labeller": name, **({"models": sample["models"]} if "models" in sample else {})}
        try:
            normalise(row, "rankings")
        except DataError as error:
            raise DataError(f"labeller {labeller}, asked about {sample['where']}: {error}") from None
        rows.append(row)
    return rows


def judged(stage, path: str, samples: list[dict]) -> list[dict]:
    """The judgements of people about these samples. Raises `SetupError` while there are none."""

    where = " ".join(source["path"] for source in sources.sources(stage.data, "train"))
    if not sources.files(path):
        (stage.folder / files.STARTED).unlink(missing_ok=True)  # nothing was done yet
        labeller = stage.sections["rank"].get("labeller")
        raise SetupError(
            f"{stage.name}: waiting for people: there is no {path}. Rank the answers, and write the rankings there:\n"
            f"    python -m pipelines rank {where}\n"
            f"    python -m pipelines rank {where} --export {path}\n"
            f"Then run the same command "
            f"again{f' (or drop rank.judgements: {labeller} then ranks)' if labeller else ''}."
        )
    known = {_key(sample): sample for sample in samples}
    rows, strange = [], 0
    for where_, row in sources.read({"path": path}):
        try:
            ranking = normalise(row, "rankings")
        except errors.DataError as error:
            raise errors.DataError(f"{where_}: {error}") from None
        sample = known.get(_key(ranking))
        if sample is None:
            strange += 1
            continue
        ranking |= {"labeller": row["labeller"]} if row.get("labeller") else {}
        if "models" in sample:
            by = dict(zip(sample["completions"], sample["models"], strict=True))
            ranking["models"] = [by[answer] for answer in ranking["completions"]]
        rows.append(ranking)
    if strange:
        logger.warning("%s: %d judgements in %s are about other answers: left out", stage.name, strange, path)
    if not rows:
        raise errors.DataError(f"{path}: no judgement is about the answers in {where}")
    stage.report["judgements"] = {"file": str(Path(path)), "used": len(rows), "about_other_answers": strange}
    stage.report["judgements"]["samples_without"] = len(known.keys() - {_key(row) for row in rows})
    return rows


def _key(row: dict) -> str:
    """The same for the same answers to the same prompt, in whatever order they are shown."""
    return json.dumps([row["prompt"], sorted(row["completions"], key=json.dumps)])
