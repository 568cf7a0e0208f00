"""The loop that runs any kernel."""

import math
from typing import Any, NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning

from skebm._typing import Kernel, LogDensity
from skebm._warnings import warn
from skebm.samplers._parallel_tempering import TemperedState
from skebm.samplers._state import State

SCALE_WINDOWS = (0.1, 0.2, 0.4, 0.8)
"""Shares of burn-in at whose end a metric is set, from the states since the last of them."""

MANY_DIVERGENCES = 0.05
"""Share of diverged proposals above which a run warns."""

FEW_EXCHANGES = 0.05
"""Share of exchanges between neighbouring temperatures below which a run warns."""


class Run(NamedTuple):
    """What a run leaves.

    Attributes
    ----------
    samples : Tensor of shape (n_keep, n_chains, d)
        States kept, equally spaced in time; the last is the final one.
    state : State
        The final state, from which another run can go on.
    step_size : float, Tensor or None
        As adapted; for parallel tempering (n_replicas, 1, 1).
    acceptance_rate : float
        Mean acceptance probability after burn-in.
    scale : float or Tensor
        As adapted, (d,), or as given.
    acceptance_rates : Tensor of shape (n_chains,)
        The same mean for each chain.
    n_diverged : int64 Tensor of shape (n_chains,)
        How many proposals of each chain diverged after burn-in.
    swap_rates : Tensor of shape (n_replicas - 1,) or None
        Mean probability of an exchange between neighbouring temperatures, after burn-in; None
        without parallel tempering.

    See Also
    --------
    run : Returns it.
    skebm.diagnostics.summarize : What there is to say of it.

    Examples
    --------
    >>> import torch
    >>> from skebm.samplers import mala, run
    >>> def log_density(x):
    ...     return -0.5 * x.square().sum(1)
    >>> rng = torch.Generator().manual_seed(0)
    >>> x = torch.randn(8, 2, generator=rng)
    >>> result = run(mala, x, log_density, rng, n_steps=100, n_keep=50, step_size=1.5)
    >>> result.samples.shape, result.acceptance_rates.shape
    (torch.Size([50, 8, 2]), torch.Size([8]))
    >>> torch.equal(result.samples[-1], result.state.position)
    True
    """

    samples: torch.Tensor
    state: State | TemperedState
    step_size: float | torch.Tensor | None
    acceptance_rate: float
    scale: float | torch.Tensor
    acceptance_rates: torch.Tensor
    n_diverged: torch.Tensor
    swap_rates: torch.Tensor | None


