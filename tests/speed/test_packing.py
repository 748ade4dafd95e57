"""Packed sequences give the losses, gradients and generations of separate ones."""

import copy
import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipelines import IGNORE_INDEX
from pipelines.speed import packed_attention
from pipelines.speed.fast_model import fast_model, fuse_loss
from pipelines.speed.packed_attention import PackedRows, _attention_by_products, enable_packed_attention
from pipelines.speed.packing import OnHost, PackedCollator, pack, plan_packs

V = 61


def packed_loss(model, batch, num_items=None):
    """Mean next-token loss of a packed batch, with the head fused where it can be; of a model bare or wrapped."""
    inner = model.module if hasattr(model, "module") else model
    fuse_loss(inner.get_base_model() if hasattr(inner, "get_base_model") else inner)
    return model(**{**batch, "use_cache": False}, num_items_in_batch=num_items).loss


COMMON = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
GQA = dict(COMMON, num_key_value_heads=2)


def gpt2(**kwargs):
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    size = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel(GPT2Config(**size, **no_dropout, **kwargs))


def opt():
    config = OPTConfig(
        vocab_size=V,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        dropout=0.0,
    )
    return OPTForCausalLM(config)


MODELS = {
    "gpt2": gpt2,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON)),
    "llama_gqa": lambda: LlamaForCausalLM(LlamaConfig(**GQA)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GQA)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GQA, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GQA, sliding_window=None)),
    "mistral_window": lambda: MistralForCausalLM(MistralConfig(**GQA, sliding_window=5)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**COMMON)),
    "opt": opt,
}


def build(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name]().train()


def sequences(lengths, seed=1):
    rng = random.Random(seed)
    return [[rng.randrange(3, V) for _ in range(n)] for n in lengths]


def separate_loss(model, seqs, labels=None):
    """Sum and count of the model's own loss over sequences, one at a time."""
    total, count = 0.0, 0
    for ids, target in zip(seqs, labels or seqs, strict=True):
        target = torch.tensor([target])
        n = int((target[:, 1:] != IGNORE_INDEX).sum())
        if n:
            total = total + model(input_ids=torch.tensor([ids]), labels=target).loss * n
            count += n
    return total, count


def assert_same_gradients(a, b, tol=1e-5):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, atol=tol, rtol=tol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_separate(name):
    model, seqs = build(name), sequences([3, 17, 9, 1, 30, 9, 22])
    reference = copy.deepcopy(model)
    total, count = separate_loss(reference, seqs)
    (total / count).backward()
    enable_packed_attention(model)
    loss = packed_loss(model, pack(seqs))
    loss.backward()
    torch.testing.assert_close(loss, total / count, atol=1e-5, rtol=1e-5)
    assert_same_gradients(model, reference)
    assert sum(p.grad.abs().sum() for p in model.parameters()) > 0


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "mistral_window"])
@pytest.mark.parametrize("up_to", [0, 256])
def test_bf16_attention_is_right_by_either_way(name, up_to, monkeypatch):
    """PyTorch's kernel (up_to 0) and the products written out are as near to float32 as bfloat16 lets them be."""

    monkeypatch.setattr(packed_attention, "PRODUCTS_UP_TO", up_to)
    seqs = sequences([3, 17, 9, 1, 30, 9, 22])
    results = []
    for precise in (True, False):
        model = build(name)
        enable_packed_attention(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not precise):
            loss = packed_loss(model, pack(seqs))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for exact, found in zip(*results, strict=True):
        assert (found - exact).norm() < 0.03 * exact.norm()


def test_attention_by_products_masks_scales_and_drops():

    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    k2, v2 = (x.repeat_interleave(2, 1) for x in (k, v))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    mask = torch.rand(2, 1, 7, 7) < 0.5
    mask |= torch.eye(7, dtype=torch.bool)
    for given, causal in ((mask, False), (None, True), (None, False)):
        found = _attention_by_products(q, k, v, given, causal, scaling=0.3)
        wanted = sdpa(q, k2, v2, given, is_causal=causal, scale=0.3).transpose(1, 2)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    ones = torch.ones_like(v)
    dropped = _attention_by_products(q, k, ones, None, True, dropout=0.5)
    assert (
        dropped.std() > 0.1 and abs(dropped.mean() - 1) < 0.3
    )  # sums of weights, some of them zero and the rest doubled


