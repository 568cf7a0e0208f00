"""Training of normalizing flows by maximum likelihood, K of them side by side."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from skebm._engine import Budget, MemberBatches, train

from ._flows import build_flow
from ._stacked_flow import REACH, FlowBase, StackedFlow

FLOW_LEARNING_RATE = 1e-2
"""Of maximum likelihood: the cosine lets it be high, and high generalises better."""

FLOW_BUDGET, FLOW_PATIENCE = Budget(epochs=30, steps=2000, patience_steps=300), 20
"""Of the same: its length, and patience in epochs."""

JUDGED_AT_ONCE = 4096

JUDGED_EVERY = 10
"""Steps, about, from one look at the held-out likelihood to the next, where epochs are shorter."""


def train_flows(
    flow: StackedFlow,
    y: torch.Tensor,
    weight: torch.Tensor,
    splits: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    rng: torch.Generator,
    batch_size: int = 256,
    learning_rate: float = FLOW_LEARNING_RATE,
    budget: Budget | None = None,
    max_epochs: int | None = None,
    patience: int | None = None,
    effort: float = 1.0,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Train K flows in place, by maximum likelihood, to one pooled stopping time.

    Parameters
    ----------
    flow : StackedFlow
        Is on `device` afterwards.
    y : Tensor of shape (K, n, d)
        Rows as every flow sees them, Gaussianised or at least standardised. Those with a coordinate
        beyond 5 have no weight, unless all of the held-out rows are such.
    weight : Tensor of shape (n,)
    splits : list of K (train, held_out) index tensors
    rng : torch.Generator
        On the CPU. Seeds the batches.
    batch_size : int, default=256
        Rows of each flow.
    learning_rate : float, default=0.01
        Of AdamW, after a warm-up of 100 steps and with a cosine to zero.
    budget : Budget, optional
        Length, and patience in steps, where the next two do not say; by default 30 epochs, or as
        many as make 2,000 steps, and a patience of 300 steps.
    max_epochs : int, optional
    patience : int, optional
        Epochs without improvement of the held-out likelihood before stopping; by default 20, or
        more by the budget.
    effort : float, default=1.0
        Factor on the length that the budget gives.
    device : str or torch.device, default="cpu"
    progress : callable, optional
        ``progress(epoch, max_epochs)``.

    Raises
    ------
    DivergenceError
        When the likelihood is not a number any more.

    See Also
    --------
    fit_flow : Makes and fits one flow.
    build_flow : Makes what is trained here.

    Examples
    --------
    Two flows, each judged on the half that it does not learn from:

    >>> import torch
    >>> from skebm.bases import build_flow, train_flows
    >>> rng = torch.Generator().manual_seed(0)
    >>> y = torch.randn(200, 2, generator=rng)
    >>> y[:, 1] += y[:, 0] ** 2 - 1
    >>> one, two = torch.arange(200).split(100)
    >>> flow = build_flow("coupling", 2, 2, rng=rng)
    >>> train_flows(
    ...     flow, y.expand(2, -1, -1), torch.ones(200), [(one, two), (two, one)],
    ...     rng=rng, max_epochs=5,
    ... )
    >>> flow.member(1).log_prob(y).shape
    torch.Size([200])
    """
    weight = weight.double().cpu()
    # the log-density of one gross outlier, minus half of its square, would outweigh all other rows
    inside = (y.abs() <= REACH).all(-1).cpu()
    if not any((weight * w)[h].sum() > 0 for w, (_, h) in zip(inside, splits, strict=True)):
        inside = torch.ones_like(inside)
    within = weight * inside  # (K, n)
    flow.to(device)
    rows = y.where(inside[..., None].to(y.device), 0.0).float().to(device)
    batches = MemberBatches(
        (rows, (within / weight.mean()).float().to(device)),
        [train_rows for train_rows, _ in splits],
        batch_size=batch_size,
        rng=rng,
    )
    held = [r[h.to(device)] for r, (_, h) in zip(rows, splits, strict=True)]
    lengths = [len(r) for r in held]
    held = pad_sequence(held, batch_first=True)
    held_weight = torch.cat([w[h] for w, (_, h) in zip(within, splits, strict=True)])
    held_weight = held_weight / held_weight.sum()

    def loss(flow, batch):
        points, w = batch
        return -(w * flow.log_prob(points)).mean(1).sum()

    def evaluate(flow):
        parts = [flow.log_prob(c) for c in held.split(JUDGED_AT_ONCE, dim=1)]
        logs = torch.cat(parts, dim=1).cpu().double()
        logs = torch.cat([row[:n] for row, n in zip(logs, lengths, strict=True)])
        return (held_weight @ logs).item()

    budget = FLOW_BUDGET if budget is None else budget
    if max_epochs is None:
        max_epochs = math.ceil(effort * budget.max_epochs(None, len(batches)))
    evaluate_every = max(1, JUDGED_EVERY // len(batches)) if patience is None else 1
    if patience is None:
        patience = budget.patience(FLOW_PATIENCE, len(batches), evaluate_every)
    with torch.enable_grad():
        train(
            flow, loss, batches, evaluate, learning_rate=learning_rate, weight_decay=0.0,
            max_epochs=max_epochs, patience=patience, evaluate_every=evaluate_every, device=device,
            progress=progress and (lambda state: progress(state["epoch"], max_epochs)),
        )  # fmt: skip


def fit_flow(
    x: torch.Tensor,
    *,
    rng: torch.Generator,
    sample_weight: torch.Tensor | None = None,
    name: Any = "coupling",
    validation_fraction: float = 0.1,
    **options: Any,
) -> FlowBase:
    """Fit one normalizing flow by maximum likelihood, with early stopping on held-out rows.

    Parameters
    ----------
    x : Tensor of shape (n, d)
        Standardised, better Gaussianised columns.
    rng : torch.Generator
        On the CPU. Seeds parameters, split and batches.
    sample_weight : Tensor of shape (n,), optional
    name : "coupling" or what `ZukoFlows` takes, default="coupling"
    validation_fraction : float, default=0.1
    **options
        Passed on to `train_flows`.

    Returns
    -------
    FlowBase
        The moving average of the weights, in its best state on the held-out rows.

    Raises
    ------
    ValueError
        When no row of positive weight is left to learn from, or to judge by.

    See Also
    --------
    train_flows : Trains several flows side by side.
    FlowBase : What is returned.

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import fit_flow
    >>> rng = torch.Generator().manual_seed(0)
    >>> x = torch.randn(200, 2, generator=rng)
    >>> distribution = fit_flow(x, rng=rng, max_epochs=5)
    >>> distribution.sample(3, rng).shape
    torch.Size([3, 2])
    """
    n, d = x.shape
    n_validation = max(1, round(validation_fraction * n))
    if n <= n_validation:
        raise ValueError(f"validation_fraction={validation_fraction} of {n} rows leaves none.")
    flow = build_flow(name, d, rng=rng)
    weight = torch.ones(n) if sample_weight is None else sample_weight.detach()
    order = torch.randperm(n, generator=rng)
    split = order[n_validation:], order[:n_validation]
    if not all(weight[rows].sum() > 0 for rows in split):
        raise ValueError("sample_weight leaves no rows to learn from, or none to judge by.")
    train_flows(flow, x.detach()[None], weight, [split], rng=rng, **options)
    return FlowBase(flow)
