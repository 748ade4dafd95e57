"""Keys and types are those of the installed configs; values become their type or a sentence that says what is right."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from trl import SFTConfig

from pipelines.commands import keys
from pipelines.kinds import KINDS
from pipelines.recipe import schema
from pipelines.recipe.sections import SFTArguments
from pipelines.recipe.stage import section_class

SFT = SFTConfig
ROOT = Path(__file__).parents[2]


def test_a_section_has_the_keys_of_the_class_it_extends_and_its_own():
    assert {f.name for f in dataclasses.fields(SFTConfig)} | {"global_batch_size"} == set(schema.fields(SFTArguments))


def test_yaml_truth_values_are_the_choices_they_spell():
    assert schema.check_value(schema.fields(SFT)["save_strategy"], False) == ("no", None)
    assert schema.check_value(schema.fields(SFT)["packing"], False) == (False, None)


@pytest.mark.parametrize("kind", KINDS)
def test_every_annotation_of_every_section_can_be_checked(kind):
    for target in KINDS[kind].sections.values():
        for field in schema.fields(section_class(target)).values():
            schema._adapter(field.hint)


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


def test_keys_shows_every_mapping_that_a_recipe_may_hold(capsys):
    """Whatever a check reads the keys of (`wrong_keys`) is declared where the key is, so that `keys` prints it too."""
    sections = {
        node.name
        for path in (ROOT / "pipelines").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Section")
    }
    shown = ""
    for kind in KINDS:
        assert keys.main([kind]) == 0
        shown += capsys.readouterr().out
    assert {"JudgeSection", "SourceSection", "RewardSection"} <= sections
    assert [name for name in sections if f"({name})" not in shown] == []
    assert "<lambda>" not in shown


@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_a_part_are_those_of_the_whole(kind, capsys):
    keys.main([kind])
    whole = capsys.readouterr().out
    for places in re.findall(r"^([\w., ]+?)(?:, as a mapping)?:   \(\w+\)$", whole, re.M):
        for place in places.split(", "):
            assert keys.main([kind, place]) == 0
            part = capsys.readouterr().out
            assert f"{places}" in part and set(part.splitlines()) <= set(whole.splitlines())
    assert keys.main([kind, "nothing"]) == 2 and "has no section" in capsys.readouterr().err
