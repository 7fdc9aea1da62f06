"""Skips tests of the sandbox where the machine cannot protect itself."""

import pytest

from gspo.sandbox import SandboxError, check_machine


def missing_for_sandbox() -> str:
    """What this machine lacks for the code sandbox; any other failure of it must fail its tests."""
    try:
        check_machine()
    except SandboxError as error:
        lacking = ("needs Linux", "nothing on this machine keeps", "cannot read the standard library")
        return str(error) if any(words in str(error) for words in lacking) else ""
    return ""


MISSING_FOR_SANDBOX = missing_for_sandbox()
needs_sandbox = pytest.mark.skipif(bool(MISSING_FOR_SANDBOX), reason=MISSING_FOR_SANDBOX)
