"""From what a user writes for `base` or `noise` to one law per member."""

import numpy as np
import torch
from sklearn.exceptions import NotFittedError
from sklearn.mixture import GaussianMixture
from sklearn.utils.validation import check_is_fitted
from torch.distributions import Distribution

from skebm.bases import (
    CANDIDATES,
    AffineTransform,
    GaussianMixtureBase,
    SklearnDensity,
    SklearnDensityBase,
    TorchDistributionBase,
    TransformedBase,
    auto_candidates,
    fit_bases,
)

CONFINEMENT = 3.0
"""``base=None``: width of the confining Gaussian, in standard deviations of the columns."""


def resolve_law(law, where, x, weight, splits, columns, generator, progress):
    """One law per split, on standardised columns.

    Parameters
    ----------
    law : str, list of str, Distribution, density estimator or None
        Names of candidates are fitted per split, several are stacked; laws that are already fitted
        (a torch Distribution, a fitted scikit-learn density) are in the units of X and serve all
        members; an unfitted scikit-learn density is cloned and fitted on standardised columns.
    where : str
        Name of the parameter, for messages.
    x, weight, splits, generator
        As in `fit_bases`.
    columns : Columns
    progress : Progress

    Returns
    -------
    list of nn.Module
    """
    if law is None:
        variance = torch.as_tensor((CONFINEMENT * columns.spread) ** 2)
        confining = GaussianMixtureBase(
            torch.ones(1), x.mean(0, keepdim=True), torch.diag(variance)[None]
        )
        return [confining] * len(splits)
    candidates = _candidates(law, where, x)
    if candidates is None:
        return [_fixed(law, where, columns)] * len(splits)
    done = iter(range(len(candidates)))
    return fit_bases(
        x, weight, splits, candidates, generator,
        lambda name: progress.stage(f"{where}: {name}", next(done), len(candidates)),
    )  # fmt: skip


def _candidates(law, where, x):
    """Candidates to fit, or None if `law` is fitted already."""
    if isinstance(law, str):
        names = auto_candidates(*x.shape) if law == "auto" else (law,)
        return {name: CANDIDATES[name] for name in names}
    if isinstance(law, (list, tuple)):
        unknown = [name for name in law if not isinstance(name, str) or name not in CANDIDATES]
        if unknown or not law:
            raise ValueError(
                f"{where}={law!r} must name at least one candidate of {sorted(CANDIDATES)}."
            )
        return {name: CANDIDATES[name] for name in law}
    if isinstance(law, Distribution) or not hasattr(law, "fit"):
        return None
    try:
        check_is_fitted(law)
    except NotFittedError:
        return {type(law).__name__: SklearnDensity(law)}
    return None


def _fixed(law, where, columns):
    """A law in the units of X, seen from standardised columns."""
    if isinstance(law, Distribution):
        base = TorchDistributionBase(law)
    elif isinstance(law, GaussianMixture):
        base = GaussianMixtureBase(law.weights_, law.means_, _full_covariances(law))
    else:
        base = SklearnDensityBase(law)
    n_varying = int(columns.varying.sum())
    if base.n_features != n_varying:
        raise ValueError(
            f"{where} has {base.n_features} features, but {n_varying} columns of X vary."
        )
    return TransformedBase(AffineTransform(columns.center, columns.scale), base)


def _full_covariances(mixture):
    """Covariances of a fitted GaussianMixture as (n_components, d, d)."""
    k, d = mixture.means_.shape
    given = mixture.covariances_
    if mixture.covariance_type == "full":
        return given
    if mixture.covariance_type == "tied":
        return np.tile(given, (k, 1, 1))
    diagonal = np.broadcast_to(given if given.ndim == 2 else given[:, None], (k, d))
    return diagonal[:, :, None] * np.eye(d)
