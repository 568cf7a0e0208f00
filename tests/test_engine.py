import ast
import math
import signal
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sklearn
import torch
from skorch.callbacks import (
    BatchScoring,
    Callback,
    Checkpoint,
    EarlyStopping,
    EpochScoring,
    EpochTimer,
    GradientNormClipping,
    InputShapeSetter,
    LRScheduler,
    PrintLog,
    ProgressBar,
)
from skorch.history import History

from skebm import _engine
from skebm._engine import MemberBatches, Opponent, check_callbacks, train, unfinished_gain
from skebm.energies import MLPEnergy
from skebm.exceptions import DivergenceError
from skebm.objectives import nce_losses

SETTINGS = {"learning_rate": 5e-3, "weight_decay": 1e-3}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class Problem:
    """Two members; data N(1, .5^2) in the first column against standard normal noise."""

    def __init__(self, n=600, batch_size=100, width=16):
        g = rng()
        z = torch.randn(n, 2, generator=g)
        z[:, 0] = 1 + 0.5 * z[:, 0]
        self.noise = torch.randn(2, 3000, 2, generator=g)
        rows = [torch.arange(n)[torch.arange(n) % 2 != k] for k in range(2)]
        self.held_out = torch.stack([z[k::2] for k in range(2)])
        self.module = MLPEnergy(2, 2, hidden_layer_sizes=(width,), rng=g)
        self.module.log_partition = torch.nn.Parameter(torch.zeros(2))
        self.batches = MemberBatches(
            (z.expand(2, -1, -1),), rows, (self.noise,), batch_size=batch_size, rng=g
        )

    @staticmethod
    def loss(module, batch):
        of_data, of_noise = nce_losses(*map(module, batch), module.log_partition)
        return (of_data.mean(-1) + of_noise.mean(-1)).sum()

    @torch.no_grad()
    def gain(self, module):
        log_z = module(self.noise).double().logsumexp(-1) - math.log(3000)
        return float((module(self.held_out).double().mean(-1) - log_z).mean())

    def train(self, max_epochs=40, **kwargs):
        evaluate = kwargs.pop("evaluate", self.gain)
        loss = kwargs.pop("loss", self.loss)
        settings = SETTINGS | kwargs
        return train(self.module, loss, self.batches, evaluate, max_epochs=max_epochs, **settings)


# --- batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch_size"), [(100, 32), (97, 10), (5, 256), (10, 1)])
def test_batches_visit_rows_of_their_member_once_in_equal_batches(n, batch_size):
    ids = torch.arange(n)
    data = (ids.expand(3, n), torch.stack([ids, 10 * ids, 100 * ids]))
    rows = [ids[ids % 3 != k] for k in range(3)]
    batches = MemberBatches(data, rows, batch_size=batch_size, rng=rng())
    epoch = list(batches)
    assert len(epoch) == len(batches)
    seen, scaled = (torch.cat(parts, 1) for parts in zip(*epoch, strict=True))
    shortest = min(map(len, rows))
    assert shortest - len(batches) < seen.shape[1] <= shortest
    assert len({batch[0].shape for batch in epoch}) == 1
    assert abs(epoch[0][0].shape[1] - batch_size) <= batch_size / 2 or shortest < batch_size
    for k in range(3):
        assert set(seen[k].tolist()) <= set(rows[k].tolist())
        assert len(seen[k].unique()) == seen.shape[1]
        assert torch.equal(scaled[k], 10**k * seen[k])  # tensors of one row stay together
    again = torch.cat([batch[0] for batch in batches], 1)
    assert not torch.equal(again, seen) or seen.shape[1] < 4  # another permutation


def test_batches_blocks_noise_and_offsets(monkeypatch):
    pool = torch.arange(50.0).expand(2, 50)
    noise = (torch.stack([pool, pool], -1), torch.arange(2.0)[:, None] + pool)
    data = (torch.randn(2, 90, 2, generator=rng()),)
    rows = [torch.arange(90)] * 2

    def epoch():
        return list(MemberBatches(data, rows, noise, batch_size=9, noise_ratio=2.5, rng=rng(1)))

    whole = epoch()
    assert all(z.shape == (2, 22, 2) and r.shape == (2, 22) for _, z, r in whole)
    for _, z, r in whole:
        assert torch.equal(z[..., 0] + torch.arange(2.0)[:, None], r)
    monkeypatch.setattr(_engine.batches, "MAX_BLOCK", 1)
    data_only = [z for z, *_ in epoch()]
    assert all(torch.equal(a, b[0]) for a, b in zip(data_only, whole, strict=True))


