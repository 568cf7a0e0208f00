"""The example of CONTRIBUTING.md: an estimator by somebody who has read that page and no more."""

import importlib.util
import pathlib
import re
import sys

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import check_estimator
from torch.distributions import MultivariateNormal

from skebm import Network

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
NAME = "likelihood_of_contributing"

# as for the estimators of the package: folds and draws are made for other rows
EXPECTED_FAILURES = {
    "check_sample_weight_equivalence_on_dense_data": "weights are not repetitions of rows"
}


def example():
    """The text between the marks, without the fence."""
    (code,) = re.findall(
        r"<!-- example: begin .*?-->\n```python\n(.*?)```\n<!-- example: end -->",
        PAGE.read_text(),
        flags=re.DOTALL,
    )
    return code


@pytest.fixture(scope="module")
def Estimator(tmp_path_factory):
    """Class of the example, from a file of its own, so that it can be pickled."""
    path = tmp_path_factory.mktemp("contributing") / f"{NAME}.py"
    path.write_text(example())
    spec = importlib.util.spec_from_file_location(NAME, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    yield module.LikelihoodDensity
    del sys.modules[NAME]


def test_files_that_it_names_are_there():
    rooms = [ROOT, ROOT / "skebm", ROOT / "skebm" / "estimators"]
    named = set(re.findall(r"`([\w/]+\.(?:py|rst|md))`", PAGE.read_text()))
    assert len(named) > 20
    made_in_the_example = {"skebm/estimators/likelihood.py"}
    missing = {name for name in named if not any((room / name).exists() for room in rooms)}
    assert missing - made_in_the_example == set()


def test_names_of_tables_are_in_the_files_beside_them():
    rows = re.findall(r"^\| a.*\|$", PAGE.read_text(), flags=re.MULTILINE)
    pairs = [
        (name, path)
        for row in rows
        for name, path in re.findall(r"`([A-Z_]+|_[a-z]+)` (?:in|of) `([\w/]+\.py)`", row)
    ]
    assert len(pairs) > 4
    for name, path in pairs:
        (file,) = [room / path for room in (ROOT, ROOT / "skebm") if (room / path).exists()]
        assert re.search(rf"^(?:def )?{name}\b", file.read_text(), flags=re.MULTILINE), (name, path)


def test_it_is_short():
    assert len(example().splitlines()) <= 60


def test_it_is_a_density_and_better_than_its_base(Estimator):
    # N(1, 1) from N(0, 1): the tilt is about x - .5, and the gain about .5 nats
    X = np.random.default_rng(0).normal(1.0, 1.0, size=(400, 1))
    base = MultivariateNormal(torch.zeros(1), torch.eye(1))
    est = Estimator(base=base, n_members=2, random_state=0).fit(X)
    assert est.n_iter_ > 0
    grid, step = np.linspace(-12.0, 12.0, 4001, retstep=True)
    integral = step * np.exp(est.score_samples(grid[:, None])).sum()
    assert integral == pytest.approx(1.0, abs=4 * est.log_partition_std_error_.max())
    fresh = np.random.default_rng(1).normal(1.0, 1.0, size=(4000, 1))
    gain = est.score(fresh) - est.base_score_samples(fresh).mean()
    assert gain == pytest.approx(0.5, abs=0.05)


def test_its_parameter_acts_and_is_checked(Estimator):
    X = np.random.default_rng(0).normal(size=(60, 1))
    with pytest.raises(ValueError, match="n_draws"):
        Estimator(n_draws=0).fit(X)
    with pytest.raises(NotFittedError):
        Estimator().score_samples(X)
    assert Estimator(energy_model=None, n_members=2, random_state=0).fit(X).n_iter_ == 0


@pytest.mark.filterwarnings("ignore")  # data of one row, two rows, log Z of 1,000 samples
def test_it_passes_the_checks_of_scikit_learn(Estimator):
    quick = Estimator(
        n_draws=50, base="gaussian", energy_model=Network(hidden_layer_sizes=(8,), max_epochs=2),
        n_members=2, n_partition_samples=1000, random_state=0,
    )  # fmt: skip
    results = check_estimator(quick, expected_failed_checks=EXPECTED_FAILURES)
    assert sum(result["status"] == "passed" for result in results) > 30
