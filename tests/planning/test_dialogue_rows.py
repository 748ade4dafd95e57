"""A row that its stage's chat template refuses is found by `check`, before anything runs."""

from transformers import AutoTokenizer

from pipelines.__main__ import main

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ m.role + ': ' + m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif "
    "%}"
)


def test_check_names_row_template_and_its_sentence(tiny_gpt2, recipe, write, tmp_path, capsys):
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_gpt2.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = NO_SYSTEM
    tokenizer.save_pretrained(base)
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a dog"}]
    thought = [turns[0], {**turns[1], "reasoning_content": "2+2"}]
    rows = [{"messages": turns}] * 16 + [
        {"messages": [{"role": "system", "content": "x"}, *turns]},
        {"messages": thought},
    ]
    stages = {
        "sft": {"kind": "sft", "model": {"model_name_or_path": str(base)}, "data": {"train": write("a.jsonl", rows)}},
        "policy": {
            "kind": "ppo",
            "model": {"model_name_or_path": "stage:sft", "chat_template_kwargs": {"enable_thinking": False}},
            "reward": {"functions": ["pipelines.ppo.rewards:length_penalty"]},
            "data": {"train": write("p.jsonl", [{"prompt": f"the cat {i}"} for i in range(32)])},
            "args": {"max_steps": 1},
        },
    }
    assert main(["check", str(recipe(stages))]) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert "a.jsonl:17: the chat template of" in text and "System role not supported" in text and str(base) in text
    assert "a.jsonl:18:" in text and "does not show `reasoning_content` of message 2" in text
    assert "stages.policy.model model.chat_template_kwargs: 'enable_thinking' is no variable" in text
    del stages["policy"]["model"]["chat_template_kwargs"]
    stages["sft"]["data"]["train"] = write("b.jsonl", rows[:16])
    assert main(["check", str(recipe(stages))]) == 0
