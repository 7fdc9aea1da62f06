"""Group Sequence Policy Optimization (arXiv 2507.18071): the losses, the configuration and the trainer.

    python train_gspo.py --model_name smollm2-135m --dataset math               one CPU or one GPU
    torchrun --nproc_per_node 4 train_gspo.py --dataset gsm8k                   several processes

The algorithm, for one rollout batch:

    1. sample G responses a query from the current policy, which thereby is pi_old;
    2. reward them; A_i = (r_i - mean) / std over the group of its query;
    3. log pi_old of every response;
    4. for each minibatch, with s_i = exp(mean_t[log pi - log pi_old]): maximise
       mean_i min(s_i A_i, clip(s_i) A_i).

Where this departs from the paper:

    1. std is unbiased and has 1e-6 added to it (the paper gives no constant).
    2. log-ratios are bounded by MAX_LOG_RATIO before exp(), far outside any clip range.
    3. the gradient norm is clipped (--max_grad_norm), and a learning rate may be warmed up.
    4. a minibatch whose groups are all tied still makes an AdamW step, which its momentum moves.
    5. a response that could not be judged has no advantage and stays out of its group's mean and std.

Shapes: Q queries, G group size, B = Q * G sequences (groups contiguous), T response positions.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from gspo import PROGRESS_DELAY_S
from gspo.policy.log_probs import micro_batches, token_log_probs
from gspo.policy.rollout import Rollout, Sampling, TransformersEngine, encode_prompt
from gspo.training.alarms import EmergencyStop, repetition, stop_if, stop_reason, unreadable_characters
from gspo.training.config import GSPOConfig
from gspo.training.intervals import wilson_interval
from gspo.training.rollout_batch import RolloutBatch
from gspo.training.run_log import peak_memory_gb
from gspo.training.training_run import Interrupted, TrainingRun

# exp() of an unbounded log-ratio overflows to inf, and inf * 0 in the backward of min() is NaN in every
# weight. exp(60) = 1e26 stays finite in float32 through the loss and its gradient; the largest ratio that
# any clip range or stop rule looks at is 100.
MAX_LOG_RATIO = 60.0
# Random stream of evaluations: far from every training stream, and the same in every run, so that two
# evaluations of the same problems are paired.
EVALUATION_STREAM = 1 << 100
# Problems evaluated at a time: a step of the progress bar.
EVALUATION_CHUNK = 16


# ----------------------------------------------------------------------------------------------- the losses


def group_advantages(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-6) over each group of group_size consecutive rewards.

    Args:
        rewards: (B,), groups contiguous. NaN marks a response that could not be judged: its advantage is 0,
            and its group's mean and (unbiased) standard deviation are taken over the others.

    Returns:
        (B,) advantages; exactly 0 throughout a group whose rewards are all equal, which teaches nothing.

    Raises:
        ValueError: a group size under 2, or B no multiple of it.
    """
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2, got {group_size}: one response has no group")
    if rewards.dim() != 1 or len(rewards) % group_size:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} do not split into groups of {group_size}")
    groups = (rewards if rewards.is_floating_point() else rewards.float()).view(-1, group_size)  # (Q, G)
    judged = ~groups.isnan()
    count = judged.sum(1, keepdim=True)  # (Q, 1)
    centred = torch.where(judged, groups - groups.nanmean(1, keepdim=True), 0.0)
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    # A tie is read off the rewards themselves: the mean of equal floats can miss them by a rounding error,
    # which a std of the same size would turn into an advantage of order 1.
    highest = torch.where(judged, groups, -math.inf).amax(1, keepdim=True)
    lowest = torch.where(judged, groups, math.inf).amin(1, keepdim=True)
    return torch.where(judged & (highest > lowest), centred / (std + 1e-6), 0.0).view(-1)


