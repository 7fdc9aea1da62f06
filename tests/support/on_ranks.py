"""Call a function of the tests in several processes: `torchrun on_ranks.py MODULE FUNCTION ARGUMENTS ...`."""

import importlib
import os
import subprocess
import sys

from support import ROOT


def on_ranks(count, function, *arguments, timeout=300):
    """Call a function with text arguments in so many processes. Returns all that they say."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command = [*launch, __file__, function.__module__, function.__name__, *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


if __name__ == "__main__":
    module, function, *arguments = sys.argv[1:]
    getattr(importlib.import_module(module), function)(*arguments)
