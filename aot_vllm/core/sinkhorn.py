"""Entropic optimal transport, solved by Sinkhorn iterations.

Dimensions: B problems, M sources (rows), N targets (columns).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Smaller kernel sums count as this much. An epsilon too small for float32 then gives poor plans, but no NaN.
SMALLEST = 1e-30


@dataclass(frozen=True)
class TransportPlan:
    """The solution of B transport problems. A solve that has not converged is a result, not an error.

    `plan` (B, M, N): the column sums equal the column marginals; after convergence the row sums are close to the row
    marginals. If costs differ by more than about 60 epsilon, the range of float32 ends and some mass may be missing.
    `error` is the mean movement of the row scaling in the last iteration. `iterations`, `error` and `converged` have
    one entry for each problem, or a single entry if all problems were stopped jointly.
    """

    plan: Tensor
    iterations: Tensor
    error: Tensor
    converged: Tensor


def sinkhorn(
    cost_BMN: Tensor,
    *,
    row_mass: Tensor,
    col_mass: Tensor | None = None,
    epsilon: float,
    iterations: int,
    tolerance: float,
    joint: bool,
) -> TransportPlan:
    """Return the entropic transport plans, (B, M, N), for the marginals `row_mass` (B, M) and `col_mass` (B, N).

    The column marginals are uniform by default. Masses are in [0, 1]; a row may have no mass, a column must have some.
    Costs are finite and of any float type. The solution is float32.

    The row scaling starts at 1. A solve ends when an iteration moves it by less than `tolerance`, on average over the
    rows with mass, or after `iterations`. With `joint`, all problems end together, by the average over all of them.

    A problem that has ended keeps its solution while the others continue, so nothing is read back from the device. On
    the CPU reading is free, and the loop ends with the last problem.
    """
    if col_mass is None:
        col_mass = torch.full((), 1 / cost_BMN.shape[2], dtype=torch.float32, device=cost_BMN.device)
    kernel_BMN, row_minimum_BM, col_minimum_BN = _scaled_kernel(cost_BMN, row_mass, epsilon)

    # A scaling of exp(-cost / epsilon) is the scaling of the kernel times exp(minimum / epsilon). The stopping rule is
    # about the former, which starts at 1.
    unit_BM = (row_minimum_BM / epsilon).exp_().clamp_max_(torch.finfo(torch.float32).max)
    r_BM = unit_BM.reciprocal().masked_fill_(row_mass <= 0, 0)
    c_BN = (col_minimum_BN / -epsilon).exp_()
    dims = (0, 1) if joint else (1,)
    weight_BM = unit_BM / (row_mass > 0).sum(dim=dims, keepdim=True)

    active = torch.ones_like((r_BM[:1] if joint else r_BM)[:, :1], dtype=torch.bool)
    error = torch.full_like(active, torch.inf, dtype=torch.float32)
    steps = torch.zeros_like(active, dtype=torch.long)
    for _ in range(iterations):
        next_r_BM = _rescale(row_mass, kernel_BMN, c_BN)
        next_c_BN = _rescale(col_mass, kernel_BMN.transpose(1, 2), next_r_BM)
        moved = (next_r_BM - r_BM).abs_().mul_(weight_BM).sum(dim=dims, keepdim=True)
        r_BM = torch.where(active, next_r_BM, r_BM)
        c_BN = torch.where(active, next_c_BN, c_BN)
        error = torch.where(active, moved, error)
        steps += active
        active = active & ~(moved < tolerance)
        if active.device.type == "cpu" and not active.any():
            break
    plan_BMN = kernel_BMN.mul_(r_BM.unsqueeze(2)).mul_(c_BN.unsqueeze(1))
    return TransportPlan(plan_BMN, steps.flatten(), error.flatten(), ~active.flatten())


def _scaled_kernel(cost_BMN: Tensor, row_mass_BM: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the kernel exp(-cost / epsilon), scaled, and the row and column minima of the cost that scale it.

    Each row and each column of the scaled kernel has an entry of 1. Unscaled, a small epsilon would turn whole rows
    into zeros and the plan into NaN. Rows without mass become zero, because their minimum is set to minus infinity.
    """
    row_minimum_BM = cost_BMN.amin(dim=2).float().masked_fill_(row_mass_BM <= 0, -torch.inf)
    reduced_BMN = cost_BMN - row_minimum_BM.unsqueeze(2)
    col_minimum_BN = reduced_BMN.amin(dim=1)
    kernel_BMN = reduced_BMN.sub_(col_minimum_BN.unsqueeze(1)).div_(-epsilon).exp_()
    return kernel_BMN, row_minimum_BM, col_minimum_BN


def _rescale(mass_BM: Tensor, kernel_BMN: Tensor, other_BN: Tensor) -> Tensor:
    """Return the scaling of the rows, (B, M), that meets their marginals, given the scaling of the columns."""
    sums_BM = torch.bmm(kernel_BMN, other_BN.unsqueeze(2)).squeeze(2)
    return mass_BM / sums_BM.clamp_min_(SMALLEST)
