"""A chain whose stages only write a file."""

import types

import pytest

from pipelines.recipe import recipe as recipe_recipe
from pipelines.stages import sft

ROWS = [{"prompt": f"what is {i}", "completion": "a fish"} for i in range(20)]


@pytest.fixture
def two(recipe, write, monkeypatch):
    """A recipe of two stages that only write a file; `two(*overrides)` loads it, `runs` counts what ran."""
    data = write("a.jsonl", ROWS)
    path = recipe(
        {
            "one": {
                "kind": "sft",
                "model": {"model_name_or_path": "gpt2"},
                "data": {"train": data},
                "args": {"learning_rate": 1e-3},
            },
            "two": {"kind": "sft", "model": {"model_name_or_path": "stage:one"}, "data": {"train": data}},
        }
    )
    runs = []

    def run(stage):
        runs.append(stage.name)
        stage.folder.mkdir(exist_ok=True)
        (stage.folder / "model.txt").write_text(str(len(runs)))
        if fail and stage.name == fail[0]:
            raise RuntimeError("killed")
        return {"loss": 1.0}

    fail = []

    fake = types.SimpleNamespace(**{k: getattr(sft, k) for k in ("DEFAULTS", "problems")}, run=run)
    monkeypatch.setattr("pipelines.recipe.stage.Stage.module", fake)
    load = lambda *overrides: recipe_recipe.load(path, list(overrides))
    return types.SimpleNamespace(load=load, runs=runs, fail=fail, data=data, path=path)
