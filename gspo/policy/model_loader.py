"""Load a model and its tokenizer by name: a hub id, a folder, `smollm2-135m`, `tiny`, `tiny-moe` or `auto`.

Every mistake that a user can make raises a ValueError, whose message is one line: what is wrong, why, and
what to do.
"""

import difflib
import os
import tempfile
from pathlib import Path
from typing import Any

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
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gspo import HUB_TIMEOUT_S
from gspo.policy.known_models import AUTO_MODELS, known_config
from gspo.policy.model_cache import EMBEDDED_NAME, converted_folder, gguf_path
from gspo.policy.saved_model import SHARDED_WEIGHTS
from gspo.policy.tiny_models import TINY_FOLDER, TINY_NAMES, new_tiny_model, tiny_config, tiny_tokenizer

BUILT_IN = ("auto", EMBEDDED_NAME, *TINY_NAMES)
KNOWN_HUB_IDS = (  # suggestions for a misspelt id, available without the hub
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
NOT_ON_HUB = {"Qwen/Qwen2.5-MoE-A2.7B-Instruct": "Qwen/Qwen1.5-MoE-A2.7B-Chat"}  # a common mistake
# Parts of the class names, in config.json, of models with a language-model head.
CAUSAL_CLASSES = ("CausalLM", "LMHeadModel", "ForConditionalGeneration")


def load_model(
    name: str,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in evaluation mode, with its tokenizer.

    Args:
        name: a hub id, a folder, or one of BUILT_IN. `auto` is the embedded model here; train_gspo.py takes a
            larger one where the plan of a run (gspo/training/plan.py) says that it fits the GPU.
        dtype: the type of the weights, a torch.dtype or its name; "auto" is the one that the model's files
            have. None means float32: an update at learning rate 1e-6 is smaller than the rounding of bfloat16
            weights.
        device: None means the GPU where there is one, else the CPU.
        trust_remote_code: whether code that comes with the model may be executed.

    Returns:
        The model and the tokenizer, which always has a pad token: its end token if it had none.

    Raises:
        ValueError: there is no such model, the hub cannot be reached, a licence is not accepted, files are
            damaged, or it is not a causal language model. The message is one line.
    """
    name = EMBEDDED_NAME if name == "auto" else name
    dtype = _torch_dtype(dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name in TINY_NAMES:
        model = new_tiny_model(name, load_file(TINY_FOLDER / f"{name}.safetensors"))
        if dtype != "auto":
            model.to(dtype)
        return model.to(device), tiny_tokenizer()
    source, local_only = _locate(name)
    _check_causal(name, _read_config(name, source, local_only, trust_remote_code))
    if (Path(source) / SHARDED_WEIGHTS).is_dir():
        raise ValueError(
            f"{name!r} is a checkpoint of several processes, each of which wrote a part: name the run's "
            "best_model or final_model, or give --resume"
        )
    access = {"local_files_only": local_only, "trust_remote_code": trust_remote_code}
    tokenizer = _tokenizer(source, **access)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **access
        )
    except Exception as error:  # a damaged file can raise any exception in transformers' parsers
        raise ValueError(_damaged_message(source, _first_line(error))) from None
    # transformers gives random values to weights that are missing or misshapen, and only warns.
    random_weights = sorted(info["missing_keys"]) + [key for key, *_ in info["mismatched_keys"]]
    if random_weights:
        raise ValueError(_damaged_message(source, f"no weights that fit {', '.join(random_weights[:3])}"))
    return model.to(device), tokenizer  # from_pretrained has set evaluation mode


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that load_model() returns, without the weights. Raises ValueError as it does."""
    name = EMBEDDED_NAME if name == "auto" else name
    if name in TINY_NAMES:
        return tiny_tokenizer()
    source, local_only = _locate(name)
    return _tokenizer(source, local_files_only=local_only, trust_remote_code=trust_remote_code)


def _tokenizer(source: str | Path, **access: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **access)
    except Exception as error:  # a damaged file can raise any exception in transformers' parsers
        raise ValueError(_damaged_message(source, _first_line(error))) from None
    # Without tokenizer files, transformers returns a tokenizer with an empty vocabulary.
    if tokenizer.eos_token is None or not tokenizer.encode("0", add_special_tokens=False):
        raise ValueError(_damaged_message(source, "no tokenizer with an end token"))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_config(name: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the configuration of a model, without its weights. For the models of `auto` it needs no hub.

    Raises:
        ValueError: the same as in load_model.
    """
    if name in AUTO_MODELS:
        return known_config(name)
    if name in ("auto", EMBEDDED_NAME):
        return known_config(EMBEDDED_NAME)
    if name in TINY_NAMES:
        return tiny_config(name)
    source, local_only = _locate(name)
    config = _read_config(name, source, local_only, trust_remote_code)
    _check_causal(name, config)
    return config


def count_parameters(config: PreTrainedConfig, trust_remote_code: bool = False) -> int:
    """Return the number of a model's parameters, from its configuration."""
    with torch.device("meta"):  # no memory for the weights
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).num_parameters()


# Hub ids and folders


def _locate(name: str) -> tuple[str | Path, bool]:
    """Find out where a model is.

    Returns:
        A folder or a hub id, and whether to use only files that are on this machine.
    """
    if name == EMBEDDED_NAME:
        return _embedded_folder(), True
    if Path(name).is_dir():
        if (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file():
            raise ValueError(
                f"folder {name!r} holds LoRA adapters without their model: name the folder best_model or "
                "final_model of the run, which has both in one model"
            )
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"folder {name!r} holds no model, it has no config.json: name a model's folder")
        return name, True
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(
            f"there is no folder {name!r}: name a model's folder, a hub id (owner/name) or "
            f"one of {', '.join(BUILT_IN)}"
        )
    return name, not _hub_has(name)


def _hub_has(name: str) -> bool:
    """Ask the hub for a model.

    Returns:
        True if the hub has it, False if the hub cannot be reached.

    Raises:
        ValueError: the hub does not have it, or does not give it to this user.
    """
    if name in NOT_ON_HUB:
        raise ValueError(f"the hub has no model {name!r}: did you mean {NOT_ON_HUB[name]}?")
    built_in = _closest(name, BUILT_IN)
    if "/" not in name and built_in:
        raise ValueError(f"unknown model {name!r}: did you mean {built_in}?")
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
    except ValueError as error:  # from the hub's library, for a name that cannot be an id
        raise ValueError(f"{name!r} is neither a folder nor a hub id ({_first_line(error)})") from None
    return True


def _read_config(
    name: str, source: str | Path, local_only: bool, trust_remote_code: bool
) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(
            source, local_files_only=local_only, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a damaged file can raise any exception in transformers' parsers
        if local_only and not Path(source).is_dir():
            raise ValueError(
                f"cannot load {name!r}{_suggestion(name)}: the model hub cannot be reached and its "
                "local cache lacks the files; connect to the network, or name a model's folder or "
                f"{EMBEDDED_NAME}"
            ) from None
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model {name!r} comes with code of its own, which is executed only with "
                "--trust_remote_code: read that code first, or name another model"
            ) from None
        raise ValueError(_damaged_message(source, _first_line(error))) from None


def _check_causal(name: str, config: PreTrainedConfig) -> None:
    """Raise a ValueError unless the model is a decoder with a language-model head."""
    architectures = getattr(config, "architectures", None) or []
    has_head = any(part in architecture for architecture in architectures for part in CAUSAL_CLASSES)
    brings_own_class = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    loads = brings_own_class or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if (architectures and not has_head) or not loads:
        kind = ", ".join(architectures) or config.model_type
        raise ValueError(
            f"model {name!r} is not a causal language model, it is {kind}: name a model whose "
            "config.json lists a ...ForCausalLM architecture"
        )


def _closest(name: str, known: tuple[str, ...]) -> str | None:
    """Return the known name most similar to this one, or None if none is similar."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def _suggestion(name: str) -> str:
    """Return ' (did you mean ...?)' for a name that is similar to a known hub id, else an empty string."""
    closest = _closest(name, KNOWN_HUB_IDS)
    if closest is None or name in KNOWN_HUB_IDS:
        return ""
    return f" (did you mean {closest}?)"


def _torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype or torch.float32
    if dtype not in names:
        raise ValueError(f"unknown dtype {dtype!r}: use one of {', '.join(names)}")
    return names[dtype]


def _damaged_message(source: str | Path, why: str) -> str:
    return (
        f"cannot load {source}, its files are damaged, incomplete or unknown to transformers ({why}): "
        "fetch them again, or name another model"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:;")


# The embedded model


def _embedded_folder() -> Path:
    """Return the folder of the converted embedded model. The first use converts it, in half a minute."""
    folder = converted_folder()
    if folder.is_dir():
        return folder
    if not gguf_path().is_file():
        raise ValueError(f"{EMBEDDED_NAME} is not installed, there is no {gguf_path()}: run python setup.py")
    print(f"Converting {EMBEDDED_NAME} once, about half a minute ...")
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        target = Path(temporary) / EMBEDDED_NAME
        source: dict[str, Any] = {
            "pretrained_model_name_or_path": gguf_path().parent,
            "gguf_file": gguf_path().name,
        }
        tokenizer = AutoTokenizer.from_pretrained(**source)
        # transformers' conversion from GGUF loses the first step of SmolLM2's pre-tokenizer, which makes a
        # token of each digit.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        # transformers 5.17 takes <|im_start|> for the end token and drops spaces in decoding; 5.23 does not.
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
        if not folder.is_dir():  # another process may have converted it meanwhile
            os.rename(target, folder)
    return folder
