"""Routing Replay: the experts that were recorded are used, weighed as the present router weighs them."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gspo.policy.expert_routing import Routing, UnknownRouting, expert_layers, refuse_dense
from gspo.policy.gradient_checkpointing import enable_gradient_checkpointing
from gspo.policy.log_probs import token_log_probs
from gspo.policy.tiny_models import new_tiny_model, tiny_config
from support.models import COMMON, make_model

PROMPTS = [[5, 6, 7, 8], [5, 6, 7, 8], [9], [10, 11, 12], [4, 3]]
RESPONSES = [[13, 14, 15], [16, 17], [16, 17, 18, 19], [20], []]
EXPERTS = {
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
# What they have besides COMMON and EXPERTS, if they know it.
MIXTURES = {
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},  # a shared expert
    "mixtral": {},
    "olmoe": {},
    "gpt_oss": {"sliding_window": 5},  # padded rows; a softmax over the chosen experts alone
    # A bias that only the choice has, and a first choice among groups of experts.
    "deepseek_v3": {
        **LATENT, "num_key_value_heads": 4, "first_k_dense_replace": 0, "n_group": 4, "topk_group": 2,
    },
}  # fmt: skip


def make_mixture(model_type, **more):
    """A random mixture of experts whose choices are far from one another."""
    torch.manual_seed(0)
    known = AutoConfig.for_model(model_type).to_dict()
    settings = {name: value for name, value in (COMMON | EXPERTS).items() if name in known}
    config = AutoConfig.for_model(model_type, **settings | MIXTURES.get(model_type, {}) | more)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
        for name, buffer in model.named_buffers():
            if "bias" in name:
                buffer.normal_()
    return model


def move(model, by=0.05):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return model


def routed(model, given=None, prompts=PROMPTS, responses=RESPONSES, **settings):
    """Log-probabilities of all tokens, and the routing."""
    routing = Routing(expert_layers(model), given or [None] * len(prompts), **settings)
    return torch.cat(token_log_probs(model, prompts, responses, 1.0, routing)), routing


def record(model):
    with torch.no_grad():
        return routed(model, records=True)[1].recorded


def gradient_of(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def watch_experts(model):
    """A list to which each call of a layer's experts adds (layer, experts of each token)."""
    calls = []
    for number, layer in enumerate(expert_layers(model)):
        layer.experts.register_forward_pre_hook(
            lambda _m, inputs, number=number: calls.append((number, inputs[1].clone()))
        )
    return calls


@pytest.fixture(scope="module", params=MIXTURES)
def recorded(request):
    """A mixture of experts that has been trained on, and the experts that it chose before."""
    model = make_mixture(request.param)
    experts = record(model)
    return move(model), experts


def test_watching_changes_no_bit(recorded):
    model, experts = recorded
    plain = torch.cat(token_log_probs(model, PROMPTS, RESPONSES))
    for settings in ({"records": True}, {"given": experts}, {"given": experts, "records": True}):
        assert torch.equal(routed(model, **settings)[0], plain)
    assert torch.equal(routed(model, record(model), replays=True)[0], plain)


def test_the_experts_of_every_token_are_recorded(recorded):
    """Row by row, without packing: the tokens then stand in their order."""
    model, _ = recorded
    calls = watch_experts(model)
    together = record(model)
    for prompt, response, of_row in zip(PROMPTS, RESPONSES, together, strict=True):
        if not response:
            assert of_row is None
            continue
        calls.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([[*prompt, *response[:-1]]]))
        expected = torch.stack([chosen for _, chosen in calls], 1)  # (|x| + |y| - 1, L, k)
        assert of_row[0].shape == (len(prompt), 2, 2) and of_row[0].dtype == torch.uint8
        found = torch.cat(of_row)
        assert torch.equal(found.long().sort(-1)[0], expected.sort(-1)[0])
    assert together[0][0] is together[1][0] or model.config.model_type == "gpt_oss"  # padded rows share none


def test_recorded_experts_are_used_and_counted(recorded):
    model, experts = recorded
    calls = watch_experts(model)
    replayed, routing = routed(model, experts, replays=True)
    free, compared = routed(model, experts)
    assert not torch.allclose(free, replayed)
    changed = 0
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        if not response:
            continue
        calls.clear()
        routed(model, [experts[i]], [prompt], [response], replays=True)
        # Padded rows have the last token too, for which nothing is given.
        used = torch.stack([chosen for _, chosen in calls], 1)[: len(prompt) + len(response) - 1]
        assert torch.equal(used, torch.cat(experts[i]).long())
        calls.clear()
        routed(model, None, [prompt], [response], records=True)
        free = torch.stack([chosen for _, chosen in calls], 1)
        for position in range(len(prompt) - 1, len(prompt) + len(response) - 1):
            for layer in range(2):
                before = set(torch.cat(experts[i])[position, layer].tolist())
                changed += len(before - set(free[position, layer].tolist()))
    tokens = sum(map(len, RESPONSES))
    assert compared.choices == routing.choices == tokens * 2 * 2
    assert 0 < compared.changed == changed
    assert routing.changed > 0, "what the routers would choose"


