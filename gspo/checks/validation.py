"""The four parts of validate_gspo.py in order, with the training runs that they need."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from data_loader import load_problems
from gspo.checks.losses import CHECKS as LOSS_CHECKS
from gspo.checks.model import NUM_PROBLEMS, ModelChecks
from gspo.checks.report import Check, Checks, Part, draw_dynamics, exactly, write_metrics, write_results
from gspo.checks.training import (
    CLIP_RANGES,
    PAPER_CLIP_FRACTIONS,
    SHORT,
    SORTING,
    Run,
    Runs,
    clip_range_checks,
    clip_range_table,
    clipping_checks,
    dynamics_table,
    movement_checks,
    performance_checks,
    performance_table,
    precision_checks,
    precision_noise,
    precision_table,
)
from gspo.policy.model_cache import EMBEDDED_NAME
from gspo.policy.model_loader import load_model, model_config
from gspo.training.config import GSPOConfig
from gspo.training.hardware import describe_environment, machine_for
from gspo.training.plan import plan_training
from gspo_implementation import gspo_loss

COMPARED = ("gspo", "grpo")  # the algorithms that part 2 compares
TINY = ("tiny", "tiny-moe")  # trained in seconds; another model shows its arithmetic and its ratios alone


def prepare(model_name: str, output_dir: Path) -> tuple[str, torch.nn.Module, Any]:
    """Load the model and make the output folder. Returns the model's resolved name, the model, its tokenizer.

    Raises ValueError for a model that cannot be used, OSError for a folder that cannot be written.
    """
    name = EMBEDDED_NAME if model_name == "auto" else model_name
    disable_progress_bar()  # of loading the weights
    if torch.cuda.is_available() and name not in (EMBEDDED_NAME, *TINY):
        # The model itself in float32 stays on the GPU, beside a copy of it in training.
        trained = GSPOConfig(
            model_name=name, optimizer="adamw", lora_rank=0, kl_coef=1.0, device="cuda", dtype="bfloat16",
            batch_size=SHORT.mini_batch_size, mini_batch_size=SHORT.mini_batch_size,
            group_size=SHORT.group_size,
        )  # fmt: skip
        machine = machine_for(None, "cuda")
        if plan_training(model_config(name), trained, gspo_loss, machine) is None:
            raise ValueError(
                f"--model_name {name}: validation holds the model in float32 twice, which {machine.name} "
                "cannot; name a smaller model"
            )
    model, tokenizer = load_model(name)
    output_dir.mkdir(parents=True, exist_ok=True)
    # A folder that cannot be written shows now rather than at the end.
    (output_dir / "results.json").write_text('{"passed": null}\n')
    return name, model, tokenizer


def validate(name: str, model: torch.nn.Module, tokenizer: Any, seeds: range, output_dir: Path) -> bool:
    """Make the four parts, print their lines, write output_dir. Returns whether every check passed."""
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_cores = os.cpu_count() or 1
    print(f"Model {name}, {device}, {num_cores} cores, seeds {', '.join(map(str, seeds))}", flush=True)

    task = SORTING if name in TINY else SHORT
    problems = load_problems(task.dataset, "eval", NUM_PROBLEMS, seeds[0])
    parts = [technical(model, tokenizer, problems, device)]
    noise = precision_noise(model, tokenizer, problems, task.max_new_tokens, device)
    model.cpu()  # the workers need the GPU's memory
    torch.cuda.empty_cache()
    planned = plan(name, seeds)
    num_workers = min(num_cores, len(planned)) if name in TINY else 1
    with Runs(planned, num_workers) as runs:
        parts.append(dynamics(runs, name, seeds))
        parts.append(performance(runs, name, seeds))
        parts.append(clipping(runs, name, seeds[0], noise, parts))
        settings = {"model_name": name, "seeds": list(seeds), "environment": describe_environment()}
        write_results(output_dir, settings, parts, time.monotonic() - started)
        write_metrics(output_dir, runs.metrics())
        curves = curves_of_seed(runs, seeds[0])
        draw_dynamics(output_dir / "dynamics.png", curves, PAPER_CLIP_FRACTIONS)
    print(f"{time.monotonic() - started:.0f} s. All figures and curves: {output_dir}/")
    return not any(part.failed for part in parts)


def plan(model_name: str, seeds: Sequence[int]) -> dict[str, Run]:
    """Every training run of parts 2 to 4 by name, in the order in which they are waited for."""
    runs = {}
    if model_name not in TINY:
        for seed in seeds:
            for algorithm in COMPARED:
                run = Run(model_name, SHORT, seed, algorithm, rewards="checksum")
                runs[f"{algorithm}, seed {seed}"] = run
        return runs
    for seed in seeds:
        for algorithm in COMPARED:
            runs[f"{algorithm}, seed {seed}"] = Run(model_name, SORTING, seed, algorithm)
    for seed in seeds:
        runs[f"before training, seed {seed}"] = Run(model_name, SORTING, seed, num_batches=0)
        runs[f"shuffled rewards, seed {seed}"] = Run(model_name, SORTING, seed, rewards="shuffled")
    for name, clip_range in CLIP_RANGES.items():
        if name != "paper":
            runs[name] = Run(model_name, SORTING, seeds[0], clip_ranges=clip_range)
    return runs


def curves_of_seed(runs: Runs, seed: int) -> dict[str, list[dict]]:
    """The metrics of the runs with this seed, by the names that the picture gives them."""
    curves = {}
    for name, metrics in runs.metrics():
        if f", seed {seed}" in name:
            curves[name.partition(",")[0]] = metrics
    return curves


def technical(model: torch.nn.Module, tokenizer: Any, problems: Sequence, device: str) -> Part:
    """Part 1: the losses, then the model with its sampling and its updates, against float64 loops."""
    part = Part("Technical correctness", "✅ All technical tests PASSED!")
    for checks in [*LOSS_CHECKS, *ModelChecks(model, tokenizer, problems, device).all()]:
        part.run(checks())
    return part.close()


def dynamics(runs: Runs, model_name: str, seeds: Sequence[int]) -> Part:
    """Part 2: how ratios and clip fractions of real runs behave, beside GRPO's."""
    part = Part("Training dynamics", "✅ Training dynamics look good!")
    runs.wait(f"{algorithm}, seed {seed}" for seed in seeds for algorithm in COMPARED)

    def training_of_a_seed(seed: int) -> Checks:
        metrics = {algorithm: runs[f"{algorithm}, seed {seed}"]["metrics"] for algorithm in COMPARED}
        yield from movement_checks(**metrics)
        if model_name in TINY:
            yield from clipping_checks(**metrics)
        part.add_table(f"Seed {seed}", dynamics_table(metrics))

    for seed in seeds:
        part.run(training_of_a_seed(seed))
    return part.close()


