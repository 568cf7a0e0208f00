"""Normalizing flows by name."""

from typing import Any

import torch

from ._coupling import CouplingSplineFlow
from ._stacked_flow import StackedFlow
from ._zuko import ZukoFlows


def build_flow(
    flow: Any, n_features: int, n_members: int = 1, *, rng: torch.Generator, **options: Any
) -> StackedFlow:
    """K flows of one kind, to be trained side by side.

    Parameters
    ----------
    flow : "coupling", or what `ZukoFlows` takes
    n_features : int
    n_members : int, default=1
    rng : torch.Generator
        On the CPU. Source of the initial weights.
    **options
        Of `CouplingSplineFlow` or of zuko's class.

    Returns
    -------
    StackedFlow
    """
    if isinstance(flow, str) and flow == "coupling":
        return CouplingSplineFlow(n_features, n_members, rng=rng, **options)
    return ZukoFlows(flow, n_features, n_members, rng=rng, **options)
