"""Markov chains under a model, in the coordinates z of its energies.

The target of member k is q_k e^{t_k}. A base may cost more than the energy, and does not change in
training; so while chains move a mixture of Gaussians stands in for it, and a final decision puts
that right (`skebm.samplers.delayed_acceptance`).

States have no gradient. They change where a chain jumps to a draw of the proposals, and between
jumps the values move under the states that are there.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from skebm._layout import Layout
from skebm._typing import Kernel
from skebm.bases import (
    GaussianMixtureBase,
    MixedMixtureBase,
    Together,
    fit_gaussian_mixture,
    fit_mixed_mixture,
)
from skebm.derivatives import value_and_gradient
from skebm.diagnostics import split_r_hat
from skebm.models import CLIP, FeatureMap, TiltedMixture, log_ratio
from skebm.samplers import State, delayed_acceptance, hmc, independence, mala, random_walk, ula

SAMPLERS = {"hmc": hmc, "mala": mala, "random_walk": random_walk, "ula": ula}
OPTIONS = {"hmc": {"n_leapfrog_steps": 5}}

MAX_COMPONENTS, MAX_FULL_FEATURES = 16, 50
"""Of the mixture that stands in for the bases; diagonal covariances in more columns."""

ADAPTATION_RATE = 0.4
"""How fast the log of a step size follows what the acceptance lacks to its target."""

RESERVE = 8192
"""Draws of the proposals, per member, that are made at once."""

WARM_UP_CHAINS, WARM_UP_MOVES = 64, 20
"""Chains per member, and moves of each, that find a first step size."""

DIAGNOSED_CHAINS, DIAGNOSED_MOVES = 16, 100
"""Chains per member, and moves of each, behind R-hat."""


class Walkers(NamedTuple):
    """Where chains are: n of every member, side by side.

    Attributes
    ----------
    z : Tensor of shape (K, n, d)
        In the coordinates of the energies.
    log_weight : Tensor of shape (K, n)
        Log-ratio there of the model without its energy (base, and modes that recalibration weights)
        to the stand-in.
    """

    z: torch.Tensor
    log_weight: torch.Tensor

    def __getitem__(self, index: Any) -> Any:
        """Some of them, or what they are made of where `index` is 0 or 1."""
        if isinstance(index, int):
            return tuple.__getitem__(self, index)
        return Walkers(self.z[index], self.log_weight[index])


@dataclass(frozen=True)
class Moves:
    """How chains move.

    Attributes
    ----------
    sampler : str
        A name of `SAMPLERS`.
    n_steps : int
        Steps of the sampler per move.
    step_size : float or "auto"
        In units of z; "auto" adapts it to the acceptance rate that the sampler aims at.
    reinit_fraction : float
        Share of the chains that are offered a jump to a draw of the proposals before a move; of
        chains that have states all are.
    """

    sampler: str
    n_steps: int
    step_size: float | str
    reinit_fraction: float

    @property
    def adapts(self) -> bool:
        """Whether step sizes follow the acceptance rate."""
        return isinstance(self.step_size, str)


def fit_stand_in(
    x: torch.Tensor, features: FeatureMap, rng: torch.Generator
) -> GaussianMixtureBase | MixedMixtureBase:
    """Mixture of Gaussians in the coordinates z, for rows of the proposals (n, d)."""
    z = features.transform(x)[0]
    if features.layout is not None:  # with diagonal covariances absent values cost nothing
        return fit_mixed_mixture(z, features.layout, MAX_COMPONENTS, rng, diagonal=True)
    diagonal = x.shape[1] > MAX_FULL_FEATURES
    return fit_gaussian_mixture(z, MAX_COMPONENTS, rng, diagonal=diagonal)


class CheapTarget:
    """log q' + alpha f for all members: q' stands in for the bases, alpha is the model's factor.

    Rows of member 0 come first, then those of member 1, ...
    """

    model: TiltedMixture
    stand_in: Any

    def __init__(self, model: TiltedMixture, stand_in: GaussianMixtureBase | MixedMixtureBase):
        self.model, self.stand_in = model, stand_in

    def _per_member(self, z):
        return self.model.features.clip(z).unflatten(0, (self.model.n_members, -1))

    def scaled_energy(self, z: torch.Tensor) -> torch.Tensor:
        """alpha f, (K n, d) -> (K n,)."""
        return (
            self.model.inverse_temperature.to(z) * self.model.energy(self._per_member(z)).flatten()
        )

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """Log-density, not normalised, (K n, d) -> (K n,)."""
        return self.stand_in.log_prob(z) + self.scaled_energy(z)

    def value_and_gradient(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-density and gradient, as samplers ask for them."""
        f, slope = value_and_gradient(self.model.energy, self._per_member(z))
        alpha = self.model.inverse_temperature.to(z)
        if self.model.features.layout is None:
            value, gradient = self.stand_in.value_and_gradient(z)
        else:
            value, gradient = value_and_gradient(self.stand_in.log_prob, z)
        slope = slope.flatten(0, 1) * (z.abs() < CLIP)
        return value + alpha * f.flatten(), gradient + alpha * slope


