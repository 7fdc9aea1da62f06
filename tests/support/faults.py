"""Faults to plant in the implementation, one at a time, and the check of validation that must see each.

After a change of the code, a fault may have to be written anew: plant() says which one, and where.
"""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from support import ROOT


class Fault(NamedTuple):
    module: str  # dotted
    place: str  # in the module: a function, a class.method, or a constant
    text: str  # in the source of that place, once
    instead: str
    checks: str  # the generator of checks that sees the fault
    seen_by: str  # a part of the name of the check that must fail


def path_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def plant(name: str) -> str:
    """The source of the fault's module with the fault in it; LookupError if it does not fit the code."""
    fault = FAULTS[name]
    source = path_of(fault.module).read_text()
    node = _find(ast.parse(source), fault.place)
    if node is None:
        raise LookupError(f"fault {name!r}: {fault.module} has no {fault.place}")
    lines = source.splitlines(keepends=True)
    before, own = lines[: node.lineno - 1], lines[node.lineno - 1 : node.end_lineno]
    after = lines[node.end_lineno :]
    count = "".join(own).count(fault.text)
    if count != 1:
        raise LookupError(
            f"fault {name!r}: {fault.place} in {fault.module} must have this text once, and has it {count} "
            f"times:\n{fault.text}"
        )
    return "".join([*before, "".join(own).replace(fault.text, fault.instead), *after])


def _find(tree: ast.Module | ast.ClassDef, place: str) -> ast.stmt | None:
    """The statement that defines a dotted name."""
    first, _, rest = place.partition(".")
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign):
            names = [node.target.id] if isinstance(node.target, ast.Name) else []
        else:
            names = [getattr(node, "name", None)]
        if first in names:
            return _find(node, rest) if rest else node
    return None


