"""What GPUs change without a GPU at hand: one card of several, flash attention, heads in float32, quantized bases,
shards.
"""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from simulated_gpu import on_gpu, simulated_gpu
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import (
    AttentionInterface,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    modeling_utils,
)
from transformers.integrations import deepspeed

from pipelines import launch
from pipelines.chain import chain
from pipelines.errors import SetupError
from pipelines.evaluation import judges
from pipelines.generation import answers
from pipelines.generation.decode import Sampler, generate, lean_decode, ready_mask, takes_ready_masks, uniforms
from pipelines.generation.logprobs import (
    collate,
    has_plain_head,
    make_ready,
    sequence_scores,
    token_logprobs,
    token_values,
)
from pipelines.models import adapters, sharding
from pipelines.models.config import ModelSection
from pipelines.ppo import checks, rollouts
from pipelines.ppo.policy_and_critic import ValueHead, place_frozen
from pipelines.recipe.recipe import load
from pipelines.speed import fused_head, packed_attention
from pipelines.speed.fast_model import float32_linear, fuse_loss
from pipelines.speed.fused_head import linear_cross_entropy, linear_logprobs
from pipelines.training import arguments
from pipelines.training.preferences import collate_rankings, enable_answer_logprobs


def gpt2(kind=GPT2LMHeadModel, **settings):
    torch.manual_seed(0)
    size = dict(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    return kind(GPT2Config(**size, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, pad_token_id=39, **settings))


@pytest.mark.parametrize(
    "bf16, said, held",
    [
        (True, "bf16 (the GPUs compute in it)", "bfloat16"),
        (False, "fp32 (not every GPU here computes in bf16)", "float32"),  # as a T4 or V100
    ],
)
def test_one_process_uses_one_gpu_and_names_the_idle_ones(
    recipe, write, tiny_gpt2, monkeypatch, caplog, bf16, said, held
):
    monkeypatch.setenv("PIPELINES_FAST_ENV", "0")
    rows = write("a.jsonl", [{"prompt": f"what is {i}", "completion": "the cat"} for i in range(16)])
    args = {"global_batch_size": 4, "max_steps": 1, "save_strategy": "no"}
    stage = {"kind": "sft", "model": {"model_name_or_path": str(tiny_gpt2)}, "data": {"train": rows}, "args": args}
    seen = []
    forward = nn.DataParallel.forward
    monkeypatch.setattr(nn.DataParallel, "forward", lambda *a, **k: seen.append(1) or forward(*a, **k))
    loaded = load(recipe({"x": stage}))
    with pytest.MonkeyPatch.context() as patch, simulated_gpu(patch, bf16=bf16, devices=2) as gpu:
        with caplog.at_level("INFO", logger="pipelines"):
            chain.run(loaded)
            answers.load(str(tiny_gpt2))
        assert gpu.counts
    assert not seen and "one process uses one GPU, the other 1 are idle. All of them: accelerate launch" in caplog.text
    assert f"x: {said} on 1 x cuda, 4 rows per step" in caplog.text
    assert f"{tiny_gpt2}: on cuda, {held} weights" in caplog.text


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
def test_a_model_with_an_attention_that_refuses_the_cpu_is_fused_all_the_same(name):
    def refuse(*args, **kwargs):
        raise RuntimeError("FlashAttention only supports fp16 and bf16 on a GPU")

    AttentionInterface.register(name, refuse)
    try:
        model = gpt2()
        model.config._attn_implementation_internal = name
        with pytest.raises(RuntimeError, match="only supports"):
            model(torch.tensor([[1, 2]]))
        assert fuse_loss(model) and model.config._attn_implementation == name
        policy = gpt2()
        policy.config._attn_implementation_internal = name
        enable_answer_logprobs(policy)  # of dpo and kto, likewise before the model is moved
        assert has_plain_head(policy) and policy.config._attn_implementation == name
    finally:
        AttentionInterface._global_mapping.pop(name)


@pytest.mark.parametrize("who", ["answers", "judge"])
@pytest.mark.parametrize("how", ["fsdp2", "zero3"])
def test_what_trains_nothing_holds_whole_models_on_each_process_of_a_launch_for_shards(
    how, who, tiny_gpt2, tmp_path, monkeypatch
):
    """As the second process of a machine sees it: FSDP would fill new weights later, ZeRO-3 cuts them up."""
    zero3 = types.SimpleNamespace(is_zero3=lambda: True)
    if who == "answers":
        base = GPT2LMHeadModel.from_pretrained(tiny_gpt2)
        get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    if how == "fsdp2":
        for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
            monkeypatch.setenv(name, "true")
        monkeypatch.setattr("transformers.distributed.fsdp._is_torch_distributed_initialized", lambda: True)
        monkeypatch.setattr(modeling_utils, "is_local_dist_rank_0", lambda: False)
    else:
        monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: zero3)
    if who == "answers":
        AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path)
        model, _ = answers.load(str(tmp_path if how == "fsdp2" else tiny_gpt2))  # adapters are refused on shards
        weights = load_file(tiny_gpt2 / "model.safetensors")
        assert all(torch.equal(weights[name], w) for name, w in model.state_dict().items() if name in weights)
    else:
        gpt2(GPT2ForSequenceClassification, num_labels=1).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path)
        scored = {}
        monkeypatch.setattr(judges, "sequence_scores", lambda model, *_: scored.setdefault("by", model).score.weight)
        with contextlib.suppress(Exception):
            judges.model_scores(str(tmp_path), [{"prompt": "what is"}], [[("red", True)]])
        assert torch.equal(scored["by"].score.weight, gpt2(GPT2ForSequenceClassification, num_labels=1).score.weight)
    assert (deepspeed._hf_deepspeed_config_weak_ref is not None) == (how == "zero3")
    assert launch.sharded() == (how == "fsdp2")


