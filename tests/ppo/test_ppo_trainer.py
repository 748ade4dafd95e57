"""PPOTrainer: learns, resumes to the bit, counts tokens not micro-batches, shares its work."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from pipelines.errors import NotFinite, SetupError
from pipelines.generation import decode
from pipelines.generation.decode import generate
from pipelines.generation.logprobs import collate
from pipelines.ppo import trainer as trainer_module
from pipelines.ppo.config import PPOConfig
from pipelines.ppo.rewards import length_penalty, log_odds
from pipelines.ppo.trainer import Diagnosed, PPOTrainer

WORDS, EOS, PAD, GOAL = 30, 30, 31, 3


def tokenizer(reverse=False):
    order = range(WORDS)[::-1] if reverse else range(WORDS)
    vocabulary = {f"w{word}": i for i, word in enumerate(order)} | {"<eos>": EOS, "<pad>": PAD}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


def gpt2(kind=GPT2LMHeadModel, seed=0, **settings):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=32,
        n_positions=48,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **settings,
    )
    if kind is GPT2ForSequenceClassification:
        config.num_labels = 1
    return kind(config)


def critic(seed=1):
    return gpt2(GPT2ForSequenceClassification, seed)


def prompts(n=64):
    return Dataset.from_dict(
        {
            "prompt": [" ".join(f"w{(i * 7 + j) % WORDS}" for j in range(1 + i % 5)) for i in range(n)],
            "number": list(range(n)),
        }
    )


def count_goal(prompts, completions, completion_ids, **columns):
    """The share of GOAL among an answer's tokens: best at 1, about 1/32 for an untrained policy."""
    return [sum(token == GOAL for token in ids) / len(ids) for ids in completion_ids]


