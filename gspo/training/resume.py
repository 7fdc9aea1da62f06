"""Open a run: a new one, or one to go on with, where a checkpoint says how far it has come."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from gspo.training.checkpoints import newest_whole, read_state, step_of
from gspo.training.config import GSPOConfig
from gspo.training.find_run import refuse_other_settings, run_folder, settings_of
from gspo.training.record import JsonLines, Record, read_lines
from gspo.training.run_folder import RunFolder
from gspo.training.wandb_sink import Wandb
from gspo.training.whole_folders import recover


@dataclass
class OpenRun:
    """A run that is ready to be recorded.

    checkpoint: where it goes on from; None for a run that begins. A run that was killed before its first
    checkpoint begins again (it is deterministic given the seed).
    """

    folder: RunFolder
    record: Record
    checkpoint: Path | None


def open_run(config: GSPOConfig, problems: str, num_batches: int) -> OpenRun:
    """Make the run folder that the configuration names, or with config.resume rewind the one that it names.

    Everything is read and checked before anything on the disk changes, except that folders which a kill left
    half written are tidied.

    Args:
        problems: a digest of all problems, by which a resumed run recognises them.
        num_batches: the rollout batches of the whole run.

    Raises:
        ValueError: a folder that already holds a run, that another process works in, or that cannot be made;
            or a run that these settings and problems do not continue, or whose files are damaged.
        CannotSave: the folder cannot be written.
    """
    settings = asdict(config)
    path = run_folder(settings)
    is_run = (path / "config.json").exists()
    if is_run and config.resume is None:
        raise ValueError(
            f"{path} already holds a run: choose another --run_name, or continue it with --resume {path}"
        )
    folder = RunFolder(path)
    try:
        record = Record(path)
        checkpoint = None
        if config.resume is not None:
            checkpoint = _rewind(folder, record, config, problems, num_batches)
        folder.write_config(settings, problems)
        record.sinks.append(JsonLines(path))
        if config.use_wandb:
            record.sinks.append(Wandb(path, settings))
    except BaseException:
        folder.close()
        raise
    return OpenRun(folder, record, checkpoint)


def _rewind(
    folder: RunFolder, record: Record, config: GSPOConfig, problems: str, num_batches: int
) -> Path | None:
    """Find the checkpoint to go on from, check that the run continues it, and drop what came after it."""
    settings = asdict(config)
    saved = settings_of(folder.path) or {}
    refuse_other_settings(folder.path, saved, settings)
    if problems != saved.get("problems"):
        raise ValueError(
            f"--resume: the problems are not those that the run in {folder.path} was started with; has the "
            "file of --dataset_path changed, or the toolkit?"
        )
    for parent in (folder.path, folder.path / "checkpoints"):
        recover(parent)
    checkpoint = _whole_checkpoint(folder, str(config.resume), saved)
    if checkpoint is None:
        record.rewind(0, {})
        return None
    state = read_state(checkpoint, lazily=True)
    refuse_other_settings(checkpoint, state["settings"], settings)
    sampled = state["step"] + len(state["pending"])
    if sampled > num_batches:
        raise ValueError(
            f"--num_epochs {config.num_epochs}: that is {num_batches} rollout batches, the run has come "
            f"further, to {sampled}"
        )
    record.rewind(state["step"], state["lines"])
    return checkpoint


def _whole_checkpoint(folder: RunFolder, resume: str, saved: dict) -> Path | None:
    """The newest whole checkpoint at or before the one that --resume names. None: the run has none yet.

    Raises:
        ValueError: none of them is whole, the one named does not exist, or the run must have had one.
    """
    candidates, named = folder.checkpoints(), Path(os.path.abspath(resume))
    if named.parent == Path(os.path.abspath(folder.path / "checkpoints")):
        if named.name not in [path.name for path in candidates]:
            raise ValueError(f"--resume {resume}: there is no such checkpoint")
        candidates = [path for path in candidates if step_of(path) <= step_of(named)]
    if not candidates:
        trained = len(read_lines(folder.path, "metrics"))
        had_checkpoints = 0 < saved.get("save_frequency", 0) < trained
        if had_checkpoints or (folder.path / "final_model").exists():
            raise ValueError(
                f"--resume {resume}: the run's checkpoints are missing; put them back, or start a new run"
            )
        return None
    newest = newest_whole(candidates)
    if newest is None:
        raise ValueError(
            f"--resume {resume}: no checkpoint in {folder.path} is whole; start again with another --run_name"
        )
    return newest
