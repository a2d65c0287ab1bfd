"""Detection: its data, boxes, networks and numbers, and tables of it."""

import json
import random
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import reference
from anybatch.cli import app as library
from anybatch.core.norm_layer import NormLayer
from anybatch.tools import networks
from anybatch.tools.data import Dataset, load
from anybatch.tools.objective import objective
from anybatch.tools.processes import OnProgress, Work
from anybatch.tools.training import prepare, step, train
from interrupted import train_stopped_after_each_epoch
from papers.cli import app
from papers.datasets import coco
from papers.networks import boxes
from papers.networks import one_stage as detectors
from papers.networks.one_stage import Detections, OneStage, Places, Targets
from papers.networks.two_stage import TwoStage
from papers.paper_run import PaperRun
from papers.reproduction import spec as reproduction
from papers.reproduction.make import placed
from papers.reproduction.spec import chosen, tasks
from papers.reproduction.store import Store
from papers.tasks import detection
from papers.tasks.average_precision import NUMBERS, average_precision
from papers.tasks.detector_norms import FrozenBatchNorm2d

pytest.importorskip("pycocotools")
# Of pycocotools, where it decodes masks under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
WIDE, HIGH = 96, 64
COLOURS = {7: (220, 40, 40), 3: (40, 60, 220)}  # by number of the category
SETTINGS = {"data": "coco", "model": "onestage", "image_size": WIDE, "batch_size": 4}
METHODS = ("torch", "frozen", "bn", "mabn", "mbn", "cbn", "brn", "bgn", "gn")


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anybatch.backends.choice.selected", "never")


def scene(seed: int) -> tuple[np.ndarray, list[tuple[int, list[float]]]]:
    """Two rectangles of a colour a category on grey, which do not meet."""
    generator = np.random.default_rng(seed)
    image = generator.normal(128, 8, (HIGH, WIDE, 3))
    found = []
    for half, category in enumerate(generator.permutation(list(COLOURS))):
        wide, high = generator.integers(14, 30, 2)
        left = int(half * WIDE // 2 + generator.integers(0, WIDE // 2 - wide))
        top = int(generator.integers(0, HIGH - high))
        image[top : top + high, left : left + wide] = COLOURS[int(category)]
        found.append((int(category), [left, top, int(wide), int(high)]))
    return image.clip(0, 255).astype(np.uint8), found


def listed(first: int, count: int) -> dict:
    images, annotations = [], []
    for k in range(count):
        images.append({"id": 5 * k, "file_name": f"{k:03d}.png", "width": WIDE, "height": HIGH})
        for category, (x, y, w, h) in scene(first + k)[1]:
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            one = {"id": len(annotations), "image_id": 5 * k, "category_id": category}
            one |= {"bbox": [x, y, w, h], "iscrowd": 0, "area": w * h, "segmentation": outline}
            annotations.append(one)
    categories = [{"id": k, "name": str(k)} for k in COLOURS]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(
    root: Path, lists: str = "{}.json", places: str = "{}", held_out: str = "test", train: int = 12
) -> Path:
    for first, part, count in ((0, "train", train), (100, held_out, 5)):
        folder = root / places.format(part)
        folder.mkdir(parents=True, exist_ok=True)
        (root / lists.format(part)).parent.mkdir(parents=True, exist_ok=True)
        (root / lists.format(part)).write_text(json.dumps(listed(first, count)))
        for k in range(count):
            Image.fromarray(scene(first + k)[0]).save(folder / f"{k:03d}.png")
    return root


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("scenes") / "cells")


@pytest.fixture
def data(scenes: Path) -> Dataset:
    return load(PaperRun(root=str(scenes), **SETTINGS))


# --- data --------------------------------------------------------------------------


def test_folders_and_zip_files_of_all_layouts_hold_the_same(tmp_path: Path, scenes: Path) -> None:
    official = write(
        tmp_path / "coco", "annotations/instances_{}2017.json", "{}2017", held_out="val"
    )
    plain = load(PaperRun(root=str(scenes), **SETTINGS))
    assert (plain.shape, plain.classes, plain.name) == ((3, HIGH, WIDE), 2, "cells")
    assert (plain.train_y.shape, plain.test_y.shape) == ((12, 2, 6), (5, 2, 6))
    roots = (official, zipped(scenes, tmp_path / "a.zip"), zipped(official, tmp_path / "b.zip"))
    for root in roots:
        other = load(PaperRun(root=str(root), **SETTINGS))
        assert torch.equal(plain.train_y, other.train_y)
        assert torch.equal(plain.test_y, other.test_y)
        assert torch.equal(plain.train_x.read(), other.train_x.read())
        assert torch.equal(plain.test_x.read(), other.test_x.read())
        assert torch.equal(plain.test_x.masks(), other.test_x.masks())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "b.zip", "coco"]


