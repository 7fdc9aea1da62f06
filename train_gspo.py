"""Train a causal language model with GSPO on problems whose answers a rule can check.

    python train_gspo.py                                          the embedded model, on a CPU
    python train_gspo.py --model_name Qwen/Qwen2.5-7B-Instruct --dataset gsm8k --use_wandb
    python train_gspo.py --dataset math --algorithm grpo          the baseline, with everything else equal
    torchrun --nproc_per_node 4 train_gspo.py ...                 several processes
    python train_gspo.py --probe ...                              can the model learn from the task? 0 or 1

Exit codes: 0 done; 1 failure; 2 bad input (one line: what, why, what to do); 3 emergency stop;
130 interrupted. Whenever it stops, what was learnt is on disk and --resume continues; with --shard full, what
was learnt up to the last checkpoint, if a process is killed or fails in a computation of all of them.
"""

# The imports up here are quick, so that --help and a mistyped flag are answered at once. Everything that
# imports torch stands in the functions that run after the flags are parsed.
import argparse
import ast
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from data_loader import (
    DATASETS,
    RewardsOf,
    RowFormat,
    dataset_named,
    default_max_new_tokens,
    load_problems,
    reward_function,
)
from gspo.printing import counted, escaped
from gspo.training.command_line import Parser, complain, interruptible, is_rank_0, plain_warnings
from gspo.training.config import GSPOConfig
from gspo.training.find_run import refuse_other_settings, resumed_folder, run_folder, settings_of

if TYPE_CHECKING:
    from gspo.training.alarms import EmergencyStop
    from gspo.training.hardware import Machine
    from gspo.training.pace import Pace
    from gspo.training.record import Sink
    from gspo.training.training_run import TrainingRun
    from gspo_implementation import GSPOTrainer

PROGRAM = "train_gspo.py"
# On a CPU, training is planned beforehand only where this many bytes per parameter do not fit.
LEAST_CPU_BYTES = 12


def main(arguments: list[str] | None = None) -> int:
    if not is_rank_0():  # only rank 0 prints
        sys.stdout = open(os.devnull, "w")
    try:
        config = parse(arguments)
    except (ValueError, OSError) as error:
        complain(PROGRAM, error)
        return 2
    code = train(config)

    from gspo.training.processes import end_processes

    end_processes()
    return code


def train(config: GSPOConfig) -> int:
    """Run a configuration. Returns the exit code."""
    from gspo.policy.vllm_server import EngineError
    from gspo.report.live import LiveReport
    from gspo.training.alarms import EmergencyStop
    from gspo.training.objective import describe_objective
    from gspo.training.processes import ProcessFailed, end_processes
    from gspo.training.whole_folders import CannotSave
    from gspo_implementation import ALGORITHMS

    try:
        config = resolve_for_processes(config)
        settings = asdict(config)
        if config.resume:
            folder = run_folder(settings)
            refuse_other_settings(folder, settings_of(folder) or {}, settings)
        reward_fn = reward_function(config.reward, config.code_reward)
        print(json.dumps({k: v for k, v in settings.items() if v is not None}, indent=2))
        run_folder(settings)
        problems = load_task(config)
        sized = replace(config, num_train_samples=len(problems[0]))
        print(f"\n{describe_objective(sized, ALGORITHMS)}\n")
        if config.dry_run:
            loaded = replace(config, num_train_samples=len(problems[0]), num_eval_samples=len(problems[1]))
            print_plan(loaded, check_task(config, *problems))
            return 0
        if config.probe:
            return probe(config, reward_fn, *problems)
        run = prepare(config, reward_fn, *problems, sinks=[LiveReport])
    except ValueError as error:
        complain(PROGRAM, error)
        return 2
    except (CannotSave, EngineError, OSError, ProcessFailed) as error:
        complain(PROGRAM, error)
        return 1
    run.trainer.stop.on_signals()
    is_main = run.processes.is_main  # all processes end alike, and only the main one says why
    if is_main and config.resume and run.drawn == run.num_queries:
        print(describe_finished(run))
    try:
        result = run.train()
    except CannotSave as error:
        if is_main:
            complain(PROGRAM, f"{error}; make room, then continue with --resume {run.folder.path}")
        return 1
    except (EngineError, ProcessFailed) as error:
        if is_main:
            complain(PROGRAM, f"{error}: continue with --resume {run.folder.path}")
        return 1
    except EmergencyStop as stop:
        if is_main:
            complain(PROGRAM, explain(stop, run))
            print_verdict(run.folder.path)
        return 3
    except Exception as error:
        if error is run.processes.shared_error:  # all processes raise it, so none waits for this one
            end_processes()
        raise
    if is_main:
        report(run, result)
    return 0 if result["finished"] else 130