def test_sequences_do_not_see_each_other():
    """The same sequence gives the same loss whatever lies before it: the test above cannot pass by
    averaging."""
    model = build("gpt2")
    enable_packed_attention(model)
    ids, others = sequences([12], 3)[0], sequences([20, 5], 4)
    silent = [[IGNORE_INDEX] * len(s) for s in others]
    alone = packed_loss(model, pack([ids]))
    for order in ([others[0], ids, others[1]], [others[1], others[0], ids]):
        labels = [ids if s is ids else silent[0][: len(s)] for s in order]
        torch.testing.assert_close(packed_loss(model, pack(order, labels)), alone, atol=1e-5, rtol=1e-5)


def test_without_packed_attention_the_cache_default_is_wrong():
    """Why we insist on use_cache=False: transformers' default leaks across sequences (facts of this
    stack)."""
    model, seqs = build("gpt2"), sequences([12, 20, 5])
    total, count = separate_loss(model, seqs)
    batch = {k: v for k, v in pack(seqs).items() if k in ("input_ids", "labels", "position_ids")}
    leaky = model(**batch, use_cache=True).loss
    assert abs(leaky - total / count) > 1e-3
    enable_packed_attention(model)
    ours = model(**pack(seqs), use_cache=True).loss
    torch.testing.assert_close(ours, total / count, atol=1e-5, rtol=1e-5)


def test_order_in_the_pack_does_not_matter():
    model, seqs = build("llama_gqa"), sequences([3, 17, 9, 30, 9, 22])
    enable_packed_attention(model)
    losses = [packed_loss(model, pack(random.Random(i).sample(seqs, len(seqs)))).item() for i in range(4)]
    assert max(losses) - min(losses) < 1e-5


@pytest.mark.parametrize("lengths", [[8, 8, 8], [40], [1, 1, 5], [2] * 30, list(range(1, 33))])
def test_any_mix_of_lengths(lengths):
    model, seqs = build("gpt2"), sequences(lengths)
    total, count = separate_loss(model, seqs)
    enable_packed_attention(model)
    torch.testing.assert_close(packed_loss(model, pack(seqs)), total / count, atol=1e-5, rtol=1e-5)


def test_no_dense_mask_is_built(monkeypatch):
    import transformers.masking_utils as masking

    model, seqs = build("llama"), sequences([30, 20])
    enable_packed_attention(model)
    built = []
    name = next(
        n for n in ("packed_sequence_compatibility_function", "packed_sequence_mask_function") if hasattr(masking, n)
    )
    real = getattr(masking, name)
    monkeypatch.setattr(masking, name, lambda *a: built.append(1) or real(*a))
    packed_loss(model, pack(seqs))
    assert not built
    batch = {k: v for k, v in pack(seqs).items() if k in ("input_ids", "labels", "position_ids")}
    packed_loss(model, batch)  # positions alone: transformers' own way still works
    assert built


def test_activation_checkpointing():
    model, seqs = build("llama_gqa"), sequences([3, 17, 9, 30])
    enable_packed_attention(model)
    plain = copy.deepcopy(model)
    packed_loss(plain, pack(seqs)).backward()
    model.gradient_checkpointing_enable()
    packed_loss(model, pack(seqs)).backward()
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "mistral_window"])
def test_generation_is_unaffected(name):
    model = build(name).eval()
    reference = copy.deepcopy(model)
    enable_packed_attention(model)
    fuse_loss(model)
    ids = torch.tensor([[2, 2, 2, 7, 9, 11], [5, 6, 7, 8, 9, 10]])
    kwargs = dict(attention_mask=(ids != 2).long(), max_new_tokens=12, do_sample=False, pad_token_id=2)
    for cache in (True, False):
        assert torch.equal(
            model.generate(ids, use_cache=cache, **kwargs), reference.generate(ids, use_cache=True, **kwargs)
        )
    torch.testing.assert_close(model(ids).logits, reference(ids).logits)


def test_padded_batches_and_the_fused_loss_equal_the_models_own():
    model = build("gpt2")
    reference = copy.deepcopy(model)
    enable_packed_attention(model)
    ids = torch.tensor([[7, 9, 11, 2, 2], [5, 6, 7, 8, 9]])
    batch = dict(input_ids=ids, attention_mask=(ids != 2).long(), labels=ids.masked_fill(ids == 2, IGNORE_INDEX))
    for num_items in (None, 11, torch.tensor(3)):
        ours = packed_loss(model, batch, num_items)
        theirs = reference(**batch, num_items_in_batch=num_items).loss
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert model.loss_is_fused and model(**batch).logits is None and model(input_ids=ids).logits.shape == (2, 5, V)


