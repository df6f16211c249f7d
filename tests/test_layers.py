"""Who may import what (DESIGN section 1)."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPS, TENSORS = {"rasterio"}, {"torch", "safetensors"}
OURS = {"uknowpan_cli", "uknowpan_models", "uknowpan_tiling"}
FORBIDDEN = {
    "tiling": TENSORS | {"typer", "rich", "uknowpan_cli", "uknowpan_models"},
    "models": MAPS | {"typer", "rich", "uknowpan_cli", "uknowpan_tiling"},
}
HEAVY = MAPS | TENSORS | {"h5py", "shapely", "numpy", "uknowpan_models", "uknowpan_tiling"}


def sources(folder):
    files = sorted((ROOT / folder).glob("*.py"))
    assert files
    return files


def imported(tree):
    """Top-level names of the packages that a module imports anywhere."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", list(FORBIDDEN))
def test_libraries_keep_to_their_side(folder):
    for path in sources(folder):
        assert not imported(ast.parse(path.read_text())) & FORBIDDEN[folder], path.name


@pytest.mark.parametrize("folder", list(FORBIDDEN))
def test_libraries_never_print(folder):
    for path in sources(folder):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            assert not (isinstance(called, ast.Name) and called.id == "print"), path.name


@pytest.mark.parametrize("folder", ["tiling", "models", "uknowpan_cli"])
def test_inside_a_folder_imports_are_relative(folder):
    own = folder if folder in OURS else f"uknowpan_{folder}"
    for path in sources(folder):
        assert not imported(ast.parse(path.read_text())) & {own, "tiling", "models"}, path.name


def child(code, *arguments):
    """What a fresh interpreter prints, as JSON."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_commands_start_without_heavy_libraries():
    loaded = child(
        "import json, sys, uknowpan.commands.main\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    assert "uknowpan_cli" in loaded
    assert not HEAVY & set(loaded)


@pytest.mark.parametrize("package, side", [("uknowpan_tiling", TENSORS), ("uknowpan_models", MAPS)])
def test_each_library_loads_without_the_other_side(package, side):
    loaded = child(
        "import importlib, json, pkgutil, sys\n"
        "package = importlib.import_module(sys.argv[1])\n"
        "for module in pkgutil.iter_modules(package.__path__):\n"
        "    importlib.import_module(f'{sys.argv[1]}.{module.name}')\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))",
        package,
    )
    assert package in loaded
    assert not (side | {"typer"} | OURS - {package}) & set(loaded)


def test_help_is_instant():
    """CPU time, so that a busy machine does not matter; the best of three."""
    code = (
        "import contextlib, io, json, resource, sys\n"
        "sys.argv = ['uknowpan', '--help']\n"
        "text = io.StringIO()\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):\n"
        "    import uknowpan.commands.main as cli\n"
        "    cli.main()\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(json.dumps([used.ru_utime + used.ru_stime, text.getvalue()]))"
    )
    answers = [child(code) for _ in range(3)]
    assert "sharpen" in answers[0][1]
    assert min(seconds for seconds, _ in answers) < 0.5
