"""The game of flow-contrastive estimation: its value is that of the paper."""

import numpy as np
import pytest
import torch

from skebm import Network
from skebm._engine import Budget
from skebm._random import Seeds
from skebm.bases import _flow_training
from skebm.datasets import Rings
from skebm.training import Columns, Recipe, flow_contrastive, make_task
from skebm.training.fit import prepare
from skebm.training.games import views


class Game(torch.nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.generator, self.log_partition = generator, torch.tensor([0.4, -0.7])

    def energy(self, z):
        assert z.abs().max() <= 5.0
        return torch.sin(2 * z).sum(-1) + 0.3 * z.square().sum(-1)


@pytest.mark.parametrize("base", ["flow", None])
def test_the_value_of_the_game_is_that_of_the_paper(base, monkeypatch):
    monkeypatch.setattr(_flow_training, "FLOW_BUDGET", Budget(epochs=2, steps=1))
    rows, seen = Rings().sample(200, random_state=0), []
    task = make_task(
        rows, np.ones(200), Columns.learn(rows, range(2)), n_members=2, validation_fraction=0.1,
        smoothing=0.0, seeds=Seeds(0), device=torch.device("cpu"),
    )  # fmt: skip
    task = prepare(task, Recipe(train=None, base=base, flow="coupling"))

    def play(task, network, flow, loss, plays, **options):
        seen.extend([flow, loss])
        raise InterruptedError

    monkeypatch.setattr(flow_contrastive, "play", play)
    with pytest.raises(InterruptedError):
        flow_contrastive.train_by_flow_contrast(
            task, Network(), generator_learning_rate=1e-3, accuracy_threshold=0.5, refinement=True,
            correction=None,
        )  # fmt: skip
    flow, loss = seen
    log_base, features = views(task)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in flow.parameters():  # no longer where it started
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    game = Game(flow)
    y = 1.5 * torch.randn(2, 50, 2, generator=generator)
    weight = torch.rand(2, 50, generator=generator)
    points, log_flow = flow.rsample(60, generator)
    drawn = features(points), log_flow, log_base(points)
    value = loss(game, y, features(y), log_base(y), weight, lambda: drawn)
    # Gao et al. (2020), equation 9, with p = exp(-E - c): the energy raises, the flow lowers
    # V = E log p / (p + q) + E log q / (p + q)
    paper = 0.0
    for k, to_y in enumerate(task.coordinates.maps):
        for rows, w, of_data in ((y[k], weight[k], True), (points[k], torch.ones(60), False)):
            x = to_y.inverse(rows.double())
            log_q = task.bases[k].log_prob(x) - to_y(x)[1]
            z = task.features.transform(x)[0].float()
            f = game.energy(z.clamp(-5, 5)[None])[0]
            p = torch.exp(log_q + f - game.log_partition[k])
            q = torch.exp(flow.log_prob(rows.expand(2, -1, -1))[k])
            paper = paper + (w * torch.log((p if of_data else q) / (p + q))).mean()
    assert value.item() == pytest.approx(-paper.item(), rel=1e-4)
    # opposite signs for the players come from the engine: one gradient, through samples, too
    gradients = torch.autograd.grad(value, list(flow.parameters()), allow_unused=True)
    assert sum(g.abs().sum().item() for g in gradients if g is not None) > 0
