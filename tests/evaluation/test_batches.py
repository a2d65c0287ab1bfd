"""Any loader is read, and a borrowed network comes back as it was."""

import random
from collections import UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from anybatch import diagnose
from anybatch.evaluation.batches import (
    check_repeatable,
    examples_in,
    logits_of,
    reading,
    recut,
    run,
    target_of,
    to_device,
)
from anybatch.evaluation.recalibration import recalibrate
from anybatch.evaluation.restore_model import borrowed
from anybatch.layers import MomentumBatchNorm1d, MovingAverageBatchNorm1d

Pair = namedtuple("Pair", "x y")


class TakesNames(nn.Module):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x * scale


# --- loaders -------------------------------------------------------------------


def test_a_data_loader_is_read_whole() -> None:
    data = DataLoader(TensorDataset(torch.arange(7.0)), batch_size=3)
    with reading(data, progress=False) as batches:
        assert [len(batch[0]) for batch in batches] == [3, 3, 1]


def test_reading_stops_and_asks_for_no_batch_more() -> None:
    source = iter(range(9))
    with reading(source, max_batches=2) as batches:
        assert list(batches) == [0, 1]
    assert next(source) == 2


@pytest.mark.parametrize("total", [[torch.ones(1)], iter([torch.ones(1)])], ids=["list", "stream"])
def test_progress_is_shown_where_it_is_wanted(total: object, capsys: pytest.CaptureFixture) -> None:
    with reading(total, progress=True, title="looking") as batches:
        list(batches)
    assert "looking" in capsys.readouterr().err


def test_no_progress_without_a_terminal(capsys: pytest.CaptureFixture) -> None:
    with reading([1]) as batches:
        list(batches)
    assert capsys.readouterr().err == ""


def test_no_progress_is_shown_without_rich(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    with reading([1, 2], progress=True) as batches:
        assert list(batches) == [1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("loader", [[], iter([]), DataLoader([1], batch_size=2, drop_last=True)])
def test_an_empty_loader_says_so(loader: object) -> None:
    with reading(loader) as batches, pytest.raises(ValueError, match="gave no batch"):
        list(batches)


def test_what_does_not_iterate_is_refused() -> None:
    with pytest.raises(TypeError, match="loader=3"), reading(3):
        pass


@pytest.mark.parametrize("wrong", [0, -1])
def test_max_batches_is_a_count(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"max_batches={wrong}"), reading([1], max_batches=wrong):
        pass


def test_a_loader_that_is_read_once_is_refused_where_it_is_read_again() -> None:
    check_repeatable([1], "2 passes are needed")
    with pytest.raises(ValueError, match="it can be read once, and 2 passes are needed"):
        check_repeatable(iter([1]), "2 passes are needed")


# --- batches -------------------------------------------------------------------

X = torch.ones(3, 2)


@pytest.mark.parametrize(
    "batch",
    [X, (X,), [X, 1], (X, 1, 2), Pair(X, 1), {"x": X, "labels": 1}, ({"x": X}, 1), ((X,), 1)],
    ids=str,
)
def test_any_batch_reaches_the_network(batch: object) -> None:
    assert torch.equal(run(TakesNames(), batch), X)
    assert examples_in(batch) == 3


def test_positional_and_keyword_arguments_reach_the_network() -> None:
    assert torch.equal(run(TakesNames(), ((X, 2.0), None)), 2 * X)
    assert torch.equal(run(TakesNames(), {"x": X, "scale": 3.0, "name": "a"}), 3 * X)


def test_a_forward_of_ones_own_takes_any_batch() -> None:
    assert run(TakesNames(), "abc", forward=lambda model, batch: model(len(batch))) == 3


def test_what_a_network_cannot_take_is_refused() -> None:
    with pytest.raises(TypeError, match="batch of type str"):
        run(TakesNames(), "abc")
    with pytest.raises(ValueError, match="mapping of image.*takes scale, x"):
        run(TakesNames(), {"image": X})


def test_targets_of_a_batch_are_found() -> None:
    assert target_of((X, 5, 6)) == 5
    assert target_of({"x": X, "labels": 4}) == 4
    for without in (X, (X,), (X, None), {"x": X}, {"x": X, "labels": None}):
        with pytest.raises(ValueError, match="has no target"):
            target_of(without)
    assert target_of({"labels": None, "targets": 4}) == 4


def test_scores_of_an_output_are_found() -> None:
    for output in (X, (X, 1), {"logits": X}, type("Output", (), {"logits": X})()):
        assert logits_of(output) is X
    with pytest.raises(TypeError, match="gave a mapping of loss"):
        logits_of({"loss": X})


def test_batches_keep_their_kind_on_the_way_to_a_device() -> None:
    for batch in (X, (X, "a"), [X], Pair(X, 1), {"x": X}, UserDict(x=X), "text", None):
        moved = to_device(batch, "meta")
        assert type(moved) is type(batch)
    assert to_device(Pair(X, {"z": [X]}), "meta").y["z"][0].is_meta
    assert to_device(X, None) is X


# --- borrowing -----------------------------------------------------------------


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        MovingAverageBatchNorm1d(6, warmup_steps=0),
        nn.Dropout(),
        MomentumBatchNorm1d(6),
    )


def everything(model: nn.Module) -> dict[str, object]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {f"{name} training": m.training for name, m in model.named_modules()}
    hooks = {f"{name} hooks": list(m._forward_hooks) for name, m in model.named_modules()}
    plain = {f"{name} {k}": v for name, m in model.named_modules() for k, v in vars(m).items()
             if isinstance(v, (int, float, str))}  # fmt: skip
    return {**state, **flags, **hooks, **plain}


def same(one: dict[str, object], other: dict[str, object]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) if isinstance(one[k], torch.Tensor) else one[k] == other[k]
        for k in one
    )


