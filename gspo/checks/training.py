"""Validation, parts 2 to 4: what the metrics of real training runs of a small model must look like.

The runs are made in worker processes, one for each core, because a tiny model leaves a second thread idle.
The checks are generators over plain figures, so that a test can make up a bad run.
"""

import contextlib
import io
import math
import multiprocessing
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from data_loader import compute_rewards, load_problems
from gspo import PROGRESS_DELAY_S
from gspo.checks.losses import PAPER_CLIP_RANGES
from gspo.checks.model import (
    DTYPES,
    MAX_TIED_GROUPS,
    TIED,
    checksum_reward,
    largest_null_clip_fraction,
)
from gspo.checks.report import Check, Checks, at_most, between, each_at_most, exactly, mean_by_minibatch
from gspo.checks.worker import start_worker
from gspo.policy.log_probs import token_log_probs
from gspo.policy.model_loader import load_model
from gspo.policy.rollout import Sampling, TransformersEngine, encode_prompt
from gspo.training.alarms import stop_reason, warnings_of
from gspo.training.intervals import interval_text, paired_interval
from gspo_implementation import GSPOConfig, GSPOTrainer

PAPER_CLIP_FRACTIONS = {"gspo": 0.15, "grpo": 0.0013}  # of tokens, figure 2
# The ranges that part 4 compares, narrowest first, are these multiples of the paper's.
RANGE_FACTORS = {"too narrow": 0.01, "a third": 1 / 3, "paper": 1.0, "triple": 3.0, "too wide": 500.0}
PAPER_LEFT, PAPER_RIGHT = PAPER_CLIP_RANGES["gspo"]
CLIP_RANGES = {name: (factor * PAPER_LEFT, factor * PAPER_RIGHT) for name, factor in RANGE_FACTORS.items()}
LEAST_GAIN = 0.01  # of held-out pass@1, at the lower end of its 95 % interval
# A run without a signal may drift up by as much. One in a hundred does, a little, which the interval over
# problems does not know of (ten seeds of tiny: mean -.023, standard deviation .022).
MOST_CHANCE = 0.03
NOISE_RESPONSES = 64


@dataclass(frozen=True)
class Task:
    """What a run is trained on, and how much."""

    dataset: str
    num_batches: int
    batch_size: int  # queries per rollout batch
    mini_batch_size: int  # queries per optimizer update
    group_size: int  # responses per query
    max_new_tokens: int
    num_eval: int  # held-out problems; 0: no evaluation
    learning_rate: float | None = None  # None: the trainer's default
    dtype: str = "auto"
    device: str | None = None  # None: a GPU where there is one


# At the start, about a third of the tiny models' sampled responses to this task, sorting digits, are right.
SORTING = Task("sort", 16, 32, 8, 8, 26, 256, 5e-5, "float32", "cpu")
# Three rollout batches on another model show how its ratios move, not what it learns.
SHORT = Task("math", 3, 4, 1, 4, 32, 0)


@dataclass(frozen=True)
class Run:
    """One training run.

    rewards: "task" for the task's own, "shuffled" for those shuffled among the responses, or "checksum" for a
    checksum of the text.
    """

    model_name: str
    task: Task
    seed: int
    algorithm: str = "gspo"
    clip_ranges: tuple[float, float] | None = None  # None: the algorithm's
    rewards: str = "task"
    num_batches: int | None = None  # None: the task's


def train_once(run: Run) -> dict:
    """Train, then evaluate on held-out problems.

    Returns {"metrics": a dict for each rollout batch, "evaluation": a dict, or None if the task has none}.
    """
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
        metrics = []
        for start in range(0, task.batch_size * num_batches, task.batch_size):
            metrics.append(trainer.train_step(problems[start : start + task.batch_size]))
        evaluation = None
        if task.num_eval:
            trainer.reward_fn = compute_rewards
            held_out = load_problems(task.dataset, "eval", task.num_eval, run.seed)
            evaluation = trainer.evaluate(held_out)
        return {"metrics": metrics, "evaluation": evaluation}


def reward_function(run: Run) -> Callable:
    rng = random.Random(run.seed)

    def shuffled(problems: list, responses: list[str]) -> list[float | None]:
        rewards = compute_rewards(problems, responses)
        rng.shuffle(rewards)
        return rewards

    return {"task": compute_rewards, "shuffled": shuffled, "checksum": checksum_reward}[run.rewards]


