"""A folder that holds an adapter alone is loaded as its base with the adapter merged into it, in every kind, or
refused.
"""

import json
import shutil

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipelines.errors import ModelError
from pipelines.kinds import CLASSIFIER, LANGUAGE_MODEL
from pipelines.models import loading
from pipelines.models.config import ModelSection
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.recipe import load

IDS = torch.tensor([[5, 9, 30, 7]])


@pytest.fixture(scope="module")
def adapters(tiny_gpt2, tmp_path_factory):
    """Folders of trained adapters by kind, and the logits of each merged by peft."""
    found, torch_state = {}, torch.random.get_rng_state()
    for kind, auto, task in (
        ("causal", AutoModelForCausalLM, "CAUSAL_LM"),
        ("score", AutoModelForSequenceClassification, "SEQ_CLS"),
    ):
        torch.manual_seed(1)
        settings = {"num_labels": 1} if kind == "score" else {}
        model = auto.from_pretrained(tiny_gpt2, **settings)
        config = peft.LoraConfig(
            r=4, task_type=task, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
        )
        adapted = peft.get_peft_model(model, config)
        folder = tmp_path_factory.mktemp(kind)
        adapted.save_pretrained(folder)
        with torch.no_grad():
            found[kind] = str(folder), adapted.eval()(IDS).logits
    torch.random.set_rng_state(torch_state)
    return found


@pytest.mark.parametrize(
    "kind, auto, settings", [("causal", LANGUAGE_MODEL, {}), ("score", CLASSIFIER, {"num_labels": 1})]
)
def test_it_is_merged_into_its_base(adapters, kind, auto, settings):
    folder, expected = adapters[kind]
    section = ModelSection(model_name_or_path=folder)
    model = loading.load_model(section, auto, **settings)
    assert not hasattr(model, "peft_config") and all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert torch.allclose(model.eval()(IDS).logits, expected, atol=1e-5)
    assert model.new_weights == []
    assert len(loading.load_tokenizer(section)) > 10  # its base's


def test_a_reward_model_starts_from_the_adapter_of_a_language_model(adapters):
    folder, _ = adapters["causal"]
    model = loading.load_model(ModelSection(model_name_or_path=folder), CLASSIFIER, new_head=True, num_labels=1)
    assert model.new_weights == ["score.weight"]
    whole = loading.load_model(ModelSection(model_name_or_path=folder), LANGUAGE_MODEL)
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, whole.transformer.h[0].attn.c_attn.weight)


def test_what_does_not_fit_is_refused(adapters, tmp_path, tiny_gpt2, recipe, write):
    with pytest.raises(ModelError, match="does not fit"):
        loading.load_model(ModelSection(model_name_or_path=adapters["score"][0]), LANGUAGE_MODEL)
    with pytest.raises(ModelError, match="random: score.weight"):
        loading.load_model(ModelSection(model_name_or_path=adapters["causal"][0]), CLASSIFIER, num_labels=1)
    lost = tmp_path / "lost"
    shutil.copytree(adapters["causal"][0], lost)
    config = json.loads((lost / "adapter_config.json").read_text())
    rows = write("a.jsonl", [{"prompt": f"what is {i}", "completion": "a fish"} for i in range(20)])
    for base, words in (
        ("./nowhere", "is an adapter on ./nowhere, and there: no such folder"),
        (None, "does not name the model"),
    ):
        (lost / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        stage = {"kind": "sft", "model": {"model_name_or_path": str(lost)}, "data": {"train": rows}}
        with pytest.raises(RecipeError, match=words):
            load(recipe({"sft": stage}))