@pytest.mark.parametrize("side", [WIDE, 48, 70, 200])
def test_boxes_are_where_the_colours_are(scenes: Path, side: int) -> None:
    """In the resized and filled image, each box holds its colour and nothing around it does."""
    made = load(PaperRun(root=str(scenes), **{**SETTINGS, "image_size": side}))
    x, masks = made.train_x.read(), made.train_x.masks()
    assert x.shape[2] % 32 == x.shape[3] % 32 == 0
    wide, high = coco.resized((WIDE, HIGH), side)
    assert not x[:, :, high:].any()
    assert not x[:, :, :, wide:].any()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    for image, rows, own in zip(x, made.train_y, masks, strict=True):
        pixels = (image * std + mean)[:, :high, :wide]
        redness = pixels[0] - pixels[2]
        for (label, *sides, crowd), mask in zip(rows.tolist(), own, strict=True):
            marked = redness > 0.4 if label == 1 else redness < -0.4  # 3 comes before 7
            where = marked.nonzero()
            low, high_ = where.min(0).values, where.max(0).values + 1
            seen = [float(v) for v in (low[1], low[0], high_[1], high_[0])]
            assert crowd == 0
            assert seen == pytest.approx(sides, abs=1.5)
            assert (mask[:high, :wide] ^ marked).float().mean() < 0.03


def test_boxes_are_cut_and_images_without_any_are_left_out(tmp_path: Path) -> None:
    root = write(tmp_path / "cells")
    lists = listed(0, 12)
    first, second, third = lists["annotations"][:3]
    first["bbox"] = [-10, -5, 30, 25]
    second["bbox"] = [WIDE - 4, 0, 50, 2 * HIGH]
    third["bbox"] = [WIDE + 2, 3, 10, 10]  # outside: its image keeps the other one
    lists["annotations"][3]["iscrowd"] = 1  # a crowd is nothing to learn
    lists["annotations"] = [a for a in lists["annotations"] if a["image_id"] != 10]
    (root / "train.json").write_text(json.dumps(lists))
    made = load(PaperRun(root=str(root), **SETTINGS))
    assert len(made.train_x) == len(made.train_y) == 10
    sides = sorted(row[1:5] for row in made.train_y[0].tolist())
    assert sides == [[0, 0, 20, 20], [WIDE - 4, 0, WIDE, HIGH]]
    part = coco.read(root, WIDE)[0]
    assert [file.name for file in part.part.files][:2] == ["000.png", "003.png"]


def test_some_images_are_a_part_of_all(scenes: Path, data: Dataset) -> None:
    some = load(PaperRun(root=str(scenes), test_size=2, validation_size=4, **SETTINGS))
    assert (len(some.train_x), len(some.train_y), len(some.test_x), len(some.test_y)) == (
        8,
        8,
        2,
        2,
    )
    every = zip(data.train_x.read(), data.train_y, strict=True)
    pairs = {y.numpy().tobytes(): x for x, y in every}
    for x, y in zip(some.test_x.read(), some.test_y, strict=True):
        assert torch.equal(pairs[y.numpy().tobytes()], x)


