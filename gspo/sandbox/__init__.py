"""Runs untrusted Python against tests, with `run_tests`. Needs the standard library alone.

    python -m gspo.sandbox      what protects this machine

runner.py has run_tests and the three forms of tests; processes.py the sandbox's processes, seen from here;
zygote.py what happens inside them; isolation.py the kernel's means; plain_data.py the values that travel.
"""

from gspo.sandbox.processes import SandboxError
from gspo.sandbox.runner import TestResult, check_machine, run_tests

__all__ = ["SandboxError", "TestResult", "check_machine", "run_tests"]
