"""The geometric path from a proposal to an unnormalised law, and the moves along it."""

import torch

from skebm.samplers import mala, random_walk


class Path:
    """pi_b = q^(1 - b) p~^b, for b from 0 to 1.

    Parameters
    ----------
    log_density : callable
        (n, d) -> (n,), log p~.
    proposal : law
        q, with ``log_prob(x)`` and ``sample(n, generator)``.
    """

    def __init__(self, log_density, proposal):
        if not callable(log_density):
            raise ValueError(f"log_density must be callable, got {log_density!r}.")
        if not (hasattr(proposal, "log_prob") and hasattr(proposal, "sample")):
            raise ValueError(
                "proposal must have log_prob(x) and sample(n, generator), got "
                f"{type(proposal).__name__}."
            )
        self.log_density, self.proposal = log_density, proposal

    def log_ratio(self, x):
        """log p~ - log q at the rows of x, (n, d) -> (n,) in float64; checked."""
        with torch.no_grad():
            target = _checked(self.log_density(x), x, "log_density").double()
            return target - _checked(self.proposal.log_prob(x), x, "proposal.log_prob").double()

    def at(self, b):
        """log pi_b as a callable."""

        def tempered(x):
            if b == 1:  # 0 * -inf would be nan outside the support of q
                return self.log_density(x)
            return (1 - b) * self.proposal.log_prob(x) + b * self.log_density(x)

        return tempered

    def kernel(self, x):
        """MALA where both ends have a gradient at the rows of x, else a random walk."""
        for log_density in (self.log_density, self.proposal.log_prob):
            try:
                state = mala.init(x, log_density)
            except RuntimeError:  # what autograd raises where there is no graph
                return random_walk
            if not state.gradient[state.log_density.isfinite()].isfinite().all():
                return random_walk
        return mala


def _checked(values, x, name):
    if not isinstance(values, torch.Tensor) or values.shape != (len(x),):
        got = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise ValueError(f"{name} must return a tensor of shape ({len(x)},), got {got}.")
    bad = int((~(values < torch.inf)).sum())  # nan as well
    if bad:
        raise ValueError(f"{name} is nan or +inf at {bad} of {len(x)} points.")
    return values


def at_least(**counts):
    """Check that integers are large enough: ``name=(value, least)``."""
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")