def change(key: str, **changes: object) -> object:
    """Changes the first image, annotation or category of a list."""

    def edit(file: Path) -> None:
        lists = json.loads(file.read_text())
        lists[key][0] |= changes
        file.write_text(json.dumps(lists))

    return edit


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("train.json", Path.unlink, "none of train.json, annotations/instances_train2017.json"),
        ("test.json", Path.unlink, "none of test.json.*val.json"),
        ("train.json", lambda f: f.write_text("{"), "train.json: it is not in COCO's format"),
        ("train.json", lambda f: f.write_text("[]"), "train.json: it is not in COCO's format"),
        ("train.json", lambda f: f.write_text('{"images": []}'), "not in COCO's format.*annotatio"),
        ("train.json", change("annotations", image_id=1), "train has no 1; it needs COCO's format"),
        ("test.json", change("categories", id=9), "the categories .*9"),
        ("test.json", change("images", file_name="x.png"), "the image x.png of test is not"),
        ("test.json", change("images", file_name="../../x.png"), "../x.png of test is not there"),
        ("test.json", change("images", width=0), "an image of test is said to be empty"),
        ("train/000.png", Path.unlink, "the image 000.png of train is not there"),
    ],
)
def test_what_is_wrong_with_the_lists_is_said(
    tmp_path: Path, name: str, edit: object, words: str
) -> None:
    root = write(tmp_path / "cells", train=2)
    (tmp_path / "x.png").write_bytes((root / "test" / "000.png").read_bytes())
    edit(root / name)
    with pytest.raises(ValueError, match=words):
        load(PaperRun(root=str(root), **SETTINGS))


def test_what_is_wrong_with_a_image_is_said_when_it_is_read(tmp_path: Path) -> None:
    root = write(tmp_path / "cells", train=2)
    change("images", width=WIDE - 1)(root / "train.json")
    (root / "test" / "001.png").write_bytes(b"PNG")
    change("annotations", segmentation=[])(root / "test.json")
    made = load(PaperRun(root=str(root), **SETTINGS))
    with pytest.raises(ValueError, match=r"000.png: it is of \(96, 64\) pixels, its list says"):
        made.train_x.read()
    with pytest.raises(ValueError, match="001.png: not an image that can be read"):
        made.test_x.read()
    with pytest.raises(ValueError, match="000.png: a box has no segmentation"):
        made.test_x.masks()
    (tmp_path / "no.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="no.zip': neither a folder nor a zip"):
        load(PaperRun(root=str(tmp_path / "no.zip"), **SETTINGS))


def test_a_link_that_leads_out_is_not_followed(tmp_path: Path) -> None:
    root = write(tmp_path / "cells", train=2)
    image = root / "train" / "000.png"
    image.rename(tmp_path / "000.png")
    image.symlink_to(tmp_path / "000.png")
    with pytest.raises(ValueError, match="the image 000.png of train is not there"):
        load(PaperRun(root=str(root), **SETTINGS))


# --- batches -------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(0, 5), st.integers(0, 10_000))
def test_flips_move_images_boxes_and_masks_together(width: int, fill: int, seed: int) -> None:
    """An image whose pixels are those of its mask stays so, and its box stays tight."""
    generator = random.Random(seed)
    left = generator.randrange(width)
    right = generator.randrange(left + 1, width + 1)
    masks = torch.zeros(2, 1, 4, width + fill, dtype=torch.bool)
    masks[:, :, 1:3, left:right] = True
    x = masks.float().expand(-1, 3, -1, -1).clone()
    x[:, :, :, width:] = -7
    rows = torch.tensor([0.0, left, 1, right, 3, 0]).expand(2, 1, 6)
    flips, widths = torch.tensor([True, False]), torch.tensor([width, width])
    new_x, new_boxes, new_masks = detection.flipped(x, rows, masks, flips, widths)
    assert new_masks is not None
    assert torch.equal(new_x[1], x[1])
    assert torch.equal(new_boxes[1], rows[1])
    assert torch.equal(new_x[:, :, :, :width], new_masks.float().expand(-1, 3, -1, -1)[..., :width])
    assert (new_x[:, :, :, width:] == -7).all()
    columns = new_masks[0, 0].any(0).nonzero()[:, 0]
    expected = [0, int(columns.min()), 1, int(columns.max()) + 1, 3, 0]
    assert new_boxes[0, 0].tolist() == expected
    assert [width - right, width - left] == [expected[1], expected[3]]


def test_batches_of_detection_follow_from_seed_and_epoch(data: Dataset, scenes: Path) -> None:
    run = PaperRun(root=str(scenes), **SETTINGS)
    first, again, other = (list(detection.batches(run, data, epoch)) for epoch in (1, 1, 2))
    assert len(first) == 3
    for (x, y), (x_again, y_again) in zip(first, again, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y.boxes, y_again.boxes)
        assert y.masks is None
    assert not torch.equal(first[0][0], other[0][0])
    masked = next(detection.batches(run.but(model="maskrcnn50"), data, 1))[1]
    assert masked.masks is not None
    parts = masked.split(3)
    assert [len(part.boxes) for part in parts] == [3, 1]
    assert torch.equal(torch.cat([part.masks for part in parts]), masked.masks)
    for rows, masks in zip(masked.boxes, masked.masks, strict=True):
        for (_, left, top, right, bottom, _), mask in zip(rows.int().tolist(), masks, strict=True):
            assert mask[top:bottom, left:right].all()
            assert mask.sum() == (bottom - top) * (right - left)


# --- boxes -----------------------------------------------------------------------------

side = st.floats(0, 50, allow_nan=False).map(lambda v: round(v, 2))
box = st.tuples(side, side, st.floats(0.5, 40), st.floats(0.5, 40)).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)


