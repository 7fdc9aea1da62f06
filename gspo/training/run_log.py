"""A run's folder: who may work in it, what is recorded, which checkpoint is gone on from; and wandb.

    gspo_outputs/<run>/
        config.json       the resolved configuration, with versions, hardware, git commit, command line
        metrics.jsonl     one line a rollout batch, flushed
        eval.jsonl        one line an evaluation
        samples.jsonl     best and worst response of some groups, with rewards
        checkpoints/step-N/   written whole or not at all
        best_model/  final_model/     what from_pretrained loads
        emergency/        of an emergency stop: its reason, metrics and rollout batch

A run folder belongs to one process at a time: it is locked, and a lock ends with its process. Of several
processes the main one writes; the others hold a RunLog with no folder and no sinks.
"""

import fcntl
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from gspo.training.alarms import warnings_of
from gspo.training.checkpoints import (
    checkpoints_in,
    newest_whole,
    recover,
    remove,
    step_of,
    sync,
    whole_folder,
    write_whole,
)
from gspo.training.record import FIELDS, JsonLines, read_lines
from gspo.training.rollout_batch import RolloutBatch

# Settings that a resumed run may change: they cannot touch what it has already done.
FREE_ON_RESUME = (
    "resume", "run_name", "output_dir", "num_epochs", "eval_frequency", "save_frequency", "use_wandb",
    "wandb_project", "dry_run", "device", "micro_batch_tokens", "gradient_checkpointing",
)  # fmt: skip
STATE_FILE = "training_state.pt"  # of a checkpoint, beside its model
# Seconds that wandb may take before the run goes on without it.
WANDB_START_S, WANDB_CALL_S, WANDB_FINISH_S = 120, 30, 120


