"""Validation, part 1 on a model: scoring, sampling and the trainer's updates against float64 loops.

The trainer is looked at from outside: what its engine sampled, what its metrics say, where its weights went.
"""

import math
import random
from collections import Counter
from copy import deepcopy

import numpy as np
import torch

import gspo_implementation as gspo
from gspo.checks import float64_reference as reference
from gspo.checks.losses import PAPER_CLIP_RANGES, relative_error
from gspo.checks.report import Check, at_most, between, each_at_most, exactly
from gspo.policy import log_probs as policy_scoring
from gspo.policy import rollout

DTYPES = ("float32", "bfloat16")
NUM_PROBLEMS, MINI_BATCH_SIZE, GROUP_SIZE, MAX_NEW_TOKENS = 8, 2, 4, 24
NUM_UPDATES = NUM_PROBLEMS // MINI_BATCH_SIZE
TEMPERATURES = (0.7, 1.0, 1.5)
UPDATE_TEMPERATURE = 1.5  # responses that differ, so that there is something to learn in every group
UPDATE_RATE = 5e-5
UNJUDGED_SHARE = 0.2
# With every second group tied, two updates at least have something to learn; with more, perhaps none has.
MAX_TIED_GROUPS = 0.5
# The float64 copy with its AdamW moments takes 24 bytes a parameter, and runs one response at a time.
MAX_TWIN_PARAMETERS = 20e6
MAX_Z = 4.5  # standard errors: exceeded by chance once in 150,000 times
WEIGHTS_A_TENSOR = 100_000  # looked at, to see whether weights move
TIED = "not measured: the model's answers to a problem are mostly equal"


def checksum_reward(problems, responses) -> list[float | None]:
    """A reward that ties for equal responses alone, some of it not judged; what is rewarded does not matter.

    Equal responses with unequal rewards would cancel to a gradient of rounding errors, which Adam scales up.
    """
    texts = [f"{problem.prompt}\n{response}" for problem, response in zip(problems, responses, strict=True)]
    sums = [random.Random(text).random() for text in texts]
    return [None if x < UNJUDGED_SHARE else x for x in sums]


def three_valued_reward(problems, responses) -> list[float]:
    """1, 0.5 or 0, for the check of the evaluation: only 1 is a pass."""
    return [random.Random(response).choice([0.0, 0.5, 1.0]) for response in responses]


class RecordingEngine(rollout.TransformersEngine):
    """Keeps the last call's rollouts."""

    def generate(self, prompts, group_size, sampling):
        self.rollouts = super().generate(prompts, group_size, sampling)
        return self.rollouts


