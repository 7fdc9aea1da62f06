"""Which answer a text commits to. Every case is a response, a reference and the reward worked out by hand."""

import pytest

from gspo.tasks.grading import final_text, math_score, reasoning_score, reference_number, same_number

RIGHT = [
    ("17", "17"),
    ("12 + 5 = 17", "17"),
    ("x = 3 and so 7 apples", "7"),
    ("3x = 93\nx = 31", "31"),
    ("She earns 9 * 2 = $18 every day", "18"),
    ("After 3 days, 7 apples remain", "7"),
    ("So they average 48/2 = <<48/2=24>>24/month", "24"),
    ("\\boxed{17}", "17"),
    ("\\boxed{\\boxed{17}}", "17"),
    ("3, then 4, so \\boxed{x = 17\\text{ apples}}", "17"),
    ("#### 17\nI hope this helps 100 people.", "17"),
    ("#### Step 3: add\n12 + 5 = 17\nThe answer is 17", "17"),
    ("#### Final Answer\n17", "17"),
    ("The answer is 18 dollars for 2 days. There were 3 boxes.", "18"),
    ("**Final answer:** $17$", "17"),
    ("Answer:\n17", "17"),
    ("Answer: 7 (3 + 4)", "7"),
    ("The area is 18 cm^2", "18"),
    ("17 or 17", "17"),
    ("In total:\n- 17 apples", "17"),
    ("So 5 + 3 = 8 + 9 = 17", "17"),
    ("x = 34/2 = 17", "17"),
    ("3 * 5.6667\n= 17.0001\n= 17", "17"),
    ("13 - 10 is 3.", "3"),
    ("0.5", "\\frac{1}{2}"),
    ("It is 1/2.", "0.5"),
    ("\\boxed{\\frac12}", "0.5"),
    ("-\\frac{1}{2}", "-0.5"),
    ("1\\frac{1}{2}", "1.5"),
    ("0.333333", "1/3"),
    ("\u22125", "-5"),
    ("-$5", "-5"),
    ("#### $18.00", "18"),
    ("1,000", "1000"),
    ("\\boxed{1{,}000}", "1000"),
    ("1.5 \\times 10^{3}", "1500"),
    ("50%", "50"),
    ("50\\%", "0.5"),
    ("\\boxed{\\sqrt{12}}", "2\\sqrt{3}"),
    ("\\boxed{(3, 4)}", "(3, 4)"),
    ("#### 4, 3", "3, 4"),
    ("\\boxed{[1, 2)}", "[1, 2)"),
    ("\\boxed{1 + x^2}", "x^2 + 1"),
]
CANDIDATES = [  # the reference is among them every time
    ("3 or 4", "4"),
    ("3 or 4", "3"),
    ("15, 16, 17", "17"),
    ("15, 16, or maybe 17", "17"),
    ("It could be 15, it could be 16, or 17", "17"),
    ("1 2 3 4 17", "17"),
    ("15\n16\n17", "17"),
    ("1. 15\n2. 16\n3. 17", "17"),
    ("- 15\n- 16\n- 17", "17"),
    ("17/18/19", "19"),
    ("17/18/19", "17"),
    ("17-18", "18"),
    ("between 15 and 17", "17"),
    ("(3) (4) (17)", "17"),
    ("18 dollars, 19 dollars, 20 dollars", "20"),
    ("x = 3, x = 4", "4"),
    ("15 = 16 = 17", "17"),
    ("\\boxed{15 = 17}", "17"),
    ("The answer is 15 = 17", "17"),
    ("it is 3 is 4 is 5", "5"),
    ("12 + 5 = 16 = 17", "17"),
    ("either 15 either 17", "17"),
    ("a) 15 b) 17", "17"),
    ("The answer is 3. The answer is 4.", "4"),
    ("The answer is 3 and 4", "3"),
    ("Answer: 3\nAnswer: 4", "4"),
    ("#### 3\n#### 4", "4"),
    ("\\boxed{3} \\boxed{4}", "4"),
    ("\\boxed{3}, \\boxed{4} or \\boxed{5}", "5"),
    ("\\boxed{17} or 18", "17"),
    ("\\boxed{3, 4}", "4"),
    ("\\boxed{3 \\text{ or } 4}", "4"),
    ("\\boxed{\\{3, 4\\}}", "4"),
    ("\\boxed{[3, 4]}", "4"),
    ("\\boxed{3 \\le x \\le 4}", "4"),
    ("17 \u00b1 1", "17"),
    ("\\boxed{2\\sqrt{3}, \\sqrt{5}}", "2\\sqrt{3}"),
    ("3, 4, 5", "3, 4"),
]
WRONG = [
    ("", "17"),
    ("seventeen", "17"),
    ("True", "1"),
    ("18", "17"),
    ("The answer is 7. I used 3 steps.", "3"),
    ("17, so it is \\boxed{x + 1}", "17"),
    ("0.33", "1/3"),
    ("1000000", "1000001"),
    ("(4, 3)", "(3, 4)"),
    ("12 + 5", "17"),  # what was asked is no answer
    ("\\boxed{12 + 5}", "17"),
    ("12 - 6", "6"),
    ("1 x 7", "7"),
    ("The answer is 7 times 1", "7"),
    ("84/7", "12"),
    ("\\sqrt{16}", "4"),
    ("\\sqrt{16}", "16"),
    ("9^2", "9"),
    ("6x", "6"),
    ("> 17", "17"),
    ("The answer is not 17", "17"),
    ("9^9^9^9", "9"),
    ("1/0", "1"),
    ("1" * 5000, "17"),
    ("1e999999999", "17"),
]


