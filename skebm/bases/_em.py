"""Expectation-maximisation for Gaussian mixtures, with row weights and shared starts.

scikit-learn's `GaussianMixture` takes no `sample_weight` and, with full covariances, spends a
quarter of a second per iteration on 10,000 rows: too slow for one fit per fold, space and size.
Here both steps are one matrix product on the quadratic features of a row.
"""

import math

import numpy as np
import torch

from ._mixtures import _LOG_2PI, GaussianMixtureBase

_CHUNK = 2048
_KEPT = (
    1 << 23
)  # values of quadratic features that are kept, 64 MiB; of more rows they are made anew
_MANY = 1 << 14  # responsibilities: of fewer the arithmetic is not what takes time
_LARGEST = 3e5  # log-densities, which single precision gives to some hundredths
_ROUGH_TOL = 1e-4  # nats that single precision can tell apart
_LEAST_LOG = -60.0  # of responsibilities: exponentials that underflow take ten times as long
_ROUNDING, _LEAST, _LEAST_WITHIN = 1e-13, 1e-12, 1e-8


def fit_gaussian_mixture(
    x: torch.Tensor,
    n_components: int,
    rng: torch.Generator,
    *,
    diagonal: bool = False,
    sample_weight: torch.Tensor | None = None,
    start: GaussianMixtureBase | None = None,
    prior_strength: float = 1.0,
    reg_covar: float = 1e-6,
    max_iter: int = 80,
    tol: float = 1e-3,
) -> GaussianMixtureBase:
    """Fit a Gaussian mixture by expectation-maximisation.

    Parameters
    ----------
    x : Tensor of shape (n_samples, n_features), float64
    n_components : int
    rng : torch.Generator
        Draws the starting centres.
    diagonal : bool, default=False
        Diagonal covariances.
    sample_weight : Tensor of shape (n_samples,), default=None
    start : GaussianMixtureBase, default=None
        Mixture to start from, in place of k-means++ centres.
    prior_strength : float, default=1.0
        Number of pseudo-rows per component. They carry the mean correlations within components,
        and the variances of the component itself, so that tight clusters far apart keep their
        size; those of a component with few rows are drawn towards the mean variances within
        components, so that none collapses.
    reg_covar : float, default=1e-6
        Added to the variances, as a share of those that the pseudo-rows carry.
    max_iter : int, default=80
    tol : float, default=1e-3
        Stop when the mean log-likelihood gains less, in nats.

    Returns
    -------
    GaussianMixtureBase

    See Also
    --------
    GaussianMixtureBase : What is returned.
    fit_mixed_mixture : The same for rows with categories and missing cells.

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import fit_gaussian_mixture
    >>> rng = torch.Generator().manual_seed(0)
    >>> x = torch.randn(500, 1, generator=rng, dtype=torch.float64)
    >>> x[:100] += 8.0
    >>> mixture = fit_gaussian_mixture(x, 2, rng)
    >>> mixture.weights.sort().values.round(decimals=1)
    tensor([0.2000, 0.8000], dtype=torch.float64)
    """
    n, d = x.shape
    weight = torch.ones(n, dtype=x.dtype) if sample_weight is None else sample_weight
    weight = weight / weight.sum()
    center = weight @ x
    x = x - center  # quadratic features lose digits far from the origin
    strength = prior_strength / n
    rows, cols = torch.triu_indices(d, d)

    def features(block):
        quadratic = block.square() if diagonal else block[:, rows] * block[:, cols]
        return torch.cat([torch.ones_like(block[:, :1]), block, quadratic], dim=1)

    def maximise(moments):
        """Weighted moments (k, n_feature_functions) -> weights, means, covariances."""
        mass = moments[:, 0].clamp(min=1e-300)
        means = moments[:, 1 : d + 1] / mass[:, None]
        second = moments[:, d + 1 :] / mass[:, None]
        if diagonal:
            covariance = torch.diag_embed(second - means.square())
        else:
            covariance = torch.zeros(len(mass), d, d, dtype=x.dtype)
            covariance[:, rows, cols] = second
            covariance[:, cols, rows] = second
            covariance = covariance - means[:, :, None] * means[:, None, :]
        return mass / mass.sum(), means, with_prior(mass, means, covariance, strength, reg_covar)

    def natural(weights, means, covariances):
        """Coefficients of log w_j + log N_j on the features, (n_feature_functions, k)."""
        tril = torch.linalg.cholesky(covariances)
        precision = torch.cholesky_inverse(tril)
        linear = (precision @ means[:, :, None])[:, :, 0]
        log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = weights.log() - log_det - 0.5 * (linear * means).sum(-1) - 0.5 * d * _LOG_2PI
        if diagonal:
            quadratic = -0.5 * precision.diagonal(dim1=-2, dim2=-1)
        else:
            quadratic = -precision[:, rows, cols]
            quadratic[:, rows == cols] *= 0.5
        return torch.cat([constant[:, None], linear, quadratic], dim=1).mT

    if start is None:
        parameters = _start(x, weight, n_components, rng, features, maximise)
    else:
        parameters = start.weights, start.means - center, start.scale_tril @ start.scale_tril.mT
    n_functions = 1 + (2 * d if diagonal else d + len(rows))
    typical = features((weight @ x.square()).sqrt()[None])[0]

    def climb(parameters, n_iter, tol, dtype):
        """Parameters after at most `n_iter` iterations, and how many of these are left.

        Single precision ends, too, before the first parameters that it cannot do justice to.
        """
        blocks, weights = x.to(dtype).split(_CHUNK), weight.to(dtype).split(_CHUNK)
        kept = [features(block) for block in blocks] if n * n_functions <= _KEPT else None
        buffer = torch.empty(min(n, _CHUNK), n_components, dtype=dtype)
        earlier, previous = parameters, -math.inf
        for left in reversed(range(n_iter)):
            try:
                coefficients = natural(*parameters)
            except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
                if dtype is torch.float64:
                    raise
                return earlier, left + 1
            if dtype is torch.float32 and not (typical @ coefficients.abs()).amax() < _LARGEST:
                return earlier, left + 1
            coefficients, moments, value = coefficients.to(dtype), 0.0, 0.0
            for phi, w in zip(kept or map(features, blocks), weights, strict=True):
                # one array for all: fresh memory costs as much as the product
                joint = torch.mm(phi, coefficients, out=buffer[: len(phi)])
                top = joint.amax(1, keepdim=True)
                joint.sub_(top).clamp_(min=_LEAST_LOG).exp_()
                total = joint.sum(1, keepdim=True)
                value += (w @ (total.log() + top)).item()
                moments = moments + (joint.mul_(w[:, None] / total).mT @ phi).double()
            earlier, parameters = parameters, maximise(moments)
            if value - previous < tol:
                return parameters, left
            previous = value
        return parameters, 0

    if n * n_components >= _MANY and max_iter > 2:
        # three times as fast, and comes close; the end, and what is returned, is double precision
        parameters, left = climb(parameters, max_iter - 2, max(tol, _ROUGH_TOL), torch.float32)
        max_iter = left + 2
    parameters, _ = climb(parameters, max_iter, tol, torch.float64)
    weights, means, covariances = parameters
    return GaussianMixtureBase(weights, means + center, covariances)


