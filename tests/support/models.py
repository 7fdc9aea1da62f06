"""Small random models of every family for which log-probabilities and sampling are tested."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 61
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": ("llama", COMMON),
    "qwen3": ("qwen3", COMMON),
    "qwen3_moe": ("qwen3_moe", {**COMMON, "num_experts": 4, "num_experts_per_tok": 2,
                                "moe_intermediate_size": 16}),
    "gpt2": ("gpt2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
                      "bos_token_id": 1, "eos_token_id": 2}),
    # a window shorter than the sequences, and logits that are capped after the output layer
    "gemma2": ("gemma2", {**COMMON, "sliding_window": 5, "final_logit_softcapping": 3.0,
                          "query_pre_attn_scalar": 8}),
    # positions with an offset, and a decoder inside the decoder
    "opt": ("opt", {"vocab_size": VOCABULARY, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48,
                    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
                    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    "mistral": ("mistral", {**COMMON, "sliding_window": 5}),
    # attention sinks, because of which its rows cannot be packed
    "gpt_oss": ("gpt_oss", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}),
    "gemma3": ("gemma3_text", {**COMMON, "sliding_window": 5, "query_pre_attn_scalar": 8}),
}  # fmt: skip


def make_model(family: str) -> PreTrainedModel:
    """Return a random model of the family, with large weights, so that errors change its logits visibly."""
    torch.manual_seed(0)
    model_type, settings = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model
