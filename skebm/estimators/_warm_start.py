"""When a fit may go on from an earlier one."""

import copy
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch

from skebm._warnings import warn

from ._base import OF_X, BaseDensity, parameters


@parameters
class WarmStart(BaseDensity):
    """Density whose parameter `warm_start` lets a fit go on from the last one.

    It does so only where that is the same kind of model, and where what it would leave of it is at
    least as good as a fresh start.
    """

    warm_start: bool = False

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **BaseDensity._parameter_constraints,
        "warm_start": ["boolean"],
    }

    @abstractmethod
    def _cannot_go_on_from(self, model: Any, n_units: int) -> str | None:
        """Why a warm start on so many rows, or groups of them, would be another model; or None."""

    @abstractmethod
    def _kept_and_fresh(
        self, model: Any, x: torch.Tensor, weight: torch.Tensor
    ) -> tuple[float, float]:
        """Mean log-density of standardised rows under what a warm start keeps, and a fresh start.

        That is a Gaussian of these rows, where the estimator has no simpler start.
        """

    def _start(self, before, rows, weight, columns, n_units):
        """The model that a warm start goes on from, on the CPU, or None for a cold one."""
        model, was = before.get("model_"), before.get("_columns")
        if not self.warm_start or model is None:
            return None
        reason = None
        if any(np.any(before.get(name) != getattr(self, name, None)) for name in OF_X):
            reason = "X has other columns"
        elif not np.array_equal(was.precision, columns.precision):
            reason = "the columns have other dtypes"
        elif not was.has_states_of(columns):
            reason = "other columns are constant, or have other states"
        elif columns.states:
            reason = f"{columns.first_state()}, and only tables of numbers go on"
        else:
            reason = self._cannot_go_on_from(model, n_units)
        if reason is None:
            kept, fresh = self._kept_and_fresh(
                model, self._tensor(rows), torch.as_tensor(weight, device=self._device)
            )
            if not kept >= fresh:
                reason = (
                    f"what the last fit would leave gives these rows {kept:.2f} nats on average, "
                    f"and a fresh start {fresh:.2f}"
                )
        if reason is not None:
            warn(f"warm_start=True, but {reason}: this fit starts anew.")
            return None
        return copy.deepcopy(model).to("cpu")
