"""What a problem is, and what all data sets share: hashes, sides and orders that depend on its text alone."""

import hashlib
import json
import random
import re
from dataclasses import dataclass, field
from typing import Any

EVAL_SHARE = 4  # one problem in four is for evaluation


@dataclass(frozen=True)
class Problem:
    """One problem.

    id: unique in its data set. kind: names its reward, a key of gspo.tasks.rewards.REWARDS. prompt: the
    user's message, before any chat template, or a list of chat messages, {"role": ..., "content": ...} each.
    answer: the reference, which is a program for code. metadata: JSON-safe. A reasoning problem has the
    generator's name and entry there, which its scorer reads; a code problem has its tests, as run_tests takes
    them, and the preamble of an answer's code; a problem of a user's own file has the columns of its row.
    """

    id: str
    kind: str
    prompt: str | list[dict]
    answer: str
    metadata: dict = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The prompt as one text, by which problems are told apart."""
        return self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt, ensure_ascii=False)

    def columns(self) -> dict:
        """Return the dict that a reward of one's own gets: the columns of the row, as they stand in the file.

        A problem from elsewhere has id, prompt, answer and its metadata.
        """
        own = {"id": self.id, "prompt": self.prompt, "answer": self.answer}
        return own | self.metadata.get("columns", self.metadata)


def stable_hash(*parts: Any) -> int:
    """A hash that is the same on every machine and in every process, which Python's hash() is not."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def id_of(text: str) -> str:
    """Ten hexadecimal digits that stand for a text in a problem's id."""
    return f"{stable_hash(text) % 16**10:010x}"


def split_of(text: str) -> str:
    """The side of a generated problem, "train" or "eval", by its text alone.

    The order of the words does not count, so that 3 + 4 and 4 + 3 are on the same side.
    """
    words = sorted(re.findall(r"\w+|[^\w\s]", text))
    return "eval" if stable_hash(words) % EVAL_SHARE == 0 else "train"


def shuffled(problems: list[Problem], seed: int) -> list[Problem]:
    """The problems in an order that depends on the seed and their texts, not on the order they came in."""
    return sorted(problems, key=lambda problem: stable_hash(seed, problem.text))


def seeded_rng(*parts: Any) -> random.Random:
    """A random stream that these parts name, such as a seed and the name of a data set."""
    return random.Random(stable_hash(*parts))
