"""Formulas for the noise in the statistics of a batch.

With ``mu, var`` the mean and variance of all data, ``mu_B, var_B`` those of a batch
of m values (biased variance), and ``x~ = (x - mu) / sqrt(var)``, batch normalization
puts out (momentum-bn, equation 3)::

    x^ = (x~ + xi_mu) / sqrt(xi_sigma)     xi_mu    = (mu - mu_B) / sqrt(var)
                                           xi_sigma = var_B / var

The values are taken to be independent; xi_mu is then nearly normal and xi_sigma
nearly a scaled chi-square, exactly so for Gaussian data. m counts values of a
channel: examples in a layer without spatial extent, `effective_values` where an
example gives several positions. Numbers go in and come out as floats; nothing here
knows of layers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anybatch.core.arguments import check_between, check_from


@dataclass(frozen=True)
class Noise:
    """Distributions of xi_mu and xi_sigma.

    xi_mu is normal with mean 0. xi_sigma is a gamma distribution with the given mean
    and standard deviation: for a batch's own statistics that is the scaled
    chi-square of equation 2; for moving averages it stands in for the generalized
    chi-square, with the same two moments.

    Attributes:
        mean_std: Standard deviation of xi_mu.
        var_mean: Mean of xi_sigma.
        var_std: Standard deviation of xi_sigma.

    Example:
        >>> noise(4)
        Noise(mean_std=0.5, var_mean=0.75, var_std=0.612...)
    """

    mean_std: float
    var_mean: float
    var_std: float

    @property
    def shape(self) -> float:
        """Shape k of the gamma distribution of xi_sigma; half the degrees of freedom."""
        return math.inf if self.var_std == 0 else (self.var_mean / self.var_std) ** 2

    @property
    def scale(self) -> float:
        """Scale theta of the gamma distribution of xi_sigma."""
        return 0.0 if self.var_mean == 0 else self.var_std**2 / self.var_mean

    @property
    def additive_strength(self) -> float:
        """``E[xi_mu^2]``, the weight of the additive regularizer."""
        return self.mean_std**2

    @property
    def log_mean(self) -> float:
        """``E[log xi_sigma]``; minus infinity for a batch of one value."""
        if self.var_mean == 0:
            return -math.inf
        return math.log(self.var_mean) + _log_bias(self.shape)

    @property
    def multiplicative_strength(self) -> float:
        """``E[log^2 xi_sigma]``, the weight of the multiplicative regularizer.

        Infinite for a batch of one value.
        """
        if self.var_mean == 0:
            return math.inf
        return self.log_mean**2 + _trigamma(self.shape)

    def mean_density(self, xi: Tensor) -> Tensor:
        """Density of xi_mu at each value.

        Args:
            xi: Any shape.

        Returns:
            A tensor of that shape.
        """
        return torch.exp(-0.5 * (xi / self.mean_std) ** 2) / (self.mean_std * math.sqrt(math.tau))

    def var_density(self, xi: Tensor) -> Tensor:
        """Density of xi_sigma at each value; 0 where that is not positive.

        Args:
            xi: Any shape.

        Returns:
            A tensor of that shape.
        """
        k, theta = self.shape, self.scale
        inside = xi.clamp(min=torch.finfo(xi.dtype).tiny)
        log = (k - 1) * inside.log() - inside / theta - math.lgamma(k) - k * math.log(theta)
        return torch.where(xi > 0, log.exp(), 0.0)


def noise(values: float, average_weight: float = 0.0, *, kurtosis: float = 3.0) -> Noise:
    """The noise in the statistics that a batch is normalized by.

    ::

        xi_mu     variance  a / m
        xi_sigma  mean      (m - 1) / m
                  variance  a * (m - 1) * ((m - 1) * kurtosis - (m - 3)) / m^3

    With kurtosis 3, as of Gaussian data, the last is ``a * 2 (m - 1) / m^2``. The
    factor ``a`` is 1 for batch normalization and ``(1 - lambda) / (1 + lambda)`` for
    momentum batch normalization after many steps. The published equation 10 has
    ``1 - lambda`` for xi_mu; averaging independent batches by equation 9 gives the
    factor above, which simulation confirms, and which the paper, too, has for
    xi_sigma.

    Args:
        values: m, the independent values behind a batch's statistics; from 1 on.
        average_weight: Lambda, the weight of the old averages (default 0.0: batch
            normalization); below 1.
        kurtosis: Fourth central moment over the squared variance (default 3.0).

    Returns:
        The `Noise`.

    Raises:
        ValueError: For an argument out of range.
        TypeError: For one that is no number.

    Source: momentum-bn, equations 2, 9 and 10.

    Example:
        >>> noise(2, average_weight=0.9375).mean_std == noise(62).mean_std
        True
    """
    check_from("values", values, 1)
    _check_weight(average_weight)
    if not kurtosis >= 1:
        raise ValueError(f"kurtosis={kurtosis!r}: give a number from 1 on; 3 is a Gaussian's")
    m, a = values, (1 - average_weight) / (1 + average_weight)
    spread = (m - 1) * ((m - 1) * kurtosis - (m - 3)) / m**3
    return Noise(math.sqrt(a / m), (m - 1) / m, math.sqrt(a * max(spread, 0.0)))


def effective_values(values: float, correlation: float) -> float:
    """Independent values that are as good as correlated ones, for their mean.

    ::

        L / (1 + (L - 1) * rho)

    An example that gives a channel L positions with mean correlation rho between
    two of them counts as so many independent values. For the *variance* of Gaussian
    data take the mean *squared* correlation.

    Args:
        values: L, the positions of an example.
        correlation: rho, between two different positions on average.

    Returns:
        A number from 1 to L for a correlation from 0 to 1, more than L below 0.

    Raises:
        ValueError: For an argument out of range; rho cannot be below -1 / (L - 1).
        TypeError: For one that is no number.

    Example:
        >>> effective_values(64, 0.0), effective_values(64, 1.0)
        (64.0, 1.0)
        >>> round(effective_values(64, 0.1), 2)
        8.77
    """
    check_from("values", values, 1)
    check_between("correlation", correlation, -1.0, 1.0)
    share = 1 + (values - 1) * correlation
    if not share > 0:
        raise ValueError(
            f"correlation={correlation!r}: {values} values cannot be so opposed to each other; "
            f"give a number above {-1 / (values - 1)}"
        )
    return values / share


def equivalent_batch_size(
    values: float, average_weight: float, *, published: bool = False
) -> float:
    """The batch size at which batch normalization's mean is as noisy as MBN's.

    ::

        m * (1 + lambda) / (1 - lambda)         published:  m / (1 - lambda)

    Args:
        values: m, examples (or values) in a batch.
        average_weight: Lambda.
        published: Go by equation 10 as printed, which the schedule of equation 11 is
            made for (default False: by the variance of the average, see `noise`).

    Returns:
        A batch size, from m on.

    Raises:
        ValueError: For an argument out of range.
        TypeError: For one that is no number.

    Source: momentum-bn, section 4.1.

    Example:
        The paper's example, batch 4 with lambda 3/4:

        >>> equivalent_batch_size(4, 0.75, published=True)
        16.0
        >>> equivalent_batch_size(4, 0.75)
        28.0
    """
    check_from("values", values, 1)
    _check_weight(average_weight)
    return values * (1 if published else 1 + average_weight) / (1 - average_weight)


def average_weight_for(values: float, target: float, *, published: bool = False) -> float:
    """The lambda with which MBN at one batch size is as noisy as BN at another.

    ::

        (target - m) / (target + m)             published:  1 - m / target

    Args:
        values: m, examples (or values) in a batch.
        target: The batch size whose noise is wanted.
        published: Go by equation 10 as printed (default False, see `noise`).

    Returns:
        Lambda; 0 where the batch is as large as the target.

    Source: momentum-bn, section 4.1; the inverse of `equivalent_batch_size`.

    Example:
        >>> average_weight_for(4, 16), average_weight_for(4, 16, published=True)
        (0.6, 0.75)
    """
    check_from("values", values, 1)
    check_from("target", target, 1)
    if target <= values:
        return 0.0
    return 1 - values / target if published else (target - values) / (target + values)


def output_moments(x: float, source: Noise) -> tuple[float, float]:
    """Mean and variance of the normalized output for one input value.

    ::

        E[x^]   = x~ * E[xi_sigma^(-1/2)]
        Var[x^] = (x~^2 + E[xi_mu^2]) * E[1 / xi_sigma] - E[x^]^2

    of equation 3 with xi_mu and xi_sigma independent. For batch normalization
    ``E[xi_sigma^(-1/2)] = sqrt(m / 2) * Gamma((m - 2) / 2) / Gamma((m - 1) / 2)`` and
    ``E[1 / xi_sigma] = m / (m - 3)``. Equation 4 as printed has ``m - 1`` under the
    first root and another variance, which loses the part that grows with x~; it does
    not follow from equations 2 and 3, and simulation bears out the forms above.

    Args:
        x: The value, normalized by the statistics of all data (x~).
        source: The noise; from `noise`.

    Returns:
        Mean (nan for up to 2 values in a batch) and variance (infinite for up to 3).

    Source: momentum-bn, equations 2 to 4.

    Example:
        >>> mean, var = output_moments(1.0, noise(16))
        >>> round(mean, 4), round(var, 4)
        (1.0883, 0.1233)
    """
    k, theta = source.shape, source.scale
    if math.isinf(k):
        return x, source.mean_std**2
    if k <= 0.5:
        return math.nan, math.inf
    mean = x * math.exp(math.lgamma(k - 0.5) - math.lgamma(k)) / math.sqrt(theta)
    if k <= 1:
        return mean, math.inf
    return mean, (x * x + source.mean_std**2) / (theta * (k - 1)) - mean * mean


def output_bound(values: float) -> float:
    """The largest output that batch normalization can give in training.

    ::

        |x^| <= sqrt(B - 1)

    before scale and shift, because each value is in the statistics it is normalized
    by. It is reached where all other values are alike. At inference there is no
    bound.

    Args:
        values: B, the values of a channel in the batch (examples times positions).

    Returns:
        The bound; 0 for one value.

    Source: four-things, equation 2 and appendix A.

    Example:
        >>> output_bound(2), output_bound(5)
        (1.0, 2.0)
    """
    check_from("values", values, 1)
    return math.sqrt(values - 1)


def regularizer(
    loss: Callable[[Tensor], Tensor], x: Tensor, source: Noise
) -> tuple[Tensor, Tensor]:
    """The expected change of the loss by the noise, to second order.

    ::

        R_add = E[xi_mu^2] / 2 * l''(x)                                    (eq. 5)
        R_mul = -E[log xi_sigma] / 2 * l'(u) + E[log^2 xi_sigma] / 8 * l''(u)
                                                                           (eq. 6)

    with derivatives in x for the first and in ``u = log|x|`` for the second; the
    second is 0 where x is 0. ``E[l((x + xi_mu) / sqrt(xi_sigma))]`` is then nearly
    ``l(x) + R_add + R_mul`` (equation 7 without its cross term), for batches of 16
    values and more.

    Args:
        loss: Value by value: a tensor of losses for a tensor of inputs, each from its
            own input alone, twice differentiable.
        x: The normalized inputs.
        source: The noise; from `noise`.

    Returns:
        ``R_add`` and ``R_mul``, tensors like ``x``.

    Source: momentum-bn, equations 5 to 7.

    Example:
        >>> x = torch.tensor([0.0, 2.0])
        >>> add, multiply = regularizer(torch.square, x, noise(64))
        >>> add
        tensor([0.0156, 0.0156])
        >>> multiply[0].item()
        0.0
    """
    with torch.enable_grad():
        point = x.detach().clone().requires_grad_(True)
        (first,) = torch.autograd.grad(loss(point).sum(), point, create_graph=True)
        second = torch.zeros_like(x)
        if first.requires_grad:
            (second,) = torch.autograd.grad(first.sum(), point, materialize_grads=True)
    first = first.detach()
    slope = x * first  # dl / dlog|x|
    bend = slope + x * x * second
    add = 0.5 * source.additive_strength * second
    multiply = -0.5 * source.log_mean * slope + 0.125 * source.multiplicative_strength * bend
    return add, multiply


def squared_error_regularizer(slope: Tensor, source: Noise) -> Tensor:
    """The additive regularizer of half the squared error.

    ::

        E[xi_mu^2] / 2 * |df/dx|^2

    Args:
        slope: ``df/dx``, of the network's output in the normalized input.
        source: The noise; from `noise`.

    Returns:
        A tensor like ``slope``.

    Source: momentum-bn, section 3.2, which leaves out the term in the second
    derivative of f.

    Example:
        >>> squared_error_regularizer(torch.tensor(2.0), noise(4))
        tensor(0.5000)
    """
    return 0.5 * source.additive_strength * slope.square()


def cross_entropy_regularizer(
    slope: Tensor, output: Tensor, target: Tensor, source: Noise
) -> Tensor:
    """The additive regularizer of the binary cross entropy.

    ::

        E[xi_mu^2] / 2 * (f^2 - 2 t f + t^2) / (f^2 (1 - f)^2) * |df/dx|^2

    Args:
        slope: ``df/dx``.
        output: f, a probability between 0 and 1.
        target: t, 0 or 1.
        source: The noise; from `noise`.

    Returns:
        A tensor like ``slope``.

    Source: momentum-bn, section 3.2, which leaves out the term in the second
    derivative of f.

    Example:
        >>> half = torch.tensor(0.5)
        >>> cross_entropy_regularizer(torch.tensor(1.0), half, torch.tensor(1.0), noise(4))
        tensor(0.5000)
    """
    curve = (output - target).square() / (output * (1 - output)).square()
    return curve * squared_error_regularizer(slope, source)


def _log_bias(k: float) -> float:
    """``E[log X] - log E[X]`` of a gamma distribution of shape k."""
    if math.isinf(k):
        return 0.0
    return float(torch.special.digamma(torch.tensor(k, dtype=torch.float64))) - math.log(k)


def _trigamma(k: float) -> float:
    """``Var[log X]`` of a gamma distribution of shape k."""
    if math.isinf(k):
        return 0.0
    return float(torch.special.polygamma(1, torch.tensor(k, dtype=torch.float64)))


def _check_weight(value: float) -> None:
    check_between("average_weight", value, 0.0, 1.0)
    if value == 1:
        raise ValueError("average_weight=1.0: no batch would count; give a number below 1")
