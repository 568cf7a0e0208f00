"""A child that is forked from a process with several threads does not wait for ever."""

import os
import subprocess
import sys

import pytest

FORK = """
import multiprocessing, warnings
import numpy as np, torch
from skebm import Network, ScoreMatchingEBM
torch.set_num_threads(2)
X = np.random.default_rng(0).normal(size=(60, 2))
def fitted():
    network = Network(max_epochs=1)
    return ScoreMatchingEBM(
        n_members=1, base="gaussian", energy_model=network, n_partition_samples=100, random_state=0
    ).fit(X)
parent = fitted()
product = torch.randn(900, 900) @ torch.randn(900, 900)  # shared out among threads
def child(connection):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = parent.score_samples(X)
        refitted = fitted().score_samples(X)
    product = torch.randn(900, 900) @ torch.randn(900, 900)
    texts = [str(w.message) for w in caught]
    connection.send((scores, refitted, torch.get_num_threads(), texts))
context = multiprocessing.get_context("fork")
here, there = context.Pipe()
process = context.Process(target=child, args=(there,), daemon=True)
process.start()
assert here.poll(60), "the child hangs"
scores, refitted, n_threads, texts = here.recv()
process.join()
assert torch.get_num_threads() == 2
np.testing.assert_allclose(scores, parent.score_samples(X))
np.testing.assert_allclose(refitted, scores)
assert n_threads == 1
assert sum("was forked from one" in text for text in texts) == 1, texts
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_scores_and_fits_with_one_thread():
    environment = {name: v for name, v in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
