"""Padding of sequences, end to end: valid positions are those of the examples without padding."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import (
    Wav2Vec2ConformerConvolutionModule,
    Wav2Vec2ConformerEncoder,
)

import anybatch

LENGTHS = [17, 12, 9, 24]


class Chomp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :-4]


class Unet(nn.Module):
    """One level; the way up is shorter than the way down where a length is odd."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU())
        self.pool = nn.MaxPool1d(2)
        self.middle = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU())
        self.up = nn.ConvTranspose1d(8, 8, 2, stride=2)
        self.last = nn.Sequential(nn.Conv1d(16, 4, 3, padding=1), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        x = self.up(self.middle(self.pool(skip)))
        return self.last(torch.cat([skip, F.pad(x, (0, skip.shape[2] - x.shape[2]))], 1))


def strided() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 8, 5, stride=2), nn.BatchNorm1d(8), nn.ReLU(),
        nn.Conv1d(8, 8, 3, stride=2, padding=1), nn.BatchNorm1d(8), nn.ReLU(),
        nn.MaxPool1d(3, 2, padding=1), nn.Conv1d(8, 4, 1), nn.BatchNorm1d(4),
    )  # fmt: skip


def temporal() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 8, 3, padding=4, dilation=2), Chomp(), nn.BatchNorm1d(8), nn.ReLU(),
        nn.Conv1d(8, 4, 3, padding="same"), nn.BatchNorm1d(4), nn.Tanh(),
    )  # fmt: skip


