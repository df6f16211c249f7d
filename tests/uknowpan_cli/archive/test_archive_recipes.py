"""The recipes of docs/how-to.md: their commands run, with schedulers that are faked by what they
put into the environment."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from running import MakePair, Run, pixels

from uknowpan.archive.report import merged_report

PAGE = Path(__file__).parents[3] / "docs" / "how-to.md"
RECIPES = PAGE.parent / "recipes" / "archives"
SCENES = [f"s{i}" for i in range(6)]
OPTIONS = ("--method", "brovey", "--coregister", "off")
VARIABLES = ("SLURM_", "AWS_BATCH_", "JOB_COMPLETION_", "UKNOWPAN_", "RANK", "WORLD_SIZE", "LOCAL_")

REAL = '#!/bin/sh\nexec {python} -m {module} "$@"\n'
RECORDING = """#!{python}
import json, os, sys
with open({calls!r}, "a") as file:
    print(json.dumps([sys.argv[1:], dict(os.environ)]), file=file)
"""
SRUN = '#!/bin/sh\nexec "$@"\n'
TORCHRUN = """#!/bin/sh
[ "$1 $2 $3 $4" = "--standalone --nproc-per-node 3 --no-python" ] || exit 1
shift 4
for rank in 0 1 2; do RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=3 "$@"; done
"""


@pytest.fixture(autouse=True)
def _no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(VARIABLES):
            monkeypatch.delenv(name)


@dataclass
class Shell:
    """Runs recipes; a `uknowpan` that only notes how it was called stands in for the real one,
    and what was noted is run here, which saves a start of Python each."""

    folder: Path
    uknowpan: Run
    calls: Path = field(init=False)

    def __post_init__(self) -> None:
        self.calls = self.folder / "calls"
        (self.folder / "bin").mkdir()
        self.command("uknowpan", RECORDING.format(python=sys.executable, calls=str(self.calls)))

    def command(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def real(self, name: str, module: str) -> None:
        self.command(name, REAL.format(python=sys.executable, module=module))

    def run(self, *command: object, **environment: str) -> str:
        """stdout of a command that succeeds."""
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        variables = {**os.environ, **environment, "PATH": path}
        words = [str(word) for word in command]
        done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def noted(self) -> list[tuple[list[str], dict[str, str]]]:
        """(arguments, environment) of the calls since the last time."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return [(words, environment) for words, environment in map(json.loads, lines)]

    def replay(self, more: Sequence[object] = ()) -> None:
        """Run what was noted."""
        for words, environment in self.noted():
            with pytest.MonkeyPatch.context() as patch:
                for name, value in environment.items():
                    if name.startswith(VARIABLES):
                        patch.setenv(name, value)
                outcome = self.uknowpan(*words, *more)
            assert outcome.code == 0, outcome.stderr


@pytest.fixture
def shell(tmp_path: Path, uknowpan: Run) -> Shell:
    return Shell(tmp_path, uknowpan)


@pytest.fixture
def scenes(tmp_path: Path, make_pair: MakePair) -> Path:
    """A manifest."""
    rows = ["pan,ms,id"]
    for number, name in enumerate(SCENES):
        pair = make_pair(name=name, ms_shape=(12, 12), noise=5.0 + number)
        rows.append(f"{pair.pan},{pair.ms[0]},{name}")
    path = tmp_path / "scenes.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture
def expected(shell: Shell, scenes: Path, tmp_path: Path) -> dict[str, bytes]:
    """The pixels that one process makes."""
    folder = tmp_path / "serial"
    assert shell.uknowpan("batch", scenes, "-o", folder, *OPTIONS, "--shard", "none").code == 0
    return pixels(folder)


def check_shards(folder: Path, count: int, expected: Mapping[str, bytes]) -> None:
    """Every scene in one of the shards, and only there; none of them has all."""
    names = {path.name for path in folder.glob("report*.jsonl")}
    assert names <= {f"report-{k}-of-{count}.jsonl" for k in range(1, count + 1)}
    assert len(names) > 1
    lines = [json.loads(line) for name in names for line in (folder / name).read_text().splitlines()]
    assert sorted((line["id"], line["status"]) for line in lines) == [(n, "done") for n in SCENES]
    assert pixels(folder) == expected


