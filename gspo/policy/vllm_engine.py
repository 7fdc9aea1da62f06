"""Sample from vLLM servers, which have a copy of the policy. pi_old is the trainer's by default all the same.

Every request states the whole distribution, so that nothing comes from the model's generation config.

A request samples a group. Its seed depends on sampling.seed and the place of the prompt alone, and response
g of the group gets that seed plus g from vLLM. Asking again therefore gives the same responses, and none is
lost or counted twice. Batches of other sizes differ by rounding, which may change a token.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gspo.policy.log_probs import TokenRows
from gspo.policy.rollout import Rollout, Sampling, end_token_ids, response_budget
from gspo.policy.vllm_extension import SHAPE
from gspo.policy.vllm_process import VLLMProcess
from gspo.policy.vllm_server import (
    ANSWER_TIMEOUT_S,
    START_TIMEOUT_S,
    TOKENIZER_SAMPLE,
    EngineError,
    Expected,
    VLLMServer,
)

# Groups that a server is asked for at a time. vLLM itself chooses which of them it computes together.
GROUPS_AT_A_TIME = 256
# The check of a server samples at this temperature, at which log-probabilities without temperature show.
CHECK_TEMPERATURE = 0.7
CHECK_TOKENS = 12
# It continues these, which any model has an idea of.
CHECK_TEXTS = (
    "What is 12 + 345?",
    "Once upon a time",
    "def main():",
    "The capital of France is",
    "import numpy as",
    "Dear Sir or Madam,",
    "1, 2, 3, 4,",
    "The opposite of hot is",
)
# The mean distance, in nats per token, of a server's log-probabilities from the trainer's that rounding
# explains, by the type that one of them computes in. Measured on SmolLM2-135M: 0.00001 in float32, 0.04 in
# bfloat16.
TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.1}
# Rounding moves log-probabilities up and down. If those sampled are higher by this on average, in nats per
# token, then the server leaves out tokens. A top-p of 0.95 moves them by about 0.03.
EXCESS = 0.02
# Gives log-probabilities under the trainer's weights: (prompts, responses, temperature) -> for each response
# those of its tokens.
LogProbsAt = Callable[[TokenRows, TokenRows, float], Sequence[Sequence[float]]]


class VLLMEngine:
    """Samples with vLLM servers. sync() gives them the weights, check() proves that they have them.

    Args:
        urls: the servers, such as http://127.0.0.1:8000. Prompts are dealt to them in turn.
        model: the policy, whose shape the servers' model must have. Its weights are not read.
        compute_type: the type that the trainer computes in, a key of TOLERANCE.
        adapters: what the servers get are LoRA adapters, for the model that they were started with.
        process: the only server itself, if this process has started it.

    Raises:
        EngineError: a server does not start, or has another model, tokenizer or other settings.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        compute_type: str = "float32",
        adapters: bool = False,
        process: VLLMProcess | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        self.tokenizer, self.compute_type = tokenizer, compute_type
        self.end_ids = end_token_ids(model, tokenizer)
        shape = {name: getattr(model.config.get_text_config(), name, None) for name in SHAPE}
        sample = tokenizer(TOKENIZER_SAMPLE, add_special_tokens=False)["input_ids"]
        expected = Expected(shape, sample, adapters, start_timeout_s, answer_timeout_s)
        self.servers = [VLLMServer(url, expected, process) for url in urls]
        for server in self.servers:
            server.connect()

    @property
    def dtype(self) -> torch.dtype:
        """The type that the servers compute in. Weights need not be written in a longer one."""
        return getattr(torch, self.servers[0].dtype)

    @property
    def tolerance(self) -> float:
        """The mean distance from the trainer's log-probabilities, nats per token, that rounding explains."""
        return max(
            TOLERANCE[name] for name in (self.compute_type, *(server.dtype for server in self.servers))
        )

    def sync(self, folder: Path, version: str) -> None:
        """Let every server take the weights of a folder, or the adapters, under the name `version`.

        The folder must stay until the next call: a server that is started again takes them again.

        Raises:
            EngineError: a server did not take them.
        """
        self._at_once([(server.load, (folder, version)) for server in self.servers])

    def expect(self, folder: Path, version: str) -> None:
        """Use weights that another process has given to the servers: with several, one calls sync()."""
        for server in self.servers:
            server.weights = folder, version

    def generate(
        self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling
    ) -> list[Rollout]:
        """Sample group_size responses to each prompt, given as token ids.

        Returns:
            len(prompts) * group_size rollouts, in which the responses to a prompt are contiguous. Their
            log-probabilities are those of the server.

        Raises:
            ValueError: a prompt is empty, or leaves no room for a token under sampling.max_length.
            EngineError: a server does not answer as it must.
        """
        return self._generate(self.servers, prompts, group_size, sampling)

    def _generate(
        self,
        servers: Sequence[VLLMServer],
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
    ) -> list[Rollout]:
        calls = []
        for i, prompt in enumerate(prompts):
            budget = response_budget(prompt, sampling)
            parameters = {
                "n": group_size,
                "seed": _seed_of(sampling.seed + i),
                "max_tokens": budget,
                "temperature": sampling.temperature,
                "top_p": 1.0,
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "logprobs": 0,  # of the sampled tokens alone
                "ignore_eos": True,  # the ids that end a response are ours
                "stop_token_ids": self.end_ids,
                "detokenize": False,
            }
            server = servers[i % len(servers)]
            calls.append((self._sample_group, (server, list(prompt), parameters)))
        return [rollout for group in self._at_once(calls) for rollout in group]

    def log_probs(self, prompts: TokenRows, responses: TokenRows) -> list[list[float]]:
        """Return the servers' log-probabilities of the response tokens, at temperature 1, in nats.

        vLLM 0.32 dies of it on a CPU with --enable-lora. Training does without.

        Raises:
            EngineError: a server does not answer as it must.
        """
        calls = []
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            server = self.servers[i % len(self.servers)]
            calls.append((self._log_probs_of, (server, list(prompt), list(response))))
        return self._at_once(calls)

    def sleep(self) -> None:
        """Let every server give up its GPU memory, until wake_up()."""
        self._at_once([(server.sleep, ()) for server in self.servers])

    def wake_up(self) -> None:
        self._at_once([(server.wake_up, ()) for server in self.servers])

    def check(self, log_probs_at: LogProbsAt) -> float:
        """Compare every server's log-probabilities with the trainer's, on responses to CHECK_TEXTS.

        Args:
            log_probs_at: gives log-probabilities under the trainer's weights.

        Returns:
            The largest of the servers' mean distances, in nats per token.

        Raises:
            EngineError: a server has other weights, or its log-probabilities are not those of
                softmax(logits / temperature) over the whole vocabulary.
        """
        gaps = []
        prompts = [self.tokenizer(text)["input_ids"] for text in CHECK_TEXTS]
        for server in self.servers:
            rollouts = self._generate([server], prompts, 1, Sampling(CHECK_TOKENS, CHECK_TEMPERATURE))
            rows = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
            sampled = _flat([r.log_probs for r in rollouts])
            expected = _flat(log_probs_at(*rows, CHECK_TEMPERATURE))
            at_1 = partial(log_probs_at, *rows, 1.0)
            gap, cause = compare(sampled, expected, self.tolerance, at_1)
            if cause:
                raise server.error(cause)
            gaps.append(gap)
        return max(gaps)

    def _sample_group(self, server: VLLMServer, prompt: list[int], parameters: dict) -> list[Rollout]:
        answer = server.generate({"token_ids": prompt, "sampling_params": parameters})
        with server.understood():
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if [choice["index"] for choice in choices] != list(range(parameters["n"])):
                raise server.error(f"it answered with {len(choices)} responses instead of {parameters['n']}")
            return [self._rollout(server, prompt, parameters, choice) for choice in choices]

    def _rollout(self, server: VLLMServer, prompt: list[int], parameters: dict, choice: dict) -> Rollout:
        response_ids = choice["token_ids"]
        tokens = (choice["logprobs"] or {}).get("content") or []
        if not response_ids or [token["token_id"] for token in tokens] != response_ids:
            raise _wrong_length(server, len(tokens), len(response_ids))
        finished = response_ids[-1] in self.end_ids
        budget = parameters["max_tokens"]
        if not (finished or len(response_ids) == budget):
            raise server.error(
                f"a response ended after {len(response_ids)} of {budget} tokens ({choice['finish_reason']}): "
                "give the server a --max-model-len for the longest prompt and response"
            )
        # At temperature 0 one token has all the probability, so its log-probability is 0 as in rollout.py.
        greedy = parameters["temperature"] == 0
        return Rollout(
            prompt_ids=prompt,
            response_ids=response_ids,
            log_probs=[0.0 if greedy else token["logprob"] for token in tokens],
            text=self.tokenizer.decode(response_ids, skip_special_tokens=True),
            finished=finished,
        )

    def _log_probs_of(self, server: VLLMServer, prompt: list[int], response: list[int]) -> list[float]:
        parameters = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0, "detokenize": False}
        answer = server.generate({"token_ids": prompt + response, "sampling_params": parameters})
        with server.understood():
            positions = (answer["prompt_logprobs"] or [])[len(prompt) :]
            if len(positions) != len(response):
                raise _wrong_length(server, len(positions), len(response))
            pairs = zip(positions, response, strict=True)
            return [position[str(token)]["logprob"] for position, token in pairs]

    def _at_once(self, calls: Sequence[tuple[Callable, tuple]]) -> list:
        """Make calls to servers at the same time, each with its arguments. Returns their results in order.

        The first error is raised at once. Calls that have not begun are then left out, and those that have
        are not waited for: a hung server answers late or never. So the threads end with the process.
        """
        results: list[Any] = [None] * len(calls)
        done: SimpleQueue[BaseException | None] = SimpleQueue()
        waiting = deque(enumerate(calls))

        def work() -> None:
            with suppress(IndexError):  # none is left
                while True:
                    i, (call, arguments) = waiting.popleft()
                    try:
                        results[i] = call(*arguments)
                    except BaseException as error:
                        waiting.clear()
                        done.put(error)
                    else:
                        done.put(None)

        for _ in range(min(len(calls), GROUPS_AT_A_TIME * len(self.servers))):
            threading.Thread(target=work, daemon=True).start()
        for _ in calls:
            if error := done.get():
                raise error
        return results


