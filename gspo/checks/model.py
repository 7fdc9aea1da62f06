"""Validation, part 1 on a model: log-probabilities, sampling and the trainer's updates against float64 loops.

The checks look at the trainer from outside: what its engine sampled, what its metrics say, where its weights
went. Shapes: B responses, T response positions, V vocabulary.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import gspo_implementation as gspo
from gspo.checks import float64_reference as reference
from gspo.checks.losses import (
    ALGORITHMS,
    has_reference,
    missing_reference,
    ranges_of,
    reference_of,
    relative_error,
)
from gspo.checks.report import Check, Checks, at_most, between, each_at_most, exactly
from gspo.policy.log_probs import token_log_probs
from gspo.policy.rollout import Rollout, Sampling, TransformersEngine, encode_prompt

DTYPES = ("float32", "bfloat16")
NUM_PROBLEMS, MINI_BATCH_SIZE, GROUP_SIZE, MAX_NEW_TOKENS = 8, 2, 4, 24
NUM_UPDATES = NUM_PROBLEMS // MINI_BATCH_SIZE
TEMPERATURES = (0.7, 1.0, 1.5)
UPDATE_TEMPERATURE = 1.5  # responses that differ, so that there is something to learn in every group
UPDATE_RATE = 5e-5
UNGRADED_SHARE = 0.2
# With every second group tied, two updates at least have something to learn; with more, perhaps none has.
MAX_TIED_GROUPS = 0.5
# The float64 copy with its AdamW moments takes 24 bytes per parameter, and computes one response at a time.
MAX_TWIN_PARAMETERS = 20e6
MAX_Z = 4.5  # standard errors: exceeded by chance once in 150,000 times
WEIGHTS_PER_TENSOR = 100_000  # looked at, to see whether weights move
Pair = tuple[list[int], list[int]]  # prompt ids and response ids
TIED = "not measured: the model's answers to a problem are mostly equal"


def checksum_reward(problems: Sequence, responses: Sequence[str]) -> list[float | None]:
    """A reward that ties for equal responses only. It leaves some ungraded; what it rewards does not matter.

    Equal responses with unequal rewards would cancel to a gradient of rounding errors, which Adam scales up.
    """
    texts = [f"{problem.prompt}\n{response}" for problem, response in zip(problems, responses, strict=True)]
    sums = [random.Random(text).random() for text in texts]
    return [None if x < UNGRADED_SHARE else x for x in sums]


def three_valued_reward(problems: Sequence, responses: Sequence[str]) -> list[float]:
    """1, 0.5 or 0, for the check of the evaluation: only 1 is a pass."""
    return [random.Random(response).choice([0.0, 0.5, 1.0]) for response in responses]


class RecordingEngine(TransformersEngine):
    """An engine that keeps the last call's rollouts."""

    def generate(self, prompts: Sequence, group_size: int, sampling: Sampling) -> list[Rollout]:
        self.rollouts = super().generate(prompts, group_size, sampling)
        return self.rollouts