class Conformer(nn.Module):
    """The convolution module of transformers, on (N, C, L)."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.Wav2Vec2ConformerConfig(
            hidden_size=6, conv_depthwise_kernel_size=5, conformer_conv_dropout=0.0
        )
        self.inside = Wav2Vec2ConformerConvolutionModule(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(torch.cat([x, x], 1).transpose(1, 2)).transpose(1, 2)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "strided": strided,
    "temporal": temporal,
    "unet": Unet,
    "conformer": Conformer,
}


def network(name: str, method: str = "bn") -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    for _ in range(3):
        model(torch.randn(4, 3, 24, dtype=torch.float64) + 0.5)
    return anybatch.convert(model, method)


def padded(lengths: list[int], size: int, fill: float = 7.0) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    examples = [torch.randn(3, n, generator=generator, dtype=torch.float64) for n in lengths]
    batch = fill * torch.randn(len(lengths), 3, size, generator=generator, dtype=torch.float64)
    for row, example in zip(batch, examples, strict=True):
        row[:, : example.shape[1]] = example
    return examples, batch


@pytest.mark.parametrize("name", NETWORKS)
def test_evaluation_is_that_of_each_example_alone(name: str) -> None:
    model = network(name).eval()
    examples, batch = padded(LENGTHS, 26)
    with anybatch.masked(model, lengths=torch.tensor(LENGTHS), zero=True):
        found = model(batch)
    plain = model(batch)
    wrong = torch.zeros(())
    for row, other, example in zip(found, plain, examples, strict=True):
        alone = model(example[None])[0]
        torch.testing.assert_close(row[:, : alone.shape[1]], alone)
        wrong = wrong.maximum((other[:, : alone.shape[1]] - alone).detach().abs().max())
    assert wrong > 1e-3  # without it, padding is in the output


@pytest.mark.parametrize("method", anybatch.METHODS)
def test_an_example_in_evaluation_depends_neither_on_batch_mates_nor_on_padding(
    method: str,
) -> None:
    model = network("unet", method).eval()
    examples, batch = padded(LENGTHS, 26)
    for mates, size in (([0, 1, 2, 3], 26), ([1, 3], 24), ([1], 13)):
        lengths = torch.tensor([LENGTHS[k] for k in mates])
        with anybatch.masked(model, lengths=lengths, zero=True):
            found = model(batch[mates, :, :size])[mates.index(1)]
        alone = model(examples[1][None])[0]
        torch.testing.assert_close(found[:, : alone.shape[1]], alone)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", ["bn", "mabn", "brn", "mbn", "gn"])
def test_training_is_that_of_the_batch_without_padding(name: str, method: str) -> None:
    """Examples of one length, so that there is such a batch."""
    model, twin = network(name, method).train(), network(name, method).train()
    examples, batch = padded([13] * 4, 20)
    exact = torch.stack(examples)
    batch.requires_grad_()
    exact.requires_grad_()
    for _ in range(3):
        with anybatch.masked(model, lengths=torch.tensor([13] * 4), zero=True):
            found = model(batch)
            expected = twin(exact)
            torch.testing.assert_close(found[..., : expected.shape[2]], expected)
            found[..., : expected.shape[2]].square().sum().backward()
            expected.square().sum().backward()
    torch.testing.assert_close(batch.grad[..., :13], exact.grad)
    assert not batch.grad[..., 13:].any()
    ours, theirs = model.state_dict(), twin.state_dict()
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("name", NETWORKS)
def test_training_does_not_depend_on_how_much_is_padded(name: str) -> None:
    results = []
    for size, fill in ((24, 0.0), (31, -3.0)):
        model = network(name).train()
        _, batch = padded(LENGTHS, size, fill)
        mask = torch.arange(size) < torch.tensor(LENGTHS).unsqueeze(1)
        with anybatch.masked(model, mask, zero=True):
            y = model(batch)
        results.append((y[..., :1], model.state_dict()))
    torch.testing.assert_close(results[0], results[1])


def test_the_network_is_left_as_it_was() -> None:
    model = network("unet")
    with anybatch.masked(model, lengths=torch.tensor([5, 5]), zero=True):
        model(padded([5, 5], 8)[1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(m.mask is None for m in model.modules() if hasattr(m, "mask"))


def test_a_conformer_of_transformers_reads_the_attention_mask() -> None:
    torch.manual_seed(0)
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        conv_depthwise_kernel_size=5, position_embeddings_type="relative", max_source_positions=64,
        attn_implementation="eager",
    )  # fmt: skip
    model = anybatch.convert(Wav2Vec2ConformerEncoder(config), "bn").eval()
    x, lengths = torch.randn(3, 14, 16), [14, 9, 5]
    mask = torch.arange(14) < torch.tensor(lengths).unsqueeze(1)
    with anybatch.masked(model, zero=True):
        found = model(x, attention_mask=mask).last_hidden_state
    for row, example, length in zip(found, x, lengths, strict=True):
        alone = model(example[None, :length]).last_hidden_state[0]
        torch.testing.assert_close(row[:length], alone, rtol=1e-4, atol=1e-5)


def parakeet() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ParakeetEncoderConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        num_mel_bins=16, subsampling_conv_channels=4, subsampling_factor=4, conv_kernel_size=3,
        dropout=0.0, dropout_positions=0.0, layerdrop=0.0, attention_dropout=0.0,
        activation_dropout=0.0, attn_implementation="sdpa",
    )  # fmt: skip
    return anybatch.convert(transformers.ParakeetEncoder(config).double(), "bn")


@pytest.mark.parametrize("size", [30, 37])
def test_a_parakeet_encoder_sees_no_padding_behind_its_subsampling(size: int) -> None:
    """The sequence is halved twice by convolutions of two dimensions."""
    model, lengths = parakeet().eval(), [30, 19, 9]
    x = torch.randn(3, size, 16, dtype=torch.float64)
    mask = torch.arange(size) < torch.tensor(lengths).unsqueeze(1)
    with anybatch.masked(model, zero=True):
        found = model(x, attention_mask=mask).last_hidden_state
    plain = model(x, attention_mask=mask).last_hidden_state
    wrong = torch.zeros(())
    for row, other, example, length in zip(found, plain, x, lengths, strict=True):
        alone = model(example[None, :length], attention_mask=torch.ones(1, length).bool())
        expected = alone.last_hidden_state[0]
        torch.testing.assert_close(row[: len(expected)], expected)
        wrong = wrong.maximum((other[: len(expected)] - expected).detach().abs().max())
    assert wrong > 1e-4  # features behind the end reach the first convolution


def test_lengths_are_followed_through_a_subsampling_of_two_dimensions() -> None:
    model, lengths = parakeet().eval(), torch.tensor([37, 19, 9])
    x = torch.randn(3, 37, 16, dtype=torch.float64)
    mask = torch.arange(37) < lengths.unsqueeze(1)
    with anybatch.masked(model, zero=True):
        expected = model(x, attention_mask=mask).last_hidden_state
    with anybatch.masked(model, lengths=lengths, zero=True):
        found = model(x, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found, expected)


class Spectrogram(nn.Module):
    """A strided block with a shortcut: two convolutions and two norms of the same maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.one = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8))
        self.other = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.one(x) + self.other(x)


