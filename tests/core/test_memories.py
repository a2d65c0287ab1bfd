"""Several memories of one layer: as many layers of their own, with the same parameters."""

import copy
import pickle
import re
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anybatch
from anybatch.backends import use_fused
from anybatch.core.norm_layer import NormLayer
from method_cases import NAMES, batch, make, same, state, step

FEW = ["bn", "mabn", "cbn"]
CLOSE = {"rtol": 1e-3, "atol": 1e-5}  # where a compiler orders sums in another way


def several(name: str, memories: int = 3, **options: object) -> NormLayer:
    """A layer that shares a batch out in twos."""
    return make(name, norm_batch_size=2, memories=memories, **options)


def apart(layer: NormLayer, memories: int = 3) -> list[NormLayer]:
    """As many layers of one memory each."""
    alone = copy.deepcopy(layer)
    alone.memories = 1
    return [copy.deepcopy(alone) for _ in range(memories)]


def kept(layer: NormLayer, at: int) -> dict[str, Tensor]:
    """The part of a layer's checkpoint that belongs to one memory and that forwards update."""
    found = state(layer)
    if at:
        start = f"memories.{at}."
        return {k.removeprefix(start): v for k, v in found.items() if k.startswith(start)}
    return {
        k: v
        for k, v in found.items()
        if not k.startswith("memories.") and k not in ("weight", "bias", *layer.set_state)
    }


@pytest.mark.parametrize("name", NAMES)
def test_memories_are_those_of_as_many_layers(name: str) -> None:
    layer = several(name).double()
    layers = apart(layer)
    for examples in (6, 6, 6, 4, 6, 2, 6, 6, 5):
        x = batch(examples, dtype=torch.float64)
        dy = torch.randn_like(x)
        y, dx = step(layer, x, dy)
        parts = zip(layers, x.split(2), dy.split(2), strict=False)
        expected = [step(one, part, grad) for one, part, grad in parts]
        assert torch.equal(y, torch.cat([part for part, _ in expected]))
        assert torch.equal(dx, torch.cat([grad for _, grad in expected]))
    for parameter in ("weight", "bias"):
        grads = [getattr(one, parameter).grad for one in layers]
        assert torch.allclose(getattr(layer, parameter).grad, sum(grads))
    for at, one in enumerate(layers):
        assert same(kept(layer, at), kept(one, 0))


@pytest.mark.parametrize("name", NAMES)
def test_more_parts_than_memories_come_in_turn(name: str) -> None:
    """Also backward: the averages of a memory move in the order of its parts."""
    layer = several(name, 2).double()
    layers = apart(layer, 2)
    for _ in range(6):
        x = batch(9, dtype=torch.float64)
        dy = torch.randn_like(x)
        parts = enumerate(zip(x.split(2), dy.split(2), strict=True))
        expected = [step(layers[at % 2], part, grad) for at, (part, grad) in parts]
        for given, whole in zip(step(layer, x, dy), zip(*expected, strict=True), strict=True):
            torch.testing.assert_close(given, torch.cat(whole), rtol=1e-12, atol=1e-12)
    for at, one in enumerate(layers):
        first, second = kept(layer, at), kept(one, 0)
        assert all(torch.allclose(first[k].double(), second[k].double()) for k in second)


@pytest.mark.parametrize("fused", ["auto", "never"])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("first", [1, 2, 4, 6])
def test_the_first_batch_may_have_fewer_parts_than_memories(
    first: int, order: int, fused: str
) -> None:
    """`cbn` then makes the slots of its window, which the memories without a part have as well."""
    conv = nn.Conv2d(3, 6, 3)
    layer = make("cbn", norm_batch_size=2, memories=4, window=None, order=order)
    layer.bind(conv)
    use_fused(fused)
    try:
        for examples in (first, 8, 8, 5, 8):
            layer(conv(torch.randn(examples, 3, 6, 6))).sum().backward()
    finally:
        use_fused("auto")
    windows = [v.shape for k, v in layer.state_dict().items() if k.endswith("var_base")]
    assert windows == [(8, 6)] * (4 if order else 0)


