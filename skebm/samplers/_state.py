"""What the kernels share: state, information about a step, and the accept-reject decision."""

from typing import NamedTuple

import torch


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
    """

    acceptance_probability: torch.Tensor
    accepted: torch.Tensor


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
    probability = torch.where(usable, log_ratio, -torch.inf).clamp_max(0.0).exp()
    accepted = torch.rand(
        probability.shape, generator=generator, dtype=probability.dtype, device=probability.device
    ).lt(probability)
    new = State(
        *(
            None if b is None else torch.where(accepted.view(-1, *[1] * (b.ndim - 1)), b, a)
            for a, b in zip(state, proposal, strict=True)
        )
    )
    return new, Info(probability, accepted)
