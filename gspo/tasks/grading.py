"""Grade responses by rules: which answer a text commits to, and whether it is right.

    python -m gspo.tasks.grading     a worker of worker_pool.py: JSON jobs on stdin, JSON results on stdout

The final answer is the last \\boxed{}, else what follows the last "####", else what follows the last "answer
is" or "answer:", else the last number of the text. It must be one value. A policy finds whatever the rule
pays for, so these earn nothing: lists ("3 or 4", "17/18/19", one number per line, two boxes side by side),
arithmetic that was not carried out ("12 + 5" or "84/7" where a number is asked for; math-verify alone accepts
both), and anything whose size makes the comparison expensive.

A reference that is a number is compared as an exact fraction, rounded as math-verify rounds (a test holds the
two together). Any other reference (2\\sqrt{3}, (1, 2), x^2 + 1) goes to math-verify, whose time-outs are off:
they rest on signals, which loops in C ignore, and the pool kills from outside.
"""

import ast
import functools
import re
from fractions import Fraction
from typing import Any

GRADED_CHARS = 8000  # the final answer stands at the end, and every scan below stays short
SIDE_BY_SIDE_WORDS = 6  # marked answers with no more words than this between them are a list of candidates
CONTEXT_CHARS = 30  # before and after a number, where an operator would make it part of a sum
MAX_EXPRESSION_CHARS = 200  # longer expressions are no final answers, and sympy may take minutes over them

BOX = re.compile(r"\\f?boxed\s*\{")
RIVAL = re.compile(r"[$\s)]*(?:\bor\b|\band\b|[,/])[\s$]*(-?\d[\d.]*)")  # \boxed{3} or 4
HASHES = re.compile(
    r"#{4,}(?!\s*(?:step|part|case)\b)\s*(?:(?:the\s+)?(?:final\s+)?answer\b\s*:?)?\s*(?=([^\n#]*))", re.I
)
ANSWER = re.compile(r"\banswer\b[^.\n:=\d]{0,40}?(?:\bis\b|:)[:\s]*(?=([^\n]*))", re.I)
SENTENCE_END = re.compile(r"[.!?](?=\s|$)")

NUMBER = re.compile(
    r"(?<![\w.^])(?<!\d[,/])"  # not inside a word or a number, not an exponent or index
    r"(?P<sign>(?<![\w)])-)?"
    r"(?:(?P<whole>\d{1,40})\s+(?=\d+/\d))?"  # 1 1/2
    r"(?P<digits>(?:\d{1,3}(?:,\d{3}){1,12}(?!\d)|\d{1,40}(?!\d))(?:\.\d{1,40}(?!\d))?|\.\d{1,40}(?!\d))"
    r"(?:\s*/\s*(?P<denominator>0*[1-9]\d{0,39})(?!\.?\d))?"
    r"(?:[eE](?P<exponent>[+-]?\d{1,2})(?!\d))?"
    r"(?P<percent>\s*(?:%|percent\b))?"
)
HEDGE = re.compile(r"\b(?:or|either|vs|maybe|perhaps|possibly|alternatively|(?:might|could|may) be)\b", re.I)
LIST_GAP = re.compile(r"(?:[\s,;:|/&.!?()\[\]'\"`•~-]|\b[a-e]\)|\b(?:and|to|then|the|answer|is)\b)*", re.I)
BARE = re.compile(r"(?:^|[\n=,;:])\s*$")  # before a number that no operation led to
ASSIGNMENT = re.compile(r"(?<![\w*+/-])[a-z]\s*=\s*$", re.I)
OPERATOR = r"[+*/×÷^±<>≤≥≠]"
OPERATOR_WORD = r"x|times|plus|minus|divided by"
OPERATOR_BEFORE = re.compile(
    rf"(?:{OPERATOR}|(?:[\d)]|\b[a-z])[ \t]*-|\d\s*(?:{OPERATOR_WORD})|√|\\[a-z]+|\b(?:sqrt|not))[\s(]*$",
    re.I,
)
OPERATOR_AFTER = re.compile(  # 14/person is 14, but 14/7 and 14 - x are sums
    rf"[\s)]*(?:\^|(?:{OPERATOR}|-)\s*(?:[\d(\\]|[a-z]\b)|(?:{OPERATOR_WORD})\s*\d|[xyz]\b)", re.I
)

TEXT_EDGES = " \t*`\"'$"  # quotes, emphasis and the like around an answer

VERDICT = re.compile(r"\b(?:yes|no|true|false)\b", re.I)

