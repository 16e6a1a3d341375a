import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from aot_vllm.core.sinkhorn import sinkhorn
from tests import reference
from tests.strategies import few, noise, seeds

PAPER = {"epsilon": 0.1, "iterations": 100, "tolerance": 1e-2}
EXACT = {"epsilon": 0.1, "iterations": 500, "tolerance": 0.0}
sizes = st.integers(1, 9)


def uniform(cost):
    return torch.full(cost.shape[:2], 1 / cost.shape[1])


def costs(seed, *shape, most=1.0):
    return noise(seed, *shape).sigmoid() * most


@few
@given(seeds, sizes, sizes, sizes)
def test_plans_are_non_negative_and_have_the_marginals(seed, problems, rows, cols):
    cost = costs(seed, problems, rows, cols)
    plan = sinkhorn(cost, row_mass=uniform(cost), joint=False, **EXACT).plan
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(2), uniform(cost), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(plan.sum(1), torch.full((problems, cols), 1 / cols), rtol=1e-4, atol=1e-6)


@few
@given(seeds, sizes, sizes, sizes)
def test_given_masses_are_respected_and_rows_without_mass_send_nothing(seed, problems, rows, cols):
    cost = costs(seed, problems, rows + 1, cols)
    row_mass = noise(seed + 1, problems, rows + 1).exp()
    row_mass[:, seed % (rows + 1)] = 0
    row_mass /= row_mass.sum(1, keepdim=True)
    col_mass = noise(seed + 2, problems, cols).softmax(1)
    plan = sinkhorn(cost, row_mass=row_mass, col_mass=col_mass, joint=False, **EXACT).plan
    torch.testing.assert_close(plan.sum(2), row_mass, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(plan.sum(1), col_mass, rtol=1e-3, atol=1e-5)
    assert (plan[:, seed % (rows + 1)] == 0).all()


@few
@given(seeds, sizes, sizes)
def test_a_row_without_mass_is_like_a_row_left_out(seed, rows, cols):
    cost = costs(seed, 2, rows, cols)
    with_row = torch.cat([costs(seed + 1, 2, 1, cols), cost], dim=1)
    row_mass = torch.cat([torch.zeros(2, 1), uniform(cost)], dim=1)
    short = sinkhorn(cost, row_mass=uniform(cost), joint=True, **PAPER)
    long = sinkhorn(with_row, row_mass=row_mass, joint=True, **PAPER)
    torch.testing.assert_close(long.plan[:, 1:], short.plan)
    assert torch.equal(long.iterations, short.iterations)
    torch.testing.assert_close(long.error, short.error, rtol=1e-3, atol=1e-6)


@few
@given(seeds, sizes, sizes, sizes, st.booleans())
def test_plan_and_iterations_are_those_of_the_oracle(seed, problems, rows, cols, joint):
    # Scalings grow like exp(cost / epsilon). Beyond costs of 0.5, float32 cannot resolve the tolerance of the rule.
    cost = costs(seed, problems, rows, cols, most=0.5)
    solution = sinkhorn(cost, row_mass=uniform(cost), joint=joint, **PAPER)
    groups = [cost.tolist()] if joint else [[one] for one in cost.tolist()]
    solved = [reference.sinkhorn(group, **PAPER) for group in groups]
    assert solution.iterations.tolist() == [taken for _, taken in solved]
    expected = torch.tensor([plan for plans, _ in solved for plan in plans])
    torch.testing.assert_close(solution.plan, expected, rtol=1e-4, atol=1e-7)


@few
@given(seeds, sizes, sizes)
def test_plans_for_large_costs_are_those_of_the_oracle(seed, rows, cols):
    cost = costs(seed, 1, rows, cols, most=2.7)
    fixed = {"epsilon": 0.1, "iterations": 12, "tolerance": 0.0}
    plan = sinkhorn(cost, row_mass=uniform(cost), joint=True, **fixed).plan
    expected, _ = reference.sinkhorn(cost.tolist(), **fixed)
    torch.testing.assert_close(plan, torch.tensor(expected), rtol=1e-4, atol=1e-7)


@few
@given(seeds, st.integers(2, 6), sizes, sizes)
def test_a_batch_is_its_problems_one_by_one(seed, problems, rows, cols):
    cost = costs(seed, problems, rows, cols)
    batch = sinkhorn(cost, row_mass=uniform(cost), joint=False, **PAPER)
    for index, one in enumerate(cost.split(1)):
        alone = sinkhorn(one, row_mass=uniform(one), joint=False, **PAPER)
        torch.testing.assert_close(batch.plan[index], alone.plan[0])
        assert batch.iterations[index] == alone.iterations[0]


@few
@given(seeds, st.integers(2, 9), st.integers(2, 9))
def test_permuted_problems_have_permuted_plans(seed, rows, cols):
    cost = costs(seed, 3, rows, cols)
    generator = torch.Generator().manual_seed(seed)
    by_row, by_col = torch.randperm(rows, generator=generator), torch.randperm(cols, generator=generator)
    plan = sinkhorn(cost, row_mass=uniform(cost), joint=False, **PAPER).plan
    permuted = sinkhorn(cost[:, by_row][:, :, by_col], row_mass=uniform(cost), joint=False, **PAPER).plan
    torch.testing.assert_close(permuted, plan[:, by_row][:, :, by_col])


@few
@given(seeds, st.integers(2, 7))
def test_a_small_epsilon_gives_the_optimal_assignment(seed, size):
    # Assignments of different cost differ by at least 1 / 8, six times epsilon. So only optimal ones share the mass.
    generator = torch.Generator().manual_seed(seed)
    cost = torch.randint(0, 9, (1, size, size), generator=generator) / 8
    best_rows, best_cols = linear_sum_assignment(cost[0])
    plan = sinkhorn(cost, row_mass=uniform(cost), joint=True, epsilon=0.02, iterations=300, tolerance=0.0).plan
    optimum = cost[0, best_rows, best_cols].mean()
    torch.testing.assert_close((plan[0] * cost[0]).sum(), optimum, rtol=0, atol=0.02)


def test_a_unique_optimal_assignment_is_found_token_by_token():
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))
    cost = costs(5, 1, 30, 30) / 4 + 0.6
    cost[0, torch.arange(30), order] = 0.0
    plan = sinkhorn(cost, row_mass=uniform(cost), joint=True, epsilon=0.02, iterations=200, tolerance=1e-6).plan
    assert torch.equal(plan[0].argmax(1), order)
    torch.testing.assert_close(plan[0, torch.arange(30), order], torch.full((30,), 1 / 30), rtol=1e-4, atol=0)


