"""What a response earns: final answers are graded in worker processes, code runs in the sandbox.

Rewards are rule-based, deterministic and in [0, 1]. Responses are untrusted text, so whatever judges them
runs in processes that are killed at a deadline; one that could not be judged has None instead of a reward.
"""

import functools
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tqdm import tqdm

from gspo import PROGRESS_DELAY_S
from gspo.sandbox import SandboxError, TestResult, run_tests
from gspo.tasks.code_answer import code_of, program_of
from gspo.tasks.worker_pool import WorkerPool

GRADING_TIMEOUT_S = 5.0  # a grading takes milliseconds
MAX_WORKERS = 16  # that judge at the same time
CODE_REWARDS = ("all", "fraction")
UNSUPPORTED = "unsupported"  # status: the sandbox cannot run these tests, whatever the code is


@dataclass(frozen=True)
class Problem:
    """One problem. `kind` names the reward: math, reasoning, code or exact.

    prompt is the user's message, before any chat template. answer: the reference, a program for code.
    metadata is JSON-safe: reasoning problems carry the generator's name and entry, which its scorer reads;
    code problems their tests, as run_tests takes them, and the preamble of an answer's code.
    """

    id: str
    kind: str
    prompt: str
    answer: str
    metadata: dict = field(default_factory=dict)


def compute_rewards(problems: list[Problem], responses: list[str]) -> list[float | None]:
    """The reward of each response to its problem, in [0, 1]; None where it could not be judged.

    Responses are untrusted text: answers are graded in worker processes that are killed after
    GRADING_TIMEOUT_S, code runs in the sandbox. ValueError with the problem's id: its reference is no
    mathematical value, or its tests cannot be run.
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
        code = {i: pair for i, pair in enumerate(pairs) if pair[0].kind == "code"}
        results = run_code([_code_job(*pair) for pair in code.values()])
        graded = iter(_grade([pair for pair in pairs if pair[0].kind != "code"]))
        for (problem, _), result in zip(code.values(), results, strict=True):
            if result is not None and result.status == UNSUPPORTED:
                raise ValueError(f"problem {problem.id}: {result.detail}")
        run = iter(results)
        self.metrics = {"code_timeouts": sum(r is not None and r.status == "timeout" for r in results)}
        return [self._code_reward(next(run)) if i in code else next(graded) for i in range(len(pairs))]

    def _code_reward(self, result: TestResult | None) -> float | None:
        if result is None:
            return None
        return (
            result.passed / result.total if self.code_reward == "fraction" else float(result.status == "pass")
        )


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


def _code_job(problem: Problem, response: str) -> tuple[str, dict]:
    tests = problem.metadata["tests"]
    return program_of(response, tests.get("entry_point"), problem.metadata.get("preamble", "")), tests


def run_code(jobs: list[tuple[str, dict]]) -> list[TestResult | None]:
    """run_tests of (code, tests) pairs, on all cores. None: the sandbox failed."""
    failures = []

    def run(job: tuple[str, dict]) -> TestResult | None:
        try:
            return run_tests(*job)
        except SandboxError as error:
            failures.append(error)
            return None
        except ValueError as error:
            return TestResult(0, 1, UNSUPPORTED, str(error))

    with ThreadPoolExecutor(_num_workers()) as threads:
        progress = tqdm(
            threads.map(run, jobs), total=len(jobs), desc="tests", delay=PROGRESS_DELAY_S, leave=False
        )
        results = list(progress)
    if failures:
        warnings.warn(f"{len(failures)} of {len(jobs)} programs were not judged: {failures[0]}", stacklevel=2)
    return results


def _grade(pairs: list[tuple[Problem, str]]) -> list[float | None]:
    """The rewards of answers that are compared, exactly or by the graders."""
    jobs = [grading_job(*pair) for pair in pairs]
    judged = iter(judge([job for job in jobs if job["kind"] != "exact"]))
    rewards = []
    for (problem, _), job in zip(pairs, jobs, strict=True):
        exact = job["kind"] == "exact"
        reward = float(job["response"].strip() == problem.answer) if exact else next(judged)
        if isinstance(reward, str):
            raise ValueError(f"problem {problem.id}: {reward}")
        rewards.append(reward)
    return rewards


def grading_job(problem: Problem, response: str) -> dict:
    """What `judge` takes. ValueError: no kind of problem whose answers are graded."""
    if problem.kind not in ("math", "reasoning", "exact"):
        raise ValueError(f"problem {problem.id}: unknown kind {problem.kind!r}")
    return {"kind": problem.kind, "response": response, "answer": problem.answer, **problem.metadata}


def judge(jobs: list[dict]) -> list[float | str | None]:
    """Rewards by the graders; a string where a reference is at fault, None where one could not be judged."""
    return _graders(os.getpid()).map(jobs, "rewards") if jobs else []


@functools.cache
def _graders(process_id: int) -> WorkerPool:
    """One pool per process: a forked child must not talk over its parent's pipes."""
    command = [sys.executable, "-m", "gspo.tasks.grading"]
    return WorkerPool(command, _num_workers(), GRADING_TIMEOUT_S)


def _num_workers() -> int:
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS)
