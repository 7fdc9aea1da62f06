"""The configurations of models that are planned without the hub: `auto` chooses among some of them."""

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from gspo.policy.model_cache import EMBEDDED_NAME


def _qwen(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **others: Any) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",  # of its files
        **others,
    }


# On a GPU, largest first.
AUTO_MODELS = {
    "Qwen/Qwen2.5-7B-Instruct": _qwen(3584, 18944, 28, 28, 4, vocab_size=152_064, tie_word_embeddings=False),
    "Qwen/Qwen2.5-3B-Instruct": _qwen(2048, 11008, 36, 16, 2),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen(1536, 8960, 28, 12, 2),
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen(896, 4864, 24, 14, 2),
}
# With these, a plan for GPUs that are elsewhere needs no hub either.
LARGER_MODELS = {
    "Qwen/Qwen2.5-32B-Instruct": _qwen(5120, 27648, 64, 40, 8, vocab_size=152_064, tie_word_embeddings=False),
    "Qwen/Qwen2.5-14B-Instruct": _qwen(5120, 13824, 48, 40, 8, vocab_size=152_064, tie_word_embeddings=False),
}

# The embedded model's own configuration is in the GGUF file, which is slow to open.
EMBEDDED: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def is_known(name: str) -> bool:
    """Return whether known_config() has this model."""
    return name in (EMBEDDED_NAME, *LARGER_MODELS, *AUTO_MODELS)


def known_config(name: str) -> PreTrainedConfig:
    """The configuration of such a model or of the embedded one, as far as shapes depend on it."""
    if name == EMBEDDED_NAME:
        return LlamaConfig(**EMBEDDED)
    return Qwen2Config(**(LARGER_MODELS | AUTO_MODELS)[name])
