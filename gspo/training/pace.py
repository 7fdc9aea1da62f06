"""Estimate how long a run takes on this machine, from seconds of its work.

Decoding, log-probabilities, an update and the optimizer's step are timed on a model of the same shapes with
random weights: on one of a single layer, and on one of so many that an update takes a second, or of all. The
other layers take as long as these. Every response is taken to be as long as it may be and every group to have
a signal, so that a run is faster than this.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedConfig

from gspo.policy.fewer_layers import num_layers, with_layers
from gspo.policy.log_probs import token_log_probs
from gspo.policy.rollout import MAX_ROWS, Sampling, TransformersEngine
from gspo.training.config import GSPOConfig
from gspo.training.forward_passes import compute_type
from gspo.training.measured_memory import (
    backward,
    longest_rows,
    make_optimizer_state,
    new_weights,
)
from gspo.training.trained_weights import TrainedWeights

# The model that is timed has as many layers, and then as many responses, as make an update take this long.
ENOUGH_SECONDS = 1.0
# The fastest of so many trials counts: others were disturbed.
TRIALS = 3
# Tokens that are decoded to time one.
DECODED_TOKENS = 8


@dataclass(frozen=True)
class Pace:
    """Seconds of a rollout batch by phase, and of an evaluation."""

    sampling: float
    log_probs: float
    updates: float
    evaluation: float

    @property
    def rollout_batch(self) -> float:
        return self.sampling + self.log_probs + self.updates

    def run(self, num_batches: int, eval_frequency: int) -> float:
        """Seconds of so many rollout batches and of the evaluations between them, before and after."""
        evaluations = 2 + (num_batches - 1) // (eval_frequency or num_batches)
        return num_batches * self.rollout_batch + evaluations * self.evaluation


def estimate_pace(
    model_config: PreTrainedConfig,
    config: GSPOConfig,
    loss: Callable[..., Any],
    device: torch.device,
    prompt_tokens: int,
    processes: int = 1,
) -> Pace:
    """The pace of a resolved configuration on this machine, whose processes share the work.

    prompt_tokens: of a prompt, on average.
    """
    assert config.max_new_tokens is not None  # resolve() has decided it
    response_tokens = min(config.max_new_tokens, config.max_length - prompt_tokens)
    config = replace(config, max_length=prompt_tokens + response_tokens, max_new_tokens=response_tokens)
    layers = num_layers(model_config)
    timed, one = 1, _times(with_layers(model_config, 1), config, loss, device)
    many = one
    while timed < layers and many["an update"] < ENOUGH_SECONDS:
        timed = min(4 * timed, layers)
        many = _times(with_layers(model_config, timed), config, loss, device)
    if timed == 1 and layers > 1:
        timed, many = 2, _times(with_layers(model_config, 2), config, loss, device)
    missing = (layers - timed) / max(1, timed - 1)
    whole = {work: seconds + max(0.0, seconds - one[work]) * missing for work, seconds in many.items()}
    group_tokens = prompt_tokens + config.group_size * response_tokens

    def sampling(queries: int, group_size: int) -> float:
        own = -(-queries // processes)
        rounds = -(-own * group_size // _decoded_rows(config))
        prefill = own * prompt_tokens * whole["a token's log-probability"]
        return prefill + rounds * response_tokens * whole["decoding a token"]

    tokens = -(-config.batch_size // processes) * group_tokens
    updates = config.updates_for(config.batch_size)
    of_trainer = config.pi_old == "trainer"  # else there are no passes before the updates
    return Pace(
        sampling=sampling(config.batch_size, config.group_size),
        # The first minibatch needs no pass of its own.
        log_probs=tokens * whole["a token's log-probability"] * (updates - 1) / updates * of_trainer,
        updates=tokens * whole["a token's update"] + updates * whole["a step"],
        evaluation=sampling(config.num_eval_samples, config.eval_samples or config.group_size),
    )


def _decoded_rows(config: GSPOConfig) -> int:
    """Responses that are sampled at a time."""
    return min(config.rollout_rows or MAX_ROWS, config.batch_size * config.group_size)


def _times(
    model_config: PreTrainedConfig, config: GSPOConfig, loss: Callable[..., Any], device: torch.device
) -> dict[str, float]:
    """Seconds of each kind of work."""
    weights = new_weights(model_config, config, device)
    make_optimizer_state(weights)
    prompts, responses = longest_rows(replace(config, mini_batch_size=1), 1)
    some = 1
    while True:
        rows = prompts[:some], responses[:some]
        update = _seconds(partial(backward, weights, config, loss, *rows), device)
        if update > ENOUGH_SECONDS or some == config.group_size:
            break
        some = min(2 * some, config.group_size)

    def log_probs() -> None:
        with torch.no_grad(), compute_type(config, device.type):
            token_log_probs(weights.model, *rows, config.temperature)

    step = _seconds(weights.optimizer.step, device)
    weights.optimizer.zero_grad()
    tokens = len(prompts[0]) + some * len(responses[0])
    return {
        "an update": update,
        "a token's update": update / tokens,
        "a token's log-probability": _seconds(log_probs, device) / tokens,
        "a step": step,
        "decoding a token": _decoding_seconds(weights, config, device),
    }


def _decoding_seconds(weights: TrainedWeights, config: GSPOConfig, device: torch.device) -> float:
    """Seconds of one step of decoding, with as many rows as a rollout batch has."""
    no_end = SimpleNamespace(eos_token_id=None, decode=lambda ids, skip_special_tokens: "")
    engine = TransformersEngine(weights.model, no_end, _decoded_rows(config))  # type: ignore[arg-type]
    engine.end_ids = []
    prompts = [[0]] * max(1, _decoded_rows(config) // config.group_size)

    def sample(tokens: int) -> float:
        with compute_type(config, device.type):
            return _seconds(lambda: engine.generate(prompts, config.group_size, Sampling(tokens)), device)

    return max(0.0, sample(2 + DECODED_TOKENS) - sample(2)) / DECODED_TOKENS


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """How long some work takes; slow work is done once."""
    fastest = math.inf
    for _ in range(TRIALS):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - started)
        if fastest > 2 * ENOUGH_SECONDS:
            break
    return fastest


def in_words(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
