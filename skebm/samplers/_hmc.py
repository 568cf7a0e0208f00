"""Hamiltonian Monte Carlo with a fixed number of leapfrog steps (Duane et al. 1987, Neal 2011).

In units of `scale`, a momentum m is drawn from the standard normal and the energy

    H(x, m) = |m|^2 / 2 - log p(x)

is followed by the leapfrog method. The end is accepted with probability min(1, exp(H - H')); the
leapfrog is reversible and keeps volumes, so p is the stationary distribution at any step size. One
step of one leapfrog is MALA.
"""

import torch

from skebm._typing import LogDensity
from skebm.samplers._state import Info, State, add_scaled, metropolis, normal_like
from skebm.samplers._state import evaluate_with_gradient as init

__all__ = ["TARGET_ACCEPTANCE", "energy_loss", "init", "leapfrog", "step"]

TARGET_ACCEPTANCE = 0.651  # optimal in high dimension (Beskos et al. 2013)


def leapfrog(
    state: State,
    momentum: torch.Tensor,
    log_density: LogDensity,
    *,
    step_size: float | torch.Tensor,
    scale: float | torch.Tensor,
    n_leapfrog_steps: int,
) -> tuple[State, torch.Tensor]:
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
    s = step_size * scale
    momentum = add_scaled(momentum, state.gradient, s, 0.5)  # pyright: ignore[reportArgumentType]
    for left in reversed(range(n_leapfrog_steps)):
        state = init(add_scaled(state.position, momentum, s), log_density)
        # the half step that ends one leapfrog and the half that begins the next are one
        add_scaled(momentum, state.gradient, s, 1.0 if left else 0.5, out=momentum)  # pyright: ignore[reportArgumentType]
    return state, momentum


def energy_loss(
    state: State, momentum: torch.Tensor, end: State, last: torch.Tensor
) -> torch.Tensor:
    """H(x, m) - H(x', m'), the log of the acceptance ratio, (n_chains,)."""
    # a difference of squares loses digits where the two are close, a product does not
    kinetic = torch.linalg.vecdot(momentum - last, momentum + last)
    return torch.add(end.log_density - state.log_density, kinetic, alpha=0.5)


def step(
    state: State,
    log_density: LogDensity,
    rng: torch.Generator,
    *,
    step_size: float | torch.Tensor,
    scale: float | torch.Tensor = 1.0,
    n_leapfrog_steps: int = 10,
) -> tuple[State, Info]:
    """One trajectory of all chains, with `n_leapfrog_steps` gradients.

    Parameters
    ----------
    state : State
        From :func:`init` or a former step.
    log_density : callable
        (n_chains, d) -> (n_chains,), up to a constant; with ``value_and_gradient`` or
        differentiable by autograd.
    rng : torch.Generator
    step_size : float or Tensor that broadcasts to (n_chains, d)
        Length of a leapfrog step, in units of `scale`.
    scale : float or Tensor that broadcasts to (n_chains, d), default=1.0
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
    momentum = normal_like(state.position, rng)
    proposal, last = leapfrog(
        state, momentum, log_density,
        step_size=step_size, scale=scale, n_leapfrog_steps=n_leapfrog_steps,
    )  # fmt: skip
    return metropolis(state, proposal, energy_loss(state, momentum, proposal, last), rng)
