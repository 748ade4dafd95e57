"""Packed attention by PyTorch's kernel for sequences of any length: a stand-in computes it here."""

import copy
import logging

import pytest
import torch
import varlen_on_cpu
from simulated_gpu import simulated_gpu
from test_packing import assert_same_gradients, build, packed_loss, separate_loss, sequences

from pipelines.errors import SetupError
from pipelines.speed import varlen
from pipelines.speed.packed_attention import enable_packed_attention
from pipelines.speed.packing import pack, pack_branches

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def kernel(monkeypatch):
    """The CPU of this process counts as a card that has the kernel, for bfloat16 and float16."""
    varlen_on_cpu.install()
    varlen._trial.cache_clear(), varlen.log_blocks.cache_clear()
    half = (torch.bfloat16, torch.float16)
    monkeypatch.setattr(varlen, "why_not", lambda device, dtype: None if dtype in half else "float32")
    return varlen_on_cpu.calls


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "qwen3", "mistral", "neox", "opt"])
def test_the_kernel_gives_the_losses_and_gradients_of_separate_sequences(name, kernel):
    model, seqs = build(name), sequences([3, 17, 9, 1, 30, 9, 22])
    reference = copy.deepcopy(model)
    total, count = separate_loss(reference, seqs)
    (total / count).backward()
    enable_packed_attention(model)
    kernel.clear()
    with torch.autocast("cpu", torch.bfloat16):
        loss = packed_loss(model, pack(seqs))
    loss.backward()
    layers = model.config.num_hidden_layers
    heads, key_heads = model.config.num_attention_heads, getattr(model.config, "num_key_value_heads", None)
    assert {call[2:] for call in kernel} == {(heads, key_heads or heads, torch.bfloat16)}
    assert len(kernel) >= layers and all(causal for causal, *_ in kernel)
    torch.testing.assert_close(loss, total / count, atol=2e-2, rtol=1e-2)
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        if theirs.grad is not None:
            assert (mine.grad - theirs.grad).norm() <= 5e-2 * theirs.grad.norm() + 1e-4, name


def test_the_kernel_is_as_near_as_the_blocks(kernel, monkeypatch):
    """In bfloat16 both are rounded alike; the scale of a model that has its own goes with it."""
    model, batch = build("llama_gqa"), pack(sequences([5, 14, 2]))
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.7
    enable_packed_attention(model)
    losses = []
    for why in (None, "off"):
        monkeypatch.setattr(varlen, "why_not", lambda device, dtype, why=why: why)
        other = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = packed_loss(other, batch)
        loss.backward()
        losses.append((loss, other))
    assert {scale for _, scale, *_ in kernel} == {0.7}
    torch.testing.assert_close(losses[0][0], losses[1][0], atol=5e-3, rtol=5e-3)
    assert_same_gradients(losses[0][1], losses[1][1], tol=2e-2)


def test_a_sequence_does_not_see_another(kernel):
    model, seqs = build("gpt2").eval(), sequences([6, 8, 5])
    enable_packed_attention(model)
    others = [seqs[0], sequences([8], seed=7)[0], seqs[2]]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        one, two = (model(**pack(some)).logits[0] for some in (seqs, others))
    same = (one == two).all(-1)
    assert same[:6].all() and same[14:].all() and not same[6:14].any()