class ModelChecks:
    """Checks of a model on NUM_PROBLEMS problems, each with a string .prompt. The model becomes float32."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any, problems: Sequence, device: str) -> None:
        self.model, self.tokenizer, self.device = model.float().to(device).eval(), tokenizer, device
        self.problems = problems[:NUM_PROBLEMS]
        self.prompts = [encode_prompt(tokenizer, problem.prompt) for problem in self.problems]
        self.num_parameters = sum(p.numel() for p in model.parameters())

    def all(self) -> list[Callable[[], Checks]]:
        updates = [partial(self.trainer_updates, algorithm) for algorithm in ALGORITHMS]
        types = [partial(self.compute_type, dtype) for dtype in DTYPES]
        return [
            self.log_probs,
            self.sampling,
            self.random_streams,
            self.endings,
            *updates,
            self.steps_without_gradient,
            self.micro_batches,
            *types,
            self.evaluation,
        ]

    def log_probs(self) -> Checks:
        """Compare token_log_probs with one row at a time, without padding and with all logits.

        Gradients are those of the norms and biases. Groups share their prompts in two of the three cases; in
        the third there is one response to each prompt, which shares nothing.
        """
        fault = "policy/log_probs.py, token_log_probs: positions, padding, temperature"
        cases = {"in groups, T=1": (1.0, 1), "T=0.7": (0.7, 1), "alone": (0.7, GROUP_SIZE)}
        errors, gradient_errors = {}, {}
        for name, (temperature, step) in cases.items():
            pairs = _pairs(self._sample(temperature))[::step]
            fast = self._trainers_log_probs(pairs, temperature)
            slow = [reference.token_log_probs(self.model, *pair, temperature) for pair in pairs]
            errors[name] = _largest_gap(fast, slow)
            gradient_errors[name] = relative_error(self._gradient(fast), self._gradient(slow))
        yield each_at_most("log-probs equal a naive forward pass", errors, 1e-3, "largest error", fault)
        yield each_at_most("so do their gradients", gradient_errors, 1e-3, "relative error", fault)
        with torch.no_grad(), torch.autocast(torch.device(self.device).type, torch.bfloat16):
            coarse = torch.cat(self._trainers_log_probs(pairs))
        rounded = (coarse == coarse.bfloat16()).double().mean().item()
        yield at_most(
            "their softmax is float32, even where products are bfloat16", rounded, 0.5, "share rounded",
            "policy/log_probs.py, token_log_probs: .float() before the softmax",
        )  # fmt: skip

    def _gradient(self, rows: Sequence[Tensor]) -> Tensor:
        """The gradient of a sum in which each token of a row has a weight of its own, from -1 to 1."""
        parameters = [p for p in self.model.parameters() if p.dim() == 1]
        weighted = [torch.linspace(-1, 1, len(row), device=row.device) * row for row in rows]
        parts = torch.autograd.grad(torch.cat(weighted).sum(), parameters)
        return torch.cat([part.flatten().double() for part in parts])

    @torch.no_grad()
    def sampling(self) -> Checks:
        errors, surprises = {}, {}
        for temperature in TEMPERATURES:
            rollouts = self._sample(temperature, 4 * GROUP_SIZE)
            pairs = _pairs(rollouts)
            computed = self._trainers_log_probs(pairs, temperature)
            errors[f"T={temperature}"] = _largest_gap([torch.tensor(r.log_probs) for r in rollouts], computed)
            surprises[f"T={temperature}"] = abs(self._surprise(pairs, temperature))
        yield each_at_most(
            "the sampler's log-probs equal the trainer's", errors, 1e-2, "largest error",
            "policy/rollout.py and policy/log_probs.py: temperature, positions, a shift by one token",
        )  # fmt: skip
        yield each_at_most(
            "tokens are drawn from the distribution that log-probs are of", surprises, MAX_Z,
            "standard errors", "policy/rollout.py: how tokens are drawn; top-k, top-p or a temperature that "
            "policy/log_probs.py does not know",
        )  # fmt: skip

    def _surprise(self, pairs: Sequence[Pair], temperature: float) -> float:
        """Sum of log p of the sampled tokens less its expectation, in standard errors.

        pairs: (prompt ids, response ids), GROUP_SIZE or a multiple of it to a prompt, contiguous.
        """
        excess = variance = 0.0
        for start in range(0, len(pairs), GROUP_SIZE):
            group = pairs[start : start + GROUP_SIZE]
            prompt = torch.tensor(group[0][0]).expand(len(group), -1)
            responses = [torch.tensor(response) for _, response in group]
            # The padding behind a response is masked below; the model is causal, so it changes nothing else.
            padded = pad_sequence(responses, batch_first=True).to(self.device)  # (B, T)
            mask = pad_sequence([torch.ones_like(r, dtype=torch.bool) for r in responses], batch_first=True)
            ids = torch.cat([prompt.to(self.device), padded], 1)
            logits = self.model(input_ids=ids).logits[:, prompt.shape[1] - 1 : -1].double() / temperature
            log_probs = logits.log_softmax(-1).cpu()[mask]  # (tokens, V)
            probs = log_probs.exp()
            mean = (probs * log_probs).sum(-1)  # (tokens,): minus the entropy
            variance += (probs * (log_probs - mean[:, None]).square()).sum().item()
            of_tokens = log_probs.gather(1, torch.cat(responses)[:, None])[:, 0]  # (tokens,)
            excess += (of_tokens - mean).sum().item()
        return excess / math.sqrt(variance) if variance else excess

    def random_streams(self) -> Checks:
        """Sample two groups of responses to one prompt."""
        sampling = Sampling(MAX_NEW_TOKENS, UPDATE_TEMPERATURE, seed=3)
        engine = TransformersEngine(self.model, self.tokenizer)
        size = 4 * GROUP_SIZE
        texts = [r.text for r in engine.generate(self.prompts[:1] * 2, size, sampling)]
        first, second = texts[:size], texts[size:]
        name = "responses have random streams of their own"
        if len(set(texts)) == 1:
            yield Check(name, None, TIED, "")
            return
        distinct = len(set(first)) > 1 and len(set(second)) > 1 and first != second
        yield exactly(
            name, distinct, True, "distinct in a group, and between two groups of one prompt:",
            "policy/rollout.py: the seeds of its uniforms",
        )  # fmt: skip

    def endings(self) -> Checks:
        """Look where responses end; then again, with a token that is often sampled made an end token too."""
        config, own = self.model.generation_config, self.tokenizer.eos_token_id
        configured, limit = config.eos_token_id, self._max_length() - MAX_NEW_TOKENS // 2
        listed = configured if isinstance(configured, list) else [configured]
        sampled = Counter(i for r in self._sample(UPDATE_TEMPERATURE) for i in r.response_ids[:8])
        wrong = 0
        for more in ([], [sampled.most_common(1)[0][0]]):
            ends = {i for i in (own, *listed, *more) if i is not None}
            config.eos_token_id = sorted(ends - {own}) or configured
            try:
                engine = TransformersEngine(self.model, self.tokenizer)
                sampling = Sampling(MAX_NEW_TOKENS, UPDATE_TEMPERATURE, limit, seed=2)
                rollouts = engine.generate(self.prompts, GROUP_SIZE, sampling)
            finally:
                config.eos_token_id = configured
            wrong += sum(not self._ends_rightly(r, ends, limit) for r in rollouts)
        yield exactly(
            "responses end at the first end token or at their limit", wrong, 0, "otherwise:",
            "policy/rollout.py: end tokens of tokenizer and generation config, max_new_tokens, max_length",
        )  # fmt: skip

    def _ends_rightly(self, r: Rollout, ends: set[int], limit: int) -> bool:
        ids, room = r.response_ids, min(MAX_NEW_TOKENS, limit - len(r.prompt_ids))
        ended = ids[-1] in ends
        return (
            ends.isdisjoint(ids[:-1])
            and r.finished == ended
            and (len(ids) <= room if ended else len(ids) == room)
            and r.text == self.tokenizer.decode(ids, skip_special_tokens=True)
        )

    def trainer_updates(self, algorithm: str) -> Checks:
        """Compare a rollout batch of the trainer with updates of a float64 copy of the model."""
        name = f"{algorithm}: four updates of the trainer equal float64 ones"
        if not has_reference(algorithm):
            yield missing_reference(algorithm)
            return
        if self.num_parameters > MAX_TWIN_PARAMETERS:
            size = f"{self.num_parameters / 1e6:.0f}M parameters"
            yield Check(name, None, f"not measured: too slow in float64 with {size}", "")
            return
        trainer = self._trainer(algorithm=algorithm, learning_rate=UPDATE_RATE, dtype="float32")
        start = deepcopy(trainer.model)
        metrics = trainer.train_step(self.problems)
        if metrics["zero_variance_groups"] > MAX_TIED_GROUPS:
            yield Check(name, None, TIED, "")
            return
        rollouts = _last_rollouts(trainer)
        twin = self._float64_updates(start, algorithm, rollouts)
        made, expected = len(metrics["clip_fraction_by_minibatch"]), len(twin.clip_fractions)
        fault = "GSPOTrainer: mini_batch_size; groups without a signal"
        yield exactly(
            f"{algorithm}: the trainer makes four updates, if four groups have a signal", made, expected,
            "updates", fault,
        )  # fmt: skip
        yield each_at_most(
            name, _update_errors(algorithm, trainer, start, metrics, twin), 4e-3, "error",
            "GSPOTrainer: advantages, pi_old (the policy before the first update, at the sampling "
            "temperature), clip ranges, the loss's denominator, AdamW and its settings",
        )  # fmt: skip
        # A response at the very edge of the range may fall on either side.
        longest = max(map(len, twin.log_ratios))
        fractions = metrics["clip_fraction_by_minibatch"]
        gap = max(abs(a - b) for a, b in zip(fractions, twin.clip_fractions, strict=True))
        yield at_most(
            f"{algorithm}: so do the clip fractions of the updates", gap, longest / min(twin.num_tokens),
            "difference", "GSPOTrainer: clip_fraction_by_minibatch",
        )  # fmt: skip
        expected_metrics, num_eligible = _clip_metrics(algorithm, twin)
        yield each_at_most(
            f"{algorithm}: so do those of the batch, by side and of what can clip",
            {name: abs(metrics[name] - value) for name, value in expected_metrics.items()},
            longest / num_eligible if num_eligible else 0.0, "difference",
            "training/loss_metrics.py: which tokens count, and over which the share is taken",
        )  # fmt: skip

    def _float64_updates(
        self, start: torch.nn.Module, algorithm: str, rollouts: Sequence[Rollout]
    ) -> reference.Updates:
        by_response = [problem for problem in self.problems for _ in range(GROUP_SIZE)]
        return reference.updates(
            start,
            reference_of(algorithm),
            _pairs(rollouts),
            checksum_reward(by_response, [r.text for r in rollouts]),
            GROUP_SIZE,
            NUM_UPDATES,
            ranges_of(algorithm),
            learning_rate=UPDATE_RATE,
            max_grad_norm=1.0,
            temperature=UPDATE_TEMPERATURE,
        )

    def steps_without_gradient(self) -> Checks:
        """Give a trainer with momentum a batch whose responses all clip, and one with equal rewards."""
        trainer = self._trainer(dtype="float32", learning_rate=UPDATE_RATE, warmup_steps=100)
        trainer.train_step(self.problems)
        clipped = trainer.collect(self.problems, 0)
        for sample in clipped.samples:
            if sample.advantage:
                assert sample.old_log_probs is not None  # the noise is measured on batch 0
                sample.old_log_probs -= math.copysign(0.1, sample.advantage)
        trainer.reward_fn = lambda problems, responses: [1.0] * len(responses)
        tied = trainer.collect(self.problems, 0)
        before, updates_before = _weights(trainer.model), trainer.schedule.last_epoch
        for name, batch in (("in which every response clips", clipped), ("in which all groups tie", tied)):
            not_made = trainer.update(batch)["updates_without_signal"]
            unmoved = torch.equal(before, _weights(trainer.model))
            yield exactly(
                f"a rollout batch {name} changes no weight",
                unmoved and not_made == NUM_UPDATES and trainer.schedule.last_epoch == updates_before,
                True, "so:", "GSPOTrainer.update: momentum moves the weights in a step without a gradient",
            )  # fmt: skip

    def micro_batches(self) -> Checks:
        norms = []
        for tokens in (4096, 1):  # one trainer at a time: each has a copy of the model and AdamW's moments
            trainer = self._trainer(dtype="float32", micro_batch_tokens=tokens)
            norms.append(trainer.train_step(self.problems)["grad_norm"])
        name = "the trainer's micro-batches never matter"
        if norms[0] == 0:
            yield Check(name, None, TIED, "")
            return
        yield at_most(
            name, abs(norms[1] / norms[0] - 1), 1e-3, "relative error of the gradient norm",
            "GSPOTrainer: the denominator of a micro-batch's loss, gradients that are lost or left behind",
        )  # fmt: skip

    def compute_type(self, dtype: str) -> Checks:
        """Look at updates at the paper's learning rate in this type, of a model that came in bfloat16."""
        trainer = self._trainer(deepcopy(self.model).bfloat16(), dtype=dtype, learning_rate=1e-6)
        before = _weights(trainer.model)
        metrics = trainer.train_step(self.problems)
        steps = (_weights(trainer.model) - before).abs()
        first = metrics["clip_fraction_by_minibatch"][:1]
        yield exactly(
            f"{dtype}: the first minibatch never clips", max(first, default=0.0), 0.0, "clip fraction",
             "GSPOTrainer: pi_old comes from the same forward passes that the updates make",
        )  # fmt: skip
        yield at_most(
            f"{dtype}: log-probs taken twice without an update, nothing clips",
            largest_null_clip_fraction([metrics]), 1e-3, "null clip fraction",
            "policy/log_probs.py: forward passes of other shapes; arithmetic that varies",
        )  # fmt: skip
        name = f"{dtype}: weights move at a learning rate of 1e-6"
        if metrics["zero_variance_groups"] > MAX_TIED_GROUPS:
            yield Check(name, None, TIED, "")
            return
        yield between(
            name, (steps > 0).double().mean().item(), 0.5, 1.0, "share of them",
            "GSPOTrainer: weights kept in float32, and a step that is taken",
        )  # fmt: skip
        yield between(
            f"{dtype}: by about that rate per update", steps[steps > 0].mean().item() / NUM_UPDATES, 1e-7,
            1.5e-6, "mean step", "GSPOTrainer: the optimizer and its learning rate",
        )  # fmt: skip

    def evaluation(self) -> Checks:
        trainer = self._trainer(dtype="float32", reward_fn=three_valued_reward)
        before = _weights(trainer.model)
        first, second = trainer.evaluate(self.problems), trainer.evaluate(self.problems)
        rewards = three_valued_reward(self.problems, [r.text for r in _last_rollouts(trainer)])
        passed = (np.array(rewards) == 1).reshape(-1, GROUP_SIZE).mean(1).tolist()
        right = (
            first == second
            and first["pass_by_problem"] == passed
            and first["pass_at_1"] == np.mean(passed)
            and (_weights(trainer.model) == before).all()
        )
        yield exactly(
            "an evaluation counts passes, and another one finds the same", bool(right), True, "so:",
            "GSPOTrainer.evaluate",
        )  # fmt: skip

    def _trainer(
        self,
        model: torch.nn.Module | None = None,
        reward_fn: Callable = checksum_reward,
        **settings: Any,
    ) -> gspo.GSPOTrainer:
        model = model or deepcopy(self.model)
        config = gspo.GSPOConfig(
            device=self.device,
            batch_size=NUM_PROBLEMS,
            mini_batch_size=MINI_BATCH_SIZE,
            group_size=GROUP_SIZE,
            max_new_tokens=MAX_NEW_TOKENS,
            max_length=self._max_length(),
            temperature=UPDATE_TEMPERATURE,
            **settings,
        )
        engine = RecordingEngine(model, self.tokenizer)
        return gspo.GSPOTrainer(model, self.tokenizer, config, reward_fn, engine=engine)

    def _trainers_log_probs(self, pairs: Sequence[Pair], temperature: float = 1.0) -> list[Tensor]:
        prompts = [prompt for prompt, _ in pairs]
        responses = [response for _, response in pairs]
        return token_log_probs(self.model, prompts, responses, temperature)

    def _max_length(self) -> int:
        return max(map(len, self.prompts)) + MAX_NEW_TOKENS

    def _sample(self, temperature: float, group_size: int = GROUP_SIZE) -> list[Rollout]:
        sampling = Sampling(MAX_NEW_TOKENS, temperature, seed=1)
        engine = TransformersEngine(self.model, self.tokenizer)
        return engine.generate(self.prompts, group_size, sampling)


