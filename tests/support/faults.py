"""Faults put into the implementation, one line at a time, and the check of validation that must see each."""

from typing import NamedTuple


class Fault(NamedTuple):
    module: str  # dotted
    line: str  # of its source, found once
    instead: str
    seen_by: str  # a part of the check's name


FAULTS = {
    "wrong sign": Fault(
        "gspo_implementation",
        "loss = -_mean",
        "loss = _mean",
        "raises what was rewarded",
    ),
    "no clipping": Fault(
        "gspo_implementation",
        "torch.minimum(ratio * advantages, ratio.clamp(1 - left, 1 + right) * advantages)",
        "ratio * advantages",
        "clipping stops the gradient",
    ),
    "clipping on the wrong side": Fault(
        "gspo_implementation",
        "torch.minimum(",
        "torch.maximum(",
        "clipping stops the gradient",
    ),
    "clip range of GRPO in the preset": Fault(
        "gspo.training.config",
        '"response", 3e-4, 4e-4),\n    "gspo_token"',
        '"response", 0.2, 0.27),\n    "gspo_token"',
        "gspo: the clip ranges",
    ),
    "clip range of GRPO in the loss": Fault(
        "gspo_implementation",
        "return _clipped_loss(\n        ratio, ratio, advantages[:, None], mask, left_clip_range,",
        "return _clipped_loss(\n        ratio, ratio, advantages[:, None], mask, 0.2 + left_clip_range,",
        "gspo: the clip ranges",
    ),
    "token mean": Fault(
        "gspo_implementation",
        "loss = -_mean_over_tokens(objective, mask).sum() / (denominator or len(mask))",
        "loss = -(objective * mask).sum() / mask.sum()",
        "weigh the same",
    ),
    "sum over tokens": Fault(
        "gspo_implementation",
        "loss = -_mean_over_tokens(objective, mask).sum() / (denominator or len(mask))",
        "loss = -(objective * mask).sum() / (denominator or len(mask))",
        "float64 loop",
    ),
    "no length normalisation": Fault(
        "gspo_implementation",
        "ratio = _bounded_exp(_mean_over_tokens(log_ratio, mask))",
        "ratio = _bounded_exp(log_ratio.sum(1))",
        "closed form",
    ),
    "sum of logs in the ratio": Fault(
        "gspo_implementation",
        "_mean_over_tokens(_token_log_ratio(log_probs, old_log_probs, mask), mask))",
        "_token_log_ratio(log_probs, old_log_probs, mask).sum(1))",
        "geometric mean",
    ),
    "padding counted": Fault(
        "gspo_implementation",
        "/ mask.sum(1).clamp(min=1)",
        "/ mask.shape[1]",
        "padding never matters",
    ),
    "padding not masked": Fault(
        "gspo_implementation",
        "return torch.where(mask, log_probs - old_log_probs, 0.0)",
        "return log_probs - old_log_probs",
        "padding never matters",
    ),
    "advantages not centred": Fault(
        "gspo_implementation",
        "groups - groups.nanmean(1, keepdim=True), 0.0",
        "groups, 0.0",
        "centred in each group",
    ),
    "advantages not scaled": Fault(
        "gspo_implementation",
        "centred / (std + 1e-6)",
        "centred",
        "advantages are (r - mean) / std",
    ),
    "ties by the standard deviation": Fault(
        "gspo_implementation",
        "judged & (highest > lowest)",
        "judged & (std > 0)",
        "equal rewards",
    ),
    "advantages of other groups": Fault(
        "gspo_implementation",
        "    groups = (rewards if rewards.is_floating_point() else rewards.float()).view(-1, group_size)",
        "    groups = (rewards if rewards.is_floating_point() else rewards.float()).view(group_size, -1).T",
        "advantages",
    ),
    "old log-probs from the new policy": Fault(
        "gspo_implementation",
        "            self._update_minibatch(batch, rows)",
        "            batch.old_log_probs |= self._score(self.model, batch, [rows])\n"
        "            self._update_minibatch(batch, rows)",
        "four updates",
    ),
    "gradient to the old policy": Fault(
        "gspo_implementation",
        "log_ratio = _token_log_ratio(log_probs, old_log_probs.detach(), mask)  # (B, T)",
        "log_ratio = _token_log_ratio(log_probs, old_log_probs, mask)",
        "no gradient flows",
    ),
    "temperature missing in scoring": Fault(
        "gspo_implementation",
        "responses, self.config.temperature)",
        "responses)",
        "four updates",
    ),
    "temperature missing in drawing": Fault(
        "gspo.policy.rollout",
        "torch.softmax(logits / temperature, -1)",
        "torch.softmax(logits, -1)",
        "tokens are drawn",
    ),
    "temperature ignored by the scorer": Fault(
        "gspo.policy.log_probs",
        "logits = logits / temperature",
        "logits = logits * 1",
        "scoring equals",
    ),
    "weights frozen": Fault(
        "gspo_implementation",
        "        self.optimizer.step()\n",
        "",
        "weights move",
    ),
    "gradients left behind": Fault(
        "gspo_implementation",
        "        self.optimizer.zero_grad()  # here",
        "        # here",
        "four updates",
    ),
    "micro-batch as denominator": Fault(
        "gspo_implementation",
        "micro_batch, log_probs, denominator=len(rows))",
        "micro_batch, log_probs, denominator=len(micro_batch))",
        "micro-batches never",
    ),
    "sampler log-probs shifted by one": Fault(
        "gspo.policy.rollout",
        "log_probs=log_probs[row, :length].tolist()",
        "log_probs=log_probs[row, :length].roll(1).tolist()",
        "sampler's log-probs",
    ),
    "scoring shifted by one": Fault(
        "gspo.policy.log_probs",
        "torch.tensor(predictors, device=device)",
        "torch.tensor(predictors, device=device).sub(1).clamp(min=0)",
        "scoring equals",
    ),
    "shared prompts mixed up": Fault(
        "gspo.policy.group_attention",
        "responses.by_group(padded[0]), prompt_key, prompt_value, groups",
        "responses.by_group(padded[0]), prompt_key.flip(0), prompt_value.flip(0), groups",
        "scoring equals",
    ),
    "positions after a shared prompt": Fault(
        "gspo.policy.group_attention",
        "positions += range(len(prompt), len(prompt) + len(response))",
        "positions += range(len(prompt) + 1, len(prompt) + 1 + len(response))",
        "scoring equals",
    ),
    "shared prompts without a gradient": Fault(
        "gspo.policy.group_attention",
        "            for grad, shared in zip(grad_prompts[1:], grad_shared, strict=True):\n",
        "            for grad, shared in ():\n",
        "so do its gradients",
    ),
    "prompt and response each with a softmax": Fault(
        "gspo.policy.group_attention",
        "log_sums = torch.logaddexp(own_log_sums, shared_log_sums)",
        "log_sums = own_log_sums",
        "scoring equals",
    ),
    "unbounded exponential": Fault(
        "gspo_implementation",
        "log_ratio.clamp(max=MAX_LOG_RATIO).exp()",
        "log_ratio.exp()",
        "stay finite",
    ),
    "clip fraction by distance": Fault(
        "gspo_implementation",
        "clipped = ((advantages > 0) & (ratio > 1 + right)) | ((advantages < 0) & (ratio < 1 - left))",
        "clipped = (ratio > 1 + right) | (ratio < 1 - left)",
        "clip_fraction counts",
    ),
    "trainer samples at another temperature": Fault(
        "gspo_implementation",
        "Sampling(config.max_new_tokens, config.temperature, config.max_length, seed)",
        "Sampling(config.max_new_tokens, 1.0, config.max_length, seed)",
        "four updates",
    ),
    "top-k": Fault(
        "gspo.policy.rollout",
        "    logits = logits.float()  # (B, V)\n",
        "    logits = logits.float()\n"
        "    full = torch.log_softmax(logits / (temperature or 1), -1)\n"
        "    logits = logits.masked_fill(logits < logits.topk(20).values[:, -1:], -1e9)\n",
        "tokens are drawn",
    ),
    "one random stream for all prompts": Fault(
        "gspo.policy.rollout",
        "np.random.SeedSequence(seed + i,",
        "np.random.SeedSequence(seed + 0 * i,",
        "random streams",
    ),
    "one random stream for a group": Fault(
        "gspo.policy.rollout", "spawn_key=(g,))", "spawn_key=(0 * g,))", "random streams"
    ),
    "end tokens of the generation config ignored": Fault(
        "gspo.policy.rollout",
        "(tokenizer.eos_token_id, *configured)",
        "(tokenizer.eos_token_id,)",
        "responses end",
    ),
    "budget off by one": Fault(
        "gspo.policy.rollout",
        "budget = min(budget, sampling.max_length - len(prompt))",
        "budget = min(budget, sampling.max_length - len(prompt) + 1)",
        "responses end",
    ),
    "always finished": Fault(
        "gspo.policy.rollout", "finished=response_ids[-1] in self.end_ids", "finished=True", "responses end"
    ),
    "unjudged responses scored as 0": Fault(
        "gspo_implementation",
        "[math.nan if r is None else float(r) for r in judged]",
        "[0.0 if r is None else float(r) for r in judged]",
        "four updates",
    ),
    "one update instead of four": Fault(
        "gspo_implementation",
        "size = self.config.mini_batch_size * self.config.group_size",
        "size = self.config.batch_size * self.config.group_size",
        "makes four updates",
    ),
    "dual clip": Fault(
        "gspo_implementation",
        "    loss = -_mean_over_tokens(objective, mask)",
        "    objective = torch.where(advantages < 0, objective.maximum(3 * advantages), objective)\n"
        "    loss = -_mean_over_tokens(objective, mask)",
        "clipping stops",
    ),
    "advantages bounded": Fault(
        "gspo_implementation",
        "centred / (std + 1e-6), 0.0)",
        "(centred / (std + 1e-6)).clamp(-1.6, 1.6), 0.0)",
        "advantages are (r - mean) / std",
    ),
    "softmax in bfloat16": Fault(
        "gspo.policy.log_probs",
        '-F.cross_entropy(logits, targets, reduction="none")',
        "logits.log_softmax(-1, torch.bfloat16).gather(1, targets[:, None])[:, 0].float()",
        "softmax is float32",
    ),
    "weights in bfloat16": Fault(
        "gspo_implementation", "self.model = model.float().to(", "self.model = model.to(", "weights move"
    ),
    "weight decay": Fault(
        "gspo_implementation", "weight_decay=config.weight_decay", "weight_decay=0.1", "four updates"
    ),
    "a pass at half the reward": Fault(
        "gspo_implementation",
        "[reward == 1.0 for reward in rewards]",
        "[(reward or 0) > 0 for reward in rewards]",
        "an evaluation counts",
    ),
}
