"""What is in the wheel."""

import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"uknowpan_cli": "uknowpan_cli", "models": "uknowpan_models", "tiling": "uknowpan_tiling"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, as setuptools writes beside its sources and reuses what lies there."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--disable-pip-version-check", "-w", folder, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def members(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.file_size for info in archive.infolist()}


def test_only_our_three_names_are_installed(members):
    top = {name.split("/")[0] for name in members}
    (info,) = {name for name in top if name.endswith(".dist-info")}
    assert top - {info} == set(FOLDERS.values())


@pytest.mark.parametrize("folder", list(FOLDERS))
def test_every_module_is_installed(members, folder):
    package = FOLDERS[folder]
    ours = {f"{package}/{path.name}" for path in (ROOT / folder).glob("*.py")}
    assert ours == {name for name in members if name.startswith(package) and name.endswith(".py")}
    assert f"{package}/py.typed" in members


def test_weights_are_installed_whole(members):
    weights = {
        f"uknowpan_models/weights/{p.name}": p.stat().st_size
        for p in (ROOT / "models" / "weights").glob("*.safetensors")
    }
    assert "uknowpan_models/weights/generic.safetensors" in weights
    assert {k: v for k, v in members.items() if "/weights/" in k} == weights


def test_wheel_is_small(wheel):
    assert wheel.stat().st_size < 12e6


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [n for n in names if n.endswith(".dist-info/METADATA")]
        (scripts,) = [n for n in names if n.endswith(".dist-info/entry_points.txt")]
        fields = Parser().parsestr(archive.read(metadata).decode())
        assert "uknowpan = uknowpan.commands.main:main" in archive.read(scripts).decode()
    assert fields["Name"] == "uknowpan"
    assert fields["License-Expression"] == "MIT"
    assert any(n.endswith("/LICENSE") for n in names)
    required = {re.split("[<>=]", r)[0] for r in fields.get_all("Requires-Dist") if "extra ==" not in r}
    assert {"torch", "rasterio", "numpy", "typer", "safetensors"} <= required
    assert not required & {"torchvision", "timm", "diffusers", "lightning", "dask"}
