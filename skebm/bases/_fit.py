"""Fitting a base: candidates side by side, and the stack of them by held-out likelihood."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from skebm._layout import Layout
from skebm._parallel import side_by_side
from skebm._random import spawn
from skebm._typing import Distribution

from ._candidates import CANDIDATES, _fit_flows, _Rows, _some, _train_quickly
from ._combine import StackedBase
from ._stacking import added, is_worth_it, stack

LOOK_STEPS = 150
"""Steps of training of autoregressive flows for a look."""

LOOK_ERRORS, FLOW_ERRORS = 1.5, 2.0
"""Standard errors that the held-out gain by a flow has to exceed, in the look and in the end."""

MAX_LOOK_ROWS = 2_000
"""Rows that the look at flows is trained, and judged, on."""


def fit_bases(
    x: torch.Tensor,
    weight: torch.Tensor,
    splits: Sequence[tuple[torch.Tensor, torch.Tensor]],
    candidates: dict[str, Any],
    rng: torch.Generator,
    progress: Callable[[str], None] = lambda text: None,
    n_jobs: int | None = 1,
    layout: Layout | None = None,
    flows: Sequence[str] = (),
) -> list[Distribution]:
    """Fit and stack the named candidates on every split.

    Parameters
    ----------
    x : Tensor of shape (n_samples, n_features), float64
        Standardised rows.
    weight : Tensor of shape (n_samples,), float64
    splits : list of (train, held_out) index tensors
    candidates : dict
        Name -> candidate, such as a part of `CANDIDATES`.
    rng : torch.Generator
    progress : callable, default=no report
        Called with the name of the candidate that is about to be fitted.
    n_jobs : int or None, default=1
        Candidates that are fitted side by side, for joblib.
    layout : Layout, default=None
        Of the rows; by default all columns are values.
    flows : sequence of str, default=()
        Names of flows, of which one is fitted too if a look at few rows says that it is worth it.

    Returns
    -------
    list of nn.Module, one per split
        `StackedBase` where more than one candidate earns a weight. The weights are shared by all
        splits and maximise the likelihood of the held-out rows (Smyth & Wolpert 1999).

    See Also
    --------
    stacking_weights : The weights of the stack.
    StackedBase : What is returned.
    fit_gaussian_mixture : Fits one mixture.

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import CANDIDATES, fit_bases
    >>> rng = torch.Generator().manual_seed(0)
    >>> x = torch.randn(300, 2, generator=rng, dtype=torch.float64)
    >>> rows = torch.arange(300)
    >>> splits = [(rows[:200], rows[200:]), (rows[100:], rows[:100])]
    >>> candidates = {name: CANDIDATES[name] for name in ("gaussian", "kde")}
    >>> bases = fit_bases(x, torch.ones(300).double(), splits, candidates, rng)
    >>> len(bases), bases[0].log_prob(x).shape
    (2, torch.Size([300]))
    """
    rows = _Rows(x, weight, Layout((), (), x.shape[1]) if layout is None else layout)
    held = torch.cat([own for _, own in splits])

    def fit_all(candidates, rng):
        pairs = zip(candidates.items(), spawn(rng, len(candidates)), strict=True)

        def arguments():
            for (name, candidate), own in pairs:
                progress(name)
                yield candidate, rows, splits, own

        return side_by_side(_fitted, arguments(), n_jobs)

    fitted = fit_all(candidates, rng)
    if len(fitted) == 1 and not flows:
        return fitted[0][0]
    least = [candidate.min_gain for candidate in candidates.values()]
    log_prob = torch.stack([column for _, column in fitted], dim=1)
    kept, weights = stack(log_prob, weight[held], least)
    if flows:
        stacked = (log_prob[:, kept] + weights.log()).logsumexp(1)
        progress("a look at flows")
        name = _most_promising(flows, rows, splits, stacked, rng)
        if name is not None:
            fitted += fit_all({name: CANDIDATES[name]}, rng)
            log_prob = torch.cat([log_prob, fitted[-1][1][:, None]], dim=1)
            if is_worth_it(
                added(stacked, log_prob[:, -1], weight[held])[1], weight[held], n_errors=FLOW_ERRORS
            ):
                kept, weights = _with_flow(log_prob, weight[held], least)
    distributions = [fitted[j][0] for j in kept]
    if len(distributions) == 1:
        return distributions[0]
    return [StackedBase(of_split, weights) for of_split in zip(*distributions, strict=True)]


def _with_flow(log_prob, sample_weight, min_gain):
    """Candidates that are kept beside a flow, the last one, as numbers, and all weights."""
    worth_it, _ = stack(log_prob, sample_weight, [*min_gain, 0.0])
    # what is dear has to be worth it beside the flow, too; the others cover what it does not
    others = [j for j, least in enumerate(min_gain) if least == 0 or j in worth_it]
    kept, weights = stack(log_prob[:, others], sample_weight, [0.0] * len(others))
    kept = [others[j] for j in kept]
    stacked = (log_prob[:, kept] + weights.log()).logsumexp(1)
    own, _ = added(stacked, log_prob[:, -1], sample_weight)
    return [*kept, len(min_gain)], torch.cat([(1.0 - own) * weights, own])


def _most_promising(flows, rows, splits, stacked, rng):
    """Name of the flow that adds most to a stack, in a short training on few rows, or None.

    Parameters
    ----------
    stacked : Tensor of shape (n_held,)
        Log-density of the stack at the held-out rows of all splits, one after another.
    """
    x, weight = rows.x, rows.weight
    # half of the folds judge, so that many rows do; the flows, too, have not seen copies of them
    n_judges = sum(len(own) for _, own in splits[: max(1, len(splits) // 2)])
    held = torch.cat([own for _, own in splits])
    some = _some(torch.arange(n_judges), MAX_LOOK_ROWS, rng)
    judges, stacked = held[some], stacked[some]
    is_seen = torch.ones(len(x), dtype=torch.bool)
    is_seen[held[:n_judges]] = False
    seen = _some(is_seen.nonzero().squeeze(1), MAX_LOOK_ROWS, rng)
    n_stopping = len(seen) // 8
    split = seen[n_stopping:], seen[:n_stopping]
    maps = [CANDIDATES[name].to_normal for name in flows]
    kind, splits = CANDIDATES[flows[0]].kind, [split] * len(flows)
    train = partial(_train_quickly, n_steps=LOOK_STEPS)
    candidates = _fit_flows(kind, maps, rows, splits, rng, train)
    gains = [added(stacked, q.log_prob(x[judges]), weight[judges])[1] for q in candidates]
    best = max(range(len(flows)), key=lambda j: weight[judges] @ gains[j])
    return flows[best] if is_worth_it(gains[best], weight[judges], n_errors=LOOK_ERRORS) else None


def _fitted(candidate, rows, splits, rng):
    """Distributions of a candidate, and their log-densities of all held-out rows."""
    distributions = candidate.fit_splits(rows, splits, rng)
    pairs = zip(distributions, splits, strict=True)
    return distributions, torch.cat([q.log_prob(rows.x[held]) for q, (_, held) in pairs])
