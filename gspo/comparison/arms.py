"""The settings that are compared, and the runs that this takes."""

import itertools
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from data_loader import dataset_named
from gspo.comparison.cells import Cell, cell_name
from gspo.training.config import GSPOConfig

# Flags of train_gspo.py that a comparison sets itself, or that make no run.
OWN = {"run_name", "output_dir", "resume", "dry_run", "plan_for", "probe", "seed"}
# The flags of OWN that all settings together may be given.
SHARED = {"seed", "output_dir"}
# Flags that say which problems are held out, and how a response to them is judged.
EVALUATION = (
    "dataset", "dataset_path", "eval_path", "difficulty", "data_seed", "num_eval_samples", "prompt_column",
    "answer_column", "reward", "code_reward", "pass_threshold", "eval_temperature",
)  # fmt: skip
# With an --eval_path, these flags only say which problems are trained on.
TRAINING_DATA = {"dataset", "dataset_path"}
# A setting that is named again gets seeds of its own, so many further on.
OTHER_SEEDS = 1000


@dataclass(frozen=True)
class Arm:
    """A setting that is compared.

    flags: its own flags of train_gspo.py, beside those that all settings share. repeat: how many settings
    before it have the same flags; its seeds are others than theirs. baseline: the label of the setting that
    it is compared with, if there is one.
    """

    label: str
    flags: tuple[str, ...]
    repeat: int = 0
    baseline: str | None = None


def arms_of(algorithms: str | None, vary: Sequence[str], named: Sequence[str]) -> list[Arm]:
    """Every combination of the algorithms, of the values of each of `vary`, and of the named settings.

    A setting is compared with the one that has the first value on the first of these axes, and the same ones
    on the others; settings with that first value are compared with the very first setting.

    algorithms: names with commas. vary: "flag=value,value". named: "name: flags".

    Raises:
        ValueError: there is nothing to compare, or a text has another form.
    """
    axes: list[list[tuple[str, list[str]]]] = []
    if algorithms:
        names = [name.strip() for name in algorithms.split(",")]
        axes.append([(name, ["--algorithm", name]) for name in names])
    axes += [_varied(text) for text in vary]
    if named:
        axes.append([_named(text) for text in named])
    if not axes:
        raise ValueError("nothing to compare: give --algorithms, --vary, --arm or --preset")
    arms: dict[tuple[int, ...], Arm] = {}
    for place in itertools.product(*(range(len(axis)) for axis in axes)):
        values = [axis[i] for axis, i in zip(axes, place, strict=True)]
        label = ", ".join(label for label, _ in values)
        flags = tuple(flag for _, each in values for flag in each)
        repeat = sum(arm.flags == flags for arm in arms.values())
        again = "" if repeat == 0 else f" (other seeds{'' if repeat == 1 else f' {repeat}'})"
        baseline = arms.get((0, *place[1:])) or arms.get((0,) * len(place))
        arms[place] = Arm(label + again, flags, repeat, baseline.label if baseline else None)
        if sum(arm.label == arms[place].label for arm in arms.values()) > 1:
            raise ValueError(f"two settings are named {arms[place].label!r}")
    return list(arms.values())


def _varied(text: str) -> list[tuple[str, list[str]]]:
    name, _, values = text.removeprefix("--").partition("=")
    types = get_type_hints(GSPOConfig)
    if name not in {f.name for f in fields(GSPOConfig)} - OWN or not values:
        raise ValueError(
            f"--vary {text}: give a flag of train_gspo.py and its values, as in learning_rate=1e-6,1e-5"
        )
    is_switch = bool in get_args(types[name]) or types[name] is bool
    settings = []
    for value in values.split(","):
        if is_switch and value not in ("on", "off"):
            raise ValueError(f"--vary {text}: the values of this flag are on and off")
        flags = [f"--{name}"] * (value == "on") if is_switch else [f"--{name}", value]
        settings.append((f"{name} {value}", flags))
    return settings


def _named(text: str) -> tuple[str, list[str]]:
    name, colon, flags = text.partition(":")
    if not (name.strip() and colon):
        raise ValueError(f"--arm {text!r}: give a name and flags, as in 'wide: --left_clip_range 3e-3'")
    try:
        return name.strip(), shlex.split(flags)
    except ValueError as error:
        raise ValueError(f"--arm {text!r}: {error}") from None


def cells_of(
    arms: Sequence[Arm],
    flags: Sequence[str],
    num_seeds: int,
    given: Callable[[list[str]], Mapping[str, Any]],
    device: str = "cpu",
) -> list[Cell]:
    """The runs of a comparison, all settings of a seed one after another.

    flags: of train_gspo.py, for all settings; its --seed is the first seed. given: makes settings by name of
    flags, as train_gspo.given_flags() does. device: where there is no --device.

    Raises:
        ValueError: a flag that a comparison sets itself, a bad value, settings that are evaluated in
            different ways, or two that are the same.
    """
    refused = (OWN - SHARED) & given([*flags]).keys()
    for arm in arms:
        for name in sorted(refused | OWN & given([*arm.flags]).keys()):
            of_one = " of one setting" if name in SHARED else ""
            raise ValueError(f"--{name}{of_one} does not go with a comparison")
    configs = [GSPOConfig(**given([*flags, *arm.flags])) for arm in arms]
    for config in configs:
        dataset_named(config.dataset)
    _refuse_other_evaluations(configs)
    cells: dict[Path, Cell] = {}
    for index in range(num_seeds):
        for arm, first in zip(arms, configs, strict=True):
            seed = first.seed + OTHER_SEEDS * arm.repeat + index
            config = replace(first, seed=seed, device=first.device or device)
            folder = Path(first.output_dir) / "cells" / cell_name(config)
            if folder in cells:
                raise ValueError(f"{cells[folder].arm!r} and {arm.label!r} are the same setting")
            cells[folder] = Cell(arm.label, index, config, folder)
    return list(cells.values())


def _refuse_other_evaluations(configs: Sequence[GSPOConfig]) -> None:
    """Raise a ValueError if settings are evaluated in different ways, or on different problems."""
    eval_paths = {config.eval_path for config in configs}
    free = TRAINING_DATA if len(eval_paths) == 1 and None not in eval_paths else set()
    for name in EVALUATION:
        values = list(dict.fromkeys(getattr(config, name) for config in configs))
        if len(values) > 1 and name not in free:
            raise ValueError(
                f"--{name} differs between settings ({', '.join(map(str, values))}): all must be evaluated "
                "on the same problems, in the same way"
            )
