r"""Value, gradient and Laplacian of an energy in one forward and one reverse sweep.

Score matching trains on :math:`\tfrac12 |\nabla f|^2 + \Delta f`. A loop of d backward passes is
the usual way to the Laplacian; here it costs one forward sweep of directions. With the outputs
:math:`y_l` of the nonlinear layers, :math:`\delta_l = \partial f / \partial y_l` of one reverse
sweep, and J the derivatives along the directions that are summed over,

.. math:: \Delta f = \sum_l \langle \delta_l, C_l \rangle, \qquad
    C_l = \sum_r y_l''[J_r, J_r] \quad (= s''(h_l) \sum_r J_r^2 \text{ for } y_l = s(h_l)),

so that second derivatives are never streamed, and nothing is after the last nonlinear layer.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from skebm._random import seeded_global_rng
from skebm.derivatives._jets import Jet
from skebm.derivatives._rules import normalise
from skebm.derivatives._tangents import NoRule, Record, require
from skebm.energies import ModuleStack

__all__ = ["derivatives"]


def derivatives(
    energy: Callable[[Tensor], Tensor], z: Tensor, directions: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Value, gradient and Laplacian (or second derivatives along directions) of an energy.

    All three can be differentiated once more with respect to the parameters of the energy, not
    with respect to `z`: ``(0.5 * gradient.square().sum(-1) + curvature).mean().backward()`` is a
    step of score matching.

    Rows must not interact. A function that is linear between kinks (ReLU,
    :class:`~skebm.energies.PiecewiseLinearEmbedding`) has second derivative zero there; what its
    kinks would add to the Laplacian is left out, as by any other automatic differentiation.

    Parameters
    ----------
    energy : StackedEnergy, torch.nn.Module or callable
        A stack (K, n, d) -> (K, n), or any function (n, d) -> (n,) or (n, 1). The usual layers
        have fast rules, also with residual sums and Python control flow; anything else is
        differentiated by d (or P) double backward passes, to the same result.
    z : Tensor of shape (K, n, d) or (n, d)
        Where to evaluate.
    directions : Tensor of shape (K, P, n, d) or (P, n, d), optional
        Vectors v, with the axis of the P directions in front of the axis of the rows. All unit
        vectors by default.

    Returns
    -------
    value : Tensor of shape (K, n) or (n,)
        Values f.
    gradient : Tensor of shape (K, n, d) or (n, d)
        Gradient of f in z.
    curvature : Tensor of shape (K, n) or (n,)
        The Laplacian :math:`\Delta f`, or with `directions` the sum of :math:`v^T \nabla^2 f\, v`
        over them.

    See Also
    --------
    value_and_gradient : Without a graph, for chains.
    skebm.objectives.score_matching_losses : What it is made for.

    References
    ----------
    Hyvärinen, A. (2005). Estimation of non-normalized statistical models by score matching. JMLR
    6. https://jmlr.org/papers/v6/hyvarinen05a.html

    Song, Y., Garg, S., Shi, J. and Ermon, S. (2019). Sliced score matching. UAI.
    https://arxiv.org/abs/1905.07088

    Li, R. et al. (2024). A computational framework for neural network-based variational Monte
    Carlo with forward Laplacian. Nature Machine Intelligence 6. https://arxiv.org/abs/2307.08214

    Dangel, F. et al. (2025). Collapsing Taylor mode automatic differentiation. NeurIPS.
    https://arxiv.org/abs/2505.13644

    Examples
    --------
    >>> import torch
    >>> from skebm.derivatives import derivatives
    >>> z = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    >>> with torch.no_grad():  # no need of gradients in the parameters
    ...     derivatives(lambda z: (z**3).sum(-1), z)
    (tensor([ 9., 27.]), tensor([[ 3., 12.], [ 0., 27.]]), tensor([18., 18.]))
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        try:
            value, records = _evaluate(energy, z, directions)
        except (NoRule, TypeError, AttributeError):
            # No rule, or a use that only a tensor bears. Whatever is wrong with the energy itself
            # shows up again here; anything else (no memory, a bug) is for the caller to see.
            result = _by_double_backward(energy, z, directions, create_graph)
        else:
            result = _by_records(value, records, z, create_graph)
    value, gradient, curvature = result
    if create_graph:
        return value, gradient, curvature
    return value.detach(), gradient.detach(), curvature.detach()


def _by_double_backward(energy, z, directions, create_graph):
    """The same by one more backward pass per direction."""
    with _Primitives(), sdpa_kernel(SDPBackend.MATH):
        value = _rows(energy(z), z)
    (gradient,) = _grad(value.sum(), [z], create_graph=True)
    if directions is None:
        directions = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device).unsqueeze(1)
    curvature = torch.zeros_like(value)
    for v in directions.unbind(-3):
        (product,) = _grad((gradient * v).sum(), [z], create_graph=create_graph)
        curvature = curvature + (product * v).sum(-1)
    return value, gradient, curvature


class _Primitives(TorchFunctionMode):
    """``layer_norm`` in elementary steps, which can be differentiated three times."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (functional.layer_norm, torch.layer_norm):
            return _layer_norm_by_steps(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _layer_norm_by_steps(x, normalized_shape, weight=None, bias=None, eps=1e-5, *_):
    y, _ = normalise(x, eps, tuple(range(-len(normalized_shape), 0)))
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _grad(output, inputs, create_graph):
    """Gradients, zero where the output does not depend on an input."""
    if not output.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(
        output, inputs, create_graph=create_graph, retain_graph=True, materialize_grads=True
    )


def _rows(value, z):
    rows = z.shape[:-1]
    if not isinstance(value, Tensor) or value.shape not in (rows, (*rows, 1)):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"energy must map z of shape {tuple(z.shape)} to one value per row, got {got}."
        )
    return value.reshape(rows)


def _evaluate(energy, z, directions):
    """Value of the energy, and the records of its nonlinear layers."""
    if isinstance(energy, ModuleStack):
        jet, record = _through_members(energy, z, directions)
    else:
        record = Record(z, directions)
        jet: Any = energy(Jet.of_input(record))
    require(isinstance(jet, Jet))
    return _rows(jet.value, record.z).reshape(z.shape[:-1]), [record, *record.members]


def _by_records(value, records, z, create_graph):
    outputs = [y for record in records for y, *_ in record.layers]
    gradient, *deltas = _grad(value.sum(), [z, *outputs], create_graph=create_graph)
    deltas = iter(deltas)
    with torch.set_grad_enabled(create_graph):
        parts = [record.curvature([next(deltas) for _ in record.layers]) for record in records]
        curvature = parts[0] if len(parts) == 1 else parts[0] + torch.stack(parts[1:])
    return value, gradient, curvature.reshape(value.shape)


def _through_members(energy, z, directions):
    """What ModuleStack does, but for its check that modules return tensors."""
    if z.ndim == 2:
        z, directions = z.unsqueeze(0), None if directions is None else directions.unsqueeze(0)
    record = Record(z, directions)
    energy._next_seed += energy.training
    with seeded_global_rng(energy._next_seed, z.device) if energy.training else nullcontext():
        values = [u(x) for u, x in zip(energy.members, Jet.of_input(record), strict=True)]
    values = torch.stack([value.reshape(z.shape[1]) for value in values])
    return energy.gain.unsqueeze(-1) * values, record
