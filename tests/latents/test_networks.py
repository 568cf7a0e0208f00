"""Perceptrons and the modules of users."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from skebm.latents import perceptron, user_network


@contextmanager
def untouched():
    """The block leaves the global generator as it was."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("sizes", [(), (8,), (8, 4)])
def test_perceptrons_start_at_zero(sizes):
    with untouched():
        network = perceptron(3, 2, sizes, seed=0)
    x = torch.linspace(-3, 3, 24).view(2, 4, 3)
    assert network(x).shape == (2, 4, 2)
    assert (network(x) == 0).all()
    network(x).sum().backward()
    assert network[-1].bias.grad.abs().sum() > 0  # but it does not stay there


def test_seeds_of_perceptrons():
    first, again, other = (perceptron(3, 2, (8,), seed=s)[0].weight for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_instance_is_copied():
    module = nn.Linear(3, 2).double().eval()
    x = torch.ones(4, 5, 3)
    with untouched():
        network = user_network(module, "decoder_model", 3, 2, seed=0)
        network(x)
    torch.testing.assert_close(network(x), module(x.double()).float())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert module.weight.abs().sum() > 0
    assert module.weight.dtype == torch.float64
    assert not module.training


@pytest.mark.parametrize("model", [nn.Linear, lambda a, b: nn.Sequential(nn.Linear(a, b))])
def test_a_class_or_factory_is_called_with_the_sizes(model):
    with untouched():
        first, again, other = (user_network(model, "m", 3, 2, seed=s) for s in (0, 0, 1))
    x = torch.ones(4, 3)
    assert torch.equal(first(x), again(x))
    assert not torch.equal(first(x), other(x))


class Images(nn.Module):
    """Knows nothing of leading axes."""

    def __init__(self, *_):
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 1, 2, stride=2)

    def forward(self, z):
        n, k = z.shape
        return self.up(z.view(n, 2, 2, 2)).flatten(1)


def test_leading_axes_are_flattened_for_modules():
    network = user_network(Images, "decoder_model", 8, 16, seed=0)
    z = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    together = network(z)
    assert together.shape == (3, 5, 16)
    torch.testing.assert_close(together[1], network(z[1]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(4, 2), r"decoder_model failed on rows of shape \(3, 3\)"),
        (nn.Linear(3, 5), r"decoder_model must map \(n, 3\) to \(n, 2\).*returned \(3, 5\)"),
        (nn.Flatten(0), r"decoder_model must map .*returned \(9,\)"),
        (nn.LSTM(3, 2), "decoder_model must map .*returned tuple"),
        (lambda a, b: None, r"decoder_model\(3, 2\) must return a torch.nn.Module, got None"),
        ("cnn", "decoder_model must be a torch.nn.Module"),
        (lambda a: None, r"decoder_model could not be made by .*called as decoder_model\(3, 2\)"),
        (nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), "decoder_model changes its input"),
    ],
)
def test_errors_name_the_parameter(model, message):
    with pytest.raises(ValueError, match=message):
        user_network(model, "decoder_model", 3, 2, seed=0)


def test_dropout_draws_from_a_private_stream():
    module = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5))
    x = torch.ones(4, 3)
    with untouched():
        first, again, other = (user_network(module, "m", 3, 50, seed=s) for s in (0, 0, 1))
        drawn = [network(x) for network in (first, again, other)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(first(x), drawn[0])  # a fresh mask at every call
    assert 0.3 < (drawn[0] == 0).float().mean() < 0.7
    first.eval()
    assert torch.equal(first(x), first(x))
    assert (first(x) != 0).all()


class AlwaysNoisy(nn.Module):
    def forward(self, x):
        return x[:, :2] + torch.randn(len(x), 2)


def test_probing_a_module_that_draws_when_it_should_not():
    # it draws in evaluation mode, too: to be probed it must not take from the global generator
    with untouched():
        user_network(AlwaysNoisy(), "m", 3, 2, seed=0)