def test_recomputed_layers_have_the_same_experts(recorded):
    model, experts = recorded
    weights = torch.linspace(-1, 1, sum(map(len, RESPONSES)))
    plain, _ = routed(model, experts, replays=True)
    expected = gradient_of(model, (weights * plain).sum())
    recomputed = deepcopy(model)
    enable_gradient_checkpointing(recomputed)
    calls = watch_experts(recomputed)
    log_probs, _ = routed(recomputed, experts, replays=True)
    routed(recomputed, records=True)[0].detach()  # a pass in between, with experts of its own
    forward, calls[:] = calls[:2], []
    found = gradient_of(recomputed, (weights * log_probs).sum())
    assert torch.equal(log_probs, plain)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    again = dict(calls)
    assert len(calls) == 2 and all(torch.equal(again[layer], chosen) for layer, chosen in forward)


def test_the_number_of_forward_passes_does_not_matter(recorded, monkeypatch):
    model, experts = recorded
    whole, routing = routed(model, experts, replays=True, records=True)
    monkeypatch.setattr("gspo.policy.log_probs.MAX_FORWARD_TOKENS", 1)
    single, of_single = routed(model, experts, replays=True, records=True)
    torch.testing.assert_close(single, whole, rtol=1e-5, atol=1e-5)
    assert (of_single.changed, of_single.choices) == (routing.changed, routing.choices)
    for one, other in zip(of_single.recorded, routing.recorded, strict=True):
        assert (one is other is None) or all(map(torch.equal, one, other))


def plain_mixture(layer, experts):
    """A layer's forward pass in a loop over tokens, with these experts (N, k) of each."""

    def forward(hidden_states):
        outputs = []
        for hidden, chosen in zip(hidden_states[0], experts.tolist(), strict=True):
            scores = (layer.gate.weight @ hidden).exp()
            gates = scores[chosen] / scores[chosen].sum()  # the softmax's denominator cancels
            output = torch.zeros_like(hidden)
            for gate, expert in zip(gates, chosen, strict=True):
                first, second = (layer.experts.gate_up_proj[expert] @ hidden).chunk(2)
                output = output + gate * (
                    layer.experts.down_proj[expert] @ (torch.sigmoid(first) * first * second)
                )
            outputs.append(output)
        return torch.stack(outputs)[None]

    return forward


def test_gate_weights_and_gradients_are_those_of_a_float64_loop():
    torch.manual_seed(0)
    model = new_tiny_model("tiny-moe").eval()
    experts = record(move(model, 0.2))
    move(model, 0.05)
    log_probs, routing = routed(model, experts, replays=True)
    assert routing.changed > 0
    weights = torch.linspace(-1, 1, len(log_probs), dtype=torch.float64)
    found = gradient_of(model, (weights * log_probs).sum())
    exact = deepcopy(model).double()
    rows = []
    for prompt, response, of_row in zip(PROMPTS, RESPONSES, experts, strict=True):
        if not response:
            continue
        given = torch.cat(of_row)  # (|x| + |y| - 1, L, k)
        for number, layer in enumerate(exact.model.layers):
            layer.mlp.forward = plain_mixture(layer.mlp, given[:, number])
        logits = exact(input_ids=torch.tensor([[*prompt, *response[:-1]]])).logits[0, len(prompt) - 1 :]
        rows.append(logits.log_softmax(-1)[range(len(response)), response])
    torch.testing.assert_close(log_probs.double(), torch.cat(rows), rtol=1e-5, atol=1e-5)
    expected = gradient_of(exact, (weights * torch.cat(rows)).sum())
    assert (found - expected).norm() / expected.norm() < 1e-5
    for layer, slow in zip(model.model.layers, exact.model.layers, strict=True):
        router, reference = layer.mlp.gate.weight.grad.double(), slow.mlp.gate.weight.grad
        assert (router - reference).norm() / reference.norm() < 1e-5 and reference.norm() > 0


def test_rows_without_given_experts_choose_their_own():
    model = move(make_mixture("qwen3_moe"), 0.0)
    experts = record(model)
    move(model)
    mixed = [None, None, experts[2], None, None]
    log_probs, routing = routed(model, mixed, replays=True)
    first, third = slice(0, 5), slice(5, 9)
    assert routing.choices == 4 * 2 * 2
    torch.testing.assert_close(log_probs[first], routed(model)[0][first])
    torch.testing.assert_close(log_probs[third], routed(model, experts, replays=True)[0][third])


@pytest.mark.parametrize(
    ("model_type", "more"), [("phimoe", {}), ("jetmoe", {"kv_channels": 8, "num_key_value_heads": 2})]
)
def test_a_mixture_that_chooses_in_another_way_is_refused(model_type, more):
    """Phi's router samples, and JetMoE's experts are not called with a choice."""
    model = make_mixture(model_type, **more)
    refuse_dense(model.config)
    with pytest.raises(UnknownRouting, match="not called with what"):
        record(model)
    token_log_probs(model, PROMPTS, RESPONSES)  # works as before


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma3"])
def test_a_dense_model_has_nothing_to_replay(family):
    model = make_model(family)
    assert expert_layers(model) == []
    with pytest.raises(ValueError, match="^--routing_replay is for mixtures of experts, and .* is none: "):
        refuse_dense(model.config)
    refuse_dense(tiny_config("tiny-moe"))


def test_more_experts_than_a_byte_holds():
    model = make_mixture("qwen3_moe", num_experts=300, num_local_experts=300)
    experts = record(model)
    assert experts[0][0].dtype == torch.int16
    assert max(torch.cat(row).max() for row in experts if row) > 255
    assert torch.equal(routed(model, experts, replays=True)[0], routed(model)[0])
