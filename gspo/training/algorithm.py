"""What there is to say about an algorithm; the entries are in gspo_implementation.ALGORITHMS.

Everything that differs between algorithms besides the loss is asked here: what its mean is over, what its
clip ranges are and measure, and how a run describes it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gspo.training.config import GSPOConfig
from gspo.training.rollout_batch import Sample

# What a loss's mean is over: the names that Algorithm.mean_over may have, in words.
MEANS = {
    "responses": "mean over each response's tokens, then over responses",
    "tokens": "mean over all tokens of an update",
}


@dataclass(frozen=True)
class Algorithm:
    """All that is to be said about an algorithm: --algorithm, validation and the tests read it here.

    loss: a function like gspo_loss.
    ratio, clip_unit: its ratio, and what one clip decision covers ("response" or "token"), in the words that
        a run prints.
    left_clip_range, right_clip_range: its default clip ranges; None: it has none on that side.
    reference: the name of the same loss as a float64 loop in gspo/checks/float64_reference.py.
    small_model_factor: how many times as wide train_gspo.py makes them for a model below SMALL_MODEL.
    mean_over: what the loss's denominator counts, a key of MEANS.
    clipping: what happens to the ratio, in the words that a run prints, with {left}, {right} and {unit}.
    clips_probability: True if the clip ranges bound pi - pi_old of a token, and not its ratio.
    """

    loss: Callable[..., tuple[torch.Tensor, dict[str, float]]]
    ratio: str
    clip_unit: str
    left_clip_range: float | None
    right_clip_range: float | None
    reference: str
    small_model_factor: float = 1.0
    mean_over: str = "responses"
    clipping: str = "clipped to [1 - {left:g}, 1 + {right:g}] per {unit}"
    clips_probability: bool = False

    @property
    def clips(self) -> bool:
        """False if it has no clip range."""
        return self.left_clip_range is not None or self.right_clip_range is not None

    @property
    def clips_per_token(self) -> bool:
        return self.clip_unit == "token"

    def denominator(self, samples: Sequence[Sample]) -> int:
        """The denominator of the loss of an optimizer update on these samples, however it is cut."""
        if self.mean_over == "tokens":
            return sum(sample.num_tokens for sample in samples)
        return len(samples)

    def clip_ranges(self, config: GSPOConfig) -> tuple[float | None, float | None]:
        """The left and the right clip range: those of the configuration, or the algorithm's own.

        Raises:
            ValueError: the configuration has one where the algorithm has none.
        """
        left, right = config.left_clip_range, config.right_clip_range
        sides = (("left", left, self.left_clip_range), ("right", right, self.right_clip_range))
        for side, given, own in sides:
            if given and own is None:
                raise ValueError(
                    f"--{side}_clip_range {given:g}: {config.algorithm} clips nothing on that side; "
                    "leave it out"
                )
        return left or self.left_clip_range, right or self.right_clip_range

    def movement(self, log_probs: torch.Tensor, old_log_probs: torch.Tensor) -> torch.Tensor:
        """How far a response (1,) or each of its tokens (|y|,) has moved, in what the clip ranges bound.

        log_probs, old_log_probs: (|y|,) of a response.
        """
        if self.clips_probability:
            return log_probs.exp() - old_log_probs.exp()
        log_ratio = log_probs - old_log_probs  # (|y|,)
        if not self.clips_per_token:
            log_ratio = log_ratio.mean(dim=0, keepdim=True)
        return log_ratio.exp() - 1

    def describe(self, left: float | None, right: float | None) -> str:
        """The objective with these clip ranges, in the words that a run prints."""
        clipping = self.clipping.format(left=left, right=right, unit=self.clip_unit)
        return f"{self.ratio}, {clipping}; {MEANS[self.mean_over]}"
