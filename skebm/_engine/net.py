"""The training loop as a net of skorch: the only file that imports it."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from skorch import NeuralNet
from skorch.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    InputShapeSetter,
    TrainEndCheckpoint,
)
from skorch.callbacks.scoring import ScoringBase
from torch import nn

from skebm._engine import Opponent
from skebm.exceptions import DivergenceError

from .steps import AveragedWeights, Player

WHAT_TO_LOWER = (
    "lower the learning rate (by a factor of 3 to 10), for an energy by energy_model=Network("
    "learning_rate=...), or scale down your module's output."
)


def refuse_callbacks(callbacks: Sequence[Any], judged: bool) -> None:
    """Raise for callbacks that are none or cannot work; see `check_callbacks`."""
    for item in callbacks:
        callback = _without_name(item)
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, Callback):
            raise ValueError(f"callbacks must hold callbacks of skorch, got {item!r}.")
        why = _why_not(callback, kind, judged)
        if why is not None:
            raise ValueError(f"callbacks: {kind.__name__} {why}")


def _without_name(item):
    named = isinstance(item, tuple | list) and len(item) == 2
    return item[1] if named else item


def _monitor(callback):
    """What in the history a callback watches, "" if nothing."""
    if isinstance(callback, type) and issubclass(callback, Checkpoint | EarlyStopping):
        callback = callback()  # skorch makes it with its defaults
    monitor = getattr(callback, "monitor", None)
    return monitor if isinstance(monitor, str) else "valid_" if callable(monitor) else ""


def _why_not(callback, kind, judged):
    """Why a callback could not do what skorch documents, or None."""
    if issubclass(kind, ScoringBase):
        return (
            "scores predictions of rows X, and an energy predicts nothing. The held-out gain is "
            "in the history as minus valid_loss; for other scores write a callback with "
            "on_epoch_end."
        )
    if issubclass(kind, InputShapeSetter):
        return "reads the shape of X, which a module is given here as n_features."
    if issubclass(kind, Checkpoint | TrainEndCheckpoint):
        if getattr(callback, "load_best", False):
            return "must have load_best=False: the state that is best on held-out rows is kept."
        if getattr(callback, "f_pickle", None) is not None:
            return "must have f_pickle=None: a net in training cannot be pickled; take f_params."
    monitor = _monitor(callback)
    if not judged and monitor.startswith("valid_") and monitor != "valid_":
        return (
            f"watches {monitor!r}, but patience=None judges nothing on held-out rows. Set patience "
            f'(a large one never stops), or monitor="{monitor.replace("valid_", "train_")}".'
        )
    return None


class EngineNet(NeuralNet):
    """skorch with our loop: the objective is the step, the held-out gain the validation.

    Parameters are those of :func:`skebm._engine.train`.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable,
        batches: Any,
        evaluate: Callable | None,
        *,
        learning_rate: float,
        weight_decay: float,
        max_epochs: int,
        patience: int | None,
        evaluate_every: int,
        max_gradient_norm: float,
        callbacks: Sequence[Any] | None,
        device: str | torch.device,
        progress: Callable | None,
        opponent: Opponent | None,
    ):
        super().__init__(
            module,
            criterion=nn.Identity(),
            optimizer=torch.optim.AdamW,  # pyright: ignore[reportArgumentType]
            optimizer__fused=True,
            optimizer__weight_decay=weight_decay,
            optimizer__param_groups=[("*log_partition", {"weight_decay": 0.0})],
            lr=learning_rate,
            max_epochs=max_epochs,
            train_split=None,  # pyright: ignore[reportArgumentType]
            callbacks=list(callbacks or []),
            # what callbacks print is skorch's own affair; without any nothing is printed
            verbose=int(bool(callbacks)),
            batch_size=1,  # of the items that `batches` counts, for progress bars
            device=device,  # pyright: ignore[reportArgumentType]
        )
        self.loss, self.batches, self.evaluate, self.progress = loss, batches, evaluate, progress
        # whoever counts epochs without a better valid_loss wants one after every epoch
        watched = any(_monitor(_without_name(c)).startswith("valid_") for c in callbacks or ())
        self.evaluate_every = 1 if watched else evaluate_every
        self.patience, self.opponent = patience, opponent
        self.max_gradient_norm, self.averaged = max_gradient_norm, None

    def get_default_callbacks(self) -> list:
        return []

    def get_all_learnable_params(self) -> Iterator:
        """Yield what the first player learns: the optimiser is made of it."""
        theirs = set() if self.opponent is None else set(self.opponent.module.parameters())
        for name, parameter in super().get_all_learnable_params():
            if parameter not in theirs:
                yield name, parameter

    def fit_loop(
        self, X: object, y: object = None, epochs: int | None = None, **fit_params: Any
    ) -> Self:
        self.n_steps, self.n_done = self.max_epochs * len(self.batches), 0
        players = [Player(self.optimizer_, self.n_steps, self.max_gradient_norm)]
        if self.opponent is not None:
            optimizer = torch.optim.AdamW(
                self.opponent.module.parameters(),
                lr=self.opponent.learning_rate,
                weight_decay=0.0,
                fused=True,
            )
            players.append(Player(optimizer, self.n_steps, self.max_gradient_norm))
        self.players = players
        self.averaged = AveragedWeights(self.module_)
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
        self.averaged = None
        return self

    def save_params(self, *args: Any, **kwargs: Any) -> None:
        """Save as skorch does, in training the moving average of the weights: that is judged."""
        trains = self.averaged is not None
        if trains:
            self.averaged.swap()
        super().save_params(*args, **kwargs)
        if trains:
            self.averaged.swap()

    def run_single_epoch(
        self, iterator: Any, training: bool, prefix: str, step_fn: Callable, **fit_params: Any
    ) -> None:
        self._set_training(training)
        total = torch.zeros((), dtype=torch.float32, device=self.device)
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
        earlier = [row[f"{prefix}_loss"] for row in self.history[:-1]]  # pyright: ignore[reportGeneralTypeIssues]
        self.history.record(f"{prefix}_loss", mean)
        self.history.record(f"{prefix}_loss_best", mean < min(earlier, default=math.inf))
        self.history.record(f"{prefix}_batch_count", len(iterator))

    def raise_by_opponent(self, progress: float) -> None:
        for parameter in self.players[1].parameters:
            parameter.grad.neg_()
        self.players[1].take_step(progress)

    def train_step_single(
        self, batch: tuple[torch.Tensor, ...], **fit_params: Any
    ) -> dict[str, Any]:
        loss = self.loss(self.module_, batch)
        loss.backward()
        return {"loss": loss.detach(), "y_pred": None}

    def validation_step(self, epoch: int, **fit_params: Any) -> None:
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

    def measure_gain(self, epoch: int) -> float:
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
