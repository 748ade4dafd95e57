"""vLLM without vLLM: what TRL's engine is given, and stages that write with a stand-in for it."""

from __future__ import annotations

import importlib.util
import json
import types

import pytest
import torch
from tiny_words import WORDS
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig
from trl.generation import vllm_generation

from pipelines.chain import chain
from pipelines.errors import SetupError
from pipelines.generation import with_vllm
from pipelines.generation.decode import generate
from pipelines.ppo.config import PPOConfig
from pipelines.ppo.rollouts import vllm_engine
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.recipe import load


@pytest.fixture
def installed(monkeypatch):
    """vLLM is installed, as far as anyone can tell: TRL's engine is `Engine`, which answers greedily."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name == "vllm" or find(name, *a))
    made = []

    class Engine:
        def __init__(self, model, accelerator, tokenizer, **how):
            self.model, self.how = model, how
            self.llm = vllm_generation.LLM(model=model.name_or_path)
            made.append(self)

        def generate(self, prompts, images, num_generations):
            assert images is None and num_generations == 1 and max(map(len, prompts)) <= self.how["max_model_length"]
            length, ends = self.how["max_completion_length"], self.how["generation_kwargs"]["stop_token_ids"]
            seeds = [(made.index(self), i) for i in range(len(prompts))]
            more = {key: self.how[key] for key in ("temperature", "top_k", "top_p")}
            ids, _ = generate(self.model, prompts, max_new_tokens=length, eos_token_ids=ends, seeds=seeds, **more)
            return prompts, ids, None, None

    monkeypatch.setattr(vllm_generation, "VLLMGeneration", Engine)
    monkeypatch.setattr(vllm_generation, "LLM", lambda **how: how, raising=False)
    return made


def start(policy, mixed_precision="bf16", **settings):
    """TRL's engine for these settings of ppo."""
    args = PPOConfig(use_vllm=True, use_cpu=True, report_to=[], **settings)
    return vllm_engine(policy, None, types.SimpleNamespace(mixed_precision=mixed_precision), args, 20, [3])


def test_settings_have_trls_names_and_defaults():
    ours, theirs = PPOConfig.__dataclass_fields__, GRPOConfig.__dataclass_fields__
    names = [name for name in ours if name.startswith("vllm_")]
    assert len(names) == 9 and all(ours[name].default == theirs[name].default for name in names)


def test_the_engine_is_given_what_was_set(installed, tiny_gpt2):
    policy = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    settings = {"vllm_tensor_parallel_size": 2, "vllm_enable_sleep_mode": True, "vllm_gpu_memory_utilization": 0.5}
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    how = start(policy, temperature=0.9, top_k=7, response_length=5, **settings, **batch).how
    assert (how["tensor_parallel_size"], how["enable_sleep_mode"], how["gpu_memory_utilization"]) == (2, True, 0.5)
    assert how["max_num_seqs"] == 24 and how["max_model_length"] == 25 and how["max_completion_length"] == 5
    assert (how["temperature"], how["top_k"], how["logprobs"], how["mode"]) == (0.9, 7, 0, "colocate")
    assert how["generation_kwargs"] == {"stop_token_ids": [3]} and how["trust_remote_code"] is False
    assert start(policy, vllm_importance_sampling_correction=False).how["logprobs"] is None
    url = {"vllm_mode": "server", "vllm_server_base_url": "http://localhost:8000"}
    assert start(policy, **url).how["server_base_url"] == "http://localhost:8000"
    foreign = type("Their", (type(policy),), {"__module__": "transformers_modules.their.code"})
    policy.__class__ = foreign
    assert start(policy).how["trust_remote_code"] is True


@pytest.mark.parametrize("trained, held", [("bf16", "bfloat16"), ("fp16", "float16"), ("no", "float32")])
def test_vllm_computes_in_the_precision_that_is_trained_in(installed, tiny_gpt2, trained, held):
    policy = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    before = vllm_generation.LLM
    assert start(policy, trained).llm == {"model": str(tiny_gpt2), "dtype": held}
    assert vllm_generation.LLM is before
    assert start(policy.bfloat16(), "no").llm["dtype"] == "bfloat16"


