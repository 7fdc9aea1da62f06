"""The record of a run: metrics, eval, samples and eval_samples.jsonl, and everything that reads along.

    python -m gspo.training.record      prints the glossary of the metrics, the table in docs/metrics.md

A line is a JSON object with the "step" at which it was written: the number of rollout batches trained on. The
files are the record; other sinks (trackers) get the same lines, and the alarms read them.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from gspo.training.alarms import warnings_of
from gspo.training.whole_folders import remove, saving, write_whole

# What is logged for each rollout batch: name to (unit, meaning and reduction).
GLOSSARY = {
    "loss": (
        "-",
        "minus the objective, mean over the updates, each weighted by its responses; those in none add 0",
    ),
    "clip_fraction": (
        "share",
        "response tokens whose clipped branch is in force (cispo: with a capped weight), of all in the batch",
    ),
    "clip_fraction_eligible": (
        "share",
        "the same, of the tokens that can clip: in responses with an advantage, after the first update "
        "(with --pi_old sampler: in all updates)",
    ),
    "clip_fraction_left": ("share", "the part of clip_fraction_eligible with a ratio below the clip range"),
    "clip_fraction_right": ("share", "the part of clip_fraction_eligible with a ratio above the clip range"),
    "eligible_fraction": ("share", "response tokens that can clip, of all in the batch"),
    "clip_fraction_sequences": ("share", "responses with a clipped token, of all responses in the batch"),
    "clip_fraction_by_minibatch": (
        "share",
        "clip_fraction of each update that had a group with a signal; 0 for the first one after sampling, "
        "unless pi_old is the sampler's",
    ),
    "ratio_spread": (
        "clip ranges",
        "median |s - 1| of the responses that can clip, in units of the mean of the left and the right clip "
        "range (grpo, cispo: each response's median |w - 1|; dppo: |pi - pi_old|); 0 if none can",
    ),
    "updates_without_signal": (
        "count",
        "optimizer updates not made: no group with a signal was left, or every response was clipped",
    ),
    "null_clip_fraction": (
        "share",
        "tokens outside the clip range if log-probabilities are computed twice with the same weights; on the "
        "first rollout batch and on the one after each evaluation (--pi_old sampler: by sampler and trainer)",
    ),
    "routing_changed": (
        "share",
        "experts chosen under pi_old that the policy's routers no longer choose, over the tokens of the "
        "responses that have a signal, in the updates after the first; of mixtures of experts, on each "
        "rollout batch with --routing_replay, else where null_clip_fraction is measured",
    ),
    "routing_changed_by_minibatch": (
        "share",
        "the same of each update that had a group with a signal; 0 for the first one after sampling",
    ),
    "importance_ratio_mean": (
        "-",
        "mean ratio to pi_old, over the responses (all but GSPO: tokens) that have a signal; 1 if none has",
    ),
    "importance_ratio_std": ("-", "standard deviation of these ratios"),
    "importance_ratio_min": ("-", "smallest of these ratios"),
    "importance_ratio_max": ("-", "largest of these ratios"),
    "reward_mean": ("reward", "mean over the judged responses of the batch; 0 if there is none"),
    "reward_std": ("reward", "standard deviation over the judged responses of the batch"),
    "queries": ("count", "queries drawn; with dynamic sampling more than batch_size"),
    "groups_all_right": ("share", "groups in which every judged response passed"),
    "groups_all_wrong": ("share", "groups in which no judged response passed"),
    "zero_variance_groups": ("share", "groups whose rewards are all equal"),
    "unjudged_responses": ("count", "responses without a reward: they have no advantage and enter no mean"),
    "code_timeouts": ("count", "responses whose code ran out of time; logged by the toolkit's own rewards"),
    "reward_errors": ("count", "responses on which --reward raised, ended its process or returned nonsense"),
    "reward_timeouts": ("count", "responses on which --reward took too long"),
    "reward_part/NAME": ("reward", "mean of a named part of the reward, over the responses that have it"),
    "response_tokens_mean": ("tokens", "mean response length, end token included"),
    "truncated_fraction": ("share", "responses cut before their end token"),
    "repetition": (
        "share",
        "4-token sequences that repeat an earlier one of the response, mean over responses",
    ),
    "unreadable_characters": ("share", "control and replacement characters, mean over responses"),
    "entropy": ("nats per token", "minus the mean log-probability of the sampled tokens"),
    "sampler_gap": (
        "nats per token",
        "mean absolute difference between the log-probabilities of sampler and trainer with the weights that "
        "sampled, over the responses that have a signal (--pi_old sampler: those in the first update after "
        "sampling; 0 if there is none)",
    ),
    "sampler_gap_max": ("nats", "largest absolute difference of a token's; with vllm or --rollout_dtype"),
    "sampler_kl": (
        "nats per token",
        "estimated KL (k3) of the sampler to pi_old, over the same responses; with vllm or --rollout_dtype",
    ),
    "sampler_ess": (
        "share",
        "effective sample size of the weights pi_old / sampler of these responses, as a share of them: 1 if "
        "the two are the same; with vllm or --rollout_dtype",
    ),
    "masked_fraction": (
        "share",
        "these responses whose mean log-probability per token differs by more than --mismatch_mask between "
        "sampler and pi_old: they get no gradient; with vllm or --rollout_dtype",
    ),
    "kl": ("nats per token", "estimated KL to the starting model; logged with a kl_coef"),
    "grad_norm": ("-", "gradient norm before clipping, mean over the updates that had a group with a signal"),
    "learning_rate": ("-", "learning rate of the batch's last optimizer update"),
    "generation_s": ("s", "time to sample the responses; with vLLM servers, also to give them new weights"),
    "reward_s": ("s", "time to reward them"),
    "log_prob_s": (
        "s",
        "time for log-probabilities before the updates: pi_old, starting model, noise",
    ),
    "update_s": ("s", "time for forward, backward and optimizer steps"),
    "tokens_per_s": ("tokens/s", "response tokens of the batch, over the sum of the four times"),
    "peak_memory_gb": ("GB", "peak so far: of the GPU, or of the process if there is no GPU"),
}
# Metrics that differ between identical runs: timing and memory.
SECONDS = ("generation_s", "reward_s", "log_prob_s", "update_s", "tokens_per_s", "peak_memory_gb")
# Metrics that some lines lack.
OPTIONAL = (
    "kl", "code_timeouts", "reward_errors", "reward_timeouts", "reward_part/NAME", "null_clip_fraction",
    "sampler_gap_max", "sampler_kl", "sampler_ess", "masked_fraction", "routing_changed",
    "routing_changed_by_minibatch",
)  # fmt: skip
# What every line of a file holds besides the step, as far as it is checked: each a number, or a list of them.
LISTS = ("clip_fraction_by_minibatch", "interval_95", "pass_by_problem", "reward_by_problem")
FIELDS = {
    "metrics": tuple(name for name in GLOSSARY if name not in OPTIONAL),
    "eval": (
        "pass_at_1",
        "interval_95",
        "reward_mean",
        "response_tokens_mean",
        "pass_by_problem",
        "reward_by_problem",
    ),
    "samples": (),
    "eval_samples": ("problem", "cut_characters"),
}


class Sink(Protocol):
    """Something that takes the record's lines: the files, or a tracker such as wandb."""

    def write(self, stream: str, step: int, values: dict) -> None: ...

    def close(self) -> None: ...