# ---- the flags


def parse(arguments: list[str] | None) -> GSPOConfig:
    """The flags as a configuration. With --resume, flags that are not given are those of the resumed run.

    A bad flag ends the program with one line and exit code 2; a bad value may also be a ValueError.
    """
    given = given_flags(arguments)
    if "resume" in given:
        given = with_settings_of_resumed_run(given)
    config = GSPOConfig(**given)
    dataset_named(config.dataset)  # a ValueError if there is none
    return config


def given_flags(arguments: list[str] | None) -> dict[str, Any]:
    """The flags among the arguments, also those in an @FILE, and their values."""
    parser = Parser(str(__doc__))
    types = get_type_hints(GSPOConfig)
    choices_of = {"algorithm": algorithm_names()}
    groups: dict[str, Any] = {}
    for f in fields(GSPOConfig):
        group = f.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        kinds = get_args(types[f.name]) or (types[f.name],)
        kind = next(t for t in kinds if t is not NoneType)
        help = f.metadata["help"]
        if f.name == "dataset":
            help += f", or one of {', '.join(DATASETS)}"
        if kind is bool:
            options: dict[str, Any] = {"action": "store_true"}
        else:
            options = {"type": kind, "choices": choices_of.get(f.name, f.metadata["choices"])}
            if f.metadata["bare"] is not None:
                options |= {"nargs": "?", "const": f.metadata["bare"]}
            if f.default is not None:
                help += f" (default: {f.default})"
        groups[group].add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=help, **options)
    return vars(parser.parse_args(arguments))


def algorithm_names() -> tuple[str, ...]:
    """The keys of gspo_implementation.ALGORITHMS, read from its source, since importing it takes seconds."""
    source = Path(__file__).with_name("gspo_implementation.py").read_text(encoding="utf-8")
    names = []
    for statement in ast.parse(source).body:
        match statement:
            case ast.Assign(targets=[ast.Name("ALGORITHMS")], value=ast.Dict(keys=keys)):
                names += [key.value for key in keys if isinstance(key, ast.Constant)]
            case ast.Assign(targets=[ast.Subscript(ast.Name("ALGORITHMS"), ast.Constant(name))]):
                names.append(name)  # an entry below the table
    return tuple(map(str, names))


def with_settings_of_resumed_run(given: dict) -> dict:
    """The flags that are given, the resumed run's own for all others, and where its folder is now."""
    folder = resumed_folder(given["resume"], given.get("output_dir", GSPOConfig.output_dir))
    if given.get("run_name", folder.name) != folder.name:
        raise ValueError(f"--run_name {given['run_name']}: the resumed run is {folder}; leave the flag out")
    inherited = {f.name for f in fields(GSPOConfig)} - {"dry_run", "probe"}
    if given.get("rollout_engine") == "transformers":  # which has no use for the servers of the run so far
        inherited.remove("vllm_url")
    method = {name: given[name] for name in ("optimizer", "lora_rank") if name in given}
    refuse_other_settings(folder, settings_of(folder) or {}, method)
    saved = {name: value for name, value in (settings_of(folder) or {}).items() if name in inherited}
    resume = str(folder) if given["resume"] == "latest" else os.path.abspath(given["resume"])
    return saved | given | {"resume": resume, "output_dir": str(folder.parent), "run_name": folder.name}


# ---- before training


def resolve_for_processes(config: GSPOConfig) -> GSPOConfig:
    """resolve_for_machine(); of several processes, the main one decides for all, by the smallest GPU."""
    from gspo.training.hardware import choose_device, num_processes
    from gspo.training.processes import Processes

    if config.plan_for or num_processes() == 1:
        return resolve_for_machine(config)
    processes = Processes(choose_device(config.device))
    machine = processes.least_machine()
    return processes.on_main(resolve_for_machine, config, machine)


