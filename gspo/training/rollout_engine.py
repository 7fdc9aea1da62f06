"""The engine that samples for a trainer: the policy itself, or vLLM servers that get its weights.

Servers get the weights through files: in shared memory if they are on this machine, else in the directory of
the runs (--output_dir), which they must share. A new version is loaded before anything is sampled from the
weights that it is of, and compared with the trainer.
"""

import os
import secrets
import shutil
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from gspo.policy.log_probs import TokenRows, token_log_probs
from gspo.policy.rollout import MAX_ROWS, Rollout, Sampling, TransformersEngine
from gspo.policy.saved_model import save_tokenizer
from gspo.policy.vllm_engine import VLLMEngine, compare
from gspo.policy.vllm_process import ServerSettings, VLLMProcess
from gspo.policy.vllm_server import EngineError
from gspo.training.config import GSPOConfig
from gspo.training.forward_passes import compute_type
from gspo.training.hardware import USABLE_SHARE, num_cores, num_processes
from gspo.training.mismatch import mismatch
from gspo.training.processes import Processes
from gspo.training.rollout_batch import Sample
from gspo.training.trained_weights import TrainedWeights
from gspo.training.whole_folders import saving

SHARED_MEMORY = Path("/dev/shm")
# Folders of weights are named by this and the process that writes them.
PREFIX = "gspo-weights-"
# Bytes of AdamW's moments per trained parameter, by way of training. They are made in the first update, when
# a server on the same GPU has its memory already.
MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2.1, "lora": 8}


def rollout_engine(
    config: GSPOConfig, weights: TrainedWeights, tokenizer: Any, processes: Processes
) -> "TransformersEngine | ServerRollouts":
    """Make the engine that a resolved configuration names; collective.

    Raises:
        ValueError: the model cannot be sampled from, or vLLM is not installed.
        EngineError: a server cannot be used.
    """
    if config.rollout_engine == "vllm":
        return ServerRollouts(config, weights, tokenizer, processes)
    return TransformersEngine(weights.model, tokenizer, config.rollout_rows or MAX_ROWS)


