"""Imports go downward only, by the table in gspo/__init__.py."""

import ast
import math
import sys

import pytest

from support import ROOT

MAY_IMPORT = {
    "gspo.policy": set(),
    "gspo.training": {"gspo.policy"},
    "gspo.sandbox": set(),
    "gspo.tasks": {"gspo.sandbox"},
    "gspo.report": {"gspo.training"},
    "gspo_implementation": {"gspo.policy", "gspo.training"},
    "data_loader": {"gspo.sandbox", "gspo.tasks"},
    "gspo.comparison": {"gspo.policy", "gspo.training", "gspo.report", "gspo_implementation", "data_loader"},
    "gspo.checks": {"gspo.policy", "gspo.training", "gspo.sandbox", "gspo.tasks", "gspo_implementation",
                    "data_loader"},
}  # fmt: skip
SOURCES = [*ROOT.glob("*.py"), *(ROOT / "gspo").rglob("*.py")]


def part_of(module: str) -> str | None:
    """The folder of the package, or the module beside it, to which a dotted name belongs."""
    parts = module.split(".")
    if parts[0] == "gspo":
        return ".".join(parts[:2]) if len(parts) > 1 else None  # the package itself has constants alone
    return parts[0] if (ROOT / f"{parts[0]}.py").exists() else None


def imported(path) -> set[str]:
    """Every module that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path):
    own = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    allowed = MAY_IMPORT.get(own)
    if allowed is None:  # a command, or the package itself
        return
    parts = {part_of(module) for module in imported(path)} - {None, own}
    # `from gspo import NAME` reads as a module of that name.
    parts = {
        part for part in parts if not part.startswith("gspo.") or (ROOT / part.replace(".", "/")).is_dir()
    }
    assert parts <= allowed, f"{own} may not import {parts - allowed}"


@pytest.mark.parametrize("path", [*(ROOT / "gspo" / "sandbox").glob("*.py")], ids=lambda path: path.name)
def test_the_sandbox_needs_the_standard_library_alone(path):
    siblings = {"isolation", "plain_data"}  # as zygote.py, which runs as a script, names them
    roots = {module.partition(".")[0] for module in imported(path)} - siblings - {"gspo"}
    assert roots <= set(sys.stdlib_module_names)


def test_no_file_is_long_without_a_reason():
    reasons = {
        "code_families": (math.inf, "tables of problems"),
        "gspo_implementation.py": (800, "one page: every loss, and the trainer that calls it"),
    }
    long = []
    for path in SOURCES:
        limit, _ = reasons.get(path.name) or reasons.get(path.parent.name) or (700, "")
        if len(path.read_text().splitlines()) > limit:
            long.append(path)
    assert long == []