def resolve_for_machine(config: GSPOConfig, machine: "Machine | None" = None) -> GSPOConfig:
    """Decide what depends on the machine, the model and the data set, and print the choices.

    machine: None: the one that --plan_for names, or this one.

    Raises:
        ValueError: there is no such model, or training it does not fit the memory.
    """
    import torch

    from gspo.policy.expert_routing import refuse_dense
    from gspo.policy.known_models import EMBEDDED_NAME
    from gspo.policy.model_loader import count_parameters
    from gspo.training.hardware import choose_device, choose_dtype, machine_for
    from gspo.training.plan import (
        auto_model,
        describe_plan,
        plan_training,
        refuse_long_rows,
        require_plan,
    )
    from gspo.training.processes import refuse_idle_processes
    from gspo_implementation import ALGORITHMS, resolve

    if config.algorithm not in ALGORITHMS:
        raise ValueError(f"--algorithm {config.algorithm}: choose one of {', '.join(ALGORITHMS)}")
    loss = ALGORITHMS[config.algorithm].loss
    device = "cuda" if config.plan_for else choose_device(config.device)
    machine = machine or machine_for(config.plan_for, device)
    try:
        refuse_idle_processes(config, machine.processes)
    except ValueError as error:
        if not config.plan_for:
            raise
        print(f"note: {error}")

    def for_model(name: str, num_parameters: int) -> GSPOConfig:
        dtype = choose_dtype(config, device, num_parameters)[0]
        known = replace(config, model_name=name, device=device, dtype=dtype)
        return with_defaults_of_model(known, num_parameters)

    model_name, plan = config.model_name, None
    if model_name == "auto" and device == "cuda":
        model_name, plan = auto_model(for_model, loss, machine)
        print(f"model: {model_name} (the largest of those known here that fits {machine.name})")
    elif model_name == "auto":
        model_name = EMBEDDED_NAME
        print(f"model: {model_name} ({'the one for CPUs' if config.device == 'cpu' else 'no GPU found'})")
    shapes = config_of_model(replace(config, model_name=model_name))
    refuse_long_rows(shapes, config.max_length)
    if config.routing_replay:
        refuse_dense(shapes)
    num_parameters = count_parameters(shapes, config.trust_remote_code)
    chosen = for_model(model_name, num_parameters)
    if device == "cuda" and not plan:
        # The embedded model is never refused: it is what `auto` takes where none of its others fits.
        planner = plan_training if model_name == EMBEDDED_NAME else require_plan
        plan = planner(shapes, chosen, loss, machine)
    resolved = resolve(plan.config if plan else chosen, num_parameters)
    if device == "cpu" and LEAST_CPU_BYTES * num_parameters > machine.total_bytes:
        require_plan(shapes, resolved, loss, machine)
    if plan and not config.dry_run:  # print_plan() says more
        print("\n".join(describe_plan(plan, machine)))
    if device == "cpu" and torch.backends.mps.is_available():
        print("device: cpu (Apple GPUs are not supported)")
    print(f"processes: {machine.processes}")
    if resolved.mini_batch_size < machine.processes:
        print(
            f"--mini_batch_size {resolved.mini_batch_size}: an update keeps so many of them busy, since each "
            "takes whole groups"
        )
    if config.dtype == "auto":
        print(f"dtype: {resolved.dtype} ({choose_dtype(config, device, num_parameters)[1]})")
    return resolved


def config_of_model(config: GSPOConfig) -> Any:
    """The configuration of the model, which a plan for other GPUs knows of some models without the hub."""
    from gspo.policy.known_models import is_known, known_config
    from gspo.policy.model_loader import model_config

    if config.plan_for and is_known(config.model_name):
        return known_config(config.model_name)
    return model_config(config.model_name, config.trust_remote_code)


def with_defaults_of_model(config: GSPOConfig, num_parameters: int) -> GSPOConfig:
    """The settings that depend on the model's size and on the data set, and whole paths."""
    dataset, dataset_path = config.dataset, config.dataset_path
    if dataset_path:
        dataset_path = os.path.abspath(dataset_path)  # for a resume from another directory
        if dataset == GSPOConfig.dataset:
            dataset = "file"
    difficulty = config.difficulty
    if difficulty == "auto":
        difficulty = difficulty_for(num_parameters)
    source = "file" if dataset_path else dataset
    reward, eval_path = config.reward, config.eval_path
    path, _, function = (reward or "").rpartition(":")
    if path and function:
        reward = f"{os.path.abspath(path)}:{function}"
    left, right = default_clip_range(config, num_parameters)
    return replace(
        config,
        left_clip_range=left,
        right_clip_range=right,
        dataset=dataset,
        dataset_path=dataset_path,
        eval_path=os.path.abspath(eval_path) if eval_path else None,
        reward=reward,
        difficulty=difficulty,
        max_new_tokens=config.max_new_tokens or default_max_new_tokens(source, difficulty),
    )


