import pytest
import torch
from scipy import stats

from skebm.samplers import delayed_acceptance, mala, random_walk

KERNELS = {"mala": mala, "random_walk": random_walk}


def cheap(x):
    """A law that is not the one asked for: N(.3, 1.5^2) in every column."""
    return -0.5 * ((x - 0.3) / 1.5).square().sum(1)


def weight(law):
    return lambda x: law(x) - cheap(x)


def take(state, law, rng, *, kernel=mala, n_steps=3, step_size=0.9, log_weight=None):
    return delayed_acceptance.step(
        state, log_weight or weight(law), rng,
        kernel=kernel, cheap_log_density=cheap, n_steps=n_steps, step_size=step_size,
    )  # fmt: skip


def ends(laws, law, kernel, log_weight=None, n_seeds=5):
    """p-values of chains started at draws of the law."""
    p = []
    for seed in range(n_seeds):
        g = laws.rng(seed)
        x = law.sample(2000, g)
        state = delayed_acceptance.init(x, log_weight or weight(law))
        for _ in range(6):
            state, _ = take(state, law, g, kernel=kernel, log_weight=log_weight)
        assert not torch.equal(state.position, x)
        p += laws.p_values(law, state.position)
    return p


@pytest.mark.parametrize("law_name", ["Banana", "TwoModes", "Exponential"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_law_is_stationary_although_the_cheap_one_is_wrong(laws, kernel, law_name):
    p = ends(laws, getattr(laws, law_name)(), KERNELS[kernel])
    assert min(p) > 1e-4
    assert stats.kstest(p, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("law_name", ["Banana", "TwoModes", "Exponential"])
def test_without_the_decision_it_is_not(laws, law_name):
    law = getattr(laws, law_name)()
    p = ends(laws, law, mala, lambda x: torch.zeros(len(x), dtype=x.dtype), n_seeds=1)
    assert min(p) < 1e-6


def test_chains_find_the_law_from_afar(laws):
    law, g = laws.TwoModes(), laws.rng()
    state = delayed_acceptance.init(torch.full((2000, 1), 4.0, dtype=torch.float64), weight(law))
    for _ in range(60):
        state, _ = take(state, law, g)
    assert min(laws.p_values(law, state.position)) > 1e-4


def test_a_step_costs_one_evaluation_of_the_law_and_no_gradient_of_it(laws):
    law, seen, asked = laws.TwoModes(), [], []

    def log_weight(x):
        seen.append(x.shape)
        assert not x.requires_grad
        assert not torch.is_grad_enabled()
        return weight(law)(x)

    class Cheap:
        def __call__(self, x):
            raise AssertionError

        def value_and_gradient(self, x):
            asked.append(x.shape)
            return cheap(x), -(x - 0.3) / 1.5**2

    g = laws.rng()
    state = delayed_acceptance.init(law.sample(50, g), log_weight)
    assert len(seen) == 1
    for n in range(1, 4):
        state, _ = delayed_acceptance.step(
            state, log_weight, g, kernel=mala, cheap_log_density=Cheap(), n_steps=5, step_size=0.5
        )
        assert seen == [(50, 1)] * (1 + n)
        assert asked == [(50, 1)] * 6 * n  # the start, and five steps


def test_all_steps_are_accepted_as_one_or_none(laws):
    law, g = laws.Banana(), laws.rng()
    before = delayed_acceptance.init(law.sample(500, g), weight(law))
    twin = laws.rng(7)
    after, info = take(before, law, laws.rng(7), n_steps=4)
    # the cheap chain by hand, with the same noise
    state, probabilities = mala.init(before.position, cheap), []
    for _ in range(4):
        state, steps = mala.step(state, cheap, twin, step_size=0.9)
        probabilities.append(steps.acceptance_probability)
    torch.testing.assert_close(
        info.cheap_acceptance_probability, torch.stack(probabilities).mean(0)
    )
    change = weight(law)(state.position) - weight(law)(before.position)
    torch.testing.assert_close(info.acceptance_probability, change.exp().clamp_max(1.0))
    torch.testing.assert_close(info.energy_error, -change)
    assert 0.1 < info.accepted.double().mean() < 0.9
    where = info.accepted[:, None]
    assert torch.equal(after.position, torch.where(where, state.position, before.position))
    torch.testing.assert_close(after.log_density, weight(law)(after.position))
    assert torch.equal(info.diverged, change < -1000.0)
    assert after.gradient is None


def test_an_approximation_that_is_exact_is_always_accepted(laws):
    law = laws.TwoModes()
    x = law.sample(200, laws.rng())
    state, info = delayed_acceptance.step(
        delayed_acceptance.init(x, lambda x: x.new_full((len(x),), 3.0)),
        lambda x: x.new_full((len(x),), 3.0), laws.rng(1),
        kernel=mala, cheap_log_density=law, n_steps=1, step_size=0.7,
    )  # fmt: skip
    plain, plain_info = mala.step(mala.init(x, law), law, laws.rng(1), step_size=0.7)
    assert info.accepted.all()
    assert torch.equal(state.position, plain.position)
    torch.testing.assert_close(info.cheap_acceptance_probability, plain_info.acceptance_probability)


def test_no_chain_leaves_the_support(laws):
    law, g = laws.Exponential(), laws.rng()
    state = delayed_acceptance.init(law.sample(500, g), weight(law))
    for _ in range(5):
        state, info = take(state, law, g)
        assert (state.position > 0).all()
        assert torch.isfinite(state.log_density).all()
    assert torch.isinf(info.energy_error).any()
    assert not info.accepted[torch.isinf(info.energy_error)].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_the_generator_decides(laws, dtype):
    law = laws.Banana()
    x = law.sample(100, laws.rng()).to(dtype)

    def end(seed):
        g, state = laws.rng(seed), delayed_acceptance.init(x, weight(law))
        for _ in range(3):
            state, info = take(state, law, g)
        return state, info

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, info = end(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(end(3)[0].position, first.position)
    assert not torch.equal(end(4)[0].position, first.position)
    assert first.position.dtype == first.log_density.dtype == dtype
    assert {part.shape for part in info} == {(100,)}
