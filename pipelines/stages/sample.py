"""Sampling: models answer the same prompts several times, for people to rank (or for a script that stands in).

    samples:
      kind: sample
      sample: {models: [stage:sft, stage:policy], completions: 4, response_length: 128}
      data: {train: prompts.jsonl}                                  # prompt

Writes `samples.jsonl`: prompt, completions, and for each of them who wrote it (`models`) and whether it came to its end
(`ended`). Answers that say the same are kept once; where two models wrote it, it is now the one's and now the other's.
Empty answers, and prompts with fewer than two different answers, leave nothing to rank: left out and counted.

Every answer has a random stream of its own: the file is the same with any number of processes, and a stage that was
stopped goes on where it was. (vLLM's streams are its own: with `use_vllm` other answers come each time.)
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from pipelines import IGNORE_INDEX, errors, files
from pipelines.data import mixing, plain_text
from pipelines.generation import answers, with_vllm
from pipelines.kinds import of_kind
from pipelines.models import chat_template, loading
from pipelines.recipe.model_checks import named_models

logger = logging.getLogger(__name__)

DEFAULTS: dict = {}
SAMPLES = "samples.jsonl"
BATCHES = 8  # so many batches of answers are on disk, or lost, together


def problems(stage, kinds) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the stage as a whole: `(key path, message, value)`."""

    sample, data = stage.sections.get("sample", {}), stage.sections.get("data", {})
    models, count = sample.get("models") or [], sample.get("completions", 4)
    if not models:
        yield "sample.models", "needs at least one language model: stage:NAME, a folder or a hub id", None
    yield from named_models(stage, kinds, "sample.models", models, of_kind(writes_text=True), "language model")
    for key, message, value in with_vllm.problems(sample):
        yield f"sample.{key}", message, value
    if models and count % len(models):
        yield "sample.completions", f"must be a multiple of {len(models)}, so that each model writes as many", count
    if data.get("validation") is not None:
        yield "data.validation", "all prompts are answered: give them in data.train alone", data["validation"]
    if data.get("too_long") == "truncate":
        yield "data.too_long", "a prompt that is cut asks something else: drop or error", "truncate"