def make(
    folder,
    *,
    reward_funcs=count_goal,
    reward_tokenizers=None,
    callbacks=None,
    data=None,
    eval_data=None,
    models=None,
    weights=None,
    ptx=None,
    **settings,
):
    defaults = dict(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        response_length=8,
        temperature=1.0,
        learning_rate=1e-3,
        num_ppo_epochs=2,
        num_mini_batches=2,
        max_steps=4,
        save_strategy="no",
        disable_tqdm=True,
        num_sample_generations=0,
    )
    policy, value = models or (gpt2(), critic())
    return PPOTrainer(
        model=policy,
        value_model=value,
        args=PPOConfig(**defaults | settings),
        reward_funcs=reward_funcs,
        reward_processing_classes=reward_tokenizers,
        reward_weights=weights,
        ptx_dataset=ptx,
        train_dataset=data or prompts(),
        eval_dataset=eval_data,
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def weights_of(trainer):
    return {name: w.detach().clone() for name, w in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}


def assert_same_weights(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        if tolerance:
            torch.testing.assert_close(one[name], other[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)
        else:
            assert torch.equal(one[name], other[name]), name


# --- it learns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_bandit_like_task_is_solved(tmp_path, seed):
    trainer = make(
        tmp_path,
        seed=seed,
        max_steps=14,
        per_device_train_batch_size=64,
        learning_rate=4e-3,
        num_ppo_epochs=4,
        kl_coef=0.0,
        vf_coef=0.5,
        response_length=4,
        allow_no_eos=True,
    )
    before = weights_of(trainer)
    trainer.train()
    history = [row["objective/scores"] for row in trainer.state.log_history if "objective/scores" in row]
    assert history[0] < 0.1 and history[-1] > 0.9
    moved = [name for name, weight in weights_of(trainer).items() if not torch.equal(weight, before[name])]
    assert any(n.startswith("policy.") for n in moved) and any(n.startswith("critic.") for n in moved)


def test_kl_holds_the_policy_back(tmp_path):
    kls = []
    for kl_coef in (0.0, 1.0):
        trainer = make(tmp_path, kl_coef=kl_coef, max_steps=8, learning_rate=3e-3)
        trainer.train()
        kls.append(trainer.state.log_history[-2]["objective/kl"])
    assert kls[1] < kls[0] / 2


# --- what it computes ---------------------------------------------------------------------------------------


def test_log_has_the_names_that_people_watch(tmp_path):
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    row = trainer.state.log_history[0]
    for name in (
        "objective/kl objective/scores objective/rlhf_reward objective/entropy policy/approxkl_avg "
        "policy/clipfrac_avg loss/policy_avg loss/value_avg val/clipfrac_avg val/explained_variance "
        "val/ratio episode eos_rate response_length lr reward/count_goal tokens_per_second/generate "
        "tokens_per_second/update"
    ).split():
        assert math.isfinite(row[name]), name
    assert row["objective/kl"] == pytest.approx(0, abs=1e-5)  # nothing has moved yet
    assert row["episode"] == 16 and row["optimizer_steps"] == 4


def test_first_minibatch_has_ratio_one_and_no_clipping(tmp_path):
    trainer = make(tmp_path, max_steps=1, num_ppo_epochs=1, num_mini_batches=1)
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert row["policy/clipfrac_avg"] == 0 and row["policy/approxkl_avg"] < 1e-10


def test_gradient_accumulation_changes_nothing(tmp_path):
    """Answers of unequal length: a mean of micro-batch means would differ."""
    results = []
    for rows, steps in ((16, 1), (4, 4), (3, 0)):
        if steps == 0:
            continue
        trainer = make(tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=steps, optim="sgd")
        trainer.train()
        results.append(weights_of(trainer))
    assert_same_weights(*results, atol=1e-6, rtol=1e-5)


def test_dropout_is_off(tmp_path):
    policy = gpt2(attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    trainer = make(tmp_path, models=(policy, critic()), max_steps=1, num_ppo_epochs=1, num_mini_batches=1)
    trainer.train()
    assert trainer.state.log_history[0]["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert policy.config.attn_pdrop == 0.5  # the saved model keeps its own setting


def test_critic_warmup_leaves_the_policy_alone(tmp_path):
    trainer = make(tmp_path, max_steps=2, critic_warmup_steps=2)
    before = weights_of(trainer)
    trainer.train()
    for name, weight in weights_of(trainer).items():
        if name.startswith("policy."):
            assert torch.equal(weight, before[name]), name
    assert not torch.equal(trainer.critic.score.weight, before["critic.score.weight"])


def test_early_stop_of_an_update(tmp_path):
    trainer = make(tmp_path, max_steps=1, num_ppo_epochs=8, learning_rate=1e-2, max_approx_kl=0.01)
    trainer.train()
    assert 1 <= trainer.state.log_history[0]["optimizer_steps"] < 16


def test_missing_eos_is_penalised_and_eos_learned(tmp_path):
    trainer = make(
        tmp_path,
        reward_funcs=lambda prompts, completions, **_: [0.0] * len(prompts),
        missing_eos_penalty=1.0,
        allow_constant_scores=True,
        max_steps=12,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        kl_coef=0.0,
    )
    trainer.train()
    rates = [row["eos_rate"] for row in trainer.state.log_history if "eos_rate" in row]
    assert rates[-1] > rates[0] + 0.3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_adapters_only_and_its_reference_is_the_policy_without_them(tmp_path, checkpointing):
    from peft import LoraConfig, PeftModel, get_peft_model

    def lora(seed=0):
        settings = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        return get_peft_model(gpt2(seed=seed), settings)

    policy = lora()
    trainer = make(tmp_path, models=(policy, critic()), activation_checkpointing=checkpointing, max_steps=3)
    assert trainer.ref_model is None
    before = weights_of(trainer)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "objective/kl" in row]
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5) != rows[-1]["objective/kl"]
    for name, weight in weights_of(trainer).items():
        if name.startswith("policy.") and "lora" not in name:
            assert torch.equal(weight, before[name]), name
        elif "lora_B" in name:
            assert not torch.equal(weight, before[name]), name
    trainer.save_model(str(tmp_path / "model"))
    again = PeftModel.from_pretrained(gpt2(), tmp_path / "model")
    ids = torch.arange(8)[None]
    torch.testing.assert_close(again(ids).logits, policy(ids).logits)
    with pytest.raises(ValueError, match="merge the adapter"):
        make(tmp_path, models=(policy, critic()))


def test_activation_checkpointing_changes_nothing(tmp_path):
    plain, checkpointed = make(tmp_path), make(tmp_path, activation_checkpointing=True)
    for trainer in (plain, checkpointed):
        trainer.train()
    assert checkpointed.policy.is_activation_checkpointing and checkpointed.critic.is_activation_checkpointing
    assert_same_weights(weights_of(plain), weights_of(checkpointed), atol=1e-6, rtol=1e-5)


def test_bf16_is_really_bf16(tmp_path):
    trainer = make(tmp_path, bf16=True, max_steps=2)
    seen = set()
    for module in (trainer.policy.transformer.h[0].mlp.c_fc, trainer.critic.transformer.h[0].mlp.c_fc):
        module.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    trainer.train()
    assert seen == {torch.bfloat16}
    assert all(weight.dtype == torch.float32 for weight in trainer.policy.parameters())
    row = trainer.state.log_history[0]
    assert row["val/ratio"] == pytest.approx(1, abs=0.05) and abs(row["objective/kl"]) < 0.1


def test_architectures_that_cannot_be_packed_are_padded(tmp_path):
    """Same rollouts, same update; also where log-probs must come from the model's own logits."""
    results = []
    for packed, plain_head in ((True, True), (False, True), (True, False), (False, False)):
        trainer = make(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4)
        trainer.learner.packed = trainer.rollout_maker.packed = packed
        trainer.policy._has_plain_head = trainer.ref_model._has_plain_head = plain_head
        trainer.train()
        results.append(weights_of(trainer))
    for other in results[1:]:
        assert_same_weights(results[0], other, atol=2e-6, rtol=1e-4)


def test_entropy_bonus_keeps_the_policy_random(tmp_path):
    entropies = []
    for coef in (0.0, 1.0):
        trainer = make(tmp_path, entropy_coef=coef, max_steps=10, learning_rate=5e-3, kl_coef=0.0)
        trainer.train()
        entropies.append(trainer.state.log_history[-2]["policy/entropy_avg"])
    assert entropies[0] < 3.3 < entropies[1] < math.log(32)


def test_a_head_that_does_more_than_multiply_is_respected(tmp_path):
    """Gemma 2 soft-caps its logits: log-probs must be those of the model, not of its bare head."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    policy = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            final_logit_softcapping=0.5,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=EOS,
        )
    )
    policy.lm_head.weight.data.mul_(30)
    trainer = make(tmp_path, models=(policy, critic()), max_steps=1, num_ppo_epochs=1, num_mini_batches=1)
    trainer.train()
    assert trainer.state.log_history[0]["val/ratio"] == pytest.approx(1, abs=1e-5)


# --- rewards ------------------------------------------------------------------------------------------------


def test_reward_functions_get_prompts_completions_and_columns(tmp_path):
    seen = []

    def spy(prompts, completions, completion_ids, number, **rest):
        seen.append((prompts, completions, completion_ids, number))
        return [float(n) for n in number]

    trainer = make(tmp_path, reward_funcs=[spy, count_goal], weights=[1.0, 0.0], max_steps=1)
    trainer.train()
    data = prompts()
    texts, completions, ids, numbers = seen[-1]
    assert len(texts) == 16 and [data[n]["prompt"] for n in numbers] == texts
    for completion, answer in zip(completions, ids, strict=True):
        assert completion == " ".join(f"w{t}" for t in answer if t < WORDS)
    row = trainer.state.log_history[0]
    assert row["objective/scores"] == pytest.approx(sum(numbers) / 16) == pytest.approx(row["reward/spy"])


@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_reward_model_scores_the_last_real_token(tmp_path, own_tokenizer):
    """Also under a tokenizer of its own: ids differ, so its scores are those of the re-encoded text."""
    reward_model = critic(seed=5)
    theirs = tokenizer(reverse=own_tokenizer)
    trainer = make(tmp_path, reward_funcs=[reward_model], reward_tokenizers=[theirs])
    assert trainer.rollout_maker.scorer.tokenizers == [theirs if own_tokenizer else None]
    trainer._set_up(None)
    rollouts = trainer._rollout(trainer.train_dataset, trainer.train_prompts, list(range(6)), list(range(6)))
    for i in range(6):
        ids = rollouts.prompts[i] + rollouts.responses[i]
        if own_tokenizer:
            ids = [WORDS - 1 - t if t < WORDS else t for t in ids]
        with torch.no_grad():
            alone = reward_model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))
            hidden = reward_model.transformer(torch.tensor([ids])).last_hidden_state
        if PAD not in ids:
            torch.testing.assert_close(alone.logits[0, 0], rollouts.scores[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(reward_model.score(hidden[0, -1])[0], rollouts.scores[i], atol=1e-5, rtol=0)


def test_rollout_numbers_equal_plain_forwards(tmp_path):
    """Log-probs, reference log-probs and values of a ragged batch equal those of each answer alone."""
    trainer = make(tmp_path, temperature=0.7)
    trainer._set_up(None)
    with torch.no_grad():  # a reference that differs
        for weight in trainer.ref_model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.02)
    out = trainer._rollout(trainer.train_dataset, trainer.train_prompts, list(range(6)), list(range(6)))
    for i in range(6):
        prompt, response, n = out.prompts[i], out.responses[i], len(out.responses[i])
        assert out.mask[i].tolist() == [t < n for t in range(out.mask.shape[1])]
        ids, states = torch.tensor([prompt + response]), slice(len(prompt) - 1, -1)
        with torch.no_grad():
            for model, found in ((trainer.policy, out.logprobs), (trainer.ref_model, out.ref_logprobs)):
                expected = (model(ids).logits[0, states] / 0.7).log_softmax(-1)
                expected = expected.gather(-1, torch.tensor(response)[:, None]).squeeze(-1)
                torch.testing.assert_close(found[i, :n], expected, atol=1e-5, rtol=0)
            values = trainer.critic.score(trainer.critic.transformer(ids).last_hidden_state)[0, states, 0]
            torch.testing.assert_close(out.values[i, :n], values, atol=1e-5, rtol=0)


def test_the_length_penalty_is_a_reward_like_any_other(tmp_path):

    trainer = make(
        tmp_path,
        reward_funcs=[count_goal, length_penalty],
        weights=[0.0, 0.5],
        max_steps=8,
        per_device_train_batch_size=64,
        learning_rate=4e-3,
        kl_coef=0.0,
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "objective/scores" in row]
    for row in rows:
        assert row["reward/length_penalty"] == pytest.approx(-row["response_length"]) == 2 * row["objective/scores"]
    assert rows[-1]["response_length"] < rows[0]["response_length"] - 1


@pytest.mark.parametrize("label", ["bad", "good"])
def test_a_classifier_scores_by_the_log_odds_of_a_label(label, tmp_path):

    torch.manual_seed(0)
    config = gpt2().config
    config.id2label = {0: "bad", 1: "good"}
    config.problem_type = "single_label_classification"
    classifier = GPT2ForSequenceClassification(config).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        probabilities = classifier(ids).logits[0].softmax(-1)
        score = log_odds(classifier, label)(ids).logits
    p = probabilities[["bad", "good"].index(label)]
    assert score.shape == (1, 1) and classifier.config.num_labels == 1
    torch.testing.assert_close(score[0, 0], (p / (1 - p)).log())
    classifier.save_pretrained(tmp_path)  # as a critic is
    again = GPT2ForSequenceClassification.from_pretrained(tmp_path).eval()
    assert again.config.id2label == {0: label} and torch.equal(again(ids).logits, score)
    with pytest.raises(ValueError, match="'fine' must be one of"):
        log_odds(GPT2ForSequenceClassification(config), "fine")


# --- a critic on the policy's own trunk ---------------------------------------------------------------------


def test_shared_critic_learns_in_half_the_memory(tmp_path):
    trainer = make(tmp_path, models=(gpt2(), "shared"), max_steps=12, learning_rate=3e-3, kl_coef=0.0, vf_coef=0.5)
    assert sum(w.numel() for w in trainer.critic.parameters()) == 32
    trainer.train()
    rows = [row for row in trainer.state.log_history if "objective/scores" in row]
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"] + 0.1
    assert rows[0]["val/first_ratio_rms"] < 1e-4


def test_shared_critic_computes_what_two_forwards_would(tmp_path):
    """Values and gradients of trunk and head are those of an ordinary critic with the same trunk."""
    trainer = make(tmp_path, models=(gpt2(), "shared"), max_steps=1)
    trainer._set_up(None)
    with torch.no_grad():
        trainer.critic.score.weight.normal_()
    out = trainer._rollout(trainer.train_dataset, trainer.train_prompts, list(range(6)), list(range(6)))
    prompt, response = out.prompts[3], out.responses[3]
    hidden = trainer.policy.transformer(torch.tensor([prompt + response])).last_hidden_state
    expected = trainer.critic.score(hidden)[0, len(prompt) - 1 : -1, 0]
    torch.testing.assert_close(out.values[3, : len(response)], expected, atol=1e-5, rtol=0)

    batch = collate([(prompt, response)], trainer.packed, "cpu")
    for hold in (False, True):
        trainer.model.zero_grad()
        trainer.model(batch, values_only=True, hold_trunk=hold).sum().backward()
        of_trunk = trainer.policy.transformer.h[0].mlp.c_fc.weight.grad
        assert (of_trunk is None) == hold
        torch.testing.assert_close(trainer.critic.score.weight.grad[0], hidden[0, len(prompt) - 1 : -1].sum(0))
        if not hold:
            (expected_grad,) = torch.autograd.grad(expected.sum(), trainer.policy.transformer.h[0].mlp.c_fc.weight)
            torch.testing.assert_close(of_trunk, expected_grad, atol=1e-5, rtol=1e-4)


def test_shared_critic_warms_up_alone_and_resumes_to_the_bit(tmp_path):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2, critic_warmup_steps=1)
    whole = make(tmp_path / "whole", models=(gpt2(), "shared"), **settings)
    before = weights_of(whole)
    stopped = make(tmp_path / "parts", models=(gpt2(), "shared"), callbacks=[StopAt(1)], **settings)
    stopped.train()
    assert not torch.equal(stopped.critic.score.weight, before["critic.score.weight"])
    assert_same_weights(weights_of(stopped) | {"critic.score.weight": before["critic.score.weight"]}, before)
    whole.train()
    resumed = make(tmp_path / "parts", models=(gpt2(), "shared"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-1"))
    assert_same_weights(weights_of(resumed), weights_of(whole))
    assert not torch.equal(whole.policy.lm_head.weight, before["policy.transformer.wte.weight"])
    resumed.save_model(str(tmp_path / "model"))
    whole.critic.score.weight.data.zero_()
    whole.critic.load(tmp_path / "model" / "critic")
    assert torch.equal(whole.critic.score.weight, resumed.critic.score.weight)


# --- PPO-ptx ------------------------------------------------------------------------------------------------


def text(n=40, length=12):
    """Pretraining rows: the words in order, from a different one each time."""
    return Dataset.from_dict({"input_ids": [[(i + j) % WORDS for j in range(length)] for i in range(n)]})


def lm_loss(policy, rows):
    ids = torch.tensor(rows["input_ids"])
    return policy(ids, labels=ids).loss


def silent(prompts, completions, **_):
    return [0.0] * len(prompts)


NO_REWARD = dict(reward_funcs=silent, allow_constant_scores=True, kl_coef=0.0, vf_coef=0.0)


def test_ptx_gradient_is_that_of_the_language_model_loss(tmp_path):
    """With no reward and no critic one SGD step is −lr · ptx_coef · ∇(mean loss per token), in any micro-batches."""
    value = critic()
    with torch.no_grad():
        value.score.weight.zero_()
    settings = dict(
        optim="sgd", learning_rate=0.1, num_ppo_epochs=1, num_mini_batches=1, max_steps=1, max_grad_norm=0.0
    )
    settings |= dict(ptx_coef=2.0, ptx_batch_size=40, ptx=text(), lr_scheduler_type="constant") | NO_REWARD
    reference = gpt2().eval()  # without dropout, as PPO
    loss = lm_loss(reference, text())
    loss.backward()
    for rows, steps in ((16, 1), (4, 4)):
        trainer = make(
            tmp_path,
            models=(gpt2(), value),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
            **settings,
        )
        trainer.train()
        for (name, new), old in zip(trainer.policy.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(new, old - 0.1 * 2.0 * old.grad, atol=1e-6, rtol=1e-4, msg=name)
        assert trainer.state.log_history[0]["loss/ptx_avg"] == pytest.approx(loss.item(), rel=1e-5)


def test_ptx_keeps_what_the_policy_knows_and_resumes_to_the_bit(tmp_path):
    settings = dict(ptx=text(), ptx_coef=1.0, ptx_batch_size=8, max_steps=6, learning_rate=3e-3) | NO_REWARD
    settings |= dict(save_strategy="steps", save_steps=3)
    whole = make(tmp_path / "whole", **settings)
    before = lm_loss(whole.policy, text()).item()
    whole.train()
    assert lm_loss(whole.policy, text()).item() < before - 0.7
    make(tmp_path / "parts", callbacks=[StopAt(3)], **settings).train()
    resumed = make(tmp_path / "parts", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights_of(resumed), weights_of(whole))


def test_ptx_needs_text_and_a_coefficient(tmp_path):
    with pytest.raises(ValueError, match="ptx_coef is above 0, but there is no pretraining text"):
        make(tmp_path, ptx_coef=1.0)
    with pytest.raises(ValueError, match="is used only with ptx_coef above 0"):
        make(tmp_path, ptx=text())


# --- diagnosis ----------------------------------------------------------------------------------------------


def test_diagnosis_names_a_policy_that_runs_away_and_stops_resumably(tmp_path, caplog):
    settings = dict(max_steps=12, kl_coef=0.0, learning_rate=2e-2, num_ppo_epochs=4)
    warned = make(tmp_path / "warn", **settings)
    with caplog.at_level("WARNING", logger="pipelines"):
        warned.train()
    said = [finding["name"] for finding in warned.monitor.watch.said]
    assert "kl_running_away" in said and len(set(said)) == len(said)
    assert [r.message for r in caplog.records if "kl running away" in r.message][0].endswith("each update.")
    assert make(tmp_path / "off", **settings, diagnosis="off").monitor.watch.said == []

    stopped = make(tmp_path / "stop", **settings, diagnosis="stop")
    with pytest.raises(Diagnosed, match=r"(?s)PPO diagnosis after update \d+.*saved in .*checkpoint-"):
        stopped.train()
    at = stopped.state.global_step
    assert at < 12 and stopped.monitor.watch.said[0]["step"] == at
    resumed = make(tmp_path / "stop", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights_of(resumed), weights_of(warned))
    assert resumed.monitor.watch.said == warned.monitor.watch.said


def test_a_judge_of_weight_0_is_watched_but_not_trained_on(tmp_path):
    def judge(prompts, completions, completion_ids, **_):
        return [-score for score in count_goal(prompts, completions, completion_ids)]

    trainer = make(
        tmp_path,
        reward_funcs=[count_goal, judge],
        weights=[1.0, 0.0],
        eval_data=prompts(64),
        eval_strategy="steps",
        eval_steps=3,
        max_steps=12,
        per_device_train_batch_size=32,
        learning_rate=4e-3,
        kl_coef=0.0,
    )
    trainer.train()
    falls = [finding for finding in trainer.monitor.watch.said if finding["name"] == "held_out_falls"]
    assert len(falls) == 1 and "held-out reward/judge fell" in falls[0]["what"]


def test_sampling_that_does_not_match_the_log_probs_is_noticed(tmp_path, monkeypatch):

    plain = decode.generate
    monkeypatch.setattr(decode, "generate", lambda *a, **k: plain(*a, **k | {"temperature": 0.5}))
    broken = make(tmp_path, max_steps=1)
    broken.train()
    assert [finding["name"] for finding in broken.monitor.watch.said] == ["ratio_not_one"]


@pytest.mark.parametrize("top_k, found", [(0, []), (8, ["sampled_otherwise"])])
def test_sampling_from_another_distribution_than_the_measured_one_is_noticed(tmp_path, top_k, found):
    settings = dict(max_steps=3, per_device_train_batch_size=64, temperature=0.3, learning_rate=1e-4)
    trainer = make(tmp_path, top_k=top_k, **settings)
    trainer.train()
    assert [finding["name"] for finding in trainer.monitor.watch.said] == found
    gaps = [abs(r["val/surprise_gap"] / r["val/surprise_sem"]) for r in trainer.state.log_history if "val/ratio" in r]
    assert all(gap > 5 for gap in gaps) if found else all(gap < 4 for gap in gaps)


def test_the_score_before_training_counts_as_an_evaluation(tmp_path):
    settings = dict(eval_data=prompts(16), eval_strategy="steps", eval_steps=2, eval_on_start=True)
    trainer = make(tmp_path, normalize_scores=True, **settings)
    trainer.train()
    evaluated = [row["eval_score"] for row in trainer.state.log_history if "eval_score" in row]
    assert [e["held_out"]["score"][0] for e in trainer.monitor.watch.evaluations] == evaluated and len(evaluated) == 3
    raw = [row["reward/count_goal"] for row in trainer.state.log_history if "reward/count_goal" in row]
    trained = [e["train_score"] for e in trainer.monitor.watch.evaluations]  # as they came, not as they were normalised
    assert trained == pytest.approx([evaluated[0], sum(raw[:2]) / 2, sum(raw) / 4])


def test_samples_survive_an_interruption_whatever_characters_they_hold(tmp_path):
    rows = [json.dumps({"step": step, "completion": "a\x85b\u2028c"}, ensure_ascii=False) for step in (1, 2, 3)]
    (tmp_path / "samples.jsonl").write_text("\n".join(rows) + '\n{"step": 3, "compl')
    make(tmp_path).monitor.forget_samples_after(2)
    assert (tmp_path / "samples.jsonl").read_text() == "\n".join(rows[:2]) + "\n"


def test_samples_are_shown_with_their_scores(tmp_path, caplog):
    with caplog.at_level("INFO", logger="pipelines"):
        make(tmp_path, max_steps=1, num_sample_generations=1).train()
    (table,) = [r.message for r in caplog.records if "answers after update" in r.message]
    first = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    line = table.splitlines()[1]
    assert len(table.splitlines()) == 4 and line.split()[0] == f"{first['score']:.3f}"
    assert first["prompt"][-40:] in line and first["completion"] in line


@pytest.mark.parametrize("eval_on_start", [True, False])
def test_held_out_answers_of_the_first_and_the_last_policy_are_kept_side_by_side(tmp_path, eval_on_start):
    data, held_out = prompts(), prompts(150)
    trainer = make(
        tmp_path,
        data=data,
        eval_data=held_out,
        eval_on_start=eval_on_start,
        max_steps=2,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    trainer.evaluate()  # as the stage does at the end
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    first, last = rows[:128], rows[-128:]
    assert {row["step"] for row in first} == {0} and {row["step"] for row in last} == {2}
    assert all(a["prompt"] == b["prompt"] and b["first"]["completion"] == a["completion"] for a, b in zip(first, last))
    assert sum(row["completion"] != row["first"]["completion"] for row in last) > 64
    assert len(rows) == 2 * 128 + 2 * 10


def test_none_says_that_a_reward_does_not_apply(tmp_path):
    def of_even(prompts, completions, number, **_):
        return [1.0 + n if n % 2 == 0 else None for n in number]

    def of_odd(prompts, completions, number, **_):
        return [None if n % 2 == 0 else -1.0 - n for n in number]

    both = make(tmp_path, reward_funcs=[of_even, of_odd], weights=[1.0, 2.0], eval_data=prompts(9))
    batch = both._train_rollout(range(16))
    expected = [1.0 + n if n % 2 == 0 else -2.0 - 2 * n for n in batch.rows]
    assert batch.scores.tolist() == expected
    found = both.evaluate()
    assert found["eval_reward/of_even"] == 5.0 and found["eval_reward/of_even_count"] == 5
    assert found["eval_reward/of_odd"] == -5.0 and found["eval_reward/of_odd_count"] == 4
    both.train()
    assert all(math.isfinite(row["objective/scores"]) for row in both.state.log_history if "objective/scores" in row)
    with pytest.raises(SetupError, match=r"every reward function of a weight gave None.*first dataset rows"):
        make(tmp_path, reward_funcs=[of_even, of_odd], weights=[1.0, 0.0]).train()


# --- vLLM ---------------------------------------------------------------------------------------------------


def test_vllm_samples_with_the_weights_of_now_and_our_log_probs(tmp_path, monkeypatch):
    """A stand-in for the engine: it answers from the weights it was given last, and knows no log-probs."""

    class Engine:
        def __init__(self, policy, *_):
            self.policy, self.copy, self.synced = policy, gpt2(seed=7), 0

        def sync_weights(self):
            self.copy.load_state_dict(self.policy.state_dict())
            self.synced += 1

        def generate(self, prompts, images, num_generations):
            assert images is None and num_generations == 1
            seeds = [(1, self.synced, i) for i in range(len(prompts))]
            ids, _ = generate(self.copy, prompts, max_new_tokens=8, eos_token_ids=[EOS], seeds=seeds)
            return prompts, ids, None, None

    with pytest.raises(ValueError, match="vLLM is not installed here"):
        make(tmp_path, use_vllm=True)
    monkeypatch.setattr(trainer_module, "vllm_engine", Engine)
    trainer = make(tmp_path, use_vllm=True)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "objective/kl" in row]
    assert trainer.rollout_maker.vllm.synced == 5 and len(rows) == 4  # the gate before training, then once an update
    assert all(row["val/first_ratio_rms"] < 1e-4 for row in rows)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4) != rows[-1]["objective/kl"]


def test_what_vllm_rounds_otherwise_is_corrected(tmp_path, monkeypatch):
    """An engine that thinks its answers less likely than they are: they are masked, cut to a bound, or not looked at."""

    class Engine:
        def __init__(self, policy, *_):
            self.policy = policy

        def sync_weights(self):
            pass

        def generate(self, prompts, images, num_generations):
            seeds = list(range(len(prompts)))
            ids, logprobs = generate(self.policy, prompts, max_new_tokens=8, eos_token_ids=[EOS], seeds=seeds)
            return prompts, ids, [[[value - 2.0] for value in values.tolist()] for values in logprobs], None

    monkeypatch.setattr(trainer_module, "vllm_engine", Engine)
    moved, logged = {}, {}
    for name, settings in {
        "masked": {},
        "cut": {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 2.0},
        "off": {"vllm_importance_sampling_correction": False},
    }.items():
        trainer = make(tmp_path / name, use_vllm=True, kl_coef=0.0, max_steps=1, **settings)
        before = [w.detach().clone() for w in trainer.model.policy.parameters()]
        trainer.train()
        after = trainer.model.policy.parameters()
        moved[name] = max((a - b).abs().max().item() for a, b in zip(after, before, strict=True))
        logged[name] = next(row for row in trainer.state.log_history if "objective/kl" in row)
    assert moved["masked"] == 0 and moved["cut"] > 1e-4 and moved["off"] > 1e-4
    names = ("sampling_logp_difference/mean", "importance_sampling_ratio/mean", "importance_sampling_ratio/max")
    assert [logged["masked"][f"sampling/{n}"] for n in names] == pytest.approx([2.0, 0.0, 0.0], abs=1e-4)
    assert [logged["cut"][f"sampling/{n}"] for n in names] == pytest.approx([2.0, 2.0, 2.0], abs=1e-4)
    assert not any(name.startswith("sampling/") for name in logged["off"])


# --- gates and errors ---------------------------------------------------------------------------------------


def test_gates_name_their_override(tmp_path):
    policy = gpt2()
    with torch.no_grad():  # never EOS
        policy.transformer.wte.weight[EOS] = -1.0
        policy.transformer.ln_f.bias.fill_(1.0)
    constant = lambda prompts, completions, **_: [1.0] * len(prompts)  # noqa: E731
    with pytest.raises(ValueError, match="(?s)allow_no_eos.*allow_constant_scores"):
        make(tmp_path, models=(policy, critic()), reward_funcs=constant).train()
    make(
        tmp_path,
        models=(policy, critic()),
        reward_funcs=constant,
        allow_no_eos=True,
        allow_constant_scores=True,
        max_steps=1,
    ).train()


def test_nan_stops_with_step_and_prompts(tmp_path):
    def sometimes_nan(prompts, completions, number, **_):
        return [math.nan if n == 5 else float(n) for n in number]

    with pytest.raises(NotFinite, match=r"sometimes_nan returned nan in update \d.*rows \[5\].*'w5"):
        make(tmp_path, reward_funcs=sometimes_nan, max_steps=8).train()

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.critic.score.weight.fill_(math.nan)

    with pytest.raises(NotFinite, match=r"the gradient norm is nan in update 2"):
        make(tmp_path, callbacks=[Break()]).train()


def test_all_problems_of_a_config_come_together(tmp_path):
    with pytest.raises(ValueError) as error:
        PPOConfig(output_dir=str(tmp_path), cliprange=0, top_p=2, kl_target=3, kl_coef=0, torch_compile=True)
    for words in ("cliprange must be above 0", "top_p", "kl_target", "torch_compile"):
        assert words in str(error.value)


def test_models_are_checked(tmp_path):
    value = critic()
    with pytest.raises(ValueError, match="separate objects"):
        make(tmp_path, models=(gpt2(), value), reward_funcs=[value])
    with pytest.raises(ValueError, match="without a `score` head"):
        make(tmp_path, models=(gpt2(), gpt2(seed=1)))
    with pytest.raises(ValueError, match="does not divide"):
        make(tmp_path, num_mini_batches=3)
    with pytest.raises(ValueError, match=r"longer than 40 tokens, first rows \[1\]"):
        make(tmp_path, data=Dataset.from_dict({"prompt": ["w1", "w1 " * 41]}))
    with pytest.raises(ValueError, match="no column `prompt`"):
        make(tmp_path, data=Dataset.from_dict({"text": ["w1"]}))


# --- saving, resuming, evaluating ---------------------------------------------------------------------------


class StopAt(TrainerCallback):
    """What Ctrl-C does: stop after this update, saving."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = control.should_save = True


RESUME = dict(
    max_steps=6,
    save_strategy="steps",
    save_steps=0.5,
    kl_target=0.01,
    kl_horizon=100,
    normalize_scores=True,
    score_clip=2.0,
    missing_eos_penalty=0.1,
    logging_steps=4,
    lr_scheduler_type="cosine",
    warmup_steps=2,
    num_sample_generations=6,
    per_device_train_batch_size=24,  # epochs of 64 prompts end inside a batch
)


def test_resume_is_bit_identical(tmp_path):
    whole = make(tmp_path / "whole", **RESUME)
    whole.train()
    assert sorted(p.name for p in (tmp_path / "whole").glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-6",
    ]

    torch.manual_seed(123)  # whatever the process did before must not matter
    interrupted = make(tmp_path / "parts", callbacks=[StopAt(2)], **RESUME)
    interrupted.train()
    assert interrupted.state.global_step == 2
    resumed = make(tmp_path / "parts", models=(gpt2(seed=8), critic(seed=9)), **RESUME)
    resumed.ref_model.load_state_dict(whole.ref_model.state_dict())  # the caller gives the SFT model again
    torch.manual_seed(456)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))

    assert_same_weights(weights_of(resumed), weights_of(whole))
    assert resumed.kl_controller.value == whole.kl_controller.value != 0.05
    for one, other in zip(resumed.state.log_history, whole.state.log_history, strict=True):
        timeless = {k for k in one if "second" not in k and "runtime" not in k}
        assert {k: one[k] for k in timeless} == {k: other[k] for k in timeless}
    samples = [(p / "samples.jsonl").read_text() for p in (tmp_path / "whole", tmp_path / "parts")]
    assert samples[0] == samples[1] and len(samples[0].splitlines()) == 60


def test_adapters_of_policy_and_critic_resume_to_the_bit(tmp_path):
    from peft import LoraConfig, get_peft_model

    def adapted():
        torch.manual_seed(5)
        settings = dict(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
        return (
            get_peft_model(gpt2(), LoraConfig(task_type="CAUSAL_LM", **settings)),
            get_peft_model(critic(), LoraConfig(task_type="SEQ_CLS", **settings)),
        )

    settings = dict(max_steps=4, save_strategy="steps", save_steps=2)
    whole = make(tmp_path / "whole", models=adapted(), **settings)
    whole.train()
    make(tmp_path / "parts", models=adapted(), callbacks=[StopAt(2)], **settings).train()
    resumed = make(tmp_path / "parts", models=adapted(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights_of(resumed), weights_of(whole))
    assert list(resumed.policy.peft_config) == ["default"]


def test_resume_true_takes_the_last_checkpoint_and_refuses_another_batch(tmp_path):
    make(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    longer = make(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 3
    with pytest.raises(ValueError, match="batches of 16 answers"):
        make(tmp_path, per_device_train_batch_size=8).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="no PPO checkpoint"):
        make(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_checkpoints_rotate(tmp_path):
    make(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_saved_models_are_plain_folders(tmp_path):
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    policy = GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    value = GPT2ForSequenceClassification.from_pretrained(tmp_path / "model" / "critic")
    for saved, live in ((policy, trainer.policy), (value, trainer.critic)):
        assert_same_weights(dict(saved.named_parameters()), dict(live.named_parameters()))
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "model").get_vocab() == tokenizer().get_vocab()


def test_evaluation(tmp_path):
    held_out = prompts(7)
    trainer = make(tmp_path, eval_data=held_out, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_score" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert rows[0]["eval_kl"] == pytest.approx(0, abs=1e-5) and rows[-1]["eval_kl"] != rows[0]["eval_kl"]
    assert rows[0]["eval_ref_perplexity"] == pytest.approx(32, rel=0.2)  # nearly uniform over 32 words
    assert 1 <= rows[0]["eval_length"] <= 8 and 0 <= rows[0]["eval_eos_rate"] <= 1
    assert trainer.evaluate()["eval_score"] == rows[-1]["eval_score"]  # the same random streams each time
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 * 7 and samples[0]["prompt"] == held_out[0]["prompt"]
    assert {"step", "prompt", "completion", "score", "kl", "ended"} <= samples[0].keys()


def test_best_model_respects_the_kl_cap(tmp_path):
    settings = dict(eval_data=prompts(16), eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    settings |= dict(load_best_model_at_end=True, metric_for_best_model="score", max_steps=6, learning_rate=3e-3)
    free = make(tmp_path / "free", **settings)
    free.train()
    evaluations = {row["step"]: row for row in free.state.log_history if "eval_score" in row}
    assert free.state.best_global_step == max(evaluations, key=lambda s: evaluations[s]["eval_score"])
    cap = sorted(row["eval_kl"] for row in evaluations.values())[2]
    capped = make(tmp_path / "capped", best_kl_cap=cap, **settings)
    capped.train()
    assert evaluations[capped.state.best_global_step]["eval_kl"] <= cap
    best = GPT2LMHeadModel.from_pretrained(capped.state.best_model_checkpoint)
    assert_same_weights(dict(best.named_parameters()), dict(capped.policy.named_parameters()))


def test_callbacks_hear_everything(tmp_path):
    heard = []

    class Listener(TrainerCallback):
        def __getattribute__(self, name):
            if name.startswith("on_"):
                return lambda args, state, control, **kwargs: heard.append((name, state.global_step)) or control
            return super().__getattribute__(name)

    trainer = make(
        tmp_path,
        callbacks=[Listener()],
        max_steps=4,
        eval_data=prompts(4),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=4,
    )
    trainer.train()
    for event in (
        ("on_train_begin", 0),
        ("on_step_begin", 0),
        ("on_step_end", 1),
        ("on_log", 1),
        ("on_evaluate", 2),
        ("on_save", 4),
        ("on_epoch_end", 4),
        ("on_train_end", 4),
    ):
        assert event in heard, event
    assert trainer.state.max_steps == 4


# --- several processes --------------------------------------------------------------------------------------


def worker(folder):
    """What each process of the launch below runs."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    trainer = make(
        folder,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4 // world,
        whiten_rewards=True,
        kl_target=0.01,
        normalize_scores=True,
        kl_coef=0.2,
        ptx=text(),
        ptx_coef=0.5,
        ptx_batch_size=6,
        eval_data=prompts(7),
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=2,
    )
    assert trainer.accelerator.num_processes == world and trainer.batch_size == 16
    trainer.train()
    trainer.save_model(str(folder / "model"))


@pytest.mark.slow
def test_two_processes_update_like_one(tmp_path):
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    for world in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if world == 2 else []
        folder = tmp_path / str(world)
        command = [sys.executable, *launch, __file__, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    for model, kind in (("model", GPT2LMHeadModel), ("model/critic", GPT2ForSequenceClassification)):
        one, two = (dict(kind.from_pretrained(tmp_path / w / model).named_parameters()) for w in "12")
        assert_same_weights(one, two, atol=2e-6, rtol=1e-4)
    states = [json.loads((tmp_path / w / "checkpoint-4/trainer_state.json").read_text()) for w in "12"]
    for one, two in zip(*(state["log_history"] for state in states), strict=True):
        for name in one:
            if "second" not in name and "runtime" not in name:
                assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-5), name


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
