"""Print what protects this machine, and what a program that tries to get out is told."""

import sys

from gspo.sandbox import SandboxError, check_machine


def main() -> int:
    try:
        protections = check_machine()
    except SandboxError as error:
        print(error)
        return 1
    for what, how in protections.items():
        print(f"{what:22} {how}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
