"""AdamW over bfloat16 weights, with moments in 8 bits: on average it does what AdamW does in float32."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from gspo.policy.log_probs import token_log_probs
from gspo.policy.model_cache import EMBEDDED_NAME, converted_folder
from gspo.policy.model_loader import load_model
from gspo.training import adamw_8bit
from gspo.training.adamw_8bit import (
    CODE_DROPS,
    AdamW8bit,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
    round_to_bfloat16,
)
from gspo.training.config import GSPOConfig
from gspo.training.trained_weights import gradient_norm
from gspo_implementation import resolve
from support.records import record_of, weights_of_run
from support.runs import EVAL, TRAIN, new_trainer, seed_everything
from support.sorting import problems, shared_prefix, trainer, weights_of


def noise_like(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1 << CODE_DROPS, values.shape, dtype=torch.int32, generator=generator)


def parameter(values, gradient):
    made = torch.nn.Parameter(values.clone())
    made.grad = gradient.to(values.dtype)
    return made


def model_on_the_bfloat16_grid():
    """The embedded model, or a random one of its width; its weights are float32 that bfloat16 can hold."""
    if converted_folder().is_dir():
        model, _ = load_model(EMBEDDED_NAME, device="cpu")
    else:
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=8192, hidden_size=576, intermediate_size=1536, num_hidden_layers=12,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        )  # fmt: skip
        model = Qwen2ForCausalLM(config).eval()
    return with_weights(model, lambda p: p.bfloat16().float())


def with_weights(model, change):
    """The model with other weights; its buffers stay, since rotary positions need float32."""
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.data = change(p.data)
    return model


def test_a_step_of_1e_6_moves_the_log_probabilities_as_in_float32():
    """The sequences' log-ratios, under the weights that a forward pass in bfloat16 sees.

    They are computed in float32, since the rounding of bfloat16 activations is as large as the log-ratios.
    Weights rounded to the nearest, which float32 masters have after one step, hardly move.
    """
    model = model_on_the_bfloat16_grid()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1000, 8000, (4, 96), generator=generator).tolist()
    prompts, responses = [row[:8] for row in rows], [row[8:] for row in rows]

    def means(of_model):
        return torch.stack([values.mean() for values in token_log_probs(of_model, prompts, responses)])

    before = means(model)
    gradients = torch.autograd.grad(-before @ torch.tensor([1.0, 1.0, -1.0, -1.0]), list(model.parameters()))

    def step(weight_type, make_optimizer):
        trained = with_weights(model, lambda p: p.to(weight_type))
        for p, gradient in zip(trained.parameters(), gradients, strict=True):
            p.grad = gradient.to(weight_type)
        make_optimizer(trained.parameters()).step()
        trained.zero_grad()
        return trained

    def log_ratios(trained, seen_as):
        with torch.no_grad():
            return means(with_weights(trained, lambda p: p.to(seen_as).float())) - before.detach()

    masters = step(torch.float32, lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.0))
    exact, nearest = (log_ratios(masters, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert exact.abs().min() > 1e-3
    # The mean of three seeds, since the rounding of each adds noise of some percent.
    stochastic = torch.zeros(4)
    for seed in range(3):
        trained = step(torch.bfloat16, lambda p, seed=seed: AdamW8bit(p, lr=1e-6, seed=seed))
        stochastic += log_ratios(trained, torch.bfloat16) / 3
    assert (stochastic - exact).norm() < 0.02 * exact.norm()
    assert nearest.norm() < 0.1 * exact.norm()


def test_updates_are_those_of_adamw_in_float32():
    """Over 200 steps with gradients of widely different sizes, of which half is signal."""
    generator = torch.Generator().manual_seed(0)
    count = 1 << 14
    sizes = 1e-3 * torch.exp(1.5 * torch.randn(count, generator=generator))
    start = (0.1 * torch.randn(count, generator=generator)).bfloat16()
    exact, rounded = torch.nn.Parameter(start.float()), torch.nn.Parameter(start.clone())
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    optimizers = torch.optim.AdamW([exact], **settings), AdamW8bit([rounded], **settings)
    for i in range(200):
        gradient = (sizes * (0.5 + torch.randn(count, generator=generator))).bfloat16()
        exact.grad, rounded.grad = gradient.float(), gradient.clone()
        if i == 180:
            before = exact.detach().clone(), rounded.detach().float()
        for optimizer in optimizers:
            optimizer.step()
    moved, expected = rounded.detach().float() - start.float(), exact.detach() - start.float()
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.99
    assert (moved.norm() / expected.norm()).item() == pytest.approx(1, abs=0.02)
    last, last_expected = rounded.detach().float() - before[1], exact.detach() - before[0]
    assert torch.cosine_similarity(last, last_expected, dim=0) > 0.97
    assert (last.norm() / last_expected.norm()).item() == pytest.approx(1, abs=0.05)


def test_a_second_moment_follows_a_gradient_that_shrinks():
    """Each step changes it by 0.1 %: rounded to the nearest it would stay where it is."""
    values = torch.full((1, 256), 0.9)
    expected = 0.9
    for i in range(1000):
        values = decode_second(*encode_second(0.999 * values, noise_like(values, seed=i)))
        expected *= 0.999
    assert values.mean().item() == pytest.approx(expected, rel=0.05)


def test_rounding_is_right_on_average():
    values = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) * 1e-3
    cases = {
        "weights": (values, lambda v, n: round_to_bfloat16(v, n).float(), 2**-7),
        "first": (values, lambda v, n: decode_first(*encode_first(v, n)), 2**-3),
        "second": (values.square(), lambda v, n: decode_second(*encode_second(v, n)), 2**-3),
    }
    for name, (exact, rounded, step) in cases.items():
        draws = torch.stack([rounded(exact, noise_like(exact, seed=i)) for i in range(400)])
        error = (draws - exact).abs() / exact.abs()
        assert error.max() < step, name
        mean_error = (draws.mean(0) - exact) / exact.abs()
        # Each of the 1024 values: a deviation of half a step at most, averaged over 400 draws.
        assert mean_error.abs().max() < 5 * step / 2 / 400**0.5, name
        assert mean_error.mean().abs() < 5 * step / 2 / (400 * exact.numel()) ** 0.5, name


def test_a_value_is_kept_from_zero_and_from_the_scale_of_its_block():
    """The largest value keeps its size, zeros stay zero, and a tiny second moment never becomes 0."""
    values = torch.zeros(2, 256)
    values[0, :3] = torch.tensor([-1.0, 1e-3, 1e-30])
    noise = noise_like(values)
    first = decode_first(*encode_first(values, noise))
    assert first[0, 0] == -1 and first[0, 1:3].tolist() == [pytest.approx(1e-3, rel=0.13), 0]
    assert not first[1].any() and not first[0, 3:].any()
    second = decode_second(*encode_second(values.square(), noise))
    assert second[0, 0] == 1 and second[0].min() > 0 and not second[1].any()


def test_the_update_does_not_depend_on_chunks_but_for_the_noise(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(2, 10, 100, generator=generator)
    moments = []
    for chunk in (1 << 22, 256):
        monkeypatch.setattr(adamw_8bit, "CHUNK", chunk)
        p = parameter(start.bfloat16(), gradient)
        optimizer = AdamW8bit([p], lr=0.01)
        optimizer.step()
        moments.append(decode_first(optimizer.state[p]["codes_1"], optimizer.state[p]["scales_1"]))
        assert (p.detach().float() - start).abs().max() < 0.05
    for moment in moments:
        torch.testing.assert_close(
            moment.view(-1)[:1000].view(10, 100),
            gradient.bfloat16() * 0.1,
            rtol=0.13,
            atol=1e-5,
            check_dtype=False,
        )


def test_noise_is_independent_between_chunks_and_uses(monkeypatch):
    """Equal values in two chunks do not round alike, nor do weights and moments."""
    monkeypatch.setattr(adamw_8bit, "CHUNK", 256)
    agreements = []
    for seed in range(200):
        p = parameter(torch.full((512,), 1.0).bfloat16(), torch.ones(512))
        AdamW8bit([p], lr=2**-9, seed=seed).step()  # half a step below 1
        first, second = (p.detach().float() < 1).view(2, 256)
        assert 0 < first.float().mean() < 1
        agreements.append((first == second).float().mean().item())
    assert sum(agreements) / 200 == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3)], ids=["float", "tensor"])
def test_a_loaded_state_goes_on_bit_for_bit(lr):
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 3, 700, generator=generator).bfloat16()
    weights = {}
    for stop in (None, 3):
        p = torch.nn.Parameter(gradients[0] * 0.1)
        optimizer = AdamW8bit([p], lr=lr, seed=5)
        for i, gradient in enumerate(gradients):
            if i == stop:
                state = optimizer.state_dict()
                p = torch.nn.Parameter(p.detach().clone())
                optimizer = AdamW8bit([p], lr=0.5, seed=6)
                optimizer.load_state_dict(state)
            p.grad = gradient
            torch.manual_seed(i)  # the global generator does not matter
            optimizer.step()
        weights[stop] = p.detach()
    assert torch.equal(weights[None], weights[3])


def test_the_step_sees_clipped_gradients():
    """A gradient of 100 clipped to 1 leaves the moments that a gradient of 1 leaves."""
    t = trainer(optimizer="adamw_8bit", dtype="auto", max_grad_norm=1e-3, batch_size=2, mini_batch_size=2)
    assert t.train_step(problems(2))["grad_norm"] > 0.1
    moments = [decode_first(s["codes_1"], s["scales_1"]) for s in t.optimizer.state.values()]
    norm = torch.cat([m.flatten() for m in moments]).norm().item()
    assert norm == pytest.approx(0.1 * 1e-3, rel=0.05)


def test_a_step_runs_on_fake_tensors():
    """As in the plan of a run's memory, where there are no values, so no .item() either."""
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.zeros(1000, 300, dtype=torch.bfloat16))
        p.grad = torch.zeros_like(p)
        optimizer = AdamW8bit([p], lr=1e-6, weight_decay=0.1)
        optimizer.step()
        optimizer.step()
    sizes = [s.numel() * s.element_size() for s in optimizer.state[p].values() if isinstance(s, torch.Tensor)]
    assert sum(sizes) < 2.05 * p.numel()


