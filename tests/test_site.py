"""What pages say of the package, and what stands elsewhere, agree."""

import ast
import csv
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def public_names():
    """What docs/api.rst lists."""
    module, names = None, []
    for line in (ROOT / "docs" / "api.rst").read_text().splitlines():
        if match := re.match(r"\.\. (?:current)?module:: (\S+)", line):
            module = match.group(1)
        elif match := re.match(r"   ([A-Za-z_][\w.]*)$", line):
            names.append(f"{module}.{match.group(1)}")
    return names


def found(name):
    module, _, rest = name.rpartition(".")
    return getattr(importlib.import_module(module), rest)


@pytest.mark.parametrize(
    "room",
    ["skebm", "skebm.compose", "skebm.datasets", "skebm.diagnostics", "skebm.plotting"],
)
def test_every_public_name_has_a_page(room):
    pytest.importorskip("matplotlib")
    module = importlib.import_module(room)
    listed = {name.rpartition(".")[2] for name in public_names() if name.startswith(f"{room}.")}
    listed |= {"DISTRIBUTIONS", "MIXED_DISTRIBUTIONS", "TRUSTED_TYPES", "UNKNOWN"}
    listed |= {"__version__", "parameters"}
    if room != "skebm":  # what the top level has is listed there
        listed |= set(importlib.import_module("skebm").__all__)
    callables = {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
    assert callables - listed == set()


def test_docstrings_are_valid():
    """Parameters are those of the signature, and sections have the names and order of numpydoc."""
    validate = pytest.importorskip("numpydoc.validate").validate
    # GL08: no docstring; PR02: a parameter that does not exist; PR10: no space before the colon;
    # GL06, GL07: unknown or misplaced sections; SS01: no summary.
    checked = {"GL06", "GL07", "GL08", "PR02", "PR10", "SS01"}
    errors = [
        (name, code, message)
        for name in public_names()
        for code, message in validate(name)["errors"]
        if code in checked
    ]
    assert errors == []


def test_figures_of_the_readme_are_those_of_the_results():
    text = (ROOT / "README.md").read_text().partition("<!-- results: begin")[2]
    shown = {
        match.group(1): [cell.strip(" *") for cell in match.group(2).split("|")]
        for match in re.finditer(r"^\| (\w+) \([\d, ]+\) \|(.*)\|$", text, flags=re.M)
    }
    with open(ROOT / "benchmarks" / "results" / "tables.csv", newline="") as file:
        measured = {row["case"]: row for row in csv.DictReader(file)}
    assert set(shown) == set(measured)
    for case, cells in shown.items():
        methods = ["GMM", "KDE", "NSF", "MAF", "NCEDensity"]
        assert cells == [measured[case][method] for method in methods]


def test_results_say_where_they_come_from():
    for path in (ROOT / "benchmarks" / "results").glob("*.csv"):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                assert all(row[name] for name in ("seeds", "command", "commit", "machine")), path


def test_pages_use_no_environment_variable():
    for path in (ROOT / "examples").glob("*.py"):
        assert "environ" not in path.read_text(), path


def warnings_of_the_package():
    """How the text of every warning begins, with "..." for what is filled in."""
    for path in (ROOT / "skebm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            # a sampler collects what it has to say before it warns
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warn", "messages.append"):
                text = node.args[0]
                text = text.left if isinstance(text, ast.BinOp) else text
                pieces = text.values if isinstance(text, ast.JoinedStr) else [text]
                if not isinstance(text, ast.Name):
                    yield "".join(
                        str(piece.value) if isinstance(piece, ast.Constant) else "..."
                        for piece in pieces
                    )


def test_trust_says_what_to_do_at_each_warning():
    page = (ROOT / "docs" / "trust.rst").read_text().partition("What to do at each warning")[2]
    table = page.partition("And at an error")[0]
    phrases = [
        re.compile(".*".join(map(re.escape, phrase.strip().split("..."))), flags=re.S)
        for row in re.findall(r"^   \* - (.+)$", table, flags=re.M)
        for phrase in row.split(";")
    ]
    found = list(warnings_of_the_package())
    assert len(found) > 20
    missing = [text for text in found if not any(phrase.match(text) for phrase in phrases)]
    assert missing == []


def test_chapters_of_the_guide_have_pictures():
    """Two of them at least, and each is described for those who do not see it."""
    guide = (ROOT / "docs" / "user_guide.rst").read_text()
    chapters = re.findall(r"^   ([a-z_]+)$", guide, flags=re.M)
    assert len(chapters) > 20
    for chapter in chapters:
        text = (ROOT / "docs" / f"{chapter}.rst").read_text()
        pictures = re.findall(r"\.\. (?:figure|image):: \S+\n +(:\w+:)", text)
        assert len(pictures) >= 2, chapter
        assert set(pictures) == {":alt:"}, chapter
