"""A compiled network trains as the plain one: one graph, and no second compilation."""

import copy
from collections.abc import Iterator
from threading import Thread

import pytest
import torch
from torch import nn

import anybatch
from anybatch.backends import use_fused
from anybatch.registry import METHODS
from layer_changes import CHANGES
from method_cases import batch, make, state, step

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = {
    "mbn": {"batch_size": 4},
    "mabn": {"warmup_steps": 2, "renorm_warmup_steps": 3, "window": 3},
    "cbn": {"window": 3, "burn_in": 0.0},
    "brn": {"warmup_steps": 2},
    **{name: {"ratio": 1 / 2} for name in ("ns", "bs", "fs", "points")},
}
# A wrapper of virtual examples draws them outside the compiled network, see
# tests/layers/test_sampled_batch_norm.py.
WHOLE = [name for name, method in METHODS.items() if not method.wraps]


def network(method: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )
    return anybatch.convert(model, method, **OPTIONS.get(method, {}))


def train(model: nn.Module, run: nn.Module, steps: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(steps):
        x = torch.randn(4, 3, 6, 6, generator=generator)
        loss = run(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def compare(method: str, backend: str) -> None:
    torch._dynamo.reset()
    plain = network(method)
    compiled = copy.deepcopy(plain)
    run = torch.compile(compiled, fullgraph=True, backend=backend)
    schedules = [anybatch.NormScheduler(model, 4) for model in (plain, compiled)]
    expected, found = train(plain, plain, 2, 1), train(compiled, run, 2, 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for epoch in range(3):  # nor does an epoch of the schedule compile anything anew
            for schedule in schedules:
                schedule.step()
            expected += train(plain, plain, 3, epoch)
            found += train(compiled, run, 3, epoch)
    assert found == pytest.approx(expected, rel=1e-4)
    x = torch.randn(4, 3, 6, 6)
    run.eval()
    with torch.no_grad():
        torch.testing.assert_close(run(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.families
@pytest.mark.few(1)
@pytest.mark.parametrize("method", WHOLE)
def test_a_layer_needs_one_graph_for_all_steps_and_epochs(method: str) -> None:
    compare(method, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("method", WHOLE)
def test_a_layer_under_inductor_gives_the_same(method: str) -> None:
    compare(method, "inductor")


GROUPED = {"ghost": {"ghost_size": 2}, "bgn": {"num_groups": 2, "examples_per_group": 2}}


@pytest.mark.families
@pytest.mark.exhaustive
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", WHOLE)
def test_a_network_compiled_for_dynamic_shapes_gives_the_same(method: str, training: bool) -> None:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
    options = {**OPTIONS.get(method, {}), **GROUPED.get(method, {})}
    plain = anybatch.convert(nn.Sequential(*layers), method, **options)
    plain(torch.randn(4, 3, 9, 9))
    plain.train(training)
    compiled = copy.deepcopy(plain)
    run = torch.compile(compiled, fullgraph=True, dynamic=True, backend="aot_eager")
    for examples, side in ((4, 9), (7, 8)):
        x = torch.randn(examples, 3, side, side)
        found, expected = run(x), plain(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        dy = torch.randn_like(expected)
        found.backward(dy)
        expected.backward(dy)
    close = {"rtol": 1e-3, "atol": 1e-4}
    for one, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, **close)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, **close)


@pytest.fixture
def _backends_as_before() -> Iterator[None]:
    yield
    use_fused("auto")


@pytest.mark.families
@pytest.mark.exhaustive
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["bn", "mabn"])
@pytest.mark.usefixtures("_backends_as_before")
def test_a_compiled_layer_sees_a_change_between_two_batches(name: str, change: str) -> None:
    if (name, change) == ("mabn", "accumulated") and torch.__version__ < "2.7":
        pytest.skip("its compiler takes no layer into a backward pass")
    torch._dynamo.reset()
    plain, x = make(name), batch(4)
    compiled = copy.deepcopy(plain)
    run = torch.compile(compiled, backend="aot_eager", dynamic=False)
    for layer in (plain, run):
        step(layer, x, torch.ones_like(x))
    for layer in (plain, compiled):
        CHANGES[change](layer)
    x = x.double() if change == "double" else x
    for _ in range(2):
        dy = torch.randn_like(x)
        torch.testing.assert_close(step(run, x, dy), step(plain, x, dy), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(state(compiled), state(plain), rtol=1e-3, atol=1e-4)


@pytest.mark.exhaustive
def test_a_layer_compiled_before_the_first_no_update_of_its_thread_sees_it() -> None:
    """The setting belongs to a thread, so it is new in a new one."""
    layer, x, found = make("bn"), batch(4), []

    def work() -> None:
        run = torch.compile(layer, backend="aot_eager", dynamic=False)
        run(x)
        with anybatch.no_update():
            run(x)
        found.append(layer.num_batches_tracked.item())

    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert found == [1]
