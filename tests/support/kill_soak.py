"""A run that is killed again and again at random moments and resumed, and one that is left alone.

    python tests/support/kill_soak.py FOLDER KILLS [FLAG ...]

It makes FOLDER/whole and FOLDER/killed, to be compared; the flags are train_gspo.py's.

Every attempt is a process of its own, forked from one that has imported everything, which ends by SIGKILL at
any moment. The run is short and saves often, so that most moments are delicate ones.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import train_gspo

FLAGS = (
    "--model_name tiny --dataset sort --num_train_samples 12 --num_eval_samples 4 --num_epochs 4 "
    "--max_new_tokens 26 --group_size 4 --learning_rate 1e-3 --warmup_steps 5 "
    "--device cpu --eval_frequency 2 --save_frequency 1"
).split()


def main(folder: str, kills: int) -> int:
    draw = random.Random(0)
    started = time.monotonic()
    assert wait(attempt(folder, "whole")) == 0
    window = duration = time.monotonic() - started
    done = halves = finished = 0
    places = set()
    while True:
        anew = not Path(folder, "killed").exists()
        process = attempt(folder, "killed")
        if done < kills:
            # Late enough to come some way; the last attempt is left alone.
            time.sleep(draw.uniform(0.1, 0.6) * window)
            os.kill(process, signal.SIGKILL)
        code = wait(process)
        if code == 0 and done < kills:  # it was done: from the start again, so that all kills are made
            os.rename(f"{folder}/killed", f"{folder}/finished-{finished}")
            finished += 1
            if anew:  # no kill hit it, since the machine has become faster than when the whole run was timed
                window /= 2
        elif code == 0:
            print(
                f"{done} kills at {len(places)} places, {halves} of which left a folder half written; "
                f"each was followed by a resume. An uninterrupted run takes {duration:.1f} s"
            )
            return 0
        elif code != -signal.SIGKILL:
            print(f"exit code {code} after {done} kills")
            return 1
        else:
            done += 1
            halves += any(Path(folder, "killed").rglob("*.partial"))
            lines = Path(folder, "killed", "metrics.jsonl")
            saved = Path(folder, "killed", "checkpoints").glob("step-*[0-9]")
            places.add(
                (lines.read_text().count("\n") if lines.exists() else 0, *sorted(p.name for p in saved))
            )


def attempt(folder: str, name: str) -> int:
    """The process that begins or resumes a run."""
    begun = (Path(folder) / name / "config.json").exists()
    where = ["--resume", f"{folder}/{name}"] if begun else ["--run_name", name, "--output_dir", folder]
    process = os.fork()
    if process == 0:
        sys.stdout = sys.stderr = open(f"{folder}/log", "a")  # noqa: SIM115
        code = 1
        try:
            code = train_gspo.main([*FLAGS, *where])
        finally:
            sys.stdout.flush()
            os._exit(code)
    return process


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    FLAGS += sys.argv[3:]
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
