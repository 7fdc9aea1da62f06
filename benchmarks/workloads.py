"""What the contestants of the benchmark are given: the same prompts, response lengths and rewards.

Standard library only: the peers' environments have nothing of ours.

A worker is a process that loads one contestant, prints a line, and then does one rollout batch for each line
that it reads, answering with a line of JSON. Between its turns it waits and takes no CPU, so that contestants
can alternate.
"""

import json
import random
import resource
import sys
from dataclasses import dataclass

LEARNING_RATE = 1e-5
CLIP_RANGES = (3e-4, 4e-4)
# Single tokens of the embedded model, with the space before them: a prompt of n of them is n tokens longer.
WORDS = (
    " one two three four five six seven eight nine ten red green blue black white day night sun rain".split()
)


@dataclass(frozen=True)
class Workload:
    """num_prompts prompts of so many tokens (chat template included), group_size responses to each."""

    description: str
    prompt_tokens: int
    shortest: int  # response tokens, uniform between the two; the same for both contestants
    longest: int
    num_prompts: int = 4
    group_size: int = 8

    @property
    def num_responses(self) -> int:
        return self.num_prompts * self.group_size

    def lengths(self, batch: int) -> list[int]:
        """Tokens of each response of rollout batch number batch, groups contiguous."""
        draw = random.Random(batch)
        return [draw.randint(self.shortest, self.longest) for _ in range(self.num_responses)]

    def prompts(self, count_tokens) -> list[str]:
        """Texts that count_tokens (of a user's message, templated) says are prompt_tokens long."""
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
    """Of response number index: no group is tied, so that every response is trained on."""
    return float(index % 2)


def wait_for_turn() -> bool:
    """Whether another rollout batch is asked for."""
    return bool(sys.stdin.readline())


def answer(seconds: dict[str, float]) -> None:
    """Report a rollout batch's seconds by phase."""
    print(json.dumps(seconds | {"peak_memory_gb": peak_memory_gb()}), flush=True)


def peak_memory_gb() -> float:
    """The process's highest resident memory, 1e9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
