"""metrics.jsonl, eval.jsonl and samples.jsonl: what a line holds, written whole and read back.

A line is a JSON object with the "step" it was written at: rollout batches trained on.
"""

import json
import os
from pathlib import Path

from gspo.training.checkpoints import saving

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
# Those that another run of the same settings may have otherwise.
SECONDS = ("generation_s", "reward_s", "scoring_s", "update_s", "tokens_per_s", "peak_memory_gb")
# By file, what every line holds besides the step: each a number, or a list of numbers.
LISTS = ("clip_fraction_by_minibatch", "interval_95", "pass_by_problem")
FIELDS = {
    "metrics": tuple(name for name in GLOSSARY if name not in ("kl", "code_timeouts")),
    "eval": ("pass_at_1", "interval_95", "reward_mean", "response_tokens_mean", "pass_by_problem"),
    "samples": (),
}


class JsonLines:
    """Writes them: one flushed line a record, whole or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, stream: str, step: int, values: dict) -> None:
        """Raises CannotSave."""
        path = _path(self.folder, stream)
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


def read_lines(folder: Path, stream: str, count: int | None = None) -> list[dict]:
    """The first count lines of one of the files, "metrics", "eval" or "samples", or all; a last line without
    its end, cut short by a kill, is none.

    Raises:
        ValueError: a line that is damaged, or no record.
    """
    path = _path(folder, stream)
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [_read(line, stream, f"{path}, line {i + 1}") for i, line in enumerate(lines[:count])]


def _path(folder: Path, stream: str) -> Path:
    return folder / f"{stream}.jsonl"


def _read(line: bytes, stream: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: not valid JSON; the file is damaged") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: no JSON object; the file is damaged")
    wrong = [name for name in FIELDS[stream] if not _is_value_of(name, record.get(name))]
    if type(record.get("step")) is not int or not 0 <= record["step"] < 2**31:
        wrong.insert(0, "step")
    if wrong:
        raise ValueError(f"{where}: {wrong[0]} is missing or no such figure; the file is damaged")
    return record


def _is_value_of(name: str, value) -> bool:
    if name in LISTS:
        whole = isinstance(value, list) and (len(value) == 2 or name != "interval_95")
        return whole and all(map(_is_number, value))
    return _is_number(value)


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # NaN is not
