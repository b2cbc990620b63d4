"""Bias to shape or texture, on images whose shape is of one class and whose texture is of another.

Source: Geirhos et al., ImageNet-trained CNNs are biased towards texture, ICLR 2019. Their images lie in folders of 16
classes (of the shape), and are called SHAPE-TEXTURE, each with a number: `cat/cat1-elephant2.png`. A network of
ImageNet's 1,000 classes answers one of the 16 by the mean probability of the classes that belong to it. The bias is
the share of answers for the shape among those for either; images whose shape and texture are of one class do not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from tqdm import tqdm

from ..config import Config
from ..data import EvalTransform
from ..data.imagenet import imagenet_classes
from ..data.images import read_image
from ..data.lists import write_table
from ..data.loader import in_parallel
from ..errors import ConfigError, DataError, few
from ..modes import graph_mode
from ..prediction import Predictor, find_images, open_predictor, softmax
from ..streams import unfailing_stderr
from .drawing import new_figure, save_figure, short_name, shown, write_json

# First and last numbers of ImageNet's classes that belong to each of the 16, as Geirhos et al. chose them.
SIXTEEN: dict[str, tuple[tuple[int, int], ...]] = {
    "airplane": ((404, 404),),
    "bear": ((294, 297),),
    "bicycle": ((444, 444), (671, 671)),
    "bird": (
        (8, 8), (10, 16), (18, 20), (22, 24), (80, 83), (87, 96), (98, 100), (127, 133), (135, 145),
    ),
    "boat": ((472, 472), (554, 554), (625, 625), (814, 814), (914, 914)),
    "bottle": ((440, 440), (720, 720), (737, 737), (898, 899), (901, 901), (907, 907)),
    "car": ((436, 436), (511, 511), (817, 817)),
    "cat": ((281, 286),),
    "chair": ((423, 423), (559, 559), (765, 765), (857, 857)),
    "clock": ((409, 409), (530, 530), (892, 892)),
    "dog": (
        (152, 191), (193, 203), (205, 226), (228, 241), (243, 250), (252, 257), (259, 259), (261, 263), (265, 268),
    ),
    "elephant": ((385, 386),),
    "keyboard": ((508, 508), (878, 878)),
    "knife": ((499, 499),),
    "oven": ((766, 766),),
    "truck": ((555, 555), (569, 569), (656, 656), (675, 675), (717, 717), (734, 734), (864, 864), (867, 867)),
}  # fmt: skip


def members(category: str) -> list[int]:
    """The numbers of ImageNet's classes that belong to one of the 16."""
    return [number for first, last in SIXTEEN[category] for number in range(first, last + 1)]


def decision_matrix(categories: Sequence[str], class_names: Sequence[str]) -> np.ndarray:
    """(classes, categories): what probabilities are multiplied with to be the categories'.

    A network of ImageNet's 1,000 classes answers by means; one whose classes have the categories' names directly.

    Raises:
        ConfigError: the network's classes are neither.
    """
    matrix = np.zeros((len(class_names), len(categories)))
    known, names = list(class_names), imagenet_classes()
    synsets = list(names)
    by_synset = set(known) == set(synsets)
    if set(categories) <= set(SIXTEEN) and (by_synset or known == list(names.values())):
        order = {name: i for i, name in enumerate(known)}
        for column, category in enumerate(categories):
            numbers = members(category)
            matrix[[order[synsets[n]] for n in numbers] if by_synset else numbers, column] = 1 / len(numbers)
        return matrix
    strange = [category for category in categories if category not in known]
    if strange:
        raise ConfigError(
            f"The network knows no class {few(strange)}; expected a network of ImageNet's 1,000 classes and folders of "
            f"the 16 classes ({', '.join(SIXTEEN)}), or folders of the network's own classes ({few(known)})"
        )
    for column, category in enumerate(categories):
        matrix[known.index(category), column] = 1
    return matrix


def parse_name(stem: str, categories: Sequence[str]) -> Optional[tuple[str, str]]:
    """(shape, texture) of a file called "cat1-elephant2"; None where it is called otherwise.

    The number after a class may be missing.
    """
    for shape in sorted(categories, key=len, reverse=True):
        for texture in sorted(categories, key=len, reverse=True):
            if re.fullmatch(rf"{re.escape(shape)}[0-9]*-{re.escape(texture)}[0-9]*", stem):
                return shape, texture
    return None


def read_layout(data_dir: Path) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """The images in folders of their shape's class.

    Returns:
        The categories (sorted), the paths, and (N,) numbers of shape and texture.

    Raises:
        DataError: there are no such folders, or files that are called otherwise.
    """
    paths = find_images([data_dir])
    folders = {path: Path(path).parent.name for path in paths}
    categories = sorted(set(folders.values()))
    if any(Path(path).parent.parent != data_dir for path in paths) or len(categories) < 2:
        raise DataError(f"{data_dir} is not laid out as SHAPE/SHAPE1-TEXTURE1.png: its folders are {few(categories)}")
    shapes, textures, strange = [], [], []
    for path in paths:
        parsed = parse_name(Path(path).stem, categories)
        if parsed is None or parsed[0] != folders[path]:
            strange.append(str(Path(path).relative_to(data_dir)))
            continue
        shapes.append(categories.index(parsed[0]))
        textures.append(categories.index(parsed[1]))
    if strange:
        raise DataError(
            f"{len(strange):,} of {len(paths):,} images are not called as their shape and texture, such as "
            f"{categories[0]}/{categories[0]}1-{categories[1]}2.png: {few(strange)}"
        )
    return categories, paths, np.array(shapes), np.array(textures)


