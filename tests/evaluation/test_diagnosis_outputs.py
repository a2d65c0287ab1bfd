"""Diagnosis of outputs: training against evaluation, and whole images against their halves."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import anybatch
from anybatch import diagnose


def images(count: int = 4, size: int = 6) -> list[Tensor]:
    """Bright on one side, so that halves differ."""
    ramp = torch.linspace(-2, 2, size)
    return [torch.randn(3, 4, size, size) + ramp for _ in range(count)]


def relative(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).square().mean() / expected.var(correction=0)


def test_disparity_is_the_output_in_training_against_evaluation_without_dropout() -> None:
    first, second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    model = nn.Sequential(first, nn.Dropout(0.9), second)
    for norm in (first, second):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    data = [torch.randn(5, 4) for _ in range(3)]
    ratios = []
    for x in data:
        trained = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
        trained = (trained - trained.mean(0)) / (trained.var(0, correction=0) + 1e-5).sqrt()
        ratios.append(relative(trained, model.eval()(x).detach()))
    found = diagnose(model.train(), data).layers[1].disparity
    assert found == pytest.approx(float(torch.stack(ratios).mean().sqrt()), rel=1e-4)


@pytest.mark.parametrize("method", ["brn", "mabn"])
def test_open_renormalization_has_no_disparity_where_batch_norm_has(method: str) -> None:
    data = [torch.randn(2, 4) for _ in range(30)]
    options = {
        "brn": {"warmup_steps": 0, "max_r": 1e9, "max_d": 1e9},
        "mabn": {"warmup_steps": 0, "renorm_warmup_steps": 0, "clip": 1e9},
    }
    plain, other = nn.Sequential(nn.BatchNorm1d(4)), nn.Sequential(nn.BatchNorm1d(4))
    for x in data:
        plain(x)
        other(x)
    anybatch.convert(other, method, **options[method])
    for _ in range(40):  # fills a window
        other(torch.randn(2, 4))
    assert diagnose(plain, data).layers[0].disparity > 0.2
    assert diagnose(other, data).layers[0].disparity < 1e-4


def test_a_fresh_network_has_seams_and_no_disparity() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.InstanceNorm2d(4))
    found = diagnose(model, images())
    assert (found.layers[0].disparity, found.layers[0].seam) == (None, 0.0)
    assert found.others[0].seam > 0.1


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.GroupNorm(1, 4)])
def test_a_seam_is_what_halves_apart_change(norm: nn.Module) -> None:
    data = images()
    ratios = [relative(torch.cat([norm(h) for h in x.chunk(2, -1)], -1), norm(x)) for x in data]
    found = diagnose(nn.Sequential(norm), data)
    expected = float(torch.stack(ratios).mean().sqrt().detach())
    assert found.others[0].seam == pytest.approx(expected, rel=1e-4)
    assert expected > 0.1
    assert "changes by" in str(found)
    assert found.to_dict()["others"] == [
        {"name": "0", "kind": type(norm).__name__, "seam": found.others[0].seam}
    ]


@pytest.mark.parametrize(
    "method", [n for n, m in anybatch.METHODS.items() if m.class_name != "SampledBatchNorm"]
)
def test_methods_have_seams_only_where_an_example_is_in_its_own_statistics(method: str) -> None:
    model = anybatch.convert(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), method)
    found = diagnose(model, images())
    seams = [norm.seam for norm in (*found.layers, *found.others)]
    assert len(seams) == 1
    assert (seams[0] > 0.05) == (method in ("gn", "ln", "in", "bgn"))


def test_an_example_weight_makes_seams() -> None:
    model = anybatch.convert(nn.Sequential(nn.BatchNorm2d(4)), "bn")
    assert diagnose(model, images()).layers[0].seam == 0
    model[0].example_weight = 0.5
    assert diagnose(model, images()).layers[0].seam > 0.05


def test_a_network_of_group_norms_gets_a_table_and_a_page_without_a_plot(tmp_path: Path) -> None:
    found = diagnose(nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)), images())
    assert (found.layers, found.batch_size, found.reading.problem) == ((), 3, "no")
    assert "No norm depends on the batch." in str(found)
    page = found.report(tmp_path / "page.html").read_text()
    assert "each example" in page
    assert "<img" not in page
    with pytest.raises(ValueError, match="no batch norm was measured"):
        found.plot(tmp_path / "noise.png")