def test_a_resumed_run_in_8_bits_is_the_uninterrupted_one(tmp_path):
    """With a KL term, whose starting model is bfloat16, too."""
    settings = {"optimizer": "adamw_8bit", "dtype": "auto", "reward_fn": shared_prefix}
    for folder, epochs in (("whole", [2]), ("continued", [1, 2])):
        for i, num_epochs in enumerate(epochs):
            seed_everything()
            resume = "latest" if i else None
            t = new_trainer(
                tmp_path / folder, num_epochs=num_epochs, resume=resume, eval_frequency=0, **settings
            )
            assert {p.dtype for p in t.model.parameters()} == {torch.bfloat16}
            t.train(TRAIN, EVAL)
    whole, continued = tmp_path / "whole" / "run", tmp_path / "continued" / "run"
    assert record_of(whole)["metrics.jsonl"] == record_of(continued)["metrics.jsonl"]
    assert weights_of_run(whole) == weights_of_run(continued)


def test_first_updates_have_a_ratio_of_one_and_later_ones_move():
    t = trainer(optimizer="adamw_8bit", dtype="auto", batch_size=4, mini_batch_size=2)
    before = weights_of(t.model)
    step = t.train_step(problems(4))
    assert step["clip_fraction_by_minibatch"][0] == step["null_clip_fraction"] == 0
    assert step["importance_ratio_max"] > 1 and not torch.equal(weights_of(t.model), before)


