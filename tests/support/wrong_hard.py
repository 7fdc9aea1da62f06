"""Three plausible wrong solutions of each family of code_families/hard.py: name -> Template sources.

Each is the reference solution with one mistake, given as (what it replaces, the mistake).
"""

from gspo.tasks.code_families.hard import HARD

MISTAKES = {
    "wrap_and_pad_lines": [
        ("<= $width", "< $width"),
        ("len(lines[-1]) + 1 + len(word)", "len(lines[-1]) + len(word)"),
        ("for word in text.split():", 'for word in text.split(" "):'),
    ],
    "first_bracket_fault_index": [
        ("len(expected) == $limit", "len(expected) > $limit"),
        ("expected[-1:] == [second_end]", "second_end in expected[-2:]"),
        ("return len(text) if expected else -1", "return -1"),
    ],
    "direction_flipping_cipher": [
        ('if char == "$pivot"', 'if result[-1] == "$pivot"'),
        ("result + char, $shift", "result + char, shift"),
        ("+ shift) % 26", '+ (-shift if char == "$pivot" else shift)) % 26'),
    ],
    "join_spans_and_drop_short": [
        ("<= $gap", "< $gap"),
        ("max(joined[-1][1], end)", "max(joined[0][1], end)"),
        ("for span in spans)", "for span in spans if abs(span[1] - span[0]) >= $shortest)"),
    ],
    "pack_boxes_heaviest_first": [
        ("<= $capacity", "< $capacity"),
        ("for box in boxes:", "for box in boxes[-1:]:"),
        ("len(box) < $most", "len(box) <= $most"),
    ],
    "inland_lake_sizes": [
        (" and 0 < x < len(rows[0]) - 1", ""),
        ("0 < y < len(rows) - 1", "0 < y"),
        ("sorted(sizes, reverse=True)", "sizes"),
    ],
    "digit_power_tail_and_cycle": [
        ("[seen.index(n), len(seen) - seen.index(n)]", "[seen.index(n), len(seen)]"),
        ("sum(int(digit) ** $power for digit in str(n))", "sum(int(digit) for digit in str(n)) ** $power"),
        ("[seen.index(n), ", "[seen.index(n) + 1, "),
    ],
    "pens_in_crates_and_boxes": [
        (" if count]", "]"),
        ("divmod(abs(pens), $pens)", "divmod(pens, $pens)"),
        ('"boxes"), (loose', '"boxs"), (loose'),
    ],
    "count_multiples_with_calm_digits": [
        ("high + 1", "high"),
        ("<= $most", "< $most"),
        ("all(a != b for a, b in zip(digits, digits[1:]))", "len(set(digits)) == len(digits)"),
    ],
    "balances_after_transfers": [
        (">= -$overdraft", "> -$overdraft"),
        ("balances.get(receiver, 0) + amount", "balances.get(receiver, 0) + amount + $fee"),
        ("sender != receiver and ", ""),
    ],
    "places_without_worst_scores": [
        ("other > total for other in totals.values())", "other > total for other in set(totals.values()))"),
        ("min(kept) >= $floor", "min(values) >= $floor"),
        ("min(kept) >= $floor", "max(kept) >= $floor"),
    ],
    "documents_by_common_tag": [
        ('removeprefix("$prefix")', 'lstrip("$prefix")'),
        ("in sorted(documents)", "in documents"),
        (">= $least", "> $least"),
    ],
    "count_step_sequences": [
        ("streak < $run", "streak <= $run"),
        ("            return 1", "            return int(total > 0)"),
        ("step != last or", "step >= last and"),
    ],
    "flatten_paths_to_depth": [
        (" or not value:", ":"),
        ("len(path) == $depth", "len(path) > $depth"),
        ("isinstance(value, (list, dict))", "isinstance(value, dict)"),
    ],
    "folder_totals_from_tree": [
        (">= $least", "> $least"),
        ("total([*path, name], child)", "total([*path, name], child) - $own * isinstance(child, dict)"),
        ('"/".join(path)', '"/" + "/".join(path)'),
    ],
    "spaced_sums_of_integer": [
        ("part - $gap", "part - $gap - 1"),
        ("return [[]]", "return [[]] if n else []"),
        ("reversed(range($smallest, min(rest, largest) + 1))", "range($smallest, min(rest, largest) + 1)"),
    ],
    "robot_on_cylinder": [
        ("<= $rows", "< $rows"),
        ("% ($columns + 1)", "% $columns"),
        ("(facing - 1) % 4", "facing - 1"),
    ],
    "expiring_cache_report": [
        ("now - since < $life", "now - since <= $life"),
        ("= loaded_at.pop(key, now)", "= loaded_at.get(key, now)"),
        (
            "loaded_at[key] = loaded_at.pop(key, now)",
            "loaded_at.pop(key, None)\n        loaded_at[key] = now",
        ),
    ],
    "timeline_with_cooldown": [
        ("[-$cooldown:]", "[-$cooldown - 1 :]"),
        (
            '(len(timeline) >= $batch and "-" not in timeline[-$batch:])',
            "(timeline[-1:].isalpha() and sum(map(str.isalpha, timeline)) % $batch == 0)",
        ),
        (
            "        timeline += job",
            """        timeline += job
        if len(timeline) >= $batch and "-" not in timeline[-$batch:]:
            timeline += "-\"""",
        ),
    ],
    "serving_start_times": [
        ("> $patience", ">= $patience"),
        ("start + duration + $rest", "start + duration"),
        (
            "            starts.append(None)",
            "            starts.append(None)\n            free_at[counter] += duration",
        ),
    ],
    "evaluate_with_extra_operator": [
        (r"\d+|\S", r"\S"),
        ("$factor * value - operand()", "$factor * value - tight()"),
        ("= additive()\n        tokens.pop(0)", "= additive()"),
    ],
    "expand_counted_groups": [
        ("count += char", "count = char"),
        ("min(int(count or 1), $cap)", "int(count or 1)"),
        ("min(int(count or 1), $cap)", "min(int(count or 0) or 1, $cap)"),
    ],
    "read_settings_by_section": [
        (
            '= (part.strip() for part in line.split("$separator", 1))',
            '= (part.strip() for part in line.split("$separator")[:2])',
        ),
        ("section = line[1:-1]", "section = line[1:-1]\n            settings[section] = {}"),
        ("[0].strip()", "[0].lstrip()"),
    ],
    "split_record_with_quotes": [
        ("field += chars.pop(0)", "field += chars.pop(-1)"),
        ("[], None, False", '[], "", False'),
        ('inside or char not in " $separator"', 'char not in " $separator"'),
    ],
}


def mistaken(source: str, right: str, wrong: str) -> str:
    assert source.count(right) == 1, f"{right} is {source.count(right)} times in {source}"
    return source.replace(right, wrong)


WRONG_HARD = {
    family.entry_point: [mistaken(family.solution, *mistake) for mistake in MISTAKES[family.entry_point]]
    for family in HARD
}
