"""A model's name to (model, tokenizer): hub id, folder, embedded (smollm2-135m), tiny, tiny-moe or auto.

Whatever a user can get wrong is a ValueError of one line: what, why, what to do.
"""

import difflib
import os
import tempfile
from pathlib import Path

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HTTPError, RepositoryNotFoundError
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
)

from gspo import HUB_TIMEOUT_S
from gspo.policy.model_cache import EMBEDDED_NAME, converted_folder, gguf_path
from gspo.policy.tiny_models import TINY_FOLDER, TINY_NAMES, new_tiny_model, tiny_config, tiny_tokenizer

BUILT_IN = ("auto", EMBEDDED_NAME, *TINY_NAMES)
AUTO_TABLE = (  # (GPU memory in GB at least, model), largest first
    (70, "Qwen/Qwen2.5-7B-Instruct"),
    (20, "Qwen/Qwen2.5-1.5B-Instruct"),
    (8, "Qwen/Qwen2.5-0.5B-Instruct"),
    (0, EMBEDDED_NAME),
)
KNOWN_HUB_IDS = (  # suggested for a misspelt id, also when the hub is out of reach
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen2.5-3B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen2.5-14B-Instruct",
    "Qwen/Qwen1.5-MoE-A2.7B-Chat",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-30B-A3B",
    "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Llama-3.2-1B-Instruct",
    "microsoft/DialoGPT-medium",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
)
NOT_ON_HUB = {"Qwen/Qwen2.5-MoE-A2.7B-Instruct": "Qwen/Qwen1.5-MoE-A2.7B-Chat"}  # a common slip
EMBEDDED_PARAMETERS = 134_515_008  # smollm2-135m; its configuration lies inside the GGUF file, slow to open


def auto_model_name(gpu_gb):
    """The model that `auto` stands for on a GPU of gpu_gb GB (1e9 bytes; 0 without a GPU)."""
    return next(name for least, name in AUTO_TABLE if gpu_gb >= least)


def resolve_model_name(name):
    """name -> (name, reason): `auto` becomes a model that suits this machine; other names stay as given."""
    if name != "auto":
        return name, "as given"
    if not torch.cuda.is_available():
        return auto_model_name(0), "no GPU found"
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return auto_model_name(gpu.total_memory / 1e9), f"{gpu.name} with {gpu.total_memory / 1e9:.0f} GB"


def load_model(name, dtype=None, device=None, trust_remote_code=False):
    """Load a causal language model in eval mode, with its tokenizer.

    dtype: torch.dtype or its name; None is float32, because an update at learning rate 1e-6 vanishes in bf16
    weights. device: None takes the GPU where there is one. The tokenizer always has a pad token (the end
    token if it had none). trust_remote_code: whether code that comes with the model may run. ValueError, one
    line: no such model, hub out of reach, licence not accepted, damaged files, not a causal language model.
    """
    name, _ = resolve_model_name(name)
    dtype = _dtype(dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name in TINY_NAMES:
        model = new_tiny_model(name, load_file(TINY_FOLDER / f"{name}.safetensors"))
        return model.to(device, dtype), tiny_tokenizer()
    source, local_only = _locate(name)
    _check_causal(name, _read_config(name, source, local_only, trust_remote_code))
    access = dict(local_files_only=local_only, trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **access)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **access
        )
    except Exception as error:  # transformers lets through whatever its parsers meet in a damaged file
        raise ValueError(_damaged(source, _first_line(error))) from None
    random_weights = sorted(info["missing_keys"]) + [key for key, *_ in info["mismatched_keys"]]
    if random_weights:  # transformers would only warn
        raise ValueError(_damaged(source, f"no weights that fit {', '.join(random_weights[:3])}"))
    if tokenizer.eos_token is None or not tokenizer.encode("0", add_special_tokens=False):
        # without tokenizer files transformers makes one up, with an empty vocabulary
        raise ValueError(_damaged(source, "no tokenizer with an end token"))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device), tokenizer  # from_pretrained has set eval mode


def count_parameters(name, trust_remote_code=False):
    """The number of parameters, tied weights once, from the configuration alone. Errors as load_model's."""
    name, _ = resolve_model_name(name)
    if name == EMBEDDED_NAME:
        return EMBEDDED_PARAMETERS
    tiny = name in TINY_NAMES
    config = tiny_config(name) if tiny else _read_config(name, *_locate(name), trust_remote_code)
    _check_causal(name, config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).num_parameters()


# Float32 weights, gradients and AdamW's two moments, before activations.
TRAINING_BYTES_PER_PARAMETER = 16


def check_memory(name, needed, gpu_bytes=None):
    """ValueError where training needs more bytes than the GPU has (gpu_bytes: by default this machine's)."""
    available = gpu_bytes or torch.cuda.get_device_properties(0).total_memory
    if needed > available:
        raise ValueError(
            f"--model_name {name}: training all of its weights needs {needed / 1e9:.0f} GB before "
            f"activations, this GPU has {available / 1e9:.0f} GB; take a smaller model, such as "
            "Qwen/Qwen2.5-1.5B-Instruct"
        )