def test_log_probs_of_answers_where_adapters_train_the_rows_of_new_tokens():
    """Of dpo and kto: PEFT wraps the head after the model was looked at, and it is more than a product then."""
    policy, batch = gpt2(), collate_rankings([{"prompts": [[1, 2], [1, 2]], "answers": [[3, 4], [5]]}], False, False)
    enable_answer_logprobs(policy)
    expected = policy(answers=batch)
    adapted = adapters.adapt(policy, ModelSection(use_peft=True), "CAUSAL_LM", [3])
    assert type(policy.get_output_embeddings()) is not nn.Linear
    torch.testing.assert_close(adapted(answers=batch), expected)  # nothing is learned yet
    adapted(answers=batch).sum().backward()
    assert any(w.grad is not None and w.grad.any() for name, w in adapted.named_parameters() if "token" in name)


def test_scores_and_values_are_not_rounded_by_autocast():
    """To bfloat16 would be to three digits; the states are, the heads are not."""
    critic = gpt2(GPT2ForSequenceClassification, num_labels=1)
    make_ready(critic)
    policy = gpt2()
    shared = ValueHead(policy)
    nn.init.normal_(shared.score.weight)
    states = torch.randn(50, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = critic.score(states), shared(states), token_values(critic, collate([([1, 2], [3, 4])], True, "cpu"))
        found += (sequence_scores(critic, [[1, 2, 3], [4, 5]], True, "cpu"),)
    torch.testing.assert_close(found[0], states @ critic.score.weight.T, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[1], (states @ shared.score.weight.T)[:, 0], atol=1e-6, rtol=1e-6)
    for values in found:
        assert values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())


def test_the_score_of_a_gpu_is_no_matrix_product():
    """TF32, which is on there, would round the states and the weights of one."""
    head, states = nn.Linear(16, 1), torch.randn(5, 3, 16, dtype=torch.bfloat16)
    expected = nn.functional.linear(states.float(), head.weight, head.bias).detach()
    called = []
    with pytest.MonkeyPatch.context() as patch, simulated_gpu(patch):
        patch.setattr(nn.functional, "linear", lambda *_: called.append(1))
        found = float32_linear(head.to("cuda"), states.to("cuda")).detach().cpu()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert not called


def test_a_quantized_base_is_probed_in_the_precision_of_its_products():
    model = gpt2().transformer
    assert packed_attention._exact(model)
    model.h[0].mlp.compute_dtype = torch.bfloat16  # as bitsandbytes' layers say it
    assert not packed_attention._exact(model)
    assert not packed_attention._exact(gpt2().bfloat16().transformer)


def test_vllm_refuses_a_quantized_policy():
    model = gpt2()
    checks.check_vllm(types.SimpleNamespace(use_vllm=True), model)
    model.full_precision = lambda: None
    checks.check_vllm(types.SimpleNamespace(use_vllm=False), model)
    with pytest.raises(SetupError, match="4 or 8 bits"):
        checks.check_vllm(types.SimpleNamespace(use_vllm=True), model)


