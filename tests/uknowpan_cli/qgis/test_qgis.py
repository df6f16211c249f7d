"""The plugin in a real QGIS without a screen: Debian's qgis has `qgis_process`."""

import configparser
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from running import MakePair, read

import uknowpan

ROOT = Path(__file__).parents[3]
PROGRAM = shutil.which("qgis_process.bin") or shutil.which("qgis_process")  # Debian's script adds an unknown option
needs_qgis = pytest.mark.skipif(PROGRAM is None, reason="qgis_process is not installed")
Process = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    folder = tmp_path_factory.mktemp("plugin")
    subprocess.run(["make", "-s", "qgis", f"DIST={folder}", f"PYTHON={sys.executable}"], cwd=ROOT, check=True)
    return folder / "uknowpan_qgis.zip"


def test_the_zip_is_complete(archive: Path) -> None:
    with zipfile.ZipFile(archive) as files:
        names = {name.removeprefix("uknowpan_qgis/") for name in files.namelist()}
        metadata = configparser.ConfigParser()
        metadata.read_string(files.read("uknowpan_qgis/metadata.txt").decode())
    assert {"__init__.py", "algorithms.py", "child.py", "provider.py", "icon.svg", "LICENSE"} <= names
    general = metadata["general"]
    assert general["version"] == uknowpan.__version__
    assert general["icon"] in names
    assert {"name", "description", "about", "qgisminimumversion", "author", "hasprocessingprovider"} <= set(general)


@pytest.fixture(scope="module")
def process(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Process:
    """`process(*words)` runs qgis_process with the plugin in a new profile; the setting names the command's folder."""
    home = tmp_path_factory.mktemp("home")
    home.chmod(0o700)
    profile = home / ".local/share/QGIS/QGIS3/profiles/default"
    with zipfile.ZipFile(archive) as files:
        files.extractall(profile / "python/plugins")
    command = home / "environment" / "bin" / "uknowpan"
    command.parent.mkdir(parents=True)
    imports = shlex.quote(os.pathsep.join(path for path in sys.path if path))
    command.write_text(f'#!/bin/sh\nPYTHONPATH={imports} exec {shlex.quote(sys.executable)} -m uknowpan "$@"\n')
    command.chmod(0o755)
    (profile / "QGIS").mkdir()
    (profile / "QGIS/QGIS3.ini").write_text(
        f"[PythonPlugins]\nuknowpan_qgis=true\n\n[Processing]\nConfiguration\\UKNOWPAN_FOLDER={home}/environment\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    clean["PATH"] = os.defpath  # QGIS embeds the Python that PATH has first
    environment = {**clean, "HOME": str(home), "XDG_RUNTIME_DIR": str(home), "QT_QPA_PLATFORM": "offscreen"}

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(PROGRAM), *map(str, words)], capture_output=True, text=True, env=environment, timeout=120
        )

    return run


@needs_qgis
def test_sharpen_in_qgis(process: Process, make_pair: MakePair, tmp_path: Path) -> None:
    """The result is the command's, to the bit; a failure ends with the command's own sentence."""
    pair, out = make_pair(), tmp_path / "out.tif"
    words = ("run", "uknowpan:sharpen", "--", f"PAN={pair.pan}", *(f"MS={path}" for path in pair.ms), "METHOD=gsa")
    done = process(*words, f"OUTPUT={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"OUTPUT:\t{out}" in done.stdout
    assert "...100" in done.stdout
    assert "ResourceWarning" not in done.stderr
    uknowpan.sharpen(pair.pan, pair.ms, tmp_path / "own.tif", method="gsa")
    assert (read(out) == read(tmp_path / "own.tif")).all()
    failed = process(*words, f"OUTPUT={out}", "OPTIONS=--max-value 0")
    assert failed.returncode != 0
    assert "--max-value must be above 0" in failed.stdout + failed.stderr


@needs_qgis
def test_the_other_algorithms_in_qgis(process: Process, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair(ms_shape=(48, 40))
    inputs = (f"PAN={pair.pan}", *(f"MS={path}" for path in pair.ms))
    info = process("run", "uknowpan:info", "--", *inputs)
    assert "160 x 192 pixels" in info.stdout, info.stdout + info.stderr
    page = process("run", "uknowpan:compare", "--", *inputs, f"OUTPUT={tmp_path / 'page.html'}")
    assert "<html" in (tmp_path / "page.html").read_text(), page.stdout + page.stderr
    batch = process("run", "uknowpan:batch", "--", f"INPUT={tmp_path}", "METHOD=gsa", f"OUTPUT={tmp_path / 'results'}")
    assert len(list((tmp_path / "results").glob("*_sharp.tif"))) == 1, batch.stdout + batch.stderr