LATEX_TO_PLAIN = [
    (re.compile(r"<<[^<>]*>>"), ""),  # GSM8K's calculator notes: 48/2 = <<48/2=24>>24
    (re.compile(r"\*\*|\\left|\\right|\\displaystyle|\\[,!;]|(?<=\d)\{,\}(?=\d)|[\u2009\u202f]"), ""),
    (re.compile(r"[\u2212\u2013]"), "-"),
    (re.compile(r"(?<=\d)\s+(?:is|equals|makes|gives)\s+(?:equal\s+to\s+)?(?=[-$]?\d)", re.I), " = "),
    (re.compile(r"\\approx|≈|\\equiv|\\implies|\\Rightarrow|\\to\b|→|⇒|=>|\\quad"), "="),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"([a-z])\s*\^\s*\{?\s*[23]\s*\}?", re.I), r"\1"),  # cm^2
    (re.compile(r"\\times|\\cdot"), "×"),
    (re.compile(r"\\div"), "÷"),
    (re.compile(r"(?<=\d)\s*[×*x]\s*10\s*\^\s*\{?\s*(-?\d{1,2})\s*\}?"), r"e\1"),
    (re.compile(r"(?<=\d)\s*\\[dt]?frac"), r" \\frac"),
    (re.compile(r"\\[dt]?frac\s*\{?\s*(-?\d+|\d(?=\d))\s*\}?\s*\{?\s*(\d+)\s*\}?"), r"\1/\2"),
    (re.compile(r"([\^_])\s*\{\s*"), r"\1"),
    (re.compile(r"-\s*\\?[$€£]\s*(?=[\d.])"), "-"),
    (re.compile(r"\\\$|[$€£{}]|\\[()\[\] ]"), " "),
    (re.compile(r"\\%"), "%"),
]


def marked_answers(response: str) -> list[str]:
    """The last marked answer of a text and those that stand side by side with it; [] where none is marked.

    Several are a list of candidates unless they agree.
    """
    text = response[-GRADED_CHARS:].replace("**", "")
    for found in (_boxes(text), _lines(HASHES, text), _lines(ANSWER, text)):
        answers = [content for _, _, content in found[-1:]]
        for earlier, later in zip(reversed(found[:-1]), reversed(found), strict=False):
            if len(re.findall(r"\w+", text[earlier[1] : later[0]])) > SIDE_BY_SIDE_WORDS:
                break
            answers.append(earlier[2])
        if answers:
            return answers
    return []


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of each \\boxed{...} whose braces close, and of a number offered beside it."""
    found = []
    for match in BOX.finditer(text):
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        content = text[match.end() : end - 1].strip()
        if depth == 0 and not BOX.search(content):
            found.append((match.start(), end, content))
            rival = RIVAL.match(text, end)
            found += [(end, end, rival[1])] if rival else []
    return found


def _lines(mark: re.Pattern, text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of each mark; the content is the rest of its sentence, up to the next mark."""
    matches = list(mark.finditer(text))
    ends = [match.start() for match in matches[1:]] + [len(text)]
    found = []
    for match, end in zip(matches, ends, strict=False):
        content = text[match.end() : min(match.end(1), end)]
        found.append((match.start(), match.end(), SENTENCE_END.split(content)[0].strip()))
    return [mark for mark in found if mark[2]]


def plain(text: str) -> str:
    """LaTeX and currency signs rewritten so that `NUMBER` reads the numbers: $\\frac{1}{2}$ becomes 1/2."""
    for pattern, replacement in LATEX_TO_PLAIN:
        text = pattern.sub(replacement, text)
    return text


def committed_number(text: str, anchor: int) -> re.Match | None:
    """The one number that a plain text commits to.

    None for a list, a sum that was not carried out, and a text without a number. anchor: 0 for what follows
    an answer mark (18 dollars for 2 days is 18), -1 for the end of a longer text.
    """
    numbers = list(NUMBER.finditer(text))
    pairs = list(zip(numbers, numbers[1:], strict=False))
    if not numbers or any(_changes(text, *pair) for pair in (pairs if anchor == 0 else pairs[-1:])):
        return None
    if anchor == 0 and NUMBER.search(text.rpartition("=")[2]):
        text = text.rpartition("=")[2]
        numbers = list(NUMBER.finditer(text))
    gaps = [_gap(text, left, right) for left, right in zip(numbers, numbers[1:], strict=False)]
    listed = [_lists(gap) for gap in gaps]
    first = last = range(len(numbers))[anchor]
    while first > 0 and listed[first - 1]:
        first -= 1
    while last < len(gaps) and listed[last]:
        last += 1
    if len({value(number) for number in numbers[first : last + 1]}) > 1:
        return None
    start, end = numbers[first].start(), numbers[last].end()
    before, after = text[max(0, start - CONTEXT_CHARS) : start], text[end : end + CONTEXT_CHARS]
    return None if OPERATOR_BEFORE.search(before) or OPERATOR_AFTER.match(after) else numbers[first]