def test_unequal_parts_of_a_first_batch_give_all_memories_one_window() -> None:
    first, second = (make("cbn", norm_batch_size=4, memories=2, window=None) for _ in range(2))
    for examples in (6, 8, 6):
        first(batch(examples))
    assert {len(v) for k, v in state(first).items() if k.endswith("values")} == {4}
    second.load_state_dict(first.state_dict())
    assert same(state(first), state(second))


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_has_the_memories_of_one_that_went_on(name: str) -> None:
    layer = several(name)
    for _ in range(5):
        step(layer, batch(6))
    other = several(name)
    other.load_state_dict(layer.state_dict(), strict=True)
    for _ in range(5):
        x = batch(6)
        dy = torch.randn_like(x)
        assert torch.equal(step(layer, x, dy)[1], step(other, x, dy)[1])
    assert same(state(layer), state(other))


@pytest.mark.parametrize("name", FEW)
def test_memories_of_another_number_start_from_the_first(name: str) -> None:
    layer, fewer, one = several(name), several(name, 2), make(name)
    for _ in range(4):
        step(layer, batch(6))
    with pytest.warns(UserWarning, match="memories=2"):
        fewer.load_state_dict(layer.state_dict())
    with pytest.warns(UserWarning, match="memories=1"):
        one.load_state_dict(layer.state_dict())
    assert same(kept(fewer, 0), kept(layer, 0))
    assert same(kept(one, 0), kept(layer, 0))
    layers = apart(fewer, 2)
    x = batch(4)
    assert torch.equal(
        fewer(x), torch.cat([a(part) for a, part in zip(layers, x.split(2), strict=True)])
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_with_memories_can_be_copied_and_pickled(name: str) -> None:
    layer = several(name)
    for _ in range(4):
        step(layer, batch(6))
    layer.zero_grad()
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    x = batch(6)
    dy = torch.randn_like(x)
    expected = step(layer, x, dy)
    for twin in twins:
        assert all(map(torch.equal, step(twin, x, dy), expected))
        assert same(state(layer), state(twin))
        with torch.no_grad():  # each has parameters of its own, and all its memories have them
            twin.weight.mul_(2.0)
        assert torch.equal(twin.bias.grad, layer.bias.grad)
    assert not torch.equal(twins[0](x), layer(x))


@pytest.mark.parametrize("name", FEW)
def test_memories_move_and_are_forgotten_with_their_layer(name: str) -> None:
    layer = several(name)
    step(layer, batch(6))
    moved = {k: v.dtype for k, v in layer.double().state_dict().items() if v.is_floating_point()}
    assert set(moved.values()) == {torch.float64}
    assert any(k.startswith("memories.2.") for k in moved)
    assert layer.weight.dtype == torch.float64
    step(layer, batch(6, dtype=torch.float64))
    layer.reset_running_stats()
    assert same(kept(layer, 1), kept(layer, 0))
    assert not layer.running_mean.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_has_the_same_keys_before_the_first_batch(name: str) -> None:
    layer = several(name)
    keys = set(layer.state_dict())
    step(layer, batch(6))
    assert set(layer.state_dict()) == keys


@pytest.mark.parametrize("name", FEW)
def test_loading_something_else_leaves_the_memories(name: str) -> None:
    layer = several(name)
    for _ in range(3):
        step(layer, batch(6))
    model, before = nn.Sequential(nn.Linear(2, 2), layer), state(layer)
    model.load_state_dict({"0.bias": torch.ones(2)}, strict=False)
    if name == "bn":  # others forget what they remember where a checkpoint has nothing of it
        model.load_state_dict({"1.weight": layer.weight.detach()}, strict=False)
    assert same(state(layer), before)


def test_an_unknown_key_of_a_memory_is_an_error() -> None:
    layer = several("mabn")
    keys = layer.state_dict()
    with pytest.raises(RuntimeError, match="memories.7.zzz"):
        layer.load_state_dict({**keys, "memories.7.zzz": torch.zeros(1)})
    with pytest.warns(UserWarning, match="^MovingAverageBatchNorm2d: the checkpoint holds other"):
        layer.load_state_dict({**keys, "memories.7.running_mean": torch.zeros(6)})


def test_a_transform_cannot_pass_several_memories() -> None:
    layers = [several("bn") for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(layers)
    base, x = copy.deepcopy(layers[0]), batch(6)
    for context in (nullcontext(), anybatch.no_update()):
        with context, pytest.raises(RuntimeError, match="memories=3, whose state is in no buffer"):
            torch.func.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,)))(
                parameters, buffers
            )
    assert torch.equal(base(x), layers[0](x))


