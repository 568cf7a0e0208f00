"""Markov chains under a model, in the coordinates z of its energies.

The target of member k is q_k e^{t_k}. A base may cost more than the energy, and does not change in
training; so while chains move a mixture of Gaussians stands in for it, and a final decision puts
that right (`skebm.samplers.delayed_acceptance`).
"""

import torch

from skebm.bases import fit_gaussian_mixture
from skebm.derivatives import value_and_gradient
from skebm.samplers import State, delayed_acceptance, hmc, independence, mala, random_walk, ula

from ._model import CLIP, log_ratio

SAMPLERS = {"hmc": hmc, "mala": mala, "random_walk": random_walk, "ula": ula}
OPTIONS = {"hmc": {"n_leapfrog_steps": 5}}

MAX_COMPONENTS, MAX_FULL_FEATURES = 16, 50
"""Of the mixture that stands in for the bases; diagonal covariances in more columns."""

ADAPTATION_RATE = 0.2
"""How fast the log of a step size follows what the acceptance lacks to its target."""

RESERVE = 8192
"""Draws of the proposals, per member, that are made at once."""

WARM_UP_CHAINS, WARM_UP_MOVES = 64, 20
"""Chains per member, and moves of each, that find a first step size."""


def fit_stand_in(x, features, generator):
    """Mixture of Gaussians in the coordinates z, for rows of the proposals (n, d)."""
    diagonal = x.shape[1] > MAX_FULL_FEATURES
    z = features.transform(x)[0]
    return fit_gaussian_mixture(z, MAX_COMPONENTS, generator, diagonal=diagonal)


class CheapTarget:
    """log q' + alpha f for all members: q' stands in for the bases, alpha is the temperature.

    Rows of member 0 come first, then those of member 1, ...
    """

    def __init__(self, model, stand_in):
        self.model, self.stand_in = model, stand_in

    def _per_member(self, z):
        return z.clamp(-CLIP, CLIP).unflatten(0, (self.model.n_members, -1))

    def tilt(self, z):
        """alpha f, (K n, d) -> (K n,)."""
        return self.model.temperature.to(z) * self.model.energy(self._per_member(z)).flatten()

    def __call__(self, z):
        return self.stand_in.log_prob(z) + self.tilt(z)

    def value_and_gradient(self, z):
        """Log-density and gradient, as samplers ask for them."""
        f, slope = value_and_gradient(self.model.energy, self._per_member(z))
        alpha = self.model.temperature.to(z)
        value, gradient = self.stand_in.value_and_gradient(z)
        slope = slope.flatten(0, 1) * (z.abs() < CLIP)
        return value + alpha * f.flatten(), gradient + alpha * slope