def performance(runs: Runs, model_name: str, seeds: Sequence[int]) -> Part:
    """Part 3: held-out pass@1 before and after training, with a control."""
    part = Part("Performance test", "✅ Performance test: PASS - Clear improvement")
    if model_name not in TINY:
        how = f"train it: python train_gspo.py --model_name {model_name}"
        part.add(Check("gspo raises held-out pass@1", None, how, ""))
        return part.close()
    names = ("before training", *COMPARED, "shuffled rewards")
    runs.wait(f"{name}, seed {seed}" for seed in seeds for name in names)

    def held_out_evaluations() -> Checks:
        evaluations: dict[str, Sequence[dict]] = {}
        for name in names:
            evaluations[name] = [runs[f"{name}, seed {seed}"]["evaluation"] for seed in seeds]
        yield from performance_checks(
            evaluations["before training"], evaluations["gspo"], evaluations["shuffled rewards"]
        )
        part.add_table("Held-out pass@1 (gspo and grpo often tie)", performance_table(evaluations))

    part.run(held_out_evaluations())
    return part.close()


def clipping(runs: Runs, model_name: str, seed: int, noise: dict, parts_before: list[Part]) -> Part:
    """Part 4: clip ranges at equal compute, and which of them this machine's precision allows."""
    part = Part("Clip ranges", "🎉 GSPO implementation looks GOOD!")

    def training_with_each_range() -> Checks:
        before = runs[f"before training, seed {seed}"]["evaluation"]
        # The run with the paper's range is that of part 2.
        results = {name: runs[f"gspo, seed {seed}" if name == "paper" else name] for name in CLIP_RANGES}
        yield from clip_range_checks({name: result["metrics"] for name, result in results.items()})
        part.add_table("Clip ranges at equal compute", clip_range_table(before, results))

    if model_name in TINY:
        runs.wait(name for name in CLIP_RANGES if name in runs)
        part.run(training_with_each_range())
    part.run(precision_checks(noise))
    heading = "Null clip fraction: share of tokens outside the range with no update"
    part.add_table(heading, precision_table(noise))
    faults = sum(len(before.failed) for before in parts_before)
    part.add(exactly("no check of parts 1 to 3 failed", faults, 0, "failed:", "the lines marked FAIL above"))
    return part.close()