@pytest.mark.parametrize("bins", [10, 16, 20, 40, 80, 160])
@pytest.mark.parametrize("dim", [2, 3])
def test_the_sequence_of_two_dimensions_stays_the_same(bins: int, dim: int) -> None:
    model = anybatch.convert(Spectrogram(), "bn").double()
    model(torch.randn(4, 1, 32, 32, dtype=torch.float64))
    model.eval()
    x, lengths = torch.randn(2, 1, bins, 40, dtype=torch.float64), torch.tensor([40, 22])
    alone = model(x[1:, ..., :22])[0]
    x, alone = (x, alone) if dim == 3 else (x.transpose(2, 3), None)
    how = {"dim": dim} if bins == 40 else {}
    with anybatch.masked(model, lengths=lengths, zero=True, **how):
        found = model(x)
    if alone is None:
        alone = model(x[1:, :, :22])[0]
        torch.testing.assert_close(found[1, :, : alone.shape[1]], alone)
    else:
        torch.testing.assert_close(found[1, ..., : alone.shape[2]], alone)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((2, 1, 40, 40), "may run along either dimension"), ((2, 1, 12, 44), "has so many positions")],
)
def test_a_sequence_that_two_dimensions_or_none_could_be_is_asked_for(
    shape: tuple[int, ...], words: str
) -> None:
    model, lengths = anybatch.convert(Spectrogram(), "bn"), torch.tensor([40, 22])
    with (
        anybatch.masked(model, lengths=lengths),
        pytest.raises(ValueError, match=rf"{words}.*dim=3"),
    ):
        model(torch.randn(shape))
    with anybatch.masked(model, lengths=lengths, dim=3):
        expected = model(torch.ones(shape))
    with anybatch.masked(model, lengths=lengths):
        model(torch.randn(2, 1, 12, 40))
        torch.testing.assert_close(model(torch.ones(shape)), expected)  # as the input before


POOLS = [
    *(nn.AvgPool1d(3, 2, 1, count_include_pad=counted) for counted in (True, False)),
    *(nn.AvgPool1d(3, 2, 1, ceil_mode=True, count_include_pad=one) for one in (True, False)),
    *(nn.AvgPool1d(2, 3, ceil_mode=True), nn.MaxPool1d(2, 3, ceil_mode=True)),
    nn.MaxPool1d(3, 2, 1, ceil_mode=True),
]


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("size", [9, 10, 11])
def test_pools_of_a_padded_example_are_those_of_it_alone(pool: nn.Module, size: int) -> None:
    layers = (nn.Conv1d(3, 4, 3, padding=1), copy.deepcopy(pool), nn.BatchNorm1d(4))
    model = anybatch.convert(nn.Sequential(*layers), "bn").eval()
    for length in range(3, size + 1):
        x = torch.randn(2, 3, size)
        with anybatch.masked(model, lengths=torch.tensor([size, length]), zero=True):
            found = model(x)
        alone = model(x[1:, :, :length])[0]
        torch.testing.assert_close(found[1, :, : alone.shape[1]], alone)
        assert found.abs().max() < 100


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_that_repeats_the_end_is_refused(mode: str) -> None:
    conv = nn.Conv1d(3, 4, 3, padding=1, padding_mode=mode)
    model, lengths = nn.Sequential(conv, anybatch.BatchNorm1d(4)), torch.tensor([5, 3])
    with (
        pytest.raises(ValueError, match=f"'0' pads with '{mode}'"),
        anybatch.masked(model, lengths=lengths, zero=True),
    ):
        pass
    with anybatch.masked(model, lengths=lengths):
        model(torch.randn(2, 3, 5))


def test_what_is_refused_leaves_the_compiler_on() -> None:
    conv = nn.Conv1d(3, 4, 3, padding=1, padding_mode="reflect")
    model, lengths = nn.Sequential(conv, anybatch.BatchNorm1d(4)), torch.tensor([5, 3])
    with pytest.raises(ValueError, match="pads with"):
        anybatch.masked(model, lengths=lengths, zero=True).__enter__()
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")
    torch.compile(torch.sin, backend=graphs)(torch.ones(2))
    assert graphs.frame_count == 1