class GivenStates:
    """Target of the values of rows whose states stay as they are.

    So that all rows have as many, those that are absent are standard normal numbers, independent of
    all else, which stand for nothing.

    Parameters
    ----------
    target : CheapTarget
    z : Tensor of shape (K n, d)
        Rows with these states.
    rng : torch.Generator

    Attributes
    ----------
    values : Tensor of shape (K n, n_values)
        Those of `z`.
    """

    target: CheapTarget
    states: torch.Tensor
    absent: torch.Tensor
    values: torch.Tensor

    def __init__(self, target: CheapTarget, z: torch.Tensor, rng: torch.Generator):
        n_states = target.model.features.layout.n_states
        self.target = target
        self.states, values = z.tensor_split([n_states], dim=1)
        self.absent = values.isnan()
        noise = torch.randn(values.shape, generator=rng, dtype=z.dtype, device=z.device)
        self.values = torch.where(self.absent, noise, values)

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """Rows with these values, (K n, n_values) -> (K n, d)."""
        return torch.cat([self.states, values.masked_fill(self.absent, torch.nan)], dim=1)

    def _nothing(self, values):
        return values.masked_fill(~self.absent, 0.0)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Log-density, not normalised, (K n, n_values) -> (K n,)."""
        return self.target(self.rows(values)) - 0.5 * self._nothing(values).square().sum(1)

    def value_and_gradient(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-density and gradient, as samplers ask for them."""
        value, gradient = self.target.value_and_gradient(self.rows(values))
        nothing = self._nothing(values)
        gradient = gradient[:, self.states.shape[1] :].masked_fill(self.absent, 0.0)
        return value - 0.5 * nothing.square().sum(1), gradient - nothing


