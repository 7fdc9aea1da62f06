"""Sample groups of responses from the policy, in process, with any decoder that transformers loads.

The sampled distribution is softmax(logits / temperature) over the whole vocabulary and nothing else: no
top-p, top-k or repetition penalty, whatever the model's generation_config says. Scoring can then use the
same distribution, without which an importance ratio has no meaning.

How it is fast: a prompt runs once per group, and its keys and values are repeated for the G responses;
finished rows leave the batch. How it is reproducible: every response draws its uniforms from a generator of
its own, so a sample depends on the seed and its prompt, not on how many rows happen to share the batch.

Shapes: Q prompts, G group size, B = Q * G rows still sampling, P padded prompt length, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from gspo.policy.cpu import packed_weights
from gspo.policy.prompt_cache import can_share_prompts, decoding_mask, run_prompts

# Rows sampled at a time: bounds the key-value cache when an evaluation hands over hundreds of prompts.
MAX_ROWS = 128
# Finished rows leave the batch when they make up this share of it; leaving one by one would copy the
# key-value cache at almost every step.
COMPACT_SHARE = 0.25
# Tokens summed at a time when a token is drawn.
CDF_BLOCK = 256


@dataclass(frozen=True)
class Sampling:
    """How to sample: prompt i of a call draws from the random stream seed + i."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy, every log-probability 0
    max_length: int | None = None  # bound on prompt + response tokens, besides max_new_tokens
    seed: int = 0


@dataclass(frozen=True)
class Rollout:
    """One sampled response. The end-of-sequence token, where one was sampled, is the last of response_ids."""

    prompt_ids: list[int]
    response_ids: list[int]
    log_probs: list[float]  # of response_ids, nats, under the distribution sampled
    text: str  # decoded without special tokens
    finished: bool  # False: cut by max_new_tokens or max_length


def encode_prompt(tokenizer, text: str) -> list[int]:
    """The ids of a user's message: through the chat template where there is one, else question and answer."""
    if tokenizer.chat_template is None:
        return tokenizer(f"Question: {text}\nAnswer:")["input_ids"]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