def decide(predictor: Predictor, paths: Sequence[str], matrix: np.ndarray) -> np.ndarray:
    """(N,) the category that each image is taken for: one forward pass an image.

    Raises:
        DataError: an image cannot be read.
    """
    transform, size = EvalTransform(predictor.preprocessing), predictor.batch_size
    found = []

    def collate(_: Sequence[str], samples: list[np.ndarray]) -> tuple[int, np.ndarray]:
        zeros = [np.zeros_like(samples[0])] * (size - len(samples))
        return len(samples), np.stack([*samples, *zeros])

    groups = (paths[i : i + size] for i in range(0, len(paths), size))
    with tqdm(total=len(paths), unit="image", disable=None, file=unfailing_stderr()) as bar, graph_mode():
        for count, images in in_parallel(lambda path: transform(read_image(path)), groups, collate, 2):
            found.append((softmax(predictor.logits(images)[:count]) @ matrix).argmax(1))
            bar.update(count)
    return np.concatenate(found)


def figures(answers: np.ndarray, shapes: np.ndarray, textures: np.ndarray, categories: Sequence[str]) -> dict[str, Any]:
    """The bias over all images of two classes, and of each class of shape; None where neither was answered."""
    conflict = shapes != textures
    for_shape, for_texture = conflict & (answers == shapes), conflict & (answers == textures)

    def counted(chosen: np.ndarray) -> dict[str, Any]:
        shape, texture, images = (int((each & chosen).sum()) for each in (for_shape, for_texture, conflict))
        either = shape + texture
        return dict(
            images=images, shape=shape, texture=texture, other=images - either,
            shape_bias=shape / either if either else None,
        )  # fmt: skip

    each = [dict(name=name, **counted(shapes == i)) for i, name in enumerate(categories)]
    known = [row["shape_bias"] for row in each if row["shape_bias"] is not None]
    whole = counted(np.ones(len(answers), bool))
    return dict(**whole, mean_of_classes=float(np.mean(known)) if known else None, classes=each)


def draw(path: Path, found: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Draws the bias of each class of shape, and of all images as a line, as Geirhos et al. do; a colour a network."""
    names = [row["name"] for row in found[0][1]["classes"]]
    figure = new_figure(5.5, 0.32 * len(names) + 1.6)
    axes = figure.subplots()
    for number, (network, each) in enumerate(found):
        values = [np.nan if row["shape_bias"] is None else row["shape_bias"] for row in each["classes"]]
        whole = "none" if each["shape_bias"] is None else f"{100 * each['shape_bias']:.1f} %"
        axes.plot(values, range(len(names)), "o", color=f"C{number % 10}", label=f"{shown(network, 50)}: {whole}")
        if each["shape_bias"] is not None:
            axes.axvline(each["shape_bias"], color=f"C{number % 10}", linewidth=1)
    axes.set_yticks(range(len(names)), [shown(name) for name in names])
    axes.set(xlim=(-0.03, 1.03), xlabel="share of answers for the shape (0: all for the texture)")
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    save_figure(figure, path)


def write(out: Path, config: Config, ending: str) -> Iterator[str]:
    """Everything that `mindska analyze shape_bias` writes; yields what it says."""
    categories, paths, shapes, textures = read_layout(Path(config.data_dir))
    if not (shapes != textures).any():
        raise DataError(f"{config.data_dir} has no image whose shape and texture are of different classes")
    found, rows = [], []
    for ckpt_path in (config.ckpt_path, *config.more_ckpt_paths):
        size = (config.image_resize[0], config.image_resize[-1]) if config.image_resize else None
        predictor = open_predictor(ckpt_path, config.model, config.use_ema, config.batch_size, size)
        answers = decide(predictor, paths, decision_matrix(categories, predictor.class_names))
        name = short_name(ckpt_path)
        found.append((name, figures(answers, shapes, textures, categories)))
        for path, shape, texture, answer in zip(paths, shapes, textures, answers):
            rows.append([name, path, categories[shape], categories[texture], categories[answer]])
    write_table(out / "shape_bias.csv", ("network", "path", "shape", "texture", "answer"), rows)
    write_json(out / "shape_bias.json", dict(networks=[dict(network=name, **each) for name, each in found]))
    draw(out / f"shape_bias.{ending}", found)
    for name, each in found:
        bias = "none" if each["shape_bias"] is None else f"{100 * each['shape_bias']:.1f} %"
        yield (
            f"{name}: shape bias {bias}; {each['shape']:,} for the shape, {each['texture']:,} for the texture, "
            f"{each['other']:,} for neither of {each['images']:,} images"
        )
    yield f"{out / f'shape_bias.{ending}'}, {out / 'shape_bias.csv'}, {out / 'shape_bias.json'}"
