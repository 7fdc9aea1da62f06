"""The engine that samples for a trainer: the policy itself, or vLLM servers that get its weights.

A new version of the weights is loaded before anything is sampled from it, and compared with the trainer.
"""

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gspo.policy.log_probs import TokenRows, token_log_probs
from gspo.policy.rollout import MAX_ROWS, Rollout, Sampling, TransformersEngine
from gspo.policy.saved_model import save_tokenizer
from gspo.policy.sharded_model import (
    gather_weights,
    gathered_weights,
    is_sharded,
    local_part,
    release_weights,
)
from gspo.policy.vllm_engine import VLLMEngine, compare
from gspo.policy.vllm_process import ServerSettings, VLLMProcess, server_bytes, weight_bytes
from gspo.training.config import GSPOConfig
from gspo.training.forward_passes import compute_type
from gspo.training.hardware import USABLE_SHARE, gigabytes, num_cores
from gspo.training.mismatch import mismatch
from gspo.training.processes import Processes
from gspo.training.rollout_batch import Sample
from gspo.training.trained_weights import TrainedWeights
from gspo.training.weights_folder import WeightsFolder
from gspo.training.whole_folders import saving

# Compares samples of a rollout batch with log pi_old, and may mask some. Returns metrics.
Comparison = Callable[[Sequence[Sample]], dict[str, float]]
# Bytes of AdamW's moments per trained parameter, by way of training. They are made in the first update, when
# a server on the same GPU has its memory already.
MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2.1, "lora": 8}
# The mean distance from the trainer's log-probabilities stays about what it was with the first weights, since
# the prompts of the check and its seeds are the same. If it exceeds this many times that, and as many nats
# per token more, then the servers' weights stay behind.
GAP_GROWTH, GAP_MARGIN = 2.0, 0.005


def rollout_engine(
    config: GSPOConfig, weights: TrainedWeights, tokenizer: Any, processes: Processes
) -> "TransformersEngine | ServerRollouts":
    """Make the engine that a resolved configuration names; collective.

    Raises:
        ValueError: the model cannot be sampled from, vLLM is not installed, or the GPU has no room for it.
        EngineError: a server cannot be used.
    """
    if config.rollout_engine == "vllm":
        return ServerRollouts(config, weights, tokenizer, processes)
    engine = ShardedEngine if is_sharded(weights.model) else TransformersEngine
    return engine(weights.model, tokenizer, config.rollout_rows or MAX_ROWS)


def comparison(engine: Any, config: GSPOConfig) -> Comparison | None:
    """How to compare the sampler's log-probabilities with pi_old's; None if there is nothing to compare.

    Sampler and trainer are the same policy in the same arithmetic, or pi_old is the sampler's.
    """
    if config.pi_old == "sampler":
        return None
    if config.sampling_dtype != config.dtype:
        return lambda samples: mismatch(with_pi_old(samples), config.mismatch_mask)
    return getattr(engine, "compare", None)


def with_pi_old(samples: Sequence[Sample]) -> list[Sample]:
    """The samples that have log pi_old."""
    return [sample for sample in samples if sample.old_log_probs is not None]


class ShardedEngine(TransformersEngine):
    """Samples with a sharded model, whose weights are gathered once for all responses.

    The processes then sample numbers of prompts and tokens of their own. sync() and rest() are collective.
    """

    def sync(self, version: str) -> None:
        """Gather the policy's present weights."""
        gather_weights(self.model)

    def rest(self) -> None:
        """Give them up, until the next sync()."""
        release_weights(self.model)


