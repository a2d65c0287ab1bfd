"""Masked group norms: each example's valid positions are normalized as they are alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch

SHAPES = {1: (3, 4, 9), 2: (3, 4, 5, 6), 3: (3, 4, 3, 4, 2)}


def group_norm(groups: int = 2, affine: bool = True) -> nn.GroupNorm:
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, 4, affine=affine).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def alone(norm: nn.GroupNorm, x: Tensor, mask: Tensor) -> Tensor:
    """The output at valid positions, one example after the other, in rows ``(n, C)``."""
    rows = []
    for example, valid in zip(x, mask, strict=True):
        if valid.any():
            packed = example.movedim(0, -1)[valid].T.unsqueeze(0)
            rows.append(
                F.group_norm(packed, norm.num_groups, norm.weight, norm.bias, norm.eps)[0].T
            )
    return torch.cat(rows)


def inputs(dims: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(dims)
    x = torch.randn(SHAPES[dims], dtype=torch.float64) + 1
    mask = torch.rand(x.shape[0], *x.shape[2:]) < 0.6
    mask[1] = False
    return x, mask


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("groups", "affine"), [(1, True), (2, False), (4, True)])
def test_output_and_gradients_are_those_of_valid_positions_alone(
    dims: int, groups: int, affine: bool
) -> None:
    norm = group_norm(groups, affine)
    x, mask = inputs(dims)
    dy = torch.randn(int(mask.sum()), 4, dtype=torch.float64)
    found = []
    for masked in (True, False):
        norm.zero_grad()
        given = x.clone().requires_grad_()
        if masked:
            with anybatch.masked(norm, mask):
                y = norm(given).movedim(1, -1)[mask]
        else:
            y = alone(norm, given, mask)
        y.backward(dy)
        found.append([y.detach(), given.grad, *(p.grad for p in norm.parameters())])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_padding_may_be_anything_and_an_example_of_padding_stays_finite() -> None:
    norm = group_norm()
    x, mask = inputs(2)
    with anybatch.masked(norm, mask):
        expected = norm(x)
        assert expected.isfinite().all()
        y = norm(x.masked_fill(~mask.unsqueeze(1), torch.nan))
    rows = mask.unsqueeze(1).expand_as(y)
    torch.testing.assert_close(y[rows], expected[rows])
    torch.testing.assert_close(norm(x), F.group_norm(x, 2, norm.weight, norm.bias))  # no hook left


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dim", [2, 3])
def test_lengths_run_along_either_dimension(dim: int, zero: bool) -> None:
    norm = group_norm()
    x, _ = inputs(2)
    size = x.shape[dim]
    lengths = torch.tensor([size, 2, 3])
    mask = (torch.arange(size) < lengths.unsqueeze(1)).unsqueeze(4 - dim).expand(-1, *x.shape[2:])
    with anybatch.masked(norm, lengths=lengths, zero=zero, dim=dim):
        y = norm(x)
    torch.testing.assert_close(y.movedim(1, -1)[mask], alone(norm, x, mask))
    assert bool((y.movedim(1, -1)[~mask] == 0).all()) == zero


@pytest.mark.parametrize("how", ["mask", "lengths", "zero"])
@pytest.mark.parametrize("method", ["gn", "ln", "in"])
def test_a_converted_network_leaves_padding_out(method: str, how: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(3, 8, 1, bias=False), nn.BatchNorm1d(8), nn.ReLU()).double()
    options = {"num_groups": 2} if method == "gn" else {}
    network = anybatch.convert(network, method, **options)
    x, lengths = torch.randn(3, 3, 9, dtype=torch.float64), torch.tensor([9, 4, 2])
    mask = torch.arange(9) < lengths.unsqueeze(1)
    given = {"mask": {"mask": mask}, "lengths": {"lengths": lengths}}.get(
        how, {"lengths": lengths, "zero": True}
    )
    with anybatch.masked(network, **given):
        y = network(x)
    for row, length in zip(range(3), lengths.tolist(), strict=True):
        torch.testing.assert_close(
            y[row : row + 1, :, :length], network(x[row : row + 1, :, :length])
        )


def test_a_compiled_network_runs_its_hooks() -> None:
    norm = group_norm()
    compiled = torch.compile(nn.Sequential(norm), backend="eager")
    x, mask = inputs(1)
    compiled(x)
    with anybatch.masked(compiled, mask):
        y = compiled(x)
    torch.testing.assert_close(y.movedim(1, -1)[mask], alone(norm, x, mask))


def test_names_choose_and_16_bits_are_normalized_in_float32() -> None:
    network = nn.Sequential(group_norm(), group_norm()).float()
    x, mask = inputs(1)
    x = x.float()
    with anybatch.masked(network, mask, "1"):
        y = network(x)
    torch.testing.assert_close(y.movedim(1, -1)[mask], alone(network[1], network[0](x), mask))
    low = (x * 0.01 + 100).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), anybatch.masked(network, mask, "0"):
        y = network[0](low)
    expected = alone(network[0], low.float(), mask)
    torch.testing.assert_close(y.float().movedim(1, -1)[mask], expected, atol=0.05, rtol=0.02)


def test_a_mask_that_does_not_fit_names_the_norm() -> None:
    network = nn.Sequential(group_norm())
    x, _ = inputs(1)
    with (
        pytest.raises(ValueError, match=r"mask of shape \(2, 9\): 0 got an input of shape"),
        anybatch.masked(network, torch.ones(2, 9, dtype=torch.bool)),
    ):
        network(x)
    network(x)


class WithActivation(nn.GroupNorm):
    """As in transformers' BiT."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class OfItsOwn(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return input - input.mean((1, 2), keepdim=True)


@pytest.mark.parametrize("how", ["mask", "lengths", "zero"])
@pytest.mark.parametrize("kind", ["relu", "hook", "keyword"])
def test_what_a_group_norm_does_besides_stays(kind: str, how: str) -> None:
    """A subclass's activation, somebody's hook, a call by keyword."""

    class Calls(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=x)

    torch.manual_seed(0)
    norm = (WithActivation if kind == "relu" else nn.GroupNorm)(2, 4).double()
    network = Calls(norm) if kind == "keyword" else nn.Sequential(norm)
    if kind == "hook":
        norm.register_forward_hook(lambda module, args, output: output * 2)
    x, lengths = torch.randn(3, 4, 9, dtype=torch.float64), torch.tensor([9, 4, 2])
    given = {"mask": torch.arange(9) < lengths.unsqueeze(1)} if how == "mask" else {}
    given = given or {"lengths": lengths, "zero": how == "zero"}
    with anybatch.masked(network, **given):
        y = network(x)
    for row, length in zip(x.split(1), lengths.tolist(), strict=True):
        torch.testing.assert_close(y[:1, :, :length], network(row[:, :, :length]))
        y = y[1:]


def test_a_group_norm_that_computes_in_its_own_way_is_told() -> None:
    norm, x = OfItsOwn(2, 4), torch.randn(2, 4, 6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    with pytest.warns(anybatch.NoEffectWarning, match=r"OfItsOwn.*no effect"):  # noqa: SIM117
        with anybatch.masked(norm, mask):
            y = norm(x)
    torch.testing.assert_close(y, norm(x))
