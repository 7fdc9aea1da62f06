"""A reward of one's own, from a file: --reward FILE.py:FUNCTION.

    def score(problem: dict, response: str) -> float | None | dict[str, float]

`problem` has all columns of its row. None means: not judged. A dict has named parts, whose sum is the reward.

    python -m gspo.tasks.own_reward COPY FILE FUNCTION     a worker of worker_pool.py

The function runs in worker processes that are killed at a deadline. One that raises, hangs, exits or returns
nonsense costs that response, which is then not judged. This protects the run from accidents, and the
function is trusted code: it has the rights of whoever started the run.
"""

import functools
import hashlib
import inspect
import os
import re
import sys
import tempfile
import traceback
import types
from collections import Counter
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any

from gspo.printing import LINE_END, escaped, say
from gspo.tasks.problem import Problem
from gspo.tasks.rewards import num_workers
from gspo.tasks.worker_pool import TIMED_OUT, WorkerPool, serve

TIMEOUT_S = 30.0  # for one response; a reward may ask another model
MEMORY_GB = 16.0  # of address space: importing torch alone takes several
# The square of a larger reward overflows float64.
LARGEST_REWARD = 1e100
MAX_TRACEBACK = 4000  # characters

Reward = float | dict[str, float] | None


class OwnReward:
    """A reward function for a trainer: (problems, responses) -> a float, a dict of parts, or None for each.

    spec: FILE.py:FUNCTION. The constructor imports the file in a worker, to see whether it works.

    Attributes:
        metrics: of the last call, sums over its responses.
        failure: why the first response that the function could not judge was not judged, with its traceback.
        source: the file, the function, and the file's SHA-256.

    Raises:
        ValueError: the file, or the function in it, cannot be had. The message is one line.
    """

    def __init__(self, spec: str):
        path, _, self.function = spec.rpartition(":")
        if not path or not self.function.isidentifier():
            raise ValueError(f"--reward {spec}: write FILE.py:FUNCTION, such as my_rewards.py:score")
        self.path = Path(os.path.abspath(path))
        if not self.path.is_file():
            raise ValueError(f"--reward {spec}: there is no file {self.path}")
        self.metrics: dict[str, int] = {}
        self.failure: str | None = None
        self._has_ended = False
        content = self.path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        self.source = {"file": str(self.path), "function": self.function, "sha256": digest}
        # Workers are started during the whole run, and must not see what the file becomes meanwhile.
        self._folder = tempfile.TemporaryDirectory(prefix="gspo-reward-")
        self._copy = Path(self._folder.name) / self.path.name
        self._copy.write_bytes(content)
        try:
            answer = self._pool().map([{"check": True}])[0]
        except RuntimeError:  # the workers do not start
            raise ValueError(f"--reward {spec}: importing the file ends its process, or never ends") from None
        if error := answer.get("error"):
            lines = re.findall(rf'{re.escape(str(self.path))}", line (\d+)', error)
            where = f"line {lines[-1]}: " if lines else ""
            raise ValueError(f"--reward {spec}: {where}{error.strip().splitlines()[-1]}")

    def __call__(self, problems: list[Problem], responses: list[str]) -> list[Reward]:
        pairs = zip(problems, responses, strict=True)
        jobs = [{"problem": problem.columns(), "response": response} for problem, response in pairs]
        answers, failures = self._answers_to(jobs)
        timeouts = Counter(failures.values())[TIMED_OUT]
        self.metrics = {"reward_errors": len(failures) - timeouts, "reward_timeouts": timeouts}
        if failures and self.failure is None:
            self.failure = failures[min(failures)]
            say(
                f"--reward {self.path.name}:{self.function}: {len(failures)} of {len(responses)} responses "
                "were not judged. This is shown once; reward_errors and reward_timeouts count them.\n"
                f"{escaped(self.failure, keep=LINE_END)}",
                sys.stderr,
            )
        return [answer.get("reward") if answer else None for answer in answers]

    def _answers_to(self, jobs: list[dict]) -> tuple[list[dict | None], dict[int, str]]:
        """The workers' answers, None where there is none, and why responses were not judged, by their places.

        A function that has never ended in time is first tried on one response per worker. If it hangs on all
        of them, it is not tried on the others, which would cost TIMEOUT_S each.
        """
        pool = self._pool()
        num_tried = len(jobs) if self._has_ended else min(num_workers(), len(jobs))
        answers = pool.map(jobs[:num_tried], "rewards")
        failures = dict(pool.lost)
        self._has_ended = self._has_ended or list(failures.values()).count(TIMED_OUT) < num_tried
        others = jobs[num_tried:]
        if self._has_ended:
            answers += pool.map(others, "rewards")
            failures |= {num_tried + place: why for place, why in pool.lost.items()}
        else:
            answers += [None] * len(others)
            failures |= dict.fromkeys(range(num_tried, len(jobs)), TIMED_OUT)
        failures |= {i: answer["error"] for i, answer in enumerate(answers) if answer and "error" in answer}
        return answers, failures

    def _pool(self) -> WorkerPool:
        return _pool_of(os.getpid(), str(self._copy), str(self.path), self.function)


