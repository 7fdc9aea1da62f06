"""Train a causal language model with GSPO on problems whose answers a rule can check.

    python train_gspo.py                                          the embedded model, on a CPU
    python train_gspo.py --model_name Qwen/Qwen2.5-7B-Instruct --dataset gsm8k --use_wandb
    python train_gspo.py --dataset math --algorithm grpo          the baseline, same everything else
    torchrun --nproc_per_node 4 train_gspo.py ...                 several processes, with a GPU each or none

Exit codes: 0 done; 1 failure; 2 bad input (one line: what, why, what to do); 3 emergency stop;
130 interrupted. Whenever it stops, what was learnt is on disk and --resume continues.
"""

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import asdict, fields, replace
from types import NoneType
from typing import get_args, get_type_hints

from gspo.training.command_line import Parser, complain, interruptible

# Waiting OpenMP threads spin for long before they sleep. On a CPU that other processes share, that made a
# rollout batch up to five times slower; spinning briefly costs little (LOG.md). Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if __name__ == "__main__":  # before the imports below, which take seconds
    interruptible()

from transformers.utils.logging import disable_progress_bar

from data_loader import default_max_new_tokens, load_problems
from gspo.policy.cpu import keep_freed_memory
from gspo.policy.model_loader import check_memory, count_parameters, load_model, resolve_model_name
from gspo.tasks.rewards import RewardFunction
from gspo.training.alarms import EmergencyStop
from gspo.training.checkpoints import CannotSave
from gspo.training.config import choose_dtype
from gspo.training.intervals import paired_interval
from gspo.training.run_log import (
    process_count,
    refuse_other_settings,
    resumed_folder,
    run_folder,
    settings_of,
)
from gspo.training.training_run import TrainingRun
from gspo_implementation import GSPOConfig, GSPOTrainer

PROGRAM = "train_gspo.py"
SAME_SIGNAL_S = 1.0  # seconds
# Bytes: float32 weights, gradients and AdamW's two moments, before activations.
MEMORY_PER_PARAMETER = 16


def main(arguments: list[str] | None = None) -> int:
    keep_freed_memory()
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
        sys.stdout = open(os.devnull, "w")
    try:
        config = resolve(parse(arguments))
        if config.resume:
            refuse_other_settings(asdict(config))
        print(json.dumps({k: v for k, v in asdict(config).items() if v is not None}, indent=2))
        print(f"\n{config.describe_objective()}\n")
        if config.dry_run:
            return 0
        run = prepare(config)
    except ValueError as error:
        complain(PROGRAM, error)
        return 2
    except (CannotSave, OSError) as error:
        complain(PROGRAM, error)
        return 1
    stop_on_signals(run.trainer)
    speaks = run.trainer.accelerator.is_main_process  # all processes end alike
    try:
        result = run.train()
    except CannotSave as error:
        if speaks:
            complain(PROGRAM, f"{error}; make room, then continue with --resume {run.log.folder}")
        return 1
    except EmergencyStop as stop:
        if speaks:
            complain(PROGRAM, explain(stop, run))
        return 3
    if speaks:
        report(run, result)
    return 0 if result["finished"] else 130


def parse(arguments: list[str] | None) -> GSPOConfig:
    """The flags as a configuration; with --resume, flags that are not given are those of the resumed run.

    Bad values end the program with one line and exit code 2.
    """
    parser = Parser(__doc__)
    types, groups = get_type_hints(GSPOConfig), {}
    for f in fields(GSPOConfig):
        group = groups.setdefault(f.metadata["group"], None) or parser.add_argument_group(f.metadata["group"])
        groups[f.metadata["group"]] = group
        kind = next(t for t in get_args(types[f.name]) or (types[f.name],) if t is not NoneType)
        shown = "" if f.default is None or kind is bool else f" (default: {f.default})"
        options = (
            {"action": "store_true"} if kind is bool else {"type": kind, "choices": f.metadata["choices"]}
        )
        help = f.metadata["help"] + shown
        group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=help, **options)
    given = vars(parser.parse_args(arguments))
    if "resume" in given:
        given = of_resumed_run(given)
    return GSPOConfig(**given)


def of_resumed_run(given: dict) -> dict:
    """The flags that are given, the resumed run's own for the others, and where its folder is now."""
    folder = resumed_folder(given["resume"], given.get("output_dir", GSPOConfig.output_dir))
    if given.get("run_name", folder.name) != folder.name:
        raise ValueError(f"--run_name {given['run_name']}: the resumed run is {folder}; leave the flag out")
    inherited = {f.name for f in fields(GSPOConfig)} - {"dry_run"}
    saved = {name: value for name, value in settings_of(folder).items() if name in inherited}
    resume = str(folder) if given["resume"] == "latest" else os.path.abspath(given["resume"])
    return saved | given | {"resume": resume, "output_dir": str(folder.parent), "run_name": folder.name}


