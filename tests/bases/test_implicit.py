"""ImplicitGenerator: the estimate of its log-density, and its gradients, where both are known."""

import copy
import math
import pickle

import pytest
import torch
from torch.distributions import Normal

from skebm.bases import ImplicitGenerator

START_SCALE = 0.3


def build(d=1, k=1, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return ImplicitGenerator(d, k, rng=generator, **options).double()


def perturbed(d=1, k=1, size=0.8, **options):
    """With g no more the identity, and not linear."""
    law = build(d, k, **options)
    generator = torch.Generator().manual_seed(7)
    for parameter in [*law.weights[1:], *law.biases]:
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += size * noise / parameter.shape[1] ** 0.5
    return law


def linear(slope, shift, log_scale, n_contrast=192):
    """g(u) = (1 + slope) u + shift: the network without a hidden layer, whose sum with u is g."""
    law = build(1, hidden=(), n_contrast=n_contrast)
    law.weights[0].data.fill_(slope)
    law.biases[0].data.fill_(shift)
    law.log_scale.data.fill_(log_scale)
    return law


@torch.no_grad()
def draws(law, seed=0, n=500, n_blocks=60):
    """Means over blocks (each has its own candidates) of what is done with z and log q."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_blocks):
        yield law.rsample(n, generator)


def mean_and_error(values):
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def log_density(law, z):
    """Of one column, by quadrature over u."""
    u = torch.linspace(-6.0, 6.0, 601, dtype=torch.float64)
    with torch.no_grad():
        mean = law.mean(u[None, :, None])[0, :, 0]
        logs = Normal(mean, law.scale[0]).log_prob(z[:, None]) + Normal(0.0, 1.0).log_prob(u)
    return logs.logsumexp(1) + math.log(u[1] - u[0])


# ---------------------------------------------------------------------- law of the samples


@pytest.mark.parametrize("d", [1, 2, 5])
def test_starts_as_the_identity_plus_noise(d):
    law = build(d)
    u = torch.randn(1, 50, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(law.mean(u), u)
    assert law.scale.item() == pytest.approx(START_SCALE, abs=1e-6)
    for z in (
        law.sample(40_000, torch.Generator().manual_seed(0)),
        law.rsample(40_000, torch.Generator().manual_seed(0))[0].detach(),
    ):
        assert z.shape == (1, 40_000, d)
        covariance = torch.cov(z[0].T).reshape(d, d)
        expected = (1 + START_SCALE**2) * torch.eye(d, dtype=torch.float64)
        torch.testing.assert_close(covariance, expected, atol=0.04, rtol=0)
        assert z.mean().abs() < 0.03


@pytest.mark.parametrize("raw", [-9.0, 3.0])
def test_scale_stays_in_its_range_and_can_come_back(raw):
    law = build()
    law.log_scale.data.fill_(raw)
    assert law.scale.item() == pytest.approx(0.05 if raw < 0 else 0.3)
    law.scale.sum().backward()
    assert law.log_scale.grad.item() > 0.0


# ---------------------------------------------------------------------- estimate of log q


@pytest.mark.parametrize("d", [1, 2])
def test_log_density_at_the_start_is_not_below_the_truth_and_close_to_it(d):
    truth = Normal(0.0, (1 + START_SCALE**2) ** 0.5)
    gaps = [(log_q - truth.log_prob(z).sum(-1)).mean().item() for z, log_q in draws(build(d), d)]
    gap, error = mean_and_error(gaps)
    assert gap > -3.0 * error
    assert gap < (0.03 if d == 1 else 0.12)


@pytest.mark.parametrize("d", [1, 2])
def test_more_candidates_close_the_gap(d):
    truth, gaps = Normal(0.0, (1 + START_SCALE**2) ** 0.5), []
    for n_contrast in (4, 32, 256):
        pairs = draws(build(d, n_contrast=n_contrast), n_contrast)
        values = [(log_q - truth.log_prob(z).sum(-1)).mean().item() for z, log_q in pairs]
        gaps.append(mean_and_error(values))
    for (gap, error), (smaller, its_error) in zip(gaps, gaps[1:], strict=False):
        assert gap - smaller > 3.0 * math.hypot(error, its_error)
    assert gaps[-1][0] > -3.0 * gaps[-1][1]
    assert gaps[-1][0] < 0.25 * gaps[0][0]


@pytest.mark.parametrize("scale", [0.3, 0.1])
def test_log_density_of_a_bent_generator_against_quadrature(scale):
    law = perturbed()
    law.log_scale.data.fill_(math.log(scale))
    u = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)[None, :, None]
    with torch.no_grad():
        moved = law.mean(u) - u
    assert moved.std() > 0.1  # bent, not shifted
    gaps = [(log_q[0] - log_density(law, z[0, :, 0])).mean().item() for z, log_q in draws(law)]
    gap, error = mean_and_error(gaps)
    assert -3.0 * error < gap < 0.1


def test_bound_from_the_estimate_stays_a_lower_bound():
    # log Z of the law itself is 0
    law = perturbed(n_contrast=16)
    terms = [(log_density(law, z[0, :, 0]) - log_q[0]).mean().item() for z, log_q in draws(law)]
    bound, error = mean_and_error(terms)
    assert bound < 3.0 * error


# ---------------------------------------------------------------------- gradients


def test_gradient_of_the_entropy_of_a_linear_generator():
    # z = (1 + a) u + b + sigma eps is N(b, v), v = (1 + a)^2 + sigma^2, of entropy log(v) / 2 + ...
    slope, log_scale, gradients = 0.3, math.log(0.2), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        law = linear(slope, 0.4, log_scale, n_contrast=400)
        _, log_q = law.rsample(500, generator)
        entropy = -log_q.mean()
        entropy.backward()
        gradients.append([law.weights[0].grad, law.biases[0].grad, law.log_scale.grad])
    variance = (1 + slope) ** 2 + 0.2**2
    expected = ((1 + slope) / variance, 0.0, 0.2**2 / variance)
    for values, truth in zip(zip(*gradients, strict=True), expected, strict=True):
        value, error = mean_and_error([v.sum().item() for v in values])
        assert error < 0.05
        assert value == pytest.approx(truth, abs=4.0 * error + 0.01)


def test_gradient_of_the_estimate_is_that_of_the_value():
    # with the noise held fixed
    law, step = perturbed(2, 2), 1e-6

    def value(other):
        z, log_q = other.rsample(20, torch.Generator().manual_seed(3))
        return (log_q + z.square().sum(-1)).sum()

    law.log_scale.data.fill_(math.log(0.2))  # within its range
    value(law).backward()
    for i, parameter in enumerate(law.parameters()):
        assert parameter.grad is not None
        direction = parameter.grad / parameter.grad.norm()
        up, down = copy.deepcopy(law), copy.deepcopy(law)
        with torch.no_grad():
            list(up.parameters())[i].add_(step * direction)
            list(down.parameters())[i].sub_(step * direction)
            slope = (value(up) - value(down)).item() / (2 * step)
        assert parameter.grad.norm().item() == pytest.approx(slope, rel=1e-4)


# ---------------------------------------------------------------------- members and state


def test_members_are_independent():
    law = perturbed(2, 3)
    z, log_q = law.rsample(100, torch.Generator().manual_seed(0))
    assert z.shape == (3, 100, 2)
    assert log_q.shape == (3, 100)
    assert law.sample(5, torch.Generator().manual_seed(0)).shape == (3, 5, 2)
    assert not torch.equal(law.weights[0][0], law.weights[0][1])
    # what is done to one leaves the others as they were
    other = copy.deepcopy(law)
    other.biases[-1].data[1] += 1.0
    other.log_scale.data[1] = math.log(0.1)
    moved, log_moved = other.rsample(100, torch.Generator().manual_seed(0))
    for k in (0, 2):
        torch.testing.assert_close(moved[k], z[k], atol=0, rtol=0)
        torch.testing.assert_close(log_moved[k], log_q[k], atol=0, rtol=0)
    assert (moved[1] != z[1]).all()
    # and one's density hangs on its own parameters only
    log_q[0].sum().backward()
    for parameter in law.parameters():
        assert parameter.grad[0].abs().sum() > 0
        assert parameter.grad[1:].abs().sum() == 0


def test_reproducible():
    pairs = []
    for _ in range(2):
        law = build(2, 2, seed=4)
        generator = torch.Generator().manual_seed(1)
        z, log_q = law.rsample(10, generator)
        pairs.append((z, log_q, law.sample(10, generator), law.weights[0]))
    for first, second in zip(*pairs, strict=True):
        assert torch.equal(first, second)
    other = build(2, 2, seed=5)
    assert not torch.equal(other.weights[0], pairs[0][3])


def test_global_generator_is_as_found():
    before = torch.get_rng_state()
    law = build(2)
    law.sample(3, torch.Generator().manual_seed(0))
    law.rsample(3, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_pickle_and_double():
    law = perturbed(2, 2).float()
    for twin in (pickle.loads(pickle.dumps(law)), copy.deepcopy(law)):
        first = law.rsample(10, torch.Generator().manual_seed(0))
        for mine, theirs in zip(first, twin.rsample(10, torch.Generator().manual_seed(0)),
                                strict=True):  # fmt: skip
            assert mine.dtype == torch.float32
            assert torch.equal(mine, theirs)
    double = law.double().rsample(10, torch.Generator().manual_seed(0))
    assert all(t.dtype == torch.float64 for t in double)
    assert not law.sample(3, torch.Generator().manual_seed(0)).requires_grad


def test_estimate_does_not_lose_digits_where_sigma_is_small_and_points_are_far():
    law = perturbed(2)
    law.log_scale.data.fill_(math.log(0.05))
    law.biases[-1].data += 5.0
    double = law.rsample(200, torch.Generator().manual_seed(0))
    # the same noise in both precisions: handed over
    noise = [t.float() for t in replay(law, 200)]
    single = copy.deepcopy(law).float()
    parts = iter(noise)
    single._normal = lambda n, generator: next(parts)
    _, log_q = single.rsample(200, None)
    torch.testing.assert_close(log_q.double(), double[1], atol=0.1, rtol=0)


def replay(law, n):
    """The draws of `rsample`, in its order."""
    generator = torch.Generator().manual_seed(0)
    return [law._normal(m, generator) for m in (n, n, law.n_contrast)]