def run(stage) -> dict:
    """Let every model answer, write the file; returns the counts."""

    state, settings = PartialState(), stage.section("sample")
    rows, _ = mixing.load(stage.data, stage.spec.rows, stage.seed, report=stage.report)
    rows = list({json.dumps(row["prompt"]): row for row in reversed(rows)}.values())[::-1]  # each prompt once
    prompts = [row["prompt"] for row in rows]
    each = settings.completions // len(settings.models)
    how = {
        key: getattr(settings, key)
        for key in ("response_length", "temperature", "top_k", "top_p", "batch_size", "keep_thoughts")
    }
    tools = [row.get("tools") for row in rows]

    log = stage.checkpoints / "answers.jsonl"
    word = [_read(log) if state.is_main_process else None]
    broadcast_object_list(word)
    done: dict[tuple[int, int], list] = word[0]  # (model, prompt) -> its answers
    left_out, control, policy = set(), set(), stage.section("data").too_long
    for m, path in enumerate(settings.models):
        model, tokenizer = answers.load(path)
        control |= {row["where"] for row in rows if chat_template.holds_control_text(tokenizer, row)}
        fits = answers.fitting(model, tokenizer, prompts, settings.response_length, tools)
        left_out |= set(range(len(prompts))) - set(fits)
        if left_out and policy == "error":
            break  # `report_length` says so
        todo = sorted((i for i in fits if (m, i) not in done), key=lambda i: len(str(prompts[i])))
        size = max(1, BATCHES * settings.batch_size * state.num_processes // each)
        writer = contextlib.nullcontext()
        if settings.use_vllm and todo:
            encoded = answers.encode_prompts(tokenizer, [prompts[i] for i in todo], [tools[i] for i in todo])
            sampling = {key: how[key] for key in ("response_length", "temperature", "top_k", "top_p")}
            writer = with_vllm.writer(model, tokenizer, encoded, answers.end_tokens(model, tokenizer), **sampling)
        with writer as write:
            for start in range(0, len(todo), size):
                some = todo[start : start + size]
                seeds = [[(stage.seed, m, i, k) for k in range(each)] for i in some]
                asked, its_tools = [prompts[i] for i in some], [tools[i] for i in some]
                found = answers.answers(model, tokenizer, asked, seeds, tools=its_tools, write=write, **how)
                done |= {(m, i): group for i, group in zip(some, found, strict=True)}
                if state.is_main_process:
                    files.append_rows(log, [{"model": m, "prompt": i, "answers": done[m, i]} for i in some])
                    at = len(fits) - len(todo) + start + len(some)
                    logger.info("%s: %s answered %d of %d prompts", stage.name, path, at, len(fits))
        del model

    long = [rows[i]["where"] for i in sorted(left_out)]
    what = f"what the models read beside an answer of {settings.response_length} tokens"
    mixing.report_length(stage, "prompts", len(rows), len(rows) - len(long), long, what, policy, "")
    plain_text.report(stage.report, "prompts", rows, lambda row: row["where"] in control)
    names = [name.removeprefix("stage:") for name in stage.sections["sample"]["models"]]
    groups = {i: [done[m, i] for m in range(len(names))] for i in range(len(rows)) if i not in left_out}
    samples, counts = collect(prompts, groups, names)
    stage.report["answers"] = counts
    if not samples:
        raise errors.DataError(f"{stage.name}: no prompt has two different answers; raise sample.temperature")
    if state.is_main_process:
        files.write_rows(stage.folder / SAMPLES, samples)
    ended = [e for row in samples for e in row["ended"]]
    return {**counts, "rows": len(samples), "ended": sum(ended) / len(ended)}


def shown(stage, tokenizer, model) -> Iterator[dict]:
    """The prompts as the first of `sample.models` is given them, for `pipelines show`."""
    rows, _ = mixing.load(stage.data, stage.spec.rows, stage.seed, report=stage.report)
    encoded = [chat_template.encode_prompt(tokenizer, row["prompt"]) for row in rows]
    limit, length = loading.positions(model), stage.section("sample").response_length
    long = [ids for ids in encoded if limit is not None and len(ids) + length > limit]
    stage.report["train"] = {"rows": len(rows), "used": len(rows) - len(long), "too_long": len(long)}
    for row, ids in zip(rows, encoded, strict=True):
        yield {"side": "train", "where": row["where"], "input_ids": ids, "labels": [IGNORE_INDEX] * len(ids)}


def collect(prompts: list, groups: dict[int, list[list]], names: list[str]) -> tuple[list[dict], dict[str, int]]:
    """Rows of samples.jsonl and what was left out, from the answers `(text, ended)` of each model to each prompt."""
    samples, counts = [], {"duplicates": 0, "empty": 0, "prompts_without_choice": 0}
    for place, (i, group) in enumerate(groups.items()):
        kept: dict[str, tuple[str, bool]] = {}
        for turn in range(len(names)):
            m = (place + turn) % len(names)  # whose copy of an answer is kept: each model's in turn
            for text, ended in group[m]:
                if not text:
                    counts["empty"] += 1
                elif text in kept:
                    counts["duplicates"] += 1
                else:
                    kept[text] = names[m], bool(ended)
        if len(kept) < 2:
            counts["prompts_without_choice"] += 1
            continue
        models, ended = zip(*kept.values(), strict=True)
        samples.append({"prompt": prompts[i], "completions": list(kept), "models": list(models), "ended": list(ended)})
    return samples, counts


def _read(log: Path) -> dict[tuple[int, int], list]:
    """What an interrupted run had written; a line it did not finish is cut off."""

    found = files.read_rows(log)
    if found:
        files.write_rows(log, found)
        logger.info("going on after %d prompts that are answered", len(found))
    return {(row["model"], row["prompt"]): row["answers"] for row in found}
