"""The geometric path from a proposal to an unnormalised distribution, and the moves along it."""

import math
from typing import Any

import torch

from skebm._typing import Distribution, Kernel, LogDensity
from skebm.samplers import geometric_path, mala, random_walk


class Path:
    """pi_b = q^(1 - b) p~^b, for b from 0 to 1.

    Parameters
    ----------
    log_density : callable
        (n, d) -> (n,), log p~.
    proposal : distribution
        q, with ``log_prob(x)`` and ``sample(n, rng)``.
    """

    def __init__(self, log_density: LogDensity, proposal: Distribution):
        if not callable(log_density):
            raise ValueError(f"log_density must be callable, got {log_density!r}.")
        if not (hasattr(proposal, "log_prob") and hasattr(proposal, "sample")):
            raise ValueError(
                f"proposal must have log_prob(x) and sample(n, rng), got {type(proposal).__name__}."
            )
        self.log_density, self.proposal = log_density, proposal

    def log_ratio(self, x: torch.Tensor) -> torch.Tensor:
        """log p~ - log q at the rows of x, (n, d) -> (n,) in float64; checked."""
        with torch.no_grad():
            target = _checked(self.log_density(x), x, "log_density").double()
            return target - _checked(self.proposal.log_prob(x), x, "proposal.log_prob").double()

    def at(self, b: float) -> LogDensity:
        """log pi_b as a callable."""

        def tempered(x):
            if b == 1:  # then q costs nothing
                return self.log_density(x)
            log_q = self.proposal.log_prob(x)
            return geometric_path(x.new_tensor(b, dtype=torch.float64), self.log_density(x), log_q)

        return tempered

    def kernel(self, x: torch.Tensor) -> Kernel:
        """MALA where both ends have a gradient at the rows of x, else a random walk."""
        for log_density in (self.log_density, self.proposal.log_prob):
            try:
                state = mala.init(x, log_density)
            except RuntimeError:  # what autograd raises where there is no graph
                return random_walk
            if not state.gradient[state.log_density.isfinite()].isfinite().all():
                return random_walk
        return mala

    def check_samples(self, samples: torch.Tensor, x: torch.Tensor) -> None:
        """Check samples of the model against draws x of the proposal."""
        if not isinstance(samples, torch.Tensor) or samples.ndim != 2 or len(samples) < 2:
            raise ValueError("samples must be a tensor of shape (m, d) with at least two rows.")
        if samples.shape[1] != x.shape[1]:
            raise ValueError(f"samples have {samples.shape[1]} columns, those of q {x.shape[1]}.")
        outside = int((~self.log_ratio(samples).isfinite()).sum())
        if outside:
            raise ValueError(
                f"log_density or proposal.log_prob is -inf at {outside} of {len(samples)} samples."
            )


def move(
    x: torch.Tensor,
    log_density: LogDensity,
    rng: torch.Generator,
    kernel: Kernel,
    n_moves: int,
    step_size: Any,
    scale_tril: torch.Tensor,
    options: dict[str, Any],
    *,
    adapt: bool = False,
) -> tuple[torch.Tensor, Any]:
    """Positions after `n_moves` steps, and the step size, adapted on the way if asked for."""

    def white(y):
        return log_density(y @ scale_tril.mT)

    y = torch.linalg.solve_triangular(scale_tril.mT, x, upper=True, left=False)
    state = kernel.init(y, white)
    for _ in range(n_moves):
        state, info = kernel.step(state, white, rng, step_size=step_size, **options)
        if adapt:
            acceptance = info.acceptance_probability.mean().item()
            step_size *= math.exp(acceptance - kernel.TARGET_ACCEPTANCE)
    return state.position @ scale_tril.mT, step_size


def _checked(values, x, name):
    if not isinstance(values, torch.Tensor) or values.shape != (len(x),):
        got = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise ValueError(f"{name} must return a tensor of shape ({len(x)},), got {got}.")
    bad = int((~(values < torch.inf)).sum())  # nan as well
    if bad:
        raise ValueError(f"{name} is nan or +inf at {bad} of {len(x)} points.")
    return values


def at_least(**counts: Any) -> None:
    """Check that integers are large enough: ``name=(value, least)``."""
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")
