"""Layouts, types, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import anybatch
from anybatch.registry import METHODS, get_method
from method_cases import CENTRED, NAMES, VIRTUAL, batch, make, same, state, step

FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    wide = torch.cat([x, x], -1)
    layouts = {
        "sliced": wide[..., : x.shape[-1]],
        "transposed": x.transpose(-1, -2).contiguous().transpose(-1, -2),
        "every other": torch.stack([x, x], 1).flatten(0, 1)[::2],
        "batch last": x.movedim(0, -1).contiguous().movedim(-1, 0),
    }
    if x.dim() in (4, 5):
        layouts["channels_last"] = x.contiguous(memory_format=FORMATS[x.dim() - 2])
    return layouts


@pytest.mark.few(10)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("norm_batch_size", [None, 2])
def test_every_layout_gives_the_same(name: str, dims: int, norm_batch_size: int | None) -> None:
    x = batch(5, dims=dims)
    dy = torch.randn_like(x)
    torch.manual_seed(0)
    plain = make(name, dims=dims, norm_batch_size=norm_batch_size)
    expected = [step(plain, x, dy) for _ in range(8)]
    for label, same_x in layouts(x).items():
        torch.manual_seed(0)
        layer = make(name, dims=dims, norm_batch_size=norm_batch_size)
        for y, grad in expected:
            inner = same_x.detach().requires_grad_()
            out = layer(inner)
            out.backward(dy.transpose(-1, -2).contiguous().transpose(-1, -2))
            assert torch.allclose(out, y, atol=1e-5), label
            assert torch.allclose(inner.grad, grad, atol=1e-4), label


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_batch_size", [None, 2])
def test_channels_last_is_kept(
    name: str, dims: int, training: bool, norm_batch_size: int | None
) -> None:
    layer = make(name, dims=dims, norm_batch_size=norm_batch_size).train(training)
    x = batch(4, dims=dims).contiguous(memory_format=FORMATS[dims]).requires_grad_()
    y = layer(x)
    assert y.is_contiguous(memory_format=FORMATS[dims])
    y.backward(torch.randn_like(y))
    assert x.grad.is_contiguous(memory_format=FORMATS[dims])


@pytest.mark.parametrize("name", NAMES)
def test_an_expanded_input_gives_what_its_copy_gives(name: str) -> None:
    layer = make(name)
    y = layer(torch.randn(1, 6, 1, 3).expand(4, 6, 5, 3))
    assert y.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm_batch_size", [None, 2])
def test_output_has_the_input_type_and_state_does_not(
    name: str, dtype: torch.dtype, norm_batch_size: int | None
) -> None:
    layer = make(name, norm_batch_size=norm_batch_size)
    for _ in range(8):
        y, grad = step(layer, batch(4).to(dtype))
        assert y.dtype == grad.dtype == dtype
    assert layer.eval()(batch(2).to(dtype)).dtype == dtype
    kinds = {tensor.dtype for tensor in state(layer).values()}
    assert kinds == {torch.float32, torch.int64}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_close_to_float32(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    low = make(name)
    torch.manual_seed(0)
    full = make(name)
    for _ in range(8):
        x, dy = batch(4).to(dtype), torch.randn(4, 6, 4, 3).to(dtype)
        y, grad = step(low, x, dy)
        expected, expected_grad = step(full, x.float(), dy.float())
        error = torch.finfo(dtype).eps
        assert (y - expected).abs().max() <= 8 * error * expected.abs().max()
        assert (grad - expected_grad).abs().max() <= 16 * error * expected_grad.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_state_stays_float32_in_a_low_precision_model(name: str) -> None:
    layer = make(name)
    step(layer, batch(4))
    before = state(layer)
    for lowered in (layer.half(), layer.bfloat16(), layer.to(torch.bfloat16)):
        assert same(before, state(lowered))
    double = state(layer.double())
    assert {t.dtype for t in double.values()} == {torch.float64, torch.int64}


@pytest.mark.parametrize("name", NAMES)
def test_layers_keep_float32_statistics_under_autocast(name: str) -> None:
    net = nn.Sequential(nn.Conv2d(6, 6, 3), make(name))
    with torch.autocast("cpu", torch.bfloat16):
        y = net(torch.randn(2, 6, 5, 5))
    y.float().backward(torch.randn(2, 6, 3, 3))
    assert y.dtype == torch.bfloat16
    assert net[1].running_var.dtype == torch.float32


@pytest.mark.parametrize("name", CENTRED)
@pytest.mark.parametrize("norm_batch_size", [None, 2])
def test_a_large_mean_costs_no_more_precision_than_in_torch(
    name: str, norm_batch_size: int | None
) -> None:
    x = (torch.randn(4, 64, 8, 8, dtype=torch.float64) * 1e-2 + 1e4).float()
    options = {"num_groups": 64} if name == "bgn" else {}
    options |= {"affine": False, "norm_batch_size": norm_batch_size}
    layer, exact = make(name, 64, **options), make(name, 64, **options).double()
    layer.set_progress(1, 3), exact.set_progress(1, 3)
    error = (layer(x) - exact(x.double())).abs().mean()
    size = 2 if name in ("ghost", "bgn") else norm_batch_size or 4
    one, other = nn.BatchNorm2d(64, affine=False), nn.BatchNorm2d(64, affine=False).double()
    errors = [(one(part) - other(part.double())).abs().mean() for part in x.split(size)]
    roundings = 2.5 if "+" in name else 1.5  # of both parts' means, and of their mixture
    assert error <= roundings * torch.stack(errors).mean()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dims", "x", "error", "words"),
    [
        (2, torch.zeros(2, 5, 3, 3), ValueError, "num_features=6, the input 5 channels"),
        (2, torch.zeros(2, 6, 3), ValueError, r"takes \(N, C, H, W\)"),
        (1, torch.zeros(6), ValueError, r"takes \(N, C\) or \(N, C, L\)"),
        (1, torch.zeros(2, 6, 3, 3), ValueError, r"takes \(N, C\) or \(N, C, L\)"),
        (3, torch.zeros(2, 6, 3, 3), ValueError, r"takes \(N, C, D, H, W\)"),
        (2, torch.zeros(2, 6, 3, 3, dtype=torch.long), TypeError, r"input\.float\(\)"),
        (2, torch.zeros(2, 6, 3, 3, dtype=torch.cfloat), TypeError, "floating point"),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_wrong_input_is_named(
    name: str, dims: int, x: torch.Tensor, error: type[Exception], words: str, training: bool
) -> None:
    layer = make(name, dims=dims).train(training)
    before = state(layer)
    with pytest.raises(error, match=words):
        layer(x)
    assert same(before, state(layer))


BAD = [
    ("bn", {"num_features": 0}, "num_features=0"),
    ("bn", {"num_features": 2.5}, "num_features=2.5"),
    ("bn", {"eps": 0.0}, "eps=0.0"),
    ("bn", {"eps": -1.0}, "eps=-1.0"),
    ("bn", {"momentum": 1.5}, "momentum=1.5"),
    ("bn", {"momentum": "fast"}, "momentum='fast'"),
    ("bn", {"norm_batch_size": 0}, "norm_batch_size=0"),
    ("bn", {"norm_batch_size": True}, "norm_batch_size=True"),
    ("bn", {"example_weight": 1.1}, "example_weight=1.1"),
    ("bn", {"example_weight": -0.1}, "example_weight=-0.1"),
    ("mbn", {"batch_size": 0}, "batch_size=0"),
    ("mbn", {"ideal_batch_size": -3}, "ideal_batch_size=-3"),
    ("mbn", {"ideal_decay": 2.0}, "ideal_decay=2.0"),
    ("mbn", {"momentum": "soft"}, "momentum='soft'"),
    ("mbn", {"track_running_stats": False}, "track_running_stats=False"),
    ("mabn", {"window": 0}, "window=0"),
    ("mabn", {"clip": 0.5}, "clip=0.5"),
    ("mabn", {"warmup_steps": -1}, "warmup_steps=-1"),
    ("mabn", {"renorm_warmup_steps": 1.5}, "renorm_warmup_steps=1.5"),
    ("mabn", {"forward_stats": "emma"}, "forward_stats='emma'"),
    ("mabn", {"backward_stats": None}, "backward_stats=None"),
    ("mabn", {"track_running_stats": False}, "track_running_stats=False"),
    ("brn", {"max_r": 0.5}, "max_r=0.5"),
    ("brn", {"max_d": -1.0}, "max_d=-1.0"),
    ("brn", {"warmup_steps": -5}, "warmup_steps=-5"),
    ("brn", {"track_running_stats": False}, "track_running_stats=False"),
    ("ghost", {"ghost_size": 0}, "ghost_size=0"),
    ("bgn", {"num_groups": 4}, "num_groups=4 does not divide num_features=6"),
    ("bgn", {"num_groups": 0}, "num_groups=0"),
    ("bgn", {"examples_per_group": 0}, "examples_per_group=0"),
    ("bs", {"sample": "bach"}, "sample='bach'"),
    ("bs", {"ratio": 0.0}, "ratio=0"),
    ("bs", {"ratio": 1.5}, "ratio=1.5"),
    ("bs", {"size": 0}, "size=0"),
    ("bs", {"size": (2, 2)}, "size=(2, 2)"),
    ("fs", {"sample": "feature", "size": (2,)}, "size=(2,)"),
    ("fs", {"sample": "feature", "size": (2, 0)}, "size=0"),
    ("bs", {"seed": -1}, "seed=-1"),
    ("bs", {"seed": 0.5}, "seed=0.5"),
    ("bs", {"seed": 1, "generator": torch.Generator()}, "seed=1 and a generator"),
    ("vdn", {"num_virtual": 0}, "num_virtual=0"),
    ("vdn", {"mix": 1.5}, "mix=1.5"),
]


@pytest.mark.parametrize(("name", "arguments", "words"), BAD)
def test_a_bad_argument_is_named_with_its_value(
    name: str, arguments: dict[str, object], words: str
) -> None:
    arguments = {"num_features": 6, **({"num_groups": 3} if name == "bgn" else {}), **arguments}
    with pytest.raises((ValueError, TypeError)) as error:
        METHODS[name].layer(2)(**arguments)
    assert words in str(error.value)
    assert any(hint in str(error.value) for hint in ("give", "leave"))


def test_an_unknown_method_gets_the_close_one() -> None:
    with pytest.raises(ValueError, match="did you mean 'mabn'"):
        get_method("mabm")


def test_an_unknown_option_gets_those_there_are() -> None:
    with pytest.raises(
        TypeError, match=r"windows=3: mabn has no such option; did you mean .window"
    ):
        METHODS["mabn"].build(6, 2, windows=3)


@pytest.mark.parametrize("name", list(METHODS))
def test_the_table_builds_every_method_in_every_dimension(name: str) -> None:
    for dims in (1, 2, 3):
        options = {"bgn": {"num_groups": 4}, "cbn": {"order": 0}}.get(name, {})
        options = {"num_virtual": 1} if name in VIRTUAL else options
        layer = METHODS[name].build(8, dims, **options)
        shape = (3, 8, *(4,) * dims)
        assert layer(torch.randn(shape)).shape == shape


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("mabn", "cbn")])
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 6),
    c=st.integers(1, 5),
    h=st.integers(1, 4),
    scale=st.floats(0.1, 10),
    shift=st.floats(-5, 5),
)
def test_shift_and_scale_of_the_input_do_not_matter(
    name: str, n: int, c: int, h: int, scale: float, shift: float
) -> None:
    options = {"num_groups": c} if name == "bgn" else {}
    options = {"num_virtual": 1} if name in VIRTUAL else options
    layer = METHODS[name].build(c, 2, eps=1e-12, **options).double()
    x = torch.randn(n, c, h, 3, dtype=torch.float64)
    assert torch.allclose(layer(x), layer(x * scale + shift), atol=1e-5)


@pytest.mark.parametrize("name", ["bn", "mbn", "mabn", "brn"])
@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 6), c=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_order_of_examples_does_not_matter(name: str, n: int, c: int, seed: int) -> None:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    x = torch.randn(n, c, 2, 2, dtype=torch.float64)
    first, second = (METHODS[name].build(c, 2).double() for _ in range(2))
    assert torch.allclose(first(x)[order], second(x[order]), atol=1e-10)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"eps": "a"}, "eps='a'"), ({"outlier_limit": "a"}, "outlier_limit='a'")],
    ids=str,
)
def test_words_in_the_place_of_numbers_are_named(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make("bn", **settings)


def test_what_is_no_optimizer_or_mean_is_named() -> None:
    with pytest.raises(TypeError, match="optimizer='x': give a torch"):
        anybatch.accumulate(make("bn"), optimizer="x")
    for mean, std in ((None, 1.0), ("x", 1.0)):
        with pytest.raises(TypeError, match="mean="):
            anybatch.VirtualDataset(nn.Identity(), mean, std)
