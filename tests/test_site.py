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
    """What the pages of docs/api list."""
    names = []
    for path in sorted((ROOT / "docs" / "api").glob("*.rst")):
        module = None
        for line in path.read_text().splitlines():
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
    [
        *("skebm", "skebm.compose", "skebm.datasets", "skebm.derivatives", "skebm.diagnostics"),
        *("skebm.estimators", "skebm.exceptions", "skebm.objectives", "skebm.plotting"),
        "skebm.samplers",
    ],
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


def test_every_public_name_has_one_page():
    names = public_names()
    assert names
    assert {name for name in names if names.count(name) > 1} == set()


NOT_CHECKED = {
    "ES01": "a summary may say all there is to say",
    "PR03": "parameters of a method come first, those that all share follow",
    "PR07": "a type with its shape may say all there is to say",
    "PR08": "a description may begin with a symbol, which keeps its case",
    "RT03": "a result may be described by its type",
    "RT04": "a description may begin with a symbol, which keeps its case",
    "SS02": "a summary may begin with a formula",
    "SS03": "a summary may be a question",
    "SS05": "nouns in the plural, and names such as Neal's, are taken for verbs",
}
"""What numpydoc asks for and we do not; all else of it is checked."""


MADE_BY_OTHERS = {"skebm.energies.SoftTrees", "skebm.estimators.Explanation"}
"""Objects that a method makes, and whose constructor is for no one else."""


def neither_parameter_nor_attribute(message, obj):
    """Which of the parameters that numpydoc misses are described nowhere, nor by a parent."""
    docs = [cls.__doc__ or "" for cls in inspect.getmro(obj)] if inspect.isclass(obj) else []
    lists = re.findall(r"^ *(\w+(?:, \w+)*) : ", "\n".join(docs), flags=re.M)
    described = {name for names in lists for name in names.split(", ")}
    return set(re.findall(r"'(\w+)'", message)) - described


def test_docstrings_are_valid():
    """All have See Also and Examples, and sections and parameters as numpydoc wants them."""
    validate = pytest.importorskip("numpydoc.validate").validate
    errors = []
    for name in public_names():
        for code, message in validate(name)["errors"]:
            if code == "PR01":  # fields of what is returned are attributes
                missing = neither_parameter_nor_attribute(message, found(name))
                message = set() if name in MADE_BY_OTHERS else missing
            if message and code not in NOT_CHECKED:
                errors.append((name, code, message))
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
