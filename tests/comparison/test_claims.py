"""The rules by which claims are read off a comparison, on outcomes that are made up."""

from dataclasses import replace
from pathlib import Path

import pytest

from gspo.comparison.cells import Cell
from gspo.comparison.claims import FAILS, HOLDS, UNSEEN, read_clipping, read_control, read_experts
from gspo.comparison.outcomes import Outcome
from gspo.comparison.table import compare
from gspo.report.run_record import read_run
from gspo.training.config import GSPOConfig

HEALTHY = read_run(Path(__file__).parents[1] / "report" / "records" / "healthy")


def outcomes(*last, clips=0.1):
    """One for each value of the last pass@1; before training, half of the problems pass."""
    evaluation = HEALTHY.evaluations[0]
    found = []
    for i, share in enumerate(last):
        passed = [[0.4, 0.6] * 8, [share - 0.1 + i / 100, share + 0.1 + i / 100] * 8]
        pairs = zip((0, HEALTHY.step), passed, strict=True)
        evaluations = [
            evaluation
            | {"step": step, "pass_by_problem": each, "reward_by_problem": each, "pass_at_1": sum(each) / 16}
            for step, each in pairs
        ]
        by_minibatch = {"clip_fraction_by_minibatch": [0.0, clips], "routing_changed_by_minibatch": [0, 0.1]}
        metrics = [batch | {"clip_fraction": clips} | by_minibatch for batch in HEALTHY.metrics]
        run = replace(HEALTHY, evaluations=evaluations, metrics=metrics)
        found.append(Outcome(Cell("a", i, GSPOConfig(), Path(f"run-{i}")), run, run.step))
    return found


def verdicts(read, arms, baselines):
    return [claim.holds for claim in read(compare(arms, baselines, 0.05, {}), arms)]


@pytest.mark.parametrize("clips, verdict", [(0.3, HOLDS), (0.02, UNSEEN), (0.001, FAILS)])
def test_how_much_more_gspo_clips(clips, verdict):
    gspo = [outcomes(0.8, clips=clips * factor)[0] for factor in (1, 1.1, 0.9)]
    grpo = [outcomes(0.8, clips=0.01 * factor)[0] for factor in (1, 1, 1)]
    gspo, grpo = (
        [replace(x, cell=replace(x.cell, index=i)) for i, x in enumerate(arm)] for arm in (gspo, grpo)
    )
    arms = {"GSPO": gspo, "GRPO": grpo}
    assert verdicts(read_clipping, arms, {"GRPO": "GSPO"})[0] == verdict


@pytest.mark.parametrize(
    "gspo, grpo, replay, verdict",
    [
        (0.8, 0.8, 0.8, [UNSEEN, HOLDS]),
        (0.8, 0.6, 0.8, [HOLDS, HOLDS]),
        (0.6, 0.8, 0.7, [FAILS, FAILS]),  # GSPO is seen to be worse, though it has learned
        (0.5, 0.5, 0.5, [UNSEEN, UNSEEN]),  # nothing has learned
    ],
)
def test_who_needs_routing_replay(gspo, grpo, replay, verdict):
    arms = {
        "GSPO, experts": outcomes(gspo, gspo - 0.01, gspo - 0.02),
        "GRPO, experts": outcomes(grpo, grpo - 0.01, grpo - 0.02),
        "GRPO, Routing Replay": outcomes(replay, replay - 0.01, replay - 0.02),
    }
    baselines = {"GRPO, experts": "GSPO, experts", "GRPO, Routing Replay": "GRPO, experts"}
    assert verdicts(read_experts, arms, baselines)[1:] == verdict


@pytest.mark.parametrize("shuffled, verdict", [(0.5, HOLDS), (0.7, FAILS)])
def test_a_control_must_not_learn(shuffled, verdict):
    arms = {"GSPO": outcomes(0.9, 0.9, 0.9), "shuffled rewards": outcomes(*[shuffled - 0.01] * 3)}
    assert verdicts(read_control, arms, {"shuffled rewards": "GSPO"}) == [verdict]


def test_a_gain_is_one_over_problems_too():
    """One problem of many that is always solved in the end is no gain on others."""
    arms = {"GSPO": outcomes(0.9, 0.9, 0.9), "shuffled rewards": outcomes(0.5, 0.5, 0.5)}
    for outcome in arms["shuffled rewards"]:
        outcome.run.evaluations[-1]["pass_by_problem"] = [0.4, 0.6] * 7 + [0.4, 1.0]
    (claim,) = read_control(compare(arms, {"shuffled rewards": "GSPO"}, 0.05, {}), arms)
    assert claim.holds == HOLDS and "gains +0.025 (-" in claim.measured