class Record:
    """What a run has recorded so far, and where its next lines go.

    Args:
        folder: the run's folder.
        sinks: receive every line. Those that want the lines of a resumed run's past find them in the files.
    """

    def __init__(self, folder: Path, sinks: Sequence[Sink] = ()):
        self.folder = folder
        self.sinks = list(sinks)
        self.clips_per_token = False  # as in warnings_of()
        self.history: list[dict] = []  # the metrics of the rollout batches so far, for the alarms
        self._raised: set[str] = set()  # kinds of the warnings that the last rollout batch caused

    def add_metrics(self, step: int, metrics: dict) -> list[str]:
        """Record a rollout batch. Returns the warnings that it causes and that the one before did not."""
        self.history.append({"step": step, **metrics})
        self._write("metrics", step, metrics)
        before = self._raised
        warnings = warnings_of(self.history, self.clips_per_token)
        self._raised = set(warnings)
        return [message for kind, message in warnings.items() if kind not in before]

    def add_evaluation(self, step: int, metrics: dict, samples: Sequence[dict] = ()) -> None:
        """Record an evaluation: first its texts, so that one that is on record has them, then its figures."""
        for sample in samples:
            self._write("eval_samples", step, sample)
        self._write("eval", step, metrics)

    def add_samples(self, step: int, samples: Sequence[dict]) -> None:
        for sample in samples:
            self._write("samples", step, sample)

    def _write(self, stream: str, step: int, values: dict) -> None:
        for sink in self.sinks:
            sink.write(stream, step, values)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()

    def evaluations(self) -> list[dict]:
        """The evaluations so far, oldest first."""
        return read_lines(self.folder, "eval")

    def line_counts(self, step: int) -> dict[str, int]:
        """The number of lines of each file up to a step, for rewind().

        Texts of an evaluation that was cut off before its figures do not count: it will be done again.
        """
        steps = {stream: _steps_in(_path(self.folder, stream)) for stream in FIELDS}
        evaluated = set(steps["eval"])
        steps["eval_samples"] = [at for at in steps["eval_samples"] if at in evaluated]
        return {stream: sum(at <= step for at in lines) for stream, lines in steps.items()}

    def rewind(self, step: int, lines: dict[str, int]) -> None:
        """Drop what was written after a checkpoint. The resumed run writes it again.

        Args and errors: as in kept_lines(); nothing changes on the disk if that refuses.

        Raises:
            CannotSave: the disk is full.
        """
        from gspo.training.checkpoints import checkpoints_in, step_of  # here, since it imports torch

        kept_lines = self.kept_lines(step, lines)
        # Delete newer checkpoints before truncating the files: they need the lines that are dropped next.
        for path in reversed(checkpoints_in(self.folder)):
            if step_of(path) > step:
                remove(path)
        for stream, kept in kept_lines.items():
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_whole(self.folder / f"{stream}.jsonl", text)
        self.history = kept_lines["metrics"]
        self._raised = set(warnings_of(self.history, self.clips_per_token)) if self.history else set()

    def kept_lines(self, step: int, lines: dict[str, int]) -> dict[str, list[dict]]:
        """The lines of each file that a checkpoint follows.

        Args:
            step: rollout batches trained on at the checkpoint.
            lines: the number of lines of each file at that time. Lines after them may be damaged.

        Raises:
            ValueError: a line is damaged, or lines are missing.
        """
        kept_lines = {stream: read_lines(self.folder, stream, lines.get(stream, 0)) for stream in FIELDS}
        for stream, kept in kept_lines.items():
            steps = [line["step"] for line in kept if line["step"] <= step]
            has_every_step = stream != "metrics" or steps == list(range(1, step + 1))
            if len(steps) < lines.get(stream, 0) or not has_every_step:
                raise ValueError(
                    f"{self.folder / stream}.jsonl lacks lines that the checkpoint follows; put the file "
                    "back, or start anew from the checkpoint's weights (--model_name)"
                )
        return kept_lines


