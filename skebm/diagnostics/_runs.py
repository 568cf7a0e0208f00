"""Runs of chains at a glance, and for ArviZ."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from skebm.samplers import Run

from ._chains import effective_sample_size, split_r_hat
from ._draws import MIN_DRAWS, as_draws


class RunSummary(NamedTuple):
    """What there is to say of a run of chains at a glance; `str` of it is a small table.

    Attributes
    ----------
    n_draws, n_chains, n_columns : int
        Shape of the draws that were kept.
    acceptance_rate : float
        Mean over chains and steps.
    acceptance_range : tuple of two float
        Rates of the chains that accept least and most.
    n_diverged : int
        Diverged proposals of all chains.
    step_size : float, Tensor or None
        As adapted.
    swap_rate : float or None
        Of parallel tempering: the smallest rate of exchange between neighbouring temperatures.
    ess_bulk, ess_tail : float
        Smallest :func:`effective_sample_size` of a column.
    r_hat : float
        Largest :func:`split_r_hat` of a column.

    See Also
    --------
    summarize : Makes it of a run.

    Examples
    --------
    >>> from skebm.diagnostics import RunSummary
    >>> print(RunSummary(500, 4, 2, 0.57, (0.55, 0.6), 0, 1.2, None, 801.0, 950.0, 1.003))
    500 draws x 4 chains x 2 columns
    acceptance   0.57 (0.55 to 0.60 over chains)
    divergences  0
    step size    1.2
    ESS          bulk 801, tail 950 (worst column)
    R-hat        1.003 (worst column)
    """

    n_draws: int
    n_chains: int
    n_columns: int
    acceptance_rate: float
    acceptance_range: tuple[float, float]
    n_diverged: int
    step_size: float | torch.Tensor | None
    swap_rate: float | None
    ess_bulk: float
    ess_tail: float
    r_hat: float

    def __str__(self) -> str:
        lowest, highest = self.acceptance_range
        lines = [
            f"{self.n_draws:,} draws x {self.n_chains:,} chains x {self.n_columns:,} columns",
            f"acceptance   {self.acceptance_rate:.2f} ({lowest:.2f} to {highest:.2f} over chains)",
            f"divergences  {self.n_diverged:,}",
        ]
        if self.step_size is not None:
            sizes = torch.as_tensor(self.step_size)
            ends = sorted({f"{sizes.min():.3g}", f"{sizes.max():.3g}"}, key=float)
            lines.append(f"step size    {' to '.join(ends)}")
        if self.swap_rate is not None:
            lines.append(f"exchanges    {self.swap_rate:.2f} (worst pair of temperatures)")
        lines += [
            f"ESS          bulk {self.ess_bulk:,.0f}, tail {self.ess_tail:,.0f} (worst column)",
            f"R-hat        {self.r_hat:.3f} (worst column)",
        ]
        return "\n".join(lines)


def summarize(run: Run) -> RunSummary:
    """Acceptance, divergences, effective sample size and R-hat of a run of chains.

    Parameters
    ----------
    run : Run
        From :func:`skebm.samplers.run`, with ``n_keep`` of at least 4; several hundred for
        figures worth reading.

    Returns
    -------
    RunSummary
        Its `ess_bulk`, `ess_tail` and `r_hat` are nan if a column never changed.

    Raises
    ------
    ImportError
        Without arviz-stats, an optional dependency: ``pip install "skebm[diagnostics]"``.
    ValueError
        For a run that kept fewer than 4 draws.

    See Also
    --------
    RunSummary : What is returned.
    skebm.samplers.run : Runs chains.

    Examples
    --------
    >>> import torch
    >>> from skebm.diagnostics import summarize
    >>> from skebm.samplers import mala, run
    >>> def log_density(x):
    ...     return -0.5 * (x**2).sum(1)
    >>> rng = torch.Generator().manual_seed(0)
    >>> result = run(
    ...     mala, torch.randn(4, 2, generator=rng), log_density, rng,
    ...     n_steps=1000, n_burn_in=200, n_keep=500, step_size=1.0,
    ... )
    >>> print(summarize(result))
    500 draws x 4 chains x 2 columns
    acceptance   0...
    divergences  0
    step size    1...
    ESS          bulk ..., tail ... (worst column)
    R-hat        1.0... (worst column)
    """
    if len(run.samples) < MIN_DRAWS:
        raise ValueError(
            f"run must hold at least {MIN_DRAWS} draws per chain, got n_keep={len(run.samples)}."
        )
    n_draws, n_chains, n_columns = run.samples.shape
    return RunSummary(
        n_draws,
        n_chains,
        n_columns,
        run.acceptance_rate,
        (run.acceptance_rates.min().item(), run.acceptance_rates.max().item()),
        int(run.n_diverged.sum()),
        run.step_size,
        None if run.swap_rates is None else run.swap_rates.min().item(),
        float(np.min(effective_sample_size(run.samples))),
        float(np.min(effective_sample_size(run.samples, "tail"))),
        float(np.max(split_r_hat(run.samples))),
    )


def to_datatree(samples: Run | ArrayLike, names: Sequence[str] | None = None) -> Any:
    """Draws as the ``DataTree`` that ArviZ takes, for its plots, summaries and files.

    Parameters
    ----------
    samples : Run, array-like or Tensor of shape (n_draws, n_chains) or (n_draws, n_chains, d)
        At least 4 draws.
    names : sequence of d str, optional
        Names of the columns; None takes x0, x1, ...

    Returns
    -------
    xarray.DataTree
        Its group `posterior` (ArviZ's word for draws of whatever distribution) holds `x` with
        dimensions (chain, draw, feature), float64. Of a run, `sample_stats` holds `acceptance_rate`
        and `n_diverged` of every chain; what happened in single steps is not kept.

    Raises
    ------
    ImportError
        Without arviz-base, an optional dependency: ``pip install "skebm[arviz]"``.
    ValueError
        For draws that are too few, of another shape or not finite, and for `names` that do not
        fit.

    See Also
    --------
    summarize : A summary without ArviZ's tables.
    skebm.samplers.run : Runs chains.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm.diagnostics import to_datatree
    >>> x = np.random.default_rng(0).normal(size=(100, 4, 2))
    >>> data = to_datatree(x, names=["width", "height"])
    >>> dict(data.posterior.sizes)
    {'chain': 4, 'draw': 100, 'feature': 2}
    """
    try:
        import xarray
        from arviz_base import from_dict
    except ImportError as error:
        raise ImportError('to_datatree needs arviz-base: pip install "skebm[arviz]"') from error
    run = samples if isinstance(samples, Run) else None
    x, _ = as_draws(samples.samples if isinstance(samples, Run) else samples)
    d = x.shape[2]
    names = [f"x{j}" for j in range(d)] if names is None else list(names)
    if len(names) != d:
        raise ValueError(f"names must hold one name for each of {d} columns, got {len(names)}.")
    data = from_dict(
        {"posterior": {"x": x.swapaxes(0, 1).astype(np.float64)}},
        coords={"feature": names},
        dims={"x": ["feature"]},
    )
    if run is not None:
        stats = {
            "acceptance_rate": ("chain", run.acceptance_rates.double().cpu().numpy()),
            "n_diverged": ("chain", run.n_diverged.cpu().numpy()),
        }
        data["sample_stats"] = xarray.Dataset(stats, {"chain": data.posterior.chain})
    return data
