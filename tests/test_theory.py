"""The formulas of the theory against simulation, with tolerances from the number of samples."""

import math

import pytest
import torch
from torch import Tensor

from anybatch import theory

RUNS = 200_000


def batches(values: int, runs: int = RUNS) -> Tensor:
    """Batches of independent standard Gaussian values."""
    return torch.randn(runs, values, dtype=torch.float64)


def xi(x: Tensor) -> tuple[Tensor, Tensor]:
    """xi_mu and xi_sigma of each batch of data of mean 0 and variance 1."""
    return -x.mean(1), x.var(1, correction=0)


def close_mean(sample: Tensor, expected: float) -> None:
    """Within five standard errors of a mean."""
    error = float(sample.std()) / math.sqrt(len(sample))
    assert float(sample.mean()) == pytest.approx(expected, abs=5 * error)


def close_std(sample: Tensor, expected: float) -> None:
    """Within five standard errors of a standard deviation."""
    square = (sample - sample.mean()).square()
    close_mean(square, expected**2)


@pytest.mark.parametrize("values", [2, 3, 8, 64])
def test_the_noise_of_a_batch_is_as_simulated(values: int) -> None:
    mean, var = xi(batches(values))
    expected = theory.noise(values)
    close_mean(mean, 0.0)
    close_std(mean, expected.mean_std)
    close_mean(var, expected.var_mean)
    close_std(var, expected.var_std)


@pytest.mark.parametrize("values", [2, 5, 16])
def test_noise_of_data_that_are_not_gaussian(values: int) -> None:
    x = batches(values).exponential_() - 1  # variance 1, kurtosis 9
    close_std(xi(x)[1], theory.noise(values, kurtosis=9.0).var_std)


def test_two_values_apart_by_two_always_have_variance_one() -> None:
    assert theory.noise(1).var_std == 0.0
    assert (
        theory.noise(2, kurtosis=1.0).var_std == 0.5
    )  # -1, 1: variance 1 or 0, each half the time


@pytest.mark.few(1)
@pytest.mark.parametrize("values", [2, 8])
@pytest.mark.parametrize("weight", [0.5, 0.9375])
def test_the_noise_of_moving_averages_is_as_simulated(values: int, weight: float) -> None:
    """Equation 8 run to its end, many times side by side."""
    runs, steps = 20_000, math.ceil(math.log(1e-8) / math.log(weight))
    mean, var = torch.zeros(runs, dtype=torch.float64), torch.ones(runs, dtype=torch.float64)
    for _ in range(steps):
        new_mean, new_var = xi(batches(values, runs))
        mean = weight * mean + (1 - weight) * new_mean
        var = weight * var + (1 - weight) * new_var
    expected = theory.noise(values, weight)
    close_std(mean, expected.mean_std)
    close_mean(var, expected.var_mean)
    close_std(var, expected.var_std)
    published = math.sqrt((1 - weight) / values)  # equation 10 as printed
    assert published > 1.2 * float(mean.std())


@pytest.mark.parametrize(("values", "weight"), [(2, 0.0), (5, 0.0), (2, 0.9375)])
def test_densities_integrate_to_one_and_have_the_moments(values: int, weight: float) -> None:
    source = theory.noise(values, weight)
    wide = torch.linspace(-10, 10, 400_001, dtype=torch.float64) * source.mean_std
    density = source.mean_density(wide)
    assert float(torch.trapezoid(density, wide)) == pytest.approx(1.0)
    assert float(torch.trapezoid(density * wide**2, wide)) == pytest.approx(source.mean_std**2)
    roots = torch.linspace(1e-9, math.sqrt(source.var_mean + 40 * source.var_std), 400_001).double()
    density = source.var_density(roots**2) * 2 * roots  # in the root: finite at 0
    assert float(torch.trapezoid(density, roots)) == pytest.approx(1.0, rel=1e-4)
    mean = float(torch.trapezoid(density * roots**2, roots))
    assert mean == pytest.approx(source.var_mean, rel=1e-4)
    assert float(source.var_density(torch.tensor(-1.0))) == 0.0


@pytest.mark.parametrize("values", [2, 5, 16])
def test_the_density_of_a_batch_is_that_of_the_simulation(values: int) -> None:
    source = theory.noise(values)
    _, var = xi(batches(values))
    for low, high in ((0.0, 0.5), (0.5, 1.0), (1.0, 2.0)):
        grid = torch.linspace(math.sqrt(low + 1e-12), math.sqrt(high), 100_001).double()
        share = float(torch.trapezoid(source.var_density(grid**2) * 2 * grid, grid))
        close_mean(((var > low) & (var <= high)).double(), share)


