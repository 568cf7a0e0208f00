"""A bound on the singular values of weights, kept up while they are trained."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from skebm.energies._networks import MLPEnergy

__all__ = ["SpectralBound"]

_FIRST_ITERATIONS = 20


class SpectralBound:
    """Holds the largest singular value of every weight matrix at or below a bound.

    Weights that exceed it are scaled down in place (Gouk et al. 2021; Miyato et al. 2018 divide
    all weights by it), so that the module stays what it is and an average of such weights keeps to
    the bound too. Singular values come from a power iteration that goes on from call to call.

    Parameters
    ----------
    energy : nn.Module
        All layers of :class:`~skebm.energies.MLPEnergy` count, and in any other module every
        parameter named ``weight`` with at least two axes, flattened to (n_outputs, rest).
    bound : float
        Positive.

    References
    ----------
    Miyato, T., Kataoka, T., Koyama, M. and Yoshida, Y. (2018). Spectral normalization for
    generative adversarial networks. ICLR.

    Gouk, H., Frank, E., Pfahringer, B. and Cree, M. (2021). Regularisation of neural networks by
    enforcing Lipschitz continuity. Machine Learning 110.

    Examples
    --------
    >>> import torch
    >>> from skebm.energies import SpectralBound
    >>> layer = torch.nn.Linear(2, 2)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
    >>> SpectralBound(layer, 2.0).apply()
    >>> layer.weight.data
    tensor([[2.0000, 0.0000],
            [0.0000, 0.5000]])
    """

    def __init__(self, energy: nn.Module, bound: float):
        self.bound = bound
        self._stacks = {
            w for part in energy.modules() if isinstance(part, MLPEnergy)
            for w in (part.output, *(layer.weight for layer in part.hidden))
        }  # fmt: skip
        weights = (part._parameters.get("weight") for part in energy.modules())
        matrices = {w for w in weights if w is not None and w.ndim > 1}
        self._weights = [w for w in energy.parameters() if w in self._stacks | matrices]
        self._vectors = [torch.ones_like(self._matrices(w)[:, :1]) for w in self._weights]
        for _ in range(_FIRST_ITERATIONS):
            self._norms()

    @torch.no_grad()
    def apply(self) -> None:
        """Scale down what exceeds the bound: to be called after every step of an optimiser."""
        for weight, norm in zip(self._weights, self._norms(), strict=True):
            self._matrices(weight).mul_((self.bound / norm.clamp_min(1e-12)).clamp_max(1.0))

    def _matrices(self, weight: nn.Parameter) -> Tensor:
        """View of a weight as a stack of matrices, (K, m, n)."""
        return weight.data if weight in self._stacks else weight.data.flatten(1)[None]

    def _norms(self) -> list[Tensor]:
        """Largest singular values, (K, 1, 1) each, after one more iteration."""
        norms = []
        for i, weight in enumerate(self._weights):
            matrix = self._matrices(weight)
            image = functional.normalize(self._vectors[i], dim=-1) @ matrix.mT
            vector = functional.normalize(image, dim=-1) @ matrix
            norms.append(vector.norm(dim=-1, keepdim=True))
            # a weight of zero has no direction to go on from
            self._vectors[i] = torch.where(norms[i] > 0, vector, self._vectors[i])
        return norms
