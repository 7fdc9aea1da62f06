"""What the commands' parsers share: a mistake is one line on standard error, and exit code 2."""

import argparse
import sys


class Parser(argparse.ArgumentParser):
    def __init__(self, description: str):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, allow_abbrev=False)

    def error(self, message):
        """One line, without the usage that argparse puts before it."""
        print(f"{self.prog}: {message}; see --help", file=sys.stderr)
        sys.exit(2)