def import_with(name: str) -> ModuleType:
    """Import the fault's module with the fault in it. Modules that are imported later get to see this one."""
    module_name = FAULTS[name].module
    spec = importlib.util.find_spec(module_name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    exec(compile(plant(name), spec.origin, "exec"), module.__dict__)
    return module


FAULTS = {
    "wrong sign": Fault(
        "gspo_implementation",
        "_clipped_loss",
        "loss = -objective /",
        "loss = objective /",
        "closed_form",
        "raises what was rewarded",
    ),
    "no clipping": Fault(
        "gspo_implementation",
        "_clipped_loss",
        "torch.minimum(ratio * advantages, ratio.clamp(1 - left, 1 + right) * advantages)",
        "ratio * advantages",
        "clipping_side",
        "clipping stops the gradient",
    ),
    "clipping on the wrong side": Fault(
        "gspo_implementation",
        "_clipped_loss",
        "torch.minimum(",
        "torch.maximum(",
        "clipping_side",
        "clipping stops the gradient",
    ),
    "clip range of GRPO in the preset": Fault(
        "gspo_implementation",
        "ALGORITHMS",
        '"response", 3e-4, 4e-4,\n        reference="gspo",',
        '"response", 0.2, 0.27,\n        reference="gspo",',
        "clip_ranges",
        "gspo: the clip ranges",
    ),
    "clip range of GRPO in the loss": Fault(
        "gspo_implementation",
        "gspo_loss",
        "return _clipped_loss(\n        ratio, ratio, advantages[:, None], mask, left_clip_range,",
        "return _clipped_loss(\n        ratio, ratio, advantages[:, None], mask, 0.2 + left_clip_range,",
        "clip_ranges",
        "gspo: the clip ranges",
    ),
    "token mean": Fault(
        "gspo_implementation",
        "_clipped_loss",
        "loss = -objective / (denominator or len(mask))",
        "loss = -(torch.minimum(ratio * advantages, ratio.clamp(1 - left, 1 + right) * ad"
        "vantages) * mask).sum() / mask.sum()",
        "sequence_mean",
        "weigh the same",
    ),
    "sum over tokens": Fault(
        "gspo_implementation",
        "_clipped_loss",
        "objective = _mean_over_tokens(objective, mask).sum()",
        "objective = (objective * mask).sum()",
        "value_and_gradient_match",
        "float64 loop",
    ),
    "no length normalisation": Fault(
        "gspo_implementation",
        "gspo_loss",
        "ratio = sequence_importance_ratio(log_probs, old_log_probs.detach(), mask)",
        "ratio = _bounded_exp(_token_log_ratio(log_probs, old_log_probs.detach(), mask).sum(1))",
        "closed_form",
        "closed form",
    ),
    "sum of logs in the ratio": Fault(
        "gspo_implementation",
        "sequence_importance_ratio",
        "_mean_over_tokens(_token_log_ratio(log_probs, old_log_probs, mask), mask))",
        "_token_log_ratio(log_probs, old_log_probs, mask).sum(1))",
        "importance_ratio",
        "geometric mean",
    ),
    "padding counted": Fault(
        "gspo_implementation",
        "_mean_over_tokens",
        "/ mask.sum(1).clamp(min=1)",
        "/ mask.shape[1]",
        "padding",
        "padding never matters",
    ),
    "padding not masked": Fault(
        "gspo_implementation",
        "_token_log_ratio",
        "return torch.where(mask, log_probs - old_log_probs, 0.0)",
        "return log_probs - old_log_probs",
        "padding",
        "padding never matters",
    ),
    "advantages not centred": Fault(
        "gspo_implementation",
        "group_advantages",
        "groups - groups.nanmean(1, keepdim=True), 0.0",
        "groups, 0.0",
        "advantages",
        "centred in each group",
    ),
    "advantages not scaled": Fault(
        "gspo_implementation",
        "group_advantages",
        "centred / (std + 1e-6)",
        "centred",
        "advantages",
        "advantages are (r - mean) / std",
    ),
    "ties by the standard deviation": Fault(
        "gspo_implementation",
        "group_advantages",
        "judged & (highest > lowest)",
        "judged & (std > 0)",
        "advantages",
        "equal rewards",
    ),
    "advantages of other groups": Fault(
        "gspo_implementation",
        "group_advantages",
        "    groups = (rewards if rewards.is_floating_point() else rewards.float()).view(-1, group_size)",
        "    groups = (rewards if rewards.is_floating_point() else rewards.float()).view(group_size, -1).T",
        "advantages",
        "advantages",
    ),
    "old log-probs from the new policy": Fault(
        "gspo_implementation",
        "GSPOTrainer.update",
        "            self._update_minibatch(batch, samples)",
        "            for sample, new in self.forward.all_log_probs(self.model, [samples]):\n"
        "                sample.old_log_probs = new\n"
        "            self._update_minibatch(batch, samples)",
        "trainer_updates",
        "four updates",
    ),
    "gradient to the old policy": Fault(
        "gspo_implementation",
        "gspo_loss",
        "old_log_probs.detach()",
        "old_log_probs",
        "old_policy_is_constant",
        "no gradient flows",
    ),
    "temperature missing in the trainer's log-probs": Fault(
        "gspo.training.forward_passes",
        "ForwardPasses.log_probs",
        "responses, self.config.temperature, routing)",
        "responses, 1.0, routing)",
        "trainer_updates",
        "four updates",
    ),
    "temperature missing in drawing": Fault(
        "gspo.policy.rollout",
        "draw_tokens",
        "torch.softmax(logits / temperature, -1)",
        "torch.softmax(logits, -1)",
        "sampling",
        "tokens are drawn",
    ),
    "temperature missing in log-probs": Fault(
        "gspo.policy.log_probs",
        "_target_log_probs",
        "logits = logits / temperature",
        "logits = logits * 1",
        "log_probs",
        "log-probs equal a naive",
    ),
    "weights frozen": Fault(
        "gspo_implementation",
        "GSPOTrainer._update_minibatch",
        "        self.optimizer.step()\n",
        "",
        "compute_type",
        "weights move",
    ),
    "gradients left behind": Fault(
        "gspo_implementation",
        "GSPOTrainer._backward",
        "        self.optimizer.zero_grad()  # here",
        "        # here",
        "trainer_updates",
        "four updates",
    ),
    "micro-batch as denominator": Fault(
        "gspo_implementation",
        "GSPOTrainer._backward",
        "self._loss(chosen, log_probs, denominator,",
        "self._loss(chosen, log_probs, len(chosen),",
        "micro_batches",
        "micro-batches never",
    ),
    "sampler log-probs shifted by one": Fault(
        "gspo.policy.rollout",
        "TransformersEngine._sample_batch",
        "log_probs=log_probs[row, :length].tolist()",
        "log_probs=log_probs[row, :length].roll(1).tolist()",
        "sampling",
        "sampler's log-probs",
    ),
    "log-probs shifted by one": Fault(
        "gspo.policy.log_probs",
        "_micro_batch_log_probs",
        "torch.tensor([i for of_row in predictors for i in of_row], device=device)",
        "torch.tensor([max(i - 1, 0) for of_row in predictors for i in of_row], device=device)",
        "log_probs",
        "log-probs equal a naive",
    ),
    "shared prompts mixed up": Fault(
        "gspo.policy.padded_attention",
        "_PaddedAttention.forward",
        "responses.by_group(padded[0]), prompt_key, prompt_value, groups",
        "responses.by_group(padded[0]), prompt_key.flip(0), prompt_value.flip(0), groups",
        "log_probs",
        "log-probs equal a naive",
    ),
    "positions after a shared prompt": Fault(
        "gspo.policy.packed_rows",
        "PackedGroups.__init__",
        "positions += range(len(prompt), len(prompt) + len(response))",
        "positions += range(len(prompt) + 1, len(prompt) + 1 + len(response))",
        "log_probs",
        "log-probs equal a naive",
    ),
    "shared prompts without a gradient": Fault(
        "gspo.policy.padded_attention",
        "_PaddedAttention.backward",
        "            for grad, shared in zip(grad_prompts[1:], grad_shared, strict=True):\n",
        "            for grad, shared in ():\n",
        "log_probs",
        "so do their gradients",
    ),
    "prompt and response each with a softmax": Fault(
        "gspo.policy.padded_attention",
        "_PaddedAttention.forward",
        "log_sums = torch.logaddexp(own_log_sums, shared_log_sums)",
        "log_sums = own_log_sums",
        "log_probs",
        "log-probs equal a naive",
    ),
    "unbounded exponential": Fault(
        "gspo_implementation",
        "_bounded_exp",
        "log_ratio.clamp(max=MAX_LOG_RATIO).exp()",
        "log_ratio.exp()",
        "overflow",
        "stay finite",
    ),
    "tokens of a micro-batch as denominator": Fault(
        "gspo.training.algorithm",
        "Algorithm.denominator",
        "sum(sample.num_tokens for sample in samples)",
        "sum(sample.num_tokens for sample in samples if sample.advantage)",
        "trainer_updates",
        "cispo: four updates",
    ),
    "sign of SAPO": Fault(
        "gspo_implementation",
        "sapo_loss",
        "loss = -_mean",
        "loss = _mean",
        "value_and_gradient_match",
        "float64 loop",
    ),
    "one temperature of SAPO": Fault(
        "gspo_implementation",
        "sapo_loss",
        ".masked_fill(advantages > 0, temperature)",
        "",
        "value_and_gradient_match",
        "so does its gradient",
    ),
    "a gradient through CISPO's weight": Fault(
        "gspo_implementation",
        "cispo_loss",
        "old_log_probs, mask)).detach()",
        "old_log_probs, mask))",
        "value_and_gradient_match",
        "so does its gradient",
    ),
    "CISPO's mean over responses": Fault(
        "gspo_implementation",
        "cispo_loss",
        "_sum_over_tokens(objective, mask) / (denominator or mask.sum().clamp(min=1))",
        "_mean_over_tokens(objective, mask).sum() / (denominator or len(mask))",
        "value_and_gradient_match",
        "float64 loop",
    ),
    "padding in a mean over tokens": Fault(
        "gspo_implementation",
        "_sum_over_tokens",
        "torch.where(mask, values, 0.0)",
        "values",
        "padding",
        "padding never matters",
    ),
    "DPPO's mask on the wrong side": Fault(
        "gspo_implementation",
        "dppo_loss",
        "clipped_left = (advantages < 0)",
        "clipped_left = (advantages > 0)",
        "value_and_gradient_match",
        "clip_fraction counts",
    ),
    "DPPO's mask by the ratio": Fault(
        "gspo_implementation",
        "dppo_loss",
        "risen = (log_probs.exp() - old_log_probs.exp()).detach()",
        "risen = (ratio - 1).detach()",
        "value_and_gradient_match",
        "float64 loop",
    ),
    "clip fraction by distance": Fault(
        "gspo_implementation",
        "_clipped_loss",
        "clipped_left = (advantages < 0) & (ratio < 1 - left)",
        "clipped_left = ratio < 1 - left",
        "value_and_gradient_match",
        "clip_fraction counts",
    ),
    "trainer samples at another temperature": Fault(
        "gspo_implementation",
        "GSPOTrainer._sample_and_reward",
        "Sampling(config.max_new_tokens, temperature, config.max_length, stream + first)",
        "Sampling(config.max_new_tokens, 1.0, config.max_length, stream + first)",
        "trainer_updates",
        "four updates",
    ),
    "top-k": Fault(
        "gspo.policy.rollout",
        "draw_tokens",
        "    logits = logits.float()  # (B, V)\n",
        "    logits = logits.float()\n"
        "    full = torch.log_softmax(logits / (temperature or 1), -1)\n"
        "    logits = logits.masked_fill(logits < logits.topk(20).values[:, -1:], -1e9)\n",
        "sampling",
        "tokens are drawn",
    ),
    "one random stream for all prompts": Fault(
        "gspo.policy.rollout",
        "draw_uniforms",
        "np.random.SeedSequence(seed + i,",
        "np.random.SeedSequence(seed + 0 * i,",
        "random_streams",
        "random streams",
    ),
    "one random stream for a group": Fault(
        "gspo.policy.rollout",
        "draw_uniforms",
        "spawn_key=(g,))",
        "spawn_key=(0 * g,))",
        "random_streams",
        "random streams",
    ),
    "end tokens of the generation config ignored": Fault(
        "gspo.policy.rollout",
        "end_token_ids",
        "(tokenizer.eos_token_id, *configured)",
        "(tokenizer.eos_token_id,)",
        "endings",
        "responses end",
    ),
    "budget off by one": Fault(
        "gspo.policy.rollout",
        "response_budget",
        "budget = min(budget, sampling.max_length - len(prompt))",
        "budget = min(budget, sampling.max_length - len(prompt) + 1)",
        "endings",
        "responses end",
    ),
    "always finished": Fault(
        "gspo.policy.rollout",
        "TransformersEngine._sample_batch",
        "finished=response_ids[-1] in self.end_ids",
        "finished=True",
        "endings",
        "responses end",
    ),
    "ungraded responses rewarded with 0": Fault(
        "gspo_implementation",
        "GSPOTrainer.collect",
        "rewards = [math.nan if sample.reward is None else sample.reward for sample in samples]",
        "rewards = [float(sample.reward or 0) for sample in samples]",
        "trainer_updates",
        "four updates",
    ),
    "one update instead of four": Fault(
        "gspo.training.rollout_batch",
        "RolloutBatch.minibatches",
        "np.array_split(np.arange(len(groups)), self.planned_updates)",
        "np.array_split(np.arange(len(groups)), 1)",
        "trainer_updates",
        "makes four updates",
    ),
    "a step without a gradient": Fault(
        "gspo_implementation",
        "GSPOTrainer._update_minibatch",
        "if norm > 0:",
        "if norm >= 0:",
        "steps_without_gradient",
        "every response clips changes no weight",
    ),
    "eligible fraction over the wrong denominator": Fault(
        "gspo.training.loss_metrics",
        "_with_averages",
        'max(sums["eligible_tokens"], 1)',
        "tokens",
        "trainer_updates",
        "of what can clip",
    ),
    "dual clip": Fault(
        "gspo_implementation",
        "_clipped_loss",
        "    objective = _mean_over_tokens(objective, mask).sum()",
        "    objective = torch.where(advantages < 0, objective.maximum(3 * advantages), objective)\n"
        "    objective = _mean_over_tokens(objective, mask).sum()",
        "clipping_side",
        "clipping stops",
    ),
    "advantages bounded": Fault(
        "gspo_implementation",
        "group_advantages",
        "centred / (std + 1e-6), 0.0)",
        "(centred / (std + 1e-6)).clamp(-1.6, 1.6), 0.0)",
        "advantages",
        "advantages are (r - mean) / std",
    ),
    "softmax in bfloat16": Fault(
        "gspo.policy.log_probs",
        "_target_log_probs",
        '-F.cross_entropy(logits, targets, reduction="none")',
        "logits.log_softmax(-1, torch.bfloat16).gather(1, targets[:, None])[:, 0].float()",
        "log_probs",
        "softmax is float32",
    ),
    "weights in bfloat16": Fault(
        "gspo.training.trained_weights",
        "AllWeights.__init__",
        "torch.bfloat16 if in_8_bits else torch.float32",
        "torch.bfloat16",
        "compute_type",
        "weights move",
    ),
    "weight decay": Fault(
        "gspo.training.trained_weights",
        "_adamw",
        "weight_decay=config.weight_decay",
        "weight_decay=0.1",
        "trainer_updates",
        "four updates",
    ),
    "a pass at half the reward": Fault(
        "gspo.training.sampling",
        "sample_and_reward",
        "sample.reward >= pass_threshold - THRESHOLD_TOLERANCE",
        "sample.reward > 0",
        "evaluation",
        "an evaluation counts",
    ),
}
