"""Which encoders find both modes of a posterior that has two, with a decoder that is fixed.

    python benchmarks/posterior.py

Rows are x = |z| + 0.1 noise with z ~ N(0, 1), 4,000 of them, and the model knows it: the decoder is
z -> |z|, the variance of the noise is 0.01, and neither is trained. So p(z | x) has a mode at x and
one at -x, alike, and the encoder is all that can be wrong. Every encoder is trained for --epochs
epochs without early stopping. Printed is the Kullback-Leibler divergence in nats from the encoder
to the exact posterior at four rows: the exact one by quadrature, the encoder's by 20,000 draws,
both over 200 bins. An encoder that has one of the modes is at log 2 = 0.69. "share" is that of the
draws with z > 0; the right one is 0.5.

The estimator learns the variance. To hold it fixed, this script makes the task and trains the model
by hand. The case "estimator" does not: it is ``ImplicitVAE``, told nothing but the decoder, and its
encoder is compared with the posterior under the noise that it has learned ("noise"; the right one
is 0.1).
"""

import argparse
import math
import time

import numpy as np
import torch

from skebm import ImplicitVAE
from skebm._layout import Layout
from skebm._random import Seeds
from skebm.training import Task
from skebm.training.latent import LatentSettings, train_latent
from skebm.training.latent_start import build_model

N_ROWS, NOISE = 4_000, 0.1
N_DRAWS, N_BINS, EDGE = 20_000, 200, 5.0
ROWS = (0.3, 0.7, 1.2, 2.0)

# encoder, kl_weight_start
CASES = {
    "gaussian": ("gaussian", 1.0),
    "gaussian 30": ("gaussian", 30.0),
    "stein": ("stein", 1.0),
    "stein 30": ("stein", 30.0),
    "implicit 30": ("implicit", 30.0),
    "estimator": ("stein", 5.0),
}


class Fold(torch.nn.Module):
    def __init__(self, center=0.0, scale=1.0):
        super().__init__()
        self.center, self.scale = center, scale

    def forward(self, z):
        return (z.abs() - self.center) / self.scale


def make_rows():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(N_ROWS, 1))
    return torch.as_tensor(np.abs(z) + NOISE * rng.normal(size=z.shape))


def fit(x, encoder, kl_weight_start, epochs, seed):
    """A model whose noise is known, on the rows in their own units."""
    n, n_train = len(x), round(0.9 * len(x))
    task = Task(
        columns=None, given=x, x=x, weight=torch.ones(n, dtype=torch.float64),
        splits=[(torch.arange(n_train), torch.arange(n_train, n))], draw=lambda _: x,
        changes=False, seeds=Seeds(seed), device=torch.device("cpu"),
    )  # fmt: skip
    settings = LatentSettings(
        n_components=1, encoder=encoder, likelihood="gaussian", kl_weight_start=kl_weight_start,
        n_importance_samples=500, encoder_model="mlp", decoder_model=Fold(),
        hidden_layer_sizes=(64, 64), learning_rate=2e-3, weight_decay=1e-3, batch_size=128,
        max_epochs=epochs, patience=None, callbacks=None,
    )  # fmt: skip
    model = build_model(x, task.weight, 1, settings, task.seeds, Layout((), (), x.shape[1]))
    log_variance = model.likelihood.log_variance
    log_variance.data.fill_(math.log(NOISE**2))
    log_variance.requires_grad_(False)
    train_latent(task, model, settings, stops_early=False)
    return model.double().eval()


def fit_estimator(x, encoder, kl_weight_start, epochs, seed):
    """The estimator, and the center and scale of the columns that its decoder makes."""
    low, center, high = np.quantile(x.numpy(), [0.25, 0.5, 0.75])
    scale = (high - low) / 1.349
    est = ImplicitVAE(
        n_components=1, encoder=encoder, kl_weight_start=kl_weight_start,
        decoder_model=Fold(center, scale), max_epochs=epochs, random_state=seed,
    ).fit(x.numpy())  # fmt: skip
    return est, center, scale


@torch.no_grad()
def judge(model, value):
    """Divergence from the encoder to the exact posterior at a row, and the share of z > 0."""
    x = torch.tensor([[value]], dtype=torch.float64)
    width = 2 * EDGE / N_BINS
    # twenty points in the middle of twenty parts of every bin
    fine = (torch.arange(20 * N_BINS, dtype=torch.float64) + 0.5) * width / 20 - EDGE
    exact = model.log_joint(x[:, None], fine[None, :, None])[0].softmax(0)
    exact = exact.view(N_BINS, 20).sum(1).numpy()
    rng = torch.Generator().manual_seed(0)
    noise = model.encoder.noise(N_DRAWS, rng=rng, dtype=torch.float64)
    z = model.encoder.draw(x, noise)[0, :, 0].numpy()
    drawn, _ = np.histogram(z, bins=N_BINS, range=(-EDGE, EDGE))
    drawn = drawn / drawn.sum()
    met = drawn > 0
    divergence = (drawn[met] * np.log(drawn[met] / np.maximum(exact[met], 1e-12))).sum()
    return divergence, (z > 0).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=110)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    x = make_rows()
    head = "".join(f"{f'x={value}':>9s}{'share':>7s}" for value in ROWS)
    print(f"{'encoder':12s}{'seed':>5s}{'CPU s':>7s}{head}")
    for name in arguments.cases:
        for seed in arguments.seeds:
            start = time.process_time()
            rows, noise = ROWS, ""
            if name == "estimator":
                est, center, scale = fit_estimator(x, *CASES[name], arguments.epochs, seed)
                model, rows = est.model_, [(value - center) / scale for value in ROWS]
                noise = f"  noise {math.sqrt(est.noise_variance_[0]):.2f}"
            else:
                model = fit(x, *CASES[name], arguments.epochs, seed)
            seconds = time.process_time() - start
            found = [judge(model, value) for value in rows]
            cells = "".join(f"{divergence:9.3f}{share:7.2f}" for divergence, share in found)
            print(f"{name:12s}{seed:5d}{seconds:7.0f}{cells}{noise}", flush=True)


if __name__ == "__main__":
    main()
