"""Compare algorithms or settings: the same start, data, order and compute, several seeds, with intervals.

    python compare_gspo.py --algorithms gspo,grpo --seeds 5 [any flag of train_gspo.py]
    python compare_gspo.py --vary left_clip_range=3e-5,3e-4,3e-3 --seeds 3 [...]
    python compare_gspo.py --arm 'paper: ' --arm 'wide: --left_clip_range 3e-3 --right_clip_range 4e-3' [...]
    python compare_gspo.py --algorithms gspo,gspo --seeds 5 [...]         two samples of one setting
    python compare_gspo.py --algorithms gspo,grpo --estimate [...]        how long it takes
    python compare_gspo.py --preset paper                     the paper's claims, measured on a CPU; --quick
    python compare_gspo.py --preset paper --scale gpu --estimate          the same for large models

Each run is an ordinary one in OUTPUT_DIR/cells and is never made twice. A comparison that was stopped goes on
with the same command, and a larger --seeds adds to the runs that are there. Several axes are combined: each
value of the first one is compared with the first value.

Exit codes: 0 done; 1 a run failed (the others are compared); 2 bad input; 130 interrupted.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from multiprocessing import get_context
from typing import TYPE_CHECKING

from gspo.comparison.arms import Arm, arms_of, cells_of
from gspo.comparison.cells import FREE, Cell, decided_differently, is_complete, record_of
from gspo.comparison.gpu_hours import H100, WEIGHT_BYTES, WEIGHTS, hours_of_run
from gspo.comparison.runner import Interrupted, Runner, end_with_parent
from gspo.printing import counted, duration, escaped
from gspo.training.command_line import Parser, complain, on_stop_signals, plain_warnings
from gspo.training.config import GSPOConfig
from train_gspo import given_flags

if TYPE_CHECKING:
    from gspo.comparison.outcomes import Outcome
    from gspo.comparison.paper import Section

PROGRAM = "compare_gspo.py"
# Seconds that a run takes before it trains and after it, for imports and its model.
AROUND_RUN_S = 8


def main(arguments: list[str] | None = None) -> int:
    options, flags = parse(arguments)
    try:
        return compare_paper(options, flags) if options.preset else compare_settings(options, flags)
    except ValueError as error:
        complain(PROGRAM, error)
        return 2
    except OSError as error:
        complain(PROGRAM, error)
        return 1


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The flags of the comparison, and those of train_gspo.py."""
    parser = Parser(str(__doc__))
    add = parser.add_argument
    add("--algorithms", help="algorithms, with commas; one that is named twice gets other seeds")
    add("--vary", action="append", default=[], metavar="FLAG=VALUE,...", help="a flag of train_gspo.py")
    add("--arm", action="append", default=[], metavar="'NAME: FLAGS'", help="a setting of several flags")
    add("--preset", choices=["paper"], help="the paper's claims, each with a comparison of its own")
    add("--quick", action="store_true", help="--preset paper in shorter runs, and fewer of them")
    add("--scale", choices=["cpu", "gpu"], default="cpu", help="what --preset paper trains (default: cpu)")
    add("--seeds", type=int, help="runs of each setting; --seed is the first (default: 3; --preset paper: 5)")
    add(
        "--jobs",
        type=int,
        help="runs side by side, among which GPUs and CPU cores are divided (default: one on each GPU; with "
        "--launch or --vllm_url 1; --preset paper: CPU cores)",
    )
    add("--launch", default="", help="in the place of python, such as 'torchrun --nproc_per_node 4'")
    add(
        "--detect",
        type=float,
        default=0.05,
        help="size of a difference: the table says how many seeds it takes to see it (default: 0.05)",
    )
    add("--estimate", action="store_true", help="say how long the runs that are missing take, and stop")
    add("--discard_models", action="store_true", help="keep no weights of finished runs, their records alone")
    add("--name", help="folder of the tables in OUTPUT_DIR (default: made of the settings)")
    options, flags = parser.parse_known_args(arguments)
    if options.seeds is None:
        options.seeds = 5 if options.preset and not options.quick else 3
    jobs = 1 if options.jobs is None else options.jobs
    if min(options.seeds, jobs) < 1 or not options.detect > 0:
        parser.error("--seeds and --jobs must be at least 1, and --detect positive")
    if options.name and not re.fullmatch(r"[\w+-][\w.+-]{0,99}", options.name):
        parser.error(f"--name {options.name!r} must be a plain name: letters, digits, '.', '_', '+', '-'")
    if options.preset and (options.algorithms or options.vary or options.arm):
        parser.error("--preset has settings of its own: leave out --algorithms, --vary and --arm")
    if (options.quick or options.scale == "gpu") and not options.preset:
        parser.error("--quick and --scale go with --preset paper")
    return options, flags