@pytest.mark.parametrize("response, reference", RIGHT)
def test_right(response, reference):
    assert math_score(response, reference) == 1.0


@pytest.mark.parametrize("response, reference", CANDIDATES)
def test_candidates_earn_nothing(response, reference):
    assert math_score(response, reference) == 0.0


@pytest.mark.parametrize("response, reference", WRONG)
def test_wrong(response, reference):
    assert math_score(response, reference) == 0.0


@pytest.mark.parametrize("reference", ["", "Paris", "True", "nan", "3 or 4", "----", "\\text{Evelyn}"])
def test_a_reference_that_is_no_value_is_an_error(reference):
    with pytest.raises(ValueError, match="reference"):
        math_score("17", reference)


def test_numbers_are_compared_as_math_verify_compares_them():
    from math_verify import parse, verify

    texts = [
        "17",
        "17.0",
        "1,000",
        "1000",
        "0.5",
        "1/2",
        "1/3",
        "0.333333",
        "0.3333",
        "-5",
        "5",
        "0.1234564",
        "0.123456",
    ]
    for reference in texts:
        for answer in texts:
            ours = same_number(reference_number(answer), reference_number(reference))
            assert ours == verify(parse(f"${reference}$"), parse(f"${answer}$")), (reference, answer)


@pytest.mark.parametrize("response, expected, text", [
    ("Let me see.\n\nIt is a cat.", "dog", "It is a cat"),
    ("The answer is **Yes**.", "No", "Yes"),
    ("No, it does not follow.", "Yes", "No"),
    ("Yes or No", "Yes", ""),
    ("There are 3 letters.", "4", "3"),
    ("There are 3 or 4 letters.", "4", ""),
    ("\\boxed{\\text{blue}}", "red", "blue"),
    ("#### a\n#### b", "b", ""),
])  # fmt: skip
def test_final_text(response, expected, text):
    assert final_text(response, expected) == text


def test_reasoning_pays_for_the_answer_and_not_for_containing_it():
    entry = {"question": "", "answer": "3", "metadata": {}}
    rewards = [
        reasoning_score(text, "letter_counting", entry) for text in ("3", "It is 3.", "13", "1 2 3", "")
    ]
    assert rewards == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_reasoning_uses_the_generators_own_scorer():
    entry = {"question": "", "answer": "a, b, c, d", "metadata": {"sorted_words": ["a", "b", "c", "d"]}}
    assert reasoning_score("The answer is a,b,c, d", "word_sorting", entry) == 1.0
    assert reasoning_score("#### a, b, d, c", "word_sorting", entry) == 0.5
