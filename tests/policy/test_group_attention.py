"""The kernels of packed attention: which one is chosen, and its values and gradients."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gspo.checks import float64_reference as reference
from gspo.policy import group_attention
from gspo.policy.gradient_checkpointing import enable_gradient_checkpointing
from gspo.policy.group_attention import can_pack, choose_kernel
from gspo.policy.log_probs import token_log_probs
from gspo.policy.packed_rows import PackedGroups
from gspo.policy.padded_attention import FlashKernel, PlainKernel
from gspo.policy.planned_device import planned_device
from gspo.policy.varlen_attention import VarlenKernel
from support.flash_attention import flash_attention_on_cpu
from support.models import make_model

# (prompt tokens, tokens of each response); responses without a token, and a group of no others
LENGTHS = [(12, (0, 1, 13)), (3, (9, 4)), (7, (0,)), (1, (1, 1))]
HEADS, KV_HEADS, WIDTH = 4, 2, 16
# prompts and responses of models
ROWS = {
    "groups": (
        [[5, 6, 7, 8, 9, 10, 11]] * 3 + [[12, 13]] * 2,
        [[14, 15, 16], [], [17] * 9, [18, 19, 20, 21], [22]],
    ),
    "ragged_rows": ([[5], [6, 7, 8, 9], [10, 11]], [[12] * 12, [13], [14, 15]]),
}
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def packed_groups(device="cpu", lengths=LENGTHS):
    groups = [([5] * prompt, [[6] * response for response in responses]) for prompt, responses in lengths]
    return PackedGroups(groups, torch.device(device))


def packed_states(dtype, device="cpu", lengths=LENGTHS):
    """Return random queries, keys, values and the gradient of the output: (N, heads or KV_HEADS, WIDTH)."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(prompt + sum(responses) for prompt, responses in lengths)
    shapes = [(num_tokens, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def value_and_gradients(attend, query, key, value, grad_output):
    states = [s.detach().clone().requires_grad_() for s in (query, key, value)]
    output = attend(*states)
    return [output.detach(), *torch.autograd.grad(output, states, grad_output)]


def naive_attention(query, key, value, lengths=LENGTHS, window=None, softcap=None):
    """Attend in float64, one query at a time over the keys that it may see."""
    query, key, value = (s.cpu().double() for s in (query, key, value))
    key, value = (s.repeat_interleave(HEADS // KV_HEADS, 1) for s in (key, value))
    output = []
    for prompt, responses in lengths:
        start = len(output)
        rows = [(list(range(start, start + prompt)), prompt)]
        for response in responses:
            first = start + prompt + sum(len(row) - prompt for row, _ in rows[1:])
            rows.append(([*range(start, start + prompt), *range(first, first + response)], response))
        for row, own in rows:
            for i in range(len(row) - own, len(row)):
                seen = row[max(0, i + 1 - (window or i + 1)) : i + 1]
                scores = torch.einsum("hd,jhd->hj", query[row[i]], key[seen]) / WIDTH**0.5
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                output.append(torch.einsum("hj,jhd->hd", scores.softmax(-1), value[seen]))
    return torch.stack(output)


def exact(states, **settings):
    grad_output = states[3].cpu().double()
    states = [s.cpu().double() for s in states[:3]]
    return value_and_gradients(lambda *qkv: naive_attention(*qkv, **settings), *states, grad_output)


@pytest.mark.parametrize("lengths", [LENGTHS, [(2, (1,))], [(4, (0, 0))]])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_the_gpu_kernel_equals_a_float64_loop(window, lengths):
    groups, states = packed_groups(lengths=lengths), packed_states(torch.float64, lengths=lengths)
    kernel = VarlenKernel(WIDTH**-0.5, window)
    with flash_attention_on_cpu():
        found = value_and_gradients(lambda *qkv: kernel.attend(*qkv, groups), *states)
    for ours, theirs in zip(found, exact(states, lengths=lengths, window=window), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # the log-sums are float32


@pytest.mark.parametrize("rows", ["groups", "ragged_rows"])
def test_models_with_the_gpu_kernel_equal_single_rows(any_model, rows, monkeypatch):
    prompts, responses = ROWS[rows]
    # The real kernel takes half types only; in float32 the comparison is sharp.
    monkeypatch.setattr(group_attention, "fits_varlen", lambda _dtype, softcap, *_widths: softcap is None)
    with flash_attention_on_cpu() as calls, planned_device("cuda", 80e9):
        log_probs = torch.cat(token_log_probs(any_model, prompts, responses, 0.7))
        found = gradient_of(any_model, log_probs)
    kinds = any_model.config.model_type
    assert bool(calls) == (kinds not in ("gemma2", "gpt_oss")), "a soft cap and sinks have no such kernel"
    slow = [
        reference.token_log_probs(any_model, p, r, 0.7) for p, r in zip(prompts, responses, strict=True) if r
    ]
    slow = torch.cat(slow)
    torch.testing.assert_close(log_probs.double(), slow.double(), rtol=1e-5, atol=1e-5)
    expected = gradient_of(any_model, slow)
    assert (found - expected).norm() / expected.norm() < 1e-5


def gradient_of(model, log_probs):
    model.zero_grad()
    (log_probs * torch.linspace(-1, 1, len(log_probs), device=log_probs.device)).sum().backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("device", "dtype", "window", "softcap", "widths", "kernel"),
    [
        ("cpu", torch.bfloat16, None, None, (64, 64), FlashKernel),
        ("cpu", torch.float32, 5, None, (64, 64), PlainKernel),
        ("cpu", torch.float32, None, None, (64, 32), PlainKernel),
        ("cuda", torch.bfloat16, None, None, (128, 128), VarlenKernel),
        ("cuda", torch.float16, 5, None, (256, 256), VarlenKernel),
        ("cuda", torch.bfloat16, None, 50.0, (128, 128), PlainKernel),
        ("cuda", torch.float32, None, None, (128, 128), PlainKernel),
        ("cuda", torch.bfloat16, None, None, (192, 128), PlainKernel),
        ("cuda", torch.bfloat16, None, None, (20, 20), PlainKernel),
        ("cuda", torch.bfloat16, None, None, (512, 512), PlainKernel),
    ],
)
def test_the_kernel_follows_from_the_device_and_the_layer(device, dtype, window, softcap, widths, kernel):
    with planned_device(device, 80e9):
        chosen = choose_kernel(torch.device("cpu"), dtype, 0.1, window, softcap, *widths)
    assert type(chosen) is kernel


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2"])
def test_fake_tensors_go_through_the_packed_pass(family, device, checkpointing, monkeypatch):
    used = []
    choose = group_attention.choose_kernel
    monkeypatch.setattr(group_attention, "choose_kernel", lambda *a: used.append(choose(*a)) or used[-1])
    with FakeTensorMode(), planned_device(device, 80e9):
        model = make_model(family)
        if checkpointing:
            enable_gradient_checkpointing(model)
        assert can_pack(model)
        with torch.autocast("cpu", torch.bfloat16):
            log_probs = token_log_probs(model, *ROWS["groups"])
        torch.cat(log_probs).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert [len(x) for x in log_probs] == [len(r) for r in ROWS["groups"][1]]
    expected = {
        ("cpu", "qwen3"): {FlashKernel}, ("cpu", "mistral"): {PlainKernel}, ("cpu", "gemma2"): {PlainKernel},
        ("cuda", "qwen3"): {VarlenKernel}, ("cuda", "mistral"): {VarlenKernel},
        ("cuda", "gemma2"): {PlainKernel},
    }  # fmt: skip
    assert set(map(type, used)) == expected[device, family]
    assert len(used) == 2 * (1 + checkpointing), "layers, and each once more where it is recomputed"


@on_cuda
@pytest.mark.parametrize("window", [None, 5])
def test_the_gpu_kernel_on_a_gpu(window):
    lengths = [(300, (0, 1, 257, 130)), (3, (9, 4)), (7, (0,)), (1, (1, 1))]
    groups, states = packed_groups("cuda", lengths), packed_states(torch.bfloat16, "cuda", lengths)
    kernel = choose_kernel(torch.device("cuda"), torch.bfloat16, WIDTH**-0.5, window, None, WIDTH, WIDTH)
    assert isinstance(kernel, VarlenKernel), "the GPU's compute capability is below 8.0"
    found = value_and_gradients(lambda *qkv: kernel.attend(*qkv, groups), *states)
    for ours, theirs in zip(found, exact(states, lengths=lengths, window=window), strict=True):
        error = (ours.cpu().double() - theirs).norm() / theirs.norm()
        assert error < 1e-2, "bfloat16 has 8 bits"


@on_cuda
def test_a_model_on_a_gpu_equals_single_rows_and_itself_without_gradients():
    model = make_model("llama").cuda()
    with torch.autocast("cuda", torch.bfloat16):
        with torch.no_grad():
            first = torch.cat(token_log_probs(model, *ROWS["groups"]))
        log_probs = torch.cat(token_log_probs(model, *ROWS["groups"]))
    assert torch.equal(first, log_probs)
    found = gradient_of(model, log_probs)
    with torch.autocast("cuda", enabled=False):
        plain = torch.cat(token_log_probs(model, *ROWS["groups"]))
    expected = gradient_of(model, plain)
    assert (log_probs - plain).abs().mean() < 0.02
    assert (found - expected).norm() / expected.norm() < 0.05
