"""What estimators of mixed tables add: parameters of the columns, and a report of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import numpy as np

from skebm._sklearn_compat import Interval, StrOptions
from skebm.training import Columns

from ._base import BaseDensity, parameters
from ._cells import Remedies
from ._schema import Schema


@dataclass(frozen=True)
class ColumnReport:
    """How one column of X was taken.

    Attributes
    ----------
    name : hashable
        Its label in a frame, its number in an array.
    kind : {"number", "category", "constant"}
    categories : tuple
        That were met, and have a probability each.
    pooled : tuple
        Rare categories that share one probability.
    missing : bool
        Whether missing cells are a state.
    atoms : tuple of float
        Numbers that are states of their own.
    step : float
        Of the grid that draws lie on; 0 for none.
    bounds : tuple of float
        Lowest and highest value of draws, where the rows pile up at them.
    """

    name: Any
    kind: str
    categories: tuple[Any, ...] = ()
    pooled: tuple[Any, ...] = ()
    missing: bool = False
    atoms: tuple[float, ...] = ()
    step: float = 0.0
    bounds: tuple[float, float] = (-np.inf, np.inf)


@parameters
class MixedDensity(BaseDensity):
    """Density of a table that may hold categories, missing cells and values of their own."""

    categorical_features: Literal["from_dtype"] | Sequence[Any] | None = "from_dtype"
    max_categories: int | None = None
    atoms: Literal["auto", "off"] | Mapping[Any, Sequence[float]] = "auto"
    handle_missing: Literal["state", "error"] = "state"

    # what a fit sets
    columns_: list[ColumnReport] = field(init=False)

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **BaseDensity._parameter_constraints,
        "categorical_features": [StrOptions({"from_dtype"}), "array-like", None],
        "max_categories": [Interval(Integral, 2, None, closed="left"), None],
        "atoms": [StrOptions({"auto", "off"}), Mapping],
        "handle_missing": [StrOptions({"state", "error"})],
    }

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = self._takes_missing
        tags.input_tags.categorical = True
        return tags

    _remedies = Remedies(
        'handle_missing="state" models missing cells',
        "name the columns of categories in categorical_features, or pass a DataFrame",
    )

    @property
    def _takes_missing(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.handle_missing == "state"

    def _read_schema(self, X):
        return Schema.learn(X, self.categorical_features, self.max_categories)

    def _kinds(self, rows, names):
        atoms: Any = "auto" if self.atoms == "auto" else None
        if isinstance(self.atoms, Mapping):
            atoms = {}
            for name, values in self.atoms.items():
                if name not in list(names):
                    raise ValueError(f"atoms has {name!r}, which is no column of X.")
                if not all(isinstance(v, Real) for v in np.atleast_1d(values)):
                    raise ValueError(f"atoms[{name!r}]={values!r} must be numbers.")
                atoms[list(names).index(name)] = np.atleast_1d(values)
        return super()._kinds(rows, names, atoms)

    def _report(self, columns: Columns, schema: Schema) -> list[ColumnReport]:
        """Every column as it was taken."""
        states = {s.column: s for s in columns.states}
        values = iter(columns.grids)
        reports = []
        for j, column in enumerate(schema.columns):
            grid = next(values) if columns.varying[j] else None
            state, constant = states.get(j), bool(columns.constant[j])
            kind = "constant" if constant else "category" if column.is_category else "number"
            reports.append(
                ColumnReport(
                    name=column.name,
                    kind=kind,
                    categories=column.levels,
                    pooled=tuple(level for level, _ in column.pooled),
                    missing=bool(state and state.missing),
                    atoms=state.atoms if state else (),
                    step=float(f"{grid.step:.9g}") if grid else 0.0,  # without dust of differences
                    bounds=(grid.low, grid.high) if grid else (-np.inf, np.inf),
                )
            )
        return reports
