"""Tests of who may import what, and of the size limits of files, functions and folders."""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"uknowpan_cli": "uknowpan", "models": "uknowpan.models", "tiling": "uknowpan.tiling"}
MAPS, TENSORS, SHELL = {"rasterio"}, {"torch", "safetensors"}, {"typer", "rich", "click"}
SECOND_COPY = re.compile(r"(uknowpan_cli|uknowpan_models|uknowpan_tiling|models|tiling)(\.[a-z_]\w*)*$")


def sources(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder} holds no Python"
    return files


PRODUCT = [path for folder in FOLDERS for path in sources(folder)]
EVERYTHING = [*PRODUCT, *sources("tests"), *sources("docs")]


def short(path):
    return path.relative_to(ROOT).as_posix()


@cache
def parsed(path):
    return ast.parse(path.read_text())


@cache
def imported(path):
    """Full names of the modules that a file imports anywhere, with the names taken from them."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {"." * node.level + (node.module or "")}
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def inside(name, package):
    return name == package or name.startswith(package + ".")


def imports(path, *packages):
    return sorted(name for name in imported(path) if any(inside(name, package) for package in packages))


def offenders(paths, *packages):
    return {short(path): names for path in paths if (names := imports(path, *packages))}


@pytest.mark.parametrize(
    "folder, foreign, own",
    [("tiling", TENSORS | SHELL, "uknowpan.tiling"), ("models", MAPS | SHELL, "uknowpan.models")],
)
def test_libraries_keep_to_their_side(folder, foreign, own):
    assert not offenders(sources(folder), *foreign)
    for path in sources(folder):
        ours = imports(path, "uknowpan")
        allowed = (own, "uknowpan.errors", "uknowpan.durable", "uknowpan.__version__")
        assert all(name == "uknowpan" or any(inside(name, other) for other in allowed) for name in ours), short(path)


def test_product_code_does_not_import_the_published_networks():
    published = ROOT / "models" / "published"
    assert not offenders([p for p in sources("models") if published not in p.parents], "uknowpan.models.published")


def test_only_the_commands_import_typer():
    commands = ROOT / "uknowpan_cli" / "commands"
    assert not offenders([p for p in PRODUCT if commands not in p.parents], "typer", "click")


def test_what_all_folders_share_imports_nothing_of_ours():
    """`uknowpan.errors` and `uknowpan.durable` serve all folders."""
    for name in ("errors.py", "durable.py"):
        shared = {name.split(".")[0] for name in imported(ROOT / "uknowpan_cli" / name)}
        assert shared <= sys.stdlib_module_names


@pytest.mark.parametrize("folder", ["tiling", "models"])
def test_libraries_never_print(folder):
    for path in sources(folder):
        for node in ast.walk(parsed(path)):
            called = node.func if isinstance(node, ast.Call) else None
            assert not (isinstance(called, ast.Name) and called.id == "print"), short(path)


def strings_imported(path):
    """Names given as strings to `import_module` and its like."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func
            name = getattr(called, "attr", getattr(called, "id", ""))
            if name in ("import_module", "importorskip", "find_spec") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def test_no_file_imports_a_second_copy():
    """A folder imported by its own name would be a second package with other classes; relative imports hide that."""
    for path in EVERYTHING:
        names = {*imported(path), *strings_imported(path)}
        assert not {name for name in names if name.startswith(".") or SECOND_COPY.match(name)}, short(path)


def child(code, *arguments):
    """The JSON that a fresh interpreter prints last."""
    done = subprocess.run([sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LOADED = "import json, sys; print(json.dumps(sorted(sys.modules)))"


def packages(modules):
    return {name.split(".")[0] for name in modules}


@pytest.mark.parametrize(
    "module, heavy",
    [
        ("uknowpan", MAPS | TENSORS | SHELL | {"numpy", "scipy", "h5py", "shapely"}),
        ("uknowpan.commands.main", MAPS | TENSORS | {"numpy", "scipy", "h5py", "shapely"}),
    ],
)
def test_start_without_heavy_libraries(module, heavy):
    loaded = child(f"import {module}; {LOADED}")
    assert module in loaded
    assert not heavy & packages(loaded)


@pytest.mark.parametrize("package, foreign", [("uknowpan.tiling", TENSORS | SHELL), ("uknowpan.models", MAPS | SHELL)])
def test_each_library_loads_without_the_other_side(package, foreign):
    loaded = child(
        "import importlib, json, pkgutil, sys\n"
        "package = importlib.import_module(sys.argv[1])\n"
        "for module in pkgutil.walk_packages(package.__path__, sys.argv[1] + '.'):\n"
        "    importlib.import_module(module.name)\n" + LOADED,
        package,
    )
    (other,) = {"uknowpan.tiling", "uknowpan.models"} - {package}
    assert package in loaded
    assert not (foreign - {"rich", "click"}) & packages(loaded)  # PyTorch imports rich, rasterio imports click
    assert not {name for name in loaded if inside(name, other)}


def cpu_seconds(code):
    """Seconds of CPU, so that a busy machine does not matter; the best of three."""
    usage = "used = resource.getrusage(resource.RUSAGE_SELF)\nprint(json.dumps(used.ru_utime + used.ru_stime))"
    return min(child(f"import json, resource\n{code}\n{usage}") for _ in range(3))


def test_the_import_is_instant():
    assert cpu_seconds("import uknowpan") < 0.3


def test_help_is_instant():
    code = (
        "import contextlib, io, sys\n"
        "sys.argv = ['uknowpan', '--help']\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    import uknowpan.commands.main as cli\n"
        "    cli.main()"
    )
    assert cpu_seconds(code) < 0.5


def test_a_command_starts_alone():
    """A slow start: each command built the options of all others."""
    loaded = child(f"from uknowpan.commands.main import application; application('info'); {LOADED}")
    assert "uknowpan.commands.info" in loaded and "uknowpan.commands.batch" not in loaded


LONGEST_FILE, LONGEST_FUNCTION, MOST_FILES = 600, 80, 16


def lines(path):
    return len(path.read_text().splitlines())


def test_no_file_is_long():
    assert not {short(path): lines(path) for path in PRODUCT if lines(path) > LONGEST_FILE}


def test_no_function_is_long():
    """Commands declare their options in the signature, so only the bodies of commands count."""
    long = {}
    for path in PRODUCT:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0].lineno if path.parent.name == "commands" else node.lineno
                if node.end_lineno - first + 1 > LONGEST_FUNCTION:
                    long[f"{short(path)}:{node.name}"] = node.end_lineno - first + 1
    assert not long


def test_the_models_folder_holds_what_sharpen_needs():
    assert len([path for path in (ROOT / "models").glob("*.py") if path.name != "__init__.py"]) <= MOST_FILES
