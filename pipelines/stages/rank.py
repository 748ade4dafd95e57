"""Ranking: samples become rankings for the reward stage, by people, by models that judge, or by a script.

    rankings:
      kind: rank
      rank: {labeller: my_labeller:rank}             # (prompt, completions) -> ranks, tags
      data: {train: stage:samples/samples.jsonl}     # prompt, completions

Writes `rankings.jsonl`: prompt, completions, ranks (1 is best, equals share a rank), tags, labeller, and who wrote each
answer where the samples say so. With `rank: {judgements: FILE.jsonl}` people rank instead: the chain stops here and
says how until the file is there, and goes on by the same command. Several people may have ranked the same answers:
each judgement is a row. A file that grows later makes the stage stale: `--redo` it, and what builds on it.

`rank: {judge: stage:reward}` ranks by the scores of a reward model, `{judge: {model: …}}` and
`{judge: {endpoint: http://…/v1, model: …}}` let a language model rank and tag (pipelines/feedback/language_judge.py);
a list of judges is as many labellers. Beside `judgements` a judge ranks everything too: its rankings of prompts that
people ranked only say how far it agrees with them (`agreement` in stage.json), the others are used.

Beside it stands `best.jsonl`, the winners as rows for sft (best of n): `data: {train: stage:rankings/best.jsonl}`.
Winners that broke off before their end are left out and counted.
"""

from __future__ import annotations

import json
import logging
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from accelerate import PartialState

from pipelines import errors, files, functions, launch
from pipelines.data import mixing, sources
from pipelines.data.rows import normalise
from pipelines.errors import DataError, SetupError
from pipelines.feedback import language_judge, results
from pipelines.feedback.language_judge import JudgeSection
from pipelines.feedback.store import dense
from pipelines.kinds import of_kind
from pipelines.recipe import schema
from pipelines.recipe.model_checks import judges, named_models

logger = logging.getLogger(__name__)

DEFAULTS: dict = {}
RANKINGS, BEST = "rankings.jsonl", "best.jsonl"


