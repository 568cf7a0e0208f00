"""What is particular to Hamiltonian Monte Carlo."""

import pytest
import torch

from skebm.samplers import hmc, mala


def test_without_the_correction_the_law_would_change(laws):
    law, g = laws.Banana(), laws.rng()
    state = hmc.init(law.sample(2000, g), law)
    for _ in range(20):
        momentum = torch.randn(state.position.shape, generator=g, dtype=torch.float64)
        state, _ = hmc.leapfrog(state, momentum, law, step_size=0.3, scale=1.0, n_leapfrog_steps=4)
    assert not min(laws.p_values(law, state.position)) > 1e-4


def test_leapfrog_is_reversible_and_keeps_volume(laws):
    law, g = laws.Banana(), laws.rng()
    x, m = law.sample(20, g), torch.randn(20, 2, generator=g, dtype=torch.float64)
    options = dict(
        step_size=0.2, scale=torch.tensor([1.0, 0.5], dtype=torch.float64), n_leapfrog_steps=7
    )

    def flow(x, m):
        end, last = hmc.leapfrog(hmc.init(x, law), m, law, **options)
        return end.position, last

    there, momentum = flow(x, m)
    assert (there - x).abs().mean() > 0.1
    back, momentum = flow(there, -momentum)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(-momentum, m)

    h = 1e-5  # Jacobian of the map (x, m) -> (x', m') by central differences
    start = torch.cat([x[:1], m[:1]], 1)
    rows = torch.cat([start + h * torch.eye(4), start - h * torch.eye(4)])
    ends = torch.cat(flow(rows[:, :2], rows[:, 2:]), 1)
    jacobian = (ends[:4] - ends[4:]) / (2 * h)
    assert torch.linalg.det(jacobian).abs().item() == pytest.approx(1.0, abs=1e-6)


def test_leapfrog_against_the_textbook(laws):
    """Half a step of the momentum, a step, half a step, written out."""
    law, g = laws.Banana(), laws.rng()
    x, m = law.sample(20, g), torch.randn(20, 2, generator=g, dtype=torch.float64)
    given = m.clone()
    end, last = hmc.leapfrog(hmc.init(x, law), m, law, step_size=0.2, scale=1.0, n_leapfrog_steps=5)
    assert torch.equal(m, given)
    for _ in range(5):
        m = m + 0.1 * hmc.init(x, law).gradient
        x = x + 0.2 * m
        m = m + 0.1 * hmc.init(x, law).gradient
    torch.testing.assert_close(end.position, x)
    torch.testing.assert_close(last, m)


def test_energy_error_falls_with_the_square_of_the_step(laws):
    law = laws.Banana()
    x = law.sample(500, laws.rng())
    errors = []
    for n in (8, 16):  # a trajectory of one length
        state, g = hmc.init(x, law), laws.rng(1)
        _, info = hmc.step(state, law, g, step_size=0.8 / n, n_leapfrog_steps=n)
        errors.append(info.energy_error.abs().median().item())
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.2)


def test_one_leapfrog_step_is_mala(laws):
    law, x = laws.Banana(), laws.Banana().sample(50, laws.rng())
    a, info_a = hmc.step(hmc.init(x, law), law, laws.rng(1), step_size=0.5, n_leapfrog_steps=1)
    b, info_b = mala.step(mala.init(x, law), law, laws.rng(1), step_size=0.5)
    torch.testing.assert_close(tuple(a), tuple(b))
    torch.testing.assert_close(info_a.energy_error, info_b.energy_error)


def test_bad_arguments(laws):
    state = hmc.init(torch.zeros(5, 2), laws.normal)
    with pytest.raises(ValueError, match="n_leapfrog_steps=0"):
        hmc.step(state, laws.normal, laws.rng(), step_size=1.0, n_leapfrog_steps=0)
