"""Every public layer by every way of calling it: right, or refused; and nothing left behind."""

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

import anybatch
from anybatch.layers.weight_centralization import CENTRALIZED
from matrix.layers import NAMES, NORMS, PLAIN, family_of, make
from matrix.outcomes import PAGE, Limit, Refusal, outcome, page
from matrix.ways import WAYS, Results, plain, state

pytestmark = pytest.mark.filterwarnings("ignore")
GROUP = "RunningGroupNorm"
ROUNDED = 0.03  # of a convolution in bfloat16


def check_first_step(name: str) -> None:
    layer, x, dy, step = make(name)
    found = plain(layer, x, dy)
    y, dx = step(x, dy)
    close(found, {"output": y, "gradient of the input": dx}, 1e-9)


def close(found: Mapping[str, Tensor], expected: Results, tolerance: float) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].double(),
            value.double(),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda message, name=name: f"{name}: {message}",
        )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_a_way_of_calling_a_layer_is_right_or_refused(name: str, way: str, training: bool) -> None:
    layer, x, dy, _ = make(name)
    for shift in (0, 1):
        plain(layer, x + shift, dy)
    layer.zero_grad()
    layer.train(training)
    twin = copy.deepcopy(layer)
    run, reference = WAYS[way]
    stated = outcome(way, training, family_of(name))
    if isinstance(stated, Refusal):
        with pytest.raises(RuntimeError, match=stated.message):
            run(layer, x, dy)
        left = state(twin)
        assert all(torch.equal(value, left[key]) for key, value in state(layer).items())
    else:
        found, expected = run(layer, x, dy), reference(twin, x, dy)
        names = stated.compared if isinstance(stated, Limit) else found
        lost = way == "`torch.autocast`"
        tolerance = (ROUNDED if name in PLAIN else 1e-5) if lost else 1e-8
        close(found, {key: expected[key] for key in names}, tolerance)
    check_first_step(name)


def test_every_public_layer_is_in_the_matrix() -> None:
    public = [name for name in anybatch.__all__ if isinstance(getattr(anybatch, name), type)]
    assert {n for n in public if issubclass(getattr(anybatch, n), _NormBase)} == {*NORMS, GROUP}
    assert {kind.__name__ for kind in CENTRALIZED} == {*PLAIN}


def test_the_page_of_the_matrix_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.matrix"
