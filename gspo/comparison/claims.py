"""Read the paper's claims off the comparisons of `--preset paper`, and print them as a table.

    python -m gspo.comparison.claims gspo_outputs/paper/paper.json        the table of README, in Markdown

The readers are pure functions of a comparison's result and outcomes.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from gspo.comparison.differences import Difference, mean_interval, paired_difference
from gspo.comparison.outcomes import Outcome
from gspo.comparison.table import AREA, FINAL
from gspo.training.intervals import paired_interval

HOLDS, FAILS, UNSEEN = "yes", "no", "not seen here"
Arms = Mapping[str, Sequence[Outcome]]


@dataclass(frozen=True)
class Claim:
    """A row of the table of claims.

    paper: what the paper says. measured: what was measured here, in words. holds: HOLDS, FAILS or UNSEEN.
    """

    claim: str
    paper: str
    measured: str
    holds: str


# ---- what is read in each comparison


def _difference(result: Mapping[str, Any], of: str, measure: str) -> dict:
    """The difference between a setting and the one it is compared with."""
    return next(each for each in result["differences"] if (each["of"], each["measure"]) == (of, measure))


def _in_words(difference: Mapping[str, Any], sign: int = 1) -> str:
    """The mean and the interval; sign -1: of the difference the other way round."""
    if difference.get("low") is None:
        return "nothing to compare"
    # Adding 0.0 makes 0.0 of -0.0.
    mean, *ends = (sign * difference[name] + 0.0 for name in ("mean", "low", "high"))
    low, high = sorted(ends)
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def _holds(difference: Mapping[str, Any], sign: int = 1) -> str:
    """Whether the difference has this sign: yes, no (it is seen, and has the other), or not seen here."""
    if not difference.get("is_seen"):
        return UNSEEN
    return HOLDS if sign * difference["mean"] > 0 else FAILS


def _is_worse(difference: Mapping[str, Any], sign: int = 1) -> bool:
    return _holds(difference, sign) == FAILS


def _is_nothing(difference: Mapping[str, Any]) -> str:
    """Whether the whole interval is within the size of a difference that was to be detected."""
    if difference.get("is_seen"):
        return FAILS
    if difference.get("low") is None or difference["num_seeds"] < 2:
        return UNSEEN
    return HOLDS if max(-difference["low"], difference["high"]) < difference["detect"] else UNSEEN


def read_curves(result: Mapping[str, Any], arms: Arms) -> list[Claim]:
    comfortable, *higher = [label.removeprefix("GSPO at ") for label in arms if label.startswith("GSPO at ")]
    area = _difference(result, f"GRPO at {comfortable}", AREA)
    final = _difference(result, f"GRPO at {comfortable}", FINAL)
    token = _difference(result, f"GSPO-token at {comfortable}", FINAL)
    claims = [
        Claim(
            "more reward than GRPO at equal compute (figure 1)",
            "GSPO is ahead throughout",
            f"learning rate {comfortable}: GSPO - GRPO in area under the curve {_in_words(area, -1)}, "
            f"in final pass@1 {_in_words(final, -1)}",
            _holds(area, -1),
        ),
        Claim(
            "GSPO-token with one advantage per response is GSPO (section 4.3)",
            "same objective, same gradient",
            f"learning rate {comfortable}: final pass@1, GSPO-token - GSPO {_in_words(token)}",
            _is_nothing(token),
        ),
    ]
    told = "; ".join(
        f"at {rate}, {_broken_in_words('GSPO', arms[f'GSPO at {rate}'])}, "
        f"{_broken_in_words('GRPO', arms[f'GRPO at {rate}'])}"
        for rate in higher
    )
    pairs = [(_broken(arms[f"GSPO at {rate}"]), _broken(arms[f"GRPO at {rate}"])) for rate in higher]
    better = any(gspo == 0 and grpo > 0.5 for gspo, grpo in pairs)
    worse = any(grpo == 0 and gspo > 0.5 for gspo, grpo in pairs)
    claims.append(
        Claim(
            "stable where GRPO is not (section 5.1)",
            "GSPO trains on, GRPO may collapse",
            f"runs that broke, by a stop or by a fall of pass@1 beyond chance: {told}",
            UNSEEN if better == worse else HOLDS if better else FAILS,
        )
    )
    return claims


def _broken(outcomes: Sequence[Outcome]) -> float:
    """The share of runs that were stopped, or whose pass@1 fell from their start by more than chance."""
    return fmean(bool(outcome.died) or _has_fallen(outcome) for outcome in outcomes)


def _has_fallen(outcome: Outcome) -> bool:
    first, last = outcome.run.evaluations[0], outcome.run.evaluations[-1]
    if len(first["pass_by_problem"]) < 2:
        return False
    return paired_interval(first["pass_by_problem"], last["pass_by_problem"])[2] < 0


def _broken_in_words(name: str, outcomes: Sequence[Outcome]) -> str:
    final = fmean(outcome.run.evaluations[-1]["pass_at_1"] for outcome in outcomes)
    stopped = sum(bool(outcome.died) for outcome in outcomes)
    broken = round(_broken(outcomes) * len(outcomes))
    return f"{name} {broken} of {len(outcomes)} ({stopped} stopped, final pass@1 {final:.2f})"


def read_clipping(result: Mapping[str, Any], arms: Arms) -> list[Claim]:
    by_seed = [
        {outcome.cell.index: outcome.mean("clip_fraction") or 0.0 for outcome in arms[name]}
        for name in ("GSPO", "GRPO")
    ]
    common = sorted(set(by_seed[0]) & set(by_seed[1]))
    gspo, grpo = ([shares[i] for i in common] for shares in by_seed)
    times, low, high = "", 0.0, math.inf
    if all(gspo) and all(grpo):
        mean, lower, upper = mean_interval([math.log(a / b) for a, b in zip(gspo, grpo, strict=True)])
        times = f": {math.exp(mean):.0f} times"
        if lower is not None and upper is not None:
            low, high = math.exp(lower), math.exp(upper)
            times += f" ({low:.0f} to {high:.0f})"
    shares = {name: _by_minibatch(arms[name], "clip_fraction_by_minibatch") for name in ("GSPO", "GRPO")}
    by_minibatch = [f"{name} {' / '.join(f'{x:.2g}' for x in each)}" for name, each in shares.items()]
    return [
        Claim(
            "two orders of magnitude more clipping than GRPO (figure 2)",
            "0.15 of the tokens against 0.0013: 115 times",
            f"{fmean(gspo):.2g} against {fmean(grpo):.2g}{times}",
            HOLDS if low > 10 else FAILS if high < 1 else UNSEEN,
        ),
        Claim(
            "the first of four minibatches cannot clip (the ratio is 1)",
            "-",
            f"clipped tokens by minibatch: {'; '.join(by_minibatch)}",
            _first_cannot_clip(shares.values()),
        ),
    ]


def _first_cannot_clip(shares: Iterable[Sequence[float]]) -> str:
    """shares: of the tokens of each minibatch. Rounding may put a token in a thousand out of the range."""
    if not all(len(each) > 1 for each in shares):
        return UNSEEN
    return HOLDS if all(each[0] < 1e-3 for each in shares) else FAILS


def _by_minibatch(outcomes: Sequence[Outcome], metric: str) -> list[float]:
    """The means of a metric by minibatch, over rollout batches and seeds."""
    lists = [batch[metric] for outcome in outcomes for batch in outcome.run.metrics if metric in batch]
    longest = max(map(len, lists), default=0)
    return [fmean(values[i] for values in lists if i < len(values)) for i in range(longest)]


def read_experts(result: Mapping[str, Any], arms: Arms) -> list[Claim]:
    changed = _by_minibatch(arms["GSPO, experts"], "routing_changed_by_minibatch")
    grpo = _difference(result, "GRPO, experts", FINAL)
    replay = _difference(result, "GRPO, Routing Replay", FINAL)
    by_seed = [_by_minibatch([outcome], "routing_changed_by_minibatch") for outcome in arms["GSPO, experts"]]
    least = mean_interval([each[1] for each in by_seed if len(each) > 1] or [0.0])[1]
    return [
        Claim(
            "experts change between pi_old and pi (section 5.3)",
            "about 10 % of them after one update (48 layers)",
            "after 0, 1, 2, ... updates: " + " / ".join(f"{share:.1%}" for share in changed),
            HOLDS if least is not None and least > 0.01 else UNSEEN,
        ),
        Claim(
            "GRPO needs Routing Replay to converge (figure 3)",
            "without it GRPO fails",
            f"final pass@1, with Routing Replay - without: {_in_words(replay)}",
            _holds(replay),
        ),
        Claim(
            "GSPO needs none (figure 3)",
            "it converges without",
            f"GSPO {_learned(arms['GSPO, experts'])}; GSPO - GRPO in final pass@1: {_in_words(grpo, -1)}",
            FAILS if _is_worse(grpo, -1) else HOLDS if _has_learned(arms["GSPO, experts"]) else UNSEEN,
        ),
    ]


def _gain(outcomes: Sequence[Outcome]) -> Difference:
    """The gain of pass@1 from before training to its end, over seeds and problems."""
    before = [outcome.run.evaluations[0]["pass_by_problem"] for outcome in outcomes]
    return paired_difference(before, [outcome.final() for outcome in outcomes])


def _learned(outcomes: Sequence[Outcome]) -> str:
    gain = _gain(outcomes)
    return f"gains {gain.mean:+.3f}" + ("" if gain.low is None else f" ({gain.low:+.3f} to {gain.high:+.3f})")


def _has_learned(outcomes: Sequence[Outcome]) -> bool:
    gain = _gain(outcomes)
    return gain.is_seen and gain.mean > 0


def read_noise(noise: Mapping[str, Any]) -> Claim:
    """What measure_precision() says."""
    rows = noise["by_length"]
    by_length = ", ".join(f"{row['gspo']:.0%} at {row['tokens']} tokens" for row in rows)
    return Claim(
        "rounding in bfloat16 leaves GSPO's clip range less often than GRPO's (section 5.4)",
        "sequence likelihoods are less sensitive to it; no figure",
        f"bfloat16 moves a token's log-ratio by {noise['token_std']:.2g} and a response's mean by "
        f"{noise['sequence_std']:.2g} (standard deviations). Without any update that is outside of GRPO's "
        f"range for {noise['grpo']:.1%} of the tokens, of GSPO's for {noise['gspo']:.0%} ({by_length})",
        HOLDS if noise["gspo"] <= noise["grpo"] else FAILS,
    )


def read_precision(result: Mapping[str, Any], arms: Arms) -> list[Claim]:
    claims = [read_noise(result["measured"])] if "measured" in result else []
    said = []
    for name in ("GSPO", "GRPO"):
        own = f"{name}, pi_old of a bfloat16 sampler"
        difference = _difference(result, own, FINAL)
        clipped = _by_minibatch(arms[own], "clip_fraction_by_minibatch")[:1] or [0.0]
        said.append(
            f"{name} {_learned(arms[own])}, {_in_words(difference)} to its own with the trainer's pi_old; "
            f"{clipped[0]:.2g} of its first minibatches clipped"
        )
    own = "GSPO, pi_old of a bfloat16 sampler"
    hurt = _is_worse(_difference(result, own, FINAL))
    claims.append(
        Claim(
            "GSPO learns with the likelihoods of a bfloat16 sampler as pi_old (section 5.4)",
            "GSPO tolerates a sampler of another precision",
            "; ".join(said),
            FAILS if hurt else HOLDS if _has_learned(arms[own]) else UNSEEN,
        )
    )
    return claims


def read_staleness(result: Mapping[str, Any], arms: Arms) -> list[Claim]:
    oldest = list(arms)[-1].rpartition(" ")[2]
    stale = _difference(result, f"GSPO, K = {oldest}", FINAL)
    said = [
        f"{name} {_in_words(_difference(result, f'{name}, K = {oldest}', FINAL))}"
        for name in ("GSPO", "GRPO")
    ]
    return [
        Claim(
            "clipping keeps responses of an older policy useful (section 2)",
            "the reason for clipping; no figure",
            f"final pass@1, pi_old of {oldest} rollout batches - of one: {'; '.join(said)}; GSPO with "
            f"{oldest} {_learned(arms[f'GSPO, K = {oldest}'])}",
            HOLDS if _has_learned(arms[f"GSPO, K = {oldest}"]) and not _is_worse(stale) else UNSEEN,
        )
    ]


def read_control(result: Mapping[str, Any], arms: Arms) -> list[Claim]:
    control = arms["shuffled rewards"]
    difference = _difference(result, "shuffled rewards", FINAL)
    return [
        Claim(
            "control: nothing is learned from shuffled rewards",
            "-",
            f"shuffled {_learned(control)}; to GSPO's own {_in_words(difference)}",
            FAILS if _has_learned(control) else HOLDS if _is_worse(difference) else UNSEEN,
        )
    ]


# ---- the table


def markdown(result: Mapping[str, Any]) -> str:
    """The table of claims of paper.json, with the machine and the commit it was made on."""
    rows = [["the claim", "the paper", "measured here", "holds?"]]
    rows += [
        [claim["claim"], claim["paper"], claim["measured"], claim["holds"]] for claim in result["claims"]
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---|---|---|---|")
    return "\n".join([*lines, "", made_on(result)])


def made_on(result: Mapping[str, Any]) -> str:
    """One line: the scale, the seeds, how long it took, the machine and the commit."""
    environment = result["environment"]
    machine = ", ".join(environment["gpus"]) or f"{environment['cpu_cores']} CPU cores"
    commit = str(environment["git_commit"])[:10]
    runs = f"{result['runs']} runs"
    if result.get("failed"):
        runs += f" ({result['failed']} of them failed, and the claims that need them are left out)"
    return (
        f"`python compare_gspo.py {result['command']}`, {result['seeds']} seeds, {runs}, "
        f"{machine}, torch {environment['versions']['torch']}, commit {commit}."
    )


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