class RunLog:
    """Writes a run's record. Of several processes the main one does; the others' has no folder."""

    def __init__(self, folder: Path | None = None, sinks: Sequence = (), lock: int | None = None):
        self.folder = folder
        self.sinks = list(sinks)
        self._lock = lock  # a file descriptor
        self.history: list[dict] = []  # the rollout batches' metrics so far, for the alarms
        self.raised: set[str] = set()  # kinds of warnings that the last rollout batch called for

    @classmethod
    def create(cls, config: dict, problems: str = "") -> "RunLog":
        """Make (or, with config["resume"], reopen) the run folder that the configuration names.

        Args:
            problems: a digest of the problems, by which a resumed run knows them again.

        Raises:
            ValueError: a new run in a folder that already holds one, a folder that another process works in,
                a resumed run with other settings or problems, or an output folder that cannot be made.
                Nothing on the disk has changed then.
        """
        folder = run_folder(config)
        try:
            if (folder / "config.json").exists() and not config["resume"]:
                raise ValueError(
                    f"{folder} already holds a run: choose another --run_name, or continue it with "
                    f"--resume {folder}"
                )
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder)
        except BlockingIOError:
            raise ValueError(f"another process is at work on the run in {folder}: wait for it") from None
        except OSError as error:
            raise ValueError(f"--output_dir: cannot make {folder} ({error.strerror})") from None
        log = cls(folder, lock=lock)
        try:
            if config["resume"]:
                refuse_other_settings(config, problems)
                for parent in (folder, folder / "checkpoints"):
                    recover(parent)
            else:
                log.begin(config, problems)
        except BaseException:
            log.close()
            raise
        return log

    def begin(self, config: dict, problems: str) -> None:
        """Write config.json and get ready to record. A resumed run does so when it is sure to go on."""
        settings = {**config, "problems": problems, "environment": describe_environment()}
        write_whole(self.folder / "config.json", json.dumps(settings, indent=2) + "\n")
        self.sinks = [JsonLines(self.folder), *([Wandb(self.folder, config)] if config["use_wandb"] else [])]

    def whole_checkpoint(self, resume: str) -> Path | None:
        """The newest whole checkpoint at or before the one that --resume names; None: there is none yet.

        Damaged ones are named on standard error.

        Raises:
            ValueError: none of them is whole, the one named does not exist, or the run must have had one.
        """
        candidates, named = self.checkpoints(), Path(os.path.abspath(resume))
        if named.parent == Path(os.path.abspath(self.folder / "checkpoints")):
            if named.name not in [path.name for path in candidates]:
                raise ValueError(f"--resume {resume}: there is no such checkpoint")
            candidates = [path for path in candidates if step_of(path) <= step_of(named)]
        if not candidates and self._had_checkpoints():
            raise ValueError(
                f"--resume {resume}: the run's checkpoints are missing; put them back, or start a new run"
            )
        newest = newest_whole(
            candidates, STATE_FILE, lambda path, why: print(f"{path} is not used: {why}", file=sys.stderr)
        )
        if candidates and newest is None:
            raise ValueError(
                f"--resume {resume}: no checkpoint in {self.folder} is whole; start again with another "
                "--run_name"
            )
        return newest

    def _had_checkpoints(self) -> bool:
        frequency = settings_of(self.folder).get("save_frequency", 0)
        trained = len(read_lines(self.folder, "metrics"))
        return (self.folder / "final_model").exists() or 0 < frequency < trained

    def rewind(self, step: int, lines: dict[str, int]) -> None:
        """Drop what was written after a checkpoint: a resumed run writes it again.

        Args:
            step: rollout batches trained on at the checkpoint.
            lines: lines of each file then. What comes after them may be damaged.

        Raises:
            ValueError: a damaged line, or lines that are missing; nothing is changed then.
        """
        record = {stream: read_lines(self.folder, stream, lines.get(stream, 0)) for stream in FIELDS}
        for stream, kept in record.items():
            steps = [line["step"] for line in kept if line["step"] <= step]
            every_step = stream != "metrics" or steps == list(range(1, step + 1))
            if len(steps) < lines.get(stream, 0) or not every_step:
                raise ValueError(
                    f"{self.folder / stream}.jsonl lacks lines that the checkpoint follows; put the file "
                    "back, or start anew from the checkpoint's weights (--model_name)"
                )
        # Of a past that is now given up, and first: they need the lines that go next.
        for path in reversed(self.checkpoints()):
            if step_of(path) > step:
                remove(path)
        for stream, kept in record.items():
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_whole(self.folder / f"{stream}.jsonl", text)
        self.history = record["metrics"]
        self.raised = set(warnings_of(self.history)) if self.history else set()

    def line_counts(self, step: int) -> dict[str, int]:
        """Lines of each file up to a step, for rewind()."""
        return {
            stream: sum(line["step"] <= step for line in read_lines(self.folder, stream)) for stream in FIELDS
        }

    def train(self, step: int, metrics: dict) -> list[str]:
        """Record a rollout batch; returns the warnings that it calls for and the one before it did not."""
        self.history.append({"step": step, **metrics})
        for sink in self.sinks:
            sink.write("metrics", step, metrics)
        warnings, before = warnings_of(self.history), self.raised
        self.raised = set(warnings)
        return [warning for kind, warning in warnings.items() if kind not in before]

    def evaluation(self, step: int, metrics: dict) -> None:
        for sink in self.sinks:
            sink.write("eval", step, metrics)

    def samples(self, step: int, records: Sequence[dict]) -> None:
        for record in records:
            for sink in self.sinks:
                sink.write("samples", step, record)

    def emergency(self, step: int, reason: str, metrics: dict, batches: Sequence[RolloutBatch]) -> None:
        """Keep the evidence of a stop: the metrics, and the rollout batch if there is one."""
        with self.writing("emergency") as folder:
            figures = {"step": step, "reason": reason, **metrics}
            # NaN is no JSON: as text
            figures = json.loads(json.dumps(figures, default=str), parse_constant=str)
            (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
            for batch in batches:
                lines = [json.dumps(record, default=str) + "\n" for record in batch.records()]
                (folder / "samples.jsonl").write_text("".join(lines))
                torch.save(batch.state_dict(), folder / "rollout_batch.pt")

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def writing(self, name: str):
        """whole_folder() of folder/name."""
        for path in self.folder.glob("*.jsonl"):  # a checkpoint on disk means that its lines are there too
            sync(path)
        return whole_folder(self.folder / name)

    def evaluations(self) -> list[dict]:
        """The evaluations on record, oldest first."""
        return read_lines(self.folder, "eval")

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return checkpoints_in(self.folder)


class Wandb:
    """The same figures in wandb, under train/ and eval/. WANDB_MODE is honoured, offline included.

    A resumed run goes on in the same wandb run. Trouble with wandb is told once, and the run goes on without.
    """

    def __init__(self, folder: Path, config: dict):
        self.run = None
        self._attempt(lambda: self._start(folder, config), WANDB_START_S)

    def _start(self, folder: Path, config: dict) -> None:
        import wandb

        id_path = folder / "wandb_id"
        if not id_path.exists():
            write_whole(id_path, uuid.uuid4().hex)
        run = wandb.init(
            project=config["wandb_project"],
            name=folder.name,
            dir=str(folder),
            config=config,
            id=id_path.read_text(encoding="utf-8"),
            resume="allow",
        )
        run.define_metric("rollout_batch")
        for prefix in ("train", "eval"):
            run.define_metric(f"{prefix}/*", step_metric="rollout_batch")
        self.run = run

    def write(self, stream: str, step: int, values: dict) -> None:
        prefix = {"metrics": "train", "eval": "eval"}.get(stream)
        if prefix and self.run:
            figures = {"rollout_batch": step, **{f"{prefix}/{k}": v for k, v in values.items()}}
            self._attempt(lambda: self.run.log(figures), WANDB_CALL_S)

    def close(self) -> None:
        if self.run:
            self._attempt(self.run.finish, WANDB_FINISH_S)

    def _attempt(self, call: Callable, seconds: float) -> None:
        """call(), which may raise or hang."""
        errors = []

        def attempt():
            try:
                call()
            except BaseException as error:  # wandb ends threads of its own with SystemExit
                errors.append(f"{type(error).__name__}: {error}".splitlines()[0])

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            errors.append(f"no answer within {seconds:.0f} s")
        if errors:
            self.run = None
            print(f"wandb: {errors[0]}; the run goes on without it, all is in its folder", file=sys.stderr)


# ------------------------------------------------------------------------------------- folders and machines


def run_folder(config: dict) -> Path:
    """output_dir/run_name, by default named by model, algorithm and time; a resumed run's own folder.

    Raises:
        ValueError: a name that is none, or no run to resume.
    """
    if config["resume"] is not None:
        return resumed_folder(config["resume"], config["output_dir"])
    name = config["run_name"] or "-".join(
        [Path(config["model_name"]).name, config["algorithm"], time.strftime("%Y%m%d-%H%M%S")]
    )
    if not re.fullmatch(r"[\w.+-]{1,200}", name) or name.startswith("."):
        raise ValueError(f"--run_name {name!r} must be a plain name: letters, digits, '.', '_', '+', '-'")
    return Path(config["output_dir"]) / name


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
    folder = Path(os.path.abspath(resume))
    runs = [folder, *([folder.parent.parent] if folder.parent.name == "checkpoints" else [])]
    found = [run for run in runs if settings_of(run)]
    if not resume or not found:
        raise ValueError(f"--resume {resume}: that is neither a run's folder nor one of its checkpoints")
    return found[0]


def settings_of(folder: Path) -> dict | None:
    """The settings that a run was started with, or None where there is no run."""
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return saved if isinstance(saved, dict) and "environment" in saved and "algorithm" in saved else None


def refuse_differing(where: Path, saved: dict, config: dict) -> None:
    """Raises ValueError, by name, where settings that shape what a run has done are not those saved there."""
    differing = [
        f"--{name} {saved[name]} (now {value})"
        for name, value in config.items()
        if name not in FREE_ON_RESUME and name in saved and saved[name] != value
    ]
    if differing:
        raise ValueError(f"--resume: {where} was made with {', '.join(differing)}; use its settings")


def refuse_other_settings(config: dict, problems: str = "") -> None:
    """Raises ValueError where a resumed run would not go on as it began; it names what differs.

    problems: as for RunLog.create; empty: not known yet.
    """
    folder = run_folder(config)
    saved = settings_of(folder)
    refuse_differing(folder, saved, config)
    if problems and problems != saved.get("problems"):
        raise ValueError(
            f"--resume: the problems are not those that the run in {folder} was started with; has the file "
            "of --dataset_path changed, or the toolkit?"
        )


def _lock(folder: Path) -> int:
    """A lock on a folder, held until the descriptor is closed or the process ends. BlockingIOError: taken."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def describe_environment() -> dict:
    """Versions, hardware, git commit and command line, for config.json."""
    here = Path(__file__).parent
    commit = None
    if shutil.which("git"):
        git = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(git, cwd=here, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command_line": sys.argv,
        "git_commit": commit or None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        "platform": platform.platform(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "processes": process_count(),
    }


def process_count() -> int:
    """Processes that train together, as torchrun and accelerate's launcher tell them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def peak_memory_gb() -> float:
    """Peak memory so far, in GB: allocated on the GPU, or resident in the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
