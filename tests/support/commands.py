"""train_gspo.py in a process of its own."""

import os
import subprocess
import sys

from support import ROOT

TINY = ["--model_name", "tiny", "--dataset", "sort", "--num_train_samples", "6", "--num_eval_samples", "4",
        "--num_epochs", "1", "--max_new_tokens", "26", "--device", "cpu"]  # fmt: skip


def command(*flags):
    return [sys.executable, str(ROOT / "train_gspo.py"), *map(str, flags)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


def run(*flags, cwd=None):
    return subprocess.run(
        command(*flags), capture_output=True, text=True, cwd=cwd, env=environment(), timeout=300
    )
