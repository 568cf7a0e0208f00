"""Bases that come from elsewhere: a box, torch distributions, scikit-learn densities.

Some of these draw on a global random generator. They are then seeded from the generator given,
under a lock, and the global state is left as found.
"""

import contextlib
import copy
import inspect
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn
from torch.autograd.function import once_differentiable

from skebm._random import draw_seed, seeded_global_rng
from skebm._typing import FloatArray


class UniformBase(nn.Module):
    """Uniform distribution on a box; log-density -inf outside of it.

    Parameters
    ----------
    low, high : array-like of shape (d,)

    See Also
    --------
    StackedBase : Mixes it with other distributions.

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import UniformBase
    >>> box = UniformBase(low=[0.0, 0.0], high=[2.0, 4.0])
    >>> box.log_prob(torch.tensor([[1.0, 1.0], [3.0, 1.0]], dtype=torch.float64))
    tensor([-2.0794,    -inf], dtype=torch.float64)
    """

    n_features: int
    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, low: ArrayLike, high: ArrayLike):
        super().__init__()
        low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in (low, high))
        if low.ndim != 1 or low.shape != high.shape:
            raise ValueError(
                "low and high must be of one shape (d,), got "
                f"{tuple(low.shape)} and {tuple(high.shape)}."
            )
        if not ((low < high) & low.isfinite() & high.isfinite()).all():
            raise ValueError(f"low must be below high, both finite, got {low} and {high}.")
        self.n_features = len(low)
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-density, (n, d) -> (n,)."""
        inside = ((x >= self.low) & (x <= self.high)).all(1)
        constant = 0.0 * x.clamp(self.low, self.high).sum(1)  # so that the gradient is there: 0
        return torch.where(inside, constant - (self.high - self.low).log().sum(), -math.inf)

    def sample(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """Draw (n, d) points."""
        u = torch.rand(
            n, self.n_features, generator=rng, dtype=torch.float64, device=self.low.device
        )
        return self.low + u * (self.high - self.low)


class TorchDistributionBase(nn.Module):
    """A ``torch.distributions.Distribution``.

    Parameters
    ----------
    distribution : torch.distributions.Distribution
        Continuous, with event shape (d,), or () for one dimension, and no batch shape (wrap it
        into ``torch.distributions.Independent``). Its own parameters set the precision of
        `log_prob` and the device: give float64 ones.

    See Also
    --------
    SklearnDensityBase : A fitted estimator.
    skebm.NCEDensity : Takes such a distribution as its `base`.

    Examples
    --------
    >>> import torch
    >>> from torch.distributions import Independent, Laplace
    >>> from skebm.bases import TorchDistributionBase
    >>> zero, one = torch.zeros(2).double(), torch.ones(2).double()
    >>> base = TorchDistributionBase(Independent(Laplace(zero, one), 1))
    >>> base.log_prob(torch.zeros(1, 2, dtype=torch.float64))
    tensor([-1.3863], dtype=torch.float64)
    >>> base.sample(3, torch.Generator().manual_seed(0)).shape
    torch.Size([3, 2])
    """

    n_features: int

    def __init__(self, distribution: torch.distributions.Distribution):
        super().__init__()
        event_shape = tuple(distribution.event_shape)
        if len(event_shape) > 1 or tuple(distribution.batch_shape):
            raise ValueError(
                "the distribution must have event shape (d,) or () and no batch shape, got "
                f"{event_shape} and {tuple(distribution.batch_shape)}; "
                "torch.distributions.Independent makes batch dimensions event dimensions."
            )
        try:
            self._support = distribution.support
        except NotImplementedError:
            self._support = None
        if self._support is not None and self._support.is_discrete:
            raise ValueError(f"{type(distribution).__name__} is discrete; it has no density.")
        self.distribution = distribution
        self.n_features = event_shape[0] if event_shape else 1
        with seeded_global_rng(0):
            self._dtype = distribution.sample().dtype

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_support": None}  # torch's constraints cannot all be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        with contextlib.suppress(NotImplementedError):
            self._support = self.distribution.support

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-density, (n, d) -> (n,); -inf outside of the support."""
        value = x.to(self._dtype)
        if not self.distribution.event_shape:
            value = value.squeeze(1)
        if self._support is None:
            return self.distribution.log_prob(value).double()
        # only inside: elsewhere torch raises, or computes something
        inside = self._support.check(value)
        log_prob = value.new_full((len(x),), -math.inf)
        log_prob[inside] = self.distribution.log_prob(value[inside])
        return log_prob.double()

    def sample(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """Draw (n, d) points."""
        with seeded_global_rng(draw_seed(rng), rng.device):
            return self.distribution.sample((n,)).double().reshape(n, self.n_features)


class SklearnDensityBase(nn.Module):
    """A fitted estimator with ``score_samples`` and ``sample``.

    The gradient of `log_prob` comes from central finite differences, 2 d evaluations at points
    1e-4 (relative to max(1, |x|)) to either side: about eight correct digits for smooth densities.

    Parameters
    ----------
    estimator : object
        Fitted, for instance a GaussianMixture or KernelDensity. It is not changed.

    See Also
    --------
    TorchDistributionBase : A distribution of torch.
    skebm.NCEDensity : Takes such an estimator as its `base`.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from sklearn.mixture import GaussianMixture
    >>> from skebm.bases import SklearnDensityBase
    >>> X = np.random.default_rng(0).normal(size=(200, 2))
    >>> base = SklearnDensityBase(GaussianMixture(random_state=0).fit(X))
    >>> x = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    >>> base.log_prob(x).backward()
    >>> x.grad.shape
    torch.Size([1, 2])
    """

    n_features: int
    _place: torch.Tensor

    def __init__(self, estimator: Any):
        super().__init__()
        for method in ("score_samples", "sample"):
            if not callable(getattr(estimator, method, None)):
                raise TypeError(f"{type(estimator).__name__} has no method {method}.")
        self.estimator = estimator
        # the estimator computes on the CPU; this says where the module was moved to
        self.register_buffer("_place", torch.empty(0))
        n_features = getattr(estimator, "n_features_in_", None)
        if n_features is None:
            n_features = self.sample(1, torch.Generator().manual_seed(0)).shape[1]
        self.n_features = n_features

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-density, (n, d) -> (n,)."""
        return _ScoreSamples.apply(x, self.estimator)

    def sample(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """Draw (n, d) points."""
        x = draw_from(self.estimator, n, draw_seed(rng))
        # GaussianMixture returns its rows sorted by component
        order = torch.randperm(n, generator=rng, device=rng.device)
        return torch.from_numpy(x).to(self._place.device)[order.to(self._place.device)]


def draw_from(estimator: Any, n: int, seed: int, **options: Any) -> FloatArray:
    """Draw from a fitted estimator with `sample`, however it takes its random state.

    Parameters
    ----------
    estimator : object
        It is not changed.
    n : int
    seed : int
    **options : dict
        Passed to `sample`.

    Returns
    -------
    ndarray of shape (n, d), float64
        In the order of the estimator: GaussianMixture sorts its rows by component.
    """
    with seeded_global_rng(seed):
        if "random_state" in inspect.signature(estimator.sample).parameters:
            options["random_state"] = seed
        elif hasattr(estimator, "random_state"):
            estimator = copy.copy(estimator)
            estimator.random_state = seed
        x = estimator.sample(n, **options)
    return np.asarray(x[0] if isinstance(x, tuple) else x, dtype=np.float64)


class _ScoreSamples(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, estimator):
        ctx.save_for_backward(x)
        ctx.estimator = estimator
        return _score_samples(estimator, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        step = 1e-4 * x.abs().clamp_min(1.0)
        gradient = torch.empty_like(x)
        for j in range(x.shape[1]):
            up, down = x.clone(), x.clone()
            up[:, j] += step[:, j]
            down[:, j] -= step[:, j]
            rise = _score_samples(ctx.estimator, up) - _score_samples(ctx.estimator, down)
            gradient[:, j] = rise / (up - down)[:, j]
        return grad[:, None] * gradient, None


def _score_samples(estimator, x):
    scores = estimator.score_samples(x.detach().cpu().numpy())
    return torch.as_tensor(np.asarray(scores, dtype=np.float64), device=x.device)
