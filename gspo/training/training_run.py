"""A run from its first rollout batch to its last: evaluations, record, checkpoints, and going on.

What is done at a step depends on the step, the record and the last checkpoint, never on how the process got
there. So a run that was killed at any point and resumed writes what it would have written.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from gspo.policy.saved_model import save_tokenizer
from gspo.policy.sharded_model import is_sharded, release_weights
from gspo.policy.vllm_server import EngineError
from gspo.printing import say
from gspo.training.alarms import (
    MEND_MISMATCH,
    MEND_REWARD,
    WINDOW,
    EmergencyStop,
    gibberish_reason,
    held_out_fall,
    mismatch_reason,
    non_finite_weights,
    stop_if,
    unjudged_reason,
)
from gspo.training.checkpoints import (
    drop_moments,
    moment_files,
    random_states,
    read_state,
    set_random_states,
    write_state,
)
from gspo.training.command_line import is_rank_0
from gspo.training.config import GSPOConfig
from gspo.training.dynamic_sampling import MAX_DRAWN
from gspo.training.findings import FirstBatches
from gspo.training.model_card import model_card
from gspo.training.processes import Processes
from gspo.training.progress import TrainingLine, describe_evaluation
from gspo.training.record import Record, Sink
from gspo.training.resume import OpenRun, open_run
from gspo.training.rollout_batch import RolloutBatch
from gspo.training.run_folder import RunFolder, describe_function
from gspo.training.sampling import standing
from gspo.training.stopping import Interrupted, StopRequest
from gspo.training.trained_weights import TrainedWeights
from gspo.training.whole_folders import CannotSave, remove, saving

# Checkpoints kept on disk. The newest has the optimizer's moments, with AdamW twice the size of the weights.
CHECKPOINTS_KEPT = 2


class Trainer(Protocol):
    """What a run needs of a trainer: GSPOTrainer, or one that trains in another way."""

    model: torch.nn.Module
    weights: TrainedWeights
    tokenizer: Any
    reward_fn: Any
    config: GSPOConfig
    processes: Processes
    stop: StopRequest
    step: int
    evaluation_texts: list[dict]  # of the last evaluate(), as lines of eval_samples.jsonl

    @property
    def clips_per_token(self) -> bool: ...

    def encode(self, problem: Any) -> list[int]: ...

    def collect(self, problems: Sequence, index: int) -> RolloutBatch: ...

    def update(self, batch: RolloutBatch) -> dict: ...

    def evaluate(self, problems: Sequence) -> dict: ...

    def finish_batch(self) -> None: ...

    def is_whole(self) -> bool: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class TrainingRun:
    """The configured epochs of a trainer on these problems, recorded in a run folder.

    The constructor opens the folder and, with config.resume, loads the state to resume from.

    Args:
        train_problems, eval_problems: those whose prompts leave no room for a response are dropped.
        source: where the problems come from, for config.json.
        sinks: makers of further sinks of the record, each called with the run's folder on the main process.

    Raises:
        ValueError: no problem is left, a run folder already in use, or a run that these settings and problems
            do not continue.
        CannotSave: the folder cannot be written.
    """

    folder: RunFolder  # of the main process alone, like the record
    record: Record
    _opened: OpenRun

    def __init__(
        self,
        trainer: Trainer,
        train_problems: Sequence,
        eval_problems: Sequence,
        source: str = "given from Python; the settings of data were not used",
        sinks: Sequence[Callable[[Path], Sink]] = (),
    ):
        self.trainer, self.config, self.processes = trainer, trainer.config, trainer.processes
        self.source, self.sinks = source, sinks
        self.train_problems = drop_long_prompts(train_problems, trainer.encode, self.config, "training")
        self.eval_problems = drop_long_prompts(eval_problems, trainer.encode, self.config, "evaluation")
        self.num_queries = self.config.num_epochs * len(self.train_problems)
        self.drawn = 0  # queries of the rollout batches trained on; those of the pending ones come next
        self.pending: list[RolloutBatch] = []  # sampled; the first may be part-way through its updates
        self.first_batches = FirstBatches(self.config, trainer.tokenizer.chat_template is not None)
        self._saved_progress: tuple | None = None  # what _progress() was at the last checkpoint
        if trainer.step and not self.config.resume:
            raise ValueError(
                f"a run starts with its first rollout batch, and this trainer has trained on {trainer.step}: "
                "make a new one"
            )
        checkpoint = self.processes.on_main(self._open)
        try:
            if checkpoint is not None:
                self._load(checkpoint)
            self.processes.on_main(self._begin, checkpoint is not None)
            if is_sharded(trainer.model):
                self.processes.each(_refuse_own_folder, self.processes.on_main(lambda: self.folder.path))
        except BaseException:
            if self.processes.is_main:
                self.close()
            raise

    def train(self) -> dict:
        """Train to the end of the last epoch, or until a stop is requested (trainer.stop).

        However it ends, the state after the last whole update is on disk, if its weights are finite. With
        sharded weights it is that of the last checkpoint, if a process dies, or fails in the middle of a
        computation that all of them make together.

        Returns:
            The evaluations "before" and "after", and the "best" one, whose weights are in best_model (None:
            there was none yet); whether it is "finished"; and the run's "folder".

        Raises:
            EmergencyStop: the update in progress must not reach the weights; the evidence is in emergency/.
            EngineError: a server cannot sample any more, or not from the policy.
            CannotSave: the disk is full; the last whole checkpoint is as it was.
            ProcessFailed: another process has failed.
        """
        if self.processes.is_main:
            say(f"run folder: {self.folder.path}")
        end: BaseException | None = None
        with ExitStack() as stack:
            if self.processes.is_main:
                stack.callback(self.close)
            num_batches = self.config.count_updates(len(self.train_problems))[0]
            line = TrainingLine(self.config, self.num_queries, self.drawn, num_batches)
            stack.enter_context(line)
            try:
                self._train_all_batches(line)
            except (Interrupted, EmergencyStop, EngineError) as stop:
                end = stop
            except CannotSave:
                raise
            except BaseException as error:
                if error is not self.processes.shared_error:  # perhaps in this process alone
                    if not is_sharded(self.trainer.model) and self.processes.is_main:
                        self._save_if_whole(self.processes.alone())
                    raise
                end = error
            if is_sharded(self.trainer.model):  # a stop in the middle of sampling has left them gathered
                release_weights(self.trainer.model)
            if isinstance(end, EmergencyStop):
                self.processes.on_main(self._keep_evidence, end)
            # No process may end before this is done: its launcher would kill the one that writes.
            self._save_if_whole(self.processes)
            recorded = self._evaluations()
            folder = self.processes.on_main(lambda: self.folder.path)
        if end is not None and not isinstance(end, Interrupted):
            raise end
        result: dict[str, Any] = {"before": None, "after": None, "best": None}
        if recorded:
            # max() takes the first of equally good evaluations, as best_model does.
            result = {"before": recorded[0], "after": recorded[-1], "best": max(recorded, key=standing)}
        return result | {"finished": end is None, "folder": folder}

    def close(self) -> None:
        """Close the record and unlock the folder; on the main process."""
        self.record.close()
        self.folder.close()

    # ---- the loop

    def _train_all_batches(self, line: TrainingLine) -> None:
        config, trainer = self.config, self.trainer
        while True:
            stop_if(non_finite_weights(trainer.model))
            finished = self.drawn == self.num_queries
            if trainer.step == 0 or finished or is_due(trainer.step, config.eval_frequency):
                with line.time.apart("evaluation"):
                    self._evaluate(line)
            if finished:
                self._save_model("final_model", self._evaluations())
                return
            if is_due(trainer.step, config.save_frequency):
                with line.time.apart("checkpoint"):
                    self.save_checkpoint(self.processes)
            self._collect_window()
            batch = self.pending[0]
            stop_if(self.processes.on_main(self._gibberish_reason), batch.metrics)
            metrics = trainer.update(batch)
            self.processes.on_main(self._record_batch, trainer.step + 1, batch, metrics, line)
            # After the record: a batch whose record failed is recorded by the resumed run.
            trainer.finish_batch()
            self.pending.pop(0)
            self.drawn += batch.num_queries

    def _queries(self, start: int, count: int) -> list:
        """The problems of queries start to start + count, or to the last query.

        Each epoch has an order of its own. More epochs only add queries at the end, so that a finished run
        can be continued.
        """
        problems = self.train_problems
        chosen = []
        for query in range(start, min(start + count, self.num_queries)):
            epoch, place = divmod(query, len(problems))
            chosen.append(problems[epoch_order(self.config.seed, epoch, len(problems))[place]])
        return chosen

    def _next_queries(self, start: int) -> list:
        """The problems from which the rollout batch that begins with this query is drawn.

        A rollout batch ends with the epoch: the last one of an epoch has what remains.
        """
        most = self.config.batch_size * (1 if self.config.dynamic_sampling == "off" else MAX_DRAWN)
        return self._queries(start, min(most, len(self.train_problems) - start % len(self.train_problems)))

    def _collect_window(self) -> None:
        """Sample all K rollout batches before the first of their updates: pi_old is the policy itself."""
        step, frequency = self.trainer.step, self.config.update_frequency
        for index in range(step + len(self.pending), step - step % frequency + frequency):
            queries = self._next_queries(self._sampled())
            if queries:
                batch = self.trainer.collect(queries, index)
                reason, advice = self.processes.on_main(self._refusal, batch)
                if reason:
                    # It is not pending yet: when that is mended, a resumed run samples it again.
                    raise EmergencyStop(reason, batch.metrics, batch, advice)
                self.pending.append(batch)
            self.trainer.stop.check()

    def _sampled(self) -> int:
        """Queries drawn so far, those of the pending rollout batches included."""
        return self.drawn + sum(batch.num_queries for batch in self.pending)

    # ---- recording; on the main process, which alone has the record

    def _record_batch(self, step: int, batch: RolloutBatch, metrics: dict, line: TrainingLine) -> None:
        for warning in self.record.add_metrics(step, metrics):
            say(f"warning, rollout batch {step}: {warning}", sys.stderr)
        for finding in self.first_batches.add(step, batch.samples):
            say(f"warning, rollout batches 1 to {WINDOW}: {finding}", sys.stderr)
        self.record.add_samples(step, batch.best_and_worst())
        sampled = sum(pending.num_queries for pending in self.pending[1:])
        line.note(step, metrics, self.drawn + batch.num_queries, sampled)

    def _record_evaluation(self, evaluations: list[dict]) -> None:
        """Record the last of the evaluations so far, and print it with what it says beside the others."""
        step, metrics = evaluations[-1]["step"], {k: v for k, v in evaluations[-1].items() if k != "step"}
        self.record.add_evaluation(step, metrics, self.trainer.evaluation_texts)
        say(describe_evaluation(evaluations[-1], evaluations[0]))
        fall = held_out_fall(evaluations)
        if fall and not held_out_fall(evaluations[:-1]):
            say(f"warning, rollout batch {step}: {fall}", sys.stderr)

    def _gibberish_reason(self) -> str | None:
        return gibberish_reason([*self.record.history, self.pending[0].metrics])

    def _refusal(self, batch: RolloutBatch) -> tuple[str | None, str]:
        """Why a rollout batch is not to be trained on, if so, and what is to be done."""
        history = [*self.record.history, *(earlier.metrics for earlier in self.pending), batch.metrics]
        if reason := unjudged_reason(history):
            return reason, MEND_REWARD
        return mismatch_reason(history), MEND_MISMATCH

    def _keep_evidence(self, stop: EmergencyStop) -> None:
        try:
            batches = self.pending[:1] if stop.batch is None else [stop.batch]
            self.folder.keep_evidence(self.trainer.step + 1, stop, batches)
        except CannotSave as error:
            say(str(error), sys.stderr)

    # ---- evaluating

    def _evaluate(self, line: TrainingLine) -> None:
        """Evaluate once per step. best_model is written before the line that says so."""
        step, recorded = self.trainer.step, self._evaluations()
        if any(earlier["step"] == step for earlier in recorded):
            return
        metrics = self.trainer.evaluate(self.eval_problems)
        evaluations = [*recorded, {"step": step, **metrics}]
        if all(standing(metrics) > standing(earlier) for earlier in recorded):
            with line.time.apart("model"):
                self._save_model("best_model", evaluations)
        self.processes.on_main(self._record_evaluation, evaluations)

    def _evaluations(self) -> list[dict]:
        """The evaluations on record, oldest first, for all processes."""
        return self.processes.on_main(lambda: self.record.evaluations())

    # ---- saving

    def _save_if_whole(self, processes: Processes) -> None:
        """Save a checkpoint, unless the weights are spoilt."""
        if self.trainer.is_whole():
            self.save_checkpoint(processes)

    def save_checkpoint(self, processes: Processes) -> None:
        """Write checkpoints/step-N: model, tokenizer, and all else that the run's future depends on.

        If the weights are sharded, each process writes its part.
        """
        name = f"step-{self.trainer.step}"
        if not processes.on_main(self._make_room, name):
            return
        with processes.around_main(lambda: self.folder.writing(f"checkpoints/{name}")) as folder:
            processes.together(_writing, folder, self.trainer.weights.save_checkpoint)
            processes.on_main(_writing, folder, self._write_state)
        processes.on_main(self._drop_older_moments, name)

    def _make_room(self, name: str) -> bool:
        """Remove checkpoints, so that there is room for one of this name. False: it is there already.

        The oldest goes first: a disk that holds CHECKPOINTS_KEPT is enough, and one is whole at any time.
        """
        if self._saved_progress == self._progress():
            return False
        others = [path for path in self.folder.checkpoints() if path.name != name]
        for path in others[: max(0, len(others) - CHECKPOINTS_KEPT + 1)]:
            remove(path)
        return True

    def _write_state(self, folder: Path) -> None:
        save_tokenizer(self.trainer.tokenizer, folder)
        state = {
            **self.trainer.state_dict(),
            "pending": [batch.state_dict() for batch in self.pending],
            "sampled": self._sampled(),
            "processes": self.processes.count,
            "settings": asdict(self.config),
            "lines": self.record.line_counts(self.trainer.step),
            "random": random_states(),
        }
        write_state(folder, state)

    def _drop_older_moments(self, name: str) -> None:
        for path in self.folder.checkpoints():
            if path.name != name:
                drop_moments(path)
        self._saved_progress = self._progress()

    def _progress(self) -> tuple[int, int, int, int]:
        """How far the run is: batches trained on, batches pending, their updates, evaluations."""
        updates = sum(len(batch.updates) for batch in self.pending)
        return self.trainer.step, len(self.pending), updates, len(self.record.evaluations())

    def _save_model(self, name: str, evaluations: list[dict]) -> None:
        """Write the model with its card. The last of the evaluations so far is its own."""
        counts = len(self.train_problems), len(self.eval_problems)
        card = model_card(self.config, self.source, *counts, evaluations)
        with self.processes.around_main(lambda: self.folder.writing(name)) as folder:
            self.processes.together(_writing, folder, self.trainer.weights.save_model)
            self.processes.on_main(_writing, folder, partial(self._write_beside_model, card))

    def _write_beside_model(self, card: str, folder: Path) -> None:
        save_tokenizer(self.trainer.tokenizer, folder)
        (folder / "README.md").write_text(card, encoding="utf-8")

    # ---- beginning and resuming

    def _open(self) -> Path | None:
        """Open the folder and the record. Returns the checkpoint to resume from, if there is one."""
        digest = problems_digest([*self.train_problems, *self.eval_problems])
        self._opened = open_run(self.config, digest, self.num_queries)
        self.folder, self.record = self._opened.folder, self._opened.record
        self.record.clips_per_token = self.trainer.clips_per_token
        return self._opened.checkpoint

    def _begin(self, resumed: bool) -> None:
        """Change what is on the disk, now that nothing can be refused any more."""
        described = {
            "data": {
                "source": self.source,
                "train_problems": len(self.train_problems),
                "eval_problems": len(self.eval_problems),
                "held_out": questions_digest(self.eval_problems),
            },
            "clips_per_token": self.trainer.clips_per_token,  # for the report, which reads no algorithm
            "reward_function": describe_function(self.trainer.reward_fn),
        }
        self._opened.begin(described)
        self.record.sinks += [new_sink(self.folder.path) for new_sink in self.sinks]
        self._saved_progress = self._progress() if resumed else None

    def _load(self, checkpoint: Path) -> None:
        """Take up the state of a checkpoint, in every process."""
        trainer = self.trainer
        state = read_state(checkpoint)
        count = self.processes.count
        saved_by = state.get("processes", count)
        if saved_by != count and self.processes.is_main:
            say(f"resumed by {count} processes instead of {saved_by}: equal but for rounding")
        trainer.weights.load_checkpoint(checkpoint)
        has_moments = bool(moment_files(checkpoint))
        if not has_moments and self.processes.is_main:
            print(
                f"warning: {checkpoint} is an older checkpoint, whose optimizer state was dropped to save "
                "room: training goes on from its weights with fresh moments, so not exactly as before",
                file=sys.stderr,
            )
        state["optimizer"]["state"] = trainer.weights.load_moments(checkpoint) if has_moments else {}
        trainer.load_state_dict(state)
        counts = [len(batch["samples"]) // batch["group_size"] for batch in state["pending"]]
        self.drawn = state["sampled"] - sum(counts)
        for batch, count in zip(state["pending"], counts, strict=True):
            problems = self._queries(self._sampled(), count)
            self.pending.append(RolloutBatch.from_state_dict(batch, problems))
        set_random_states(state["random"])


def _refuse_own_folder(path: Path) -> None:
    """Raise a ValueError if the main process's run folder is not there for this process."""
    if not path.is_dir():
        raise ValueError(
            f"--output_dir: another machine does not see {path}: with --shard full, it must be a folder that "
            "all machines share"
        )