def test_batches_refresh_the_data_each_epoch():
    z = torch.zeros(1, 20, 1)

    def jitter(g):
        return (z + torch.rand(z.shape, generator=g),)

    batches = MemberBatches(jitter, [torch.arange(20)], batch_size=20, rng=rng())
    (one,), (two,) = (next(iter(batches)) for _ in range(2))
    assert not set(one.flatten().tolist()) & set(two.flatten().tolist())


# --- training --------------------------------------------------------------------------------


def test_learns_and_keeps_the_best_state():
    problem = Problem()
    history = problem.train()
    assert set(history) == {"epoch", "train_loss", "validation_gain", "log"}
    assert len(history.pop("log")) == 40
    assert all(len(values) == 41 for values in history.values())
    gains = history["validation_gain"]
    assert gains[0] == 0.0  # no tilt
    assert np.isnan(history["train_loss"][0])
    # the exact gain is KL(data, noise) = (1 + .25 - 1) / 2 + ln 2
    assert gains.max() == pytest.approx(0.125 + math.log(2), abs=0.1)
    assert problem.gain(problem.module) == gains.max()
    assert not problem.module.training
    log_z = problem.module(problem.noise).logsumexp(-1) - math.log(3000)
    torch.testing.assert_close(problem.module.log_partition, log_z, atol=0.1, rtol=0)


def test_no_tilt_wins_when_nothing_beats_it():
    problem = Problem()
    real, initial = problem.gain, {k: v.clone() for k, v in problem.module.state_dict().items()}
    history = problem.train(evaluate=lambda m: -abs(real(m)), patience=3)
    assert np.argmax(history["validation_gain"]) == 0
    assert len(history["epoch"]) < 41
    for name, value in problem.module.state_dict().items():
        assert torch.equal(value, initial[name])


def test_patience_and_epochs_between_evaluations():
    problem = Problem()
    gains = iter([0.0, 1.0, 0.5, 0.4] + 30 * [0.3])
    history = problem.train(
        evaluate=lambda m: next(gains), patience=10, evaluate_every=5, max_epochs=60
    )
    measured = ~np.isnan(history["validation_gain"])
    assert history["epoch"][measured].tolist() == [0, 5, 10, 15]
    assert history["epoch"][-1] == 16  # no verdict before the warm-up of 6 epochs, then 10 more


def test_without_evaluation_the_last_average_is_kept():
    problem = Problem()
    history = problem.train(evaluate=None, max_epochs=60)
    assert len(history["epoch"]) == 61
    assert np.isnan(history["validation_gain"]).all()
    assert problem.gain(problem.module) > 0.6
    assert not problem.module.training


def test_bit_identical_in_threads_and_global_rng_untouched():
    results = [None] * 3

    def run(i):
        problem = Problem()
        problem.train(max_epochs=5)
        results[i] = problem.module.state_dict()

    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_not_a_number_stops_with_advice():
    problem = Problem()

    def explodes(module, batch):
        loss = problem.loss(module, batch)
        return loss * (math.inf if module(batch[0]).abs().max() > 0.05 else 1.0)

    with pytest.raises(DivergenceError, match="training loss became nan.*learning_rate"):
        problem.train(loss=explodes)
    with pytest.raises(DivergenceError, match="held-out gain became NaN.*learning_rate"):
        Problem().train(evaluate=lambda m: math.nan)


def test_weight_decay_spares_log_partition():
    problem = Problem()
    problem.module.log_partition.data += 1.0
    weight = problem.module.hidden[0].weight.detach().clone()

    def nothing(module, batch):
        return 0.0 * sum(p.sum() for p in module.parameters())

    problem.train(loss=nothing, weight_decay=1.0, evaluate=None, max_epochs=20)
    assert torch.equal(problem.module.log_partition, torch.ones(2))
    assert problem.module.hidden[0].weight.norm() < weight.norm()


