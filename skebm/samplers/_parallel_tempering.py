"""Parallel tempering (Swendsen & Wang 1986, Geyer 1991), for modes far apart.

Replicas of each chain run side by side on a path of distributions

    log pi_b(x) = b log p(x) + (1 - b) log q(x),   1 = b_1 > b_2 > ... > b_R,

(without a reference q, the second term is missing), each moved by a kernel of its own step size.
Then the replicas i and i + 1 exchange their positions x and y with probability

    min(1, exp((b_i - b_(i+1)) (l(y) - l(x)))),   l = log p - log q,

which keeps the product of all distributions. Pairs of even and of odd i take turns, so that a
position travels along the ladder instead of walking at random (Syed et al. 2022). What the hottest
replica finds reaches the coldest, which samples p.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from skebm._typing import Kernel, LogDensity
from skebm.samplers import _mala
from skebm.samplers._geometric import geometric_path
from skebm.samplers._state import State, choose, evaluate, evaluate_with_gradient

COLDEST_TO_HOTTEST = 0.01


class Parts(NamedTuple):
    """log p and log q, each with its gradient, at the positions of all replicas.

    Attributes
    ----------
    log_density : Tensor of shape (n_replicas * n_chains,)
    gradient : Tensor of shape (n_replicas * n_chains, d) or None
    log_reference, reference_gradient
        The same of the reference; None without one.
    """

    log_density: torch.Tensor
    gradient: torch.Tensor | None
    log_reference: torch.Tensor | None = None
    reference_gradient: torch.Tensor | None = None


class TemperedState(NamedTuple):
    """Where the replicas of the chains are.

    Attributes
    ----------
    position : Tensor of shape (n_chains, d)
        Of the coldest replicas, which have the distribution p.
    log_density : Tensor of shape (n_chains,)
        log p there.
    gradient : Tensor of shape (n_chains, d) or None
        Its gradient.
    replicas : State
        All of them, (n_replicas * n_chains, d), from cold to hot, with the log-density of the
        distribution that each has.
    parts : Parts
        What these log-densities are mixed from: an exchange evaluates nothing anew.
    odd : bool
        Which pairs exchange in the next step.

    See Also
    --------
    ParallelTempering : The kernel that makes it.
    State : That of the other kernels.

    Examples
    --------
    >>> import torch
    >>> from skebm.samplers import ParallelTempering
    >>> def log_density(x):
    ...     return -0.5 * x.square().sum(1)
    >>> rng = torch.Generator().manual_seed(0)
    >>> x = torch.randn(8, 2, generator=rng)
    >>> kernel = ParallelTempering(inverse_temperatures=[1.0, 0.3, 0.1])
    >>> state = kernel.init(x, log_density)
    >>> state.position.shape, state.replicas.position.shape
    (torch.Size([8, 2]), torch.Size([24, 2]))
    """

    position: torch.Tensor
    log_density: torch.Tensor
    gradient: torch.Tensor | None
    replicas: State
    parts: Parts
    odd: bool


class TemperedInfo(NamedTuple):
    """What happened in a step.

    Attributes
    ----------
    acceptance_probability, accepted, energy_error, diverged : Tensors of shape (n_chains,)
        As in :class:`Info`, of the kernel on the coldest replicas.
    rate : Tensor of shape (n_replicas, 1, 1)
        Mean acceptance probability of the kernel on each replica.
    swap_probability : Tensor of shape (n_replicas - 1, n_chains)
        With which neighbours would exchange, those included whose turn it is not.

    See Also
    --------
    ParallelTempering : The kernel that returns it.
    Info : That of the other kernels.

    Examples
    --------
    >>> import torch
    >>> from skebm.samplers import ParallelTempering
    >>> def log_density(x):
    ...     return -0.5 * x.square().sum(1)
    >>> rng = torch.Generator().manual_seed(0)
    >>> x = torch.randn(8, 2, generator=rng)
    >>> kernel = ParallelTempering(inverse_temperatures=[1.0, 0.3, 0.1])
    >>> state, info = kernel.step(kernel.init(x, log_density), log_density, rng, step_size=0.5)
    >>> info.rate.shape, info.swap_probability.shape
    (torch.Size([3, 1, 1]), torch.Size([2, 8]))
    """

    acceptance_probability: torch.Tensor
    accepted: torch.Tensor
    energy_error: torch.Tensor
    diverged: torch.Tensor
    rate: torch.Tensor
    swap_probability: torch.Tensor


class ParallelTempering:
    """A kernel that runs another one at several temperatures and exchanges positions.

    Parameters
    ----------
    kernel : module, default=skebm.samplers.mala
        With a step size, and such that the point it evaluates last is its proposal.
    inverse_temperatures : int or sequence of float, default=8
        Falling from 1; the last is positive without, and may be 0 with a reference. An int is the
        number of replicas: a geometric sequence from 1 to 0.01, which gives neighbours the same
        rate of exchange on a normal distribution, and with a reference one more replica at 0.
    log_reference : callable, optional
        (n, d) -> (n,), the log-density of a distribution q, up to a constant, positive where p is;
        best one as wide as all modes together. Without it the hottest distribution is proportional
        to p^b, which must be normalisable and wide enough for one chain to cross.

    Raises
    ------
    ValueError
        If the kernel has no step size, or the inverse temperatures do not fall as they should.

    See Also
    --------
    run : Adapts a step size for each replica during burn-in.

    Notes
    -----
    A step costs what one of the kernel costs on n_replicas * n_chains points, in one batch, and
    an exchange costs no evaluation. In d dimensions about sqrt(d) replicas are needed for each
    power of ten between the temperatures; neighbours should exchange in 20 to 60 % of the trials.

    References
    ----------
    Swendsen, R. H. and Wang, J.-S. (1986). Replica Monte Carlo simulation of spin-glasses.
    *Physical Review Letters* 57.
    Geyer, C. J. (1991). Markov chain Monte Carlo maximum likelihood. *Computing Science and
    Statistics: Proceedings of the 23rd Symposium on the Interface*.
    Syed, S., Bouchard-Côté, A., Deligiannidis, G. and Doucet, A. (2022). Non-reversible parallel
    tempering: a scalable highly parallel MCMC scheme. *JRSS B* 84.

    Examples
    --------
    Four fifths of the mass at 6, a fifth at -6; all chains start at -6.

    >>> import math
    >>> import torch
    >>> from skebm.samplers import ParallelTempering, run
    >>> def log_density(x):
    ...     left, right = -0.5 * (x[:, 0] + 6) ** 2, -0.5 * (x[:, 0] - 6) ** 2
    ...     return torch.logaddexp(left + math.log(0.2), right + math.log(0.8))
    >>> result = run(
    ...     ParallelTempering(), torch.full((200, 1), -6.0), log_density,
    ...     torch.Generator().manual_seed(0), n_steps=400, n_burn_in=200, n_keep=40, step_size=1.0,
    ... )
    >>> (result.samples > 0).float().mean().item()
    0.8
    """

    def __init__(
        self,
        kernel: Kernel = _mala,
        inverse_temperatures: int | Sequence[float] = 8,
        log_reference: LogDensity | None = None,
    ):
        if kernel.TARGET_ACCEPTANCE is None:
            raise ValueError("kernel must have a step size.")
        if isinstance(inverse_temperatures, int):
            n_positive = inverse_temperatures - (log_reference is not None)
            if n_positive < 1:
                raise ValueError(f"inverse_temperatures={inverse_temperatures} are too few.")
            steps = max(n_positive - 1, 1)
            b = [COLDEST_TO_HOTTEST ** (i / steps) for i in range(n_positive)]
            inverse_temperatures = b if log_reference is None else [*b, 0.0]
        b = torch.as_tensor(inverse_temperatures, dtype=torch.float64)
        lowest_allowed = b[-1] > 0 if log_reference is None else b[-1] >= 0
        if b.ndim != 1 or len(b) < 2 or b[0] != 1 or not (b.diff() < 0).all() or not lowest_allowed:
            raise ValueError(
                "inverse_temperatures must fall from 1 to a positive number (or 0, where "
                f"log_reference is given), at least two of them; got {inverse_temperatures}."
            )
        self.kernel = kernel
        self.inverse_temperatures = b
        self.log_reference = log_reference
        self.TARGET_ACCEPTANCE = kernel.TARGET_ACCEPTANCE

    def init(self, x: torch.Tensor, log_density: LogDensity) -> TemperedState:
        """State with all replicas of a chain at one place, or each at its own.

        Parameters
        ----------
        x : Tensor of shape (n_chains, d) or (n_replicas, n_chains, d)
        log_density : callable
            (n, d) -> (n,).

        Returns
        -------
        TemperedState
        """
        *_, n, d = x.shape
        path = self._path(x, n, log_density)
        x = x.expand(len(path.levels), n, d).flatten(0, 1)
        replicas = self.kernel.init(x, path)
        return self._state(replicas, path.parts, n, odd=False)

    def step(
        self,
        state: TemperedState,
        log_density: LogDensity,
        rng: torch.Generator,
        *,
        step_size: float | torch.Tensor,
        scale: float | torch.Tensor = 1.0,
        **options: Any,
    ) -> tuple[TemperedState, TemperedInfo]:
        """One step of the kernel on all replicas, then one round of exchanges.

        Parameters
        ----------
        state : TemperedState
            From :meth:`init` or a former step.
        log_density : callable
            (n, d) -> (n,), up to a constant, as the kernel needs it.
        rng : torch.Generator
        step_size : float or Tensor that broadcasts to (n_replicas, n_chains, d)
            Of the coldest replica, in units of `scale`. Without a reference that at the inverse
            temperature b is longer by the factor b^(-1/2), as a normal distribution is wider; with
            one, all steps are as long as `step_size` says.
        scale : float or Tensor that broadcasts to (n_replicas, n_chains, d), default=1.0
            A length for each dimension, ideally the standard deviations of the target.
        **options
            Passed on to the step of the kernel.

        Returns
        -------
        TemperedState, TemperedInfo
        """
        n = len(state.position)
        path = self._path(state.position, n, log_density)
        b = path.levels
        lengths = step_size * scale * (b**-0.5 if self.log_reference is None else b**0)
        lengths = lengths.expand(len(b), n, lengths.shape[-1]).flatten(0, 1)
        replicas, info = self.kernel.step(
            state.replicas, path, rng, step_size=1.0, scale=lengths, **options
        )
        parts = choose(info.accepted, path.parts, state.parts)

        # exchanges
        log_ratio = parts.log_density
        if self.log_reference is not None:
            log_ratio = log_ratio - parts.log_reference
        log_ratio = -b.diff(dim=0)[:, :, 0] * log_ratio.view(len(b), n).diff(dim=0)
        probability = log_ratio.nan_to_num(-torch.inf, torch.inf, -torch.inf).clamp_max(0).exp()
        uniform = torch.rand(probability.shape, generator=rng, dtype=b.dtype, device=b.device)
        swapped = uniform < probability
        swapped[1 - state.odd :: 2] = False
        source = torch.arange(len(b) * n, device=b.device).view(len(b), n)
        source[:-1] += n * swapped
        source[1:] -= n * swapped
        source = source.flatten()
        parts: Any = Parts._make(None if part is None else part[source] for part in parts)
        replicas = path.mix(replicas.position[source], parts)

        cold = (field[:n] for field in info)
        rate = info.acceptance_probability.view(len(b), n, 1).mean(1, keepdim=True)
        new = self._state(replicas, parts, n, odd=not state.odd)
        return new, TemperedInfo(*cold, rate, probability)  # pyright: ignore[reportCallIssue]

    def _path(self, x, n_chains, log_density):
        levels = self.inverse_temperatures.to(x)[:, None, None]
        return _Path(levels, n_chains, log_density, self.log_reference)

    def _state(self, replicas, parts, n, odd):
        cold = (None if field is None else field[:n] for field in replicas)
        return TemperedState(*cold, replicas, parts, odd)  # pyright: ignore[reportCallIssue]


class _Path:
    """log pi_b of the rows of all replicas; `parts` are those of the last evaluation."""

    def __init__(self, levels, n_chains, log_density, log_reference):
        self.levels = levels
        self.b = levels.expand(-1, n_chains, 1).flatten(0, 1)
        self.log_density, self.log_reference = log_density, log_reference

    def __call__(self, x):
        return self._evaluate(x, evaluate).log_density

    def value_and_gradient(self, x):
        state = self._evaluate(x, evaluate_with_gradient)
        return state.log_density, state.gradient

    def _evaluate(self, x, evaluate):
        functions = [self.log_density]
        if self.log_reference is not None:
            functions.append(self.log_reference)
        self.parts = Parts(*(field for f in functions for field in evaluate(x, f)[1:]))
        return self.mix(x, self.parts)

    def mix(self, x, parts):
        """State at x, from the parts there."""
        p, gradient, q, reference_gradient = parts
        if self.log_reference is None:
            return State(x, self.b[:, 0] * p, None if gradient is None else self.b * gradient)
        if gradient is not None:
            gradient = geometric_path(self.b, gradient, reference_gradient)
        return State(x, geometric_path(self.b[:, 0], p, q), gradient)
