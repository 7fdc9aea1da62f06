"""Families of easy function-writing problems: one line does it. Fields: see family.Family."""

import random

from gspo.tasks.code_families.family import Family, integers, word, words

EASY = (
    # One operation: SmolLM2-135M-Instruct, sampled, has some of these right.
    Family(
        "numbers",
        "add_constant(x)",
        "returns the integer x plus $a.",
        """
def add_constant(x):
    return x + $a
""",
        draw=lambda rng, p: [rng.randint(-50, 50)],
        edges=lambda p: [[0], [1], [-p.a]],
        parameters={"a": range(2, 100)},
    ),
    Family(
        "numbers",
        "times_constant(x)",
        "returns the integer x times $a.",
        """
def times_constant(x):
    return x * $a
""",
        draw=lambda rng, p: [rng.randint(-50, 50)],
        edges=lambda p: [[0], [1], [-1], [10]],
        parameters={"a": range(3, 100)},
    ),
    Family(
        "numbers",
        "constant_minus(x)",
        "returns $a minus the integer x.",
        """
def constant_minus(x):
    return $a - x
""",
        draw=lambda rng, p: [rng.randint(-50, 50)],
        edges=lambda p: [[0], [p.a], [p.a + 1], [-1]],
        parameters={"a": range(2, 100)},
    ),
    Family(
        "numbers",
        "remainder_of(x)",
        "returns the remainder of the division of x, an integer of at least 0, by $a.",
        """
def remainder_of(x):
    return x % $a
""",
        draw=lambda rng, p: [rng.randint(0, 500)],
        edges=lambda p: [[0], [p.a], [p.a - 1], [p.a + 1], [5 * p.a - 1]],
        parameters={"a": range(4, 70)},
    ),
    Family(
        "numbers",
        "is_multiple(x)",
        "returns True if the integer x is divisible by $a, and False otherwise.",
        """
def is_multiple(x):
    return x % $a == 0
""",
        draw=lambda rng, p: [rng.choice((p.a * rng.randint(1, 20), rng.randint(1, 300)))],
        edges=lambda p: [[0], [p.a], [p.a + 1], [2 * p.a], [3 * p.a - 1], [1], [7 * p.a], [4 * p.a + 1]],
        parameters={"a": range(2, 70)},
    ),
    Family(
        "numbers",
        "is_above(x)",
        "returns True if the integer x is greater than $a, and False otherwise.",
        """
def is_above(x):
    return x > $a
""",
        draw=lambda rng, p: [rng.randint(p.a - 20, p.a + 20)],
        edges=lambda p: [[p.a + step] for step in (0, 1, -1, 9, -9, 5, -30, 2)],
        parameters={"a": range(-20, 80)},
    ),
    Family(
        "numbers",
        "larger_of_two(x)",
        "returns the larger of the integer x and $a.",
        """
def larger_of_two(x):
    return max(x, $a)
""",
        draw=lambda rng, p: [rng.randint(p.a - 20, p.a + 20)],
        edges=lambda p: [[p.a], [p.a + 1], [p.a - 1], [p.a + 30], [p.a + 12], [p.a + 5]],
        parameters={"a": range(-20, 80)},
    ),
    Family(
        "strings",
        "put_before(text)",
        "returns the string '$word' followed by the string text.",
        """
def put_before(text):
    return "$word" + text
""",
        draw=lambda rng, p: [word(rng)],
        edges=lambda p: [[""], ["x"]],
        parameters={
            "word": [
                a + b
                for a in ("re", "un", "pre", "sub", "out", "over", "mis", "dis")
                for b in ("-", ":", ".", "_", "/", "+", "=", "~")
            ]
        },
    ),
    Family(
        "strings",
        "put_after(text)",
        "returns the string text followed by '$word'.",
        """
def put_after(text):
    return text + "$word"
""",
        draw=lambda rng, p: [word(rng)],
        edges=lambda p: [[""], ["x"]],
        parameters={
            "word": [
                a + b
                for a in ("-", ":", ".", "_", "/", "+", "=", "~")
                for b in ("ing", "ed", "er", "ly", "s", "ness", "ful", "able")
            ]
        },
    ),
    Family(
        "strings",
        "count_character(text)",
        "returns how many times the character '$char' occurs in the string text.",
        """
def count_character(text):
    return text.count("$char")
""",
        draw=lambda rng, p: [word(rng, letters=3 * p.char + "eK7-")],
        edges=lambda p: [[""], [p.char], [p.char * 3], [p.char.swapcase() + " "]],
        parameters={"char": "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?+*/=-_"},
    ),
    Family(
        "lists",
        "without_constant(items)",
        "returns a list of the integers in the list items that are not equal to $a, in the same order.",
        """
def without_constant(items):
    return [item for item in items if item != $a]
""",
        draw=lambda rng, p: [[rng.randint(p.a - 1, p.a + 2) for _ in range(rng.randint(2, 5))]],
        edges=lambda p: [[[]], [[p.a, p.a]], [[1, p.a, 1]], [[1, 3, 1]]],
        parameters={"a": range(4, 100)},
    ),
    Family(
        "lists",
        "append_constant(items)",
        "returns a new list with the items of the list items and then the integer $a.",
        """
def append_constant(items):
    return items + [$a]
""",
        draw=lambda rng, p: [integers(rng, 0, 99, 5)],
        edges=lambda p: [[[]], [[1]], [[p.a]]],
        parameters={"a": range(2, 100)},
    ),
    Family(
        "lists",
        "contains_constant(items)",
        "returns True if the integer $a is in the list items, and False otherwise.",
        """
def contains_constant(items):
    return $a in items
""",
        draw=lambda rng, p: [[rng.choice((p.a, p.a - 1, p.a + 1, 0)) for _ in range(rng.randint(1, 3))]],
        edges=lambda p: [[[]], [[p.a]], [[p.a, 1]], [[1, p.a]], [[p.a + 1]], [[p.a - 1, p.a + 2]]],
        parameters={"a": range(2, 100)},
    ),
    Family(
        "lists",
        "add_to_each(numbers)",
        "returns a list of the integers in the list numbers, each increased by $a.",
        """
def add_to_each(numbers):
    return [number + $a for number in numbers]
""",
        draw=lambda rng, p: [integers(rng, -9, 9, 5)],
        edges=lambda p: [[[]], [[0]], [[1, 1]]],
        parameters={"a": range(2, 100)},
    ),
    # One line.
    Family(
        "numbers",
        "add_then_multiply(x)",
        "adds $a to the integer x and returns the result multiplied by $b.",
        """
def add_then_multiply(x):
    return (x + $a) * $b
""",
        draw=lambda rng, p: [rng.randint(-50, 50)],
        edges=lambda p: [[0], [-p.a], [1]],
        parameters={"a": range(2, 30), "b": range(2, 10)},
    ),
    Family(
        "numbers",
        "is_large_multiple(n)",
        """returns True if the integer n is divisible by $divisor and also greater than $limit, and False
        otherwise.""",
        """
def is_large_multiple(n):
    return n % $divisor == 0 and n > $limit
""",
        draw=lambda rng, p: [
            p.limit + (p.divisor * rng.randint(1, 20) if rng.random() < 0.4 else rng.randint(-60, 60))
        ],
        edges=lambda p: [
            *([0], [p.limit], [p.limit - p.divisor], [p.limit + p.divisor + 1]),
            *([p.limit + k * p.divisor] for k in (1, 2, 5, 10)),
        ],
        parameters={"divisor": (2, 3, 4, 5, 6, 10, 12, 15, 20, 30), "limit": range(60, 601, 60)},
    ),
    Family(
        "numbers",
        "sum_in_steps_up_to(n)",
        """returns the sum of the integers $first, $first + $step, $first + 2 * $step and so on, as far as
        they are less than or equal to the integer n. It returns 0 if n is less than $first.""",
        """
def sum_in_steps_up_to(n):
    return sum(range($first, n + 1, $step))
""",
        draw=lambda rng, p: [rng.randint(p.first - 2, p.first + 70)],
        edges=lambda p: [[p.first], [p.first - 1], [p.first + p.step], [p.first + p.step - 1], [-9]],
        parameters={"first": range(3, 13), "step": range(2, 10)},
    ),
    Family(
        "strings",
        "swap_letter_for_another(text)",
        """returns the string text with every lowercase '$old' replaced by '$new'. All other characters,
        uppercase letters among them, stay as they are.""",
        """
def swap_letter_for_another(text):
    return text.replace("$old", "$new")
""",
        draw=lambda rng, p: [word(rng, letters=3 * p.old + p.old.upper() + p.new + "xZ", min_length=3)],
        edges=lambda p: [[""], [3 * p.old], [p.old.upper() + p.old], [p.new + p.old]],
        parameters={"old": "abcdefgh", "new": "mnopqrst*-"},
    ),
    Family(
        "strings",
        "clip_and_mark(text)",
        """returns the first $size characters of the string text followed by '$mark'. If text has fewer than
        $size characters, all of it is used; '$mark' is always added.""",
        """
def clip_and_mark(text):
    return text[:$size] + "$mark"
""",
        draw=lambda rng, p: [word(rng, max_length=p.size + 6)],
        edges=lambda p: [[""], ["a" * (p.size - 1)], ["b" * p.size], ["c" * (p.size + 1)]],
        parameters={"size": range(2, 12), "mark": ("...", "!", "?", "*", "#", "~", " (cut)", "--")},
    ),
    Family(
        "strings",
        "repeat_joined_by(word)",
        """returns a string that consists of the string word written $count times, with '$separator' between
        neighbouring copies, but not before the first or after the last copy.""",
        """
def repeat_joined_by(word):
    return "$separator".join([word] * $count)
""",
        draw=lambda rng, p: [word(rng, max_length=5)],
        edges=lambda p: [[""], ["a"], ["ab"]],
        parameters={"count": range(2, 10), "separator": ("-", "+", "/", "_", "*", "...", ", ", " and ")},
    ),
    Family(
        "strings",
        "starts_and_ends_with_letters(text)",
        """returns True if the string text starts with the lowercase letter '$first' and ends with the
        lowercase letter '$last', and False otherwise.""",
        """
def starts_and_ends_with_letters(text):
    return text.startswith("$first") and text.endswith("$last")
""",
        draw=lambda rng, p: [
            rng.choice(5 * p.first + "xy") + word(rng, max_length=5) + rng.choice(5 * p.last + "xy")
        ],
        edges=lambda p: [
            *([""], [f"{p.first}{p.last}x"], [f"x{p.first}{p.last}"], [f"x{p.first}{p.last}x"]),
            *([p.first + middle + p.last] for middle in ("", "x", "yxy", p.last + p.first)),
        ],
        parameters={"first": "abcdefgh", "last": "klmnoprst"},
    ),
    Family(
        "strings",
        "long_words_with_initial(sentence)",
        """returns the list of those words of the string sentence that start with '$letter' and have at least
        $size letters, in the same order. The words consist of lowercase letters and are separated by single
        spaces; an empty sentence gives an empty list.""",
        """
def long_words_with_initial(sentence):
    return [word for word in sentence.split() if word.startswith("$letter") and len(word) >= $size]
""",
        draw=lambda rng, p: [
            " ".join(
                rng.choice(3 * p.letter + "xy") + word(rng, min_length=p.size - 2, max_length=p.size)
                for _ in range(rng.randint(3, 5))
            )
        ],
        edges=lambda p: [
            *([""], [p.letter * p.size], [p.letter * (p.size - 1)]),
            *(["x" * p.size], [f"{p.letter * (p.size + 1)} x{p.letter * p.size} {p.letter * p.size}"]),
        ],
        parameters={"letter": "abcdefgh", "size": range(3, 11)},
    ),
    Family(
        "lists",
        "count_above(numbers)",
        "returns how many of the integers in the list numbers are greater than $limit.",
        """
def count_above(numbers):
    return sum(number > $limit for number in numbers)
""",
        draw=lambda rng, p: [integers(rng, p.limit - 5, p.limit + 5)],
        edges=lambda p: [[[]], [[p.limit]], [[p.limit + 1] * 2], [[p.limit - 1, p.limit, p.limit + 1]]],
        parameters={"limit": range(-30, 70)},
    ),
    Family(
        "lists",
        "without_first_and_last_items(items)",
        """returns a list of the elements of the list items, in the same order, without the first $head and
        the last $tail of them. The result is an empty list if items has at most $head + $tail elements.""",
        """
def without_first_and_last_items(items):
    return items[$head:-$tail]
""",
        draw=lambda rng, p: [integers(rng, 0, 9, min_length=p.head + p.tail, max_length=p.head + p.tail + 5)],
        edges=lambda p: [[list(range(size))] for size in (0, p.head, p.head + p.tail, p.head + p.tail + 1)],
        parameters={"head": range(2, 10), "tail": range(2, 10)},
    ),
    Family(
        "lists",
        "keep_between_inclusive(numbers)",
        """returns a list of those integers in the list numbers that are at least $low and at most $high, in
        the same order. Integers that occur several times are kept each time.""",
        """
def keep_between_inclusive(numbers):
    return [number for number in numbers if $low <= number <= $high]
""",
        draw=lambda rng, p: [integers(rng, p.low - 4, p.high + 4, min_length=2)],
        edges=lambda p: [[[]], [[p.high, p.low]], [[p.low - 1, p.high + 1]], [[p.high] * 2], [[p.low] * 2]],
        parameters={"low": range(-10, 5), "high": range(6, 12)},
    ),
    Family(
        "lists",
        "largest_multiple_or_default(numbers)",
        """returns the largest integer in the list numbers that is divisible by $divisor, or $default if there
        is none. The integers may be negative, and 0 counts as divisible.""",
        """
def largest_multiple_or_default(numbers):
    return max((number for number in numbers if number % $divisor == 0), default=$default)
""",
        draw=lambda rng, p: [
            [number * rng.choice((1, p.divisor)) for number in integers(rng, -20, 20, min_length=2)]
        ],
        edges=lambda p: [[[]], [[1, p.divisor + 1]], [[-p.divisor]], [[p.divisor, p.divisor + 1]], [[0]]],
        parameters={"divisor": range(2, 12), "default": (-1, 0, 1, 50, 100, 500, 999)},
    ),
    Family(
        "dictionaries",
        "price_of_several(prices, name)",
        """returns the price of $count pieces of one article. The dictionary prices maps names to the integer
        price of a single piece, which may be 0. The result is the price of the article called name multiplied
        by $count, or $default if prices does not contain name.""",
        """
def price_of_several(prices, name):
    return prices[name] * $count if name in prices else $default
""",
        draw=lambda rng, p: [
            {name: rng.randint(0, 20) for name in rng.sample(("pen", "cup", "map", "bag"), 3)},
            rng.choice(("pen", "cup", "map", "bag")),
        ],
        edges=lambda p: [[{}, "pen"], [{"pen": 0}, "pen"], [{"pen": 3, "cup": 5}, "cup"]],
        parameters={"count": range(2, 12), "default": (-1, -2, -10, -99, 500, 999, 1000)},
    ),
    Family(
        "dictionaries",
        "reduce_high_prices_only(prices)",
        """returns a new dictionary with only those entries of the dictionary prices whose value is at least
        $least, each value lowered by $discount. The keys are strings and the values integers.""",
        """
def reduce_high_prices_only(prices):
    return {name: price - $discount for name, price in prices.items() if price >= $least}
""",
        draw=lambda rng, p: [
            {word(rng): rng.randint(p.least - 6, p.least + 6) for _ in range(rng.randint(2, 4))}
        ],
        edges=lambda p: [[{}], [{"a": p.least}], [{"b": p.least - 1, "c": p.least + 1}]],
        parameters={"least": range(20, 101, 10), "discount": range(2, 10)},
    ),
    Family(
        "dictionaries",
        "number_table_as_dictionary(n)",
        """returns a dictionary with one entry for each integer i from 1 to n, both included: the key is i as
        a string, and the value is the integer $factor * i + $offset. If n is 0, the dictionary is empty.""",
        """
def number_table_as_dictionary(n):
    return {str(i): $factor * i + $offset for i in range(1, n + 1)}
""",
        draw=lambda rng, p: [rng.randint(2, 16)],
        edges=lambda p: [[0], [1]],
        parameters={"factor": range(2, 12), "offset": range(1, 10)},
    ),
    Family(
        "recursion",
        "countdown_in_steps(n)",
        """returns the list of integers that starts with n and in which each next integer is $step less than
        the one before, as long as they are at least $stop. The list is empty if n is less than $stop.""",
        """
def countdown_in_steps(n):
    return [n] + countdown_in_steps(n - $step) if n >= $stop else []
""",
        draw=lambda rng, p: [rng.randint(p.stop - 2, p.stop + 8 * p.step)],
        edges=lambda p: [[p.stop], [p.stop - 1], [p.stop + p.step], [p.stop + p.step - 1]],
        parameters={"step": range(2, 10), "stop": range(10)},
    ),
    Family(
        "recursion",
        "count_nested_above(data)",
        """returns how many integers greater than $limit there are in data at any depth. data is a list whose
        items are integers or further lists of the same kind; lists may be empty.""",
        """
def count_nested_above(data):
    return sum(count_nested_above(item) if isinstance(item, list) else item > $limit for item in data)
""",
        draw=lambda rng, p: [_nested(rng, p.limit - 5, p.limit + 6, depth=3)],
        edges=lambda p: [
            *([[]], [[p.limit]], [[[[p.limit + 1]]]], [[[p.limit + 1] * 2, []]]),
            [[p.limit + 2, [p.limit - 1, [p.limit + 1, p.limit]]]],
        ],
        parameters={"limit": range(-20, 50)},
    ),
    Family(
        "recursion",
        "value_of_recurrence(n)",
        """returns the integer f(n) for an integer n of at least 0, where f(0) = $start, and
        f(n) = $factor * f(n - 1) + $increase for every n of at least 1.""",
        """
def value_of_recurrence(n):
    return $start if n == 0 else $factor * value_of_recurrence(n - 1) + $increase
""",
        draw=lambda rng, p: [rng.randint(2, 18)],
        edges=lambda p: [[0], [1]],
        parameters={"start": range(1, 6), "factor": range(2, 5), "increase": range(1, 7)},
    ),
    Family(
        "simulation",
        "counter_after_moves(moves)",
        """returns the final value of a counter that starts at $start. The string moves is read from left to
        right: each 'U' adds $up to the counter, and each 'D' subtracts $down. There are no other characters,
        and the counter may become negative.""",
        """
def counter_after_moves(moves):
    return $start + $up * moves.count("U") - $down * moves.count("D")
""",
        draw=lambda rng, p: [word(rng, letters="UD", max_length=10)],
        edges=lambda p: [[""], ["U"], ["D"], ["UDD"], [10 * "D"]],
        parameters={"start": (5, 10, 20, 50), "up": range(2, 6), "down": range(6, 10)},
    ),
    Family(
        "simulation",
        "tank_level_after_changes(changes)",
        """returns the final level of a tank as an integer. The level starts at $start, and the integers in
        the list changes are added to it one after the other. Whenever an addition would bring the level above
        $capacity it becomes $capacity, and whenever it would bring it below 0 it becomes 0.""",
        """
def tank_level_after_changes(changes):
    level = $start
    for change in changes:
        level = min(max(level + change, 0), $capacity)
    return level
""",
        draw=lambda rng, p: [integers(rng, -p.capacity, p.capacity, min_length=1)],
        edges=lambda p: [[[]], [[2 * p.capacity, -1]], [[-2 * p.capacity, 3]], [[1, 1]]],
        parameters={"start": range(1, 7), "capacity": range(10, 22)},
    ),
    Family(
        "simulation",
        "savings_after_each_day(n)",
        """returns the list of the numbers of coins in a piggy bank at the end of day 1, day 2 and so on up to
        day n. It holds $start coins before day 1, and $gain coins are put in on each day. If n is 0, the list
        is empty.""",
        """
def savings_after_each_day(n):
    return [$start + $gain * day for day in range(1, n + 1)]
""",
        draw=lambda rng, p: [rng.randint(2, 16)],
        edges=lambda p: [[0], [1]],
        parameters={"start": range(10, 101, 10), "gain": range(2, 10)},
    ),
    Family(
        "parsing",
        "field_or_missing(line)",
        """returns field number $number, counted from 1, of the string line, whose fields are separated by
        '$separator'. A field may be the empty string, and is then returned as such. If line has fewer than
        $number fields, the function returns 'missing'.""",
        """
def field_or_missing(line):
    fields = line.split("$separator")[:$number]
    return fields[-1] if len(fields) == $number else "missing"
""",
        draw=lambda rng, p: [p.separator.join(words(rng, min_count=p.number - 1, max_count=p.number + 2))],
        edges=lambda p: [
            [p.separator.join("abcdefghi"[: p.number])],
            [p.separator.join("abcdefghi"[: p.number - 1])],
            [p.separator.join(["a", *[""] * (p.number - 1), "b"])],
        ],
        parameters={"number": range(2, 8), "separator": (",", ";", "|", ":", "/", "-", "#", "+", "=", "&")},
    ),
    Family(
        "parsing",
        "sum_of_named_amounts(text)",
        """returns the sum of the integers in a string such as 'ab${sign}3${separator}c${sign}12', for which
        it is 15: entries separated by '$separator', each a name, '$sign' and an integer of at least 0. A name
        may occur several times, and every entry counts. An empty string gives 0.""",
        """
def sum_of_named_amounts(text):
    return sum(int(entry.split("$sign")[1]) for entry in text.split("$separator")) if text else 0
""",
        draw=lambda rng, p: [
            p.separator.join(f"{name}{p.sign}{rng.randint(0, 40)}" for name in words(rng, 4, 1, max_length=3))
        ],
        edges=lambda p: [
            *([""], [f"a{p.sign}10"]),
            [f"a{p.sign}7{p.separator}b{p.sign}0{p.separator}a{p.sign}7"],
        ],
        parameters={
            "separator": (",", ";", "|", "/", "&", "+", " ", "_"),
            "sign": ("=", ":", "~", ">", "#", "@", "%", "->"),
        },
    ),
    Family(
        "parsing",
        "pieces_from_stock_code(code)",
        """returns the total number of pieces, as an integer, that a string such as '3${mark}4' stands for. It
        is the number of full boxes, then '$mark', then the number of loose pieces. Both are integers of at
        least 0 and can have several digits. Each full box holds $size pieces.""",
        """
def pieces_from_stock_code(code):
    boxes, loose = code.split("$mark")
    return int(boxes) * $size + int(loose)
""",
        draw=lambda rng, p: [f"{rng.randint(0, 30)}{p.mark}{rng.randint(0, 30)}"],
        edges=lambda p: [[f"0{p.mark}0"], [f"1{p.mark}0"], [f"0{p.mark}1"], [f"12{p.mark}10"]],
        parameters={"mark": ("+", ":", "/", "b", "x", "-", "box"), "size": range(6, 16)},
    ),
)


def _nested(rng: random.Random, low: int, high: int, depth: int) -> list:
    """A list of up to four integers and lists, at most `depth` deep."""
    return [
        _nested(rng, low, high, depth - 1) if depth > 1 and rng.random() < 0.4 else rng.randint(low, high)
        for _ in range(rng.randint(2 if depth > 2 else 0, 4))
    ]
