"""Muon (orthogonalised momentum) for matrices and convolution kernels, and an average of weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update has all singular values near one, by five Newton-Schulz steps.

    Kernels are seen as matrices [out, rest]. Matrices of one shape are treated as one batch: for the small
    ones of this model that is several times quicker than one after another. Method: Jordan et al., "Muon",
    2024.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step with the gradients at hand; a parameter without one stays."""
        group = self.param_groups[0]
        keep, rate = group["momentum"], group["lr"]
        batches: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                rows, columns = parameter.shape[0], parameter[0].numel()
                batches[min(rows, columns), max(rows, columns)].append(parameter)
        for parameters in batches.values():
            wanted = torch.stack([self._wanted(parameter, keep) for parameter in parameters])
            for parameter, update in zip(parameters, orthogonalise(wanted), strict=True):
                rows, columns = parameter.shape[0], parameter[0].numel()
                turned = update if rows <= columns else update.T
                parameter.add_(turned.reshape(parameter.shape), alpha=-rate * max(1.0, rows / columns) ** 0.5)

    def _wanted(self, parameter: nn.Parameter, keep: float) -> Tensor:
        """The momentum, one step ahead, as a matrix with rows <= columns."""
        assert parameter.grad is not None
        gradient = parameter.grad.flatten(1)
        if gradient.shape[0] > gradient.shape[1]:
            gradient = gradient.T
        state = self.state[parameter]
        average: Tensor = state.setdefault("average", torch.zeros_like(gradient))
        average.mul_(keep).add_(gradient, alpha=1 - keep)
        wanted: Tensor = gradient * (1 - keep) + average * keep
        return wanted


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices [n, rows, columns], rows <= columns, with their singular values moved towards one."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445, alpha=1.0)
    return x


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the parameters of `average` towards those of `model`."""
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)