def sequence_importance_ratio(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """s_i = (pi(y_i|x) / pi_old(y_i|x))^(1/|y_i|), the geometric mean of the token ratios (equation 7).

    Args: log_probs, old_log_probs (B, T); mask (B, T) bool. Returns (B,); 1 for a row with no tokens.
    """
    return _bounded_exp(_mean_over_tokens(_token_log_ratio(log_probs, old_log_probs, mask), mask))


def gspo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    left_clip_range: float = 3e-4,
    right_clip_range: float = 4e-4,
    denominator: int | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Minus the GSPO objective, 1/B sum_i min(s_i A_i, clip(s_i, 1 - left, 1 + right) A_i) (equation 5).

    Args:
        log_probs: (B, T) under the policy, differentiable.
        old_log_probs: (B, T) under the policy that sampled; no gradient flows to it.
        advantages: (B,).
        mask: (B, T) bool, True at response tokens. Other positions never matter, NaN included; a row with no
            tokens contributes 0.
        denominator: sequences of the whole optimizer update when these B are one micro-batch of it (B if
            not given): the sum over micro-batches is then the loss of the update, however it was cut.

    Returns:
        The scalar loss to minimise, and metrics as floats: clip_fraction (of tokens, the paper's unit),
        clip_fraction_sequences, importance_ratio_mean, _std, _min, _max (over sequences).

    Raises:
        ValueError: shapes that do not agree, or a clip range that is not positive.
    """
    _check_shapes(log_probs, old_log_probs, advantages, mask, advantages_per_token=False)
    log_ratio = _token_log_ratio(log_probs, old_log_probs.detach(), mask)  # (B, T)
    ratio = _bounded_exp(_mean_over_tokens(log_ratio, mask))[:, None]  # (B, 1): one ratio a sequence
    return _clipped_loss(
        ratio, ratio, advantages[:, None], mask, left_clip_range, right_clip_range, denominator
    )


def gspo_token_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    left_clip_range: float = 3e-4,
    right_clip_range: float = 4e-4,
    denominator: int | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """GSPO-token (equations 13 and 14): s_it = sg[s_i] pi(y_it) / sg[pi(y_it)], with an advantage per token.

    As gspo_loss, but advantages may be (B, T). With equal advantages along a row it has GSPO's value,
    clipping and gradient.
    """
    _check_shapes(log_probs, old_log_probs, advantages, mask, advantages_per_token=True)
    sequence_ratio = sequence_importance_ratio(log_probs, old_log_probs, mask).detach()[:, None]  # (B, 1)
    own_ratio = torch.exp(_token_log_ratio(log_probs, log_probs.detach(), mask))  # (B, T): 1, with a gradient
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]
    return _clipped_loss(
        sequence_ratio * own_ratio,
        sequence_ratio,
        advantages,
        mask,
        left_clip_range,
        right_clip_range,
        denominator,
    )


def grpo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    left_clip_range: float = 0.2,
    right_clip_range: float = 0.27,
    denominator: int | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The GRPO baseline: 1/B sum_i 1/|y_i| sum_t min(w_it A_i, clip(w_it) A_i), w_it = pi / pi_old.

    As gspo_loss, but advantages may be (B, T), and the metrics' importance ratios are over tokens.
    """
    _check_shapes(log_probs, old_log_probs, advantages, mask, advantages_per_token=True)
    ratio = _bounded_exp(_token_log_ratio(log_probs, old_log_probs.detach(), mask))  # (B, T)
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]
    return _clipped_loss(ratio, ratio, advantages, mask, left_clip_range, right_clip_range, denominator)


def kl_penalty(
    log_probs: torch.Tensor, reference_log_probs: torch.Tensor, mask: torch.Tensor, denominator: int
) -> torch.Tensor:
    """1/denominator sum_i mean_t [r - 1 - log r], r = pi_ref / pi: KL(pi || pi_ref) in nats per token.

    Schulman's k3 estimator, as in GRPO (arXiv 2402.03300, equation 4). GSPO's own objective has no such term.
    """
    log_ratio = _token_log_ratio(reference_log_probs, log_probs, mask)
    return _mean_over_tokens(_bounded_exp(log_ratio) - 1 - log_ratio, mask).sum() / denominator


def _token_log_ratio(log_probs, old_log_probs, mask):
    """log pi - log pi_old (B, T), 0 where mask is False."""
    return torch.where(mask, log_probs - old_log_probs, 0.0)


def _mean_over_tokens(values, mask):
    """(B, T) or (B, 1) to (B,): the mean over each row's tokens, 0 for a row without any."""
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def _bounded_exp(log_ratio):
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _clipped_loss(ratio, reported_ratio, advantages, mask, left, right, denominator):
    """The clipped surrogate that the three losses share; they differ in the ratio alone.

    ratio, advantages: (B, 1) per sequence or (B, T) per token. Mean over each sequence's tokens, then over
    sequences: never over tokens of different sequences, where long answers would dominate.
    """
    if not (left > 0 and right > 0):
        raise ValueError(f"clip ranges must be positive, got left {left} and right {right}")
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - left, 1 + right) * advantages)
    loss = -_mean_over_tokens(objective, mask).sum() / (denominator or len(mask))
    # Clipped: the clipped branch is the one in force, so that no gradient passes. |s - 1| alone is not it.
    clipped = ((advantages > 0) & (ratio > 1 + right)) | ((advantages < 0) & (ratio < 1 - left))
    return loss, _ratio_metrics(reported_ratio.detach(), clipped & mask, mask)


