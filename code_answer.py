"""The program in a response: what of a model's text is run as its answer to a code problem.

Responses mix prose, code, examples of use and printed output, often in several fenced blocks and often cut
off at the token limit. One piece of the text is taken, never several: a list of candidates earns nothing.
"""

import re
import textwrap
from collections.abc import Iterator

# A fence that opens a block: at the start of a line with any info string, or after prose with a word at most.
OPENING = re.compile(r"^([ \t]*|(?:(?!```|~~~).)+)(`{3,}|~{3,})[ \t]*([^`~]*)$")
DEFINITION = r"^[ \t]*(?:(?:async )?def|class)[ \t]+{name}\b|^{name}[ \t]*(?::[^=\n]*)?=(?!=)"
FUTURE_IMPORT = re.compile(r"^from __future__ import [^\n]*\n?", re.MULTILINE)
BYTE_ORDER_MARK = "\ufeff"


def code_of(response: str, entry_point: str | None = None) -> str:
    """The last fenced block that defines entry_point, else the last that is not empty, else the whole text.

    A block may be unclosed (the response was cut off). Without an entry_point (programs that read their
    input) the last block counts.
    """
    blocks = [block for block in _fenced_blocks(response) if block.strip()] or [response]
    if entry_point is not None:
        definition = re.compile(DEFINITION.format(name=re.escape(entry_point)), re.MULTILINE)
        blocks = [block for block in blocks if definition.search(block)] or blocks
    return textwrap.dedent(blocks[-1].lstrip(BYTE_ORDER_MARK))


def program_of(response: str, entry_point: str | None, preamble: str) -> str:
    """code_of the response after a preamble, such as the imports that its prompt showed."""
    code = code_of(response, entry_point)
    if not preamble:
        return code
    # Only a docstring may stand before these.
    future = "".join(line.rstrip("\n") + "\n" for line in FUTURE_IMPORT.findall(code))
    return future + preamble + FUTURE_IMPORT.sub("", code)


def _fenced_blocks(response: str) -> Iterator[str]:
    """Contents of ``` and ~~~ blocks. A closing fence may stand at the end of the last line of code."""
    fence, lines = None, []
    for line in response.splitlines(keepends=True):
        stripped = line.rstrip()
        if fence is None:
            opening = OPENING.match(stripped)
            if opening and (not opening[1].strip() or " " not in opening[3]):
                fence, lines = opening[2], []
        elif stripped.endswith(fence):
            yield "".join(lines) + stripped.rstrip(fence[0])
            fence = None
        else:
            lines.append(line)
    if fence is not None:
        yield "".join(lines)