def test_plain(shell: Shell, scenes: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    shell.run("sh", RECIPES / "plain.sh", scenes, tmp_path / "out", *OPTIONS)
    shell.replay()
    assert pixels(tmp_path / "out") == expected


def test_xargs(shell: Shell, make_pair: MakePair, scenes: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """For real, on two scenes, one of them with a name that shells stumble over; what is there is
    not made again."""
    source, output = tmp_path / "in put", tmp_path / "out put"
    source.mkdir()
    for name, copied in (("s0", "s0"), ("s1", "s 1'")):
        for kind in ("pan", "ms"):
            shutil.copy(tmp_path / f"{name}_{kind}.tif", source / f"{copied}_{kind}.tif")
    shell.real("uknowpan", "uknowpan")
    command = ("bash", RECIPES / "xargs.sh", source, output, *OPTIONS)
    shell.run(*command, JOBS="2")
    wanted = {"s0_sharp.tif": expected["s0_sharp.tif"], "s 1'_sharp.tif": expected["s1_sharp.tif"]}
    assert pixels(output) == wanted
    shell.command("uknowpan", "#!/bin/sh\nexit 1\n")
    shell.run(*command)
    (output / "s0_sharp.tif").unlink()
    with pytest.raises(AssertionError):
        shell.run(*command)


def test_slurm(shell: Shell, scenes: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    shell.command("srun", SRUN)
    array = next(
        line.rpartition("=")[2]
        for line in (RECIPES / "slurm.sh").read_text().splitlines()
        if line.startswith("#SBATCH --array=")
    )
    first, last = map(int, array.split("-"))
    for task in range(first, last + 1):
        values = {"ID": task, "MIN": first, "MAX": last, "STEP": 1, "COUNT": last - first + 1}
        shell.run(
            *("bash", RECIPES / "slurm.sh", scenes, tmp_path / "out", *OPTIONS),
            SLURM_CPUS_PER_TASK="1",
            **{f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()},
        )
    shell.replay()
    check_shards(tmp_path / "out", last - first + 1, expected)


def moved(words: Sequence[str], tmp_path: Path) -> list[str]:
    """/archive of a container is a folder here."""
    return [word.replace("/archive", str(tmp_path)) for word in words]


def test_aws(shell: Shell, scenes: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    shell.command("aws", (tmp_path / "bin" / "uknowpan").read_text())
    shell.run("sh", RECIPES / "aws-submit.sh", "queue", 3)
    (registered, _), (submitted, _) = shell.noted()
    file = Path(registered[registered.index("--cli-input-json") + 1].removeprefix("file://"))
    definition = json.loads(file.read_text())
    assert submitted[submitted.index("--job-definition") + 1] == definition["jobDefinitionName"]
    assert submitted[submitted.index("--array-properties") + 1] == "size=3"
    container = definition["containerProperties"]
    assert {v["name"] for v in container["volumes"]} == {"archive"}
    for index in range(3):
        variables = {"AWS_BATCH_JOB_ARRAY_INDEX": str(index), "AWS_BATCH_JOB_ARRAY_SIZE": "3"}
        shell.run(*moved(container["command"], tmp_path), **variables)
    shell.replay(OPTIONS)
    check_shards(tmp_path / "out", 3, expected)


def test_kubernetes(shell: Shell, scenes: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    job = yaml.safe_load((RECIPES / "kubernetes-job.yaml").read_text())
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert (job["kind"], spec["completionMode"]) == ("Job", "Indexed")
    assert environment == {"UKNOWPAN_SHARDS": str(spec["completions"])}
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    for index in range(spec["completions"]):
        command = moved(container["command"], tmp_path)
        shell.run(*command, JOB_COMPLETION_INDEX=str(index), **environment)
    shell.replay(OPTIONS)
    check_shards(tmp_path / "out", spec["completions"], expected)


def test_torchrun(shell: Shell, scenes: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    shell.command("torchrun", TORCHRUN)
    shell.run("sh", RECIPES / "torchrun.sh", scenes, tmp_path / "out", *OPTIONS, GPUS="3")
    shell.replay()
    check_shards(tmp_path / "out", 3, expected)


@pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="distributed is not installed (uknowpan[dask])"
)
def test_dask_scheduler(shell: Shell, scenes: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """For real, with one worker; nothing of it stays."""
    shell.real("uknowpan", "uknowpan")
    shell.real("dask", "dask")
    output = tmp_path / "out"
    words = ("bash", RECIPES / "dask-scheduler.sh", scenes, output, *OPTIONS)
    shell.run(*words, WORKERS="1", TMPDIR=str(tmp_path))
    assert pixels(output) == expected
    assert {line["status"] for line in merged_report(output).scenes} == {"done"}
    assert children(tmp_path) == set()


def children(folder: Path) -> set[int]:
    """Processes of `dask` that run with a file in a folder."""
    processes = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"dask" in words and any(os.fsencode(folder) in word for word in words):
            processes.add(int(path.parent.name))
    return processes


def test_dask_local(shell: Shell, scenes: Path, tmp_path: Path) -> None:
    """The command alone: test_cluster runs such clusters."""
    shell.run("sh", RECIPES / "dask-local.sh", scenes, tmp_path / "out", *OPTIONS)
    ((words, _),) = shell.noted()
    at = words.index("--dask")
    assert words[at : at + 2] == ["--dask", "local"]
    del words[at : at + 2]
    assert shell.uknowpan(*words).code == 0


def test_snakemake(shell: Shell, scenes: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    if shutil.which("snakemake") is None:
        pytest.skip("Snakemake is not installed")
    shell.real("uknowpan", "uknowpan")
    config = (f"in={tmp_path}", f"out={tmp_path / 'out'}", f"options={' '.join(OPTIONS)}")
    shell.run("snakemake", "-s", RECIPES / "Snakefile", "--cores", 2, "-d", tmp_path / "work", "--config", *config)
    assert pixels(tmp_path / "out") == expected


def test_dask_kubernetes_is_python() -> None:
    """No cluster here: no more than that it can be read, and takes options that there are."""
    tree = ast.parse((RECIPES / "dask-kubernetes.py").read_text())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert {"uknowpan", "batch", "--dask", "-o", "-j"} <= texts


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.iterdir()))
def test_page_links_the_files(name: str) -> None:
    assert f"(recipes/archives/{name})" in PAGE.read_text()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_no_nonsense(path: Path) -> None:
    """A shell reads them, and they stop where something is missing."""
    shell = "bash" if path.read_text().startswith("#!/bin/bash") else "sh"
    done = subprocess.run([shell, "-n", path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([shell, path], capture_output=True, text=True)
    assert done.returncode != 0
