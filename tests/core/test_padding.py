"""Padding of sequences, end to end: valid positions are those of the examples without padding."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
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
    lengths = torch.tensor([9, 2])
    with (
        anybatch.masked(model, lengths=lengths),
        pytest.raises(ValueError, match="up to 9: the input has 8"),
    ):
        model(torch.randn(2, 3, 8, dtype=torch.float64))