def test_float64_and_frozen_parameters():
    problem = Problem()
    problem.module.double()
    problem.module.hidden[0].weight.requires_grad_(False)
    weight = problem.module.hidden[0].weight.clone()
    problem.batches.data = tuple(t.double() for t in problem.batches.data)
    problem.batches.noise = tuple(t.double() for t in problem.batches.noise)
    problem.noise, problem.held_out = problem.noise.double(), problem.held_out.double()
    history = problem.train(max_epochs=10)
    assert history["validation_gain"].max() > 0.1
    assert torch.equal(problem.module.hidden[0].weight, weight)


# --- two players -------------------------------------------------------------------------------

CENTRE = torch.tensor([[0.7, -1.2], [0.3, 2.0]])


class Saddle(torch.nn.Module):
    """Of (x - a)^2 / 2 + b (x - a).(y - c) - w (y - c)^2 / 2; x lowers it, y raises it."""

    def __init__(self, coupling=1.0, curvature=1.0):
        super().__init__()
        self.coupling, self.curvature = coupling, curvature
        self.x = torch.nn.Parameter(torch.zeros(2))
        self.rival = torch.nn.Module()
        self.rival.y = torch.nn.Parameter(torch.zeros(2))

    def value(self):
        x, y = self.x - CENTRE[0], self.rival.y - CENTRE[1]
        own = 0.5 * self.curvature * (x.square() - y.square()).sum()
        return own + self.coupling * (x @ y)

    def distance(self):
        return (self.x - CENTRE[0]).norm() + (self.rival.y - CENTRE[1]).norm()


def play(module, *, plays=lambda: True, rate=0.02, evaluate=None, max_epochs=100, **kwargs):
    batches = kwargs.pop("batches", [(torch.zeros(1, 1),)] * 10)
    settings = {"learning_rate": 0.02, "weight_decay": 0.0, "max_epochs": max_epochs} | kwargs
    opponent = Opponent(module.rival, rate, plays)
    loss = settings.pop("loss", lambda module, batch: module.value())
    return train(module, loss, batches, evaluate, opponent=opponent, **settings)


@pytest.mark.parametrize(("coupling", "curvature"), [(0.0, 1.0), (1.0, 1.0), (-0.5, 0.3)])
def test_players_meet_at_the_saddle(coupling, curvature):
    module = Saddle(coupling, curvature)
    history = play(module)
    torch.testing.assert_close(module.x.data, CENTRE[0], atol=0.02, rtol=0)
    torch.testing.assert_close(module.rival.y.data, CENTRE[1], atol=0.02, rtol=0)
    assert abs(history["train_loss"][-1]) < 0.01


def test_the_opponent_raises_what_the_first_player_lowers():
    # nothing holds them, and AdamW takes steps of its rate
    module = Saddle(coupling=0.0, curvature=0.0)
    play(module, loss=lambda module, batch: (module.x + module.rival.y).sum(), max_epochs=3)
    assert (module.x < -0.05).all()
    torch.testing.assert_close(module.rival.y.data, -module.x.data)


def test_solo_steps_move_the_opponent_alone_and_uphill_before_each_step_of_the_game():
    module, seen = Saddle(coupling=0.0, curvature=0.0), []

    def state(module):
        return module.x.detach().clone(), module.rival.y.detach().clone()

    def solo_loss(module):
        seen.append(("solo", *state(module)))
        return (module.x + 3.0 * module.rival.y).sum()

    def loss(module, batch):
        seen.append(("joint", *state(module)))
        return (module.x * batch[0].sum() + 1.0).sum() + 0.0 * module.rival.y.sum()

    opponent = Opponent(module.rival, 0.02, lambda: False, n_solo_steps=3, solo_loss=solo_loss)
    train(
        module, loss, [(torch.ones(1, 1),)] * 5, opponent=opponent, learning_rate=0.02,
        weight_decay=0.0, max_epochs=2,
    )  # fmt: skip
    assert [kind for kind, *_ in seen] == 10 * (3 * ["solo"] + ["joint"])
    for (kind, x, y), (_, next_x, next_y) in pairwise(seen):
        if kind == "solo":  # uphill, and the gradient that it leaves at x moves nothing
            assert (next_y > y).all()
            assert torch.equal(next_x, x)
        else:
            assert (next_x < x).all()
            assert torch.equal(next_y, y)


