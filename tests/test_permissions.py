"""What may not be read or written is one message in every command: the path, and what the system says."""

import importlib
import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

import mindcv
import pytest
from commands import ROOT, script
from tiny import make_images

from mindska.models.factory import own_preprocessing
from mindska.names import known_models
from mindska.weights.files import write_checkpoint

NOBODY = 65534


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Files that only their owner may read, in a folder that all may enter."""
    # Python's own files may be out of the other user's reach.
    from sklearn.datasets import load_digits

    load_digits()

    for path in (ROOT / "scripts").glob("*.py"):
        script(path.stem)
    for module in ("prediction", "export", "folding", "weights.alike", "benchmark.measure", "benchmark.tables"):
        importlib.import_module(f"mindska.{module}")  # what commands load late
    known_models()
    "".encode("utf-32-le")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    net = mindcv.create_model("skanet_nano", num_classes=3)
    record = dict(model="skanet_nano", num_classes=3, preprocessing=own_preprocessing("skanet_nano"))
    for path in ("net.ckpt", "secret.ckpt", "closed/net.ckpt"):
        (folder / path).parent.mkdir(exist_ok=True)
        write_checkpoint(folder / path, {p.name: p for p in net.get_parameters()}, record)
    for path in ("secret.safetensors", "secret.pth", "secret.yaml", "secret.txt", "secret.onnx", "secret.mindir"):
        (folder / path).write_text("model: skanet_nano\n")
    (folder / "secret.onnx.json").write_text("{}")
    (folder / "secret.mindir.json").write_text("{}")
    for data in ("data", "closed/data", "half", "secret_data"):
        make_images(folder / data)
    (folder / "readonly").mkdir()
    (folder / "unlisted").mkdir()
    (folder / "unlisted").chmod(0o333)
    (folder / "out").mkdir()
    (folder / "out").chmod(0o777)
    for path in folder.glob("secret*"):
        path.chmod(0)
    (folder / "half" / "train" / "class1").chmod(0)
    (folder / "half" / "val" / "class1").chmod(0)
    (folder / "closed").chmod(0)
    (folder / "readonly").chmod(0o555)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def as_nobody(place, monkeypatch):
    """As a user who owns nothing here. Root may read everything."""
    monkeypatch.chdir(place)
    if os.geteuid() == 0:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    yield
    if os.getuid() == 0:
        os.seteuid(0)
        os.setegid(0)


def run(command, words):
    if command.startswith("scripts/"):
        script(command[len("scripts/") :]).main(words)
    else:
        sys.argv = [command, *words]
        runpy.run_path(str(ROOT / command), run_name="__main__")


DATA = "--data_dir data --model skanet_nano --image_resize 64 --batch_size 4 --epoch_size 1 --warmup_epochs 0"
COMMANDS = [
    # command and words; the path that the message must name
    ("train.py --config secret.yaml", "secret.yaml"),
    ("train.py --config closed/a.yaml", "closed/a.yaml"),
    (f"train.py {DATA} --data_dir secret_data", "secret_data"),
    (f"train.py {DATA} --data_dir closed/data", "closed/data"),
    (f"train.py {DATA} --data_dir half", "half/train/class1"),
    (f"train.py {DATA} --class_map secret.txt", "secret.txt"),
    (f"train.py {DATA} --class_map closed/a.txt", "closed/a.txt"),
    (f"train.py {DATA} --ckpt_path secret.ckpt", "secret.ckpt"),
    (f"train.py {DATA} --ckpt_path closed/net.ckpt", "closed/net.ckpt"),
    (f"train.py {DATA} --ckpt_save_dir readonly/run", "readonly/run"),
    (f"train.py {DATA} --ckpt_save_dir closed/run", "closed/run"),
    (f"train.py {DATA} --ckpt_save_dir unlisted", "unlisted"),
    ("validate.py --config secret.yaml --ckpt_path net.ckpt", "secret.yaml"),
    ("validate.py --data_dir data --ckpt_path secret.ckpt", "secret.ckpt"),
    ("validate.py --data_dir data --ckpt_path secret.safetensors", "secret.safetensors"),
    ("validate.py --data_dir data --ckpt_path closed/net.ckpt", "closed/net.ckpt"),
    ("validate.py --data_dir half --ckpt_path net.ckpt", "half/val/class1"),
    ("validate.py --data_dir data --ckpt_path net.ckpt --class_map secret.txt", "secret.txt"),
    ("validate.py --data_dir data --ckpt_path net.ckpt --result_json readonly/a.json", "readonly/a.json"),
    ("validate.py --data_dir data --ckpt_path net.ckpt --result_json closed/a.json", "closed/a.json"),
    ("scripts/predict data/val --ckpt_path secret.ckpt", "secret.ckpt"),
    ("scripts/predict data/val --ckpt_path secret.onnx", "secret.onnx"),
    ("scripts/predict data/val --ckpt_path secret.mindir", "secret.mindir"),
    ("scripts/predict data/val --ckpt_path closed/net.onnx", "closed/net.onnx"),
    ("scripts/predict half/val --ckpt_path net.ckpt", "half/val/class1"),
    ("scripts/predict closed/data --ckpt_path net.ckpt", "closed/data"),
    ("scripts/predict closed/a.jpg --ckpt_path net.ckpt", "closed/a.jpg"),
    ("scripts/convert --from secret.ckpt --to out/a.ckpt", "secret.ckpt"),
    ("scripts/convert --from secret.pth --to out/a.ckpt", "secret.pth"),
    ("scripts/convert --from net.ckpt --to readonly/a.ckpt", "readonly/a.ckpt"),
    ("scripts/convert --from net.ckpt --to closed/a.ckpt", "closed/a.ckpt"),
    ("scripts/convert --from net.ckpt --to out/a.ckpt --class_names secret.txt", "secret.txt"),
    ("scripts/convert --from net.ckpt --to out/a.ckpt --class_names closed/a.txt", "closed/a.txt"),
    ("scripts/export --format onnx --ckpt_path secret.ckpt --to out/a.onnx", "secret.ckpt"),
    ("scripts/export --format onnx --ckpt_path closed/net.ckpt --to out/a.onnx", "closed/net.ckpt"),
    ("scripts/export --format mindir --ckpt_path net.ckpt --to readonly/a.mindir", "readonly/a.mindir"),
    ("scripts/export --format mindir --ckpt_path net.ckpt --to closed/a.mindir", "closed/a.mindir"),
    ("scripts/inspect_checkpoint secret.ckpt", "secret.ckpt"),
    ("scripts/inspect_checkpoint closed/net.ckpt", "closed/net.ckpt"),
    ("scripts/average_checkpoints net.ckpt secret.ckpt --to out/a.ckpt", "secret.ckpt"),
    ("scripts/average_checkpoints net.ckpt net.ckpt --to readonly/a.ckpt", "readonly/a.ckpt"),
    ("scripts/clean_checkpoint secret.ckpt --to out", "secret.ckpt"),
    ("scripts/clean_checkpoint net.ckpt --to readonly", "readonly"),
    ("scripts/clean_checkpoint net.ckpt --to closed", "closed"),
    ("scripts/benchmark --loader --rounds 1 --json readonly/a.json", "readonly/a.json"),
    ("scripts/benchmark --loader --rounds 1 --json closed/a.json", "closed/a.json"),
    ("scripts/prepare_digits readonly/digits", "readonly/digits"),
    ("scripts/prepare_digit_scenes readonly/scenes", "readonly/scenes"),
]


@pytest.mark.fault("permissions")
@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
@pytest.mark.parametrize("line, path", COMMANDS, ids=[line for line, _ in COMMANDS])
def test_what_may_not_be_used_is_one_message(as_nobody, place, monkeypatch, capsys, line, path):
    command, *words = line.split()
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as ended:
        run(command, words)
    said = str(ended.value) + capsys.readouterr().err
    assert ended.value.code not in (0, None)
    assert "Permission denied" in said and path in said, said
    assert "Traceback" not in said and ".tmp" not in said
    assert not os.path.lexists("output") and not list((place / "out").iterdir())
