"""How many optimizer steps a run has, and of what, is said before it begins; few of them are warned of."""

from types import SimpleNamespace

import pytest

from pipelines.training.loop import _Size

ARGS = SimpleNamespace(per_device_train_batch_size=4, gradient_accumulation_steps=2, world_size=1, max_steps=-1)


@pytest.mark.parametrize(
    "report, steps, told, warned",
    [
        (
            {"packs": 96, "train": {"used": 1163}},
            24,
            "24 optimizer steps of 8 packs each (about 97 examples)",
            "set args.packing: false",
        ),
        ({"train": {"used": 5000}}, 625, "625 optimizer steps of 8 rows each", None),
        ({"train": {"windows": 400}}, 50, "50 optimizer steps of 8 windows each", "raise args.num_train_epochs"),
        ({}, 100, "100 optimizer steps of 8 rows each", None),
    ],
)
def test_the_steps_of_a_run(report, steps, told, warned, caplog):
    caplog.set_level("INFO", "pipelines")
    _Size(SimpleNamespace(name="sft", report=report)).on_train_begin(ARGS, SimpleNamespace(max_steps=steps), None)
    assert told in caplog.text
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert (
        (not warnings) if warned is None else (f"only {steps} optimizer steps" in warnings[0] and warned in warnings[0])
    )
