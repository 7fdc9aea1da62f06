"""How far importance ratios move without any update, when the sampler computes in bfloat16.

The weights are the same on both sides, so a ratio other than 1 is rounding alone.
"""

from collections.abc import Sequence
from copy import deepcopy
from statistics import fmean, pstdev

import torch

from data_loader import load_problems
from gspo.policy.log_probs import token_log_probs
from gspo.policy.model_loader import load_model
from gspo.policy.rollout import Sampling, TransformersEngine, encode_prompt
from gspo.training.config import GSPOConfig
from gspo_implementation import ALGORITHMS

PROBLEMS, SAMPLES = 128, 4
# The first lengths of the rows of the table, in response tokens.
LENGTHS = (1, 10, 15, 20)


def measure_precision(config: GSPOConfig) -> dict:
    """Log-probabilities of sampled responses, in float32 against a copy of the model in bfloat16.

    config: names the model, the data set and the most tokens of a response.

    Returns:
        token_std, sequence_std: standard deviation of the log-ratio of a token, and of its mean over a
        response, in nats. by_length: for each range of lengths, the number of responses, sequence_std, and
        the share of tokens outside of the paper's clip range, "gspo" by their response's ratio and "grpo" by
        their own.
    """
    model, tokenizer = load_model(config.model_name, dtype="float32", device="cpu")
    problems = load_problems(config.dataset, "train", PROBLEMS, path=config.dataset_path)
    prompts = [encode_prompt(tokenizer, problem.prompt) for problem in problems]
    max_new_tokens = config.max_new_tokens or config.max_length
    sampling = Sampling(max_new_tokens, 1.0, max(map(len, prompts)) + max_new_tokens, 0)
    rollouts = TransformersEngine(model, tokenizer).generate(prompts, SAMPLES, sampling)
    rows = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
    coarse = deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        pairs = zip(token_log_probs(model, *rows), token_log_probs(coarse, *rows), strict=True)
        gaps = [(fine - rough).double() for fine, rough in pairs if len(fine)]  # each (|y|,)
    bounds = [*LENGTHS, max_new_tokens + 1]
    by_length = []
    for low, high in zip(bounds[:-1], bounds[1:], strict=True):
        group = [gap for gap in gaps if low <= len(gap) < high]
        if group:
            by_length.append({"tokens": f"{low} to {high - 1}", "responses": len(group), **_spread(group)})
    return {"token_std": pstdev(torch.cat(gaps).tolist()), **_spread(gaps), "by_length": by_length}


def _spread(gaps: Sequence[torch.Tensor]) -> dict:
    """sequence_std, and the shares of tokens outside of each algorithm's clip range."""
    means = [gap.mean().item() for gap in gaps]
    tokens = torch.cat(list(gaps))
    sequences = torch.cat([gap.mean().expand(len(gap)) for gap in gaps])
    return {
        "sequence_std": pstdev(means) if len(means) > 1 else 0.0,
        "gspo": _outside(sequences, "gspo"),
        "grpo": _outside(tokens, "grpo"),
    }


def _outside(log_ratios: torch.Tensor, algorithm: str) -> float:
    ratios, clip = log_ratios.exp(), ALGORITHMS[algorithm]
    assert clip.left_clip_range is not None and clip.right_clip_range is not None
    outside = (ratios < 1 - clip.left_clip_range) | (ratios > 1 + clip.right_clip_range)
    return fmean(outside.tolist())
