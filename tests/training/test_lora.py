"""LoRA: adapters that are trained, a base that is not, and the sum of both as a plain model."""

import copy
import json
import random
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig

from gspo.policy.log_probs import token_log_probs
from gspo.policy.lora import ALPHA, adapter_weights, add_adapters
from gspo.policy.model_loader import load_model
from gspo.training.config import GSPOConfig
from gspo.training.trained_weights import trained_weights
from gspo_implementation import GSPOTrainer, resolve
from support.models import VOCABULARY, make_model
from support.records import record_of, weights_of_run
from support.runs import EVAL, TRAIN, new_trainer, seed_everything
from support.sorting import problems, shared_prefix, trainer

PROMPTS, RESPONSES = [[5, 6, 7], [8, 9]], [[10, 11, 12, 13], [14, 15, 16]]
LORA = {"lora_rank": 4, "learning_rate": 1e-3, "batch_size": 2, "mini_batch_size": 2}


def log_probs(model):
    with torch.no_grad():
        return torch.cat(token_log_probs(model, PROMPTS, RESPONSES))


def base_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def lora(model, dtype="float32", **settings):
    """The model with adapters as a trainer makes them, both moved away from where they start."""
    config = GSPOConfig(model_name="it", device="cpu", dtype=dtype, lora_rank=4, **settings)
    made = trained_weights(model, resolve(config, 10**5), torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_ten_updates_leave_the_base_as_it_was_bit_for_bit(name, dtype):
    t = trainer(name, dtype=dtype, gradient_checkpointing=name == "tiny", **LORA)
    assert {p.dtype for p in t.weights.parameters} == {torch.float32} and t.model.dtype == getattr(
        torch, dtype
    )
    before, start = base_of(t.model), [p.detach().clone() for p in t.weights.parameters]
    for i in range(10):
        step = t.train_step(problems(2, seed=i))
        # One update a rollout batch: the policy is still pi_old.
        assert (step["importance_ratio_min"], step["importance_ratio_max"]) == (1, 1)
    assert step.get("null_clip_fraction", 0) == 0
    after = base_of(t.model)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert not any(map(torch.equal, start, t.weights.parameters))
    assert all(p.grad is None for p in t.model.parameters() if not p.requires_grad)
    trained = {id(p) for p in t.model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in t.weights.parameters}


def test_every_linear_layer_but_output_and_routers_has_an_adapter():
    adapted = {}
    for family in ("llama", "qwen3_moe", "gpt2", "opt"):
        weights = lora(make_model(family))
        adapted[family] = set(weights._adapter_config.target_modules)
        # A and B of each, in two layers; GPT-2 has two layers c_proj in each.
        assert len(weights.parameters) == 2 * 2 * (len(adapted[family]) + (family == "gpt2"))
    qwen2_moe = Qwen2MoeConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=2,
        shared_expert_intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, num_experts=2,
    )  # fmt: skip
    weights = lora(AutoModelForCausalLM.from_config(qwen2_moe))  # whose shared expert has a linear gate
    adapted["qwen2_moe"] = set(weights._adapter_config.target_modules)
    # Routers, experts in one tensor, norms, embeddings and the output layer stay as they are.
    assert adapted == {
        "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        "qwen3_moe": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "qwen2_moe": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        "gpt2": {"c_attn", "c_proj", "c_fc"},
        "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    }


def test_the_start_is_the_model_and_depends_on_the_seed_alone():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(made))
        state = torch.get_rng_state()
        model = make_model("llama")
        torch.set_rng_state(state)
        config = resolve(GSPOConfig(model_name="it", device="cpu", lora_rank=8, seed=seed), 10**5)
        weights = trained_weights(copy.deepcopy(model), config, torch.device("cpu"))
        assert torch.equal(torch.get_rng_state(), state)
        made.append(weights.parameters)
        assert torch.equal(log_probs(weights.model), log_probs(model))
    assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()
    first, same, other = (torch.cat([p.flatten() for p in parameters]) for parameters in made)
    assert torch.equal(first, same) and not torch.equal(first, other)
    bound = first.abs().max().item()  # A's entries are uniform in +-1/sqrt(in); B is 0
    assert bound == pytest.approx(32**-0.5, rel=0.01)


def test_the_adapter_is_added_with_the_usual_factor():
    model = make_model("llama")
    weights = lora(copy.deepcopy(model))
    layer, plain = weights.model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), plain(x) + ALPHA / 4 * (x @ a.T @ b.T))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_starting_model_is_the_model_as_it_was(dtype):
    """A copy made at the start gives the same KL bit for bit."""
    kl = []
    for copied in (True, False):
        t = trainer(dtype=dtype, kl_coef=0.1, **LORA)
        if copied:
            t.weights.starting_model = partial(nullcontext, copy.deepcopy(t.model))
        kl.append([t.train_step(problems(2, seed=i))["kl"] for i in range(3)])
    assert kl[0] == kl[1] and kl[0][0] == 0 and kl[0][2] > 0


