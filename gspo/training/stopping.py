"""How a run stops early without losing anything: on request, at the next place where its state is whole."""

import os
import sys
import time
from typing import Any

from gspo.printing import say
from gspo.training.command_line import on_stop_signals
from gspo.training.processes import Processes

# A second signal within so many seconds is the first one again: a launcher passes on a signal that its
# processes have received themselves.
SAME_SIGNAL_S = 1.0


class Interrupted(Exception):
    """A stop was requested, and this is a place where the state is whole."""


class StopRequest:
    """A request to stop the run; set `requested` to make it."""

    def __init__(self, processes: Processes):
        self.processes = processes
        self.requested = False

    def check(self) -> None:
        """Mark a place where the state is whole; raises Interrupted if any process was asked to stop."""
        if self.processes.any(self.requested):
            raise Interrupted

    def on_signals(self) -> None:
        """SIGINT, SIGTERM and SIGHUP request a stop; a second one, SAME_SIGNAL_S later, ends it at once."""
        received: list[float] = []

        def stop(*_: Any) -> None:
            received.append(time.monotonic())
            if received[-1] - received[0] > SAME_SIGNAL_S:
                os._exit(130)  # a checkpoint in progress is abandoned: the last whole one stays
            if not self.requested and self.processes.is_main:
                say("stopping after this update; once more to stop at once", sys.stderr)
            self.requested = True

        on_stop_signals(stop)
