"""GSPO in this toolkit against TRL's GRPOTrainer set to GSPO: same model, prompts, response lengths, rewards.

    python benchmarks/compare_trl.py                         workloads a, b and c, five rollout batches each
    python benchmarks/compare_trl.py --workloads a --batches 9

TRL gets an environment of its own (benchmarks/.peer, made at the first run: some minutes, 2 GB) and what is
fastest for it here: bf16, in sampling too, no gradient checkpointing, and the allocator settings that this
toolkit makes for itself. The two alternate, batch by batch, while the other waits. The table has medians; the
first batch of each, which warms up, does not count. Everything is also written to benchmarks/results.json.
"""

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from statistics import median

from workloads import WORKLOADS

FOLDER = Path(__file__).parent
PEER = FOLDER / ".peer"
PEER_PACKAGES = ("torch==2.13.0", "trl==1.16.0", "transformers==5.23.0", "accelerate==1.15.0")
PEER_PYTHON = PEER / "bin" / "python"
# glibc: keep freed memory, as freed_memory.py does for this toolkit.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
PHASES = ("generation", "scoring", "update", "total")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workloads", default="abc", help="letters of workloads.py")
    parser.add_argument(
        "--batches", type=int, default=5, help="rollout batches of each contestant and workload"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    make_peer_environment()
    results = {}
    for name in options.workloads:
        results[name] = compare(name, options.batches, options.threads)
        print(table(name, results[name]), flush=True)
        (FOLDER / "results.json").write_text(json.dumps(results, indent=1))


def make_peer_environment() -> None:
    if not PEER_PYTHON.exists():
        print(f"making {PEER} with {', '.join(PEER_PACKAGES)}", flush=True)
        venv.create(PEER, with_pip=True)
        subprocess.run([PEER_PYTHON, "-m", "pip", "install", "--quiet", *PEER_PACKAGES], check=True)


def model_folder() -> str:
    """The embedded model as both load it."""
    code = "import model_loader, model_cache; model_loader.load_model(model_cache.EMBEDDED_NAME); "
    code += "print(model_cache.converted_folder())"
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER.parent, check=True, stdout=subprocess.PIPE
    )
    return printed.stdout.decode().split()[-1]


def compare(name: str, batches: int, threads: int) -> dict[str, list[dict]]:
    """Each contestant's rollout batches, without the first."""
    folder = model_folder()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
    commands = {
        "gspo": ([sys.executable, "gspo_worker.py", folder, name], environment),
        "trl": ([PEER_PYTHON, "trl_worker.py", folder, name], environment | ALLOCATOR),
    }
    workers = {who: Worker(command, variables) for who, (command, variables) in commands.items()}
    answers = {who: [] for who in workers}
    for _ in range(batches):
        for who, worker in workers.items():
            answers[who].append(worker.turn())
    for worker in workers.values():
        worker.close()
    return {who: taken[1:] for who, taken in answers.items()}


class Worker:
    """A contestant in a process of its own, which does a rollout batch for each line (workloads.py)."""

    def __init__(self, command, environment):
        self.process = subprocess.Popen(
            command, cwd=FOLDER, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        while self._line() != "ready":
            pass

    def turn(self) -> dict:
        print("go", file=self.process.stdin, flush=True)
        while not (line := self._line()).startswith("{"):
            pass
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended with exit code {self.process.wait()}")
        return line.strip()


def table(name: str, answers: dict[str, list[dict]]) -> str:
    """Medians in Markdown: seconds by phase, response tokens a second, peak memory, and TRL's ratio to ours."""
    workload = WORKLOADS[name]
    tokens = median(sum(workload.lengths(batch)) for batch in range(1, len(answers["gspo"]) + 1))
    lines = [
        f"\n({name}) {workload.description}: {workload.num_prompts} prompts of {workload.prompt_tokens} tokens, "
        f"{workload.group_size} responses each of {workload.shortest} to {workload.longest} tokens\n",
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
