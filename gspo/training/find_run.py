"""The folder of a run: the name of a new one, and how --resume finds an old one. Does not import torch."""

import contextlib
import itertools
import json
import os
import re
import time
from dataclasses import fields
from pathlib import Path

from gspo.training.config import GSPOConfig

# Settings that a resumed run may change: they do not affect what it has already done.
FREE_ON_RESUME = (
    "resume", "run_name", "output_dir", "num_epochs", "eval_frequency", "save_frequency", "use_wandb",
    "log_to", "wandb_project", "dry_run", "plan_for", "probe", "device", "micro_batch_tokens",
    "gradient_checkpointing", "shard", "rollout_rows", "rollout_engine", "vllm_url", "mismatch_mask",
)  # fmt: skip


def run_folder(config: dict) -> Path:
    """output_dir/run_name, by default model, algorithm, seed and time; or the folder of the resumed run.

    Raises:
        ValueError: run_name is not a plain name, or there is no run to resume.
    """
    if config["resume"] is not None:
        return resumed_folder(config["resume"], config["output_dir"])
    model, now = Path(config["model_name"]).name, time.strftime("%Y%m%d-%H%M%S")
    name = config["run_name"] or f"{model}-{config['algorithm']}-seed{config['seed']}-{now}"
    if not re.fullmatch(r"[\w.+-]{1,200}", name) or name.startswith("."):
        raise ValueError(f"--run_name {name!r} must be a plain name: letters, digits, '.', '_', '+', '-'")
    return Path(config["output_dir"]) / name


def make_new_folder(path: Path) -> Path:
    """Make a folder of this name, or with -2, -3 and so on behind it if the name is taken. Returns its path.

    Making a folder either succeeds or finds it there, so two processes never get the same one.

    Raises:
        OSError: the folder cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with contextlib.suppress(FileExistsError):
            candidate.mkdir()
            break
    return candidate


def resumed_folder(resume: str, output_dir: str) -> Path:
    """The run folder that --resume names: "latest" (the run that was started last), a run, or a checkpoint.

    Raises:
        ValueError: there is none.
    """
    if resume == "latest":
        runs = [path for path in Path(output_dir).glob("*") if settings_of(path)]
        if not runs:
            raise ValueError(f"--resume latest: no run in {output_dir}; name a run or checkpoint folder")
        return max(runs, key=lambda run: (run / "config.json").stat().st_mtime_ns)
    named = Path(os.path.abspath(resume))
    candidates = [named]
    if named.parent.name == "checkpoints":
        candidates.append(named.parent.parent)
    for folder in candidates:
        if resume and settings_of(folder):
            return folder
    raise ValueError(f"--resume {resume}: that is neither a run's folder nor one of its checkpoints")


def settings_of(folder: Path) -> dict | None:
    """The settings that a run was started with, or None if the folder holds no run."""
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_run = isinstance(saved, dict) and "environment" in saved and "algorithm" in saved
    return saved if is_run else None


def refuse_other_settings(where: Path, saved: dict, config: dict) -> None:
    """Compare the settings of a resumed run with those saved in a run folder or checkpoint.

    A run that was made before a setting was there had its default.

    Raises:
        ValueError: a setting differs that shaped what the run has already done; the message names each.
    """
    decided = {f.name: f.default for f in fields(GSPOConfig) if f.default not in (None, "auto")}
    before = decided | saved
    differing = [
        f"--{name} {before[name]} (now {value})"
        for name, value in config.items()
        if name not in FREE_ON_RESUME and name in before and before[name] != value
    ]
    if differing:
        raise ValueError(f"--resume: {where} was made with {', '.join(differing)}; use its settings")
