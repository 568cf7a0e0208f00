"""What estimators share that stand on a normalizing flow and learn in a game with a generator."""

import copy
import math
from functools import partial
from numbers import Integral

import numpy as np
import torch
from sklearn.utils import check_array, check_random_state
from torch import nn

from skebm._engine import MemberBatches, Opponent
from skebm._sklearn_compat import StrOptions
from skebm.bases import Coordinates, StackedBase, build_flow, train_flows
from skebm.bases._flow_training import JUDGED_AT_ONCE

from ._base import resolve_device
from ._model import TiltedMixture
from ._neural import (
    EnergyWithPartition,
    build_energy,
    few_copies,
    if_auto,
    rows_judged,
    train_networks,
)
from ._threads import limit_threads
from ._tilted import BaseTiltedDensity, halves

EPOCHS, STEPS = 20, 700
"""``max_epochs="auto"``, of every stage of training: whichever lasts longer."""

PATIENCE_STEPS = 200
"""Least patience of game and refinement: in few rows 20 epochs are 60 steps, less than a game needs
to take a turn."""

HEAD_START = 100
"""Steps that the energy takes before the generator takes its first."""

STEP_COST = 20
"""Of a step of the game, in evaluations of the energy on its rows."""

MAX_COPIES = 8
"""Of rows with fresh jitter, where columns have ties."""


def sampling_generator(n_samples, random_state):
    """Generator of a seed; raises where `n_samples` is no number of rows."""
    if not isinstance(n_samples, Integral) or n_samples < 1:
        raise ValueError(f"n_samples={n_samples!r} must be an integer of at least 1.")
    seed = check_random_state(random_state).randint(np.iinfo(np.int32).max)
    return torch.Generator().manual_seed(int(seed))


