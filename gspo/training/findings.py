"""Findings about groups of responses sampled with a run's settings: each names an obstacle to learning.

figures_of() counts, findings() judges the counts. Both are pure functions. The probe (--probe) reads them
before training, a run reads them once about its first rollout batches.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gspo.training.alarms import WINDOW
from gspo.training.config import GSPOConfig
from gspo.training.intervals import wilson_interval

if TYPE_CHECKING:
    from gspo.training.rollout_batch import Sample

# Too hard, too easy: this share of the groups.
NEARLY_ALL = 0.9
# A mean reward up to this is as good as none.
NEARLY_NOTHING = 0.05
# Under this many groups nothing is said about shares of them.
MIN_GROUPS = 8
# Groups without a signal are enough to judge by if the share with one is below this, with 95 % confidence:
# that takes 16 groups.
HIGHEST_SIGNAL_SHARE = 0.2
# Cut off: this share of the responses. From the second on, too few ended to tell whether the problems are too
# hard as well.
TRUNCATED_SHARE, MOST_TRUNCATED = 0.25, 0.9
# An answer of up to this many characters, on one line, is looked for in the responses that earned nothing. Of
# a longer one, such as a program, nothing follows.
SHORT_ANSWER = 40
# Form: so much larger is the share of these responses with their own answer than with another problem's, and
# so many are they.
ANSWER_SHARE, MIN_WITH_ANSWER = 0.2, 10
# Noise: tokens outside the clip range, and the spread at which three standard deviations leave it.
NOISY_TOKENS, NOISE_SPREAD = 0.01, 1 / 3
# Hours from which a run counts as slow.
SLOW_HOURS = 24.0


@dataclass(frozen=True)
class Figures:
    """Counts over some groups of responses; and what the probe measures besides, which a run leaves out.

    groups, responses: how many there are.
    with_signal: groups with a signal. all_right, all_wrong: groups in which every, no judged response passed.
    reward_mean: over the judged responses; NaN if there are none.
    only_reward: what every judged response earned; None if they differ, or if there are none.
    only_reward_passes: whether that is a pass.
    truncated: responses cut before their end token. truncated_rewarded: those of them with a reward above 0.
        truncated_by: the setting that cut most of them.
    answerable: responses that earned nothing, to problems with a short answer that is not in the prompt.
    with_answer: those of them in which the answer stands. with_other_answer: those in which, on average, the
        answer of another problem stands: how often it does so by accident.
    dropped_problems: training problems whose prompts leave no room, of num_problems.
    failure: the first failure of the reward function as text.
    null_clip_fraction, noise_spread: see probe.Passes.
    hours: that the run will take.
    """

    groups: int
    responses: int
    with_signal: int
    all_right: int
    all_wrong: int
    reward_mean: float
    only_reward: float | None
    only_reward_passes: bool
    unjudged: int
    tokens_mean: float
    tokens_longest: int
    truncated: int
    truncated_rewarded: int
    truncated_by: str
    answerable: int
    with_answer: int
    with_other_answer: float
    has_chat_template: bool
    max_length: int
    max_new_tokens: int | None
    dropped_problems: int = 0
    num_problems: int = 0
    failure: str | None = None
    null_clip_fraction: float = 0.0
    noise_spread: float = 0.0
    hours: float = 0.0

    @property
    def signal_interval(self) -> tuple[float, float]:
        """The 95 % interval of the share of groups with a signal."""
        return wilson_interval(self.with_signal / self.groups, self.groups)

    @property
    def hardly_any_signal(self) -> bool:
        return self.with_signal <= (1 - NEARLY_ALL) * self.groups

    @property
    def is_constant(self) -> bool:
        """True if every judged response earned the same, which is neither a pass nor nothing."""
        return self.only_reward is not None and self.only_reward > 0 and not self.only_reward_passes

    @property
    def is_in_vain(self) -> bool:
        """True if a run with these settings would learn nothing."""
        no_signal = self.with_signal == 0 and self.signal_interval[1] < HIGHEST_SIGNAL_SHARE
        return no_signal or self.unjudged == self.responses or self.is_constant


@dataclass(frozen=True)
class Finding:
    """Something that stands in the way of learning, and a sentence on what to do."""

    name: str
    message: str

    def __str__(self) -> str:
        return f"{self.name}: {self.message}"


def has_signal(group: Sequence["Sample"], config: GSPOConfig) -> bool:
    """True if a run with these settings would learn from the group."""
    from gspo.training.dynamic_sampling import keeps  # here, since it imports torch and gspo.report does not

    return keeps(group, "pass" if config.dynamic_sampling == "pass" else "reward")


def figures_of(samples: Sequence["Sample"], config: GSPOConfig, has_chat_template: bool) -> Figures:
    """Count what the samples of whole groups are like; config: the resolved one they were made with."""
    size = config.group_size
    groups = [samples[i : i + size] for i in range(0, len(samples), size)]
    passes = [{sample.passed for sample in group if sample.reward is not None} for group in groups]
    judged = [sample for sample in samples if sample.reward is not None]
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    is_same = len(set(rewards)) == 1
    truncated = [sample for sample in samples if not sample.rollout.finished]
    at_most_new = [sample for sample in truncated if sample.num_tokens == config.max_new_tokens]
    lengths = [sample.num_tokens for sample in samples]
    answerable, with_answer, with_other_answer = _count_answers(judged)
    return Figures(
        groups=len(groups),
        responses=len(samples),
        with_signal=sum(has_signal(group, config) for group in groups),
        all_right=passes.count({True}),
        all_wrong=passes.count({False}),
        reward_mean=sum(rewards) / len(rewards) if rewards else math.nan,
        only_reward=rewards[0] if is_same else None,
        only_reward_passes=is_same and judged[0].passed,
        unjudged=len(samples) - len(judged),
        tokens_mean=sum(lengths) / len(lengths),
        tokens_longest=max(lengths),
        truncated=len(truncated),
        truncated_rewarded=sum((sample.reward or 0) > 0 for sample in truncated),
        truncated_by="max_new_tokens" if 2 * len(at_most_new) >= len(truncated) else "max_length",
        answerable=answerable,
        with_answer=with_answer,
        with_other_answer=with_other_answer,
        has_chat_template=has_chat_template,
        max_length=config.max_length,
        max_new_tokens=config.max_new_tokens,
    )


def findings(figures: Figures) -> list[Finding]:
    """What the figures say stands in the way of learning; empty where nothing does."""
    f, found = figures, []

    def add(name: str, message: str) -> None:
        found.append(Finding(name, message))

    if f.unjudged:
        failure = f"; the first failure: {f.failure.strip().splitlines()[-1]}" if f.failure else ""
        add(
            "unjudged",
            f"{f.unjudged} of {f.responses} responses have no reward, since the reward function failed or "
            f"could not judge them: repair it, or leave such problems out{failure}",
        )
    if f.is_constant:
        add(
            "constant reward",
            f"every judged response earned {f.only_reward:.4g}, whatever it says: look at the reward "
            "function, which does not tell right answers from wrong ones",
        )
    is_cut_off = (
        f.truncated >= TRUNCATED_SHARE * f.responses
        and f.truncated_rewarded <= NEARLY_NOTHING * f.truncated
        and f.unjudged < f.responses
    )
    if is_cut_off:
        limit = f.max_length if f.truncated_by == "max_length" else f.max_new_tokens
        add(
            "cut off",
            f"{_share(f.truncated, f.responses)} of the responses were cut before their end, and "
            f"{_share(f.truncated_rewarded, f.truncated)} of these earned a reward: raise "
            f"--{f.truncated_by} (now {limit}), or ask for short answers in the prompt",
        )
    has_other_form = (
        f.with_answer >= MIN_WITH_ANSWER
        and f.with_answer - f.with_other_answer >= ANSWER_SHARE * f.answerable
    )
    if has_other_form:
        add(
            "form",
            f"the reference answer stands in {f.with_answer} of {f.answerable} responses that earned "
            "nothing: right answers may have another form than the reward reads; say in the prompt how to "
            "write the answer, or change the reward function",
        )
    is_explained = has_other_form or (is_cut_off and f.truncated >= MOST_TRUNCATED * f.responses)
    enough = f.groups >= MIN_GROUPS
    too_hard = f.all_wrong >= NEARLY_ALL * f.groups and f.reward_mean <= NEARLY_NOTHING
    too_easy = f.all_right >= NEARLY_ALL * f.groups
    if enough and f.hardly_any_signal and too_hard and not is_explained:
        add(
            "too hard",
            f"{f.all_wrong} of {f.groups} groups have no right response: use an easier --difficulty or "
            "easier problems, a stronger model, a larger --group_size, or a reward that pays for a part of "
            "the answer",
        )
    if enough and too_easy:
        add(
            "too easy",
            f"{f.all_right} of {f.groups} groups have only right responses: use a harder --difficulty or "
            "harder problems; --dynamic_sampling passes over groups without a signal",
        )
    has_cause = f.unjudged or f.is_constant or is_cut_off or has_other_form or too_hard or too_easy
    if enough and f.hardly_any_signal and not has_cause:
        add(
            "tied groups",
            f"{f.with_signal} of {f.groups} groups have a signal, though not all are right and not all are "
            "wrong: the responses to a problem hardly differ in reward; raise --temperature or --group_size",
        )
    if f.dropped_problems:
        add(
            "no room",
            f"{f.dropped_problems} of {f.num_problems} training problems were dropped, since their prompts "
            f"leave no room for a response: raise --max_length (now {f.max_length}), or shorten the prompts",
        )
    if f.null_clip_fraction > NOISY_TOKENS or f.noise_spread > NOISE_SPREAD:
        add(
            "noise",
            "log-probabilities computed twice with the same weights differ by "
            f"{f.noise_spread:.2g} clip ranges (standard deviation), and {f.null_clip_fraction:.0%} of the "
            "tokens leave the clip range without an update: use --dtype float32, or widen "
            "--left_clip_range and --right_clip_range",
        )
    if not f.has_chat_template:
        add(
            "no chat template",
            'the tokenizer has none, so a prompt stands between "Question: " and "Answer:", which suits a '
            "base model: for one that was tuned to follow instructions, use a tokenizer with its template",
        )
    if f.hours > SLOW_HOURS:
        add(
            "slow",
            f"the run would take about {f.hours:.0f} hours: fewer problems (--num_train_samples, "
            "--num_eval_samples), shorter responses (--max_new_tokens), a smaller model or a GPU help",
        )
    return found


class FirstBatches:
    """The samples of a run's first WINDOW rollout batches, about which it says once what was found.

    A run that is resumed in between has only the samples since then.
    """

    def __init__(self, config: GSPOConfig, has_chat_template: bool):
        self.config, self.has_chat_template = config, has_chat_template
        self._samples: list[Sample] = []

    def add(self, step: int, samples: Sequence["Sample"]) -> list[Finding]:
        """Take in the samples of rollout batch number `step`; return the findings after the last of them."""
        if step > WINDOW:
            return []
        self._samples += samples
        if step < WINDOW:
            return []
        found = findings(figures_of(self._samples, self.config, self.has_chat_template))
        self._samples = []
        return found


def _count_answers(judged: Sequence["Sample"]) -> tuple[int, int, float]:
    """Figures.answerable, with_answer and with_other_answer of the judged samples."""
    answers = {id(sample.problem): _short_answer(sample.problem) for sample in judged}
    other_answers = sorted({answer for answer in answers.values() if answer})
    answerable = with_answer = 0
    with_other_answer = 0.0
    for sample in judged:
        answer = answers[id(sample.problem)]
        earned = sample.passed or (sample.reward or 0) > 0
        if earned or not answer:
            continue
        answerable += 1
        with_answer += _stands_in(answer, sample.rollout.text)
        others = [_stands_in(other, sample.rollout.text) for other in other_answers if other != answer]
        with_other_answer += sum(others) / max(len(others), 1)
    return answerable, with_answer, with_other_answer


def _short_answer(problem: object) -> str:
    """The problem's answer if it is short text that is not in the prompt, else ""."""
    answer = getattr(problem, "answer", None)
    if not isinstance(answer, str):
        return ""
    answer = answer.strip()
    is_short = len(answer) <= SHORT_ANSWER and "\n" not in answer
    return answer if is_short and not _stands_in(answer, str(getattr(problem, "prompt", ""))) else ""


def _stands_in(answer: str, text: str) -> bool:
    """True if the answer stands in the text by itself: 7 does not in 17, 7.5 or 1,700."""
    pattern = rf"(?<![\w.,]){re.escape(answer.casefold())}(?!\w|[.,]\d)"
    return re.search(pattern, text.casefold()) is not None


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.0%}"