def test_offloaded_shards_are_decoded_on_the_device(monkeypatch):
    monkeypatch.setattr(rollouts, "runs_on_fsdp", lambda accelerator: True)
    with pytest.MonkeyPatch.context() as patch, simulated_gpu(patch):
        policy = gpt2().eval()
        accelerator = types.SimpleNamespace(device=torch.device("cuda", 0))
        maker = rollouts.RolloutMaker(None, accelerator, policy, None, None, [0], True)
        for _ in range(2):
            with maker._whole_policy(None) as model:
                assert all(on_gpu(x) for x in (*model.parameters(), *model.buffers()))
                generate(model, [[1, 2], [3]], max_new_tokens=3, eos_token_ids=[0], seeds=[1, 2])
        assert not any(on_gpu(weight) for weight in policy.parameters())


def test_shards_in_bf16_sum_gradients_in_float32_and_round_no_output():
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    plugin = types.SimpleNamespace(mixed_precision_policy=half, fsdp_version=2)
    accelerator = types.SimpleNamespace(state=types.SimpleNamespace(fsdp_plugin=plugin))
    sharding.float32_sums(accelerator)
    found = plugin.mixed_precision_policy
    assert (found.param_dtype, found.reduce_dtype, found.output_dtype) == (torch.bfloat16, torch.float32, None)
    sharding.float32_sums(types.SimpleNamespace(state=types.SimpleNamespace()))  # no FSDP: nothing to do


# --- what is computed otherwise on an accelerator gives the same ---------------------------------------------


