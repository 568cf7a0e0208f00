"""The Metropolis-adjusted Langevin algorithm (Roberts & Tweedie 1996).

With s = step_size * scale, g the gradient of the log-density and xi standard normal, the proposal

    x' = x + s^2 g(x) / 2 + s xi

is accepted with probability min(1, p(x') N(x; x' + s^2 g(x') / 2, s^2) / (p(x) N(x'; ...))), so
that the chain has p as its stationary law, at any step size.
"""

import torch

from skebm.samplers._state import evaluate_with_gradient as init
from skebm.samplers._state import metropolis

__all__ = ["TARGET_ACCEPTANCE", "init", "step"]

TARGET_ACCEPTANCE = 0.574  # optimal in high dimension (Roberts & Rosenthal 1998)


def step(state, log_density, generator, *, step_size, scale=1.0):
    """One step of all chains, with one gradient.

    Parameters
    ----------
    state : State
        From :func:`init` or a former step.
    log_density : callable
        (n_chains, d) -> (n_chains,), up to a constant; differentiable by autograd.
    generator : torch.Generator
    step_size : float
        Standard deviation of the noise, in units of `scale`.
    scale : float or Tensor of shape (d,), default=1.0
        A length for each dimension, ideally the standard deviations of the target.

    Returns
    -------
    State, Info
    """
    x, _, gradient = state
    s = step_size * scale
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    proposal = init(x + 0.5 * s**2 * gradient + s * noise, log_density)
    # the noise that would lead back from the proposal
    back = (x - proposal.position) / s - 0.5 * s * proposal.gradient
    log_ratio = proposal.log_density - state.log_density + 0.5 * (noise**2 - back**2).sum(1)
    return metropolis(state, proposal, log_ratio, generator)
