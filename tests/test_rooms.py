"""The import layering of the package, and what importing it does to the process."""

import ast
import pathlib
import subprocess
import sys

import pytest

import skebm

ROOT = pathlib.Path(skebm.__file__).parent

# A room may import from rooms of lower rank, and from itself.
RANK = {
    "": 11,  # skebm/__init__.py
    "plotting": 10,
    "compose": 9,
    "estimators": 8,
    "training": 7,
    "models": 6,
    "diagnostics": 5,
    "latents": 5,
    "partition": 5,
    "objectives": 4,
    "samplers": 4,
    "derivatives": 3,
    "bases": 2,
    "datasets": 2,
    "energies": 2,
    "_engine": 1,
    "_memory": 1,
    "_modules": 1,
    "_parallel": 1,
    "_containers": 0,
    "_layout": 0,
    "_random": 0,
    "_sklearn_compat": 0,
    "_state": 0,
    "_statistics": 0,
    "_tensors": 0,
    "_threads": 0,
    "_typing": 0,
    "_version": 0,
    "_warnings": 0,
    "exceptions": 0,
}

FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}


def room_of(module):
    """Room of a module of the package, "skebm.bases._em" -> "bases"."""
    return module.split(".")[1] if "." in module else ""


def imports(tree, file):
    """Yield (full name, line, whether inside a function) of everything that is imported."""
    package = ["skebm", *pathlib.PurePosixPath(file).parent.parts]

    def visit(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child.lineno, inside
            elif isinstance(child, ast.ImportFrom):
                above = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*above, *([child.module] if child.module else [])])
                for alias in child.names:
                    yield f"{module}.{alias.name}", child.lineno, inside
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from visit(child, inside or function)

    yield from visit(tree, False)


def dotted(tree):
    """Yield (dotted name, line) of chains of attributes such as sklearn.utils._tags."""
    for node in ast.walk(tree):
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name):
            yield ".".join([inner.id, *reversed(parts)]), node.lineno


def layering(file, tree):
    """Imports of `file` that do not point downwards."""
    parts = pathlib.PurePosixPath(file).with_suffix("").parts
    own = "" if parts == ("__init__",) else parts[0]
    for name, line, _ in imports(tree, file):
        if name.split(".")[0] != "skebm":
            continue
        room = room_of(name)
        if room not in RANK:
            yield f"{file}:{line} imports {name}, which is in no known room"
        elif room != own and RANK[room] >= RANK[own]:
            yield f"{file}:{line} imports {name}: {own or 'skebm'} may not import {room}"


def of(tree, file, package):
    return [i for i in imports(tree, file) if i[0].split(".")[0] == package]


def foreign(file, tree):
    """Imports of other packages that are not where they belong."""
    room = file.split("/")[0]
    if file != "_engine/net.py":
        for name, line, _ in of(tree, file, "skorch"):
            yield f"{file}:{line} imports {name}: only _engine/net.py may"
    for name, line, inside in of(tree, file, "matplotlib") + of(tree, file, "mpl_toolkits"):
        if room != "plotting" or not inside:
            yield f"{file}:{line} imports {name}: only functions of plotting may"
    for package in ("zuko", "arviz", "arviz_base", "arviz_stats", "xarray"):
        for name, line, inside in of(tree, file, package):
            if not inside:
                yield f"{file}:{line} imports {name} outside of a function"
    if room in ("bases", "objectives", "partition"):
        for name, line, inside in of(tree, file, "sklearn"):
            if not inside:
                yield f"{file}:{line} imports {name} outside of a function"


def private(file, tree):
    """Private names of scikit-learn outside of the one file for them."""
    if file == "_sklearn_compat.py":
        return
    used = [(name, line) for name, line, _ in imports(tree, file)] + list(dotted(tree))
    for name, line in used:
        parts = name.split(".")
        if parts[0] == "sklearn" and any(p.startswith("_") for p in parts):
            yield f"{file}:{line} uses {name}"


def counted_frames(file, tree):
    """Warnings that say how many frames up the user is, which the next change makes wrong."""
    if file == "_warnings.py":
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "stacklevel":
            yield f"{file}:{node.value.lineno} counts frames: take warn of _warnings.py"


RULES = [layering, foreign, private, counted_frames]


def test_every_file_is_in_a_known_room():
    rooms = {file.split("/")[0].removesuffix(".py") for file in FILES} - {"__init__"}
    assert rooms <= set(RANK)
    assert len(FILES) > 30


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("file", FILES)
def test_rooms(file, rule):
    assert list(rule(file, ast.parse(FILES[file].read_text()))) == []