class Chains:
    """Chains of all members under a model.

    Parameters
    ----------
    model : TiltedMixture
        Its energy is read afresh at every move, so that it may be trained in between.
    stand_in : GaussianMixtureBase or MixedMixtureBase
    moves : Moves
    step_size : Tensor of shape (n_members,)
        In units of z, to begin with.
    dtype : torch.dtype
        Of the chains; the bases compute in doubles.
    rng : torch.Generator
        Its device is that of the chains.
    n_reserves : int, default=0
        Draws of the proposals are made so often, `RESERVE` per member at a time, and then those are
        offered again. With 0 a draw is never offered twice.

    Attributes
    ----------
    record : list of tuples
        Acceptance rates of all moves so far: of the steps, of the moves as wholes, and of the
        jumps to the proposals, (K,) each, or None where there were none.
    """

    model: TiltedMixture
    layout: Layout | None
    moves: Moves
    jump_share: float
    adapts: bool
    rng: torch.Generator
    dtype: torch.dtype
    device: torch.device
    kernel: Kernel
    options: dict[str, Any]
    step_size: torch.Tensor
    target: CheapTarget
    record: list[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]

    def __init__(
        self,
        model: TiltedMixture,
        stand_in: GaussianMixtureBase | MixedMixtureBase,
        moves: Moves,
        *,
        step_size: torch.Tensor,
        dtype: torch.dtype,
        rng: torch.Generator,
        n_reserves: int = 0,
    ):
        self.model, self.moves, self.rng = model, moves, rng
        self.layout = model.features.layout
        self.jump_share = moves.reinit_fraction if self.layout is None else 1.0
        self.adapts = moves.adapts and (self.layout is None or self.layout.n_values > 0)
        self.dtype, self.device = dtype, rng.device
        # the model may be elsewhere: doubles are not for every device
        exact_device = model.log_partition.device
        self._exact_rng = rng
        if exact_device.type != self.device.type:
            self._exact_rng = torch.Generator(exact_device).manual_seed(rng.initial_seed())
        self.kernel, self.options = SAMPLERS[moves.sampler], OPTIONS.get(moves.sampler, {})
        self.step_size = step_size.to(self.device, dtype)
        self.target = CheapTarget(model, stand_in.to(self.device, dtype))
        self._bases = [Together([base]) for base in model.bases]
        self.record = []
        nothing = torch.empty(model.n_members, 0, model.n_features, device=self.device)
        self._reserve = Walkers(nothing, nothing[..., 0])
        self._reserves: deque[Walkers] = deque(maxlen=n_reserves)
        # then jumps to the proposals are decided on by the energy alone
        self._energy_decides = len(model.mode_weights) == 0 and all(
            q is p for q, p in zip(model.bases, model.proposals, strict=True)
        )

    # ------------------------------------------------------------------ where chains are

    def at(self, z: torch.Tensor) -> Walkers:
        """Walkers at given points, (K, n, d)."""
        z = z.to(self.device, self.dtype)
        return Walkers(z, torch.stack(self._log_weights(z)))

    def start(self, n: int) -> Walkers:
        """Walkers at draws of the proposals, n of every member."""
        return self._draw(n)

    def columns(self, walkers: Walkers) -> list[torch.Tensor]:
        """Rows on standardised columns, K tensors (n, d) where the model computes."""
        return [self._columns(z) for z in walkers.z]

    def log_density(self, walkers: Walkers) -> torch.Tensor:
        """Log-density in the coordinates z, not normalised, (K, n)."""
        shape = walkers.log_weight.shape
        return self.target(walkers.z.flatten(0, 1)).view(shape) + walkers.log_weight

    def scaled_energy(self, walkers: Walkers) -> torch.Tensor:
        """alpha f, (K, n)."""
        f = self.target.scaled_energy(walkers.z.flatten(0, 1))
        return f.view(walkers.log_weight.shape)

    def _log_weights(self, points):
        """Log-weights of every member at its points, K tensors (n_k, d) -> K tensors (n_k,)."""
        z, model, weights = torch.cat(list(points)), self.model, []
        x = self._columns(z)
        # the same for all members
        log_det, cheap = model.features.transform(x)[1], self.target.stand_in.log_prob(z)
        parts = (values.split([len(rows) for rows in points]) for values in (x, log_det, cheap))
        for k, (rows, own_log_det, own_cheap) in enumerate(zip(*parts, strict=True)):
            (components,), _ = self._bases[k](rows)
            exact = components.logsumexp(0) + model.mode_tilt_of(k, rows) - own_log_det
            weights.append(exact.to(z) - own_cheap)
        return weights

    def _columns(self, z):
        return self.model.features.transform.inverse(z.to(self.model.log_partition))

    def _draw(self, n):
        """Walkers at draws of the proposals, n of every member."""
        if self._reserve.z.shape[1] < n:
            self._reserve = self._next_reserve(n)
        drawn, self._reserve = self._reserve[:, :n], self._reserve[:, n:]
        return drawn

    def _next_reserve(self, n):
        """At least n draws, with their weights: many at once cost a base little more than a few."""
        if self._reserves and len(self._reserves) == self._reserves.maxlen:
            self._reserves.rotate(-1)
            return self._reserves[-1]
        size = max(n, RESERVE)
        x = (p.sample(size, self._exact_rng) for p in self.model.proposals)
        reserve = self.at(torch.stack([self.model.features.transform(rows)[0] for rows in x]))
        self._reserves.append(reserve)
        return reserve

    # ------------------------------------------------------------------ moves

    def jump(self, walkers: Walkers) -> tuple[Walkers, torch.Tensor]:
        """Let chains jump to draws of the proposals, where the model accepts that.

        Returns
        -------
        walkers : Walkers
        acceptance_rate : Tensor of shape (K,)
        """
        z, drawn = walkers.z, self._draw(walkers.z.shape[1])

        def log_weight(flat):
            ratio = self._log_ratio(flat.view_as(z)).flatten()
            return self.target.scaled_energy(flat) + ratio

        state, info = independence.step(
            independence.init(z.flatten(0, 1), log_weight), log_weight, self.rng,
            propose=lambda n, rng: drawn.z.flatten(0, 1),
        )  # fmt: skip
        accepted = info.accepted.view(z.shape[:2])
        weight = torch.where(accepted, drawn.log_weight, walkers.log_weight)
        return Walkers(state.position.view_as(z), weight), accepted.float().mean(1)

    def _log_ratio(self, z):
        """log of base and modes to proposal, (K, n, d) -> (K, n)."""
        if self._energy_decides:
            return z.new_zeros(z.shape[:2])
        x = torch.stack([self._columns(points) for points in z])
        ratio = log_ratio(self.model.bases, self.model.proposals, x) + self.model.mode_tilt(x)
        return ratio.to(z)

    def move(
        self, walkers: Walkers, n_steps: int | None = None
    ) -> tuple[Walkers, torch.Tensor, torch.Tensor]:
        """Move chains by `n_steps` steps of the sampler, those of `moves` by default.

        Returns
        -------
        walkers : Walkers
        acceptance_rate, move_acceptance_rate : Tensors of shape (K,)
            Of the steps, and of the moves as wholes.
        """
        shape, position = walkers.log_weight.shape, walkers.z.flatten(0, 1)
        target: Any = self.target

        def rows(values):
            return values

        if self.layout is not None:
            target = GivenStates(self.target, position, self.rng)
            position, rows = target.values, target.rows
        state, info = delayed_acceptance.step(
            State(position, walkers.log_weight.flatten()),
            lambda at: torch.cat(self._log_weights(rows(at).unflatten(0, shape))),
            self.rng,
            kernel=self.kernel, cheap_log_density=target,
            n_steps=self.moves.n_steps if n_steps is None else n_steps,
            step_size=self.step_size.repeat_interleave(shape[1])[:, None], **self.options,
        )  # fmt: skip
        moved = Walkers(rows(state.position).view_as(walkers.z), state.log_density.view(shape))
        acceptance = info.cheap_acceptance_probability.view(shape).mean(1)
        return moved, acceptance, info.accepted.view(shape).float().mean(1)

    def advance(self, walkers: Walkers, *, moves: bool = True) -> Walkers:
        """Move chains as training does: some jump first, step sizes adapt; the move is recorded.

        Without `moves` they jump only, which costs a fraction of that.
        """
        acceptance = move_acceptance = jump_rate = None
        if self.jump_share > 0:
            n_jumps = max(1, round(self.jump_share * walkers.z.shape[1]))
            jumped, jump_rate = self.jump(walkers[:, :n_jumps])
            pairs = zip(jumped, walkers[:, n_jumps:], strict=True)
            walkers = Walkers(*(torch.cat(pair, dim=1) for pair in pairs))
        if moves:
            walkers, acceptance, move_acceptance = self.move(walkers)
            if self.adapts:
                self._adapt(acceptance)
        self.record.append((acceptance, move_acceptance, jump_rate))
        return walkers

    def advance_some(self, buffer: Walkers, n: int, *, moves: bool = True) -> Walkers:
        """The same for n chains of `buffer`, in place; returns these n."""
        shape = buffer.log_weight.shape
        order = torch.rand(shape, generator=self.rng, dtype=torch.float32, device=self.device)
        index = order.argsort(1)[:, :n]
        across = index[..., None].expand(-1, -1, buffer.z.shape[-1])
        walkers = Walkers(buffer.z.gather(1, across), buffer.log_weight.gather(1, index))
        walkers = self.advance(walkers, moves=moves)
        buffer.z.scatter_(1, across, walkers.z)
        buffer.log_weight.scatter_(1, index, walkers.log_weight)
        return walkers

    def run(self, walkers: Walkers, n_steps: int) -> Walkers:
        """Take `n_steps` steps in moves of at most the usual length, with jumps; recorded."""
        while n_steps:
            jump_rate = None
            if self.jump_share > 0:
                shape = walkers.log_weight.shape
                offered = torch.rand(
                    shape, generator=self.rng, dtype=torch.float32, device=self.device
                )
                offered = offered < self.jump_share
                jumped, jump_rate = self.jump(walkers)
                walkers = Walkers(
                    torch.where(offered[..., None], jumped.z, walkers.z),
                    torch.where(offered, jumped.log_weight, walkers.log_weight),
                )
            n_now = min(n_steps, self.moves.n_steps)
            walkers, acceptance, move_acceptance = self.move(walkers, n_now)
            self.record.append((acceptance, move_acceptance, jump_rate))
            n_steps -= n_now
        return walkers

    def _adapt(self, acceptance, rate=ADAPTATION_RATE):
        """Change step sizes towards the acceptance rate that the sampler aims at."""
        excess = acceptance - self.kernel.TARGET_ACCEPTANCE
        self.step_size = self.step_size * (rate * excess).exp()

    def warm_up(self) -> None:
        """Find step sizes for the energy as it is."""
        walkers = self.start(WARM_UP_CHAINS)
        for t in range(WARM_UP_MOVES):
            walkers, acceptance, _ = self.move(walkers)
            self._adapt(acceptance, rate=(1 + t) ** -0.5)

    # ------------------------------------------------------------------ diagnostics

    def rates(self, last: float = 1.0) -> dict[str, Any]:
        """Mean acceptance rates of a last share of the moves so far, and the step sizes."""
        record = self.record[-max(2, int(len(self.record) * last)) :]
        steps, moves, jumps = (
            [rate for rate in rates if rate is not None] for rates in zip(*record, strict=True)
        )
        return {
            "step_size": self.step_size.cpu().numpy(),
            "acceptance_rate": torch.stack(steps).mean(0).cpu().numpy(),
            "move_acceptance_rate": torch.stack(moves).mean().item(),
            "restart_acceptance_rate": torch.stack(jumps).mean().item() if jumps else np.nan,
        }

    @torch.no_grad()
    def r_hat(self) -> float:
        """Split R-hat, the largest over members, columns and f, of chains as in training."""
        walkers, draws = self.start(DIAGNOSED_CHAINS), []
        for _ in range(DIAGNOSED_MOVES):
            walkers = self.run(walkers, self.moves.n_steps)
            z = walkers.z if self.layout is None else self.layout.as_numbers(walkers.z)
            draws.append(torch.cat([z, self.scaled_energy(walkers)[..., None]], dim=-1))
        # (moves, members, chains, d + 1) -> (moves, chains, members * (d + 1))
        draws = torch.stack(draws).transpose(1, 2).flatten(2)
        return float(np.nanmax(split_r_hat(draws)))
