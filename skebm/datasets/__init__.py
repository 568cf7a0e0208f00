"""Synthetic distributions with a sampler and the exact log-density, for tests, benchmarks and
examples.

Every distribution is a small immutable object with ``name``, ``n_features``, ``sample`` and
``log_density`` (normalised, in nats). :data:`DISTRIBUTIONS` holds one of each at its default
parameters; the ``make_*`` functions draw from them in the manner of :mod:`sklearn.datasets`.

Those in :data:`MIXED_DISTRIBUTIONS` have categories, counts, missing values and zeros. Their rows
are frames of pandas, and ``log_density`` is with respect to counting measure for categories,
counts, missing cells and atoms, and Lebesgue measure for numbers.
"""

from skebm.datasets._make import (
    make_banana,
    make_bayesian_network,
    make_checkerboard,
    make_claw,
    make_eight_gaussians,
    make_funnel,
    make_gamma_copula,
    make_gaussian_mixture,
    make_latent_classes,
    make_missing_by_value,
    make_multivariate_t,
    make_pinwheel,
    make_rings,
    make_sheared_gaussian,
    make_spirals,
    make_two_moons,
    make_zero_inflated_amounts,
)
from skebm.datasets._mixed import (
    BayesianNetwork,
    LatentClasses,
    MissingByValue,
    ZeroInflatedAmounts,
)
from skebm.datasets._plane import (
    Banana,
    Checkerboard,
    Claw,
    EightGaussians,
    Pinwheel,
    Rings,
    Spirals,
    TwoMoons,
)
from skebm.datasets._tables import (
    Funnel,
    GammaCopula,
    GaussianMixtureDistribution,
    MultivariateT,
    ShearedGaussian,
)

__all__ = [
    "DISTRIBUTIONS",
    "MIXED_DISTRIBUTIONS",
    "Banana",
    "BayesianNetwork",
    "Checkerboard",
    "Claw",
    "EightGaussians",
    "Funnel",
    "GammaCopula",
    "GaussianMixtureDistribution",
    "LatentClasses",
    "MissingByValue",
    "MultivariateT",
    "Pinwheel",
    "Rings",
    "ShearedGaussian",
    "Spirals",
    "TwoMoons",
    "ZeroInflatedAmounts",
    "make_banana",
    "make_bayesian_network",
    "make_checkerboard",
    "make_claw",
    "make_eight_gaussians",
    "make_funnel",
    "make_gamma_copula",
    "make_gaussian_mixture",
    "make_latent_classes",
    "make_missing_by_value",
    "make_multivariate_t",
    "make_pinwheel",
    "make_rings",
    "make_sheared_gaussian",
    "make_spirals",
    "make_two_moons",
    "make_zero_inflated_amounts",
]

DISTRIBUTIONS = {
    distribution.name: distribution
    for distribution in (
        Claw(),
        EightGaussians(),
        TwoMoons(),
        Checkerboard(),
        Rings(),
        Pinwheel(),
        Spirals(),
        Banana(),
        MultivariateT(),
        GammaCopula(),
        Funnel(),
        GaussianMixtureDistribution(),
        ShearedGaussian(),
    )
}
"""One distribution of each kind at its default parameters, by name."""

MIXED_DISTRIBUTIONS = {
    distribution.name: distribution
    for distribution in (
        LatentClasses(),
        MissingByValue(),
        ZeroInflatedAmounts(),
        BayesianNetwork(),
    )
}
"""One distribution of mixed tables of each kind at its default parameters, by name."""
