"""GSPOConfig: every setting of a run, with its bounds and its line of help.

The command line is made from these fields, and the copy in the run folder is the one in use. This module does
not import torch, so that --help and a mistyped flag are answered at once.
"""

import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from importlib.util import find_spec
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints

# Larger integers are slips of the hand, and would end in an error deep inside a library.
INTEGER_LIMIT = 2**31
# What --log_to may name, and the class of each; the package of each has its name.
TRACKERS = {"wandb": "Wandb", "tensorboard": "TensorBoard", "trackio": "Trackio"}
# Larger floats become infinite in float32.
FLOAT_LIMIT = 1e30
# Logits divided by less than this overflow float32.
LOWEST_TEMPERATURE = 1e-3


def flag(
    default: Any,
    group: str,
    help: str,
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    positive: bool = False,
    bare: Any = None,
) -> Any:
    """A field of the configuration, which is also a command-line flag.

    at_least: the lowest value allowed. positive: the value must be greater than 0. bare: what the flag means
    if it is given without a value.
    """
    bounds = {"choices": choices, "at_least": at_least, "positive": positive, "bare": bare}
    return field(default=default, metadata={"group": group, "help": help, **bounds})


@dataclass
class GSPOConfig:
    """Every setting of a run; train_gspo.py makes its flags from these fields.

    None means that the value is decided later, from the algorithm, the model's size or the machine
    (gspo_implementation.resolve).

    Raises:
        ValueError: a value of the wrong type or out of its bounds.
    """

    model_name: str = flag(
        "auto", "model", "hub id, folder, smollm2-135m, tiny, tiny-moe; auto: by GPU memory"
    )
    dtype: str = flag("auto", "model", "compute type over float32 weights", ("auto", "float32", "bfloat16"))
    trust_remote_code: bool = flag(False, "model", "run code that comes with the model; it can do anything")
    device: str | None = flag(
        None,
        "model",
        "where to train (default: cuda if there is a GPU); Apple GPUs are not used",
        ("cuda", "cpu"),
    )
    lora_rank: int | None = flag(
        None,
        "model",
        "train LoRA adapters of this rank over frozen weights; 0: train all weights (default: all weights, "
        "or rank 32 if only that fits the GPU)",
        at_least=0,
    )
    gradient_checkpointing: bool | None = flag(
        None,
        "model",
        "recompute activations in backward: less memory, slower (default: if the GPU needs it)",
    )

    dataset: str = flag(
        "mixed",
        "data",
        "problems to train and evaluate on: OWNER/NAME on the hub, reasoning_gym:NAME for a generator of it",
    )
    dataset_path: str | None = flag(
        None, "data", "a file of your own, jsonl, csv or parquet, with questions and answers"
    )
    difficulty: str = flag(
        "auto",
        "data",
        "level of the generated problems; auto: by model size",
        ("auto", "easy", "medium", "hard"),
    )
    code_reward: str = flag(
        "all",
        "data",
        "reward of code: 1 if all tests pass, else 0; or the fraction that passes",
        ("all", "fraction"),
    )
    reward: str | None = flag(
        None,
        "data",
        "FILE.py:FUNCTION, score(problem, response) -> float, None or dict of parts (default: by data set)",
    )
    system_prompt: str | None = flag(None, "data", "system message before each prompt")
    prompt_suffix: str | None = flag(
        None,
        "data",
        "added to each question of a file or of the hub; '' for nothing (default: a request to reason step "
        'by step and to answer after "####"; nothing with --reward)',
    )
    chat_template_kwargs: str = flag(
        "{}", "data", """JSON for the chat template, such as '{"enable_thinking": false}'"""
    )
    prompt_column: str | None = flag(
        None, "data", "column of the prompt (default: question, prompt or problem)"
    )
    answer_column: str | None = flag(None, "data", "column of the reference answer (default: answer)")
    eval_path: str | None = flag(
        None, "data", "a file of held-out problems (default: a fifth of the file, or the hub's own split)"
    )
    pass_threshold: float = flag(1.0, "data", "pass@1 counts rewards from this on", at_least=-1e100)
    num_train_samples: int = flag(100, "data", "number of training problems", at_least=1)
    num_eval_samples: int = flag(
        50, "data", "number of held-out problems, disjoint from training", at_least=1
    )
    data_seed: int = flag(0, "data", "decides which problems are drawn for training and held out", at_least=0)

    algorithm: str = flag("gspo", "objective", "importance ratio, loss and clip ranges as one preset")
    left_clip_range: float | None = flag(
        None,
        "objective",
        "clip ratios below 1 - this; docs/algorithms.md says what it means for each algorithm (default: the "
        "algorithm's; if neither is given, GSPO takes 20 times it for models under 0.5B)",
        positive=True,
    )
    right_clip_range: float | None = flag(
        None,
        "objective",
        "clip ratios above 1 + this, in the same way",
        positive=True,
    )
    pi_old: str = flag(
        "trainer",
        "objective",
        "whose log-probabilities are log pi_old: the trainer's, computed before the updates, or the "
        "sampler's, which saves that pass and lets the difference of the two into the ratio",
        ("trainer", "sampler"),
    )
    kl_coef: float = flag(
        0.0, "objective", "weight of a KL penalty to the starting model; the paper has none", at_least=0
    )
    routing_replay: bool = flag(
        False,
        "objective",
        "of a mixture of experts: compute the policy with the experts that pi_old chose; GRPO needs it, GSPO "
        "does not",
    )

    shuffle_rewards: bool = flag(
        False,
        "objective",
        "a control: shuffle each group's rewards among its responses, so that nothing can be learnt from "
        "them; evaluations keep theirs",
    )

    num_epochs: int = flag(1, "training", "passes over the training problems", at_least=1)
    batch_size: int = flag(4, "training", "queries per rollout batch", at_least=1)
    mini_batch_size: int = flag(
        1, "training", "queries per optimizer update; batch_size must be a multiple of it", at_least=1
    )
    group_size: int = flag(8, "training", "responses per query", at_least=2)
    dynamic_sampling: str = flag(
        "off",
        "training",
        "draw queries until batch_size groups have a signal: rewards that differ, or some responses that "
        "pass and some that do not; without a value: reward",
        ("off", "reward", "pass"),
        bare="reward",
    )
    update_frequency: int = flag(
        1, "training", "K: refresh pi_old every K rollout batches; a larger K makes pi_old older", at_least=1
    )
    learning_rate: float | None = flag(
        None, "training", "learning rate of AdamW (default: 1e-6; 1e-5 for models under 0.5B)", at_least=0
    )
    warmup_steps: int = flag(0, "training", "optimizer updates of linear warm-up", at_least=0)
    weight_decay: float = flag(0.0, "training", "decoupled weight decay of AdamW", at_least=0)
    max_grad_norm: float = flag(1.0, "training", "clip the gradient norm to this", positive=True)
    optimizer: str = flag(
        "auto",
        "training",
        "adamw: float32 weights and moments; adamw_8bit: bfloat16 weights with unbiased rounding, 8-bit "
        "moments; auto: adamw, or what fits the GPU",
        ("auto", "adamw", "adamw_8bit"),
    )
    shard: str = flag(
        "auto",
        "training",
        "weights over several processes: none: each has all of them; full: each has a part; auto: full where "
        "a GPU cannot hold them",
        ("auto", "none", "full"),
    )
    micro_batch_tokens: int | None = flag(
        None,
        "training",
        "tokens per forward pass; changes memory, and results by rounding alone (default: 4096, or what fits "
        "the GPU)",
        at_least=1,
    )
    seed: int = flag(0, "training", "seed of the training order and of the sampling", at_least=0)

    max_length: int = flag(512, "sampling", "prompt plus response tokens", at_least=2)
    max_new_tokens: int | None = flag(None, "sampling", "response tokens (default: by data set)", at_least=1)
    temperature: float = flag(
        1.0,
        "sampling",
        "sampling temperature; log-probabilities use the same",
        at_least=LOWEST_TEMPERATURE,
        positive=True,
    )
    rollout_rows: int | None = flag(
        None,
        "sampling",
        "responses sampled at a time; changes memory, not samples (default: 128, or what fits the GPU)",
        at_least=1,
    )
    eval_temperature: float = flag(
        1.0, "sampling", "temperature of evaluations", at_least=LOWEST_TEMPERATURE, positive=True
    )
    eval_samples: int | None = flag(
        None, "sampling", "responses per held-out problem (default: group_size)", at_least=1
    )
    rollout_engine: str = flag(
        "transformers",
        "sampling",
        "engine that samples: the policy in this process, or vLLM servers, which are fast",
        ("transformers", "vllm"),
    )
    rollout_dtype: str = flag(
        "auto",
        "sampling",
        "type in which the policy itself samples, in training and evaluations; auto: --dtype",
        ("auto", "bfloat16"),
    )
    vllm_url: str | None = flag(
        None, "sampling", "URLs of vLLM servers, with commas (default: the run starts one beside itself)"
    )
    mismatch_mask: float = flag(
        0.01,
        "sampling",
        "with vllm or --rollout_dtype: a response gets no gradient if its mean log-probability per token, in "
        "nats, differs by more between sampler and trainer",
        positive=True,
    )

    output_dir: str = flag("gspo_outputs", "run", "directory in which run folders are made")
    run_name: str | None = flag(
        None, "run", "name of the run folder (default: model, algorithm, seed and time)"
    )
    eval_frequency: int = flag(
        25, "run", "rollout batches between evaluations; 0: only before and after", at_least=0
    )
    save_frequency: int = flag(
        25, "run", "rollout batches between checkpoints; 0: only at the end", at_least=0
    )
    resume: str | None = flag(None, "run", "continue a run: its folder, one of its checkpoints, or 'latest'")
    use_wandb: bool = flag(False, "run", "the same as --log_to wandb (WANDB_MODE=offline works)")
    log_to: str | None = flag(
        None,
        "run",
        "trackers that get the record too: wandb, tensorboard, trackio, or several with commas",
    )
    wandb_project: str = flag("gspo", "run", "project in wandb and trackio")
    dry_run: bool = flag(
        False,
        "run",
        "print the resolved configuration, the objective, and the plan: memory and time; then stop",
    )
    plan_for: str | None = flag(
        None,
        "run",
        "with --dry_run: plan for other GPUs, by GB each, such as 80, 8x80 or 2x8x80 (default: this machine)",
    )
    probe: bool = flag(
        False,
        "run",
        "sample a few groups, say whether training can work, then stop; exit code 1 if not",
    )

    def __post_init__(self) -> None:
        if isinstance(self.chat_template_kwargs, dict):  # from Python
            self.chat_template_kwargs = json.dumps(self.chat_template_kwargs)
        hints = get_type_hints(type(self))
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
                setattr(self, f.name, value)
            kinds = get_args(hints[f.name]) or (hints[f.name],)
            _check_type(f.name, value, kinds)
            if value is not None:
                _check_bounds(f, value)
                # Numpy's numbers, say, become Python's: config.json and checkpoints hold plain data.
                setattr(self, f.name, kinds[0](value))
        if self.batch_size % self.mini_batch_size:
            raise ValueError(
                f"--mini_batch_size {self.mini_batch_size} does not divide --batch_size {self.batch_size}: "
                "every optimizer update takes the same number of queries"
            )
        if self.optimizer == "adamw_8bit" and self.dtype == "float32":
            raise ValueError(
                "--optimizer adamw_8bit --dtype float32: its weights are in bfloat16; leave --dtype out"
            )
        if self.optimizer == "adamw_8bit" and self.lora_rank:
            raise ValueError(
                f"--optimizer adamw_8bit --lora_rank {self.lora_rank}: adapters are trained by "
                "adamw, adamw_8bit trains all weights; leave out one of the two"
            )
        try:
            template_kwargs = json.loads(self.chat_template_kwargs)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--chat_template_kwargs is not valid JSON ({error})") from None
        if not isinstance(template_kwargs, dict):
            raise ValueError(f"--chat_template_kwargs must be a JSON object, got {self.chat_template_kwargs}")
        if self.plan_for is not None:
            if not re.fullmatch(r"([1-9]\d{0,5}x){0,2}[1-9]\d{0,5}", self.plan_for):
                raise ValueError(
                    f"--plan_for {self.plan_for}: give GB, GPUs x GB or machines x GPUs x GB, such as 80, "
                    "8x80 or 2x8x80"
                )
            if self.device == "cpu":
                raise ValueError("--plan_for plans for GPUs: leave out --device cpu")
            if not self.dry_run:
                raise ValueError(
                    "--plan_for goes with --dry_run: a run is planned for the machine it runs on"
                )
        for name in self.trackers:
            if name not in TRACKERS:
                raise ValueError(f"--log_to {name}: choose among {', '.join(TRACKERS)}")
            if not _is_installed(name):
                raise ValueError(
                    f"--log_to {name}: it is not installed; python -m pip install {name}, or leave it out "
                    "(--log_to '' where a resumed run has it)"
                )
        if self.routing_replay and self.pi_old == "sampler":
            raise ValueError(
                "--routing_replay --pi_old sampler: the experts that are replayed are those of the trainer's "
                "pi_old; leave out one of the two"
            )
        if self.rollout_dtype != "auto" and self.rollout_engine == "vllm":
            raise ValueError(
                "--rollout_dtype is for --rollout_engine transformers; vLLM servers sample in --dtype"
            )
        if self.vllm_urls and self.rollout_engine != "vllm":
            raise ValueError(f"--vllm_url {self.vllm_url} goes with --rollout_engine vllm")
        for url in self.vllm_urls:
            if not re.fullmatch(r"https?://[^/\s]+/?", url):
                raise ValueError(f"--vllm_url {url}: give URLs such as http://127.0.0.1:8000, with commas")

    @property
    def method(self) -> str:
        """The way of training, once it is decided: "adamw", "adamw_8bit" or "lora"."""
        return "lora" if self.lora_rank else self.optimizer

    @property
    def sampling_dtype(self) -> str:
        """The type in which the policy itself samples, once --dtype is decided."""
        return self.dtype if self.rollout_dtype == "auto" else self.rollout_dtype

    @property
    def mean_clip_range(self) -> float:
        """The mean of the clip ranges that the algorithm has, once they are decided; inf if it has none."""
        ranges = [side for side in (self.left_clip_range, self.right_clip_range) if side is not None]
        return sum(ranges) / len(ranges) if ranges else math.inf

    @property
    def vllm_urls(self) -> list[str]:
        """The servers that --vllm_url gives."""
        return _listed(self.vllm_url)

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names that --log_to and --use_wandb give, each once."""
        return tuple(dict.fromkeys([*["wandb"] * self.use_wandb, *_listed(self.log_to)]))

    def updates_for(self, num_queries: int) -> int:
        """Optimizer updates of a rollout batch of so many queries, but at most those of batch_size."""
        return -(-min(num_queries, self.batch_size) // self.mini_batch_size)

    def count_updates(self, num_problems: int) -> tuple[int, int]:
        """Rollout batches and optimizer updates of all epochs over num_problems training problems.

        The last rollout batch of an epoch has the problems that remain, and may make fewer updates.
        """
        whole_batches, remaining = divmod(num_problems, self.batch_size)
        num_batches = whole_batches + (remaining > 0)
        num_updates = whole_batches * self.updates_for(self.batch_size) + self.updates_for(remaining)
        return self.num_epochs * num_batches, self.num_epochs * num_updates


def _listed(text: str | None) -> list[str]:
    """The parts of a text between commas, without blanks; those that are empty are left out."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _is_installed(package: str) -> bool:
    """True if it can be imported, which may take seconds and is not done here."""
    return sys.modules[package] is not None if package in sys.modules else find_spec(package) is not None


