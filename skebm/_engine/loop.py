"""Training of a module, by one player or two."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MAX_GRADIENT_NORM = 2.0


@dataclass(frozen=True)
class Opponent:
    """The second player of a game: a part of the module that raises the loss.

    Attributes
    ----------
    module : nn.Module
        Part of the module that is trained; the rest of it lowers the loss.
    learning_rate : float
    plays : callable, optional
        ``plays()`` -> bool, asked once per step: whether the opponent takes this one, too. It
        always does by default.
    n_solo_steps : int, default=0
        Steps that it takes alone before each step of the game.
    solo_loss : callable, optional
        ``solo_loss(module)`` -> scalar tensor: what it raises in those, on rows of its own choice.
    """

    module: nn.Module
    learning_rate: float
    plays: Callable[[], bool] = lambda: True
    n_solo_steps: int = 0
    solo_loss: Callable[[nn.Module], Tensor] | None = None


def check_callbacks(callbacks: Sequence | None, *, judged: bool) -> None:
    """Refuse callbacks that are none, or that could not do here what skorch documents.

    Parameters
    ----------
    callbacks : sequence of skorch callbacks or None
        Instances, classes, or pairs of a name and one of these, as skorch takes them.
    judged : bool
        Whether held-out rows are judged in training, so that there is a ``valid_loss``.

    Raises
    ------
    ValueError
        That names the callback, and says why.
    """
    if callbacks:
        from .net import refuse_callbacks  # and with it skorch, which takes a while

        refuse_callbacks(callbacks, judged)


def train(
    module: nn.Module,
    loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor],
    batches: Iterable[tuple[Tensor, ...]],
    evaluate: Callable[[nn.Module], float] | None = None,
    *,
    learning_rate: float,
    weight_decay: float,
    max_epochs: int,
    patience: int | None = None,
    evaluate_every: int = 1,
    max_gradient_norm: float = MAX_GRADIENT_NORM,
    callbacks: Sequence[Any] | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[dict], None] | None = None,
    opponent: Opponent | None = None,
) -> dict:
    """Train a module in place and leave its best state in it, in evaluation mode.

    AdamW with a warm-up of 100 steps (a tenth of a shorter training) and a cosine to zero, with
    clipped gradients. What is evaluated and kept is the moving average of the weights (0.99), not
    the weights of the last step. The initial state is evaluated too: with f = 0 it is "no tilt",
    and it is kept when nothing beats it.

    Parameters
    ----------
    module : nn.Module
        Parameters called ``log_partition``, at any depth, are exempt from weight decay.
    loss : callable
        ``loss(module, batch)`` -> scalar tensor.
    batches : sized iterable of tuples of tensors
        Iterated afresh each epoch, such as :class:`MemberBatches`.
    evaluate : callable, optional
        ``evaluate(module)`` -> held-out gain over the base in nats, larger is better. Called in
        evaluation mode, without gradients. Without it training runs to ``max_epochs``
        and the last state is kept.
    learning_rate, weight_decay : float
        Of AdamW.
    max_epochs : int
        Passes over the data; with 0 the initial state is judged and kept.
    patience : int, optional
        Stop after this many epochs without a better evaluation; never by default.
    evaluate_every : int, default=1
        Epochs from one evaluation to the next; more than one when epochs are very short. It is one
        where a callback watches ``valid_loss``.
    max_gradient_norm : float, default=2.0
        Where gradients are clipped. Below their usual norm every step counts alike, however large
        its gradient: that biases the minimum where gradients have heavy tails.
    callbacks : list of skorch callbacks, optional
        The user's, which `check_callbacks` lets pass. One that raises KeyboardInterrupt at the end
        of an epoch, as skorch's own EarlyStopping does, ends the training; the same from the
        keyboard is passed on.
    device : str or torch.device, default="cpu"
        The module is moved there; batches must be there.
    progress : callable, optional
        Called after each epoch with a dict: epoch, max_epochs, train_loss, validation_gain,
        best_epoch, best_gain.
    opponent : Opponent, optional
        With one, training is a game for the loss: both players take their gradient from the same
        backward pass, each with an optimiser and a clipped norm of its own.

    Returns
    -------
    dict
        Arrays of shape (n_epochs + 1,): ``epoch``, ``train_loss``, ``validation_gain``. Row 0 is
        the initial state (no train loss); gains are NaN where none was measured. And ``log``, the
        history of skorch as a list of dicts, one per epoch, with its ``batches`` where there are
        callbacks.

    Raises
    ------
    DivergenceError
        When the loss or the gain is not a number any more.
    """
    from .net import EngineNet  # and with it skorch, which takes a while

    net = EngineNet(
        module,
        loss,
        batches,
        evaluate,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        max_epochs=max_epochs,
        patience=patience,
        evaluate_every=evaluate_every,
        max_gradient_norm=max_gradient_norm,
        callbacks=callbacks,
        device=device,
        progress=progress,
        opponent=opponent,
    )
    # not net.fit, which swallows a KeyboardInterrupt and calls a half-trained net fitted
    net.initialize()
    net.notify("on_train_begin", X=None, y=None)
    net.fit_loop(None)
    net.notify("on_train_end", X=None, y=None)
    return {
        "epoch": np.arange(len(net.history) + 1),
        "train_loss": np.array([math.nan, *(row["train_loss"] for row in net.history)]),
        "validation_gain": np.array(
            [net.initial_gain, *(row["validation_gain"] for row in net.history)]
        ),
        # without the time that epochs took, so that equal fits are equal
        "log": [{name: v for name, v in row.items() if name != "dur"} for row in net.history],
    }
