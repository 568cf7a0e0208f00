"""The loop that runs any kernel."""

import math
import warnings
from typing import NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning

from skebm.samplers._state import State


class Run(NamedTuple):
    """What a run leaves.

    Attributes
    ----------
    samples : Tensor of shape (n_keep, n_chains, d)
        States kept, equally spaced in time; the last is the final one.
    state : State
        The final state, from which another run can go on.
    step_size : float or None
        As adapted.
    acceptance_rate : float
        Mean acceptance probability after burn-in.
    """

    samples: torch.Tensor
    state: State
    step_size: float | None
    acceptance_rate: float


def run(
    kernel, x, log_density, generator, *, n_steps, n_burn_in=0, n_keep=1, step_size=None, **options
):
    """Run chains from given points.

    Parameters
    ----------
    kernel : module
        For instance ``skebm.samplers.mala``.
    x : Tensor of shape (n_chains, d)
    log_density : callable
        (n_chains, d) -> (n_chains,).
    generator : torch.Generator
    n_steps : int
        Steps after burn-in.
    n_burn_in : int, default=0
        Steps before, all discarded, in which the step size is adapted until the mean acceptance
        over the chains is the kernel's ``TARGET_ACCEPTANCE``. The step size is fixed afterwards:
        a chain that goes on adapting has another stationary law.
    n_keep : int, default=1
        How many of the states to keep; must divide `n_steps`.
    step_size : float, optional
        To start with; required by kernels that have one.
    **options
        Passed on to ``kernel.step``.

    Returns
    -------
    Run

    Warns
    -----
    ConvergenceWarning
        Where the acceptance rate is far from the kernel's target.
    """
    if n_steps < 1 or n_keep < 1 or n_steps % n_keep:
        raise ValueError(f"n_keep={n_keep} must divide n_steps={n_steps}, both at least 1.")
    target = kernel.TARGET_ACCEPTANCE
    if (step_size is None) != (target is None):
        raise ValueError("step_size must be given, just for kernels that have a step size.")
    state = kernel.init(x, log_density)
    astray = int((~state.log_density.isfinite()).sum())
    if astray:
        raise ValueError(f"{astray} of {len(x)} chains start where log_density is not finite.")

    if step_size is not None:
        adaptation = DualAveraging(step_size, target)
        options["step_size"] = step_size
    for _ in range(n_burn_in):
        state, info = kernel.step(state, log_density, generator, **options)
        if step_size is not None:
            options["step_size"] = adaptation.update(info.acceptance_probability.mean().item())
    if step_size is not None and n_burn_in:
        step_size = options["step_size"] = adaptation.average

    samples = state.position.new_empty((n_keep, *state.position.shape))
    acceptance = 0.0
    for t in range(1, n_steps + 1):
        state, info = kernel.step(state, log_density, generator, **options)
        acceptance += info.acceptance_probability.mean()
        kept, between = divmod(t * n_keep, n_steps)
        if between == 0:
            samples[kept - 1] = state.position
    rate = float(acceptance) / n_steps
    if target is not None and abs(rate - target) > 0.25:
        warnings.warn(
            f"the chains accept {rate:.0%} of the proposals at step size {step_size:.3g}; the "
            f"target is {target:.0%}. Give n_burn_in more steps, or another step_size.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return Run(samples, state, step_size, rate)


class DualAveraging:
    """Step size by Nesterov's dual averaging (Hoffman & Gelman 2014, section 3.2).

    Parameters
    ----------
    step_size : float
        To start with.
    target : float
        Acceptance rate to reach.
    """

    # shrinkage, delay of the first steps, and the rate at which early steps are forgotten: the
    # published values
    gamma, t0, kappa = 0.05, 10.0, 0.75

    def __init__(self, step_size, target):
        self.target = target
        self.mu = math.log(step_size)
        self.t, self.error, self.log_average = 0, 0.0, 0.0

    def update(self, acceptance):
        """Step size for the next step, given the acceptance of the last."""
        self.t += 1
        self.error += (self.target - acceptance - self.error) / (self.t + self.t0)
        log_step_size = self.mu - math.sqrt(self.t) / self.gamma * self.error
        weight = self.t**-self.kappa
        self.log_average += weight * (log_step_size - self.log_average)
        return math.exp(log_step_size)

    @property
    def average(self):
        """The step size to use after burn-in."""
        return math.exp(self.log_average)
