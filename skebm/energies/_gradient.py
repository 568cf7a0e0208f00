"""Value and gradient in x of an energy, without autograd: what Markov chains ask for.

A chain needs f(x) and its gradient thousands of times, and never a gradient in the weights.
Autograd pays for a graph and fresh memory at each call; here the layers of a network are run
forwards and backwards by hand, in buffers that are kept.
"""

import math
import threading

import torch
from torch import Tensor, nn

from skebm.energies._embeddings import PeriodicEmbedding, PiecewiseLinearEmbedding
from skebm.energies._networks import MLPEnergy
from skebm.energies._products import is_large, product
from skebm.energies._stack import ModuleStack, StackedEnergy

__all__ = ["InputGradient"]

# torch's kernels of layers: functions that also take `out`, and their derivatives
_nn, _aten = torch._C._nn, torch.ops.aten

# Rows in one pass on a CPU, and those below which the members of a stack go together.
_BLOCK_ROWS, _FEW_ROWS = 1024, 128


class InputGradient:
    """A log-density that also offers ``value_and_gradient``, at a fraction of autograd's cost.

    By hand go :class:`~skebm.energies.MLPEnergy`, ``nn.Sequential`` chains of linear layers, the
    usual activations, LayerNorm and dropout in evaluation mode, and
    :class:`~skebm.energies.ModuleStack` of such chains. Anything else goes through autograd, with
    the same answers. The layers are looked up here, once; their weights at each call, so that
    they may be trained in between.

    Parameters
    ----------
    energy : callable
        (n, d) -> (n,) or (n, 1); a stack of energies (K, n, d) -> (K, n).

    Notes
    -----
    Threads may share one program. Buffers are no part of copies and pickles.
    """

    def __init__(self, energy):
        self.energy = energy
        self._stacked = isinstance(energy, StackedEnergy)
        self._chains = _chains(energy)
        self._dropouts = [module for chain in self._chains or () for module in chain.dropouts]

    def __reduce__(self):
        return type(self), (self.energy,)

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate f; differentiable by autograd where x asks for it.

        Parameters
        ----------
        x : Tensor of shape (n, d) or (K, n, d)

        Returns
        -------
        Tensor of shape (n,) or (K, n)
        """
        return self.energy(x).reshape(x.shape[:-1])

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate f and its gradient in x.

        Parameters
        ----------
        x : Tensor of shape (n, d) or (K, n, d)

        Returns
        -------
        value : Tensor of shape (n,) or (K, n)
        gradient : Tensor of the shape of x
            Both without a graph, and yours: no later call writes to them.
        """
        if not self._fits(x):
            return self._by_autograd(x)
        with torch.no_grad():
            if not self._stacked:
                return self._chains[0].run(x)
            if x.ndim == 2:
                value, gradient = self._run_stack(x.unsqueeze(0))
                return value.squeeze(0), gradient.squeeze(0)
            return self._run_stack(x)

    def _fits(self, x):
        if self._chains is None or any(module.training for module in self._dropouts):
            return False
        if not self._stacked:
            return x.ndim == 2
        energy = self.energy
        return x.shape[-1:] == (energy.n_features,) and (
            len(x) == energy.n_members if x.ndim == 3 else x.ndim == 2 and energy.n_members == 1
        )

    def _run_stack(self, x):
        if not isinstance(self.energy, ModuleStack):
            return self._chains[0].run(x)
        runs = [chain.run(rows) for chain, rows in zip(self._chains, x, strict=True)]
        values, gradients = map(torch.stack, zip(*runs, strict=True))
        gain = self.energy.gain.unsqueeze(-1)
        return values.mul_(gain), gradients.mul_(gain.unsqueeze(-1))

    def _by_autograd(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self(x)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), gradient


class _Chain:
    """Layers one after the other, run forwards and backwards in buffers of the thread."""

    # Two batch sizes in turn, each with whole blocks and a rest.
    _N_WORKSPACES = 4

    def __init__(self, parts):
        self.parts = [part for part in parts if part[0] is not None]
        self.dropouts = [module for layer, module in parts if layer is None]
        self.local = threading.local()

    def run(self, x):
        """Value and gradient, in blocks; the members of a stack one by one if that is faster."""
        if x.device.type != "cpu":
            return self.run_rows(x, 64 * _BLOCK_ROWS)
        if x.ndim == 2 or len(x) == 1 or x.shape[1] <= _FEW_ROWS:
            return self.run_rows(x, _BLOCK_ROWS)
        runs = [self.run_rows(x[k : k + 1], _BLOCK_ROWS, k) for k in range(len(x))]
        return tuple(map(torch.cat, zip(*runs, strict=True)))

    def run_rows(self, x, n_rows, member=None):
        if x.shape[-2] <= n_rows:
            return self.run_block(x, member)
        blocks = [self.run_block(rows, member) for rows in x.split(n_rows, dim=-2)]
        values, gradients = zip(*blocks, strict=True)
        return torch.cat(values, -1), torch.cat(gradients, -2)

    def run_block(self, x, member):
        layers, seed = self.workspace(x)
        h = x
        for layer in layers:
            layer.member = member
            h = layer.forward(h)
        value, g = h.sum(-1), seed
        for layer in reversed(layers):
            g = layer.backward(g)
        return value, g.clone() if g is layers[0].out else g

    def workspace(self, x):
        key = (x.shape, x.dtype, x.device)
        workspaces = self.local.__dict__.setdefault("workspaces", {})
        if key not in workspaces:
            if len(workspaces) >= self._N_WORKSPACES:
                del workspaces[next(iter(workspaces))]
            # buffers born in inference mode could not be used outside of it
            with torch.inference_mode(False):
                layers, h = [], torch.empty_like(x)
                for layer, module in self.parts:
                    layers.append(layer(module, h))
                    h = layers[-1].out
                layers[0].grad = None  # the result: a new tensor at each call
                workspaces[key] = layers, torch.ones_like(h)
        return workspaces[key]


