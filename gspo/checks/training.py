"""Validation, parts 2 to 4: a small model trained for real, by the real trainer, and what must be seen then.

Runs go to worker processes, one for each core: a tiny model leaves a second thread idle. What they bring back
is judged by generators of checks over plain figures, so that a bad run can be made up in a test.
"""

import contextlib
import io
import math
import multiprocessing
import os
import random
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from statistics import fmean

import torch
from tqdm import tqdm

from data_loader import compute_rewards, load_problems
from gspo import PROGRESS_DELAY_S
from gspo.checks.losses import PAPER_CLIP_RANGES
from gspo.checks.model import DTYPES, MAX_TIED_GROUPS, TIED, checksum_reward
from gspo.checks.report import Check, at_most, between, exactly
from gspo.policy.log_probs import token_log_probs
from gspo.policy.model_loader import load_model
from gspo.policy.rollout import Sampling, TransformersEngine, encode_prompt
from gspo.training.alarms import stop_reason, warnings_of
from gspo.training.intervals import paired_interval
from gspo_implementation import GSPOConfig, GSPOTrainer

PAPER_CLIP_FRACTIONS = {"gspo": 0.15, "grpo": 0.0013}  # of tokens, figure 2
# Multiples of the paper's range: too narrow, around it, too wide.
RANGE_FACTORS = {"too narrow": 0.01, "a third": 1 / 3, "paper": 1.0, "triple": 3.0, "too wide": 500.0}
LEAST_GAIN = 0.01  # of held-out pass@1, at the lower end of its 95 % interval
# Of a run without a signal: one run in a hundred drifts up a little, which the interval over problems does
# not know of (ten seeds of tiny: mean -.023, standard deviation .022).
MOST_CHANCE = 0.03
NOISE_RESPONSES = 64


@dataclass(frozen=True)
class Task:
    """What is trained on, and how much: queries a batch and an update, responses a query."""

    dataset: str
    num_batches: int
    batch_size: int
    mini_batch_size: int
    group_size: int
    max_new_tokens: int
    num_eval: int  # held-out problems; 0: no evaluation
    learning_rate: float | None = None  # None: the trainer's default
    dtype: str = "auto"
    device: str | None = None  # None: a GPU where there is one


# The tiny models have about a third of their task, sorting digits, right at the start, sampled.
SORTING = Task("sort", 16, 32, 8, 8, 26, 256, 5e-5, "float32", "cpu")
# Three rollout batches on another model show how its ratios move, not what it learns.
SHORT = Task("math", 3, 4, 1, 4, 32, 0)


@dataclass(frozen=True)
class Run:
    """One training run. rewards: the task's own, "shuffled" among responses, or "checksum" of their text."""

    model_name: str
    task: Task
    seed: int
    algorithm: str = "gspo"
    clip_ranges: tuple[float, float] | None = None  # None: the algorithm's
    rewards: str = "task"
    num_batches: int | None = None  # None: the task's


def carry_out(run: Run) -> dict:
    """{"metrics": of each rollout batch, "evaluation": after the last, or None}."""
    task = run.task
    num_batches = task.num_batches if run.num_batches is None else run.num_batches
    # The bars of several processes would write over each other.
    with contextlib.redirect_stderr(io.StringIO()):
        model, tokenizer = load_model(run.model_name, device="cpu")
        left, right = run.clip_ranges or (None, None)
        config = GSPOConfig(
            model_name=run.model_name,
            algorithm=run.algorithm,
            left_clip_range=left,
            right_clip_range=right,
            batch_size=task.batch_size,
            mini_batch_size=task.mini_batch_size,
            group_size=task.group_size,
            max_new_tokens=task.max_new_tokens,
            learning_rate=task.learning_rate,
            dtype=task.dtype,
            device=task.device,
            seed=run.seed,
        )
        trainer = GSPOTrainer(model, tokenizer, config, reward_function(run))
        problems = load_problems(task.dataset, "train", task.batch_size * task.num_batches, run.seed)
        starts = range(0, task.batch_size * num_batches, task.batch_size)
        metrics = [trainer.train_step(problems[start : start + task.batch_size]) for start in starts]
        trainer.reward_fn = compute_rewards
        held_out = load_problems(task.dataset, "eval", task.num_eval, run.seed) if task.num_eval else []
        return {"metrics": metrics, "evaluation": trainer.evaluate(held_out) if held_out else None}