def _changes(text: str, left: re.Match, right: re.Match) -> bool:
    """True where "15 = 17" offers both numbers.

    They are equated without an operation, and the second is no rounding of the first.
    """
    equated = text[left.end() : right.start()].strip() == "=" and BARE.search(text[: left.start()])
    decimals = len(right["digits"].partition(".")[2])
    return bool(equated) and abs(value(left) - value(right)) > Fraction(1, 2 * 10**decimals)


def _gap(text: str, left: re.Match, right: re.Match) -> str:
    """The text between two numbers, without what both have: 18 dollars, 19 dollars; x = 3, x = 4."""
    gap = text[left.end() : right.start()]
    unit = re.match(r"\s*[a-z%]+", text[right.end() :], re.I)
    gap = gap.removeprefix(unit.group()) if unit else gap
    before = text[max(0, left.start() - CONTEXT_CHARS) : left.start()]
    return ASSIGNMENT.sub("", gap) if ASSIGNMENT.search(before) else gap


def _lists(gap: str) -> bool:
    """True where the numbers on both sides are candidates: 3, 4; 3 or maybe 4; but not 7 (3 boxes)."""
    hedged = HEDGE.search(gap) and len(re.findall(r"\w+", gap)) <= SIDE_BY_SIDE_WORDS
    return bool(LIST_GAP.fullmatch(gap) or hedged) and gap.strip() != "("


def value(number: re.Match) -> Fraction:
    """The number as it is written; 50% is 50 here, and `same_number` also takes it for 1/2."""
    magnitude = Fraction(number["digits"].replace(",", "")) / Fraction(number["denominator"] or 1)
    magnitude = (int(number["whole"] or 0) + magnitude) * Fraction(10) ** int(number["exponent"] or 0)
    return -magnitude if number["sign"] else magnitude


def same_number(answer: re.Match, reference: re.Match) -> bool:
    """True where two numbers are equal after rounding to six decimals, as math-verify does.

    Small numbers are rounded to five significant digits instead.
    """
    if answer["denominator"] and value(reference).denominator == 1:
        return False  # 84/7 is the question, 12 the answer
    return any(
        abs(a - r) <= min(Fraction(1, 2_000_000), abs(r) / 100_000)
        for a in (value(answer), value(answer) / (100 if answer["percent"] else 1))
        for r in (value(reference), value(reference) / (100 if reference["percent"] else 1))
    )


def reference_number(reference: str) -> re.Match | None:
    """The number that a reference is, if it is one: 18, $18.00, 1/2, x = 3, 18 dollars."""
    text = plain(reference).strip()
    number = committed_number(text, 0)
    rest = text.rpartition("=")[2].replace(number.group(), "", 1) if number else ""
    return number if re.fullmatch(r"[A-Za-z\s.°²³]*", rest) else None


def math_score(response: str, reference: str) -> float:
    """1.0 if the final answer of the response equals the reference, else 0.0.

    ValueError: the reference is no mathematical value.
    """
    number = reference_number(reference)
    if number is None:
        return _expression_score(response, reference)
    marked = [plain(answer) for answer in marked_answers(response)]
    if marked and not BOX.search(response) and not any(NUMBER.search(answer) for answer in marked):
        marked = []  # "check whether the answer is correct" marks nothing
    candidates = [committed_number(answer, 0) for answer in marked]
    if not candidates:
        candidates = [committed_number(plain(response[-GRADED_CHARS:]), -1)]
    answers = [answer for answer in candidates if answer is not None]
    if len(answers) < len(candidates) or len({value(answer) for answer in answers}) > 1:
        return 0.0
    return float(same_number(answers[0], number))


def _expression_score(response: str, reference: str) -> float:
    from math_verify import verify
    from sympy import MatrixBase, Set, Tuple

    gold = parse_expression(reference)
    if gold is None:
        raise ValueError(f"the reference answer {reference!r} is not a mathematical value")
    answers = marked_answers(response) or re.findall(r"\$([^$\n]+)\$\W*$", response[-GRADED_CHARS:])
    answers = answers or response.strip().splitlines()[-1:]
    answer = parse_expression(answers[0]) if len(set(answers)) == 1 else None
    collections = (Set, Tuple, MatrixBase)
    if answer is None or isinstance(answer, collections) and not isinstance(gold, collections):
        return 0.0
    return float(verify(gold, answer, timeout_seconds=None))