def _chains(energy):
    """The chains of an energy, one for all members or one for each; None to use autograd."""
    if not _is_plain(energy):
        return None
    if type(energy) is ModuleStack:
        parts = [_sequence(member) for member in energy.members]
    elif type(energy) is MLPEnergy:
        parts = [_mlp(energy)]
    else:
        parts = [_sequence(energy)]
    return None if None in parts else [_Chain(one) for one in parts]


def _is_plain(energy):
    """Whether nothing was hung onto a module that changes what it computes."""
    return isinstance(energy, nn.Module) and not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
        for module in energy.modules()
    )


def _mlp(energy):
    parts = []
    if energy.embedding is not None:
        if type(energy.embedding) not in _EMBEDDINGS:
            return None
        parts.append((_EMBEDDINGS[type(energy.embedding)], energy.embedding))
    parts += [(_StackedHidden, layer) for layer in energy.hidden]
    return [*parts, (_StackedOutput, energy)]


def _sequence(module):
    """Layers and modules of a chain (n, d) -> (n,) or (n, 1); None as layer of a dropout."""
    leaves = list(_leaves(module))
    widths = [leaf.out_features for leaf in leaves if type(leaf) is nn.Linear]
    if not widths or widths[-1] != 1:
        return None
    parts = []
    for leaf in leaves:
        if type(leaf) in _DROPOUTS:
            parts.append((None, leaf))
        elif type(leaf) in _LAYERS:
            parts.append((_LAYERS[type(leaf)], leaf))
        elif type(leaf) is nn.Flatten:
            if leaf.start_dim != 1 and leaf is not leaves[-1]:
                return None
        elif type(leaf) is not nn.Identity:
            return None
    return parts


def _leaves(module):
    if type(module) is nn.Sequential:
        for part in module:
            yield from _leaves(part)
    else:
        yield module


# Layers, each for inputs h of one shape; `backward` comes after `forward`. Weights are read at each
# call, from where modules keep them.


class _Linear:
    def __init__(self, module, h):
        self.weights, self.grad = module._parameters, torch.empty_like(h)
        self.out = h.new_empty(len(h), module.out_features)
        self.is_large = is_large(h, module.out_features)

    def forward(self, h):
        weight, bias = self.weights["weight"], self.weights["bias"]
        if self.is_large:
            return product(h, weight.t(), bias)
        return _nn.linear(h, weight, bias, out=self.out)

    def backward(self, g):
        weight = self.weights["weight"]
        if self.is_large:
            return product(g, weight)
        return (torch.mul if len(weight) == 1 else torch.mm)(g, weight, out=self.grad)


class _LayerNorm:
    def __init__(self, module, h):
        self.module, self.out = module, h

    def forward(self, h):
        m = self.module
        self.h = h
        y, *self.moments = torch.native_layer_norm(h, m.normalized_shape, m.weight, m.bias, m.eps)
        return y

    def backward(self, g):
        m, only_h = self.module, [True, False, False]
        return _aten.native_layer_norm_backward(
            g, self.h, m.normalized_shape, *self.moments, m.weight, m.bias, only_h
        )[0]


class _Activation:
    """An elementwise function, by torch's own kernels of its value and its derivative."""

    def __init__(self, module, h):
        self.module, self.out = module, torch.empty_like(h)
        self.value, self.chain = _ACTIVATIONS[type(module)]

    def forward(self, h):
        self.h = h
        return self.value(self.module, h, self.out)

    def backward(self, g):
        return self.chain(self.module, g, self.h, self.out)


