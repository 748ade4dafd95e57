"""Global batches, data order and a stop on NaN that names the rows."""

import types

import pytest

from pipelines import files
from pipelines.commands.run_here import run_and_report
from pipelines.errors import NotFinite
from pipelines.recipe.recipe import load
from pipelines.training import checkpoints
from pipelines.training.arguments import accumulation
from pipelines.training.trainer import GlobalOrder


@pytest.mark.parametrize(
    "total, micro, world, expected",
    [
        (32, 8, 1, (8, 4)),
        (32, 8, 2, (8, 2)),
        (32, 8, 4, (8, 1)),
        (32, 8, 8, (4, 1)),
        (12, 8, 1, (6, 2)),
        (7, 2, 1, (1, 7)),
    ],
)
def test_global_batch_becomes_micro_batch_and_accumulation(total, micro, world, expected):
    found = accumulation({"global_batch_size": total, "per_device_train_batch_size": micro}, world)
    size, steps = found["per_device_train_batch_size"], found["gradient_accumulation_steps"]
    assert (size, steps) == expected and size * steps * world == total and size <= micro


def test_a_global_batch_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="use a multiple of 3"):
        accumulation({"global_batch_size": 32}, 3)


def order(rows, epoch=0.0, batch=4, accumulate=1, world=1, seed=1):
    args = types.SimpleNamespace(
        train_batch_size=batch, gradient_accumulation_steps=accumulate, world_size=world, seed=seed
    )
    return GlobalOrder(types.SimpleNamespace(args=args, state=types.SimpleNamespace(epoch=epoch)), rows)


def test_order_depends_on_seed_and_epoch_only():
    assert list(order(103)) == list(order(103, batch=2, accumulate=2)) == list(order(103, batch=1, world=4))
    assert list(order(103)) == list(order(103, epoch=0.73))  # resumed in the middle of the epoch
    assert list(order(103)) != list(order(103, epoch=1.0)) and list(order(103)) != list(order(103, seed=2))


def test_every_epoch_is_whole_global_batches_of_different_rows():
    first = list(order(103))
    assert len(first) == len(order(103)) == 100 and len(set(first)) == 100
    assert set(first) != set(order(103, epoch=1.0))


def test_too_few_rows_for_one_step():
    with pytest.raises(ValueError, match="3 training rows do not fill one step of 4"):
        order(3)


def test_nan_names_step_rows_and_last_checkpoint(recipe, write, tiny_gpt2, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    poison = tokenizer("Z", add_special_tokens=False)["input_ids"][0]  # a token that only one row holds
    model.get_input_embeddings().weight.data[poison] = float("nan")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = type(model.lm_head.weight)(model.lm_head.weight.data.nan_to_num())
    model.save_pretrained(tmp_path / "poisoned")
    tokenizer.save_pretrained(tmp_path / "poisoned")
    rows = [{"prompt": f"what is {i}", "completion": "Z" if i == 13 else "fish"} for i in range(32)]
    stage = {
        "kind": "sft",
        "model": {"model_name_or_path": str(tmp_path / "poisoned"), "chat_template": "plain"},
        "data": {"train": write("rows.jsonl", rows)},
        "args": {
            "global_batch_size": 4,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 1,
            "save_steps": 1,
            "logging_steps": 1,
        },
    }
    loaded = load(recipe({"sft": stage}))
    with pytest.raises(NotFinite) as error:
        run_and_report(loaded, [], [])
    text = str(error.value)
    assert "rows.jsonl:14" in text and "the loss is nan at step" in text and "last good checkpoint" in text
    # What was logged until then is on disk, and in the report.
    entries, total, seconds = files.read_log(loaded["sft"].checkpoints)
    failed = int(text.split("at step ")[1].split(".")[0])
    assert total == 8 and seconds > 0 and [e["step"] for e in entries] == list(range(1, failed))
    assert f"step {failed - 1} of 8" in (loaded.output_dir / "report.html").read_text()


def test_last_checkpoint_is_the_newest_whole_one(tmp_path):
    for step, whole in [(2, True), (10, True), (12, False)]:
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / checkpoints.COMPLETE).touch()
    assert checkpoints.last_checkpoint(tmp_path).endswith("checkpoint-10")
    assert checkpoints.last_checkpoint(tmp_path / "none") is None
