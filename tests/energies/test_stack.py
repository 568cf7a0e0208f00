import copy
import threading
from functools import partial

import pytest
import torch
from torch import nn

from skebm._layout import Layout
from skebm.energies import (
    MLPEnergy,
    ModuleStack,
    Network,
    PeriodicEmbedding,
    PiecewiseLinearEmbedding,
)

D, K, N = 3, 4, 17


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def small_network(n_features):
    return nn.Sequential(nn.Linear(n_features, 5), nn.Tanh(), nn.Linear(5, 1))


def raw(k):
    return MLPEnergy(D, k, hidden_layer_sizes=(8,), rng=rng())


def piecewise_linear(k):
    z = torch.randn(k, 50, D, generator=rng(1))
    embedding = PiecewiseLinearEmbedding(list(z), n_bins=6)
    return MLPEnergy(D, k, hidden_layer_sizes=(8, 7), embedding=embedding, rng=rng())


def periodic(k):
    g = rng()
    embedding = PeriodicEmbedding(D, k, n_frequencies=4, sigma=0.3, rng=g)
    return MLPEnergy(D, k, hidden_layer_sizes=(8,), embedding=embedding, rng=g)


def user_module(k):
    return ModuleStack(small_network, D, k, seed=3)


class InPlace(nn.Module):
    """Moves the rows that it is given, in place."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, 1)

    def forward(self, z):
        z -= 1.0
        return self.linear(z)


# name -> stack of K members; a new energy joins all laws with one line
ENERGIES = {
    "raw": raw,
    "piecewise_linear": piecewise_linear,
    "periodic": periodic,
    "user_module": user_module,
}


def perturbed(stack):
    """As after some training."""
    g = rng(7)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=g)
    return stack


@pytest.mark.parametrize("make", ENERGIES.values(), ids=ENERGIES)
class TestEveryEnergy:
    def test_starts_at_exactly_zero(self, make):
        z = 3 * torch.randn(K, N, D, generator=rng(2))
        f = make(K)(z)
        assert f.shape == (K, N)
        assert torch.equal(f, torch.zeros(K, N))

    def test_one_member_takes_plain_rows(self, make):
        energy = perturbed(make(1))
        z = torch.randn(N, D, generator=rng(2))
        assert energy(z).shape == (N,)
        assert torch.equal(energy(z), energy(z[None])[0])

    def test_stack_equals_its_members(self, make):
        stack = perturbed(make(K)).double()
        z = torch.randn(K, N, D, generator=rng(2), dtype=torch.float64)
        together = stack(z)
        for k in range(K):
            alone = stack.member(k)
            torch.testing.assert_close(alone(z[k]), together[k], rtol=1e-12, atol=1e-12)
            assert alone.n_members == 1
        with torch.no_grad():  # the members own their weights
            for parameter in stack.member(0).parameters():
                parameter.zero_()
        assert torch.equal(stack(z), together)

    def test_members_do_not_see_each_other(self, make):
        stack = perturbed(make(K))
        z = torch.randn(K, N, D, generator=rng(2))
        changed = z.clone()
        changed[1] += 1.0
        same = torch.ones(K, dtype=torch.bool)
        same[1] = False
        assert torch.equal(stack(z)[same], stack(changed)[same])

    def test_gradients_against_finite_differences(self, make):
        energy = perturbed(make(2)).double()
        z = torch.randn(2, 5, D, generator=rng(4), dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(energy, z, eps=1e-7, atol=1e-5)
        names = [name for name, _ in energy.named_parameters()]
        parameters = tuple(p.detach().clone().requires_grad_() for p in energy.parameters())

        def of_parameters(*values):
            named = dict(zip(names, values, strict=True))
            return torch.func.functional_call(energy, named, (z.detach(),))

        energy.eval()
        assert torch.autograd.gradcheck(of_parameters, parameters, eps=1e-7, atol=1e-5)

    def test_learns_from_zero(self, make):
        energy = make(2)
        optimizer = torch.optim.AdamW(energy.parameters(), 1e-2)
        z = torch.randn(2, 200, D, generator=rng(5))
        target = (z[..., 0] * z[..., 1]).tanh()
        first = None
        for _ in range(150):
            optimizer.zero_grad()
            loss = (energy(z) - target).square().mean()
            loss.backward()
            first = first or loss.item()
            optimizer.step()
        assert loss.item() < 0.6 * first
        assert all(p.grad is not None for p in energy.parameters())

    def test_same_seed_same_weights_and_global_rng_untouched(self, make):
        before = torch.get_rng_state()
        one, two = make(K), make(K)
        assert torch.equal(torch.get_rng_state(), before)
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_rejects_wrong_shapes(self, make):
        stack = make(K)
        for shape in [(N, D), (K + 1, N, D), (K, N, D + 1)]:
            with pytest.raises(ValueError, match=r"expects z of shape \(4, n, 3\), got"):
                stack(torch.zeros(shape))


class TestRowsWithStates:
    layout = Layout([3, 2], [-1, 1], 2)
    """A category, a number, and another one that may be missing."""

    def rows(self):
        codes = torch.tensor([[0, 0], [1, 0], [2, 1], [0, 1]])
        values = torch.randn(4, 2, generator=rng(2))
        return self.layout.join(codes, values).expand(2, -1, -1)

    @pytest.mark.parametrize("embedding", ["periodic", "piecewise_linear", None])
    @pytest.mark.parametrize("module", [None, small_network])
    def test_energy_of_values(self, embedding, module):
        options = {"module": module} if module else {"embedding": embedding}
        z = self.rows()
        energy = Network(**options).build([z[0], z[1]], embedding=None, seed=0, layout=self.layout)
        perturbed(energy)
        f, values = energy.of_values(z)
        assert torch.equal(f(values), energy(z))
        assert (values[z[..., 2:].isnan()] == 0).all()
        moved = z.clone()
        moved[..., 2:] += 0.3
        assert torch.equal(f(values + 0.3), energy(moved))  # also where they are absent


class TestUserModules:
    def test_instance_is_copied_never_trained(self):
        instance = small_network(D)
        before = copy.deepcopy(instance.state_dict())
        stack = ModuleStack(instance, D, K)
        perturbed(stack)
        for name, value in instance.state_dict().items():
            assert torch.equal(value, before[name])

    def test_class_and_vector_output(self):
        class Flat(nn.Module):
            def __init__(self, n_features):
                super().__init__()
                self.linear = nn.Linear(n_features, 1)

            def forward(self, z):
                return self.linear(z).squeeze(-1)

        assert perturbed(ModuleStack(Flat, D, 2))(torch.randn(2, N, D)).shape == (2, N)

    def test_members_of_a_factory_start_differently(self):
        stack = user_module(2)
        assert not torch.equal(stack.members[0][0].weight, stack.members[1][0].weight)

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (nn.Linear(D, 2), r"energy_model must map .* returned \(3, 2\)"),
            (nn.Linear(D + 1, 1), r"energy_model failed on rows of shape \(3, 3\)"),
            (lambda n_features: "net", r"energy_model\(3\) must return a torch.nn.Module"),
            (3.0, r"energy_model must be a torch.nn.Module"),
            (InPlace, r"energy_model changes its input in place; .* x = x - 1"),
            (nn.Sequential(nn.ReLU(inplace=True), nn.Linear(D, 1)), "energy_model changes its in"),
            (lambda width, depth: None, r"energy_model could not be made by .*module__"),
            (partial(small_network, rank=2), r"energy_model could not be made by .*rank"),
            (nn.Bilinear(D, D, 1), r"energy_model failed on rows of shape \(3, 3\)"),
        ],
    )
    def test_clear_errors(self, bad, message):
        with pytest.raises(ValueError, match=message):
            ModuleStack(bad, D, 1)

    @pytest.mark.parametrize(
        ("make", "called_with"),
        [
            (lambda d: small_network(d), D),
            (lambda d, width=7: small_network(d), D),
            (lambda *sizes: small_network(*sizes), D),
            (lambda width=7, *, n_features: small_network(n_features), D),
            (lambda width=7, n_features=2: small_network(n_features), D),
            # what skorch calls without the number of columns
            (lambda n_inputs=D: small_network(n_inputs), D),
            (lambda: small_network(D), D),
            (partial(lambda n_inputs, width: small_network(n_inputs), n_inputs=D, width=7), D),
            (partial(lambda width, d: small_network(d), 7), D),
        ],
    )
    def test_is_called_with_the_number_of_columns_where_it_asks_for_it(self, make, called_with):
        member = ModuleStack(make, D, 1).members[0]
        assert member[0].in_features == called_with

    def test_a_module_that_works_on_a_copy_of_its_input_is_taken(self):
        class Copies(InPlace):
            def forward(self, z):
                return super().forward(z.clone())

        assert perturbed(ModuleStack(Copies(), D, 2))(torch.randn(2, N, D)).shape == (2, N)

    def test_dropout_is_private_and_reproducible_in_threads(self):
        def with_dropout(n_features):
            return nn.Sequential(nn.Linear(n_features, 9), nn.Dropout(0.5), nn.Linear(9, 1))

        z = torch.randn(2, N, D, generator=rng())
        results = [None] * 4

        def run(i):
            stack = perturbed(ModuleStack(with_dropout, D, 2, seed=5))
            results[i] = torch.stack([stack(z) for _ in range(20)])

        before = torch.get_rng_state()
        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.equal(results[0][0], results[0][1])  # fresh masks at every step
        assert all(torch.equal(results[0], other) for other in results[1:])
