"""Tests of the wheel: its contents, its metadata and a run from it outside the checkout."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import uknowpan

ROOT = Path(__file__).parents[1]
FOLDERS = {"uknowpan_cli": "uknowpan", "models": "uknowpan/models", "tiling": "uknowpan/tiling"}


def run(*command, **keywords):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **keywords)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def files():
    """The repository's files, as paths from its root: git's, with what is new and not ignored."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return sorted({name for name in listed.split("\0") if name and (ROOT / name).is_file()})


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, files):
    """Built from a copy, because setuptools writes beside its sources and reuses old results there."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in files:
        if "/" not in name or name.split("/")[0] in FOLDERS:
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--disable-pip-version-check", "-w", folder, folder / "source")
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def members(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.file_size for info in archive.infolist()}


def test_the_wheel_holds_the_files_of_the_three_folders(members, files):
    """Packages and data are listed by hand in pyproject.toml, so a new folder or kind of file shows here.

    The plugin for QGIS is no part of the wheel: only QGIS can import it.
    """
    expected = {}
    for name in files:
        folder, _, rest = name.partition("/")
        if folder in FOLDERS and not rest.startswith("qgis/"):
            expected[f"{FOLDERS[folder]}/{rest}"] = (ROOT / name).stat().st_size
    assert {name: size for name, size in members.items() if ".dist-info/" not in name} == expected
    assert {"uknowpan/py.typed", "uknowpan/models/weights/generic.safetensors"} <= set(expected)


def test_wheel_is_small(wheel):
    assert wheel.stat().st_size < 12e6


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        fields = Parser().parsestr(archive.read(name).decode())
        scripts = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
        assert any(n.endswith("/LICENSE") for n in archive.namelist())
    assert "uknowpan = uknowpan.commands.main:main" in scripts
    assert fields["Name"] == "uknowpan"
    assert fields["License-Expression"] == "MIT"
    required = {re.split("[<>=]", r)[0] for r in fields.get_all("Requires-Dist") if "extra ==" not in r}
    assert {"torch", "rasterio", "numpy", "typer", "safetensors"} <= required
    assert not required & {"torchvision", "timm", "diffusers", "lightning", "dask"}


def test_what_the_packages_import_is_declared():
    """A library that only the tests' extra installs is missing at a user's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {"PIL": "pillow", "pywt": "pywavelets"}
    extras = {"dask", "distributed", "cryptography", "xarray"}  # by an option, or the caller's array
    extras |= {"qgis", "processing", "uknowpan_qgis"}  # QGIS has these
    declared = {re.split("[<>=]", line)[0] for line in project["dependencies"]}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module] if isinstance(node, ast.ImportFrom) else []
                for module in {name.split(".")[0] for name in modules} - {"uknowpan", *sys.stdlib_module_names}:
                    known = names.get(module, module) in declared | extras
                    assert known, f"{path.name} imports {module}"


def test_the_version_has_one_place(wheel):
    assert wheel.name.split("-")[1] == uknowpan.__version__
    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not re.search("^version:", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)


def test_recipes_of_other_packagers_follow():
    """A dependency, a bound or a version that pyproject.toml has and the conda recipe or the image has not."""
    recipe = (ROOT / "docs/packaging/meta.yaml").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    run_time = re.findall(r"^    - (.+)$", recipe.partition("  run:\n")[2].partition("\ntest:")[0], re.MULTILINE)
    expected = ["python" + project["requires-python"], *project["dependencies"]]
    assert [line.replace(" ", "").replace("pytorch", "torch") for line in run_time] == expected
    assert f'version: "{uknowpan.__version__}"' in recipe
    copied = re.findall("^COPY (.*) ", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert set(FOLDERS) <= set(copied) and all((ROOT / name).exists() for line in copied for name in line.split())


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The bin folder of a fresh environment: the wheel, beside the libraries of the running one."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, symlinks=True, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q", wheel)
    libraries = [p for p in sys.path if p.endswith("site-packages")]
    (packages / "libraries.pth").write_text("\n".join(libraries))  # their own .pth files stay unread
    return folder / "bin"


def test_the_demo_runs_from_the_wheel(installed, tmp_path):
    where = run(installed / "python", "-c", "import uknowpan; print(uknowpan.__file__)", cwd=tmp_path, env={})
    assert Path(where.strip()).is_relative_to(installed.parent)
    out = run(installed / "uknowpan", "demo", "--out", tmp_path / "demo", cwd=tmp_path, env={})
    picture = Path(out.splitlines()[-1])
    assert picture.is_relative_to(tmp_path)
    assert picture.stat().st_size > 10_000
