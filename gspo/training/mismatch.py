"""How far the sampler's distribution mu is from pi_old, where the two differ; and what is masked.

pi_old is the trainer's here: with --pi_old sampler there is nothing to compare and to mask. A response whose
tokens mu finds more or less probable than pi_old does, on average by more than a bound, was not sampled from
pi_old for GSPO's purposes: its clip range is narrower than that. It gets no gradient and stays in the
denominator. There is no weight pi_old / mu: over a response of many tokens it is 0 or enormous.
"""

from collections.abc import Sequence

import torch

from gspo.training.rollout_batch import Sample

# exp() of a larger sum of log-ratios says nothing but "far".
MAX_LOG_WEIGHT = 30.0


def mismatch(samples: Sequence[Sample], bound: float) -> dict[str, float]:
    """Mask the samples whose mean of log pi_old - log mu is further than `bound` from 0, in nats per token.

    Args:
        samples: responses with log pi_old; without any, there are no metrics.

    Returns:
        Metrics, of all of them: the largest gap of a token, the k3 estimate of KL(mu || pi_old) per token,
        the effective sample size of the weights pi_old / mu as a share of the responses, and the share that
        is masked (record.GLOSSARY).
    """
    if not samples:
        return {}
    gaps = [sample.old_log_probs - torch.tensor(sample.rollout.log_probs) for sample in samples]  # (|y|,)
    tokens = torch.cat(gaps).double()
    means = torch.stack([gap.mean() for gap in gaps])
    masked = means.abs() > bound
    for sample, is_masked in zip(samples, masked.tolist(), strict=True):
        sample.masked = is_masked
    log_weights = torch.stack([gap.double().sum() for gap in gaps])
    # Only their ratios matter.
    weights = (log_weights - log_weights.max()).exp()
    k3 = tokens.clamp(max=MAX_LOG_WEIGHT).exp() - 1 - tokens
    return {
        "sampler_gap_max": tokens.abs().max().item(),
        "sampler_kl": k3.mean().item(),
        "sampler_ess": (weights.sum().square() / weights.square().sum() / len(weights)).item(),
        "masked_fraction": masked.float().mean().item(),
    }
