"""The plan of a run: what of the model is trained and how, and whether that fits the GPU.

The plan is a measurement (measured_memory.py). It decides what `auto` takes, what is refused, the tokens of a
forward pass, gradient checkpointing, and how many responses are sampled at a time. A GB is 1e9 bytes.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedConfig

from gspo.policy.known_models import AUTO_MODELS, known_config
from gspo.policy.model_cache import EMBEDDED_NAME
from gspo.policy.model_loader import count_parameters
from gspo.policy.rollout import MAX_ROWS
from gspo.training.config import GSPOConfig
from gspo.training.disk_plan import disk_bytes
from gspo.training.forward_passes import PASS_TOKENS
from gspo.training.hardware import Machine, gigabytes
from gspo.training.measured_memory import Memory, measure_sampling, measure_update, memory_while_serving
from gspo.training.processes import Processes
from gspo.training.sharded_memory import UnitSizes, moments_share

# The fewest tokens of a forward pass with gradient checkpointing. Without it they are halved once at most.
CHECKPOINTED_PASS_TOKENS = 512
# The rank that `auto` gives to LoRA.
LORA_RANK = 32
# --max_length is not advised to be shorter than this: most prompts would leave no room for a response.
SHORTEST_ADVICE = 256
# The fewest bytes per parameter that a way of training needs: if these do not fit, nothing is measured.
LEAST_BYTES = {"adamw": 16, "adamw_8bit": 6, "lora": 2}


@dataclass(frozen=True)
class Plan:
    """A configuration with every setting decided on which memory depends, and its memory."""

    config: GSPOConfig
    memory: Memory


def refuse_long_rows(model_config: PreTrainedConfig, max_length: int) -> None:
    """Raise a ValueError if rows may be longer than the model's positions."""
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ValueError(f"--max_length {max_length} is beyond the model's {positions} positions")


def plan_training(
    model_config: PreTrainedConfig, config: GSPOConfig, loss: Callable[..., Any], machine: Machine
) -> Plan | None:
    """Decide what the configuration leaves open (None, or "auto"), so that training fits the memory.

    The first way of training that fits is taken; within it gradient checkpointing and shorter passes only if
    needed, and as many responses at a time as fit.

    Returns:
        None if nothing fits that the configuration allows.
    """
    parameters = count_parameters(model_config, config.trust_remote_code)
    for method in methods_for(config):
        for shard in shards_for(config, machine):
            if LEAST_BYTES[method] * parameters / machine.shards_with(shard) > machine.usable_bytes:
                continue
            decided = replace(with_method(config, method), shard=shard)
            plan = _first_fitting(model_config, _passes(decided), loss, machine)
            if plan is not None:
                return plan
    return None


def shards_for(config: GSPOConfig, machine: Machine) -> list[str]:
    """The values of --shard that a configuration allows on a machine, in the order of preference."""
    if config.shard != "auto":
        return [config.shard]
    return ["none", "full"] if machine.shards > 1 else ["none"]


def _first_fitting(
    model_config: PreTrainedConfig,
    candidates: Sequence[GSPOConfig],
    loss: Callable[..., Any],
    machine: Machine,
) -> Plan | None:
    """The plan of the first configuration that fits, of several that each take less than the one before.

    Measuring takes seconds. Mostly the first one fits or none does, so that the first and the last one are
    measured before those between.
    """

    @cache
    def plan_of(index: int) -> Plan | None:
        return _fitting(model_config, candidates[index], loss, machine)

    last = len(candidates) - 1
    if plan_of(0) is not None or plan_of(last) is None:
        return plan_of(0)
    between = range(1, last)
    return plan_of(1 + bisect_left(between, True, key=lambda index: plan_of(index) is not None))


def methods_for(config: GSPOConfig) -> list[str]:
    """The ways of training that a configuration allows, in the order of preference."""
    if config.lora_rank:
        return ["lora"]
    allowed = [name for name in ("adamw", "adamw_8bit") if config.optimizer in ("auto", name)]
    if config.dtype == "float32":  # 8-bit moments come with bfloat16 weights
        allowed = [name for name in allowed if name != "adamw_8bit"]
    if config.lora_rank is None and config.optimizer == "auto":
        allowed.append("lora")
    return allowed


def with_method(config: GSPOConfig, method: str) -> GSPOConfig:
    """The configuration with one way of training decided."""
    if method == "lora":
        return replace(config, optimizer="adamw", lora_rank=config.lora_rank or LORA_RANK)
    return replace(config, optimizer=method, lora_rank=0)


