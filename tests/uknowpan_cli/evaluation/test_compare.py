"""`uknowpan compare`: one page with every method, its scores, and pictures that a browser shows."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from rasters import write_raster
from running import Run
from scipy.ndimage import gaussian_filter

from uknowpan.datasets.synthetic import load_demo_scene, write_scene
from uknowpan.evaluation.comparing import choose_window
from uknowpan.tiling import open_pair

METHODS = ["bicubic", "brovey", "gsa", "mtf-glp", "awlp", "generic"]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    paths = write_scene(load_demo_scene(160), tmp_path_factory.mktemp("scene"))
    return [str(paths.pan), str(paths.ms)]


def test_a_page_that_a_browser_shows(scene: list[str], uknowpan: Run, tmp_path: Path) -> None:
    """All results and scores are on the page, nothing comes from elsewhere, and a browser draws every picture."""
    page = tmp_path / "c.html"
    outcome = uknowpan("compare", *scene, "-o", page, "--png", tmp_path / "c.png", "--json", "-q")
    assert outcome.code == 0, outcome.stderr
    scores = json.loads(outcome.stdout)["scores"]
    assert list(scores) == METHODS and all(scores[name]["seconds"] > 0 for name in METHODS)
    # Sharpening explains the MS better than an enlarged MS does.
    assert scores["generic"]["r_ergas"] < 0.5 * scores["bicubic"]["r_ergas"]

    text = page.read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert [entry["name"] for entry in data["entries"]] == METHODS
    assert (data["width"], data["height"], data["ratio"]) == (160, 160, 4)
    assert all(len(entry["pictures"]) == 2 for entry in data["entries"])  # four bands
    assert (
        not any("sharp_ergas" in entry["scores"] for entry in data["entries"]) and not data["truth"]
    )  # the scene is too small for a twin
    assert not re.search(r"(src|href)=|https?://", text)
    assert page.stat().st_size < 8e6 and (tmp_path / "c.png").stat().st_size > 10_000

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("the page is right, but no chromium is installed to show it")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([chromium, *flags, page.as_uri()], capture_output=True, text=True, timeout=300)
    body = re.search(r"<body[^>]*>", done.stdout)[0]
    assert 'data-ready="7"' in body and "data-error" not in body
    assert "Of these methods generic is nearest to the MS" in done.stdout  # the answer comes first


def test_inputs_and_outputs_are_checked(scene: list[str], uknowpan: Run, tmp_path: Path) -> None:
    there = tmp_path / "c.html"
    there.write_text("kept")
    uknowpan("compare", *scene, "-o", there).fails(4, "exists")
    uknowpan("compare", *scene, "-o", tmp_path / "d.html", "-m", tmp_path / "none.safetensors").fails(5)
    assert there.read_text() == "kept" and not (tmp_path / "d.html").exists()


def test_the_window_shows_fine_detail(tmp_path: Path) -> None:
    """Soft clouds of more contrast than the ground: the window, once full of them, holds the ground."""
    rng = np.random.default_rng(0)
    pan = 500 + 100 * gaussian_filter(rng.normal(size=(1024, 1024)), 6) / 0.047 + rng.normal(size=(1024, 1024))
    pan[640:896, 128:384] = 500 + 50 * rng.random((256, 256))
    write_raster(tmp_path / "pan.tif", pan[None].astype(np.float32), Affine(1, 0, 0, 0, -1, 0))
    ms = pan.reshape(1, 256, 4, 256, 4).mean((2, 4)).astype(np.float32)
    write_raster(tmp_path / "ms.tif", ms, Affine(4, 0, 0, 0, -4, 0))
    with open_pair(str(tmp_path / "pan.tif"), str(tmp_path / "ms.tif")) as pair:
        row, col, height, width = choose_window(pair, 256)
    assert (height, width) == (256, 256)
    shared = max(min(row + 256, 896) - max(row, 640), 0) * max(min(col + 256, 384) - max(col, 128), 0)
    assert shared > 0.5 * 256**2
