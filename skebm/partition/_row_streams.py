"""Random numbers that belong to a row."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

DEGREES = 8
"""Degrees of freedom of the chi-squared numbers, those of the t proposal that they are for."""


class RowStreams:
    """Random numbers that belong to a row, whatever other rows are there.

    The key of a stream is the row itself, rounded to six decimals.

    Parameters
    ----------
    x : Tensor of shape (n, d)
    seed : int

    See Also
    --------
    marginal_likelihoods : Takes it, so that rows do not change each other's estimates.

    Examples
    --------
    >>> import torch
    >>> from skebm.partition import RowStreams
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> both, second = RowStreams(x, seed=0), RowStreams(x[1:], seed=0)
    >>> normal, _ = both.draw(torch.tensor([1]), stage=0, n=3, k=1)
    >>> same, _ = second.draw(torch.tensor([0]), stage=0, n=3, k=1)
    >>> torch.equal(normal, same)
    True
    """

    device: torch.device
    seed: int
    keys: list[int]

    def __init__(self, x: torch.Tensor, seed: int):
        self.device, self.seed = x.device, seed
        # one generator that is set to one stream after the other: to make one takes longer than
        # to draw hundreds of numbers
        self._generator = np.random.Generator(np.random.Philox(key=0))
        self._state: Any = self._generator.bit_generator.state
        rounded = np.round(x.double().cpu().numpy(), 6) + 0.0  # no negative zeros
        rounded[np.isnan(rounded)] = np.nan  # of all that have other bytes
        self.keys = [
            int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little")
            for row in rounded
        ]

    def draw(self, rows: torch.Tensor, stage: int, n: int, k: int) -> Iterator[torch.Tensor]:
        """Standard normal (m, n, k) and chi-squared (m, n) numbers for the chosen rows."""
        normal = np.empty((len(rows), n, k))
        square = np.empty((len(rows), n))
        for i, row in enumerate(rows.tolist()):
            stream = self._stream(row, stage)
            stream.standard_normal(out=normal[i])
            square[i] = stream.chisquare(DEGREES, n)
        return (torch.as_tensor(a, device=self.device) for a in (normal, square))

    def rng(self, row: int, stage: int) -> torch.Generator:
        """Generator of torch for one row."""
        seed = int(self._stream(row, stage).integers(2**62))
        return torch.Generator(self.device).manual_seed(seed)

    def _stream(self, row, stage):
        self._state["state"]["key"][:] = self.keys[row], (self.seed << 8) + stage
        self._generator.bit_generator.state = self._state
        return self._generator
