"""Sample groups of responses from the policy, in process, with any decoder that transformers loads.

Responses are sampled from softmax(logits / temperature) over the whole vocabulary. There is no top-p, top-k
or repetition penalty, whatever the model's generation_config says. log_probs.py computes log-probabilities
under exactly this distribution; under any other, an importance ratio would have no meaning.

Two things make it fast. Each prompt goes through the model once, and its keys and values are repeated for the
G responses of the group. Rows whose responses have ended leave the batch.

Samples are reproducible because every response has a random stream of its own. A sample depends on the seed
and the prompt, not on the other rows in the batch.

Shapes: Q prompts, G group size, B = Q * G responses or those of them still being sampled, T response tokens,
P padded prompt length, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jinja2 import TemplateError
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gspo.policy.cpu import packed_weights
from gspo.policy.prompt_cache import can_share_prompts, decoding_mask, prefill

# The most responses sampled at a time. It bounds the key-value cache when an evaluation passes hundreds of
# prompts.
MAX_ROWS = 128
# Ended rows leave the batch when they make up this share of it. Were each to leave by itself, the key-value
# cache would be copied at almost every step.
COMPACT_SHARE = 0.25
# How many tokens of the vocabulary form a block when a token is drawn.
CDF_BLOCK = 256


@dataclass(frozen=True)
class Sampling:
    """How to sample. The responses to prompt i of a call use the random streams of seed + i."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy, and every log-probability is 0
    max_length: int | None = None  # bound on prompt + response tokens, besides max_new_tokens
    seed: int = 0


@dataclass(frozen=True)
class Rollout:
    """One sampled response. If an end-of-sequence token was sampled, it is the last of response_ids."""

    prompt_ids: list[int]
    response_ids: list[int]
    log_probs: list[float]  # of response_ids in nats, under the distribution that was sampled from
    text: str  # the response decoded without special tokens
    finished: bool  # False: cut off at max_new_tokens or max_length


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[dict],
    system_prompt: str | None = None,
    template_kwargs: dict | None = None,
) -> list[int]:
    """Return the token ids of a prompt, rendered by the tokenizer's chat template.

    Without a chat template, the messages stand between "Question: " and "Answer:".

    Args:
        prompt: a user's message, or chat messages, {"role": ..., "content": ...} each.
        system_prompt: a system message before them; messages that begin with one of their own keep that.
        template_kwargs: what the chat template takes besides, such as {"enable_thinking": False}.

    Raises:
        ValueError: the chat template refuses the messages or the settings. The message is one line.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    if tokenizer.chat_template is None:
        text = "\n\n".join(message["content"] for message in messages)
        return tokenizer(f"Question: {text}\nAnswer:")["input_ids"]
    try:
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **(template_kwargs or {})
        )
    except (TemplateError, TypeError) as error:  # some know no system message
        first_line = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"the model's chat template refuses the prompt ({first_line}): leave out --system_prompt or "
            "--chat_template_kwargs, or change the messages"
        ) from error
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def unknown_share(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """Return the share of the texts' tokens that are the tokenizer's unknown token; 0 if it has none."""
    tokens = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return sum(token == tokenizer.unk_token_id for token in tokens) / max(1, len(tokens))


class TransformersEngine:
    """Samples with the model object that is being trained, so its weights are always current.

    Raises:
        ValueError: the model has recurrent layers.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
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
        """Sample group_size responses to each prompt, given as token ids.

        Returns:
            len(prompts) * group_size rollouts, in which the responses to a prompt are contiguous.

        Raises:
            ValueError: a prompt is empty, or leaves no room for a token under sampling.max_length.
        """
        budgets = torch.tensor([_response_budget(prompt, sampling) for prompt in prompts])
        budgets = budgets.repeat_interleave(group_size)  # (len(prompts) * G,)
        longest = int(budgets.max())
        prompts_per_batch = max(1, MAX_ROWS // group_size)
        most_rows = min(len(budgets), prompts_per_batch * group_size)
        rollouts = []
        with _evaluation_mode(self.model), torch.no_grad(), packed_weights(self.model, most_rows):
            for start in range(0, len(prompts), prompts_per_batch):
                batch = prompts[start : start + prompts_per_batch]
                batch_budgets = budgets[start * group_size :][: len(batch) * group_size]
                uniforms = draw_uniforms(sampling.seed + start, len(batch), group_size, longest)
                rollouts += self._sample_batch(batch, batch_budgets, sampling.temperature, uniforms)
        return rollouts

    def _sample_batch(
        self,
        prompts: Sequence[Sequence[int]],
        budgets: torch.Tensor,
        temperature: float,
        uniforms: torch.Tensor,
    ) -> list[Rollout]:
        """Sample responses of at most `budgets` (B,) tokens each, drawn with `uniforms` (B, T)."""
        device = self.model.get_input_embeddings().weight.device
        num_rows, longest = len(budgets), int(budgets.max())
        group_size = num_rows // len(prompts)
        budgets = budgets.to(device)
        uniforms = uniforms.to(device)
        end_ids = torch.tensor(self.end_ids, device=device)
        tokens = torch.zeros(num_rows, longest, dtype=torch.long, device=device)  # (B, T)
        log_probs = torch.zeros(num_rows, longest, device=device)  # (B, T)
        lengths = torch.zeros_like(budgets)  # (B,)

        logits, cache, attention_mask = prefill(self.model, prompts)
        logits = logits.repeat_interleave(group_size, dim=0)  # (B, V)
        attention_mask = attention_mask.repeat_interleave(group_size, dim=0)  # (B, P)
        cache.batch_repeat_interleave(group_size)
        # Which response each row of the batch holds. logits, cache and attention_mask have the same order.
        rows = torch.arange(num_rows, device=device)
        ended = torch.zeros_like(rows, dtype=torch.bool)
        for step in range(longest):
            token, log_prob = draw_tokens(logits, temperature, uniforms[rows, step])
            # Ended rows that are still in the batch write here too, behind the end of their responses.
            tokens[rows, step], log_probs[rows, step] = token, log_prob
            lengths[rows[~ended]] = step + 1
            ended = ended | torch.isin(token, end_ids) | (budgets[rows] == step + 1)
            if ended.all():
                break
            if ended.float().mean() >= COMPACT_SHARE:
                kept = (~ended).nonzero().squeeze(1)
                cache.batch_select_indices(kept)
                rows, token, ended = rows[kept], token[kept], ended[kept]
                attention_mask = attention_mask[kept]
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], dim=1)
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