def _check_type(name: str, value: Any, kinds: tuple[type, ...]) -> None:
    """Raises ValueError unless the value has one of these types. An int may be a float, a bool may not."""
    accepted = tuple({int: Integral, float: Real}.get(kind, kind) for kind in kinds)
    wrong_bool = isinstance(value, bool) and bool not in kinds
    if wrong_bool or not isinstance(value, accepted):
        expected = " or ".join(kind.__name__.replace("NoneType", "null") for kind in kinds)
        raise ValueError(f"--{name} must be {expected}, got {value!r}")


def _check_bounds(f: Field, value: Any) -> None:
    """Raises ValueError for a value, not None, that breaks the bounds of its field."""
    name, choices, at_least = f.name, f.metadata["choices"], f.metadata["at_least"]
    if isinstance(value, str):
        if value.encode(errors="ignore").decode() != value:
            raise ValueError(f"--{name} is not valid UTF-8 text: {value!r}")
        if choices and value not in choices:
            raise ValueError(f"--{name} {value}: choose one of {', '.join(choices)}")
        return
    if isinstance(value, Integral) and abs(int(value)) >= INTEGER_LIMIT:
        raise ValueError(f"--{name} must be below {INTEGER_LIMIT}, got {value}")
    if f.metadata["positive"] and not 0 < value < FLOAT_LIMIT:
        raise ValueError(f"--{name} must be positive and finite, got {value}")
    if at_least is not None and not value >= at_least:
        raise ValueError(f"--{name} must be at least {at_least}, got {value}")
    if not value < FLOAT_LIMIT:
        raise ValueError(f"--{name} must be finite, got {value}")
