"""Measure the memory of training a model from its configuration alone, on tensors without memory.

The model is made on tensors that have shapes and nothing else (FakeTensorMode). On them run an update, as the
trainer makes it (forward pass over the packed row, loss, backward, clipping, optimizer step), and the first
steps of sampling, while LivingMemory counts what is alive. The same functions run on real tensors, where
their time is measured (pace.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations import moe

from gspo.policy.fewer_layers import decoder_layers, has_equal_layers, num_layers, with_layers
from gspo.policy.log_probs import logit_tokens, micro_batches, token_log_probs
from gspo.policy.model_loader import count_parameters
from gspo.policy.planned_device import planned_device
from gspo.policy.prompt_cache import decode, prefill
from gspo.policy.rollout import MAX_ROWS, draw_tokens, evaluation_mode
from gspo.policy.sharded_model import call
from gspo.policy.vllm_process import server_bytes
from gspo.training.config import GSPOConfig
from gspo.training.forward_passes import compute_type, sampling_type
from gspo.training.hardware import Machine
from gspo.training.living_memory import LivingMemory
from gspo.training.loss_metrics import unread_metrics
from gspo.training.sharded_memory import UnitSizes, sharded_parts, with_masters
from gspo.training.trained_weights import TrainedWeights, gradient_norm, trained_weights

# The CUDA context with the libraries' workspaces: 0.5 to 1 GB, depending on the GPU.
CONTEXT_BYTES = 1e9
# Of a model with more layers, all alike, these numbers of them are measured.
MEASURED_LAYERS = 2, 3
# The most values of a parameter whose optimizer step is measured.
STEPPED_VALUES = 1 << 25


@dataclass(frozen=True)
class Memory:
    """Bytes by part, at the peak of an update and at the peak of sampling."""

    update: dict[str, float]
    sampling: dict[str, float]

    @property
    def largest(self) -> dict[str, float]:
        return max(self.update, self.sampling, key=lambda parts: sum(parts.values()))

    @property
    def peak(self) -> float:
        return sum(self.largest.values())


def measure_update(
    model_config: PreTrainedConfig, config: GSPOConfig, loss: Callable[..., Any], machine: Machine
) -> dict[str, float]:
    """Bytes by part at the peak of an update, with a configuration in which everything is decided.

    Args:
        loss: a function like gspo_implementation.gspo_loss.
    """
    passes = (
        "update", config.gradient_checkpointing, config.micro_batch_tokens, config.mini_batch_size,
        config.algorithm, machine.processes,
    )  # fmt: skip

    def work(weights: TrainedWeights) -> dict[str, list[torch.Tensor]]:
        update(weights, config, loss, machine.processes)
        return {"gradients": [p.grad for p in weights.parameters if p.grad is not None]}

    return _measured(model_config, config, machine, passes, work, trains=True)


def measure_sampling(
    model_config: PreTrainedConfig, config: GSPOConfig, machine: Machine
) -> dict[str, float]:
    """Bytes by part at the peak of sampling."""

    def work(weights: TrainedWeights) -> dict[str, list[torch.Tensor]]:
        return {"cache": sample(weights, config)}

    return _measured(model_config, config, machine, ("sampling", config.rollout_rows), work, trains=False)


def memory_while_serving(
    update: dict[str, float], model_config: PreTrainedConfig, config: GSPOConfig
) -> dict[str, float]:
    """Bytes by part while vLLM samples: what the trainer keeps, and a server of the run's own beside it.

    update: those of an update.
    """
    parts: dict[str, float] = {name: update[name] for name in ("weights", "optimizer") if name in update}
    if not config.vllm_urls:
        parameters = count_parameters(model_config, config.trust_remote_code)
        parts["vLLM server"] = server_bytes(parameters, str(config.dtype))
    return parts


def _measured(
    model_config: PreTrainedConfig,
    config: GSPOConfig,
    machine: Machine,
    of_work: tuple,
    work: Callable[[TrainedWeights], dict[str, list[torch.Tensor]]],
    trains: bool,
) -> dict[str, float]:
    """Bytes by part at the peak of some work; what was measured in this process is not measured again.

    of_work: the settings that the work depends on. work: returns tensors that are parts of their own.
    trains: it is an update.
    """
    shards = machine.shards_with(config.shard)
    # Shards keep no copies of gathered weights, in which autocast would keep those of float32 weights.
    measured = config
    if shards > 1 and config.method == "adamw" and config.dtype == "bfloat16":
        measured = replace(config, optimizer="adamw_8bit")
    vocabulary = model_config.get_text_config(decoder=True).vocab_size
    # The one thing by which a GPU's size changes a pass.
    chunk = logit_tokens(vocabulary, machine.total_bytes) if config.device == "cuda" else None
    key = (
        model_config.to_json_string(use_diff=False), measured.optimizer, config.lora_rank, config.dtype,
        config.device, config.max_length, config.max_new_tokens, config.group_size, chunk, of_work,
    )  # fmt: skip
    if key not in _MEASURED:
        with planned_device(str(config.device), machine.total_bytes):
            _MEASURED[key] = _sections(model_config, measured, work)
    sections: list[dict[str, float]] = _MEASURED[key]
    if shards > 1:
        sizes = UnitSizes.of(model_config, config.trust_remote_code)
        if measured is not config:
            sections = [with_masters(section, sizes) for section in sections]
        sections = [
            moment for section in sections for moment in sharded_parts(section, sizes, config, shards, trains)
        ]
    totals = [sum(section.values()) for section in sections]
    parts = dict(sections[totals.index(max(totals))])
    if config.device == "cuda":
        parts["CUDA context"] = CONTEXT_BYTES
    # LoRA switches its adapters off instead. This is not measured: torch cannot copy a model without memory.
    if config.kl_coef and config.method != "lora":
        parts["starting model"] = parts["weights"]
    return parts


_MEASURED: dict[tuple, list[dict[str, float]]] = {}  # sections


def _sections(
    model_config: PreTrainedConfig, config: GSPOConfig, work: Callable[[TrainedWeights], dict[str, list]]
) -> list[dict[str, float]]:
    """Bytes by part at the peak of each section of some work.

    They are linear in the number of layers if these are alike, so that a few layers are enough. A peak over
    several sections would not be: with few layers it is where the logits are, with many where all gradients
    are.
    """
    layers, (few, more) = num_layers(model_config), MEASURED_LAYERS
    if layers <= more or not has_equal_layers(model_config, more, config.trust_remote_code):
        return _measured_sections(model_config, config, work)
    of_few, of_more = (_measured_sections(with_layers(model_config, n), config, work) for n in (few, more))
    sections = []
    for first, second in zip(of_few, of_more, strict=True):
        section = {}
        for part in first | second:
            per_layer = (second.get(part, 0) - first.get(part, 0)) / (more - few)
            section[part] = second.get(part, 0) + (layers - more) * per_layer
        sections.append(section)
    return sections


def _measured_sections(
    model_config: PreTrainedConfig, config: GSPOConfig, work: Callable[[TrainedWeights], dict[str, list]]
) -> list[dict[str, float]]:
    """_sections() of a model, all of whose layers are measured."""
    vocabulary = model_config.get_text_config(decoder=True).vocab_size
    with FakeTensorMode(), _on_fake_tensors(), LivingMemory(vocabulary) as memory:
        with memory.counting_as("weights"):
            weights = new_weights(model_config, config, torch.device("cpu"))
        make_optimizer_state(weights)
        _start_sections(weights, memory)
        memory.forget_peaks()
        with memory.counting_as("activations"):
            tensors = work(weights)
        return memory.parts(optimizer=_moments(weights), **tensors)


def _start_sections(weights: TrainedWeights, memory: LivingMemory) -> None:
    """Make the work start a section of memory wherever its peak changes by another amount per layer.

    That is before the first layer's forward pass, at the end of the output layer's backward pass, before the
    first layer's backward pass, and before the optimizer's step.
    """
    layers = decoder_layers(weights.model)
    if layers is None:
        return

    def start(*_: Any) -> None:
        memory.start_section()

    def start_at_gradient(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(start)

    layers[0].register_forward_pre_hook(start)
    layers[0].register_forward_hook(start_at_gradient)
    layers[-1].register_forward_hook(start_at_gradient)
    weights.optimizer.register_step_pre_hook(start)


@contextmanager
def _on_fake_tensors() -> Iterator[None]:
    """Inside, what torch and transformers cannot do on tensors without memory is done in another way.

    Modules convert their parameters by replacing them: torch would swap the contents of the old and the new
    one, which FakeTensorMode's references forbid. Experts are multiplied by transformers' fallback, which has
    the same shapes: torch's grouped product takes bfloat16 alone.
    """

    def apply(module: nn.Module, convert: Callable, recurse: bool = True) -> nn.Module:
        converted: dict[nn.Parameter, nn.Parameter] = {}  # shared parameters stay shared
        for part in module.modules() if recurse else [module]:
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    if parameter not in converted:
                        converted[parameter] = nn.Parameter(convert(parameter.data), parameter.requires_grad)
                    part._parameters[name] = converted[parameter]
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = convert(buffer)
        return module

    usual = nn.Module._apply, getattr(moe, "_can_use_grouped_mm", None)  # not in every transformers
    nn.Module._apply = apply  # type: ignore[assignment, method-assign]
    moe._can_use_grouped_mm = lambda *_, **__: False
    try:
        yield
    finally:
        nn.Module._apply, moe._can_use_grouped_mm = usual  # type: ignore[method-assign]


def _moments(weights: TrainedWeights) -> list[torch.Tensor]:
    """The optimizer's tensors."""
    states = weights.optimizer.state.values()
    return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]