# --- correlated positions --------------------------------------------------------


@pytest.mark.parametrize(("examples", "values", "correlation"), [(2, 16, 0.3), (8, 9, 0.05)])
def test_effective_values(examples: int, values: int, correlation: float) -> None:
    shared = torch.randn(RUNS // 4, examples, 1).double() * math.sqrt(correlation)
    own = torch.randn(RUNS // 4, examples, values).double() * math.sqrt(1 - correlation)
    x = (shared + own).flatten(1)
    many = examples * theory.effective_values(values, correlation)
    close_std(x.mean(1), theory.noise(many).mean_std)
    squares = examples * theory.effective_values(values, correlation**2)
    close_std(x.square().mean(1), math.sqrt(2 / squares))


def test_equal_positions_are_one_value() -> None:
    assert theory.effective_values(1, 0.5) == 1.0
    assert theory.effective_values(100, 1.0) == pytest.approx(1.0)
    assert theory.effective_values(4, -0.25) == pytest.approx(16.0)


# --- equivalent settings ---------------------------------------------------------


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(("values", "target"), [(2, 32), (4, 16), (1, 64)])
def test_the_weight_for_a_target_gives_the_target(
    values: int, target: int, published: bool
) -> None:
    weight = theory.average_weight_for(values, target, published=published)
    found = theory.equivalent_batch_size(values, weight, published=published)
    assert found == pytest.approx(target)
    if not published:
        wanted = theory.noise(target).mean_std
        assert theory.noise(values, weight).mean_std == pytest.approx(wanted)


def test_a_batch_as_large_as_the_target_needs_no_averages() -> None:
    assert theory.average_weight_for(32, 32) == theory.average_weight_for(64, 32) == 0.0
    assert theory.equivalent_batch_size(7, 0.0) == 7.0


def test_the_published_schedule_reaches_twice_the_ideal_batch_size_less_the_batch() -> None:
    weight = theory.average_weight_for(2, 32, published=True)  # equation 11 at the last epoch
    assert weight == 0.9375
    assert theory.equivalent_batch_size(2, weight) == pytest.approx(2 * 32 - 2)


# --- outputs ---------------------------------------------------------------------


@pytest.mark.parametrize("values", [8, 16, 64])
@pytest.mark.parametrize("x", [0.0, 1.0, -2.0])
def test_output_moments(values: int, x: float) -> None:
    mean, var = xi(batches(values))
    out = (x + mean) / var.sqrt()
    expected_mean, expected_var = theory.output_moments(x, theory.noise(values))
    close_mean(out, expected_mean)
    close_std(out, math.sqrt(expected_var))


def test_equation_4_as_printed_is_not_what_equations_2_and_3_give() -> None:
    m, x = 16, 2.0
    ratio = math.exp(math.lgamma((m - 2) / 2) - math.lgamma((m - 1) / 2))
    printed = x * math.sqrt((m - 1) / 2) * ratio
    printed_var = ((m - 1) / (m - 3) * (1 + x * x) - printed**2) / m
    mean, var = xi(batches(m))
    out = (x + mean) / var.sqrt()
    assert abs(printed - float(out.mean())) > 50 * float(out.std()) / math.sqrt(RUNS)
    assert printed_var < 0.6 * float(out.var())


def test_output_moments_where_there_are_none_or_no_noise() -> None:
    mean, var = theory.output_moments(1.0, theory.noise(2))
    assert math.isnan(mean)
    assert math.isinf(var)
    assert math.isinf(theory.output_moments(1.0, theory.noise(3))[1])
    assert theory.output_moments(1.0, theory.Noise(0.0, 1.0, 0.0)) == (1.0, 0.0)


@pytest.mark.parametrize("values", [2, 3, 10])
def test_no_output_passes_the_bound_and_one_reaches_it(values: int) -> None:
    bound = theory.output_bound(values)
    x = batches(values)
    out = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0)
    assert float(out.abs().max()) <= bound * (1 + 1e-9)
    lone = torch.ones(1, values, dtype=torch.float64)
    lone[0, 0] = 0.0
    norm = torch.nn.BatchNorm1d(1, eps=1e-12, affine=False).double()
    assert float(norm(lone.mT)[0]) == pytest.approx(-bound)


# --- the regularizer -------------------------------------------------------------


@pytest.mark.parametrize("values", [2, 5, 16, 64])
def test_strengths(values: int) -> None:
    mean, var = xi(batches(values))
    source = theory.noise(values)
    close_mean(mean.square(), source.additive_strength)
    close_mean(var.log(), source.log_mean)
    close_mean(var.log().square(), source.multiplicative_strength)


def softplus(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(2 * x)


@pytest.mark.parametrize("loss", [torch.square, softplus, torch.sin], ids=["square", "ce", "sin"])
@pytest.mark.parametrize("x", [-1.0, 0.0, 0.5, 2.0])
def test_the_regularizer_is_what_noise_adds_to_the_loss(loss, x: float) -> None:
    values = 256
    runs = 2 * RUNS
    mean = torch.randn(runs, dtype=torch.float64) / math.sqrt(values)
    gamma = torch.distributions.Gamma(torch.tensor((values - 1) / 2).double(), values / 2)
    var = gamma.sample((runs,))
    added = loss((x + mean) / var.sqrt()) - loss(torch.tensor(x).double())
    point = torch.tensor([x], dtype=torch.float64)
    terms = theory.regularizer(loss, point, theory.noise(values))
    error = float(added.std()) / math.sqrt(runs)
    rest = 30 / values**2  # third and fourth moments, and the cross term
    assert float(sum(terms)) == pytest.approx(float(added.mean()), abs=5 * error + rest)


def test_additive_part_alone_for_a_quadratic_is_exact() -> None:
    source = theory.noise(2)
    mean, _ = xi(batches(2))
    x = torch.tensor([0.3, -4.0], dtype=torch.float64)
    add, _ = theory.regularizer(torch.square, x, source)
    for k in range(2):
        close_mean((x[k] + mean).square() - x[k].square(), float(add[k]))


def test_a_linear_loss_has_no_additive_part() -> None:
    add, multiply = theory.regularizer(lambda x: 3 * x, torch.ones(2), theory.noise(8))
    assert add.tolist() == [0.0, 0.0]
    assert bool((multiply > 0).all())


def test_special_forms_are_the_general_one_where_f_is_linear_in_the_input() -> None:
    source = theory.noise(16)
    x = torch.tensor([0.2, 0.6], dtype=torch.float64)
    target = torch.tensor([0.0, 1.0], dtype=torch.float64)
    slope = torch.full_like(x, 0.5)

    def half_square(x: Tensor) -> Tensor:
        return 0.5 * (0.5 * x - target).square()

    add, _ = theory.regularizer(half_square, x, source)
    assert torch.allclose(theory.squared_error_regularizer(slope, source), add)

    def entropy(x: Tensor) -> Tensor:
        return torch.nn.functional.binary_cross_entropy(0.5 * x, target, reduction="none")

    add, _ = theory.regularizer(entropy, x, source)
    assert torch.allclose(theory.cross_entropy_regularizer(slope, 0.5 * x, target, source), add)


def test_a_batch_of_one_value_has_no_variance_to_regularize_by() -> None:
    source = theory.noise(1)
    assert source.var_mean == source.var_std == 0.0
    assert source.log_mean == -math.inf
    assert source.multiplicative_strength == math.inf


# --- arguments -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: theory.noise(0), ValueError, "values=0: give a number from 1 on"),
        (lambda: theory.noise(math.inf), ValueError, "values=inf"),
        (lambda: theory.noise("4"), TypeError, "values='4': give a number"),
        (lambda: theory.noise(4, 1.0), ValueError, "average_weight=1.0: no batch would count"),
        (lambda: theory.noise(4, -0.1), ValueError, "average_weight=-0.1"),
        (lambda: theory.noise(4, kurtosis=0.5), ValueError, "kurtosis=0.5: give a number from 1"),
        (lambda: theory.effective_values(4, 2.0), ValueError, "correlation=2.0"),
        (lambda: theory.effective_values(4, -0.5), ValueError, "give a number above -0.33"),
        (lambda: theory.average_weight_for(2, 0.5), ValueError, "target=0.5"),
        (lambda: theory.output_bound(True), TypeError, "values=True"),
    ],
)
def test_errors_of_theory_name_the_argument_and_the_remedy(call, error, words: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert words in str(raised.value)
