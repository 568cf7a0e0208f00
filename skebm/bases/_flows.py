"""Normalizing flows by name."""

from typing import Any

import torch

from ._autoregressive import AutoregressiveFlow
from ._coupling import CouplingSplineFlow
from ._stacked_flow import StackedFlow
from ._zuko import ZukoFlows

_OWN = {"coupling": CouplingSplineFlow, "autoregressive": AutoregressiveFlow}


def build_flow(
    flow: Any, n_features: int, n_members: int = 1, *, rng: torch.Generator, **options: Any
) -> StackedFlow:
    """K flows of one kind, to be trained side by side.

    Parameters
    ----------
    flow : "coupling", "autoregressive", or what `ZukoFlows` takes
    n_features : int
    n_members : int, default=1
    rng : torch.Generator
        On the CPU. Source of the initial weights.
    **options
        Of `CouplingSplineFlow`, `AutoregressiveFlow` or zuko's class.

    Returns
    -------
    StackedFlow

    See Also
    --------
    fit_flow : Makes and fits one.
    train_flows : Trains what this returns.

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import build_flow
    >>> rng = torch.Generator().manual_seed(0)
    >>> flow = build_flow("autoregressive", n_features=2, n_members=4, rng=rng, n_layers=2)
    >>> flow.log_prob(torch.zeros(4, 10, 2)).shape
    torch.Size([4, 10])
    """
    own = _OWN.get(flow) if isinstance(flow, str) else None
    if own is not None:
        return own(n_features, n_members, rng=rng, **options)
    return ZukoFlows(flow, n_features, n_members, rng=rng, **options)
