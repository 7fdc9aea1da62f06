"""Group Sequence Policy Optimization (arXiv 2507.18071): the losses and the trainer.

    python train_gspo.py --model_name smollm2-135m --dataset math               one CPU or one GPU
    torchrun --nproc_per_node 4 train_gspo.py --dataset gsm8k                   several processes

The algorithm, for one rollout batch:

    1. sample G responses per query from the current policy, which becomes pi_old;
    2. reward them; A_i = (r_i - mean) / std over the group of its query;
    3. compute log pi_old of every response, or take the sampler's own (--pi_old sampler);
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
from dataclasses import replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from gspo.live_line import Bar
from gspo.policy.cpu import prepare_cpu
from gspo.policy.rollout import Rollout, Sampling
from gspo.training.alarms import non_finite_weights, stop_if, stop_reason, unjudged_reason
from gspo.training.algorithm import Algorithm
from gspo.training.config import GSPOConfig
from gspo.training.decide import decide
from gspo.training.dynamic_sampling import QueryDraw, keeps
from gspo.training.forward_passes import ForwardPasses, sampling_type, to_cpu
from gspo.training.loss_inputs import check_ranges, check_shapes
from gspo.training.loss_metrics import (
    loss_metrics,
    none_eligible,
    pool_metrics,
    read_metrics,
    unread_metrics,
    without_gap,
    without_sums,
)
from gspo.training.plan import fit_to_gpu, refuse_long_rows
from gspo.training.processes import Processes, refuse_idle_processes
from gspo.training.rollout_batch import RolloutBatch, Sample, lacks_pi_old
from gspo.training.rollout_engine import comparison, rollout_engine
from gspo.training.sampling import (
    encode_problem,
    evaluation_metrics,
    evaluation_texts,
    sample_and_reward,
    shuffle_rewards,
)
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
# SAPO's temperatures for a positive advantage, and for a negative one, whose gradient fades faster.
SAPO_TEMPERATURES = (1.0, 1.05)
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
    check_shapes(log_probs, old_log_probs, advantages, mask, advantages_per_token=False)
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
    check_shapes(log_probs, old_log_probs, advantages, mask, advantages_per_token=True)
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
    check_shapes(log_probs, old_log_probs, advantages, mask, advantages_per_token=True)
    ratio = _bounded_exp(_token_log_ratio(log_probs, old_log_probs.detach(), mask))  # (B, T)
    advantages = _per_token(advantages)
    return _clipped_loss(ratio, ratio, advantages, mask, left_clip_range, right_clip_range, denominator)


def sapo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    left_clip_range: None = None,
    right_clip_range: None = None,
    denominator: int | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """SAPO (arXiv 2511.20347): 1/B sum_i 1/|y_i| sum_t (4/tau) sigmoid(tau (w_it - 1)) A_it, a soft gate.

    Arguments and results are those of grpo_loss, but there is no clip range: no token is clipped or can be.
    trl, verl and ms-swift have the same gate and temperatures; Trinity-RFT takes the mean over all tokens.
    """
    if left_clip_range is not None or right_clip_range is not None:
        raise ValueError("SAPO has no clip range")
    check_shapes(log_probs, old_log_probs, advantages, mask, advantages_per_token=True)
    ratio = _bounded_exp(_token_log_ratio(log_probs, old_log_probs.detach(), mask))  # (B, T)
    advantages = _per_token(advantages)
    temperature, temperature_below = SAPO_TEMPERATURES
    tau = torch.full_like(advantages, temperature_below).masked_fill(advantages > 0, temperature)
    # 4 / tau makes the gate's slope at w = 1, and so the gradient on policy, that of w itself.
    gate = 4 / tau * torch.sigmoid(tau * (ratio - 1))
    loss = -_mean_over_tokens(gate * advantages, mask).sum() / (denominator or len(mask))
    none = torch.zeros_like(mask)
    return loss, loss_metrics(ratio.detach(), none, none, none, mask)


def cispo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    left_clip_range: None = None,
    right_clip_range: float = 4.0,
    denominator: int | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """CISPO (MiniMax-M1, arXiv 2506.13585): 1/N sum_it sg[min(w_it, 1 + right)] A_it log pi_it.

    N counts the tokens of all responses. Arguments and results are those of grpo_loss, but the denominator is
    the number of tokens of the optimizer update. A token counts as clipped if its weight is capped, whatever
    the sign of its advantage; it keeps a gradient.

    The paper takes N over one group, and gives no number for its upper bound; its lower bound is off. The cap
    of 5 is that of ScaleRL (arXiv 2510.13786), which trl and ms-swift name directly, as epsilon_high. verl
    writes clip(w, 1 - low, 1 + high), with a high of 0.2 in its example.
    """
    if left_clip_range is not None or not right_clip_range > 0:
        raise ValueError(
            f"CISPO has a positive right clip range alone: {left_clip_range}, {right_clip_range}"
        )
    check_shapes(log_probs, old_log_probs, advantages, mask, advantages_per_token=True)
    ratio = _bounded_exp(_token_log_ratio(log_probs, old_log_probs, mask)).detach()  # (B, T)
    advantages = _per_token(advantages)
    objective = ratio.clamp(max=1 + right_clip_range) * advantages * torch.where(mask, log_probs, 0.0)
    loss = -_sum_over_tokens(objective, mask) / (denominator or mask.sum().clamp(min=1))
    eligible = (advantages != 0) & mask
    capped = eligible & (ratio > 1 + right_clip_range)
    return loss, loss_metrics(ratio, torch.zeros_like(mask), capped, eligible, mask)


def dppo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    left_clip_range: float = 0.15,
    right_clip_range: float = 0.15,
    denominator: int | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """DPPO with the binary total variation (arXiv 2602.04879): 1/N sum_it m_it w_it A_it.

    m_it is 0, and the token is clipped, where A_it > 0 and pi - pi_old > right, or A_it < 0 and
    pi_old - pi > left: the clip ranges bound a token's probability, not its ratio. N counts the tokens of all
    responses. Arguments and results are those of grpo_loss, but the denominator is the number of tokens of
    the optimizer update.

    The paper's pi_old is the sampler's distribution (--pi_old sampler), and its objective sums over a
    response's tokens. trl and verl take the mean over all tokens, as here, and the authors' own script for
    verl a sum over a constant. Both write sg[w] log pi for w, which has the same gradient, and cap w at 20.
    They take 0.15 for the total variation, open-instruct 0.2.
    """
    check_ranges(left_clip_range, right_clip_range)
    check_shapes(log_probs, old_log_probs, advantages, mask, advantages_per_token=True)
    ratio = _bounded_exp(_token_log_ratio(log_probs, old_log_probs.detach(), mask))  # (B, T)
    advantages = _per_token(advantages)
    risen = (log_probs.exp() - old_log_probs.exp()).detach()
    clipped_left = (advantages < 0) & (risen < -left_clip_range) & mask
    clipped_right = (advantages > 0) & (risen > right_clip_range) & mask
    objective = torch.where(clipped_left | clipped_right, 0.0, ratio) * advantages
    loss = -_sum_over_tokens(objective, mask) / (denominator or mask.sum().clamp(min=1))
    metrics = loss_metrics(ratio.detach(), clipped_left, clipped_right, (advantages != 0) & mask, mask)
    return loss, metrics


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


def _sum_over_tokens(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, T) to a scalar: the sum over the tokens of all rows."""
    return torch.where(mask, values, 0.0).sum()


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
    """The clipped surrogate of gspo, gspo_token and grpo, which differ in the ratio alone.

    ratio, reported_ratio, advantages: (B, 1) per sequence or (B, T) per token. The mean is over each
    sequence's tokens, then over sequences, never over the tokens of all sequences, where long answers would
    dominate.
    """
    check_ranges(left, right)
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