class Runs:
    """Training runs in worker processes, by name. runs[name] waits for a result, or raises its error."""

    def __init__(self, runs: dict[str, Run], num_workers: int) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork of a process with OpenMP's threads may hang
        threads = max(1, (os.cpu_count() or 1) // num_workers)
        self.pool = ProcessPoolExecutor(num_workers, spawn, start_worker, (threads,))
        self.futures: dict[str, Future] = {
            name: self.pool.submit(train_once, run) for name, run in runs.items()
        }

    def wait(self, names: Iterable[str]) -> None:
        """Wait for the runs of these names, with a progress bar."""
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
        """Name and metrics of each run that ended without an error and took steps."""
        for name, future in self.futures.items():
            if not future.exception() and future.result()["metrics"]:
                yield name, future.result()["metrics"]

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------- part 2: dynamics


def movement_checks(gspo: Sequence[dict], grpo: Sequence[dict]) -> Checks:
    """Check how the ratios move in two runs from the same start, given one dict per rollout batch."""
    both = [*gspo, *grpo]
    first = max(fraction for m in both for fraction in m["clip_fraction_by_minibatch"][:1])
    yield exactly(
        "the first minibatch never clips, in either algorithm", first, 0.0, "largest clip fraction",
        "pi_old: the policy before the first update, by the forward passes that the update makes",
    )  # fmt: skip
    name = "the updates after it see a policy that has moved"
    spreads = [m["importance_ratio_std"] for m in both if m["zero_variance_groups"] <= MAX_TIED_GROUPS]
    if spreads:
        yield Check(
            name, min(spreads) > 0, f"smallest spread of ratios {min(spreads):.2g}", "more than 0",
            "pi_old is refreshed between the minibatches, or weights do not move",
        )  # fmt: skip
    else:
        yield Check(name, None, TIED, "")
    for name, metrics, allowed in (("gspo", gspo, 0.02), ("grpo", grpo, 0.1)):
        farthest = max((m["importance_ratio_mean"] for m in metrics), key=_distance_from_1)
        yield between(
            f"{name}: ratios stay near 1", farthest, 1 - allowed, 1 + allowed, "farthest mean",
            "the length normalisation of the ratio, learning rate",
        )  # fmt: skip
    yield each_at_most(
        "log-probs taken twice without an update, nothing clips",
        {"gspo": largest_null_clip_fraction(gspo), "grpo": largest_null_clip_fraction(grpo)}, 1e-3,
        "null clip fraction", "the compute type: --dtype float32",
    )  # fmt: skip
    infinite = sorted({name for m in both for name, value in m.items() if not _finite(value)})
    yield exactly("all figures are finite", infinite, [], "the others:", "the loss and its gradient")
    yield exactly(
        "gspo: no alarm was raised", sorted(set(_alarms(gspo))), [], "alarms:", "learning rate, ratio"
    )  # fmt: skip


def clipping_checks(gspo: Sequence[dict], grpo: Sequence[dict]) -> Checks:
    """Check how much the same two runs clip, which is where the two algorithms differ most."""
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


def _finite(value: float | list[float]) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(map(math.isfinite, values))


def _alarms(metrics: Sequence[dict]) -> Iterator[str]:
    """Every warning and every reason to stop that the run would have had, batch by batch."""
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
    return paired_interval(_pass_rates(before), _pass_rates(after))


def _pass_rates(evaluations: Sequence[dict]) -> list[float]:
    return [rate for evaluation in evaluations for rate in evaluation["pass_by_problem"]]


def performance_checks(before: Sequence[dict], after: Sequence[dict], control: Sequence[dict]) -> Checks:
    """Check what training gained, given one evaluation per seed.

    They are from before training, from after it, and from after training on shuffled rewards.
    """
    yield _lower_end(
        "gspo raises held-out pass@1", gain(before, after), LEAST_GAIN, True,
        "the sign of the loss, advantages, or weights that do not move",
    )  # fmt: skip
    yield _lower_end(
        "with rewards shuffled among the responses it does not", gain(before, control), MOST_CHANCE, False,
        "the evaluation: an improvement without a signal is not learning",
    )  # fmt: skip
    yield _lower_end(
        "gspo is ahead of that control", gain(control, after), LEAST_GAIN, True,
        "rewards that do not reach the loss",
    )  # fmt: skip


def _lower_end(
    name: str, interval: tuple[float, float, float], bound: float, above: bool, fault: str
) -> Check:
    """A check that the lower end of a gain's interval is above the bound, or that it is not."""
    mean, low, high = interval
    measured = f"{mean:+.3f} ({interval_text(low, high)})"
    where = "above" if above else "not above"
    return Check(name, (low > bound) == above, measured, f"lower end {where} {bound:+g}", fault)


def performance_table(evaluations: dict[str, Sequence[dict]]) -> list[dict]:
    """One row per run, from its evaluations over the seeds. Gains are over the first run."""
    before = next(iter(evaluations.values()))
    rows = []
    for name, after in evaluations.items():
        pass_at_1 = fmean(e["pass_at_1"] for e in after)
        rows.append({"run": name, "pass@1": pass_at_1, **gain_columns(before, after)})
    return rows


def gain_columns(before: Sequence[dict], after: Sequence[dict]) -> dict:
    mean, low, high = gain(before, after)
    interval = f"{low:+.3f} to {high:+.3f}" if low < high else "none"
    return {"gain": f"{mean:+.3f}", "95 % interval": interval}


# ---------------------------------------------------------------------------------------- part 4: clip ranges


def clip_range_checks(metrics: dict[str, Sequence[dict]]) -> Checks:
    """Check how much is clipped, given the metrics of a run with each range, narrowest first."""
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
    """One row per range, from the evaluation before training and the result of the run with that range."""
    rows = []
    for name in CLIP_RANGES:
        metrics, evaluation = results[name]["metrics"], results[name]["evaluation"]
        rows.append(
            {
                "clip range": _range_label(name),
                **gain_columns([before], [evaluation]),
                "clipped tokens": fmean(m["clip_fraction"] for m in metrics),
                "ratio's standard deviation": fmean(m["importance_ratio_std"] for m in metrics),
            }
        )
    return rows


def _range_label(name: str) -> str:
    left, right = CLIP_RANGES[name]
    return f"{name}: {left:.3g}, {right:.3g}"


def precision_noise(
    model: torch.nn.Module, tokenizer: Any, problems: Sequence, max_new_tokens: int, device: str
) -> dict[str, list[tuple[float, int]]]:
    """How far the ratio of each response is from 1 with no update at all.

    There are two sources of noise for each compute type: computing the log-probabilities of the same
    responses again, and taking the sampler's own log-probabilities for pi_old.

    Returns a dict from the source of noise to (ratio, number of tokens) of each response.
    """
    group_size = max(2, NOISE_RESPONSES // len(problems))
    prompts = [encode_prompt(tokenizer, problem.prompt) for problem in problems]
    noise = {}
    for dtype in DTYPES:
        autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")
        with torch.no_grad(), autocast:
            engine = TransformersEngine(model, tokenizer)
            rollouts = engine.generate(prompts, group_size, Sampling(max_new_tokens))
            prompt_ids = [r.prompt_ids for r in rollouts]
            response_ids = [r.response_ids for r in rollouts]
            first = token_log_probs(model, prompt_ids, response_ids)
            again = token_log_probs(model, prompt_ids, response_ids)
        sampled = [torch.tensor(r.log_probs) for r in rollouts]
        noise[f"{dtype}, computed again"] = _ratios(first, again)
        noise[f"{dtype}, sampler's own"] = _ratios(first, sampled)
    return noise


def _ratios(
    log_probs: Sequence[torch.Tensor], old_log_probs: Sequence[torch.Tensor]
) -> list[tuple[float, int]]:
    """(importance ratio, number of tokens) of each response."""
    ratios = []
    for new, old in zip(log_probs, old_log_probs, strict=True):
        ratios.append(((new.cpu() - old.cpu()).mean().exp().item(), len(new)))
    return ratios


def share_outside(ratios: Sequence[tuple[float, int]], left: float, right: float) -> float:
    """Null clip fraction: the share of tokens in responses whose ratio is outside without any update."""
    outside = sum(tokens for ratio, tokens in ratios if not 1 - left <= ratio <= 1 + right)
    return outside / sum(tokens for _, tokens in ratios)


def precision_table(noise: dict[str, list[tuple[float, int]]]) -> list[dict]:
    rows = []
    for name, clip_range in CLIP_RANGES.items():
        shares = {source: share_outside(ratios, *clip_range) for source, ratios in noise.items()}
        rows.append({"clip range": _range_label(name), **shares})
    return rows


def precision_checks(noise: dict[str, list[tuple[float, int]]]) -> Checks:
    for source, ratios in noise.items():
        if "again" in source:
            share = share_outside(ratios, *CLIP_RANGES["paper"])
            yield at_most(
                f"the paper's range holds the noise of {source}", share, 0.01, "null clip fraction",
                "the model's arithmetic, which is not the same twice",
            )  # fmt: skip