def test_cosine_runs_in_game_time():
    # the rate of an opponent that takes the last quarter alone is that of everybody there
    module, rates = Saddle(), []

    class Rates(Callback):
        def on_batch_end(self, net, **kwargs):
            rates.append([p.optimizer.param_groups[0]["lr"] for p in net.players])

    n_steps, start = 400, 300
    play(
        module, plays=lambda: len(rates) >= start, max_epochs=40, callbacks=[Rates()],
        rate=0.02,
    )  # fmt: skip
    assert len(rates) == n_steps
    first, second = np.array(rates).T
    time = np.arange(n_steps)
    cosine = 0.02 * 0.5 * (1 + np.cos(np.pi * time / n_steps))
    warm = min(_engine.steps.WARM_UP_STEPS, n_steps // 10)
    np.testing.assert_allclose(first, cosine * np.minimum(1, (time + 1) / warm), rtol=1e-6)
    # its warm-up counts its own steps
    own = np.minimum(1, (time - start + 1) / warm)[start:]
    np.testing.assert_allclose(second[start:], cosine[start:] * own, rtol=1e-6)


def test_an_opponent_that_does_not_play_stays_where_it_is():
    module, asked = Saddle(), []
    module.rival.y.data += 0.1
    play(module, plays=lambda: bool(asked.append(1)), max_epochs=20)
    assert len(asked) == 200  # once per step
    assert torch.equal(module.rival.y, torch.full((2,), 0.1))
    # the best answer to it
    answer = CENTRE[0] - (module.rival.y.detach() - CENTRE[1])
    assert (module.x.detach() - answer).norm() < 0.8 * answer.norm()
    # and its weights do not decay with those of the first player
    play(module, plays=lambda: False, weight_decay=1.0, max_epochs=5)
    assert torch.equal(module.rival.y, torch.full((2,), 0.1))


def test_players_have_rates_of_their_own():
    slow = Saddle(coupling=0.0)
    play(slow, rate=1e-7, max_epochs=20)
    assert slow.rival.y.abs().max() < 1e-4
    assert (slow.x.detach() - CENTRE[0]).norm() < 0.1
    other = Saddle(coupling=0.0)
    play(other, rate=1e-7, learning_rate=1e-7, max_epochs=20)
    assert other.x.abs().max() < 1e-4


@pytest.mark.parametrize("norm", [_engine.loop.MAX_GRADIENT_NORM, 100.0])
def test_clipping_is_of_each_player_alone(norm):
    # with one norm for both, the steep player would stop the flat one; AdamW would hide it
    moved = []

    class Norms(Callback):
        def on_batch_end(self, net, **kwargs):
            moved.append([p.parameters[0].grad.norm().item() for p in net.players])

    module = Saddle()
    play(
        module, max_epochs=1, max_gradient_norm=norm, callbacks=[Norms()],
        loss=lambda module, batch: (1e6 * module.x + 1.0 * module.rival.y).sum(),
    )  # fmt: skip
    assert moved[0] == pytest.approx([norm, math.sqrt(2.0)], rel=1e-4)


def test_best_state_is_of_both_players():
    module, seen = Saddle(), []

    def evaluate(module):
        seen.append((module.x.detach().clone(), module.rival.y.detach().clone()))
        return [0.0, 1.0, 2.0, 0.5, 0.4, 0.3][len(seen) - 1]

    play(module, evaluate=evaluate, max_epochs=5)
    assert torch.equal(module.x, seen[2][0])
    assert torch.equal(module.rival.y, seen[2][1])
    assert not torch.equal(module.rival.y, seen[3][1])
    # where nothing is better, both go back
    module, gains = Saddle(), iter([1.0] + 9 * [0.0])
    play(module, evaluate=lambda _: next(gains), max_epochs=5)
    assert torch.equal(module.x, torch.zeros(2))
    assert torch.equal(module.rival.y, torch.zeros(2))


def test_a_player_that_sits_out_alone_is_no_player():
    # the same training as without an opponent whose part is frozen
    one, two = Problem(), Problem()
    two.module.rival = torch.nn.Linear(1, 1)
    plain = one.train(max_epochs=4)
    opponent = Opponent(two.module.rival, 1.0, lambda: False)
    weight = two.module.rival.weight.detach().clone()
    game = two.train(max_epochs=4, opponent=opponent)
    np.testing.assert_array_equal(plain["validation_gain"], game["validation_gain"])
    np.testing.assert_array_equal(plain["train_loss"], game["train_loss"])
    assert torch.equal(two.module.rival.weight, weight)


def test_an_opponent_that_explodes_stops_the_game():
    def explodes(module, batch):
        return module.value() * (math.inf if module.rival.y.abs().max() > 0.05 else 1.0)

    with pytest.raises(DivergenceError, match="training loss became"):
        play(Saddle(), loss=explodes)


def test_callbacks_see_the_game():
    class Names(Callback):
        def on_grad_computed(self, net, named_parameters, **kwargs):
            self.names = {name for name, _ in named_parameters}

    names = Names()
    callbacks = [
        names, EpochTimer(), GradientNormClipping(1.0),
        LRScheduler(policy="ExponentialLR", gamma=0.9),
        EarlyStopping(monitor="valid_loss", patience=3, sink=lambda text: None),
    ]  # fmt: skip
    gains = iter([0.0, 0.5] + 90 * [0.2])
    history = play(Saddle(), evaluate=lambda _: next(gains), callbacks=callbacks)
    assert len(history["epoch"]) == 5
    assert names.names == {"x"}  # callbacks work on the first player


def test_games_are_bit_identical():
    states = []
    for _ in range(2):
        module = Saddle()
        play(module, max_epochs=10)
        states.append(module.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("gains", "patience", "rise"),
    [
        ([0.0, 0.1, 0.2, 0.3, 0.4], 2, 0.2), ([0.0, 0.4, 0.2, 0.3, 0.1], 2, 0.0),
        ([0.0, 0.4, 0.2, 0.3, 0.1], 9, 0.4), ([0.0, math.nan, 0.2, math.nan, 0.5], 1, 0.3),
        ([0.0, -1.0, -2.0, -1.5, -1.0], 2, 0.0),
    ],
)  # fmt: skip
def test_what_training_still_gained_when_it_ended(gains, patience, rise):
    found = unfinished_gain(np.arange(5), np.array(gains), patience)
    assert found == pytest.approx(rise, abs=1e-12)


# --- callbacks and interrupts ------------------------------------------------------------------


class Recorder(Callback):
    def __init__(self):
        self.calls = []

    def on_train_begin(self, net, **kwargs):
        self.calls.append("train_begin")

    def on_train_end(self, net, **kwargs):
        self.calls.append("train_end")

    def on_epoch_end(self, net, **kwargs):
        self.calls.append("epoch_end")
        assert net.history[-1, "batches", -1, "train_loss"] > 0
        assert {"valid_loss", "valid_loss_best", "train_loss"} <= set(net.history[-1])

    def on_batch_end(self, net, batch=None, training=None, **kwargs):
        self.calls.append("batch_end")

    def on_grad_computed(self, net, named_parameters, **kwargs):
        assert any(p.grad.abs().sum() > 0 for _, p in named_parameters)


def test_skorch_callbacks_are_called():
    recorder = Recorder()
    callbacks = [
        recorder,
        ("timer", EpochTimer()),
        GradientNormClipping(1.0),
        LRScheduler(policy="ExponentialLR", gamma=0.5),
    ]
    problem = Problem()
    plain = Problem().train(max_epochs=4)
    history = problem.train(max_epochs=4, callbacks=callbacks)
    n_batches = len(problem.batches)
    expected = ["train_begin", *4 * (n_batches * ["batch_end"] + ["epoch_end"]), "train_end"]
    assert recorder.calls == expected
    # a user's schedule multiplies ours
    assert history["train_loss"][1] == pytest.approx(plain["train_loss"][1], rel=1e-3)
    assert history["train_loss"][4] > plain["train_loss"][4]


def test_skorch_early_stopping_ends_training_without_an_error():
    stop = EarlyStopping(monitor="valid_loss", patience=2, sink=lambda text: None)
    gains = iter([0.0, 0.5] + 50 * [0.2])
    problem = Problem()
    history = problem.train(evaluate=lambda m: next(gains), callbacks=[stop])
    assert len(history["epoch"]) == 4
    assert problem.gain(problem.module) != 0.0  # the state of epoch 1


def test_checkpoints_hold_the_weights_that_were_judged(tmp_path):
    problem, lines = Problem(), []
    checkpoint = Checkpoint(monitor="valid_loss_best", dirname=str(tmp_path))
    history = problem.train(
        max_epochs=6, evaluate_every=3, callbacks=[checkpoint, PrintLog(sink=lines.append)]
    )
    # whoever watches the held-out gain has it measured after every epoch
    assert np.isfinite(history["validation_gain"]).all()
    best = int(history["validation_gain"].argmax())
    assert best > 0
    saved = torch.load(tmp_path / "params.pt")
    state = problem.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in saved.items())
    log = History.from_file(str(tmp_path / "history.json"))
    assert log[-1, "event_cp"]
    assert log[:, "epoch"] == list(range(1, best + 1))
    assert len(lines) == 2 + 6
    assert lines[0].split() == ["epoch", "train_loss", "valid_loss", "validation_gain", "cp"]
    assert History(history["log"])[:, "train_loss"] == list(history["train_loss"][1:])
    best_losses = np.flatnonzero(History(history["log"])[:, "train_loss_best"])
    losses = history["train_loss"][1:]
    assert all(losses[i] == losses[: i + 1].min() for i in best_losses)
    assert losses.argmin() in best_losses


