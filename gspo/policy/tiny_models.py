"""`tiny` and `tiny-moe`: Qwen3 and Qwen3-MoE made from config, with a vocabulary of characters.

For tests, validation and small science. gspo/checks/warm_up_tiny.py makes their weights.
"""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

TINY_NAMES = ("tiny", "tiny-moe")
TINY_FOLDER = Path(__file__).parent / "weights"
TINY_VOCABULARY = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 127))]


def tiny_tokenizer():
    """One token per character: printable ASCII and newline, else <unk>. decode(encode(text)) == text."""
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


def tiny_config(name):
    """Configuration of `tiny` (Qwen3, 113k parameters) or `tiny-moe` (Qwen3-MoE, 222k, 2 of 8 experts)."""
    shared = dict(
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


def new_tiny_model(name, weights=None):
    """`tiny` or `tiny-moe`: random, or with weights, a state dict under the names save_pretrained writes."""
    config = tiny_config(name)
    if weights is None:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return model_class.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