def compare_settings(options: argparse.Namespace, flags: list[str]) -> int:
    """Compare the settings that the flags name. Returns the exit code.

    Raises:
        ValueError: there is nothing to compare, or train_gspo.py refuses the input.
    """
    arms = arms_of(options.algorithms, options.vary, options.arm)
    cells = cells_of(arms, flags, options.seeds, given_flags, default_device())
    if options.estimate:
        return estimate(cells, options)
    from gspo.comparison.page import write_comparison
    from gspo.comparison.table import render
    from gspo.training.whole_folders import CannotSave

    folder = cells[0].folder.parents[1] / (options.name or default_name(arms, cells))
    print(f"{counted(len(arms), 'setting')} x {counted(options.seeds, 'seed')}: {folder}", flush=True)
    failed = make_runs(cells, options)
    if failed is None:
        return 130
    outcomes, result = compared(arms, cells, options.detect, failed)
    print(escaped(render(result), "\n"))
    try:
        write_comparison(result, outcomes, folder)
    except (CannotSave, OSError) as error:
        complain(PROGRAM, error)
        return 1
    if any(outcomes.values()):
        print(f"\nreport: {folder / 'report.html'}")
    return 1 if failed else 0


def compare_paper(options: argparse.Namespace, flags: list[str]) -> int:
    """Measure the paper's claims. Returns the exit code.

    Raises:
        ValueError: train_gspo.py refuses the input.
    """
    from gspo.comparison.paper import SCALES, sections

    scale = SCALES["quick" if options.quick else options.scale]
    parts = sections(scale)
    refuse_flags_of_sections(parts, flags)
    all_flags, device = [*scale.flags, *flags], default_device()
    cells = {part.key: cells_of(part.arms, all_flags, options.seeds, given_flags, device) for part in parts}
    # A run that two comparisons have in common is made once. All runs of a seed come before the next seed.
    by_folder = {cell.folder: cell for part in parts for cell in cells[part.key]}
    runs = sorted(by_folder.values(), key=lambda cell: cell.index)
    if scale.is_small:
        options.jobs = options.jobs or os.cpu_count()
    if options.estimate:
        return estimate(runs, options)
    from gspo.comparison.claims import markdown
    from gspo.comparison.page import write_claims
    from gspo.comparison.table import render
    from gspo.training.whole_folders import CannotSave

    own_runs = given_flags(flags).keys() - (FREE - {"device"})
    name = f"paper-{scale.name}" + (f"-{digest_of(runs)}" if own_runs else "")
    folder = runs[0].folder.parents[1] / (options.name or name)
    print(f"the paper's claims in {len(runs)} runs: {folder}", flush=True)
    failed = make_runs(runs, options)
    if failed is None:
        return 130
    why = {cell.folder: reason for cell, reason in failed.items()}
    outcomes, results, claims = {}, {}, []
    for part in parts:
        own = {cell: why[cell.folder] for cell in cells[part.key] if cell.folder in why}
        outcomes[part.key], results[part.key] = compared(part.arms, cells[part.key], options.detect, own)
        if not own:  # failures would choose the seeds that a claim is read off
            if part.measure:
                results[part.key]["measured"] = part.measure(cells[part.key][0].config)
            claims += part.read(results[part.key], outcomes[part.key])
        print(escaped(f"\n{part.title}\n{render(results[part.key])}", "\n"))
    made = [outcome for arms in outcomes.values() for arm in arms.values() for outcome in arm]
    if not made:
        complain(PROGRAM, "all runs failed")
        return 1
    result = {
        "command": shlex.join(
            ["--preset", "paper", *["--quick"] * options.quick, "--scale", options.scale, *flags]
        ),
        "seeds": options.seeds,
        "runs": len(runs),
        "failed": len(failed),
        "environment": made_with(made[0]),
        "claims": [asdict(claim) for claim in claims],
        "sections": {part.key: {"title": part.title, **results[part.key]} for part in parts},
    }
    try:
        write_claims(result, outcomes, folder)
    except (CannotSave, OSError) as error:
        complain(PROGRAM, error)
        return 1
    print(escaped(f"\n{markdown(result)}\n\nreport: {folder / 'report.html'}", "\n"))
    return 1 if failed else 0


