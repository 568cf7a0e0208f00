"""Fitting a base: candidates side by side, and the stack of them by held-out likelihood."""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from skebm._layout import Layout
from skebm._parallel import side_by_side
from skebm._random import spawn
from skebm._typing import Distribution

from ._candidates import CANDIDATES, Rows, fit_flows, subsample, train_quickly
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
    rows = Rows(x, weight, Layout((), (), x.shape[1]) if layout is None else layout)
    held = torch.cat([own for _, own in splits])

    def pieces(candidates, seeds):
        for (name, candidate), own in zip(candidates.items(), seeds, strict=True):
            progress(name)
            yield _fitted, candidate, rows, splits, own

    def first_pieces(seeds):
        if flows:  # first, because it takes longest
            progress("a look at flows")
            yield _look, flows, rows, splits, rng
        yield from pieces(candidates, seeds)

    fitted = side_by_side(operator.call, first_pieces(spawn(rng, len(candidates))), n_jobs)
    looked_at = fitted.pop(0) if flows else None
    if len(fitted) == 1 and not flows:
        return fitted[0][0]
    least = [candidate.min_gain for candidate in candidates.values()]
    log_prob = torch.stack([column for _, column in fitted], dim=1)
    kept, weights = stack(log_prob, weight[held], least)
    if looked_at is not None:
        stacked = (log_prob[:, kept] + weights.log()).logsumexp(1)
        rng, judges, of_flows = looked_at
        name = _most_promising(flows, judges, of_flows, stacked, weight[held])
        if name is not None:
            more = pieces({name: CANDIDATES[name]}, spawn(rng, 1))
            fitted += side_by_side(operator.call, more, n_jobs)
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


def _look(flows, rows, splits, rng):
    """Train flows for a short time, on few rows.

    Returns
    -------
    rng : torch.Generator
        The one that was given, or a copy that has drawn in its place.
    judges : Tensor of shape (n_judges,)
        Places among the held-out rows of all splits, one after another.
    log_prob : Tensor of shape (n_flows, n_judges)
        Log-densities of the flows at these rows, which they have not seen.
    """
    # half of the folds judge, so that many rows do; the flows, too, have not seen copies of them
    n_judges = sum(len(own) for _, own in splits[: max(1, len(splits) // 2)])
    held = torch.cat([own for _, own in splits])
    judges = subsample(torch.arange(n_judges), MAX_LOOK_ROWS, rng)
    is_seen = torch.ones(len(rows.x), dtype=torch.bool)
    is_seen[held[:n_judges]] = False
    seen = subsample(is_seen.nonzero().squeeze(1), MAX_LOOK_ROWS, rng)
    n_stopping = len(seen) // 8
    split = seen[n_stopping:], seen[:n_stopping]
    maps = [CANDIDATES[name].to_normal for name in flows]
    kind, splits = CANDIDATES[flows[0]].kind, [split] * len(flows)
    train = partial(train_quickly, n_steps=LOOK_STEPS)
    trained = fit_flows(kind, maps, rows, splits, rng, train)
    return rng, judges, torch.stack([q.log_prob(rows.x[held[judges]]) for q in trained])


def _most_promising(flows, judges, log_prob, stacked, weight):
    """Name of the flow that adds most to a stack, or None.

    Parameters
    ----------
    flows : sequence of str
    judges, log_prob : Tensors
        As `_look` returns them.
    stacked, weight : Tensors of shape (n_held,)
        Log-density of the stack at all held-out rows, and their weights.
    """
    stacked, weight = stacked[judges], weight[judges]
    gains = [added(stacked, own, weight)[1] for own in log_prob]
    best = max(range(len(flows)), key=lambda j: weight @ gains[j])
    return flows[best] if is_worth_it(gains[best], weight, n_errors=LOOK_ERRORS) else None


def _fitted(candidate, rows, splits, rng):
    """Distributions of a candidate, and their log-densities of all held-out rows."""
    distributions = candidate.fit_splits(rows, splits, rng)
    pairs = zip(distributions, splits, strict=True)
    return distributions, torch.cat([q.log_prob(rows.x[held]) for q, (_, held) in pairs])