def groups_of(*sizes):
    """Groups of (prompt, answers …) of so many tokens, each answer behind its own copy of the prompt."""
    lengths = iter(sequences([n for size in sizes for n in size], seed=3))
    prompts = [[next(lengths) for _ in size] for size in sizes]
    return [[prompt + answer for answer in answers] for prompt, *answers in prompts]


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "neox"])
def test_answers_behind_one_copy_of_their_prompt_are_as_each_behind_its_own(name, kernel):
    model, groups = build(name), groups_of((9, 4, 1, 6), (5, 7), (3, 2, 2))
    groups.append(sequences([4, 6], seed=8))  # with nothing in common
    members, reference = [ids for group in groups for ids in group], copy.deepcopy(model)
    enable_packed_attention(model)
    kernel.clear()
    batch = pack_branches(groups)
    last, layers = batch.pop("last"), model.config.num_hidden_layers
    with torch.autocast("cpu", torch.bfloat16):
        states = model.base_model(**batch, use_cache=False).last_hidden_state[0, last].float()
    assert len(kernel) == layers and all(causal for causal, *_ in kernel)
    alone = [reference.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in members]
    torch.testing.assert_close(states, torch.stack(alone), atol=5e-2, rtol=2e-2)
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    (states * weights).sum().backward()
    (torch.stack(alone) * weights).sum().backward()
    for (part, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        if theirs.grad is not None:
            assert (mine.grad - theirs.grad).norm() <= 5e-2 * theirs.grad.norm() + 1e-3, part


def test_the_copies_of_a_prompt_give_their_gradients_back():
    """In float64, against the same in a loop; a prompt's are summed in float32, whatever the dtype."""
    shared = varlen.Shared.of(((2, 1, 3), (0, 4), (1, 2, 2)), CPU)
    assert shared.seams.tolist() == [0, 2, 3, 6, 10, 11, 13, 15] and shared.longest == 4
    assert shared.key_seams.tolist() == [0, 2, 5, 10, 14, 15, 18, 21] and shared.longest_keys == 5
    assert shared.places.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 10, 11, 12, 10, 13, 14]
    many = torch.arange(1).repeat(300)
    x = torch.ones(1, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    varlen._Copies.apply(x, many).sum().backward()
    assert x.grad.unique().tolist() == [300.0]  # bfloat16 counts to 256 by ones


@pytest.mark.parametrize("change", ["window", "dropout", "branches", "head size"])
def test_what_the_kernel_cannot_do_is_done_in_blocks_and_logged(change, kernel, caplog):
    model = build("mistral_window" if change == "window" else "gpt2" if change == "dropout" else "llama_gqa")
    batch = pack(sequences([3, 17, 9]))
    if change == "dropout":
        for block in model.transformer.h:
            block.attn.attn_dropout.p = 0.1
    if change == "branches":
        batch["branches"] = torch.zeros(29, dtype=torch.int64)
    if change == "head size":
        for layer in model.model.layers:  # 4 x 8 to 8 x 4
            layer.self_attn.head_dim, layer.self_attn.scaling = 4, 0.5
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[:2]
    enable_packed_attention(model)
    kernel.clear()
    with caplog.at_level(logging.INFO), torch.autocast("cpu", torch.bfloat16):
        packed_loss(model, batch)
    assert not kernel
    if change != "branches":
        assert caplog.text.count("attended to in blocks") == 1


def test_a_window_that_no_sequence_reaches_is_none(kernel):
    model = build("mistral_window")
    enable_packed_attention(model)
    with torch.autocast("cpu", torch.bfloat16):
        packed_loss(model, pack(sequences([3, 5, 4])))
    assert len(kernel) >= model.config.num_hidden_layers


def test_it_is_chosen_by_what_a_card_can_do(monkeypatch):
    varlen_on_cpu.install()
    varlen._trial.cache_clear()
    assert "NVIDIA" in varlen.why_not(CPU, torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch, simulated_gpu(patch):
        assert varlen.why_not(CUDA, torch.bfloat16) is varlen.why_not(CUDA, torch.float16) is None
        assert "float32" in varlen.why_not(CUDA, torch.float32)
        monkeypatch.setenv("PIPELINES_GPU_OFF", "graphs, varlen")
        assert "PIPELINES_GPU_OFF" in varlen.why_not(CUDA, torch.bfloat16)
        monkeypatch.setenv("PIPELINES_GPU_OFF", "varlan")
        with pytest.raises(SetupError, match="did you mean varlen"):
            varlen.why_not(CUDA, torch.bfloat16)
        monkeypatch.delenv("PIPELINES_GPU_OFF")
        monkeypatch.setattr(varlen, "varlen", None)
        assert "has none" in varlen.why_not(CUDA, torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch, simulated_gpu(patch, bf16=False):
        monkeypatch.undo()
        assert "Ampere" in varlen.why_not(CUDA, torch.float16)


@pytest.mark.parametrize("fault", ["raises", "other numbers", "upper left"])
def test_a_card_on_which_it_fails_attends_in_blocks(fault, monkeypatch):
    real = varlen.varlen.varlen_attn

    def wrong(query, key, value, *rest, **how):
        if fault == "raises":
            raise RuntimeError("no kernel image is available\nand more")
        if fault == "upper left":  # the first query at the first key, wherever there are more keys
            patch.setattr(varlen_on_cpu, "sees", lambda n, keys, causal: torch.ones(n, keys, dtype=torch.bool).tril())
            return real(query, key, value, *rest, **how)
        return query + (key + value)[: len(query)].repeat_interleave(2, 1)

    varlen_on_cpu.install()
    varlen._trial.cache_clear()
    monkeypatch.setattr(varlen.varlen, "varlen_attn", wrong)
    with pytest.MonkeyPatch.context() as patch, simulated_gpu(patch):
        expected = "no kernel image is available" if fault == "raises" else "other numbers than SDPA"
        assert expected in varlen.why_not(CUDA, torch.bfloat16)
    varlen._trial.cache_clear()


def test_seams_that_are_not_those_of_the_row_are_refused(kernel):
    model, batch = build("gpt2"), pack(sequences([5, 4]))
    enable_packed_attention(model)
    batch["on_host"] = pack(sequences([5, 3]))["on_host"]
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(SetupError, match="have 8 tokens, the row 9"):
        packed_loss(model, batch)