def with_prior(
    mass: torch.Tensor,
    means: torch.Tensor,
    covariance: torch.Tensor,
    strength: float,
    reg_covar: float,
) -> torch.Tensor:
    """Covariances of components that pseudo-rows keep from collapsing.

    Parameters
    ----------
    mass : Tensor of shape (k,)
    means : Tensor of shape (k, d)
    covariance : Tensor of shape (k, d, d)
        Of the rows of every component, which is changed in place.
    strength : float
        Mass of the pseudo-rows, see `prior_strength` of `fit_gaussian_mixture`.
    reg_covar : float

    Returns
    -------
    Tensor of shape (k, d, d)
    """
    share = (strength / (mass + strength))[:, None]
    # no more digits than these are left of second moments minus squared means
    rounding = _ROUNDING * (covariance.diagonal(dim1=-2, dim2=-1).abs() + means.square())
    covariance.diagonal(dim1=-2, dim2=-1).add_(rounding)
    variance = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=_LEAST)
    within = torch.einsum("k,kij->ij", mass / mass.sum(), covariance)
    # of a single row, or of equal ones, there is no variance
    within.diagonal().clamp_(min=_LEAST_WITHIN)
    mean_variance = within.diagonal()
    own = ((1 - share) * variance.log() + share * mean_variance.log()).exp()
    ratio = (own / mean_variance).sqrt()
    carried = ratio[:, :, None] * within * ratio[:, None, :]
    covariance = covariance + share[:, :, None] * (carried - covariance)
    covariance.diagonal(dim1=-2, dim2=-1).add_(reg_covar * own)
    return covariance


def _start(x, weight, n_components, rng, features, maximise):
    """Hard assignment to k-means++ centres, refined by a few rounds of k-means."""
    from sklearn.cluster import KMeans

    seed = int(torch.randint(2**31 - 1, (), generator=rng))
    subset = np.random.RandomState(seed).permutation(len(x))[:4000]
    means = KMeans(n_components, n_init=1, max_iter=5, random_state=seed).fit(  # pyright: ignore[reportArgumentType]
        x[subset].numpy(), sample_weight=weight[subset].numpy()
    )
    labels = torch.as_tensor(means.predict(x.numpy())).long()
    moments = 0.0
    for block, w, label in zip(*(a.split(_CHUNK) for a in (x, weight, labels)), strict=True):
        hard = torch.nn.functional.one_hot(label, n_components).to(x.dtype)
        moments = moments + (hard * w[:, None]).mT @ features(block)
    return maximise(moments)