class ServerRollouts:
    """Samples with vLLM servers: those of --vllm_url, or one that each process starts beside itself.

    The methods but generate() and log_probs() are collective. A server of the run's own ends with close(), or
    with this process.
    """

    def __init__(
        self, config: GSPOConfig, weights: TrainedWeights, tokenizer: Any, processes: Processes
    ) -> None:
        self.config, self.weights, self.processes = config, weights, processes
        urls = config.vllm_urls
        num_parameters = sum(parameter.numel() for parameter in weights.model.parameters())
        num_bytes = num_parameters * getattr(torch, str(config.dtype)).itemsize
        self.folder = processes.on_main(_weights_folder, urls, config.output_dir, num_bytes)
        self._run = self.folder.name.removeprefix(PREFIX)  # other runs may use the servers before and after
        self._own: VLLMProcess | None = None
        # At the latest when this process ends.
        self.close = weakref.finalize(self, (opened := ExitStack()).close)
        if processes.is_main:
            opened.callback(shutil.rmtree, self.folder, ignore_errors=True)
        try:
            if not urls:
                processes.on_main(self._write_model, tokenizer)
                self._own = processes.together(VLLMProcess, self._server_settings())
                opened.callback(self._own.stop)
                urls = [self._own.url]
            self.engine: VLLMEngine = processes.together(
                lambda: VLLMEngine(
                    urls,
                    weights.model,
                    tokenizer,
                    compute_type=str(config.dtype),
                    adapters=bool(config.lora_rank),
                    ended=self._own.ended if self._own else lambda: None,
                )
            )
            if self._own:  # it has what it was started with
                processes.on_main(shutil.rmtree, self.folder / "model")
        except BaseException:
            self.close()
            raise
        # Servers that all processes use are given the weights by the main one.
        self._loads = self._own is not None or processes.is_main
        self._version = ""
        self._asleep = False

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

        Args:
            version: names the weights among all that this trainer will have. Those that the servers have
                already are not given again.

        Raises:
            EngineError: a server did not take them, or samples from others.
            CannotSave: they cannot be written.
        """
        if self._asleep:
            torch.cuda.empty_cache()
            self.processes.together(self.engine.wake_up)
            self._asleep = False
        if version == self._version:
            return
        folder = self.folder / version
        name = f"{self._run}-{version}"
        self.processes.on_main(self._write_update, folder)
        if self._loads:
            self.processes.together(self._load, folder, name)
        else:
            self.processes.together(self.engine.expect, folder, name)
        self._version = version

    def rest(self) -> None:
        """Let a server on the trainer's own GPU give its memory up, until the next sync()."""
        if self._own is not None and self.processes.device.type == "cuda":
            self.processes.together(self.engine.sleep)
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
        _, cause = compare(sampled, expected, expected, self.engine.tolerance)
        if cause:
            urls = ", ".join(server.url for server in self.engine.servers)
            raise EngineError(f"vLLM server {urls}: {cause}")
        return mismatch(compared, self.config.mismatch_mask)

    # ---- on the main process

    def _write_model(self, tokenizer: Any) -> None:
        """Write what a server is started with: the model as it is now, and the tokenizer."""
        folder = self.folder / "model"
        with saving(folder):
            folder.mkdir()
            self.weights.save_model(folder, getattr(torch, str(self.config.dtype)))
            save_tokenizer(tokenizer, folder)

    def _write_update(self, folder: Path) -> None:
        # The older ones first, so that there is room. Nothing is sampled from them any more.
        for older in self.folder.iterdir():
            shutil.rmtree(older)
        with saving(folder):
            folder.mkdir()
            self.weights.save_update(folder, self.engine.dtype)

    # ---- in each process

    def _load(self, folder: Path, name: str) -> None:
        self.engine.sync(folder, name)
        self.engine.check(self._log_probs_at)

    def _log_probs_at(
        self, prompts: TokenRows, responses: TokenRows, temperature: float
    ) -> list[list[float]]:
        with torch.no_grad(), compute_type(self.config, self.processes.device.type):
            rows = token_log_probs(self.weights.model, prompts, responses, temperature)
        return [row.tolist() for row in rows]

    def _server_settings(self) -> ServerSettings:
        config, device = self.config, self.processes.device
        share = None
        if device.type == "cuda":
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(device)
            parameters = sum(parameter.numel() for parameter in self.weights.parameters)
            share = server_share(free, total, MOMENT_BYTES[config.method] * parameters)
        return ServerSettings(
            self.folder / "model",
            str(config.dtype),
            config.max_length,
            memory_share=share,
            gpu=device.index or 0,
            threads=max(1, num_cores() - 1),  # the server's own loop spins on one
            lora_rank=config.lora_rank or 0,
            trust_remote_code=config.trust_remote_code,
        )


def server_share(free_bytes: float, total_bytes: float, to_come_bytes: float) -> float:
    """Return the share of a GPU's memory for a server that samples while the trainer's passes rest.

    Args:
        free_bytes: while the trainer has its weights on the GPU.
        to_come_bytes: what the trainer will keep there besides.

    Raises:
        ValueError: next to nothing is left.
    """
    share = (free_bytes - to_come_bytes) / total_bytes - (1 - USABLE_SHARE)
    if share < 0.1:
        raise ValueError(
            f"--rollout_engine vllm: the trainer leaves {max(0.0, share):.0%} of the GPU's memory for a "
            "server beside it: start one on another GPU (--vllm_url), or train with --lora_rank 32"
        )
    return share


def _weights_folder(urls: Sequence[str], output_dir: str, num_bytes: int) -> Path:
    """Make the folder for weights of so many bytes. Those of processes that are gone are removed."""
    parent = Path(output_dir).absolute()
    on_one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes())) == num_processes()
    if on_one_machine and all(map(_is_local, urls)) and os.access(SHARED_MEMORY, os.W_OK):
        for folder in SHARED_MEMORY.glob(f"{PREFIX}*"):
            if not _is_running(folder.name.removeprefix(PREFIX).partition("-")[0]):
                shutil.rmtree(folder, ignore_errors=True)
        if shutil.disk_usage(SHARED_MEMORY).free > 1.1 * num_bytes:
            parent = SHARED_MEMORY
    folder = parent / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    with saving(folder):
        folder.mkdir(parents=True)
    return folder


def _is_local(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # another user's
        return True
    return True