# -------------------------------------------------------------------------------------------- the algorithms


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
    "sapo": Algorithm(
        sapo_loss, "token ratio w = pi / pi_old", "token", None, None, reference="sapo",
        clipping="through the gate (4 / tau) sigmoid(tau (w - 1)) with tau 1 for A > 0 and 1.05 for A < 0, "
        "which clips nothing",
    ),
    "cispo": Algorithm(
        cispo_loss, "token ratio w = pi / pi_old", "token", None, 4.0, reference="cispo", mean_over="tokens",
        clipping="capped at 1 + {right:g}, as a constant weight of log pi",
    ),
    "dppo": Algorithm(
        dppo_loss, "token ratio w = pi / pi_old", "token", 0.15, 0.15, reference="dppo", mean_over="tokens",
        clipping="without a gradient for a token with A > 0 whose probability is more than {right:g} above "
        "pi_old's, or with A < 0 more than {left:g} below", clips_probability=True,
    ),
}  # fmt: skip


def resolve(config: GSPOConfig, num_parameters: int) -> GSPOConfig:
    """A copy in which every None that depends on the algorithm, the model's size or the machine is decided.

    Raises:
        ValueError: there is no such algorithm, it lacks a clip range that is given, or no GPU and one is
            asked for.
    """
    if config.algorithm not in ALGORITHMS:
        raise ValueError(f"--algorithm {config.algorithm}: choose one of {', '.join(ALGORITHMS)}")
    return decide(config, ALGORITHMS[config.algorithm], num_parameters)


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
        if config.device == "cpu":
            prepare_cpu()
        sharding = self.processes.sharding() if config.shard == "full" else None
        self.weights = trained_weights(model, config, self.processes.device, sharding)
        self.model, self.optimizer = self.weights.model, self.weights.optimizer
        self.forward = ForwardPasses(config, self.processes, self.model)
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
        return self.algorithm.clips_per_token

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
        other log-probabilities are computed here. With --pi_old sampler, log pi_old is what the sampler said.
        """
        config = self.config
        stream = (config.seed << 64) + (index << 32)

        def sample_groups(chunk: Sequence, drawn: int) -> tuple[list[Sample], dict]:
            if drawn:  # a later round of a draw; a resumed run begins the draw again
                self.stop.check()
            return self._sample_and_reward(chunk, stream + drawn, config.group_size, config.temperature)

        samples, metrics = self.query_draw.draw(problems, sample_groups)
        self._tell_engine("rest")
        if config.shuffle_rewards:
            shuffle_rewards(samples, config.group_size, stream)
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
        compare = comparison(self.engine, config)
        needed = minibatches[1:] if updated_first and not (measures_noise or compare) else minibatches
        if config.pi_old == "sampler":
            needed = []
            for sample in batch.samples:
                sample.old_log_probs = sample.sampled_log_probs
        for sample, log_probs in self.forward.old_log_probs(self.model, needed, measures_noise):
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
            with sampling_type(config, self.processes.device.type):
                return self.engine.generate(prompts, num_samples, sampling)

        return sample_and_reward(
            problems, num_samples, generate, self.reward_fn, self.processes, config.pass_threshold, prepare
        )

    def _tell_engine(self, what: str, *arguments: str) -> None:
        """Call a method that an engine of one's own may lack."""
        getattr(self.engine, what, lambda *_: None)(*arguments)

    def _null_clip_fraction(self, minibatches: Sequence[Sequence[Sample]]) -> float:
        """The share of a minibatch's tokens outside the clip range if computed again: pure noise.

        With --pi_old sampler, it is the noise between sampler and trainer.
        """
        pairs = self.forward.all_log_probs(self.model, minibatches[:1])
        if not pairs:
            return 0.0
        samples, again = [sample for sample, _ in pairs], [log_probs for _, log_probs in pairs]
        outside = 0.0
        for sign in (1.0, -1.0):  # a positive advantage clips on the right, a negative one on the left
            signed = [replace(sample, advantage=sign, masked=False) for sample in samples]
            side = "clip_fraction_right" if sign > 0 else "clip_fraction_left"
            outside += self._loss(signed, again, denominator=1, num_responses=1)[1][side]
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
        has_moved = self.schedule.last_epoch > batch.updates_before
        of_sampler = self.config.pi_old == "sampler"
        can_clip = has_moved or of_sampler  # else the policy still is pi_old, to the bit
        parts, log_probs = self.forward.retry(lambda: self._backward(samples), batch.samples)
        trained, max_grad_norm = self.weights.parameters, self.config.max_grad_norm
        self.processes.sum_gradients(trained)
        grad_norm = gradient_norm(trained)
        if grad_norm > max_grad_norm:  # otherwise every gradient would be multiplied by 1
            torch.nn.utils.clip_grads_with_norm_(trained, max_grad_norm, grad_norm)
        parts = self.processes.gather(parts)
        if can_clip:
            for row, values in self.processes.gather(log_probs):
                samples[row].note_ratio(values, self.config.mean_clip_range, self.algorithm.movement)
        else:
            parts = [none_eligible(part) for part in parts]
        if has_moved and of_sampler:
            parts = [without_gap(part) for part in parts]
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
        denominator = self.algorithm.denominator(samples)
        passes = []
        for rows in self.forward.micro_batches(self.model, samples):
            if not rows:
                self.forward.empty_pass(self.model).backward()
                continue
            chosen = [samples[row] for row in rows]
            log_probs, routing = self.forward.updated_log_probs(self.model, chosen)
            with unread_metrics():
                loss, unread = self._loss(chosen, log_probs, denominator, num_responses=len(samples))
            loss.backward()
            unread |= routing | {"loss_sum": loss.detach().double() * len(samples)}
            passes.append((rows, [values.detach() for values in log_probs], unread))
        # A GPU is waited for from here on, when it has all its work.
        parts: list[dict] = []
        computed: list[tuple[int, torch.Tensor]] = []
        for rows, log_probs, unread in passes:
            own = to_cpu(log_probs)
            pairs = zip(rows, own, strict=True)
            gaps = [samples[row].sampler_gap(values, self.config.pi_old) for row, values in pairs]
            gap_sums = {"sampler_gap_sum": sum(gaps), "sampler_gap_responses": len(gaps)}
            parts.append(read_metrics(unread) | gap_sums)
            computed += zip(rows, own, strict=True)
        return parts, computed

    def _loss(
        self,
        samples: Sequence[Sample],
        log_probs: Sequence[torch.Tensor],
        denominator: int,
        num_responses: int,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The algorithm's loss (ALGORITHMS) of some samples, and its metrics.

        log_probs: (|y|,) per sample, as the policy now has them.
        denominator, num_responses: the loss's denominator (Algorithm.denominator) and the number of responses
            of the optimizer update, of which these are a part. The mean of the KL is over responses.
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
            kl = kl_penalty(values, reference, mask & ~masked[:, None], num_responses)
            loss = loss + config.kl_coef * kl
            kl_of_all = kl_penalty(values.detach(), reference, mask, num_responses)
            metrics |= {"kl_sum": kl_of_all.double() * num_responses}
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