def test_the_head_on_an_accelerator_gives_what_it_gives_on_a_cpu():
    """Losses, log-probs, entropies and gradients; with the number of targets known to the host, and without."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(30, 8), torch.randn(50, 8) * 6  # some probabilities underflow
    labels = torch.randint(50, (30,))
    wanted = torch.where(torch.arange(30) % 3 == 0, -100, labels)

    def results(device, targets=None):
        h, w = (x.clone().to(device).requires_grad_() for x in (hidden, weight))
        loss = linear_cross_entropy(h, w, wanted.to(device), rows=7, targets=targets)
        logprobs, entropy = linear_logprobs(h, w, labels.to(device), rows=7)
        (loss + logprobs.mean() + entropy.sum() / 100).backward()
        return [x.detach().cpu() for x in (loss, logprobs, entropy, h.grad, w.grad)]

    expected = results("cpu")
    with pytest.MonkeyPatch.context() as patch, simulated_gpu(patch) as gpu:
        for targets in (None, 20):
            for found, right in zip(results("cuda", targets), expected, strict=True):
                torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
        assert not [place for place in gpu.places["other"] if "wait speed/" in place]
        h, w = (x.to("cuda").requires_grad_() for x in (hidden, weight))
        nothing = linear_cross_entropy(h, w, torch.full((30,), -100).cuda())  # no row to learn from
        nothing.backward()
        assert nothing.item() == 0 and h.grad.abs().sum().item() == 0


def test_decoding_on_an_accelerator_gives_what_it_gives_on_a_cpu():
    """Masks that are handed over, ended rows asked for every eight tokens: the answers are the same."""
    model, prompts = gpt2().eval(), [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
    assert takes_ready_masks(model.config)

    def answers():
        draw = Sampler(uniforms([1, 2, 3, 4], 20), 0.7)
        with torch.no_grad():
            tokens, logprobs = lean_decode(model, prompts, 20, [0, 3, 17, 21], draw)
        out = []
        for ids, logp in zip(tokens.tolist(), logprobs, strict=True):
            n = next((t + 1 for t, token in enumerate(ids) if token in (0, 3, 17, 21)), 20)
            out.append((ids[:n], logp[:n]))
        return out

    expected = answers()
    assert len({len(ids) for ids, _ in expected}) > 1
    with pytest.MonkeyPatch.context() as patch, simulated_gpu(patch):
        model.cuda()
        found = answers()
    for (ids, logp), (right, right_logp) in zip(found, expected, strict=True):
        assert ids == right
        torch.testing.assert_close(logp, right_logp, atol=1e-5, rtol=1e-5)


def test_a_ready_mask_lets_the_last_queries_see_what_is_before_them_and_no_padding():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert ready_mask(mask, 2)[:, 0].tolist() == [
        [[False, True, False], [False, True, True]],
        [[True, True, False], [True, True, True]],
    ]
    assert ready_mask(mask, 1)[0, 0].tolist() == [[False, True, True]]


def test_float32_products_of_a_gpu_are_in_tf32_unless_the_recipe_or_the_environment_says_no(monkeypatch):
    stage = types.SimpleNamespace(
        sections={"args": {}}, module=types.SimpleNamespace(DEFAULTS={}), checkpoints="x", seed=0, name="x"
    )
    monkeypatch.setattr(arguments.best_checkpoint, "defaults", lambda *_: {})
    monkeypatch.setattr(arguments.best_checkpoint, "reported", lambda *_: ())
    monkeypatch.setattr(arguments, "is_torch_tf32_available", lambda: True)

    def tf32(device):
        return arguments.settings(stage, arguments.Hardware(device), lambda stage: ("bf16", "so"))[0].get("tf32")

    assert tf32("cuda") is True and tf32("cpu") is None
    monkeypatch.setenv("PIPELINES_GPU_OFF", "tf32")
    assert tf32("cuda") is None
    monkeypatch.delenv("PIPELINES_GPU_OFF")
    stage.sections["args"]["tf32"] = False
    assert tf32("cuda") is False
    monkeypatch.setattr(arguments, "is_torch_tf32_available", lambda: False)  # a T4
    stage.sections["args"].clear()
    assert tf32("cuda") is None


@pytest.mark.parametrize(
    ("cards", "before", "expected"),
    [
        (["nvidia0"], {}, "expandable_segments:True"),
        (["nvidiactl", "null"], {}, None),
        (["nvidia0"], {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
        (["nvidia0"], {"PIPELINES_GPU_OFF": "expandable_segments"}, None),
        (["nvidia0"], {"PIPELINES_FAST_ENV": "0"}, None),
    ],
)
def test_segments_of_a_gpus_memory_can_grow(cards, before, expected, monkeypatch, tmp_path):
    for name in cards:
        (tmp_path / name).touch()
    environment = dict.fromkeys(launch.FAST, "set") | before
    monkeypatch.setattr(launch.os, "environ", environment)
    monkeypatch.setattr(launch, "Path", lambda _: tmp_path)
    launch.fast_environment()  # nothing is missing of FAST: it does not start again
    assert environment.get("PYTORCH_ALLOC_CONF") == expected
    assert environment.get("PYTORCH_CUDA_ALLOC_CONF") == before.get("PYTORCH_CUDA_ALLOC_CONF", expected)


def test_frozen_models_hold_their_products_in_bf16_where_the_policy_trains_in_it(monkeypatch):
    """The log-probs and scores are those of autocast, bit for bit; on a CPU and in float32 nothing changes."""
    monkeypatch.setattr(fused_head, "_is_emulated", lambda dtype: False)  # heads multiply as on a card
    here = types.SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16", state=types.SimpleNamespace())
    gpu = types.SimpleNamespace(**{**vars(here), "device": torch.device("cuda", 0)})
    batch = collate([([1, 2, 3], [4, 5, 6])], True, "cpu")

    def placed(model, where):
        make_ready(model)
        monkeypatch.setattr(model, "to", lambda device: model)
        return place_frozen(model, where)

    for kind, found in (
        (GPT2LMHeadModel, lambda m: token_logprobs(m, batch, 0.7)[0]),
        (GPT2ForSequenceClassification, lambda m: sequence_scores(m, [[1, 2, 3], [4, 5]], True, "cpu")),
    ):
        settings = {} if kind is GPT2LMHeadModel else {"num_labels": 1}
        half, plain = placed(gpt2(kind, **settings), gpu), placed(gpt2(kind, **settings), here)
        assert half.transformer.h[1].attn.c_proj.weight.dtype == torch.bfloat16
        assert {weight.dtype for weight in plain.parameters()} == {torch.float32}
        assert not hasattr(half, "score") or half.score.weight.dtype == torch.float32
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            mine, theirs = found(half), found(plain)
        assert mine.dtype == torch.float32 and torch.equal(mine, theirs)
    monkeypatch.setenv("PIPELINES_GPU_OFF", "bf16_frozen")
    assert {weight.dtype for weight in placed(gpt2(), gpu).parameters()} == {torch.float32}
    monkeypatch.delenv("PIPELINES_GPU_OFF")
    gpu.mixed_precision = "no"
    assert {weight.dtype for weight in placed(gpt2(), gpu).parameters()} == {torch.float32}
