"""What a weights file is, told from its content, and what it holds before any translation."""

from __future__ import annotations

import hashlib
import logging
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from ..errors import MissingWeights, WeightsError, few, printable
from ..files import sha256
from .convert import STATE_PREFIX, from_layers
from .files import MOST_BYTES, read_file, read_safetensors, with_path
from .foreign import read_caffemodel, read_torch
from .shards import index_in, read_index, read_shards
from .wrappers import Named, split

log = logging.getLogger("mindska")

# kind of file -> the frameworks whose names its weights may have (see `names.py`)
KINDS = {
    "PyTorch": ("torch",),
    "safetensors": ("torch", "mindspore"),
    "Caffe": ("caffe",),
    "MindSpore": ("mindspore",),
}
SUFFIXES = (".ckpt", ".pth", ".pth.tar", ".pt", ".bin", ".safetensors", ".caffemodel")  # of files in a folder to name
# What is found in the place of weights: how it begins, without white space and in small letters -> what it is.
TEXTS = {
    b"version https://git-lfs": "it is a git-lfs pointer, which names the file; `git lfs pull` fetches the file itself",
    b"<": "it is a page (HTML or XML): the download gave a page about the file, a login or an error; download the file "
    "itself",
}
CONTROL = set(range(32)) - set(b"\t\n\r\f")  # no text has such bytes
FORMATS = {  # how it begins -> what it is
    b"\x89HDF": "it is in HDF5, which only Caffe and Keras read",
    b"\x93NUMPY": "it is one array of NumPy's",
    b"GGUF": "it is in GGUF, which holds no such networks",
    b"\xd8^:\x7f": "it is encrypted (MindSpore's enc_key); load it with MindSpore, and save it without a key",
    **{magic: f"it is an archive ({name}); unpack it first"
       for magic, name in ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"7z\xbc\xaf", "7z"),
                           (b"\x28\xb5\x2f\xfd", "zstd"), (b"Rar!", "rar"))},
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """The weights in a file, under the file's own names without the prefixes of training tools.

    Attributes:
        path: the file, or the index of several.
        kind: "PyTorch", "safetensors", "Caffe" or "MindSpore".
        named: the weights with their names in the file, and what lies beside them.
        averaged: they are an average over the training (EMA).
        both: the file has averaged and raw weights.
        record: what the file says of itself; of a file of ours everything, of others the epoch where it is known.
    """

    path: Path
    kind: str
    named: Named
    averaged: bool = False
    both: bool = False
    record: dict[str, Any] = field(default_factory=dict)
    shards: tuple[Path, ...] = ()

    @property
    def arrays(self) -> Mapping[str, Any]:
        """Name -> array or tensor."""
        return self.named.arrays

    @property
    def size(self) -> int:
        """Bytes of the file, or of the index and its shards."""
        return sum(path.stat().st_size for path in (self.path, *self.shards))

    @property
    def sha256(self) -> str:
        """The file's SHA-256; of several files, the one of the lines that sha256sum prints of them."""
        if not self.shards:
            return sha256(self.path)
        lines = (f"{sha256(path)}  {path.name}\n" for path in (self.path, *self.shards))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def choice(self) -> str:
        """A line on the choice between averaged and raw weights; empty where there is none."""
        if not self.both:
            return ""
        taken, other, words = (
            ("averaged (EMA)", "raw", "--no-use_ema") if self.averaged else ("raw", "averaged (EMA)", "--use_ema")
        )
        value = not self.averaged
        return (
            f"{self.path}: the {taken} weights are taken; the file has the {other} ones as well ({words}; in "
            f"Python open_weights(path, ema={value}))"
        )

    @property
    def frameworks(self) -> tuple[str, ...]:
        """The frameworks whose names the weights may have."""
        return KINDS[self.kind]