class ModelChecks:
    """Checks of a model on NUM_PROBLEMS problems, each with a string .prompt. The model becomes float32."""

    def __init__(self, model, tokenizer, problems, device: str):
        self.model, self.tokenizer, self.device = model.float().to(device).eval(), tokenizer, device
        self.problems = problems[:NUM_PROBLEMS]
        self.prompts = [rollout.encode_prompt(tokenizer, problem.prompt) for problem in self.problems]
        self.num_parameters = sum(p.numel() for p in model.parameters())

    def all(self) -> list:
        updates = [self.trainer_updates, self.micro_batches, self.compute_types, self.evaluation]
        return [self.scoring, self.sampling, self.random_streams, self.endings, *updates]

    def scoring(self):
        """Against one row at a time without padding, with all logits; gradients of the norms and biases.

        Groups share their prompts; then one response to each prompt, which shares nothing.
        """
        fault = "policy_scoring.token_log_probs: positions, padding, temperature"
        parameters = [p for p in self.model.parameters() if p.dim() == 1]
        errors, gradient_errors = {}, {}
        for name, temperature, step in (
            ("in groups, T=1", 1.0, 1),
            ("T=0.7", 0.7, 1),
            ("alone", 0.7, GROUP_SIZE),
        ):
            pairs = _pairs(self._sample(temperature))[::step]
            fast = policy_scoring.token_log_probs(self.model, *zip(*pairs, strict=True), temperature)
            slow = [reference.token_log_probs(self.model, *pair, temperature) for pair in pairs]
            errors[name] = _largest_gap(fast, slow)
            gradients = []
            for rows in (fast, slow):
                weighted = [torch.linspace(-1, 1, len(row), device=row.device) * row for row in rows]
                parts = torch.autograd.grad(torch.cat(weighted).sum(), parameters)
                gradients.append(torch.cat([part.flatten().double() for part in parts]))
            gradient_errors[name] = relative_error(*gradients)
        yield each_at_most("scoring equals a naive forward", errors, 1e-3, "largest error", fault)
        yield each_at_most("so do its gradients", gradient_errors, 1e-3, "relative error", fault)
        with torch.no_grad(), torch.autocast(torch.device(self.device).type, torch.bfloat16):
            coarse = torch.cat(policy_scoring.token_log_probs(self.model, *zip(*pairs, strict=True)))
        rounded = (coarse == coarse.bfloat16()).double().mean().item()
        yield at_most(
            "its softmax is float32, even where products are bfloat16", rounded, 0.5, "share rounded",
            "policy_scoring.token_log_probs: .float() before the softmax",
        )  # fmt: skip

    @torch.no_grad()
    def sampling(self):
        errors, surprises = {}, {}
        for temperature in TEMPERATURES:
            rollouts = self._sample(temperature, 4 * GROUP_SIZE)
            pairs = _pairs(rollouts)
            scored = policy_scoring.token_log_probs(self.model, *zip(*pairs, strict=True), temperature)
            errors[f"T={temperature}"] = _largest_gap([torch.tensor(r.log_probs) for r in rollouts], scored)
            surprises[f"T={temperature}"] = abs(self._surprise(pairs, temperature))
        yield each_at_most(
            "the sampler's log-probs equal the scorer's", errors, 1e-2, "largest error",
            "rollout.py and policy_scoring.py: temperature, positions, a shift by one token",
        )  # fmt: skip
        yield each_at_most(
            "tokens are drawn from the distribution that is scored", surprises, MAX_Z, "standard errors",
            "rollout.py: how tokens are drawn; top-k, top-p or a temperature that scoring does not know",
        )  # fmt: skip

    def _surprise(self, pairs, temperature: float) -> float:
        """Sum of log p of the sampled tokens against its expectation, in standard errors."""
        excess = variance = 0.0
        for prompt, response in pairs:
            ids = torch.tensor([[*prompt, *response]], device=self.device)
            logits = self.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() / temperature
            log_probs = logits.log_softmax(-1)  # (T, V)
            mean = (log_probs.exp() * log_probs).sum(-1)
            variance += (log_probs.exp() * (log_probs - mean[:, None]).square()).sum().item()
            excess += (log_probs.gather(1, ids[0, len(prompt) :, None])[:, 0] - mean).sum().item()
        return excess / math.sqrt(variance) if variance else excess

    def random_streams(self):
        """One prompt, given twice."""
        sampling = rollout.Sampling(MAX_NEW_TOKENS, UPDATE_TEMPERATURE, seed=3)
        engine = rollout.TransformersEngine(self.model, self.tokenizer)
        texts = [r.text for r in engine.generate(self.prompts[:1] * 2, 4 * GROUP_SIZE, sampling)]
        groups = texts[: 4 * GROUP_SIZE], texts[4 * GROUP_SIZE :]
        name = "responses have random streams of their own"
        if len(set(texts)) == 1:
            yield Check(name, None, TIED, "")
            return
        distinct = min(len(set(group)) for group in groups) > 1 and groups[0] != groups[1]
        yield exactly(
            name, distinct, True, "distinct in a group, and between two groups of one prompt:",
            "rollout.py: the seeds of its uniforms",
        )  # fmt: skip

    def endings(self):
        """Where responses end; then again, with a token that is often sampled made an end token too."""
        config, own = self.model.generation_config, self.tokenizer.eos_token_id
        configured, limit = config.eos_token_id, self._max_length() - MAX_NEW_TOKENS // 2
        listed = configured if isinstance(configured, list) else [configured]
        sampled = Counter(i for r in self._sample(UPDATE_TEMPERATURE) for i in r.response_ids[:8])
        wrong = 0
        for more in ([], [sampled.most_common(1)[0][0]]):
            ends = {i for i in (own, *listed, *more) if i is not None}
            config.eos_token_id = sorted(ends - {own}) or configured
            try:
                engine = rollout.TransformersEngine(self.model, self.tokenizer)
                sampling = rollout.Sampling(MAX_NEW_TOKENS, UPDATE_TEMPERATURE, limit, seed=2)
                rollouts = engine.generate(self.prompts, GROUP_SIZE, sampling)
            finally:
                config.eos_token_id = configured
            wrong += sum(self._ends_wrongly(r, ends, limit) for r in rollouts)
        yield exactly(
            "responses end at the first end token or at their limit", wrong, 0, "otherwise:",
            "rollout.py: end tokens of tokenizer and generation config, max_new_tokens, max_length",
        )  # fmt: skip

    def _ends_wrongly(self, r: rollout.Rollout, ends: set[int], limit: int) -> bool:
        ids, room = r.response_ids, min(MAX_NEW_TOKENS, limit - len(r.prompt_ids))
        ended = ids[-1] in ends
        right = ends.isdisjoint(ids[:-1]) and r.finished == ended and (ended or len(ids) == room)
        return not (
            right and len(ids) <= room and r.text == self.tokenizer.decode(ids, skip_special_tokens=True)
        )

    def trainer_updates(self):
        """One rollout batch of the trainer against a float64 copy of the model with updates of its own."""
        for kind in PAPER_CLIP_RANGES:
            name = f"{kind}: four updates of the trainer equal float64 ones"
            if self.num_parameters > MAX_TWIN_PARAMETERS:
                size = f"{self.num_parameters / 1e6:.0f}M parameters"
                yield Check(name, None, f"not measured: too slow in float64 with {size}", "")
                continue
            trainer = self._trainer(algorithm=kind, learning_rate=UPDATE_RATE, dtype="float32")
            start = deepcopy(trainer.model)
            metrics = trainer.train_step(self.problems)
            if metrics["zero_variance_groups"] > MAX_TIED_GROUPS:
                yield Check(name, None, TIED, "")
                continue
            twin = self._float64_updates(start, kind, trainer.engine.rollouts)
            made = len(metrics["clip_fraction_by_minibatch"])
            fault = "GSPOTrainer: mini_batch_size"
            yield exactly(f"{kind}: the trainer makes four updates", made, NUM_UPDATES, "updates", fault)
            moved, expected = (_weights(m) - _weights(start) for m in (trainer.model, twin.model))
            norm = sum(twin.grad_norms) / len(twin.grad_norms)
            taught = [row for row, a in zip(twin.log_ratios, twin.advantages, strict=True) if a]
            ratios = [row.mean()[None] if kind != "grpo" else row for row in taught]
            extremes = torch.cat(ratios).min().exp().item(), torch.cat(ratios).max().exp().item()
            farthest = max(abs(extreme - 1) for extreme in extremes)
            given = [metrics[f"importance_ratio_{end}"] for end in ("min", "max")]
            errors = {
                "sampler": _largest_gap(
                    [torch.tensor(r.log_probs) for r in trainer.engine.rollouts], twin.old_log_probs
                ),
                "gradient norm": abs(metrics["grad_norm"] / norm - 1),
                "weights": relative_error(moved, expected),
                "ratios": max(abs(a - b) for a, b in zip(given, extremes, strict=True)) / farthest,
            }
            yield each_at_most(
                name, errors, 4e-3, "error",
                "GSPOTrainer: advantages, pi_old (the policy before the first update, at the sampling "
                "temperature), clip ranges, the loss's denominator, AdamW and its settings",
            )  # fmt: skip
            tokens = [len(row) for row in twin.log_ratios]
            fractions = [*metrics["clip_fraction_by_minibatch"], metrics["clip_fraction"]]
            expected = [*twin.clip_fractions, np.average(twin.clip_fractions, weights=twin.num_tokens)]
            gap = max(abs(a - b) for a, b in zip(fractions, expected, strict=True))
            one_response = max(tokens) / min(twin.num_tokens)  # at the very edge of the range, on either side
            fault = "GSPOTrainer: clip_fraction, by minibatch and pooled"
            yield at_most(f"{kind}: so do their clip fractions", gap, one_response, "difference", fault)

    def _float64_updates(self, start, kind: str, rollouts) -> reference.Updates:
        asked = [problem for problem in self.problems for _ in range(GROUP_SIZE)]
        return reference.updates(
            start,
            kind,
            _pairs(rollouts),
            checksum_reward(asked, [r.text for r in rollouts]),
            GROUP_SIZE,
            NUM_UPDATES,
            PAPER_CLIP_RANGES[kind],
            learning_rate=UPDATE_RATE,
            max_grad_norm=1.0,
            temperature=UPDATE_TEMPERATURE,
        )

    def micro_batches(self):
        norms = [  # one trainer at a time: each has a copy of the model and its optimizer's moments
            self._trainer(dtype="float32", micro_batch_tokens=tokens).train_step(self.problems)["grad_norm"]
            for tokens in (4096, 1)
        ]
        name = "the trainer's micro-batches never matter"
        if norms[0] == 0:
            yield Check(name, None, TIED, "")
            return
        yield at_most(
            name, abs(norms[1] / norms[0] - 1), 1e-3, "relative error of the gradient norm",
            "GSPOTrainer: the denominator of a micro-batch's loss, gradients that are lost or left behind",
        )  # fmt: skip

    def compute_types(self):
        for dtype in DTYPES:
            yield from self._compute_type(dtype)

    def _compute_type(self, dtype: str):
        """What the arithmetic does to updates at the paper's rate, of a model that came in bfloat16."""
        trainer = self._trainer(deepcopy(self.model).bfloat16(), dtype=dtype, learning_rate=1e-6)
        before = _weights(trainer.model)
        metrics = trainer.train_step(self.problems)
        steps = (_weights(trainer.model) - before).abs()
        yield exactly(
            f"{dtype}: the first minibatch never clips", metrics["clip_fraction_by_minibatch"][0], 0.0,
            "clip fraction", "GSPOTrainer: pi_old is scored by the passes that the updates run",
        )  # fmt: skip
        yield at_most(
            f"{dtype}: scored twice without an update, nothing clips", metrics["null_clip_fraction"], 1e-3,
            "null clip fraction", "policy_scoring.py: passes of other shapes; arithmetic that varies",
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
            f"{dtype}: by about that rate an update", steps[steps > 0].mean().item() / NUM_UPDATES, 1e-7,
            1.5e-6, "mean step", "GSPOTrainer: the optimizer and its learning rate",
        )  # fmt: skip

    def evaluation(self):
        trainer = self._trainer(dtype="float32", reward_fn=three_valued_reward)
        before = _weights(trainer.model)
        first, second = trainer.evaluate(self.problems), trainer.evaluate(self.problems)
        rewards = three_valued_reward(None, [r.text for r in trainer.engine.rollouts])
        passed = (np.array(rewards) == 1).reshape(-1, GROUP_SIZE).mean(1).tolist()
        right = first == second and first["pass_by_problem"] == passed
        right &= first["pass_at_1"] == np.mean(passed) and bool((_weights(trainer.model) == before).all())
        yield exactly(
            "an evaluation counts passes, and another one finds the same", bool(right), True, "so:",
            "GSPOTrainer.evaluate",
        )  # fmt: skip

    def _trainer(self, model=None, reward_fn=checksum_reward, **settings) -> gspo.GSPOTrainer:
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

    def _max_length(self) -> int:
        return max(map(len, self.prompts)) + MAX_NEW_TOKENS

    def _sample(self, temperature: float, group_size: int = GROUP_SIZE) -> list[rollout.Rollout]:
        sampling = rollout.Sampling(MAX_NEW_TOKENS, temperature, seed=1)
        engine = rollout.TransformersEngine(self.model, self.tokenizer)
        return engine.generate(self.prompts, group_size, sampling)


def _pairs(rollouts) -> list[tuple[list[int], list[int]]]:
    return [(r.prompt_ids, r.response_ids) for r in rollouts]


def _largest_gap(rows, others) -> float:
    return max((a.cpu().double() - b.cpu()).abs().max().item() for a, b in zip(rows, others, strict=True))


def _weights(model) -> torch.Tensor:
    parts = [p.detach().flatten()[:WEIGHTS_A_TENSOR].double().cpu() for p in model.parameters()]
    return torch.cat(parts)