def test_settings_made_on_a_layer_hold_for_all_its_memories() -> None:
    layer = several("mbn").double()
    layers = apart(layer)
    for epoch, momentum in enumerate((0.1, 0.5, 0.2), 1):
        for one in (layer, *layers):
            one.set_progress(epoch, 3)
            one.momentum = momentum
        x = batch(6, dtype=torch.float64)
        for _ in range(2):
            parts = zip(layers, x.split(2), strict=True)
            assert torch.equal(layer(x), torch.cat([one(part) for one, part in parts]))


@pytest.mark.parametrize("name", NAMES)
def test_memories_stand_still_where_a_layer_does(name: str) -> None:
    layer = several(name)
    step(layer, batch(6))
    before = state(layer)
    with anybatch.no_update():
        step(layer, batch(6))
    anybatch.freeze(layer)
    step(layer, batch(6))
    anybatch.thaw(layer)
    layer.eval()(batch(6))
    assert same(before, state(layer))


def test_evaluation_has_the_running_statistics_of_the_first_memory() -> None:
    layer = several("bn")
    first = apart(layer)[0]
    for _ in range(3):
        x = batch(6)
        layer(x), first(x[:2])
    x = batch(6)
    assert torch.equal(layer.eval()(x), first.eval()(x))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_memories_of_cbn_follow_the_layer_before_it(order: int) -> None:
    conv = nn.Conv2d(3, 6, 3, padding=1).double()
    layer = several("cbn", order=order, window=4).double().bind(conv)
    singles = []
    for _ in range(3):
        own = copy.deepcopy(conv)
        own._forward_hooks.clear()
        own._forward_hooks_with_kwargs.clear()
        alone = make("cbn", order=order, window=4).double().bind(own)
        keys = layer.state_dict().items()
        alone.load_state_dict({k: v for k, v in keys if not k.startswith("memories.")})
        singles.append((own, alone))
    optimizer = torch.optim.SGD(conv.parameters(), 0.05)
    for _ in range(6):
        x = torch.randn(6, 3, 5, 5, dtype=torch.float64)
        dy = torch.randn(6, 6, 5, 5, dtype=torch.float64)
        y = layer(conv(x))
        expected = []
        for (own, alone), part in zip(singles, x.split(2), strict=True):
            own.load_state_dict(conv.state_dict())
            expected.append(alone(own(part)))
        assert torch.allclose(y, torch.cat(expected), atol=1e-12)
        optimizer.zero_grad()
        y.backward(dy)
        optimizer.step()


def test_a_mask_is_shared_out_with_the_batch() -> None:
    layer = several("mabn").double()
    layers = apart(layer)
    for _ in range(4):
        x, mask = batch(6, dtype=torch.float64), torch.rand(6, 4, 3) > 0.3
        parts = zip(layers, x.split(2), mask.split(2), strict=True)
        expected = [one(part, valid) for one, part, valid in parts]
        assert torch.equal(layer(x, mask), torch.cat(expected))


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_moves_each_memory_once(name: str, reentrant: bool) -> None:
    layer = several(name)
    plain = copy.deepcopy(layer)
    for _ in range(3):
        x = batch(6).requires_grad_()
        dy = torch.randn_like(x)
        expected = step(plain, x, dy)
        y = checkpoint(layer, x, use_reentrant=reentrant)
        y.backward(dy)
        assert torch.equal(y, expected[0])
        assert torch.allclose(x.grad, expected[1], atol=1e-6)
    first, second = state(plain), state(layer)
    assert all(torch.allclose(first[k], second[k], atol=1e-6) for k in first)