def run(
    kernel: Kernel,
    x: torch.Tensor,
    log_density: LogDensity,
    rng: torch.Generator,
    *,
    n_steps: int,
    n_burn_in: int = 0,
    n_keep: int = 1,
    step_size: float | torch.Tensor | None = None,
    adapt_scale: bool = False,
    progress: bool = False,
    **options: Any,
) -> Run:
    """Run chains from given points.

    Parameters
    ----------
    kernel : module or ParallelTempering
        For instance ``skebm.samplers.mala``.
    x : Tensor of shape (n_chains, d)
    log_density : callable
        (n_chains, d) -> (n_chains,).
    rng : torch.Generator
    n_steps : int
        Steps after burn-in.
    n_burn_in : int, default=0
        Steps before, all discarded, in which the step size is adapted until the mean acceptance
        over the chains is the kernel's ``TARGET_ACCEPTANCE``, and the scale if asked for. Both are
        fixed afterwards: a chain that goes on adapting has another stationary distribution.
    n_keep : int, default=1
        How many of the states to keep; must divide `n_steps`.
    step_size : float or Tensor, optional
        To start with, as ``kernel.step`` takes it; required by kernels that have one. Adaptation
        multiplies a tensor by one factor.
    adapt_scale : bool, default=False
        Whether burn-in also learns the `scale` of the kernel: the standard deviations of the
        states, over chains and time, in windows each twice as long as the one before. Give
        `n_burn_in` a hundred steps or more.
    progress : bool, default=False
        Show a bar, for runs of more than a second; needs tqdm.
    **options
        Passed on to ``kernel.step``, such as `scale`.

    Returns
    -------
    Run

    Raises
    ------
    ValueError
        If a parameter is out of range, or chains start where `log_density` is not finite.
    ImportError
        If `progress` is asked for without tqdm.

    Warns
    -----
    ConvergenceWarning
        Where the acceptance rate is far from the kernel's target (of ULA: below it), where many
        proposals diverge, and where replicas hardly exchange.

    See Also
    --------
    Run : What is returned.
    ParallelTempering : A kernel for separate modes.
    skebm.diagnostics.summarize : Whether the chains can be believed.

    Notes
    -----
    Memory does not grow with the number of steps, only with `n_keep`.

    Examples
    --------
    >>> import torch
    >>> from skebm.samplers import mala, run
    >>> def log_density(x):  # standard deviations 0.1 and 10
    ...     return -0.5 * ((10 * x[:, 0]) ** 2 + (x[:, 1] / 10) ** 2)
    >>> result = run(
    ...     mala, torch.zeros(500, 2), log_density, torch.Generator().manual_seed(0),
    ...     n_steps=100, n_burn_in=200, n_keep=10, step_size=1.0, adapt_scale=True,
    ... )
    >>> result.samples.shape
    torch.Size([10, 500, 2])
    >>> result.scale.tolist()
    [0.1, 10.]
    """
    _check_settings(kernel, x, n_steps, n_burn_in, n_keep, step_size, adapt_scale)
    target, state = kernel.TARGET_ACCEPTANCE, kernel.init(x, log_density)
    _check_start(state, x)
    adaptation = Adaptation(target, n_burn_in, step_size, options.get("scale", 1.0), adapt_scale)
    if target is not None:
        options["step_size"] = step_size
    samples = state.position.new_empty((n_keep, *state.position.shape))
    acceptance_rates = torch.zeros_like(state.log_density)
    n_diverged = torch.zeros_like(state.log_density, dtype=torch.int64)
    swap_rates = None
    times = range(1 - n_burn_in, n_steps + 1)
    for t in _with_bar(times) if progress else times:
        state, info = kernel.step(state, log_density, rng, **options)
        if t <= 0:
            if target is not None:
                options |= adaptation.update(info, state.position)
            continue
        acceptance_rates += info.acceptance_probability
        n_diverged += info.diverged
        if isinstance(state, TemperedState):
            rates = info.swap_probability.mean(1)
            swap_rates = rates if swap_rates is None else swap_rates + rates
        kept, between = divmod(t * n_keep, n_steps)
        if between == 0:
            samples[kept - 1] = state.position
    acceptance_rates /= n_steps
    if swap_rates is not None:
        swap_rates /= n_steps
    result = Run(
        samples, state, options.get("step_size"), acceptance_rates.mean().item(),
        options.get("scale", 1.0), acceptance_rates, n_diverged, swap_rates,
    )  # fmt: skip
    _warn(kernel, result, n_steps)
    return result


def _check_settings(kernel, x, n_steps, n_burn_in, n_keep, step_size, adapt_scale):
    """Raise for what no run can have."""
    if n_steps < 1 or n_keep < 1 or n_steps % n_keep:
        raise ValueError(f"n_keep={n_keep} must divide n_steps={n_steps}, both at least 1.")
    if n_burn_in < 0:
        raise ValueError(f"n_burn_in={n_burn_in} must not be negative.")
    if x.ndim != 2:
        raise ValueError(f"x must have the shape (n_chains, d), got {tuple(x.shape)}.")
    target = kernel.TARGET_ACCEPTANCE
    if (step_size is None) != (target is None):
        raise ValueError("step_size must be given, just for kernels that have a step size.")
    if adapt_scale and (target is None or n_burn_in < 10):
        raise ValueError(
            "adapt_scale=True needs a kernel that has a step size, and n_burn_in of at least 10."
        )


def _check_start(state, x):
    """Raise for chains that have no density where they start."""
    if state.log_density.shape != x.shape[:1]:
        raise ValueError(
            f"log_density must return a tensor of shape ({len(x)},), got "
            f"{tuple(state.log_density.shape)}."
        )
    astray = int((~state.log_density.isfinite()).sum())
    if astray:
        raise ValueError(f"{astray} of {len(x)} chains start where log_density is not finite.")


def _with_bar(times):
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    return tqdm(times, desc="sampling", unit="step", delay=1.0)


