"""Stands in for train_gspo.py in a comparison: leaves the record of a run with figures made of its flags.

    python fake_training.py train_gspo.py --learning_rate R --seed S --output_dir D --run_name N

It waits FAKE_WAIT_S seconds before each of its rollout batches, and goes on where the record ends. A learning
rate of 1 is stopped for good in rollout batch 2, one of 2 fails, one of 3 is bad input, and one of 4 is
killed. The algorithm that FAKE_FAILS names fails too. With a --max_length of 99 other problems are held out.
Nothing can be judged in rollout batch 2 while the file that FAKE_UNJUDGED names exists.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from train_gspo import given_flags  # noqa: E402

BATCHES, PROBLEMS = 3, 8
HEALTHY = ROOT / "tests" / "report" / "records" / "healthy" / "metrics.jsonl"


def main() -> int:
    flags = given_flags(sys.argv[2:])
    rate, seed = flags["learning_rate"], flags.get("seed", 0)
    algorithm = flags.get("algorithm", "gspo")
    folder = Path(flags.get("resume") or Path(flags["output_dir"]) / flags["run_name"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    if rate == 3:
        print("train_gspo.py: there is no such thing", file=sys.stderr)
        return 2
    if rate == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    folder.mkdir(parents=True, exist_ok="resume" in flags)
    environment = {"gpus": [], "cpu_cores": 2, "git_commit": "0123456789abcdef", "versions": {"torch": "2"}}
    config = {"algorithm": algorithm, "environment": environment, "num_epochs": 1, "group_size": 4}
    data = {"train_problems": 2 * BATCHES, "held_out": str(flags.get("max_length") == 99)}
    (folder / "config.json").write_text(json.dumps(config | {"seed": seed, "data": data}))
    (folder / "checkpoints").mkdir(exist_ok=True)
    with (folder / "starts.txt").open("a") as starts:
        starts.write("started\n")
    evaluations, metrics = folder / "eval.jsonl", folder / "metrics.jsonl"
    batch = json.loads(HEALTHY.read_text().splitlines()[0])
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    if not evaluations.exists():
        write(evaluations, evaluation(0, 0.0, 0))
    for step in range(done + 1, BATCHES + 1):
        time.sleep(float(os.environ.get("FAKE_WAIT_S", 0)))
        if (rate == 2 or algorithm == os.environ.get("FAKE_FAILS")) and step == 2:
            print("no space left on device", file=sys.stderr)
            return 1
        unjudged = Path(os.environ.get("FAKE_UNJUDGED", folder / "none")).exists()
        if step == 2 and (rate == 1 or unjudged):
            (folder / "emergency").mkdir()
            figures = {"step": step, "reason": "unjudged" if unjudged else "loss is nan"}
            figures["advice"] = "mend the reward" if unjudged else None
            (folder / "emergency" / "metrics.json").write_text(json.dumps(figures))
            print("train_gspo.py: emergency stop", file=sys.stderr)
            return 3
        write(metrics, batch | {"step": step, "queries": 2, "clip_fraction": rate})
    write(evaluations, evaluation(BATCHES, rate, seed))
    (folder / "final_model").mkdir()
    (folder / "final_model" / "model.safetensors").touch()
    return 0


def evaluation(step: int, rate: float, seed: int) -> dict:
    """A pass@1 of about the learning rate, with noise by seed and problem."""
    noise = random.Random(seed)
    of_seed = noise.gauss(0, 0.01)
    passed = [rate + of_seed + noise.gauss(0, 0.02) for _ in range(PROBLEMS)]
    figures = {"step": step, "pass_by_problem": passed, "reward_by_problem": passed}
    figures |= {"pass_at_1": sum(passed) / PROBLEMS, "interval_95": [0, 1]}
    return figures | {"reward_mean": 0, "response_tokens_mean": 1}


def write(path: Path, line: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
