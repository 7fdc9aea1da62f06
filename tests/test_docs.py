"""README.md, CONTRIBUTING.md and docs/: commands parse, links lead somewhere, Python blocks compile."""

import ast
import importlib
import json
import re
import shlex

import pytest

from support import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_README_LINES = 210
# The rest of a line of a code block, or of a span of code, after the command's name.
COMMAND = r"(?:python|torchrun|accelerate launch)\b[^`\n]*?\b{script}\b([^`\n]*)"
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands_of(script):
    """(page's name, flags as written) of each command line that the pages show, without those for --help."""
    pattern = re.compile(COMMAND.format(script=re.escape(script)))
    found = [(page.name, flags.strip()) for page in PAGES for flags in pattern.findall(page.read_text())]
    return [(name, flags) for name, flags in found if flags != "--help"]


def prose_of(page):
    """A page's text without its code blocks."""
    return CODE_BLOCK.sub("", page.read_text())


def anchors_of(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def python_blocks():
    """(page's name, code) of each block that is marked as Python."""
    blocks = [(page.name, *block) for page in PAGES for block in CODE_BLOCK.findall(page.read_text())]
    return [(name, code) for name, language, code in blocks if language == "python"]


# Commands that people type, wherever they have them from.
TYPED = (
    "--dataset mixed --num_train_samples 20 --num_epochs 2",
    "--model_name Qwen/Qwen2.5-14B-Instruct --dataset math",
    "--update_frequency 2",
    "--learning_rate 2e-6",
    "--num_train_samples 500",
    "--batch_size 4 --mini_batch_size 1 --group_size 4 --left_clip_range 3e-4 --right_clip_range 4e-4",
)


@pytest.mark.parametrize("page, flags", commands_of("compare_gspo.py"))
def test_comparing_commands_parse(page, flags):
    from compare_gspo import arms_of, cells_of, given_flags, parse

    options, others = parse([word for word in shlex.split(flags, comments=True) if word != "[...]"])
    if not options.preset:
        arms = arms_of(options.algorithms, options.vary, options.arm)
        assert len(cells_of(arms, others, options.seeds, given_flags)) >= 2


@pytest.mark.parametrize("page, flags", [*commands_of("train_gspo.py"), *(("typed", t) for t in TYPED)])
def test_training_commands_parse(page, flags):
    from train_gspo import parse

    words = shlex.split(flags, comments=True)
    # docs/extending.md makes a data set and an algorithm; other tests carry that out.
    words = [{"minutes": "math", "better_half": "gspo"}.get(word, word) for word in words]
    if "--resume" in words:  # it reads the run that it names
        place = words.index("--resume")
        del words[place : place + 2]
    parse(words)


@pytest.mark.parametrize("page, flags", commands_of("validate_gspo.py"))
def test_validation_commands_parse(page, flags):
    from validate_gspo import parse

    parse(shlex.split(flags, comments=True))


@pytest.mark.parametrize("page, flags", commands_of("data_loader.py"))
def test_commands_about_a_task_parse(page, flags):
    from data_loader import parse

    parse(shlex.split(flags, comments=True))


def test_commands_are_found():
    """The two tests above would pass if the pattern found nothing."""
    assert len(commands_of("train_gspo.py")) >= 8
    assert ("running.md", "--dataset_path problems.jsonl") in commands_of("train_gspo.py")
    assert len(commands_of("validate_gspo.py")) >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in LINK.findall(prose_of(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors_of(linked), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_are_closed(page):
    assert "```" not in prose_of(page)


@pytest.mark.parametrize("page, code", python_blocks())
def test_python_blocks_compile_and_their_imports_exist(page, code):
    compile(code, page, "exec")
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {', '.join(missing)}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"{page.relative_to(ROOT)})" not in readme] == []


def test_the_readmes_table_of_claims_is_that_of_the_measurement():
    from gspo.comparison.claims import markdown

    measured = json.loads((ROOT / "docs" / "claims.json").read_text())
    assert markdown(measured) in (ROOT / "README.md").read_text()