@pytest.mark.parametrize("fails", [False, True])
def test_a_borrowed_network_comes_back_as_it_was(fails: bool) -> None:
    model = network()
    model[1].eval()
    kept = model[0].register_forward_hook(lambda *_: None)
    for _ in range(3):
        model(torch.randn(8, 4))
    before, buffers = everything(model), list(model.buffers())
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    try:
        with borrowed(model, training=True) as inner:
            assert inner is model
            assert model[1].training
            model[3].register_forward_hook(lambda *_: None)
            kept.remove()
            model[1].momentum = model[2].momentum = 0.5
            model[2].example_weight = 0.5
            model[2].extra = 1
            model[4]._buffers["running_mean"] = torch.zeros(6)
            model.register_buffer("new", torch.ones(1))
            for _ in range(3):
                model(torch.randn(8, 4))
            random.random()
            np.random.rand()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert same(before, everything(model))
    assert all(a is b for a, b in zip(buffers, model.buffers(), strict=True))
    assert torch.equal(numbers[0], torch.get_rng_state())
    assert numbers[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert not hasattr(model[2], "extra")
    kept.remove()
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("size", [2, 5, 6])
def test_what_examples_have_beside_tensors_is_cut_and_joined_with_them(size: int) -> None:
    """Names as the default collation gives them; a height and a width stay as they are."""
    number, batches = 0, []
    for count in (4, 4, 4, 3, 2):
        numbers = list(range(number, number + count))
        number += count
        names = [f"{one}.png" for one in numbers]
        x = torch.tensor(numbers).float().view(-1, 1)
        batches.append({"x": x, "name": names, "more": (names, x), "size": (3, 4)})
    found = list(recut(batches, size))
    assert [len(batch["x"]) for batch in found] == [size] * (17 // size)
    for batch in found:
        names = [f"{int(one)}.png" for one in batch["x"]]
        assert batch["name"] == names
        assert batch["more"][0] == names
        assert batch["size"] == (3, 4)


class Detector(nn.Module):
    """Takes what torchvision's detectors take, and gives what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        assert isinstance(images, list)
        size = [max(image.shape[dim] for image in images) for dim in (1, 2)]
        padded = [
            F.pad(image, (0, size[1] - image.shape[2], 0, size[0] - image.shape[1]))
            for image in images
        ]
        found = self.body(torch.stack(padded)).mean((1, 2, 3))
        if not self.training:
            return [{"scores": one} for one in found]
        assert targets is not None
        boxes = torch.stack([target["boxes"].sum() for target in targets])
        return {"loss_boxes": (found - boxes).square().mean(), "loss_scores": found.mean()}


def detections(count: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(3, 16 + number, 20, generator=generator),
            {"boxes": torch.full((number + 1, 4), 0.01), "name": f"{number}"},
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_lists_of_images_are_cut_and_joined_by_image(size: int, kind: type) -> None:
    every = detections(6)
    loader = [kind(map(kind, zip(*every[at : at + 2], strict=True))) for at in (0, 2, 4)]
    assert [examples_in(batch) for batch in loader] == [2, 2, 2]
    cut = list(recut(loader, size))
    assert [len(entry) for batch in cut for entry in batch] == [size] * (2 * 6 // size)
    assert all(type(batch) is kind for batch in cut)
    images = [image for batch in cut for image in batch[0]]
    names = [target["name"] for batch in cut for target in batch[1]]
    assert names == [target["name"] for _, target in every]
    assert all(one is other for one, (other, _) in zip(images, every, strict=True))


def test_what_stands_behind_lists_of_images_is_cut_as_in_other_batches() -> None:
    images, targets = zip(*detections(4), strict=True)
    loader = [
        (
            images[at : at + 2],
            targets[at : at + 2],
            torch.arange(at, at + 2),
            ["a", "b"],
            {"size": 3},
        )
        for at in (0, 2)
    ]
    for size in (1, 3, 4):
        cut = list(recut(loader, size))
        assert all(isinstance(batch[2], Tensor) and batch[4] == {"size": 3} for batch in cut)
        numbers = torch.cat([batch[2] for batch in cut])
        assert torch.equal(numbers, torch.arange(size * (4 // size)))
        names = [name for batch in cut for name in batch[3]]
        assert names == ["a", "b", "a", "b"][: len(numbers)]
        assert [len(batch[0]) for batch in cut] == [len(batch[1]) for batch in cut]


def annotated(count: int) -> list[dict[str, Tensor]]:
    """Images with their boxes, of which each has another number."""
    return [
        {"image": torch.randn(3, 8, 9), "boxes": torch.rand(i % 3 + 1, 4)} for i in range(count)
    ]


@pytest.mark.parametrize("per_batch", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", ["listed", "images beside targets"])
def test_an_entry_of_an_example_stays_whole(kind: str, size: int, per_batch: int) -> None:
    """Lists of mappings as detectron2 and MONAI have them, and as DETR's targets."""
    every = annotated(8)
    parts = [every[at : at + per_batch] for at in range(0, 8, per_batch)]

    def loaded(part: list[dict[str, Tensor]]) -> object:
        if kind == "listed":
            return part
        images = torch.stack([one["image"] for one in part])
        return images, [{"boxes": one["boxes"]} for one in part]

    loader = [loaded(part) for part in parts]
    assert [examples_in(batch) for batch in loader] == [per_batch] * len(parts)
    cut = list(recut(loader, size))
    assert [examples_in(batch) for batch in cut] == [size] * (8 // size)
    number = 0
    for batch in cut:
        if kind == "listed":
            found = [(one["image"], one["boxes"]) for one in batch]
        else:
            found = [(x, one["boxes"]) for x, one in zip(*batch, strict=True)]
        for image, boxes in found:
            assert torch.equal(image, every[number]["image"])
            assert torch.equal(boxes, every[number]["boxes"])
            number += 1


def test_a_list_of_examples_is_the_argument_of_a_network() -> None:
    class Detectron(nn.Module):
        def forward(self, inputs: list[dict[str, Tensor]]) -> Tensor:
            return torch.stack([one["image"] for one in inputs])

    assert run(Detectron(), annotated(2)).shape == (2, 3, 8, 9)
    with pytest.raises(ValueError, match="no target"):
        target_of(annotated(2))
    pair = [{"x": torch.zeros(5, 2)}, {"labels": torch.zeros(5)}]  # inputs and targets
    assert examples_in(pair) == 5
    assert target_of(pair) is pair[1]
    assert examples_in(({"x": torch.zeros(5, 2)}, {"x": torch.zeros(5)})) == 5


def test_a_detector_is_diagnosed_and_recalibrated_with_its_own_loader() -> None:
    torch.manual_seed(0)
    model, data = Detector(), detections(8)
    loader = DataLoader(data, 4, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))
    found = diagnose(model, loader, batch_size=1)
    assert (found.batch_size, found.batches) == (1, 8)
    losses = [sum(model([image], [target]).values()).item() for image, target in data]
    assert found.train_loss == pytest.approx(sum(losses) / 8, rel=1e-5)
    assert not found.notes[:-1]  # the loss is known
    assert recalibrate(model, loader).examples == 8