def new_weights(model_config: PreTrainedConfig, config: GSPOConfig, device: torch.device) -> TrainedWeights:
    """A model of random weights, prepared for training as a run prepares its model."""
    masters = config.method == "adamw" or config.dtype == "float32"
    dtype = torch.float32 if masters else torch.bfloat16
    model = AutoModelForCausalLM.from_config(
        model_config, dtype=dtype, trust_remote_code=config.trust_remote_code
    )
    return trained_weights(model, replace(config, learning_rate=1e-6, kl_coef=0.0), device)


def make_optimizer_state(weights: TrainedWeights) -> None:
    """Make a step on gradients of 0 if the optimizer has no moments before its first step."""
    if weights.optimizer.state:
        return
    for parameter in weights.parameters:
        parameter.grad = torch.zeros_like(parameter)
    weights.optimizer.step()
    weights.optimizer.zero_grad()


def longest_rows(config: GSPOConfig, processes: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses of an optimizer update, as long as the configuration lets them be."""
    longest = min(config.max_new_tokens or config.max_length, config.max_length - 1)
    rows = -(-config.mini_batch_size // processes) * config.group_size  # whole groups
    prompts = [[row // config.group_size] * (config.max_length - longest) for row in range(rows)]
    return prompts, [[0] * longest for _ in range(rows)]


def update(weights: TrainedWeights, config: GSPOConfig, loss: Callable[..., Any], processes: int = 1) -> None:
    """An optimizer update, as GSPOTrainer makes it; its gradients stay.

    It makes as many passes as it takes to reach the peak: with two, the second one finds gradients there.
    """
    prompts, responses = longest_rows(config, processes)
    assert config.micro_batch_tokens is not None
    for rows in micro_batches(weights.model, prompts, responses, config.micro_batch_tokens)[:2]:
        backward(weights, config, loss, [prompts[row] for row in rows], [responses[row] for row in rows])
    norm = gradient_norm(weights.parameters)
    torch.nn.utils.clip_grads_with_norm_(weights.parameters, config.max_grad_norm, norm)
    step_of_one(weights)


def step_of_one(weights: TrainedWeights) -> None:
    """An optimizer step of one parameter, which needs as much memory as that of all, one after the other.

    It is the largest of at most STEPPED_VALUES: on larger ones the optimizers work in parts.
    """
    gradients = [parameter.grad for parameter in weights.parameters]
    small = [p for p in weights.parameters if p.numel() <= STEPPED_VALUES] or weights.parameters
    chosen = max(small, key=torch.numel)
    for parameter in weights.parameters:
        if parameter is not chosen:
            parameter.grad = None
    weights.optimizer.step()
    for parameter, gradient in zip(weights.parameters, gradients, strict=True):
        parameter.grad = gradient


def backward(
    weights: TrainedWeights,
    config: GSPOConfig,
    loss: Callable[..., Any],
    prompts: list[list[int]],
    responses: list[list[int]],
) -> None:
    """A forward and a backward pass over these rows."""
    with compute_type(config, weights.parameters[0].device.type):
        log_probs = call(weights.model, token_log_probs, prompts, responses, config.temperature)
    values = pad_sequence(log_probs, batch_first=True)  # (B, T)
    mask = torch.ones_like(values, dtype=torch.bool)
    advantages = torch.ones_like(values[:, 0])
    with unread_metrics():
        objective, _ = loss(values, values.detach(), advantages, mask, denominator=len(prompts))
    objective.backward()


def sample(weights: TrainedWeights, config: GSPOConfig) -> list[torch.Tensor]:
    """The first tokens of responses to prompts that are as long as may be. Returns the cache's tensors."""
    model, group_size = weights.model, config.group_size
    prompt = [0] * (config.max_length - 1)
    num_prompts = -(-(config.rollout_rows or MAX_ROWS) // group_size)
    device_type = weights.parameters[0].device.type
    with evaluation_mode(model), torch.no_grad(), sampling_type(config, device_type):
        logits, cache, mask = prefill(model, [prompt] * num_prompts, group_size, max_new_tokens=1)
        uniform = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)  # (B,)
        token, _ = draw_tokens(logits, config.temperature, uniform)
        position = torch.full_like(token, len(prompt))
        draw_tokens(decode(model, cache, mask, token, position), config.temperature, uniform)
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