def _ratio_metrics(ratio, clipped, mask) -> dict[str, float]:
    """Ratios (B, 1) or (B, T); clipped, mask (B, T). float64: the square of a ratio overflows float32."""
    has_tokens = mask.any(1)
    ratios = ratio[mask if ratio.shape == mask.shape else has_tokens].double()
    if ratios.numel() == 0:
        ratios = torch.ones(1, dtype=torch.float64)
    return {
        "clip_fraction": clipped.sum().item() / max(mask.sum().item(), 1),
        "clip_fraction_sequences": clipped.any(1).sum().item() / max(has_tokens.sum().item(), 1),
        "importance_ratio_mean": ratios.mean().item(),
        "importance_ratio_std": ratios.std(correction=0).item(),
        "importance_ratio_min": ratios.min().item(),
        "importance_ratio_max": ratios.max().item(),
    }


def _check_shapes(log_probs, old_log_probs, advantages, mask, advantages_per_token) -> None:
    shape = tuple(mask.shape)
    allowed = [shape[:1], shape] if advantages_per_token else [shape[:1]]
    if mask.dim() != 2 or log_probs.shape != mask.shape or old_log_probs.shape != mask.shape:
        raise ValueError(
            f"log_probs {tuple(log_probs.shape)}, old_log_probs {tuple(old_log_probs.shape)} and mask "
            f"{shape} must all be (B, T)"
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}")
    if tuple(advantages.shape) not in allowed:
        raise ValueError(f"advantages {tuple(advantages.shape)} must be {' or '.join(map(str, allowed))}")


LOSSES = {"gspo": gspo_loss, "gspo_token": gspo_token_loss, "grpo": grpo_loss}


# ------------------------------------------------------------------------------------------------ the trainer


