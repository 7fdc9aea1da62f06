"""Compare the speed of training: GSPO in this toolkit, and TRL's GRPOTrainer with the settings of GSPO.

    python benchmarks/compare_trl.py                         workloads a, b and c, five rollout batches each
    python benchmarks/compare_trl.py --workloads a --batches 9

Both have the same model, prompts, response lengths and rewards. TRL has an environment of its own,
benchmarks/.peers/trl. The first use makes it, which takes some minutes and 2 GB. TRL gets the settings that
are fastest for it here: bfloat16, in sampling too, no gradient checkpointing, and the allocator settings that
this toolkit makes for itself. The two take turns of one rollout batch, while the other waits. The table has
medians without the first batch, which warms up. All numbers are also written to benchmarks/results.json.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median

from contestants import FOLDER, Worker, alternate, environment_of, model_folder
from workloads import WORKLOADS

PACKAGES = ("torch==2.13.0", "trl==1.16.0", "transformers==5.23.0", "accelerate==1.15.0")
PHASES = ("generation", "log_prob", "update", "total")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workloads", default="abc", help="letters of workloads.py")
    parser.add_argument(
        "--batches", type=int, default=5, help="rollout batches of each contestant and workload"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    python = environment_of("trl", PACKAGES)
    results = {}
    for name in options.workloads:
        results[name] = compare(name, options.batches, options.threads, python)
        print(table(name, results[name]), flush=True)
        (FOLDER / "results.json").write_text(json.dumps(results, indent=1))


def compare(name: str, batches: int, threads: int, trl_python: Path) -> dict[str, list[dict]]:
    """Return what each contestant measured in its rollout batches, without the first."""
    folder = model_folder()
    workers = {
        "gspo": Worker([sys.executable, "gspo_worker.py", folder, name], threads),
        "trl": Worker([trl_python, "trl_worker.py", folder, name], threads),
    }
    return alternate(workers, batches)


def table(name: str, answers: dict[str, list[dict]]) -> str:
    """Return a Markdown table of medians: seconds by phase, response tokens per second, memory and ratios."""
    workload = WORKLOADS[name]
    tokens = median(sum(workload.lengths(batch)) for batch in range(1, len(answers["gspo"]) + 1))
    lines = [
        f"\n({name}) {workload.description}: {workload.num_prompts} prompts of {workload.prompt_tokens} "
        f"tokens, {workload.group_size} responses each of {workload.shortest} to {workload.longest} tokens\n",
        f"| | {' | '.join(f'{phase} s' for phase in PHASES)} | tokens/s | peak GB |",
        "|---" * (len(PHASES) + 3) + "|",
    ]
    medians = {
        who: {key: median(answer[key] for answer in taken) for key in (*PHASES, "peak_memory_gb")}
        for who, taken in answers.items()
    }
    for who, values in medians.items():
        seconds = " | ".join(f"{values[phase]:.2f}" for phase in PHASES)
        lines.append(
            f"| {who} | {seconds} | {tokens / values['total']:.0f} | {values['peak_memory_gb']:.2f} |"
        )
    ours, theirs = medians["gspo"], medians["trl"]
    ratios = " | ".join(f"{theirs[phase] / ours[phase]:.2f}" for phase in PHASES)
    memory = theirs["peak_memory_gb"] / ours["peak_memory_gb"]
    lines.append(f"| trl / gspo | {ratios} | {theirs['total'] / ours['total']:.2f} | {memory:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
