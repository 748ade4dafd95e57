"""What tests of dpo and kto share: a policy, encoded rankings, a stage, and how it is stopped and resumed."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipelines.chain import chain
from pipelines.speed.packed_attention import enable_packed_attention
from pipelines.training.preferences import enable_answer_logprobs

ARGS = {"global_batch_size": 8, "learning_rate": 1e-3, "max_steps": 4, "save_steps": 2, "logging_steps": 1}
TRL = {"bf16": False, "use_cpu": True, "report_to": [], "gradient_checkpointing": False}  # of its configs


def rankings(count, answers, seed=0):
    """Encoded rankings of random tokens: answers of different lengths to the same prompt."""
    draw = torch.Generator().manual_seed(seed)
    some = lambda n: torch.randint(5, 300, (n,), generator=draw).tolist()
    out = []
    for row in range(count):
        prompt = some(4 + row % 3)
        out.append(
            {
                "prompts": [prompt] * answers,
                "answers": [some(2 + (row + k) % 4) for k in range(answers)],
                "ranks": [float(k + 1) for k in range(answers)],
                "row": row,
            }
        )
    return out


def policy(folder, packed=True):
    """A causal language model as the stages train it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if packed:
        enable_packed_attention(model)
    enable_answer_logprobs(model)
    return model.train()


def stage(kind, train, folder, **args):
    """A stage of the recipe that learns from the file `train`, a fifth of it held out."""
    return {
        "kind": kind,
        "model": {"model_name_or_path": str(folder), "chat_template": "plain"},
        "data": {"train": train, "validation": 0.2},
        "args": {**ARGS, **args},
    }


def with_lora(stage):
    return stage | {"model": {**stage["model"], "use_peft": True, "lora_target_modules": ["all-linear"]}}


def weights(loaded, name):
    return load_file(loaded[name].folder / "model.safetensors")


def check_resumed(loaded, trainer, monkeypatch):
    """The stage `broken` is stopped in its sixth step and goes on: its weights are those of the stage `whole`."""
    real = trainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            chain.run(loaded, ["broken"])
    chain.run(loaded, ["broken"])
    broken = weights(loaded, "broken")
    assert all(torch.equal(value, broken[key]) for key, value in weights(loaded, "whole").items())


def check_parts(loaded):
    """The stages `parts` and `whole`, of micro-batches of two sizes, are the same; `lora` left its adapter."""
    whole = weights(loaded, "whole")
    assert all(torch.allclose(value, whole[key], atol=1e-5) for key, value in weights(loaded, "parts").items())
    assert (loaded["lora"].folder / "adapter" / "adapter_model.safetensors").is_file()
