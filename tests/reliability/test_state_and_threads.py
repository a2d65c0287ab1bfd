"""Networks that are copied, shared, moved, run in threads and workers, in the middle of training.

What a single layer does alone is in tests/core/test_state.py; here are networks of every method
in the table, torch's group norms included.
"""

import copy
import multiprocessing
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import anybatch
from anybatch.core.norm_layer import NormLayer
from method_cases import QUICK, make, same, state
from method_cases import train as layer_train

METHODS = list(anybatch.METHODS)
OURS = [name for name in METHODS if anybatch.METHODS[name].builder is None]
POOLED = [name for name in OURS if name not in ("l1", "range")]
EXAMPLES = 4


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(6 * 16, 4),
    )


def converted(method: str, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """A network of a method, in the middle of its schedule, in its virtual dataset."""
    model = convnet() if model is None else model
    own = {**QUICK.get(method, {}), **options}
    if method == "cbn":
        own = {"window": 3, "burn_in": 0.0, **options}
    if anybatch.METHODS[method].wraps:
        own.pop("num_virtual", None)
    if method == "bgn":
        own["num_groups"] = 2
    model = anybatch.convert(model, method, **own)
    if anybatch.METHODS[method].wraps:
        model = anybatch.VirtualDataset(model, [0.0] * 3, [1.0] * 3, 2, seed=0)
    anybatch.NormScheduler(model, 3, last_epoch=1)
    return model


def data(seed: int, **like: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(EXAMPLES, 3, 8, 8, generator=generator) + 0.3).to(**like)


def train(model: nn.Module, steps: range, **like: Any) -> list[Tensor]:
    """Some steps of an optimizer's; losses."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for number in steps:
        optimizer.zero_grad()
        loss = (model(data(number, **like)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def go_on_alike(one: nn.Module, other: nn.Module, **like: Any) -> None:
    """That two networks train on alike, bit for bit."""
    assert same(state(one), state(other))
    assert equal(train(one, range(20, 26), **like), train(other, range(20, 26), **like))
    assert same(state(one), state(other))


# --- copies ------------------------------------------------------------------------------


def by_pickle(model: nn.Module) -> nn.Module:
    found: nn.Module = pickle.loads(pickle.dumps(model))
    return found


@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle])
@pytest.mark.parametrize("method", METHODS)
def test_a_copied_network_trains_on_alike(
    method: str, how: Callable[[nn.Module], nn.Module]
) -> None:
    model = converted(method)
    train(model, range(7))
    go_on_alike(model, how(model))


@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle])
@pytest.mark.parametrize("method", POOLED)
def test_a_network_copied_within_an_optimizer_step_ends_it_alike(
    method: str, how: Callable[[nn.Module], nn.Module]
) -> None:
    model = converted(method)
    anybatch.accumulate(model, 4)
    train(model, range(6))
    go_on_alike(model, how(model))


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_between_forward_and_backward_disturbs_neither(method: str) -> None:
    model = converted(method)
    train(model, range(7))
    alone = copy.deepcopy(model)
    model.zero_grad()
    expected = alone(data(7)).square().mean()
    expected.backward()
    loss = model(data(7)).square().mean()
    other = copy.deepcopy(model)
    train(other, range(8, 12))
    loss.backward()
    for (name, one), two in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad), name
    assert same(state(model), state(alone))


# --- threads and workers -----------------------------------------------------------------


@pytest.mark.exhaustive
def test_models_of_all_methods_train_in_threads_as_they_do_alone() -> None:
    """All at once, and each method in two threads."""
    models = [converted(method) for method in METHODS for _ in range(2)]
    alone = [copy.deepcopy(model) for model in models]
    gate = threading.Barrier(8)

    def work(place: int) -> list[Tensor]:
        if place < 8:
            gate.wait()
        return train(models[place], range(12))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(len(models))))
    for place, losses in enumerate(found):
        method = METHODS[place // 2]
        assert equal(losses, train(alone[place], range(12))), method
        assert same(state(models[place]), state(alone[place])), method


@pytest.mark.parametrize("method", METHODS)
def test_threads_share_a_model_in_evaluation(method: str) -> None:
    model = converted(method)
    train(model, range(7))
    model.eval()
    expected = [model(data(seed)).detach() for seed in range(16)]
    before = state(model)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: model(data(seed)).detach(), range(16)))
    assert equal(found, expected)
    assert same(before, state(model))


class Features(Dataset[tuple[Tensor, Tensor]]):
    """What networks put out in evaluation, and after some training in the worker."""

    def __init__(self, models: dict[str, nn.Module]) -> None:
        self.models = list(models.values())

    def __len__(self) -> int:
        return len(self.models)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        model = copy.deepcopy(self.models[item])
        features = model.eval()(data(item)).detach()
        return features, torch.stack(train(model, range(4)))


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_models_work_in_the_workers_of_a_loader(start: str) -> None:
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} here")
    models = {method: converted(method) for method in METHODS}
    for model in models.values():
        train(model, range(7))
    items = Features(models)
    loader = DataLoader(
        items, batch_size=None, num_workers=2, multiprocessing_context=start, timeout=240
    )
    for method, found, item in zip(models, loader, range(len(items)), strict=True):
        assert equal(list(found), list(items[item])), method


# --- types and devices -------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_detour_over_double_changes_nothing(method: str) -> None:
    model = converted(method)
    train(model, range(7))
    other = copy.deepcopy(model).double().float()
    go_on_alike(model, other)


@pytest.mark.few(3)
@pytest.mark.parametrize("method", METHODS)
def test_a_network_moved_to_another_type_is_one_built_in_it(method: str) -> None:
    """In the middle of training, float to double and back."""
    model = converted(method)
    for kind, first in ((torch.float64, 0), (torch.float32, 7), (torch.float64, 14)):
        model.to(kind)
        built = converted(method).to(kind)
        built.load_state_dict(model.state_dict())
        train(model, range(first, first + 7), dtype=kind)
        train(built, range(first, first + 7), dtype=kind)
        for name, tensor in model.state_dict().items():
            assert tensor.dtype in (kind, torch.int64, torch.bool), name
        go_on_alike(model, built, dtype=kind)


@pytest.mark.parametrize("method", POOLED)
def test_a_network_moves_within_an_optimizer_step(method: str) -> None:
    model = converted(method)
    anybatch.accumulate(model, 4)
    train(model, range(6))
    go_on_alike(model, copy.deepcopy(model).double().float())


@pytest.mark.parametrize("method", METHODS)
def test_moving_keeps_the_parameters_that_an_optimizer_has(method: str) -> None:
    model = converted(method)
    before = [id(p) for p in model.parameters()]
    model.double().float().to("cpu")
    assert before == [id(p) for p in model.parameters()]


# --- older checkpoints -------------------------------------------------------------------


def without(state: Any, names: set[str]) -> Any:
    """A copy of a checkpoint without some entries of its layers; it keeps the versions."""
    found = OrderedDict((k, v.clone()) for k, v in state.items() if k.split(".")[-1] not in names)
    found._metadata = state._metadata  # type: ignore[attr-defined]
    return found


@pytest.mark.few(3)
@pytest.mark.parametrize("method", OURS)
def test_memory_that_a_checkpoint_has_only_in_part_starts_fresh(method: str) -> None:
    """As from a version whose layers remembered something else."""
    model = converted(method)
    norm = next(m for m in model.modules() if isinstance(m, NormLayer))
    train(model, range(7))
    for name in norm.method_state:
        older = without(model.state_dict(), {name})
        other, fresh = converted(method), converted(method)
        train(other, range(9))
        alone = len(norm.method_state) == 1  # a checkpoint of torch's, for all that it knows
        with nullcontext() if alone else pytest.warns(UserWarning, match=f"lacks {name}"):
            other.load_state_dict(older)
        bare = without(older, set(norm.method_state))
        train(fresh, range(3))
        fresh.load_state_dict(bare)
        assert same(state(other), state(fresh)), name


@pytest.mark.parametrize("method", OURS)
def test_a_key_that_no_layer_knows_is_named(method: str) -> None:
    model = converted(method)
    name = next(n for n, m in model.named_modules() if isinstance(m, NormLayer))
    for key in ("of_the_future", "step.of_the_future"):
        newer = {**model.state_dict(), f"{name}.{key}": torch.zeros(3)}
        with pytest.raises(RuntimeError, match=f"Unexpected key.*{name}.{key}"):
            model.load_state_dict(newer)


# --- hooks -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_hooks_of_a_torch_norm_act_on_what_replaces_it(method: str) -> None:
    """All kinds, acting on values: inputs, outputs and both sides' gradients."""
    results = []
    for late in (False, True):
        torch.manual_seed(0)
        plain = convnet()
        # The first order of cbn takes only what its convolution put out.
        own = {"order": 0} if method == "cbn" else {}
        if late:
            model = converted(method, plain, **own)
        norm = plain[1]
        norm.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        norm.register_forward_hook(lambda m, args, y: y * 3)
        norm.register_full_backward_pre_hook(lambda m, dy: (dy[0] * 5,))
        norm.register_full_backward_hook(lambda m, dx, dy: (dx[0] * 7,))
        if not late:
            model = converted(method, plain, **own)
        losses = train(model, range(6))
        results.append([*losses, *(p.grad for p in model.parameters())])
    assert equal(*results)


# --- sharing -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_norms_that_share_parameters_still_do(method: str) -> None:
    model = convnet()
    model[4].weight, model[4].bias = model[1].weight, model[1].bias
    model = converted(method, model)
    own = model.model if isinstance(model, anybatch.VirtualDataset) else model
    assert own[4].weight is own[1].weight
    assert own[4].bias is own[1].bias
    assert len(list(model.parameters())) == 8
    train(model, range(7))
    twin = copy.deepcopy(model)
    inner = twin.model if isinstance(twin, anybatch.VirtualDataset) else twin
    assert inner[4].weight is inner[1].weight
    go_on_alike(model, twin)


class Twice(nn.Module):
    """A block at three places of one forward, on maps of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh())
        self.saved: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self._run(self.stem(x))
        x = self._run(x)
        return self._run(x[:, :, ::2, ::2])

    def _run(self, x: Tensor) -> Tensor:
        if self.saved is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.saved == "reentrant")


@contextmanager
def passes(choice: str) -> Iterator[None]:
    anybatch.backends.use_fused(choice)
    try:
        yield
    finally:
        anybatch.backends.use_fused("auto")


@pytest.mark.parametrize("method", METHODS)
def test_a_norm_at_three_places_of_a_forward(method: str) -> None:
    """Compiled and elementary paths agree in double: neither reads what a later call wrote."""
    own = {"order": 0} if method == "cbn" else {}  # others need a convolution of their own
    first = converted(method, Twice(), **own).double()
    second = copy.deepcopy(first)
    with passes("auto"):
        losses = train(first, range(8), dtype=torch.float64)
    with passes("never"):
        others = train(second, range(8), dtype=torch.float64)
    torch.testing.assert_close(torch.stack(losses), torch.stack(others))
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(tensor, second.state_dict()[name], msg=name)
    for name, tensor in first.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert tensor == 24


@pytest.mark.few(6)
@pytest.mark.parametrize("way", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("fused", ["auto", "never"])
@pytest.mark.parametrize("method", METHODS)
def test_a_norm_at_three_places_of_a_checkpointed_forward(
    method: str, way: str, fused: str
) -> None:
    own = {"order": 0} if method == "cbn" else {}
    plain = converted(method, Twice(), **own).double()
    saving = copy.deepcopy(plain)
    inner = saving.model if isinstance(saving, anybatch.VirtualDataset) else saving
    inner.saved = way
    with passes(fused):
        losses = train(plain, range(8), dtype=torch.float64)
        others = train(saving, range(8), dtype=torch.float64)
    torch.testing.assert_close(torch.stack(losses), torch.stack(others))
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(saving.state_dict()[name], tensor, msg=name)


def gradients(layer: nn.Module, inputs: list[Tensor], reentrant: bool | None) -> list[Tensor]:
    """Of several forwards, checkpointed or not, before one backward."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    net = nn.Sequential(layer, nn.Tanh())
    if reentrant is None:
        ys = [net(x) for x in leaves]
    else:
        ys = [checkpoint(net, x, use_reentrant=reentrant) for x in leaves]
    generator = torch.Generator().manual_seed(0)
    torch.autograd.backward(ys, [torch.randn(y.shape, generator=generator) for y in ys])
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["bn", "brn", "mbn", "ghost", "fs"])
def test_checkpointed_batches_that_begin_alike_are_told_apart(
    method: str, reentrant: bool, last: bool
) -> None:
    """Pictures with a border, batches with one first example, and the same values elsewhere."""
    plain = make(method)
    layer_train(plain, 5)
    saving = copy.deepcopy(plain)
    base = torch.randn(2, 6, 8, 8)
    framed = [nn.functional.pad(s * base + s, (6, 6, 6, 6)) for s in (1.0, 3.0, 0.3)]
    begun = [torch.cat([base[:1], s * base]) for s in (1.0, 3.0, 0.3)]
    for inputs in (framed, begun):
        form = torch.channels_last if last else torch.contiguous_format
        inputs = [x.contiguous(memory_format=form) for x in inputs]
        expected = gradients(plain, inputs, None)
        for a, b in zip(expected, gradients(saving, inputs, reentrant), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_in_many_steps_of_a_checkpointed_recurrence(reentrant: bool) -> None:
    plain = make("brn")
    layer_train(plain, 5)
    saving = copy.deepcopy(plain)
    inputs = [s * torch.randn(2, 6, 4, 3) + s for s in torch.linspace(0.1, 3, 64).tolist()]
    expected = gradients(plain, inputs, None)
    for a, b in zip(expected, gradients(saving, inputs, reentrant), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="more often before one backward than the 64 times"):
        gradients(saving, [inputs[-1] + k for k in range(66)], reentrant)


# --- forwards between a forward and its backward --------------------------------------------


def _eval(model: nn.Module) -> None:
    model.eval()
    model(data(9))
    model.train()


def _without_gradients(model: nn.Module) -> None:
    with torch.no_grad():
        model(data(9))


def _inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        model(data(9))


def _load(model: nn.Module) -> None:
    """Of the layers' state; that weights were overwritten torch notices itself."""
    own = [name for name, _ in model.named_parameters()]
    past = {k: torch.zeros_like(v) for k, v in state(model).items() if k not in own}
    model.load_state_dict(past, strict=False)


def _reset(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, NormLayer):
            module.reset_running_stats()


@pytest.mark.few(16)
@pytest.mark.parametrize("fused", ["auto", "never"])
@pytest.mark.parametrize("between", [_eval, _without_gradients, _inference_mode, _load, _reset])
@pytest.mark.parametrize("method", METHODS)
def test_what_happens_before_a_backward_does_not_change_it(
    method: str, between: Callable[[nn.Module], None], fused: str
) -> None:
    model = converted(method)
    with passes(fused):
        train(model, range(8))
        alone = copy.deepcopy(model)
        gradients = []
        for one in (model, alone):
            one.zero_grad()
            loss = one(data(8)).square().mean()
            if one is model:
                between(model)
            loss.backward()
            gradients.append([p.grad for p in one.parameters()])
        windowed = method in ("mabn", "cbn")  # an average over steps, which is emptied
        assert equal(*gradients) or (windowed and between in (_load, _reset))


@pytest.mark.parametrize("fused", ["auto", "never"])
@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_after_inference_mode(method: str, fused: str) -> None:
    """A forward in it counts like one without gradients, and leaves no tensor of its own."""
    with passes(fused):
        model = converted(method)
        other = copy.deepcopy(model)
        with torch.inference_mode():
            model(data(0))
        with torch.no_grad():
            other(data(0))
        go_on_alike(model, other)
        for saved in (True, False):
            found = checkpoint(model, data(3).requires_grad_(), use_reentrant=saved)
            found.square().mean().backward()


@pytest.mark.parametrize("method", POOLED)
def test_inference_mode_within_an_optimizer_step(method: str) -> None:
    model = converted(method)
    anybatch.accumulate(model, 2)
    with torch.inference_mode(), anybatch.no_update():
        model(data(0))
    with torch.inference_mode():
        model(data(0))
    train(model, range(5))


@pytest.mark.parametrize("method", METHODS)
def test_a_network_that_was_converted_loaded_or_calibrated_in_inference_mode(method: str) -> None:
    model = converted(method)
    train(model, range(3))
    saved = state(model)
    with torch.inference_mode():
        model.load_state_dict(saved)
        if method in OURS:
            anybatch.recalibrate(model, [data(n) for n in range(3)], progress=False)
    train(model, range(3, 8))
