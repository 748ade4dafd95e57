"""The points of a sweep: which there are, what differs between them, and links to what an earlier run has made.

A point is a run like any other, in a folder named by its values. A stage that was finished before with the same
settings, data and parents is not trained again: its folder in the point is a link to where it lies, so its record is
the one that was written when it was made.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipelines import files
from pipelines.chain import record as chain_record
from pipelines.chain.record import differences, identity, settings, stage_damage
from pipelines.errors import RecordError, SetupError
from pipelines.recipe.stage import Recipe, Stage

MOST = 500  # points of one sweep
DRAW = 0  # the seed of `--random`: the same command draws the same points, a larger N draws these and more


def short(key: str) -> str:
    """A key path for people and folders: `stages.policy.args.kl_coef` is policy.kl_coef."""
    parts = key.split(".")
    parts = parts[1:] if parts[0] == "stages" else parts
    return ".".join(parts[:1] + parts[2:] if len(parts) > 2 and parts[1] == "args" else parts)


def folder_name(words: Iterable[str]) -> str:
    """A folder's name for `words`: readable and safe; where something had to be changed, six digits tell it apart."""
    plain = ",".join(word or "null" for word in words)
    safe = re.sub(r"^\.", "-", re.sub(r"[^A-Za-z0-9_.,+-]", "-", plain))[:100]
    return safe if safe == plain else f"{safe}-{hashlib.sha256(plain.encode()).hexdigest()[:6]}"


def product(values: dict[str, list[str]], draw: int | None = None) -> list[dict[str, str]]:
    """Every combination of the keys' `values`, the last key changing fastest; with `draw` so many of them, at random.

    Raises `SetupError` for more than `MOST`.
    """
    total = math.prod(map(len, values.values()))
    if draw is not None and draw < 1:
        raise SetupError(f"--random {draw}: must be 1 or more")
    if min(total, draw or total) > MOST:
        most = f"at most {MOST} points"
        raise SetupError(f"{total} points are too many: fewer values, or --random N ({most})" if not draw else most)
    if draw is None or draw >= total:
        return [dict(zip(values, one, strict=True)) for one in itertools.product(*values.values())]
    rng, drawn = random.Random(DRAW), set[int]()
    while len(drawn) < draw:
        drawn.add(rng.randrange(total))
    out = []
    for number in sorted(drawn):
        point = {}
        for key, texts in reversed(values.items()):
            number, at = divmod(number, len(texts))
            point[key] = texts[at]
        out.append({key: point[key] for key in values})
    return out


def needed(recipes: Sequence[Recipe], names: Sequence[str]) -> list[str]:
    """The stages `names` (all when empty) and what they build on in any of the `recipes`, in the recipe's order."""
    order = [stage.name for stage in recipes[0].stages]
    wanted = set(names or order)
    for name in reversed(order):
        if name in wanted:
            wanted |= {parent for recipe in recipes for parent in recipe[name].parents}
    return [name for name in order if name in wanted]


def variants(recipes: Sequence[Recipe], names: Sequence[str]) -> list[tuple[int, ...]]:
    """For each recipe the numbers of its stages' variants: stages with the same number have settings that train the
    same, what they build on aside.
    """
    known: dict[str, list[dict]] = {name: [] for name in names}
    out = []
    for recipe in recipes:
        numbers = []
        for name in names:
            mine = settings(recipe[name])
            found = (i for i, other in enumerate(known[name]) if not differences(other, mine))
            number = next(found, len(known[name]))
            if number == len(known[name]):
                known[name].append(mine)
            numbers.append(number)
        out.append(tuple(numbers))
    return out


def link_finished(recipe: Recipe, names: Sequence[str], homes: Sequence[Path]) -> None:
    """Link the stages `names` that a run in one of the folders `homes` has finished as they would be made here.

    Links of an earlier call are made anew; a stage that was begun or finished here stays.
    """
    made: dict[str, str | None] = {}
    for stage in recipe.stages:
        if stage.folder.is_symlink():
            stage.folder.unlink()
        if stage.name in names and not os.path.lexists(stage.folder):
            home = _finished_elsewhere(stage, made, homes)
            if home is not None:
                recipe.output_dir.mkdir(parents=True, exist_ok=True)
                stage.folder.symlink_to(os.path.relpath(home, recipe.output_dir), target_is_directory=True)
        final = files.read_record(stage.folder / files.FINISHED)
        made[stage.name] = identity(final) if final else None


def _finished_elsewhere(stage: Stage, made: dict[str, str | None], homes: Sequence[Path]) -> Path | None:
    parents = {name: made.get(name) for name in stage.parents}
    if None in parents.values():
        return None
    mine = None
    for home in homes:
        folder = home / stage.name
        if folder.is_symlink() or folder == stage.folder:
            continue
        final = None
        with contextlib.suppress(RecordError):  # whose record cannot be read is no model to build on
            final = files.read_record(folder / files.FINISHED)
        if final is None:
            continue
        mine = mine or chain_record.record(stage, parents)  # reads the data: only where there is something to compare
        if not differences(final["record"], mine) and not stage_damage(folder, final, quick=True):
            return folder
    return None
