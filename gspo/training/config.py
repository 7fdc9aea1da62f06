"""GSPOConfig: every setting of a run, and the presets of the algorithms.

The command line is made from these fields, and the copy in the run folder is the one in use.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import get_args, get_type_hints

import torch


@dataclass(frozen=True)
class Preset:
    """An algorithm: its kind of ratio, what one clip decision covers, and the clip ranges tuned for it."""

    ratio: str
    clip_unit: str
    left_clip_range: float
    right_clip_range: float


# Clip ranges of section 5.1: a sequence ratio is a mean over tokens and moves a thousand times less than a
# token ratio does.
PRESETS = {
    "gspo": Preset("sequence ratio s = exp(mean of its tokens' log-ratios)", "response", 3e-4, 4e-4),
    "gspo_token": Preset("sequence ratio s, with a gradient per token", "response", 3e-4, 4e-4),
    "grpo": Preset("token ratio w = pi / pi_old", "token", 0.2, 0.27),
}


# Whole numbers stay below this: more is a slip of the hand, and would end deep in a library.
INTEGER_LIMIT = 2**31
# What float32 still tells from infinity, and logits divided by it from NaN.
FLOAT_LIMIT, LOWEST_TEMPERATURE = 1e30, 1e-3
# Parameters under which bfloat16 does not pay on a CPU: its matrices are too small for the casts around them.
SMALL_MODEL = 20e6


def flag(default, group: str, help: str, choices: Sequence[str] | None = None):
    """A configuration field, which is also a command-line flag."""
    return field(default=default, metadata={"group": group, "help": help, "choices": choices})


@dataclass
class GSPOConfig:
    """Every setting of a run; train_gspo.py makes its flags from these fields.

    None means "decided from the rest": resolve() fills it in. ValueError for a value that cannot work.
    """

    model_name: str = flag("auto", "model", "hub id, folder, smollm2-135m, tiny, tiny-moe; auto: by GPU")
    dtype: str = flag("auto", "model", "compute type over float32 weights", ("auto", "float32", "bfloat16"))
    trust_remote_code: bool = flag(False, "model", "run code that comes with the model; it can do anything")
    device: str | None = flag(None, "model", "default: cuda where there is one", ("cuda", "cpu"))
    gradient_checkpointing: bool = flag(False, "model", "recompute activations in backward: less memory")

    dataset: str = flag("mixed", "data", "mixed, math, code, reasoning, gsm8k, sort, or file")
    dataset_path: str | None = flag(None, "data", "jsonl in the format of GSM8K, HumanEval or MBPP")
    difficulty: str = flag("auto", "data", "of generated problems", ("auto", "easy", "medium", "hard"))
    code_reward: str = flag(
        "all", "data", "of code: 1 only if all tests pass, or the fraction that does", ("all", "fraction")
    )
    num_train_samples: int = flag(100, "data", "training problems")
    num_eval_samples: int = flag(50, "data", "held-out problems, never shared with training")

    algorithm: str = flag("gspo", "objective", "a whole preset: ratio and clip ranges", tuple(PRESETS))
    left_clip_range: float | None = flag(None, "objective", "clip below 1 - this (default: the algorithm's)")
    right_clip_range: float | None = flag(None, "objective", "clip above 1 + this (default: the algorithm's)")
    kl_coef: float = flag(0.0, "objective", "weight of a KL term to the starting model; the paper has none")

    num_epochs: int = flag(3, "training", "passes over the training problems")
    batch_size: int = flag(4, "training", "queries a rollout batch")
    mini_batch_size: int = flag(1, "training", "queries an optimizer update; must divide batch_size")
    group_size: int = flag(4, "training", "responses a query")
    update_frequency: int = flag(1, "training", "K: pi_old is refreshed every K rollout batches")
    learning_rate: float | None = flag(None, "training", "AdamW's (default 1e-6; 1e-5 for models under 0.5B)")
    warmup_steps: int = flag(0, "training", "optimizer updates of linear warm-up")
    weight_decay: float = flag(0.0, "training", "AdamW's decoupled weight decay")
    max_grad_norm: float = flag(1.0, "training", "gradient norm is clipped to this")
    micro_batch_tokens: int = flag(4096, "training", "tokens of a forward pass; changes memory, not results")
    seed: int = flag(0, "training", "of data, order and sampling")

    max_length: int = flag(512, "sampling", "prompt + response tokens")
    max_new_tokens: int | None = flag(None, "sampling", "response tokens (default: by data set)")
    temperature: float = flag(1.0, "sampling", "of sampling, and of scoring with it")
    rollout_engine: str = flag("transformers", "sampling", "what samples", ("transformers", "vllm"))

    output_dir: str = flag("gspo_outputs", "run", "run folders are made in it")
    run_name: str | None = flag(None, "run", "the run folder's name (default: model, algorithm and time)")
    eval_frequency: int = flag(25, "run", "evaluate every so many rollout batches; 0: only before and after")
    save_frequency: int = flag(25, "run", "checkpoint every so many rollout batches; 0: only at the end")
    resume: str | None = flag(None, "run", "continue from a run or checkpoint folder, or 'latest'")
    use_wandb: bool = flag(False, "run", "log to wandb as well (WANDB_MODE=offline works)")
    wandb_project: str = flag("gspo", "run", "wandb project")
    dry_run: bool = flag(False, "run", "print the resolved configuration and objective; load no weights")

    def __post_init__(self):
        for name, hint in get_type_hints(type(self)).items():
            if isinstance(getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(getattr(self, name)))
            value, kinds = getattr(self, name), get_args(hint) or (hint,)
            numbers_too = {int: Integral, float: Real}
            fits = isinstance(value, tuple(numbers_too.get(kind, kind) for kind in kinds))
            if not fits or (isinstance(value, bool) and bool not in kinds):
                expected = " or ".join(kind.__name__.replace("NoneType", "null") for kind in kinds)
                raise ValueError(f"--{name} must be {expected}, got {value!r}")
            if isinstance(value, Integral) and abs(value) >= INTEGER_LIMIT:
                raise ValueError(f"--{name} must be below {INTEGER_LIMIT}, got {value}")
            if isinstance(value, str) and value.encode(errors="ignore").decode() != value:
                raise ValueError(f"--{name} is no text in UTF-8: {value!r}")
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise ValueError(f"--{f.name} {value}: choose one of {', '.join(choices)}")
        at_least = {"num_train_samples": 1, "num_eval_samples": 1, "num_epochs": 1, "batch_size": 1}
        at_least |= {"mini_batch_size": 1, "group_size": 2, "update_frequency": 1, "max_length": 2}
        at_least |= {"max_new_tokens": 1, "micro_batch_tokens": 1, "eval_frequency": 0, "save_frequency": 0}
        at_least |= {"warmup_steps": 0, "weight_decay": 0, "kl_coef": 0, "seed": 0}
        for name, lowest in at_least.items():
            if getattr(self, name) is not None and not getattr(self, name) >= lowest:
                raise ValueError(f"--{name} must be at least {lowest}, got {getattr(self, name)}")
        for name in ("weight_decay", "kl_coef"):
            if getattr(self, name) >= FLOAT_LIMIT:
                raise ValueError(f"--{name} must be finite, got {getattr(self, name)}")
        for name in ("left_clip_range", "right_clip_range", "learning_rate", "temperature", "max_grad_norm"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < FLOAT_LIMIT:
                raise ValueError(f"--{name} must be positive and finite, got {getattr(self, name)}")
        if self.temperature < LOWEST_TEMPERATURE:
            raise ValueError(f"--temperature must be at least {LOWEST_TEMPERATURE}, got {self.temperature}")
        if self.batch_size % self.mini_batch_size:
            raise ValueError(
                f"--mini_batch_size {self.mini_batch_size} does not divide --batch_size {self.batch_size}: "
                "every optimizer update takes the same number of queries"
            )
        if self.rollout_engine == "vllm":
            raise ValueError("--rollout_engine vllm is not available yet; use transformers")

    def resolve(self, num_parameters: int) -> "GSPOConfig":
        """A copy in which every None that depends on the algorithm, model size or device is decided."""
        preset = PRESETS[self.algorithm]
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "--device cuda: torch finds no GPU here; leave the flag out, or give --device cpu"
            )
        return replace(
            self,
            left_clip_range=self.left_clip_range or preset.left_clip_range,
            right_clip_range=self.right_clip_range or preset.right_clip_range,
            learning_rate=self.learning_rate or (1e-5 if num_parameters < 0.5e9 else 1e-6),
            max_new_tokens=self.max_new_tokens or self.max_length,
            device=device,
            dtype=choose_dtype(device, num_parameters)[0] if self.dtype == "auto" else self.dtype,
        )

    @property
    def updates_per_rollout_batch(self) -> int:
        return self.batch_size // self.mini_batch_size

    def describe_objective(self) -> str:
        """The resolved objective in a paragraph: what is maximised, and what can clip."""
        preset = PRESETS[self.algorithm]
        updates = self.updates_per_rollout_batch
        kl = f", plus {self.kl_coef} x KL to the starting model" if self.kl_coef else ", no KL term"
        if updates * self.update_frequency == 1:
            clipping = (
                "With one optimizer update per rollout batch the ratio is 1 by construction: nothing can "
                "clip, and every algorithm here is the same. Lower --mini_batch_size for more updates."
            )
        else:
            clipping = (
                f"The first update sees a ratio of exactly 1 and cannot clip; the other "
                f"{updates * self.update_frequency - 1} before pi_old is refreshed can."
            )
        return (
            f"{self.algorithm}: {preset.ratio}, clipped to [1 - {self.left_clip_range:g}, "
            f"1 + {self.right_clip_range:g}] per {preset.clip_unit}; mean over each response's tokens, "
            f"then over responses{kl}. {self.batch_size} queries x {self.group_size} responses a rollout "
            f"batch, {updates} optimizer update{'s' * (updates != 1)} of {self.mini_batch_size} x "
            f"{self.group_size} responses each; pi_old is refreshed every {self.update_frequency} rollout "
            f"batch{'es' * (self.update_frequency != 1)}. {clipping}"
        )


def choose_dtype(device: str, num_parameters: int) -> tuple[str, str]:
    """The compute type that --dtype auto stands for, and why."""
    if device == "cuda":
        return "bfloat16", "the GPU multiplies it many times faster"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")):
        return "float32", "this CPU has no bfloat16 multiplication"
    if num_parameters < SMALL_MODEL:
        return "float32", "for a model this small, casting costs more than bfloat16 saves"
    return "bfloat16", "this CPU multiplies it about twice as fast"
