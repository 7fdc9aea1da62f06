"""A trainer's run from its first rollout batch to its last: evaluations, record, checkpoints, stops, resume.

What is done at a step depends on the step, the record and the last checkpoint, never on how the process got
there. So a run that was killed at any point and resumed writes what it would have written.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from gspo.training.alarms import EmergencyStop, gibberish_reason, stop_if
from gspo.training.checkpoints import CannotSave, random_states, remove, set_random_states
from gspo.training.rollout_batch import RolloutBatch
from gspo.training.run_log import STATE_FILE, RunLog, refuse_differing

# Checkpoints kept on disk: with float32 weights and AdamW's moments, one takes three times the model.
CHECKPOINTS_KEPT = 2
# Of what a checkpoint's state holds: it changes with that, so that an older one is refused and not misread.
STATE_FORMAT = 1


class Interrupted(Exception):
    """A stop was asked for, at a place where the state is whole."""


class TrainingRun:
    """A trainer's configured epochs on these problems, recorded in a run folder.

    Making it opens the folder and, with config.resume, loads the state to go on from.

    Args:
        trainer: a GSPOTrainer.
        train_problems, eval_problems: those whose prompts leave no room for a response are dropped.

    Raises:
        ValueError: no problem is left, a run folder already in use, or a checkpoint that these settings and
            problems do not continue.
        CannotSave: the folder cannot be written.
    """

    def __init__(self, trainer, train_problems: Sequence, eval_problems: Sequence):
        self.trainer, self.config = trainer, trainer.config
        self.train_problems = trainer.that_fit(train_problems, "training")
        self.eval_problems = trainer.that_fit(eval_problems, "evaluation")
        per_epoch = -(-len(self.train_problems) // self.config.batch_size)
        self.num_batches = self.config.num_epochs * per_epoch
        self.pending: list[RolloutBatch] = []  # sampled; the first may be part-way through its updates
        self.best_pass_rate = -1.0
        self._saved = None  # what _position() was at the last checkpoint
        self.log = RunLog()
        try:
            path = self._of_main_process(self._open_folder)
            if self.config.resume:
                self._go_on_from(path)
        except BaseException:
            self.log.close()
            raise

    def train(self) -> dict:
        """To the end of the last epoch, or until trainer.stop_requested.

        Whatever ends it, the state after the last whole update is on disk, if its weights are finite.

        Returns:
            The evaluations "before" and "after" (None: there was none yet), and whether it is "finished".

        Raises:
            EmergencyStop: the update in progress must not reach the weights; the evidence is in emergency/.
            CannotSave: the disk is full; the last whole checkpoint is as it was.
        """
        trainer = self.trainer
        bar = trainer.progress_bar(
            total=self.num_batches, initial=trainer.step, desc="training", unit="batch"
        )
        end = None
        with closing(self.log), bar:
            try:
                self._run_through(bar)
            except (Interrupted, EmergencyStop) as stop:
                end = stop
            except CannotSave:
                raise
            except BaseException:  # of this process alone, perhaps
                if trainer.accelerator.is_main_process:
                    self._save_if_whole()
                raise
            if isinstance(end, EmergencyStop):
                self._of_main_process(self._keep_evidence, end)
            # No process ends before this is done: its launcher would kill the one that writes.
            self._of_main_process(self._save_if_whole)
            recorded = self._recorded_evaluations()
        if isinstance(end, EmergencyStop):
            raise end
        before, after = (recorded[0], recorded[-1]) if recorded else (None, None)
        return {"before": before, "after": after, "finished": end is None}

    # ---- the loop

    def _run_through(self, bar) -> None:
        config, trainer = self.config, self.trainer
        while True:
            stop_if(trainer.broken_weights())
            finished = trainer.step == self.num_batches
            if trainer.step == 0 or finished or _is_due(trainer.step, config.eval_frequency):
                self._evaluate()
            if finished:
                self._of_main_process(self._save_model, "final_model")
                return
            if _is_due(trainer.step, config.save_frequency):
                self._of_main_process(self.save_checkpoint)
            self._collect_window()
            batch = self.pending[0]
            stop_if(self._of_main_process(self._gibberish_reason), batch.metrics)
            metrics = trainer.update(batch)
            self._of_main_process(self._record, trainer.step + 1, batch, metrics, bar)
            trainer.step += 1  # recorded first: a batch whose record fails is recorded by the resumed run
            self.pending.pop(0)

    def _problems_of(self, index: int) -> list:
        """Rollout batch number index: each epoch has an order of its own, its last batch is what remains.

        More epochs only add batches at the end, so that a finished run can be continued.
        """
        config, problems = self.config, self.train_problems
        epoch, place = divmod(index, self.num_batches // config.num_epochs)
        order = np.random.default_rng([config.seed, epoch]).permutation(len(problems)).tolist()
        start = place * config.batch_size
        return [problems[i] for i in order[start : start + config.batch_size]]

    def _collect_window(self) -> None:
        """Sample all K rollout batches before the first of their updates: pi_old is the policy itself."""
        step, frequency = self.trainer.step, self.config.update_frequency
        end = min(self.num_batches, step - step % frequency + frequency)
        for index in range(step + len(self.pending), end):
            self.pending.append(self.trainer.collect(self._problems_of(index), index))
            self.trainer.stop_here_if_asked()

    # ---- recording

    def _record(self, step: int, batch: RolloutBatch, metrics: dict, bar) -> None:
        for warning in self.log.train(step, metrics):
            bar.write(f"warning, rollout batch {step}: {warning}", file=sys.stderr)
        self.log.samples(step, batch.best_and_worst())
        bar.set_postfix(
            refresh=False,  # a refresh would draw the bar before its delay, and close() then not end its line
            reward=f"{metrics['reward_mean']:.2f}",
            clip=f"{metrics['clip_fraction']:.2f}",
            tok_s=f"{metrics['tokens_per_s']:.0f}",
        )
        bar.update()

    def _of_main_process(self, work: Callable, *arguments):
        """What work() gives or raises on the main process, which alone has the record, for all processes."""
        result = error = None
        if self.trainer.accelerator.is_main_process:
            try:
                result = work(*arguments)
            except (ValueError, CannotSave) as refusal:
                error = refusal
        result, error = broadcast_object_list([result, error])
        if error is not None:
            raise error
        return result

    def _recorded_evaluations(self) -> list[dict]:
        return self._of_main_process(self.log.evaluations)

    def _gibberish_reason(self) -> str | None:
        return gibberish_reason([*self.log.history, self.pending[0].metrics])

    def _evaluate(self) -> None:
        """Once a step; best_model is written before the line that says so."""
        step = self.trainer.step
        if any(recorded["step"] == step for recorded in self._recorded_evaluations()):
            return
        metrics = self.trainer.evaluate(self.eval_problems)
        if metrics["pass_at_1"] > self.best_pass_rate:
            self.best_pass_rate = metrics["pass_at_1"]
            self._of_main_process(self._save_model, "best_model")
        self._of_main_process(self.log.evaluation, step, metrics)

    def _keep_evidence(self, stop: EmergencyStop) -> None:
        try:
            self.log.emergency(self.trainer.step + 1, str(stop), stop.metrics, self.pending[:1])
        except CannotSave as error:
            print(error, file=sys.stderr)

    # ---- keeping

    def _save_if_whole(self) -> None:
        if self.trainer.is_whole():
            self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """Write checkpoints/step-N: model, tokenizer, and all else that the run's future depends on."""
        if self._saved == self._position():
            return
        name = f"step-{self.trainer.step}"
        # The oldest first: a disk that holds CHECKPOINTS_KEPT is enough, and one is whole at any time.
        others = [path for path in self.log.checkpoints() if path.name != name]
        for path in others[: max(0, len(others) - CHECKPOINTS_KEPT + 1)]:
            remove(path)
        with self.log.writing(f"checkpoints/{name}") as folder:
            self._save_weights(folder)
            state = {
                "format": STATE_FORMAT,
                **self.trainer.state_dict(),
                "pending": [batch.state_dict() for batch in self.pending],
                "settings": asdict(self.config),
                "lines": self.log.line_counts(self.trainer.step),
                "random": random_states(),
            }
            torch.save(state, folder / STATE_FILE)
        self._saved = self._position()

    def _position(self) -> tuple[int, int, int, int]:
        """Rollout batches trained on, batches sampled beyond them, updates made of these, evaluations."""
        updates = sum(len(batch.updates) for batch in self.pending)
        return self.trainer.step, len(self.pending), updates, len(self.log.evaluations())

    def _open_folder(self) -> Path | None:
        """Opens the run folder; returns the checkpoint to go on from, if any."""
        config = asdict(self.config)
        self.log = RunLog.create(config, self._problems_digest())
        return self.log.whole_checkpoint(config["resume"]) if config["resume"] else None

    def _go_on_from(self, path: Path | None) -> None:
        """Load a checkpoint, and rewind the run's record to it.

        A run that was killed before its first checkpoint starts again: the same seed takes the same way.
        """
        trainer = self.trainer
        lines = {}
        if path is not None:
            # On the CPU: the optimizer moves its state to the weights, and random states stay there.
            state = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
            if state.get("format") != STATE_FORMAT:
                raise ValueError(
                    f"--resume {path}: another version of this toolkit wrote it; go on with that one, or "
                    f"start anew from its weights (--model_name {path})"
                )
            refuse_differing(path, state["settings"], asdict(self.config))
            reached = state["step"] + len(state["pending"])
            if reached > self.num_batches:
                raise ValueError(
                    f"--num_epochs {self.config.num_epochs}: that is {self.num_batches} rollout batches, the "
                    f"run has come further, to {reached}"
                )
            saved = type(trainer.model).from_pretrained(path, dtype=torch.float32)
            trainer.model.load_state_dict(saved.state_dict())
            trainer.load_state_dict(state)
            self.pending = [
                RolloutBatch.from_state_dict(batch, self._problems_of(trainer.step + i))
                for i, batch in enumerate(state["pending"])
            ]
            set_random_states(state["random"])
            lines = state["lines"]
        self._of_main_process(self._rewind, lines)
        self.best_pass_rate = max((e["pass_at_1"] for e in self._recorded_evaluations()), default=-1.0)

    def _rewind(self, lines: dict[str, int]) -> None:
        self.log.rewind(self.trainer.step, lines)
        self.log.begin(asdict(self.config), self._problems_digest())
        self._saved = self._position() if lines else None

    def _problems_digest(self) -> str:
        """Of all problems in order: a rollout batch is known by its place in them."""
        texts = [
            [problem.prompt, str(getattr(problem, "answer", None))]
            for problem in (*self.train_problems, *self.eval_problems)
        ]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()

    def _save_weights(self, folder) -> None:
        self.trainer.model.save_pretrained(folder)
        self.trainer.tokenizer.save_pretrained(folder)

    def _save_model(self, name: str) -> None:
        with self.log.writing(name) as folder:
            self._save_weights(folder)


def _is_due(step: int, frequency: int) -> bool:
    """Whether something is done after so many rollout batches; frequency 0: never."""
    return step > 0 and frequency > 0 and step % frequency == 0