@given(box, box)
def test_giou_is_that_of_its_definition(one: list[float], other: list[float]) -> None:
    found = boxes.giou(torch.tensor(one).double(), torch.tensor(other).double())
    exact = reference.generalized_iou(*(torch.tensor(b).double().tolist() for b in (one, other)))
    assert float(found) == pytest.approx(exact, abs=1e-9)


@given(st.lists(box, max_size=12), st.integers(0, 1000), st.sampled_from([0.1, 0.3, 0.6]))
def test_suppression_is_that_of_its_definition(
    some: list[list[float]], seed: int, most: float
) -> None:
    generator = random.Random(seed)
    scores = [generator.random() for _ in some]
    classes = [generator.randrange(2) for _ in some]
    sides = torch.tensor(some, dtype=torch.float64).view(-1, 4)
    found = boxes.suppress(sides, torch.tensor(scores), torch.tensor(classes), most)
    assert found.tolist() == reference.suppressed(some, scores, classes, most)


@given(st.floats(-20, 20), st.booleans())
def test_focal_loss_is_that_of_its_definition(logit: float, wanted: bool) -> None:
    x = torch.tensor(logit, dtype=torch.float64)
    found = detectors.focal(x, torch.tensor(float(wanted), dtype=torch.float64))
    assert float(found) == pytest.approx(reference.focal_loss(logit, wanted), rel=1e-6, abs=1e-15)


@given(
    st.lists(st.tuples(st.sampled_from([-1.0, 0, 2]), box, st.booleans()), min_size=1, max_size=6)
)
def test_places_learn_the_smallest_box_around_them(rows: list) -> None:
    targets = [[label, *sides, float(crowd)] for label, sides, crowd in rows]
    points = detectors.grid(8, 9, torch.device("cpu"))
    assert points[10].tolist() == [12.0, 12.0]
    found = detectors.assigned(points.double(), torch.tensor(targets).double().view(1, -1, 6))
    exact = torch.tensor(targets).double().view(-1, 6).tolist()
    assert found[0].tolist() == [reference.learned_box(p, exact, 12) for p in points.tolist()]


def said_of(targets: torch.Tensor, classes: int, sure: float) -> Places:
    """What heads would say that know everything, so surely."""
    height, width = 8, 12
    points = detectors.grid(height, width, targets.device)
    which = detectors.assigned(points, targets)
    own = targets.gather(1, which.clamp(min=0)[..., None].expand(-1, -1, 6))
    distances = torch.cat([points - own[..., 1:3], own[..., 3:5] - points], -1)
    logs = (distances.clamp(min=0.1) / 8).log().mT.unflatten(2, (height, width))
    hot = nn.functional.one_hot(own[..., 0].long().clamp(min=0), classes).bool()
    logits = torch.where(hot & (which >= 0)[..., None], sure, -sure)
    near = detectors.nearness(distances.clamp(min=1e-6)).clamp(1e-4, 1 - 1e-4).logit()
    return Places(
        logits.mT.unflatten(2, (height, width)), logs, near.unflatten(1, (height, width))[:, None]
    )


def test_who_says_what_is_there_loses_little_and_is_understood(data: Dataset) -> None:
    targets = data.train_y
    said = said_of(targets, 2, 12.0)
    centred = detectors.loss(said, targets)
    wrong = detectors.loss(said._replace(classes=said.classes.flip(1)), targets)
    moved = detectors.loss(said._replace(distances=said.distances + 0.5), targets)
    points = detectors.grid(8, 12, targets.device)
    logits = said.centres.flatten(1)[detectors.assigned(points, targets) >= 0]
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, logits.sigmoid())
    assert float(centred) == pytest.approx(float(entropy), abs=0.01)  # nothing else is lost
    assert float(wrong) > 10 * float(centred)
    assert float(moved) > float(centred) + 0.3
    found = [detectors._found(Places(*parts)) for parts in zip(*said, strict=True)]
    numbers = average_precision(found, targets)
    assert numbers["average_precision"] > 0.99
    nothing = targets.clone()
    nothing[..., 0] = -1
    assert float(detectors.loss(said_of(nothing, 2, 12.0), nothing)) < 1e-3