def test_progress_bars_know_the_length_of_an_epoch(monkeypatch):
    totals = []

    class Bar:
        def __init__(self, total, leave):
            totals.append(total)

        def set_postfix(self, values, refresh):
            assert values["train_loss"] > 0

        def update(self):
            totals[-1] -= 1

        def close(self):
            pass

    monkeypatch.setattr("skorch.callbacks.logging.tqdm.tqdm", Bar)
    problem = Problem()
    problem.train(max_epochs=2, callbacks=[ProgressBar()])
    assert len(problem.batches) > 1
    assert totals == [0, 0]


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (7, "must hold callbacks of skorch, got 7"),
        (print, "must hold callbacks of skorch"),
        (("name", "log"), "must hold callbacks of skorch"),
        (EpochScoring("neg_log_loss"), "EpochScoring scores predictions .* predicts nothing"),
        (("r2", BatchScoring("r2")), "BatchScoring scores predictions"),
        (EpochScoring, "EpochScoring scores predictions"),
        (InputShapeSetter(), "InputShapeSetter reads the shape of X"),
        (Checkpoint(load_best=True), "Checkpoint must have load_best=False"),
        (Checkpoint(f_pickle="net.pkl"), "Checkpoint must have f_pickle=None"),
    ],
)
def test_callbacks_that_cannot_work_are_refused(callback, message):
    with pytest.raises(ValueError, match=message):
        check_callbacks([EpochTimer(), callback], judged=True)


