"""Families of hard function-writing problems: several rules that act together. Fields: see family.Family."""

import random
from collections.abc import Sequence

from gspo.tasks.code_families.family import Family, integers, word, words

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


# Parts of the draws below


def bracketed(rng: random.Random, kinds: str) -> str:
    """A text with brackets of the two kinds, mostly with a fault somewhere."""
    text = ""
    expected: list[str] = []  # closing brackets of those that are open
    for _ in range(rng.randint(2, 6)):
        opening = rng.choice([0, 0, 2])
        text += rng.choice(["", "x"]) + kinds[opening]
        expected.append(kinds[opening + 1])
        while expected and rng.random() < 0.5:
            text += expected.pop()
    text += "".join(reversed(expected))
    cut = rng.randrange(len(text))
    return rng.choice([text, text[:cut] + text[cut + 1 :], text[:cut] + rng.choice(kinds) + text[cut:]])


def lake_map(rng: random.Random, water: str) -> list[str]:
    """Rows of characters with water mostly inland."""
    height, width = rng.randint(5, 6), rng.randint(5, 7)

    def cell(y: int, x: int) -> str:
        wet = 0.02 if y in (0, height - 1) or x in (0, width - 1) else 0.68
        return water if rng.random() < wet else "."

    return ["".join(cell(y, x) for x in range(width)) for y in range(height)]


def strips(sizes: Sequence[int], water: str) -> list[str]:
    """A map with one straight inland lake of each size."""
    width = max(sizes) + 2
    land = "." * width
    return [land] + [row for size in sizes for row in (("." + water * size).ljust(width, "."), land)]


def stranded(size: int, water: str) -> list[list[str]]:
    """Maps with a straight lake at the first or last row, or at the first or last column."""
    rows = strips([size], water)
    return [rows[1:], rows[:-1], [row[1:] for row in rows], [row[:-1] for row in rows]]


def nested(rng: random.Random, depth: int) -> int | list | dict:
    """An integer in `depth` lists and dictionaries, some of which hold one more thing."""
    if depth == 0:
        return rng.randint(0, 9)
    children: list = [nested(rng, depth - 1)]
    if depth < 3:
        children += rng.choice([[], [], [rng.randint(0, 9)], [[]], [{}]])
    rng.shuffle(children)
    if rng.random() < 0.5:
        return children
    return dict(zip(rng.sample("abcdef", len(children)), children, strict=True))


def folder(rng: random.Random, depth: int, largest: int) -> dict:
    """A tree of folders as dictionaries: name -> size of a file, or a folder."""
    names = rng.sample("abcdef", rng.choice([1, 2, 2]))
    return {
        name: folder(rng, depth - 1, largest) if depth and rng.random() < 0.6 else rng.randint(1, largest)
        for name in names
    }


def expression(rng: random.Random, operator: str, depth: int = 2) -> str:
    """A sum with an extra operator and parentheses, `depth` deep."""
    if depth == 0 or rng.random() < 0.15:
        return str(rng.choice([rng.randint(0, 9), rng.randint(10, 30)]))
    parts = [expression(rng, operator, depth - 1) for _ in range(rng.choice([2, 2, 3]))]
    text = parts[0]
    for part in parts[1:]:
        text += rng.choice(["{}", " {} "]).format(rng.choice(["+", "-", operator, operator])) + part
    return f"({text})" if rng.random() < 0.5 else text


