"""A terminal of so many columns: what a program writes to it, and what is then on its screen."""

import fcntl
import os
import pty
import re
import struct
import termios

ERASE = "\x1b[K"


def written_in_terminal(work, columns):
    """What work() writes, in a process of its own whose standard output and error are a terminal."""
    reader, writer = os.pipe()  # the width must be set before the work begins
    process, terminal = pty.fork()
    if process == 0:
        code = 1
        try:
            import sys

            os.read(reader, 1)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            os.environ["TERM"] = "xterm"
            work()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    os.write(writer, b"x")
    written = b""
    while True:
        try:
            more = os.read(terminal, 1 << 16)
        except OSError:  # Linux says so that the other end was closed
            break
        if not more:
            break
        written += more
    for end in (reader, writer, terminal):
        os.close(end)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, written.decode()
    return written.decode()


def live_states(written):
    """The states of the live line: what follows a carriage return, up to the erasure of the rest."""
    return [state for state in re.findall(rf"\r([^\r\n]*){re.escape(ERASE)}", written) if state]


def screen_of(written, columns):
    """The rows that are on the screen afterwards, without those that are empty. Long rows wrap."""
    rows, row, column = [""], 0, 0
    for piece in re.findall(rf"{re.escape(ERASE)}|.", written, re.DOTALL):
        if piece == ERASE:
            rows[row] = rows[row][:column]
        elif piece == "\r":
            column = 0
        elif piece == "\n":
            row, column = row + 1, column
            rows += [""] * (row + 1 - len(rows))
        else:
            assert piece.isprintable(), repr(piece)
            if column == columns:
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            padded = rows[row].ljust(column)
            rows[row] = padded[:column] + piece + padded[column + 1 :]
            column += 1
    return [text.rstrip() for text in rows if text.strip()]