def kind_of(path: Union[str, Path]) -> str:
    """The kind of a weights file, by its first bytes; "index": it names the files that hold the weights.

    Raises:
        MissingWeights: there is no such file.
        WeightsError: it is nothing that holds weights, or cannot be read; the message says what it is.
    """
    path = Path(path)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise WeightsError(_folder(path))
        if not stat.S_ISREG(status.st_mode):
            raise WeightsError(f"{path} is no file: a pipe, a socket or a device")
        with path.open("rb") as file:
            head = file.read(512)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingWeights(f"No checkpoint at {path.absolute()}") from None
    except ValueError as error:  # a path with a NUL
        raise WeightsError(f"{path} is no name of a file: {error}") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if status.st_size > MOST_BYTES:
        raise WeightsError(f"{path} has {status.st_size:,} bytes; expected at most {MOST_BYTES:,}")
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
        return "PyTorch"  # a zip archive, or a pickle as PyTorch wrote until version 1.5
    text = b"" if CONTROL & set(head) else head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"{"):
        return "index"
    if head[8:9] == b"{":
        return "safetensors"
    for start, what in {**TEXTS, **FORMATS}.items():
        if (text if start in TEXTS else head).startswith(start):
            raise WeightsError(f"{path} is no file of weights: {what}")
    if head[257:262] == b"ustar":
        raise WeightsError(f"{path} is no file of weights: it is an archive (tar); unpack it first")
    if head[:1] == b"\x0a":
        # protobuf, field 1: of a checkpoint a message that begins with a field 1, of a net its name
        length = next((i for i in range(1, 10) if head[i : i + 1] < b"\x80"), 0)
        return "MindSpore" if head[1 + length : 2 + length] == b"\x0a" else "Caffe"
    if head[:1] in (b"\x12", b"\x1a") or head.startswith(b"\xa2\x06"):  # a net without a name: layers, inputs, layer
        return "Caffe"
    reason = "it is empty: a download or a copy was cut" if not status.st_size else "its content is none of these"
    if path.suffix in (".onnx", ".mindir"):
        reason = "an exported model is for predicting"
    raise WeightsError(
        f"{path} is no file of weights ({reason}); known: PyTorch (.pth, .pth.tar, .bin), safetensors, Caffe "
        f"(.caffemodel) and MindSpore (.ckpt)"
    )


def _folder(path: Path) -> str:
    """What to say of a folder in the place of a file: which files of weights it has."""
    entries = sorted(entry.name for entry in path.iterdir())
    files = [name for name in entries if name.endswith(SUFFIXES)]
    what = f"it holds {few(files)}" if files else "it holds no file that is called like weights"
    return f"{path} is a folder; expected a file of weights ({what})"


def _located(path: Path) -> Path:
    """The file itself; of a folder with an index of weights in several files, the index."""
    try:
        indices = index_in(path) if path.is_dir() else []
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if len(indices) > 1:
        raise WeightsError(f"{path} is a folder with several indices; name one: {few(i.name for i in indices)}")
    return indices[0] if indices else path


def open_source(path: Union[str, Path], ema: Optional[bool] = None) -> Source:
    """The weights in a file, whatever its kind, or in several files with an index (given by it or by its folder).

    Args:
        ema: True for the averaged weights (an error when there are none), False for the raw ones, None for the averaged
            where the file has them, unless its record says that the raw ones scored higher (`weights: raw`).

    Raises:
        MissingWeights, WeightsError.
    """
    path = _located(Path(path))
    kind, shards = kind_of(path), ()  # type: str, tuple[Path, ...]
    loaded: Mapping[str, Any]
    if kind == "index":
        names = read_index(path)
        shards = tuple(path.parent / name for name in names)
        kinds = {kind_of(shard) for shard in shards}
        if kinds not in ({"PyTorch"}, {"safetensors"}):
            raise WeightsError(f"{path} names files of {' and '.join(sorted(kinds))}; expected PyTorch or safetensors")
        kind = kinds.pop()
        loaded, record = read_shards(path, names, read_torch if kind == "PyTorch" else _arrays), {}
    elif kind == "PyTorch":
        loaded = read_torch(path)
        record = {name: loaded[name] for name in ("epoch", "metric") if _is_number(loaded.get(name))}
    elif kind == "Caffe":
        loaded, record = from_layers(read_caffemodel(path)), {}
    else:
        arrays, record = (read_safetensors if kind == "safetensors" else read_file)(path)
        loaded = {name: array for name, array in arrays.items() if not name.startswith(STATE_PREFIX)}
    choice = with_path(path, split, loaded)
    if ema is None and choice.both and record.get("weights") == "raw":
        ema = False  # of a run: the raw weights scored higher
    named, averaged = choice.take(ema, str(path))
    if choice.others:
        log.warning("%s also has weights under %s, which are not read", printable(path), few(choice.others))
    return Source(path, kind, named, averaged, choice.both, record, shards)


def _arrays(path: Path) -> Mapping[str, Any]:
    return read_safetensors(path)[0]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9  # no NaN either