def compare(
    sampled: Sequence[float],
    expected: Sequence[float],
    tolerance: float,
    expected_at_1: Callable[[], Sequence[Sequence[float]]] | None = None,
) -> tuple[float, str | None]:
    """Compare log-probabilities of sampled tokens, as their server gives them, with the trainer's.

    Args:
        expected: the trainer's, at the temperature of sampling.
        tolerance: the mean distance that rounding explains.
        expected_at_1: gives the trainer's at temperature 1 by response, if sampling was at another. It takes
            a forward pass, and is called only if the others are too far away.

    Returns:
        The mean distance in nats per token, and what is wrong, or None.
    """
    excess = [a - b for a, b in zip(sampled, expected, strict=True)]
    gap = fmean(map(abs, excess))
    if gap > tolerance and expected_at_1 is not None:
        gap_at_1 = fmean(abs(a - b) for a, b in zip(sampled, _flat(expected_at_1()), strict=True))
        if gap_at_1 <= tolerance:
            return gap, (
                "its log-probabilities are those without temperature: start it with "
                "--logprobs-mode processed_logprobs"
            )
    # Without the improbable tokens, all others are more probable. Rounding may raise the mean of a few, too.
    noise = min(pstdev(excess), tolerance) / math.sqrt(len(excess))
    raised = fmean(excess) > max(min(EXCESS, tolerance), 4 * noise)
    if raised and fmean(x >= -tolerance for x in excess) > 0.9:
        return gap, (
            f"its tokens are more probable than the policy's by {fmean(excess):.3f} nats: it samples with "
            "top-p, top-k or min-p, which must be off"
        )
    if gap > tolerance:
        return gap, (
            f"its log-probabilities are {gap:.3f} nats per token away from the trainer's: its weights are "
            "stale or another model's"
        )
    return gap, None


def _flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [x for row in rows for x in row]


def _wrong_length(server: VLLMServer, log_probs: int, tokens: int) -> EngineError:
    return server.error(f"it gave {log_probs} log-probabilities for a response of {tokens} tokens")


def _seed_of(stream: int) -> int:
    """The seed of a group's first response. vLLM takes 64 bits, of which a CPU uses the lower 32."""
    high, low = np.random.SeedSequence(stream).generate_state(2).tolist()
    return (high >> 2 << 32) + low
