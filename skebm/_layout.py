"""What the columns of a row are: states first, then values.

A column of a table is a *state* (a category, missing, a value of its own such as zero, or "a
number") and, where the state says "a number", a *value*. A row of a tensor holds the codes of its
states, 0, 1, ..., and then its values, NaN where the state says that there is none.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Cell", "Layout"]


class Cell(NamedTuple):
    """Where a cell of a table is in a row: its state, its value, or both.

    Attributes
    ----------
    state, value : int
        Columns of the row; -1 for none.
    n_states : int
        Number of states; 0 without a column of states.
    missing : int
        Which of these says that it is missing; -1 for none.
    """

    state: int = -1
    value: int = -1
    n_states: int = 0
    missing: int = -1

    @property
    def columns(self) -> list[int]:
        """Its columns of the row; none for a cell of a constant column."""
        return [j for j in (self.state, self.value) if j >= 0]


class Layout(nn.Module):
    """Which columns of a row tensor are states, and which values they switch on.

    It has no parameters; it is a module so that it is stored with the modules that hold one.

    Parameters
    ----------
    sizes : sequence of int
        Number of states of every column of states.
    value_of : sequence of int
        Value that is there where such a column shows state 0, as a number among the values; -1
        for categories, which have none.
    n_values : int
        Number of columns of values.
    """

    sizes: tuple[int, ...]
    value_of: tuple[int, ...]
    n_values: int

    def __init__(self, sizes: Sequence[int], value_of: Sequence[int], n_values: int):
        super().__init__()
        self.sizes, self.value_of = tuple(map(int, sizes)), tuple(map(int, value_of))
        self.n_values = int(n_values)

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}, value_of={self.value_of}, n_values={self.n_values}"

    @property
    def n_states(self) -> int:
        """Number of columns of states."""
        return len(self.sizes)

    @property
    def n_features(self) -> int:
        """Number of columns of a row."""
        return len(self.sizes) + self.n_values

    def codes(self, x: Tensor) -> Tensor:
        """States of rows, (n, n_features) -> (n, n_states), integers."""
        return x[:, : self.n_states].long()

    def values(self, x: Tensor) -> Tensor:
        """Values of rows, (n, n_features) -> (n, n_values); NaN where there is none."""
        return x[:, self.n_states :]

    def join(self, codes: Tensor, values: Tensor) -> Tensor:
        """Rows of states and values; values whose state says so are left out."""
        values = values.clone()
        for i, j in enumerate(self.value_of):
            if j >= 0:
                values[codes[:, i] != 0, j] = torch.nan
        return torch.cat([codes.to(values), values], dim=1)

    def unknown(self, x: Tensor) -> Tensor:
        """Which cells of rows are not known, (n, n_features) of bool.

        A state is unknown where its code is negative, as of a category that was never met, and a
        value where it is NaN though no state says so. The value of an unknown state is unknown.
        """
        lost = x[:, : self.n_states] < 0
        value_lost = self.values(x).isnan()
        for i, j in enumerate(self.value_of):
            if j >= 0:
                value_lost[:, j] &= x[:, i] <= 0
        return torch.cat([lost, value_lost], dim=1)

    def subset(self, kept: Sequence[int]) -> "Layout":
        """Layout of rows of these columns alone, in their order."""
        states = [i for i in kept if i < self.n_states]
        place = {j - self.n_states: k for k, j in enumerate(kept[len(states) :])}
        return Layout(
            [self.sizes[i] for i in states],
            [place.get(self.value_of[i], -1) for i in states],
            len(place),
        )

    def one_hot(self, x: Tensor) -> Tensor:
        """Indicators of all states, (n, sum of sizes); zeros for those that are unknown."""
        codes = self.codes(x)
        parts = [
            (codes[:, i, None] == torch.arange(size, device=x.device)).to(x.dtype)
            for i, size in enumerate(self.sizes)
        ]
        return torch.cat(parts, dim=1) if parts else x.new_zeros(len(x), 0)

    def as_numbers(self, z: Tensor) -> Tensor:
        """Rows for what knows numbers only: indicators of states, and values, 0 for those absent.

        Parameters
        ----------
        z : Tensor of shape (..., n_features)

        Returns
        -------
        Tensor of shape (..., n_numbers)
        """
        rows = z.reshape(-1, self.n_features)
        values = self.values(rows).nan_to_num(0.0, torch.inf, -torch.inf)
        numbers = torch.cat([self.one_hot(rows), values], dim=1)
        return numbers.view(*z.shape[:-1], self.n_numbers)

    @property
    def n_numbers(self) -> int:
        """Number of columns that `as_numbers` returns."""
        return sum(self.sizes) + self.n_values

    def likeliest(self, means: Tensor) -> Tensor:
        """Rows with the likeliest states, and the mean values given these.

        Parameters
        ----------
        means : Tensor of shape (n, n_numbers)
            Means of `as_numbers`: probabilities of the states, and means of values that are 0 where
            there is none.

        Returns
        -------
        Tensor of shape (n, n_features)
        """
        *masses, values = means.split([*self.sizes, self.n_values], dim=1)
        values = values.clone()
        for mass, j in zip(masses, self.value_of, strict=True):
            if j >= 0:
                values[:, j] /= mass[:, 0]
        codes = [mass.argmax(1) for mass in masses]
        return self.join(torch.stack(codes, dim=1), values) if codes else values
