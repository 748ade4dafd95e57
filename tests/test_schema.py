"""Keys and types are read from the source of the installed configs, and agree with the real dataclasses."""

import dataclasses
import subprocess
import sys

import pytest

from pipelines import schema
from pipelines.stages import KINDS

SFT = "trl.trainer.sft_config:SFTConfig"


def test_fields_equal_those_of_the_real_class():
    from transformers import Seq2SeqTrainingArguments
    from trl import RewardConfig, SFTConfig

    from pipelines.sections import SFTArguments

    for target, real in [
        (SFT, SFTConfig),
        ("trl.trainer.reward_config:RewardConfig", RewardConfig),
        ("transformers.training_args_seq2seq:Seq2SeqTrainingArguments", Seq2SeqTrainingArguments),
        ("pipelines.sections:SFTArguments", SFTArguments),
    ]:
        assert set(schema.fields(target)) == {f.name for f in dataclasses.fields(real)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_annotation_of_every_section_can_be_checked(kind):
    import importlib

    for target in importlib.import_module(f"pipelines.stages.{kind}").SECTIONS.values():
        for field in schema.fields(target).values():
            schema._adapter(field.annotation)


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("learning_rate", "2e-5", 2e-5),
        ("learning_rate", 1, 1.0),
        ("max_length", None, None),
        ("packing", True, True),
        ("lr_scheduler_type", "cosine", "cosine"),
        ("report_to", ["tensorboard"], ["tensorboard"]),
    ],
)
def test_good_values_become_their_type(key, value, expected):
    assert schema.check_value(schema.fields(SFT)[key], value) == (expected, None)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("learning_rate", "fast", "a number"),
        ("max_length", 2.5, "a whole number"),
        ("max_length", True, "a whole number"),
        ("packing", "maybe", "true or false"),
        ("lr_scheduler_type", "cosin", "did you mean cosine?"),
        ("packing_strategy", "bfdd", "did you mean bfd?"),
    ],
)
def test_bad_values_say_what_would_be_right(key, value, words):
    assert words in schema.check_value(schema.fields(SFT)[key], value)[1]


def test_model_config_keys():
    assert {"n_layer", "n_embd", "vocab_size", "hidden_size"} <= schema.model_config_keys("gpt2")[0]
    assert schema.model_config_keys("gtp2")[0] == set()


def test_reading_keys_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from pipelines import schema, recipe; schema.fields('pipelines.sections:PPOArguments');"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'trl', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
