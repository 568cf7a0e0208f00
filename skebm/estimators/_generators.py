"""What the games leave behind, in the units of X: flows as densities, implicit generators."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.utils import check_array

from skebm._state import ModulesAsArrays
from skebm._tensors import results_like, without_tensors
from skebm._threads import limit_threads
from skebm._typing import Distribution, FloatArray, RandomState
from skebm.bases import JUDGED_AT_ONCE, Coordinates, ImplicitGenerator, StackedBase
from skebm.training import Columns

from ._base import sampling_rng


class FlowDensity(ModulesAsArrays):
    """A normalizing flow as a density: the mean of the flows of all members.

    Parameters
    ----------
    columns : Columns
    distributions : list of K distributions on standardised columns
    """

    def __init__(self, columns: Columns, distributions: Sequence[Distribution]):
        self._columns = columns
        # a copy, which stays on the CPU when the model moves
        self._mixture = copy.deepcopy(StackedBase(distributions, [1.0] * len(distributions))).cpu()

    def score_samples(self, X: ArrayLike) -> FloatArray:
        """Log-density of every row.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,), float64
            In nats, in the units of X.
        """
        rows = check_array(without_tensors(X), dtype=np.float64)  # pyright: ignore[reportArgumentType]
        if rows.shape[1] != len(self._columns.varying):
            raise ValueError(
                f"X has {rows.shape[1]} features, but the flow is expecting "
                f"{len(self._columns.varying)} features."
            )
        x = self._columns.standardize(rows)
        with torch.no_grad(), limit_threads(1):
            values = [self._mixture.log_prob(c) for c in torch.as_tensor(x).split(JUDGED_AT_ONCE)]
        values = torch.cat(values).numpy() + self._columns.log_factors(rows)
        return results_like(X)(values)

    def score(self, X: ArrayLike, y: object = None) -> float:
        """Mean log-density of the rows of X, in nats."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: RandomState = None) -> FloatArray:
        """Draw rows, (n_samples, n_features)."""
        rng = sampling_rng(random_state, n_samples=n_samples)
        with torch.no_grad(), limit_threads(1):
            x = self._mixture.sample(n_samples, rng)
        return self._columns.restore(x.numpy())


class ImplicitSampler(ModulesAsArrays):
    """Draws of an implicit generator: those of all members in equal parts.

    Parameters
    ----------
    columns : Columns
    generator : ImplicitGenerator
    coordinates : Coordinates
    """

    def __init__(self, columns: Columns, generator: ImplicitGenerator, coordinates: Coordinates):
        self._columns = columns
        # copies, which stay on the CPU when the model moves
        self._generator = copy.deepcopy(generator).cpu()
        self._coordinates = copy.deepcopy(coordinates).cpu()

    def sample(self, n_samples: int = 1, random_state: RandomState = None) -> FloatArray:
        """Draw rows, (n_samples, n_features)."""
        rng = sampling_rng(random_state, n_samples=n_samples)
        n_members = self._generator.n_members
        with torch.no_grad(), limit_threads(1):
            y = self._generator.sample(-(-n_samples // n_members), rng)
            x = self._coordinates.columns(y).flatten(0, 1)
            x = x[torch.randperm(len(x), generator=rng)[:n_samples]]
            return self._columns.restore(x.numpy())
