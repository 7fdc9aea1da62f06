"""A vLLM server that the run starts itself, beside the trainer, and ends with itself.

vLLM's pinned packages and the toolkit's exclude each other, so it has an environment of its own, which
`python setup.py --with_vllm` makes.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gspo.policy import vllm_guard
from gspo.policy.model_cache import vllm_environment

# The Python of an environment with vLLM, if it is not the one that setup.py makes.
PYTHON_VARIABLE = "GSPO_VLLM_PYTHON"
# GB of main memory for keys and values on a CPU.
CPU_CACHE_GB = 2
# The least memory for keys and values, and for all else that a server has besides its weights, in bytes.
LEAST_CACHE_BYTES = 2e9
# Tokens of the longest response that VLLMEngine.check() asks for, with its prompt.
LEAST_LENGTH = 64
# The ranks of LoRA that vLLM has memory layouts for.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# By these variables a launcher tells its processes of one another. They would mislead vLLM's.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
                      "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip


@dataclass(frozen=True)
class ServerSettings:
    """How a server is started.

    folder: the model and its tokenizer.
    dtype: "float32" or "bfloat16".
    max_length: prompt plus response tokens.
    memory_share: the share of the GPU's memory that it may take; None on a CPU.
    gpu: number of the GPU, as torch counts them.
    threads: of a CPU.
    lora_rank: of the adapters that it will get; 0: it gets whole weights.
    """

    folder: Path
    dtype: str
    max_length: int
    memory_share: float | None = None
    gpu: int = 0
    threads: int = 1
    lora_rank: int = 0
    trust_remote_code: bool = False


def vllm_python() -> Path:
    """Return the Python that has vLLM.

    Raises:
        ValueError: there is none.
    """
    given = os.environ.get(PYTHON_VARIABLE)
    python = Path(given) if given else vllm_environment() / "bin" / "python"
    if not python.exists():
        advice = f"{PYTHON_VARIABLE} names no file" if given else "run python setup.py --with_vllm first"
        raise ValueError(
            f"--rollout_engine vllm: there is no {python}: {advice}, or give the --vllm_url of a server"
        )
    return python


def weight_bytes(num_parameters: int, dtype: str) -> int:
    """Return the size of a model's weights in a type, in bytes."""
    return num_parameters * (4 if dtype == "float32" else 2)


def server_bytes(num_parameters: int, dtype: str) -> float:
    """Return the least memory that a server of a model takes, in bytes."""
    return weight_bytes(num_parameters, dtype) + LEAST_CACHE_BYTES


class VLLMProcess:
    """A running server. It ends with stop(), or with this process, however that ends.

    Args:
        removed: a folder to remove when it ends.

    Raises:
        ValueError: vLLM is not installed.
    """

    def __init__(self, settings: ServerSettings, removed: Path) -> None:
        guard = [sys.executable, vllm_guard.__file__, str(removed)]
        command = [*guard, *server_command(vllm_python(), settings)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        handle, log = tempfile.mkstemp(prefix="gspo-vllm-", suffix=".log")
        self.log, self._log_stays = Path(log), False
        self._process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdin=subprocess.PIPE,
            stdout=handle,
            stderr=handle,
            env=server_variables(os.environ, settings),
            start_new_session=True,
        )
        os.close(handle)

    def ended(self) -> str | None:
        """Return why the server is no longer there; None if it is."""
        code = self._process.poll()
        if code is None:
            return None
        if code == 128 + signal.SIGKILL:
            return "it was killed (signal 9), perhaps by the system, because memory had run out"
        return f"it has ended with code {code}: {_first_error(self.log)}"

    def kept_log(self) -> Path:
        """Return the path of the server's log, and keep the file when the server ends."""
        self._log_stays = True
        return self.log

    def stop(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(2 * vllm_guard.PATIENCE_S)
        if not self._log_stays:
            self.log.unlink(missing_ok=True)


def server_command(python: Path, settings: ServerSettings) -> list[str]:
    """Return the command that starts a server, but for its port."""
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(settings.folder), "--served-model-name", "policy",
        "--host", "127.0.0.1",
        "--dtype", settings.dtype,
        "--max-model-len", str(max(settings.max_length, LEAST_LENGTH)),
        # Log-probabilities are those of softmax(logits / temperature).
        "--logprobs-mode", "processed_logprobs",
        # Nothing comes from the model's own generation config, such as a top-p.
        "--generation-config", "vllm",
        # Token ids in and out.
        "--enable-scale-out",
        "--worker-extension-cls", "gspo.policy.vllm_extension.PolicyWorker",
    ]  # fmt: skip
    if settings.memory_share is None:
        command += [
            "--enforce-eager", "--distributed-executor-backend", "uni",
            # A group shares whole blocks of its prompt, by default of 128 tokens; 32 is the least.
            "--block-size", "32",
            # With it, seeds end the server (vllm_extension.py). Without it, a prompt must fit one pass.
            "--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(2048, settings.max_length)),
        ]  # fmt: skip
    else:
        command += ["--gpu-memory-utilization", f"{settings.memory_share:.3f}", "--enable-sleep-mode"]
    if settings.lora_rank:
        rank = next((rank for rank in LORA_RANKS if rank >= settings.lora_rank), settings.lora_rank)
        command += ["--enable-lora", "--max-lora-rank", str(rank)]
    if settings.trust_remote_code:
        command.append("--trust-remote-code")
    return command


def server_variables(environment: Mapping[str, str], settings: ServerSettings) -> dict[str, str]:
    """Return the server's environment variables, made of this process's."""
    kept = {
        name: value
        for name, value in environment.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
    variables = {
        "PYTHONPATH": str(Path(__file__).parents[2]),  # for the worker extension
        "VLLM_SERVER_DEV_MODE": "1",  # opens the requests that load weights
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if settings.memory_share is None:
        # Compilation of the first requests would take 40 s.
        variables |= {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": str(settings.threads),
                      "VLLM_CPU_KVCACHE_SPACE": str(CPU_CACHE_GB)}  # fmt: skip
    else:
        visible = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        variables["CUDA_VISIBLE_DEVICES"] = visible[settings.gpu] if visible else str(settings.gpu)
    return kept | variables


def _first_error(log: Path) -> str:
    """Return the first error in a log, from which the others follow; without one, the last line."""
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if line.strip() and " WARNING " not in line]
    for line in lines:
        if error := re.search(r"\b\w*Error: .+", line):
            return error.group()[:300]
    return lines[-1][:300] if lines else "it has written nothing"
