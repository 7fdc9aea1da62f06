"""Problems that are generated: math and reasoning by reasoning-gym, code by the families of code_families/.

Each generator is a stream of problems of one side, train or eval. A data set takes them in turns, so that
every generator has its share. The same seed gives the same problems in the same order on every machine.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gspo.tasks.code_families.easy import EASY
from gspo.tasks.code_families.family import Family, instantiate
from gspo.tasks.code_families.hard import HARD
from gspo.tasks.code_families.medium import MEDIUM
from gspo.tasks.problem import Problem, id_of, seeded_rng, shuffled, split_of, stable_hash

MAX_DRAWS = 1_000_000  # draws from one generator
MAX_REPEATS = 1000  # draws in a row that bring nothing new: the generator has no more

FAMILIES = {"easy": EASY, "medium": MEDIUM, "hard": HARD}

NUMBER_ONLY = " Answer with only the final number."
YES_OR_NO = " Answer with only Yes or No."
STEP_BY_STEP = '\nReason step by step, then give the final answer alone after "####".'


@dataclass(frozen=True)
class Source:
    """One reasoning-gym generator at one level.

    generator, config: what reasoning_gym.create_dataset takes. question: the prompt, formatted with the
    entry's question and metadata. keep: tells which entries to use.
    """

    generator: str
    config: dict
    question: str = "{question}" + STEP_BY_STEP
    keep: Callable[[dict], bool] = lambda entry: True


def up_to_20(entry: dict) -> bool:
    operands = re.findall(r"\d+", entry["metadata"]["expression"])
    return int(entry["answer"]) >= 0 and all(int(operand) <= 20 for operand in operands)


WHAT_IS = "What is {expression}?"
WHAT_IS_EASY = WHAT_IS + NUMBER_ONLY
WHAT_IS_LONG = WHAT_IS + STEP_BY_STEP
COUNT_LETTERS = 'How many times does the letter "{target_letter}" appear in "{span[0]}"?'
# Not every generator will do: ransom_note and isomorphic_strings depend on Python's hash seed, time_intervals
# on today's date; countdown and color_cube_rotation pay 0.01 for any text, which a group's small std blows
# up, and spell_backward pays for a letter in the right place ("I do not know." has 1/3 for "ton");
# fraction_simplification, graded as math, would pay for the question itself.
SOURCES = {
    # Easy is for models of a hundred million parameters: SmolLM2-135M-Instruct, sampled, has some right.
    ("math", "easy"): [
        Source("chain_sum", dict(min_terms=2, max_terms=2, max_digits=1), WHAT_IS_EASY, up_to_20),
        Source("products", dict(max_digits=1), WHAT_IS_EASY),
        Source("chain_sum", dict(min_terms=2, max_terms=2, min_digits=2, max_digits=2),
               WHAT_IS_EASY, up_to_20),
    ],
    ("math", "medium"): [
        Source("chain_sum", dict(min_terms=3, max_terms=5, min_digits=2, max_digits=3), WHAT_IS_LONG),
        Source("products", dict(min_digits=2, max_digits=2), WHAT_IS_LONG),
        Source("decimal_chain_sum", dict(max_terms=3, max_digits=2, max_decimal_places=2), WHAT_IS_LONG),
        Source("simple_equations", dict(max_terms=3, max_value=20)),
        Source("gcd", dict(max_value=200)),
        Source("lcm", dict(max_value=40)),
        Source("simple_geometry", dict(max_sides=4)),
    ],
    ("math", "hard"): [
        Source("basic_arithmetic", dict(min_terms=5, max_terms=8, min_digits=2, max_digits=3)),
        Source("products", dict(min_digits=3, max_digits=4), WHAT_IS_LONG),
        Source("simple_equations", dict(min_terms=4, max_terms=6, max_value=100)),
        Source("lcm", dict(min_numbers=3, max_numbers=3, min_value=10, max_value=200)),
        Source("gsm_symbolic", dict()),
        Source("count_primes", dict(max_n=400)),
        Source("dice", dict(num_dice=3, max_dice_size=10)),
    ],
    ("reasoning", "easy"): [
        Source("letter_counting", dict(min_words=1, max_words=1), COUNT_LETTERS + NUMBER_ONLY),
        Source("calendar_arithmetic", dict(tasks=["is_leap_year"]), "Is {year} a leap year?" + YES_OR_NO),
        Source("syllogism", dict(), "{premise1}. {premise2}. Does it follow that {conclusion}?" + YES_OR_NO),
    ],
    ("reasoning", "medium"): [
        Source("letter_counting", dict()),
        Source("syllogism", dict()),
        Source("family_relationships", dict()),
        Source("needle_haystack", dict(min_num_statements=5, max_num_statements=15)),
        Source("aiw", dict()),
        Source("word_sorting", dict(max_words=5)),
    ],
    ("reasoning", "hard"): [
        Source("knights_knaves", dict(n_people=3)),
        Source("zebra_puzzles", dict()),
        Source("self_reference", dict()),
        Source("course_schedule", dict()),
        Source("word_sorting", dict(min_words=8, max_words=12)),
        Source("caesar_cipher", dict(max_words=5)),
        Source("binary_alternation", dict()),
    ],
}  # fmt: skip


def load_math(split: str, num_samples: int, seed: int, difficulty: str) -> list[Problem]:
    """Arithmetic and algebra. ValueError: fewer different problems exist."""
    return _from_sources("math", split, num_samples, seed, difficulty)


def load_reasoning(split: str, num_samples: int, seed: int, difficulty: str) -> list[Problem]:
    """Logic and tasks on strings. ValueError: fewer different problems exist."""
    return _from_sources("reasoning", split, num_samples, seed, difficulty)


def load_code(split: str, num_samples: int, seed: int, difficulty: str) -> list[Problem]:
    """Python functions to write. ValueError: fewer different problems exist."""
    streams = [_family_stream(family, split, seed, difficulty) for family in FAMILIES[difficulty]]
    return _in_turns(streams, "code", split, num_samples, seed, difficulty)


def _from_sources(name: str, split: str, num_samples: int, seed: int, difficulty: str) -> list[Problem]:
    prompts: set[str] = set()  # two sources may give the same problem
    streams = [
        _source_stream(source, name, split, seed, difficulty, prompts) for source in SOURCES[name, difficulty]
    ]
    return _in_turns(streams, name, split, num_samples, seed, difficulty)


def _in_turns(
    streams: list[Iterator[Problem]], name: str, split: str, num_samples: int, seed: int, difficulty: str
) -> list[Problem]:
    """num_samples problems, from one stream after the other, shuffled."""
    # A small number of problems comes from the first few streams: let the seed decide which these are.
    seeded_rng(seed, name, split).shuffle(streams)
    problems: list[Problem] = []
    while streams and len(problems) < num_samples:
        for stream in list(streams):
            problem = next(stream, None)
            if problem is None:
                streams.remove(stream)
            else:
                problems.append(problem)
    if len(problems) < num_samples:
        raise ValueError(
            f"{name} has {len(problems)} different problems for {split} at difficulty {difficulty}, and "
            f"{num_samples} were asked for: ask for fewer, or for a higher difficulty"
        )
    return shuffled(problems[:num_samples], seed)


def _family_stream(family: Family, split: str, seed: int, difficulty: str) -> Iterator[Problem]:
    """The family's problems of one side, in an order that depends on the seed."""
    order = seeded_rng(seed, family.signature).sample(range(family.size), family.size)
    for index in order:
        problem = instantiate(family, index)
        if split_of(problem.prompt) == split:
            yield problem.as_problem(f"code-{difficulty}-{id_of(problem.prompt)}")