def problems(stage, kinds) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the stage as a whole: `(key path, message, value)`."""
    rank = stage.sections.get("rank", {})
    labeller, judgements, judge = rank.get("labeller"), rank.get("judgements"), rank.get("judge")
    if not labeller and not judgements and not judge:
        yield (
            "rank",
            "who ranks? Give `judgements: FILE.jsonl` (people), `judge:` (a model) or `labeller: module:function` (a "
            "script)",
            None,
        )
    if labeller and judge:
        yield "rank.labeller", "a script and a judge: who ranks? Give one of the two", labeller
    yield from _wrong_judges(stage, kinds)
    if labeller and (wrong := functions.problem(labeller, "prompt", "completions")):
        yield "rank.labeller", wrong, labeller
    if judgements and not judgements.removesuffix(".gz").endswith((".jsonl", ".json", ".parquet")):
        yield "rank.judgements", "must be a .jsonl, .json or .parquet file (each also .gz)", judgements
    if stage.sections.get("data", {}).get("validation") is not None:
        yield "data.validation", "all samples are ranked: give them in data.train alone", None


def _wrong_judges(stage, kinds) -> Iterator[tuple[str, str, object]]:
    names: dict[str, str] = {}
    if stage.sections.get("rank", {}).get("judge") == []:
        yield "rank.judge", "an empty list: name a judge, or drop the key", []
    for at, judge in judges(stage):
        if isinstance(judge, str) and judge:
            yield from named_models(stage, kinds, at, judge, ("reward",), "reward model")
        elif isinstance(judge, dict):
            wrong = list(schema.wrong_keys(judge, JudgeSection, at, "judge"))
            yield from wrong or _wrong_judge(stage, kinds, at, judge)
            if wrong:
                continue
        else:
            yield at, "is a reward model (stage:NAME, folder, hub id), or a mapping with `model`", judge
            continue
        if (name := judge_name(judge)) in names:
            yield at, f"is called {name}, as {names[name]} is: give one of them another `name`", None
        names[name] = at


def _wrong_judge(stage, kinds, at: str, judge: dict) -> Iterator[tuple[str, str, object]]:
    """What is wrong with a language model that judges, all of whose keys are right by themselves."""
    endpoint, model = judge.get("endpoint"), judge.get("model")
    if not model:
        yield f"{at}.model", "which model judges? With an endpoint, its name there", model
    elif not endpoint:
        yield from named_models(stage, kinds, f"{at}.model", model, of_kind(writes_text=True), "language model")
    elif model.startswith("stage:"):
        yield f"{at}.model", "an endpoint knows no stages: give the model's name there", model
    if endpoint is not None:
        address = urlsplit(endpoint)
        if address.scheme not in ("http", "https") or not address.hostname or address.query or address.fragment:
            yield f"{at}.endpoint", "must be an address such as http://127.0.0.1:8000/v1", endpoint
        variable = judge.get("key_env")
        if variable and not os.environ.get(variable, "").strip():
            yield f"{at}.key_env", "the environment has no such variable, or it is empty", variable
    for key in ("key_env", "requests_per_minute", "concurrency", "timeout", "parameters"):
        if endpoint is None and key in judge:
            yield f"{at}.{key}", "goes with an endpoint: drop this key", judge[key]
    for key in ("model", "messages", "n", "stream"):
        if key in judge.get("parameters", {}):
            yield f"{at}.parameters.{key}", "is set by the stage itself", judge["parameters"][key]
    if "name" in judge and not (judge["name"] or "").strip():
        yield f"{at}.name", "an empty name: drop this key", judge["name"]
    for i, tag in enumerate(judge.get("tags", [])):
        if not tag.strip() or len(tag) > 64:
            yield f"{at}.tags[{i}]", "a tag has 1 to 64 characters", tag


def judge_name(judge: str | dict) -> str:
    """The labeller that a judge is in the rankings."""
    named = judge.get("name") or judge.get("model") if isinstance(judge, dict) else judge
    return str(named).removeprefix("stage:").rstrip("/").rpartition("/")[2]


def run(stage) -> dict:
    """Rank, or read the judgements; write the file; returns the counts. Every process calls it; the first writes."""
    if stage.section("rank").judge:
        return _rank(stage, PartialState().is_main_process)
    with launch.first_alone() as first:  # a labeller may be slow
        return _rank(stage, first) if first else {}


def _rank(stage, first: bool) -> dict:
    settings = stage.section("rank")
    samples, _ = mixing.load(stage.data, stage.spec.rows, stage.seed, report=stage.report)
    rankings, judges_ = [], {}
    if settings.judgements:
        if settings.labeller:
            logger.info("%s: people ranked, so the labeller %s is not asked", stage.name, settings.labeller)
        rankings = judged(stage, settings.judgements, samples)
    elif settings.labeller:
        rankings = scripted(settings.labeller, samples)
    if settings.judge:
        rankings, judges_ = by_models(stage, samples, rankings)
    if not first:
        return {}
    if not rankings:
        raise DataError(f"{stage.name}: no prompt was ranked: {json.dumps(judges_)}")
    tools = {_key(sample): sample["tools"] for sample in samples if sample.get("tools")}
    rankings = [row | ({"tools": tools[_key(row)]} if _key(row) in tools else {}) for row in rankings]
    files.write_rows(stage.folder / RANKINGS, rankings)
    best, unfinished = winners(rankings, samples)
    won = files.write_rows(stage.folder / BEST, best)
    if unfinished:
        logger.warning(
            "%s: the best answers to %d prompts broke off and are not in %s, from which sft would learn to end there "
            "(sample with a larger response_length)",
            stage.name,
            unfinished,
            BEST,
        )
    if not won:
        logger.warning("%s: no ranking has a winner without tags: %s is empty", stage.name, BEST)
    ties = sum(len(set(row["ranks"])) == 1 for row in rankings)
    tags = [tag for row in rankings for answer in row.get("tags") or [] for tag in answer]
    return {
        "samples": len(samples),
        "rankings": len(rankings),
        "undecided": ties,
        "winners": won,
        **({"winners_cut_off": unfinished} if unfinished else {}),
        **{f"tagged_{tag}": tags.count(tag) for tag in sorted(set(tags))},
        **judges_,
    }


def by_models(stage, samples: list[dict], by_people: list[dict]) -> tuple[list[dict], dict]:
    """`(rankings, figures)`: those of people, and of every judge those of the other prompts; how each judge did, and
    how far all who ranked the same answers agree (Kendall's tau-b, `results.agreement`).
    """
    given, ranked, figures = stage.section("rank").judge, [], {}
    for (_, recipe), judge in zip(judges(stage), given if isinstance(given, list) else [given], strict=True):
        name = judge_name(recipe)
        if isinstance(judge, str):
            rows, counts = by_scores(name, judge, samples), {"not_ranked": 0}
        else:
            known = schema.fields(JudgeSection)
            section = JudgeSection(**{key: schema.check_value(known[key], value)[0] for key, value in judge.items()})
            rows, counts = language_judge.rank_rows(name, section, samples, stage.folder)
        counts["pairs_tied"] = language_judge.tied(rows)
        logger.info("%s: judge %s: %s", stage.name, name, ", ".join(f"{k} {v:.3g}" for k, v in counts.items()))
        ranked += rows
        figures[name] = counts
    people, seen = {_key(row) for row in by_people}, {_key(row): row["completions"] for row in samples}
    same = []
    for row in [*by_people, *ranked]:
        order = dict(zip(row["completions"], row["ranks"]))  # people were shown the answers in another order
        ranks = [order[answer] for answer in seen[_key(row)]]
        same.append({"item": _key(row), "labeller": row.get("labeller") or "people", "ranks": ranks})
    agreement = results.agreement_of(same, stage.seed)
    for pair in agreement["pairs"]:
        tau = "unknown" if pair["tau"] is None else f"{pair['tau']:.2f}"
        logger.info("%s: %s and %s: tau %s over %d prompts", stage.name, *pair["labellers"], tau, pair["prompts"])
    found = {"judges": figures, **({"agreement": agreement} if agreement["pairs"] else {})}
    return [*by_people, *(row for row in ranked if _key(row) not in people)], found


def by_scores(name: str, model: str, samples: list[dict]) -> list[dict]:
    """A ranking of every sample by the scores of a reward model; equal scores share a rank. Every process calls it."""
    from pipelines.evaluation.judges import model_scores  # late: takes a second, and `check` does without

    groups = [list(zip(s["completions"], s.get("ended") or [True] * len(s["completions"]))) for s in samples]
    rows = []
    for sample, scores in zip(samples, model_scores(model, samples, groups), strict=True):
        row = {"prompt": sample["prompt"], "completions": sample["completions"]}
        row |= {"ranks": dense([-score for score in scores]), "labeller": name}
        rows.append(row | ({"models": sample["models"]} if sample.get("models") else {}))
    return rows


def winners(rankings: list[dict], samples: list[dict]) -> tuple[list[dict], int]:
    """`(rows, unfinished)`: the best answer of every ranking that decides something, as rows `prompt, completion`.

    Of answers that share the first rank the first without a tag that came to its end, by `ended` of the `samples`; a
    ranking whose best answers all have tags gives none, nor does one whose best broke off: those are counted.
    """
    told = [(s, zip(s["completions"], s["ended"], strict=True)) for s in samples if s.get("ended")]
    broken = {(json.dumps(s["prompt"]), answer) for s, answers in told for answer, ended in answers if not ended}
    rows, unfinished = [], 0
    for ranking in rankings:
        prompt, answers, ranks = (ranking[key] for key in ("prompt", "completions", "ranks"))
        tags = ranking.get("tags") or [[]] * len(ranks)
        if len(set(ranks)) == 1:
            continue
        clean = [answers[i] for i, rank in enumerate(ranks) if rank == min(ranks) and not tags[i]]
        whole = [answer for answer in clean if (json.dumps(prompt), answer) not in broken]
        if whole:
            row = {"prompt": prompt, "completion": whole[0]}
            rows.append(row | ({"tools": ranking["tools"]} if ranking.get("tools") else {}))
        unfinished += bool(clean and not whole)
    return rows, unfinished


def scripted(labeller: str, samples: list[dict]) -> list[dict]:
    """A ranking of every sample by the function `package.module:name`."""

    function, name, rows = functions.load(labeller), labeller.partition(":")[2], []
    for sample in samples:
        given = function(sample["prompt"], sample["completions"])
        try:
            if not isinstance(given, (tuple, list)) or len(given) != 2:
                raise DataError(f"it must give (ranks, tags), not {reprlib.repr(given)}")
            ranks, tags = given
            row = {"prompt": sample["prompt"], "completions": sample["completions"], "ranks": ranks, "tags": tags}
            row |= {"labeller": name, **({"models": sample["models"]} if "models" in sample else {})}
            normalise(row, "rankings")
        except DataError as error:
            raise DataError(f"labeller {labeller}, asked about {sample['where']}: {error}") from None
        rows.append(row)
    return rows


def judged(stage, path: str, samples: list[dict]) -> list[dict]:
    """The judgements of people about these samples. Raises `SetupError` while there are none."""

    where = " ".join(source["path"] for source in sources.sources(stage.data, "train"))
    if not sources.files(path):
        if not (stage.folder / language_judge.CACHE).is_file():
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
