"""Runs: what they are, what they train on, and that they go on where they were stopped."""

import copy
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anybatch.core.files import write_whole
from anybatch.tools import networks
from anybatch.tools.classification import batches
from anybatch.tools.config import parse_options, read_config
from anybatch.tools.data import Dataset, augment, load
from anybatch.tools.images import ImageFiles
from anybatch.tools.report_files import output_folder
from anybatch.tools.run import MODELS, Run
from anybatch.tools.timing import time_steps
from anybatch.tools.training import method_options, prepare, step, train, train_epoch
from interrupted import train_stopped_after_each_epoch

SMALL = {"train_size": 24, "epochs": 3}


# --- configuration -----------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "mnist"}, "data='mnist': give one of 'digits', 'cifar10'"),
        ({"model": "alexnet"}, "model='alexnet': give one of 'mlp'"),
        ({"model": "resnet8"}, "model='resnet8': digits are 8x8, give 'mlp'"),
        ({"method": "mabm"}, "did you mean 'mabn'"),
        ({"method": "mabn", "options": (("windows", 3),)}, "windows=3: mabn has no such option"),
        ({"options": (("window", 3),)}, "method 'torch' has none"),
        ({"batch_size": 0}, "batch_size=0: give a whole number from 1 on"),
        ({"epochs": 1.5}, "epochs=1.5"),
        ({"norm_batch_size": 3}, "norm_batch_size=3: give a number from 1 to batch_size=2"),
        ({"small_epochs": 3}, "small_epochs=3: give norm_batch_size or accumulate"),
        ({"seed": -1}, "seed=-1"),
        ({"lr": -0.1}, "lr=-0.1"),
        ({"precision": "fp8"}, "precision='fp8': give one of 'float32'"),
        ({"milestones": (3, 12)}, "milestones=(3, 12): give epochs in rising order, from 1 to 11"),
        ({"norm_decay": "some"}, "norm_decay='some': give True, False or 'auto'"),
        ({"gamma_target": 2.0}, "gamma_target=2.0: give a number from 0 to 1"),
        ({"model": "timm:"}, "model='timm:': give one of 'mlp'"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(changes: dict[str, object], words: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        Run(**changes)
    assert words in str(error.value)


def test_a_run_is_its_data_and_back() -> None:
    run = Run(method="mabn", options=(("window", 8),), norm_batch_size=1)
    assert Run.from_dict(json.loads(json.dumps(run.as_dict()))) == run
    assert run.key == Run(method="mabn", options=(("window", 8),), norm_batch_size=1).key
    assert run.key != run.but(seed=1).key
    with pytest.raises(ValueError, match="speed=3: a run has"):
        Run.from_dict({"speed": 3})


def test_names_of_runs_outlast_new_settings() -> None:
    """Results and checkpoints of runs that were made before a setting came are found again."""
    assert Run().key == "torch-b2-s0-aff6c5b2"
    assert Run(milestones=(3,)).key != Run().key


def test_a_run_is_the_same_wherever_it_is_made() -> None:
    here = Run(data="cifar100", model="resnet8", root="here")
    there = here.but(root="there", device="cuda")
    assert here.identity == there.identity
    assert here.key != there.key
    for change in ({"seed": 1}, {"lr": 0.2}, {"norm_decay": False}, {"test_size": 7}):
        assert here.but(**change).identity != here.identity


def test_options_are_read_as_json_or_text() -> None:
    read = parse_options(["mabn.window=8", "mabn.forward_stats=sma", "brn.smooth=True"])
    assert read == {"mabn": (("window", 8), ("forward_stats", "sma")), "brn": (("smooth", True),)}
    for wrong in ("window=8", "mabn.window", "mabn.=3"):
        with pytest.raises(ValueError, match=r"give METHOD\.NAME=VALUE"):
            parse_options([wrong])


def test_configuration_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"epochs": 3}')
    assert read_config(tmp_path / "a.json") == {"epochs": 3}
    if sys.version_info >= (3, 11):
        (tmp_path / "a.toml").write_text('epochs = 3\nmethods = "mabn"\n')
        assert read_config(tmp_path / "a.toml") == {"epochs": 3, "methods": "mabn"}
    (tmp_path / "marked.json").write_text('{"epochs": 3}', encoding="utf-8-sig")  # as by Notepad
    assert read_config(tmp_path / "marked.json") == {"epochs": 3}
    for name, text in (("b.json", "{"), ("b.toml", "a = = b"), ("c.json", "[1]"), ("d.txt", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            read_config(tmp_path / name)
    with pytest.raises(ValueError, match="cannot be read"):
        read_config(tmp_path / "missing.json")


# --- files -------------------------------------------------------------------


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write there.*--output"):
        output_folder(tmp_path / "file" / "runs")


# --- data --------------------------------------------------------------------


def test_digits_are_split_once_and_for_all() -> None:
    data = load(Run())
    assert data.shape == (64,)
    assert (len(data.train_x), len(data.test_x), data.classes) == (1297, 500, 10)
    assert abs(float(data.train_x.mean())) < 1e-5
    with pytest.raises(ValueError, match="train_size=2000: give a number from 1 to 1297"):
        load(Run(train_size=2000))


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


def binary_cifar10(folder: Path, training_files: int = 5) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data_batch_{k}.bin" for k in range(1, training_files + 1)] + ["test_batch.bin"]
    for seed, name in enumerate(names):
        x = images(6, seed)
        planes = x.transpose(0, 3, 1, 2).reshape(6, -1)
        np.concatenate([np.arange(6, dtype=np.uint8)[:, None], planes], 1).tofile(folder / name)
    return images(6, 0)


@pytest.mark.parametrize("inner", ["", "cifar10", "cifar-10-batches-bin"])
def test_cifar_in_its_binary_form(tmp_path: Path, inner: str) -> None:
    first = binary_cifar10(tmp_path / inner)
    data = load(Run(data="cifar10", model="resnet8", root=str(tmp_path)))
    assert data.train_x.shape == (30, 3, 32, 32)
    assert data.train_y[:6].tolist() == [0, 1, 2, 3, 4, 5]
    red = (first[0, :, :, 0] / 255 - 0.4914) / 0.2470
    assert torch.allclose(data.train_x[0, 0], torch.tensor(red, dtype=torch.float32), atol=1e-5)


@pytest.mark.exhaustive
def test_cifar_mosaics(tmp_path: Path) -> None:
    x = images(5000)
    grid = x.reshape(50, 100, 32, 32, 3).swapaxes(1, 2).reshape(1600, 3200, 3)
    labels = np.arange(5000, dtype=np.uint8) % 100
    for split in ("train", "test"):
        Image.fromarray(grid).save(
            tmp_path / f"{split}-00.webp", lossless=True, quality=0, method=0
        )
    np.savez(tmp_path / "labels.npz", train=labels, test=labels)
    data = load(Run(data="cifar100", model="resnet8", root=str(tmp_path)))
    assert data.train_x.shape == (5000, 3, 32, 32)
    assert data.classes == 100
    expected = (torch.tensor(x[101, 3, 4, 1] / 255) - 0.4865) / 0.2564
    assert torch.allclose(data.train_x[101, 1, 3, 4].double(), expected, atol=1e-5)
    (tmp_path / "test-00.webp").unlink()
    with pytest.raises(ValueError, match=r"test-00\.webp and on are missing"):
        load(Run(data="cifar100", model="resnet8", root=str(tmp_path)))


def test_cifar_folders_that_are_missing_half_there_or_pickled(tmp_path: Path) -> None:
    def read() -> None:
        load(Run(data="cifar10", model="resnet8", root=str(tmp_path)))

    with pytest.raises(ValueError, match=r"no cifar10 in .*binary version \(\.bin files\)"):
        read()
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"data": [1]}))
    with pytest.raises(ValueError, match="Python version, which is never unpickled"):
        read()
    binary_cifar10(tmp_path)
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(ValueError, match=r"test_batch\.bin is missing"):
        read()
    (tmp_path / "test_batch.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="3 bytes are no whole number of 3073-byte records"):
        read()
    with pytest.raises(ValueError, match="there is nothing of that name"):
        load(Run(data="cifar10", model="resnet8", root=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="give them with --root"):
        load(Run(data="cifar10", model="resnet8"))


def test_folders_of_images_are_read_as_data(tmp_path: Path) -> None:
    def read() -> object:
        return load(Run(data="imagefolder", model="resnet8", root=str(tmp_path)))

    with pytest.raises(ValueError, match=r"it needs the folders train and test \(or val\)"):
        read()
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(3):
                image = Image.fromarray(images(1, 10 * label + k)[0])
                image.resize((40, 20)).save(tmp_path / split / name / f"{k}.png")
    data = read()
    assert data.train_x.shape == (6, 3, 32, 32)
    assert data.test_y.tolist() == [0, 0, 0, 1, 1, 1]
    (tmp_path / "train" / "dog" / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.jpg: not an image that can be read"):
        read()


def image_folders(root: Path, size: tuple[int, int] = (40, 20)) -> None:
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for k in range(3):
                image = Image.fromarray(images(1, 10 * label + k)[0])
                image.resize(size).save(root / split / name / f"{k}.png")


def test_images_that_are_read_as_they_are_needed(tmp_path: Path) -> None:
    image_folders(tmp_path)
    run = Run(
        data="imagenet", model="resnet8", root=str(tmp_path), image_size=24, batch_size=2, epochs=2
    )
    data = load(run)
    assert data.shape == (3, 24, 24)
    assert sorted(data.train_y.tolist()) == [0, 0, 0, 1, 1, 1]
    first, again, other = ([x for x, _ in batches(run, data, epoch)] for epoch in (1, 1, 2))
    assert len(first) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    plain = torch.cat([x for x, _ in batches(run.but(augment=False), data, 1)])
    index = torch.randperm(6, generator=torch.Generator().manual_seed(100_003 * 0 + 1))
    assert torch.equal(plain, data.train_x[index].read())
    row = train(run, tmp_path / "out")
    assert len(row["epochs"]) == 2


def test_the_middle_of_a_image_is_cropped_and_standardized(tmp_path: Path) -> None:
    pixels = np.zeros((256, 300, 3), np.uint8)
    pixels[16:240, 38:262] = 255  # the middle 224
    Image.fromarray(pixels).save(tmp_path / "a.png")
    x = ImageFiles([tmp_path / "a.png"], 224).read()[0]
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(x, white[:, None, None].expand(3, 224, 224))


def test_random_parts_are_of_the_image_and_sometimes_flipped(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    parts = ImageFiles([tmp_path / "a.png"] * 60, 16).augmented(torch.Generator().manual_seed(0))
    slopes = parts[:, 0, 8, -1] - parts[:, 0, 8, 0]
    assert 10 < int((slopes < 0).sum()) < 50
    widths = slopes.abs() * 255 * 0.229
    assert 20 < float(widths.min()) < 80 < float(widths.max()) < 200


def test_links_that_lead_out_of_the_data_are_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    image_folders(root)
    outside.mkdir()
    (root / "train" / "cat" / "0.png").rename(outside / "0.png")
    (root / "train" / "cat" / "0.png").symlink_to(outside / "0.png")
    for data in ("imagefolder", "imagenet"):
        with pytest.raises(ValueError, match=r"train/cat/0\.png is a link that leads out of it"):
            load(Run(data=data, model="resnet8", root=str(root)))
    (root / "train" / "cat" / "0.png").unlink()
    (root / "train" / "cat" / "0.png").symlink_to(root / "train" / "cat" / "1.png")
    assert len(load(Run(data="imagenet", model="resnet8", root=str(root))).train_y) == 6


def test_what_is_missing_and_where_to_get_it(tmp_path: Path) -> None:
    for data, place in (("imagenet", "www.image-net.org"), ("cifar100", "www.cs.toronto.edu")):
        with pytest.raises(ValueError, match=place):
            load(Run(data=data, model="resnet8", root=str(tmp_path)))


def test_a_part_of_the_training_examples_is_held_out() -> None:
    whole, held = load(Run()), load(Run(validation_size=300, test_size=100))
    assert (len(held.train_y), len(held.test_y)) == (997, 100)
    rows = {tuple(x.tolist()) for x in whole.train_x}
    assert all(tuple(x.tolist()) in rows for x in held.test_x)
    train_rows = {tuple(x.tolist()) for x in held.train_x}
    assert not any(tuple(x.tolist()) in train_rows for x in held.test_x)
    with pytest.raises(ValueError, match="validation_size=1297: give a number from 1 to 1296"):
        load(Run(validation_size=1297))
    with pytest.raises(ValueError, match="test_size=501: give a number from 1 to 500"):
        load(Run(test_size=501))


def test_arrays_are_read_as_data(tmp_path: Path) -> None:
    path = tmp_path / "some.npz"

    def read(**arrays: object) -> object:
        np.savez(path, **arrays)
        return load(Run(data="npz", root=str(path)))

    x, y = np.ones((4, 7), np.float32), np.array([0, 1, 2, 1])
    good = {"x_train": x * np.arange(7), "y_train": y, "x_test": x, "y_test": y}
    assert read(**good).classes == 3
    with pytest.raises(ValueError, match="it needs the arrays x_train, .*, and has x_train"):
        read(x_train=x)
    with pytest.raises(ValueError, match=r"x_test \(4, 7\) and y_test \(3,\)"):
        read(**{**good, "y_test": y[:3]})
    with pytest.raises(ValueError, match="whole numbers from 0 on"):
        read(**{**good, "y_test": y - 1})
    with pytest.raises(ValueError, match="cannot be read"):  # it would have to be unpickled
        read(**{**good, "x_train": np.array([{}], object)})
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match="cannot be read"):
        load(Run(data="npz", root=str(path)))


def test_augmentation_flips_and_shifts_whole_images() -> None:
    x = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8) + 1
    seen = set()
    for seed in range(40):
        y = augment(x, torch.Generator().manual_seed(seed), pad=1)
        assert y.shape == x.shape
        padded = torch.nn.functional.pad(x[0], (1, 1, 1, 1))
        crops = [
            (flip, i, j)
            for flip in (False, True)
            for i in range(3)
            for j in range(3)
            if torch.equal(y[0], (padded.flip(2) if flip else padded)[:, i : i + 8, j : j + 8])
        ]
        assert len(crops) == 1
        seen.add(crops[0])
    assert len(seen) > 10


# --- networks ------------------------------------------------------------------


# Parameters of the CIFAR form with 10 classes and of the ImageNet form with 1,000. Of the VGGs,
# papers and libraries count the convolutions' biases too, which a norm makes useless.
PARAMETERS = {
    "resnet20": (272_474, None),
    "resnet56": (855_770, None),
    "resnet18": (11_173_962, 11_689_512),
    "resnet34": (21_282_122, 21_797_672),
    "resnet50": (23_520_842, 25_557_032),
    "vgg11": (None, 132_868_840 - 2_752),
    "vgg16": (None, 138_365_992 - 4_224),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_networks_are_as_large_as_the_literature_has_them(name: str) -> None:
    for counted, classes, side in zip(PARAMETERS[name], (10, 1000), (32, 224), strict=True):
        if counted is not None:
            with torch.device("meta"):
                net = networks.build(name, classes, (3, side, side))
            assert sum(p.numel() for p in net.parameters()) == counted


@pytest.mark.parametrize(("name", "side", "left"), [("resnet18", 32, 4), ("resnet18", 224, 7)])
def test_maps_shrink_as_the_papers_have_them(name: str, side: int, left: int) -> None:
    sizes = []
    with torch.device("meta"):
        net = networks.build(name, 10, (3, side, side))
        last = next(m for m in net.modules() if isinstance(m, torch.nn.AdaptiveAvgPool2d))
        last.register_forward_pre_hook(lambda _, x: sizes.append(x[0].shape[-1]))
        net(torch.randn(2, 3, side, side))
    assert sizes == [left]


def test_networks_of_other_libraries_are_taken_where_they_are(monkeypatch) -> None:
    made = {}

    def create_model(name: str, **options: object) -> torch.nn.Module:
        if name != "known":
            raise RuntimeError(f"Unknown model ({name})")
        made.update(options)
        return torch.nn.Identity()

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    assert isinstance(networks.build("timm:known", 7, (3, 8, 8)), torch.nn.Identity)
    assert made == {"num_classes": 7, "in_chans": 3}
    with pytest.raises(ValueError, match=r"'timm:other': timm has no such network .*Unknown"):
        networks.build("timm:other", 7, (3, 8, 8))
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ValueError, match="torchvision is not installed"):
        networks.build("torchvision:resnet18", 7, (3, 8, 8))


@pytest.mark.few(3)
@pytest.mark.parametrize("name", [n for n in MODELS if n != "resnet56"])
def test_networks_train_on_two_images(name: str) -> None:
    shape = (64,) if name == "mlp" else (3, 32, 32)
    net = networks.build(name, 7, shape)
    y = net(torch.randn(2, *shape))
    assert y.shape == (2, 7)
    y.backward(torch.randn_like(y))
    if name == "resnet20":
        assert sum(isinstance(m, torch.nn.Conv2d) for m in net.modules()) == 19 + 2


def test_a_network_of_images_refuses_vectors() -> None:
    with pytest.raises(ValueError, match="model='vgg11': it takes images"):
        networks.build("vgg11", 10, (64,))


# --- training ------------------------------------------------------------------


LATER = {"milestones": (1, 2), "norm_decay": "auto", "gamma_target": 1.0, "norm_epochs": 2}
MEMORIES = {"norm_batch_size": 2, "options": (("memories", 4),)}
GROWING = ({"norm_batch_size": 2}, {"accumulate": 4}, MEMORIES)  # before batches are whole


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        *((name, {}) for name in ("torch", "mbn", "mabn", "brn", "bgn", "gn")),
        ("mbn", LATER),
        *(("mabn", {"batch_size": 8, "small_epochs": 1, **cut}) for cut in GROWING),
    ],
)
def test_a_stopped_training_ends_with_the_same_numbers(
    tmp_path: Path, method: str, settings: dict[str, object]
) -> None:
    run = Run(method=method, **SMALL, **settings)
    whole = train(run, tmp_path / "whole")
    again = train_stopped_after_each_epoch(run, tmp_path / "stopped")
    timeless = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in result["epochs"]]
        for result in (whole, again)
    ]
    assert timeless[0] == timeless[1]
    assert [p.suffix for p in (tmp_path / "stopped" / "runs").iterdir()] == [".json"]
    assert train(run, tmp_path / "stopped") == again  # a finished run is not trained again


