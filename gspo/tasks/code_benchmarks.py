"""Rows of HumanEval's and MBPP's jsonl files as function-writing problems."""

import ast
import warnings

from gspo.tasks.code_families.family import CodeProblem

HUMAN_EVAL: dict[str, type] = {"prompt": str, "entry_point": str, "canonical_solution": str, "test": str}
MBPP: dict[str, type] = {"text": str, "code": str, "test_list": list}
ANSWER_FORMAT = "Answer with only the {what}, in one Python code block."


def code_problem(row: dict) -> CodeProblem | None:
    """The problem of a row. None: the row has neither format. ValueError: something in it is wrong."""
    if "question" in row:
        return None
    if "test_list" in row:
        sanitized = {"text": row["prompt"]} if "prompt" in row else {}  # that version's name for it
        return _mbpp(_with_types(row | sanitized, MBPP))
    if "entry_point" in row:
        return _human_eval(_with_types(row, HUMAN_EVAL))
    return None


def _human_eval(row: dict) -> CodeProblem:
    """A row of HumanEval. The prompt's imports and helpers go to the answer's code and to the tests."""
    lines, name = row["prompt"].split("\n"), row["entry_point"]
    function = _functions(_parsed(row["prompt"], "prompt")).get(name)
    if function is None:
        raise ValueError(f"prompt does not begin a function {name}")
    if "check" not in _functions(_parsed(row["test"], "test")):
        raise ValueError("test defines no function check")
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    preamble = "\n".join(lines[: first - 1]) + "\n"
    return CodeProblem(
        prompt=f"Complete this Python function.\n\n{row['prompt'].strip()}\n\n"
        + ANSWER_FORMAT.format(what="whole function"),
        solution=row["prompt"] + row["canonical_solution"],
        tests={"entry_point": name, "asserts": f"{preamble}\n{row['test']}\ncheck({name})\n"},
        preamble=preamble,
    )


def _mbpp(row: dict) -> CodeProblem:
    """A row of MBPP. The prompt shows the first test, which tells the function's name, and no other."""
    tests = [*_strings(row, "test_list"), *_strings(row, "challenge_test_list")]
    setup = _strings(row, "test_imports")
    if row.get("test_setup_code"):
        setup = [_with_types(row, {"test_setup_code": str})["test_setup_code"], *setup]
    defined = {
        node.name for node in ast.walk(_parsed(row["code"], "code")) if isinstance(node, ast.FunctionDef)
    }
    test_nodes = list(ast.walk(_parsed("\n".join(tests), "test_list")))
    if not any(isinstance(node, ast.Assert) for node in test_nodes):
        raise ValueError("test_list has no assert")
    called = [
        node.func.id
        for node in test_nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in defined
    ]
    if not called:
        raise ValueError("the tests call none of the functions that code defines")
    return CodeProblem(
        prompt=f"{row['text'].strip()}\nThe function must pass this test, and others: {tests[0].strip()}\n"
        + ANSWER_FORMAT.format(what="function"),
        solution=row["code"],
        tests={"entry_point": called[0], "asserts": "\n".join([*setup, *tests])},
    )


def _functions(module: ast.Module) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}


def _strings(row: dict, key: str) -> list[str]:
    """The strings of a list that may be missing; ValueError for anything else."""
    values = row.get(key) or []
    if not (isinstance(values, list) and all(isinstance(value, str) for value in values)):
        raise ValueError(f"{key} is no list of strings")
    return values


def _with_types(row: dict, types: dict[str, type]) -> dict:
    for key, kind in types.items():
        if not isinstance(row.get(key), kind):
            found = type(row[key]).__name__ if key in row else "missing"
            raise ValueError(f"{key} is {found}, not {kind.__name__}")
    return row


def _parsed(source: str, field: str) -> ast.Module:
    try:
        with warnings.catch_warnings(action="ignore"):  # strings may have outdated escapes
            return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{field} is not Python ({error})") from error
