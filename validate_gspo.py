"""Proof that GSPO works on this machine, before it is paid for at scale.

    python validate_gspo.py                               one to three minutes, no network, no GPU
    python validate_gspo.py --model_name tiny-moe         the same on a mixture of experts
    python validate_gspo.py --model_name Qwen/Qwen2.5-0.5B-Instruct     what makes sense on a model of yours
    python validate_gspo.py --seeds 5                     parts 2 and 3 with five seeds

Four parts: (1) the properties that implementations get wrong, against float64 loops; (2) the dynamics
of real training, beside GRPO's; (3) held-out pass@1 before and after, with a control; (4) clip ranges, and
which of them this machine's precision allows. Everything also goes to validation_results/: results.json,
metrics.jsonl and dynamics.png. Exit codes: 0 all is well; 1 a check failed; 2 bad input; 130 interrupted.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in train_gspo.py: torch reads it

import torch
from transformers.utils.logging import disable_progress_bar

from data_loader import load_problems
from gspo.checks.losses import CHECKS as LOSS_CHECKS
from gspo.checks.model import NUM_PROBLEMS, ModelChecks
from gspo.checks.report import Check, Part, draw_dynamics, exactly, write_metrics, write_results
from gspo.checks.training import (
    PAPER_CLIP_FRACTIONS,
    SHORT,
    SORTING,
    Run,
    Runs,
    clip_range_checks,
    clip_range_table,
    clip_ranges,
    clipping_checks,
    dynamics_table,
    movement_checks,
    performance_checks,
    performance_table,
    precision_checks,
    precision_noise,
    precision_table,
)
from gspo.policy.model_loader import check_memory, count_parameters, load_model, resolve_model_name
from gspo.training.command_line import Parser
from gspo.training.run_log import describe_environment

ALGORITHMS = tuple(PAPER_CLIP_FRACTIONS)
TINY = ("tiny", "tiny-moe")  # trained in seconds; another model shows its arithmetic and its ratios alone
# Bytes: the model, and a copy of it in training (weights, gradients, AdamW's moments).
MEMORY_PER_PARAMETER = 20


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    started = time.monotonic()
    try:
        name, _ = resolve_model_name(options.model_name)
        disable_progress_bar()  # of loading the weights
        if torch.cuda.is_available():
            check_memory(name, MEMORY_PER_PARAMETER * count_parameters(name))
        model, tokenizer = load_model(name)
        options.output_dir.mkdir(parents=True, exist_ok=True)
        (options.output_dir / "results.json").write_text(
            '{"passed": null}\n'
        )  # fails now rather than at the end
    except (ValueError, OSError) as error:
        print(f"validate_gspo.py: {error}", file=sys.stderr)
        return 2
    seeds = range(options.seed, options.seed + options.seeds)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"Model {name}, {device}, {os.cpu_count()} cores, seeds {', '.join(map(str, seeds))}", flush=True)

    task = SORTING if name in TINY else SHORT
    problems = load_problems(task.dataset, "eval", NUM_PROBLEMS, options.seed)
    parts = [technical(model, tokenizer, problems, device)]
    noise = precision_noise(model, tokenizer, problems, task.max_new_tokens, device)
    model.cpu()  # the workers need the GPU's memory
    torch.cuda.empty_cache()
    planned = plan(name, seeds)
    with Runs(planned, min(os.cpu_count(), len(planned)) if name in TINY else 1) as runs:
        parts.append(dynamics(runs, name, seeds))
        parts.append(performance(runs, name, seeds))
        parts.append(clipping(runs, name, seeds[0], noise, parts))
        settings = {"model_name": name, "seeds": list(seeds), "environment": describe_environment()}
        write_results(options.output_dir, settings, parts, time.monotonic() - started)
        write_metrics(options.output_dir, runs.metrics())
        curves = {run.partition(",")[0]: m for run, m in runs.metrics() if f", seed {seeds[0]}" in run}
        draw_dynamics(options.output_dir / "dynamics.png", curves, PAPER_CLIP_FRACTIONS)
    print(f"{time.monotonic() - started:.0f} s. All figures and curves: {options.output_dir}/")
    return 1 if any(part.failed for part in parts) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--model_name", default="tiny", help="tiny, tiny-moe, a hub id or a folder (default: tiny)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds for parts 2 and 3 (default: 1)")
    parser.add_argument("--output_dir", type=Path, default=Path("validation_results"))
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.seed < 0:
        parser.error("--seeds must be at least 1, and --seed at least 0")
    return options


def plan(model_name: str, seeds: Sequence[int]) -> dict[str, Run]:
    """Every training run of parts 2 to 4 by name, in the order in which they are waited for."""
    if model_name not in TINY:
        return {
            f"{algorithm}, seed {seed}": Run(model_name, SHORT, seed, algorithm, rewards="checksum")
            for seed in seeds
            for algorithm in ALGORITHMS
        }
    runs = {}
    for seed in seeds:
        for algorithm in ALGORITHMS:
            runs[f"{algorithm}, seed {seed}"] = Run(model_name, SORTING, seed, algorithm)
    for seed in seeds:
        runs[f"before training, seed {seed}"] = Run(model_name, SORTING, seed, num_batches=0)
        runs[f"shuffled rewards, seed {seed}"] = Run(model_name, SORTING, seed, rewards="shuffled")
    for name, clip_range in clip_ranges().items():
        if name != "paper":
            runs[name] = Run(model_name, SORTING, seeds[0], clip_ranges=clip_range)
    return runs


def technical(model, tokenizer, problems, device: str) -> Part:
    part = Part("Technical correctness", "✅ All technical tests PASSED!")
    for checks in [*LOSS_CHECKS, *ModelChecks(model, tokenizer, problems, device).all()]:
        part.run(checks())
    return part.close()


def dynamics(runs: Runs, model_name: str, seeds: Sequence[int]) -> Part:
    part = Part("Training dynamics", "✅ Training dynamics look good!")
    runs.wait(f"{algorithm}, seed {seed}" for seed in seeds for algorithm in ALGORITHMS)

    def training_of_a_seed(seed: int):
        metrics = {algorithm: runs[f"{algorithm}, seed {seed}"]["metrics"] for algorithm in ALGORITHMS}
        yield from movement_checks(**metrics)
        if model_name in TINY:
            yield from clipping_checks(**metrics)
        part.add_table(f"Seed {seed}", dynamics_table(metrics))

    for seed in seeds:
        part.run(training_of_a_seed(seed))
    return part.close()


def performance(runs: Runs, model_name: str, seeds: Sequence[int]) -> Part:
    part = Part("Performance test", "✅ Performance test: PASS - Clear improvement")
    if model_name not in TINY:
        how = f"train it: python train_gspo.py --model_name {model_name}"
        part.add(Check("gspo raises held-out pass@1", None, how, ""))
        return part.close()
    names = ("before training", *ALGORITHMS, "shuffled rewards")
    runs.wait(f"{name}, seed {seed}" for seed in seeds for name in names)

    def held_out_evaluations():
        evaluations = {name: [runs[f"{name}, seed {seed}"]["evaluation"] for seed in seeds] for name in names}
        before, gspo, _, control = evaluations.values()
        yield from performance_checks(before, gspo, control)
        part.add_table("Held-out pass@1 (gspo and grpo often tie)", performance_table(evaluations))

    part.run(held_out_evaluations())
    return part.close()


def clipping(runs: Runs, model_name: str, seed: int, noise: dict, parts_before: list[Part]) -> Part:
    part = Part("Clip ranges", "🎉 GSPO implementation looks GOOD!")

    def training_with_each_range():
        before = runs[f"before training, seed {seed}"]["evaluation"]
        names = {name: name if name in runs else f"gspo, seed {seed}" for name in clip_ranges()}
        results = {name: runs[run] for name, run in names.items()}
        yield from clip_range_checks({name: result["metrics"] for name, result in results.items()})
        part.add_table("Clip ranges at equal compute", clip_range_table(before, results))

    if model_name in TINY:
        runs.wait(name for name in clip_ranges() if name in runs)
        part.run(training_with_each_range())
    part.run(precision_checks(noise))
    part.add_table(
        "Null clip fraction: share of tokens outside the range with no update", precision_table(noise)
    )
    faults = sum(len(before.failed) for before in parts_before)
    part.add(exactly("no check of parts 1 to 3 failed", faults, 0, "failed:", "the lines marked FAIL above"))
    return part.close()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may not know the marks
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("validate_gspo.py: interrupted, nothing was concluded", file=sys.stderr)
        sys.exit(130)
