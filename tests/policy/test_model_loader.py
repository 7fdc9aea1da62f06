"""Loading models by name: built-in ones, folders, and the mistakes that users make, all without a network."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from data_loader import load_problems
from gspo.checks.warm_up_tiny import sampled_accuracy
from gspo.policy import model_loader
from gspo.policy.model_cache import converted_folder, gguf_path
from gspo.policy.model_loader import (
    TINY_FOLDER,
    count_parameters,
    load_model,
    model_config,
    tiny_tokenizer,
)

TINY = ["tiny", "tiny-moe"]
PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))


def one_line_error(name):
    """Return the message with which load_model refuses the name."""
    with pytest.raises(ValueError) as caught:
        load_model(name, device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def size_of(name):
    """Return the number of a model's parameters, without its weights."""
    return count_parameters(model_config(name))


@pytest.fixture
def folder(tmp_path):
    """Return a complete model folder, for a test to damage."""
    model, tokenizer = load_model("tiny", device="cpu")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", TINY)
def test_tiny_survives_a_round_trip_through_a_folder(name, tmp_path):
    model, tokenizer = load_model(name, device="cpu")
    assert not model.training and model.dtype == torch.float32
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokenizer_again = load_model(str(tmp_path), device="cpu")
    ids = torch.tensor([tokenizer.encode("3141592653589793=")])
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert tokenizer_again.encode(PRINTABLE) == tokenizer.encode(PRINTABLE)
    assert tokenizer_again.decode(tokenizer_again.encode(PRINTABLE)) == PRINTABLE


@pytest.mark.parametrize("name", TINY)
def test_tiny_ships_small_and_half_trained(name):
    assert (TINY_FOLDER / f"{name}.safetensors").stat().st_size < 1_000_000
    model, tokenizer = load_model(name, device="cpu")
    torch.manual_seed(0)
    assert 0.25 < sampled_accuracy(model, tokenizer, load_problems("sort", "eval", 256, seed=1)) < 0.47


def test_loading_tiny_draws_no_random_numbers():
    state = torch.random.get_rng_state()
    load_model("tiny", device="cpu")
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("text", [PRINTABLE, "", "  two  spaces ", "don't , stop . n't", "\\boxed{3}\n\n"])
def test_tiny_tokenizer_is_exact(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    message = [{"role": "user", "content": text}]
    assert tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == text


@pytest.mark.parametrize("name", TINY)
def test_parameters_are_counted_without_weights(name):
    assert size_of(name) == load_model(name, device="cpu")[0].num_parameters()


def test_dtype_is_a_torch_dtype_or_its_name():
    assert load_model("tiny", dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    assert load_model("tiny", dtype=torch.bfloat16, device="cpu")[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown dtype 'int3'"):
        load_model("tiny", dtype="int3")


def test_a_missing_pad_token_becomes_the_end_token(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    model, tokenizer = load_model(str(folder), device="cpu")
    assert tokenizer.pad_token == "<eos>"
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_folder_without_a_model(tmp_path):
    assert "no config.json" in one_line_error(str(tmp_path))
    assert "there is no folder" in one_line_error(str(tmp_path / "nowhere"))


def test_folder_with_weights_cut_short(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200_000])
    assert "damaged" in one_line_error(str(folder))


def test_folder_with_a_weight_missing_or_misshapen(folder):
    weights = load_file(folder / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "model.norm.weight" in one_line_error(str(folder))
    weights["model.norm.weight"] = norm[:3].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "model.norm.weight" in one_line_error(str(folder))


def test_code_that_comes_with_a_model_is_executed_only_when_asked(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": {
        "AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM",
    }}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        "class OwnConfig(Qwen3Config):\n    model_type = 'own'\n"
        "class OwnForCausalLM(Qwen3ForCausalLM):\n    config_class = OwnConfig\n"
    )
    assert "--trust_remote_code" in one_line_error(str(folder))
    assert not (tmp_path / "ran").exists()
    model, _ = load_model(str(folder), trust_remote_code=True)
    assert (
        (tmp_path / "modules").exists()
        and (tmp_path / "ran").exists()
        and type(model).__name__ == "OwnForCausalLM"
    )
    assert count_parameters(model_config(str(folder), True), True) == size_of("tiny")


def test_folder_without_a_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer" in one_line_error(str(folder))


@pytest.mark.parametrize(
    "config, evidence",
    [
        ("{", "not a valid JSON"),
        (json.dumps({"model_type": "no-such-type"}), "no-such-type"),
        (json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}), "not a causal language"),
        (json.dumps({"model_type": "t5"}), "not a causal language"),
    ],
)
def test_folder_with_another_kind_of_model(folder, config, evidence):
    (folder / "config.json").write_text(config)
    assert evidence in one_line_error(str(folder))


def test_misspelt_names_get_a_suggestion():
    assert "did you mean tiny?" in one_line_error("tinny")
    assert "did you mean smollm2-135m?" in one_line_error("smollm-135m")
    assert "did you mean Qwen/Qwen1.5-MoE-A2.7B-Chat?" in one_line_error("Qwen/Qwen2.5-MoE-A2.7B-Instruct")
    assert "neither a folder nor a hub id" in one_line_error("two words/and a space")


def test_embedded_model_not_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "run python setup.py" in one_line_error("smollm2-135m")


# A server on this machine in place of the hub


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does if it had gated repositories by meta-llama and no others."""

    def do_HEAD(self):
        gated = self.path.startswith("/meta-llama/")
        self.send_response(401 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(model_loader, "hf_hub_url", lambda name, file: f"{address}/{name}/{file}")
    yield server
    server.shutdown()
    server.server_close()


def test_gated_model_names_the_login(hub):
    assert "accept its licence" in one_line_error("meta-llama/Llama-3.1-8B-Instruct")


def test_model_not_on_the_hub(hub):
    assert "did you mean Qwen/Qwen2.5-7B-Instruct?" in one_line_error("Qwen/Qwen2.5-7B-Instuct")


def test_hub_out_of_reach(hub):
    hub.server_close()
    assert "the model hub cannot be reached" in one_line_error("Qwen/Qwen2.5-14B-Instruct")
    assert model_config("Qwen/Qwen2.5-7B-Instruct").num_hidden_layers == 28  # `auto` knows it
    with pytest.raises(ValueError, match="the model hub cannot be reached"):
        model_config("Qwen/Qwen2.5-14B-Instruct")


def test_hub_out_of_reach_but_model_in_its_cache(folder, tmp_path, hub, monkeypatch):
    hub.server_close()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert "its local cache lacks the files" in one_line_error("someone/model")
    repository = tmp_path / "cache" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    for path in list(folder.glob("*.*")):
        path.rename(repository / "snapshots" / ("0" * 40) / path.name)
    assert load_model("someone/model", device="cpu")[0].num_parameters() == size_of("tiny")


@pytest.mark.skipif(
    not (gguf_path().is_file() or converted_folder().is_dir()),
    reason="the embedded model is not installed: run python setup.py",
)
def test_embedded_model():
    model, tokenizer = load_model("smollm2-135m", device="cpu")
    assert model.num_parameters() == size_of("smollm2-135m")
    assert tokenizer.tokenize("12 + 345") == ["1", "2", "Ġ+", "Ġ", "3", "4", "5"]
    assert tokenizer.tokenize("a  1") == ["a", "ĠĠ", "1"]  # spaces before a digit, as SmolLM2 was trained
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    output = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(output[len(ids) :])
