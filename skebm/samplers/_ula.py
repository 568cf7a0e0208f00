r"""The unadjusted Langevin algorithm (Parisi 1981, Roberts & Tweedie 1996).

The proposal of MALA, always taken. The chain has another stationary distribution than p: of a
normal distribution with standard deviation sigma, in units of which the step is s, it has the
variance

    sigma^2 / (1 - s^2 / 4),   s < 2.

How often MALA would have accepted is free to know, and says how far the distribution is from p.
"""

import torch

from skebm._typing import LogDensity
from skebm.samplers._hmc import energy_loss, leapfrog
from skebm.samplers._state import Info, State, choose, judge, normal_like
from skebm.samplers._state import evaluate_with_gradient as init

__all__ = ["TARGET_ACCEPTANCE", "init", "step"]

TARGET_ACCEPTANCE = 0.98
"""Of a normal distribution in 1, 2, 10, 100 dimensions the variance is then 11, 8, 4, 2 % too
large; at 0.9,
45, 30, 15, 6 %. In one dimension even a poor step is seldom rejected."""


def step(
    state: State,
    log_density: LogDensity,
    rng: torch.Generator,
    *,
    step_size: float | torch.Tensor,
    scale: float | torch.Tensor = 1.0,
) -> tuple[State, Info]:
    """One step of all chains, with one gradient.

    A chain whose move diverges (energy error above 1000, or a log-density or gradient that is not
    finite) stays where it is. Otherwise a step too large for the curvature at one place would carry
    it off to where it never returns from.

    Parameters
    ----------
    state : State
        From :func:`init` or a former step.
    log_density : callable
        (n_chains, d) -> (n_chains,), up to a constant; with ``value_and_gradient`` or
        differentiable by autograd.
    rng : torch.Generator
    step_size : float or Tensor that broadcasts to (n_chains, d)
        Standard deviation of the noise, in units of `scale`. In the convention
        x' = x - eps grad E + sqrt(2 eps) xi, eps is ``step_size**2 / 2``.
    scale : float or Tensor that broadcasts to (n_chains, d), default=1.0
        A length for each dimension, ideally the standard deviations of the target.

    Returns
    -------
    State, Info
        `acceptance_probability` is that of MALA for the same move. `accepted` is True but where a
        chain diverged.
    """
    noise = normal_like(state.position, rng)
    proposal, last = leapfrog(
        state, noise, log_density, step_size=step_size, scale=scale, n_leapfrog_steps=1
    )
    probability, energy_error, diverged = judge(energy_loss(state, noise, proposal, last))
    accepted = ~diverged
    return choose(accepted, proposal, state), Info(probability, accepted, energy_error, diverged)
