import math

import pytest
import torch

from skebm.partition import annealed_importance_sampling, sequential_monte_carlo
from skebm.samplers import hmc, mala, random_walk

# name of the law, its arguments
CASES = [("Tilt", (1, 0.5)), ("Tilt", (2, 3.0)), ("Skew", (10, 4.0))]
cases = pytest.mark.parametrize(("name", "arguments"), CASES)


def smc(law, g, **options):
    return sequential_monte_carlo(law, law.q, g, **{"n_pilot": 400, **options})


def ais(law, g, **options):
    options = {"n_particles": 100, "n_temperatures": 40, "n_pilot": 200, **options}
    return annealed_importance_sampling(law, law.q, g, **options)


# ------------------------------------------------------------------ sequential Monte Carlo


@cases
def test_smc_errors_are_honest(laws, name, arguments):
    law = getattr(laws, name)(*arguments)
    results = [smc(law, laws.rng(s), n_particles=40).partition for s in range(50)]
    laws.check_coverage(results, law.log_z)


def test_smc_finds_the_right_weights_of_modes(laws):
    law = laws.TwoModes(2)
    runs = [smc(law, laws.rng(s), n_particles=50) for s in range(50)]
    laws.check_coverage([r.partition for r in runs], law.log_z)
    right = torch.stack(
        [r.log_z.softmax(0) @ (r.samples[..., 0] > 0).double().mean(1) for r in runs]
    )
    assert right.mean().item() == pytest.approx(0.8, abs=4 * right.std().item() / math.sqrt(50))


def test_smc_in_many_dimensions(laws):
    law = laws.Tilt(43, 12.0)
    results = [smc(law, laws.rng(s), n_particles=128) for s in range(8)]
    z = [(r.partition.value - law.log_z) / r.partition.std_error for r in results]
    assert max(map(abs, z)) < 4
    assert max(r.partition.std_error for r in results) < 0.15
    samples = results[0].samples.flatten(0, 1)
    assert samples.mean().item() == pytest.approx(law.mean, abs=0.02)
    assert samples.var().item() == pytest.approx(1 / (1 + law.b), abs=0.02)


@pytest.mark.parametrize(
    ("kernel", "options"), [(hmc, {"n_leapfrog_steps": 3}), (mala, {}), (random_walk, {})]
)
def test_every_kernel(laws, kernel, options):
    law = laws.Skew(2, 3.0)
    run = smc(law, laws.rng(), kernel=kernel, **options)
    assert abs(run.partition.value - law.log_z) < 4 * run.partition.std_error
    assert 0 < run.partition.std_error < 0.05
    result = ais(law, laws.rng(), kernel=kernel, **options)
    assert abs(result.value - law.log_z) < 4 * result.std_error


def test_without_gradient_and_with_an_edge(laws):
    law = laws.Box()
    runs = [smc(law, laws.rng(s)) for s in range(20)]
    laws.check_coverage([r.partition for r in runs], law.log_z, low=0.3, high=2.0)
    assert ((runs[0].samples > 0) & (runs[0].samples < 1)).all()
    results = [ais(law, laws.rng(s)) for s in range(20)]
    laws.check_coverage(results, law.log_z, low=0.3, high=2.0)


def test_what_a_run_holds_and_costs(laws):
    law, calls = laws.Tilt(3, 4.0), []

    def counted(x):
        calls.append((len(x), x.requires_grad))
        return law(x)

    run = sequential_monte_carlo(
        counted,
        law.q,
        laws.rng(),
        n_particles=50,
        n_runs=4,
        n_pilot=100,
        n_moves=2,
        kernel=mala,
    )
    temperatures, step_sizes, scale_trils = run.tuning
    k = len(step_sizes)
    assert k > 2
    assert calls == [
        (n, gradient) for n in (100, 200) for _ in range(k) for gradient in (False, *[True] * 3)
    ]
    assert temperatures[0] == 0
    assert temperatures[-1] == 1
    assert (temperatures.diff() > 0).all()
    assert run.samples.shape == (4, 50, 3)
    assert not run.samples.requires_grad
    assert scale_trils.shape == (k, 3, 3)
    assert (step_sizes > 0).all()
    assert run.partition.method == "sequential Monte Carlo"
    assert run.partition.n_samples == 200
    assert run.partition.value == pytest.approx(run.log_z.exp().mean().log().item())
    assert 1 / run.partition.ess == pytest.approx(run.partition.std_error**2 + 1 / 200)
    # the model is its base: one stage, no error
    trivial = sequential_monte_carlo(law.q.log_prob, law.q, laws.rng(), n_particles=10)
    assert trivial.tuning.temperatures.tolist() == [0, 1]
    assert trivial.partition.value == pytest.approx(0.0, abs=1e-12)


def test_reproducible_from_the_generator_alone(laws):
    law = laws.Skew(2, 2.0)
    before = torch.get_rng_state()
    a, b, c = (smc(law, laws.rng(s), n_particles=20) for s in (1, 1, 2))
    assert a.partition == b.partition != c.partition
    assert torch.equal(a.samples, b.samples)
    exact = law.sample(50, laws.rng())
    a, b, c = (ais(law, laws.rng(s), samples=exact) for s in (1, 1, 2))
    assert a == b != c
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------ annealed importance sampling


