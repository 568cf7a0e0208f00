import gc
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from skebm.derivatives import _derivatives, _jets, _tangents, derivatives
from skebm.energies import (
    MLPEnergy,
    ModuleStack,
    PeriodicEmbedding,
    PiecewiseLinearEmbedding,
    StackedEnergy,
)
from skebm.energies._embeddings import MixedEmbedding

TOLERANCE = 1e-10


def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    """In steps: the third derivative of torch's own is wrong (pytorch/pytorch#175754)."""
    x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return (y if weight is None else y * weight) + (0.0 if bias is None else bias)


def by_hessian(energy, z, directions=None):
    """One backward pass per direction, as in a textbook."""
    z = z.clone().requires_grad_()
    value = energy(z).reshape(z.shape[:-1])
    (gradient,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    if directions is None:
        directions = torch.eye(z.shape[-1], dtype=z.dtype).unsqueeze(-2)
        directions = directions.expand(*z.shape[:-2], *directions.shape)
    curvature = torch.zeros_like(value)
    for p in range(directions.shape[-3]):
        v = directions.select(-3, p)
        along = (gradient * v).sum()
        if along.requires_grad:
            (product,) = torch.autograd.grad(
                along, z, create_graph=True, allow_unused=True, materialize_grads=True
            )
            curvature = curvature + (product * v).sum(-1)
    return value, gradient, curvature


def loss_and_gradients(result, parameters):
    value, gradient, curvature = result
    # not the mean: rows of unequal weight
    weight = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype).reshape(value.shape)
    loss = (weight * (0.5 * gradient.square().sum(-1) + curvature + value.sin())).sum()
    options = {"allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(loss, parameters, **options)


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE * (1e-3 + b.abs().max().item()))


def assert_agrees(energy, z, directions=None):
    parameters = list(energy.parameters()) if isinstance(energy, nn.Module) else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "layer_norm", layer_norm)
        with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
            theirs = by_hessian(energy, z, directions)
        their_gradients = loss_and_gradients(theirs, parameters) if parameters else ()
        theirs = [part.detach() for part in theirs]
    ours = derivatives(energy, z, directions)
    our_gradients = loss_and_gradients(ours, parameters) if parameters else ()
    assert_close([part.detach() for part in ours], theirs)
    assert_close(our_gradients, their_gradients)
    with torch.no_grad():
        plain = derivatives(energy, z, directions)
    assert not any(part.requires_grad for part in plain)
    assert_close(plain, theirs)


@pytest.fixture
def fast(monkeypatch):
    """No silent fallback."""

    def refuse(*args):
        raise AssertionError("no fast rule")

    monkeypatch.setattr(_derivatives, "_by_double_backward", refuse)