def refuse_flags_of_sections(parts: "Sequence[Section]", flags: Sequence[str]) -> None:
    """Raise a ValueError if a flag is one that the preset has values of its own for."""
    own = set().union(*(given_flags(list(arm.flags)) for part in parts for arm in part.arms))
    for name in sorted((own - {"model_name"}) & given_flags(list(flags)).keys()):
        raise ValueError(f"--{name}: --preset paper has values of its own for this flag; leave it out")


def made_with(outcome: "Outcome") -> dict:
    """The machine and the versions that a run was made with."""
    environment = outcome.run.config["environment"]
    return {name: value for name, value in environment.items() if name != "command_line"}


def make_runs(cells: Sequence[Cell], options: argparse.Namespace) -> dict[Cell, str] | None:
    """Make the runs that are missing. Returns those that failed, and why; None if a signal has come.

    Raises:
        ValueError: train_gspo.py refuses the input.
    """
    missing = any(not is_complete(cell, record_of(cell)) for cell in cells)
    if missing and not options.launch:  # with several processes, more may fit
        check_elsewhere(list({cell.arm: cell for cell in cells}.values()))

    def tell(cell: Cell) -> None:
        run = record_of(cell)
        if run and run.evaluations:
            rates = " to ".join(f"{run.evaluations[i]['pass_at_1']:.3f}" for i in (0, -1))
            died = f", died: {run.emergency['reason']}" if run.emergency else ""
            print(escaped(f"{cell.arm}, seed {cell.seed}: held-out pass@1 {rates}{died}"), flush=True)

    runner = Runner(jobs_of(cells, options), options.launch, visible_gpus(), tell, options.discard_models)
    try:
        return runner.run(cells)
    except Interrupted:
        complain(PROGRAM, "interrupted: the same command goes on from here")
        return None


def jobs_of(cells: Iterable[Cell], options: argparse.Namespace) -> int:
    """How many runs are made side by side.

    Raises:
        ValueError: they would share a vLLM server, which has the weights of one run.
    """
    shares_server = any(cell.config.vllm_url for cell in cells)
    if shares_server and (options.jobs or 1) > 1:
        raise ValueError(
            f"--jobs {options.jobs} with --vllm_url: a server has the weights of one run at a time; leave "
            "out one of the two: without --vllm_url each run starts a server of its own"
        )
    one = shares_server or options.launch
    return options.jobs or (1 if one else max(1, len(visible_gpus())))


def compared(
    arms: Sequence[Arm], cells: Sequence[Cell], detect: float, failed: Mapping[Cell, str]
) -> "tuple[dict[str, list[Outcome]], dict]":
    """The outcomes of each setting, and what table.compare() says of them."""
    from gspo.comparison.outcomes import outcomes_of
    from gspo.comparison.table import compare

    outcomes = {
        arm.label: outcomes_of([cell for cell in cells if cell.arm == arm.label], record_of) for arm in arms
    }
    baselines = {arm.label: arm.baseline for arm in arms if arm.baseline}
    return outcomes, compare(outcomes, baselines, detect, failed)


def default_name(arms: Sequence[Arm], cells: Sequence[Cell]) -> str:
    """The name of the folder of the tables: the same for every number of seeds."""
    words = "-".join(re.sub(r"[^\w.+-]+", "_", arm.label) for arm in arms)[:60]
    return f"compare-{words}-{digest_of(cells)}"


def digest_of(cells: Sequence[Cell]) -> str:
    """Six digits that stand for the settings, whatever the number of seeds."""
    runs = [cell.folder.name for cell in cells if cell.index == 0]
    return hashlib.sha256(json.dumps(runs).encode()).hexdigest()[:6]


def visible_gpus() -> list[str]:
    """The names of the GPUs as CUDA_VISIBLE_DEVICES has them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None or not torch.cuda.is_available():
        return [str(i) for i in range(torch.cuda.device_count())]
    return [name.strip() for name in given.split(",") if name.strip()]


def default_device() -> str:
    return "cuda" if visible_gpus() else "cpu"


def check_elsewhere(cells: Sequence[Cell]) -> None:
    """check_settings() in a process of its own: a CUDA context here would hold memory during all runs.

    Raises:
        ValueError: as there.
        OSError: the process was killed.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), begin_check) as pool:
        # The new process inherits the mask. It leaves Ctrl-C to this one, which is told of it a moment later.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            check = pool.submit(check_settings, cells)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            check.result()
        except BrokenProcessPool:
            raise OSError(
                "the check of the settings was killed, as the system does if memory runs out"
            ) from None


