"""What is published of a finished stage tells nothing of the machine it was made on, nor of who worked there."""

import getpass
import json
import os
import socket
from pathlib import Path

import pytest

from pipelines.chain.record import differences, portable
from pipelines.commands import push
from pipelines.commands.run_here import run_and_report
from pipelines.recipe.recipe import load

ROWS = [
    {"prompt": f"what colour is the {w}", "completion": f"the {w} is red"} for w in "cat dog bird fish tree".split()
] * 4
PLANTED = {"HF_TOKEN": "hf_" + "Planted" * 5, "WANDB_API_KEY": "k" * 40, "SOME_SECRET": "correct-horse-battery"}


@pytest.mark.parametrize("lora", [False, True])
def test_no_file_of_a_finished_stage_holds_a_secret_or_a_place(recipe, write, tiny_gpt2, tmp_path, monkeypatch, lora):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("USER", "ada-of-the-lab")
    monkeypatch.setattr(socket, "gethostname", lambda: "machine-of-ada")
    args = {"global_batch_size": 4, "max_steps": 2, "max_length": 32, "report_to": ["tensorboard"]}
    peft = {"use_peft": True, "lora_r": 2} if lora else {}
    first = {
        "kind": "sft",
        "model": {"model_name_or_path": str(tiny_gpt2), "chat_template": "plain", **peft},
        "data": {"train": write("rows.jsonl", ROWS), "validation": 0.2},
        "args": args,
    }
    loaded = load(recipe({"first": first}))
    run_and_report(loaded, [], [])
    folder = loaded["first"].folder
    words = [*PLANTED.values(), "ada-of-the-lab", "machine-of-ada", str(tmp_path), str(tiny_gpt2), str(Path.cwd())]
    words += [str(Path.home()) + "/", str(Path(push.__file__).parents[2])]
    if len(getpass.getuser()) > 4:  # `root` stands in many a text
        words.append(getpass.getuser())
    if len(os.uname().nodename) > 4:
        words.append(os.uname().nodename)
    sent = [folder / name for name in push.files(folder)]  # without `adapter`: PEFT finds its base by the path in it
    assert {"README.md", "stage.json", "history.jsonl", "config.json", "model.safetensors"} <= {p.name for p in sent}
    assert lora == (folder / "adapter").is_dir()
    found = {
        path.name: [word for word in words if word.encode() in path.read_bytes()]
        for path in [*sent, loaded.output_dir / "report.html"]
    }
    assert not any(found.values()), found
    stage = json.loads((folder / "stage.json").read_text())
    message = f"{stage['stage']} ({stage['kind']}) of {stage['recipe']}"  # of `push`
    assert message == "first (sft) of recipe.yaml"


def test_absolute_paths_are_short_and_told_apart():
    one, two = {"data": {"/a/x.jsonl": {"sha256": "1"}}}, {"data": {"/b/x.jsonl": {"sha256": "1"}}}
    assert list(portable(one)["data"])[0].startswith("…/x.jsonl (") and "/a/" not in json.dumps(portable(one))
    assert differences(one, portable(one)) == [] and differences(one, two)
    assert portable({"a": ["stage:x/y", "data/x.jsonl", "/", "a /b", 3]}) == {
        "a": ["stage:x/y", "data/x.jsonl", "/", "a /b", 3]
    }