def _source_stream(
    source: Source, name: str, split: str, seed: int, difficulty: str, prompts: set[str]
) -> Iterator[Problem]:
    """The source's new problems of one side, until it has no more. prompts: those used so far, added to."""
    import reasoning_gym  # this import takes seconds

    # A generator numbers its entries from its seed on, so neighbouring seeds would give overlapping problems.
    generator_seed = stable_hash(seed, source.generator, source.config) % 2**31
    entries = reasoning_gym.create_dataset(
        source.generator, seed=generator_seed, size=MAX_DRAWS, **source.config
    )
    repeats = 0
    for index in range(MAX_DRAWS):
        entry = entries[index]
        fields = entry["metadata"] | {"question": entry["question"].strip()}
        prompt = source.question.format(**fields)
        if not source.keep(entry) or split_of(prompt) != split:
            continue
        if prompt in prompts:
            repeats += 1
            if repeats > MAX_REPEATS:
                return
            continue
        repeats = 0
        prompts.add(prompt)
        metadata = {"generator": source.generator}
        if name == "reasoning":
            metadata["entry"] = json.loads(json.dumps(entry))  # tuples become lists, as in a file
        yield Problem(f"{name}-{difficulty}-{id_of(prompt)}", name, prompt, entry["answer"], metadata)
