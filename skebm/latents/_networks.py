"""Networks between rows and latent variables: perceptrons, and modules of the user."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from skebm._modules import PrivateStream, build_module, describe, try_module
from skebm._random import seeded_global_rng

__all__ = ["perceptron", "user_network"]


def perceptron(
    n_inputs: int, n_outputs: int, hidden_layer_sizes: Sequence[int], *, seed: int
) -> nn.Module:
    """Linear, LayerNorm, SiLU, ..., linear; the last layer starts at zero, so the network does.

    Parameters
    ----------
    n_inputs, n_outputs : int
    hidden_layer_sizes : sequence of int
    seed : int
        Of the initial weights.

    Returns
    -------
    nn.Module
        (..., n_inputs) -> (..., n_outputs).

    See Also
    --------
    user_network : The same for a module of yours.
    AffinePlus : Adds it to an affine map.

    Examples
    --------
    >>> import torch
    >>> from skebm.latents import perceptron
    >>> network = perceptron(n_inputs=3, n_outputs=2, hidden_layer_sizes=(16, 16), seed=0)
    >>> network(torch.ones(1, 3)).detach()
    tensor([[0., 0.]])
    """
    layers, width = [], n_inputs
    with seeded_global_rng(seed):
        for n_units in hidden_layer_sizes:
            # in place: without gradients a third of the time, which goes into fresh memory
            layers += [nn.Linear(width, n_units), nn.LayerNorm(n_units), nn.SiLU(inplace=True)]
            width = n_units
        last = nn.Linear(width, n_outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


def user_network(
    model: nn.Module | Callable[..., nn.Module],
    name: str,
    n_inputs: int,
    n_outputs: int,
    *,
    seed: int,
) -> nn.Module:
    """Copy of a user's module, or what the user's class or factory makes, in float32 on the CPU.

    Random numbers that it draws in training mode (dropout) come from a private stream.

    Parameters
    ----------
    model : nn.Module or callable
        A callable is called with (n_inputs, n_outputs).
    name : str
        Of the parameter that it was given as, for the errors.
    n_inputs, n_outputs : int
    seed : int

    Returns
    -------
    nn.Module
        (..., n_inputs) -> (..., n_outputs).

    Raises
    ------
    ValueError
        If `model` is neither, or does not map (n, n_inputs) to (n, n_outputs).

    See Also
    --------
    perceptron : The network where a user gives none.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from skebm.latents import user_network
    >>> network = user_network(nn.Linear, "decoder", n_inputs=2, n_outputs=5, seed=0)
    >>> network(torch.ones(3, 2)).shape
    torch.Size([3, 5])
    """
    with seeded_global_rng(seed):
        module = build_module(model, name, n_inputs, n_outputs).to("cpu", torch.float32)
        got = try_module(module, name, n_inputs)
    if not isinstance(got, Tensor) or got.shape != (3, n_outputs):
        raise ValueError(
            f"{name} must map (n, {n_inputs}) to (n, {n_outputs}); "
            f"for n=3 it returned {describe(got)}."
        )
    return _UserNetwork(module, n_outputs, seed).train()


class _UserNetwork(PrivateStream, nn.Module):
    def __init__(self, module: nn.Module, n_outputs: int, seed: int):
        super().__init__()
        self.module, self.n_outputs, self._next_seed = module, n_outputs, seed + 1

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # modules of users, of images say, need not know leading axes
        with self._stream(x.device):
            values = self.module(rows)
        return values.view(*x.shape[:-1], self.n_outputs)
