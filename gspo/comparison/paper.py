"""The paper's claims (arXiv 2507.18071, section 5) as comparisons of this toolkit: what is run for each.

Each section is a comparison of its own. Runs that two sections have in common are made once. At small scale,
not every claim can be seen: the table says so where it is so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gspo.comparison.arms import Arm
from gspo.comparison.claims import (
    Arms,
    Claim,
    read_clipping,
    read_control,
    read_curves,
    read_experts,
    read_precision,
    read_staleness,
)
from gspo.training.config import GSPOConfig

# Section 5.1 of the paper.
PAPER_RANGE = ("--left_clip_range", "3e-4", "--right_clip_range", "4e-4")
# Values of --learning_rate: comfortable, high, past what the tiny model bears.
RATES = ("5e-5", "2e-4", "5e-4")
# Rollout batches that share one pi_old (--update_frequency).
STALENESS = ("2", "4", "8")


@dataclass(frozen=True)
class Scale:
    """Where the claims are tried, and on what.

    flags: of all runs. moe_flags: further ones of the mixture of experts. rates: values of --learning_rate.
    staleness: values of --update_frequency beside 1. sampler: flags of a sampler in bfloat16. is_small: a run
    leaves a second core idle, and the rounding of bfloat16 is measured beside the runs.
    """

    name: str
    flags: tuple[str, ...]
    moe_flags: tuple[str, ...]
    rates: tuple[str, ...]
    staleness: tuple[str, ...]
    sampler: tuple[str, ...] = ("--rollout_dtype", "bfloat16")
    is_small: bool = True


def _flags(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Sorting 12 to 24 digits: the tiny models get a third of the held-out problems right at the start.
SORTING = (
    "--dataset sort --batch_size 32 --mini_batch_size 8 --group_size 8 --max_new_tokens 26 --device cpu "
    "--dtype float32 --eval_frequency 4 --save_frequency 0"
)
CPU = Scale(
    "cpu",
    _flags(f"--model_name tiny --num_train_samples 512 --num_eval_samples 256 {SORTING}"),
    _flags("--model_name tiny-moe"),
    RATES,
    STALENESS,
)
QUICK = Scale(
    "quick",
    _flags(f"--model_name tiny --num_train_samples 256 --num_eval_samples 128 {SORTING}"),
    _flags("--model_name tiny-moe"),
    (RATES[0], RATES[-1]),
    (STALENESS[-1],),
)
GPU = Scale(
    "gpu",
    _flags(
        "--model_name Qwen/Qwen2.5-1.5B-Instruct --dataset gsm8k --num_train_samples 7473 "
        "--num_eval_samples 500 --max_length 1024 --batch_size 128 --mini_batch_size 32 --group_size 8 "
        "--eval_frequency 10 --rollout_engine vllm"
    ),
    _flags("--model_name Qwen/Qwen1.5-MoE-A2.7B-Chat"),
    ("1e-6", "5e-6", "2e-5"),
    STALENESS,
    sampler=(),  # vLLM computes in bfloat16
    is_small=False,
)
SCALES = {scale.name: scale for scale in (CPU, QUICK, GPU)}


@dataclass(frozen=True)
class Section:
    """A comparison, and what is to be read in it.

    read: makes claims of the result of table.compare() and of the outcomes by label.
    measure: what is measured beside the runs, with the first setting's configuration; read() finds it in the
        result as "measured".
    """

    key: str
    title: str
    arms: list[Arm]
    read: Callable[[Mapping[str, Any], Arms], list[Claim]]
    measure: Callable[[GSPOConfig], dict] | None = None


def _noise(config: GSPOConfig) -> dict:
    from gspo.comparison.precision import measure_precision  # here, since it imports torch

    return measure_precision(config)


def sections(scale: Scale) -> list[Section]:
    """The comparisons of the preset, in the order of the claims."""
    gspo, rate = ("--algorithm", "gspo", *PAPER_RANGE), ("--learning_rate", scale.rates[0])
    token, grpo = ("--algorithm", "gspo_token", *PAPER_RANGE), ("--algorithm", "grpo")
    curves = []
    for value in scale.rates:
        at = f" at {value}"
        for name, flags in (("GSPO", gspo), ("GSPO-token", token), ("GRPO", grpo)):
            curves.append(
                Arm(
                    name + at,
                    (*flags, "--learning_rate", value),
                    baseline=None if name == "GSPO" else f"GSPO{at}",
                )
            )
    clipping = [
        Arm("GSPO", (*gspo, *rate)),
        Arm("GRPO", (*grpo, *rate), baseline="GSPO"),
        Arm(
            "GSPO, 20 times the range",
            ("--algorithm", "gspo", "--left_clip_range", "6e-3", "--right_clip_range", "8e-3", *rate),
            baseline="GSPO",
        ),
    ]
    experts = [
        Arm("GSPO, experts", (*gspo, *rate, *scale.moe_flags)),
        Arm("GRPO, experts", (*grpo, *rate, *scale.moe_flags), baseline="GSPO, experts"),
        Arm(
            "GRPO, Routing Replay",
            (*grpo, *rate, *scale.moe_flags, "--routing_replay"),
            baseline="GRPO, experts",
        ),
    ]
    sampler = ("--pi_old", "sampler", *scale.sampler)
    precision = [
        Arm("GSPO", (*gspo, *rate)),
        Arm("GSPO, pi_old of a bfloat16 sampler", (*gspo, *rate, *sampler), baseline="GSPO"),
        Arm("GRPO", (*grpo, *rate)),
        Arm("GRPO, pi_old of a bfloat16 sampler", (*grpo, *rate, *sampler), baseline="GRPO"),
    ]
    stale = []
    for k in ("1", *scale.staleness):
        for name, flags in (("GSPO", gspo), ("GRPO", grpo)):
            own = (*flags, *rate) if k == "1" else (*flags, *rate, "--update_frequency", k)
            stale.append(Arm(f"{name}, K = {k}", own, baseline=None if k == "1" else f"{name}, K = 1"))
    control = [
        Arm("GSPO", (*gspo, *rate)),
        Arm("shuffled rewards", (*gspo, *rate, "--shuffle_rewards"), baseline="GSPO"),
    ]
    return [
        Section("curves", "1. Training at equal compute", curves, read_curves),
        Section("clipping", "2. Clip fractions", clipping, read_clipping),
        Section("experts", "3. Mixture of experts", experts, read_experts),
        Section(
            "precision",
            "4. Precision of the sampler",
            precision,
            read_precision,
            _noise if scale.is_small else None,
        ),
        Section("staleness", "5. Staleness of pi_old", stale, read_staleness),
        Section("control", "6. Control: shuffled rewards", control, read_control),
    ]