@pytest.mark.parametrize("callback", [Checkpoint(), Checkpoint, ("stop", EarlyStopping())])
def test_nobody_watches_what_is_not_measured(callback):
    check_callbacks([callback], judged=True)
    with pytest.raises(ValueError, match="patience=None judges nothing"):
        check_callbacks([callback], judged=False)
    watches_training = Checkpoint(monitor="train_loss_best")
    check_callbacks([watches_training, PrintLog, ("bar", ProgressBar)], judged=False)


def test_keyboard_interrupt_is_passed_on():
    problem = Problem()

    def interrupted(module, batch):
        signal.raise_signal(signal.SIGINT)
        return problem.loss(module, batch)

    # a process that was started in the background may ignore the signal
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            problem.train(loss=interrupted)
    finally:
        signal.signal(signal.SIGINT, before)


def test_metadata_routing_does_not_disturb():
    with sklearn.config_context(enable_metadata_routing=True):
        assert Problem().train(max_epochs=2)["epoch"][-1] == 2


def test_progress_reports_every_epoch(capsys):
    reports = []
    history = Problem().train(max_epochs=3, progress=reports.append)
    assert [report["epoch"] for report in reports] == [1, 2, 3]
    assert reports[-1]["best_gain"] == history["validation_gain"].max()
    assert {"max_epochs", "train_loss", "validation_gain", "best_epoch"} <= set(reports[0])
    assert capsys.readouterr() == ("", "")


def test_importing_the_engine_does_not_import_skorch():
    files = {path.name: path for path in Path(_engine.__file__).parent.glob("*.py")}
    assert "skorch" in files.pop("net.py").read_text()
    assert len(files) > 2
    for path in files.values():
        tree = ast.parse(path.read_text())
        at_import = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert at_import
        assert not any("skorch" in ast.unparse(node) for node in at_import)
        assert not any(ast.unparse(node).startswith("from .net") for node in at_import)
