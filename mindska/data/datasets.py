"""Image classification data on disk: folders of images, or CIFAR and MNIST in their binary formats."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Callable, Optional, Union

import numpy as np
from PIL import Image

from ..errors import DataError, look_alike, printable
from .base import THREADS, ImageArrays, ImageDataset, ImageFiles, relabelled
from .class_order import Order, read_class_map, read_folder_map
from .folders import Surroundings, find_images, is_folder, subfolders
from .images import EXTENSIONS
from .lists import ImageList, is_list
from .mnist import Mnist
from .shards import ImageShards, find_shards

log = logging.getLogger("mindska")

Dataset = ImageDataset


class ImageFolder(ImageFiles):
    """`data_dir/split/class/**/*.jpg` (or another image format); classes are numbered in the order of their names.

    The order is that of text, as in torchvision and MindCV. Hidden files and folders, those of storage systems and
    files with other extensions are passed over and counted; `mindska.data.folders` says which links are followed.

    Args:
        order: from the names of the folders to the classes in the order of their numbers.
        exif_orientation: turn images as their EXIF tag says.
    """

    def __init__(
        self,
        data_dir: Union[str, Path],
        split: str,
        order: Order = list,
        exif_orientation: bool = False,
    ) -> None:
        root = Path(data_dir) / split
        if not is_folder(root):
            there = ", ".join(subfolders(data_dir)[0]) or "none"
            raise DataError(
                f"No split {split!r} in {data_dir}; its folders: {there}. Where these are the classes, --val_ratio 0.2 "
                f"keeps a fifth of each for validation"
            )
        self.root, self.exif_orientation = root, exif_orientation
        self.split = split if split != "." else "images"
        names, self.found = subfolders(root)
        if not names:
            raise DataError(
                f"{root} has no class folders; expected {root}/CLASS/IMAGE.jpg{self.found.passed_over_text()}"
            )
        if twins := look_alike(names):
            raise DataError(f"{root} has class folders that look the same{twins}")
        self.class_names = order(names)
        folders = {str(root / name): name for name in self.class_names}
        surroundings = Surroundings(folders)
        labels: list[int] = []
        with ThreadPoolExecutor(THREADS) as pool:
            listings = pool.map(lambda folder: find_images(folder, surroundings), folders)
            for label, (folder, found) in enumerate(zip(folders, listings)):
                if not found.paths:
                    endings = ", ".join(sorted(EXTENSIONS))
                    raise DataError(f"{folder} has no image ({endings}){found.passed_over_text()}")
                self.found.add(found)
                labels += [label] * len(found.paths)
        self.paths, self.sizes = self.found.paths, self.found.sizes
        self.passed_over = self.found.passed_over_text()
        self.labels = np.asarray(labels, np.int32)
        self.check_headers()
        self.found.report_links()


def image_files(folder: Union[str, Path]) -> list[str]:
    """The image files below a folder, sorted; how many there are, and what is passed over, goes to the log.

    Raises:
        DataError: a folder cannot be listed.
    """
    found = find_images(str(folder))
    found.report_links()
    log.info("%d images in %s%s", len(found.paths), printable(folder), printable(found.passed_over_text()))
    return found.paths


class Cifar(ImageArrays):
    """CIFAR-10 or CIFAR-100 in the binary format of its authors: records of label bytes and 3 x 32 x 32 pixel bytes."""

    FILES = {  # name -> (usual folder, label bytes, training files, test files, class names)
        "cifar10": (
            "cifar-10-batches-bin",
            1,
            [f"data_batch_{i}.bin" for i in range(1, 6)],
            ["test_batch.bin"],
            "batches.meta.txt",
        ),
        "cifar100": ("cifar-100-binary", 2, ["train.bin"], ["test.bin"], "fine_label_names.txt"),
    }
    PIXELS = 3 * 32 * 32

    def __init__(self, name: str, data_dir: Union[str, Path], split: str, order: Order = list) -> None:
        folder, label_bytes, train, test, names = self.FILES[name]
        root = Path(data_dir)
        root = root / folder if is_folder(root / folder) else root
        files = {"train": train, "val": test, "test": test}.get(split)
        if files is None:
            raise DataError(f"{name} has no split {split!r}; its splits: train, val")
        missing = [file for file in [*files, names] if not (root / file).is_file()]
        if missing:
            raise DataError(f"{name} is not in {root.absolute()}: missing {', '.join(missing)} (binary version)")
        self.name, self.split, self.root = name, split, root
        try:
            own_names = (root / names).read_text(encoding="ascii").split()
            contents = [np.fromfile(root / file, np.uint8) for file in files]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{name} in {root.absolute()} cannot be read: {error}") from error
        size = label_bytes + self.PIXELS
        for file, data in zip(files, contents):
            if data.size == 0 or data.size % size:
                raise DataError(f"{root / file} has {data.size} bytes; expected a multiple of {size}: is it complete?")
        table = np.concatenate([data.reshape(-1, size) for data in contents])
        labels = table[:, label_bytes - 1]  # CIFAR-100: coarse label, then fine label
        if labels.max() >= len(own_names):
            raise DataError(f"{root} has label {labels.max()} but {len(own_names)} class names")
        self.number(labels, own_names, order)
        self.pixels = table[:, label_bytes:].reshape(-1, 3, 32, 32)

    def as_image(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.pixels[index].transpose(1, 2, 0)))


# Data sets with files of their own, and what reads them: (name, data_dir, split, order of the classes) -> data set.
NAMED: dict[str, Callable[..., Dataset]] = {**dict.fromkeys(Cifar.FILES, Cifar), **dict.fromkeys(Mnist.CLASSES, Mnist)}


def open_dataset(
    name: str,
    data_dir: Union[str, Path],
    split: str,
    class_map: Union[str, Path] = "",
    trained_on: Optional[Sequence[str]] = None,
    exif_orientation: bool = False,
    classes: str = "",
    allow_outside_data_dir: bool = False,
) -> Dataset:
    """A split of a data set: "imagenet" (or any folder of class folders, tar shards, or list of files), "cifar10",
    "cifar100", "mnist", "fashion_mnist", "kmnist".

    How many images and classes it has, and what was passed over, goes to the log.

    Args:
        split: a folder in `data_dir`; the beginning of its tar files' names (`train` for `train-0000.tar`, ...); or a
            CSV file with columns path and label (see `ImageList`).
        class_map: text file with the classes in the order of their numbers (see `read_class_map`), or a CSV file that
            says which folder is of which class (see `read_folder_map`).
        trained_on: the classes of a network in its order; where the data has the same ones, they are numbered like it.
        exif_orientation: turn images as their EXIF tag says.
        classes: those to take, with commas, or a file that names them (see `chosen_classes`).
        allow_outside_data_dir: a list may name files elsewhere.

    Raises:
        DataError: a folder, split or file is missing or is not what it should be.
    """
    if name not in ("", "imagenet", *NAMED):
        raise DataError(f"dataset is {name!r}; expected imagenet (folders of images) or one of {', '.join(NAMED)}")
    in_list = is_list(split) and name not in NAMED
    if not str(data_dir) and not in_list:
        raise DataError("data_dir is not set: name the folder that holds the images, e.g. --data_dir DATA")
    if str(data_dir) and not is_folder(data_dir):
        raise DataError(f"No data folder at {Path(data_dir).absolute()}")
    folders = read_folder_map(class_map) if is_list(str(class_map)) else {}
    mapped = read_class_map(class_map) if str(class_map) and not folders else None

    def order(names: list[str]) -> list[str]:
        if mapped is None:
            return list(trained_on) if trained_on and Counter(trained_on) == Counter(names) else names
        _check_map_fits(class_map, mapped, names, f"{split} in {data_dir}")
        return mapped

    # Of lists and shards: the classes that their labels may be. A choice of classes is made among all of them.
    known = mapped or (None if classes or folders else trained_on)
    dataset: Dataset
    if name in NAMED:
        dataset = NAMED[name](name, data_dir, split, order)
    elif in_list:
        dataset = ImageList(split, data_dir, known, exif_orientation, allow_outside_data_dir)
    elif shards := find_shards(data_dir, split):
        dataset = ImageShards(shards, split, data_dir, known, exif_orientation)
    else:
        dataset = ImageFolder(data_dir, split, order, exif_orientation)
    log.info("%s", dataset)
    if folders:
        _check_map_fits(class_map, list(folders), dataset.class_names, f"{split} in {data_dir}")
        names = order(list(dict.fromkeys(folders.values())))
        dataset = relabelled(dataset, names, [folders[each] for each in dataset.class_names], dataset.split)
        log.info("%s, by %s", dataset, class_map)
    if classes:
        dataset = with_classes(dataset, chosen_classes(classes), order)
        log.info("%s", dataset)
    return dataset


def _check_map_fits(file: Union[str, Path], mapped: Sequence[str], names: Sequence[str], place: str) -> None:
    if Counter(mapped) != Counter(names):
        raise DataError(
            f"The class map {file} does not fit {place}: it names what is no class there: "
            f"{sorted(set(mapped) - set(names))[:10]}; it lacks classes: {sorted(set(names) - set(mapped))[:10]}"
            f"{look_alike(set(mapped) - set(names), set(names) - set(mapped))}"
        )


def chosen_classes(classes: str) -> list[str]:
    """The classes that an option names: with commas, or in a text file, one a line (see `read_class_map`).

    Raises:
        DataError: it names none, or one twice.
    """
    if "," not in classes and Path(classes).is_file():
        return read_class_map(classes)
    names = [name.strip() for name in classes.split(",") if name.strip()]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        raise DataError(f"classes is {classes!r}; " + (f"it names twice: {twice[:10]}" if twice else "it names none"))
    return names


def check_known(chosen: Sequence[str], names: Iterable[str], where: str) -> None:
    """DataError where a class that was chosen is none of some."""
    unknown = [name for name in chosen if name not in set(names)]
    if unknown:
        raise DataError(
            f"classes names {unknown[:10]}, which {where} does not have; it has {sorted(names)[:10]}"
            f"{', ...' if len(list(names)) > 10 else ''}{look_alike(unknown, names)} (one class a line of a file, or "
            f"with commas between them)"
        )


def with_classes(dataset: Dataset, chosen: Sequence[str], order: Order = list) -> Dataset:
    """The images of some classes only, which are numbered anew, in the order that they had or that `order` gives.

    Raises:
        DataError: the data does not have one of them.
    """
    check_known(chosen, dataset.class_names, str(dataset.root))
    wanted = set(chosen)
    names = [name for name in dataset.class_names if name in wanted]
    with suppress(DataError):  # a class map of all classes
        names = order(names)
    left = [name if name in wanted else "" for name in dataset.class_names]
    return relabelled(dataset, names, left, dataset.split)