def test_scaled_logits_fall_back_to_the_models_own_loss(caplog):
    torch.manual_seed(0)
    model, seqs = GraniteForCausalLM(GraniteConfig(**GQA, logits_scaling=8.0)), sequences([3, 17, 9])
    total, count = separate_loss(model, seqs)
    enable_packed_attention(model)
    for _ in range(2):
        torch.testing.assert_close(packed_loss(model, pack(seqs)), total / count, atol=1e-5, rtol=1e-5)
    assert len([r for r in caplog.records if "logits_scaling" in r.message]) == 1


def test_a_forward_that_changes_the_logits_is_noticed(caplog):
    """No config names it, but the logits are not head(last hidden states): the dry run finds out."""

    class Doubled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    assert fuse_loss(Doubled(LlamaConfig(**COMMON))) is False
    assert "not head(last hidden states)" in caplog.text


def test_a_deep_copy_is_independent():
    """Such as a reference model: its loss and its logits must come from its own weights."""
    model, seqs = build("gpt2").eval(), sequences([12, 20])
    fast_model(model)
    enable_packed_attention(model)
    ids = torch.tensor([seqs[0]])
    before = model(ids).logits.clone(), packed_loss(model, pack(seqs)).item()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert torch.equal(reference(ids).logits, before[0]) and packed_loss(reference, pack(seqs)).item() == before[1]
    assert not torch.equal(model(ids).logits, before[0]) and packed_loss(model, pack(seqs)).item() != before[1]


def test_the_dry_run_leaves_training_flags_alone():
    model = build("gpt2")
    model.transformer.h[0].eval()
    fuse_loss(model)
    assert model.training and not model.transformer.h[0].training and not model.transformer.h[0].mlp.training
    assert model.transformer.h[1].training


def test_peft_is_packed_and_fused():
    from peft import LoraConfig, get_peft_model

    base, seqs = build("llama"), sequences([3, 17, 9])
    total, count = separate_loss(base, seqs)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    enable_packed_attention(model)
    loss = packed_loss(model, pack(seqs))
    torch.testing.assert_close(loss, total / count, atol=1e-5, rtol=1e-5)  # B starts at zero
    loss.backward()
    assert base.loss_is_fused
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, _ in model.named_parameters() if "lora" in n
    }


