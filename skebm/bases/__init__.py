"""Bases: normalised distributions with ``log_prob(x)`` and ``sample(n, rng)``, as torch
modules.
"""

from skebm.bases._adapters import (
    SklearnDensityBase,
    TorchDistributionBase,
    UniformBase,
    draw_from,
)
from skebm.bases._autoregressive import AutoregressiveFlow
from skebm.bases._candidates import (
    CANDIDATES,
    MAX_FIT_ROWS,
    MAX_PATTERNS,
    WITH_STATES,
    SklearnDensity,
    auto_candidates,
    auto_flows,
)
from skebm.bases._combine import (
    AffineTransform,
    ArcsinhTransform,
    Coordinates,
    StackedBase,
    TransformedBase,
    marginal,
)
from skebm.bases._conditional import Conditional, condition, mixture_part, values_given_states
from skebm.bases._coupling import CouplingSplineFlow
from skebm.bases._em import fit_gaussian_mixture
from skebm.bases._fit import fit_bases
from skebm.bases._flow_training import JUDGED_AT_ONCE, fit_flow, train_flows
from skebm.bases._flows import build_flow
from skebm.bases._implicit import ImplicitGenerator
from skebm.bases._marginal import MarginalGaussianization
from skebm.bases._mixed import (
    MixedKernelBase,
    MixedMixtureBase,
    ValuesTransform,
    draw_states,
    patterns,
)
from skebm.bases._mixed_em import fit_mixed_mixture
from skebm.bases._mixtures import ConfiningGaussian, GaussianMixtureBase, KernelDensityBase
from skebm.bases._stacked_flow import FlowBase, StackedFlow
from skebm.bases._stacking import stacking_weights
from skebm.bases._together import Together
from skebm.bases._views import IN_OWN_COLUMNS, VIEWS, fit_views
from skebm.bases._zuko import ZukoFlows

__all__ = [
    "CANDIDATES",
    "IN_OWN_COLUMNS",
    "JUDGED_AT_ONCE",
    "MAX_FIT_ROWS",
    "MAX_PATTERNS",
    "VIEWS",
    "WITH_STATES",
    "AffineTransform",
    "ArcsinhTransform",
    "AutoregressiveFlow",
    "Conditional",
    "ConfiningGaussian",
    "Coordinates",
    "CouplingSplineFlow",
    "FlowBase",
    "GaussianMixtureBase",
    "ImplicitGenerator",
    "KernelDensityBase",
    "MarginalGaussianization",
    "MixedKernelBase",
    "MixedMixtureBase",
    "SklearnDensity",
    "SklearnDensityBase",
    "StackedBase",
    "StackedFlow",
    "Together",
    "TorchDistributionBase",
    "TransformedBase",
    "UniformBase",
    "ValuesTransform",
    "ZukoFlows",
    "auto_candidates",
    "auto_flows",
    "build_flow",
    "condition",
    "draw_from",
    "draw_states",
    "fit_bases",
    "fit_flow",
    "fit_gaussian_mixture",
    "fit_mixed_mixture",
    "fit_views",
    "marginal",
    "mixture_part",
    "patterns",
    "stacking_weights",
    "train_flows",
    "values_given_states",
]