@pytest.fixture
def slow(monkeypatch):
    """Counts how often the slow path was taken."""
    calls, original = [], _derivatives._by_double_backward

    def count(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(_derivatives, "_by_double_backward", count)
    return calls


@pytest.fixture(params=[1 << 18, 64], ids=["whole", "in blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(_tangents, "BLOCK", request.param)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def perturbed(module, scale=0.3):
    """Parameters as after some training, in float64."""
    module = module.double()
    g = rng(7)
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return module


def network(d, *layers, width=6):
    """Linear, layers, linear, tanh, linear."""
    rest = [nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)]
    return perturbed(nn.Sequential(nn.Linear(d, width), *layers, *rest))


class Residual(nn.Module):
    """Sums of branches, and a column that goes its own way."""

    def __init__(self, d, width=6):
        super().__init__()
        self.first, self.middle = nn.Linear(d, width), nn.Linear(width, width)
        self.skip, self.last = nn.Linear(d, width), nn.Linear(width, 1)

    def forward(self, z):
        h = functional.silu(self.first(z))
        for _ in range(2):
            h = h + functional.gelu(self.middle(h))
        h = h * torch.tanh(self.skip(z)) - 0.5 * h
        return self.last(h).squeeze(-1) - 0.1 * z.square().sum(-1) + z[:, 0].sin() * z[:, -1]


def gate(z):
    a, b = z[..., :2], z[..., 2:]
    return torch.cat([a * b, a / (1 + b**2), (2 - a).exp(), z], dim=-1).cos().mean(-1)


# name -> layer or function (n, w) -> (n, w)
SMOOTH = {
    "silu": nn.SiLU(),
    "silu_": nn.SiLU(inplace=True),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "softplus": nn.Softplus(beta=2.0),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "mish": nn.Mish(),
    "elu": nn.ELU(0.7),
    "celu": nn.CELU(0.5),  # torch rounds alpha to single precision in the derivative
    "selu": nn.SELU(),
    "sin": torch.sin,
    "cos": torch.cos,
    "exp": torch.exp,
    "square": torch.square,
    "erf": torch.erf,
    "atan": torch.atan,
    "expm1": torch.expm1,
    "softsign": nn.Softsign(),
    "tanhshrink": nn.Tanhshrink(),
    "log1p": lambda h: torch.log1p(h**2),
    "rsqrt": lambda h: (h * h + 0.5).rsqrt(),
    "reciprocal": lambda h: (h * h + 0.5).reciprocal(),
    "log": lambda h: torch.log(1.0 + h**2),
    "sqrt": lambda h: (h * h + 0.5).sqrt(),
    "cube": lambda h: h**3,
    "rational": lambda h: (h - 1) / (2.0 + h.square()) + 1 / (3 + h.pow(2)),
    "product": lambda h: h * h.tanh(),
    "softmax": lambda h: h.exp() / h.exp().sum(-1, keepdim=True),
}
KINKED = {
    "relu": nn.ReLU(),
    "relu_": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "prelu": nn.PReLU(),
    "leaky_relu": nn.LeakyReLU(0.1),
    "hardtanh": nn.Hardtanh(-0.5, 0.7),
    "clamp": lambda h: h.clamp(-0.5, 0.7),
    "abs": torch.abs,
}
SHAPES = {
    "dropout": nn.Dropout(0.5).eval(),
    "flatten": lambda h: h.unflatten(-1, (3, 2)).tanh().flatten(1),
    "reshape": lambda h: h.reshape(len(h), 2, 3).sin().view(h.shape[0], -1),
    "index": lambda h: torch.cat([h[:, 3:], h[:, [0, 2]], h[:, 1].unsqueeze(-1)], 1),
    "stack": lambda h: torch.stack([h, h.sin()], -1).mean(-1),
    "into": lambda h: h.mul(2.0).add_(1.0).mul_(h.tanh()),
    "reverse": lambda h: 1.0 - (-h),
    "repeated": lambda h: (h - h.mean(-1, keepdim=True)) * 2.0,
}


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, h):
        return self.function(h)


@pytest.mark.parametrize("name", [*SMOOTH, *KINKED, *SHAPES])
def test_layers_have_a_rule(name, fast, block):
    layer = {**SMOOTH, **KINKED, **SHAPES}[name]
    layer = layer if isinstance(layer, nn.Module) else Apply(layer)
    energy = network(3, layer)
    assert_agrees(energy, normal(5, 3))
    assert_agrees(energy, normal(5, 3), normal(2, 5, 3, seed=2))


@pytest.mark.parametrize("name", [*SMOOTH, *KINKED])
def test_layers_have_a_rule_on_the_input_itself(name, fast):
    layer = {**SMOOTH, **KINKED}[name]
    layer = layer if isinstance(layer, nn.Module) else Apply(layer)
    copied = Apply(lambda z: 1.0 * z)  # z itself may not be overwritten
    assert_agrees(nn.Sequential(copied, layer, network(4)), 1.0 + 0.3 * normal(3, 4))


@pytest.mark.parametrize(
    ("d", "width"), [(1, 6), (2, 6), (10, 6), (10, 12), (43, 6), (100, 12), (784, 6)]
)
def test_dimensions(d, width, fast):
    energy = network(d, nn.SiLU(), nn.LayerNorm(width), width=width)
    n = 7 if d < 50 else 2
    assert_agrees(energy, normal(n, d))
    assert_agrees(energy, normal(n, d), normal(3, n, d, seed=2))


class Scaled(nn.Module):
    """Trainable scalars, vectors and row-wise factors."""

    def __init__(self, d):
        super().__init__()
        self.first, self.gain, self.bias = nn.Linear(d, 6), nn.Parameter(torch.zeros(())), 0.5
        self.slope = nn.Parameter(torch.zeros(6))

    def forward(self, z):
        h = self.gain * self.first(z) + self.bias
        h = torch.tanh(h * self.slope - h.sum(-1, keepdim=True) / 3.0)
        return (h * h.mean(-1, keepdim=True)).sum(-1) ** 3


@pytest.mark.parametrize("d", [3, 20])
def test_factors(d, fast, block):
    energy = perturbed(Scaled(d), 1.0)
    assert_agrees(energy, normal(5, d))
    assert_agrees(energy, normal(1, d))
    assert_agrees(energy, normal(5, d), normal(2, 5, d, seed=2))


@pytest.mark.parametrize("d", [3, 20])
def test_residual_sums_also_from_the_input(d, fast, block):
    energy = perturbed(Residual(d))
    assert_agrees(energy, normal(5, d))
    assert_agrees(energy, normal(5, d), normal(2, 5, d, seed=2))


def test_wide_input_uses_no_more_directions_than_units(fast, monkeypatch):
    seen, original = [], _tangents.Rows.reduce

    def spy(rows, n_directions):
        seen.append(original(rows, n_directions))
        return seen[-1]

    monkeypatch.setattr(_tangents.Rows, "reduce", spy)
    derivatives(network(20, nn.SiLU()), normal(5, 20))
    derivatives(perturbed(Residual(20)), normal(5, 20))
    assert seen == [6]  # the second reads its input twice


def test_deficient_weights_of_a_wide_input(fast):
    energy = network(20, nn.SiLU())
    with torch.no_grad():
        energy[0].weight[3:] = energy[0].weight[:3]
    assert_agrees(energy, normal(5, 20))


def test_functions(fast):
    assert_agrees(gate, normal(5, 4))
    assert_agrees(gate, normal(5, 4), normal(3, 5, 4, seed=2))
    assert_agrees(lambda z: -0.5 * z.square().sum(-1), normal(5, 4))


def test_known_derivatives(fast):
    d = 6
    z = normal(9, d)
    value, gradient, laplacian = derivatives(lambda z: (-0.5 * z.square().sum(-1)).exp(), z)
    square = z.square().sum(-1)
    assert_close([value, gradient], [(-0.5 * square).exp(), -z * (-0.5 * square).exp()[:, None]])
    assert_close([laplacian], [(square - d) * (-0.5 * square).exp()])


def embedding(name, d, k):
    if name == "periodic":
        return PeriodicEmbedding(d, k, n_frequencies=3, rng=rng())
    if name == "piecewise_linear":
        return PiecewiseLinearEmbedding(list(normal(k, 50, d)), n_bins=5)
    return None


@pytest.mark.parametrize("name", [None, "periodic", "piecewise_linear"])
@pytest.mark.parametrize("d", [2, 20])
def test_constants_beside_columns(name, d, fast, block):
    """As the states of rows are, of which some values are absent."""
    encoder = embedding(name, d, 2)
    encoder = None if encoder is None else MixedEmbedding(3, encoder)
    energy = MLPEnergy(d + 3, 2, hidden_layer_sizes=(8, 6), embedding=encoder, rng=rng())

    class OfValues(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = perturbed(energy)

        def forward(self, z):
            constants, present = normal(2, 5, 3, seed=3), normal(2, 5, d, seed=4) > 0
            return self.energy(torch.cat([constants, z * present], dim=-1))

    z = normal(2, 5, d)
    assert_agrees(OfValues(), z)
    assert_agrees(OfValues(), z, normal(2, 3, 5, d, seed=2))
    gradient = derivatives(OfValues(), z)[1]
    assert (gradient[normal(2, 5, d, seed=4) <= 0] == 0).all()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", [None, "periodic", "piecewise_linear"])
@pytest.mark.parametrize("d", [4, 20])
def test_stacks(name, k, d, fast, block):
    energy = MLPEnergy(d, k, hidden_layer_sizes=(8, 6), embedding=embedding(name, d, k), rng=rng())
    energy = perturbed(energy)
    z = normal(k, 5, d)
    assert_agrees(energy, z)
    assert_agrees(energy, z, normal(k, 2, 5, d, seed=2))
    if k == 1:
        assert_agrees(energy, z[0])
        assert_agrees(energy, z[0], normal(2, 5, d, seed=2))


class Shared(StackedEnergy):
    """Members that share their first layer."""

    def __init__(self, d, k):
        super().__init__(d, k)
        self.first = nn.Linear(d, 6)
        self.second = nn.Parameter(torch.zeros(k, 6, 6))
        self.third = nn.Parameter(torch.zeros(k, 6, 1))

    def stacked(self, z):
        h = torch.bmm(self.first(z), self.second).tanh() + self.first(z).sin()
        return torch.bmm(h, self.third).squeeze(-1)


@pytest.mark.parametrize("k", [2, 6])
@pytest.mark.parametrize("d", [6, 12])
def test_members_that_share_a_layer(d, k, fast, block):
    energy = perturbed(Shared(d, k))
    assert_agrees(energy, normal(k, 5, d))
    assert_agrees(energy, normal(k, 5, d), normal(k, 2, 5, d, seed=2))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("d", [4, 20])
def test_stack_of_user_modules(k, d, fast):
    energy = perturbed(ModuleStack(partial(Residual, width=5), d, k))
    z = normal(k, 5, d)
    assert_agrees(energy, z)
    assert_agrees(energy, z, normal(k, 2, 5, d, seed=2))
    if k == 1:
        assert_agrees(energy, z[0])


def test_dropout_masks_are_those_of_a_plain_evaluation(fast):
    energy = ModuleStack(lambda d: network(d, nn.Dropout(0.5), nn.SiLU()), 4, 2).double()
    with torch.no_grad():
        energy.gain += 1.0
    z, seed = normal(2, 30, 4), energy._next_seed
    value, _, _ = derivatives(energy, z)
    energy._next_seed = seed
    assert_close([value], [energy(z)])


class Attention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.lift = nn.Linear(1, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, 0.0, "gelu", batch_first=True)

    def forward(self, z):
        return self.layer(self.lift(z.unsqueeze(-1))).mean((-1, -2))


class Bilinear(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.layer = nn.Bilinear(d, d, 1)

    def forward(self, z):
        return self.layer(z.sin(), z)


class Overwritten(nn.Module):
    """In-place writes into memory that something else reads."""

    def __init__(self, d):
        super().__init__()
        self.layer = nn.Linear(d, 1)

    def forward(self, z):
        h = z.sin()
        part = h[:, :2]
        part *= 3.0
        return self.layer(h).exp()


class Detached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class Without(nn.Module):
    """A part of the function that autograd is told not to see."""

    def __init__(self, d):
        super().__init__()
        self.layer = nn.Linear(d, 1)

    def forward(self, z):
        with torch.no_grad():
            scale = z.square().sum(-1, keepdim=True)
        return self.layer(z.sin()) * scale


# modules without a rule, and those where a rule would be wrong
SLOW = {
    "fft": lambda d: Apply(lambda z: torch.fft.rfft(z).abs().square().sin().sum(-1)),
    "cumsum": lambda d: Apply(lambda z: z.cumsum(-1).sin().prod(-1)),
    "bilinear": Bilinear,
    "logsigmoid": lambda d: network(d, nn.LogSigmoid()),
    "to python": lambda d: Apply(lambda z: z.sin().sum(-1) ** float(2 + 0 * z[0, 0])),
    "attention": Attention,
    "overwritten": Overwritten,
    "autograd function": lambda d: Apply(lambda z: Detached.apply(z).square().sum(-1)),
    "no grad": Without,
    "script": lambda d: torch.jit.script(network(d)),
    "comparison": lambda d: Apply(lambda z: z.sin().sum(-1) * (1.0 + (z == 0.0).any(-1))),
    "data-dependent": lambda d: Apply(lambda z: (z**3 if z.mean() > 0 else z**4).sum(-1)),
    "frozen": lambda d: Apply(lambda z: (z.sin() + z.data.cos()).prod(-1)),
    "across rows": lambda d: Apply(lambda z: (z[:, 0] - z[:, 0].mean(0).detach()).sin()),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Converting a tensor")
@pytest.mark.parametrize("name", SLOW)
def test_what_has_no_rule_gives_the_same_answer(name, slow):
    energy = perturbed(SLOW[name](4))
    assert_agrees(energy, normal(5, 4))
    assert_agrees(energy, normal(5, 4), normal(2, 5, 4, seed=2))
    assert slow


def test_linear_and_constant_functions():
    z, zero, one = normal(5, 4), torch.zeros(5).double(), torch.ones(5).double()
    assert_close(derivatives(lambda z: z.sum(-1), z), [z.sum(-1), torch.ones_like(z), zero])
    assert_close(derivatives(lambda z: one, z), [one, torch.zeros_like(z), zero])


def test_training_in_single_precision_is_finite(fast):
    energy = MLPEnergy(3, 2, embedding=embedding("periodic", 3, 2), rng=rng())
    optimizer = torch.optim.Adam(energy.parameters(), 1e-2)
    z = 3.0 * normal(2, 200, 3).float()
    losses = []
    for _ in range(10):
        value, gradient, curvature = derivatives(energy, z)
        assert value.dtype == gradient.dtype == curvature.dtype == torch.float32
        loss = (0.5 * gradient.square().sum(-1) + curvature).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(math.isfinite(x) for x in losses)
    assert losses[-1] < losses[0]


def test_wrong_shapes_are_refused_by_the_energy():
    energy = MLPEnergy(3, 2, rng=rng())
    with pytest.raises(ValueError, match="expects z of shape"):
        derivatives(energy, torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match="one value per row"):
        derivatives(nn.Linear(3, 2), torch.zeros(5, 3))


def test_errors_of_the_user_are_not_swallowed():
    def broken(z):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        derivatives(broken, torch.zeros(5, 3))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, IndexError, RuntimeError, ValueError])
@pytest.mark.parametrize("place", ["rule", "sweep"])
def test_bugs_and_lack_of_memory_surface(error, place, monkeypatch, slow):
    def fail(*args, **kwargs):
        raise error("not to be hidden")

    if place == "rule":
        monkeypatch.setitem(_jets.RULES, "silu", fail)
    else:
        monkeypatch.setattr(_tangents.Node, "at", fail)
    with pytest.raises(error, match="not to be hidden"):
        derivatives(network(3, nn.SiLU()), normal(5, 3))
    assert not slow


@pytest.mark.parametrize("error", [TypeError, AttributeError, NameError])
def test_bugs_in_the_sweep_surface(error, monkeypatch, slow):
    def fail(*args, **kwargs):
        raise error("not to be hidden")

    monkeypatch.setattr(_tangents.Node, "at", fail)
    with pytest.raises(error, match="not to be hidden"):
        derivatives(network(3, nn.SiLU()), normal(5, 3))
    assert not slow


def test_an_evaluation_leaves_no_cycles_behind():
    energy = MLPEnergy(3, 2, embedding=embedding("periodic", 3, 2), rng=rng())
    gc.collect()
    gc.disable()
    try:
        derivatives(energy, normal(2, 5, 3).float())
        assert not any(issubclass(type(x), _tangents.Node) for x in gc.get_objects())
    finally:
        gc.enable()