class Chains:
    """Chains of all members, side by side.

    A chain is a row (z, w) of d + 1 numbers: its coordinates, and the log-ratio there of the model
    without its energy (base, and modes that recalibration weights) to the stand-in.

    Parameters
    ----------
    model : TiltedMixture
        Its energy is read afresh at every move, so that it may be trained in between.
    stand_in : GaussianMixtureBase
    sampler : str
        A name of `SAMPLERS`.
    n_steps : int
        Steps of the sampler per move.
    step_size : Tensor of shape (n_members,)
        In units of z.
    dtype : torch.dtype
        Of the chains; the bases compute in doubles.
    generator : torch.Generator
        Its device is that of the chains.
    """

    def __init__(self, model, stand_in, *, sampler, n_steps, step_size, dtype, generator):
        self.model, self.n_steps, self.generator = model, n_steps, generator
        self.dtype, self.device = dtype, generator.device
        # the model may be elsewhere: doubles are not for every device
        exact_device = model.log_partition.device
        self._exact_generator = generator
        if exact_device.type != self.device.type:
            self._exact_generator = torch.Generator(exact_device).manual_seed(
                generator.initial_seed()
            )
        self.kernel, self.options = SAMPLERS[sampler], OPTIONS.get(sampler, {})
        self.step_size = step_size.to(self.device, dtype)
        self.target = CheapTarget(model, stand_in.to(self.device, dtype))
        self._reserve = torch.empty(model.n_members, 0, model.n_features, device=self.device)
        # then jumps to the proposals are decided on by the energy alone
        self._energy_decides = len(model.mode_weights) == 0 and all(
            q is p for q, p in zip(model.bases, model.proposals, strict=True)
        )

    def rows(self, z):
        """Chains at given points, (K, n, d) -> (K, n, d + 1)."""
        z = z.to(self.device, self.dtype)
        return torch.cat([z, torch.stack(self._log_weights(z))[..., None]], dim=-1)

    def _log_weights(self, points):
        """Log-weights w of every member at its points, K tensors (n_k, d) -> K tensors (n_k,)."""
        model, weights = self.model, []
        for k, z in enumerate(points):
            x = self._columns(z)
            exact = model.bases[k].log_prob(x) + model.mode_tilt_of(k, x)
            exact = exact - model.features.transform(x)[1]
            weights.append(exact.to(z) - self.target.stand_in.log_prob(z))
        return weights

    def _columns(self, z):
        """Rows on standardised columns, where the model computes."""
        return self.model.features.transform.inverse(z.to(self.model.log_partition))

    def draw(self, n):
        """Points drawn from the proposals, never the same twice, (K, n, d)."""
        if self._reserve.shape[1] < n:
            size = max(n, RESERVE)
            x = (p.sample(size, self._exact_generator) for p in self.model.proposals)
            z = torch.stack([self.model.features.transform(rows)[0] for rows in x])
            self._reserve = z.to(self.device, self.dtype)
        drawn, self._reserve = self._reserve[:, :n], self._reserve[:, n:]
        return drawn

    def start(self, n):
        """Chains at draws of the proposals, (K, n, d + 1)."""
        return self.rows(self.draw(n))

    def restart(self, rows):
        """Let chains jump to draws of the proposals, where the model accepts that.

        Returns
        -------
        rows : Tensor of shape (K, n, d + 1)
        acceptance_rate : Tensor of shape (K,)
        """
        z = rows[..., :-1]

        def log_weight(flat):
            return self.target.tilt(flat) + self._log_ratio(flat.view_as(z)).flatten()

        state, info = independence.step(
            independence.init(z.flatten(0, 1), log_weight), log_weight, self.generator,
            propose=lambda n, generator: self.draw(z.shape[1]).flatten(0, 1),
        )  # fmt: skip
        accepted = info.accepted.view(z.shape[:2])
        rows = torch.cat([state.position.view_as(z), rows[..., -1:]], dim=-1)
        jumped = [chains[mask, :-1] for chains, mask in zip(rows, accepted, strict=True)]
        rows[..., -1][accepted] = torch.cat(self._log_weights(jumped))
        return rows, accepted.float().mean(1)

    def _log_ratio(self, z):
        """log of base and modes to proposal, (K, n, d) -> (K, n)."""
        if self._energy_decides:
            return z.new_zeros(z.shape[:2])
        x = torch.stack([self._columns(points) for points in z])
        ratio = log_ratio(self.model.bases, self.model.proposals, x) + self.model.mode_tilt(x)
        return ratio.to(z)

    def move(self, rows):
        """Move chains by `n_steps` steps of the sampler.

        Returns
        -------
        rows : Tensor of shape (K, n, d + 1)
        acceptance_rate, move_acceptance_rate : Tensors of shape (K,)
            Of the steps, and of the moves as wholes.
        """
        shape = rows.shape[:2]
        flat = rows.flatten(0, 1)
        state, info = delayed_acceptance.step(
            State(flat[:, :-1], flat[:, -1]),
            lambda z: torch.cat(self._log_weights(z.unflatten(0, shape))),
            self.generator,
            kernel=self.kernel, cheap_log_density=self.target, n_steps=self.n_steps,
            step_size=self.step_size.repeat_interleave(shape[1])[:, None], **self.options,
        )  # fmt: skip
        moved = torch.cat([state.position, state.log_density[:, None]], dim=1).view_as(rows)
        acceptance = info.cheap_acceptance_probability.view(shape).mean(1)
        return moved, acceptance, info.accepted.view(shape).float().mean(1)

    def adapt(self, acceptance, rate=ADAPTATION_RATE):
        """Change step sizes towards the acceptance rate that the sampler aims at."""
        excess = acceptance - self.kernel.TARGET_ACCEPTANCE
        self.step_size = self.step_size * (rate * excess).exp()

    def warm_up(self):
        """Find step sizes for the energy as it is."""
        rows = self.start(WARM_UP_CHAINS)
        for t in range(WARM_UP_MOVES):
            rows, acceptance, _ = self.move(rows)
            self.adapt(acceptance, rate=(1 + t) ** -0.5)

    def log_density(self, rows):
        """Log-density of chains in the coordinates z, not normalised, (K, n, d + 1) -> (K, n)."""
        flat = rows.flatten(0, 1)
        return (self.target(flat[:, :-1]) + flat[:, -1]).view(rows.shape[:2])