@pytest.mark.parametrize(
    ("method", "cut"), [("torch", GROWING[1]), *(("bn", cut) for cut in GROWING)], ids=str
)
def test_after_small_batches_come_whole_ones(method: str, cut: dict[str, int]) -> None:
    run = Run(method=method, train_size=24, batch_size=8, epochs=2, small_epochs=1, **cut)
    data = load(run)
    small, again = prepare(run, data), prepare(run, data)
    for training in (small, again):
        train_epoch(run, training, data, 1)
    other = run.but(norm_batch_size=None, accumulate=1, small_epochs=None, options=())
    plain = prepare(other, data)
    kept = small.model.state_dict().items()
    plain.model.load_state_dict({k: v for k, v in kept if "memories." not in k})
    plain.optimizer.load_state_dict(copy.deepcopy(small.optimizer.state_dict()))
    plain.learning_rate.load_state_dict(small.learning_rate.state_dict())
    rows = [train_epoch(run, small, data, 2), train_epoch(other, plain, data, 2)]
    assert rows[0]["train_loss"] == rows[1]["train_loss"]
    assert rows[0]["test_loss"] == rows[1]["test_loss"]
    still_small = train_epoch(run.but(small_epochs=2), again, data, 2)
    assert rows[0]["train_loss"] != still_small["train_loss"]


