"""The notebook of the documentation runs as it stands."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rasterio

FOLDER = Path(__file__).parents[1] / "docs" / "notebook"
MISSING = [name for name in ("matplotlib", "xarray") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_the_notebook_runs(tmp_path: Path) -> None:
    """From the pair beside it to a map; its stored outputs name no folder of ours."""
    for path in FOLDER.glob("*.tif"):
        shutil.copy(path, tmp_path)
    book = json.loads((FOLDER / "landsat.ipynb").read_text())
    code = "\n".join("".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code")
    imports = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [sys.executable, "-c", code + "\nplt.savefig('map.png')"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": imports, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    with rasterio.open(tmp_path / "sharp.tif") as sharp, rasterio.open(FOLDER / "landsat8_pan.tif") as pan:
        assert (sharp.shape, sharp.transform, sharp.count) == (pan.shape, pan.transform, 4)
    assert (tmp_path / "map.png").stat().st_size > 10_000
    stored = [output for cell in book["cells"] for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in stored) == 2
    assert not any("/" in "".join(output.get("text", "")) for output in stored)
