"""The record of a run: its folder, metrics.jsonl, eval.jsonl, samples.jsonl, and wandb.

    gspo_outputs/<run>/
        config.json       the resolved configuration, with versions, hardware, git commit, command line
        metrics.jsonl     one line a rollout batch, flushed; the record that everything else is read from
        eval.jsonl        one line an evaluation
        samples.jsonl     best and worst response of some groups, with rewards
        checkpoints/step-N/   written whole or not at all
        best_model/  final_model/     what from_pretrained loads
        emergency/        of an emergency stop: its reason, metrics and rollout batch

A run folder belongs to one process at a time: it is locked, and a lock ends with its process. Of several
processes the main one writes; the others hold a RunLog with no folder and no sinks.
"""

import contextlib
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

from alarms import warnings_of
from checkpoints import (
    checkpoints_in,
    newest_whole,
    recover,
    saving,
    step_of,
    sync,
    whole_folder,
    write_whole,
)
from rollout_batch import RolloutBatch

# What is logged for each rollout batch: (unit, meaning and reduction). The README's glossary is this table.
GLOSSARY = {
    "loss": ("-", "minus the objective over the rollout batch, each response as its update saw it"),
    "clip_fraction": ("share", "response tokens whose clipped branch is in force, of all in the batch"),
    "clip_fraction_sequences": ("share", "responses with a clipped token, of all responses in the batch"),
    "clip_fraction_by_minibatch": (
        "share",
        "clip_fraction of each update in turn; 0 for the first after pi_old is set",
    ),
    "null_clip_fraction": ("share", "tokens outside the clip range when scored twice with the same weights"),
    "importance_ratio_mean": ("-", "mean ratio to pi_old, over responses (GSPO) or tokens (GRPO) that teach"),
    "importance_ratio_std": ("-", "standard deviation of the ratio, likewise"),
    "importance_ratio_min": ("-", "smallest ratio, likewise"),
    "importance_ratio_max": ("-", "largest ratio, likewise"),
    "reward_mean": ("reward", "mean over the judged responses of the batch"),
    "reward_std": ("reward", "standard deviation over the judged responses of the batch"),
    "zero_variance_groups": ("share", "groups whose rewards are all equal, which teach nothing"),
    "unjudged_responses": ("count", "responses that could not be judged: no advantage, out of every mean"),
    "code_timeouts": ("count", "responses whose code ran out of time; from the toolkit's own rewards"),
    "response_tokens_mean": ("tokens", "mean response length, end token included"),
    "truncated_fraction": ("share", "responses cut before their end token"),
    "repetition": ("share", "runs of 4 tokens that stood in the same response before, mean over responses"),
    "unreadable_characters": ("share", "control and replacement characters, mean over responses"),
    "entropy": ("nats per token", "minus the mean log-probability of the sampled tokens"),
    "sampler_gap": (
        "nats per token",
        "mean distance of the sampler's log-probabilities from the scorer's, over responses that teach",
    ),
    "kl": ("nats per token", "estimated KL to the starting model; only with a kl_coef"),
    "grad_norm": ("-", "gradient norm before clipping, mean over the batch's optimizer updates"),
    "learning_rate": ("-", "of the batch's last optimizer update"),
    "generation_s": ("s", "sampling the responses"),
    "reward_s": ("s", "judging them"),
    "scoring_s": ("s", "log-probabilities under pi_old"),
    "update_s": ("s", "forward, backward and optimizer steps"),
    "tokens_per_s": ("tokens/s", "response tokens of the batch, over the sum of the four times"),
    "peak_memory_gb": ("GB", "peak so far: of the GPU where there is one, else of the process"),
}
# Settings that a resumed run may change: they cannot touch what it has already done.
FREE_ON_RESUME = (
    "resume", "run_name", "output_dir", "num_epochs", "eval_frequency", "save_frequency", "use_wandb",
    "wandb_project", "dry_run", "device", "micro_batch_tokens", "gradient_checkpointing",
)  # fmt: skip
STATE_FILE = "training_state.pt"  # of a checkpoint, beside its model
# Seconds that wandb may take before the run goes on without it.
WANDB_START_S, WANDB_CALL_S, WANDB_FINISH_S = 120, 30, 120
SECONDS = ("generation_s", "reward_s", "scoring_s", "update_s", "tokens_per_s", "peak_memory_gb")