def begin_check() -> None:
    """The start of the process that calls check_settings()."""
    end_with_parent()
    plain_warnings()


def check_settings(cells: Iterable[Cell]) -> None:
    """Check a run of each setting as far as that goes without its model's weights, and print its warnings.

    Raises:
        ValueError: a run would be refused, or two settings have different held-out problems.
    """
    from gspo.training.training_run import questions_digest

    warnings: dict[str, None] = {}  # each is printed once, though all settings may have it
    settings: dict[str, str] = {}  # digest of the held-out problems to the first setting with them
    decided = []
    for cell in cells:
        with redirect_stderr(io.StringIO()) as printed:
            config, _, held_out, _ = resolved(cell.config)
        warnings |= dict.fromkeys(printed.getvalue().splitlines())
        settings.setdefault(questions_digest(held_out), f"{cell.arm} ({config.difficulty})")
        decided.append((cell.config, asdict(config)))
    warnings |= {f"warning: {note}": None for note in decided_differently(decided)}
    for line in warnings:
        print(line, file=sys.stderr)
    if len(settings) > 1:
        raise ValueError(
            f"held-out problems differ between {' and '.join(settings.values())}: --difficulty auto goes by "
            "the model's size, so name one"
        )


def resolved(config: GSPOConfig) -> tuple[GSPOConfig, list, list, int | None]:
    """The configuration as a run on this machine resolves it, its problems, and the tokens of a prompt.

    Raises:
        ValueError: a run would be refused.
    """
    from train_gspo import check_task, load_task, resolve_for_machine

    with redirect_stdout(io.StringIO()):
        config = resolve_for_machine(config)
        problems = load_task(config)
        return config, *problems, check_task(config, *problems)


def estimate(cells: Sequence[Cell], options: argparse.Namespace) -> int:
    """Print how long the runs that are missing take, and the size of all models. Returns the exit code."""
    from gspo.training.hardware import gigabytes

    elsewhere = options.scale == "gpu" and not visible_gpus()
    cost_of = cost_on_gpu if elsewhere else cost_here
    total, kept = 0.0, 0.0
    for arm in dict.fromkeys(cell.arm for cell in cells):
        own = [cell for cell in cells if cell.arm == arm]
        missing = [cell for cell in own if not is_complete(cell, record_of(cell))]
        seconds, model_bytes = cost_of(own[0].config)
        seconds += AROUND_RUN_S
        total += len(missing) * seconds
        kept += len(own) * 2 * model_bytes  # best_model and final_model
        print(
            f"{arm}: {len(missing)} of {len(own)} runs are missing, at most about {duration(seconds)} each",
            flush=True,
        )
    total /= jobs_of(cells, options)
    where = f" on one {H100.name}, computed and not measured" if elsewhere else ""
    print(f"in all: at most about {duration(total)}{where}")
    if not options.discard_models:
        print(f"models that stay: at most about {gigabytes(kept)}; none with --discard_models")
    return 0


def cost_here(config: GSPOConfig) -> tuple[float, float]:
    """Seconds of a run on this machine, from seconds of its work, and bytes of its model."""
    import torch

    from gspo.policy.model_loader import count_parameters
    from train_gspo import config_of_model, pace_here

    config, problems, _, prompt_tokens = resolved(config)
    pace = pace_here(config, prompt_tokens)
    seconds = pace.run(config.count_updates(len(problems))[0], config.eval_frequency)
    shapes = config_of_model(config)
    saved = getattr(shapes, "dtype", None) or torch.float32
    return seconds, saved.itemsize * count_parameters(shapes, config.trust_remote_code)


def cost_on_gpu(config: GSPOConfig) -> tuple[float, float]:
    """Seconds of a run on a GPU that is not here, and bytes of its model."""
    hours = hours_of_run(config, config.num_train_samples)
    return 3600 * hours, WEIGHT_BYTES * WEIGHTS[config.model_name][0]


def interrupt(*_: object) -> None:
    """Handle a signal before the runs and after them; while there are runs, they are asked to stop."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    plain_warnings()
    on_stop_signals(interrupt)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        complain(PROGRAM, "interrupted: the same command goes on from here")
        sys.exit(130)
