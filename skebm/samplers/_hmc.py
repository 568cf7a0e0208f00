"""Hamiltonian Monte Carlo with a fixed number of leapfrog steps (Duane et al. 1987, Neal 2011).

In units of `scale`, a momentum m is drawn from the standard normal and the energy

    H(x, m) = |m|^2 / 2 - log p(x)

is followed by the leapfrog method. The end is accepted with probability min(1, exp(H - H')); the
leapfrog is reversible and keeps volumes, so p is the stationary law at any step size. One step of
one leapfrog is MALA.
"""

import torch

from skebm.samplers._state import evaluate_with_gradient as init
from skebm.samplers._state import metropolis

__all__ = ["TARGET_ACCEPTANCE", "init", "leapfrog", "step"]

TARGET_ACCEPTANCE = 0.651  # optimal in high dimension (Beskos et al. 2013)


def leapfrog(state, momentum, log_density, *, step_size, scale, n_leapfrog_steps):
    """Follow the energy for a while, at one gradient per leapfrog step.

    Parameters
    ----------
    state : State
    momentum : Tensor of shape (n_chains, d)
        In units of 1 / `scale`.
    log_density : callable
    step_size, scale, n_leapfrog_steps
        As in :func:`step`.

    Returns
    -------
    State, Tensor of shape (n_chains, d)
        The end, and the momentum there.
    """
    for _ in range(n_leapfrog_steps):
        momentum = momentum + 0.5 * step_size * scale * state.gradient
        state = init(state.position + step_size * scale * momentum, log_density)
        momentum = momentum + 0.5 * step_size * scale * state.gradient
    return state, momentum


def step(state, log_density, generator, *, step_size, scale=1.0, n_leapfrog_steps=10):
    """One trajectory of all chains, with `n_leapfrog_steps` gradients.

    Parameters
    ----------
    state : State
        From :func:`init` or a former step.
    log_density : callable
        (n_chains, d) -> (n_chains,), up to a constant; differentiable by autograd.
    generator : torch.Generator
    step_size : float
        Length of a leapfrog step, in units of `scale`.
    scale : float or Tensor of shape (d,), default=1.0
        A length for each dimension, ideally the standard deviations of the target.
    n_leapfrog_steps : int, default=10
        A trajectory should be about as long as the target is wide, ``step_size *
        n_leapfrog_steps`` between 1 and 3. On a normal target whose period (2 pi) it meets, a
        chain returns to where it was.

    Returns
    -------
    State, Info
    """
    if n_leapfrog_steps < 1:
        raise ValueError(f"n_leapfrog_steps={n_leapfrog_steps} must be at least 1.")
    x = state.position
    momentum = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    proposal, last = leapfrog(
        state, momentum, log_density,
        step_size=step_size, scale=scale, n_leapfrog_steps=n_leapfrog_steps,
    )  # fmt: skip
    log_ratio = proposal.log_density - state.log_density + 0.5 * (momentum**2 - last**2).sum(1)
    return metropolis(state, proposal, log_ratio, generator)
