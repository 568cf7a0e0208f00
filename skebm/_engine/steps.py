"""What a step of the training does: an optimiser's step, and a moving average of the weights."""

import math

import torch
from torch import nn

WARM_UP_STEPS = 100

AVERAGING_DECAY = 0.99


class Player:
    """An optimiser with clipped gradients, a warm-up and a cosine.

    The last two are factors on the rates in force: a user's scheduler keeps its say. The warm-up
    counts the player's own steps, the cosine those of the training: whoever sits out now and then
    ends with everybody else.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, n_steps: int, max_gradient_norm: float):
        self.optimizer, self.max_gradient_norm = optimizer, max_gradient_norm
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.n_warm_up = max(1, min(WARM_UP_STEPS, n_steps // 10))
        self.n_taken, self.factor = 0, 1.0

    def take_step(self, progress: float) -> None:
        """Step by the gradients in place; `progress` of the training is in [0, 1)."""
        nn.utils.clip_grad_norm_(self.parameters, self.max_gradient_norm)
        self.n_taken += 1
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        factor = min(1.0, self.n_taken / self.n_warm_up) * cosine
        for group in self.optimizer.param_groups:
            group["lr"] *= factor / self.factor
        self.factor = factor
        self.optimizer.step()


class AveragedWeights:
    """Moving average of a module's parameters, swapped in to be evaluated and kept."""

    def __init__(self, module: nn.Module):
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.averages = [p.detach().clone() for p in self.parameters]
        self.n_updates = 0

    def update(self) -> None:
        # a short memory at first, so that the initial weights are soon forgotten
        decay = min(AVERAGING_DECAY, (self.n_updates + 1) / (self.n_updates + 10))
        self.n_updates += 1
        torch._foreach_lerp_(self.averages, [p.data for p in self.parameters], 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def swap(self) -> None:
        for i, parameter in enumerate(self.parameters):
            parameter.data, self.averages[i] = self.averages[i], parameter.data
