"""State: checkpoints, copies, freezing, and forwards that must not count."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import anybatch
from anybatch.backends import use_fused
from anybatch.backends.aten import passes as aten
from method_cases import NAMES, VIRTUAL, batch, make, same, state, step, train

TORCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def trained(dims: int = 2) -> nn.Module:
    """A torch batch norm that has seen data."""
    norm = TORCH[dims](6)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    nn.init.normal_(norm.bias)
    for _ in range(5):
        norm(batch(4, dims=dims))
    return norm


# --- checkpoints -----------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_torch_checkpoint_loads_strictly_and_keeps_its_function(name: str, dims: int) -> None:
    norm, layer = trained(dims), make(name, dims=dims, example_weight=0.0)
    train(layer, 9, dims=dims)
    layer.load_state_dict(norm.state_dict(), strict=True)
    x = batch(3, dims=dims)
    if name != "bgn":  # its channel groups share the statistics
        assert torch.allclose(layer.eval()(x), norm.eval()(x), atol=1e-5)
    fresh = make(name, dims=dims)
    for key in ("step", "count", "backward_step"):
        if key in layer.method_state:
            open_at = fresh.warmup_steps if name == "brn" else 0  # its statistics are trained
            assert torch.equal(
                layer.method_state[key], torch.full_like(fresh.method_state[key], open_at)
            )


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_those_of_torch(name: str) -> None:
    layer, norm = make(name), nn.BatchNorm2d(6)
    assert [n for n, _ in layer.named_parameters()] == [n for n, _ in norm.named_parameters()]
    assert [n for n, _ in layer.named_buffers()] == [n for n, _ in norm.named_buffers()]
    for key, value in norm.state_dict().items():
        assert layer.state_dict()[key].shape == value.shape
    pointers = [tensor.data_ptr() for tensor in layer.state_dict().values()]
    assert len(set(pointers)) == len(pointers)  # nothing aliased: safetensors refuses that


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop", [1, 3, 5, 8])
def test_a_resumed_run_is_the_run_that_did_not_stop(name: str, stop: int) -> None:
    layer = make(name)
    train(layer, stop)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make(name)
    other.set_progress(1, 3)
    other.load_state_dict(torch.load(file, weights_only=True))
    other.set_progress(2, 3)
    for _ in range(8):
        x, dy = batch(2), torch.randn(2, 6, 4, 3)
        for a, b in zip(step(layer, x, dy), step(other, x, dy), strict=True):
            assert torch.equal(a, b)
    assert same(state(layer), state(other))


def test_a_batch_size_read_from_the_first_batch_is_in_the_checkpoint() -> None:
    layer = anybatch.MomentumBatchNorm1d(3)
    layer(torch.randn(4, 3))
    other = anybatch.MomentumBatchNorm1d(3)
    other.load_state_dict(layer.state_dict())
    assert other.batch_size == 4
    assert other.momentum == layer.momentum == 1 - 0.85 ** (4 / 32)


def test_a_window_of_another_length_is_reported() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for window"):
        make("mabn", window=3).load_state_dict(make("mabn", window=5).state_dict())


def test_a_checkpoint_with_a_mean_needs_a_bias_in_the_uncentred_form() -> None:
    norm = nn.BatchNorm2d(6, affine=False)
    norm(batch(4))
    with pytest.raises(RuntimeError, match=r"affine=False with a running mean.*centered=True"):
        make("mabn", affine=False).load_state_dict(norm.state_dict())


# --- copies ----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_goes_on_alone(name: str, how: object) -> None:
    layer = make(name)
    train(layer, 5)
    other = how(layer)
    assert same(state(layer), state(other))
    x, dy = batch(2), torch.randn(2, 6, 4, 3)
    before = state(other)
    first = step(layer, x, dy)
    assert same(before, state(other))
    assert all(torch.equal(a, b) for a, b in zip(first, step(other, x, dy), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_made_on_the_meta_device_starts_like_any_other(name: str) -> None:
    options = {"num_groups": 2} if name == "bgn" else {}
    if "seed" in anybatch.METHODS[name].options:
        options = {"seed": 0}
    with torch.device("meta"):
        layer = anybatch.METHODS[name].build(6, 2, **options)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert same(state(layer), state(anybatch.METHODS[name].build(6, 2, **options)))


@pytest.mark.parametrize("name", NAMES)
def test_reset_forgets_everything(name: str) -> None:
    options = {"bgn": {"num_groups": 2}, "cbn": {"order": 0, "window": 4}}.get(name, {})
    options = {"num_virtual": 1} if name in VIRTUAL else options
    layer = anybatch.METHODS[name].build(6, 2, **options)
    fresh = state(layer)
    train(layer, 5)
    layer.reset_parameters()
    assert same(fresh, state(layer))


@pytest.mark.parametrize("name", NAMES)
def test_repr_shows_the_method_and_its_options(name: str) -> None:
    text = repr(make(name, norm_batch_size=4))
    assert text.startswith(anybatch.METHODS[name].class_name + "2d(6, eps=1e-05")
    assert "norm_batch_size=4" in text
    for option in ("window=3",) if name == "mabn" else ("ghost_size=2",) if name == "ghost" else ():
        assert option in text


@pytest.mark.parametrize("name", NAMES)
def test_sync_conversion_of_torch_leaves_the_layer_alone(name: str) -> None:
    net = nn.Sequential(make(name))
    assert nn.SyncBatchNorm.convert_sync_batchnorm(net)[0] is net[0]
    assert type(net[0]).__name__ == anybatch.METHODS[name].class_name + "2d"


# --- freezing, and forwards that leave no trace ------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_layer_stays_frozen_through_train_and_checkpoint(name: str) -> None:
    net = nn.Sequential(make(name, example_weight=0.0))
    train(net, 5)
    anybatch.freeze(net).train()
    before, x = state(net), batch(4)
    assert torch.equal(step(net, x)[0], net.eval()(x).detach())
    assert same(before, state(net))
    assert "frozen=statistics" in repr(net)
    other = nn.Sequential(make(name))
    other.load_state_dict(net.state_dict())
    assert other[0].frozen
    anybatch.thaw(net).train()
    step(net, x)
    assert net[0].num_batches_tracked == before["0.num_batches_tracked"] + 1


def test_affine_parameters_freeze_apart_from_statistics() -> None:
    net = nn.Sequential(make("bn"))
    anybatch.freeze(net, statistics=False, affine=True)
    train(net, 1)
    assert net[0].num_batches_tracked == 1
    assert net[0].weight.grad is None
    other = nn.Sequential(make("bn"))
    other.load_state_dict(net.state_dict())
    assert not other[0].weight.requires_grad
    assert "frozen=affine" in repr(other)
    anybatch.thaw(other, affine=True)
    assert other[0].weight.requires_grad


def test_freeze_picks_by_pattern_or_predicate() -> None:
    net = nn.Sequential(make("bn"), make("mabn"), make("brn"))
    anybatch.freeze(net, where="[01]")
    assert [layer.frozen for layer in net] == [True, True, False]
    anybatch.thaw(net, where=lambda name, module: isinstance(module, anybatch.BatchNorm2d))
    assert [layer.frozen for layer in net] == [False, True, False]
    with pytest.raises(ValueError, match=r"where='head\.\*' picks none of 0, 1, 2"):
        anybatch.freeze(net, where="head.*")
    with pytest.raises(ValueError, match="convert it first"):
        anybatch.freeze(nn.Sequential(nn.BatchNorm2d(3)))


@pytest.mark.parametrize("name", NAMES)
def test_no_update_leaves_no_trace(name: str) -> None:
    layer = make(name)
    train(layer, 8)
    before, x, dy = state(layer), batch(2), torch.randn(2, 6, 4, 3)
    with anybatch.no_update():
        silent = step(layer, x, dy)
    assert same(before, state(layer))
    loud = step(layer, x, dy)
    assert all(torch.equal(a, b) for a, b in zip(silent, loud, strict=True))
    assert not same(before, state(layer))


def test_no_update_stays_in_its_thread() -> None:
    layer = make("bn")
    with anybatch.no_update():
        thread = threading.Thread(target=train, args=(layer, 1))
        thread.start()
        thread.join()
        train(layer, 1)
    assert layer.num_batches_tracked == 1  # the other thread's


def test_no_update_ends_with_its_block() -> None:
    layer = make("bn")

    def fail() -> None:
        with anybatch.no_update(), anybatch.no_update():
            train(layer, 1)
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        fail()
    train(layer, 1)
    assert layer.num_batches_tracked == 1


# --- passes -----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_two_forwards_before_one_backward(name: str) -> None:
    layer = make(name)
    train(layer, 8)
    other = copy.deepcopy(layer)
    a, b = batch(2), batch(3)
    da, db = torch.randn(2, 6, 4, 3), torch.randn(3, 6, 4, 3)
    x, z = a.clone().requires_grad_(), b.clone().requires_grad_()
    with anybatch.no_update():
        expected = step(other, a, da)[1]
    first, second = layer(x), layer(z)
    torch.autograd.backward([first, second], [da, db])
    assert torch.allclose(x.grad, expected, atol=1e-5) or name == "mabn"  # its window holds both
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_without_gradients_in_training_counts(name: str) -> None:
    layer = make(name)
    with torch.no_grad():
        layer(batch(2))
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["training", "inference", "frozen"])
@pytest.mark.parametrize("options", [{}, {"norm_batch_size": 2}, {"example_weight": 0.3}], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("fused", ["auto", "never"])
def test_the_output_may_be_changed_in_place(
    name: str, mode: str, options: dict[str, object], memory_format: torch.memory_format, fused: str
) -> None:
    use_fused(fused)
    layer = make(name, **options)
    layer.train(mode != "inference")
    layer.frozen = mode == "frozen"
    other, gradients = copy.deepcopy(layer), []
    x, dy = batch(5).contiguous(memory_format=memory_format), torch.randn(5, 6, 4, 3)
    for norm, inplace in ((layer, True), (other, False)):
        leaf = x.clone().requires_grad_()
        F.relu(norm(leaf), inplace=inplace).backward(dy)
        gradients.append([leaf.grad, norm.weight.grad, norm.bias.grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    use_fused("auto")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wanted", ["input", "weight", "bias"])
def test_gradients_only_where_wanted(name: str, wanted: str) -> None:
    full, part = make(name), None
    train(full, 8)
    part = copy.deepcopy(full)
    full.zero_grad(), part.zero_grad()
    for key, parameter in part.named_parameters():
        parameter.requires_grad_(key == wanted)
    x, dy = batch(2), torch.randn(2, 6, 4, 3)
    _, grad = step(full, x, dy)
    inner = x.clone().requires_grad_(wanted == "input")
    part(inner).backward(dy)
    if wanted == "input":
        assert torch.allclose(inner.grad, grad, atol=1e-6)
    for key, parameter in part.named_parameters():
        expected = getattr(full, key).grad if key == wanted else None
        assert (parameter.grad is None) == (expected is None)
        assert expected is None or torch.allclose(parameter.grad, expected, atol=1e-5)


def test_a_second_derivative_of_averaged_backward_statistics_is_refused() -> None:
    layer = make("mabn")
    x = batch(2).requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(layer(x), x, torch.randn(2, 6, 4, 3), create_graph=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_step_counts_once(name: str, use_reentrant: bool) -> None:
    plain = make(name)
    saving = copy.deepcopy(plain)
    for _ in range(10):
        x, dy = batch(2), torch.randn(2, 6, 4, 3)
        first = step(plain, x, dy)
        inner = x.clone().requires_grad_()
        y = checkpoint(saving, inner, use_reentrant=use_reentrant)
        y.backward(dy)
        assert torch.allclose(first[0], y, atol=1e-6)
        assert torch.allclose(first[1], inner.grad, atol=1e-5)
    counted = state(plain)
    for key, value in state(saving).items():
        exact = not value.is_floating_point()
        assert torch.equal(value, counted[key]) if exact else torch.allclose(value, counted[key])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("norm_batch_size", [None, 2])
def test_checkpointed_forwards_before_one_backward_find_their_own_statistics(
    name: str, use_reentrant: bool, norm_batch_size: int | None
) -> None:
    plain = nn.Sequential(
        nn.Conv2d(6, 6, 1), make(name, norm_batch_size=norm_batch_size), nn.Tanh()
    )
    plain.append(nn.Conv2d(6, 6, 1))
    for _ in range(9):
        step(plain, batch(4))
    saving = copy.deepcopy(plain)
    plain.zero_grad(), saving.zero_grad()
    inputs = [scale * batch(4) for scale in (1.0, 3.0, 0.3)]
    dys = [torch.randn(4, 6, 4, 3) for _ in inputs]
    gradients = []
    for net in (plain, saving):
        leaves = [x.clone().requires_grad_() for x in inputs]
        if net is saving:
            ys = [checkpoint(net, x, use_reentrant=use_reentrant) for x in leaves]
        else:
            ys = [net(x) for x in leaves]
        torch.autograd.backward(ys, dys)
        gradients.append([leaf.grad for leaf in (*leaves, *net.parameters())])
    for expected, actual in zip(*gradients, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)
    counted, state_after = state(plain), state(saving)
    for key, value in counted.items():
        assert torch.allclose(state_after[key], value, rtol=1e-4, atol=1e-6), key


@pytest.mark.families
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_layer_is_whole_and_equal(name: str) -> None:
    torch._dynamo.reset()
    plain = make(name)
    compiled = copy.deepcopy(plain)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(9):
        x, dy = batch(2), torch.randn(2, 6, 4, 3)
        first, second = step(plain, x, dy), step(run, x, dy)
        for a, b in zip(first, second, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    for key, value in state(plain).items():
        assert torch.allclose(value, state(compiled)[key], atol=1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "bgn"])
def test_the_exported_inference_is_an_ordinary_batch_norm(name: str) -> None:
    layer = make(name).eval()
    graph = torch.export.export(layer, (batch(2),)).graph
    called = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert any("batch_norm" in target for target in called)
    assert all(target.startswith(("aten.", "<built-in")) for target in called)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm_batch_size", [None, 2])
def test_no_value_is_read_in_a_step(
    name: str, norm_batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without data have nothing to read: on a GPU such a step waits for no result."""
    # torch's operator for statistics has no form for such tensors.
    monkeypatch.setattr(aten, "_moments", lambda x: (x.new_empty(x.shape[1]),) * 2)
    layer = make(name, norm_batch_size=norm_batch_size)
    layer.set_progress(2, 3)
    layer = layer.to("meta")
    x = torch.randn(5, 6, 4, 3, device="meta", requires_grad=True)
    y = layer(x)
    y.backward(torch.randn_like(y))
    assert y.device.type == x.grad.device.type == "meta"