def largest_null_clip_fraction(metrics: Sequence[dict]) -> float:
    """The largest over the rollout batches that measured it; NaN, which passes no check, if none did."""
    measured = [m["null_clip_fraction"] for m in metrics if "null_clip_fraction" in m]
    return max(measured, default=math.nan)


def _update_errors(
    algorithm: str,
    trainer: gspo.GSPOTrainer,
    start: torch.nn.Module,
    metrics: dict,
    twin: reference.Updates,
) -> dict[str, float]:
    """How far the trainer's updates are from those of the float64 twin: quantity to error."""
    rollouts = _last_rollouts(trainer)
    moved, expected = _weights(trainer.model) - _weights(start), _weights(twin.model) - _weights(start)
    norm = np.mean(twin.grad_norms)
    # The metrics' ratios are those of responses with an advantage: of their tokens, or one for each response.
    by_response = _ratios(algorithm, twin)
    ratios = torch.cat([row for row, a in zip(by_response, twin.advantages, strict=True) if a])
    lowest, highest = ratios.min().item(), ratios.max().item()
    ranges = [side for side in ranges_of(algorithm) if side is not None]
    spreads = [
        np.median(row.abs()) / np.mean(ranges)
        for row, can_clip in zip(_movements(algorithm, twin), twin.can_clip, strict=True)
        if can_clip and ranges
    ]
    spread = float(np.median(spreads)) if spreads else 0.0
    gap = max(abs(metrics["importance_ratio_min"] - lowest), abs(metrics["importance_ratio_max"] - highest))
    return {
        "sampler": _largest_gap([torch.tensor(r.log_probs) for r in rollouts], twin.old_log_probs),
        "gradient norm": abs(metrics["grad_norm"] / norm - 1),
        "weights": relative_error(moved, expected),
        "ratios": gap / max(abs(lowest - 1), abs(highest - 1)),
        "ratio spread": abs(metrics["ratio_spread"] - spread) / max(spread, 1e-6),
    }


