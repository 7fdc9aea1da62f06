"""Open a run: a new one, or one to resume, where a checkpoint says how far it has come."""

import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gspo.training.checkpoints import newest_whole, read_state, step_of
from gspo.training.config import GSPOConfig
from gspo.training.find_run import refuse_other_settings, run_folder, settings_of
from gspo.training.record import JsonLines, Record, read_lines
from gspo.training.run_folder import RunFolder
from gspo.training.trackers import open_trackers
from gspo.training.whole_folders import recover


@dataclass
class OpenRun:
    """A run that was checked, with nothing changed on the disk yet.

    checkpoint: what to resume from; None for a run that begins. A run that was killed before its first
    checkpoint begins again (it is deterministic given the seed).
    step, lines: the rollout batches trained on and the lines of the record at the checkpoint.
    """

    config: GSPOConfig
    problems: str
    folder: RunFolder
    record: Record
    checkpoint: Path | None = None
    step: int = 0
    lines: dict[str, int] = field(default_factory=dict)

    def begin(self, described: dict) -> None:
        """Drop what was written after the checkpoint, write config.json, and get ready to record.

        described: what config.json says besides the settings. A resumed run may have another reward function,
            which is reported.

        Raises:
            CannotSave: the disk is full.
        """
        settings = asdict(self.config)
        if self.config.resume is not None:
            before = (settings_of(self.folder.path) or {}).get("reward_function")
            if before is not None and before != described.get("reward_function"):
                print(
                    "warning: the reward function is not the one that the run had so far: what is on record "
                    "was earned under another, and a gain compares the two",
                    file=sys.stderr,
                )
            self.record.rewind(self.step, self.lines)
        self.folder.write_config({**settings, "problems": self.problems, **described})
        self.record.sinks.append(JsonLines(self.folder.path))
        self.record.sinks += open_trackers(self.config.trackers, self.folder.path, settings, self.step)


def open_run(config: GSPOConfig, problems: str, num_queries: int) -> OpenRun:
    """Make the run folder that the configuration names; with config.resume, check the one that it names.

    A run that is refused is left as it is, except that folders which a kill left half written are tidied.

    Args:
        problems: a digest of all problems, by which a resumed run recognises them.
        num_queries: the queries of the whole run, over all epochs.

    Raises:
        ValueError: a folder that already holds a run, that another process works in, or that cannot be made;
            or a run that these settings and problems do not continue, or whose files are damaged.
        CannotSave: the folder cannot be written.
    """
    path = run_folder(asdict(config))
    own_name = config.resume is None and config.run_name is None
    if os.path.lexists(path / "config.json") and config.resume is None and not own_name:  # readable or not
        raise ValueError(
            f"{path} already holds a run: choose another --run_name, or continue it with --resume {path}"
        )
    folder = RunFolder(path, own_name)
    run = OpenRun(config, problems, folder, Record(folder.path))
    try:
        if config.resume is not None:
            _find_checkpoint(run, num_queries)
    except BaseException:
        run.folder.close()
        raise
    return run


def _find_checkpoint(run: OpenRun, num_queries: int) -> None:
    """Find the checkpoint to resume from, and check that these settings and problems continue it."""
    config, folder, settings = run.config, run.folder, asdict(run.config)
    saved = settings_of(folder.path) or {}
    refuse_other_settings(folder.path, saved, settings)
    if run.problems != saved.get("problems"):
        raise ValueError(
            f"--resume: the problems are not those that the run in {folder.path} was started with; has the "
            "file of --dataset_path changed, or the toolkit?"
        )
    for parent in (folder.path, folder.path / "checkpoints"):
        recover(parent)
    checkpoint = _whole_checkpoint(folder, str(config.resume), saved)
    if checkpoint is None:
        return
    state = read_state(checkpoint)
    refuse_other_settings(checkpoint, state["settings"], settings)
    if state["sampled"] > num_queries:
        raise ValueError(
            f"--num_epochs {config.num_epochs}: that is {num_queries} queries, the run has come further, to "
            f"{state['sampled']}"
        )
    run.record.kept_lines(state["step"], state["lines"])  # refuses a damaged record
    run.checkpoint, run.step, run.lines = checkpoint, state["step"], state["lines"]


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