class TransformersEngine:
    """Samples with the model object that is being trained: its weights are never stale."""

    def __init__(self, model, tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self.end_ids = _end_token_ids(model, tokenizer)
        if not can_share_prompts(model):
            raise ValueError(
                f"{model.config.model_type} has recurrent layers, whose state cannot be repeated "
                "for a group yet: use a model with attention layers only"
            )

    def generate(
        self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling
    ) -> list[Rollout]:
        """Sample group_size responses to each prompt (token ids); groups are contiguous.

        Raises:
            ValueError: an empty prompt, or one that leaves no room for a token under sampling.max_length.
        """
        budgets = torch.tensor([_response_budget(prompt, sampling) for prompt in prompts])
        budgets = budgets.repeat_interleave(group_size)  # (B,)
        prompts_at_a_time = max(1, MAX_ROWS // group_size)
        rollouts = []
        rows = min(len(budgets), prompts_at_a_time * group_size)
        with _evaluating(self.model), torch.no_grad(), packed_weights(self.model, rows):
            for start in range(0, len(prompts), prompts_at_a_time):
                chunk = prompts[start : start + prompts_at_a_time]
                budget = budgets[start * group_size :][: len(chunk) * group_size]
                uniforms = _uniforms(sampling.seed + start, len(chunk), group_size, int(budgets.max()))
                rollouts += self._generate_chunk(chunk, budget, sampling.temperature, uniforms)
        return rollouts

    def _generate_chunk(self, prompts, budget, temperature, uniforms) -> list[Rollout]:
        """Of at most budget (B,) tokens each, drawn at uniforms (B, T)."""
        device = self.model.get_input_embeddings().weight.device
        group_size, longest = len(budget) // len(prompts), int(budget.max())
        budget = budget.to(device)
        uniforms = uniforms.to(device)
        end_ids = torch.tensor(self.end_ids, device=device)
        tokens = torch.zeros(len(budget), longest, dtype=torch.long, device=device)  # (B, T)
        log_probs = torch.zeros(len(budget), longest, device=device)  # (B, T)
        lengths = torch.zeros_like(budget)  # (B,)

        logits, cache, attention_mask = run_prompts(self.model, prompts)
        logits = logits.repeat_interleave(group_size, dim=0)  # (B, V)
        attention_mask = attention_mask.repeat_interleave(group_size, dim=0)  # (B, P)
        cache.batch_repeat_interleave(group_size)
        live = torch.arange(len(budget), device=device)  # responses in the batch; logits, cache in this order
        done = torch.zeros_like(live, dtype=torch.bool)  # those among them that have ended
        for step in range(longest):
            token, log_prob = _sample(logits, temperature, uniforms[live, step])
            tokens[live, step], log_probs[live, step] = token, log_prob
            lengths[live[~done]] = step + 1
            done = done | torch.isin(token, end_ids) | (budget[live] == step + 1)
            if done.all():
                break
            if done.float().mean() >= COMPACT_SHARE:
                kept = (~done).nonzero().squeeze(1)
                cache.batch_select_indices(kept)
                live, token, attention_mask, done = (x[kept] for x in (live, token, attention_mask, done))
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(live), 1)], dim=1)
            logits = self.model(
                input_ids=token[:, None],
                attention_mask=decoding_mask(self.model, cache, attention_mask),
                position_ids=attention_mask.sum(1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]

        rollouts = []
        for row, length in enumerate(lengths.tolist()):
            response_ids = tokens[row, :length].tolist()
            rollouts.append(
                Rollout(
                    prompt_ids=list(prompts[row // group_size]),
                    response_ids=response_ids,
                    log_probs=log_probs[row, :length].tolist(),
                    text=self.tokenizer.decode(response_ids, skip_special_tokens=True),
                    finished=response_ids[-1] in self.end_ids,
                )
            )
        return rollouts


def _uniforms(seed: int, num_prompts: int, group_size: int, length: int) -> torch.Tensor:
    """Uniforms (B, T) in [0, 1): a stream for each response, so that none depends on its neighbours."""
    streams = [
        np.random.SeedSequence(seed + i, spawn_key=(g,))
        for i in range(num_prompts)
        for g in range(group_size)
    ]
    return torch.from_numpy(np.stack([np.random.default_rng(stream).random(length) for stream in streams]))


def _sample(logits, temperature, uniform):
    """Draw by inverting the cumulative distribution at uniform (B,): tokens and log-probabilities (B,).

    First the block of CDF_BLOCK tokens, then the token in it, so that the sums that need float64 (in float32
    their error over a 150k vocabulary is larger than many tokens' probabilities) are over few numbers: half
    the time of one cumulative sum. A token of probability 0 is never drawn.
    """
    logits = logits.float()  # (B, V)
    if temperature == 0:
        token = logits.argmax(-1)
        return token, torch.zeros_like(token, dtype=torch.float32)
    weights = torch.softmax(logits / temperature, -1)
    weights = F.pad(weights, (0, -weights.shape[1] % CDF_BLOCK)).view(len(logits), -1, CDF_BLOCK)
    blocks = weights.sum(-1, dtype=torch.float64)  # (B, V / CDF_BLOCK)
    cumulative = blocks.cumsum(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    block = _first_above(cumulative, threshold)  # (B, 1)
    threshold = threshold - (cumulative - blocks).gather(1, block)
    weights = weights.gather(1, block[:, :, None].expand(-1, 1, CDF_BLOCK))[:, 0]  # (B, CDF_BLOCK)
    within = _first_above(weights.double().cumsum(-1), threshold)  # (B, 1)
    token = block * CDF_BLOCK + within
    return token.squeeze(1), weights.gather(1, within).log().squeeze(1)


def _first_above(cumulative, threshold):
    """Index (B, 1) of the first of cumulative (B, N) above threshold (B, 1), which rounding may have raised
    to the last of them or a little more."""
    threshold = torch.minimum(threshold, cumulative[:, -1:] * (1 - 2**-52))
    return torch.searchsorted(cumulative, threshold, right=True)


def _response_budget(prompt, sampling: Sampling) -> int:
    """Tokens that a response to this prompt may have."""
    if not prompt:
        raise ValueError("a prompt has no tokens: there is nothing to continue")
    room = sampling.max_length - len(prompt) if sampling.max_length is not None else sampling.max_new_tokens
    if min(room, sampling.max_new_tokens) < 1:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens leaves no room for a response (max_length "
            f"{sampling.max_length}, max_new_tokens {sampling.max_new_tokens})"
        )
    return min(room, sampling.max_new_tokens)


def _end_token_ids(model, tokenizer) -> list[int]:
    """Every id that ends a response: the tokenizer's, and the generation config's (often a list)."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in (tokenizer.eos_token_id, *configured) if i is not None})


@contextmanager
def _evaluating(model):
    """Evaluation mode (no dropout, no gradient checkpointing) within; every module's mode as found after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