def _ratios(algorithm: str, twin: reference.Updates) -> list[Tensor]:
    """The importance ratios of each response: (1,) its own, or (|y|,) those of its tokens."""
    per_token = ALGORITHMS[algorithm].clip_unit == "token"
    return [(row if per_token else row.mean()[None]).exp() for row in twin.log_ratios]


def _movements(algorithm: str, twin: reference.Updates) -> list[Tensor]:
    """What the clip ranges bound, (1,) or (|y|,) for each response: s - 1, w - 1, or pi - pi_old."""
    if ALGORITHMS[algorithm].clips_probability:
        return [old.exp() * row.expm1() for old, row in zip(twin.old_log_probs, twin.log_ratios, strict=True)]
    return [ratios - 1 for ratios in _ratios(algorithm, twin)]


def _clip_metrics(algorithm: str, twin: reference.Updates) -> tuple[dict[str, float], int]:
    """The shares of clipped tokens in a rollout batch, and the number of tokens that can clip.

    The reference loss of each response alone says how many of its tokens are clipped; with an infinite range
    on one side, how many on the other.
    """
    left, right = ranges_of(algorithm)
    loss = reference_of(algorithm)
    num_left = num_right = num_eligible = 0.0
    rows = zip(twin.old_log_probs, twin.log_ratios, twin.advantages, twin.can_clip, strict=True)
    for old, log_ratios, advantage, can_clip in rows:
        if not can_clip or (left is None and right is None):
            continue
        num_tokens = len(old)
        response = old + log_ratios, old, torch.tensor([advantage], dtype=torch.float64)
        tensors = (
            *(x.view(1, -1) for x in response[:2]),
            response[2],
            torch.ones(1, num_tokens, dtype=torch.bool),
        )
        num_eligible += num_tokens
        num_left += num_tokens * loss(*tensors, left, right and math.inf)[1]
        num_right += num_tokens * loss(*tensors, left and math.inf, right)[1]
    num_tokens, eligible = sum(map(len, twin.log_ratios)), max(num_eligible, 1)
    shares = {
        "clip_fraction": (num_left + num_right) / num_tokens,
        "clip_fraction_eligible": (num_left + num_right) / eligible,
        "clip_fraction_left": num_left / eligible,
        "clip_fraction_right": num_right / eligible,
        "eligible_fraction": num_eligible / num_tokens,
    }
    return shares, int(num_eligible)


def _last_rollouts(trainer: gspo.GSPOTrainer) -> list[Rollout]:
    assert isinstance(trainer.engine, RecordingEngine)
    return trainer.engine.rollouts


def _pairs(rollouts: Sequence[Rollout]) -> list[Pair]:
    return [(r.prompt_ids, r.response_ids) for r in rollouts]


def _largest_gap(rows: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max((a.cpu().double() - b.cpu()).abs().max().item() for a, b in zip(rows, others, strict=True))


def _weights(model: torch.nn.Module) -> Tensor:
    """The first WEIGHTS_PER_TENSOR weights of each tensor, in one float64 vector."""
    parts = [p.detach().flatten()[:WEIGHTS_PER_TENSOR].double().cpu() for p in model.parameters()]
    return torch.cat(parts)