def test_gradients_of_boxes_reach_the_network(data: Dataset) -> None:
    net = OneStage(2)
    x = data.train_x.read()[:2]
    net.loss(x, Targets(data.train_y[:2])).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert net.distances.weight.grad.any()


# --- average precision --------------------------------------------------------------


def truth(*rows: list[float]) -> torch.Tensor:
    return torch.tensor([list(rows)])


def finding(*rows: tuple[list[float], float, int], masks: torch.Tensor | None = None) -> Detections:
    sides = torch.tensor([r[0] for r in rows]).view(-1, 4)
    return Detections(
        sides, torch.tensor([r[1] for r in rows]), torch.tensor([r[2] for r in rows]), masks
    )


BOX = [10.0, 10.0, 30.0, 30.0]
REAL = [0, *BOX, 0]


@pytest.mark.parametrize(
    ("found", "there", "expected"),
    [
        (finding((BOX, 0.1, 0)), truth(REAL), (1.0, 1.0, 1.0)),
        (finding(), truth(REAL), (0.0, 0.0, 0.0)),
        (finding((BOX, 0.1, 1)), truth(REAL), (0.0, 0.0, 0.0)),
        # 20x20 found as 20x13: intersection over union 0.65 counts at 0.5, 0.55, 0.6 and 0.65
        (finding(([10.0, 10, 30, 23], 0.9, 0)), truth(REAL), (0.4, 1.0, 0.0)),
        # a better one that is nothing: a precision of a half at every recall
        (finding((BOX, 0.1, 0), ([50.0, 50, 60, 60], 0.9, 0)), truth(REAL), (0.5, 0.5, 0.5)),
        # found twice: the second is nothing, but comes behind
        (finding((BOX, 0.9, 0), (BOX, 0.8, 0)), truth(REAL), (1.0, 1.0, 1.0)),
        # one of two: a recall of a half, 51 of the 101 that are asked for
        (finding((BOX, 0.9, 0)), truth(REAL, [0, 50, 50, 60, 60, 0]), (51 / 101,) * 3),
        # one class of two
        (finding((BOX, 0.9, 0)), truth(REAL, [1, 50, 50, 60, 60, 0]), (0.5, 0.5, 0.5)),
        # in a crowd: neither for nor against
        (
            finding(([50.0, 50, 60, 60], 0.9, 0), (BOX, 0.5, 0)),
            truth(REAL, [0, 45, 45, 90, 90, 1], [-1, 0, 0, 0, 0, 0]),
            (1.0, 1.0, 1.0),
        ),
    ],
)
def test_average_precision_by_hand(
    found: Detections,
    there: torch.Tensor,
    expected: tuple[float, ...],
    capsys: pytest.CaptureFixture,
) -> None:
    numbers = average_precision([found], there)
    assert tuple(numbers) == NUMBERS
    assert list(numbers.values()) == pytest.approx(expected, abs=1e-6)
    assert capsys.readouterr().out == ""


def test_average_precision_of_masks() -> None:
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[:, 10:30, 10:30] = True
    half = mask.clone()
    half[:, 23:] = False
    numbers = average_precision([finding((BOX, 0.9, 0), masks=half)], truth(REAL), [mask])
    assert [numbers[name] for name in NUMBERS] == pytest.approx([1, 1, 1])
    assert [numbers[f"mask_{name}"] for name in NUMBERS] == pytest.approx([0.4, 1, 0])


def test_a_library_that_detection_misses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ValueError, match=r"by pycocotools; pip install 'anybatch\[papers\]'"):
        average_precision([], truth(REAL))
    monkeypatch.setitem(sys.modules, "torchvision.models.resnet", None)
    with pytest.raises(ValueError, match="torchvision is not installed; 'onestage' is"):
        networks.build("fasterrcnn50", 3, (3, 64, 64))