# Hub ids and folders


def _locate(name):
    """name -> (folder or hub id, whether to look at files on this machine only)."""
    if name == EMBEDDED_NAME:
        return _embedded_folder(), True
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"folder {name!r} holds no model, it has no config.json: name a model's folder")
        return name, True
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(
            f"there is no folder {name!r}: name a model's folder, a hub id (owner/name) or "
            f"one of {', '.join(BUILT_IN)}"
        )
    return name, not _hub_has(name)


def _hub_has(name):
    """Whether the hub serves this model. False: the hub is out of reach, the local cache has to do."""
    if name in NOT_ON_HUB:
        raise ValueError(f"the hub has no model {name!r}: did you mean {NOT_ON_HUB[name]}?")
    if "/" not in name and _close(name, BUILT_IN):
        raise ValueError(f"unknown model {name!r}: did you mean {_close(name, BUILT_IN)}?")
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_TIMEOUT_S)
    except GatedRepoError:
        raise ValueError(
            f"model {name!r} is gated: accept its licence on its hub page, then run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"the hub has no model {name!r} (or it is private: run `hf auth login`){_suggestion(name)}"
        ) from None
    except EntryNotFoundError:
        raise ValueError(
            f"{name!r} on the hub is no transformers model, it has no config.json: name another repository"
        ) from None
    except (HTTPError, OSError):
        return False
    except ValueError as error:  # the hub library's verdict on an id that cannot be one
        raise ValueError(f"{name!r} is neither a folder nor a hub id ({_first_line(error)})") from None
    return True


def _read_config(name, source, local_only, trust_remote_code):
    try:
        return AutoConfig.from_pretrained(
            source, local_files_only=local_only, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # as above
        if local_only and not Path(source).is_dir():
            raise ValueError(
                f"cannot load {name!r}{_suggestion(name)}: the model hub cannot be reached and its "
                "local cache lacks the files; connect to the network, or name a model's folder or "
                f"{EMBEDDED_NAME}"
            ) from None
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model {name!r} comes with code of its own, which runs only with --trust_remote_code: read "
                "that code first, or name another model"
            ) from None
        raise ValueError(_damaged(source, _first_line(error))) from None


def _check_causal(name, config):
    """ValueError unless the weights belong to a decoder with a language-model head."""
    architectures = getattr(config, "architectures", None) or []
    headless = architectures and not any(
        kind in architecture
        for architecture in architectures
        for kind in ("CausalLM", "LMHeadModel", "ForConditionalGeneration")
    )
    own_class = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if headless or not (own_class or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        kind = ", ".join(architectures) or config.model_type
        raise ValueError(
            f"model {name!r} is not a causal language model, it is {kind}: name a model whose "
            "config.json lists a ...ForCausalLM architecture"
        )


def _close(name, known):
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def _suggestion(name):
    """' (did you mean ...?)' for an id close to a known one but not equal, else nothing."""
    close = _close(name, KNOWN_HUB_IDS)
    return f" (did you mean {close}?)" if close and name not in KNOWN_HUB_IDS else ""


def _dtype(dtype):
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype or torch.float32
    if dtype not in names:
        raise ValueError(f"unknown dtype {dtype!r}: use one of {', '.join(names)}")
    return names[dtype]


def _damaged(source, why):
    return (
        f"cannot load {source}, its files are damaged, incomplete or unknown to transformers ({why}): "
        "fetch them again, or name another model"
    )


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:;")


# The embedded model


def _embedded_folder():
    """The folder of the converted embedded model; converts it on first use (half a minute)."""
    folder = converted_folder()
    if folder.is_dir():
        return folder
    if not gguf_path().is_file():
        raise ValueError(f"{EMBEDDED_NAME} is not installed, there is no {gguf_path()}: run python setup.py")
    print(f"Converting {EMBEDDED_NAME} once, about half a minute ...")
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        target = Path(temporary) / EMBEDDED_NAME
        source = dict(pretrained_model_name_or_path=gguf_path().parent, gguf_file=gguf_path().name)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        # The conversion from GGUF loses the first step of SmolLM2's pre-tokenizer: each digit stands alone.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        # transformers 5.17 takes <|im_start|> for the end token and drops spaces in decoding, 5.23 does not.
        tokenizer.clean_up_tokenization_spaces = False
        tokenizer.add_special_tokens(
            {
                "bos_token": "<|im_start|>",
                "eos_token": "<|im_end|>",
                "pad_token": "<|im_end|>",
                "unk_token": "<|endoftext|>",
            }
        )
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        if not folder.is_dir():  # another process may have been faster
            os.rename(target, folder)
    return folder