def test_what_vllm_would_load_otherwise_is_refused(installed, tiny_gpt2, tmp_path, monkeypatch):
    policy = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    policy.resize_token_embeddings(policy.config.vocab_size + 3)
    with pytest.raises(SetupError, match="tokens were added here"):
        start(policy)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_gpt2)}))
    policy.name_or_path = str(tmp_path)
    with pytest.raises(SetupError, match="an adapter alone"):
        start(policy)

    def fails(*args, **how):
        raise ValueError("architecture is not supported")

    monkeypatch.setattr(vllm_generation, "VLLMGeneration", fails)
    with pytest.raises(SetupError, match="vLLM cannot start with .*: architecture is not supported"):
        start(AutoModelForCausalLM.from_pretrained(tiny_gpt2))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode needs use_vllm: true"),
        ({"vllm_importance_sampling_mode": "token_mask"}, "needs use_vllm: true"),
        ({"use_vllm": True, "vllm_server_base_url": "http://h"}, "only with vllm_mode: server"),
        ({"use_vllm": True, "vllm_mode": "server", "vllm_tensor_parallel_size": 2}, "is for vllm_mode: colocate"),
        ({"use_vllm": True, "vllm_importance_sampling_clip_min": 3.0}, "must be below"),
        ({"use_vllm": True, "vllm_importance_sampling_mode": "words"}, "must be one of token_truncate"),
        (
            {
                "use_vllm": True,
                "vllm_importance_sampling_mode": "token_truncate",
                "vllm_importance_sampling_clip_max": None,
            },
            "needs vllm_importance_sampling_clip_min or _clip_max",
        ),
    ],
)
def test_settings_that_exclude_each_other(settings, message):
    with pytest.raises(SetupError, match=message):
        PPOConfig(use_cpu=True, report_to=[], **settings)


def asking(write, base, **keys):
    """A stage each of kind sample and evaluate, which write with vLLM, greedily."""
    asked = write("asked.jsonl", [{"prompt": f"what is {w}"} for w in WORDS[:4]])
    sample = {"models": [base], "completions": 2, "response_length": 6, "use_vllm": True}
    scored = {"models": [base], "prompts": asked, "judge": f"{__name__}:judge", "response_length": 6, "use_vllm": True}
    return {
        "samples": {"kind": "sample", "data": {"train": asked}, "sample": sample | keys},
        "scores": {"kind": "evaluate", "evaluate": {**scored, "temperature": 0.0}},
    }


def judge(prompt, answer):
    return float(len(answer))


def test_sample_and_evaluate_write_with_vllm(recipe, write, tiny_gpt2, installed):
    loaded = load(recipe(asking(write, str(tiny_gpt2))))
    chain.run(loaded)
    rows = [json.loads(line) for line in open(loaded["samples"].folder / "samples.jsonl")]
    assert rows and len(installed) == 2 and [e.how["top_k"] for e in installed] == [0, 1]
    assert all(e.how["gpu_memory_utilization"] == 0.8 and e.how["logprobs"] is None for e in installed)
    assert installed[0].how["max_completion_length"] == 6
    scores = json.loads((loaded["scores"].folder / "values.json").read_text())
    model, tokenizer = (cls.from_pretrained(tiny_gpt2) for cls in (AutoModelForCausalLM, AutoTokenizer))
    prompts = [tokenizer(f"what is {w}")["input_ids"] for w in WORDS[:4]]
    ids, _ = generate(
        model.eval(), prompts, max_new_tokens=6, eos_token_ids=[tokenizer.eos_token_id], seeds=[0] * 4, top_k=1
    )
    lengths = [float(len(t.strip())) for t in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    found = json.dumps(scores)
    assert json.dumps(lengths) in found, (lengths, found[:500])


def test_without_vllm_they_say_so(recipe, write, tiny_gpt2):
    with pytest.raises(RecipeError, match=r"(?s)samples\.sample\.use_vllm.*not installed.*scores\.evaluate\.use_vllm"):
        load(recipe(asking(write, str(tiny_gpt2))))


def test_vllm_writes_nothing_where_nothing_is_asked():
    from pipelines.evaluation.checks import problems

    found = list(problems({"models": ["m"], "text": "x.txt", "use_vllm": True}))
    assert ("use_vllm", "writes answers to prompts or pairs, which are not asked for: drop this key", True) in found


def test_the_model_gives_the_device_up_while_vllm_writes(installed, tiny_gpt2, tokenizer):
    from simulated_gpu import on_gpu, simulated_gpu

    with pytest.MonkeyPatch.context() as patch, simulated_gpu(patch):
        model = AutoModelForCausalLM.from_pretrained(tiny_gpt2).to("cuda").eval()
        with with_vllm.writer(model, tokenizer, [[1, 2]], [0], response_length=3) as write:
            assert not any(on_gpu(weight) for weight in model.parameters())
            assert len(write([[1, 2], [3]])) == 2
        assert all(on_gpu(weight) for weight in model.parameters())
    assert torch.is_tensor(next(model.parameters()))
