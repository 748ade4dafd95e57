"""`check` says when the disk will not hold what the stages write."""

from pipelines import files
from pipelines.commands import check

GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64}


def test_check_warns_of_a_disk_that_is_too_small(recipe, write, tiny_gpt2, monkeypatch, capsys):
    rows = write("rows.jsonl", [{"prompt": f"what is {i}", "completion": "a fish"} for i in range(20)])
    text = write("text.jsonl", [{"text": f"the cat is {i}"} for i in range(20)])
    tokenizer = {"model_name_or_path": None, "config": GPT2, "tokenizer_name_or_path": str(tiny_gpt2)}
    path = recipe(
        {
            "base": {"kind": "pretrain", "model": {k: v for k, v in tokenizer.items() if v}, "data": {"train": text}},
            "sft": {
                "kind": "sft",
                "model": {"model_name_or_path": "stage:base", "chat_template": "plain"},
                "data": {"train": rows},
            },
        }
    )
    assert check.main([str(path)]) == 0
    assert "warning" not in capsys.readouterr().out
    monkeypatch.setattr(files, "free_bytes", lambda path: 2_000_000)
    assert check.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert out.count("warning: base: its checkpoints need about") == 1 and "2.0 MB free" in out and "no problems" in out
    monkeypatch.setattr(files, "free_bytes", lambda path: 5_300_000)  # for each stage, but not for one after another
    assert check.main([str(path)]) == 0
    assert "warning: sft: " in (out := capsys.readouterr().out) and "beside" in out
