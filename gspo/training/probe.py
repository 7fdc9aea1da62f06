"""Sample some groups with a run's own settings, before any training, and say whether training can work.

    python train_gspo.py --probe [any other flag]

It samples as the run would: the same problems in the same order, from the same random streams. No optimizer
step is made, and nothing is written.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from gspo.live_line import Bar
from gspo.printing import escaped
from gspo.training.config import GSPOConfig
from gspo.training.findings import Figures, figures_of, findings, has_signal
from gspo.training.rollout_batch import Sample, mean_parts
from gspo.training.training_run import drop_long_prompts, epoch_order

# So many queries are enough if one of their groups has a signal. Otherwise, twice as many are sampled.
ENOUGH_QUERIES = 16
# Characters of a prompt or response that are shown.
SHOWN_CHARACTERS = 1200


@dataclass(frozen=True)
class Sampled:
    """Rewarded samples of some queries, groups contiguous.

    sums: the sums that came with the rewards (reward_fn.metrics).
    response_s: seconds to sample and reward one response.
    """

    samples: list[Sample]
    sums: dict[str, float]
    response_s: float


@dataclass(frozen=True)
class Passes:
    """What the passes through the model over one minibatch showed, of which no update was made.

    null_clip_fraction: as in record.GLOSSARY.
    noise_spread, noise_max: root mean square and largest movement (Algorithm.movement) between pi_old, which
        a pass without gradients or the sampler gives, and a pass with them, at the same weights; in units of
        the mean clip range.
    log_prob_s, update_s: seconds per response token of a forward pass, and of a forward and backward pass.
    """

    null_clip_fraction: float
    noise_spread: float
    noise_max: float
    log_prob_s: float
    update_s: float


def probe_training(trainer: Any, train_problems: Sequence, eval_problems: Sequence) -> int:
    """Sample, measure, and print a table and a paragraph; collective.

    Args:
        trainer: a GSPOTrainer that has not trained.

    Returns:
        The exit code: 1 where training would be in vain, else 0.

    Raises:
        ValueError: no problem's prompt leaves room for a response.
        EmergencyStop: a log-probability or a reward is not finite.
    """
    config = trainer.config
    kept = drop_long_prompts(train_problems, trainer.encode, config, "training")
    eval_kept = drop_long_prompts(eval_problems, trainer.encode, config, "evaluation")
    sampled = sample_groups(trainer, kept)
    trainer._tell_engine("rest")
    passes = measure_passes(trainer, sampled.samples)
    figures = figures_of(sampled.samples, config, trainer.tokenizer.chat_template is not None)
    seconds = run_seconds(config, figures, sampled, passes, len(kept), len(eval_kept))
    failures = trainer.processes.gather([getattr(trainer.reward_fn, "failure", None)])
    figures = replace(
        figures,
        dropped_problems=len(train_problems) - len(kept),
        num_problems=len(train_problems),
        failure=next((failure for failure in failures if failure), None),
        null_clip_fraction=passes.null_clip_fraction,
        noise_spread=passes.noise_spread,
        hours=sum(seconds.values()) / 3600,
    )
    rows = [f"{name:28}{value}" for name, value in table(figures, sampled, passes, seconds)]
    parts = [examples(sampled.samples, config, trainer.tokenizer), "\n".join(rows), verdict(figures)]
    if figures.failure:
        parts.append(f"The first failure of the reward function:\n{shown(figures.failure)}")
    # The others wait: if they ended first, with exit code 1, their launcher would kill the one that prints.
    trainer.processes.on_main(lambda: print("\n\n".join(parts), flush=True))
    return 1 if figures.is_in_vain else 0


# ---- measuring


def sample_groups(trainer: Any, problems: Sequence) -> Sampled:
    """Sample and reward the first queries of the run, in its rollout batches, without training in between."""
    config = trainer.config
    order = epoch_order(config.seed, 0, len(problems))
    queries = [problems[place] for place in order[: 2 * ENOUGH_QUERIES]]
    samples: list[Sample] = []
    sums: dict[str, float] = {}
    response_seconds = []
    with Bar(len(queries), "probing", "queries") as bar:
        for index, start in enumerate(range(0, len(queries), config.batch_size)):
            if start >= ENOUGH_QUERIES and not is_undecided(samples, config):
                break
            chunk = queries[start : start + config.batch_size]
            stream = (config.seed << 64) + (index << 32)  # as in GSPOTrainer.collect()
            more, metrics = trainer._sample_and_reward(chunk, stream, config.group_size, config.temperature)
            samples += more
            response_seconds.append((metrics.pop("generation_s") + metrics.pop("reward_s")) / len(more))
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0) + value
            bar.update(len(chunk))
    # The first batch starts the workers that give rewards, and warms up a GPU.
    return Sampled(samples, sums, fmean(response_seconds[1:] or response_seconds))


def is_undecided(samples: Sequence[Sample], config: GSPOConfig) -> bool:
    """True if more groups would tell more: there are rewards, and no group has a signal yet."""
    size = config.group_size
    groups = [samples[i : i + size] for i in range(0, len(samples), size)]
    is_judged = any(sample.reward is not None for sample in samples)
    return is_judged and not any(has_signal(group, config) for group in groups)


def measure_passes(trainer: Any, samples: Sequence[Sample]) -> Passes:
    """Log-probabilities and a gradient over one minibatch, of groups with a signal if there are any."""
    config, processes = trainer.config, trainer.processes
    size = config.group_size
    groups = [samples[i : i + size] for i in range(0, len(samples), size)]
    groups.sort(key=lambda group: not has_signal(group, config))  # stable: those with a signal come first
    # Every response takes part, as the responses of a group with a signal do.
    minibatch = [
        replace(sample, advantage=1.0, has_signal=True)
        for group in groups[: config.mini_batch_size]
        for sample in group
    ]
    num_tokens = sum(sample.num_tokens for sample in minibatch)
    for sample, log_probs in trainer.forward.all_log_probs(trainer.model, [minibatch]):
        sample.old_log_probs = sample.sampled_log_probs if config.pi_old == "sampler" else log_probs
    if trainer.config.kl_coef:
        with trainer.weights.starting_model() as reference:
            pairs = trainer.forward.all_log_probs(reference, [minibatch])
        for sample, log_probs in pairs:
            sample.reference_log_probs = log_probs
    started = time.perf_counter()
    null_clip_fraction = trainer._null_clip_fraction([minibatch])
    log_prob_s = time.perf_counter() - started
    started = time.perf_counter()
    _, computed = trainer.forward.retry(lambda: trainer._backward(minibatch), minibatch)
    update_s = time.perf_counter() - started
    trainer.optimizer.zero_grad()
    moved = []
    for row, log_probs in processes.gather(computed):
        old_log_probs = minibatch[row].old_log_probs
        assert old_log_probs is not None
        moved.append(trainer.algorithm.movement(log_probs, old_log_probs))  # (1,) or (|y|,)
    in_clip_ranges = torch.cat(moved) / config.mean_clip_range
    return Passes(
        null_clip_fraction,
        in_clip_ranges.square().mean().sqrt().item(),
        in_clip_ranges.abs().max().item(),
        log_prob_s / num_tokens,
        update_s / num_tokens,
    )


def run_seconds(
    config: GSPOConfig, figures: Figures, sampled: Sampled, passes: Passes, num_train: int, num_eval: int
) -> dict[str, float]:
    """Estimate the seconds of a run over num_train and num_eval problems, by part; without optimizer steps.

    It assumes that the responses keep their length and the groups their share with a signal.
    """
    responses = config.num_epochs * num_train * config.group_size
    num_batches, num_updates = config.count_updates(num_train)
    has_gradient = 1.0 if config.kl_coef else figures.with_signal / figures.groups
    tokens = has_gradient * responses * figures.tokens_mean
    # The first update after pi_old is refreshed needs no log-probabilities beforehand.
    num_windows = math.ceil(num_batches / config.update_frequency)
    passes_before = 0.0 if config.pi_old == "sampler" else 1 - num_windows / num_updates
    passes_before += config.kl_coef > 0
    evaluations = 2 + ((num_batches - 1) // config.eval_frequency if config.eval_frequency else 0)
    eval_responses = evaluations * num_eval * (config.eval_samples or config.group_size)
    return {
        "sampling": responses * sampled.response_s,
        "log-probabilities": tokens * passes_before * passes.log_prob_s,
        "updates": tokens * passes.update_s,
        f"{evaluations} evaluations": eval_responses * sampled.response_s,
    }


# ---- printing


def table(
    figures: Figures, sampled: Sampled, passes: Passes, seconds: dict[str, float]
) -> list[tuple[str, str]]:
    """Pairs of a name and a text."""
    f = figures
    low, high = f.signal_interval
    unjudged = f"{f.unjudged} of {f.responses}"
    sums = dict(sampled.sums)
    if "code_timeouts" in sums:
        unjudged += f"; {sums.pop('code_timeouts'):.0f} programs timed out"
    *training, _ = seconds.values()
    run_tokens = f.tokens_mean * seconds["sampling"] / sampled.response_s
    parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
    return [
        ("reward mean", f"{f.reward_mean:.3f}"),
        *[(name, f"{mean:.3f}") for name, mean in mean_parts(sampled.samples).items()],
        *[(f"{name} per response", f"{value / f.responses:.3g}") for name, value in sums.items()],
        (
            "groups with a signal",
            f"{f.with_signal} of {f.groups}  (95 % interval of the share {low:.0%} to {high:.0%})",
        ),
        ("groups all right", f"{f.all_right} of {f.groups}"),
        ("groups all wrong", f"{f.all_wrong} of {f.groups}"),
        ("response tokens", f"mean {f.tokens_mean:.1f}, longest {f.tokens_longest}"),
        ("truncated responses", f"{f.truncated / f.responses:.1%}"),
        ("unjudged responses", unjudged),
        (
            "response tokens per s",
            f"{f.tokens_mean / sampled.response_s:.0f} in sampling with rewards, "
            f"{run_tokens / sum(training):.0f} in training",
        ),
        ("time of the run", f"about {duration(sum(seconds.values()))}: {parts}"),
        (
            "noise",
            f"null clip fraction {f.null_clip_fraction:.2g}; log-ratios of two passes "
            f"{f.noise_spread:.2g} clip ranges (root mean square), at most {passes.noise_max:.2g}",
        ),
    ]


def verdict(figures: Figures) -> str:
    """Whether training can work, and what was found, in a paragraph."""
    f = figures
    low, high = f.signal_interval
    interval = f"95 % interval of the share {low:.0%} to {high:.0%}"
    if f.unjudged == f.responses:
        sentence = "Training would be in vain: no response could be judged."
    elif f.is_constant:
        sentence = "Training would be in vain: the reward is the same for every response."
    elif f.is_in_vain:
        sentence = f"Training would be in vain: of {f.groups} groups sampled, none has a signal ({interval})."
    elif f.with_signal == 0:
        sentence = (
            f"Too few groups to tell: of {f.groups} sampled, none has a signal ({interval}); "
            "raise --num_train_samples."
        )
    elif f.hardly_any_signal:
        sentence = (
            "This model would learn little from this task with these settings: only "
            f"{f.with_signal} of {f.groups} groups sampled have a signal ({interval})."
        )
    else:
        sentence = (
            f"This model can learn from this task with these settings: {f.with_signal} of {f.groups} groups "
            f"have a signal ({interval})."
        )
    return " ".join([sentence, *[f"{str(finding)[0].upper()}{str(finding)[1:]}." for finding in findings(f)]])


def examples(samples: Sequence[Sample], config: GSPOConfig, tokenizer: Any) -> str:
    """A prompt as the model sees it, and the best and the worst response of the group that differs most."""
    size = config.group_size
    groups = [samples[i : i + size] for i in range(0, len(samples), size)]

    def reward(sample: Sample) -> float:
        return -math.inf if sample.reward is None else sample.reward

    def spread(group: Sequence[Sample]) -> float:
        rewards = [sample.reward for sample in group if sample.reward is not None]
        return max(rewards) - min(rewards) if rewards else -1.0

    group = max(groups, key=spread)
    prompt = tokenizer.decode(group[0].rollout.prompt_ids, skip_special_tokens=False)
    texts = ["A prompt, as the model sees it:", shown(prompt)]
    for kind, sample in ("best", max(group, key=reward)), ("worst", min(group, key=reward)):
        earned = "not judged" if sample.reward is None else f"reward {sample.reward:.4g}"
        end = "" if sample.rollout.finished else ", cut off"
        texts.append(f"\nThe {kind} of {size} responses to it ({earned}, {sample.num_tokens} tokens{end}):")
        texts.append(shown(sample.rollout.text))
    return "\n".join(texts)


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def shown(text: str) -> str:
    """The text indented, its middle left out if it is long, and without characters that move the cursor."""
    if len(text) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        text = f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"
    return "\n".join(f"    {line}" for line in escaped(text, keep="\n").split("\n"))