@pytest.mark.parametrize("size", [None, 4])
def test_virtual_examples_are_as_long_as_the_input(size: int | None) -> None:
    layers = (nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3, padding=1))
    model = anybatch.convert(nn.Sequential(*layers), "vdn", norm_batch_size=size)
    model = anybatch.VirtualDataset(model, 0.0, 1.0, num_virtual=2)
    before, lengths = copy.deepcopy(model.state_dict()), torch.tensor([8, 3, 4])
    x = torch.randn(3, 3, 8)
    found = []
    for padding in (0.0, 100.0):
        model.load_state_dict(before)
        x[1, :, 3:] = x[2, :, 4:] = padding
        with anybatch.masked(model, lengths=lengths, zero=True):
            found.append(model(x))
    assert torch.equal(found[0][1, :, :3], found[1][1, :, :3])
    assert torch.equal(found[0][0], found[1][0])


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("first", ["masked", "plain"])
def test_a_compiled_network_follows_lengths(first: str, zero: bool) -> None:
    layers = (nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3, padding=1))
    model = anybatch.convert(nn.Sequential(*layers), "bn").requires_grad_(False)
    model[1].momentum = 0.0
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x, lengths = torch.randn(4, 3, 8), torch.tensor([8, 2, 3, 1])
    if first == "plain":
        compiled(x)
    with anybatch.masked(model, lengths=lengths, zero=zero):
        found, expected = compiled(x), model(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(found, compiled(x))


def test_a_parakeet_encoder_trains_as_without_padding() -> None:
    """Examples of one length: the batch with padding and the one without have equal statistics."""
    model = parakeet()
    other = copy.deepcopy(model)
    x = torch.randn(3, 37, 16, dtype=torch.float64)
    mask = (torch.arange(37) < 22).expand(3, 37)
    with anybatch.masked(model, zero=True):
        found = model(x, attention_mask=mask).last_hidden_state
    expected = other(x[:, :22], attention_mask=mask[:, :22]).last_hidden_state
    torch.testing.assert_close(found[:, : expected.shape[1]], expected)
    dy = torch.randn_like(expected)
    (found[:, : expected.shape[1]] * dy).sum().backward()
    (expected * dy).sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
    torch.testing.assert_close(model.state_dict(), other.state_dict())


def test_a_wav2vec2_bert_encoder_has_no_statistics_that_padding_could_reach() -> None:
    """It has layer norms alone, and sets padding to zero itself where it has the mask."""
    torch.manual_seed(0)
    config = transformers.Wav2Vec2BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        conv_depthwise_kernel_size=5, feature_projection_input_dim=16, layerdrop=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.Wav2Vec2BertModel(config).double().eval()
    x, lengths = torch.randn(3, 14, 16, dtype=torch.float64), [14, 9, 5]
    mask = (torch.arange(14) < torch.tensor(lengths).unsqueeze(1)).long()
    plain = model(x, attention_mask=mask).last_hidden_state
    with anybatch.masked(model, zero=True):
        found = model(x, attention_mask=mask).last_hidden_state
    for row, other, example, length in zip(found, plain, x, lengths, strict=True):
        alone = model(example[None, :length], attention_mask=mask[:1, :length]).last_hidden_state[0]
        torch.testing.assert_close(row[:length], alone)
        torch.testing.assert_close(other[:length], alone)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "none given"),
        ({"mask": torch.ones(2, 4).bool(), "lengths": torch.ones(2).long()}, "both given"),
        ({"mask": torch.tensor([[0, 1], [1, 1]]), "zero": True}, "at the end of sequences"),
        ({"lengths": torch.ones(2)}, "whole numbers"),
        ({"lengths": torch.tensor([3, -1])}, "lengths from -1: give whole numbers from 0 on"),
        ({"mask": torch.tensor([3, 2])}, r"values up to 3: .* give lengths="),
        ({"lengths": torch.tensor([3, 2]), "dim": 1}, "dim=1: give 2 or 3"),
        ({"mask": torch.ones(2, 4).bool(), "dim": 2}, "dim=2: give 2 or 3, with lengths"),
    ],
)
def test_wrong_masks_and_lengths_are_refused(arguments: dict, words: str) -> None:
    model = network("temporal")
    with pytest.raises((ValueError, TypeError), match=words), anybatch.masked(model, **arguments):
        pass