def print_plan(config: GSPOConfig, prompt_tokens: int | None) -> None:
    """Print the plan of a resolved configuration: memory, what else would fit, and time.

    prompt_tokens: of a prompt on average, if it is known.

    Raises:
        ValueError: training does not fit the memory.
    """
    from gspo.training.hardware import machine_for
    from gspo.training.pace import in_words
    from gspo.training.plan import describe_disk, describe_others, describe_plan, require_plan
    from gspo_implementation import ALGORITHMS

    loss = ALGORITHMS[config.algorithm].loss
    machine = machine_for(config.plan_for, str(config.device))
    shapes = config_of_model(config)
    plan = require_plan(shapes, config, loss, machine)
    print("\n".join(["plan:", *describe_plan(plan, machine), *describe_others(plan, shapes, loss, machine)]))
    print(describe_disk(plan, shapes, machine))
    num_batches, num_updates = config.count_updates(config.num_train_samples)
    responses = config.num_epochs * config.num_train_samples * config.group_size
    print(
        f"work: at most {num_batches} rollout batches, {num_updates} updates, {responses} responses and "
        f"{responses * (config.max_new_tokens or config.max_length) / 1e6:.3g} million sampled tokens"
    )
    if config.rollout_engine == "vllm":
        print("time: not estimated with vLLM")
    elif config.plan_for is None:
        pace = pace_here(config, prompt_tokens)
        total = in_words(pace.run(num_batches, config.eval_frequency))
        print(
            f"time: at most about {total} here: {in_words(pace.rollout_batch)} a rollout batch "
            f"(sampling {in_words(pace.sampling)}, log-probabilities {in_words(pace.log_probs)}, updates "
            f"{in_words(pace.updates)}), {in_words(pace.evaluation)} an evaluation; rewards not counted"
        )


def pace_here(config: GSPOConfig, prompt_tokens: int | None) -> "Pace":
    """How fast this machine works on a resolved configuration.

    prompt_tokens: of a prompt on average, if it is known.
    """
    import torch

    from gspo.training.hardware import machine_for
    from gspo.training.pace import estimate_pace
    from gspo_implementation import ALGORITHMS

    device, loss = torch.device(str(config.device)), ALGORITHMS[config.algorithm].loss
    processes = machine_for(None, str(config.device)).processes
    prompt_tokens = prompt_tokens or config.max_length // 4
    return estimate_pace(config_of_model(config), config, loss, device, prompt_tokens, processes)


def default_clip_range(config: GSPOConfig, num_parameters: int) -> tuple[float | None, float | None]:
    """The clip range, left and right, as it is given or by default; None: the algorithm's own.

    Small models learn at ten times the rate of others by default, on short answers, and s moves further in a
    rollout batch. So GSPO's range is wider for them than the paper's (docs/defaults.md).
    """
    from gspo.training.decide import SMALL_MODEL
    from gspo_implementation import ALGORITHMS

    given = config.left_clip_range, config.right_clip_range
    algorithm = ALGORITHMS.get(config.algorithm)
    if any(given) or algorithm is None or num_parameters >= SMALL_MODEL:
        return given
    factor = algorithm.small_model_factor
    left, right = algorithm.left_clip_range, algorithm.right_clip_range
    return left and round(factor * left, 9), right and round(factor * right, 9)


def difficulty_for(num_parameters: int) -> str:
    """The level of generated problems on which a model of this size has something to learn."""
    if num_parameters < 0.4e9:
        return "easy"
    if num_parameters < 4e9:
        return "medium"
    return "hard"


def prepare(
    config: GSPOConfig,
    reward_fn: RewardsOf,
    train_problems: list,
    eval_problems: list,
    sinks: "Sequence[Callable[[Path], Sink]]" = (),
) -> "TrainingRun":
    """The trainer and the run folder. sinks: makers of further sinks of the record.

    Raises:
        ValueError: the input cannot work.
    """
    from gspo.training.training_run import TrainingRun

    trainer = load_trainer(config, reward_fn, train_problems)
    source = config.dataset_path or config.dataset
    return TrainingRun(trainer, train_problems, eval_problems, source, sinks)


