"""Runs untrusted Python against tests. Needs the standard library alone.

    from gspo.sandbox import run_tests

    python -m gspo.sandbox      what protects this machine
"""

from gspo.sandbox.runner import SandboxError, TestResult, check_machine, run_tests

__all__ = ["SandboxError", "TestResult", "check_machine", "run_tests"]
