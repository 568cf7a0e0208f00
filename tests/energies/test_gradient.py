import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from skebm.energies import (
    InputGradient,
    MLPEnergy,
    ModuleStack,
    PeriodicEmbedding,
    PiecewiseLinearEmbedding,
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = list(TOLERANCE)
ACTIVATIONS = [
    nn.SiLU(),
    nn.SiLU(inplace=True),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.Softplus(),
    nn.Softplus(beta=2, threshold=1),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.ReLU(),
    nn.LeakyReLU(0.2),
    nn.ELU(),
    nn.ELU(alpha=0.7),
]


def rows(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomised(module, dtype=torch.float64, seed=0):
    """The module with noise on every parameter, also on those that start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.to(dtype)


def chain(activation=None, d=3, *, norm=False, tail=None):
    middle = [nn.LayerNorm(7)] if norm else []
    activation = nn.SiLU() if activation is None else activation
    tail = [nn.Flatten(0)] if tail is None else tail
    layers = [nn.Linear(d, 7), *middle, activation, nn.Linear(7, 7, bias=False), activation]
    return nn.Sequential(*layers, nn.Linear(7, 1), *tail)


def stack(embedding, n_members=3, d=2, hidden_layer_sizes=(9, 8)):
    generator = torch.Generator().manual_seed(0)
    if embedding == "periodic":
        embedding = PeriodicEmbedding(d, n_members, n_frequencies=5, generator=generator)
    elif embedding == "piecewise":
        embedding = PiecewiseLinearEmbedding(rows(n_members, 50, d), n_bins=4)
    return MLPEnergy(
        d,
        n_members,
        hidden_layer_sizes=hidden_layer_sizes,
        embedding=embedding,
        generator=generator,
    )


def by_autograd(energy, x):
    x = x.detach().clone().requires_grad_()
    value = energy(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach().reshape(x.shape[:-1]), gradient


def check(energy, x, program=None, *, fast=True):
    program = InputGradient(energy) if program is None else program
    assert program._fits(x) == fast
    tolerance = TOLERANCE[x.dtype]
    for got, expected in zip(program.value_and_gradient(x), by_autograd(energy, x), strict=True):
        assert not got.requires_grad
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_chain(activation, dtype):
    energy = randomised(chain(activation), dtype)
    for n in (1, 20, 1500):
        check(energy, rows(n, 3, dtype=dtype))


@pytest.mark.parametrize(
    "energy",
    [
        chain(norm=True),
        chain(tail=()),
        chain(tail=(nn.Softplus(), nn.Flatten(0))),
        chain(tail=(nn.LeakyReLU(), nn.Identity(), nn.Flatten())),
        nn.Sequential(nn.Sequential(nn.Tanh(), nn.Linear(3, 5)), chain(d=5)),
        nn.Sequential(nn.LayerNorm(3, elementwise_affine=False), chain()),
        nn.Linear(3, 1),
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)),
        nn.Sequential(nn.Dropout(0.5), chain()).eval(),
    ],
)
def test_shapes_of_chains(energy):
    check(randomised(energy), rows(20, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("embedding", [None, "periodic", "piecewise"])
def test_stack(embedding, dtype):
    energy = randomised(stack(embedding), dtype)
    for n in (1, 20, 1100):
        check(energy, rows(3, n, 2, dtype=dtype))
    check(energy.member(1), rows(20, 2, dtype=dtype))
    check(energy.member(1), rows(1, 20, 2, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_members", [1, 3])
def test_wide_stack(n_members, dtype):
    """Large enough for the other library of matrix products."""
    energy = randomised(stack("periodic", n_members, hidden_layer_sizes=(128, 128)), dtype)
    energy.output.data.div_(128)
    check(energy, rows(n_members, 300, 2, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_chain(dtype):
    layers = [nn.Linear(20, 128), nn.Tanh(), nn.Linear(128, 128, bias=False), nn.SiLU()]
    energy = nn.Sequential(*layers, nn.Linear(128, 1), nn.Flatten(0)).to(dtype)
    check(energy, rows(1500, 20, dtype=dtype))


def test_ends_of_bins_as_autograd():
    energy = randomised(stack("piecewise"))
    edges = -energy.embedding.shift / energy.embedding.scale  # (K, 1, d, bins)
    check(energy, edges.squeeze(1).mT.contiguous())


def test_no_hidden_layer():
    check(randomised(stack("periodic", hidden_layer_sizes=())), rows(3, 5, 2))
    check(randomised(stack(None, hidden_layer_sizes=())), rows(3, 5, 2))


def test_stack_of_modules():
    energy = randomised(ModuleStack(lambda d: chain(d=d), 3, 2))
    for n in (1, 700):
        check(energy, rows(2, n, 3))
    check(energy.member(1), rows(5, 3))


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = chain(tail=())

    def forward(self, x):
        return self.net(x).squeeze(-1) - 0.5 * x.square().sum(-1)


def hooked():
    energy = chain()
    energy[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    return energy


@pytest.mark.parametrize(
    "energy",
    [
        Custom(),
        hooked(),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 1)),
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
        nn.Sequential(nn.Linear(3, 4), nn.Mish(), nn.Linear(4, 1)),
        ModuleStack(lambda d: Custom(), 3),
        lambda x: -x.square().sum(-1),
    ],
)
def test_other_energies_by_autograd(energy):
    energy = randomised(energy) if isinstance(energy, nn.Module) else energy
    check(energy, rows(20, 3), fast=False)


def test_training_mode_of_dropout_is_followed():
    energy = randomised(nn.Sequential(chain(tail=()), nn.Dropout(0.5)))
    program = InputGradient(energy)
    x = rows(200, 3)
    for training in (True, False, True):
        energy.train(training)
        value, _ = program.value_and_gradient(x)
        assert (value == 0).any() == training


def test_weights_are_read_at_each_call():
    energy = randomised(stack("periodic"))
    program = InputGradient(energy)
    x = rows(3, 20, 2)
    for seed in range(3):
        check(energy, x, program)
        randomised(energy, seed=seed)
    energy.load_state_dict(randomised(stack("periodic"), seed=9).state_dict())
    check(energy, x, program)
    energy.float()
    check(energy, x.float(), program)


def test_batch_sizes_in_turn():
    energy = randomised(chain())
    program = InputGradient(energy)
    for n in (5, 1, 700, 5, 0, 40, 256, 257, 1, 5):
        check(energy, rows(n, 3), program)


def test_rows_need_not_be_contiguous():
    check(randomised(stack("piecewise")), rows(2, 20, 3).permute(2, 1, 0))
    check(randomised(chain()), rows(3, 20).T)


@pytest.mark.parametrize("n", [1, 20, 700])
@pytest.mark.parametrize("embedding", [None, "periodic", "piecewise"])
def test_results_are_not_written_to_again(embedding, n):
    program = InputGradient(randomised(stack(embedding)))
    first = program.value_and_gradient(rows(3, n, 2))
    kept = [tensor.clone() for tensor in first]
    program.value_and_gradient(rows(3, n, 2, seed=1))
    for tensor, copied in zip(first, kept, strict=True):
        assert torch.equal(tensor, copied)
        tensor.fill_(3.0)
    again = program.value_and_gradient(rows(3, n, 2))
    for tensor, copied in zip(again, kept, strict=True):
        assert torch.equal(tensor, copied)


def test_grad_modes_and_parameters_are_left_alone():
    energy = randomised(chain())
    program = InputGradient(energy)
    x = rows(20, 3).requires_grad_()
    expected = by_autograd(energy, x)
    for mode in (torch.inference_mode, torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            for got, wanted in zip(program.value_and_gradient(x), expected, strict=True):
                assert not got.requires_grad
                torch.testing.assert_close(got, wanted)
    assert x.requires_grad
    assert x.grad is None
    assert all(p.requires_grad and p.grad is None for p in energy.parameters())


def test_fallback_under_no_grad():
    energy = randomised(Custom())
    with torch.no_grad():
        got = InputGradient(energy).value_and_gradient(rows(20, 3))
    torch.testing.assert_close(got[1], by_autograd(energy, rows(20, 3))[1])
    assert all(p.grad is None for p in energy.parameters())


def test_call_is_the_energy():
    energy = randomised(chain(tail=()))
    program = InputGradient(energy)
    x = rows(20, 3).requires_grad_()
    assert program(x).shape == (20,)
    (gradient,) = torch.autograd.grad(program(x).sum(), x)
    torch.testing.assert_close(gradient, program.value_and_gradient(x)[1])


def test_wrong_shapes_get_the_message_of_the_energy():
    program = InputGradient(stack(None))
    with pytest.raises(ValueError, match="expects z of shape"):
        program.value_and_gradient(rows(20, 2))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda p: pickle.loads(pickle.dumps(p))]
)
def test_copies(duplicate):
    energy = randomised(stack("periodic"))
    program = InputGradient(energy)
    x = rows(3, 20, 2)
    value, gradient = program.value_and_gradient(x)
    assert len(pickle.dumps(program)) < len(pickle.dumps(energy)) + 200
    twin = duplicate(program)
    torch.testing.assert_close(twin.value_and_gradient(x), (value, gradient))


def test_threads_share_a_program():
    energy = randomised(chain())
    program = InputGradient(energy)
    failures = []

    def work(seed):
        x = rows(100, 3, seed=seed)
        expected = by_autograd(energy, x)[1]
        for _ in range(200):
            if not torch.allclose(program.value_and_gradient(x)[1], expected):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
