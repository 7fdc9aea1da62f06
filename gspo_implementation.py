"""Group Sequence Policy Optimization (arXiv 2507.18071): the losses and the trainer.

    python train_gspo.py --model_name smollm2-135m --dataset math               one CPU or one GPU
    torchrun --nproc_per_node 4 train_gspo.py --dataset gsm8k                   several processes

The algorithm, for one rollout batch:

    1. sample G responses per query from the current policy, which becomes pi_old;
    2. reward them; A_i = (r_i - mean) / std over the group of its query;
    3. compute log pi_old of every response;
    4. for each minibatch, with s_i = exp(mean_t[log pi - log pi_old]), maximise
       mean_i min(s_i A_i, clip(s_i) A_i).

Where this departs from the paper:

    1. std is unbiased and has 1e-6 added to it (the paper gives no constant).
    2. log-ratios are bounded by MAX_LOG_RATIO before exp(), far outside any clip range.
    3. the gradient norm is clipped (--max_grad_norm), and a learning rate may be warmed up.
    4. a group whose rewards are all equal, and which no KL term moves, stays out of the updates and their
       means. The other groups are dealt evenly over the updates. An update without a gradient is not made,
       since AdamW's momentum would move the weights nearly as far as a step with one.
    5. a response that could not be judged has no advantage and stays out of its group's mean and std.

Shapes: Q queries, G group size, B = Q * G sequences (groups contiguous), T response positions.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from gspo.live_line import Bar
from gspo.policy.cpu import prepare_cpu
from gspo.policy.rollout import Rollout, Sampling
from gspo.training.alarms import non_finite_weights, stop_if, stop_reason, unjudged_reason
from gspo.training.config import GSPOConfig
from gspo.training.dynamic_sampling import QueryDraw, keeps
from gspo.training.forward_passes import PASS_TOKENS, ForwardPasses, to_cpu
from gspo.training.hardware import choose_device, choose_dtype
from gspo.training.loss_metrics import (
    loss_metrics,
    none_eligible,
    pool_metrics,
    read_metrics,
    unread_metrics,
    without_sums,
)
from gspo.training.plan import fit_to_gpu, refuse_long_rows
from gspo.training.processes import Processes, refuse_idle_processes
from gspo.training.rollout_batch import RolloutBatch, Sample, lacks_pi_old
from gspo.training.rollout_engine import rollout_engine
from gspo.training.sampling import encode_problem, evaluation_metrics, evaluation_texts, sample_and_reward
from gspo.training.stopping import StopRequest
from gspo.training.trained_weights import gradient_norm, trained_weights
from gspo.training.training_run import TrainingRun, is_due

# exp() of an unbounded log-ratio overflows to inf, and inf * 0 in the backward of min() is NaN in every
# weight. exp(60) = 1e26 stays finite in float32 through the loss and its gradient; the largest ratio that
# any clip range or stop rule looks at is 100.
MAX_LOG_RATIO = 60.0
# The random stream of evaluations is far from every training stream, and the same in every run, so that two
# evaluations of the same problems are paired.
EVALUATION_STREAM = 1 << 100
# Models below this many parameters have a default learning rate of their own.
SMALL_MODEL = 0.5e9
# LoRA's adapters learn at ten times the rate of the weights ("LoRA Without Regret").
LORA_RATE_FACTOR = 10
# Problems of each process per step of an evaluation and of its progress bar.
EVALUATION_CHUNK = 16


# ----------------------------------------------------------------------------------------------- the losses


def group_advantages(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-6) over each group of group_size consecutive rewards.

    Args:
        rewards: (B,), groups contiguous. NaN marks a response that could not be judged: its advantage is 0,
            and its group's mean and (unbiased) standard deviation are taken over the others.

    Returns:
        (B,) advantages; exactly 0 throughout a group whose rewards are all equal, which has no signal.

    Raises:
        ValueError: the group size is under 2, or B is not a multiple of it.
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
    # Ties are found by comparing the rewards themselves. The mean of equal floats can differ from them by a
    # rounding error, which a std of the same size would turn into an advantage of order 1.
    highest = torch.where(judged, groups, -math.inf).amax(1, keepdim=True)
    lowest = torch.where(judged, groups, math.inf).amin(1, keepdim=True)
    return torch.where(judged & (highest > lowest), centred / (std + 1e-6), 0.0).view(-1)


def sequence_importance_ratio(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """s_i = (pi(y_i|x) / pi_old(y_i|x))^(1/|y_i|), the geometric mean of the token ratios (equation 7).

    Args: log_probs, old_log_probs (B, T); mask (B, T) bool. Returns (B,); 1 for a row without tokens.
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
        mask: (B, T) bool, True at response tokens. Other positions never matter, NaN included. A row
            without tokens contributes 0.
        denominator: sequences of the whole optimizer update if these B are one micro-batch of it; B by
            default. The losses of the micro-batches then add up to the loss of the update, however it is cut.

    Returns:
        The scalar loss to minimise, and metrics as floats: clip_fraction (of tokens, the paper's unit),
        clip_fraction_eligible (of the tokens with an advantage), and the parts of it that are clipped below
        and above the range, clip_fraction_left and _right; clip_fraction_sequences; importance_ratio_mean,
        _std, _min, _max (over sequences); and the sums from which pool_metrics() makes the same averages
        over several calls.

    Raises:
        ValueError: shapes do not agree, or a clip range is not positive.
    """
    _check_shapes(log_probs, old_log_probs, advantages, mask, advantages_per_token=False)
    ratio = sequence_importance_ratio(log_probs, old_log_probs.detach(), mask)[:, None]  # (B, 1)
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

    Arguments and results are those of gspo_loss, but advantages may be (B, T). With equal advantages along a
    row it has GSPO's value, clipping and gradient.
    """
    _check_shapes(log_probs, old_log_probs, advantages, mask, advantages_per_token=True)
    sequence_ratio = sequence_importance_ratio(log_probs, old_log_probs, mask).detach()[:, None]  # (B, 1)
    # pi / sg[pi] is exactly 1 everywhere: it only carries the gradient of the token's own log-probability.
    own_ratio = torch.exp(_token_log_ratio(log_probs, log_probs.detach(), mask))  # (B, T)
    ratio = sequence_ratio * own_ratio
    advantages = _per_token(advantages)
    return _clipped_loss(
        ratio, sequence_ratio, advantages, mask, left_clip_range, right_clip_range, denominator
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

    Arguments and results are those of gspo_loss, but advantages may be (B, T), and the metrics' importance
    ratios are over tokens.
    """
    _check_shapes(log_probs, old_log_probs, advantages, mask, advantages_per_token=True)
    ratio = _bounded_exp(_token_log_ratio(log_probs, old_log_probs.detach(), mask))  # (B, T)
    advantages = _per_token(advantages)
    return _clipped_loss(ratio, ratio, advantages, mask, left_clip_range, right_clip_range, denominator)


def kl_penalty(
    log_probs: torch.Tensor, reference_log_probs: torch.Tensor, mask: torch.Tensor, denominator: int
) -> torch.Tensor:
    """1/denominator sum_i mean_t [r - 1 - log r] with r = pi_ref / pi, in nats per token: KL(pi || pi_ref).

    Schulman's k3 estimator, as in GRPO (arXiv 2402.03300, equation 4). GSPO's own objective has no such term.
    """
    log_ratio = _token_log_ratio(reference_log_probs, log_probs, mask)
    return _mean_over_tokens(_bounded_exp(log_ratio) - 1 - log_ratio, mask).sum() / denominator


def _per_token(advantages: torch.Tensor) -> torch.Tensor:
    """(B,) or (B, T) to a shape that broadcasts over (B, T)."""
    return advantages if advantages.dim() == 2 else advantages[:, None]


def _token_log_ratio(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """log pi - log pi_old (B, T), 0 where mask is False."""
    return torch.where(mask, log_probs - old_log_probs, 0.0)


def _mean_over_tokens(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, T) or (B, 1) to (B,): the mean over each row's tokens, 0 for a row without tokens."""
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def _bounded_exp(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _clipped_loss(
    ratio: torch.Tensor,
    reported_ratio: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    left: float,
    right: float,
    denominator: int | None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The clipped surrogate that the three losses share; they differ in the ratio alone.

    ratio, reported_ratio, advantages: (B, 1) per sequence or (B, T) per token. The mean is over each
    sequence's tokens, then over sequences, never over the tokens of all sequences, where long answers would
    dominate.
    """
    if not (left > 0 and right > 0):
        raise ValueError(f"clip ranges must be positive, got left {left} and right {right}")
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - left, 1 + right) * advantages)
    # For one value per sequence, as in GSPO, the mean over its tokens is that value.
    objective = _mean_over_tokens(objective, mask).sum()
    loss = -objective / (denominator or len(mask))
    # A token is clipped if the clipped branch is in force, so that no gradient flows. A ratio outside the
    # range is not enough: on the other side min() takes the unclipped branch.
    clipped_left = (advantages < 0) & (ratio < 1 - left)
    clipped_right = (advantages > 0) & (ratio > 1 + right)
    eligible = advantages != 0
    metrics = loss_metrics(
        reported_ratio.detach(), clipped_left & mask, clipped_right & mask, eligible & mask, mask
    )
    return loss, metrics


def _check_shapes(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    advantages_per_token: bool,
) -> None:
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


# -------------------------------------------------------------------------------------------- the algorithms


@dataclass(frozen=True)
class Algorithm:
    """All that is to be said about an algorithm: --algorithm, validation and the tests read it here.

    loss: a function like gspo_loss.
    ratio, clip_unit: its ratio, and what one clip decision covers, in the words that a run prints.
    left_clip_range, right_clip_range: its default clip ranges.
    reference: the name of the same loss as a float64 loop in gspo/checks/float64_reference.py.
    small_model_factor: how many times as wide train_gspo.py makes them for a model below SMALL_MODEL.
    """

    loss: Callable[..., tuple[torch.Tensor, dict[str, float]]]
    ratio: str
    clip_unit: str
    left_clip_range: float
    right_clip_range: float
    reference: str
    small_model_factor: float = 1.0


# Clip ranges of section 5.1: a sequence ratio is a mean over tokens and moves a thousand times less than a
# token ratio does.
ALGORITHMS = {
    "gspo": Algorithm(
        gspo_loss, "sequence ratio s = exp(mean of its tokens' log-ratios)", "response", 3e-4, 4e-4,
        reference="gspo", small_model_factor=20.0,
    ),
    "gspo_token": Algorithm(
        gspo_token_loss, "sequence ratio s, with a gradient per token", "response", 3e-4, 4e-4,
        reference="gspo_token", small_model_factor=20.0,
    ),
    "grpo": Algorithm(grpo_loss, "token ratio w = pi / pi_old", "token", 0.2, 0.27, reference="grpo"),
}  # fmt: skip


def resolve(config: GSPOConfig, num_parameters: int) -> GSPOConfig:
    """A copy in which every None that depends on the algorithm, the model's size or the machine is decided.

    Raises:
        ValueError: there is no such algorithm, or no GPU and one is asked for.
    """
    if config.algorithm not in ALGORITHMS:
        raise ValueError(f"--algorithm {config.algorithm}: choose one of {', '.join(ALGORITHMS)}")
    algorithm = ALGORITHMS[config.algorithm]
    device = "cuda" if config.plan_for else choose_device(config.device)
    lora_rank = config.lora_rank or 0
    default_rate = 1e-5 if num_parameters < SMALL_MODEL else 1e-6
    if lora_rank:
        default_rate *= LORA_RATE_FACTOR
    return replace(
        config,
        left_clip_range=config.left_clip_range or algorithm.left_clip_range,
        right_clip_range=config.right_clip_range or algorithm.right_clip_range,
        learning_rate=default_rate if config.learning_rate is None else config.learning_rate,
        max_new_tokens=config.max_new_tokens or config.max_length,
        eval_samples=config.eval_samples or config.group_size,
        device=device,
        dtype=choose_dtype(config, device, num_parameters)[0],
        optimizer="adamw" if config.optimizer == "auto" else config.optimizer,
        lora_rank=lora_rank,
        shard="none" if config.shard == "auto" else config.shard,
        micro_batch_tokens=config.micro_batch_tokens or PASS_TOKENS,
        gradient_checkpointing=bool(config.gradient_checkpointing),
    )


# ------------------------------------------------------------------------------------------------ the trainer


class GSPOTrainer:
    """Trains a causal language model with the configured algorithm.

    Args:
        model, tokenizer: the policy. What of it is trained, and in which type, is in trained_weights.py.
        config: a GSPOConfig.
        reward_fn: (problems, responses) -> for each response a float, a dict of named parts whose sum is the
            reward, or None if it cannot be judged. A problem is any object with a .prompt, a string or chat
            messages. If reward_fn has an attribute `metrics`, a dict of sums over the responses of its last
            call, those are logged too.
        engine: samples the responses; by default that of config.rollout_engine. It needs generate() alone.

    Attributes:
        step: the number of rollout batches trained on.
        stop: a StopRequest; set stop.requested to stop after the update in progress.
        evaluation_texts: what the last evaluation sampled, as lines of eval_samples.jsonl.
    """

    def __init__(
        self, model: Any, tokenizer: Any, config: GSPOConfig, reward_fn: Callable, engine: Any = None
    ):
        if config.model_name == "auto":  # from Python, whose model has a name of its own
            config = replace(config, model_name=model.name_or_path or model.config.model_type)
        refuse_long_rows(model.config, config.max_length)
        num_parameters = sum(p.numel() for p in model.parameters())
        resolved = resolve(config, num_parameters)
        self.processes = Processes(str(resolved.device))
        if resolved.device == "cuda" and config.micro_batch_tokens is None:  # train_gspo.py has planned it
            loss = ALGORITHMS[config.algorithm].loss
            config = fit_to_gpu(config, model.config, resolved, loss, self.processes)
        self.config = config = self.processes.on_main(resolve, config, num_parameters)  # one for all
        self.algorithm = ALGORITHMS[config.algorithm]
        refuse_idle_processes(config, self.processes.count)
        self.stop = StopRequest(self.processes)
        self.forward = ForwardPasses(config, self.processes)
        if config.device == "cpu":
            prepare_cpu()
        sharding = self.processes.sharding() if config.shard == "full" else None
        self.weights = trained_weights(model, config, self.processes.device, sharding)
        self.model, self.optimizer = self.weights.model, self.weights.optimizer
        self.tokenizer = tokenizer
        self.reward_fn = reward_fn
        self.engine = engine or rollout_engine(config, self.weights, tokenizer, self.processes)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda update: min(1.0, (update + 1) / max(1, config.warmup_steps))
        )
        self.step = 0
        self.evaluation_texts: list[dict] = []
        self.query_draw = QueryDraw(config.dynamic_sampling, config.batch_size, config.group_size)
        self._in_optimizer_step = False

    def train(self, train_problems: Sequence, eval_problems: Sequence) -> dict:
        """Train for the configured epochs in the run folder that the configuration names.

        Returns and raises what TrainingRun.train() does, and raises ValueError as TrainingRun does.
        """
        return TrainingRun(self, train_problems, eval_problems).train()

    def encode(self, problem: Any) -> list[int]:
        return encode_problem(self.tokenizer, problem, self.config)

    @property
    def clips_per_token(self) -> bool:
        return self.algorithm.clip_unit == "token"

    def train_step(self, problems: Sequence) -> dict:
        """One rollout batch on these problems: sample, reward, update. Returns its metrics.

        With dynamic sampling, as many of them are drawn as it takes (collect).

        Raises:
            EmergencyStop: a figure is not finite, a ratio is out of bounds, or no response could be judged.
        """
        batch = self.collect(problems, self.step)
        stop_if(unjudged_reason([batch.metrics], window=1), batch.metrics)
        metrics = self.update(batch)
        self.finish_batch()
        return metrics

    # ---- steps 1 to 3: sample, reward, log pi_old

    def collect(self, problems: Sequence, index: int) -> RolloutBatch:
        """Sample and reward rollout batch number index under the present policy, which is its pi_old.

        It is made of all these problems, or with dynamic sampling of as many of them as it takes.

        K rollout batches (--update_frequency) are sampled before the first of their updates. The very first
        update sees the weights that sampled, so its own forward pass gives log pi_old for its minibatch. The
        other log-probabilities are computed here.
        """
        config = self.config
        stream = (config.seed << 64) + (index << 32)

        def sample_groups(chunk: Sequence, drawn: int) -> tuple[list[Sample], dict]:
            if drawn:  # a later round of a draw; a resumed run begins the draw again
                self.stop.check()
            return self._sample_and_reward(chunk, stream + drawn, config.group_size, config.temperature)

        samples, metrics = self.query_draw.draw(problems, sample_groups)
        self._tell_engine("rest")
        rewards = [math.nan if sample.reward is None else sample.reward for sample in samples]
        # float64, so that two rewards that differ have a signal, however close they are.
        advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64), config.group_size)  # (B,)
        for sample, advantage in zip(samples, advantages.tolist(), strict=True):
            sample.advantage = advantage
        updates = config.updates_for(len(samples) // config.group_size)
        batch = RolloutBatch(samples, config.group_size, updates, self.schedule.last_epoch)
        for group in batch.groups():
            trained = keeps(group, config.dynamic_sampling)
            for sample in group:
                sample.has_signal = trained and (sample.advantage != 0 or config.kl_coef > 0)
        batch.metrics = metrics | batch.statistics() | self._compute_log_probs(batch, index)
        batch.metrics["learning_rate"] = self.schedule.get_last_lr()[0]
        self.query_draw.note(batch.groups())
        return batch

    def _compute_log_probs(self, batch: RolloutBatch, index: int) -> dict[str, float]:
        """Compute what the updates need besides their own forward passes. Returns metrics of it."""
        config = self.config
        metrics: dict[str, float] = {}
        started = time.perf_counter()
        minibatches = batch.minibatches()
        measures_noise = index == 0 or is_due(index, config.eval_frequency)
        updated_first = index % config.update_frequency == 0
        compare = getattr(self.engine, "compare", None)  # of one that is not the policy itself
        needed = minibatches[1:] if updated_first and not (measures_noise or compare) else minibatches
        for sample, log_probs in self.forward.all_log_probs(self.model, needed):
            sample.old_log_probs = log_probs
        if compare:
            metrics |= compare(batch.samples)
        if config.kl_coef:
            with self.weights.starting_model() as reference:
                for sample, log_probs in self.forward.all_log_probs(reference, minibatches):
                    sample.reference_log_probs = log_probs
        if measures_noise and minibatches:
            metrics["null_clip_fraction"] = self._null_clip_fraction(minibatches)
        metrics["log_prob_s"] = time.perf_counter() - started
        return metrics

    def _sample_and_reward(
        self, problems: Sequence, stream: int, num_samples: int, temperature: float
    ) -> tuple[list[Sample], dict]:
        """num_samples rewarded samples of each problem, and the time they took.

        stream + i seeds problem i, so that the samples do not depend on the number of processes.
        """
        config = self.config

        def prepare() -> None:
            self._tell_engine("sync", str(self.schedule.last_epoch))  # updates made so far

        def generate(own: Sequence, first: int) -> list[Rollout]:
            assert config.max_new_tokens is not None  # resolve() has decided it
            prompts = [self.encode(problem) for problem in own]
            sampling = Sampling(config.max_new_tokens, temperature, config.max_length, stream + first)
            with self.forward.compute_type():
                return self.engine.generate(prompts, num_samples, sampling)

        return sample_and_reward(
            problems, num_samples, generate, self.reward_fn, self.processes, config.pass_threshold, prepare
        )

    def _tell_engine(self, what: str, *arguments: str) -> None:
        """Call a method that an engine of one's own may lack."""
        getattr(self.engine, what, lambda *_: None)(*arguments)

    def _null_clip_fraction(self, minibatches: Sequence[Sequence[Sample]]) -> float:
        """The share of a minibatch's tokens outside the clip range if computed again: pure noise."""
        pairs = self.forward.all_log_probs(self.model, minibatches[:1])
        if not pairs:
            return 0.0
        samples, again = [sample for sample, _ in pairs], [log_probs for _, log_probs in pairs]
        outside = 0.0
        for sign in (1.0, -1.0):  # a positive advantage clips on the right, a negative one on the left
            signed = [replace(sample, advantage=sign, masked=False) for sample in samples]
            outside += self._loss(signed, again, denominator=1)[1]["clip_fraction"]
        return outside

    # ---- step 4: the updates

    def update(self, batch: RolloutBatch) -> dict:
        """Make the updates that the rollout batch still lacks. Returns the metrics of the whole batch.

        Raises:
            ValueError: the policy was updated in between, and is no longer the pi_old of the first minibatch.
        """
        if lacks_pi_old(batch.samples) and self.schedule.last_epoch != batch.updates_before:
            raise ValueError("the policy was updated between collect() and update() of this rollout batch")
        stop_if(stop_reason(batch.metrics), batch.metrics)
        for samples in batch.minibatches()[len(batch.updates) :]:
            self._update_minibatch(batch, samples)
            self.stop.check()
        self.optimizer.zero_grad()  # sampling needs the gradients' memory
        return batch.final_metrics()

    def finish_batch(self) -> None:
        """Count a rollout batch as trained on. A run does so when the batch is on record."""
        self.step += 1

    def _update_minibatch(self, batch: RolloutBatch, samples: Sequence[Sample]) -> None:
        """One optimizer update on these samples. The batch then has its metrics."""
        started = time.perf_counter()
        can_clip = self.schedule.last_epoch > batch.updates_before  # else the policy still is pi_old
        parts, log_probs = self.forward.retry(lambda: self._backward(samples), batch.samples)
        trained, max_grad_norm = self.weights.parameters, self.config.max_grad_norm
        self.processes.sum_gradients(trained)
        grad_norm = gradient_norm(trained)
        if grad_norm > max_grad_norm:  # otherwise every gradient would be multiplied by 1
            torch.nn.utils.clip_grads_with_norm_(trained, max_grad_norm, grad_norm)
        parts = self.processes.gather(parts)
        if can_clip:
            for row, values in self.processes.gather(log_probs):
                samples[row].note_ratio(values, self.config.mean_clip_range, self.clips_per_token)
        else:
            parts = [none_eligible(part) for part in parts]
        metrics = pool_metrics(parts, len(samples), sum(sample.num_tokens for sample in samples))
        norm = grad_norm.item()
        metrics |= {"grad_norm": norm, "learning_rate": self.schedule.get_last_lr()[0]}
        averages = without_sums(metrics)
        stop_if(stop_reason(averages, self.clips_per_token), batch.metrics | averages)
        if lacks_pi_old(samples):
            for row, values in self.processes.gather(log_probs):
                samples[row].old_log_probs = values
        self._in_optimizer_step = True
        if norm > 0:  # 0: every response is clipped
            self.optimizer.step()
            self.schedule.step()
        batch.updates.append(metrics | {"seconds": time.perf_counter() - started})
        self._in_optimizer_step = False

    def _backward(self, samples: Sequence[Sample]) -> tuple[list[dict], list[tuple[int, torch.Tensor]]]:
        """Gradients of the loss of this process's share of the samples.

        Returns: the metrics of its micro-batches, and pairs of a row in the samples and its log-probabilities
        (|y|,).
        """
        self.optimizer.zero_grad()  # here, so that an update that was given up leaves nothing behind
        passes = []
        for rows in self.forward.micro_batches(self.model, samples):
            if not rows:
                self.forward.empty_pass(self.model).backward()
                continue
            chosen = [samples[row] for row in rows]
            log_probs = self.forward.log_probs(self.model, chosen)
            with unread_metrics():
                loss, unread = self._loss(chosen, log_probs, denominator=len(samples))
            loss.backward()
            loss_sum = loss.detach().double() * len(samples)
            passes.append((rows, [values.detach() for values in log_probs], unread | {"loss_sum": loss_sum}))
        # A GPU is waited for from here on, when it has all its work.
        parts: list[dict] = []
        computed: list[tuple[int, torch.Tensor]] = []
        for rows, log_probs, unread in passes:
            own = to_cpu(log_probs)
            gaps = [samples[row].sampler_gap(values) for row, values in zip(rows, own, strict=True)]
            parts.append(read_metrics(unread) | {"sampler_gap_sum": sum(gaps)})
            computed += zip(rows, own, strict=True)
        return parts, computed

    def _loss(
        self, samples: Sequence[Sample], log_probs: Sequence[torch.Tensor], denominator: int
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The algorithm's loss (ALGORITHMS) of some samples, and its metrics.

        denominator: sequences of the optimizer update, of which these are a part.
        log_probs: (|y|,) per sample, as the policy now has them.
        """
        config, device = self.config, self.processes.device
        # Without log pi_old this is the first update after sampling: the policy is still pi_old.
        old = [
            values.detach() if sample.old_log_probs is None else sample.old_log_probs
            for sample, values in zip(samples, log_probs, strict=True)
        ]
        lengths = torch.tensor([sample.num_tokens for sample in samples], device=device)
        values = _pad(log_probs, device)  # (B, T)
        mask = torch.arange(values.shape[1], device=device) < lengths[:, None]  # (B, T)
        loss, metrics = self.algorithm.loss(
            values,
            _pad(old, device),
            torch.tensor([sample.trained_advantage for sample in samples], device=device),
            mask,
            config.left_clip_range,
            config.right_clip_range,
            denominator,
        )
        if config.kl_coef:
            reference = _pad([sample.reference_log_probs for sample in samples], device)
            masked = torch.tensor([sample.masked for sample in samples], device=device)
            kl = kl_penalty(values, reference, mask & ~masked[:, None], denominator)
            loss = loss + config.kl_coef * kl
            kl_of_all = kl_penalty(values.detach(), reference, mask, denominator)
            metrics |= {"kl_sum": kl_of_all.double() * denominator}
        return loss, metrics

    # ---- evaluation

    def evaluate(self, problems: Sequence) -> dict:
        """Sample eval_samples responses to each problem, from random streams that are the same every time.

        The streams do not depend on the seed, and training's temperature and group size do not matter here.

        Returns and raises what evaluation_metrics() does with them.
        """
        num_samples, temperature = self.config.eval_samples, self.config.eval_temperature
        assert num_samples is not None  # resolve() has decided it
        samples: list[Sample] = []
        with Bar(len(problems), "evaluating", "problems") as bar:
            size = EVALUATION_CHUNK * self.processes.count
            for start in range(0, len(problems), size):
                self.stop.check()
                chunk = problems[start : start + size]
                stream = EVALUATION_STREAM + start
                samples += self._sample_and_reward(chunk, stream, num_samples, temperature)[0]
                bar.update(len(chunk))
        self._tell_engine("rest")
        self.evaluation_texts = evaluation_texts(samples, num_samples)
        return evaluation_metrics(samples, num_samples)

    # ---- the state

    def is_whole(self) -> bool:
        """True if the state is that after a whole update, and its weights are finite."""
        return not self._in_optimizer_step and non_finite_weights(self.model) is None

    def state_dict(self) -> dict:
        """What the future depends on besides the weights, as plain data and tensors."""
        return {
            "step": self.step,
            "halvings": self.forward.halvings,
            "signal_share": self.query_draw.signal_share,
            "optimizer": self.optimizer.state_dict() | {"state": {}},  # its moments are saved by the weights
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up the state of state_dict(); the weights are loaded by the caller."""
        self.step, self.forward.halvings = state["step"], state["halvings"]
        self.query_draw.signal_share = state["signal_share"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def _pad(rows: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Tensors (|y|,) to (B, T)."""
    return pad_sequence(list(rows), batch_first=True).to(device)