def _passes(config: GSPOConfig) -> list[GSPOConfig]:
    """The configuration with checkpointing and the tokens of a pass decided: candidates, best first.

    The last one takes the least memory. A pass takes a row at least.
    """
    choices = [False, True] if config.gradient_checkpointing is None else [config.gradient_checkpointing]
    candidates = []
    for checkpointing in choices:
        tokens = [config.micro_batch_tokens or PASS_TOKENS]
        if config.micro_batch_tokens is None:
            shortest = CHECKPOINTED_PASS_TOKENS if checkpointing else PASS_TOKENS // 2
            while tokens[-1] // 2 >= max(shortest, config.max_length):
                tokens.append(tokens[-1] // 2)
        candidates += [
            replace(config, gradient_checkpointing=checkpointing, micro_batch_tokens=t) for t in tokens
        ]
    return candidates


def _fitting(
    model_config: PreTrainedConfig, config: GSPOConfig, loss: Callable[..., Any], machine: Machine
) -> Plan | None:
    """The plan of a configuration, with as many rows sampled at a time as fit; None if it does not fit."""
    usable = machine.usable_bytes
    update = measure_update(model_config, config, loss, machine)
    if sum(update.values()) > usable:
        return None
    if config.rollout_engine == "vllm":
        plan = Plan(config, Memory(update, memory_while_serving(update, model_config, config)))
        return plan if plan.memory.peak <= usable else None

    def with_rows(rows: int) -> Plan:
        decided = replace(config, rollout_rows=rows)
        return Plan(decided, Memory(update, measure_sampling(model_config, decided, machine)))

    # The responses to a problem are sampled together, in training and in an evaluation.
    group_size = max(config.group_size, config.eval_samples or 0)
    rows = max(config.rollout_rows or MAX_ROWS, group_size) // group_size * group_size
    plan = with_rows(rows)
    if plan.memory.peak <= usable:
        return plan
    least = with_rows(group_size)
    if config.rollout_rows or least.memory.peak > usable:
        return None
    # Memory grows evenly with the rows.
    least_bytes, most_bytes = (sum(some.memory.sampling.values()) for some in (least, plan))
    more = int((usable - least_bytes) * (rows - group_size) / (most_bytes - least_bytes))
    return with_rows((group_size + more) // group_size * group_size)


def auto_model(
    config_for: Callable[[str, int], GSPOConfig], loss: Callable[..., Any], machine: Machine
) -> tuple[str, Plan | None]:
    """The model that `auto` stands for on a GPU: the largest that fits, else the embedded one; and its plan.

    config_for: the configuration of a run with a model of this name and number of parameters.
    """
    for name in (*AUTO_MODELS, EMBEDDED_NAME):
        model_config = known_config(name)
        plan = plan_training(model_config, config_for(name, count_parameters(model_config)), loss, machine)
        if plan is not None:
            break
    return name, plan


def require_plan(
    model_config: PreTrainedConfig, config: GSPOConfig, loss: Callable[..., Any], machine: Machine
) -> Plan:
    """plan_training(), or a refusal.

    Raises:
        ValueError: nothing fits. The message is one line: what is needed and for what, what there is, and
            which flags would make it fit.
    """
    plan = plan_training(model_config, config, loss, machine)
    if plan is not None:
        return plan
    print(f"{config.model_name} does not fit {machine.name}; looking for flags that would make it fit ...")
    smallest = replace(with_method(config, methods_for(config)[-1]), shard=shards_for(config, machine)[-1])
    least = _passes(smallest)[-1]
    parts = measure_update(model_config, least, loss, machine)
    if least.rollout_engine != "vllm":  # with shards, sampling often takes more
        group_size = max(least.group_size, least.eval_samples or 0)
        sampling = measure_sampling(model_config, replace(least, rollout_rows=group_size), machine)
        parts = max(parts, sampling, key=lambda found: sum(found.values()))
    advice = remedy(model_config, config, loss, machine)
    raise ValueError(
        f"--model_name {config.model_name}: training needs {gigabytes(sum(parts.values()))} of memory "
        f"({list_parts(parts)}), and {gigabytes(machine.usable_bytes)} of {machine.name} can be planned; "
        + (f"it fits with {advice}" if advice else "no flag makes it fit: name a smaller --model_name")
    )


def fit_to_gpu(
    config: GSPOConfig,
    model_config: PreTrainedConfig,
    resolved: GSPOConfig,
    loss: Callable[..., Any],
    processes: Processes,
) -> GSPOConfig:
    """The configuration with what it leaves open decided for the smallest GPU of the processes; collective.

    resolved: the same configuration with its other settings decided.

    Raises:
        ValueError: nothing fits (require_plan).
    """
    known = replace(config, device="cuda", dtype=resolved.dtype, max_new_tokens=resolved.max_new_tokens)
    machine = processes.least_machine()
    return processes.on_main(lambda: require_plan(model_config, known, loss, machine).config)


def remedy(
    model_config: PreTrainedConfig, config: GSPOConfig, loss: Callable[..., Any], machine: Machine
) -> str | None:
    """The flags that make training fit, as they are typed: the mildest change, or a smaller model."""
    rows: dict[str, Any] = {"rollout_rows": None}
    passes: dict[str, Any] = rows | {"micro_batch_tokens": None}
    if config.gradient_checkpointing is False:
        passes["gradient_checkpointing"] = None
    method: dict[str, Any] = {"shard": "auto", "lora_rank": None, "optimizer": "auto"}
    for opened in (rows, passes, method, passes | method):
        plan = plan_training(model_config, replace(config, **opened), loss, machine)
        if plan is not None:
            return _as_flags(plan.config, config, opened)
    length = config.max_length
    while length > SHORTEST_ADVICE:
        length = max(length // 2, SHORTEST_ADVICE)
        new_tokens = min(config.max_new_tokens or length, length)
        shorter = replace(config, max_length=length, max_new_tokens=new_tokens)
        if plan_training(model_config, shorter, loss, machine):
            return f"--max_length {length}"
    parameters = count_parameters(model_config, config.trust_remote_code)
    for name in (*AUTO_MODELS, EMBEDDED_NAME):
        smaller = known_config(name)
        if count_parameters(smaller) < parameters and plan_training(smaller, config, loss, machine):
            return f"--model_name {name}"
    return None


def _as_flags(decided: GSPOConfig, config: GSPOConfig, names: Iterable[str]) -> str:
    """The settings of these names that differ from a configuration's, as they are typed.

    What the configuration leaves to the plan is decided by it again.
    """
    flags = []
    for name in names:
        value, given = getattr(decided, name), getattr(config, name)
        if value != given and (given not in (None, "auto") or name == "lora_rank"):
            flags.append(f"--{name}" if value is True else f"--{name} {value}")
    return " ".join(flags)


# ---- what is said about it


def list_parts(parts: Mapping[str, float]) -> str:
    """Parts with their sizes, largest first; those too small to matter are left out."""
    largest, *others = sorted(parts.items(), key=lambda item: -item[1])
    shown = [largest, *(part for part in others if part[1] >= 5e7)]
    return ", ".join(f"{name} {num_bytes / 1e9:.1f}" for name, num_bytes in shown)


def describe_method(config: GSPOConfig) -> str:
    """What is trained of the model, in words and as flags."""
    words = {
        "adamw": "all weights, with float32 masters and AdamW (--optimizer adamw --lora_rank 0)",
        "adamw_8bit": "all weights in bfloat16, unbiased rounding, 8-bit moments (--optimizer adamw_8bit)",
        "lora": f"LoRA adapters over frozen weights (--lora_rank {config.lora_rank})",
    }
    return words[config.method]


def describe_plan(plan: Plan, machine: Machine) -> list[str]:
    """Lines on what is trained, and the memory that it takes."""
    config, memory = plan.config, plan.memory
    checkpointing = ", with gradient checkpointing" if config.gradient_checkpointing else ""
    sampling = f"sampling {config.rollout_rows} responses at a time"
    if config.rollout_engine == "vllm":
        sampling = "while vLLM samples"
    shards = []
    if machine.processes > 1:
        words = {"none": "each GPU has all weights", "full": f"weights over {machine.shards} GPUs"}
        shards = [f"shards: {words[config.shard]} (--shard {config.shard})"]
    return [
        f"trained: {describe_method(config)}",
        *shards,
        f"memory at its peak: {gigabytes(memory.peak)} of {machine.name}",
        f"  an update, {config.micro_batch_tokens} tokens per pass{checkpointing}: "
        f"{gigabytes(sum(memory.update.values()))} ({list_parts(memory.update)})",
        f"  {sampling}: {gigabytes(sum(memory.sampling.values()))} ({list_parts(memory.sampling)})",
    ]


def describe_disk(plan: Plan, model_config: PreTrainedConfig, machine: Machine) -> str:
    """A line on the room that a run takes on the disk."""
    config = plan.config
    parameters = count_parameters(model_config, config.trust_remote_code)
    moments, shards = int(plan.memory.update["optimizer"]), machine.shards_with(config.shard)
    if shards > 1:  # what each process has whole is written once
        sizes = UnitSizes.of(model_config, config.trust_remote_code)
        moments = round(moments / moments_share(sizes, config, shards))
    saved = getattr(model_config, "dtype", None) or torch.float32
    if config.method == "lora":  # a float32 adapter weight has two float32 moments
        parts = disk_bytes(moments // 8, torch.float32, torch.bfloat16, moments)
        parts |= dict.fromkeys(("best_model", "final_model"), parameters * saved.itemsize)
    else:
        trained = torch.float32 if config.method == "adamw" else torch.bfloat16
        parts = disk_bytes(parameters, trained, saved, moments)
    return f"disk: at most {gigabytes(sum(parts.values()))} ({list_parts(parts)})"


def describe_others(
    plan: Plan, model_config: PreTrainedConfig, loss: Callable[..., Any], machine: Machine
) -> list[str]:
    """Lines on the other ways of training: what they take, or that they do not fit."""
    lines = []
    parameters = count_parameters(model_config, plan.config.trust_remote_code)
    all_open = replace(
        plan.config, optimizer="auto", lora_rank=None, gradient_checkpointing=None, micro_batch_tokens=None
    )
    for method in methods_for(all_open):
        other = _passes(with_method(all_open, method))[-1]
        if method == plan.config.method:
            continue
        least = LEAST_BYTES[method] * parameters / machine.shards_with(other.shard)
        if least <= machine.usable_bytes:
            least = sum(measure_update(model_config, other, loss, machine).values())
        fits = "would fit too" if least <= machine.usable_bytes else "would not fit"
        lines.append(f"  {describe_method(other)} {fits}: at least {gigabytes(least)}")
    return lines
