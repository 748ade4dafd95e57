"""Sampling: right distribution and log-probs, stops at EOS, the same answer whatever stands beside it."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from pipelines.generation.decode import (
    Sampler,
    can_decode_lean,
    generate,
    hf_decode,
    inverse_cdf,
    lean_decode,
    truncate,
)
from pipelines.speed import packed_attention
from pipelines.speed.packed_attention import enable_packed_attention

EOS = 10


def tiny_gpt2(vocabulary=11):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=10
    )
    model = GPT2LMHeadModel(config).eval()
    model.transformer.wte.weight.data.mul_(15)  # far from uniform
    return model


def tiny_llama(vocabulary=11):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=10,
    )
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data.mul_(100)
    return model


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    kept = expected > 5
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum().item()
    degrees = int(kept.sum()) - 1
    return statistic, degrees + 5 * (2 * degrees) ** 0.5  # mean + 5 standard deviations


@pytest.mark.parametrize("vocabulary", [3, 128, 1000])
def test_inverse_cdf_distribution(vocabulary):
    torch.manual_seed(0)
    weights = torch.randn(vocabulary).mul(2).exp()
    weights[1] = 0.0
    u = torch.rand(200_000)
    tokens = torch.cat([inverse_cdf(weights.expand(len(part), -1), part) for part in u.split(20_000)])
    counts = torch.bincount(tokens, minlength=vocabulary).float()
    assert counts[1] == 0
    statistic, limit = chi_square(counts, weights / weights.sum())
    assert statistic < limit


def test_inverse_cdf_is_the_inverse_of_the_cdf():
    torch.manual_seed(0)
    weights = torch.rand(4, 301).double()
    u = torch.rand(4).double()
    cdf = (weights / weights.sum(-1, keepdim=True)).cumsum(-1)
    assert torch.equal(inverse_cdf(weights, u), torch.searchsorted(cdf, u[:, None], right=True).squeeze(-1))


def test_inverse_cdf_never_takes_an_impossible_token():
    weights = torch.zeros(2, 300)
    weights[:, [7, 150]] = 1.0
    extremes = torch.tensor([0.0, 1 - 2**-24])
    assert inverse_cdf(weights, extremes).tolist() == [7, 150]


def test_truncate_top_k_and_top_p():
    weights = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    assert truncate(weights, 2, 1.0).tolist() == [[4, 0, 3, 0]]
    assert truncate(weights, 0, 0.4).tolist() == [[4, 0, 0, 0]]
    assert truncate(weights, 0, 0.41).tolist() == [[4, 0, 3, 0]]
    assert truncate(weights, 0, 1.0).tolist() == weights.tolist()


def test_sampler_logprobs_are_those_of_the_temperature():
    torch.manual_seed(0)
    logits, u = torch.randn(5, 40), torch.rand(5, 1)
    tokens, logprobs = Sampler(u, temperature=0.7)(logits, 0)
    expected = (logits / 0.7).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs, expected)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_generated_tokens_follow_the_models_own_probabilities(build):
    """Chi-square over 4000 answers: first token, and second token given the likeliest first."""
    model, prompt, temperature = build(), [1, 2, 3], 1.3
    responses, _ = generate(
        model,
        [prompt] * 4000,
        max_new_tokens=2,
        eos_token_ids=[EOS],
        seeds=[(0, i) for i in range(4000)],
        temperature=temperature,
        batch_size=1000,
    )

    def probabilities(ids):
        with torch.no_grad():
            return (model(torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1)

    first = torch.tensor([r[0] for r in responses])
    statistic, limit = chi_square(torch.bincount(first, minlength=11).float(), probabilities(prompt))
    assert statistic < limit
    mode = next(t for t in first.bincount(minlength=11).argsort(descending=True).tolist() if t != EOS)
    second = torch.tensor([r[1] for r in responses if r[0] == mode])
    assert len(second) > 300
    statistic, limit = chi_square(torch.bincount(second, minlength=11).float(), probabilities([*prompt, mode]))
    assert statistic < limit


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_logprobs_equal_a_plain_forward_and_answers_stop_at_eos(build):
    model, prompts = build(), [[1], [2, 3, 4], [5] * 9, [6, 7], [8, 9]]
    responses, logprobs = generate(
        model,
        prompts,
        max_new_tokens=12,
        eos_token_ids=[EOS, 9],
        seeds=range(5),
        temperature=0.8,
        batch_size=3,
    )
    assert any(len(r) < 12 for r in responses) and any(len(r) > 1 for r in responses)
    for prompt, response, logprob in zip(prompts, responses, logprobs, strict=True):
        assert len(response) == len(logprob) <= 12
        assert not {EOS, 9} & set(response[:-1])
        assert len(response) == 12 or response[-1] in (EOS, 9)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / 0.8
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).squeeze(-1)
        torch.testing.assert_close(logprob, expected, atol=1e-5, rtol=0)


def test_an_answer_does_not_depend_on_its_neighbours():
    model, prompts = tiny_gpt2(), [[1], [2, 3, 4], [5] * 9, [6, 7]]
    settings = dict(max_new_tokens=10, eos_token_ids=[EOS])
    together, _ = generate(model, prompts, seeds=[(7, i) for i in range(4)], **settings)
    for i in range(4):
        alone, _ = generate(model, [prompts[i]], seeds=[(7, i)], **settings)
        assert alone[0] == together[i]
    other, _ = generate(model, prompts, seeds=[(8, i) for i in range(4)], **settings)
    assert other != together


def test_the_models_own_generation_settings_do_not_interfere():
    model, prompts = tiny_gpt2(), [[1], [2, 3]]
    settings = dict(max_new_tokens=10, eos_token_ids=[EOS], seeds=range(2))
    plain, _ = generate(model, prompts, **settings)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.min_length = 30
    before = model.generation_config
    assert generate(model, prompts, **settings)[0] == plain
    assert model.generation_config is before


def test_top_k_one_is_greedy():
    model, prompts = tiny_gpt2(), [[1], [2, 3]]
    settings = dict(max_new_tokens=5, eos_token_ids=[], top_k=1)
    one, _ = generate(model, prompts, seeds=[1, 2], **settings)
    two, _ = generate(model, prompts, seeds=[3, 4], **settings)
    assert one == two


SMALL = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=1,
)
ARCHITECTURES = {
    "gpt2": dict(vocab_size=40, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1),
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL,
    "mistral": SMALL | dict(sliding_window=6),
    "gemma2": SMALL | dict(sliding_window=6, query_pre_attn_scalar=4),
    "gpt_neox": SMALL,
    "opt": SMALL | dict(ffn_dim=32, word_embed_proj_dim=16),
    "phi": SMALL,
    "olmo2": SMALL,
    "bloom": SMALL | dict(n_head=4),
    "mamba": SMALL,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_our_decoding_equals_transformers_own(name):
    """Same random streams, so the very same tokens; prompts of all lengths, ended rows are dropped."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **ARCHITECTURES[name])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    prompts = [[2 + (7 * i + j) % 38 for j in range(1 + i % 9)] for i in range(24)]
    uniforms = torch.rand(24, 12)
    ends = [1, 5, 7, 9]
    if name in ("mamba", "bloom"):
        assert not can_decode_lean(model)
        return
    assert can_decode_lean(model)
    theirs, ours = (decode(model, prompts, 12, ends, Sampler(uniforms, 1.0)) for decode in (hf_decode, lean_decode))
    lengths = []
    for row in range(24):
        tokens = theirs[0][row].tolist()
        n = next((i + 1 for i, token in enumerate(tokens) if token in ends), 12)
        assert ours[0][row, :n].tolist() == tokens[:n]
        torch.testing.assert_close(ours[1][row, :n], theirs[1][row, :n], atol=1e-5, rtol=0)
        lengths.append(n)
    assert len(set(lengths)) > 3 and max(lengths) == 12


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_a_wide_cache_under_autocast_gives_the_logprobs_of_a_plain_forward(build):
    """bfloat16: up to its rounding, which is that of the forwards of the update too."""
    model, prompts = build(), [[1, 2, 3], [4, 5, 6, 7, 8]]
    enable_packed_attention(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        responses, logprobs = generate(model, prompts, max_new_tokens=8, eos_token_ids=[EOS], seeds=[1, 2])
        for prompt, response, found in zip(prompts, responses, logprobs, strict=True):
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float()
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
            torch.testing.assert_close(found, expected, atol=0.15, rtol=0.05)


def test_cached_keys_wider_than_the_queries_are_attended_to_in_float32():
    model = tiny_llama()
    enable_packed_attention(model)
    attention = packed_attention.packed_sdpa_attention
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 1, 4), torch.randn(2, 2, 6, 4), torch.randn(2, 2, 6, 4)
    module = model.model.layers[0].self_attn
    plain, _ = attention(module, q.bfloat16().float(), k, v, None, scaling=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        wide, _ = attention(module, q.bfloat16(), k, v, None, scaling=0.5)
    assert wide.dtype == torch.bfloat16
    assert torch.equal(wide, plain.bfloat16())
