"""Sample groups of responses from the policy, in process, with any decoder that transformers loads.

Responses are sampled from softmax(logits / temperature) over the whole vocabulary. There is no top-p, top-k
or repetition penalty, whatever the model's generation_config says. log_probs.py computes log-probabilities
under exactly this distribution; under any other, an importance ratio would have no meaning.

Four things make it fast. Each prompt goes through the model once, and its keys and values are repeated for
the G responses of the group. The cache is allocated once. Rows whose responses have ended leave the batch. A
GPU is waited for only every few tokens, to see which these are.

If memory runs out, the batch is sampled again with half the rows, now and from then on.

Samples are reproducible because every response has a random stream of its own. A sample depends on the seed
and the prompt, not on the other rows in the batch.

Shapes: Q prompts, G group size, B = Q * G responses or those of them still being sampled, T response tokens,
P padded prompt length, V vocabulary.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jinja2 import TemplateError
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gspo.policy.cpu import packed_weights
from gspo.policy.log_probs import token_log_probs
from gspo.policy.out_of_memory import is_out_of_memory
from gspo.policy.prompt_cache import can_share_prompts, decode, prefill
from gspo.printing import say

# The most responses sampled at a time. It bounds the key-value cache when an evaluation passes hundreds of
# prompts.
MAX_ROWS = 128
# Ended rows leave the batch when they make up this share of it. Were each to leave by itself, the key-value
# cache would be copied at almost every step.
COMPACT_SHARE = 0.25
# After every so many tokens, a GPU is asked which rows have ended. It must finish all its work to answer, and
# is idle until it gets more. Rows that have ended in between cost up to this many tokens each.
LOOK_EVERY = 8
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

    Args:
        max_rows: responses sampled at a time. A group that is larger is sampled as a whole.

    Raises:
        ValueError: the model has recurrent layers.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_rows: int = MAX_ROWS
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        # The most rows that are tried. It is halved when memory runs out, and may then split a group.
        self.row_limit = sys.maxsize
        self.end_ids = end_token_ids(model, tokenizer)
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
            RuntimeError: memory does not suffice for a single response.
        """
        budgets = [response_budget(prompt, sampling) for prompt in prompts]
        total = len(prompts) * group_size
        rows = self._rows(group_size, total)
        rollouts: list[Rollout] = []
        with evaluation_mode(self.model), torch.no_grad(), packed_weights(self.model, rows):
            while len(rollouts) < total:
                # The next responses: those to some prompts, or if no group fits, a part of one group.
                prompt, first_response = divmod(len(rollouts), group_size)
                num_responses = min(rows, group_size - first_response)  # to each prompt
                batch = slice(prompt, prompt + max(1, rows // group_size))
                batch_budgets = torch.tensor(budgets[batch]).repeat_interleave(num_responses)  # (B,)
                uniforms = draw_uniforms(
                    sampling.seed + prompt,
                    len(budgets[batch]),
                    num_responses,
                    max(budgets[batch]),
                    first_response,
                )
                try:
                    rollouts += self._sample_batch(
                        prompts[batch], batch_budgets, sampling.temperature, uniforms
                    )
                    continue
                except RuntimeError as error:
                    if not is_out_of_memory(error) or len(batch_budgets) == 1:
                        raise
                # After the handler, which holds the failed attempt's tensors.
                self._halve(len(batch_budgets))
                rows = self._rows(group_size, total)
        return rollouts

    def sync(self, version: str) -> None:
        """Take the policy's present weights: it has no others."""

    def log_probs(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Return the log-probabilities of the response tokens, at temperature 1, in nats."""
        with evaluation_mode(self.model), torch.no_grad():
            return [row.tolist() for row in token_log_probs(self.model, prompts, responses)]

    def _sample_batch(
        self,
        prompts: Sequence[Sequence[int]],
        budgets: torch.Tensor,
        temperature: float,
        uniforms: torch.Tensor,
    ) -> list[Rollout]:
        """Sample responses of at most `budgets` (B,) tokens each, drawn with `uniforms` (B, T).

        On a GPU, the loop waits only when it looks which rows have ended, every LOOK_EVERY tokens. This reads
        `ended`, and writes the indices of the rows that stay. A model may wait by itself within `decode`: of
        the families in our tests, gemma3 does, once a token.
        """
        device = self.model.get_input_embeddings().weight.device
        num_rows, longest = len(budgets), int(budgets.max())
        group_size = num_rows // len(prompts)
        look_every = _look_every(device)
        uniforms = uniforms.to(device)
        end_ids = torch.tensor(self.end_ids, dtype=torch.long, device=device)
        tokens = torch.zeros(num_rows, longest, dtype=torch.long, device=device)  # (B, T)
        log_probs = torch.zeros(num_rows, longest, device=device)  # (B, T)

        logits, cache, mask = prefill(self.model, prompts, group_size, longest)
        # Which response each row of the batch holds. All that is (B, ...) below has the same order.
        rows = torch.arange(num_rows, device=device)
        prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        prompt_lengths = prompt_lengths.repeat_interleave(group_size)  # (B,)
        last_step = budgets.to(device) - 1  # (B,)
        ended = torch.zeros_like(rows, dtype=torch.bool)  # (B,)
        for step in range(longest):
            token, log_prob = draw_tokens(logits, temperature, uniforms[rows, step])
            # Ended rows that are still in the batch write here too, behind the end of their responses.
            tokens[rows, step], log_probs[rows, step] = token, log_prob
            ended = ended | _is_any_of(token, end_ids) | (last_step == step)
            if step + 1 == longest:
                break
            if (step + 1) % look_every == 0:
                kept_rows = [row for row, has_ended in enumerate(ended.tolist()) if not has_ended]
                if not kept_rows:
                    break
                if len(kept_rows) <= (1 - COMPACT_SHARE) * len(rows):
                    kept = torch.tensor(kept_rows, device=device)
                    cache.batch_select_indices(kept)
                    rows, token, ended, mask = rows[kept], token[kept], ended[kept], mask[kept]
                    prompt_lengths, last_step = prompt_lengths[kept], last_step[kept]
            # Ended rows stay at their last position: the model may have no more.
            position = prompt_lengths + last_step.clamp(max=step)
            logits = decode(self.model, cache, mask, token, position)

        # Each is transferred at once, and not by row.
        tokens, log_probs = tokens.cpu(), log_probs.cpu()
        rollouts = []
        for row, length in enumerate(_lengths(tokens, end_ids.cpu(), budgets).tolist()):
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

    def _rows(self, group_size: int, total: int) -> int:
        """Return how many of `total` responses are sampled at a time: whole groups, if one of them fits."""
        rows = min(total, max(self.max_rows, group_size), self.row_limit)
        return rows // group_size * group_size or rows

    def _halve(self, rows: int) -> None:
        """Sample at most half of these rows at a time from now on."""
        self.row_limit = rows // 2
        torch.cuda.empty_cache()
        say(
            f"out of memory: from now on, at most {self.row_limit} responses are sampled at a time",
            sys.stderr,
        )


def draw_uniforms(
    seed: int, num_prompts: int, group_size: int, length: int, first_response: int = 0
) -> torch.Tensor:
    """Return float64 numbers (B, length) uniform in [0, 1), from an independent stream for each response.

    first_response: the first of the responses to each prompt, where a group is sampled in parts.
    """
    rows = []
    for i in range(num_prompts):
        for g in range(first_response, first_response + group_size):
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


def _is_any_of(token: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return whether each token is one of the ids (N,). Of many ids, a GPU would wait in torch.isin."""
    return (token[..., None] == ids).any(-1)


def _lengths(tokens: torch.Tensor, end_ids: torch.Tensor, budgets: torch.Tensor) -> torch.Tensor:
    """Return the lengths (B,) of the responses in `tokens` (B, T): up to an end token or their budget."""
    steps = torch.arange(1, tokens.shape[1] + 1)
    ends = torch.where(_is_any_of(tokens, end_ids), steps, tokens.shape[1])  # (B, T)
    return torch.minimum(ends.amin(1), budgets)


def _look_every(device: torch.device) -> int:
    """Return after how many tokens to look which rows have ended. On a CPU, this costs nothing."""
    return 1 if device.type == "cpu" else LOOK_EVERY


def response_budget(prompt: Sequence[int], sampling: Sampling) -> int:
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


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every id that ends a response: the tokenizer's, and those of the model's generation config."""
    configured = model.generation_config.eos_token_id  # an id, a list of ids or None
    if not isinstance(configured, list):
        configured = [configured]
    return sorted({i for i in (tokenizer.eos_token_id, *configured) if i is not None})


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Set evaluation mode (no dropout, no gradient checkpointing), and restore every module's mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