class JsonLines:
    """The sink that writes the files: one flushed line per record, whole or not at all."""

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
    """The lines of one of the files, a key of FIELDS: the first count of them, or all.

    A last line without its line end was cut short by a kill and does not count.

    Raises:
        ValueError: a line is damaged, or is not a record.
    """
    path = _path(folder, stream)
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [_parse(line, stream, f"{path}, line {i + 1}") for i, line in enumerate(lines[:count])]


def _steps_in(path: Path) -> list[int]:
    """The steps of a file's lines, which begin with them. The rest of the lines is not read, to be quick."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        beginnings = [line[len('{"step": ') : 30] for line in file if line.endswith(b"\n")]
    return [int(beginning.partition(b",")[0].strip(b"}\n")) for beginning in beginnings]


def _path(folder: Path, stream: str) -> Path:
    return folder / f"{stream}.jsonl"


def _parse(line: bytes, stream: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: not valid JSON; the file is damaged") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not a JSON object; the file is damaged")
    wrong = [name for name in FIELDS[stream] if not _is_value_of(name, record.get(name))]
    if type(record.get("step")) is not int or not 0 <= record["step"] < 2**31:
        wrong.insert(0, "step")
    if wrong:
        raise ValueError(f"{where}: {wrong[0]} is missing or is not a figure; the file is damaged")
    return record


def _is_value_of(name: str, value: Any) -> bool:
    if name not in LISTS:
        return _is_number(value)
    right_length = isinstance(value, list) and (len(value) == 2 or name != "interval_95")
    return right_length and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # false for NaN


def readable_lines(folder: Path, stream: str) -> tuple[list[dict], str]:
    """The lines of a file up to the first damaged one, and what is wrong with that: "" if none is.

    Unlike read_lines() it raises nothing: it is for looking at a run, not for continuing it.
    """
    path = _path(folder, stream)
    found: list[dict] = []
    try:
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        for i, line in enumerate(lines):
            found.append(_parse(line, stream, f"{path.name}, line {i + 1}"))
    except (OSError, ValueError) as error:
        return found, str(error)
    return found, ""


def glossary_table() -> str:
    """GLOSSARY as a Markdown table."""
    rows = [f"| `{name}` | {unit} | {meaning} |" for name, (unit, meaning) in GLOSSARY.items()]
    return "\n".join(["| name | unit | meaning |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(glossary_table())
