"""Families of medium function-writing problems: a short loop with state. Fields: see family.Family."""

import random

from gspo.tasks.code_families.family import Family, integers, word, words


def nested(rng: random.Random, low: int, high: int, depth: int) -> list:
    """A list of integers and of lists, at most `depth` lists deep."""
    return [
        nested(rng, low, high, depth - 1) if depth > 1 and rng.random() < 0.6 else rng.randint(low, high)
        for _ in range(rng.randint(1, 3))
    ]


def tree(rng: random.Random, max_size: int, depth: int) -> list:
    """A node [name, size, children], at most `depth` levels."""
    count = rng.choice([1, 2, 2]) if depth > 1 else 0
    children = [tree(rng, max_size, rng.randint(1, depth - 1)) for _ in range(count)]
    return [word(rng, 2, letters="abcdefghijkmnop"), rng.randint(0, max_size), children]


def shift(start: int, minutes: int) -> str:
    """A shift from `start`, in minutes after midnight, as '23:30-0:15'."""
    return "-".join(f"{time // 60 % 24}:{time % 60:02}" for time in (start, start + minutes))


MEDIUM = (
    Family(
        "strings",
        "mask_long_runs(text)",
        """returns the string text in which every run of $k or more equal characters in a row, taken as long
        as possible, is replaced by a single '$mark'. Shorter runs stay as they are, upper and lower case
        are different characters, and an empty string gives an empty string.""",
        """
from itertools import groupby

def mask_long_runs(text):
    runs = ["".join(run) for _, run in groupby(text)]
    return "".join("$mark" if len(run) >= $k else run for run in runs)
""",
        draw=lambda rng, p: ["".join(rng.choice("abB") * rng.randint(1, p.k + 1) for _ in range(5))],
        edges=lambda p: [[""], ["a" * p.k], ["ab" + "b" * (p.k - 2)], ["c" * 2 * p.k], ["aA" * p.k]],
        parameters={"k": range(2, 7), "mark": "#*-+_.~^@!%&=?:"},
    ),
    Family(
        "strings",
        "restyle_long_words(sentence)",
        """takes a string of lowercase words separated by single spaces and returns the string in which every
        word of at least $n letters is reversed and every word that begins with '$c' in the given sentence
        is put in capitals. A word for which both hold is changed in both ways. The words keep their
        places, and an empty string gives an empty string.""",
        """
def restyle_long_words(sentence):
    result = []
    for word in sentence.split(" "):
        styled = word[::-1] if len(word) >= $n else word
        result.append(styled.upper() if word.startswith("$c") else styled)
    return " ".join(result)
""",
        draw=lambda rng, p: [
            " ".join(words(rng, 5, 2, max_length=p.n + 2, min_length=2, letters="abeo" + 3 * p.c))
        ],
        edges=lambda p: [
            [""],
            [p.c],
            [p.c + "o" * (p.n - 1)],
            ["o" * (p.n - 1) + p.c],
            ["ab" + "e" * (p.n - 3)],
        ],
        parameters={"n": range(3, 7), "c": "cdfghijklmnpqrstuvwxyz"},
    ),
    Family(
        "strings",
        "longest_piece_with_few(text)",
        """returns the longest substring (characters in a row) of the string text that contains '$c' at most
        $k times. If several substrings have this greatest length, it returns the leftmost of them. An
        empty string gives an empty string.""",
        """
def longest_piece_with_few(text):
    best, start, count = "", 0, 0
    for end, char in enumerate(text):
        count += char == "$c"
        while count > $k:
            count -= text[start] == "$c"
            start += 1
        if end + 1 - start > len(best):
            best = text[start : end + 1]
    return best
""",
        draw=lambda rng, p: [word(rng, 14, 7, letters="abcd" + 3 * p.c)],
        edges=lambda p: [
            [""],
            [p.c * (p.k + 1)],
            ["1" + p.c * (p.k + 1) + "2"],
            [(p.c + "1") * (p.k + 2) + "2"],
        ],
        parameters={"k": range(2, 6), "c": "abcdefghijklmnopqrstuvwxyz"},
    ),
    Family(
        "strings",
        "shift_every_nth_letter(text)",
        """numbers the lowercase letters 'a' to 'z' of the string text from left to right, starting with 1,
        and returns the string in which each lowercase letter whose number is a multiple of $n is moved $s
        places forward in the alphabet, where 'a' follows 'z'. The other lowercase letters stay as they
        are, and so do all other characters, which get no number.""",
        """
def shift_every_nth_letter(text):
    result, number = "", 0
    for char in text:
        if "a" <= char <= "z":
            number += 1
            if number % $n == 0:
                char = chr((ord(char) - ord("a") + $s) % 26 + ord("a"))
        result += char
    return result
""",
        draw=lambda rng, p: [word(rng, 12, 5, letters="abcmtyz A-")],
        edges=lambda p: [[""], ["z" * 2 * p.n], ["a" * (2 * p.n - 1)], ["A-b" * p.n], ["-{" + "c" * p.n]],
        parameters={"n": range(2, 6), "s": range(2, 26)},
    ),
    Family(
        "lists",
        "first_heavy_window(numbers)",
        """looks in the list numbers for $w neighbouring integers whose sum is at least $total and returns the
        index of the first of the $w integers. If there are several such places, the leftmost one counts.
        It returns -1 if there is none, which includes every list of fewer than $w integers.""",
        """
def first_heavy_window(numbers):
    for start in range(len(numbers) - $w + 1):
        if sum(numbers[start : start + $w]) >= $total:
            return start
    return -1
""",
        draw=lambda rng, p: [
            integers(rng, -1, p.total // p.w, 5, 2) + integers(rng, 1, 2 * p.total // p.w + 2, 8, p.w)
        ],
        edges=lambda p: [
            [[]],
            [[p.total] * (p.w - 1)],
            [[p.total] + [0] * (p.w - 1)],
            [[0] * (p.w + 1) + [p.total]],
            [[1] + [0] * p.w + [p.total - 1]],
            [[p.total - 1] + [0] * (p.w - 1) + [p.total]],
            [[-1] + [-(-p.total // p.w)] * p.w],
        ],
        parameters={"w": range(2, 6), "total": range(10, 35)},
    ),
    Family(
        "lists",
        "spans_of_close_numbers(numbers)",
        """sorts the integers of the list numbers and splits them into groups: a new group begins wherever an
        integer exceeds the one before it by more than $gap. It returns a list with [smallest, largest] for
        every group that has at least $m members, in ascending order. Equal integers are separate members,
        and an empty list gives an empty list.""",
        """
def spans_of_close_numbers(numbers):
    groups = []
    for number in sorted(numbers):
        if groups and number - groups[-1][-1] <= $gap:
            groups[-1].append(number)
        else:
            groups.append([number])
    return [[group[0], group[-1]] for group in groups if len(group) >= $m]
""",
        draw=lambda rng, p: [integers(rng, -3 * p.gap - 2, 3 * p.gap + 2, 10, 6)],
        edges=lambda p: [
            [[]],
            [[p.gap * i for i in (3, 1, 2, 0)]],
            [[5] * p.m],
            [[0] * p.m + [p.gap + 1] * p.m],
            [[7] * (p.m - 1)],
        ],
        parameters={"gap": range(1, 31), "m": range(2, 5)},
    ),
    Family(
        "lists",
        "thin_out_repeats(numbers)",
        """returns a list of the integers of the list numbers in the same order, in which an integer that is a
        multiple of $d (as 0 is) is kept at most $k times and any other integer at most once. The first
        occurrences of an integer are the ones that are kept.""",
        """
def thin_out_repeats(numbers):
    kept = []
    for number in numbers:
        if kept.count(number) < ($k if number % $d == 0 else 1):
            kept.append(number)
    return kept
""",
        draw=lambda rng, p: [rng.choices([p.d, 0, p.d + 1, -p.d, 1], k=rng.randint(6, 5 + 2 * p.k))],
        edges=lambda p: [
            [[]],
            [[p.d] * (p.k + 2)],
            [[*range(1, p.d + 1)] * 2],
            [[p.d, -2 * p.d] * p.k],
            [[0] * (p.k + 1) + [1 - p.d] * p.k],
        ],
        parameters={"d": range(2, 20), "k": range(2, 6)},
    ),
    Family(
        "lists",
        "longest_gentle_climb(numbers)",
        """returns the length of the longest stretch of neighbouring elements in the list of integers numbers
        in which each element exceeds the one before it by at least $low and at most $high. A single
        element is a stretch of length 1, and an empty list gives 0.""",
        """
def longest_gentle_climb(numbers):
    longest = length = 0
    for index, number in enumerate(numbers):
        climbs = index > 0 and $low <= number - numbers[index - 1] <= $high
        length = length + 1 if climbs else 1
        longest = max(longest, length)
    return longest
""",
        draw=lambda rng, p: [
            [sum(steps[: i + 1]) for i in range(len(steps))]
            for steps in [integers(rng, p.low - 3, p.high + 3, 10, 3)]
        ],
        edges=lambda p: [
            [[]],
            [[5]],
            [[-2 * p.low, -p.low, 0, p.low, -2]],
            [[0, p.high, 2 * p.high]],
            [[1, p.high + 2, p.high + 1 + p.low]],
            [[0, 0, p.low, p.low, 2 * p.low, p.low + p.high, 2 * p.low + p.high]],
        ],
        parameters={"low": range(1, 9), "high": range(9, 21)},
    ),
    Family(
        "numbers",
        "weighted_digit_check(n)",
        """multiplies the decimal digits of the integer n (n is at least 0) by the weights $a, $b, $a, $b and
        so on in turn, beginning with the last digit, which gets $a, and going to the left. It returns the
        remainder of the sum of these products when divided by $m.""",
        """
def weighted_digit_check(n):
    digits = [int(digit) for digit in reversed(str(n))]
    return ($a * sum(digits[::2]) + $b * sum(digits[1::2])) % $m
""",
        draw=lambda rng, p: [rng.randint(0, 10 ** rng.randint(2, 6))],
        edges=lambda p: [[0], [1], [10], [99], [120], [9999]],
        parameters={"a": range(2, 6), "b": range(6, 10), "m": (10, 11, 13, 16, 17, 19)},
    ),
    Family(
        "numbers",
        "count_divisible_or_containing(n)",
        """returns how many of the integers from 1 to n, n included, either are divisible by $k or have the
        digit $d in decimal notation, but not both. It returns 0 if the integer n is less than 1.""",
        """
def count_divisible_or_containing(n):
    return sum((i % $k == 0) != ("$d" in str(i)) for i in range(1, n + 1))
""",
        draw=lambda rng, p: [rng.randint(5, 200)],
        edges=lambda p: [[0], [-p.k], [p.k], [p.d], [2 * p.k], [10 * p.d], [300]],
        parameters={"k": range(3, 13), "d": range(1, 10)},
    ),
    Family(
        "numbers",
        "next_with_digit_sum(n)",
        """returns the smallest integer that is greater than n, has decimal digits that add up to a multiple
        of $k, and does not end in the digit $d. n is an integer that is at least 0.""",
        """
def next_with_digit_sum(n):
    n += 1
    while sum(map(int, str(n))) % $k != 0 or n % 10 == $d:
        n += 1
    return n
""",
        draw=lambda rng, p: [rng.randint(1, 10 ** rng.randint(2, 4))],
        edges=lambda p: [
            *([0], [8], [p.k], [109], [589]),
            # The next integer has a fitting digit sum, and its last digit is $d or beside it.
            *([10 * (p.k - last % p.k) + last - 1] for last in (p.d, (p.d + 1) % 10, (p.d - 1) % 10)),
        ],
        parameters={"k": range(2, 10), "d": range(10)},
    ),
    Family(
        "dictionaries",
        "capped_totals_by_name(orders)",
        """takes a list of pairs [name, amount], where name is a string and amount a positive integer. It
        returns a dictionary from each name that occurs in at least $k pairs to the sum of its amounts,
        where an amount greater than $cap counts as $cap. Names in fewer pairs are left out, and an empty
        list gives an empty dictionary.""",
        """
def capped_totals_by_name(orders):
    amounts = {}
    for name, amount in orders:
        amounts.setdefault(name, []).append(min(amount, $cap))
    return {name: sum(capped) for name, capped in amounts.items() if len(capped) >= $k}
""",
        draw=lambda rng, p: [
            [[rng.choice(["ann", "bob", "cy"]), rng.randint(1, 2 * p.cap)] for _ in range(rng.randint(4, 7))]
        ],
        edges=lambda p: [
            [[]],
            [[["ann", p.cap]] * (p.k - 1) + [["bob", p.cap + 5]] * p.k],
            [[["ann", 2], ["bob", 1]] * p.k],
            [[["cy", p.cap - 1]] * (p.k + 1)],
        ],
        parameters={"k": range(2, 4), "cap": range(10, 60)},
    ),
    Family(
        "dictionaries",
        "group_by_length_remainder(words)",
        """takes a list of strings and returns a dictionary in which each key is a string, the remainder of a
        word's length when divided by $m (such as '0'), and each value is the list of the words with this
        remainder in their original order. Words that contain the lowercase letter '$c' are left out, and a
        word that is repeated is listed only once, at its first place. There are no empty lists in the
        dictionary.""",
        """
def group_by_length_remainder(words):
    groups = {}
    for word in words:
        group = str(len(word) % $m)
        if "$c" not in word and word not in groups.get(group, []):
            groups.setdefault(group, []).append(word)
    return groups
""",
        draw=lambda rng, p: [rng.choices(words(rng, 6, 5, max_length=5, letters="abeoisn" + p.c), k=6)],
        edges=lambda p: [
            [[]],
            [["sos", "ooo", "o", "sos"]],
            [["x" + p.c]],
            [["", "-", "--", p.c.upper() + "-"]],
            [[p.c, "---" + p.c + "-", "-----"]],
        ],
        parameters={"m": range(2, 6), "c": "abcdefghijklmnpqrtuvwxyz"},
    ),
    Family(
        "dictionaries",
        "units_to_reorder(stock, sold)",
        """takes two dictionaries from names of items to integers that are at least 0. What is left of an item
        in stock is its number in stock minus its number in sold (0 if it is not in sold), but never less
        than 0; items that are only in sold are ignored. The function returns a dictionary that has an
        entry for each item of which fewer than $low are left: from its name to the number of units that
        would bring what is left up to $high.""",
        """
def units_to_reorder(stock, sold):
    orders = {}
    for item, number in stock.items():
        left = max(number - sold.get(item, 0), 0)
        if left < $low:
            orders[item] = $high - left
    return orders
""",
        draw=lambda rng, p: [
            {item: rng.randint(0, 2 * p.low + 2) for item in rng.sample(["cup", "hat", "pen", "tie"], 3)},
            {item: rng.randint(0, p.low + 2) for item in rng.sample(["bag", "cup", "hat", "pen"], 2)},
        ],
        edges=lambda p: [
            [{}, {"cup": 2}],
            [{"cup": p.low, "hat": p.low - 1}, {}],
            [{"cup": p.low + 3}, {"cup": p.low + 8}],
            [{"hat": p.low + 3, "pen": 0}, {"hat": 3}],
        ],
        parameters={"low": range(2, 12), "high": range(12, 22)},
    ),
    Family(
        "recursion",
        "deep_weighted_sum(nested)",
        """takes a list of integers and lists, which can be nested to any depth, and returns the sum of all
        the integers in it that are greater than $limit, with weights. An integer that stands directly in
        the outer list has weight 1, and each further list around an integer multiplies its weight by $k.
        If there is nothing to add, it returns 0.""",
        """
def deep_weighted_sum(nested):
    total = 0
    for item in nested:
        if isinstance(item, list):
            total += $k * deep_weighted_sum(item)
        elif item > $limit:
            total += item
    return total
""",
        draw=lambda rng, p: [nested(rng, p.limit - 4, p.limit + 6, 4)],
        edges=lambda p: [
            [[]],
            [[[], [[]], p.limit]],
            [[p.limit, [p.limit + 1]]],
            [[1, [[[p.limit + 2]], p.limit + 3]]],
            [[p.limit + 1, p.limit + 1, -p.limit]],
        ],
        parameters={"limit": range(1, 17), "k": range(2, 7)},
    ),
    Family(
        "recursion",
        "flatten_to_depth(nested)",
        """takes a list of integers and lists, which can be nested to any depth, and returns a flat list of
        integers in the order from left to right, in which every list at depth $d is replaced by the single
        integer $marker, whatever it contains. The outer list is at depth 0, the lists directly in it are
        at depth 1, the lists directly in those at depth 2, and so on. An empty list at a smaller depth
        adds nothing.""",
        """
def flatten_to_depth(nested, depth=0):
    if depth == $d:
        return [$marker]
    flat = []
    for item in nested:
        flat += flatten_to_depth(item, depth + 1) if isinstance(item, list) else [item]
    return flat
""",
        draw=lambda rng, p: [nested(rng, 0, 20, p.d + 1)],
        edges=lambda p: [
            [[]],
            [[1, [2, [3, [4, [5, [6]], 7]]], 8]],
            [[[[[[]]]], [], 9]],
            [[5, [[[[1, 2], 3], 4], [[], [7]]]]],
            [[[], [[]], 4, [[6]]]],
        ],
        parameters={"d": range(2, 5), "marker": range(-30, 0)},
    ),
    Family(
        "recursion",
        "names_of_heavy_nodes(tree)",
        """takes a tree whose nodes are lists [name, size, children]: a string, an integer that is at least 0,
        and a list of nodes of the same form. The weight of a node is its own size plus the weights of its
        children. The function returns the list of the names of all nodes whose weight is at least $limit:
        the name of a node comes first, then all the names from its first child and what is below it, then
        all those from its second child and what is below it, and so on.""",
        """
def names_of_heavy_nodes(tree):
    def weight(node):
        return node[1] + sum(weight(child) for child in node[2])

    name, _, children = tree
    names = [name] if weight(tree) >= $limit else []
    for child in children:
        names += names_of_heavy_nodes(child)
    return names
""",
        draw=lambda rng, p: [tree(rng, p.limit, 3)],
        edges=lambda p: [
            [["a", p.limit, []]],
            [["b", p.limit - 1, []]],
            [["c", p.limit - 1, [["d", 1, []]]]],
            [["e", 0, [["f", 1, [["g", p.limit, []]]], ["h", 2, []]]]],
            [["k", p.limit, [["m", p.limit - 1, [["n", 0, []]]]]]],
            [["a", 0, [["d", 0, [["c", p.limit, []]]], ["b", p.limit, []]]]],
            [["p", 0, [["q", p.limit - 1, []], ["r", p.limit - 1, []]]]],
        ],
        parameters={"limit": range(10, 110)},
    ),
    Family(
        "recursion",
        "half_and_third_cost(n)",
        """returns the integer f(n) for an integer n that is at least 0. f(n) is n itself if n is less than
        $base; otherwise it is f(n // 2) + f(n // 3) + $c, where // is division rounded down.""",
        """
def half_and_third_cost(n):
    if n < $base:
        return n
    return half_and_third_cost(n // 2) + half_and_third_cost(n // 3) + $c
""",
        draw=lambda rng, p: [rng.randint(p.base + 1, 200)],
        edges=lambda p: [[0], [p.base - 1], [p.base], [p.base + 1], [2 * p.base], [6 * p.base], [500]],
        parameters={"base": range(2, 10), "c": range(3, 18)},
    ),
    Family(
        "simulation",
        "tank_level_and_spill(flows)",
        """simulates a tank that can hold $cap litres and contains $start litres at first. Each integer in the
        list flows, one after the other, is the number of litres poured in, or taken out if it is negative.
        After each of them, what is above $cap litres is spilled, and a level below 0 becomes 0. The
        function returns a list of two integers: the final level and the total number of litres spilled.""",
        """
def tank_level_and_spill(flows):
    level, spilled = $start, 0
    for flow in flows:
        level = max(level + flow, 0)
        spilled += max(level - $cap, 0)
        level = min(level, $cap)
    return [level, spilled]
""",
        draw=lambda rng, p: [integers(rng, -p.cap // 2, p.cap * 3 // 4, 7, 3)],
        edges=lambda p: [
            [[]],
            [[p.cap - p.start]],
            [[p.cap + 5, 3, -4]],
            [[-p.start - 7, 5]],
            [[p.cap, -2 * p.cap, p.cap + 1]],
        ],
        parameters={"cap": range(20, 40), "start": range(2, 17, 3)},
    ),
    Family(
        "simulation",
        "walk_around_ring(commands)",
        """moves a walker on a ring of $n cells, which are numbered from 0 and where cell 0 follows the last
        one. It starts in cell 0 and faces the higher numbers. For each letter of the string commands, 'S'
        moves it one cell and 'J' moves it $j cells at once in the direction it faces, and 'T' turns it
        round. The function returns a list of two integers: the cell in which it ends, and the number of
        different cells in which it stood after some command or at the start.""",
        """
def walk_around_ring(commands):
    cell, direction, visited = 0, 1, {0}
    for command in commands:
        if command == "T":
            direction = -direction
        else:
            cell = (cell + direction * ($j if command == "J" else 1)) % $n
            visited.add(cell)
    return [cell, len(visited)]
""",
        draw=lambda rng, p: [word(rng, 10, 3, letters="SSJJT")],
        edges=lambda p: [[""], ["S"], ["TJ"], ["S" * p.n], ["JTJJTJ"], ["TTSTJ"], ["TSTJ"]],
        parameters={"n": range(7, 21), "j": range(2, 7)},
    ),
    Family(
        "simulation",
        "score_with_streaks(results)",
        """returns the final score of a game, an integer that is 0 at first. The string results consists of
        the letters 'W' and 'L', which are taken from left to right. A 'W' adds $a points, or twice as many
        if it is number $k or later in an unbroken series of 'W'. An 'L' subtracts $loss points, but a
        score that would fall below 0 becomes 0.""",
        """
def score_with_streaks(results):
    score = streak = 0
    for result in results:
        if result == "W":
            streak += 1
            score += $a * (2 if streak >= $k else 1)
        else:
            streak = 0
            score = max(score - $loss, 0)
    return score
""",
        draw=lambda rng, p: [word(rng, 14, p.k, letters="WWWL")],
        edges=lambda p: [
            [""],
            ["LW"],
            ["W" * (p.k - 1)],
            ["W" * p.k],
            ["W" * 3 * p.k + "L" + "W" * (p.k + 1)],
            ["WLLWW"],
        ],
        parameters={"a": range(2, 6), "k": range(3, 6), "loss": range(1, 9)},
    ),
    Family(
        "parsing",
        "sum_entries_with_default(text)",
        """reads a string of entries separated by '$sep', and returns a dictionary from each key to an
        integer. An entry is either key=value, where value is an integer that can be negative, or only a
        key, which then has the value $default; a key is one or more letters. The values of a key that
        occurs several times are added up. Empty entries are skipped, so an empty string gives an empty
        dictionary.""",
        """
def sum_entries_with_default(text):
    totals = {}
    for entry in text.split("$sep"):
        if entry:
            key, equals, value = entry.partition("=")
            totals[key] = totals.get(key, 0) + (int(value) if equals else $default)
    return totals
""",
        draw=lambda rng, p: [
            p.sep.join(
                rng.choice("abcd") + rng.choice(["", f"={rng.randint(-5, 20)}"])
                for _ in range(rng.randint(2, 5))
            )
        ],
        edges=lambda p: [
            [""],
            ["a"],
            [p.sep.join(["a=1", "", "b=0", ""])],
            [p.sep.join(["a", "b=-3", "a"])],
            [p.sep.join(["x=4", "y", "x=6"])],
        ],
        parameters={"sep": ",;|&/", "default": range(2, 22)},
    ),
    Family(
        "parsing",
        "minutes_in_shifts(text)",
        """takes a string of shifts separated by commas, each with its start and its end on a 24-hour clock,
        such as '9:05-17:30', and returns the total number of minutes worked as an integer. A shift whose
        end is earlier than its start ends on the next day; one with equal start and end has 0 minutes.
        From every shift of more than $limit minutes, $pause minutes are subtracted. An empty string gives
        0.""",
        """
def minutes_in_shifts(text):
    total = 0
    for shift in text.split(",") if text else []:
        start, end = (int(time.split(":")[0]) * 60 + int(time.split(":")[1]) for time in shift.split("-"))
        minutes = (end - start) % (24 * 60)
        total += minutes - $pause if minutes > $limit else minutes
    return total
""",
        draw=lambda rng, p: [
            ",".join(
                shift(rng.randint(0, 1439), rng.randint(p.limit - 50, p.limit + 80))
                for _ in range(rng.randint(1, 3))
            )
        ],
        edges=lambda p: [
            [""],
            [shift(480, p.limit)],
            [shift(545, p.limit + 1)],
            [shift(1410, 50)],
            [f"{shift(0, p.limit + 30)},{shift(720, p.limit + 5)}"],
            ["7:15-7:15"],
        ],
        parameters={"limit": range(60, 300, 20), "pause": range(10, 60, 5)},
    ),
    Family(
        "parsing",
        "expand_page_list(text)",
        """takes a string of entries separated by commas, each of which is a page number such as '7' or a
        range of pages such as '3-6', where both ends belong to the range and the first is never greater
        than the last. It returns the list of the page numbers that are at most $limit and not divisible by
        $k, in ascending order and each only once. An empty string gives an empty list.""",
        """
def expand_page_list(text):
    pages = set()
    for entry in text.split(",") if text else []:
        first, _, last = entry.partition("-")
        pages.update(range(int(first), int(last or first) + 1))
    return sorted(page for page in pages if page <= $limit and page % $k != 0)
""",
        draw=lambda rng, p: [
            ",".join(
                rng.choice([f"{first}", f"{first}-{first + rng.randint(1, 6)}"])
                for first in integers(rng, 1, p.limit, 4, 2)
            )
        ],
        edges=lambda p: [
            [""],
            [f"{p.k + 1}-{p.k + 1}"],
            ["9-11,10-13"],
            [f"{p.limit - 2}-{p.limit + 3},1"],
            ["14,5,1-3"],
            ["11,7,4"],  # which a set does not sort
            [f"{p.k},{2 * p.k - 1}"],
        ],
        parameters={"k": range(2, 11), "limit": range(15, 35, 2)},
    ),
)
