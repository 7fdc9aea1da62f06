"""How long a run takes on a GPU that is not at hand: a roofline of its three kinds of work.

    sampling            a decoding step reads all weights once, for at most ROWS responses
    log-probabilities   2 floating-point operations per weight and token
    updates             6 per weight and token; 8 with gradient checkpointing

Every response is taken to be as long as it may be. Nothing here was measured: the shares of the peaks are
what well-made systems reach, and the result is good to about a factor of two.
"""

from dataclasses import dataclass

from gspo.training.config import GSPOConfig

WEIGHT_BYTES = 2
# Responses that vLLM decodes at a time by default.
ROWS = 256
PROMPT_TOKENS = 100
# Weights in all and those that a token meets, of the models of --preset paper --scale gpu.
WEIGHTS = {
    "Qwen/Qwen2.5-1.5B-Instruct": (1.54e9, 1.54e9),
    "Qwen/Qwen2.5-7B-Instruct": (7.62e9, 7.62e9),
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": (14.3e9, 2.7e9),
}


@dataclass(frozen=True)
class GPU:
    """Peaks of the data sheet, in bfloat16 operations and bytes per second, and the shares one reaches."""

    name: str
    operations: float
    bandwidth: float
    operations_share: float = 0.35
    bandwidth_share: float = 0.6


H100 = GPU("H100 80 GB", 989e12, 3.35e12)


def hours_of_run(config: GSPOConfig, num_problems: int, gpu: GPU = H100) -> float:
    """GPU hours of a run.

    Raises:
        ValueError: the model is none of WEIGHTS.
    """
    from gspo.training.pace import Pace  # here, since it imports torch

    if config.model_name not in WEIGHTS:
        raise ValueError(
            f"--model_name {config.model_name}: without a GPU here, hours are known for {', '.join(WEIGHTS)}"
        )
    weights, active = WEIGHTS[config.model_name]
    response_tokens = config.max_new_tokens or config.max_length - PROMPT_TOKENS
    num_batches, updates = config.count_updates(num_problems)
    operations, bandwidth = gpu.operations * gpu.operations_share, gpu.bandwidth * gpu.bandwidth_share

    def sampling(responses: int) -> float:
        """Seconds."""
        return -(-responses // ROWS) * response_tokens * weights * WEIGHT_BYTES / bandwidth

    responses = config.batch_size * config.group_size
    tokens = config.batch_size * PROMPT_TOKENS + responses * response_tokens
    updates_each = max(1, updates // num_batches)
    scored = 0.0 if config.pi_old == "sampler" else 2 * active * tokens * (updates_each - 1) / updates_each
    trained = (8 if config.gradient_checkpointing else 6) * active * tokens
    pace = Pace(
        sampling=sampling(responses),
        log_probs=scored / operations,
        updates=trained / operations,
        evaluation=sampling(config.num_eval_samples * (config.eval_samples or config.group_size)),
    )
    return pace.run(num_batches, config.eval_frequency) / 3600
