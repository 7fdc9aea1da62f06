"""What a response earns: final answers are graded in worker processes, code runs in the sandbox.

Rewards are rule-based, deterministic and in [0, 1]. Responses are untrusted text, so whatever grades them
runs in processes that are killed at a deadline. A response that could not be judged has None instead of a
reward.

REWARDS has one entry per kind of problem: a function that rewards a list of responses.
"""

import functools
import os
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from gspo.sandbox import SandboxError, TestResult, check_machine, run_tests
from gspo.tasks.code_answer import code_of, program_of
from gspo.tasks.problem import Problem
from gspo.tasks.worker_pool import WorkerPool

GRADING_TIMEOUT_S = 5.0  # a grading takes milliseconds
MAX_WORKERS = 16  # that grade at the same time
CODE_REWARDS = ("all", "fraction")
UNSUPPORTED = "unsupported"  # status: the sandbox cannot run these tests, whatever the code is


def compute_rewards(problems: list[Problem], responses: list[str]) -> list[float | None]:
    """The reward of each response to its problem, in [0, 1]; None where it could not be judged.

    Responses are untrusted text: answers are graded in worker processes that are killed after
    GRADING_TIMEOUT_S, code runs in the sandbox. ValueError with the problem's id: its kind is unknown, its
    reference is no mathematical value, or its tests cannot be run.
    """
    return RewardFunction()(problems, responses)


class RewardFunction:
    """compute_rewards with its setting, for a trainer.

    code_reward: "all", 1 only if all tests pass; or "fraction", the share of the tests that pass. metrics: of
    the last call, sums over its responses.
    """

    def __init__(self, code_reward: str = "all"):
        if code_reward not in CODE_REWARDS:
            raise ValueError(f"unknown code reward {code_reward!r}; choose one of {', '.join(CODE_REWARDS)}")
        self.code_reward = code_reward
        self.metrics: dict[str, int] = {}

    def __call__(self, problems: list[Problem], responses: list[str]) -> list[float | None]:
        pairs = list(zip(problems, responses, strict=True))
        for problem in problems:
            if problem.kind not in REWARDS:
                raise ValueError(f"problem {problem.id}: unknown kind {problem.kind!r}")
        self.metrics = {"code_timeouts": 0}
        rewards: list[float | None] = [None] * len(pairs)
        for kind, reward_all in REWARDS.items():
            places = [i for i, problem in enumerate(problems) if problem.kind == kind]
            if places:
                of_kind = reward_all([pairs[i] for i in places], self)
                for place, reward in zip(places, of_kind, strict=True):
                    rewards[place] = reward
        return rewards


def math_reward(response: str, answer: str) -> float:
    """1.0 if the final answer of the response equals `answer`, else 0.0, also where it could not be judged.

    ValueError: `answer` is no mathematical value.
    """
    return compute_rewards([Problem("math_reward", "math", "", answer)], [response])[0] or 0.0


def code_reward(response: str, tests: dict) -> float:
    """1.0 if the response's code passes all tests (as gspo.sandbox.run_tests takes them), else 0.0.

    ValueError: malformed tests. SandboxError: the sandbox does not work here.
    """
    return float(run_tests(code_of(response, tests.get("entry_point")), tests).status == "pass")


# The kinds of problems. Each function takes (problem, response) pairs and the RewardFunction, whose settings
# it reads and to whose metrics it adds.

Pairs = list[tuple[Problem, str]]


def _reward_code(pairs: Pairs, settings: RewardFunction) -> list[float | None]:
    """1.0 if all tests pass in the sandbox; or the share of the tests that pass."""
    jobs = []
    for problem, response in pairs:
        tests, preamble = problem.metadata["tests"], problem.metadata.get("preamble", "")
        jobs.append((program_of(response, tests.get("entry_point"), preamble), tests))
    rewards: list[float | None] = []
    for (problem, _), result in zip(pairs, run_all_tests(jobs), strict=True):
        if result is None:
            rewards.append(None)
            continue
        if result.status == UNSUPPORTED:
            raise ValueError(f"problem {problem.id}: {result.detail}")
        settings.metrics["code_timeouts"] += result.status == "timeout"
        if settings.code_reward == "fraction":
            rewards.append(result.passed / result.total)
        else:
            rewards.append(float(result.status == "pass"))
    return rewards


def _reward_answer(pairs: Pairs, settings: RewardFunction) -> list[float | None]:
    """The reward that a worker of gspo.tasks.grading gives to the final answer."""
    rewards: list[float | None] = []
    graded = grade_answers([grading_job(problem, response) for problem, response in pairs])
    for (problem, _), reward in zip(pairs, graded, strict=True):
        if isinstance(reward, str):
            raise ValueError(f"problem {problem.id}: {reward}")
        rewards.append(reward)
    return rewards


def _reward_exact(pairs: Pairs, settings: RewardFunction) -> list[float | None]:
    """1.0 if the response is the answer, white space around it aside."""
    return [float(response.strip() == problem.answer) for problem, response in pairs]


REWARDS: dict[str, Callable[[Pairs, RewardFunction], list[float | None]]] = {
    "code": _reward_code,
    "math": _reward_answer,
    "reasoning": _reward_answer,
    "generator": _reward_answer,
    "text": _reward_answer,
    "exact": _reward_exact,
}


# Code, in the sandbox


def require_sandbox() -> None:
    """ValueError: this machine cannot run untrusted code safely."""
    try:
        check_machine()
    except SandboxError as error:
        raise ValueError(
            f"code problems cannot be judged here: {error}. --dataset math and reasoning need no sandbox"
        ) from error


def run_all_tests(jobs: list[tuple[str, dict]]) -> list[TestResult | None]:
    """run_tests of (code, tests) pairs, on all cores. None: the sandbox failed."""
    failures = []

    def run_one(job: tuple[str, dict]) -> TestResult | None:
        try:
            return run_tests(*job)
        except SandboxError as error:
            failures.append(error)
            return None
        except ValueError as error:
            return TestResult(0, 1, UNSUPPORTED, str(error))

    from gspo.live_line import Bar  # here, since --help imports this module and needs no tqdm

    results = []
    with ThreadPoolExecutor(num_workers()) as threads, Bar(len(jobs), "tests", "done") as progress:
        for result in threads.map(run_one, jobs):
            results.append(result)
            progress.update()
    if failures:
        warnings.warn(f"{len(failures)} of {len(jobs)} programs were not judged: {failures[0]}", stacklevel=2)
    return results


# Final answers, in workers


def grading_job(problem: Problem, response: str) -> dict:
    """What a worker of gspo.tasks.grading takes."""
    return {"kind": problem.kind, "response": response, "answer": problem.answer, **problem.metadata}


def grade_answers(jobs: list[dict]) -> list[float | str | None]:
    """Rewards by the workers; a string where a reference is at fault, None where one could not be judged."""
    return _graders(os.getpid()).map(jobs, "rewards") if jobs else []


@functools.cache
def _graders(process_id: int) -> WorkerPool:
    """The pool of one process: a forked child must not talk over its parent's pipes."""
    command = [sys.executable, "-m", "gspo.tasks.grading"]
    return WorkerPool(command, num_workers(), GRADING_TIMEOUT_S)


def num_workers() -> int:
    return min(num_cores(), MAX_WORKERS)


def num_cores() -> int:
    """The cores that this process may use; macOS tells only how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