def probe(config: GSPOConfig, reward_fn: RewardsOf, train_problems: list, eval_problems: list) -> int:
    """Say whether the model can learn from the task with these settings. Returns the exit code.

    Raises:
        ValueError: the input cannot work.
    """
    from gspo.training.alarms import EmergencyStop
    from gspo.training.probe import probe_training

    if config.resume:
        raise ValueError(
            "--probe samples before training, and --resume continues a run: leave one of them out; to probe "
            "what a run has learnt, name its final_model with --model_name"
        )
    trainer = load_trainer(config, reward_fn, train_problems)
    try:
        return probe_training(trainer, train_problems, eval_problems)
    except EmergencyStop as stop:
        complain(PROGRAM, f"--probe: training would stop at once: {stop}")
        return 1


def load_trainer(config: GSPOConfig, reward_fn: RewardsOf, train_problems: list) -> "GSPOTrainer":
    """The model and the trainer.

    Raises:
        ValueError: the input cannot work.
    """
    from transformers.utils.logging import disable_progress_bar

    from gspo.policy.model_loader import load_model
    from gspo.policy.vllm_process import vllm_python
    from gspo_implementation import GSPOTrainer

    if config.rollout_engine == "vllm" and not config.vllm_urls:
        vllm_python()  # refuses before the model is loaded
    if not sys.stderr.isatty():
        disable_progress_bar()  # of loading the weights: control characters in a log file
    # On the CPU first: each process then moves the model to its own GPU, and makes it float32 there. In the
    # type of the files it takes no memory here but the files' own pages, which processes share.
    model, tokenizer = load_model(
        config.model_name, dtype="auto", device="cpu", trust_remote_code=config.trust_remote_code
    )
    disable_progress_bar()  # of writing them, at each save
    warn_of_unreadable_prompts(tokenizer, config, train_problems)
    return GSPOTrainer(model, tokenizer, config, reward_fn)


def load_task(config: GSPOConfig) -> tuple[list, list]:
    """The problems to train on and those held out. Prints what is added to their questions.

    Raises:
        ValueError: they cannot be had.
    """
    form = RowFormat(
        prompt_column=config.prompt_column,
        answer_column=config.answer_column,
        prompt_suffix=config.prompt_suffix,
        own_reward=config.reward is not None,
        eval_path=config.eval_path,
    )
    settings = config.data_seed, config.difficulty, config.dataset_path, form
    train_problems = load_problems(config.dataset, "train", config.num_train_samples, *settings)
    eval_problems = load_problems(config.dataset, "eval", config.num_eval_samples, *settings)
    print(f"problems: {len(train_problems)} to train on, {len(eval_problems)} held out")
    if form.suffix and any(problem.text.endswith(form.suffix) for problem in train_problems):
        print(f"added to each question (--prompt_suffix): {form.suffix!r}")
    return train_problems, eval_problems


def check_task(config: GSPOConfig, train_problems: list, eval_problems: list) -> int | None:
    """Look at the prompts as a run would, without the model's weights.

    A plan needs the model's config.json alone: where its tokenizer cannot be had, prompts are not looked at.

    Returns:
        The tokens of a training prompt on average; None without a tokenizer.

    Raises:
        ValueError: no prompt leaves room.
    """
    from gspo.policy.model_loader import load_tokenizer
    from gspo.training.sampling import encode_problem
    from gspo.training.training_run import drop_long_prompts

    try:
        tokenizer = load_tokenizer(config.model_name, config.trust_remote_code)
    except ValueError as error:
        print(f"the prompts' lengths are not checked: {error}")
        return None

    def encode(problem: Any) -> list[int]:
        return encode_problem(tokenizer, problem, config)

    warn_of_unreadable_prompts(tokenizer, config, train_problems)
    kept = drop_long_prompts(train_problems, encode, config, "training")
    drop_long_prompts(eval_problems, encode, config, "evaluation")
    return round(sum(len(encode(problem)) for problem in kept) / len(kept))