def test_what_a_forward_lacks_is_named() -> None:
    model = network("temporal")
    with anybatch.masked(model, zero=True), pytest.raises(ValueError, match="attention_mask="):
        model(torch.randn(2, 3, 8, dtype=torch.float64))
    with (
        anybatch.masked(model, zero=True),
        pytest.raises(TypeError, match="attention_mask of type"),
    ):
        model(torch.randn(2, 3, 8, dtype=torch.float64), attention_mask=torch.zeros(2, 8))
    for lengths in (torch.tensor([8]), torch.tensor([8, 2, 3])):
        with (
            anybatch.masked(model, lengths=lengths),
            pytest.raises(ValueError, match=f"{len(lengths)} lengths: the input has 2 examples"),
        ):
            model(torch.randn(2, 3, 8, dtype=torch.float64))
    lengths = torch.tensor([9, 2])
    with (
        anybatch.masked(model, lengths=lengths),
        pytest.raises(ValueError, match="up to 9: the input has 8"),
    ):
        model(torch.randn(2, 3, 8, dtype=torch.float64))


@pytest.mark.parametrize("zero", [False, True])
def test_positions_in_rows_behind_a_stride_take_its_lengths(zero: bool) -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(8, 6, 3, stride=2, padding=1), nn.BatchNorm1d(6)
            self.linear, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            rows: Tensor = self.linear(self.norm(self.conv(x)).transpose(1, 2)).flatten(0, 1)
            return self.last(rows)

    torch.manual_seed(0)
    net = anybatch.convert(Strided(), "bn")
    lengths, seen = torch.tensor([17, 9, 4, 2]), []
    net.last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with anybatch.masked(net, lengths=lengths, zero=zero):
        net(torch.randn(4, 8, 17))
    valid = torch.arange(9) < torch.tensor([9, 5, 2, 1]).unsqueeze(1)
    rows = seen[0][valid.flatten()]
    torch.testing.assert_close(net.last.running_mean, 0.1 * rows.mean(0))


@pytest.mark.parametrize("between", [nn.Identity, nn.ReLU, nn.Hardswish])
@pytest.mark.parametrize("lengths", [[14, 11, 9], [14, 10, 7], [13, 5, 1]])
@pytest.mark.parametrize("method", ["bn", "gn"])
def test_a_sequence_that_returns_to_a_size_has_its_new_lengths(
    method: str, lengths: list[int], between: type[nn.Module]
) -> None:
    """An odd length loses a position where a stride of 2 is undone."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv1d(4, 4, 2, 2), nn.ConvTranspose1d(4, 8, 2, 2), between()),
        *(nn.Conv1d(8, 8, 3, padding=1), between(), nn.BatchNorm1d(8), nn.Conv1d(8, 2, 3)),
    )
    model = anybatch.convert(model, method).double().eval()
    x = torch.randn(3, 4, 14, dtype=torch.float64)
    with anybatch.masked(model, lengths=torch.tensor(lengths), zero=True):
        y = model(x)
        if method == "bn":
            model.train()(x)
    for row, n in enumerate(lengths):
        if n < 4:  # too short for a kernel of 3
            continue
        alone = model.eval()(x[row : row + 1, :, :n]) if method == "gn" else None
        if alone is not None:
            torch.testing.assert_close(y[row : row + 1, :, : alone.shape[2]], alone)
    if method == "bn":
        rows = [model[:5](x[row : row + 1, :, :n]) for row, n in enumerate(lengths) if n > 1]
        values = torch.cat([part[0].T for part in rows])
        torch.testing.assert_close(model[5].running_mean, 0.1 * values.mean(0), rtol=1e-6, atol=0)


def test_pools_of_a_padded_example_are_exact_in_float64() -> None:
    pool, x = nn.Sequential(nn.AvgPool1d(3, 2, 1)), torch.randn(2, 4, 9, dtype=torch.float64)
    with anybatch.masked(pool, lengths=torch.tensor([9, 4]), zero=True):
        y = pool(x)
    torch.testing.assert_close(y[1:, :, :2], pool(x[1:, :, :4]), rtol=1e-14, atol=1e-14)