def test_adapters_are_on_again_after_an_error():
    weights = lora(make_model("llama"))
    before = log_probs(weights.model)
    with pytest.raises(ZeroDivisionError), weights.starting_model() as start:
        assert not torch.equal(log_probs(start), before)
        raise ZeroDivisionError
    assert torch.equal(log_probs(weights.model), before)
    assert all(p.requires_grad for p in weights.parameters)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2", "tiny", "tiny-moe"])
def test_a_saved_model_is_plain_and_has_the_adapters_in_it(family, tmp_path):
    """tiny and GPT-2 have tied embeddings; GPT-2 has layers whose weights are the other way round."""
    model = load_model(family, device="cpu")[0] if "tiny" in family else make_model(family)
    before = log_probs(model)
    weights = lora(model)
    base, trained = base_of(weights.model), log_probs(weights.model)
    weights.save_model(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert type(plain) is type(model) and plain.dtype == torch.float32
    assert not hasattr(plain, "peft_config") and "lora" not in " ".join(plain.state_dict())
    torch.testing.assert_close(log_probs(plain), trained, rtol=0, atol=1e-5)
    assert (trained - before).abs().max() > 0.01
    after = base_of(weights.model)
    assert all(torch.equal(base[name], after[name]) for name in base)
    other = lora(type(model).from_pretrained(tmp_path, dtype=torch.float32))
    other.load_checkpoint(tmp_path / "adapter")
    assert all(map(torch.equal, other.parameters, weights.parameters))


def test_a_model_in_bfloat16_is_merged_in_float32_and_rounded_once(tmp_path):
    model = make_model("llama").bfloat16()
    expected = copy.deepcopy(model)
    weights = lora(model, dtype="bfloat16")
    weights.save_model(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    layer = weights.model.model.layers[1].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    exact = expected.model.layers[1].self_attn.q_proj.weight.float() + ALPHA / 4 * b @ a
    assert torch.equal(plain.model.layers[1].self_attn.q_proj.weight, exact.bfloat16())
    assert torch.equal(plain.model.embed_tokens.weight, expected.model.embed_tokens.weight)


def test_a_checkpoint_holds_the_adapters_alone(tmp_path):
    config = Qwen2Config(vocab_size=VOCABULARY, hidden_size=512, intermediate_size=2048, num_hidden_layers=2)
    weights = lora(Qwen2ForCausalLM(config))
    weights.save_checkpoint(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    size = sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix != ".md")
    assert size < 0.05 * 4 * weights.model.num_parameters()
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "it" and (saved["r"], saved["lora_alpha"]) == (4, ALPHA)
    before = [p.detach().clone() for p in weights.parameters]
    with torch.no_grad():
        for parameter in weights.parameters:
            parameter.zero_()
    weights.load_checkpoint(tmp_path)
    assert all(map(torch.equal, before, weights.parameters))
    with pytest.raises(ValueError, match="holds LoRA adapters .* best_model or final_model"):
        load_model(str(tmp_path))


def test_peft_itself_loads_a_checkpoint(tmp_path):
    from peft import PeftModel

    weights = lora(make_model("gpt2"))
    weights.save_checkpoint(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("gpt2"), tmp_path).base_model.model
    torch.testing.assert_close(log_probs(loaded.eval()), log_probs(weights.model))


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    settings = {"lora_rank": 4, "reward_fn": shared_prefix, "eval_frequency": 0, "name": name}
    for folder, epochs in (("whole", [2]), ("continued", [1, 2])):
        for i, num_epochs in enumerate(epochs):
            seed_everything()
            resume = "latest" if i else None
            new_trainer(tmp_path / folder, num_epochs=num_epochs, resume=resume, **settings).train(
                TRAIN, EVAL
            )
    whole, continued = tmp_path / "whole" / "run", tmp_path / "continued" / "run"
    assert record_of(whole)["metrics.jsonl"] == record_of(continued)["metrics.jsonl"]
    assert weights_of_run(whole) == weights_of_run(continued)


def test_adapters_learn_ten_times_as_fast_by_default():
    for num_parameters, expected in ((10**8, 1e-4), (7 * 10**9, 1e-5)):
        adapters = resolve(GSPOConfig(model_name="it", device="cpu", lora_rank=32), num_parameters)
        everything = resolve(GSPOConfig(model_name="it", device="cpu", lora_rank=0), num_parameters)
        assert adapters.learning_rate == pytest.approx(expected)
        assert adapters.learning_rate == pytest.approx(10 * everything.learning_rate)


def test_adapters_are_made_on_a_model_without_memory():
    """As in the plan of a run's memory, which has no values."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2))
    add_adapters(model, rank=4, seed=0, base_model="it")
    parameters = adapter_weights(model).values()
    assert len(parameters) == 2 * 2 * 7 and {p.dtype for p in parameters} == {torch.float32}
    assert all(p.is_meta and p.requires_grad for p in parameters)


def test_a_model_is_given_to_one_trainer_with_adapters():
    model, tokenizer = load_model("tiny", device="cpu")
    config = GSPOConfig(device="cpu", lora_rank=4)
    GSPOTrainer(model, tokenizer, config, shared_prefix)
    for again in (config, GSPOConfig(device="cpu")):
        with pytest.raises(ValueError, match="has LoRA adapters already"):
            GSPOTrainer(model, tokenizer, again, shared_prefix)