def test_memories_keep_the_format_and_a_fused_activation() -> None:
    layer = several("bn")
    plain = copy.deepcopy(layer)
    x, residual = batch(6).contiguous(memory_format=torch.channels_last), batch(6)
    y = layer(x, residual=residual, activation="relu")
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(y, (plain(x) + residual).relu(), atol=1e-6)


def test_a_network_converts_to_layers_of_several_memories() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    anybatch.convert(model, "mabn", norm_batch_size=2, memories=3)
    scheduler = anybatch.NormScheduler(model, 2)
    model(torch.randn(6, 3, 8, 8)).sum().backward()
    scheduler.step()
    assert model[1].memories == 3
    assert "memories=3" in repr(model[1])
    anybatch.convert(model, "brn")
    assert (model[1].norm_batch_size, model[1].memories) == (2, 3)
    assert isinstance(anybatch.to_batchnorm(model)[1], nn.BatchNorm2d)


WRONG = [
    ("memories", 0, ValueError, "memories=0"),
    ("memories", True, TypeError, "memories=True"),
    ("norm_batch_size", 0, ValueError, "norm_batch_size=0"),
    ("norm_batch_size", -1, ValueError, "norm_batch_size=-1"),
    ("norm_batch_size", "2", TypeError, "norm_batch_size='2'"),
    ("norm_batch_size", None, ValueError, "memories=3: give norm_batch_size"),
]


@pytest.mark.parametrize(("name", "value", "kind", "words"), WRONG)
def test_impossible_parts_are_refused_at_once(
    name: str, value: object, kind: type[Exception], words: str
) -> None:
    layer = several("mabn")
    with pytest.raises(kind, match=re.escape(words)):
        setattr(layer, name, value)
    with pytest.raises(kind, match=re.escape(words)):
        make("mabn", **{"norm_batch_size": 2, "memories": 3, name: value})
    assert (layer.norm_batch_size, layer.memories) == (2, 3)


def test_accumulation_joins_what_parts_would_cut() -> None:
    layer = make("bn")
    anybatch.accumulate(layer, 2)
    with pytest.raises(ValueError, match="norm_batch_size=2: it cuts a batch"):
        layer.norm_batch_size = 2
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match="norm_batch_size=2: it cuts a batch"):
        anybatch.convert(model, "bn", norm_batch_size=2)
    anybatch.accumulate(layer, 1)
    layer.norm_batch_size = 2
    with pytest.raises(ValueError, match="norm_batch_size=2 cuts a batch"):
        anybatch.accumulate(layer, 2)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # of torch's own
@pytest.mark.parametrize("name", FEW)
def test_a_compiled_layer_has_the_memories_of_one_that_is_not(name: str) -> None:
    layer = several(name)
    other = copy.deepcopy(layer)
    compiled = torch.compile(nn.Sequential(nn.Identity(), other), backend="aot_eager")
    for _ in range(3):
        x = batch(6)
        dy = torch.randn_like(x)
        torch.testing.assert_close(step(compiled, x, dy), step(layer, x, dy), **CLOSE)
    torch.testing.assert_close(state(other), state(layer), **CLOSE)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["bn", "mabn", "brn"])
def test_batches_of_several_sizes_go_to_all_memories(name: str, masked: bool) -> None:
    """A whole batch may be as large as the part of another that one memory takes."""
    torch.manual_seed(0)
    layer = make(name, dims=1, norm_batch_size=2, memories=2)
    for number in (8, 4, 8, 4, 2, 6, 4):
        twin, x = copy.deepcopy(layer), torch.randn(number, 6)  # which remembers no way
        mask = torch.ones(number, dtype=torch.bool) if masked else None
        assert torch.equal(layer(x, mask), twin(x, mask))
        assert same(state(layer), state(twin))