@pytest.mark.parametrize(
    ("rule", "file", "code"),
    [
        (layering, "bases/_em.py", "from skebm.energies import MLPEnergy"),
        (layering, "bases/_em.py", "from ..estimators import NCEDensity"),
        (layering, "bases/_em.py", "def f():\n    from .. import estimators"),
        (layering, "samplers/_run.py", "import skebm.objectives.contrastive"),
        (layering, "energies/_stack.py", "from skebm.derivatives import derivatives"),
        (layering, "derivatives/_jets.py", "from skebm.objectives import nce_losses"),
        (layering, "diagnostics/_runs.py", "from ..partition import LogPartition"),
        (layering, "datasets/_make.py", "from skebm import NCEDensity"),
        (layering, "exceptions.py", "from skebm._version import __version__"),
        (layering, "training/fit.py", "from skebm.estimators import NCEDensity"),
        (layering, "training/fit.py", "def f():\n    import skebm.estimators._base"),
        (layering, "models/tilted.py", "from ..estimators._base import BaseDensity"),
        (layering, "models/tilted.py", "from skebm.training import Columns"),
        (layering, "estimators/nce.py", "from skebm.plotting import DensityDisplay"),
        (layering, "estimators/nce.py", "from skebm.new_room import something"),
        (layering, "estimators/nce.py", "from skebm.compose import DensityPipeline"),
        (layering, "compose/_pipeline.py", "from skebm.plotting import DensityDisplay"),
        (foreign, "estimators/nce.py", "def f():\n    from skorch import NeuralNet"),
        (foreign, "_engine/loop.py", "def f():\n    from skorch import NeuralNet"),
        (foreign, "estimators/_base.py", "def f():\n    import matplotlib.pyplot as plt"),
        (foreign, "plotting/_common.py", "import matplotlib.pyplot as plt"),
        (foreign, "bases/_adapters.py", "import zuko.flows"),
        (foreign, "diagnostics/_chains.py", "from arviz_stats.base import array_stats"),
        (foreign, "bases/_fit.py", "from sklearn.base import clone"),
        (private, "estimators/nce.py", "from sklearn.base import _fit_context"),
        (private, "estimators/nce.py", "from sklearn.utils._tags import Tags"),
        (private, "estimators/nce.py", "import sklearn.utils\nsklearn.utils._tags.Tags"),
        (counted_frames, "samplers/_run.py", "warnings.warn('slow', stacklevel=3)"),
    ],
)
def test_rules_find_what_they_forbid(rule, file, code):
    assert list(rule(file, ast.parse(code)))


@pytest.mark.parametrize(
    ("file", "code"),
    [
        (
            "estimators/_members.py",
            "from ._model import log_ratio\nfrom ..bases import UniformBase",
        ),
        ("_engine/net.py", "from skorch import NeuralNet"),
        ("plotting/_density.py", "def f():\n    import matplotlib.pyplot as plt"),
        ("bases/_adapters.py", "def f():\n    import zuko"),
        ("energies/_trees.py", "from skebm._sklearn_compat import hist_gradient_boosting_nodes"),
        ("__init__.py", "from skebm.estimators import NCEDensity"),
        ("_warnings.py", "warnings.warn('slow', stacklevel=3)"),
    ],
)
def test_rules_allow_what_they_should(file, code):
    for rule in RULES:
        assert list(rule(file, ast.parse(code))) == []


IMPORT = """
import pickle, random, sys, warnings
import numpy as np
# what others change when they are imported is not ours to answer for
import joblib, scipy.interpolate, scipy.special, sklearn.ensemble, sklearn.mixture, torch
from torch.distributions import Distribution

def state():
    return {
        "default dtype": torch.get_default_dtype(),
        "validation of distributions": Distribution._validate_args,
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": pickle.dumps(np.random.get_state()),
        "python generator": random.getstate(),
        "print options of numpy": repr(np.get_printoptions()),
        "floating-point errors of numpy": np.geterr(),
        "print options of torch": repr(vars(torch._tensor_str.PRINT_OPTS)),
        "warnings": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "configuration of scikit-learn": sklearn.get_config(),
        "excepthook": sys.excepthook,
    }

before, modules = state(), set(sys.modules)
import skebm
after = state()
changed = [name for name in before if before[name] != after[name]]
assert not changed, f"changed: {changed}"
optional = {"skorch", "matplotlib", "zuko", "arviz_base", "arviz_stats", "tqdm", "pandas", "xarray"}
loaded = optional & (set(sys.modules) - modules)
assert not loaded, f"imported: {sorted(loaded)}"
assert all(hasattr(skebm, name) for name in skebm.__all__)
"""


def test_import_is_lean_and_changes_nothing():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == ""


def test_the_package_shows_its_rooms_and_names():
    """And imports a room when it is first asked for."""
    rooms = {room for room in RANK if room and not room.startswith("_")}
    assert set(dir(skebm)) == {*skebm.__all__, *rooms}
    code = "import skebm; skebm.datasets.make_claw(1), skebm.plotting.ChainsDisplay"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = skebm.nothing


def test_importing_the_package_leaves_slow_imports_for_later():
    code = (
        "import sys, skebm; "
        "print([m for m in ('sklearn.ensemble', 'sklearn.mixture', 'sklearn.decomposition', "
        "'matplotlib', 'zuko', 'torch._dynamo') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