def test_its_weights_are_in_bfloat16():
    config = resolve(GSPOConfig(model_name="tiny", optimizer="adamw_8bit", device="cpu"), 10**5)
    assert config.dtype == "bfloat16"
    with pytest.raises(ValueError, match="^--optimizer adamw_8bit --dtype float32: .* leave --dtype out$"):
        GSPOConfig(optimizer="adamw_8bit", dtype="float32")
    with pytest.raises(ValueError, match="^--optimizer adamw_8bit --lora_rank 8: .* leave out one"):
        GSPOConfig(optimizer="adamw_8bit", lora_rank=8)


def test_a_run_goes_on_from_a_checkpoint_without_moments(tmp_path):
    """As older checkpoints are."""
    settings = {"optimizer": "adamw_8bit", "dtype": "auto", "reward_fn": shared_prefix, "eval_frequency": 0}
    new_trainer(tmp_path, save_frequency=1, **settings).train(TRAIN, EVAL)
    older = sorted((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)[0]
    t = new_trainer(tmp_path, resume=str(older), **settings)
    assert t.train(TRAIN, EVAL)["finished"]


def test_the_norm_of_bfloat16_gradients_is_a_float32():
    parameter = torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    parameter.grad = torch.full((1000,), 0.03125, dtype=torch.bfloat16)
    assert gradient_norm([parameter]).item() == pytest.approx(0.03125 * 1000**0.5, rel=1e-6)
