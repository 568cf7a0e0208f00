import pytest
import torch
from torch import nn

from skebm.derivatives import derivatives
from skebm.energies import InputGradient, _products
from skebm.energies._products import gradient_of_second, is_large, product

SHAPES = {
    "one": ((1300, 128), (128, 64), (64,)),
    "stack": ((3, 1300, 128), (3, 128, 64), (3, 1, 64)),
    "stack of one": ((1, 1300, 128), (1, 128, 64), (1, 1, 64)),
}
OTHERS = {
    "few": ((5, 4), (4, 3), (3,)),
    "narrow": ((9000, 128), (128, 1), (1,)),
    "several axes": ((2, 100, 128), (128, 64), (64,)),
    "vector": ((9000, 128), (128,), None),
    "other bias": ((200, 128), (128, 64), (200, 1)),
}
has_onednn = pytest.mark.skipif(not _products._works, reason="no oneDNN")


@pytest.fixture
def calls(monkeypatch):
    """Sizes of the products that went by oneDNN."""
    seen, original = [], _products._onednn

    def spy(a, *args):
        seen.append(a.numel())
        return original(a, *args)

    monkeypatch.setattr(_products, "_onednn", spy)
    return seen


@pytest.fixture
def broken(monkeypatch):
    """An operator that does not work; how often it was asked."""
    seen = []

    def fail(*args):
        seen.append(args)
        raise RuntimeError("not here")

    monkeypatch.setattr(_products, "_onednn", fail)
    monkeypatch.setattr(_products, "_works", True)
    return seen


def tensors(shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    draws = [s if s is None else torch.randn(s, generator=generator) for s in shapes]
    return [x if x is None else x.to(dtype).requires_grad_() for x in draws]


def with_derivatives(function, a, b, bias):
    """Result, first derivatives, and derivatives of these."""
    result = function(a, b, bias)
    inputs = [x for x in (a, b, bias) if x is not None]
    first = torch.autograd.grad(result.sin().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    return [x.detach() for x in (result, *first, *second)]


def plainly(a, b, bias):
    return a @ b if bias is None else a @ b + bias


def assert_close(ours, theirs, tolerance=1e-5):
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == y.shape
        assert (x.double() - y).abs().max() <= tolerance * y.abs().max()


def check(shapes, dtype=torch.float32):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    exact = with_derivatives(plainly, *tensors(shapes, torch.float64))
    assert_close(with_derivatives(product, *tensors(shapes, dtype)), exact, tolerance)


@has_onednn
@pytest.mark.parametrize("name", SHAPES)
def test_large_products(name, calls):
    check(SHAPES[name])
    assert calls
    a, b, bias = SHAPES[name]
    check((a, b, None))
    assert is_large(torch.zeros(a), b[-1])


@pytest.mark.parametrize("name", OTHERS)
def test_other_products_by_torch(name, calls):
    a, b, bias = tensors(OTHERS[name], torch.float32)
    product(a, b, bias)
    assert not calls
    check(OTHERS[name])


def test_other_types_by_torch(calls):
    check(SHAPES["one"], torch.float64)
    a, b, _ = tensors(SHAPES["one"], torch.float64)
    with pytest.raises(RuntimeError):
        product(a.float(), b)
    assert not calls


@pytest.mark.parametrize("name", SHAPES)
def test_broken_operator_is_asked_once(name, broken):
    check(SHAPES[name])
    check(SHAPES[name])
    assert len(broken) == 1
    assert not is_large(torch.zeros(SHAPES[name][0]), 64)


def test_missing_operator(monkeypatch, calls):
    monkeypatch.setattr(_products, "_works", False)
    for shapes in SHAPES.values():
        check(shapes)
    assert not calls


@has_onednn
def test_mistakes_are_the_callers(monkeypatch):
    a, b = torch.zeros(200, 128), torch.zeros(100, 128)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        product(a, b)
    assert _products._works


def test_gradients_are_laid_out_as_the_weights():
    for shapes in SHAPES.values():
        a, b, _ = tensors(shapes, torch.float32)
        grad = torch.randn(*a.shape[:-1], b.shape[-1])
        for weight in (b, b.mT.contiguous().mT):
            found = gradient_of_second(a, weight, grad)
            assert found.stride() == weight.stride()
            assert_close([found], [(a.mT.double() @ grad.double()).detach()])


def test_out_is_used_by_torch():
    a, b, bias = (x.detach() for x in tensors(OTHERS["few"], torch.float32))
    out = torch.empty(5, 3)
    assert product(a, b, bias, out=out) is out
    assert product(a, b, out=out) is out


@pytest.mark.parametrize("works", [True, False])
def test_energies_in_single_precision(works, monkeypatch):
    """Score matching and chains on a network that is large enough."""
    monkeypatch.setattr(_products, "_works", works and _products._works)
    torch.manual_seed(0)
    layers = [nn.Linear(6, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1)]
    energy, z = nn.Sequential(*layers), torch.randn(200, 6)

    def found(energy, z):
        value, gradient, laplacian = derivatives(energy, z)
        loss = (0.5 * gradient.square().sum(-1) + laplacian).mean()
        loss = torch.autograd.grad(loss, [p for p in energy.parameters() if p.ndim > 1])
        parts = [value, gradient, laplacian, *InputGradient(energy).value_and_gradient(z), *loss]
        return [x.detach() for x in parts]

    ours = found(energy, z)
    assert_close(ours, found(energy.double(), z.double()))