@pytest.mark.exhaustive
def test_a_killed_process_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    run = Run(method="mabn", epochs=4, train_size=400)
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from anybatch.tools.run import Run\n"
        "from anybatch.tools.training import train\n"
        "torch.set_num_threads(1)\n"
        "train(Run(method='mabn', epochs=4, train_size=400), Path(sys.argv[1]),"
        " lambda *_: print('epoch', flush=True))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    first, second = train(run, tmp_path / "whole"), train(run, tmp_path / "killed")
    for a, b in zip(first["epochs"], second["epochs"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_a_checkpoint_that_is_broken_or_crafted_is_refused(tmp_path: Path) -> None:
    run = Run(**SMALL)
    path = tmp_path / "runs" / f"{run.key}.ckpt"
    path.parent.mkdir()

    class Crafted:
        def __reduce__(self) -> object:
            return (os.mkdir, (str(tmp_path / "owned"),))

    buffer = io.BytesIO()
    torch.save({"run": Crafted()}, buffer)
    for content in (b"half a fi", buffer.getvalue()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="delete it to start the run again"):
            train(run, tmp_path)
    assert not (tmp_path / "owned").exists()


def test_order_and_noise_follow_from_seed_and_epoch() -> None:
    run, data = Run(train_size=24), load(Run(train_size=24))
    first, again, other = (
        [x for x, _ in batches(r, data, e)] for r, e in ((run, 2), (run, 2), (run, 3))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    with pytest.raises(ValueError, match="batch_size=50: give a number from 1 to 24"):
        next(batches(Run(train_size=24, batch_size=50), data, 1))


def test_settings_that_suit_a_short_run() -> None:
    assert method_options(Run(method="brn", epochs=8), 100) == {"warmup_steps": 200, "smooth": True}
    given = Run(method="brn", options=(("smooth", False), ("warmup_steps", 5)))
    assert method_options(given, 100) == {"warmup_steps": 5, "smooth": False}
    assert method_options(Run(method="mabn", batch_size=8, norm_batch_size=2), 9) == {
        "norm_batch_size": 2
    }


def test_the_learning_rate_falls_at_milestones() -> None:
    run, data = Run(epochs=3, milestones=(1, 2), train_size=24), load(Run(train_size=24))
    training = prepare(run, data)
    rates = []
    for epoch in (1, 2, 3):
        rates.append(training.optimizer.param_groups[0]["lr"])
        for x, y in batches(run, data, epoch):
            step(run, training, x, y)
            training.learning_rate.step()
    assert rates == pytest.approx([0.1 * 2 / 64, 0.01 * 2 / 64, 0.001 * 2 / 64])


def test_decay_of_scales_and_shifts_is_a_setting() -> None:
    data = load(Run(train_size=24))

    def decays(**settings: object) -> set[float]:
        run = Run(method="bn", train_size=24, **settings)
        training = prepare(run, data)
        norms = [m for m in training.model.modules() if hasattr(m, "running_mean")]
        mine = {id(p) for norm in norms for p in (norm.weight,)}
        groups = training.optimizer.param_groups
        return {g["weight_decay"] for g in groups for p in g["params"] if id(p) in mine}

    assert decays() == {1e-4}
    assert decays(norm_decay=False) == {0.0}
    assert decays(norm_decay="auto") == {0.0, 1e-4}
    run = Run(method="bn", train_size=24, gamma_target=1.0, weight_decay=0.5, lr=32.0, momentum=0)
    training = prepare(run, data)
    norm = next(m for m in training.model.modules() if hasattr(m, "running_mean"))
    torch.nn.init.constant_(norm.weight, 3.0)
    (0 * training.model(data.train_x[:4])).sum().backward()
    training.optimizer.step()
    assert torch.allclose(norm.weight, torch.full_like(norm.weight, 3 - 1.0 * 0.5 * 2))


def test_weights_of_a_moving_average_network_may_stay_uncentred() -> None:
    x = torch.randn(4, 3, 8, 8)
    data = Dataset("some", x, torch.arange(4), x, torch.arange(4), 4)
    for options, centred in (((), True), ((("centralize", False),), False)):
        run = Run(data="npz", model="resnet8", method="mabn", options=options)
        first = next(m for m in prepare(run, data).model.modules() if hasattr(m, "out_channels"))
        moved = (first(x + 1) - first(x))[:, :, 4, 4]  # centred weights see no constant
        assert torch.allclose(moved, torch.zeros(()), atol=1e-5) == centred


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_in_every_precision(precision: str) -> None:
    run, data = Run(method="mabn", precision=precision, train_size=24), load(Run(train_size=24))
    training = prepare(run, data)
    x, y = next(batches(run, data, 1))
    assert step(run, training, x, y).isfinite()


def test_convolutions_put_out_channels_last(tmp_path: Path) -> None:
    binary_cifar10(tmp_path)
    run = Run("cifar10", str(tmp_path), "resnet8", "mabn")
    data = load(run)
    found = []
    for channels_last in (False, True):
        training = prepare(run.but(channels_last=channels_last), data)
        convs = [m for m in training.model.modules() if isinstance(m, torch.nn.Conv2d)]
        convs[-1].register_forward_hook(lambda _module, _x, y: found.append(y.detach()))
        step(run, training, *next(batches(run, data, 1)))
    by_row, by_pixel = (y.is_contiguous(memory_format=torch.channels_last) for y in found)
    assert (by_row, by_pixel) == (False, True)
    assert torch.allclose(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.exhaustive
def test_step_times_are_relative_to_torch() -> None:
    data = load(Run(train_size=24))
    times = time_steps(
        {"mabn": Run(method="mabn", train_size=24)}, data, rounds=3, block_seconds=0.001
    )
    assert set(times) == {"torch", "mabn"}
    assert times["torch"].ratio == 1.0
    assert times["mabn"].low <= times["mabn"].ratio <= times["mabn"].high
