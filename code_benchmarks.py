"""Rows of HumanEval's and MBPP's jsonl files as function-writing problems."""

import ast
import warnings

from code_family import CodeProblem

HUMAN_EVAL = {"prompt": str, "entry_point": str, "canonical_solution": str, "test": str}
MBPP = {"text": str, "code": str, "test_list": list}
ANSWER_FORMAT = "Answer with only the {what}, in one Python code block."


def code_problem(row: dict) -> CodeProblem | None:
    """None: the row has neither format. ValueError: it has, but something in it is wrong."""
    if "prompt" in row and "test_list" in row:  # MBPP's sanitized version
        row = row | {"text": row["prompt"], "test_setup_code": "\n".join(row.get("test_imports", []))}
    if "test_list" in row:
        return _mbpp(_with_types(row, MBPP))
    if "entry_point" in row:
        return _human_eval(_with_types(row, HUMAN_EVAL))
    return None


def _human_eval(row: dict) -> CodeProblem:
    """What stands before the function, imports and helpers, goes to the answer's code and to the tests."""
    lines, name = row["prompt"].splitlines(), row["entry_point"]
    functions = [node for node in _parsed(row["prompt"], "prompt").body if isinstance(node, ast.FunctionDef)]
    first = next((node.lineno for node in functions if node.name == name), None)
    if first is None:
        raise ValueError(f"prompt does not begin a function {name}")
    preamble = "\n".join(lines[: first - 1]) + "\n"
    _parsed(row["test"], "test")
    return CodeProblem(
        prompt=f"Complete this Python function.\n\n{row['prompt'].strip()}\n\n"
        + ANSWER_FORMAT.format(what="whole function"),
        solution=row["prompt"] + row["canonical_solution"],
        tests={"entry_point": name, "asserts": f"{preamble}\n{row['test']}\ncheck({name})\n"},
        preamble=preamble,
    )


def _mbpp(row: dict) -> CodeProblem:
    """The prompt shows the first test, which tells the function's name; the others stay hidden."""
    tests = [*row["test_list"], *row.get("challenge_test_list", [])]
    defined = {
        node.name for node in ast.walk(_parsed(row["code"], "code")) if isinstance(node, ast.FunctionDef)
    }
    test_nodes = list(ast.walk(_parsed("\n".join(map(str, tests)), "test_list")))
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
        tests={"entry_point": called[0], "asserts": "\n".join([row.get("test_setup_code", ""), *tests])},
    )


def _with_types(row: dict, types: dict[str, type]) -> dict:
    for key, kind in types.items():
        if not isinstance(row.get(key), kind):
            found = type(row[key]).__name__ if key in row else "missing"
            raise ValueError(f"{key} is {found}, not {kind.__name__}")
    return row


def _parsed(source: str, field: str) -> ast.Module:
    try:
        with warnings.catch_warnings(action="ignore"):  # of outdated escapes in strings
            return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{field} is not Python ({error})") from error
