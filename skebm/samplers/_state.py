"""What the kernels share: state, information about a step, evaluation, and the decision."""

import math
from typing import Any, NamedTuple

import torch

from skebm._typing import LogDensity

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

    See Also
    --------
    Info : What happened in a step.
    run : Runs chains from given points.

    Examples
    --------
    >>> import torch
    >>> from skebm.samplers import mala
    >>> def log_density(x):
    ...     return -0.5 * x.square().sum(1)
    >>> rng = torch.Generator().manual_seed(0)
    >>> x = torch.randn(8, 2, generator=rng)
    >>> state = mala.init(x, log_density)
    >>> torch.equal(state.gradient, -x)
    True
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

    See Also
    --------
    State : Where the chains are.
    run : Means of these over a run.

    Examples
    --------
    >>> import torch
    >>> from skebm.samplers import mala
    >>> def log_density(x):
    ...     return -0.5 * x.square().sum(1)
    >>> rng = torch.Generator().manual_seed(0)
    >>> x = torch.randn(8, 2, generator=rng)
    >>> state, info = mala.step(mala.init(x, log_density), log_density, rng, step_size=0.5)
    >>> info.accepted.shape, info.rate > 0.5, int(info.diverged.sum())
    (torch.Size([8]), True, 0)
    """

    acceptance_probability: torch.Tensor
    accepted: torch.Tensor
    energy_error: torch.Tensor
    diverged: torch.Tensor

    @property
    def rate(self) -> float:
        """Mean acceptance probability, from which a step size is adapted."""
        return self.acceptance_probability.mean().item()


def evaluate(x: torch.Tensor, log_density: LogDensity) -> State:
    """State at x, without a gradient."""
    x = x.detach()
    with torch.no_grad():
        return State(x, log_density(x))


def evaluate_with_gradient(x: torch.Tensor, log_density: LogDensity) -> State:
    """State at x, from one evaluation of the log-density and one gradient.

    Honours ``log_density.value_and_gradient``, as `skebm.samplers` describes it.
    """
    x = x.detach()
    own = getattr(log_density, "value_and_gradient", None)
    if own is not None:
        return State(x, *own(x))
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        value = log_density(leaf)
        (gradient,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    return State(x, value.detach(), gradient)


def add_scaled(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: float | torch.Tensor,
    factor: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x + factor * scale * y in one operation, where `scale` is a number or a tensor."""
    if isinstance(scale, torch.Tensor):
        return torch.addcmul(x, y, scale, value=factor, out=out)
    return torch.add(x, y, alpha=factor * scale, out=out)


def normal_like(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Standard normal noise of the shape of x."""
    return torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)


def choose(mask: torch.Tensor, new: Any, old: Any) -> Any:
    """Chain by chain, `new` where `mask` holds, else `old`: named tuples of tensors or None."""
    column = mask.unsqueeze(1)
    return new._make(
        None if a is None else torch.where(mask if a.ndim == 1 else column, a, b)
        for a, b in zip(new, old, strict=True)
    )


def judge(log_ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Acceptance probability, energy error and divergence, from the log of the ratio.

    What is not finite gets probability 0.
    """
    log_ratio = torch.nan_to_num(log_ratio, -math.inf, -math.inf, -math.inf)
    energy_error = -log_ratio
    return log_ratio.exp().clamp_max_(1.0), energy_error, energy_error > MAX_ENERGY_ERROR


def metropolis(
    state: State, proposal: State, log_ratio: torch.Tensor, rng: torch.Generator
) -> tuple[State, Info]:
    """Accept `proposal` with probability min(1, exp(log_ratio)), chain by chain.

    A ratio that is not finite is rejected. As it contains the log-density of the proposal, so is a
    proposal outside the support, or where the arithmetic overflows.
    """
    probability, energy_error, diverged = judge(log_ratio)
    uniform = torch.rand(
        probability.shape, generator=rng, dtype=probability.dtype, device=probability.device
    )
    accepted = uniform < probability
    return choose(accepted, proposal, state), Info(probability, accepted, energy_error, diverged)
