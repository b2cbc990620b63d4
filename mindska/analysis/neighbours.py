"""SkaNet's graph: which nodes each node is compared with, drawn on the image, and how far away they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor
from tqdm import tqdm

from ..data import EvalTransform
from ..data.lists import write_table
from ..errors import ConfigError
from ..models.layers.graph import MaxRelativeConv
from ..modes import pynative_mode
from ..streams import unfailing_stderr
from .drawing import grid, new_figure, save_figure, short_name, show_picture, shown, write_json
from .opening import Subject, batches, displayed, some_images

DRAWN = 8  # images in the picture
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#42d4f4")


@dataclass(frozen=True)
class Graph:
    """The neighbours that a block finds in a batch.

    Attributes:
        block: as "stages.2.1". size: (height, width) of the map of nodes; keys: of the pooled nodes among which the
            neighbours are.
        neighbours: (B, nodes, k), the nearest first.
    """

    block: str
    size: tuple[int, int]
    keys: tuple[int, int]
    neighbours: np.ndarray

    def centres(self, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """(nodes, 2) and (keys, 2): the middles of the nodes and of the pooled ones, (y, x) in pixels of the input."""
        step = (image_size[0] / self.size[0], image_size[1] / self.size[1])
        pooled = (self.size[0] // self.keys[0], self.size[1] // self.keys[1])
        return _middles(self.size, step), _middles(self.keys, (step[0] * pooled[0], step[1] * pooled[1]))

    def distances(self, image_size: tuple[int, int]) -> np.ndarray:
        """(B, nodes, k): from each node to its neighbours, in pixels of the input."""
        nodes, keys = self.centres(image_size)
        return np.linalg.norm(keys[self.neighbours] - nodes[None, :, None], axis=-1)

    def by_chance(self, image_size: tuple[int, int]) -> float:
        """The mean distance of a node from all nodes that might be its neighbours."""
        nodes, keys = self.centres(image_size)
        return float(np.mean([np.linalg.norm(keys - node, axis=-1).mean() for node in nodes]))


def _middles(size: tuple[int, int], step: tuple[float, float]) -> np.ndarray:
    rows, columns = np.meshgrid(np.arange(size[0]), np.arange(size[1]), indexing="ij")
    return np.stack([(rows.ravel() + 0.5) * step[0], (columns.ravel() + 0.5) * step[1]], axis=1)


def graph_cells(subject: Subject) -> dict[str, MaxRelativeConv]:
    """The graph convolutions of a network by their blocks.

    Raises:
        ConfigError: it has none.
    """
    found = {}
    for i, stage in enumerate(subject.backbone.stages):
        for j, block in enumerate(getattr(stage, "blocks", ())):
            cell = getattr(getattr(block.attn, "spatial", None), "graph", None)
            if isinstance(cell, MaxRelativeConv):
                found[f"stages.{i}.{j}"] = cell
    if not found:
        raise ConfigError(
            f"{subject.config.ckpt_path} holds {subject.config.model}, which has no graph of neighbours; expected a "
            f"SkaNet (skanet_s, skanet_nano)"
        )
    return found


def graphs(subject: Subject, images: np.ndarray) -> list[Graph]:
    """The neighbours that each block finds in images (B, C, H, W): one forward pass, in PyNative mode."""
    found: list[Graph] = []

    def keep(name: str) -> Any:
        def hook(cell: MaxRelativeConv, inputs: Any, output: Tensor) -> None:
            height, width = inputs[0].shape[2:]
            pooled = getattr(cell.pool, "kernel_size", 1)
            pooled = pooled if isinstance(pooled, (tuple, list)) else (pooled, pooled)
            neighbours = cell.neighbours(inputs[0]).asnumpy()
            found.append(Graph(name, (height, width), (height // pooled[-2], width // pooled[-1]), neighbours))

        return hook

    handles = [cell.register_forward_hook(keep(name)) for name, cell in graph_cells(subject).items()]
    try:
        with pynative_mode():
            subject.backbone.forward_stages(Tensor(images))
    finally:
        for handle in handles:
            handle.remove()
    return found


def shown_blocks(names: Sequence[str]) -> list[str]:
    """The first and the last block of each stage."""
    by_stage: dict[str, list[str]] = {}
    for name in names:
        by_stage.setdefault(name.rpartition(".")[0], []).append(name)
    return [name for blocks in by_stage.values() for name in dict.fromkeys((blocks[0], blocks[-1]))]


def write(
    out: Path,
    subject: Subject,
    nodes: Sequence[tuple[float, float]],
    files: Sequence[Path],
    number: int,
    ending: str,
) -> Iterator[str]:
    """Everything that `mindska analyze neighbours` writes; yields what it says.

    Args:
        nodes: places in the image, as shares of its height and width.
    """
    cells = graph_cells(subject)
    images = some_images(subject, files, number)
    size, blocks = subject.pixels.image_size, shown_blocks(list(cells))
    figure, axes = grid(min(DRAWN, len(images)), len(blocks), 1.6)
    rows: list[list[Any]] = []
    distances: dict[str, list[np.ndarray]] = {name: [] for name in cells}
    shapes: dict[str, Graph] = {}
    bar = tqdm(total=len(images), unit="image", disable=None, file=unfailing_stderr())
    seen = 0
    for places, pixels in batches(images, [EvalTransform(subject.pixels)], subject.config.batch_size, subject.config):
        for graph in graphs(subject, pixels[0]):
            shapes[graph.block] = graph
            each = graph.distances(size)
            distances[graph.block].append(each.ravel())
            middles, keys = graph.centres(size)
            for place_of_node, (y, x) in enumerate(nodes):
                row = min(int(y * graph.size[0]), graph.size[0] - 1)
                column = min(int(x * graph.size[1]), graph.size[1] - 1)
                node = row * graph.size[1] + column
                for i, place in enumerate(places):
                    near = graph.neighbours[i, node]
                    for rank, key in enumerate(near, start=1):
                        at = [round(float(value), 1) for value in (*middles[node], *keys[key])]
                        rows.append([images.names[place], graph.block, row, column, rank, *at, round(float(each[i, node, rank - 1]), 2)])  # fmt: skip # noqa: E501
                    if place < DRAWN and graph.block in blocks:
                        picture = displayed(pixels[0, i], subject.pixels)
                        title = graph.block if place == 0 else ""
                        spot = axes[place, blocks.index(graph.block)]
                        _draw(spot, picture, middles[node], keys[near], COLOURS[place_of_node % len(COLOURS)], title)
        for place in places:
            if place < DRAWN:
                axes[place, 0].set_ylabel(shown(short_name(images.names[place]), 16), fontsize=7)
        seen += len(places)
        bar.update(len(places))
    bar.close()
    save_figure(figure, out / f"neighbours.{ending}")
    header = ("image", "block", "node_row", "node_column", "rank", "node_y", "node_x", "neighbour_y", "neighbour_x", "distance")  # fmt: skip # noqa: E501
    write_table(out / "neighbours.csv", header, rows)
    table = [_statistics(shapes[name], np.concatenate(distances[name]), cells[name], size) for name in cells]
    write_table(out / "neighbours_distance.csv", list(table[0]), (list(row.values()) for row in table))
    facts = dict(model=subject.config.model, ckpt_path=subject.config.ckpt_path, image_size=size, images=seen)
    write_json(out / "neighbours.json", dict(facts, blocks=table))
    _draw_distances(out / f"neighbours_distance.{ending}", table)
    yield f"{seen} images, distance of the neighbours in pixels of {size[0]}x{size[1]}"
    yield f"{'block':<12}{'mean':>8}{'median':>8}{'p90':>8}{'by chance':>11}"
    for each_block in table:
        figures = "".join(f"{each_block[name]:8.1f}" for name in ("mean", "median", "p90"))
        yield f"{each_block['block']:<12}{figures}{each_block['by_chance']:11.1f}"
    yield f"{out / f'neighbours.{ending}'}, {out / f'neighbours_distance.{ending}'}, and CSV"


def _draw(axes: Any, picture: np.ndarray, node: np.ndarray, near: np.ndarray, colour: str, title: str) -> None:
    if not axes.images:
        show_picture(axes, picture)
        axes.set_title(title, fontsize=8)
    for y, x in near:
        axes.plot([node[1] - 0.5, x - 0.5], [node[0] - 0.5, y - 0.5], "-", color=colour, linewidth=0.8)
    axes.plot(near[:, 1] - 0.5, near[:, 0] - 0.5, "o", color=colour, markersize=3)
    axes.plot(node[1] - 0.5, node[0] - 0.5, "*", color=colour, markersize=8, markeredgecolor="white")
    axes.set_xlim(-0.5, picture.shape[1] - 0.5)
    axes.set_ylim(picture.shape[0] - 0.5, -0.5)


def _statistics(graph: Graph, distances: np.ndarray, cell: MaxRelativeConv, size: tuple[int, int]) -> dict[str, Any]:
    keys = graph.keys[0] * graph.keys[1]
    return dict(
        block=graph.block,
        nodes=graph.size[0] * graph.size[1],
        keys=keys,
        k=cell.search.k,
        dilation=min(cell.search.dilation, keys // cell.search.k),
        mean=round(float(distances.mean()), 3),
        median=round(float(np.median(distances)), 3),
        p90=round(float(np.percentile(distances, 90)), 3),
        largest=round(float(distances.max()), 3),
        by_chance=round(graph.by_chance(size), 3),
    )


def _draw_distances(path: Path, table: Sequence[dict[str, Any]]) -> None:
    figure = new_figure(max(5, 0.35 * len(table) + 2), 3.2)
    axes = figure.subplots()
    places = range(len(table))
    for name, style in (("mean", "o-"), ("median", "s--"), ("p90", "^:")):
        axes.plot(places, [row[name] for row in table], style, markersize=4, label=name)
    axes.plot(places, [row["by_chance"] for row in table], "-", color="grey", label="by chance")
    axes.set_xticks(places, [row["block"] for row in table], rotation=60, fontsize=8)
    axes.set(ylabel="distance in pixels", title="Distance of a node's neighbours, by block")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    save_figure(figure, path)
