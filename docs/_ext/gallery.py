"""The order of the gallery, and a small setting for its long pages.

With ``SKEBM_SMOKE=1`` the pages of `LONG` are run with few rows, members, trees and epochs: the
code is checked, and the numbers mean little. The pages themselves know nothing of it.
"""

import functools
import os
import warnings
from pathlib import Path

from sklearn.base import clone

from skebm import Boosting, Network
from skebm._engine import Budget
from skebm.bases import _flow_training
from skebm.estimators._base import BaseDensity

ORDER = [
    "quickstart",
    "plot_mixed_table",
    "plot_odd_rows",
    "plot_outliers",
    "plot_asking",
    "plot_imputation",
    "plot_true_density",
    "plot_compare_estimators",
    "plot_synthetic_rows",
    "plot_comparing_models",
    "plot_trust",
    "plot_own_energy",
    "plot_own_classifier",
    "plot_generative_classifier",
    "plot_pipelines",
    "plot_callbacks",
    "plot_large",
    "plot_saving",
    "plot_base_and_members",
    "plot_score_field",
    "plot_chains",
    "plot_flow_contrastive",
    "plot_implicit_vae",
    "plot_log_z",
]
LONG = {
    "plot_asking",
    "plot_base_and_members",
    "plot_chains",
    "plot_compare_estimators",
    "plot_flow_contrastive",
    "plot_implicit_vae",
    "plot_imputation",
    "plot_mixed_table",
    "plot_score_field",
    "plot_true_density",
}
N_ROWS, N_MEMBERS, N_TREES, N_EPOCHS, N_IMPORTANCE_SAMPLES = 400, 2, 3, 3, 20

fit, flow_budget = BaseDensity.fit, _flow_training.FLOW_BUDGET
small_flow_budget = Budget(epochs=N_EPOCHS, steps=1)


@functools.wraps(fit)
def small_fit(self, X, *args, **kwargs):
    self.n_members = min(getattr(self, "n_members", 1), N_MEMBERS)
    if hasattr(self, "max_epochs"):  # of ImplicitVAE
        self.max_epochs, self.n_importance_samples = N_EPOCHS, N_IMPORTANCE_SAMPLES
    energy = getattr(self, "energy_model", None)
    if energy == "auto":
        energy = Boosting() if type(self).__name__ == "NCEDensity" else Network()
    if isinstance(energy, Boosting):
        self.energy_model = clone(energy).set_params(max_iter=N_TREES)
    elif isinstance(energy, Network):
        self.energy_model = clone(energy).set_params(max_epochs=N_EPOCHS)
    if getattr(self, "correction", None) == "auto" and energy is not None:
        self.correction = Boosting(max_iter=N_TREES)
    return fit(self, X[:N_ROWS], *args, **kwargs)


def size(gallery_conf, fname):
    """Before each page: whole, or small. (Its `fit` is the one that the docstrings show.)"""
    small = os.environ.get("SKEBM_SMOKE") == "1" and Path(fname).stem in LONG
    BaseDensity.fit = small_fit if small else fit
    _flow_training.FLOW_BUDGET = small_flow_budget if small else flow_budget
    warnings.formatwarning = brief


def brief(message, category, *args, **kwargs):
    """What a page prints of a warning: not where the file lies."""
    return f"{category.__name__}: {message}\n"


def order(fname):
    """Place of a page; what is not listed comes last."""
    name = Path(fname).stem
    return ORDER.index(name) if name in ORDER else len(ORDER)
