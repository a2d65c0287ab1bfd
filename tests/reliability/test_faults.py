"""What a layer remembers of a fault: nothing that is not finite, and the rest for a known time."""

import pytest
import torch
from torch import nn

import anybatch
from papers.studies import faults
from papers.studies.faults import GRADIENT, REMEMBERING, recovery

NOT_FINITE = [
    "one infinite value",
    "one NaN",
    "a batch of NaN",
    "overflow of float16",
    "values of 1e30",
]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "LIMIT", 20)
    monkeypatch.setattr(faults, "BEFORE", 30)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("fault", [*NOT_FINITE, GRADIENT])
@pytest.mark.parametrize("method", REMEMBERING)
def test_what_is_not_finite_leaves_nothing(method: str, fault: str) -> None:
    found = recovery(fault, method)
    assert (found.training, found.evaluation, found.finite) == (0, 0, True)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("fault", NOT_FINITE)
def test_torch_s_layer_never_recovers(fault: str) -> None:
    """That the faults strike at all."""
    assert recovery(fault, "torch").evaluation is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", faults.FAULTS)
@pytest.mark.parametrize("seed", range(3))
def test_every_output_is_finite_again_at_once(fault: str, seed: int) -> None:
    for method in REMEMBERING:
        assert recovery(fault, method, seed).finite


@pytest.mark.usefixtures("soon")
def test_a_window_forgets_after_its_length() -> None:
    assert recovery("values of 10", "cbn").training == 3  # a window of 4, this step included


@pytest.mark.parametrize("fused", ["auto", "never"])
@pytest.mark.parametrize("centered", [False, True])
def test_empty_places_of_a_window_are_no_statistics(fused: str, centered: bool) -> None:
    """Steps that are not finite leave places empty, beyond the end of the warm-up."""
    anybatch.backends.use_fused(fused)
    try:
        layer = anybatch.MovingAverageBatchNorm1d(
            3, window=8, warmup_steps=20, renorm_warmup_steps=200, centered=centered
        )
        for _ in range(18):
            with torch.no_grad():
                layer(torch.full((4, 3), torch.nan))
        for _ in range(12):
            y = layer(3 * torch.randn(400, 3)).detach()
            assert (y.square().mean(0) - 1).abs().max() < 0.3
    finally:
        anybatch.backends.use_fused("auto")


@pytest.mark.parametrize("method", REMEMBERING)
def test_a_step_that_a_scaler_skips_costs_nothing(method: str) -> None:
    """Infinite gradients: the next step's are those of a layer that did not see them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    anybatch.convert(model, method, **faults.OPTIONS.get(method, {}))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x = torch.randn(4, 3, 8, 8)
    before = [p.clone() for p in model.parameters()]
    for _ in range(12):
        optimizer.zero_grad()
        scaler.scale(16 * model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update(scaler.get_scale() / 2**20)
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(t.isfinite().all() for t in model.state_dict().values())
