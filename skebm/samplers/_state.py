"""What the kernels share: state, information about a step, and the accept-reject decision."""

from typing import NamedTuple

import torch

MAX_ENERGY_ERROR = 1000.0
"""Above this a proposal counts as diverged; the value that Stan uses."""


class State(NamedTuple):
    """Where the chains are.

    Attributes
    ----------
    position : Tensor of shape (n_chains, d)
    log_density : Tensor of shape (n_chains,)
        The callable given to the kernel, at `position`.
    gradient : Tensor of shape (n_chains, d) or None
        Its gradient; None for kernels that use none.
    """

    position: torch.Tensor
    log_density: torch.Tensor
    gradient: torch.Tensor | None = None


class Info(NamedTuple):
    """What happened in a step.

    Attributes
    ----------
    acceptance_probability : Tensor of shape (n_chains,)
    accepted : bool Tensor of shape (n_chains,)
    energy_error : Tensor of shape (n_chains,)
        Minus the log of the acceptance ratio before it is cut at 1: for HMC what the trajectory
        gained in energy. inf where the proposal left the support or the arithmetic overflowed.
    diverged : bool Tensor of shape (n_chains,)
        Whether the energy error exceeds `MAX_ENERGY_ERROR`. Many of these, other than at the
        edge of a support, say that the step size is too large for the curvature there.
    """

    acceptance_probability: torch.Tensor
    accepted: torch.Tensor
    energy_error: torch.Tensor
    diverged: torch.Tensor


def evaluate_with_gradient(x, log_density):
    """State at x, from one evaluation of the log-density and one gradient."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        value = log_density(x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return State(x.detach(), value.detach(), gradient)


def metropolis(state, proposal, log_ratio, generator):
    """Accept `proposal` with probability min(1, exp(log_ratio)), chain by chain.

    A proposal whose log-density or ratio is not finite (outside the support, or where the
    arithmetic overflows) is rejected.
    """
    usable = proposal.log_density.isfinite() & log_ratio.isfinite()
    energy_error = torch.where(usable, -log_ratio, torch.inf)
    probability = (-energy_error).clamp_max(0.0).exp()
    accepted = torch.rand(
        probability.shape, generator=generator, dtype=probability.dtype, device=probability.device
    ).lt(probability)
    new = State(
        *(
            None if b is None else torch.where(accepted.view(-1, *[1] * (b.ndim - 1)), b, a)
            for a, b in zip(state, proposal, strict=True)
        )
    )
    return new, Info(probability, accepted, energy_error, energy_error > MAX_ENERGY_ERROR)
