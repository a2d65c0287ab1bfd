"""The papers' data sets beside those of `anybatch.tools.data`, which loads both by name."""

from anybatch.tools.data import LOADERS, Dataset, data_root
from anybatch.tools.run import Run
from papers.datasets import camvid, coco, corrupted


def _camvid(run: Run) -> Dataset:
    root = data_root(run)
    train, test = (camvid.read_split(root, split, run.image_size) for split in ("train", "test"))
    return Dataset("camvid", *train, *test, camvid.CLASSES)


def _coco(run: Run) -> Dataset:
    train, test, classes = coco.read(data_root(run), run.image_size)
    return Dataset(data_root(run).stem, train, train.part.targets, test, test.part.targets, classes)


LOADERS.update({"camvid": _camvid, "coco": _coco, "cifar100-corrupted": corrupted.load})
