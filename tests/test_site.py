"""The site builds without a warning, every page and notebook of it."""

import json
import os
import subprocess
import sys

import pytest
from commands import ROOT
from documented import NAVIGATION

pytest.importorskip("mkdocs")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_every_page_is_built(site):
    for name in NAVIGATION:
        page = (
            site / name.replace("index.md", ".") / "index.html"
            if name == "index.md"
            else site / name[:-3] / "index.html"
        )
        assert page.is_file(), name
    api = (site / "api" / "index.html").read_text()
    for name in ("create_segmenter", "create_detector", "open_weights", "export", "Predictor", "TrainStep", "Trainer"):
        assert f'.{name}"' in api, name


@pytest.mark.slow
def test_links_out_of_docs_lead_to_files(site):
    """Recipes, the contributing guide and the licence are files of the repository that the site has as well."""
    models = (site / "models" / "index.html").read_text()
    assert 'href="../files/configs/skanet_s.yaml"' in models
    assert (site / "files/configs/skanet_s.yaml").read_bytes() == (ROOT / "configs/skanet_s.yaml").read_bytes()
    home = (site / "index.html").read_text()
    assert 'href="imagenet/"' in home and 'href="contributing/"' in home and 'src="images/neighbours.png"' in home
    assert (site / "files/LICENSE").is_file() and json.loads((site / "search/search_index.json").read_text())["docs"]