# --- inference ---------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in NAMES if n != "bgn"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inference_is_torchs_batch_norm_to_the_bit(name: str, dtype: torch.dtype) -> None:
    layer = make(name)
    train(layer, 9)
    layer.eval()
    x = batch(3).to(dtype)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    expected = F.batch_norm(x, *(a.to(kind) for a in arguments), False, 0.0, layer.eps)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("name", ["bn", "mbn", "brn", "ghost"])
def test_an_example_weight_of_one_is_instance_normalization(name: str) -> None:
    layer = make(name, affine=False, example_weight=1.0)
    train(layer, 3)
    x = batch(3)
    assert torch.allclose(layer.eval()(x), F.instance_norm(x), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_an_example_is_not_moved_by_its_batch_mates_at_inference(name: str, alpha: float) -> None:
    layer = make(name)
    train(layer, 5)
    layer.example_weight = alpha  # a plain attribute of a trained layer
    layer.eval()
    x = batch(4)
    alone = torch.cat([layer(one) for one in x.split(1)])
    assert torch.allclose(layer(x), alone, atol=1e-5)


@pytest.mark.parametrize("name", ["bn", "mabn", "bgn"])
def test_gradients_flow_through_the_examples_own_share(name: str) -> None:
    layer = make(name, example_weight=0.4).double()
    train_input = batch(4).double()
    layer(train_input)
    layer.eval()
    x = batch(2).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,), atol=1e-5)


