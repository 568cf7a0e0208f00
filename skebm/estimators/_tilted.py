"""Bases tilted by energies: what a user writes for them, warm starts, and the fit."""

from abc import abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

from sklearn.utils.validation import check_memory
from torch.distributions import Distribution

from skebm._sklearn_compat import HasMethods, Interval, StrOptions
from skebm._statistics import gaussian_log_likelihood
from skebm.bases import CANDIDATES, ConfiningGaussian
from skebm.energies import (
    Boosting,
    EnergyModel,
    EnergyModelMixin,
    Network,
    resolve_energy_model,
)
from skebm.training import CONFINEMENT, Recipe, fit_tilted

from ._base import parameters
from ._members import MemberDensity
from ._warm_start import WarmStart

COMPARED_ROWS, CONFINED = 5_000, 0.1
"""Rows on which the base that a warm start keeps is compared with a fresh one; and by how many
nats per column a confining Gaussian may be worse."""

DISTRIBUTION = [StrOptions({"auto", *CANDIDATES}), list, tuple, Distribution,
                HasMethods(["score_samples", "sample"])]  # fmt: skip


class _Density(Protocol):
    def score_samples(self, X: Any) -> Any: ...
    def sample(self, n_samples: int) -> Any: ...


DistributionLike: TypeAlias = str | Sequence[str] | Distribution | _Density | None
"""What a user may write for `base` and `noise`."""


@parameters
class TiltedDensity(EnergyModelMixin, WarmStart, MemberDensity):
    """Bases tilted by energies; an estimator adds its fields and `_recipe`.

    It may override `_check_parameters`, too.
    """

    base: DistributionLike = "auto"
    energy_model: EnergyModel | None = "auto"
    recalibration: bool = True
    smoothing: float | Literal["scott"] = 0.0
    memory: Any = None

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **MemberDensity._parameter_constraints,
        **WarmStart._parameter_constraints,
        "base": [*DISTRIBUTION, None],
        "energy_model": "no_validation",  # its own `validate` says what is wrong
        "recalibration": ["boolean"],
        "smoothing": [StrOptions({"scott"}), Interval(Real, 0, None, closed="left")],
        "memory": [None, str, HasMethods(["cache"])],
    }

    @abstractmethod
    def _recipe(self) -> Recipe:
        """What is particular to the method, a `Recipe`; `_basic_recipe` knows the shared fields."""

    def _basic_recipe(self, train, **particular):
        """Recipe with what the shared fields say."""
        return Recipe(
            train=train,
            base=self.base,
            own_energy=not (self.energy_model is None or isinstance(self.energy_model, str)),
            n_partition_samples=self.n_partition_samples,
            recalibrates=self.recalibration,
            **particular,
        )

    def _resolve_energy_model(
        self, default: Network | Boosting, *, network_only: bool = False
    ) -> Any:
        """What `energy_model` says, checked: a specification, a classifier, or None for no energy.

        Parameters
        ----------
        default : Network or Boosting
            Of "auto".
        network_only : bool, default=False
            Whether the method trains networks and nothing else.
        """
        if self.energy_model is None:
            if self.base is None:
                raise ValueError(
                    "energy_model=None is the base alone, so that it needs a base; base is None."
                )
            return None
        model = resolve_energy_model(self.energy_model, default)
        if network_only and not isinstance(model, Network):
            raise ValueError(
                f"{type(self).__name__} trains networks only, and energy_model is {model!r}; take "
                "Network(...), a torch module, or NCEDensity."
            )
        if isinstance(model, Network | Boosting):
            model.validate()
        return model

    # ------------------------------------------------------------------ fit

    def _cannot_go_on_from(self, model, n_units):
        if model.n_members != min(self.n_members, n_units):
            return f"the last fit has {model.n_members} members"
        if isinstance(model.bases[0], ConfiningGaussian) != (self.base is None):
            return "base is another one"
        return None

    def _kept_and_fresh(self, model, x, weight):
        x, weight = x[:COMPARED_ROWS], weight[:COMPARED_ROWS]
        kept = (model.base_log_prob(x) @ weight / weight.sum()).item()
        if self.base is not None:
            return kept, gaussian_log_likelihood(x, weight)
        # what confines an energy without a base is no model of the rows, but it has to hold them
        center = weight @ x / weight.sum()
        variance = weight @ (x - center).square() / weight.sum()
        fresh = ConfiningGaussian(center, CONFINEMENT**2 * variance).log_prob(x)
        return kept, (fresh @ weight / weight.sum()).item() - CONFINED * x.shape[1]

    def _fit(self, rows, weight, columns, context):
        shares = self.memory is not None and self.random_state is not None
        memory = check_memory(self.memory) if shares else None
        particular = {"smoothing": self.smoothing, "memory": memory}
        return fit_tilted(self._task(rows, weight, columns, context, **particular), self._recipe())
