"""The tasks of the benchmark's contestants: the same prompts, response lengths and rewards for all.

This module needs the standard library only, because the peers' environments have none of our packages.

A worker is a process that loads one contestant and prints "ready". It then executes one rollout batch for
each line that it reads, and prints a line of JSON after it. Between its turns it waits without using the CPU.
"""

import json
import random
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass

LEARNING_RATE = 1e-5
CLIP_RANGES = (3e-4, 4e-4)
# Each word, with the space before it, is one token of the embedded model.
WORDS = (
    " one two three four five six seven eight nine ten red green blue black white day night sun rain".split()
)


@dataclass(frozen=True)
class Workload:
    """A number of prompts of one length, and responses to them of given lengths."""

    description: str
    prompt_tokens: int  # with the chat template
    shortest: int  # the least and the most response tokens; lengths are uniform between them
    longest: int
    num_prompts: int = 4
    group_size: int = 8

    @property
    def num_responses(self) -> int:
        return self.num_prompts * self.group_size

    def lengths(self, batch: int) -> list[int]:
        """Return the tokens of each response of a rollout batch, given its number; groups are contiguous."""
        draw = random.Random(batch)
        return [draw.randint(self.shortest, self.longest) for _ in range(self.num_responses)]

    def prompts(self, count_tokens: Callable[[str], int]) -> list[str]:
        """Return user messages of which count_tokens says that they have prompt_tokens tokens."""
        draw = random.Random(0)
        missing = self.prompt_tokens - count_tokens(WORDS[0])
        texts = [" ".join([WORDS[0], *draw.choices(WORDS, k=missing)]) for _ in range(self.num_prompts)]
        assert {count_tokens(text) for text in texts} == {self.prompt_tokens}
        return texts


WORKLOADS = {
    "a": Workload("short prompts", 46, 64, 64),
    "b": Workload("256-token prompts", 256, 64, 64),
    "c": Workload("ragged responses", 46, 8, 128),
}


def reward(index: int) -> float:
    """Return the reward of a response, given its index. No group is tied, so all responses give gradients."""
    return float(index % 2)


def wait_for_turn() -> bool:
    """Wait, and return whether there is another rollout batch to execute."""
    return bool(sys.stdin.readline())


def answer(seconds: dict[str, float]) -> None:
    """Report a rollout batch's seconds by phase."""
    print(json.dumps(seconds | {"peak_memory_gb": peak_memory_gb()}), flush=True)


def peak_memory_gb() -> float:
    """Return the process's highest resident memory in units of 1e9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