class FlowDensity:
    """A normalizing flow as a density: the mean of the flows of all members.

    Parameters
    ----------
    columns : Columns
    laws : list of K laws on standardised columns
    """

    def __init__(self, columns, laws):
        self._columns = columns
        self._law = StackedBase(laws, [1.0] * len(laws))

    def score_samples(self, X):
        """Log-density of every row.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,), float64
            In nats, in the units of X.
        """
        X = check_array(X, dtype=np.float64)
        if X.shape[1] != len(self._columns.varying):
            raise ValueError(
                f"X has {X.shape[1]} features, but the flow is expecting "
                f"{len(self._columns.varying)} features."
            )
        x, met = self._columns.standardize(X)
        with torch.no_grad(), limit_threads(1):
            values = [self._law.log_prob(c) for c in torch.as_tensor(x).split(JUDGED_AT_ONCE)]
        values = torch.cat(values).numpy() + self._columns.log_det
        return np.where(met, values, -np.inf)

    def score(self, X, y=None):
        """Mean log-density of the rows of X, in nats."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples=1, random_state=None):
        """Draw rows, (n_samples, n_features)."""
        generator = sampling_generator(n_samples, random_state)
        with torch.no_grad(), limit_threads(1):
            x = self._law.sample(n_samples, generator)
        return self._columns.restore(x.numpy())


class FlowBasedDensity(BaseTiltedDensity):
    """A tilted density whose base is a flow, fitted by maximum likelihood member by member."""

    _parameter_constraints: dict = {
        **BaseTiltedDensity._parameter_constraints,
        "flow": [str, callable, nn.Module],
        "base": [StrOptions({"flow"}), None],
    }

    def _laws(self, law, x, weight, splits, seeds, progress):
        # not the coordinates of the energies, which come from all rows: they are no density, but
        # the flows are, and held-out rows must not have shaped them
        coordinates = Coordinates(
            [
                self._transform(x[rows], weight[rows], seeds.generator("coordinates", k))
                for k, (rows, _) in enumerate(splits)
            ]
        )
        generator = seeds.generator("flow")
        flow = build_flow(self.flow, x.shape[1], len(splits), generator=generator)
        train_flows(
            flow, coordinates(x), weight, splits, generator=generator,
            batch_size=self.batch_size, device=resolve_device(self.device),
            progress=partial(progress.stage, "flow"),
        )  # fmt: skip
        self._start = flow.cpu(), coordinates
        laws = coordinates.laws(flow)
        if self.base is None:
            bases = law(None, "base")
            return bases, halves(laws, bases), laws
        return laws, laws, laws

    def _blend(self, rows, weight, columns, seeds, progress):
        blend = super()._blend(rows, weight, columns, seeds, progress)
        del self._start  # of the last scale only
        return blend

    def _flow_laws(self, members):
        """Laws of the flows that maximum likelihood left."""
        if self.base is not None:
            return members.bases
        flow, coordinates = self._start
        return coordinates.laws(flow)

    def _views(self, members, device):
        """Differentiable functions of points y in the coordinates of the flows, (K, n, d).

        Returns
        -------
        log_base : callable
            Log-densities of the bases in those coordinates, (K, n).
        features : callable
            The same points as the energies see them, (K, n, d), not clipped.
        """
        flow, coordinates = (copy.deepcopy(part).to(device) for part in self._start)
        transform = copy.deepcopy(members.features.transform).to(device)

        def features(y):
            x, _ = coordinates.inverse(y)
            return transform(x.flatten(0, 1))[0].view_as(x).to(y.dtype)

        if self.base is not None:
            return flow.requires_grad_(False).log_prob, features
        bases = [copy.deepcopy(q).to(device) for q in members.bases]

        def log_base(y):
            x, log_det = coordinates.inverse(y)
            values = [q.log_prob(rows) for q, rows in zip(bases, x, strict=True)]
            return (torch.stack(values) - log_det).to(y.dtype)

        return log_base, features

    def _play(
        self,
        members,
        rival,
        loss,
        plays,
        *,
        learning_rate,
        rival_learning_rate,
        refresh,
        device,
        kept,
        progress,
    ):
        """Train energies against the generators of all members, `rival`.

        Parameters
        ----------
        members : Members
        rival : nn.Module
            With ``rsample(n, generator)``; it raises the loss.
        loss : callable
            ``loss(game, y, z, log_base, weight, drawn)`` -> scalar tensor: rows in the coordinates
            of the flows and of the energies, (K, B, d) each, log-densities of the bases and weights
            of the rows, (K, B) each, and a function that draws from the rival: points z, and their
            log-densities under the rival and under the bases.
        plays : callable
            ``plays(n_steps)`` -> bool: whether the rival takes a step.
        learning_rate, rival_learning_rate, refresh, device, kept, progress

        Returns
        -------
        Trained
        nn.Module
            The game: `energy`, `log_partition` and `rival`.
        int
            Steps of an epoch.
        """
        n_members = len(members)
        energy = self._new_energy(members, "game", kept)
        log_base, features = self._views(members, device)
        coordinates = self._start[1]
        game = EnergyWithPartition(energy, n_members)
        if kept is not None:
            with torch.no_grad():
                game.log_partition.copy_(kept.log_partition)
        game.rival = rival
        game.to(device)
        weight = (members.weight / members.weight.mean()).float().to(device)
        weight = weight.expand(n_members, -1)

        def rows(generator):
            x = members.x if refresh is None else refresh(generator)
            y = coordinates(x).float().to(device)
            z = members.features.transform(x)[0].float().to(device)
            with torch.no_grad():
                logs = [log_base(points) for points in y.split(JUDGED_AT_ONCE, dim=1)]
            return y, z.expand_as(y), torch.cat(logs, dim=1), weight

        batches = MemberBatches(
            few_copies(rows, 1 if refresh is None else MAX_COPIES),
            [train_rows for train_rows, _ in members.splits],
            batch_size=self.batch_size,
            generator=members.seeds.generator("game, batches"),
        )
        self._stages = {}
        generator = members.seeds.generator("game, samples", device=device)
        n_steps = 0

        def batch_loss(game, batch):
            nonlocal n_steps
            n_steps += 1

            def drawn():
                y, log_rival = game.rival.rsample(batch[0].shape[1], generator)
                return features(y), log_rival, log_base(y)

            return loss(game, *batch, drawn)

        n_train = max(len(train_rows) for train_rows, _ in members.splits)
        trained = train_networks(
            members, game, batch_loss, batches,
            evaluation_cost=rows_judged(members) / (STEP_COST * n_train),
            opponent=Opponent(rival, rival_learning_rate, lambda: plays(n_steps)),
            learning_rate=learning_rate, max_epochs=self._n_epochs(len(batches)),
            **self._training_options(len(batches), device, progress),
        )  # fmt: skip
        rival.cpu().requires_grad_(False)
        return trained, game, len(batches)

    def _new_energy(self, members, stage, kept):
        """Energies to start from: zero, or those of the last fit."""
        return build_energy(
            if_auto(self.energy_model, "periodic"),
            members,
            self.hidden_layer_sizes,
            members.seeds.of(f"{stage}, network"),
            kept,
        )

    def _n_epochs(self, n_batches):
        return if_auto(self.max_epochs, max(EPOCHS, math.ceil(STEPS / n_batches)))

    def _training_options(self, n_batches, device, progress):
        patience = max(self.patience, math.ceil(PATIENCE_STEPS / n_batches))
        return {
            "weight_decay": self.weight_decay, "patience": patience,
            "early_stopping": self.early_stopping, "callbacks": self.callbacks,
            "device": device, "progress": progress,
        }  # fmt: skip

    def _tilt(self, members, kept, refresh, device, progress):
        model, trained, accepted = super()._tilt(members, kept, refresh, device, progress)
        if not hasattr(self, "_trained"):
            return model, trained, accepted
        flow, coordinates = self._trained
        laws = coordinates.laws(flow)
        gains = held_out_log_densities(members, laws)
        gains = gains - held_out_log_densities(members, members.bases)
        share = torch.cat(members.held_weights)
        share = share / share.sum()
        gain = (share @ gains).item()
        error = (share.square() @ (gains - gain).square()).sqrt().item()
        self._stages["flow_after_game"] = gain
        if self.base is None:
            return model, trained, accepted
        # the flow that was trained on may have become the better density, and is then the model
        reached = 0.0
        if accepted:
            reached = members.mean_gain(trained.held, trained.pool).item()
        if gain > max(reached, 2.0 * error):
            self._start = self._trained
            model = TiltedMixture(laws, laws, members.features, None)
            return model, trained, False
        return model, trained, accepted


def held_out_log_densities(members, laws):
    """Log-densities of the held-out rows of all members, in standardised columns."""
    pairs = zip(laws, members.splits, strict=True)
    return torch.cat([law.log_prob(members.x[held]) for law, (_, held) in pairs])


def held_out_log_likelihood(members, laws):
    """Their weighted mean."""
    weight = torch.cat(members.held_weights)
    return (weight @ held_out_log_densities(members, laws) / weight.sum()).item()