# y = s(x), and then g s'(x), both into y
_ACTIVATIONS = {
    nn.SiLU: (
        lambda m, x, y: _nn.silu(x, out=y),
        lambda m, g, x, y: _aten.silu_backward.grad_input(g, x, grad_input=y),
    ),
    nn.Tanh: (
        lambda m, x, y: torch.tanh(x, out=y),
        lambda m, g, x, y: _aten.tanh_backward.grad_input(g, y, grad_input=y),
    ),
    nn.Sigmoid: (
        lambda m, x, y: torch.sigmoid(x, out=y),
        lambda m, g, x, y: _aten.sigmoid_backward.grad_input(g, y, grad_input=y),
    ),
    nn.Softplus: (
        lambda m, x, y: _nn.softplus(x, m.beta, m.threshold, out=y),
        lambda m, g, x, y: _aten.softplus_backward.grad_input(
            g, x, m.beta, m.threshold, grad_input=y
        ),
    ),
    nn.GELU: (
        lambda m, x, y: _nn.gelu(x, approximate=m.approximate, out=y),
        lambda m, g, x, y: _aten.gelu_backward.grad_input(
            g, x, approximate=m.approximate, grad_input=y
        ),
    ),
    nn.ReLU: (
        lambda m, x, y: torch.clamp_min(x, 0, out=y),
        lambda m, g, x, y: _aten.threshold_backward.grad_input(g, x, 0, grad_input=y),
    ),
    nn.LeakyReLU: (
        lambda m, x, y: _nn.leaky_relu(x, m.negative_slope, out=y),
        lambda m, g, x, y: _aten.leaky_relu_backward.grad_input(
            g, x, m.negative_slope, False, grad_input=y
        ),
    ),
    nn.ELU: (
        lambda m, x, y: _nn.elu(x, m.alpha, out=y),
        lambda m, g, x, y: _aten.elu_backward.grad_input(g, m.alpha, 1, 1, False, x, grad_input=y),
    ),
}
_LAYERS = dict.fromkeys(_ACTIVATIONS, _Activation)
_LAYERS |= {nn.Linear: _Linear, nn.LayerNorm: _LayerNorm}
_DROPOUTS = (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _rows(weights, member):
    """Of a weight of all members, that of one (None: of all)."""
    return weights if member is None else weights[member : member + 1]


class _StackedHidden:
    def __init__(self, module, h):
        self.module, self.grad = module, torch.empty_like(h)
        self.width = module.weight.shape[-1:]
        self.linear, self.affine, self.out = h.new_empty(3, *h.shape[:-1], *self.width)
        self.is_large = is_large(h, *self.width)

    def forward(self, h):
        m = self.module
        weights = (m.offset, m.weight, m.gain, m.bias)
        offset, self.weight, self.gain, bias = (_rows(w, self.member) for w in weights)
        if self.is_large:
            self.linear = product(h, self.weight, offset)
        else:
            torch.baddbmm(offset, h, self.weight, out=self.linear)
        y, *self.moments = torch.native_layer_norm(self.linear, self.width, None, None, 1e-5)
        torch.addcmul(bias, y, self.gain, out=self.affine)
        return _nn.silu(self.affine, out=self.out)

    def backward(self, g):
        g = _aten.silu_backward.grad_input(g, self.affine, grad_input=self.out).mul_(self.gain)
        g = _aten.native_layer_norm_backward(
            g, self.linear, self.width, *self.moments, None, None, [True, False, False]
        )[0]
        if self.is_large:
            return product(g, self.weight.mT)
        return torch.bmm(g, self.weight.mT, out=self.grad)


class _StackedOutput:
    def __init__(self, energy, h):
        self.energy, self.grad = energy, torch.empty_like(h)
        self.out = h.new_empty(*h.shape[:-1], 1)

    def forward(self, h):
        self.weight = _rows(self.energy.output, self.member)
        return torch.bmm(h, self.weight, out=self.out)

    def backward(self, g):
        return torch.mul(g, self.weight.mT, out=self.grad)


class _Periodic:
    def __init__(self, module, h):
        self.module, n_frequencies = module, module.frequencies.shape[-1]
        self.phase = h.new_empty(*h.shape, n_frequencies)
        self.out = h.new_empty(*h.shape[:-1], module.n_outputs)
        self.sin, self.cos = self.halves(self.out)

    def forward(self, h):
        self.rates = 2 * math.pi * _rows(self.module.frequencies, self.member)
        torch.mul(self.rates, h.unsqueeze(-1), out=self.phase)
        torch.sin(self.phase, out=self.sin)
        torch.cos(self.phase, out=self.cos)
        return self.out

    def backward(self, g):
        of_sin, of_cos = self.halves(g)
        torch.mul(of_sin, self.cos, out=self.phase).addcmul_(of_cos, self.sin, value=-1)
        return self.phase.mul_(self.rates).sum(-1)

    def halves(self, encoded):
        return encoded.unflatten(-1, (2, *self.phase.shape[-2:])).unbind(-3)


class _PiecewiseLinear:
    def __init__(self, module, h):
        self.module = module
        self.line, self.clipped = h.new_empty(2, *h.shape, module.scale.shape[-1])
        self.out = self.clipped.flatten(-2)

    def forward(self, h):
        m = self.module
        weights = (m.shift, m.scale, m.lowest, m.highest)
        shift, scale, lowest, highest = (_rows(w, self.member) for w in weights)
        torch.addcmul(shift, h.unsqueeze(-1), scale, out=self.line)
        torch.clamp(self.line, lowest, highest, out=self.clipped)
        self.slope = self.line.eq_(self.clipped).mul_(scale)  # 1 or 0, times the scale
        return self.out

    def backward(self, g):
        return self.slope.mul_(g.view(self.slope.shape)).sum(-1)


_EMBEDDINGS = {PeriodicEmbedding: _Periodic, PiecewiseLinearEmbedding: _PiecewiseLinear}
