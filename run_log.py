"""The record of a run: its folder, metrics.jsonl, eval.jsonl, samples.jsonl, wandb, and the alarms' rules.

    gspo_outputs/<run>/
        config.json       the resolved configuration, with versions, hardware, git commit, command line
        metrics.jsonl     one line a rollout batch, flushed; the record that everything else is read from
        eval.jsonl        one line an evaluation
        samples.jsonl     best and worst response of some groups, with rewards
        checkpoints/step-N/   written whole or not at all
        best_model/  final_model/     what from_pretrained loads

Only the main process writes; the others hold a RunLog with no folder and no sinks.
"""

import json
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

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
    "entropy": ("nats per token", "minus the mean log-probability of the sampled tokens"),
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
SECONDS = ("generation_s", "reward_s", "scoring_s", "update_s", "tokens_per_s", "peak_memory_gb")


class RunLog:
    """Writes a run's record. Without a folder it writes nothing, so that callers need no branch."""

    def __init__(self, folder: Path | None = None, sinks: Sequence = ()):
        self.folder = folder
        self.sinks = list(sinks)
        self.history: list[dict] = []  # the rollout batches' metrics so far, for the alarms
        self.raised: set[str] = set()  # kinds of warnings that the last rollout batch called for

    @classmethod
    def create(cls, config: dict) -> "RunLog":
        """Make (or, with config["resume"], reopen) the run folder that the configuration names.

        Raises:
            ValueError: a new run in a folder that already holds one.
        """
        folder = run_folder(config)
        if not config["resume"] and (folder / "config.json").exists():
            raise ValueError(
                f"{folder} already holds a run: choose another --run_name, or continue it with "
                f"--resume {folder}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_other_settings(folder / "config.json", config)
        _write_json(folder / "config.json", {**config, "environment": describe_environment()})
        sinks = [JsonLines(folder)]
        if config["use_wandb"]:
            sinks.append(Wandb(folder, config))
        return cls(folder, sinks)

    def rewind(self, step: int) -> None:
        """Drop the lines after a step, which a resumed run is about to write again."""
        if self.folder is None:
            return
        for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl"):
            lines = [line for line in _read_lines(self.folder / name) if line["step"] <= step]
            text = "".join(json.dumps(line, allow_nan=True) + "\n" for line in lines)
            _write_text(self.folder / name, text)
        for path in self.checkpoints():  # of a past that is now given up
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        self.history = _read_lines(self.folder / "metrics.jsonl")

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

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()

    @contextmanager
    def writing(self, name: str):
        """A folder to fill, which takes the place of folder/name when complete: whole or not at all.

        Yields None where there is no run folder.
        """
        if self.folder is None:
            yield None
            return
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        for path in sorted(partial.rglob("*")):
            _sync(path)
        previous = target.with_name(target.name + ".previous")
        shutil.rmtree(previous, ignore_errors=True)
        if target.exists():
            target.rename(previous)
        partial.rename(target)
        _sync(target.parent)
        shutil.rmtree(previous, ignore_errors=True)

    def evaluations(self) -> list[dict]:
        """The evaluations on record, oldest first."""
        return _read_lines(self.folder / "eval.jsonl") if self.folder else []

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return checkpoints_in(self.folder) if self.folder else []


class JsonLines:
    """metrics.jsonl, eval.jsonl and samples.jsonl, one flushed line a record."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, stream: str, step: int, values: dict) -> None:
        with open(self.folder / f"{stream}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, default=str) + "\n")

    def close(self) -> None:
        pass


class Wandb:
    """The same figures in wandb, under train/ and eval/. WANDB_MODE is honoured, offline included."""

    def __init__(self, folder: Path, config: dict):
        import wandb

        self.run = wandb.init(
            project=config["wandb_project"], name=folder.name, dir=str(folder), config=config
        )
        self.run.define_metric("rollout_batch")
        for prefix in ("train", "eval"):
            self.run.define_metric(f"{prefix}/*", step_metric="rollout_batch")

    def write(self, stream: str, step: int, values: dict) -> None:
        prefix = {"metrics": "train", "eval": "eval"}.get(stream)
        if prefix:
            self.run.log({"rollout_batch": step, **{f"{prefix}/{k}": v for k, v in values.items()}})

    def close(self) -> None:
        self.run.finish()


# ----------------------------------------------------------------------------------------------- the alarms


def stop_reason(metrics: dict) -> str | None:
    """Why the update that these metrics describe must not reach the weights, or None.

    Reads loss, grad_norm, importance_ratio_max (a healthy one stays within a few per cent of 1).
    """
    for name in ("loss", "grad_norm", "importance_ratio_mean", "importance_ratio_max"):
        if not math.isfinite(metrics[name]):
            return f"{name} is {metrics[name]}"
    if metrics["importance_ratio_max"] > 100:
        return f"importance_ratio_max is {metrics['importance_ratio_max']:.4g}, above 100"
    return None


def gibberish_reason(history: Sequence[dict]) -> str | None:
    """Why the policy's text is beyond repair, measured against the run's own start, or None.

    Entropy near that of a uniform choice, or responses that no longer end although they used to, over five
    rollout batches in a row with nothing rewarded.
    """
    if len(history) < 10:
        return None
    start, recent = history[:5], history[-5:]
    if any(batch["reward_mean"] > 0 for batch in recent):
        return None
    if all(batch["entropy"] > 3 * max(1.0, _mean(start, "entropy")) for batch in recent):
        now, then = _mean(recent, "entropy"), _mean(start, "entropy")
        return f"entropy rose from {then:.2f} to {now:.2f} nats per token"
    if _mean(start, "truncated_fraction") < 0.5 and all(batch["truncated_fraction"] == 1 for batch in recent):
        return "no response has ended for five rollout batches, and nothing was rewarded"
    return None


def warnings_of(history: Sequence[dict]) -> dict[str, str]:
    """What a user should look at, read off the metric history (oldest first): kind to message."""
    last, warnings = history[-1], {}
    lowest, highest = last["importance_ratio_min"], last["importance_ratio_max"]
    if highest > 10 or lowest < 0.1:
        warnings["ratio"] = (
            f"importance ratios reach {lowest:.3g} to {highest:.3g}: the policy moves far in one rollout "
            "batch; lower --learning_rate"
        )
    if last["clip_fraction"] > 0.8:
        warnings["clip"] = (
            f"{last['clip_fraction']:.0%} of tokens are clipped: most of the batch teaches nothing; "
            "lower --learning_rate or widen the clip range"
        )
    if last["null_clip_fraction"] > 0.01:
        warnings["null clip"] = (
            f"null_clip_fraction is {last['null_clip_fraction']:.3g}: scoring noise alone leaves the clip "
            "range; use --dtype float32 or a wider range"
        )
    if len(history) >= 10 and all(batch["zero_variance_groups"] == 1 for batch in history[-10:]):
        warnings["no signal"] = (
            "no learning signal: in ten rollout batches every group's rewards were equal; "
            "try an easier --difficulty, a larger --group_size or a stronger model"
        )
    first, latest = _mean(history[:10], "loss"), _mean(history[-10:], "loss")
    if len(history) >= 30 and latest > first + 1:
        warnings["loss"] = f"the loss has risen from {first:.3g} to {latest:.3g}"
    return warnings


def _mean(history, name):
    return sum(batch[name] for batch in history) / len(history)


# ------------------------------------------------------------------------------------- folders and machines


def run_folder(config: dict) -> Path:
    """output_dir/run_name, by default named by model, algorithm and time; a resumed run's own folder."""
    if config["resume"]:
        return find_checkpoint(config["resume"], config["output_dir"]).parent.parent
    name = config["run_name"] or "-".join(
        [Path(config["model_name"]).name, config["algorithm"], time.strftime("%Y%m%d-%H%M%S")]
    )
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise ValueError(f"--run_name {name!r} must be a plain name: letters, digits, '.', '_', '+', '-'")
    return Path(config["output_dir"]) / name


def _refuse_other_settings(path: Path, config: dict) -> None:
    """A resumed run keeps the settings that shaped its past; ValueError names those that differ."""
    if not (config["resume"] and path.exists()):
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    differing = [k for k, v in config.items() if k not in FREE_ON_RESUME and k in saved and saved[k] != v]
    if differing:
        named = ", ".join(f"--{k} {saved[k]} (now {config[k]})" for k in differing)
        raise ValueError(f"--resume: the run in {path.parent} was started with {named}; use its settings")


def checkpoints_in(folder: Path) -> list[Path]:
    """The run folder's whole checkpoints, oldest first."""
    found = (folder / "checkpoints").glob("step-*")
    return sorted((p for p in found if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))


def find_checkpoint(resume: str, output_dir: str) -> Path:
    """The checkpoint that --resume names: "latest", a run folder, or a checkpoint folder.

    Raises:
        ValueError: there is none.
    """
    if resume == "latest":
        runs = [run for run in Path(output_dir).glob("*") if checkpoints_in(run)]
        newest = (checkpoints_in(run)[-1] for run in runs)
        candidates = sorted(newest, key=lambda path: path.stat().st_mtime)
    elif Path(resume).absolute().parent.name == "checkpoints" and (Path(resume) / STATE_FILE).exists():
        candidates = [Path(resume)]
    else:
        candidates = checkpoints_in(Path(resume))
    if not candidates:
        where = output_dir if resume == "latest" else resume
        raise ValueError(f"--resume {resume}: no checkpoint in {where}; name a run or checkpoint folder")
    return candidates[-1]


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
    """The whole lines of a jsonl file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _write_json(path: Path, value) -> None:
    _write_text(path, json.dumps(value, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
