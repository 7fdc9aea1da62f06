"""Three plausible wrong solutions of each family of code_families/easy.py: name -> Template sources."""

WRONG_EASY = {
    "add_constant": [
        """
def add_constant(x):
    return x - $a
""",
        """
def add_constant(x):
    return x * $a
""",
        """
def add_constant(x):
    return abs(x) + $a
""",
    ],
    "times_constant": [
        """
def times_constant(x):
    return x + $a
""",
        """
def times_constant(x):
    return x ** $a if 0 <= x < 3 else x
""",
        """
def times_constant(x):
    return abs(x) * $a
""",
    ],
    "constant_minus": [
        """
def constant_minus(x):
    return x - $a
""",
        """
def constant_minus(x):
    return $a + x
""",
        """
def constant_minus(x):
    return abs($a - x)
""",
    ],
    "remainder_of": [
        """
def remainder_of(x):
    return x // $a
""",
        """
def remainder_of(x):
    return x / $a
""",
        """
def remainder_of(x):
    return x % $a or $a
""",
    ],
    "is_multiple": [
        """
def is_multiple(x):
    return x % $a != 0
""",
        """
def is_multiple(x):
    return x % $a
""",
        """
def is_multiple(x):
    return x / $a == 0
""",
    ],
    "is_above": [
        """
def is_above(x):
    return x >= $a
""",
        """
def is_above(x):
    return x < $a
""",
        """
def is_above(x):
    return x != $a
""",
    ],
    "larger_of_two": [
        """
def larger_of_two(x):
    return min(x, $a)
""",
        """
def larger_of_two(x):
    return x
""",
        """
def larger_of_two(x):
    return x > $a
""",
    ],
    "put_before": [
        """
def put_before(text):
    return text + "$word"
""",
        """
def put_before(text):
    return "$word"
""",
        """
def put_before(text):
    return "$word " + text
""",
    ],
    "put_after": [
        """
def put_after(text):
    return "$word" + text
""",
        """
def put_after(text):
    return "$word"
""",
        """
def put_after(text):
    return text + " $word"
""",
    ],
    "count_character": [
        """
def count_character(text):
    return len(text.split("$char"))
""",
        """
def count_character(text):
    return text.find("$char")
""",
        """
def count_character(text):
    return "$char" in text
""",
    ],
    "without_constant": [
        """
def without_constant(items):
    return [item for item in items if item == $a]
""",
        """
def without_constant(items):
    return sorted(set(items) - {$a})
""",
        """
def without_constant(items):
    return items.remove($a)
""",
    ],
    "append_constant": [
        """
def append_constant(items):
    return [$a] + items
""",
        """
def append_constant(items):
    return items.append($a)
""",
        """
def append_constant(items):
    return sorted(items + [$a])
""",
    ],
    "contains_constant": [
        """
def contains_constant(items):
    return $a not in items
""",
        """
def contains_constant(items):
    return items[:1] == [$a]
""",
        """
def contains_constant(items):
    return items.count($a)
""",
    ],
    "add_to_each": [
        """
def add_to_each(numbers):
    return [number * $a for number in numbers]
""",
        """
def add_to_each(numbers):
    return sum(numbers) + $a
""",
        """
def add_to_each(numbers):
    return [numbers[0] + $a]
""",
    ],
    "add_then_multiply": [
        """
def add_then_multiply(x):
    return x + $a * $b
""",
        """
def add_then_multiply(x):
    return x * $b + $a
""",
        """
def add_then_multiply(x):
    return (abs(x) + $a) * $b
""",
    ],
    "is_large_multiple": [
        """
def is_large_multiple(n):
    return n % $divisor == 0 and n >= $limit
""",
        """
def is_large_multiple(n):
    return n % $divisor == 0 or n > $limit
""",
        """
def is_large_multiple(n):
    return n % $divisor == 0
""",
    ],
    "sum_in_steps_up_to": [
        """
def sum_in_steps_up_to(n):
    return sum(range($first, n, $step))
""",
        """
def sum_in_steps_up_to(n):
    return sum(range($first, n + 1))
""",
        """
def sum_in_steps_up_to(n):
    return len(range($first, n + 1, $step))
""",
    ],
    "swap_letter_for_another": [
        """
def swap_letter_for_another(text):
    return text.replace("$old", "$new", 1)
""",
        """
def swap_letter_for_another(text):
    return text.lower().replace("$old", "$new")
""",
        """
def swap_letter_for_another(text):
    return text.replace("$new", "$old")
""",
    ],
    "clip_and_mark": [
        """
def clip_and_mark(text):
    return text[: $size - 1] + "$mark"
""",
        """
def clip_and_mark(text):
    return text[:$size] + "$mark" if len(text) > $size else text
""",
        """
def clip_and_mark(text):
    return text[:$size]
""",
    ],
    "repeat_joined_by": [
        """
def repeat_joined_by(word):
    return (word + "$separator") * $count
""",
        """
def repeat_joined_by(word):
    return "$separator".join(word * $count)
""",
        """
def repeat_joined_by(word):
    return "$separator".join([word] * ($count + 1))
""",
    ],
    "starts_and_ends_with_letters": [
        """
def starts_and_ends_with_letters(text):
    return text.startswith("$first") or text.endswith("$last")
""",
        """
def starts_and_ends_with_letters(text):
    return "$first" in text and "$last" in text
""",
        """
def starts_and_ends_with_letters(text):
    return text[0] == "$first" and text[-1] == "$last"
""",
    ],
    "long_words_with_initial": [
        """
def long_words_with_initial(sentence):
    return [word for word in sentence.split() if word.startswith("$letter") and len(word) > $size]
""",
        """
def long_words_with_initial(sentence):
    return [word for word in sentence.split() if len(word) >= $size]
""",
        """
def long_words_with_initial(sentence):
    return [word for word in sentence.split() if "$letter" in word and len(word) >= $size]
""",
    ],
    "count_above": [
        """
def count_above(numbers):
    return sum(number >= $limit for number in numbers)
""",
        """
def count_above(numbers):
    return len(set(number for number in numbers if number > $limit))
""",
        """
def count_above(numbers):
    return sum(number < $limit for number in numbers)
""",
    ],
    "without_first_and_last_items": [
        """
def without_first_and_last_items(items):
    return items[$head:$tail]
""",
        """
def without_first_and_last_items(items):
    return items[$head : -$tail - 1]
""",
        """
def without_first_and_last_items(items):
    return items[$head:]
""",
    ],
    "keep_between_inclusive": [
        """
def keep_between_inclusive(numbers):
    return [number for number in numbers if $low < number < $high]
""",
        """
def keep_between_inclusive(numbers):
    return [number for number in numbers if number in range($low, $high)]
""",
        """
def keep_between_inclusive(numbers):
    return sorted(set(number for number in numbers if $low <= number <= $high))
""",
    ],
    "largest_multiple_or_default": [
        """
def largest_multiple_or_default(numbers):
    best = $default
    for number in numbers:
        if number % $divisor == 0 and number > best:
            best = number
    return best
""",
        """
def largest_multiple_or_default(numbers):
    return max(number for number in numbers if number % $divisor == 0)
""",
        """
def largest_multiple_or_default(numbers):
    largest = max(numbers, default=$default)
    return largest if largest % $divisor == 0 else $default
""",
    ],
    "price_of_several": [
        """
def price_of_several(prices, name):
    return prices.get(name, $default) * $count
""",
        """
def price_of_several(prices, name):
    return prices[name] * $count if prices.get(name) else $default
""",
        """
def price_of_several(prices, name):
    return prices.get(name, $default)
""",
    ],
    "reduce_high_prices_only": [
        """
def reduce_high_prices_only(prices):
    return {name: price - $discount for name, price in prices.items() if price > $least}
""",
        """
def reduce_high_prices_only(prices):
    return {name: price - $discount if price >= $least else price for name, price in prices.items()}
""",
        """
def reduce_high_prices_only(prices):
    return {name: price for name, price in prices.items() if price >= $least}
""",
    ],
    "number_table_as_dictionary": [
        """
def number_table_as_dictionary(n):
    return {i: $factor * i + $offset for i in range(1, n + 1)}
""",
        """
def number_table_as_dictionary(n):
    return {str(i): $factor * i + $offset for i in range(1, n)}
""",
        """
def number_table_as_dictionary(n):
    return {str(i): $factor * i + $offset for i in range(n + 1)}
""",
    ],
    "countdown_in_steps": [
        """
def countdown_in_steps(n):
    return [n] + countdown_in_steps(n - $step) if n > $stop else []
""",
        """
def countdown_in_steps(n):
    return countdown_in_steps(n - $step) + [n] if n >= $stop else []
""",
        """
def countdown_in_steps(n):
    return [n] + countdown_in_steps(n - $step) if n >= $stop else [n]
""",
    ],
    "count_nested_above": [
        """
def count_nested_above(data):
    return sum(isinstance(item, int) and item > $limit for item in data)
""",
        """
def count_nested_above(data):
    return sum(count_nested_above(item) if isinstance(item, list) else item >= $limit for item in data)
""",
        """
def count_nested_above(data):
    return sum(isinstance(item, list) or item > $limit for item in data)
""",
    ],
    "value_of_recurrence": [
        """
def value_of_recurrence(n):
    return $start if n <= 1 else $factor * value_of_recurrence(n - 1) + $increase
""",
        """
def value_of_recurrence(n):
    return $start if n == 0 else $factor * (value_of_recurrence(n - 1) + $increase)
""",
        """
def value_of_recurrence(n):
    return $start * $factor**n + $increase
""",
    ],
    "counter_after_moves": [
        """
def counter_after_moves(moves):
    return $up * moves.count("U") - $down * moves.count("D")
""",
        """
def counter_after_moves(moves):
    return $start + $up * moves.count("U") + $down * moves.count("D")
""",
        """
def counter_after_moves(moves):
    return max(0, $start + $up * moves.count("U") - $down * moves.count("D"))
""",
    ],
    "tank_level_after_changes": [
        """
def tank_level_after_changes(changes):
    return min(max($start + sum(changes), 0), $capacity)
""",
        """
def tank_level_after_changes(changes):
    level = $start
    for change in changes:
        level = min(level + change, $capacity)
    return level
""",
        """
def tank_level_after_changes(changes):
    level = 0
    for change in changes:
        level = min(max(level + change, 0), $capacity)
    return level
""",
    ],
    "savings_after_each_day": [
        """
def savings_after_each_day(n):
    return [$start + $gain * day for day in range(n)]
""",
        """
def savings_after_each_day(n):
    return [$start + $gain * day for day in range(n + 1)]
""",
        """
def savings_after_each_day(n):
    return $start + $gain * n
""",
    ],
    "field_or_missing": [
        """
def field_or_missing(line):
    fields = line.split("$separator")
    return fields[$number] if len(fields) > $number else "missing"
""",
        """
def field_or_missing(line):
    return line.split("$separator")[$number - 1]
""",
        """
def field_or_missing(line):
    fields = [field for field in line.split("$separator") if field]
    return fields[$number - 1] if len(fields) >= $number else "missing"
""",
    ],
    "sum_of_named_amounts": [
        """
def sum_of_named_amounts(text):
    return sum(int(entry.split("$sign")[1]) for entry in text.split("$separator"))
""",
        """
def sum_of_named_amounts(text):
    amounts = dict(entry.split("$sign") for entry in text.split("$separator") if entry)
    return sum(map(int, amounts.values()))
""",
        """
def sum_of_named_amounts(text):
    return sum(int(character) for character in text if character.isdigit())
""",
    ],
    "pieces_from_stock_code": [
        """
def pieces_from_stock_code(code):
    boxes, loose = code.split("$mark")
    return int(boxes) + int(loose) * $size
""",
        """
def pieces_from_stock_code(code):
    return int(code[0]) * $size + int(code[-1])
""",
        """
def pieces_from_stock_code(code):
    boxes, loose = code.split("$mark")
    return (int(boxes) + int(loose)) * $size
""",
    ],
}
