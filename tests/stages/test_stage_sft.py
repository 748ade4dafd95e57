"""Supervised fine-tuning: loss on answers only, EOS is learned, long rows are counted, every shape of data works."""

import json
import math

import pytest
import torch

from pipelines.chain import chain
from pipelines.errors import DataError
from pipelines.models import chat_template
from pipelines.recipe.recipe import load

FACTS = {"cat": "red", "dog": "blue", "bird": "green", "fish": "big"}
ROWS = [{"prompt": f"what colour is the {k}", "completion": f"the {k} is {v}"} for k, v in FACTS.items()]
ARGS = {"global_batch_size": 4, "learning_rate": 5e-3, "num_train_epochs": 40, "max_length": 64, "eval_steps": 0.5}


def run(recipe, tiny_gpt2, data, args=None, model=None):
    stage = {
        "kind": "sft",
        "model": {"model_name_or_path": str(tiny_gpt2), **(model or {})},
        "data": data,
        "args": {**ARGS, **(args or {})},
    }
    loaded = load(recipe({"sft": stage}))
    chain.run(loaded)
    return loaded["sft"].folder, json.loads((loaded["sft"].folder / "stage.json").read_text())


@pytest.mark.parametrize("packing", [True, False])
def test_it_learns_to_answer_and_to_stop(recipe, write, tiny_gpt2, packing):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = write("rows.jsonl", ROWS * 8)
    folder, record = run(
        recipe,
        tiny_gpt2,
        {"train": data, "validation": data},
        {"packing": packing, "num_train_epochs": 60, "global_batch_size": 4 if packing else 8},
    )
    assert record["metrics"]["eval_perplexity"] < 1.2
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for row in ROWS:
        ids = torch.tensor([chat_template.encode_prompt(tokenizer, row["prompt"])])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)[
            0, ids.shape[1] :
        ]
        assert out[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(out, skip_special_tokens=True) == row["completion"]


def test_the_reported_loss_is_that_of_the_answers_alone(recipe, write, tiny_gpt2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = write("rows.jsonl", ROWS * 4)
    folder, record = run(recipe, tiny_gpt2, {"train": data, "validation": data}, {"num_train_epochs": 2})
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    total = count = 0
    for row in ROWS:
        prompt, answer = chat_template.encode_answer(tokenizer, row["prompt"], row["completion"])
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    assert record["metrics"]["eval_loss"] == pytest.approx(total / count, rel=1e-4)
    assert record["metrics"]["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-3)
    assert record["metrics"]["eval_tokens"] == 4 * count


def test_dialogues_and_instructions_mix(recipe, write, tiny_gpt2):
    dialogue = {"messages": [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "red"}]}
    alpaca = {"instruction": "what is it", "input": "a dog", "output": "blue"}
    sources = [write("d.jsonl", [dialogue] * 8), write("i.jsonl", [alpaca] * 8), write("p.jsonl", ROWS)]
    _, record = run(recipe, tiny_gpt2, {"train": sources}, {"num_train_epochs": 1})
    assert record["rows"]["train"]["used"] == 20


@pytest.mark.parametrize("policy, used", [("drop", 4), ("truncate", 8)])
def test_rows_longer_than_the_context_are_counted(recipe, write, tiny_gpt2, policy, used, caplog):
    long = [{"prompt": "what is it", "completion": "big fish " * 60}] * 4
    data = {"train": write("rows.jsonl", ROWS + long), "too_long": policy}
    with caplog.at_level("WARNING", logger="pipelines"):
        _, record = run(recipe, tiny_gpt2, data, {"num_train_epochs": 1, "max_length": 48})
    assert record["rows"]["train"]["too_long"] == 4 and record["rows"]["train"]["used"] == used
    assert "4 of 8 rows are longer than 48 tokens" in caplog.text and "rows.jsonl:5" in caplog.text


def test_rows_longer_than_the_context_can_be_an_error(recipe, write, tiny_gpt2):
    long = [{"prompt": "what is it", "completion": "big fish " * 60}]
    with pytest.raises(DataError, match="rows.jsonl:5"):
        run(recipe, tiny_gpt2, {"train": write("rows.jsonl", ROWS + long), "too_long": "error"})


def test_a_plain_template_is_kept_for_later_stages(recipe, write, tiny_gpt2):
    from transformers import AutoTokenizer

    folder, _ = run(
        recipe, tiny_gpt2, {"train": write("r.jsonl", ROWS)}, {"num_train_epochs": 1}, {"chat_template": "plain"}
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(chat_template.encode_prompt(tokenizer, "what is it")) == "what is it"
    assert chat_template.encode_answer(tokenizer, "what", "fish")[1][-1] == tokenizer.eos_token_id


def test_gradient_accumulation_changes_nothing(recipe, write, tiny_gpt2, tmp_path):
    """Rows of very different lengths: a mean of means would weigh their tokens differently."""
    from safetensors.torch import load_file

    rows = ROWS + [{"prompt": "what is it", "completion": "a fish " * (1 + 3 * i)} for i in range(4)]
    data, found = write("rows.jsonl", rows * 2), []
    for micro in (8, 2):
        folder, _ = run(
            recipe,
            tiny_gpt2,
            {"train": data},
            {
                "global_batch_size": 8,
                "per_device_train_batch_size": micro,
                "num_train_epochs": 3,
                "optim": "sgd",
                "learning_rate": 0.5,
            },
        )
        found.append(load_file(folder / "model.safetensors"))
        folder.parent.rename(tmp_path / f"micro{micro}")
    assert max((found[0][k] - found[1][k]).abs().max().item() for k in found[0]) < 1e-5
    start = load_file(tiny_gpt2 / "model.safetensors")
    assert max((found[0][k][:300] - start[k][:300]).abs().max().item() for k in start if k in found[0]) > 1e-2
