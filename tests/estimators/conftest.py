"""What tests of whole fits share."""

import pytest

from skebm._engine import Budget
from skebm.bases import _flow_training, build_flow
from skebm.training import adversarial, chains, distributions, flow_contrastive


@pytest.fixture(scope="module")
def small_parts():
    """Flows that fit in a fraction of a second, and leave the energies something to learn.

    What is measured after a training is measured on few samples, too: the bound on log Z, the gap
    of a generator, and R-hat. Their values are tested elsewhere.
    """

    def small(flow, n_features, n_members=1, **options):
        if flow == "coupling":
            options |= {"n_layers": 2, "hidden": (16,), "n_bins": 4}
        return build_flow(flow, n_features, n_members, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributions, "build_flow", small)
        budget = Budget(epochs=10, steps=1, patience_steps=300)
        patch.setattr(_flow_training, "FLOW_BUDGET", budget)
        for module in (adversarial, flow_contrastive):
            patch.setattr(module, "HEAD_START", 20)
        patch.setattr(adversarial, "GENERATOR_STEPS", 20)
        patch.setattr(adversarial, "BOUND_SAMPLES", {"flow": 1024, "implicit": 1024})
        patch.setattr(adversarial, "GAP_SAMPLES", 1024)
        patch.setattr(chains, "DIAGNOSED_MOVES", 10)
        patch.setattr(adversarial, "SETTLING_STEPS", dict.fromkeys(adversarial.SETTLING_STEPS, 30))
        patch.setattr(
            adversarial, "SETTLING_SAMPLES", dict.fromkeys(adversarial.SETTLING_SAMPLES, 128)
        )
        yield