def _ddp_worker(rank, folder):
    """One of two processes; rank 1's second batch has no targets at all."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = build("gpt2")
    fast_model(model)
    enable_packed_attention(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for step, batch in enumerate(_ddp_batches(rank)):
        model.zero_grad()
        packed_loss(wrapped, batch, num_items=10).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        torch.save(grads, f"{folder}/grads-{step}-{rank}.pt")
    dist.destroy_process_group()


def _ddp_batches(rank):
    seqs = sequences([9, 5, 12], seed=rank)
    silent = [[IGNORE_INDEX] * len(s) for s in seqs]
    return [pack(seqs), pack(seqs, silent if rank else None)]


@pytest.mark.slow
def test_ddp_averages_the_gradients(tmp_path):
    torch.multiprocessing.spawn(_ddp_worker, (str(tmp_path),), nprocs=2)
    for step in range(2):
        model = build("gpt2")
        enable_packed_attention(model)
        sum(packed_loss(model, _ddp_batches(rank)[step], num_items=20) for rank in range(2)).backward()
        for rank in range(2):
            got = torch.load(tmp_path / f"grads-{step}-{rank}.pt", weights_only=True)
            for name, p in model.named_parameters():
                torch.testing.assert_close(got[name], p.grad, atol=1e-6, rtol=1e-4)


def test_tied_weights_train_and_save(tmp_path):
    model, seqs = build("gpt2"), sequences([30, 20, 10])
    fast_model(model)
    enable_packed_attention(model)
    before = model.get_output_embeddings().weight.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = packed_loss(model, pack(seqs))
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert model.lm_head.weight is model.transformer.wte.weight and not torch.equal(before, model.lm_head.weight)
    model.save_pretrained(tmp_path)
    assert "packed_sdpa" not in (tmp_path / "config.json").read_text()  # others must be able to load it
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([seqs[0]])
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=1e-5)


def test_fast_model_swaps_the_gelu_without_changing_the_function():
    model = build("gpt2").eval()
    ids = torch.tensor(sequences([20]))
    before = model(ids).logits
    fast_model(model)
    assert all(isinstance(block.mlp.act, torch.nn.GELU) for block in model.transformer.h)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-6, rtol=1e-5)


def test_bidirectional_encoder_packs_too():
    torch.manual_seed(0)
    config = BertConfig(**{k: v for k, v in COMMON.items() if k != "bos_token_id"})
    model, seqs = BertModel(config, add_pooling_layer=False).eval(), sequences([3, 17, 9])
    separate = torch.cat([model(torch.tensor([s])).last_hidden_state for s in seqs], 1)
    enable_packed_attention(model)
    batch = pack(seqs)
    batch.pop("labels")
    torch.testing.assert_close(model(**batch).last_hidden_state, separate, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_packed_is_told():
    bloom = BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(ValueError, match="packing: false"):
        enable_packed_attention(bloom)
    config = Qwen3Config(**GQA, head_dim=8)
    config.layer_types = ["full_attention", "linear_attention"]
    qwen = build("qwen3")
    qwen.config = config
    with pytest.raises(ValueError, match="linear_attention"):
        enable_packed_attention(qwen)


def test_misuse_is_told():
    model, batch = build("gpt2"), pack(sequences([5, 6]))
    enable_packed_attention(model)
    two_rows = {k: v.repeat(2, 1) if torch.is_tensor(v) and v.ndim == 2 else v for k, v in batch.items()}
    with pytest.raises(ValueError, match="one row|the row 22"):
        model(**two_rows)
    cache = model(torch.tensor([[5, 6]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="KV cache"):
        model(**batch, past_key_values=cache)
    with pytest.raises(ValueError, match="at least one token"):
        pack([[1, 2], []])
    with pytest.raises(ValueError, match="as many labels"):
        pack([[1, 2]], [[1]])


def test_pack_layout():
    batch = pack([[5, 6, 7], [8, 9]], [[IGNORE_INDEX, 6, 7], [8, 9]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 6, 7, IGNORE_INDEX, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5] and batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 3


def test_collator_reads_trl_packs_and_drops_other_columns():
    from datasets import Dataset
    from trl import pack_dataset

    rows = {
        "input_ids": sequences([5, 3, 7, 2, 6]),
        "labels": [[IGNORE_INDEX, *s[1:]] for s in sequences([5, 3, 7, 2, 6])],
    }
    packed = pack_dataset(Dataset.from_dict(rows), 10)
    batch = PackedCollator()([{**row, "text": "x"} for row in packed])
    assert set(batch) == set(pack([[1]]))
    lengths = batch["cu_seq_lens_q"].diff().tolist()
    assert sorted(lengths) == [2, 3, 5, 6, 7]
    got = sorted(part.tolist() for part in batch["input_ids"][0].split(lengths))
    assert got == sorted(rows["input_ids"])
    plain = PackedCollator()([{"input_ids": [4, 5, 6], "completion_mask": [0, 0, 1]}, {"input_ids": [7, 8]}])
    assert plain["labels"].tolist() == [[IGNORE_INDEX, IGNORE_INDEX, 6, IGNORE_INDEX, 8]]
    with pytest.raises(ValueError, match="seq_lengths"):
        PackedCollator()([{"input_ids": [4, 5, 6], "seq_lengths": [2]}])


def test_collator_equals_pack():
    seqs = sequences([5, 3, 7])
    ours, theirs = PackedCollator()([{"input_ids": s, "labels": s} for s in seqs]), pack(seqs)
    assert ours.pop("on_host") == theirs.pop("on_host") == OnHost((5, 3, 7), 4 + 2 + 6)
    for name, value in theirs.items():
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(value)), name


def test_plan_packs():
    rng = random.Random(0)
    lengths = [min(256, max(0, int(rng.expovariate(1 / 90)))) for _ in range(500)]
    plan = plan_packs(lengths, 1024)
    assert sorted(i for group in plan for i in group) == [i for i, n in enumerate(lengths) if n]
    used = [sum(lengths[i] for i in group) for group in plan]
    assert max(used) <= 1024 and sum(used) / (1024 * len(plan)) > 0.97
    assert plan == plan_packs(lengths, 1024)
    assert plan_packs([4, 6, 5, 5], 10) == [[1, 0], [2, 3]]  # best fit, not first come
    with pytest.raises(ValueError, match="number 1 with 11"):
        plan_packs([4, 11], 10)


def test_blocks_waste_little():
    rng = random.Random(0)
    lengths = [min(256, 1 + int(rng.expovariate(1 / 90))) for _ in range(60)]
    rows = PackedRows.of(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]))
    assert sum(c * n for c, n in rows.blocks) == rows.slots.numel() < 1.35 * sum(lengths)
    assert len(rows.blocks) <= 8
    assert torch.equal(rows.slots[rows.places], torch.arange(sum(lengths)))
