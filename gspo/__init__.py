"""The parts that the commands and the two modules beside this package are made of.

    policy/     a language model: load it, sample from it, log-probabilities under it
    training/   one run: settings, loop, record, checkpoints, alarms        may import policy
    report/     pictures and a page from a run's folder                     may import training
    sandbox/    runs untrusted Python against tests; standard library only
    tasks/      problems, and what a response earns                         may import sandbox
    checks/     what validation measures                                    may import everything
    comparison/ many runs, and what they say together                       may import everything

printing.py and live_line.py, beside them, are for all of them: to say what they do and how far they are.
tests/test_imports.py holds the imports to this table.
"""

import os
import sys

# OpenMP threads that wait for work spin for long before they sleep. On a CPU that other processes share, that
# made a rollout batch up to five times slower; spinning briefly costs little (LOG.md). torch reads this once,
# when it is imported, so it is set here, where every import of the toolkit comes by.
SPIN_COUNT_COMES_LATE = "torch" in sys.modules and "GOMP_SPINCOUNT" not in os.environ
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Seconds before a progress bar appears.
PROGRESS_DELAY_S = 2.0
# Seconds that the model hub has to answer a first request. The hub's own libraries retry for 25 s.
HUB_TIMEOUT_S = 5.0
