"""Small data sets in COCO's format."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

SQUARE = [[10, 10, 30, 10, 30, 40, 10, 40]]


def annotation(number: int, image: int = 1, category: int = 1, box=(10, 10, 20, 30), **more) -> dict:
    return dict(id=number, image_id=image, category_id=category, bbox=list(box), iscrowd=0, area=600, **more)


def content(annotations=None, images: int = 2, categories=((1, "cat"), (2, "dog"))) -> dict:
    return dict(
        images=[dict(id=i, file_name=f"{i}.png", width=100, height=80) for i in range(1, images + 1)],
        annotations=[annotation(1), annotation(2, 2, 2)] if annotations is None else annotations,
        categories=[dict(id=number, name=name) for number, name in categories],
    )


def write(folder: Path, data: dict, make_images: bool = True, name: str = "a.json") -> Path:
    if make_images:
        for image in data["images"]:
            path = folder / image["file_name"]
            if not path.exists() and isinstance(image.get("width"), int) and image["width"] > 0:
                Image.new("RGB", (image["width"], image["height"]), (90, 120, 30)).save(path)
    path = folder / name
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return path
