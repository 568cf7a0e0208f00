"""The Metropolis-adjusted Langevin algorithm (Roberts & Tweedie 1996).

With s = step_size * scale, g the gradient of the log-density and xi standard normal, the proposal

    x' = x + s^2 g(x) / 2 + s xi

is accepted with probability min(1, p(x') N(x; x' + s^2 g(x') / 2, s^2) / (p(x) N(x'; ...))), so
that the chain has p as its stationary distribution, at any step size. The proposal is one leapfrog
step with momentum xi, and the ratio is that of HMC.
"""

import torch

from skebm._typing import LogDensity
from skebm.samplers._hmc import energy_loss, leapfrog
from skebm.samplers._state import Info, State, metropolis, normal_like
from skebm.samplers._state import evaluate_with_gradient as init

__all__ = ["TARGET_ACCEPTANCE", "init", "step"]

TARGET_ACCEPTANCE = 0.574  # optimal in high dimension (Roberts & Rosenthal 1998)


def step(
    state: State,
    log_density: LogDensity,
    rng: torch.Generator,
    *,
    step_size: float | torch.Tensor,
    scale: float | torch.Tensor = 1.0,
) -> tuple[State, Info]:
    """One step of all chains, with one gradient.

    Parameters
    ----------
    state : State
        From :func:`init` or a former step.
    log_density : callable
        (n_chains, d) -> (n_chains,), up to a constant; with ``value_and_gradient`` or
        differentiable by autograd.
    rng : torch.Generator
    step_size : float or Tensor that broadcasts to (n_chains, d)
        Standard deviation of the noise, in units of `scale`.
    scale : float or Tensor that broadcasts to (n_chains, d), default=1.0
        A length for each dimension, ideally the standard deviations of the target.

    Returns
    -------
    State, Info
    """
    noise = normal_like(state.position, rng)
    proposal, last = leapfrog(
        state, noise, log_density, step_size=step_size, scale=scale, n_leapfrog_steps=1
    )
    return metropolis(state, proposal, energy_loss(state, noise, proposal, last), rng)