@pytest.mark.parametrize("name", ["bn", "ghost", "bgn"])
def test_without_running_statistics_inference_takes_the_batch(name: str) -> None:
    layer = make(name, track_running_stats=False)
    x = batch(4)
    expected = step(layer, x)[0]
    assert torch.equal(layer.eval()(x), expected)
    assert layer.running_mean is None
    assert "track_running_stats=False" in (layer.inference_obstacle() or "")
    assert layer(torch.randn(1, 6, 1, 1)).isfinite().all()


def test_a_checkpoint_of_a_frozen_layer_says_what_of_it_is_frozen() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), make("bn", 4, 2))
    other = anybatch.freeze(copy.deepcopy(net), affine=True)
    other.load_state_dict(anybatch.freeze(net).state_dict())
    assert (other[1].frozen, other[1].affine_frozen) == (True, False)
    assert other[1].weight.requires_grad
    assert "1.frozen" not in anybatch.thaw(net).state_dict()  # it is as torch's


@pytest.mark.parametrize("way", ["freeze", "frozen"])
def test_frozen_parameters_stay_where_an_optimizer_would_move_them_on(way: str) -> None:
    """By momentum, weight decay, and gradients that were set to 0 and not to None."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    net = net if way == "frozen" else anybatch.convert(net, "bn")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

    def descend() -> None:
        net(torch.randn(4, 3, 6, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    descend()
    net = anybatch.convert(net, "frozen") if way == "frozen" else anybatch.freeze(net, affine=True)
    before = [p.detach().clone() for p in net[1].parameters()]
    for _ in range(3):
        descend()
    for parameter, old in zip(net[1].parameters(), before, strict=True):
        assert torch.equal(parameter, old)


@pytest.mark.parametrize("change", [anybatch.freeze, anybatch.thaw])
@pytest.mark.parametrize("name", ["statistics", "affine"])
def test_freezing_takes_true_or_false(change: object, name: str) -> None:
    net = nn.Sequential(make("bn", 4, 2))
    with pytest.raises(TypeError, match=f"{name}='no': give True or False"):
        change(net, **{name: "no"})  # type: ignore[operator]
    assert not net[0].frozen
