"""Three plausible wrong solutions of each family of code_families/medium.py: name -> Template sources."""

WRONG_MEDIUM = {
    "mask_long_runs": [
        """
from itertools import groupby

def mask_long_runs(text):
    runs = ["".join(run) for _, run in groupby(text)]
    return "".join("$mark" if len(run) > $k else run for run in runs)
""",
        """
def mask_long_runs(text):
    for char in set(text):
        text = text.replace(char * $k, "$mark")
    return text
""",
        """
def mask_long_runs(text):
    result, run = "", ""
    for char in text:
        if run and char != run[-1]:
            result += "$mark" if len(run) >= $k else run
            run = ""
        run += char
    return result
""",
    ],
    "restyle_long_words": [
        """
def restyle_long_words(sentence):
    words = [word[::-1] if len(word) >= $n else word for word in sentence.split()]
    return " ".join(word.upper() if word.startswith("$c") else word for word in words)
""",
        """
def restyle_long_words(sentence):
    result = []
    for word in sentence.split():
        if len(word) >= $n:
            word = word[::-1]
        elif word.startswith("$c"):
            word = word.upper()
        result.append(word)
    return " ".join(result)
""",
        """
def restyle_long_words(sentence):
    result = []
    for word in sentence.split():
        styled = word[::-1] if len(word) > $n else word
        result.append(styled.upper() if word.startswith("$c") else styled)
    return " ".join(result)
""",
    ],
    "longest_piece_with_few": [
        """
def longest_piece_with_few(text):
    best = ""
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            piece = text[start:end]
            if piece.count("$c") < $k and len(piece) > len(best):
                best = piece
    return best
""",
        """
def longest_piece_with_few(text):
    best = ""
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            piece = text[start:end]
            if piece.count("$c") <= $k and len(piece) >= len(best):
                best = piece
    return best
""",
        """
def longest_piece_with_few(text):
    best = ""
    for start in range(len(text)):
        for end in range(start + 1, len(text)):
            piece = text[start:end]
            if piece.count("$c") <= $k and len(piece) > len(best):
                best = piece
    return best
""",
    ],
    "shift_every_nth_letter": [
        """
def shift_every_nth_letter(text):
    result = ""
    for index, char in enumerate(text):
        if char.islower() and (index + 1) % $n == 0:
            char = chr((ord(char) - ord("a") + $s) % 26 + ord("a"))
        result += char
    return result
""",
        """
def shift_every_nth_letter(text):
    result, number = "", 0
    for char in text:
        if char.islower():
            number += 1
            if number % $n == 0:
                char = chr(ord(char) + $s)
        result += char
    return result
""",
        """
def shift_every_nth_letter(text):
    result, number = "", 0
    for char in text:
        if char.islower():
            if number % $n == 0:
                char = chr((ord(char) - ord("a") + $s) % 26 + ord("a"))
            number += 1
        result += char
    return result
""",
    ],
    "first_heavy_window": [
        """
def first_heavy_window(numbers):
    for start in range(len(numbers)):
        if sum(numbers[start : start + $w]) >= $total:
            return start
    return -1
""",
        """
def first_heavy_window(numbers):
    for start in range(len(numbers) - $w):
        if sum(numbers[start : start + $w]) >= $total:
            return start
    return -1
""",
        """
def first_heavy_window(numbers):
    for start in range(len(numbers) - $w + 1):
        if sum(numbers[start : start + $w]) > $total:
            return start
    return -1
""",
    ],
    "spans_of_close_numbers": [
        """
def spans_of_close_numbers(numbers):
    groups = []
    for number in sorted(numbers):
        if groups and number - groups[-1][0] <= $gap:
            groups[-1].append(number)
        else:
            groups.append([number])
    return [[group[0], group[-1]] for group in groups if len(group) >= $m]
""",
        """
def spans_of_close_numbers(numbers):
    groups = []
    for number in sorted(set(numbers)):
        if groups and number - groups[-1][-1] <= $gap:
            groups[-1].append(number)
        else:
            groups.append([number])
    return [[group[0], group[-1]] for group in groups if len(group) >= $m]
""",
        """
def spans_of_close_numbers(numbers):
    numbers = sorted(numbers)
    spans, group = [], numbers[:1]
    for number in numbers[1:]:
        if number - group[-1] > $gap:
            if len(group) >= $m:
                spans.append([group[0], group[-1]])
            group = []
        group.append(number)
    return spans
""",
    ],
    "thin_out_repeats": [
        """
def thin_out_repeats(numbers):
    kept = []
    for number in numbers:
        if number % $d != 0 or kept.count(number) < $k:
            kept.append(number)
    return kept
""",
        """
def thin_out_repeats(numbers):
    kept, multiples = [], 0
    for number in numbers:
        if number % $d == 0:
            multiples += 1
            if multiples <= $k:
                kept.append(number)
        elif number not in kept:
            kept.append(number)
    return kept
""",
        """
def thin_out_repeats(numbers):
    kept = []
    for number in numbers:
        if kept.count(number) <= ($k if number % $d == 0 else 0):
            kept.append(number)
    return kept
""",
    ],
    "longest_gentle_climb": [
        """
def longest_gentle_climb(numbers):
    longest = length = 1
    for before, number in zip(numbers, numbers[1:]):
        length = length + 1 if $low <= number - before <= $high else 1
        longest = max(longest, length)
    return longest
""",
        """
def longest_gentle_climb(numbers):
    longest = length = 0
    for index, number in enumerate(numbers):
        climbs = index > 0 and $low <= number - numbers[index - 1] < $high
        length = length + 1 if climbs else 1
        longest = max(longest, length)
    return longest
""",
        """
def longest_gentle_climb(numbers):
    if not numbers:
        return 0
    longest = length = 1
    for before, number in zip(numbers, numbers[1:]):
        if $low <= number - before <= $high:
            length += 1
        else:
            longest = max(longest, length)
            length = 1
    return longest
""",
    ],
    "weighted_digit_check": [
        """
def weighted_digit_check(n):
    digits = [int(digit) for digit in str(n)]
    return ($a * sum(digits[::2]) + $b * sum(digits[1::2])) % $m
""",
        """
def weighted_digit_check(n):
    total, weight = 0, $b
    while n > 0:
        total += n % 10 * weight
        weight = $a if weight == $b else $b
        n //= 10
    return total % $m
""",
        """
def weighted_digit_check(n):
    digits = [int(digit) for digit in reversed(str(n))]
    return $a * sum(digits[::2]) + $b * sum(digits[1::2])
""",
    ],
    "count_divisible_or_containing": [
        """
def count_divisible_or_containing(n):
    return sum(i % $k == 0 or "$d" in str(i) for i in range(1, n + 1))
""",
        """
def count_divisible_or_containing(n):
    return sum((i % $k == 0) != ("$d" in str(i)) for i in range(1, n))
""",
        """
def count_divisible_or_containing(n):
    return sum((i % $k == 0) != (i % 10 == $d) for i in range(1, n + 1))
""",
    ],
    "next_with_digit_sum": [
        """
def next_with_digit_sum(n):
    while sum(map(int, str(n))) % $k != 0 or n % 10 == $d:
        n += 1
    return n
""",
        """
def next_with_digit_sum(n):
    n += 1
    while sum(map(int, str(n))) % $k != 0:
        n += 1
    return n
""",
        """
def next_with_digit_sum(n):
    n += 2
    while sum(map(int, str(n))) % $k != 0 or n % 10 == $d:
        n += 1
    return n
""",
    ],
    "capped_totals_by_name": [
        """
def capped_totals_by_name(orders):
    amounts = {}
    for name, amount in orders:
        amounts.setdefault(name, []).append(amount)
    return {name: min(sum(values), $cap) for name, values in amounts.items() if len(values) >= $k}
""",
        """
def capped_totals_by_name(orders):
    amounts = {}
    for name, amount in orders:
        amounts.setdefault(name, []).append(min(amount, $cap))
    return {name: sum(capped) for name, capped in amounts.items() if len(capped) > $k}
""",
        """
def capped_totals_by_name(orders):
    amounts = {}
    for name, amount in orders:
        if amount <= $cap:
            amounts.setdefault(name, []).append(amount)
    return {name: sum(kept) for name, kept in amounts.items() if len(kept) >= $k}
""",
    ],
    "group_by_length_remainder": [
        """
def group_by_length_remainder(words):
    groups = {}
    for word in words:
        group = len(word) % $m
        if "$c" not in word and word not in groups.get(group, []):
            groups.setdefault(group, []).append(word)
    return groups
""",
        """
def group_by_length_remainder(words):
    groups = {}
    for word in words:
        if "$c" not in word:
            groups.setdefault(str(len(word) % $m), []).append(word)
    return groups
""",
        """
def group_by_length_remainder(words):
    groups = {}
    for word in words:
        group = groups.setdefault(str(len(word) % $m), [])
        if "$c" not in word and word not in group:
            group.append(word)
    return groups
""",
    ],
    "units_to_reorder": [
        """
def units_to_reorder(stock, sold):
    orders = {}
    for item, number in stock.items():
        left = number - sold.get(item, 0)
        if left < $low:
            orders[item] = $high - left
    return orders
""",
        """
def units_to_reorder(stock, sold):
    orders = {}
    for item, number in stock.items():
        left = max(number - sold.get(item, 0), 0)
        if left <= $low:
            orders[item] = $high - left
    return orders
""",
        """
def units_to_reorder(stock, sold):
    orders = {}
    for item, number in sold.items():
        left = max(stock.get(item, 0) - number, 0)
        if left < $low:
            orders[item] = $high - left
    return orders
""",
    ],
    "deep_weighted_sum": [
        """
def deep_weighted_sum(nested):
    total = 0
    for item in nested:
        if isinstance(item, list):
            total += $k * deep_weighted_sum(item)
        elif item >= $limit:
            total += item
    return total
""",
        """
def deep_weighted_sum(nested, weight=1):
    total = 0
    for item in nested:
        if isinstance(item, list):
            total += deep_weighted_sum(item, $k)
        elif item > $limit:
            total += item * weight
    return total
""",
        """
def deep_weighted_sum(nested):
    total = 0
    for item in nested:
        if isinstance(item, list):
            total += $k * deep_weighted_sum(item)
        else:
            total += item
    return total if total > $limit else 0
""",
    ],
    "flatten_to_depth": [
        """
def flatten_to_depth(nested, depth=0):
    flat = []
    for item in nested:
        if not isinstance(item, list):
            flat.append(item)
        elif depth == $d:
            flat.append($marker)
        else:
            flat += flatten_to_depth(item, depth + 1)
    return flat
""",
        """
def flatten_to_depth(nested, depth=0):
    flat = []
    for item in nested:
        if isinstance(item, list):
            flat += flatten_to_depth(item, depth + 1)
        else:
            flat.append(item if depth < $d else $marker)
    return flat
""",
        """
def flatten_to_depth(nested, depth=0):
    if depth == $d:
        return [$marker] if nested else []
    flat = []
    for item in nested:
        flat += flatten_to_depth(item, depth + 1) if isinstance(item, list) else [item]
    return flat
""",
    ],
    "names_of_heavy_nodes": [
        """
def names_of_heavy_nodes(tree):
    name, size, children = tree
    names = [name] if size >= $limit else []
    for child in children:
        names += names_of_heavy_nodes(child)
    return names
""",
        """
def names_of_heavy_nodes(tree):
    name, size, children = tree
    names = [name] if size + sum(child[1] for child in children) >= $limit else []
    for child in children:
        names += names_of_heavy_nodes(child)
    return names
""",
        """
def names_of_heavy_nodes(tree):
    def weight(node):
        return node[1] + sum(weight(child) for child in node[2])

    names = []
    for child in tree[2]:
        names += names_of_heavy_nodes(child)
    return names + [tree[0]] if weight(tree) >= $limit else names
""",
    ],
    "half_and_third_cost": [
        """
def half_and_third_cost(n):
    if n <= $base:
        return n
    return half_and_third_cost(n // 2) + half_and_third_cost(n // 3) + $c
""",
        """
def half_and_third_cost(n):
    if n < $base:
        return n
    return n // 2 + n // 3 + $c
""",
        """
def half_and_third_cost(n):
    if n < $base:
        return $c
    return half_and_third_cost(n // 2) + half_and_third_cost(n // 3) + $c
""",
    ],
    "tank_level_and_spill": [
        """
def tank_level_and_spill(flows):
    level, spilled = $start, 0
    for flow in flows:
        level += flow
        if level > $cap:
            spilled += level - $cap
            level = $cap
    return [max(level, 0), spilled]
""",
        """
def tank_level_and_spill(flows):
    level = $start + sum(flows)
    return [min(max(level, 0), $cap), max(level - $cap, 0)]
""",
        """
def tank_level_and_spill(flows):
    level, spilled = 0, 0
    for flow in flows:
        level = max(level + flow, 0)
        spilled += max(level - $cap, 0)
        level = min(level, $cap)
    return [level, spilled]
""",
    ],
    "walk_around_ring": [
        """
def walk_around_ring(commands):
    cell, direction, visited = 0, 1, set()
    for command in commands:
        if command == "T":
            direction = -direction
        else:
            cell = (cell + direction * ($j if command == "J" else 1)) % $n
            visited.add(cell)
    return [cell, len(visited)]
""",
        """
def walk_around_ring(commands):
    cell, direction, visited = 0, 1, {0}
    for command in commands:
        if command == "S":
            cell += direction
        elif command == "J":
            cell += direction * $j
        else:
            direction = -direction
        visited.add(cell)
    return [cell % $n, len(visited)]
""",
        """
def walk_around_ring(commands):
    cell, direction, visited = 0, 1, {0}
    for command in commands:
        if command == "T":
            direction = -1
        else:
            cell = (cell + direction * ($j if command == "J" else 1)) % $n
            visited.add(cell)
    return [cell, len(visited)]
""",
    ],
    "score_with_streaks": [
        """
def score_with_streaks(results):
    score = streak = 0
    for result in results:
        if result == "W":
            streak += 1
            score += $a * (2 if streak > $k else 1)
        else:
            streak = 0
            score = max(score - $loss, 0)
    return score
""",
        """
def score_with_streaks(results):
    score = streak = 0
    for result in results:
        if result == "W":
            streak += 1
            score += $a * (2 if streak >= $k else 1)
        else:
            streak = 0
            score -= $loss
    return max(score, 0)
""",
        """
def score_with_streaks(results):
    score = wins = 0
    for result in results:
        if result == "W":
            wins += 1
            score += $a * (2 if wins >= $k else 1)
        else:
            score = max(score - $loss, 0)
    return score
""",
    ],
    "sum_entries_with_default": [
        """
def sum_entries_with_default(text):
    totals = {}
    for entry in text.split("$sep"):
        if entry:
            key, equals, value = entry.partition("=")
            totals[key] = int(value) if equals else $default
    return totals
""",
        """
def sum_entries_with_default(text):
    totals = {}
    for entry in text.split("$sep"):
        key, equals, value = entry.partition("=")
        totals[key] = totals.get(key, 0) + (int(value) if equals else $default)
    return totals
""",
        """
def sum_entries_with_default(text):
    totals = {}
    for entry in text.split("$sep"):
        if "=" in entry:
            key, value = entry.split("=")
            totals[key] = totals.get(key, 0) + int(value)
        elif entry:
            totals.setdefault(entry, $default)
    return totals
""",
    ],
    "minutes_in_shifts": [
        """
def minutes_in_shifts(text):
    total = 0
    for shift in text.split(",") if text else []:
        start, end = (int(time.split(":")[0]) * 60 + int(time.split(":")[1]) for time in shift.split("-"))
        minutes = (end - start) % (24 * 60)
        total += minutes - $pause if minutes >= $limit else minutes
    return total
""",
        """
def minutes_in_shifts(text):
    total = 0
    for shift in text.split(",") if text else []:
        start, end = (int(time.split(":")[0]) * 60 + int(time.split(":")[1]) for time in shift.split("-"))
        total += end - start - $pause if end - start > $limit else end - start
    return total
""",
        """
def minutes_in_shifts(text):
    total = 0
    for shift in text.split(",") if text else []:
        start, end = (int(time.split(":")[0]) * 60 + int(time.split(":")[1]) for time in shift.split("-"))
        total += (end - start) % (24 * 60)
    return total - $pause if total > $limit else total
""",
    ],
    "expand_page_list": [
        """
def expand_page_list(text):
    pages = set()
    for entry in text.split(",") if text else []:
        if "-" in entry:
            first, last = entry.split("-")
            pages.update(range(int(first), int(last)))
        else:
            pages.add(int(entry))
    return sorted(page for page in pages if page <= $limit and page % $k != 0)
""",
        """
def expand_page_list(text):
    pages = []
    for entry in text.split(",") if text else []:
        first, _, last = entry.partition("-")
        pages += range(int(first), int(last or first) + 1)
    return sorted(page for page in pages if page <= $limit and page % $k != 0)
""",
        """
def expand_page_list(text):
    pages = []
    for entry in text.split(",") if text else []:
        first, _, last = entry.partition("-")
        pages += range(int(first), int(last or first) + 1)
    return list(set(page for page in pages if page <= $limit and page % $k != 0))
""",
    ],
}