@cases
def test_forward_errors_are_honest(laws, name, arguments):
    law = getattr(laws, name)(*arguments)
    results = [ais(law, laws.rng(s)) for s in range(50)]
    laws.check_coverage(results, law.log_z)
    assert results[0].lower == results[0].value
    assert results[0].upper is None
    assert results[0].method == "annealed importance sampling"


@cases
def test_both_directions_are_honest(laws, name, arguments):
    law = getattr(laws, name)(*arguments)
    results = []
    for seed in range(30):
        g = laws.rng(seed)
        results.append(ais(law, g, samples=law.sample(100, g)))
    laws.check_coverage(results, law.log_z)
    assert results[0].n_samples == 200


def test_bracket_lies_around_the_truth(laws):
    """Few temperatures, so that both bounds are loose."""
    law, g = laws.Tilt(43, 12.0), laws.rng()
    options = dict(n_particles=64, n_temperatures=10, samples=law.sample(64, g))
    results = [ais(law, g, **options) for _ in range(10)]
    gaps = torch.tensor([[r.lower - law.log_z, r.upper - law.log_z] for r in results])
    error = gaps.std(0) / math.sqrt(len(gaps))
    assert gaps[:, 0].mean() < -3 * error[0]
    assert gaps[:, 1].mean() > 3 * error[1]
    within = torch.tensor([r.value - law.log_z for r in results])
    assert within.abs().mean() < 0.5 * gaps.abs().mean()


def test_forward_weights_are_unbiased(laws):
    law = laws.Skew(2, 3.0)
    z = torch.tensor(
        [ais(law, laws.rng(s), n_particles=20, n_temperatures=8).value for s in range(60)]
    )
    ratios = (z - law.log_z).exp()
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / math.sqrt(60)


def test_one_temperature_is_importance_sampling(laws):
    law = laws.Tilt(2, 0.3)
    result = ais(law, laws.rng(3), n_particles=500, n_temperatures=1)
    x = law.q.sample(500, laws.rng(3))
    expected = (law(x) - law.q.log_prob(x)).logsumexp(0) - math.log(500)
    assert result.value == pytest.approx(expected.item())


def test_float32(laws):
    class Single:
        def log_prob(self, x):
            return -0.5 * (x**2).sum(1) - math.log(2 * math.pi)

        def sample(self, n, rng):
            return torch.randn(n, 2, generator=rng)

    q, g = Single(), laws.rng()
    run = sequential_monte_carlo(lambda x: q.log_prob(x - 2) + 1, q, g)
    assert run.samples.dtype == torch.float32
    assert abs(run.partition.value - 1) < 4 * run.partition.std_error
    result = annealed_importance_sampling(
        lambda x: q.log_prob(x - 2) + 1, q, g, samples=q.sample(300, g) + 2
    )
    assert abs(result.value - 1) < 4 * result.std_error


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_particles": 1}, "n_particles=1 must be at least 2"),
        ({"n_runs": 1}, "n_runs=1 must be at least 2"),
        ({"n_pilot": 1}, "n_pilot=1 must be at least 16"),
        ({"n_moves": 0}, "n_moves=0 must be at least 1"),
        ({"ess_share": 1.0}, "ess_share=1.0 must lie between 0 and 1"),
    ],
)
def test_bad_numbers(laws, options, message):
    law = laws.Tilt(2, 1.0)
    with pytest.raises(ValueError, match=message):
        smc(law, laws.rng(), **options)


@pytest.mark.parametrize(
    ("log_density", "message"),
    [
        (3.0, "log_density must be callable"),
        (lambda x: x, r"log_density must return a tensor of shape \(1024,\), got \(1024, 2\)"),
        (lambda x: 0.0, "log_density must return a tensor .* got float"),
        (lambda x: torch.full((len(x),), math.nan), "log_density is nan or .inf at 1024 of 1024"),
        (lambda x: torch.full((len(x),), -math.inf), "log_density is -inf at all 1024 draws"),
        (lambda x: -1e12 * (x**2).sum(1), "too far to be bridged"),
    ],
)
def test_bad_log_density(laws, log_density, message):
    with pytest.raises(ValueError, match=message):
        sequential_monte_carlo(log_density, laws.normal(2), laws.rng(), kernel=random_walk)


def test_a_run_without_particles_on_the_support(laws):
    with pytest.raises(ValueError, match="all n_particles=10 draws of a run"):
        smc(laws.Box(), laws.rng(), n_particles=10)


def test_bad_proposal_and_samples(laws):
    law = laws.Tilt(2, 1.0)
    with pytest.raises(ValueError, match=r"proposal must have log_prob\(x\) and .* got int"):
        sequential_monte_carlo(law, 3, laws.rng())
    for samples, message in [
        (torch.zeros(3), "samples must be a tensor of shape"),
        (torch.zeros(5, 3), "samples have 3 columns, those of q 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            ais(law, laws.rng(), samples=samples)
    box = laws.Box()
    with pytest.raises(ValueError, match="-inf at 2 of 3 samples"):
        ais(box, laws.rng(), samples=torch.tensor([[2.0, 2], [0.5, 0.5], [3, 3]]).double())
    with pytest.raises(ValueError, match="n_temperatures=0"):
        ais(law, laws.rng(), n_temperatures=0)
