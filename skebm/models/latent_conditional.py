r"""Rows of which some cells are known, under a latent-variable model.

Given the latent variables z, cells are independent. So cells that are not known are left out of
the likelihood, which integrates over them, and with weighted draws of z given the known cells a,

.. math:: p(b \mid a) = E_{z \mid a}\; p(b \mid z),

a mixture whose components have a closed form.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from skebm._layout import Cell, Layout
from skebm.latents import BernoulliLikelihood
from skebm.partition import (
    RowStreams,
    ess,
    importance_sampling,
    posterior_samples,
    systematic_resampling,
)

from .completions import (
    LEVELS,
    N_NODES,
    Completions,
    by_open_cells,
    drawn_from_cell,
    filled_cells,
    leading_components,
    quantile_nodes,
    restricted,
    weighted_cells,
)
from .latent import InBlocks, LatentVariableModel

N_LATENT = 1_024
"""Weighted draws of the latent variables of a row."""

ALLOWED = 8
"""Draws for one that is asked for, where not all are allowed."""

_LATENT = 65_536  # of them at once

_LOG_2PI = math.log(2.0 * math.pi)


class LatentConditioner:
    """A latent-variable model whose rows can be completed.

    Parameters
    ----------
    model : LatentVariableModel
    layout : Layout
        Of its rows.

    Raises
    ------
    ValueError
        For a Bernoulli likelihood of values.
    """

    is_mixture: bool

    def __init__(self, model: LatentVariableModel, layout: Layout):
        of_values = getattr(model.likelihood, "of_values", model.likelihood)
        if isinstance(of_values, BernoulliLikelihood):
            raise ValueError(
                'likelihood="bernoulli" does not answer questions about some of the cells; '
                'likelihood="gaussian" does.'
            )
        self.is_mixture = False
        self._model, self._layout, self._of_values = model, layout, of_values
        self._decoder = InBlocks(model.decoder)

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """There is one member, which has all of every row."""
        return x.new_zeros(1, len(x)), x.new_zeros(len(x))

    def complete(
        self,
        x: Tensor,
        known: Tensor,
        cells: Sequence[Cell],
        *,
        n_draws: int,
        seed: int,
        integrate: bool = True,
    ) -> Iterator[tuple[Tensor, Completions]]:
        """Complete rows; see :meth:`Conditioner.complete`."""
        for rows, pattern, cell in by_open_cells(known, cells if integrate else []):
            for some in rows.split(_LATENT // N_LATENT):
                z, log_weights, error = self._latents(x[some], pattern, seed)
                if cell:
                    yield some, self._of_cell(x[some], cell, z, log_weights, error)
                    continue
                rng = torch.Generator(x.device)
                filled = self._filled(x[some], pattern, z, log_weights, n_draws, rng, seed)
                even = log_weights.logsumexp(1, keepdim=True) - math.log(n_draws)
                even = even.expand(-1, n_draws)
                one, unknown = x.new_ones(len(some), 1), torch.full_like(even, math.nan)
                yield some, Completions(filled, even, unknown, one, error, ess(log_weights))

    def draw(
        self,
        x: Tensor,
        known: Tensor,
        cells: Sequence[Cell],
        n: int,
        rng: torch.Generator,
        allows: Callable[[Tensor], Tensor] | None = None,
        integrate: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Draw completions; see :meth:`Conditioner.draw`."""
        drawn, n_effective = x.new_empty(len(x), n, x.shape[1]), x.new_empty(len(x))
        seed = int(torch.randint(2**31 - 1, (), generator=rng, device=rng.device))
        for rows, pattern, cell in by_open_cells(known, cells if integrate else []):
            for some in rows.split(_LATENT // N_LATENT):
                z, log_weights, error = self._latents(x[some], pattern, seed)
                n_effective[some] = ess(log_weights)
                if cell:
                    found = self._of_cell(x[some], cell, z, log_weights, error)
                    drawn[some] = drawn_from_cell(restricted(found, allows), cell, n, rng)
                    continue
                m = n if allows is None else ALLOWED * n
                filled = self._filled(x[some], pattern, z, log_weights, m, rng)
                if allows is not None:
                    fine = allows(filled.flatten(0, 1)).view(len(some), m)
                    first = fine.double().argsort(dim=1, descending=True, stable=True)[:, :n]
                    filled = filled.gather(1, first[..., None].expand(-1, -1, x.shape[1]))
                drawn[some] = filled
        return drawn, n_effective

    def _latents(self, x, known, seed):
        """Weighted latent variables given known cells, and the error of log p(a).

        Returns
        -------
        z : Tensor of shape (n, N_LATENT, k)
        log_weights : Tensor of shape (n, N_LATENT)
            The weights add up to p(a).
        error : Tensor of shape (n,)
        """
        x = self._without(x, known)
        model = self._model
        rng = torch.Generator(x.device).manual_seed(seed)
        # the encoder sees zeros in place of cells that it does not know
        seen = x.nan_to_num(0.0).float()
        single = LatentVariableModel(
            self._decoder,
            model.likelihood,
            model.n_components,
            copy.deepcopy(model.encoder).float(),
        )
        location, covariance = single.moments(seen, rng)
        z, log_weights = posterior_samples(
            single.of_rows(x), location.double(), covariance.double(), RowStreams(x, seed),
            n_samples=N_LATENT,
        )  # fmt: skip
        error = importance_sampling(log_weights).std_error
        return z, log_weights - math.log(N_LATENT), error

    def _without(self, x, known):
        """Rows whose open cells are marked as unknown."""
        x, n_states = x.clone(), self._layout.n_states
        x[:, :n_states][:, ~known[:n_states]] = -1.0
        x[:, n_states:][:, ~known[n_states:]] = torch.nan
        return x

    def _filled(self, x, known, z, log_weights, m, rng, seed=None):
        """m draws of the open cells of every row, (n, m, d); with a seed the same random numbers
        for every row.
        """
        filled = x.new_empty(len(x), m, x.shape[1])
        for i, (own, logs) in enumerate(zip(z, log_weights, strict=True)):
            if seed is not None:
                rng.manual_seed(seed)
            offset = torch.rand(1, generator=rng, dtype=x.dtype, device=x.device)
            which = systematic_resampling(logs.softmax(0), offset, m)
            which = which[torch.randperm(m, generator=rng, device=x.device)]
            drawn = self._model.likelihood.sample(self._decoder(own[which]), rng)
            filled[i] = torch.where(known, x[i], drawn)
        n_states = self._layout.n_states
        if n_states:
            rows = filled.flatten(0, 1)
            codes, values = rows[:, :n_states].long(), rows[:, n_states:]
            filled = self._layout.join(codes, values).view(filled.shape)
        return filled

    def _of_cell(self, x, cell, z, log_weights, error):
        """Completions with all states of a cell, and numbers at quantiles of its distribution."""
        output, sizes = self._decoder(z), self._layout.sizes
        log_mass, log_states = x.new_zeros(log_weights.shape), x.new_zeros(len(x), 0)
        if cell.state >= 0:
            start = sum(sizes[: cell.state])
            log_masses = output[..., start : start + cell.n_states]
            log_states = (log_masses + log_weights[..., None]).logsumexp(1)
            if cell.value >= 0:
                log_mass, log_states = log_masses[..., 0], log_states[:, 1:]
        nodes = None
        log_density = log_states
        if cell.value >= 0:
            j = cell.value - self._layout.n_states
            mean = output[..., sum(sizes) + j]
            deviation = self._of_values.variance[j].double().sqrt()
            own = (log_weights + log_mass).softmax(1)

            def distribution(at):
                white = (at[:, None] - mean[..., None]) / deviation
                share = (own[..., None] * torch.special.ndtr(white)).sum(1)
                logs = own.log()[..., None] - 0.5 * (white.square() + _LOG_2PI) - deviation.log()
                return share, logs.logsumexp(1)

            which, _ = leading_components(own)
            points = mean.gather(1, which)[..., None] + deviation * LEVELS.to(x)
            nodes = quantile_nodes(points.flatten(1), distribution)
            of_number = (log_weights + log_mass).logsumexp(1, keepdim=True)
            log_density = torch.cat([log_states, of_number + distribution(nodes[0])[1]], dim=1)
        weights, _ = weighted_cells(log_density, nodes)
        rows, one = filled_cells(x, cell, nodes), x.new_ones(len(x), 1)
        n_nodes = N_NODES if nodes else 0
        return Completions(rows, weights, log_density, one, error, ess(log_weights), n_nodes)