def counted(rng: random.Random, group: str, escape: str, depth: int = 2) -> str:
    """A run-length code with groups, `depth` deep."""
    units = [rng.choice("abc"), escape + rng.choice(group + "5" + escape)]
    units = rng.sample(units, rng.randint(0 if depth == 1 else 1, 1 + depth // 2))
    units = [rng.choice(["", "", "0", "2", str(rng.randint(3, 12)), "10"]) + unit for unit in units]
    if depth:
        inside = counted(rng, group, escape, depth - 1)
        units.append(rng.choice(["", "0", "2", "2", "3"]) + group[0] + inside + group[1])
    rng.shuffle(units)
    return "".join(units)


def settings(rng: random.Random, separator: str, comment: str) -> str:
    """Lines of settings, with sections and comments between them."""
    lines = []
    for _ in range(rng.randint(2, 3)):
        key, value = rng.choice("abc"), rng.choice([str(rng.randint(0, 40)), word(rng, 2), f"x{separator}1"])
        space = rng.choice(["", " "])
        setting = f"{key}{space}{separator}{space}{value}"
        line = rng.choice([f"[{rng.choice(['in', 'out'])}]", setting, setting])
        lines.append(line + rng.choice(["", "", f" {comment} x"]))
    return "\n".join(lines)


def quoted_field(rng: random.Random, separator: str, quote: str) -> str:
    """A field of a record, mostly with something that the separator or the quotes make difficult."""
    plain = word(rng, 3)
    inside = rng.choice([f"{plain}{separator}x", f" {plain}", f"{plain}{quote * 2}", "", plain])
    return rng.choice([plain, f" {plain} ", "", f"{quote}{inside}{quote}", f" {quote}{inside}{quote}"])


def cached_keys(rng: random.Random, capacity: int, life: int) -> list[int]:
    """Requests, enough for the first keys to expire."""
    weights = [(capacity + 1 - key) ** 2 for key in range(capacity + 1)]
    return rng.choices(range(capacity + 1), weights, k=life + rng.randint(2, 4))


def spread_jobs(rng: random.Random, cooldown: int, batch: int) -> str:
    """Jobs of which more than `batch` in a row need no cooldown, with any others around them."""
    jobs = word(rng, 3, 0, ALPHABET[:cooldown])
    for _ in range(batch + 1):
        fresh = [letter for letter in ALPHABET[: cooldown + 3] if letter not in jobs[-cooldown:]]
        jobs += rng.choice(fresh)
    return jobs + word(rng, 4, 1, ALPHABET[: cooldown + 2])


HARD = (
    Family(
        "strings",
        "wrap_and_pad_lines(text)",
        """breaks the string text, whose words are separated by single spaces, into lines and returns the list
        of lines. Each line takes as many of the next words, joined by single spaces, as fit into $width
        characters, and is then filled up on the $side with "$filler" to exactly $width characters. A word
        longer than $width characters gets a line of its own, unchanged. An empty text gives an empty
        list.""",
        """
def wrap_and_pad_lines(text):
    def padded(line, left=0, right=0):
        return left * "$filler" + line + right * "$filler"

    lines = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= $width:
            lines[-1] += " " + word
        else:
            lines.append(word)
    return [padded(line, $side=$width - len(line)) for line in lines]
""",
        draw=lambda rng, p: [" ".join(words(rng, 7, 3, max_length=9))],
        edges=lambda p: [
            [""],
            ["a" * p.width],
            ["ab " + "c" * (p.width - 3)],
            ["ab " + "c" * (p.width - 2)],
            ["ab " + "c" * (p.width + 2) + " d e"],
        ],
        parameters={"width": range(8, 18), "side": ("left", "right"), "filler": "._*-"},
    ),
    Family(
        "strings",
        "first_bracket_fault_index(text)",
        """checks the brackets of the two pairs "$kinds" in the string text and returns the index of the first
        faulty bracket, as an integer. A bracket is faulty if it is a closing bracket that does not match the
        innermost open bracket (or finds none open), an opening bracket that makes more than $limit brackets
        open at once, or an opening bracket of the second pair while the innermost open bracket is of the
        second pair too. If no bracket is faulty, the result is -1 if all brackets are closed in the end, and
        the length of text if not. All other characters are ignored.""",
        """
def first_bracket_fault_index(text):
    first, first_end, second, second_end = "$kinds"
    closing = {first: first_end, second: second_end}
    expected = []
    for index, char in enumerate(text):
        if char in closing:
            if len(expected) == $limit or (char == second and expected[-1:] == [second_end]):
                return index
            expected.append(closing[char])
        elif char in closing.values():
            if expected[-1:] != [char]:
                return index
            expected.pop()
    return len(text) if expected else -1
""",
        draw=lambda rng, p: [bracketed(rng, p.kinds)],
        edges=lambda p: [
            [""],
            [p.kinds[0] * p.limit + p.kinds[1] * p.limit],
            [p.kinds[0] * (p.limit + 1) + p.kinds[1] * (p.limit + 1)],
            [p.kinds[2] * 2 + p.kinds[3] * 2],
            [p.kinds[0] + p.kinds[2] * 2 + p.kinds[3] * 2 + p.kinds[1]],
            [p.kinds[2] + p.kinds[0] + p.kinds[2:] + p.kinds[1] + p.kinds[3]],
            [p.kinds[0] + "xx"],
            [p.kinds[0:2] + p.kinds[3]],
            [p.kinds[0] + p.kinds[3] + p.kinds[1]],
            [p.kinds[0] + p.kinds[2] + p.kinds[1] + p.kinds[3]],
        ],
        parameters={
            "kinds": [a + b for a in ("()", "[]", "{}", "<>") for b in ("()", "[]", "{}", "<>") if a != b],
            "limit": range(3, 9),
        },
    ),
    Family(
        "strings",
        "direction_flipping_cipher(text)",
        """encodes the string text of lowercase letters and spaces and returns the resulting string. Each
        letter is moved by $shift places in the alphabet, which is a ring: "a" comes after "z", and "z" before
        "a". The direction is forward to begin with (from "a" towards "z"). Each letter "$pivot" of text is
        itself still moved in the old direction, but reverses the direction for the letters after it. A space
        stays a space and sets the direction back to forward.""",
        """
def direction_flipping_cipher(text):
    result, shift = "", $shift
    for char in text:
        if char == " ":
            result, shift = result + char, $shift
        else:
            result += chr((ord(char) - 97 + shift) % 26 + 97)
            if char == "$pivot":
                shift = -shift
    return result
""",
        draw=lambda rng, p: [" ".join(words(rng, 3, 1, max_length=6, letters=p.pivot * 4 + ALPHABET))],
        edges=lambda p: [
            [""],
            [p.pivot],
            [p.pivot + "az"],
            [p.pivot * 2 + "az"],
            [p.pivot + "m n"],
            ["za " + p.pivot],
        ],
        parameters={"shift": range(2, 13), "pivot": "aeinorst"},
    ),
    Family(
        "lists",
        "join_spans_and_drop_short(spans)",
        """takes a list of spans [start, end], two integers each, in any order, and joins spans that overlap
        or are at most $gap apart (the start of the later one minus the end of the earlier one). A joined span
        is joined with others in the same way. A span whose start is greater than its end means the same span
        with the two swapped. The function returns the list of the spans [start, end] that result, sorted by
        start, without those whose end minus start is less than $shortest. An empty list gives an empty
        list.""",
        """
def join_spans_and_drop_short(spans):
    joined = []
    for start, end in sorted(sorted(span) for span in spans):
        if joined and start - joined[-1][1] <= $gap:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    return [[start, end] for start, end in joined if end - start >= $shortest]
""",
        draw=lambda rng, p: [
            [[start, start + rng.randint(-6, 12)] for start in integers(rng, -20, 50, 6, min_length=2)]
        ],
        edges=lambda p: [
            [[]],
            [[[3, 3 + p.shortest]]],
            [[[3 + p.shortest, 3], [40, 39 + p.shortest]]],
            [[[0, p.shortest], [p.shortest + p.gap, 2 * p.shortest + p.gap]]],
            [[[0, p.shortest], [p.shortest + p.gap + 1, 2 * p.shortest + p.gap]]],
            [[[5, 5], [0, 30]]],
            [[[p.gap + 2, p.shortest + p.gap + 2], [p.gap + 1, p.shortest + p.gap + 3], [-p.shortest, 0]]],
            [[[x, x + 1] for x in range(p.shortest)]],
        ],
        parameters={"gap": range(1, 11), "shortest": range(3, 13)},
    ),
    Family(
        "lists",
        "pack_boxes_heaviest_first(weights)",
        """packs items with the weights in a list of positive integers and returns the boxes as a list of
        lists of weights. The items are packed from the heaviest to the lightest. Each goes into the box
        opened earliest among those that with it weigh at most $capacity and hold at most $most items; if
        there is no such box, a new one is opened for it. Items heavier than $capacity are left out. The boxes
        stand in the order in which they were opened, and the weights in a box in the order of packing. An
        empty list gives an empty list.""",
        """
def pack_boxes_heaviest_first(weights):
    boxes = []
    for weight in sorted(weights, reverse=True):
        if weight > $capacity:
            continue
        for box in boxes:
            if sum(box) + weight <= $capacity and len(box) < $most:
                box.append(weight)
                break
        else:
            boxes.append([weight])
    return boxes
""",
        draw=lambda rng, p: [integers(rng, 1, p.capacity * 2 // 3, 9, min_length=4)],
        edges=lambda p: [
            [[]],
            [[p.capacity]],
            [[p.capacity + 1, 1]],
            [[1, p.capacity - 1]],
            [[1] * (p.most + 1)],
            [[2, p.capacity - 3, p.capacity - 2]],
            [[2, p.capacity // 2, p.capacity // 2]],
            [[1, 1, p.capacity]],
        ],
        parameters={"capacity": range(10, 30), "most": range(2, 6)},
    ),
    Family(
        "lists",
        "inland_lake_sizes(rows)",
        """takes a map, a list of equally long strings in which "$water" is water and "." is land, and returns
        a list of integers. Two water cells touch if the $contact of their distance in rows and their distance
        in columns is 1. A lake is a group of water cells connected by touching, to which no further water
        cell can be added. Lakes with a cell in the first or last row or in the first or last column do not
        count, and neither do lakes of fewer than $least cells. The result holds the number of cells of each
        other lake, from the largest to the smallest. An empty map gives an empty list.""",
        """
def inland_lake_sizes(rows):
    water = {(y, x) for y, row in enumerate(rows) for x, char in enumerate(row) if char == "$water"}
    sizes = []
    while water:
        lake = [water.pop()]
        for y, x in lake:
            touching = {(b, a) for b, a in water if $contact([abs(b - y), abs(a - x)]) == 1}
            lake += touching
            water -= touching
        inland = all(0 < y < len(rows) - 1 and 0 < x < len(rows[0]) - 1 for y, x in lake)
        if inland and len(lake) >= $least:
            sizes.append(len(lake))
    return sorted(sizes, reverse=True)
""",
        draw=lambda rng, p: [lake_map(rng, p.water)],
        edges=lambda p: [
            [[]],
            [strips([p.least - 1, p.least, p.least + 2], p.water)],
            [strips([p.least + 2, p.least, p.least + 1, p.least], p.water)],
            *([rows] for rows in stranded(p.least, p.water)),
            [["." * 6, f".{p.water * 3}..", f"....{p.water}.", f"...{p.water}..", "." * 6]],
        ],
        parameters={
            "water": "~wo*#=+%",
            "least": range(2, 6),
            "contact": ("sum", "max"),
        },
    ),
    Family(
        "numbers",
        "digit_power_tail_and_cycle(n)",
        """starts with the non-negative integer n and again and again replaces the current number by $plus
        plus the sum of its decimal digits, each raised to the power $power. It stops at the first number that
        has come up before (n is the first number to come up). It returns a list of two integers: how many
        numbers came up before that number did so for the first time, and how many came up from its first time
        on, without its second time.""",
        """
def digit_power_tail_and_cycle(n):
    seen = []
    while n not in seen:
        seen.append(n)
        n = $plus + sum(int(digit) ** $power for digit in str(n))
    return [seen.index(n), len(seen) - seen.index(n)]
""",
        draw=lambda rng, p: [rng.randint(2, 999)],
        edges=lambda p: [[0], [1], [10], [p.plus]],
        parameters={"power": (2, 3, 4), "plus": range(1, 26)},
    ),
    Family(
        "numbers",
        "pens_in_crates_and_boxes(pens)",
        """returns an integer number of pens as a string like "2 crates, 3 boxes, 5 pens", where a crate holds
        $boxes boxes, a box holds $pens pens, and as many crates and then as many boxes as possible are used.
        Units whose number is 0 are left out, and the number 1 takes the singular ("1 crate", "1 box",
        "1 pen"). A negative number gives "minus " followed by the text for its absolute value, and 0 gives
        "no pens".""",
        """
def pens_in_crates_and_boxes(pens):
    if pens == 0:
        return "no pens"
    boxes, loose = divmod(abs(pens), $pens)
    crates, boxes = divmod(boxes, $boxes)
    units = [(crates, "crate", "crates"), (boxes, "box", "boxes"), (loose, "pen", "pens")]
    parts = [f"{count} {one if count == 1 else many}" for count, one, many in units if count]
    return ("minus " if pens < 0 else "") + ", ".join(parts)
""",
        draw=lambda rng, p: [rng.randint(-1, 3) * p.boxes * p.pens + rng.randint(1, p.boxes * p.pens)],
        edges=lambda p: [
            [0],
            [1],
            [p.pens],
            [p.boxes * p.pens],
            [2 * p.boxes * p.pens + p.pens + 1],
            [p.boxes * p.pens - 1],
            [-1],
            [-(p.boxes * p.pens + 2 * p.pens + 1)],
        ],
        parameters={"boxes": range(3, 13), "pens": range(4, 14)},
    ),
    Family(
        "numbers",
        "count_multiples_with_calm_digits(low, high)",
        """returns how many integers from low to high, both included, fulfil three conditions. The integer is
        a multiple of $divisor (0 is one), its decimal digits add up to at most $most, and no two digits that
        stand side by side are equal. The digits of a negative integer are those of its absolute value. If low
        is greater than high, the result is 0.""",
        """
def count_multiples_with_calm_digits(low, high):
    count = 0
    for number in range(low, high + 1):
        digits = str(abs(number))
        calm = all(a != b for a, b in zip(digits, digits[1:]))
        count += number % $divisor == 0 and sum(map(int, digits)) <= $most and calm
    return count
""",
        draw=lambda rng, p: [low := rng.randint(-300, 700), low + rng.randint(100, 900)],
        edges=lambda p: [[0, 0], [1, 0], [100, 1999], [-60, 60], [-p.divisor, -1], [p.divisor, p.divisor]],
        parameters={"divisor": (2, 4, 5, 7, 8, 13, 14, 16, 17, 19), "most": range(8, 19)},
    ),
    Family(
        "dictionaries",
        "balances_after_transfers(transfers)",
        """carries out a list of transfers [sender, receiver, amount] (two strings and a positive integer) in
        their order and returns a dictionary from name to final balance, an integer. Everyone starts with 0,
        and on top of the amount the sender pays a fee of $fee, which nobody receives. A transfer is skipped
        if sender and receiver are the same or if it would leave the sender with less than -$overdraft. The
        dictionary has exactly the names in transfers that are not skipped.""",
        """
def balances_after_transfers(transfers):
    balances = {}
    for sender, receiver, amount in transfers:
        left = balances.get(sender, 0) - amount - $fee
        if sender != receiver and left >= -$overdraft:
            balances[sender] = left
            balances[receiver] = balances.get(receiver, 0) + amount
    return balances
""",
        draw=lambda rng, p: [
            [
                [rng.choice("abcd"), rng.choice("abcd"), rng.randint(1, p.overdraft)]
                for _ in range(rng.randint(3, 5))
            ]
        ],
        edges=lambda p: [
            [[]],
            [[["c", "b", 5], ["a", "b", p.overdraft - p.fee]]],
            [[["a", "b", p.overdraft - p.fee + 1]]],
            [[["a", "a", 5]]],
            [[["c", "b", 5], ["b", "a", p.overdraft - p.fee + 5], ["a", "d", 2 * p.overdraft]]],
        ],
        parameters={"overdraft": range(20, 70, 5), "fee": range(1, 9)},
    ),
    Family(
        "dictionaries",
        "places_without_worst_scores(scores)",
        """takes a dictionary from player to list of integer scores and returns a dictionary from player to a
        list of two integers, place and total. A player's total is the sum of the scores without the $drop
        lowest ones, plus $bonus if all the scores that remain are at least $floor. The place is 1 plus the
        number of players with a higher total, so equal totals share a place. Players with at most $drop
        scores are ignored altogether.""",
        """
def places_without_worst_scores(scores):
    totals = {}
    for player, values in scores.items():
        kept = sorted(values)[$drop:]
        if kept:
            totals[player] = sum(kept) + ($bonus if min(kept) >= $floor else 0)
    place = {total: 1 + sum(other > total for other in totals.values()) for total in totals.values()}
    return {player: [place[total], total] for player, total in totals.items()}
""",
        draw=lambda rng, p: [
            {
                name: integers(rng, p.floor - 2, p.floor + 4, p.drop + 2, min_length=p.drop)
                for name in rng.sample(["ann", "bob", "cem", "dee", "eve"], rng.randint(2, 4))
            }
        ],
        edges=lambda p: [
            [{}],
            [{"ann": [9] * p.drop, "bob": [1] * (p.drop + 1)}],
            [{"ann": [1] * (p.drop + 1), "bob": [2] * (p.drop + 1), "cem": [2] * (p.drop + 1)}],
            [{"ann": [0] * p.drop + [p.floor], "bob": [0] * p.drop + [p.floor - 1]}],
            [{"ann": [p.floor] + [0] * p.drop, "bob": [p.floor + p.bonus] + [0] * p.drop}],
            [{"ann": [0] * p.drop + [p.floor - 1, p.floor + 1], "bob": [p.floor] * (p.drop + 2)}],
        ],
        parameters={"drop": (2, 3), "bonus": range(2, 8), "floor": range(4, 10)},
    ),
    Family(
        "dictionaries",
        "documents_by_common_tag(documents)",
        """takes a dictionary from document name to list of tags and returns a dictionary from tag to list of
        the names of the documents that have it, in alphabetical order and each once. Tags are put into
        lowercase first, and then one "$prefix" at the beginning of a tag is taken off. Tags that fewer than
        $least documents have are left out, and of each list only the first $most names are kept.""",
        """
def documents_by_common_tag(documents):
    index = {}
    for name in sorted(documents):
        for tag in sorted({tag.lower().removeprefix("$prefix") for tag in documents[name]}):
            index.setdefault(tag, []).append(name)
    return {tag: names[:$most] for tag, names in index.items() if len(names) >= $least}
""",
        draw=lambda rng, p: [
            {
                name: rng.choices(
                    ["sun", "Sun", p.prefix + "sun", "sea", p.prefix + "SEA"], k=rng.randint(1, 2)
                )
                for name in rng.sample("abcdefgh", rng.randint(4, 5))
            }
        ],
        edges=lambda p: [
            [{}],
            [{"b": [p.prefix + "sun"] * p.least} | {name: ["sea"] for name in "ac"[: p.least - 1]}],
            [{name: ["Sea"] for name in "fedcba"[-p.least :]}],
            [{name: [p.prefix.upper() + "sea", "ice"] for name in "fdbace"}],
            [{name: [p.prefix * 2 + "ice"] for name in "cab"}],
        ],
        parameters={
            "prefix": ("x-", "the-", "my-", "un", "re-", "#", "@", "+", "no-", "old-", "pre", "sub-"),
            "least": (2, 3),
            "most": (3, 4, 5),
        },
    ),
    Family(
        "recursion",
        "count_step_sequences(total)",
        """returns the number of sequences of steps, each step $short, $medium or $long long, that add up to
        exactly the integer total and in which the same step never occurs more than $run times in a row.
        Sequences with the same steps in a different order are different. For total 0 the empty sequence
        counts, so the result is 1; for a negative total it is 0.""",
        """
from functools import cache


def count_step_sequences(total):
    @cache
    def count(rest, last, streak):
        if rest == 0:
            return 1
        ways = 0
        for step in ($short, $medium, $long):
            if step <= rest and (step != last or streak < $run):
                ways += count(rest - step, step, streak + 1 if step == last else 1)
        return ways

    return count(total, 0, 0)
""",
        draw=lambda rng, p: [rng.randint(p.long, 32)],
        edges=lambda p: [
            [0],
            [-1],
            [p.short],
            [p.short * (p.run + 1)],
            [p.short + p.medium],
            [p.medium * (p.run + 1)],
            [p.medium * p.run + p.short],
        ],
        parameters={"short": (1, 2), "medium": (3, 4, 5), "long": (7, 9, 11), "run": range(2, 6)},
    ),
    Family(
        "recursion",
        "flatten_paths_to_depth(data)",
        """flattens a nested dictionary of integers, lists and dictionaries (with strings as keys) and
        returns one dictionary. Each of its keys is a path: the keys from the outside to the inside, joined by
        "$separator", where a list counts as a dictionary whose keys are the positions of its items, counted
        from $first. A path has at most $depth keys; what stands at a path of $depth keys is its value,
        unchanged. An empty list or dictionary inside data is a value like an integer and is kept; for empty
        data the result is empty.""",
        """
def flatten_paths_to_depth(data):
    flat = {}

    def visit(path, value):
        if len(path) == $depth or not isinstance(value, (list, dict)) or not value:
            flat["$separator".join(path)] = value
            return
        for key, child in value.items() if isinstance(value, dict) else enumerate(value, $first):
            visit([*path, str(key)], child)

    for key, value in data.items():
        visit([key], value)
    return flat
""",
        draw=lambda rng, p: [
            {"x": nested(rng, rng.choice([p.depth - 1, p.depth, p.depth]))}
            | rng.choice([{}, {"y": rng.randint(0, 9)}])
        ],
        edges=lambda p: [
            [{}],
            [{"a": {}, "b": {"c": []}}],
            [{"a": [[[[[1, 2]]]]]}],
            [{"a": {"b": {"c": {"d": {"e": 1}}}}}],
            [{"a": [5, {"b": 6}], "b": 7}],
        ],
        parameters={
            "separator": (".", "/", ":", "->", "__", "|", "-", "+"),
            "depth": (2, 3, 4),
            "first": (0, 1, 2),
        },
    ),
    Family(
        "recursion",
        "folder_totals_from_tree(tree)",
        """takes a folder, a dictionary in which each value is the size of a file (an integer) or another
        folder, and returns a dictionary from path to total size. It has every folder whose total size is at
        least $least, which can include tree itself. The total size of a folder is $own plus the sizes of its
        files plus the total sizes of the folders directly in it. The path of tree is ""; that of another
        folder is the names from the outside to the inside joined by "/", like "a/b".""",
        """
def folder_totals_from_tree(tree):
    totals = {}

    def total(path, node):
        if isinstance(node, int):
            return node
        size = $own + sum(total([*path, name], child) for name, child in node.items())
        if size >= $least:
            totals["/".join(path)] = size
        return size

    total([], tree)
    return totals
""",
        draw=lambda rng, p: [folder(rng, 2, p.least - 2)],
        edges=lambda p: [
            [{}],
            [{"a": p.least - p.own}],
            [{"a": p.least - p.own - 1}],
            [{"a": {"b": p.least - p.own}}],
            [{"a": {"b": {"c": p.least, "d": {}}}, "e": {"f": 1}}],
            [{"a": {name: p.least - p.own - 1 for name in "bc"}}],
        ],
        parameters={"own": range(1, 9), "least": range(12, 32, 2)},
    ),
    Family(
        "recursion",
        "spaced_sums_of_integer(n)",
        """returns all ways to write the integer n as a sum of integer parts, as a list of lists. Each part is
        at least $smallest, is not divisible by $skip, and is at least $gap greater than the part after it, so
        the parts of a sum are in descending order. Sums with a greater first part come first, among sums with
        the same first part those with a greater second part, and so on. For 0 the result is [[]], the empty
        sum; if there is no way, as for negative n, it is [].""",
        """
def spaced_sums_of_integer(n):
    def sums(rest, largest):
        if rest == 0:
            return [[]]
        found = []
        for part in reversed(range($smallest, min(rest, largest) + 1)):
            if part % $skip:
                found += [[part, *tail] for tail in sums(rest - part, part - $gap)]
        return found

    return sums(n, n)
""",
        draw=lambda rng, p: [rng.randint(8, 20)],
        edges=lambda p: [
            *([0], [-3], [p.smallest - 1], [2 * p.skip]),
            *([2 * p.smallest + p.gap], [2 * p.smallest + p.gap + 2]),
        ],
        parameters={"smallest": (2, 3, 4), "gap": range(2, 6), "skip": range(4, 10)},
    ),
    Family(
        "simulation",
        "robot_on_cylinder(commands)",
        """follows a string of commands for a robot on a grid with columns 0 to $columns and rows 0 to $rows,
        and returns the list [column, row, direction] at the end. The robot starts in column 0, row 0, heading
        "N"; "L" and "R" turn it by 90 degrees to the left or right, and "F" moves it one cell: "N" is row +
        1, "E" is column + 1, "S" is row - 1 and "W" is column - 1. The columns form a ring, so column 0 is
        next to column $columns. An "F" that would leave the rows does not move the robot but turns it by 180
        degrees.""",
        """
def robot_on_cylinder(commands):
    column, row, facing = 0, 0, 0
    for command in commands:
        if command == "L":
            facing = (facing - 1) % 4
        elif command == "R":
            facing = (facing + 1) % 4
        else:
            dx, dy = [(0, 1), (1, 0), (0, -1), (-1, 0)][facing]
            if 0 <= row + dy <= $rows:
                column, row = (column + dx) % ($columns + 1), row + dy
            else:
                facing = (facing + 2) % 4
    return [column, row, "NESW"[facing]]
""",
        draw=lambda rng, p: [word(rng, 16, 4, "FFFLR")],
        edges=lambda p: [
            [""],
            ["F" * p.rows],
            ["F" * (p.rows + 3)],
            ["LLFFLLF"],
            ["RRRRR" + "F" * p.columns],
            ["R" + "F" * (p.columns + 2)],
            ["LLLLLF"],
        ],
        parameters={"columns": range(2, 10), "rows": range(2, 10)},
    ),
    Family(
        "simulation",
        "expiring_cache_report(requests)",
        """simulates a cache of at most $capacity keys, empty at first, for a list of requested keys
        (integers). A requested key that is not in the cache is loaded, in place of the least recently
        requested one if the cache is full. A key last loaded by request number i is dropped just before
        request i + $life, even if it was requested in between. The result is a dictionary: "hits" is the
        number of requests whose key was in the cache, "keys" the list of the keys in it at the end, the least
        recently requested first.""",
        """
def expiring_cache_report(requests):
    loaded_at, hits = {}, 0
    for now, key in enumerate(requests):
        loaded_at = {kept: since for kept, since in loaded_at.items() if now - since < $life}
        if key in loaded_at:
            hits += 1
        elif len(loaded_at) == $capacity:
            del loaded_at[next(iter(loaded_at))]
        loaded_at[key] = loaded_at.pop(key, now)
    return {"hits": hits, "keys": list(loaded_at)}
""",
        draw=lambda rng, p: [cached_keys(rng, p.capacity, p.life)],
        edges=lambda p: [
            [[]],
            [[5] * p.life],
            [[5] * (p.life + 1)],
            [[5] * (2 * p.life)],
            [[*range(p.capacity), 0, 99]],
            [[*range(p.capacity + 1), 0]],
        ],
        parameters={"capacity": range(2, 7), "life": range(8, 21)},
    ),
    Family(
        "simulation",
        "timeline_with_cooldown(jobs)",
        """runs the jobs in a string of lowercase letters, one letter per job, in their order and each as
        early as possible, and returns the timeline as a string with one character per time slot: the letter
        of the job, or "-" for a slot without a job. Between two jobs with the same letter there must be at
        least $cooldown slots, which may hold other jobs. When $batch slots in a row held jobs, the next slot
        must be empty. The timeline ends with the last job.""",
        """
def timeline_with_cooldown(jobs):
    timeline = ""
    for job in jobs:
        while job in timeline[-$cooldown:] or (len(timeline) >= $batch and "-" not in timeline[-$batch:]):
            timeline += "-"
        timeline += job
    return timeline
""",
        draw=lambda rng, p: [spread_jobs(rng, p.cooldown, p.batch)],
        edges=lambda p: [
            [""],
            ["aa"],
            ["aba"],
            [ALPHABET[: p.batch]],
            [(ALPHABET[: p.cooldown + 1] * 27)[: 2 * p.batch + 1]],
            ["a" + ALPHABET[: p.batch]],
        ],
        parameters={"cooldown": range(1, 7), "batch": range(3, 14)},
    ),
    Family(
        "simulation",
        "serving_start_times(customers)",
        """simulates a shop with $counters counters for a list of customers [arrival, duration] (integers, in
        minutes), sorted by arrival, and returns the list of the minutes at which their service starts. They
        are served in that order, each customer as early as possible once the customer has arrived and a
        counter is free. All counters are free at first, and a counter is free again $rest minutes after a
        service at it ends. A customer who would have to wait more than $patience minutes leaves at once
        without being served and has None in the list.""",
        """
def serving_start_times(customers):
    free_at, starts = [0] * $counters, []
    for arrival, duration in customers:
        counter = free_at.index(min(free_at))
        start = max(arrival, free_at[counter])
        if start - arrival > $patience:
            starts.append(None)
        else:
            starts.append(start)
            free_at[counter] = start + duration + $rest
    return starts
""",
        draw=lambda rng, p: [
            [
                [arrival, rng.randint(2, 9)]
                for arrival in sorted(integers(rng, 0, 9, p.counters + 4, p.counters + 2))
            ]
        ],
        edges=lambda p: [
            [[]],
            [[[3, 5]]],
            [[[0, 10]] * p.counters + [[10 + p.rest - p.patience, 3]] * p.counters + [[12 + 2 * p.rest, 2]]],
            [[[0, 10]] * p.counters + [[9 + p.rest - p.patience, 3]]],
            [[[0, 10]] * p.counters + [[0, 9]] * p.counters + [[9 + p.rest, 2]]],
        ],
        parameters={"counters": (2, 3), "patience": range(2, 10), "rest": range(2, 6)},
    ),
    Family(
        "parsing",
        "evaluate_with_extra_operator(text)",
        """evaluates the expression in the string text and returns its value, an integer. The expression
        consists of non-negative integers, the operators +, - and $operator, and round brackets, with single
        spaces between some of them, and is always well-formed. a $operator b stands for $factor * a - b, and
        $operator binds more tightly than + and -. Operators that bind equally tightly are applied from left
        to right.""",
        r"""
import re


def evaluate_with_extra_operator(text):
    tokens = re.findall(r"\d+|\S", text)

    def operand():
        token = tokens.pop(0)
        if token != "(":
            return int(token)
        value = additive()
        tokens.pop(0)
        return value

    def tight():
        value = operand()
        while tokens and tokens[0] == "$operator":
            tokens.pop(0)
            value = $factor * value - operand()
        return value

    def additive():
        value = tight()
        while tokens and tokens[0] in "+-":
            value += tight() if tokens.pop(0) == "+" else -tight()
        return value

    return additive()
""",
        draw=lambda rng, p: [expression(rng, p.operator)],
        edges=lambda p: [
            [text.replace("@", p.operator)]
            for text in ("17", "2@3@4", "1+2@3", "9 - 4 - 3", "9-(3-1)", "((4))", "12@5", "(1@2)-(3@4)")
        ],
        parameters={"operator": "@#&%^~!|", "factor": range(2, 11)},
    ),
    Family(
        "parsing",
        "expand_counted_groups(code)",
        """expands the string code, which is always well-formed, and returns the resulting string. A letter
        stands for itself, and a group, which is a code again (or empty), stands between the two brackets
        "$group". A decimal number right before a letter or group says how often it is repeated (0: left out;
        a number above $cap counts as $cap; no number: once). "$escape" itself does not appear in the result,
        but makes the character after it count as a letter, even a digit, a bracket or another "$escape"; a
        number for that letter stands before the "$escape".""",
        """
def expand_counted_groups(code):
    opening, closing = "$group"
    chars = iter(code)

    def group():
        text, count = "", ""
        for char in chars:
            if char == closing:
                break
            if char.isdigit():
                count += char
                continue
            unit = next(chars) if char == "$escape" else group() if char == opening else char
            text += unit * min(int(count or 1), $cap)
            count = ""
        return text

    return group()
""",
        draw=lambda rng, p: [counted(rng, p.group, p.escape)],
        edges=lambda p: [
            [text.replace("(", p.group[0]).replace(")", p.group[1]).replace("!", p.escape)]
            for text in ("", "0a", "12a", "2(a3(b))c", "10(a0(bc))", "2!(3!5", "4()a")
        ],
        parameters={"group": ("()", "[]", "{}", "<>"), "cap": range(3, 10), "escape": "!~%"},
    ),
    Family(
        "parsing",
        "read_settings_by_section(text)",
        """reads the lines of the string text and returns a dictionary from section to the dictionary of its
        settings. Everything from the first "$comment" of a line on is dropped. A line "[name]" (letters only)
        begins or continues that section ("$default" before the first such line). A line with a "$separator"
        is a setting: a key (letters only), the first "$separator", a value. Other lines are ignored. If a key
        is repeated in a section, the last one counts. Spaces around lines, keys and values are dropped.
        Values of digits only become integers, others (even "") stay strings. Sections without settings are
        left out.""",
        """
def read_settings_by_section(text):
    settings, section = {}, "$default"
    for line in text.split("\\n"):
        line = line.split("$comment")[0].strip()
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1]
        elif "$separator" in line:
            key, value = (part.strip() for part in line.split("$separator", 1))
            settings.setdefault(section, {})[key] = int(value) if value.isdigit() else value
    return settings
""",
        draw=lambda rng, p: [settings(rng, p.separator, p.comment)],
        edges=lambda p: [
            [text.replace("=", p.separator).replace("#", p.comment)]
            for text in (
                "",
                "[in]\nno-thing > none",
                "a = b = c",
                "a=1\n[in]\na = 07 # x\nb=",
                " [in]\na=1\n[out]\n\n[in]\nb=-2",
                "# a=1\n b = 2/3",
                "[in\nnothing]\na=[b]",
                "[in] # x\na=b",
            )
        ],
        parameters={
            "separator": ("=", ":", "->", "~"),
            "comment": ("#", ";", "%", "//"),
            "default": ("general", "main", "top", "base", "common"),
        },
    ),
    Family(
        "parsing",
        "split_record_with_quotes(line)",
        """splits the string line at every "$separator" that is not in quotes and returns the list of fields.
        The quotation mark is "$quote", both to begin and to end a quoted piece, which is a field or a part of
        one; inside a piece, two quotation marks in a row stand for one that belongs to the field. The
        quotation marks that begin or end a piece and all spaces outside of quotes are left out. A field for
        which line holds nothing, or only spaces, is None and not a string, so an empty line gives [None];
        quotes are always closed.""",
        """
def split_record_with_quotes(line):
    fields, field, inside = [], None, False
    chars = list(line)
    while chars:
        char = chars.pop(0)
        if inside and char == "$quote" and chars[:1] == ["$quote"]:
            field += chars.pop(0)
        elif char == "$quote":
            inside, field = not inside, field or ""
        elif inside or char not in " $separator":
            field = (field or "") + char
        elif char == "$separator":
            fields.append(field)
            field = None
    return [*fields, field]
""",
        draw=lambda rng, p: [
            p.separator.join(quoted_field(rng, p.separator, p.quote) for _ in range(rng.randint(1, 4)))
        ],
        edges=lambda p: [
            [text.replace(",", p.separator).replace("'", p.quote)]
            for text in ("", ",", "'',a", " 'a,b' , c", "'it''s',b", "' a '", "''''", "x'y,z'")
        ],
        parameters={"separator": ",;|/:&+=", "quote": "'`^~*%!@"},
    ),
)
