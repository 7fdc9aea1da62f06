"""Decides what a configuration leaves open, from the algorithm, the model's size and the machine."""

from dataclasses import replace

from gspo.training.algorithm import Algorithm
from gspo.training.config import GSPOConfig
from gspo.training.forward_passes import PASS_TOKENS
from gspo.training.hardware import choose_device, choose_dtype

# Models below this many parameters have a default learning rate of their own.
SMALL_MODEL = 0.5e9
# LoRA's adapters learn at ten times the rate of the weights ("LoRA Without Regret").
LORA_RATE_FACTOR = 10


def decide(config: GSPOConfig, algorithm: Algorithm, num_parameters: int) -> GSPOConfig:
    """A copy in which every None is decided.

    Raises:
        ValueError: no GPU and one is asked for, or a clip range that the algorithm does not have.
    """
    device = "cuda" if config.plan_for else choose_device(config.device)
    lora_rank = config.lora_rank or 0
    default_rate = 1e-5 if num_parameters < SMALL_MODEL else 1e-6
    if lora_rank:
        default_rate *= LORA_RATE_FACTOR
    left, right = algorithm.clip_ranges(config)
    return replace(
        config,
        left_clip_range=left,
        right_clip_range=right,
        learning_rate=default_rate if config.learning_rate is None else config.learning_rate,
        max_new_tokens=config.max_new_tokens or config.max_length,
        eval_samples=config.eval_samples or config.group_size,
        device=device,
        dtype=choose_dtype(config, device, num_parameters)[0],
        optimizer="adamw" if config.optimizer == "auto" else config.optimizer,
        lora_rank=lora_rank,
        shard="none" if config.shard == "auto" else config.shard,
        micro_batch_tokens=config.micro_batch_tokens or PASS_TOKENS,
        gradient_checkpointing=bool(config.gradient_checkpointing),
    )
