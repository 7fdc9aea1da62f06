"""`tiny` and `tiny-moe`: small Qwen3 and Qwen3-MoE models with a vocabulary of characters.

They serve tests, validation and small experiments. gspo/checks/warm_up_tiny.py has trained their weights.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

TINY_NAMES = ("tiny", "tiny-moe")
TINY_FOLDER = Path(__file__).parent / "weights"
TINY_VOCABULARY = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 127))]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character: printable ASCII, newline, and <unk> for all others.

    decode(encode(text)) == text for every text without unknown characters.
    """
    vocabulary = {token: index for index, token in enumerate(TINY_VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def tiny_config(name: str) -> Qwen3Config | Qwen3MoeConfig:
    """Return the configuration of a tiny model.

    `tiny` is a Qwen3 with 113k parameters; `tiny-moe` is a Qwen3-MoE with 222k, of whose 8 experts 2 are used
    per token.
    """
    shared: dict[str, Any] = dict(
        vocab_size=len(TINY_VOCABULARY),
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=TINY_VOCABULARY.index("<pad>"),
        eos_token_id=TINY_VOCABULARY.index("<eos>"),
    )
    if name == "tiny":
        return Qwen3Config(num_hidden_layers=2, intermediate_size=192, **shared)
    return Qwen3MoeConfig(
        num_hidden_layers=4,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        **shared,
    )


def new_tiny_model(name: str, weights: dict[str, torch.Tensor] | None = None) -> PreTrainedModel:
    """Build `tiny` or `tiny-moe` with random weights, or with the given ones.

    Args:
        weights: a state dict with the names that save_pretrained writes.
    """
    config = tiny_config(name)
    if weights is None:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return model_class.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
