"""`plan`: counts equal real models, the formulae equal what is worked out by hand, and what it suggests fits."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from pipelines.__main__ import main
from pipelines.commands import plan
from pipelines.data import mixing
from pipelines.generation.logprobs import disable_dropout
from pipelines.kinds import CLASSIFIER, KINDS
from pipelines.models import chat_template, tokenizer_setup
from pipelines.planning import anatomy, costs, setups, suggest, tables, unmade
from pipelines.planning.job import Job, Model, describe
from pipelines.planning.planner import Planner, Setup, micro_batch
from pipelines.recipe.recipe import load
from pipelines.speed import packed_attention, packing
from pipelines.speed.half_products import hold_half
from pipelines.training.preferences import collate_rankings
from pipelines.training.rankings import RankingCollator

SMALL = {
    "gpt2": ("AutoModelForCausalLM", {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 100}),
    "llama": (
        "AutoModelForCausalLM",
        {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "vocab_size": 100,
        },
    ),
    "gpt_neox": (
        "AutoModelForCausalLM",
        {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "vocab_size": 100,
        },
    ),
    "qwen3": (
        "AutoModelForSequenceClassification",
        {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 48,
            "vocab_size": 100,
            "num_labels": 1,
        },
    ),
    "bert": (
        "AutoModelForMaskedLM",
        {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "vocab_size": 100,
        },
    ),
    "t5": (
        "AutoModelForSeq2SeqLM",
        {"num_layers": 2, "d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 64, "vocab_size": 100},
    ),
}


def config(kind):
    return AutoConfig.for_model(kind, **SMALL[kind][1])


@pytest.mark.parametrize("kind", SMALL)
def test_parameters_and_layers_are_those_of_the_real_model(kind):
    auto = SMALL[kind][0]
    real = getattr(transformers, auto).from_config(config(kind))
    found = anatomy.examine(config(kind), auto)
    assert found.parameters == found.trainable == sum(p.numel() for p in real.parameters())
    assert found.layers == (4 if kind == "t5" else 2)  # encoder and decoder
    assert found.hidden == 32


def test_products_of_gpt2_are_kaplans_count():
    found = anatomy.examine(config("gpt2"), "AutoModelForCausalLM")
    vectors = 2 * (4 * 32 + 9 * 32) + 2 * 32  # layer norms and biases
    assert found.products == 2 * 12 * 32**2 + vectors + 100 * 32
    assert (found.attention, found.kv, found.linear) == (32, 32, 2 * 12 * 32**2)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_activations_are_what_a_real_forward_keeps(kind):
    """The trace on fake tensors against the bytes that autograd really holds."""
    auto = SMALL[kind][0]
    found, traced = anatomy.activations(config(kind), auto, 3, 16, dropout=False, fast_gelu=False)
    model = getattr(transformers, auto).from_config(config(kind))

    disable_dropout(model)
    own, kept = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.base_model(input_ids=torch.zeros(3, 16, dtype=torch.int64), use_cache=False)
    assert traced
    assert found == pytest.approx(sum(t.untyped_storage().nbytes() for t in kept.values()), rel=0.01)


def test_activations_grow_with_rows_and_shrink_in_bf16():
    one, two = (anatomy.activations(config("llama"), "AutoModelForCausalLM", rows, 32)[0] for rows in (2, 4))
    half = anatomy.activations(config("llama"), "AutoModelForCausalLM", 2, 32, precision="bf16")[0]
    assert two == pytest.approx(2 * one, rel=0.05)
    assert 0.45 * one < half < 0.75 * one


def test_activations_of_answers_behind_one_copy_of_their_prompt():
    """Each layer keeps the mask of who sees whom, as the real forward of such a batch does."""

    model = transformers.AutoModelForSequenceClassification.from_config(config("llama"), dtype=torch.float32)
    assert packed_attention.enable_packed_scores(model)
    prompt = list(range(20))
    batch = packing.pack_branches([[prompt + [i] * 10 for i in (50, 60, 70)]] * 2)
    found, traced = anatomy.activations(config("llama"), CLASSIFIER, 2, 50, mask="branches", dropout=False)
    own, kept = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(**batch)
    assert traced and batch["input_ids"].shape == (1, 100)
    assert found == pytest.approx(sum(t.untyped_storage().nbytes() for t in kept.values()), rel=0.03)


@pytest.mark.parametrize(
    "auto, kind, layout",
    [
        ("AutoModelForCausalLM", "llama", "shared"),
        ("AutoModelForSequenceClassification", "llama", "shared"),
        ("AutoModelForSequenceClassification", "bert", "padded"),
    ],
)
def test_layout_is_that_of_our_trainers(auto, kind, layout):
    assert anatomy.layout(config(kind), auto, True) == layout
    assert anatomy.layout(config(kind), auto, False) == layout.replace("shared", "packed")


def test_rankings_share_their_prompt_as_the_collator_lays_them(tiny_gpt2, recipe, write):
    rows = [
        {"prompt": "the cat sees " * n, "completions": ["a dog", "a big dog " * n, "a bird"], "ranks": [1, 2, 3]}
        for n in (2, 3, 30)
    ]
    stage = {
        "kind": "reward",
        "model": {"model_name_or_path": str(tiny_gpt2)},
        "data": {"train": write("r.jsonl", rows)},
        "args": {"per_device_train_batch_size": 2},
    }
    loaded = load(recipe({"judge": stage}))
    found = describe(loaded.stages[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_gpt2)
    tokenizer_setup.dress(tokenizer, None)
    collate = RankingCollator(tokenizer.pad_token_id, packed=True)
    encoded = [
        [sum(chat_template.encode_answer(tokenizer, row["prompt"], c), []) for c in row["completions"]]
        for row in rows[:2]
    ]
    real = [collate.inputs([answers])["input_ids"].shape[1] for answers in encoded]
    assert found.laid == real and found.rows == 2  # the third ranking is longer than the context, and dropped
    planner, setup = Planner(found), Setup(micro=2)
    assert planner.tokens_per_step(setup) == sum(real) < sum(len(a) for answers in encoded for a in answers)
    rows_, length = micro_batch(found, setup)
    assert length == max(real) and sum(real) <= rows_ * length < sum(real) + length


@pytest.mark.parametrize("kind, answers", [("dpo", 3), ("kto", 2)])
def test_policies_on_rankings_are_planned_as_they_are_trained(tiny_gpt2, recipe, write, kind, answers):
    rows = [
        {"prompt": "the cat sees " * n, "completions": ["a dog", "a big dog", "a bird"], "ranks": [1, 3, 2]}
        for n in (2, 3, 4)
    ]
    stage = {
        "kind": kind,
        "model": {"model_name_or_path": str(tiny_gpt2)},
        "data": {"train": write("r.jsonl", rows)},
        "args": {"per_device_train_batch_size": 2, "max_length": 64, "num_train_epochs": 2},
    }
    loaded = load(recipe({"policy": stage}))
    found, stage = describe(loaded.stages[0]), loaded.stages[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_gpt2)
    encoded = stage.module.encode(stage, stage.module.ready(stage, tokenizer), 64)["train"]
    batches = [collate_rankings([row], True, True) for row in encoded]
    # the last token of an answer is not fed, here it is counted
    tokens = [batch["inputs"]["input_ids"].shape[1] + answers for batch in batches]
    assert found.laid == tokens and found.rows == 3 and found.layout == "shared"
    assert found.learned == pytest.approx(sum(len(batch["labels"]) for batch in batches) / sum(tokens))
    planner, setup = Planner(found), Setup(micro=2)
    train, decoding = planner.flops_per_step(setup)
    once = costs.forward_flops(
        planner.tokens_per_step(setup),
        planner.anatomy("model").products,
        2,
        planner.anatomy("model").attention,
        found.mean / 2,
    )
    # the reference's pass is one forward (kto: two) of both epochs; kto reads other answers in every step
    steps, share = planner.steps(setup), planner.steps(setup) * 2 / 3
    assert steps == 2 and decoding == 0
    assert train == pytest.approx(once * (3 + (1 / share if kind == "dpo" else 2 / share + 1)))


def test_states_worked_out_by_hand():
    n = 1_000_000_000
    plain = costs.states(n, n)
    assert (plain.weights, plain.gradients, plain.optimizer) == (4e9, 4e9, 8e9)
    assert costs.states(n, n, "ddp", 8).gradients == 8e9  # the tensors and the buckets
    # figure 1 of the ZeRO paper: 7.5B parameters on 64 devices, Adam in mixed precision
    psi = 7_500_000_000
    without_buffers = [costs.states(psi, psi, f"zero{stage}", 64) for stage in (1, 2, 3)]
    sizes = [(s.total - s.buffers) / 1e9 for s in without_buffers]
    assert sizes == pytest.approx([31.4, 16.6, 1.9], abs=0.06)
    lora = costs.states(n, n // 100, size=2)
    assert (lora.weights, lora.gradients, lora.optimizer) == (1.98e9 + 4e7, 4e7, 8e7)  # adapters in float32
    four_bits = costs.states(n, n // 100, size=2, quantized=n - n // 100)
    assert four_bits.weights == pytest.approx(0.99e9 * 0.516 + 4e7, rel=1e-3)


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_sharding_divides_weights_gradients_and_optimizer(strategy):
    one, eight = (costs.states(8_000_000, 8_000_000, strategy, world) for world in (1, 8))
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(eight, part) == pytest.approx(getattr(one, part) / 8)
    whole = costs.states(8_000_000, 8_000_000, strategy, 2, compute=4)
    assert (whole.weights, whole.gradients) == (4 * 8_000_000 / 2, 4 * 8_000_000 / 2)
    zero2 = costs.states(8_000_000, 8_000_000, "zero2", 8)
    assert zero2.weights == 2 * 8_000_000 and zero2.gradients == eight_th(2) and zero2.optimizer == eight_th(12)


def eight_th(size):
    return 8_000_000 * size / 8


def test_flops_and_traffic_worked_out_by_hand():
    assert costs.train_flops(costs.forward_flops(10, 1000)) == 6 * 1000 * 10  # Kaplan
    assert costs.forward_flops(1, 0, layers=2, width=64, attended=100) == 4 * 2 * 64 * 100
    assert costs.train_flops(3.0, frozen=True) == 6.0 and costs.train_flops(3.0, checkpointing=True) == 12.0
    assert costs.traffic(1000, 1000, "ddp", 4) == 2 * 3 / 4 * 1000 * 4
    ddp_in_bf16 = 2 * 3 / 4 * 1000 * 2
    assert costs.traffic(1000, 1000, "zero1", 4) == costs.traffic(1000, 1000, "zero2", 4) == 1.5 * ddp_in_bf16
    assert costs.traffic(1000, 1000, "zero2", 4, micro_batches=3) == 3.5 * ddp_in_bf16  # the weights travel once
    assert costs.traffic(1000, 1000, "fsdp2", 4, outside=400) == 1.3 * ddp_in_bf16
    assert costs.traffic(1000, 1000, "fsdp2", 4, micro_batches=2, compute=4) == 6 * ddp_in_bf16
    assert costs.traffic(1000, 1000, "fsdp2", 4) == 1.5 * ddp_in_bf16  # as ZeRO-3 in its paper, section 7.2
    assert costs.traffic(1000, 1000, "zero3", 4) == ddp_in_bf16  # gathered once: a billion weights may stay
    assert costs.traffic(10**10, 10**10, "zero3", 4) == 1.45 * 10**7 * ddp_in_bf16
    assert costs.korthikanti(128 * 4, 64, 3) == 34 * 128 * 4 * 64 * 3
    assert costs.kv_cache(10, 2, 64, 2) == 10 * 2 * 64 * 2 * 2


def test_the_fused_head_is_smaller_than_its_logits():
    tokens, vocabulary, hidden = 8192, 50304, 768
    fused = costs.fused_head(tokens, vocabulary, hidden, 512)
    assert fused == 512 * vocabulary * 4 + tokens * hidden * 4 + vocabulary * hidden * 4
    assert costs.full_logits(tokens, vocabulary) == 3 * tokens * vocabulary * 4 > 10 * fused


def a_job(kind="sft", **values):
    shape = {"num_hidden_layers": 8, "hidden_size": 1024, "num_attention_heads": 8, "intermediate_size": 4096}
    made = AutoConfig.for_model("llama", **shape, vocab_size=32000, num_labels=1)
    models = {"model": Model(made, KINDS[kind].auto_class)}
    if kind == "ppo":
        models |= {name: Model(made, CLASSIFIER) for name in ("critic", "reward 0")}
    stage = SimpleNamespace(name="stage", seed=0, sections={})
    values = {"num_train_epochs": 1, "global_batch_size": 64, **values}
    return Job(stage, kind, values, models, 1000, [512], 512, 1, 64 if kind == "ppo" else 0)


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_no_launcher_holds_whole_logits(kind):
    planner = Planner(a_job(kind))
    setups = [Setup(gpu="h100", strategy=how, world=4, micro=32, bf16=True) for how in ("ddp", "fsdp2", "zero3")]
    assert len({planner.head(setup) for setup in setups}) == 1
    assert len({planner.rollouts(setup) for setup in setups[1:]}) == 1


def test_what_is_suggested_fits_and_what_was_asked_does_not():
    planner, asked = Planner(a_job()), Setup(gpu="h100", micro=32, bf16=True)
    room = 0.6 * planner.memory(asked).total
    found = suggest.suggestions(planner, asked, room)
    assert found
    for words, changed, memory in found:
        assert changed != asked, words
        assert planner.memory(changed).total == memory.total <= room, words
    texts = " ".join(words for words, *_ in found)
    assert "per_device_train_batch_size" in texts and "activation_checkpointing" in texts
    micro = next(changed.micro for words, changed, _ in found if "train_batch" in words)
    assert planner.memory(Setup(gpu="h100", micro=2 * micro, bf16=True)).total > room  # no smaller than it must be


def test_a_model_too_large_for_its_gpus_is_sharded_or_given_more_of_them():
    planner, asked = (
        Planner(a_job()),
        Setup(gpu="h100", strategy="ddp", world=8, micro=1, checkpointing=True, bf16=True),
    )
    room = planner.memory(Setup(**{**vars(asked), "strategy": "fsdp2", "world": 16})).total
    words = [words for words, *_ in suggest.suggestions(planner, asked, room)]
    assert any("--gpus 16" in text for text in words) and not any("--gpus 32" in text for text in words)


def test_more_gpus_are_suggested_only_as_far_as_the_global_batch_can_be_split():
    planner = Planner(a_job(global_batch_size=16))
    asked = Setup(gpu="h100", strategy="fsdp2", world=4, micro=4, bf16=True)
    found = suggest.suggestions(planner, asked, planner.memory(Setup(**{**vars(asked), "world": 16, "micro": 1})).total)
    (words, changed, _), *others = [one for one in found if "--gpus" in one[0]]
    assert "--gpus 16 --config_file accelerate_configs/fsdp2_multi.yaml" in words and not others
    assert (changed.world, changed.micro) == (16, 1)
    planner = Planner(a_job(global_batch_size=8))
    found = suggest.suggestions(planner, asked, planner.memory(Setup(**{**vars(asked), "world": 16, "micro": 1})).total)
    assert found and not any("--gpus 16" in words for words, *_ in found)


def test_what_ppo_decodes_at_once_is_made_smaller():
    planner, asked = Planner(a_job("ppo")), Setup(gpu="h100", micro=1, checkpointing=True, bf16=True)
    room = planner.memory(asked).total - planner.cache(asked) / 2
    (words, changed, memory), *_ = suggest.suggestions(planner, asked, room)
    assert words == "args.local_rollout_forward_batch_size=16" and memory.kv_cache == planner.cache(asked) / 4


@pytest.mark.parametrize(
    "words, gpu, world",
    [
        (["--config_file", "accelerate_configs/fsdp2.yaml"], "h100", 8),
        (["--config_file", "accelerate_configs/fsdp2.yaml", "--gpu", "a100", "--gpus", "4"], "a100", 4),
        (["--config_file", "accelerate_configs/fsdp2.yaml", "--processes", "2"], None, 2),
        (["--config_file", "accelerate_configs/cpu_2.yaml"], None, 2),
        ([], None, 1),
    ],
)
def test_where_a_stage_runs(words, gpu, world):
    setup = setups.setup_of(a_job(per_device_train_batch_size=8), plan.parser().parse_args(["recipe", *words]))
    assert (setup.gpu, setup.world, setup.bf16) == (gpu, world, gpu is not None)


def test_ppo_holds_reference_critic_reward_model_and_cache():
    planner, setup = Planner(a_job("ppo")), Setup(micro=2)
    memory, n = planner.memory(setup), planner.anatomy("model").parameters
    assert memory.reference == 4 * n
    assert memory.critic == 16 * planner.anatomy("critic").parameters
    assert memory.rewards == 4 * planner.anatomy("reward 0").parameters
    assert memory.kv_cache == 2 * 64 * (512 + 64) * 8 * 1024 * 4
    lora = planner.memory(Setup(micro=2, lora=True))
    assert lora.reference == 0 and lora.optimizer < 0.05 * memory.optimizer and lora.weights < 1.05 * memory.weights


def test_on_a_gpu_in_bf16_frozen_models_and_decoding_hold_products_in_half(monkeypatch):
    """As `hold_half` and `half_products` leave a real model of that shape."""
    planner = Planner(a_job("ppo"))
    fp32, bf16 = (Setup(micro=2, gpu="h100", bf16=bf16) for bf16 in (False, True))
    a, plain = planner.anatomy("model"), planner.memory(fp32)
    model = anatomy._build(planner.job.models["model"].config, "AutoModelForCausalLM").requires_grad_(False)
    assert plain.reference == 4 * a.parameters == sum(p.numel() * p.itemsize for p in model.parameters())
    maps = [m for m in hold_half(model).modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
    assert all(m.weight.dtype == torch.bfloat16 for m in maps)
    held = sum(p.numel() * p.itemsize for p in model.parameters())
    memory = planner.memory(bf16)
    assert memory.reference == pytest.approx(held, rel=2e-3)  # biases are not counted
    copies = 2 * sum(m.weight.numel() for m in maps)
    assert memory.rollouts - planner.memory(replace(bf16, size=2)).rollouts == copies
    monkeypatch.setenv("PIPELINES_GPU_OFF", "bf16_frozen, bf16_decoding")
    off = Planner(a_job("ppo")).memory(bf16)
    assert off.reference == plain.reference and off.rollouts == memory.rollouts - copies


def test_ppo_on_one_base_holds_adapters_and_a_value_head_weighs_nothing():
    job, setup = a_job("ppo"), Setup(micro=2, lora=True)
    planner = Planner(job)
    apart, work = planner.memory(setup), planner.flops_per_step(setup)
    job.stage.sections = {"reward": {"share_base": True}}
    memory, adapter = planner.memory(setup), planner.anatomy("critic", True).trainable
    assert memory.critic == 16 * adapter and memory.rewards == 4 * adapter and 0 < adapter < 0.01 * apart.rewards
    same = {"weights", "gradients", "optimizer", "activations", "reference", "kv_cache", "rollouts"}
    assert all(getattr(memory, name) == getattr(apart, name) for name in same)
    del job.models["critic"]  # `critic: shared`
    head = planner.memory(setup)
    assert head.critic == 0 and head.activations < apart.activations and planner.flops_per_step(setup) < work


def test_writing_the_model_takes_a_copy():
    """On the CPU: a merged one with adapters, or the one gathered from shards."""
    planner = Planner(a_job())
    n = planner.anatomy("model").parameters
    assert planner.memory(Setup()).saving == 0 and planner.memory(Setup(lora=True)).saving == 4 * n
    assert planner.memory(Setup(strategy="fsdp2", world=2)).saving == 4 * n
    assert planner.memory(Setup(gpu="h100", strategy="fsdp2", world=2)).saving == 0
    assert planner.memory(Setup(gpu="h100", lora=True, bf16=True, size=2, micro=1)).saving == 0


@pytest.mark.parametrize(
    "file, strategy",
    [("ddp", "ddp"), ("fsdp2", "fsdp2"), ("zero2", "zero2"), ("zero3", "zero3"), ("cpu", "single"), ("cpu_2", "ddp")],
)
def test_config_files_say_what_is_sharded(file, strategy):
    assert setups.launcher(f"accelerate_configs/{file}.yaml")["strategy"] == strategy


def test_a_whole_chain_is_planned_before_any_of_it_exists(recipe, write, capsys, monkeypatch):
    rows = [{"prompt": "what is it", "completion": "a cat " * 20}] * 64
    pairs = [{"prompt": "what is it", "chosen": "a cat", "rejected": "a dog " * 30}] * 64
    model = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 128}
    path = recipe(
        {
            "base": {
                "kind": "pretrain",
                "model": {"config": model},
                "tokenizer": {"train": "bpe", "vocab_size": 500},
                "data": {"train": write("text.jsonl", [{"text": "a cat and a dog " * 20}] * 64)},
                "args": {"max_length": 64, "global_batch_size": 8},
            },
            "sft": {
                "kind": "sft",
                "model": {"model_name_or_path": "stage:base"},
                "data": {"train": write("sft.jsonl", rows)},
                "args": {"global_batch_size": 8, "num_train_epochs": 2},
            },
            "reward": {
                "kind": "reward",
                "model": {"model_name_or_path": "stage:sft"},
                "data": {"train": write("pairs.jsonl", pairs)},
                "args": {"global_batch_size": 8},
            },
            "policy": {
                "kind": "ppo",
                "model": {"model_name_or_path": "stage:sft"},
                "reward": {"models": ["stage:reward"]},
                "data": {"train": write("prompts.jsonl", [{"prompt": "what is it"}] * 64)},
                "args": {"global_batch_size": 16, "total_episodes": 160, "response_length": 16},
            },
        }
    )

    assert main(["plan", str(path), "--gpus", "2", "--gpu", "a100", "--price-per-hour", "2"]) == 0
    said = capsys.readouterr().out
    for words in (
        "base (pretrain)",
        "36 steps",
        "16 steps",
        "10 updates",
        "critic",
        "fits",
        "cost",
        "all ",
    ):
        assert words in said, said
    assert "characters are taken" not in said  # the tokenizer was trained for it: the text is small
    monkeypatch.setattr(unmade, "SMALL", -1)
    monkeypatch.setattr(unmade, "_made", {})
    policy = next(name for name in load(path).stages if name.kind == "ppo").name
    assert main(["plan", str(path), policy, f"stages.{policy}.args.advantage=rloo"]) == 0
    said = capsys.readouterr().out
    assert "no critic (advantage: rloo): 0." in said and "GB less than with gae" in said and "critic:" not in said
    assert main(["plan", str(path), "sft", "stages.sft.args.max_steps=7"]) == 0
    said = capsys.readouterr().out
    assert "7 steps" in said and "characters are taken" in said


def test_rows_that_an_earlier_stage_will_write_are_left_out_and_said(tiny_gpt2, recipe, write):
    rows = [{"prompt": "the cat", "chosen": "sees a dog", "rejected": "a bird"}] * 12
    stages = {
        "samples": {
            "kind": "sample",
            "sample": {"models": [str(tiny_gpt2)]},
            "data": {"train": write("prompts.jsonl", [{"prompt": "the cat"}] * 4)},
        },
        "rankings": {
            "kind": "rank",
            "rank": {"labeller": "data.bay.labeller:script_labeller"},
            "data": {"train": "stage:samples/samples.jsonl"},
        },
        "judge": {
            "kind": "reward",
            "model": {"model_name_or_path": str(tiny_gpt2)},
            "data": {"train": [write("rows.jsonl", rows), "stage:rankings/rankings.jsonl"]},
        },
    }

    loaded = load(recipe(stages), read_data=False)
    found = describe(loaded["judge"])
    assert found.rows == 12 and found.notes == ["rows that an earlier stage will write are not counted"]


def test_a_folder_is_planned_from_its_config_alone(tiny_gpt2, recipe, write, tmp_path, capsys):
    """The tokenizer at hand counts exactly, and no weights are needed."""
    folder = tmp_path / "config_only"
    folder.mkdir()
    for file in tiny_gpt2.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    path = recipe(
        {
            "sft": {
                "kind": "sft",
                "model": {"model_name_or_path": str(folder)},
                "data": {"train": write("rows.jsonl", [{"prompt": "the cat", "completion": "sees a dog"}] * 32)},
            }
        }
    )

    assert main(["plan", str(path)]) == 0
    said = capsys.readouterr().out
    rows = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    assert "characters are taken" not in said and "GPT2LMHeadModel" in said and rows > 300


def test_wrong_names_are_told_with_the_right_ones(recipe, write, capsys):
    path = recipe(
        {
            "sft": {
                "kind": "sft",
                "model": {"model_name_or_path": "gpt2"},
                "data": {"train": write("rows.jsonl", [{"prompt": "a", "completion": "b"}])},
            }
        }
    )
    for words, hint in (
        (["--gpu", "h10"], "did you mean h100"),
        (["stf"], "did you mean sft"),
        (["--config_file", "accelerate_configs/zero22.yaml"], "did you mean accelerate_configs/zero2.yaml"),
    ):
        assert main(["plan", str(path), *words]) == 2
        assert hint in capsys.readouterr().err


def test_rows_are_sampled_over_all_sources(tiny_gpt2, recipe, write, monkeypatch):
    """A short source before a long one: the first rows alone would say half of the tokens."""
    monkeypatch.setattr("pipelines.planning.job.SAMPLE", 200)
    short = write("a.jsonl", [{"prompt": "the cat", "completion": f"a dog {i}"} for i in range(300)])
    long = write("b.jsonl", [{"prompt": "the cat", "completion": f"a big dog {i} " * 4} for i in range(300)])
    stage = {"kind": "sft", "model": {"model_name_or_path": str(tiny_gpt2)}, "data": {"train": [short, long]}}
    loaded = load(recipe({"sft": stage}), read_data=False)
    found = describe(loaded["sft"])
    tokenizer = unmade.tokenizer_of(loaded["sft"])
    rows = mixing.stream(loaded["sft"].data, "train", "sft", 42)
    every = [len(ids) for row in rows for ids, _ in chat_template.encode_row(tokenizer, row)]
    assert found.rows == 600 and len(found.lengths) == 200
    assert found.mean == pytest.approx(sum(every) / len(every), rel=0.1)


def test_the_cpu_is_measured_in_the_precision_that_is_trained_in(monkeypatch):
    asked = []
    monkeypatch.setattr(setups, "calibrate", lambda bf16: asked.append(bf16) or (1e12, 1e10))
    for bf16 in (False, True):
        found = tables.outlook(Planner(a_job()), Setup(bf16=bf16), 0.4, True)
        assert found.seconds > 0 and ("bf16" if bf16 else "float32") in found.basis
    assert asked == [False, True]


def test_what_does_not_fit_is_told_below_the_tables():
    planner, setup = Planner(a_job()), Setup(gpu="t4", micro=64)
    told = tables.report([tables.outlook(planner, setup, 0.4, False)], 2.0)
    head, rule, row = next(part for part in told.split("\n\n") if part.startswith("stage")).splitlines()[:3]
    assert head.split()[-1] == "cost" and set(rule) == {"-", " "} and "NO" in row
    assert "does not fit into 16.0 GB; it would with" in told and "per_device_train_batch_size" in told
    assert max(map(len, told.splitlines())) < 260
