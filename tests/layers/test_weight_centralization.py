"""Weight centralization: every convolution and linear layer, nothing renamed."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch
from anybatch.backends import row_kernels_for, use_fused
from anybatch.layers.weight_centralization import (
    _centre,
    centralized_weight,
    decentralize,
    is_centralized,
)

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, bias=False), (2, 4, 7, 7)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 7)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (2, 4, 7, 7)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 7)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, output_padding=1, stride=2),
                      (2, 4, 5, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 3), (2, 4, 4, 4, 4)),
    "linear": (lambda: nn.Linear(4, 6), (2, 4)),
}  # fmt: skip


def centred(layer: nn.Module) -> nn.Module:
    """The layer with its weights minus each output channel's mean, by a plain loop."""
    plain = copy.deepcopy(layer)
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    groups = getattr(layer, "groups", 1)
    with torch.no_grad():
        for part in plain.weight.chunk(groups) if transposed else [plain.weight]:
            for channel in part.unbind(1) if transposed else part.unbind(0):
                channel -= channel.mean()
    return plain


@pytest.mark.parametrize("kind", LAYERS)
def test_the_output_is_that_of_centred_weights(kind: str) -> None:
    build, shape = LAYERS[kind]
    layer = build().double()
    expected, x = centred(layer), torch.randn(shape, dtype=torch.float64)
    keys, parameters = list(layer.state_dict()), list(layer.parameters())
    wrapped = anybatch.weight_centralization(layer)
    assert wrapped is layer
    assert is_centralized(layer)
    assert torch.allclose(layer(x), expected(x), atol=1e-12)
    assert list(layer.state_dict()) == [*keys, "centralized"]
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    assert anybatch.weight_centralization(layer) is layer  # once is enough
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_pass_the_subtraction(kind: str) -> None:
    build, shape = LAYERS[kind]
    layer = anybatch.weight_centralization(build().double())
    x, weight = torch.randn(shape, dtype=torch.float64), layer.weight

    def run(w: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"weight": w}, (x,))

    assert torch.autograd.gradcheck(run, (weight,))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "arrange",
    [
        lambda w: w,
        lambda w: w.to(memory_format=torch.channels_last),
        lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
        lambda w: torch.stack([w, w], -1)[..., 0],
        lambda w: w[:0],
    ],
    ids=["contiguous", "channels last", "transposed", "strided", "empty"],
)
def test_compiled_loops_centre_what_is_dense(
    arrange: Callable[[Tensor], Tensor], dtype: torch.dtype, threads: int
) -> None:
    pytest.importorskip("numba")
    weight = arrange(torch.randn(37, 48, 5, 5, dtype=dtype) + 3).requires_grad_()
    assert (row_kernels_for(weight) is not None) == (
        weight.numel() > 0
        and (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last))
    )
    dy, found = torch.randn_like(weight), []
    torch.set_num_threads(threads)
    try:
        for choice in ("auto", "never"):
            use_fused(choice)
            y = _centre(weight, (1, 2, 3))
            found.append((y, *torch.autograd.grad(y, weight, dy)))
    finally:
        use_fused("auto")
        torch.set_num_threads(1)
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("kind", LAYERS)
def test_decentralizing_writes_the_weights_and_keeps_the_output(kind: str) -> None:
    build, shape = LAYERS[kind]
    layer, x = anybatch.weight_centralization(build()), torch.randn(shape)
    before, weights = layer(x), centralized_weight(layer)
    plain = decentralize(layer)
    assert type(plain).__module__.startswith("torch.")
    assert torch.equal(plain.weight, weights)
    assert torch.allclose(plain(x), before, atol=1e-6)


def test_layers_that_cannot_be_centred_are_refused_by_name() -> None:
    class Own(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv2d(x, self.weight * 2)

    with pytest.raises(TypeError, match="module=Own: give one of Conv1d"):
        anybatch.weight_centralization(Own(3, 3, 3))
    with pytest.raises(TypeError, match="module=ReLU"):
        anybatch.weight_centralization(nn.ReLU())
    with pytest.raises(ValueError, match="leaves nothing"):
        anybatch.weight_centralization(nn.Conv2d(4, 4, 1, groups=4))
