"""`anybatch.explain` tells which backend serves a batch, and leaves no trace."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import anybatch
from anybatch.backends import use_fused


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    use_fused("auto")
    yield
    use_fused("auto")


def served(layer: nn.Module, *inputs: torch.Tensor, **named: torch.Tensor) -> tuple[str, str]:
    """The backend, and why Numba's does not serve."""
    (row,) = anybatch.explain(layer, *inputs, **named).layers
    return row.backend, row.reasons.get("numba", "")


def test_a_plain_cpu_batch_is_served_by_numba_each_time() -> None:
    pytest.importorskip("numba")
    layer, x = anybatch.BatchNorm2d(4), torch.randn(2, 4, 3, 3)
    layer(x)
    for _ in range(2):
        backend, why = served(layer, x)
        assert (backend, why) == ("numba", "")


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (anybatch.MovingAverageBatchNorm2d(4, centered=True), "centered=True"),
        (anybatch.BatchNorm2d(4, affine=False), "no weight and bias"),
        (anybatch.BatchNorm2d(4).bfloat16(), "torch.float64"),
        (anybatch.SampledBatchNorm2d(4, ratio=1.0), "the sample is the whole batch"),
        (anybatch.BatchNorm2d(4).eval(), "evaluation mode"),
        (anybatch.freeze(nn.Sequential(anybatch.BatchNorm2d(4)))[0], "frozen statistics"),
    ],
)
def test_operators_of_torch_serve_and_the_reason_is_told(layer: nn.Module, reason: str) -> None:
    x = torch.randn(2, 4, 3, 3).double()
    backend, why = served(layer, x if reason == "torch.float64" else x.float())
    assert backend == "aten"
    assert reason in why


def test_a_mask_and_the_choice_of_the_user_are_reasons() -> None:
    layer, x = anybatch.BatchNorm2d(4), torch.randn(2, 4, 3, 3)
    mask = torch.tensor([True, False])
    assert served(layer, x, mask=mask)[0] == "numba"
    assert "mask" in served(anybatch.L1BatchNorm2d(4), x, mask=mask)[1]
    use_fused("never")
    assert served(layer, x) == ("aten", "use_fused('never')")


def test_a_network_is_left_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout())
    net = anybatch.convert(net, "cbn")
    x = torch.randn(2, 3, 6, 6)
    net(x).sum().backward()
    before, grads = copy.deepcopy(net.state_dict()), [p.grad.clone() for p in net.parameters()]
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    found = anybatch.explain(net, x)
    assert torch.equal(torch.rand(1), expected)
    assert [row.name for row in found.layers] == ["1"]
    assert capsys.readouterr().out.strip() == str(found)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    for p, grad in zip(net.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)
    assert not net[1]._forward_hooks
    assert not net[1]._forward_pre_hooks


def test_a_layer_that_is_not_called_is_listed() -> None:
    net = nn.ModuleDict({"used": anybatch.BatchNorm1d(2), "spare": anybatch.BatchNorm1d(2)})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norms["used"](x)

    rows = {row.name: row.backend for row in anybatch.explain(Net(), torch.randn(3, 2)).layers}
    assert rows["norms.spare"] == ""
    assert rows["norms.used"]


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="has no anybatch layer"):
        anybatch.explain(nn.Linear(1, 1), torch.randn(1, 1))