class RunLog:
    """Writes a run's record. Without a folder it writes nothing, so that callers need no branch."""

    def __init__(self, folder: Path | None = None, sinks: Sequence = (), lock: int | None = None):
        self.folder = folder
        self.sinks = list(sinks)
        self._lock = lock  # a file descriptor
        self.history: list[dict] = []  # the rollout batches' metrics so far, for the alarms
        self.raised: set[str] = set()  # kinds of warnings that the last rollout batch called for

    @classmethod
    def create(cls, config: dict) -> "RunLog":
        """Make (or, with config["resume"], reopen) the run folder that the configuration names.

        Raises:
            ValueError: a new run in a folder that already holds one, a folder that another process works in,
                a resumed run with other settings, or an output folder that cannot be made.
        """
        folder = run_folder(config)
        held = folder / "config.json"
        try:
            if held.exists() and not config["resume"]:
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
                for parent in (folder, folder / "checkpoints"):
                    recover(parent)
                _refuse_other_settings(held, config)
            else:
                log.begin(config)
        except BaseException:
            log.close()
            raise
        return log

    def begin(self, config: dict) -> None:
        """Write config.json and get ready to record. A resumed run does so when it is sure to go on."""
        if self.folder is None:
            return
        settings = {**config, "environment": describe_environment()}
        write_whole(self.folder / "config.json", json.dumps(settings, indent=2) + "\n")
        self.sinks = [JsonLines(self.folder), *([Wandb(self.folder, config)] if config["use_wandb"] else [])]

    def whole_checkpoint(self, resume: str) -> Path | None:
        """The newest whole checkpoint at or before the one that --resume names; None: there is none yet.

        Damaged ones are named on standard error.

        Raises:
            ValueError: none of them is whole, or the one named does not exist.
        """
        if self.folder is None:
            return None
        candidates = self.checkpoints()
        if Path(resume).absolute().parent == (self.folder / "checkpoints").absolute():
            if Path(resume).absolute() not in [path.absolute() for path in candidates]:
                raise ValueError(f"--resume {resume}: there is no such checkpoint")
            candidates = [path for path in candidates if step_of(path) <= step_of(Path(resume))]
        newest = newest_whole(
            candidates, lambda path, why: print(f"{path} is not used: {why}", file=sys.stderr)
        )
        if candidates and newest is None:
            raise ValueError(
                f"--resume {resume}: no checkpoint in {self.folder} is whole; start again with another "
                "--run_name"
            )
        return newest

    def rewind(self, step: int, evaluations: int) -> None:
        """Drop what was written after a step and so many evaluations: a resumed run writes it again."""
        if self.folder is None:
            return
        for name in ("metrics.jsonl", "samples.jsonl", "eval.jsonl"):
            lines = _read_lines(self.folder / name)
            kept = lines[:evaluations] if name == "eval.jsonl" else [x for x in lines if x["step"] <= step]
            write_whole(self.folder / name, "".join(json.dumps(line) + "\n" for line in kept))
        for path in self.checkpoints():  # of a past that is now given up
            if step_of(path) > step:
                shutil.rmtree(path)
        self.history = _read_lines(self.folder / "metrics.jsonl")
        self.raised = set(warnings_of(self.history)) if self.history else set()

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
            if folder is None:
                return
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
        """whole_folder() of folder/name; yields None where there is no run folder."""
        if self.folder is None:
            return contextlib.nullcontext()
        for path in self.folder.glob("*.jsonl"):  # a checkpoint on disk means that its lines are there too
            sync(path)
        return whole_folder(self.folder / name)

    def evaluations(self) -> list[dict]:
        """The evaluations on record, oldest first."""
        return _read_lines(self.folder / "eval.jsonl") if self.folder else []

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return checkpoints_in(self.folder) if self.folder else []


class JsonLines:
    """metrics.jsonl, eval.jsonl and samples.jsonl, one flushed line a record, whole or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, stream: str, step: int, values: dict) -> None:
        """Raises CannotSave."""
        path = self.folder / f"{stream}.jsonl"
        line = json.dumps({"step": step, **values}, default=str) + "\n"
        with saving(path), open(path, "ab") as file:
            start = file.tell()
            try:
                file.write(line.encode())
                file.flush()
            except OSError:
                os.truncate(path, start)
                raise

    def close(self) -> None:
        pass


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
    if config["resume"]:
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
    folder = Path(resume)
    folder = folder.parent.parent if folder.absolute().parent.name == "checkpoints" else folder
    if not settings_of(folder):
        raise ValueError(f"--resume {resume}: that is neither a run's folder nor one of its checkpoints")
    return folder


def settings_of(folder: Path) -> dict | None:
    """The settings that a run was started with, or None where there is no run."""
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return saved if isinstance(saved, dict) and "environment" in saved and "algorithm" in saved else None


def differing_settings(saved: dict, config: dict) -> list[str]:
    """Flags that a resumed run would change, although they shape what it has done, and their values."""
    return [
        f"--{name} {saved[name]} (now {value})"
        for name, value in config.items()
        if name not in FREE_ON_RESUME and name in saved and saved[name] != value
    ]


def _refuse_other_settings(path: Path, config: dict) -> None:
    differing = differing_settings(settings_of(path.parent), config)
    if differing:
        raise ValueError(
            f"--resume: the run in {path.parent} was started with {', '.join(differing)}; use its settings"
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
    }


def peak_memory_gb() -> float:
    """Peak memory so far, in GB: allocated on the GPU, or resident in the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _read_lines(path: Path) -> list[dict]:
    """The whole lines of a jsonl file; a last line cut short by a kill is left out.

    Raises:
        ValueError: another line is broken.
    """
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}, line {number}: not valid JSON; the file is damaged") from None
    return lines
