"""The program in a response: the part of a model's text that is tested as its answer to a code problem.

Responses mix prose, code, examples of use and printed output, often in several fenced blocks and often cut
off at the token limit. One piece of the text is taken, never several: a list of candidates earns nothing.
"""

import re
import textwrap
from collections.abc import Iterator

# A fence that opens a block: at the start of a line with any info string, or after prose with a word at most.
OPENING = re.compile(r"^([ \t]*|(?:(?!```|~~~).)+)(`{3,}|~{3,})[ \t]*([^`~]*)$")
# One that closes it: alone, or after code that cannot have it in a string or a comment; then nothing but a
# marker such as <|im_end|> or </think>.
CLOSING = r"^([^#'\"`{mark}]*){fence}+[ \t]*(?:<.*)?$"
MARGIN = re.compile(r" *(?:(?:[-*+]|\d+[.)]) +)?")  # of a line, with the mark of a list
MAX_SHIFT = 3  # columns of a closing fence right of its opening; further right is an example in a docstring
INDENTED = re.compile(r"(?:[ \t\r]*\n)*[ \t]+\S")
# A text pattern finds these: parsing untrusted code may end the process that does it.
FUTURE_IMPORT = re.compile(
    r"^from[ \t]+__future__[ \t]+import\b(?:[^\n\\(]|\\\r?\n|\([^)]*\))*\n?", re.MULTILINE
)
FIRST_DEFINITION = re.compile(r"^(?:@|(?:async )?def |class )", re.MULTILINE)
DEFINITION = r"^[ \t]*(?:(?:async )?def|class)[ \t]+{name}\b|^{name}[ \t]*(?::[^=\n]*)?=(?!=)"
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
    code = blocks[-1].lstrip(BYTE_ORDER_MARK)
    # Only where needed: dedent would also empty lines of white space in the strings of the code.
    return textwrap.dedent(code) if INDENTED.match(code) else code


def program_of(response: str, entry_point: str | None, preamble: str) -> str:
    """code_of the response with a preamble, such as the imports that its prompt showed.

    It stands before the code, but after imports from __future__, which only a docstring may precede.
    """
    code = code_of(response, entry_point)
    head = re.split(FIRST_DEFINITION, code, maxsplit=1)[0]
    first = max((future.end() for future in FUTURE_IMPORT.finditer(head)), default=0)
    return code[:first] + preamble + code[first:]


def _fenced_blocks(response: str) -> Iterator[str]:
    """Contents of ``` and ~~~ blocks. A closing fence may stand at the end of the last line of code."""
    closing: re.Pattern | None = None  # of the open block
    furthest, lines = 0, list[str]()
    for line in response.splitlines(keepends=True):
        stripped = line.rstrip()
        if closing is None:
            opening = OPENING.match(stripped)
            if opening and (not opening[1].strip() or " " not in opening[3]):
                closing = re.compile(CLOSING.format(mark=opening[2][0], fence=opening[2]))
                margin = MARGIN.match(line.expandtabs())
                assert margin  # it matches the empty text
                furthest, lines = margin.end() + MAX_SHIFT, []
        elif (end := closing.match(stripped)) and (end[1].strip() or len(end[1].expandtabs()) <= furthest):
            yield "".join(lines) + end[1].rstrip()
            closing = None
        else:
            lines.append(line)
    if closing is not None:
        yield "".join(lines)
