"""GPU kernels serve only where they agree with torch's operators; faults are planted here.

Compiled where there is a GPU, else interpreted.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anybatch
from anybatch.backends import use_fused
from anybatch.backends.protocol import Kernels
from anybatch.core import kernel_guard
from anybatch.core.norm_layer import NormLayer
from interpreter import TRIALS, cpu_batches_take_gpu_kernels
from method_cases import make, state, step

triton = pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
OLD = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 3)
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    *([pytest.mark.gpu] if CUDA else []),
    pytest.mark.skipif(OLD and not CUDA, reason="its interpreter stores where a mask is false"),
]
Plant = Callable[[str, Callable[[Any], Any]], None]


@pytest.fixture(autouse=True)
def _guarded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Batches on the tests' device may take the kernels, which this process knows nothing of."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel_guard.forget()
    with nullcontext() if CUDA else cpu_batches_take_gpu_kernels():
        monkeypatch.setattr(TRIALS, kernel_guard.fault_of)
        yield
    kernel_guard.forget()


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Plant]:
    """Replaces the kernels that decide, forward or backward, by what a function makes of them."""
    from anybatch.backends.triton import method_kernels

    bound = method_kernels.with_rule

    def replace(which: str, fault: Callable[[Any], Any]) -> None:
        rule = {"forward": "choose", "backward": "average"}[which]

        def with_fault(kernel: Any, name: str, *args: Any) -> Any:
            made = bound(kernel, name, *args)
            return fault(made) if name == rule else made

        monkeypatch.setattr(method_kernels, "with_rule", with_fault)
        method_kernels._kernels.cache_clear()

    yield replace
    method_kernels._kernels.cache_clear()


class Launched:
    """A kernel that also does something else when it is launched."""

    def __init__(self, kernel: Any, then: Callable[..., None]) -> None:
        self.kernel, self.then = kernel, then

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.kernel[grid](*args, **kwargs)
            self.then(*args)

        return launch


def wrong(place: int) -> Callable[[Any], Any]:
    """A kernel one of whose results is a thousandth too large."""
    return lambda kernel: Launched(kernel, lambda *args: args[place].mul_(1.001))


def failing(kernel: Any) -> Any:
    """A kernel that fails after it has changed memory."""

    def fail(*args: Any) -> None:
        raise RuntimeError("out of resource: shared memory")

    return Launched(kernel, fail)


def uncompiled(kernel: Any) -> Any:
    """A kernel that calls what is no function."""
    old = kernel.fn
    scope = {**old.__globals__, "sides": 3}
    new = FunctionType(old.__code__, scope, old.__name__, old.__defaults__, old.__closure__)
    new.__annotations__, new.__module__ = old.__annotations__, old.__module__
    return triton.jit(new)


def batches(number: int = 2, side: int = 2) -> list[Tensor]:
    """Batches of four channels, which one program takes where they are last."""
    shape, last = (3, 4, side, side), torch.channels_last
    return [torch.randn(shape).to(DEVICE, memory_format=last) for _ in range(number)]


def trained(layer: NormLayer, given: list[Tensor]) -> list[Tensor]:
    """Outputs, gradients and state after some steps."""
    torch.manual_seed(7)
    results = [t for x in given for t in step(layer, x)]
    assert layer.weight.grad is not None
    return [*results, layer.weight.grad, layer.bias.grad, *state(layer).values()]


def backend(layer: NormLayer, x: Tensor) -> str:
    y = layer(x.clone().requires_grad_())
    name: str = y.grad_fn.how[0].name
    return name


def assert_same_as_torch(layer: NormLayer, given: list[Tensor]) -> None:
    """A layer that kernels may serve trains as one that torch's operators serve."""
    twin = copy.deepcopy(layer)
    ours = trained(layer, given)
    use_fused("never")
    try:
        theirs = trained(twin, given)
    finally:
        use_fused("auto")
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["bn", "mabn"])
def test_kernels_that_agree_serve_and_are_tried_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    real = kernel_guard.try_kernels
    monkeypatch.setattr(kernel_guard, "try_kernels", lambda *a: tried.append(a) or real(*a))
    layer, chance = make(name, 4).to(DEVICE), torch.get_rng_state()
    x = batches(1)[0]
    before = torch.get_rng_state()
    assert not torch.equal(chance, before)
    assert backend(layer, x) == "triton"
    assert torch.equal(torch.get_rng_state(), before), "the trial takes no random numbers"
    assert layer.num_batches_tracked == 1, "the trial changes no state"
    assert backend(layer, batches(1, 3)[0]) == "triton"
    assert backend(make(name, 4).to(DEVICE), x) == "triton"
    assert len(tried) == 1
    assert_same_as_torch(make(name, 4).to(DEVICE), batches())