@functools.cache
def _pool_of(process_id: int, copy: str, path: str, function: str) -> WorkerPool:
    """The pool of one process: a forked child must not talk over its parent's pipes."""
    command = [sys.executable, "-m", "gspo.tasks.own_reward", copy, path, function]
    return WorkerPool(command, num_workers(), TIMEOUT_S)


# The worker's side


def worker_handle(copy: str, path: str, function: str) -> Callable[[dict], dict]:
    """Import the file from its copy. Returns what answers jobs: {"reward": ...} or {"error": traceback}."""
    try:
        score, problem = _import_function(copy, path, function), None
    except BaseException as error:  # whatever a user's file may raise, SystemExit included
        score, problem = None, _traceback_of(error, path)

    def handle(job: dict) -> dict:
        if score is None or "check" in job:
            return {"error": problem} if problem else {}
        try:
            return {"reward": checked(score(job["problem"], job["response"]))}
        except BaseException as error:
            return {"error": _traceback_of(error, path)}

    return handle


def _import_function(copy: str, path: str, function: str) -> Callable[[dict, str], Any]:
    sys.path.insert(0, str(Path(path).parent))  # the file may import its neighbours
    module = types.ModuleType(Path(path).stem)
    module.__file__ = path
    sys.modules[module.__name__] = module
    exec(compile(Path(copy).read_bytes(), path, "exec"), vars(module))
    score = getattr(module, function, None)
    if not callable(score):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise AttributeError(f"it has no function {function}, but {', '.join(names) or 'none at all'}")
    try:
        inspect.signature(score).bind({}, "")
    except TypeError:
        raise TypeError(f"{function} must take two arguments, problem and response") from None
    return score


def checked(value: Any) -> Reward:
    """A reward as plain numbers. ValueError: it is none."""
    if value is None:
        return None
    if isinstance(value, dict):
        if not value:
            raise ValueError("the reward is an empty dict; None means: not judged")
        if not all(isinstance(name, str) for name in value):
            raise ValueError(f"the parts' names are not all strings: {', '.join(map(repr, value))}")
        return {name: _number(part, f"the part {name!r}") for name, part in value.items()}
    return _number(value, "the reward")


def _number(value: Any, what: str) -> float:
    # Numbers of numpy and torch become Python's.
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, Real):
        raise ValueError(f"{what} is {type(value).__name__}, not a number: {str(value)[:50]!r}")
    number = float(value)
    if not abs(number) <= LARGEST_REWARD:  # also NaN
        raise ValueError(f"{what} is {number}, which is not finite or too large")
    return number


def _traceback_of(error: BaseException, path: str) -> str:
    """The traceback from the user's file on, without the frames of this module."""
    frames = traceback.extract_tb(error.__traceback__)
    own = next((i for i, frame in enumerate(frames) if frame.filename == path), len(frames))
    lines = traceback.format_list(frames[own:]) + traceback.format_exception_only(error)
    # The message may quote a response: characters that could move the cursor are escaped.
    text = escaped("".join(lines), keep=LINE_END)
    return text[-MAX_TRACEBACK:].strip()


if __name__ == "__main__":
    serve(lambda: worker_handle(*sys.argv[1:4]), MEMORY_GB)