def warn_of_unreadable_prompts(tokenizer: Any, config: GSPOConfig, problems: list) -> None:
    """Print a line if the model cannot read the prompts: it would learn nothing from them."""
    from gspo.policy.rollout import unknown_share
    from gspo.policy.tiny_models import TINY_NAMES

    share = unknown_share(tokenizer, [problem.text for problem in problems])
    why = None
    if share > 0.5:
        why = f"{share:.0%} of the prompts' tokens are unknown to this model's tokenizer"
    elif config.model_name in TINY_NAMES and config.dataset != "sort":
        why = f"{config.model_name} has learned to sort digits and nothing else (--dataset sort)"
    if why and is_rank_0():
        print(
            f"warning: {why}: it cannot read these problems; take another --model_name or --dataset",
            file=sys.stderr,
        )


# ---- after training


def explain(stop: "EmergencyStop", run: "TrainingRun") -> str:
    """The message of an emergency stop: what went wrong, where to look, what to start from."""
    folder, checkpoints = run.folder.path, run.folder.checkpoints()
    before = f"the state before it is {checkpoints[-1]}" if checkpoints else "no checkpoint was written yet"
    # Those of LoRA hold adapters alone.
    start = "from best_model" if run.config.lora_rank else "from one of them"
    advice = f"Start again, {start} (--model_name) or anew, with a lower --learning_rate"
    if stop.advice:
        advice = f"{stop.advice} {folder}"
    return (
        f"emergency stop in rollout batch {run.trainer.step + 1}, before the update: {stop}. The evidence is "
        f"in {folder}/emergency; {before}, the best state evaluated {folder}/best_model. {advice}"
    )


def describe_finished(run: "TrainingRun") -> str:
    """What there is to say before a run is resumed that has nothing left to train on."""
    config = run.config
    queries, epochs = counted(run.num_queries, "query", "queries"), counted(config.num_epochs, "epoch")
    return (
        f"{run.folder.path} is finished ({config.model_name}, {config.algorithm}): it has trained on all "
        f"{queries} of its {epochs}. A larger --num_epochs goes on from there.\n"
    )


def report(run: "TrainingRun", result: dict) -> None:
    """Print a table of the held-out figures before and after, the best step, and where everything is."""
    from gspo.training.intervals import describe_gain
    from gspo.training.rollout_batch import PART_PREFIX

    before, after, best, folder = result["before"], result["after"], result["best"], run.folder.path
    if before is None:
        print(f"interrupted in the first evaluation; continue with --resume {folder}")
        return
    rows = [("pass@1", "pass_at_1", "pass_by_problem", ".3f")]
    # A reward of 0 or 1 has pass@1 as its mean, which is then printed once.
    if any(e["reward_by_problem"] != e["pass_by_problem"] for e in (before, after, best)):
        rows.append(("mean reward", "reward_mean", "reward_by_problem", ".4g"))
    print(f"{'held-out':12}{'before':>9}{'after':>9}   gain, paired by problem")
    for name, key, by_problem, form in rows:
        first, last, gain = f"{before[key]:{form}}", "-", "-"
        if after["step"]:
            last = f"{after[key]:{form}}"
            gain = describe_gain(before[by_problem], after[by_problem], f"+{form}")
        print(f"{name:12}{first:>9}{last:>9}   {gain}")
    for name in [name for name in after if name.startswith(PART_PREFIX)]:
        print(f"{name}: {before.get(name, math.nan):.4g} before, {after[name]:.4g} after")
    figures = ", ".join(f"{name} {best[key]:{form}}" for name, key, _, form in rows)
    print(f"best evaluation: {when(best['step'])}, {figures}: {folder / 'best_model'}")
    print_verdict(folder)
    print(f"run folder: {folder}")
    if not result["finished"]:
        print(f"interrupted after rollout batch {run.trainer.step}; continue with --resume {folder}")
    else:
        print(f"trained model: {folder / 'final_model'}")


def print_verdict(folder: Path) -> None:
    """Print what the run's record says of it, as its report does."""
    from gspo.report.run_record import read_run
    from gspo.report.verdict import verdict

    print()
    for sentence in verdict(read_run(folder, going=False)):
        print(escaped(sentence))
    print()
    if (folder / "report.html").exists():
        print(f"report: {folder / 'report.html'}")


def when(step: int) -> str:
    """The time of an evaluation in words."""
    if step == 0:
        return "before training"
    return f"after {counted(step, 'rollout batch', 'rollout batches')}"


if __name__ == "__main__":
    plain_warnings()
    interruptible()  # the imports that follow take seconds
    sys.exit(main())