class GSPOTrainer:
    """Trains a causal language model with the configured algorithm.

    Args:
        model, tokenizer: the policy; its weights are kept in float32, whatever the compute type.
        config: a GSPOConfig.
        reward_fn: (problems, responses) -> list of float, or None for a response that cannot be judged. A
            problem is any object with a string .prompt; problems and responses are aligned. If it has an
            attribute `metrics`, a dict of sums over the responses of its last call, those are logged too.
        engine: samples the responses; by default the policy itself, in process.
    """

    def __init__(self, model, tokenizer, config: GSPOConfig, reward_fn, engine=None):
        self.config = config = config.resolve(sum(p.numel() for p in model.parameters()))
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and config.max_length > positions:
            raise ValueError(f"--max_length {config.max_length} is beyond the model's {positions} positions")
        self.accelerator = Accelerator(cpu=config.device == "cpu")
        self.model = model.float().to(self.accelerator.device).eval()
        self.tokenizer = tokenizer
        self.reward_fn = reward_fn
        self.engine = engine or TransformersEngine(self.model, tokenizer)
        self.reference_model = deepcopy(self.model).requires_grad_(False) if config.kl_coef else None
        if config.gradient_checkpointing:
            _enable_gradient_checkpointing(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda update: min(1.0, (update + 1) / max(1, config.warmup_steps))
        )
        self.loss = LOSSES[config.algorithm]
        self.step = 0  # rollout batches trained on
        self.halvings = 0  # of micro_batch_tokens, for want of memory
        self.stop_requested = False  # set it (in a signal handler, say) to stop after the update in progress
        self._stepping = False  # the optimizer is at the weights

    def train(self, train_problems: Sequence, eval_problems: Sequence) -> dict:
        """Run the configured epochs in the run folder that the configuration names.

        Returns: the evaluations "before" and "after", and whether it is "finished" (false: stop_requested).

        Raises:
            ValueError: no problem whose prompt leaves room for a response, a run folder already in use, or a
                checkpoint that does not go with these settings and problems.
            EmergencyStop: an update that must not reach the weights; the evidence is in emergency/.
            CannotSave: the disk is full; the last whole checkpoint is as it was.
        """
        return TrainingRun(self, train_problems, eval_problems).train()

    def train_step(self, problems: Sequence) -> dict:
        """One rollout batch on these problems: sample, reward, score, update. Returns its metrics."""
        metrics = self.update(self.collect(problems, self.step))
        self.step += 1
        return metrics

    def evaluate(self, problems: Sequence) -> dict:
        """Sample group_size responses to each problem, from random streams that are the same every time.

        Returns:
            pass_at_1: share of responses with reward 1, and interval_95 of it (Wilson's, over problems);
            reward_mean; response_tokens_mean; pass_by_problem: each problem's own share, for paired
            comparisons. A response that could not be judged counts as not passed.
        """
        size = self.config.group_size
        rollouts, rewards = [], []
        starts = range(0, len(problems), EVALUATION_CHUNK)
        for start in self.progress_bar(iterable=starts, desc="evaluating", unit="chunk", leave=False):
            self.stop_here_if_asked()
            chunk = problems[start : start + EVALUATION_CHUNK]
            sampled, judged, _ = self._sample(chunk, EVALUATION_STREAM + start)
            rollouts += sampled
            rewards += judged
        passed = np.array([reward == 1.0 for reward in rewards]).reshape(-1, size).mean(1)  # (Q,)
        pass_at_1 = float(passed.mean())
        return {
            "pass_at_1": pass_at_1,
            "interval_95": list(wilson_interval(pass_at_1, len(passed))),
            "reward_mean": float(np.mean([reward or 0.0 for reward in rewards])),
            "response_tokens_mean": float(np.mean([len(r.response_ids) for r in rollouts])),
            "pass_by_problem": passed.tolist(),
        }

    def that_fit(self, problems: Sequence, purpose: str) -> list:
        """The problems whose prompts leave room for a response; the others are dropped and counted.

        Raises:
            ValueError: none does.
        """
        lengths = [len(encode_prompt(self.tokenizer, problem.prompt)) for problem in problems]
        kept = [p for p, length in zip(problems, lengths, strict=True) if length < self.config.max_length]
        if not kept:
            raise ValueError(
                f"--max_length {self.config.max_length} is shorter than every {purpose} prompt (the shortest "
                f"has {min(lengths)} tokens); raise it"
            )
        if len(kept) < len(problems) and self.accelerator.is_main_process:
            print(
                f"{purpose}: dropped {len(problems) - len(kept)} of {len(problems)} problems, whose prompts "
                f"leave no room for a response in --max_length {self.config.max_length}",
                file=sys.stderr,
            )
        return kept

    # ---- one rollout batch

    def _computing(self):
        """The compute type: bfloat16 matrix products over the float32 weights, or float32 throughout.

        torch.autocast rather than accelerate's: that one is fixed once a process, and trainers of both types
        may be compared in one.
        """
        enabled = self.config.dtype == "bfloat16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled)

    def _sample(self, problems, stream: int):
        """Responses, their rewards, and metrics of both, sampled and judged by all processes together.

        stream + i seeds problem i, so that the samples do not depend on how many processes share them.
        """
        config, rank = self.config, self.accelerator.process_index
        share = np.array_split(np.arange(len(problems)), self.accelerator.num_processes)[rank].tolist()
        own = [problems[i] for i in share]
        started = time.perf_counter()
        rollouts = self._generate(own, stream + share[0]) if own else []
        generated = time.perf_counter()
        asked = [problem for problem in own for _ in range(config.group_size)]
        rewards = list(self.reward_fn(asked, [rollout.text for rollout in rollouts])) if own else []
        metrics = {"generation_s": generated - started, "reward_s": time.perf_counter() - generated}
        gathered = gather_object(list(zip(rollouts, rewards, strict=True)))
        for counts in gather_object([getattr(self.reward_fn, "metrics", {})] if own else []):
            metrics |= {name: metrics.get(name, 0) + count for name, count in counts.items()}
        rollouts, rewards = [rollout for rollout, _ in gathered], [reward for _, reward in gathered]
        if not all(math.isfinite(x) for rollout in rollouts for x in rollout.log_probs):
            raise EmergencyStop(self.broken_weights() or "the policy's log-probabilities are not finite")
        if not all(reward is None or math.isfinite(reward) for reward in rewards):
            raise EmergencyStop("the reward function returned a number that is not finite; None: not judged")
        return rollouts, rewards, metrics

    def _generate(self, problems, seed: int) -> list[Rollout]:
        config = self.config
        prompts = [encode_prompt(self.tokenizer, problem.prompt) for problem in problems]
        sampling = Sampling(config.max_new_tokens, config.temperature, config.max_length, seed)
        with self._computing():
            return self.engine.generate(prompts, config.group_size, sampling)

    def collect(self, problems: Sequence, index: int) -> RolloutBatch:
        """Sample, judge and score rollout batch number index under the present policy: pi_old from now."""
        config = self.config
        stream = (config.seed << 64) + (index << 32)
        rollouts, judged, sampling_metrics = self._sample(problems, stream)
        rewards = torch.tensor([math.nan if r is None else float(r) for r in judged])  # (B,)
        known = rewards[~rewards.isnan()]
        if len(known) == 0:
            raise EmergencyStop("no response of the rollout batch could be judged")
        advantages = group_advantages(rewards, config.group_size)
        groups = advantages.view(-1, config.group_size)  # (Q, G)
        teaches = (advantages != 0) | bool(config.kl_coef)
        batch = RolloutBatch(list(problems), rollouts, rewards, advantages, teaches)
        started = time.perf_counter()
        batch.old_log_probs = self._score(self.model, batch, self._minibatches(batch))
        if self.reference_model is not None:
            batch.reference_log_probs = self._score(self.reference_model, batch, self._minibatches(batch))
        null_clip_fraction = self._null_clip_fraction(batch)
        scoring_s = time.perf_counter() - started
        lengths = [len(rollout.response_ids) for rollout in rollouts]
        gaps = [
            (torch.tensor(rollouts[row].log_probs) - old).abs().mean().item()
            for row, old in batch.old_log_probs.items()
        ]
        batch.metrics = {
            **sampling_metrics,
            "null_clip_fraction": null_clip_fraction,
            "sampler_gap": float(np.mean(gaps)) if gaps else 0.0,
            "reward_mean": known.mean().item(),
            "reward_std": known.std(correction=0).item(),
            "zero_variance_groups": (groups == 0).all(1).double().mean().item(),
            "unjudged_responses": len(rewards) - len(known),
            "response_tokens_mean": float(np.mean(lengths)),
            "entropy": -float(np.mean([x for rollout in rollouts for x in rollout.log_probs])),
            "truncated_fraction": float(np.mean([not rollout.finished for rollout in rollouts])),
            "repetition": float(np.mean([repetition(rollout.response_ids) for rollout in rollouts])),
            "unreadable_characters": float(np.mean([unreadable_characters(r.text) for r in rollouts])),
            "scoring_s": scoring_s,
        }
        return batch

    def update(self, batch: RolloutBatch) -> dict:
        """The updates that the rollout batch still lacks; returns the metrics of the whole batch."""
        stop_if(stop_reason(batch.metrics), batch.metrics)
        for rows in self._minibatches(batch)[len(batch.updates) :]:
            self._update_minibatch(batch, rows)
            self.stop_here_if_asked()
        with torch.no_grad():
            everything = list(range(len(batch.rollouts)))
            _, pooled = self._loss_of(batch, everything, batch.seen, denominator=len(everything))
        self.optimizer.zero_grad()  # sampling needs the gradients' memory
        updates = batch.updates
        metrics = {
            **pooled,
            "clip_fraction_by_minibatch": [update["clip_fraction"] for update in updates],
            "grad_norm": float(np.mean([update["grad_norm"] for update in updates])),
            "learning_rate": updates[-1]["learning_rate"],
            **batch.metrics,
            "update_s": sum(update["seconds"] for update in updates),
        }
        tokens = sum(len(rollout.response_ids) for rollout in batch.rollouts)
        total = sum(metrics[name] for name in ("generation_s", "reward_s", "scoring_s", "update_s"))
        return {**metrics, "tokens_per_s": tokens / total, "peak_memory_gb": peak_memory_gb()}

    def _update_minibatch(self, batch: RolloutBatch, rows: list[int]) -> None:
        """One optimizer update on these rows; the batch then has its metrics, and what it saw."""
        started = time.perf_counter()
        seen = self._within_memory(batch, lambda: self._backward(batch, rows))
        for parameter in self.model.parameters():
            if parameter.grad is None:  # no row of this process reached it
                parameter.grad = torch.zeros_like(parameter)
            if self.accelerator.num_processes > 1:  # accelerate copies the gradient even where there is one
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="sum")
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        if grad_norm > self.config.max_grad_norm:  # else a pass over all gradients would multiply them by 1
            torch.nn.utils.clip_grads_with_norm_(
                self.model.parameters(), self.config.max_grad_norm, grad_norm
            )
        seen = dict(gather_object(list(seen.items())))
        with torch.no_grad():
            _, metrics = self._loss_of(batch, rows, seen, denominator=len(rows))
        metrics |= {"grad_norm": grad_norm.item(), "learning_rate": self.schedule.get_last_lr()[0]}
        stop_if(stop_reason(metrics), batch.metrics | metrics)
        self._stepping = True
        self.optimizer.step()
        self.schedule.step()
        batch.seen |= seen
        batch.updates.append(metrics | {"seconds": time.perf_counter() - started})
        self._stepping = False

    def _backward(self, batch: RolloutBatch, rows: list[int]) -> dict[int, torch.Tensor]:
        """Gradients of the loss of this process's share of the rows, and the log-probabilities it saw."""
        self.optimizer.zero_grad()  # here, so that an update that was given up leaves nothing behind
        seen = {}
        for micro_batch in self._own_micro_batches(batch, rows):
            log_probs = self._log_probs(self.model, batch, micro_batch)
            loss, _ = self._loss_of(batch, micro_batch, log_probs, denominator=len(rows))
            loss.backward()
            seen |= {row: values.detach().cpu() for row, values in log_probs.items()}
        return seen

    def _within_memory(self, batch: RolloutBatch, work: Callable):
        """work(), with half the tokens of a forward pass whenever memory runs out.

        The gradient is the same but for rounding, which in bfloat16 adds noise to the ratios of the rollout
        batch in progress: they were scored in other shapes.
        """
        longest = max(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in batch.rollouts)
        while True:
            try:
                return work()
            except RuntimeError as error:
                if not _out_of_memory(error) or self._micro_batch_tokens <= longest:
                    raise
            # Out of the handler, which holds the failed attempt's tensors.
            self.halvings += 1
            torch.cuda.empty_cache()
            tqdm.write(
                f"out of memory: from now on {self._micro_batch_tokens} tokens a forward pass "
                "(--micro_batch_tokens)",
                file=sys.stderr,
            )

    @property
    def _micro_batch_tokens(self) -> int:
        return self.config.micro_batch_tokens >> self.halvings

    def _loss_of(self, batch: RolloutBatch, rows: list[int], log_probs: dict, denominator: int):
        """The configured loss of some rows, a part of a sum over denominator rows, and its metrics.

        log_probs: row to (|y|,), as the policy now has them. Rows that are not there teach nothing: they add
        0 to the loss, cannot clip, and count in the clip fractions' denominators alone.
        """
        config, device = self.config, self.accelerator.device
        taught = [row for row in rows if row in log_probs]
        lengths = torch.tensor([len(log_probs[row]) for row in taught], dtype=torch.long, device=device)
        values = _pad([log_probs[row] for row in taught], device)  # (B, T)
        mask = torch.arange(values.shape[1], device=device) < lengths[:, None]  # (B, T)
        loss, metrics = self.loss(
            values,
            _pad([batch.old_log_probs[row] for row in taught], device),
            batch.advantages[taught].to(device),
            mask,
            config.left_clip_range,
            config.right_clip_range,
            denominator,
        )
        tokens = sum(len(batch.rollouts[row].response_ids) for row in rows)
        metrics["clip_fraction"] *= lengths.sum().item() / max(tokens, 1)
        metrics["clip_fraction_sequences"] *= len(taught) / max(len(rows), 1)
        if config.kl_coef:
            reference = _pad([batch.reference_log_probs[row] for row in taught], device)
            kl = kl_penalty(values, reference, mask, denominator)
            loss = loss + config.kl_coef * kl
            metrics["kl"] = kl.item()
        return loss, {"loss": loss.item(), **metrics}

    def _minibatches(self, batch: RolloutBatch) -> list[list[int]]:
        """The rows of each optimizer update: whole groups, in order; the last may be smaller."""
        size = self.config.mini_batch_size * self.config.group_size
        rows = list(range(len(batch.rollouts)))
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _own_micro_batches(self, batch: RolloutBatch, rows: list[int]) -> list[list[int]]:
        """This process's share of the rows that teach, as the passes that scoring and updating both run.

        A row without an advantage has a gradient of exactly 0. On problems much too easy or too hard for the
        model, which half of all groups often are, leaving it out halves scoring and updating.
        """
        teaching = [row for row in rows if batch.teaches[row]]
        own = teaching[self.accelerator.process_index :: self.accelerator.num_processes]
        prompts = [batch.rollouts[row].prompt_ids for row in own]
        responses = [batch.rollouts[row].response_ids for row in own]
        split = micro_batches(self.model, prompts, responses, self._micro_batch_tokens)
        return [[own[i] for i in indices] for indices in split]

    def _log_probs(self, model, batch: RolloutBatch, rows: list[int]) -> dict[int, torch.Tensor]:
        prompts = [batch.rollouts[row].prompt_ids for row in rows]
        responses = [batch.rollouts[row].response_ids for row in rows]
        with self._computing():
            scored = token_log_probs(model, prompts, responses, self.config.temperature)
        return dict(zip(rows, scored, strict=True))

    def _score(self, model, batch: RolloutBatch, minibatches: list[list[int]]) -> dict:
        """Log-probabilities of the minibatches' rows, in the very forward passes that their updates run.

        Equal shapes give equal bits, so that the ratio of an unchanged policy is exactly 1.
        """

        def own_share() -> dict:
            own = {}
            with torch.no_grad(), self._computing():  # entered once: the weights are cast once for all passes
                for rows in minibatches:
                    for micro_batch in self._own_micro_batches(batch, rows):
                        scored = self._log_probs(model, batch, micro_batch)
                        own |= {row: values.cpu() for row, values in scored.items()}
            return own

        return dict(gather_object(list(self._within_memory(batch, own_share).items())))

    def _null_clip_fraction(self, batch: RolloutBatch) -> float:
        """Share of a minibatch's tokens outside the clip range when scored again: pure noise."""
        teaching = [rows for rows in self._minibatches(batch) if batch.teaches[rows].any()]
        again = self._score(self.model, batch, teaching[:1])
        outside = 0.0
        for sign in (1.0, -1.0):  # a positive advantage clips on the right, a negative one on the left
            signed = replace(batch, advantages=torch.full_like(batch.advantages, sign))
            outside += self._loss_of(signed, sorted(again), again, denominator=1)[1]["clip_fraction"]
        return outside

    def progress_bar(self, **options):
        """tqdm, on the main process, for what takes longer than PROGRESS_DELAY_S."""
        # In a log file a bar is a line each time it is drawn: draw it seldom.
        interval = 0.5 if sys.stderr.isatty() else 30.0
        main = self.accelerator.is_main_process
        return tqdm(
            disable=not main, mininterval=interval, delay=PROGRESS_DELAY_S, dynamic_ncols=True, **options
        )

    # ---- stopping and going on

    def stop_here_if_asked(self) -> None:
        """A place at which the state is whole. The processes agree: a signal may reach only one of them."""
        if any(gather_object([self.stop_requested])):
            raise Interrupted

    def is_whole(self) -> bool:
        """Whether the state is that after a whole update, and worth keeping."""
        return not self._stepping and self.broken_weights() is None

    def broken_weights(self) -> str | None:
        """Which weights are not finite, or None."""
        parameters = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        if torch.nn.utils.get_total_norm(parameters.values()).isfinite():  # fast: no mask of them is made
            return None
        broken = [name for name, p in parameters.items() if not p.isfinite().all()]
        return f"{len(broken)} weight tensors are not finite, such as {broken[0]}" if broken else None

    def state_dict(self) -> dict:
        """What the future depends on besides the weights: plain data and tensors."""
        return {
            "step": self.step,
            "halvings": self.halvings,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.step, self.halvings = state["step"], state["halvings"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def _pad(rows: list[torch.Tensor], device) -> torch.Tensor:
    if not rows:
        return torch.zeros(0, 0, device=device)
    return pad_sequence([row.to(device) for row in rows], batch_first=True)


def _out_of_memory(error: RuntimeError) -> bool:
    """On a GPU, or on a CPU as torch's allocator says it, or oneDNN, which does not give the reason."""
    return should_reduce_batch_size(error) or "could not create a primitive" in str(error)


def _enable_gradient_checkpointing(model) -> None:
    """Recompute activations in the backward pass, with dropout still off.

    transformers checkpoints a layer only while it is in training mode, which would also turn on the dropout
    that GPT-2 and its kin have; so the layers are marked one by one, and what is inside them is left alone.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        module.training = getattr(module, "gradient_checkpointing", False)
        for name, value in vars(module).items() if module.training else ():
            if "dropout" in name and isinstance(value, float):  # OPT's layers drop out by themselves
                setattr(module, name, 0.0)
