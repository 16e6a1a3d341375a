"""Entropic optimal transport by Sinkhorn's iterations: problem in, solution out.

Dimensions: B problems, M sources (rows), N targets (columns); 1 where all problems share a value.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Kernel sums count as at least this much, so that an epsilon too small for float32 gives poor plans, never NaN.
SMALLEST = 1e-30


@dataclass(frozen=True)
class TransportPlan:
    """The solution of B transport problems. Not having converged is data, not an error.

    `plan` (B, M, N) has column sums equal to the column masses and, once converged, row sums close to the row masses.
    Where costs differ by more than about 60 epsilon, float32 may end and some mass be missing.
    `iterations`, `error` (mean movement of the row scaling in the last iteration) and `converged` have one entry for
    each problem, or a single one when all problems were stopped jointly.
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
    """Return the entropic transport plan between `row_mass` (B, M) and `col_mass` (B, N), uniform by default.

    A problem ends when its row scaling, started at 1, moves by less than `tolerance` on average over its rows with
    mass; with `joint`, all problems end together when the average over all of them does. Masses are in [0, 1]; rows may
    be without mass, columns not. Costs are finite, in any float type; the solution is float32.

    Solutions that have ended are held while others go on, so nothing has to be read back from the device. On the CPU,
    where reading is free, the loop ends with the last of them.
    """
    if col_mass is None:
        col_mass = torch.full((), 1 / cost_BMN.shape[2], dtype=torch.float32, device=cost_BMN.device)
    kernel_BMN, row_minimum_BM, col_minimum_BN = _scaled_kernel(cost_BMN, row_mass, epsilon)

    # A scaling of exp(-cost / epsilon) is that of the kernel times exp(minimum / epsilon). Both sides start at 1.
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
    """Return exp(-cost / epsilon) scaled to have an entry of 1 in each row and column, and the minima scaled out.

    Without it a small epsilon turns whole rows into zeros and the plan into NaN. Rows without mass become zero: their
    minimum is taken as minus infinity.
    """
    row_minimum_BM = cost_BMN.amin(dim=2).float().masked_fill_(row_mass_BM <= 0, -torch.inf)
    reduced_BMN = cost_BMN - row_minimum_BM.unsqueeze(2)
    col_minimum_BN = reduced_BMN.amin(dim=1)
    kernel_BMN = reduced_BMN.sub_(col_minimum_BN.unsqueeze(1)).div_(-epsilon).exp_()
    return kernel_BMN, row_minimum_BM, col_minimum_BN


def _rescale(mass_BM: Tensor, kernel_BMN: Tensor, other_BN: Tensor) -> Tensor:
    """Return the scaling, (B, M), that gives the rows of the kernel their mass against the other side's scaling."""
    sums_BM = torch.bmm(kernel_BMN, other_BN.unsqueeze(2)).squeeze(2)
    return mass_BM / sums_BM.clamp_min_(SMALLEST)
