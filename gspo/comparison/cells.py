"""The runs of a comparison: one for each setting and seed, each an ordinary run folder.

A run's folder is named after its settings, so that the same run is never made twice: a comparison that was
killed goes on where it was, a sixth seed adds to five, and two comparisons share the runs that they have in
common.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gspo.report.run_record import RunRecord, read_run
from gspo.training.config import GSPOConfig
from gspo.training.find_run import FREE_ON_RESUME

# Settings that change what is on record of a run, although a resumed run may change them.
OF_THE_RECORD = {"num_epochs", "eval_frequency", "rollout_engine", "mismatch_mask", "shard"}
# Settings that say how and where a run is made, not what it is.
FREE = set(FREE_ON_RESUME) - OF_THE_RECORD
# Settings whose defaults are the algorithm's.
OF_THE_ALGORITHM = {"left_clip_range", "right_clip_range"}


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    arm: the label of its setting. index: the place of its seed among those of the setting; runs of the same
    index are paired. config: with a device. folder: the run's.
    """

    arm: str
    index: int
    config: GSPOConfig = field(compare=False)
    folder: Path

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def flags(self) -> list[str]:
        """The flags of train_gspo.py that make this configuration."""
        settings = settings_given(self.config).items()
        return [f"--{name}" if value is True else f"--{name}={value}" for name, value in settings]

    @property
    def is_named_right(self) -> bool:
        """False if a file that the run depends on has changed since the comparison began."""
        return self.folder.name == cell_name(self.config)

    @property
    def log(self) -> Path:
        """The file with all that the run prints."""
        return self.folder.with_name(f"{self.folder.name}.log")


def settings_given(config: GSPOConfig) -> dict[str, Any]:
    """The settings that are not at their defaults."""
    values = asdict(config)
    return {f.name: values[f.name] for f in fields(config) if values[f.name] != f.default}


def cell_name(config: GSPOConfig) -> str:
    """The name of a run's folder: model, algorithm, seed and a digest of its settings and its files.

    A setting at its default does not count, so that a new one does not give every run another name. The
    device does, unless it is the CPU, since the type of the computations depends on it.
    """
    settings = {name: value for name, value in settings_given(config).items() if name not in FREE}
    reward_file = (config.reward or "").rpartition(":")[0]
    for path in (config.dataset_path, config.eval_path, reward_file):
        if path and Path(path).is_file():
            settings[f"contents of {path}"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if config.device not in (None, "cpu"):
        settings["device"] = config.device
    if Path(config.model_name).is_dir():
        paths = [path for path in sorted(Path(config.model_name).iterdir()) if path.is_file()]
        files = [(path.name, path.stat()) for path in paths]
        settings["model's files"] = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    model = re.sub(r"[^\w.+-]", "-", Path(config.model_name).name)[:80].lstrip(".") or "model"
    return f"{model}-{config.algorithm}-seed{config.seed}-{digest}"


def decided_differently(runs: Sequence[tuple[GSPOConfig, Mapping[str, Any]]]) -> list[str]:
    """A note for each setting that all runs of a model leave open, and that is not the same in all of them.

    Runs of different models may differ, since settings that are left open depend on the size of the model.

    runs: configurations as they are given, and the settings of their runs.
    """
    notes: dict[str, None] = {}
    for model in dict.fromkeys(config.model_name for config, _ in runs):
        of_model = [(settings_given(config), run) for config, run in runs if config.model_name == model]
        given = set[str]().union(*(settings for settings, _ in of_model))
        for name in (f.name for f in fields(GSPOConfig)):
            values = dict.fromkeys(str(run[name]) for _, run in of_model if name in run)
            if len(values) > 1 and name not in given | FREE | OF_THE_ALGORITHM:
                listed = ", ".join(values)
                notes[f"--{name} is left open and differs between runs ({listed}): name it for all"] = None
    return list(notes)


def record_of(cell: Cell) -> RunRecord | None:
    """Read the record of a run; None if it has not come so far as to have one. Raises OSError."""
    try:
        return read_run(cell.folder)
    except (FileNotFoundError, ValueError):
        return None


def is_complete(cell: Cell, run: RunRecord | None) -> bool:
    """True if the run has nothing left to do: it is finished with its model saved, or was stopped for good.

    An emergency stop of the policy would come again: the run is deterministic. One that asks to mend the
    reward or the sampler is no result, nor is one before the first evaluation.
    """
    if run is None or run.going:
        return False
    if run.emergency:
        return bool(run.evaluations) and not run.emergency.get("advice")
    return run.finished and (cell.folder / "final_model").is_dir()


def make_room(cell: Cell, run: RunRecord | None, discard_models: bool = False) -> None:
    """Delete a folder that a kill has left without a record, or the checkpoints of a run that is complete.

    discard_models: the weights of a complete run go too; its record and the cards of its models stay.
    """
    if run is None and not (cell.folder / "config.json").exists():
        shutil.rmtree(cell.folder, ignore_errors=True)
    elif run and is_complete(cell, run):
        if discard_models or not run.emergency:
            shutil.rmtree(cell.folder / "checkpoints", ignore_errors=True)
        if discard_models:
            for weights in cell.folder.glob("*_model/*.safetensors"):
                weights.unlink()
