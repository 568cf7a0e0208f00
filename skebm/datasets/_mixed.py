"""Distributions of tables with categories, counts, missing values and zeros."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from scipy.special import expit, log_expit, log_ndtr, logsumexp, ndtr, ndtri, softmax

from skebm._typing import FloatArray

from ._distribution import log_normal
from ._mixed_distribution import (
    NO_DENSITY,
    MixedDistribution,
    choose,
    log_lognormal,
    log_masses,
    log_poisson,
)

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class LatentClasses(MixedDistribution):
    """Three latent classes, given which five columns of four kinds are independent.

    p(x) = sum_k w_k prod_j p_j(x_j | k): a colour that may be missing, a membership, Poisson
    visits, and normal height and weight. What distinguishes the classes (logits, logarithms of
    rates, means) is multiplied by ``separation``, so that at 0 all columns are independent. See
    Hunt and Jorgensen, "Mixture model clustering for mixed data with missing information",
    Computational Statistics & Data Analysis, 2003.

    Parameters
    ----------
    separation : float, default=1.0
        Factor on what distinguishes the classes.

    See Also
    --------
    make_latent_classes : The same as a function that draws rows.

    Examples
    --------
    >>> from skebm.datasets import LatentClasses
    >>> truth = LatentClasses()
    >>> X = truth.sample(1000, random_state=0)
    >>> list(X.columns)
    ['colour', 'member', 'visits', 'height', 'weight']
    >>> truth.log_density(X).shape
    (1000,)

    Marginals are known as well, here that of two columns, and with it the conditional
    distribution of the others.

    >>> two = truth.log_marginal(X[["height", "visits"]])
    >>> given_two = truth.log_density(X) - two
    """

    separation: float = 1.0
    name: ClassVar[str] = "latent_classes"
    columns: ClassVar[dict[str, Any]] = {
        "colour": ("blue", "green", "red"),
        "member": (False, True),
        "visits": int,
        "height": float,
        "weight": float,
    }

    _weights: ClassVar[FloatArray] = np.array([0.5, 0.3, 0.2])
    _scales: ClassVar[dict[str, float]] = {"height": 6.0, "weight": 8.0}

    @cached_property
    def _colour(self):  # (class, colour or missing)
        differences = [[1.5, 0.0, -1.0, -1.0], [-1.0, 1.5, 0.0, 0.0], [-1.0, -1.0, 1.5, 1.5]]
        return softmax(
            np.log([0.4, 0.3, 0.2, 0.1]) + self.separation * np.array(differences), axis=-1
        )

    @cached_property
    def _member(self):
        return expit(self.separation * np.array([-1.5, 0.0, 1.5]))

    @cached_property
    def _rate(self):
        return 3.0 * np.exp(self.separation * np.array([-0.8, 0.0, 0.8]))

    @cached_property
    def _means(self):
        return {
            "height": 170.0 + 10.0 * self.separation * np.array([-1.0, 0.0, 1.0]),
            "weight": 70.0 + 12.0 * self.separation * np.array([0.5, -1.0, 1.0]),
        }

    def _draw(self, n_samples, rng):
        k = rng.choice(3, n_samples, p=self._weights)
        return {
            "colour": choose(self._colour[k], rng),
            "member": rng.uniform(size=n_samples) < self._member[k],
            "visits": rng.poisson(self._rate[k]),
        } | {
            name: self._means[name][k] + scale * rng.standard_normal(n_samples)
            for name, scale in self._scales.items()
        }

    def _given_class(self, name: str, values: np.ndarray) -> FloatArray:
        """Log-densities of one column given each class, (n,) -> (n, 3)."""
        if name == "colour":
            return log_masses(self._colour, 3)[:, values].T
        if name == "member":
            both = np.column_stack([1.0 - self._member, self._member])
            return log_masses(both, 2)[:, values].T
        if name == "visits":
            return log_poisson(values[:, None], self._rate)
        log_p = log_normal(values[:, None], self._means[name], self._scales[name])
        return np.where(np.isnan(log_p), NO_DENSITY, log_p)

    def _log_conditionals(self, columns):
        joint = np.log(self._weights)
        marginals = [np.zeros(1)]
        for name, values in columns.items():
            joint = joint + self._given_class(name, values)
            marginals.append(np.asarray(logsumexp(joint, axis=1)))
        with np.errstate(invalid="ignore"):  # nothing is known given what is impossible
            return [after - before for before, after in pairwise(marginals)]

    def log_marginal(self, X: pandas.DataFrame) -> FloatArray:
        """Exact log-density of the marginal of some of the columns.

        Parameters
        ----------
        X : DataFrame
            The rows, with any of the columns, at least one.

        Returns
        -------
        log_marginal : ndarray of shape (n_samples,)
            In nats; minus infinity where a cell is impossible.
        """
        given = set(getattr(X, "columns", ()))
        names = [name for name in self.columns if name in given] or list(self.columns)
        parts = [self._given_class(*column) for column in self._read(X, names).items()]
        return np.asarray(logsumexp(np.log(self._weights) + np.sum(parts, axis=0), axis=1))


@dataclass(frozen=True)
class MissingByValue(MixedDistribution):
    """Two columns with holes: whether a cell is missing depends on age, or on the cell itself.

    Age is N(50, 15^2), pressure N(120 + 8 z, 12^2) and income 40 + 12 u, where z is the
    standardised age and u | z ~ N(z / 2, 3 / 4), so that u ~ N(0, 1). Pressure is missing with
    probability Phi(a + b z), known from age ("missing at random"); income is missing with
    probability Phi(a + b u), so that high incomes are hidden ("missing not at random"). b is
    ``dependence``, and a makes the share of missing cells ``share`` in both columns. The mass of a
    missing income given age is Phi((a + b z / 2) / (1 + 3 b^2 / 4)^(1/2)). For the terms see
    Rubin, "Inference and missing data", Biometrika, 1976.

    Parameters
    ----------
    share : float, default=0.3
        Of missing cells, in both columns.
    dependence : float, default=1.5
        How much it depends on values whether a cell is missing; 0 is not at all.

    See Also
    --------
    make_missing_by_value : The same as a function that draws rows.

    Examples
    --------
    >>> from skebm.datasets import MissingByValue
    >>> truth = MissingByValue(share=0.4)
    >>> X = truth.sample(1000, random_state=0)
    >>> bool(X["age"].isna().any()), round(float(X["income"].isna().mean()), 1)
    (False, 0.4)
    >>> truth.log_density(X).shape
    (1000,)
    """

    share: float = 0.3
    dependence: float = 1.5
    name: ClassVar[str] = "missing_by_value"
    columns: ClassVar[dict[str, Any]] = {"age": float, "pressure": float, "income": float}

    @property
    def _threshold(self):
        return ndtri(self.share) * np.sqrt(1.0 + self.dependence**2)

    def _draw(self, n_samples, rng):
        z, noise, e = rng.standard_normal((3, n_samples))
        u = 0.5 * z + np.sqrt(0.75) * e
        hidden = [
            rng.uniform(size=n_samples) < ndtr(self._threshold + self.dependence * cause)
            for cause in (z, u)
        ]
        return {
            "age": 50.0 + 15.0 * z,
            "pressure": np.where(hidden[0], np.nan, 120.0 + 8.0 * z + 12.0 * noise),
            "income": np.where(hidden[1], np.nan, 40.0 + 12.0 * u),
        }

    def _log_conditionals(self, columns):
        age, pressure, income = columns.values()
        a, b = self._threshold, self.dependence
        z, u = (age - 50.0) / 15.0, (income - 40.0) / 12.0
        income_missing = log_ndtr((a + 0.5 * b * z) / np.sqrt(1.0 + 0.75 * b**2))
        income_there = log_normal(u, 0.5 * z, np.sqrt(0.75)) - np.log(12.0) + log_ndtr(-a - b * u)
        pressure_there = log_normal(pressure, 120.0 + 8.0 * z, 12.0) + log_ndtr(-a - b * z)
        return [
            log_normal(age, 50.0, 15.0),
            np.where(np.isnan(pressure), log_ndtr(a + b * z), pressure_there),
            np.where(np.isnan(income), income_missing, income_there),
        ]


@dataclass(frozen=True)
class ZeroInflatedAmounts(MixedDistribution):
    """A category and an amount that is zero for many rows and log-normal for the others.

    Three segments with masses 1/2, 3/10 and 1/5. In segment k the amount is 0 with probability
    ``zero_shares[k]``, else its logarithm is ``N(log_means[k], log_scale^2)``. See Aitchison, "On
    the distribution of a positive random variable having a discrete probability mass at the
    origin", Journal of the American Statistical Association, 1955.

    Parameters
    ----------
    zero_shares : tuple of three float, default=(0.6, 0.3, 0.1)
        Probability of an amount of zero in each segment.
    log_means : tuple of three float, default=(2.0, 3.0, 4.0)
        Mean of the logarithm of the other amounts.
    log_scale : float, default=0.8
        Standard deviation of that logarithm.

    See Also
    --------
    make_zero_inflated_amounts : The same as a function that draws rows.

    Examples
    --------
    >>> from skebm.datasets import ZeroInflatedAmounts
    >>> truth = ZeroInflatedAmounts()
    >>> X = truth.sample(5000, random_state=0)
    >>> (X["amount"] == 0).groupby(X["segment"], observed=True).mean().round(1).to_dict()
    {'basic': 0.6, 'plus': 0.3, 'premium': 0.1}
    """

    zero_shares: tuple[float, float, float] = (0.6, 0.3, 0.1)
    log_means: tuple[float, float, float] = (2.0, 3.0, 4.0)
    log_scale: float = 0.8
    name: ClassVar[str] = "zero_inflated_amounts"
    columns: ClassVar[dict[str, Any]] = {"segment": ("basic", "plus", "premium"), "amount": float}

    _masses: ClassVar[FloatArray] = np.array([0.5, 0.3, 0.2])

    def _draw(self, n_samples, rng):
        k = rng.choice(3, n_samples, p=self._masses)
        zero = rng.uniform(size=n_samples) < np.array(self.zero_shares)[k]
        log_amount = np.array(self.log_means)[k] + self.log_scale * rng.standard_normal(n_samples)
        return {"segment": k, "amount": np.where(zero, 0.0, np.exp(log_amount))}

    def _log_conditionals(self, columns):
        segment, amount = columns.values()
        k = segment % 3  # a segment that is none of the three has no density anyway
        zero = np.array(self.zero_shares)[k]
        value = log_lognormal(amount, np.array(self.log_means)[k], self.log_scale)
        with np.errstate(divide="ignore"):  # no zeros, or nothing else
            log_zero, log_other = np.log(zero), np.log1p(-zero)
        return [
            log_masses(self._masses, 3)[segment],
            np.where(amount == 0, log_zero, log_other + value),
        ]


@dataclass(frozen=True)
class BayesianNetwork(MixedDistribution):
    """Six columns of customers, each depending on some of those before it.

    The region has a mass; age is normal around a mean of the region; the plan has logits that are
    linear in the standardised age and depend on the region; membership is logistic in plan and
    age; the logarithm of what is spent is normal around a mean of plan, membership and age; visits
    are Poisson with a rate of membership and spending. So :meth:`log_conditionals` has the
    distribution of every column given its causes. See Lauritzen and Wermuth, "Graphical models for
    associations between variables, some of which are qualitative and some quantitative", Annals of
    Statistics, 1989.

    See Also
    --------
    make_bayesian_network : The same as a function that draws rows.

    Examples
    --------
    >>> from skebm.datasets import BayesianNetwork
    >>> truth = BayesianNetwork()
    >>> X = truth.sample(1000, random_state=0)
    >>> list(X.columns)
    ['region', 'age', 'plan', 'member', 'spend', 'visits']
    >>> truth.log_conditionals(X).shape
    (1000, 6)
    """

    name: ClassVar[str] = "bayesian_network"
    columns: ClassVar[dict[str, Any]] = {
        "region": ("east", "north", "south", "west"),
        "age": float,
        "plan": ("basic", "plus", "premium"),
        "member": (False, True),
        "spend": float,
        "visits": int,
    }

    _region: ClassVar[FloatArray] = np.array([0.4, 0.3, 0.2, 0.1])
    _age_mean: ClassVar[FloatArray] = np.array([38.0, 44.0, 50.0, 58.0])
    _plan_logit: ClassVar[FloatArray] = np.array(
        [[1.0, 0.0, -1.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [-0.5, 1.5, 0.0]]
    )
    _plan_slope: ClassVar[FloatArray] = np.array([-1.0, 0.0, 1.0])
    _member_logit: ClassVar[FloatArray] = np.array([-2.0, 0.0, 2.0])
    _spend_mean: ClassVar[FloatArray] = np.array([3.0, 4.0, 5.0])

    def _plan(self, region, z):
        return softmax(self._plan_logit[region] + self._plan_slope * z[:, None], axis=-1)

    def _member(self, plan, z):
        return self._member_logit[plan] + 0.5 * z

    def _log_spend(self, plan, member, z):
        return self._spend_mean[plan] + 0.5 * member + 0.2 * z

    def _rate(self, member, spend):
        log_spend = np.log(np.where(spend > 0, spend, 1.0))
        return np.exp(0.2 + 0.8 * member + 0.3 * (log_spend - 4.0))

    def _draw(self, n_samples, rng):
        region = rng.choice(4, n_samples, p=self._region)
        age = self._age_mean[region] + 10.0 * rng.standard_normal(n_samples)
        z = (age - 45.0) / 10.0
        plan = choose(self._plan(region, z), rng)
        member = rng.uniform(size=n_samples) < expit(self._member(plan, z))
        log_spend = self._log_spend(plan, member, z) + 0.5 * rng.standard_normal(n_samples)
        spend = np.exp(log_spend)
        visits = rng.poisson(self._rate(member, spend))
        values = (region, age, plan, member, spend, visits)
        return dict(zip(self.columns, values, strict=True))

    def _log_conditionals(self, columns):
        region, age, plan, member, spend, visits = columns.values()
        z = (age - 45.0) / 10.0
        # A code that is no category has no density anyway; these keep the indices legal.
        at_region, at_plan, is_member = region % 4, plan % 3, member % 2
        plans = log_masses(self._plan(at_region, z), 3)
        logit = self._member(at_plan, z)
        members = np.column_stack([log_expit(-logit), log_expit(logit)])
        return [
            log_masses(self._region, 4)[region],
            log_normal(age, self._age_mean[at_region], 10.0),
            np.take_along_axis(plans, plan[:, None], axis=1)[:, 0],
            np.where(
                (member == 0) | (member == 1),
                members[np.arange(len(member)), is_member],
                NO_DENSITY,
            ),
            log_lognormal(spend, self._log_spend(at_plan, is_member, z), 0.5),
            log_poisson(visits, self._rate(is_member, spend)),
        ]