def _warn(kernel, result, n_steps):
    """Warn of what makes the samples doubtful."""
    messages = []
    target, rate = kernel.TARGET_ACCEPTANCE, result.acceptance_rate
    if target is not None:
        # Odds, so that the same rule fits targets near 0 and near 1.
        too_low = rate * (1 - target) < 0.3 * target * (1 - rate)
        if too_low or rate > target + 0.25:
            step_size = torch.as_tensor(result.step_size).flatten()[0].item()
            messages.append(
                f"the acceptance rate is {rate:.0%} at step size {step_size:.3g}; the target is "
                f"{target:.0%}. More steps of burn-in, or another step size, would help."
            )
    diverged = result.n_diverged.double().mean().item() / n_steps
    # without a gradient a large step is just rejected, as is one out of the support
    if result.state.gradient is not None and diverged > MANY_DIVERGENCES:
        messages.append(
            f"{diverged:.0%} of the proposals diverged. If they do not just leave the support, the "
            "log-density is too steep in places, or not finite: take a smaller step_size."
        )
    if result.swap_rates is not None and result.swap_rates.min() < FEW_EXCHANGES:
        i = int(result.swap_rates.argmin())
        b = kernel.inverse_temperatures
        messages.append(
            f"replicas at inverse temperatures {b[i]:.3g} and {b[i + 1]:.3g} exchange with "
            f"probability {result.swap_rates[i]:.2g}: put further temperatures in between."
        )
    for message in messages:
        warn(message, ConvergenceWarning)


class Adaptation:
    """Step size and, if asked for, scale of a kernel during burn-in.

    Parameters
    ----------
    target : float
        Acceptance rate to reach.
    n_steps : int
        Length of burn-in.
    step_size, scale : float or Tensor
        To start with.
    adapt_scale : bool
    """

    def __init__(
        self,
        target: float | None,
        n_steps: int,
        step_size: float | torch.Tensor | None,
        scale: float | torch.Tensor,
        adapt_scale: bool,
    ):
        self.target, self.n_steps, self.step_size, self.scale = target, n_steps, step_size, scale
        self.window_ends = {round(share * n_steps) for share in SCALE_WINDOWS if adapt_scale}
        self.t = 0
        self._restart()

    def _restart(self):
        self.averaging, self.moments = DualAveraging(self.target), Moments()

    def update(self, info: Any, position: torch.Tensor) -> dict[str, Any]:
        """Options for the next step of the kernel, given what the last one did."""
        self.t += 1
        factor = self.averaging.update(info.rate)
        if self.t == self.n_steps:
            factor = self.averaging.average
        if not self.window_ends:
            return {"step_size": self.step_size * factor}
        self.moments.update(position)
        if self.t in self.window_ends:
            scale = self.moments.standard_deviation
            # of a dimension in which no chain has moved yet there is nothing to learn
            self.scale = torch.where(scale > 0, scale, self.scale)
            self._restart()
            factor = 1.0
        return {"step_size": self.step_size * factor, "scale": self.scale}


class Moments:
    """Standard deviations of all rows seen, from merged batches (Chan, Golub & LeVeque 1983)."""

    n: int
    mean: Any
    squares: Any

    def __init__(self):
        self.n, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, x: torch.Tensor) -> None:
        """Add the rows of x, (n, d)."""
        mean, total = x.mean(0), self.n + len(x)
        gap = mean - self.mean
        self.squares = self.squares + (x - mean).square().sum(0)
        self.squares += gap.square() * (self.n * len(x) / total)
        self.mean = self.mean + gap * (len(x) / total)
        self.n = total

    @property
    def standard_deviation(self) -> torch.Tensor:
        """Of each column, (d,)."""
        return (self.squares / max(self.n - 1, 1)).sqrt()


class DualAveraging:
    """Factor of a step size by Nesterov's dual averaging (Hoffman & Gelman 2014, section 3.2).

    Parameters
    ----------
    target : float
        Acceptance rate to reach.
    """

    # Shrinkage, delay of the first steps, and the rate at which early steps are forgotten: the
    # published values, but for a shrinkage twice as strong. The rate is a mean over chains, and at
    # the sharp edge where leapfrog turns unstable 0.05 never settled.
    gamma, t0, kappa = 0.1, 10.0, 0.75

    def __init__(self, target: float | None):
        self.target = target
        self.t, self.error, self.log_average = 0, 0.0, 0.0

    def update(self, acceptance: Any) -> Any:
        """Factor for the next step, given the acceptance of the last: numbers or tensors."""
        self.t += 1
        self.error = self.error + (self.target - acceptance - self.error) / (self.t + self.t0)
        log_factor = -math.sqrt(self.t) / self.gamma * self.error
        weight = self.t**-self.kappa
        self.log_average = self.log_average + weight * (log_factor - self.log_average)
        return math.e**log_factor

    @property
    def average(self) -> Any:
        """The factor to use after burn-in."""
        return math.e**self.log_average