# --- settings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "resnet8"}, "model='resnet8': give one of 'onestage', 'fasterrcnn50'"),
        ({"model": "torchvision:resnet18"}, "model='torchvision:resnet18': give one of 'onestage'"),
        ({"norms": "tail"}, "norms='tail': give one of 'all', 'heads', 'body'"),
        ({"method": "vdn"}, "method='vdn': a detector takes no virtual examples"),
        ({"method": "frozen", "options": (("window", 3),)}, "method 'frozen' has none"),
        ({"method": "frozen", "centralize": True}, "'frozen' converts nothing"),
        ({"weights": "resnet50.pth"}, "weights='resnet50.pth': give one of fasterrcnn50"),
        ({"model": "fasterrcnn50", "norm_batch_size": 2}, "normalize regions, not images"),
        ({"data": "cifar10", "model": "onestage"}, "model='onestage': give one of 'mlp'"),
        ({"data": "cifar10", "model": "resnet8", "norms": "heads"}, "norms='heads': leave it out"),
        ({"data": "cifar10", "model": "resnet8", "weights": "x"}, "weights='x': leave it out"),
        ({"data": "cifar10", "model": "resnet8", "method": "frozen"}, "frozen': it is for detec"),
    ],
)
def test_settings_go_together(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PaperRun(**{**SETTINGS, **changes})


def test_identities_of_older_runs_stay() -> None:
    assert PaperRun(data="cifar10", model="resnet20", method="mabn").identity == OLD
    assert PaperRun(**SETTINGS).identity != PaperRun(norms="heads", **SETTINGS).identity


OLD = "9f4f247dfe704a87"


def kinds(run: PaperRun, data: Dataset, part: str) -> set[type]:
    """Classes of the norms in a part of a prepared detector."""
    norms = (nn.GroupNorm, nn.BatchNorm2d, NormLayer)
    modules = prepare(run, data).model.named_modules()
    return {type(m) for name, m in modules if name.startswith(part) and isinstance(m, norms)}


def test_norms_are_the_methods_where_they_should_be(data: Dataset, scenes: Path) -> None:
    run = PaperRun(root=str(scenes), method="mabn", norm_batch_size=2, **SETTINGS)
    both = kinds(run, data, "body"), kinds(run, data, "heads")
    assert both[0] == both[1]
    assert len(both[0]) == 1
    method = both[0].pop()
    heads = run.but(norms="heads")
    assert (kinds(heads, data, "body"), kinds(heads, data, "heads")) == ({nn.GroupNorm}, {method})
    body = run.but(norms="body")
    assert kinds(body, data, "body") == {method}
    assert kinds(body, data, "heads") == {FrozenBatchNorm2d}
    none = PaperRun(root=str(scenes), method="frozen", norms="heads", **SETTINGS)
    assert kinds(none, data, "body") == {nn.GroupNorm}
    assert kinds(none, data, "heads") == {FrozenBatchNorm2d}


def test_frozen_norms_stay_and_do_all_but_nothing(data: Dataset, scenes: Path) -> None:
    run = PaperRun(root=str(scenes), method="frozen", lr=0.01, **SETTINGS)
    training = prepare(run, data)
    before = {n: v.clone() for n, v in training.model.state_dict().items()}
    training.model.train()
    norms = [m for m in training.model.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(norms) > 20
    assert not any(norm.training for norm in norms)
    x = torch.randn(2, norms[0].num_features, 3, 3)
    assert torch.allclose(norms[0](x), x, atol=1e-4)
    for x, y in objective(run).batches(run, data, 1):
        step(run, training, x, y)
    after = training.model.state_dict()
    frozen = {f"{n}." for n, m in training.model.named_modules() if m in norms}
    changed = {n for n, v in after.items() if not torch.equal(v, before[n])}
    assert changed
    assert not any(name.startswith(tuple(frozen)) for name in changed)


# --- training ------------------------------------------------------------------------


@pytest.mark.few(2)
@pytest.mark.parametrize("norms", ["all", "heads"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_tables_trains_a_detector(
    method: str, norms: str, data: Dataset, scenes: Path
) -> None:
    size = 2 if method not in ("torch", "gn", "frozen") else None
    run = PaperRun(
        root=str(scenes), method=method, norms=norms, norm_batch_size=size, lr=0.02, **SETTINGS
    )
    training = prepare(run, data)
    for x, y in objective(run).batches(run, data, 1):
        assert step(run, training, x, y).isfinite()
    loss, numbers = objective(run).evaluate(run, training.model, data)
    assert loss is None
    assert tuple(numbers) == objective(run).numbers
    assert all(0 <= number <= 1 for number in numbers.values())


@pytest.mark.slow
def test_detectors_learn_scenes(scenes: Path, tmp_path: Path) -> None:
    run = PaperRun(
        root=str(scenes), method="mabn", norm_batch_size=2, epochs=40, lr=0.3, **SETTINGS
    )
    result = train(run, tmp_path)
    assert result["average_precision_50"] > 0.8
    assert result["average_precision"] > 0.3
    assert result["epochs"][0]["average_precision_50"] < 0.2


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["torch", "mabn", "cbn"])
def test_a_stopped_detection_run_ends_with_the_same_numbers(
    scenes: Path, tmp_path: Path, method: str
) -> None:
    groups = {} if method == "torch" else {"norm_batch_size": 2}
    run = PaperRun(root=str(scenes), method=method, epochs=3, norms="heads", **groups, **SETTINGS)
    whole = train(run, tmp_path / "whole")
    again = train_stopped_after_each_epoch(run, tmp_path / "stopped")
    for a, b in zip(whole["epochs"], again["epochs"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert set(whole["epochs"][0]) == {"epoch", "train_loss", "test_loss", "seconds", *NUMBERS}
    assert whole["average_precision"] == whole["epochs"][-1]["average_precision"]


def test_detectors_train_in_half_precision_and_micro_batches(scenes: Path, data: Dataset) -> None:
    run = PaperRun(root=str(scenes), method="mabn", precision="bfloat16", accumulate=2, **SETTINGS)
    training = prepare(run, data)
    x, y = next(objective(run).batches(run, data, 1))
    assert step(run, training, x, y).isfinite()
    assert objective(run).evaluate(run, training.model, data)[0] is None


# --- two stages ------------------------------------------------------------------------


class Preset(nn.Module):
    """Stands for torchvision's detector: keeps what it is given, gives what it should."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: list, targets: list | None = None) -> object:
        self.given = images, targets
        if self.training:
            return {"a": self.scale, "b": 3 * self.scale.half()}
        one = {"boxes": torch.tensor([BOX]), "scores": torch.tensor([0.5])}
        masks = torch.full((1, 1, 40, 40), 0.2)
        masks[:, :, :5] = 0.7
        return [one | {"labels": torch.tensor([2]), "masks": masks} for _ in images]


def test_targets_and_findings_are_translated() -> None:
    net = TwoStage(Preset())
    rows = torch.tensor([[REAL, [1, 0, 0, 5, 5, 1]], [[1, 2, 3, 4, 5, 0], [-1, 0, 0, 0, 0, 0]]])
    masks = torch.zeros(2, 2, 40, 40, dtype=torch.bool)
    masks[1, 0, 3:5, 2:4] = True
    loss = net.loss(torch.randn(2, 3, 40, 40), Targets(rows.float(), masks))
    assert float(loss.detach()) == 8
    images, targets = net.detector.given
    assert [tuple(image.shape) for image in images] == [(3, 40, 40)] * 2
    assert [one["labels"].tolist() for one in targets] == [[1], [2]]
    assert [one["boxes"].tolist() for one in targets] == [[BOX], [[2, 3, 4, 5]]]
    assert torch.equal(targets[1]["masks"], masks[1, :1].to(torch.uint8))
    found = net.eval().find(torch.randn(1, 3, 40, 40))
    assert found[0].classes.tolist() == [1]
    assert found[0].masks is not None
    assert found[0].masks.shape == (1, 40, 40)
    assert found[0].masks.sum() == 200


def test_mask_detectors_are_judged_by_masks_too() -> None:
    plain = objective(PaperRun(**SETTINGS))
    masked = objective(PaperRun(**{**SETTINGS, "model": "maskrcnn50"}))
    assert masked.numbers == (*plain.numbers, *(f"mask_{name}" for name in NUMBERS))
    assert masked.metric == plain.metric == "average_precision"


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["fasterrcnn50", "maskrcnn50"])
def test_torchvisions_detectors_train_and_find(name: str, scenes: Path, tmp_path: Path) -> None:
    resnet = pytest.importorskip("torchvision.models.resnet").resnet50()
    torch.save(resnet.state_dict(), scenes / "resnet50.pth")
    run = PaperRun(
        root=str(scenes), **{**SETTINGS, "model": name, "method": "mabn", "accumulate": 2}
    )
    made = load(run)
    for one in (run, run.but(norms="heads"), run.but(norms="heads", weights="resnet50.pth")):
        training = prepare(one, made)
        x, y = next(objective(one).batches(one, made, 1))
        assert step(one, training, x, y).isfinite()
        assert set(objective(one).evaluate(one, training.model, made)[1]) == {
            *objective(one).numbers
        }
    body = dict(training.model.named_parameters())
    assert not body["detector.backbone.body.layer1.0.conv1.weight"].requires_grad
    assert body["detector.backbone.body.layer2.0.conv1.weight"].requires_grad
    with pytest.raises(ValueError, match=r"weights='no.pth': there is no .*no.pth; it is to hold"):
        prepare(run.but(weights="no.pth"), made)


# --- tables ---------------------------------------------------------------------------

TINY = {
    "paper": "detection",
    "source": "Table 1",
    "title": "Scenes",
    "claim": "MABN recovers.",
    "unit": "AP",
    "down": "method",
    "across": "number",
    "figure": "bars",
    "rows": [
        {"label": "none", "run": {"method": "frozen", "norms": "heads"}},
        {"label": "MABN", "run": {"method": "mabn", "norms": "heads"}},
    ],
    "columns": [{"label": "AP"}, {"label": "AP50", "measure": "average_precision_50"}],
    "sizes": {
        size: {
            "run": {**SETTINGS, "norm_batch_size": 2, "epochs": epochs, "lr": 0.1},
            "seeds": 1,
            "folder": "cells",
            "examples": [12, 5],
            "text": "Made up.",
        }
        for size, epochs in (("small", 2), ("paper", 3))
    },
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "reproductions"
    folder.mkdir()
    (folder / "tiny.json").write_text(json.dumps(TINY))
    monkeypatch.setattr(reproduction, "FOLDER", folder)
    reproduction.reproductions.cache_clear()
    yield tmp_path
    reproduction.reproductions.cache_clear()


def in_this_process(
    runs: list[PaperRun], folder: Path, workers: int, on_progress: OnProgress, work: Work
) -> None:
    for one in runs:
        on_progress(one.key, 0, work(one, folder, lambda *_: None))


@pytest.mark.exhaustive
def test_a_table_of_detection_is_made_and_drawn(
    tiny: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("papers.reproduction.make.in_processes", in_this_process)
    store = tiny / "store"
    call = ["tiny", "--store", str(store)]
    result = CliRunner().invoke(app, [*call, "--root", str(scenes.parent)])
    assert result.exit_code == 0, result.output
    rows = Store(store / "results.jsonl").rows()
    assert len(rows) == 2  # both columns are read off the same runs
    for row in rows.values():
        assert set(NUMBERS) <= set(row["result"])
        assert len(row["result"]["average_precisions"]) == 2
        assert row["result"]["test_loss"] is None
    cells = json.loads((store / "report.json").read_text())[0]["cells"]
    by_id = {cell["ids"][0]: rows[cell["ids"][0]]["result"] for cell in cells}
    for cell in cells:
        name = NUMBERS[1] if cell["column"] == "AP50" else NUMBERS[0]
        assert cell["mean"] == pytest.approx(100 * by_id[cell["ids"][0]][name])


def test_data_are_found_beside_others_packed_or_not(tiny: Path, scenes: Path) -> None:
    task = tasks(chosen(["tiny"]), "small")[0]
    zipped(scenes, tiny / "cells.zip")
    for root, found in (
        (scenes, scenes),
        (scenes.parent, scenes),
        (tiny, tiny / "cells.zip"),
        (tiny / "cells.zip", tiny / "cells.zip"),
    ):
        assert placed(task, root, "cpu").run.root == str(found)
    with pytest.raises(ValueError, match=r"no folder 'cells' nor a zip file in it, with train"):
        placed(task, tiny / "store", "cpu")


def test_the_library_knows_no_data_with_boxes(scenes: Path) -> None:
    command = ["train", "--data", "coco", "--model", "onestage", "--root", str(scenes)]
    result = CliRunner().invoke(library, command)
    assert result.exit_code == 2
    assert "data='coco': give one of 'digits'" in result.output