def draw_uniforms(seed: int, num_prompts: int, group_size: int, length: int) -> torch.Tensor:
    """Return float64 numbers (B, length) uniform in [0, 1), from an independent stream for each response."""
    rows = []
    for i in range(num_prompts):
        for g in range(group_size):
            stream = np.random.SeedSequence(seed + i, spawn_key=(g,))
            rows.append(np.random.default_rng(stream).random(length))
    return torch.from_numpy(np.stack(rows))


def draw_tokens(
    logits: torch.Tensor, temperature: float, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row from softmax(logits / temperature), by inverting the cumulative distribution.

    The token drawn is the first whose cumulative probability exceeds the row's uniform number. Over a
    vocabulary of 150,000, float32 sums have an error larger than many tokens' probabilities, so the sums must
    be float64. To make few of them, the block of CDF_BLOCK tokens is drawn first and then the token in it:
    this takes half the time of one cumulative sum. A token of probability 0 is never drawn.

    Args:
        logits: (B, V).
        temperature: 0 takes the most probable token.
        uniform: (B,) float64 in [0, 1).

    Returns:
        The tokens (B,) and their log-probabilities (B,) in float32.
    """
    logits = logits.float()  # (B, V)
    if temperature == 0:
        token = logits.argmax(-1)
        return token, torch.zeros_like(token, dtype=torch.float32)
    probs = torch.softmax(logits / temperature, -1)
    probs = F.pad(probs, (0, -probs.shape[1] % CDF_BLOCK))  # whole blocks
    probs = probs.view(len(logits), -1, CDF_BLOCK)
    block_probs = probs.sum(-1, dtype=torch.float64)  # (B, V / CDF_BLOCK)
    block_cdf = block_probs.cumsum(-1)
    # The probabilities are rounded and sum to almost 1: scale the uniform number to their exact sum.
    threshold = uniform[:, None] * block_cdf[:, -1:]  # (B, 1)
    block = _first_above(block_cdf, threshold)  # (B, 1)
    # What remains of the threshold within the block.
    threshold = threshold - (block_cdf - block_probs).gather(1, block)
    probs = probs.gather(1, block[:, :, None].expand(-1, 1, CDF_BLOCK))[:, 0]  # (B, CDF_BLOCK)
    index = _first_above(probs.double().cumsum(-1), threshold)  # (B, 1), within the block
    token = block * CDF_BLOCK + index
    return token.squeeze(1), probs.gather(1, index).log().squeeze(1)


def _first_above(cdf: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Return the index (B, 1) of the first entry of `cdf` (B, N) above `threshold` (B, 1)."""
    # Rounding may have raised the threshold to the last entry or a little above it, where none would follow.
    threshold = torch.minimum(threshold, cdf[:, -1:] * (1 - 2**-52))
    return torch.searchsorted(cdf, threshold, right=True)


def _response_budget(prompt: Sequence[int], sampling: Sampling) -> int:
    """Return how many tokens a response to this prompt may have."""
    if not prompt:
        raise ValueError("a prompt has no tokens: there is nothing to continue")
    budget = sampling.max_new_tokens
    if sampling.max_length is not None:
        budget = min(budget, sampling.max_length - len(prompt))
    if budget < 1:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens leaves no room for a response (max_length "
            f"{sampling.max_length}, max_new_tokens {sampling.max_new_tokens})"
        )
    return budget


def _end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every id that ends a response: the tokenizer's, and those of the model's generation config."""
    configured = model.generation_config.eos_token_id  # an id, a list of ids or None
    if not isinstance(configured, list):
        configured = [configured]
    return sorted({i for i in (tokenizer.eos_token_id, *configured) if i is not None})


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Set evaluation mode (no dropout, no gradient checkpointing), and restore every module's mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
