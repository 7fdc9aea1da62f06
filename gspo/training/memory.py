"""Forward passes that fit the memory: when it runs out, they take half as many tokens, with the same gradient."""

import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from tqdm import tqdm

Result = TypeVar("Result")


class MicroBatchSize:
    """The number of tokens per forward pass, which is halved whenever memory runs out."""

    def __init__(self, tokens: int):
        self._tokens_at_start = tokens
        self.halvings = 0

    @property
    def tokens(self) -> int:
        return self._tokens_at_start >> self.halvings

    def retry(self, work: Callable[[], Result], longest: int) -> Result:
        """Return work(); repeat it with half the tokens as long as it runs out of memory.

        The gradient stays the same but for rounding. In bfloat16 that rounding adds noise to the ratios of the
        rollout batch in progress, whose pi_old was computed in other shapes.

        Args:
            work: reads `tokens`, and may be repeated.
            longest: tokens of the longest row, which cannot be divided.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:
                if not _is_out_of_memory(error) or self.tokens <= longest:
                    raise
            # After the handler, which holds the failed attempt's tensors.
            self.halvings += 1
            torch.cuda.empty_cache()
            tqdm.write(
                f"out of memory: from now on {self.tokens} tokens per forward pass (--micro_batch_tokens)",
                file=sys.stderr,
            )


def _is_out_of_memory(error: RuntimeError) -> bool:
    """True for a GPU's error, for that of torch's CPU allocator, and for oneDNN's, which names no reason."""
    return should_reduce_batch_size(error) or "could not create a primitive" in str(error)