def _writing(folder: Path, write: Callable[[Path], None]) -> None:
    """Do write(folder); whatever a library raises on a full disk becomes a CannotSave."""
    with saving(folder):
        write(folder)


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    """The order in which an epoch takes the problems."""
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


def is_due(step: int, frequency: int) -> bool:
    """True after every `frequency` rollout batches; never for a frequency of 0."""
    return step > 0 and frequency > 0 and step % frequency == 0


def drop_long_prompts(
    problems: Sequence, encode: Callable[[Any], list[int]], config: GSPOConfig, purpose: str
) -> list:
    """The problems whose prompts leave room for a response. The others are dropped, counted and reported.

    encode: a problem to the token ids of its prompt.

    Raises:
        ValueError: none does.
    """
    max_length = config.max_length
    lengths = [len(encode(problem)) for problem in problems]
    kept = [p for p, length in zip(problems, lengths, strict=True) if length < max_length]
    if not kept:
        raise ValueError(
            f"--max_length {max_length} is shorter than every {purpose} prompt (the shortest has "
            f"{min(lengths)} tokens); raise it"
        )
    if len(kept) < len(problems) and is_rank_0():
        print(
            f"{purpose}: dropped {len(problems) - len(kept)} of {len(problems)} problems, whose prompts "
            f"leave no room for a response in --max_length {max_length}",
            file=sys.stderr,
        )
    return kept


def problems_digest(problems: Sequence) -> str:
    """A digest of all problems in their order: a rollout batch is known by its place in them."""
    return _digest([problem.prompt, str(getattr(problem, "answer", None))] for problem in problems)


def questions_digest(problems: Sequence) -> str:
    """A digest of the questions in their order, without what --prompt_suffix and the like add to them."""
    return _digest(
        [str(getattr(problem, "id", problem.prompt)), str(getattr(problem, "answer", None))]
        for problem in problems
    )


def _digest(texts: Iterable[list]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