@pytest.mark.parametrize("epsilon", [0.02, 1.0, 1e3])
@pytest.mark.parametrize("joint", [True, False])
def test_column_masses_are_exact_at_any_iteration(epsilon, joint):
    cost = costs(3, 4, 20, 10)
    solution = sinkhorn(cost, row_mass=uniform(cost), joint=joint, epsilon=epsilon, iterations=3, tolerance=1e-2)
    torch.testing.assert_close(solution.plan.sum(1), torch.full((4, 10), 0.1))


@pytest.mark.parametrize("epsilon", [1e-30, 1e-6, 1e-3, 1e-2, 1e3])
@pytest.mark.parametrize("joint", [True, False])
def test_extreme_epsilons_give_no_nan_and_move_no_more_than_the_masses(epsilon, joint):
    cost = costs(3, 4, 20, 10)
    solution = sinkhorn(cost, row_mass=uniform(cost), joint=joint, epsilon=epsilon, iterations=100, tolerance=1e-2)
    assert solution.plan.isfinite().all()
    assert not solution.error.isnan().any()
    assert (solution.plan >= 0).all()
    assert (solution.plan.sum(1) <= 0.1 * 1.0001).all()


def test_constant_costs_give_the_independent_plan():
    cost = torch.full((2, 4, 5), 1.7)
    plan = sinkhorn(cost, row_mass=uniform(cost), joint=False, **PAPER).plan
    torch.testing.assert_close(plan, torch.full((2, 4, 5), 1 / 20))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_costs_are_solved_in_float32(dtype):
    cost = costs(4, 2, 6, 5).to(dtype)
    half = sinkhorn(cost, row_mass=uniform(cost), joint=False, **PAPER)
    full = sinkhorn(cost.float(), row_mass=uniform(cost), joint=False, **PAPER)
    assert half.plan.dtype == torch.float32
    torch.testing.assert_close(half.plan, full.plan)


def test_a_solve_that_does_not_converge_is_a_result_and_not_an_error():
    cost = costs(6, 3, 12, 12)
    solution = sinkhorn(cost, row_mass=uniform(cost), joint=False, epsilon=0.01, iterations=2, tolerance=1e-9)
    assert not solution.converged.any()
    assert solution.iterations.tolist() == [2, 2, 2]
    assert (solution.error > 1e-9).all()


def test_a_nan_in_the_costs_does_not_count_as_convergence():
    cost = costs(6, 2, 3, 3)
    cost[1, 0, 0] = torch.nan
    solution = sinkhorn(cost, row_mass=uniform(cost), joint=False, **PAPER)
    assert solution.converged.tolist() == [True, False]
    assert solution.plan[0].isfinite().all()


def test_the_costs_are_not_modified():
    cost = costs(8, 2, 3, 4)
    before = cost.clone()
    sinkhorn(cost, row_mass=uniform(cost), joint=True, **PAPER)
    assert torch.equal(cost, before)
