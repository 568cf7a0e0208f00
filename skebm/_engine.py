"""The engine: minibatches of tensors, and a training loop with skorch inside.

The only file that imports skorch, and only when training starts. skorch brings the history and the
callbacks that users already have; the loop itself is lean (no row-by-row collation, no host sync
per step), so that a step costs what a bare torch loop costs.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from skebm._random import spawn
from skebm.exceptions import DivergenceError

__all__ = ["MemberBatches", "Opponent", "train"]

WARM_UP_STEPS = 100
AVERAGING_DECAY = 0.99
MAX_GRADIENT_NORM = 2.0
MAX_BLOCK = 2**22  # elements of one tensor gathered ahead: bounds the memory at large n
WHAT_TO_LOWER = "lower learning_rate (by a factor of 3 to 10), or scale down your module's output."


class MemberBatches:
    """Minibatches for K members at once, member k from its own rows.

    Every tensor has members on its leading axis; what members share is expanded
    (``z.expand(K, n, d)`` copies nothing). Rows are permuted once per epoch and member, gathered in
    blocks and sliced. All batches of an epoch have one size, the one nearest to ``batch_size`` that
    divides the rows evenly; the few rows left over differ from epoch to epoch.

    Parameters
    ----------
    data : tuple of tensors of shape (K, n, ...), or callable
        Per-row tensors: coordinates, and offsets or weights if the loss wants them. A callable is
        called with ``generator`` at the start of every epoch and returns such a tuple
        (dequantisation draws a fresh jitter there).
    rows : sequence of K integer tensors
        The rows of each member.
    noise : tuple of tensors of shape (K, m, ...), default=()
        Pools of noise, drawn with replacement.
    batch_size : int
        Data rows per member and batch.
    noise_ratio : float, default=1.0
        Noise samples per data row.
    generator : torch.Generator
        On the CPU whatever the device of the tensors, so that the batches are the same everywhere.
        Seeds one stream per member, and is handed to `data`.

    Yields
    ------
    tuple of tensors
        ``(*data, *noise)``, cut to (K, B, ...) and (K, noise_ratio * B, ...).
    """

    def __init__(
        self,
        data: tuple[Tensor, ...] | Callable[[torch.Generator], tuple[Tensor, ...]],
        rows: Sequence[Tensor],
        noise: tuple[Tensor, ...] = (),
        *,
        batch_size: int,
        noise_ratio: float = 1.0,
        generator: torch.Generator,
    ):
        self.data, self.rows, self.noise = data, rows, noise
        self.generator, self.generators = generator, spawn(generator, len(rows))
        n_rows = min(len(r) for r in rows)
        self.n_batches = max(1, round(n_rows / batch_size))
        self.batch_size = n_rows // self.n_batches
        self.n_noise = max(1, round(noise_ratio * self.batch_size))

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        data = self.data(self.generator) if callable(self.data) else self.data
        n_members, shape = len(self.rows), (self.n_batches, self.batch_size)
        order = torch.stack(
            [
                r[torch.randperm(len(r), generator=own)[: math.prod(shape)]]
                for r, own in zip(self.rows, self.generators, strict=True)
            ]
        ).view(n_members, *shape)
        n_gathered = max(t[0, 0].numel() for t in data + self.noise) * n_members
        n_gathered *= max(self.batch_size, self.n_noise)
        for chosen in order.split(max(1, MAX_BLOCK // n_gathered), dim=1):
            gathered = [_gather(tensor, chosen) for tensor in data]
            if self.noise:
                pool_size, size = self.noise[0].shape[1], (chosen.shape[1], self.n_noise)
                drawn = torch.stack(
                    [torch.randint(pool_size, size, generator=own) for own in self.generators]
                )
                gathered += [_gather(tensor, drawn) for tensor in self.noise]
            yield from zip(*gathered, strict=True)


def _gather(tensor: Tensor, index: Tensor) -> Sequence[Tensor]:
    """Rows ``index`` (K, n_batches, B) of a tensor (K, n, ...), as n_batches of (K, B, ...)."""
    n_members, n_rows = tensor.shape[:2]
    index = index.transpose(0, 1).to(tensor.device)
    # one flat axis: index_select is four times as fast as indexing with two tensors
    if tensor.stride(0) == 0:
        flat, flat_index = tensor[0], index
    else:
        first_rows = n_rows * torch.arange(n_members, device=tensor.device).unsqueeze(-1)
        flat, flat_index = tensor.flatten(0, 1), index + first_rows
    rows = flat.index_select(0, flat_index.flatten())
    return rows.view(*index.shape, *tensor.shape[2:]).unbind()


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
    callbacks: Sequence | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[dict], None] | None = None,
    opponent: Opponent | None = None,
) -> dict[str, np.ndarray]:
    """Train a module in place and leave its best state in it, in evaluation mode.

    AdamW with a warm-up of 100 steps (a tenth of a shorter training) and a cosine to zero, with
    clipped gradients. What is evaluated and kept is the moving average of the weights (.99), not
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
        Epochs from one evaluation to the next; more than one when epochs are very short.
    max_gradient_norm : float, default=2.0
        Where gradients are clipped. Below their usual norm every step counts alike, however large
        its gradient: that biases the minimum where gradients have heavy tails.
    callbacks : list of skorch callbacks, optional
        The user's. A callback that raises KeyboardInterrupt at the end of an epoch, as skorch's own
        EarlyStopping does, ends the training; the same from the keyboard is passed on.
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
    dict of arrays of shape (n_epochs + 1,)
        ``epoch``, ``train_loss``, ``validation_gain``. Row 0 is the initial state (no train loss);
        gains are NaN where none was measured.

    Raises
    ------
    DivergenceError
        When the loss or the gain is not a number any more.
    """
    net = _net_class()(
        module,
        criterion=nn.Identity(),
        optimizer=torch.optim.AdamW,
        optimizer__fused=True,
        optimizer__weight_decay=weight_decay,
        optimizer__param_groups=[("*log_partition", {"weight_decay": 0.0})],
        lr=learning_rate,
        max_epochs=max_epochs,
        train_split=None,
        callbacks=list(callbacks or []),
        verbose=0,
        device=device,
    )
    net.loss, net.batches, net.evaluate, net.progress = loss, batches, evaluate, progress
    net.patience, net.evaluate_every, net.opponent = patience, evaluate_every, opponent
    net.max_gradient_norm = max_gradient_norm
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
    }


class _Player:
    """An optimiser with clipped gradients, a warm-up and a cosine.

    The last two are factors on the rates in force: a user's scheduler keeps its say. The warm-up
    counts the player's own steps, the cosine those of the training: whoever sits out now and then
    ends with everybody else.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, n_steps: int, max_gradient_norm: float):
        self.optimizer, self.max_gradient_norm = optimizer, max_gradient_norm
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.n_warm_up = max(1, min(WARM_UP_STEPS, n_steps // 10))
        self.n_taken, self.factor = 0, 1.0

    def take_step(self, progress: float) -> None:
        """Step by the gradients in place; `progress` of the training is in [0, 1)."""
        nn.utils.clip_grad_norm_(self.parameters, self.max_gradient_norm)
        self.n_taken += 1
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        factor = min(1.0, self.n_taken / self.n_warm_up) * cosine
        for group in self.optimizer.param_groups:
            group["lr"] *= factor / self.factor
        self.factor = factor
        self.optimizer.step()


class _AveragedWeights:
    """Moving average of a module's parameters, swapped in to be evaluated and kept."""

    def __init__(self, module: nn.Module):
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.averages = [p.detach().clone() for p in self.parameters]
        self.n_updates = 0

    def update(self) -> None:
        # a short memory at first, so that the initial weights are soon forgotten
        decay = min(AVERAGING_DECAY, (self.n_updates + 1) / (self.n_updates + 10))
        self.n_updates += 1
        torch._foreach_lerp_(self.averages, [p.data for p in self.parameters], 1 - decay)

    def swap(self) -> None:
        for i, parameter in enumerate(self.parameters):
            parameter.data, self.averages[i] = self.averages[i], parameter.data


@functools.cache
def _net_class() -> type:
    """The private NeuralNet, made on first use: importing skorch takes a while."""
    from skorch import NeuralNet

    class EngineNet(NeuralNet):
        """skorch with our loop: the objective is the step, the held-out gain the validation."""

        def get_default_callbacks(self):
            return []

        def get_all_learnable_params(self):
            """Yield what the first player learns: the optimiser is made of it."""
            theirs = set() if self.opponent is None else set(self.opponent.module.parameters())
            for name, parameter in super().get_all_learnable_params():
                if parameter not in theirs:
                    yield name, parameter

        def fit_loop(self, X, y=None, epochs=None, **fit_params):
            self.n_steps, self.n_done = self.max_epochs * len(self.batches), 0
            players = [_Player(self.optimizer_, self.n_steps, self.max_gradient_norm)]
            if self.opponent is not None:
                optimizer = torch.optim.AdamW(
                    self.opponent.module.parameters(),
                    lr=self.opponent.learning_rate,
                    weight_decay=0.0,
                    fused=True,
                )
                players.append(_Player(optimizer, self.n_steps, self.max_gradient_norm))
            self.players = players
            self.averaged = _AveragedWeights(self.module_)
            self.best_epoch, self.best_gain, self.best_state = 0, -math.inf, None
            self.initial_gain = self.latest_gain = self.measure_gain(0)
            first_epochs = players[0].n_warm_up / len(self.batches)  # no verdict before the warm-up
            datasets = {"dataset_train": self.batches, "dataset_valid": None}
            for epoch in range(1, self.max_epochs + 1):
                self.notify("on_epoch_begin", **datasets)
                self.run_single_epoch(self.batches, True, "train", self.train_step_single)
                self.validation_step(epoch)
                try:
                    self.notify("on_epoch_end", **datasets)
                except KeyboardInterrupt:  # how skorch's callbacks say "enough"
                    break
                waited = epoch - max(self.best_epoch, first_epochs)
                if self.patience is not None and waited >= self.patience:
                    break
            self._set_training(False)
            if self.best_state is None:
                self.averaged.swap()
            else:
                self.module_.load_state_dict(self.best_state)
            return self

        def run_single_epoch(self, iterator, training, prefix, step_fn, **fit_params):
            self._set_training(training)
            total = torch.zeros((), device=self.device)
            for batch in iterator:
                # bookkeeping per batch costs as much as a small step: only when somebody listens
                if self.callbacks_:
                    self.notify("on_batch_begin", batch=batch, training=training)
                progress = self.n_done / self.n_steps
                self.n_done += 1
                if self.opponent is not None:
                    for _ in range(self.opponent.n_solo_steps):
                        self.players[1].optimizer.zero_grad()
                        self.opponent.solo_loss(self.module_).backward()
                        self.raise_by_opponent(progress)
                for player in self.players:
                    player.optimizer.zero_grad()
                step = step_fn(batch)
                if self.callbacks_:
                    named = list(self.get_all_learnable_params())
                    self.notify("on_grad_computed", named_parameters=named, batch=batch)
                self.players[0].take_step(progress)
                if self.opponent is not None and self.opponent.plays():
                    self.raise_by_opponent(progress)
                self.averaged.update()
                total += step["loss"]
                if self.callbacks_:
                    self.history.record_batch(f"{prefix}_loss", step["loss"].item())
                    self.history.record_batch(f"{prefix}_batch_size", batch[0].shape[1])
                    self.notify("on_batch_end", batch=batch, training=training, **step)
            mean = total.item() / len(iterator)
            if not math.isfinite(mean):
                raise DivergenceError(f"The training loss became {mean}; {WHAT_TO_LOWER}")
            self.history.record(f"{prefix}_loss", mean)
            self.history.record(f"{prefix}_batch_count", len(iterator))

        def raise_by_opponent(self, progress):
            for parameter in self.players[1].parameters:
                parameter.grad.neg_()
            self.players[1].take_step(progress)

        def train_step_single(self, batch, **fit_params):
            loss = self.loss(self.module_, batch)
            loss.backward()
            return {"loss": loss.detach(), "y_pred": None}

        def validation_step(self, epoch, **fit_params):
            due = epoch % self.evaluate_every == 0 or epoch == self.max_epochs
            gain = self.measure_gain(epoch) if due else math.nan
            self.history.record("validation_gain", gain)
            if self.evaluate is not None:  # under the names that skorch's callbacks watch
                self.latest_gain = gain if due else self.latest_gain
                self.history.record("valid_loss", -self.latest_gain)
                self.history.record("valid_loss_best", self.best_epoch == epoch)
            if self.progress is not None:
                self.progress(
                    {
                        "epoch": epoch,
                        "max_epochs": self.max_epochs,
                        "train_loss": self.history[-1, "train_loss"],
                        "validation_gain": gain,
                        "best_epoch": self.best_epoch,
                        "best_gain": self.best_gain,
                    }
                )

        def measure_gain(self, epoch):
            """Held-out gain of the averaged weights; the best state so far is remembered."""
            if self.evaluate is None:
                return math.nan
            self._set_training(False)
            self.averaged.swap()
            with torch.no_grad():
                gain = float(self.evaluate(self.module_))
            if math.isnan(gain):
                raise DivergenceError(f"The held-out gain became NaN; {WHAT_TO_LOWER}")
            if gain > self.best_gain:
                self.best_epoch, self.best_gain = epoch, gain
                state = self.module_.state_dict()
                self.best_state = {name: tensor.clone() for name, tensor in state.items()}
            self.averaged.swap()
            return gain

    return EngineNet
