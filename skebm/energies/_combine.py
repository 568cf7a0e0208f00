"""Energies made of others: classifiers, members side by side, and sums."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from skebm._layout import Layout
from skebm._typing import Modules

from ._forest import evaluate, without_forest
from ._trees import SoftTrees

__all__ = ["ClassifierEnergy", "CorrectedEnergy", "MemberEnergies", "logit"]


class ClassifierEnergy(nn.Module):
    """Logit of a fitted scikit-learn classifier plus a constant; no gradient.

    Parameters
    ----------
    classifier : fitted classifier
    offset : float
        log nu.
    n_stages : int or None
        For staged classifiers: how many stages count.
    floor : float
        Probabilities are kept this far from 0 and 1, so that f is finite.
    layout : Layout, optional
        Of rows whose states the classifier sees as indicators, see :meth:`Layout.as_numbers`.
    """

    offset: float
    n_stages: int | None
    floor: float
    layout: Layout | None

    def __init__(
        self,
        classifier: Any,
        offset: float,
        n_stages: int | None,
        floor: float,
        layout: Layout | None = None,
    ):
        super().__init__()
        self.classifier, self.layout = classifier, layout
        self.offset, self.n_stages, self.floor = offset, n_stages, floor

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Evaluate f, (n, d) -> (n,)."""
        rows = z.detach() if self.layout is None else self.layout.as_numbers(z.detach())
        rows = rows.cpu().numpy()
        if self.n_stages is None:
            p = self.classifier.predict_proba(rows)
        else:
            p = next(islice(self.classifier.staged_predict_proba(rows), self.n_stages - 1, None))
        return torch.as_tensor(logit(p, self.floor) + self.offset, device=z.device)


class MemberEnergies(nn.Module):
    """K separate energies side by side, (K, n, d) -> (K, n)."""

    members: Modules

    def __init__(self, members: Iterable[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Evaluate member k on z[k], (K, n, d) -> (K, n)."""
        if len(z) == len(self.members) and all(isinstance(f, SoftTrees) for f in self.members):
            return evaluate(self, list(self.members), z)
        return torch.stack([f(rows) for f, rows in zip(self.members, z, strict=True)])

    def __getstate__(self) -> dict[str, Any]:
        return without_forest(super().__getstate__())

    def member(self, k: int) -> "MemberEnergies":
        """Member k alone, still (1, n, d) -> (1, n)."""
        return MemberEnergies([self.members[k]])

    @property
    def softness(self) -> float | None:
        """Width of the splits of trees; None for energies that have none."""
        return getattr(self.members[0], "softness", None)

    def set_softness(self, softness: float) -> None:
        """Set the width of the splits of all trees."""
        for trees in self.members:
            trees.softness = softness


class CorrectedEnergy(nn.Module):
    """A stack of K energies, and one that corrects it: their sum, (K, n, d) -> (K, n).

    Parameters
    ----------
    first : nn.Module
        With `member`.
    correction : MemberEnergies
    """

    first: Any
    correction: MemberEnergies

    def __init__(self, first: Any, correction: MemberEnergies):
        super().__init__()
        self.first, self.correction = first, correction

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Evaluate member k on z[k], (K, n, d) -> (K, n)."""
        return self.first(z) + self.correction(z)

    def member(self, k: int) -> "CorrectedEnergy":
        """Member k alone, still (1, n, d) -> (1, n)."""
        return CorrectedEnergy(self.first.member(k), self.correction.member(k))

    @property
    def softness(self) -> float | None:
        """Width of the splits of trees."""
        return self.correction.softness

    def set_softness(self, softness: float) -> None:
        """Set it."""
        self.correction.set_softness(softness)


def logit(p: np.ndarray, floor: float) -> np.ndarray:
    """Log-odds of class 1 in probabilities (n, 2), kept `floor` away from 0 and 1."""
    p = np.clip(p[:, 1], floor, 1.0 - floor)
    return np.log(p) - np.log1p(-p)
