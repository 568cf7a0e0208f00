"""Flows of the package zuko."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution

from skebm._random import GLOBAL_RNG_LOCK, draw_seed, seeded_global_rng
from skebm._typing import Modules

from ._stacked_flow import StackedFlow

_ZUKO_NAMES = {"nsf": "NSF", "maf": "MAF", "nice": "NICE", "gf": "GF"}


class ZukoFlows(StackedFlow):
    """K flows of the package zuko, one after the other.

    Parameters
    ----------
    flow : {"nsf", "maf", "nice", "gf"}, zuko.lazy.LazyDistribution, or callable
        Autoregressive neural spline flow, masked autoregressive flow, affine couplings,
        Gaussianization flow; or a flow without context, which is copied; or a class or factory,
        called as ``flow(n_features, **options)`` once per member.
    n_features : int
        Number of columns d.
    n_members : int, default=1
        Number of flows K.
    rng : torch.Generator
        Source of the initial weights.
    **options
        Of zuko's class; by default ``transforms=3, hidden_features=(64, 64)`` for a name.

    See Also
    --------
    build_flow : Makes it by name.
    CouplingSplineFlow : A flow that needs no other package.

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import ZukoFlows
    >>> rng = torch.Generator().manual_seed(0)
    >>> flows = ZukoFlows("nsf", n_features=2, n_members=2, rng=rng, transforms=1)
    >>> flows.log_prob(torch.zeros(2, 5, 2)).shape
    torch.Size([2, 5])
    """

    flows: Modules

    def __init__(
        self,
        flow: Any,
        n_features: int,
        n_members: int = 1,
        *,
        rng: torch.Generator,
        **options: Any,
    ):
        super().__init__(n_features, n_members)
        if isinstance(flow, str) and flow not in _ZUKO_NAMES:
            raise ValueError(
                f"flow={flow!r} must be 'coupling', one of {sorted(_ZUKO_NAMES)}, a flow of "
                "the package zuko or a function that makes one."
            )
        zuko = _import_zuko()
        if isinstance(flow, str):
            options = dict(transforms=3, hidden_features=(64, 64)) | options
            flow = getattr(zuko.flows, _ZUKO_NAMES[flow])
        elif not callable(flow):
            raise ValueError(f"flow must be a name, a flow of zuko or a factory, got {flow!r}.")
        with seeded_global_rng(draw_seed(rng)):
            flows: list[Any] = [
                copy.deepcopy(flow) if isinstance(flow, nn.Module) else flow(n_features, **options)
                for _ in range(n_members)
            ]
        for made in flows:
            distribution = made() if isinstance(made, zuko.lazy.LazyDistribution) else None
            if not isinstance(distribution, zuko.distributions.NormalizingFlow):
                raise ValueError(
                    "flow must be a normalizing flow of the package zuko or make one, "
                    f"got {made!r}."
                )
            try:  # of another number of features, or in need of a context
                distribution.log_prob(next(made.parameters()).new_zeros(2, n_features))
            except (RuntimeError, ValueError) as error:
                raise ValueError(
                    f"flow must take rows of {n_features} features and no context; on such rows "
                    f"{type(made).__name__} failed: {error}"
                ) from error
        self.flows = nn.ModuleList(flows)

    def __reduce__(self) -> tuple[Any, ...]:
        # What makes the object is called before its state is loaded, and with it zuko's classes.
        return _unloaded_zuko_flows, (), self.__dict__

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [flow().log_prob(rows) for flow, rows in zip(self.flows, z, strict=True)]
        )

    def rsample(self, n: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        distributions = [flow() for flow in self.flows]
        device = next(self.parameters()).device
        with seeded_global_rng(draw_seed(rng), device):
            draws = [distribution.base.rsample((n,)) for distribution in distributions]
        z, log_prob = [], []
        for distribution, u in zip(distributions, draws, strict=True):
            x, log_det = distribution.transform.inv.call_and_ladj(u)
            z.append(x)
            log_prob.append(distribution.base.log_prob(u) - log_det.reshape(n, -1).sum(1))
        return torch.stack(z), torch.stack(log_prob)

    def alone(self, k: int) -> "ZukoFlows":
        single = copy.copy(self)
        single._modules = {"flows": nn.ModuleList([copy.deepcopy(self.flows[k])])}
        single.n_members = 1
        return single

    def beside(self, others: "Sequence[ZukoFlows]") -> "ZukoFlows":
        whole = copy.copy(self)
        flows = [copy.deepcopy(flow.flows[0]) for flow in (self, *others)]
        whole._modules = {"flows": nn.ModuleList(flows)}
        whole.n_members = len(flows)
        return whole


def _unloaded_zuko_flows():
    _import_zuko()
    return ZukoFlows.__new__(ZukoFlows)


def _import_zuko():
    """Import zuko, which turns off the validation of all torch distributions, and undo that."""
    with GLOBAL_RNG_LOCK:
        validate = Distribution._validate_args
        try:
            import zuko
        except ImportError as error:
            raise ImportError(
                'flows by name other than "coupling" need the package zuko: '
                'pip install "skebm[flows]"'
            ) from error
        finally:
            Distribution.set_default_validate_args(validate)
    return zuko
