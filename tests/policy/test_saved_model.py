"""A saved model means the same here and under transformers 4."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer, Qwen2Tokenizer

from gspo.policy.model_loader import load_model
from gspo.policy.saved_model import load_weights, save_model, save_tokenizer
from gspo.policy.tiny_models import new_tiny_model
from support.models import COMMON

LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16}  # fmt: skip
# Random models by what is peculiar about their configuration.
MODELS = {
    "llama 3.1": ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA_3}),
    "yarn": ("qwen2", {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}),
    "experts": ("qwen2_moe", {"rope_theta": 1e6, "num_experts": 4, "num_experts_per_tok": 2,
                              "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}),
    "by layer": ("gemma3_text", {"rope_theta": 1e6, "rope_local_base_freq": 5e3, "sliding_window": 5,
                                 "num_hidden_layers": 6,
                                 "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "phi 3": ("phi3", {"rope_theta": 5e5, "original_max_position_embeddings": 16, "rope_scaling":
                       {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}}),
    "part rotary": ("stablelm", {"rope_theta": 5e5, "partial_rotary_factor": 0.5}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}  # fmt: skip
TEXTS = ["What is 12 + 3?", "  a\n\tb \u00e9 7", "<|im_start|>user\nHi<|im_end|>"]
IDS = torch.arange(3, 51)[None]
UNDER_TRANSFORMERS_4 = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
assert __version__.startswith("4.57"), __version__
for folder in sorted(Path(sys.argv[1]).iterdir()):
    expected = torch.load(folder / "expected.pt")
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.no_grad():
        far = (model(torch.arange(3, 51)[None]).logits - expected["logits"]).abs().max().item()
    assert far <= 1e-5 * expected["logits"].abs().max().item(), (folder, far)
    for name, value in expected["config"].items():
        assert getattr(model.config, name) == value, (folder, name)
    if "ids" in expected:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoded = [dict(tokenizer(text)) for text in expected["texts"]]
        assert encoded == expected["ids"], folder
        assert [tokenizer.decode(row["input_ids"]) for row in encoded] == expected["decoded"], folder
        assert tokenizer.all_special_tokens == expected["special"], folder
    print(folder.name, "is the same")
"""


def random_model(model_type, settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **COMMON | deepcopy(settings))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model


def byte_level_tokenizer(tokenizer_class, **special):
    """A tokenizer of bytes, of a class that transformers 4 and 5 do not share."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return tokenizer_class(vocab={name: index for index, name in enumerate(names)}, merges=[], **special)


def tokenizers():
    special = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    return {
        "yarn": byte_level_tokenizer(Qwen2Tokenizer, **special),
        "gpt2": byte_level_tokenizer(GPT2Tokenizer),
    }


def encodings(tokenizer):
    ids = [dict(tokenizer(text)) for text in TEXTS]
    decoded = [tokenizer.decode(row["input_ids"]) for row in ids]
    return {"texts": TEXTS, "ids": ids, "decoded": decoded, "special": tokenizer.all_special_tokens}


@pytest.mark.parametrize("name", MODELS)
def test_settings_have_both_names_and_mean_the_same_here(tmp_path, name):
    model = random_model(*MODELS[name])
    save_model(model, tmp_path)
    saved, given = json.loads((tmp_path / "config.json").read_text()), MODELS[name][1]
    assert saved["dtype"] == saved["torch_dtype"] == "float32"
    for setting in ("rope_theta", "rope_local_base_freq", "partial_rotary_factor", "num_experts"):
        assert saved.get(setting) == given.get(setting) or setting not in given
    scaling = given.get("rope_scaling", {})
    assert saved.get("rope_scaling", {}).items() >= scaling.items()
    assert "rope_theta" not in saved.get("rope_scaling", {})
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert getattr(again.config, "rope_parameters", None) == getattr(model.config, "rope_parameters", None)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("name", ["yarn", "gpt2"])
def test_a_tokenizer_is_the_same_when_loaded(tmp_path, name):
    tokenizer = tokenizers()[name]
    save_tokenizer(tokenizer, tmp_path)
    assert encodings(AutoTokenizer.from_pretrained(tmp_path)) == encodings(tokenizer)


def test_auto_is_the_type_of_the_files(tmp_path):
    model, tokenizer = load_model("tiny", device="cpu")
    save_model(model, tmp_path, torch.bfloat16)
    save_tokenizer(tokenizer, tmp_path)
    as_saved = load_model(str(tmp_path), dtype="auto", device="cpu")[0]
    as_trained = load_model(str(tmp_path), device="cpu")[0]
    weights = zip(model.parameters(), as_saved.parameters(), as_trained.parameters(), strict=True)
    for given, bfloat16, float32 in weights:
        assert torch.equal(bfloat16, given.bfloat16()) and bfloat16.dtype == torch.bfloat16
        assert torch.equal(float32, bfloat16.float()) and float32.dtype == torch.float32
    assert load_model("tiny", dtype="auto", device="cpu")[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_weights_are_loaded_into_the_same_parameters(tmp_path, name):
    source, target = load_model(name, device="cpu")[0], new_tiny_model(name)
    save_model(source, tmp_path)
    parameters = list(target.parameters())
    load_weights(target, tmp_path)
    assert all(now is before for now, before in zip(target.parameters(), parameters, strict=True))
    with torch.no_grad():
        assert torch.equal(target(IDS).logits, source(IDS).logits)
    assert target.get_input_embeddings().weight is target.get_output_embeddings().weight
    if sys.platform == "linux":  # a mapped file would keep its room on the disk after it is removed
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory):
    """A folder with transformers 4.57, to stand before the packages of this environment."""
    folder = tmp_path_factory.mktemp("transformers_4")
    needed = ["transformers==4.57.*", "huggingface_hub<1", "tokenizers<0.23"]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries", "0"]
    command = [*install, "--target", folder, *needed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        pytest.skip(f"pip cannot install transformers 4.57: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.slow
def test_saved_models_are_the_same_under_transformers_4(tmp_path, transformers_4):
    own_tokenizers = tokenizers()
    models = {name: (random_model(*settings), own_tokenizers.get(name)) for name, settings in MODELS.items()}
    models |= {name: load_model(name, device="cpu") for name in ("tiny", "tiny-moe", "smollm2-135m")}
    for name, (model, tokenizer) in models.items():
        save_model(model, tmp_path / name)
        with torch.no_grad():
            expected = {"logits": model(IDS).logits, "config": same_in_both(model.config)}
        if tokenizer:
            save_tokenizer(tokenizer, tmp_path / name)
            expected |= encodings(tokenizer)
        torch.save(expected, tmp_path / name / "expected.pt")
    environment = os.environ | {"PYTHONPATH": str(transformers_4), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", UNDER_TRANSFORMERS_4, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is the same") == len(models)


def same_in_both(config):
    """The settings that tools read from a configuration."""
    names = ("architectures", "tie_word_embeddings", "vocab_size", "hidden_size", "eos_token_id")
    return {name: getattr(config, name) for name in names}