def resolve(config: GSPOConfig) -> GSPOConfig:
    """Decide what depends on the machine, the model's size and the data set."""
    model_name, reason = resolve_model_name(config.model_name)
    if config.model_name != model_name:
        print(f"model: {model_name} ({reason})")
    parameters = count_parameters(model_name, config.trust_remote_code)
    if config.dataset_path:  # for a resume from elsewhere
        config = replace(config, dataset_path=os.path.abspath(config.dataset_path))
    if config.dataset_path and config.dataset == GSPOConfig.dataset:
        config = replace(config, dataset="file")
    source = "file" if config.dataset_path else config.dataset
    difficulty = config.difficulty if config.difficulty != "auto" else difficulty_for(parameters)
    config = replace(
        config,
        model_name=model_name,
        difficulty=difficulty,
        max_new_tokens=config.max_new_tokens or default_max_new_tokens(source, difficulty),
    )
    resolved = config.resolve(parameters)
    if resolved.device == "cuda":
        check_memory(model_name, MEMORY_PER_PARAMETER * parameters)
    print(f"processes: {process_count()}")
    if config.dtype == "auto":
        print(f"dtype: {resolved.dtype} ({choose_dtype(resolved.device, parameters)[1]})")
    return resolved


def difficulty_for(parameters: int) -> str:
    """The level of generated problems on which a model of this size has something to learn."""
    if parameters < 0.4e9:
        return "easy"
    return "medium" if parameters < 4e9 else "hard"


def prepare(config: GSPOConfig) -> TrainingRun:
    """Problems, model, trainer and run folder; ValueError where the input cannot work. Quick things first."""
    run_folder(asdict(config))
    train_problems, eval_problems = (
        load_problems(config.dataset, split, count, config.seed, config.difficulty, config.dataset_path)
        for split, count in (("train", config.num_train_samples), ("eval", config.num_eval_samples))
    )
    if not sys.stderr.isatty():
        disable_progress_bar()  # of loading the weights
    # On the CPU first: each process of several then moves it to its own GPU.
    model, tokenizer = load_model(config.model_name, device="cpu", trust_remote_code=config.trust_remote_code)
    trainer = GSPOTrainer(model, tokenizer, config, RewardFunction(config.code_reward))
    return TrainingRun(trainer, train_problems, eval_problems)


def stop_on_signals(trainer: GSPOTrainer) -> None:
    """First SIGINT or SIGTERM: stop after the update in progress, with a checkpoint. Second: at once.

    A launcher passes on a signal that its processes have had themselves: within SAME_SIGNAL_S it is the same.
    """
    asked = []

    def stop(*_):
        asked.append(time.monotonic())
        if asked[-1] - asked[0] > SAME_SIGNAL_S:
            os._exit(130)  # without the checkpoint that may be in progress: the last whole one stays
        if not trainer.stop_requested and trainer.accelerator.is_main_process:
            print("\nstopping after this update; once more to stop at once", file=sys.stderr)
        trainer.stop_requested = True

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def explain(stop: EmergencyStop, run: TrainingRun) -> str:
    """What went wrong, where to look, and what to go on from."""
    folder, checkpoints = run.log.folder, run.log.checkpoints()
    before = f"the state before it is {checkpoints[-1]}" if checkpoints else "no checkpoint was written yet"
    return (
        f"emergency stop in rollout batch {run.trainer.step + 1}, before the update: {stop}. The evidence is "
        f"in {folder}/emergency; {before}, the best state evaluated {folder}/best_model. Start again, from "
        "one of them (--model_name) or anew, with a lower --learning_rate"
    )


def report(run: TrainingRun, result: dict) -> None:
    """What came of it: pass@1 before and after, the paired gain, and where everything is."""
    before, after, folder = result["before"], result["after"], run.log.folder
    if before is None:
        print(f"interrupted in the first evaluation; continue with --resume {folder}")
        return
    evaluations = {"before": before}
    if after["step"]:
        evaluations[f"after {after['step']} rollout batches"] = after
    for name, figures in evaluations.items():
        low, high = figures["interval_95"]
        print(f"held-out pass@1 {name}: {figures['pass_at_1']:.3f}  (95 % interval {low:.3f} to {high:.3f})")
    if len(evaluations) > 1 and len(before["pass_by_problem"]) == len(after["pass_by_problem"]) > 1:
        gain, low, high = paired_interval(before["pass_by_problem"], after["pass_by_problem"])
        print(f"gain, paired by problem: {gain:+.3f}  (95 % interval {low:+.3f} to {high:+.3f})")
    print(f"run folder: {folder}  (metrics.jsonl, eval.jsonl, samples.jsonl, checkpoints, best_model)")
    if not result["finished"]:
        print(f"interrupted after rollout batch {run.trainer.step}; continue with --resume {folder}")
    else:
        print(f"trained model: {folder / 'final_model'}")


if __name__ == "__main__":
    sys.exit(main())