def reward_function(run: Run):
    rng = random.Random(run.seed)

    def shuffled(problems, responses) -> list[float]:
        rewards = compute_rewards(problems, responses)
        rng.shuffle(rewards)
        return rewards

    return {"task": compute_rewards, "shuffled": shuffled, "checksum": checksum_reward}[run.rewards]


def start_worker(threads: int) -> None:
    """In a worker process: it ends with its parent, even if that is killed."""

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    torch.set_num_threads(threads)
    threading.Thread(target=end_with_parent, daemon=True).start()


class Runs:
    """Runs under way, by name. runs[name] waits for one, and raises what it raised."""

    def __init__(self, runs: dict[str, Run], num_workers: int):
        spawn = multiprocessing.get_context("spawn")  # a fork of a process with OpenMP's threads may hang
        threads = max(1, os.cpu_count() // num_workers)
        self.pool = ProcessPoolExecutor(num_workers, spawn, start_worker, (threads,))
        self.futures: dict[str, Future] = {
            name: self.pool.submit(carry_out, run) for name, run in runs.items()
        }

    def wait(self, names: Iterable[str]) -> None:
        futures = [self.futures[name] for name in names]
        progress = tqdm(
            total=len(futures), desc="  training", unit="run", delay=PROGRESS_DELAY_S, leave=False
        )
        with progress:
            for _ in as_completed(futures):
                progress.update()

    def __getitem__(self, name: str) -> dict:
        return self.futures[name].result()

    def __contains__(self, name: str) -> bool:
        return name in self.futures

    def metrics(self) -> Iterator[tuple[str, list[dict]]]:
        """Of the runs that came to their end and took steps: name and metrics."""
        for name, future in self.futures.items():
            if not future.exception() and future.result()["metrics"]:
                yield name, future.result()["metrics"]

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------- part 2: dynamics


def mean_by_minibatch(metrics: Sequence[dict]) -> list[float]:
    return [
        fmean(fractions)
        for fractions in zip(*(m["clip_fraction_by_minibatch"] for m in metrics), strict=True)
    ]


def movement_checks(gspo: Sequence[dict], grpo: Sequence[dict]):
    """Of the metrics of two runs from the same start, a dict a rollout batch: how the ratios move."""
    both = [*gspo, *grpo]
    first = max(m["clip_fraction_by_minibatch"][0] for m in both)
    yield exactly(
        "the first minibatch never clips, in either algorithm", first, 0.0, "largest clip fraction",
        "pi_old: it must be the policy before the first update, scored as the update scores it",
    )  # fmt: skip
    spreads = [m["importance_ratio_std"] for m in both if m["zero_variance_groups"] <= MAX_TIED_GROUPS]
    yield Check(
        "the updates after it see a policy that has moved", min(spreads) > 0 if spreads else None,
        f"smallest spread of ratios {min(spreads):.2g}" if spreads else TIED, "more than 0",
        "pi_old is refreshed between the minibatches, or weights do not move",
    )  # fmt: skip
    for name, metrics, allowed in (("gspo", gspo, 0.02), ("grpo", grpo, 0.1)):
        farthest = max((m["importance_ratio_mean"] for m in metrics), key=_distance_from_1)
        yield between(
            f"{name}: ratios stay near 1", farthest, 1 - allowed, 1 + allowed, "farthest mean",
            "the length normalisation of the ratio, learning rate",
        )  # fmt: skip
    yield at_most(
        "scored twice without an update, nothing clips", max(m["null_clip_fraction"] for m in both), 1e-3,
        "null clip fraction", "the compute type: --dtype float32",
    )  # fmt: skip
    infinite = sorted({name for m in both for name, value in m.items() if not _finite(value)})
    yield exactly("all figures are finite", infinite, [], "the others:", "the loss and its gradient")
    yield exactly(
        "gspo: no alarm was raised", sorted(set(_alarms(gspo))), [], "alarms:", "learning rate, ratio"
    )  # fmt: skip


def clipping_checks(gspo: Sequence[dict], grpo: Sequence[dict]):
    """Of the same two runs: how much is clipped, which is where the two algorithms differ most."""
    yield between(
        "gspo: every minibatch after the first clips", min(mean_by_minibatch(gspo)[1:]), 0.01, 0.95,
        "smallest clip fraction", "clipping, the clip ranges",
    )  # fmt: skip
    fractions = {
        "gspo": fmean(m["clip_fraction"] for m in gspo),
        "grpo": fmean(m["clip_fraction"] for m in grpo),
    }
    yield between(
        "gspo: the pooled clip fraction is in the healthy band", fractions["gspo"], 0.03, 0.6,
        "share of tokens", "clip ranges, learning rate",
    )  # fmt: skip
    yield between(
        "grpo: it is a tenth of that at most", fractions["grpo"], 0.0, fractions["gspo"] / 10,
        "share of tokens", "the ratio, of a sequence for gspo and of a token for grpo; each one's clip range",
    )  # fmt: skip


def _distance_from_1(ratio: float) -> float:
    return abs(ratio - 1) if math.isfinite(ratio) else math.inf


def _finite(value) -> bool:
    return all(map(math.isfinite, value if isinstance(value, list) else [value]))


def _alarms(metrics: Sequence[dict]) -> Iterable[str]:
    for end in range(1, len(metrics) + 1):
        yield from warnings_of(metrics[:end]).values()
        if reason := stop_reason(metrics[end - 1]):
            yield reason


def dynamics_table(runs: dict[str, Sequence[dict]]) -> list[dict]:
    return [
        {
            "algorithm": name,
            "clipped tokens": fmean(m["clip_fraction"] for m in metrics),
            "in the paper": PAPER_CLIP_FRACTIONS[name],
            "by minibatch": " / ".join(f"{x:.2g}" for x in mean_by_minibatch(metrics)),
            "smallest ratio": min(m["importance_ratio_min"] for m in metrics),
            "largest ratio": max(m["importance_ratio_max"] for m in metrics),
            "first reward": metrics[0]["reward_mean"],
            "last reward": metrics[-1]["reward_mean"],
        }
        for name, metrics in runs.items()
    ]


# ---------------------------------------------------------------------------------------- part 3: performance


def gain(before: Sequence[dict], after: Sequence[dict]) -> tuple[float, float, float]:
    """Mean change of held-out pass@1 and its 95 % interval, paired by problem over all seeds' evaluations."""
    rates = [[rate for e in evaluations for rate in e["pass_by_problem"]] for evaluations in (before, after)]
    return paired_interval(*rates)


def performance_checks(before: Sequence[dict], after: Sequence[dict], control: Sequence[dict]):
    """Evaluations of each seed: before training, after it, and after training on shuffled rewards."""
    for name, figures, bound, wanted, fault in (
        ("gspo raises held-out pass@1", gain(before, after), LEAST_GAIN, True,
         "the sign of the loss, advantages, or weights that do not move"),
        ("with rewards shuffled among the responses it does not", gain(before, control), MOST_CHANCE, False,
         "the evaluation: what improves without a signal is not learning"),
        ("gspo is ahead of that control", gain(control, after), LEAST_GAIN, True,
         "rewards that do not reach the loss"),
    ):  # fmt: skip
        mean, low, high = figures
        measured = f"{mean:+.3f} (95 % interval {low:+.3f} to {high:+.3f})"
        expected = f"lower end {'above' if wanted else 'not above'} {bound:+g}"
        yield Check(name, (low > bound) == wanted, measured, expected, fault)


def performance_table(evaluations: dict[str, Sequence[dict]]) -> list[dict]:
    """Of runs by name, each one's evaluations over the seeds; gains are over the first."""
    before = next(iter(evaluations.values()))
    return [
        {"run": name, "pass@1": pass_at_1(after)} | gain_columns(before, after)
        for name, after in evaluations.items()
    ]


def pass_at_1(evaluations: Sequence[dict]) -> float:
    return fmean(e["pass_at_1"] for e in evaluations)


def gain_columns(before: Sequence[dict], after: Sequence[dict]) -> dict:
    mean, low, high = gain(before, after)
    return {"gain": f"{mean:+.3f}", "95 % interval": f"{low:+.3f} to {high:+.3f}"}


# ---------------------------------------------------------------------------------------- part 4: clip ranges


def clip_ranges() -> dict[str, tuple[float, float]]:
    left, right = PAPER_CLIP_RANGES["gspo"]
    return {name: (factor * left, factor * right) for name, factor in RANGE_FACTORS.items()}


def clip_range_checks(metrics: dict[str, Sequence[dict]]):
    """Of the metrics of a run with each range, narrowest first."""
    fractions = [fmean(m["clip_fraction"] for m in run) for run in metrics.values()]
    falling = all(a >= b for a, b in zip(fractions, fractions[1:], strict=False))
    yield Check(
        "the wider the range, the less is clipped", falling, " ".join(f"{x:.3g}" for x in fractions),
        "never rising", "the clip ranges do not reach the loss",
    )  # fmt: skip
    yield between(
        "a range that is too narrow clips most of the later minibatches", fractions[0], 0.3, 0.75,
        "share of tokens", "which side of the range clips",
    )  # fmt: skip
    yield between(
        "one that is too wide clips next to nothing", fractions[-1], 0.0, 0.01, "share of tokens",
        "the ratio's length normalisation",
    )  # fmt: skip


def clip_range_table(before: dict, results: dict[str, dict]) -> list[dict]:
    return [
        {"clip range": f"{name}: {left:.3g}, {right:.3g}"}
        | gain_columns([before], [results[name]["evaluation"]])
        | {
            "clipped tokens": fmean(m["clip_fraction"] for m in results[name]["metrics"]),
            "ratio's standard deviation": fmean(m["importance_ratio_std"] for m in results[name]["metrics"]),
        }
        for name, (left, right) in clip_ranges().items()
    ]


def precision_noise(model, tokenizer, problems, max_new_tokens: int, device: str) -> dict[str, list]:
    """How far a ratio is from 1 with no update at all: source of noise to (ratio, tokens) of each response.

    Two sources for each compute type: scoring the same responses again, and taking the sampler's own
    log-probabilities for pi_old.
    """
    group_size = max(2, NOISE_RESPONSES // len(problems))
    prompts = [encode_prompt(tokenizer, problem.prompt) for problem in problems]
    noise = {}
    for dtype in DTYPES:
        autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")
        with torch.no_grad(), autocast:
            rollouts = TransformersEngine(model, tokenizer).generate(
                prompts, group_size, Sampling(max_new_tokens)
            )
            asked = [r.prompt_ids for r in rollouts]
            answers = [r.response_ids for r in rollouts]
            scored, again = (token_log_probs(model, asked, answers) for _ in range(2))
        sampled = [torch.tensor(r.log_probs) for r in rollouts]
        for source, old in (("scored again", again), ("sampler's own", sampled)):
            ratios = [(a.cpu() - b.cpu()).mean().exp().item() for a, b in zip(scored, old, strict=True)]
            noise[f"{dtype}, {source}"] = list(zip(ratios, map(len, answers), strict=True))
    return noise


def share_outside(ratios: Iterable[tuple[float, int]], left: float, right: float) -> float:
    """Null clip fraction: tokens of the responses whose ratio is outside the range, without an update."""
    ratios = list(ratios)
    outside = sum(tokens for ratio, tokens in ratios if not 1 - left <= ratio <= 1 + right)
    return outside / sum(tokens for _, tokens in ratios)


def precision_table(noise: dict[str, list]) -> list[dict]:
    return [
        {"clip range": f"{name}: {left:.3g}, {right:.3g}"}
        | {source: share_outside(ratios, left, right) for source, ratios in noise.items()}
        for name, (left, right) in clip_ranges().items()
    ]


def precision_checks(noise: dict[str, list]):
    left, right = PAPER_CLIP_RANGES["gspo"]
    for source, ratios in noise.items():
        share = share_outside(ratios, left, right)
        if "again" in source:
            yield at_most(
                f"the paper's range holds the noise of {source}", share, 0.01, "null clip fraction",
                "the model's arithmetic, which is not the same twice",
            )  # fmt: skip