class ServerRollouts:
    """Samples with vLLM servers: those of --vllm_url, or one that each process starts beside itself.

    The methods but generate() and log_probs() are collective. A server of the run's own ends with close(), or
    with this process.
    """

    def __init__(
        self, config: GSPOConfig, weights: TrainedWeights, tokenizer: Any, processes: Processes
    ) -> None:
        self.config, self.weights, self.processes = config, weights, processes
        self._folder: WeightsFolder  # of the main process alone
        self._process: VLLMProcess | None = None
        self._num_parameters = sum(parameter.numel() for parameter in weights.model.parameters())
        self._count = 0  # of the versions so far
        self._loaded: tuple | None = None  # what the servers have, as _identity() says
        self._first_gap: float | None = None
        self._asleep = False
        parts: list[Any] = []  # to be closed
        self.close = weakref.finalize(self, _close, parts, os.getpid())
        try:
            self.run = processes.on_main(self._make_folder, parts)  # other runs may use the servers, too
            urls = config.vllm_urls
            if not urls:
                model = self._write_model(tokenizer)
                settings = processes.each(self._server_settings, model)
                self._process = processes.each(VLLMProcess, settings, model.parent)
                parts.insert(0, self._process.stop)
                urls = [self._process.url]
            make = partial(VLLMEngine, urls, weights.model, tokenizer, str(config.dtype))
            self.engine: VLLMEngine = processes.each(
                partial(make, adapters=bool(config.lora_rank), process=self._process)
            )
        except BaseException:
            self.close()
            raise
        # Servers that all processes use are given the weights by the main one.
        self._loads = self._process is not None or processes.is_main

    def generate(
        self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling
    ) -> list[Rollout]:
        """As VLLMEngine.generate()."""
        return self.engine.generate(prompts, group_size, sampling)

    def log_probs(self, prompts: TokenRows, responses: TokenRows) -> list[list[float]]:
        """As VLLMEngine.log_probs()."""
        return self.engine.log_probs(prompts, responses)

    def sync(self, version: str) -> None:
        """Give the policy's present weights to the servers, and compare some log-probabilities with its own.

        Weights that the servers have already are not given again.

        Args:
            version: changes with every update.

        Raises:
            EngineError: a server did not take them, or samples from others.
            CannotSave: they cannot be written.
        """
        if self._asleep:
            torch.cuda.empty_cache()
            self.processes.each(self.engine.wake_up)
            self._asleep = False
        identity = self._identity(version)
        if not self.processes.any(identity != self._loaded):
            return
        self._count += 1
        with self._written(str(self._count)) as folder:
            self.processes.together(self.weights.save_update, folder, self.engine.dtype)
        name = f"{self.run}-{self._count}"
        with gathered_weights(self.weights.model):  # one process may check them alone
            self.processes.each(self._load if self._loads else self.engine.expect, folder, name)
        self._loaded = identity

    def rest(self) -> None:
        """Let a server on the trainer's own GPU give its memory up, until the next sync()."""
        if self._process is not None and self.processes.device.type == "cuda":
            self.processes.each(self.engine.sleep)
            self._asleep = True

    def compare(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Compare the servers' log-probabilities of samples with pi_old's, and mask by --mismatch_mask.

        Args:
            samples: of a rollout batch; those with log pi_old are compared.

        Returns:
            The metrics of mismatch().

        Raises:
            EngineError: the servers have other weights than the trainer, or leave out tokens.
        """
        compared, sampled, expected = [], [], []
        for sample in samples:
            if sample.old_log_probs is not None:
                compared.append(sample)
                sampled += sample.rollout.log_probs
                expected += sample.old_log_probs.tolist()
        if not compared:
            return {}
        _, cause = compare(sampled, expected, self.engine.tolerance)
        if cause:
            raise self.engine.servers[0].error(cause)
        return mismatch(compared, self.config.mismatch_mask)

    def _identity(self, version: str) -> tuple:
        """Something that differs if the weights do, also if they were changed without an update."""
        parts = [local_part(weight) for weight in self.weights.parameters]
        return version, [(part.data_ptr(), part._version) for part in parts]

    # ---- on the main process

    def _make_folder(self, parts: list) -> str:
        num_bytes = weight_bytes(self._num_parameters, str(self.config.dtype))
        self._folder = WeightsFolder(self.config.vllm_urls, self.config.output_dir, num_bytes)
        parts.append(self._folder.close)
        return self._folder.path.name

    @contextmanager
    def _new_folder(self, name: str) -> Iterator[Path]:
        with saving(self._folder.path):
            yield self._folder.new(name)

    # ---- in each process

    def _written(self, name: str) -> AbstractContextManager[Path]:
        """A new folder, which all processes fill together."""
        return self.processes.around_main(lambda: self._new_folder(name))

    def _write_model(self, tokenizer: Any) -> Path:
        """Write what a server is started with: the model as it is now, and the tokenizer."""
        with self._written("model") as folder:
            dtype = getattr(torch, str(self.config.dtype))
            self.processes.together(self.weights.save_model, folder, dtype)
            self.processes.on_main(save_tokenizer, tokenizer, folder)
        return folder

    def _load(self, folder: Path, name: str) -> None:
        self.engine.sync(folder, name)
        gap = self.engine.check(self._log_probs_at)
        if self._first_gap is None:
            self._first_gap = gap
        if gap > GAP_GROWTH * self._first_gap + GAP_MARGIN:
            raise self.engine.servers[0].error(
                f"its log-probabilities are {gap:.3g} nats per token away from the trainer's, with the first "
                f"weights {self._first_gap:.3g}: its weights stay behind"
            )

    def _log_probs_at(
        self, prompts: TokenRows, responses: TokenRows, temperature: float
    ) -> list[list[float]]:
        with torch.no_grad(), compute_type(self.config, self.processes.device.type):
            rows = token_log_probs(self.weights.model, prompts, responses, temperature)
        return [row.tolist() for row in rows]

    def _server_settings(self, model: Path) -> ServerSettings:
        config, device = self.config, self.processes.device
        share = None
        if device.type == "cuda":
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(device)
            trained = sum(local_part(parameter).numel() for parameter in self.weights.parameters)
            least = server_bytes(self._num_parameters, str(config.dtype))
            to_come = MOMENT_BYTES[config.method] * trained
            if is_sharded(self.weights.model):
                to_come += weight_bytes(self._num_parameters, str(config.dtype))  # while the check runs
            elif config.method == "adamw" and config.dtype == "bfloat16":
                to_come += 2 * trained  # autocast's copies, while the check runs
            share = server_share(free, total, to_come, least)
        return ServerSettings(
            model,
            str(config.dtype),
            config.max_length,
            memory_share=share,
            gpu=device.index or 0,
            threads=max(1, num_cores() - 1),  # the server's own loop spins on one
            lora_rank=config.lora_rank or 0,
            trust_remote_code=config.trust_remote_code,
        )


def server_share(free_bytes: float, total_bytes: float, to_come_bytes: float, least_bytes: float) -> float:
    """Return the share of a GPU's memory for a server that samples while the trainer's passes rest.

    Args:
        free_bytes: while the trainer has its weights on the GPU.
        to_come_bytes: what the trainer will keep there besides.
        least_bytes: what the server takes at least.

    Raises:
        ValueError: less is left.
    """
    left_bytes = free_bytes - to_come_bytes - (1 - USABLE_SHARE) * total_bytes
    if left_bytes < least_bytes:
        raise ValueError(
            f"--rollout_engine vllm: the trainer leaves {gigabytes(max(0.0, left_bytes))} of the GPU for a "
            f"server beside it, which takes {gigabytes(least_bytes)} at least: start one on another GPU "
            "(--vllm_url), or train with --lora_rank 32"
        )
    return left_bytes / total_bytes


def _close(parts: list, process: int) -> None:
    """Close all parts; not when a fork of the process ends."""
    if os.getpid() == process:
        for close in parts:
            close()