def parse_expression(text: str) -> Any:
    """The sympy object that math-verify reads in a text that is one expression, or None."""
    from math_verify import LatexExtractionConfig, parse

    text = text.strip().strip("$").rstrip(".").strip()
    words = re.findall(r"[a-z]{3,}|\b(?:or|to|no|is|if|of|at|in)\b", re.sub(r"\\[a-zA-Z]+", " ", text), re.I)
    if not text or len(text) > MAX_EXPRESSION_CHARS or words:
        return None
    parsed = parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    return parsed[0] if parsed else None


def final_text(response: str, expected: str) -> str:
    """The final answer as text: the marked one, else the last line; "" for candidates side by side.

    expected: the right answer, which is used for its form alone. Where it is a number or one of yes, no,
    true, false, the sentence around it may stay ("There are 3 letters."), as long as it commits to one.
    """
    answers = marked_answers(response) or response[-GRADED_CHARS:].strip().splitlines()[-1:]
    texts = {re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip(TEXT_EDGES).rstrip(".") for text in answers}
    answer = texts.pop() if len(texts) == 1 else ""
    if VERDICT.fullmatch(expected):
        verdicts = {verdict.capitalize() for verdict in VERDICT.findall(answer)}
        return verdicts.pop() if len(verdicts) == 1 else ""
    if NUMBER.fullmatch(expected):
        number = committed_number(plain(answer), 0 if marked_answers(response) else -1)
        return number.group().strip() if number else ""
    return answer


def text_score(response: str, reference: str) -> float:
    """1.0 if the whole response, or the final answer that it gives, is the reference letter for letter.

    White space around either does not count, nor do quotes, emphasis and a full stop around an answer.
    """
    if response.strip() == reference.strip():
        return 1.0
    return float(final_text(response, reference) == reference.strip(TEXT_EDGES).rstrip("."))


def reasoning_score(response: str, generator: str, entry: dict) -> float:
    """reasoning-gym's own score of the final answer, in [0, 1]."""
    return _scored(final_text(response, entry["answer"]), generator, entry)


def generator_score(response: str, generator: str, entry: dict) -> float:
    """The score of any generator's answer, which may be a grid of several lines or hold any character.

    The answer is all that follows the last "####" as it stands. Where there is none, it is final_text().
    """
    _, mark, answer = response.rpartition("####")
    if not mark and entry["answer"] is not None and "\n" not in entry["answer"]:
        answer = final_text(response, entry["answer"])
    return _scored(answer.strip(), generator, entry)


def _scored(answer: str, generator: str, entry: dict) -> float:
    """The scorer's verdict on an answer.

    Where the generator has no scorer of its own, the library's default pays for containing the answer ("13"
    earns 0.5 for "3", "Yes or No" 0.33 for "Yes"); equality takes its place.
    """
    from reasoning_gym.dataset import ProceduralDataset

    scorer = _scorer(generator)
    if type(scorer).score_answer is ProceduralDataset.score_answer:
        return float(answer.casefold() == entry["answer"].casefold())
    try:
        return min(1.0, max(0.0, float(scorer.score_answer(answer, entry))))
    except Exception:  # some scorers raise what they like on a text that is no answer
        return 0.0


@functools.cache
def _scorer(generator: str) -> Any:
    """A data set of the generator, for its score_answer."""
    import reasoning_gym

    return reasoning_gym.create_dataset(generator, size=1, seed=0)


def grade(job: dict) -> float | str:
    """A worker's answer to a job (rewards.grading_job): the reward, or what is wrong with the reference."""
    if job["kind"] == "reasoning":
        return reasoning_score(job["response"], job["generator"], job["entry"])
    if job["kind"] == "generator":
        return generator_score(job["response"], job["generator"], ast.literal_eval(job["entry"]))
    if job["kind"] == "text":
        return text_score(job["response"], job["answer"])
    try:
        return math_score(job["response"], job["answer"])
    except ValueError as error:
        return str(error)


if __name__ == "__main__":
    import logging

    # Imported before the worker says that it is ready: the time of a job is its own.
    import math_verify  # noqa: F401
    import reasoning_gym  # noqa: F401

    from gspo.tasks.worker_pool import serve

    logging.disable()  # math-verify warns that its time-outs are off
    serve(lambda: grade)