FAULTS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "wrong output": ("forward", wrong(1), "output: error"),
    "wrong running variance": ("forward", wrong(7), "running_var: error"),
    "wrong gradient": ("backward", wrong(2), "input gradient: error"),
    "wrong gradient of the scale": ("backward", wrong(5), "weight gradient: error"),
    "failing forward": ("forward", failing, "out of resource"),
    "failing backward": ("backward", failing, "out of resource"),
    "uncompiled forward": ("forward", uncompiled, "KernelFailure"),
    "uncompiled backward": ("backward", uncompiled, "not serve|Failure|Error"),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_kernels_are_named_once_and_torch_serves(
    fault: str, plant: Plant, tmp_path: Path
) -> None:
    which, planted, words = FAULTS[fault]
    plant(which, planted)
    layer = make("bn", 4).to(DEVICE)
    with pytest.warns(RuntimeWarning, match=rf"kernels of batch statistics.*({words})") as told:
        assert_same_as_torch(layer, batches())
    assert len(told) == 1
    assert backend(layer, batches(1)[0]) != "triton"
    assert list(tmp_path.rglob("*.json")) == []
    found = anybatch.explain(layer, batches(1)[0])
    assert "failed beside torch's operators" in found.layers[0].reasons["triton"]


@pytest.mark.few(1)
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_kernels_that_fail_on_a_larger_batch_leave_the_state_as_it_was(
    which: str, plant: Plant
) -> None:
    """The trial passes; the launch for the batch itself fails, after state was written."""
    large = batches(1, 8)[0]

    def fault(kernel: Any) -> Any:
        def fail(*args: Any) -> None:
            if args[1].shape == large.shape:
                raise RuntimeError("out of resource: registers")

        return Launched(kernel, fail)

    layer = make("mabn", 4).to(DEVICE)
    plant(which, fault)
    with pytest.warns(RuntimeWarning, match=f"{which}: RuntimeError: out of resource") as told:
        assert_same_as_torch(layer, [large, large])
    assert len(told) == 1
    assert backend(layer, large) != "triton"


def test_memory_that_runs_out_is_no_fault_of_the_kernels(plant: Plant) -> None:
    large, full = batches(1, 8)[0], [True]

    def fault(kernel: Any) -> Any:
        def fail(*args: Any) -> None:
            if args[1].shape == large.shape and full:
                full.clear()
                raise torch.OutOfMemoryError("CUDA out of memory")

        return Launched(kernel, fail)

    layer = make("bn", 4).to(DEVICE)
    plant("forward", fault)
    before = state(layer)
    with pytest.raises(torch.OutOfMemoryError):
        layer(large)
    assert all(torch.equal(before[name], value) for name, value in state(layer).items())
    assert backend(layer, large) == "triton"


def test_an_agreement_is_kept_for_the_same_device_versions_and_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from anybatch.backends.triton.backend import TritonBackend

    tried, made = [], ["one device"]
    real = kernel_guard.try_kernels
    monkeypatch.setattr(kernel_guard, "try_kernels", lambda *a: tried.append(a) or real(*a))
    monkeypatch.setattr(TritonBackend, "kernels", lambda *_: Kernels("some kernels", made[0]))
    for identity, expected in (("one device", 1), ("one device", 1), ("another driver", 2)):
        made[0] = identity
        kernel_guard.forget()
        assert backend(make("bn", 4).to(DEVICE), batches(1)[0]) == "triton"
        assert len(tried) == expected
    kept = [json.loads(path.read_text()) for path in tmp_path.rglob("*.json")]
    assert [one["kernels"] for one in kept] == ["some kernels"] * 2
    assert all(0 <= error <= most for one in kept for error, most in one["errors"].values())


def test_a_cache_that_cannot_be_written_costs_a_trial_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from anybatch.backends.triton.backend import TritonBackend

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(TritonBackend, "kernels", lambda *_: Kernels("some kernels", "a device"))
    assert backend(make("bn", 4).to(DEVICE), batches(1)[0]) == "triton"


def test_the_identity_of_kernels_changes_with_device_and_sources(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from anybatch.backends.triton import identity

    class About:
        name, major, minor = "NVIDIA H200", 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: About)
    identity.identity.cache_clear()
    one = identity.identity(torch.device("cuda", 0))
    assert "NVIDIA H200" in one
    assert torch.__version__ in one
    assert triton.__version__ in one
    monkeypatch.setattr(identity, "_made_from", lambda: ("9.9", "other sources"))
    identity.identity.cache_clear()
    assert identity.identity(torch.device("cuda", 0)) != one
    identity.identity.cache_clear()
    assert identity.identity(torch.device("cpu")) is None


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", ["checkpoint", "inference mode", "no gradients", "hooks"])
def test_a_trial_goes_unnoticed_by_what_surrounds_the_first_batch(how: str) -> None:
    layer = make("bn", 4).to(DEVICE)
    x, packed = batches(1)[0].requires_grad_(), []
    if how == "checkpoint":
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    elif how == "inference mode":
        with torch.inference_mode():
            layer(x)
    elif how == "no gradients":
        with torch.no_grad():
            layer(x)
    else:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
            layer(x)
        assert len(packed) == 2, "input and scale"
    assert list(kernel_guard._faults.values()) == [None]
    assert layer.num_batches_tracked == 1
    assert isinstance(layer.weight, nn.Parameter)


def test_each_device_has_a_block_counter_of_its_own() -> None:
    """Copies of a layer for several devices share its plans."""
    from anybatch.backends.triton.backend import _Work

    class Kernels:
        def forward(self, x: Tensor, counter: Tensor) -> torch.device:
            return counter.device

    work = _Work(Kernels())
    for device in ("cpu", "meta", "cpu", "meta"):
        assert work.run("forward", (), torch.zeros(1, device=device)) == torch.device(device)
