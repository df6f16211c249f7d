"""`train` on PanCollection files: the whole chain, what it leaves, how it stops and refuses."""

import fcntl
import json
import re
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import h5py
import numpy as np
import pytest
import rasterio
import torch
from patch_files import TINY_NETWORKS, story
from running import MakePair, Run, spawn, write_tiny_model
from safetensors.torch import load_file
from typer.testing import CliRunner

from uknowpan.commands.main import app
from uknowpan.models.checkpoints import load_model, read_card
from uknowpan.models.network import FSAStudentLite
from uknowpan.models.published.uknow import stages
from uknowpan.models.published.uknow.guided import GuidedTeacher
from uknowpan.models.published.uknow.prior import PriorNet
from uknowpan.models.published.uknow.student import FSAStudent
from uknowpan.models.training import loop as training
from uknowpan.training import show as train_show

ITERATIONS = 16
TRAIN = f"""
[train]
iterations = {ITERATIONS}
batch_size = 4
warmup = 2
learning_rate = 0.01
validate_every = 8
validation_samples = 4
checkpoint_every = 4
log_every = 4
ema = 0.5
amp = false
"""
CONFIGS = TINY_NETWORKS | {
    "fsa-t": TINY_NETWORKS["fsa-t"] + "terminal_share = 0.2\n",
    "fsa-s": TINY_NETWORKS["fsa-s"] + "[options]\nflips = false\n",
    "paper": "[network]\nwidth = 4\nblocks = 1\nheads = 2\ndropout = 0.0\n[options]\nsteps = 2\nflips = false\n",
}
STAGE_OF = {"paper": "fsa-s", "cached": "fsa-s"}


@dataclass(frozen=True)
class Chain:
    """The files of the chain."""

    folder: Path
    stdout: dict[str, str]

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def arguments(self, name: str) -> list[object]:
        """Arguments of `train` without --out."""
        stage, data = STAGE_OF.get(name, name), self / "data" / "train.h5"
        config = self / f"{'fsa-s' if name == 'cached' else name}.toml"
        told = {
            "fsa-t": ["--prior", self / "prior" / "best.safetensors"],
            "fsa-s": ["--teacher", self / "fsa-t" / "best.safetensors"],
            "cached": ["--cache", self / "cache.h5"],
            "paper": ["--teacher", self / "fsa-t" / "best.safetensors"],
        }.get(name, [])
        return [*("train", "--stage", stage, "--data", data, "--config", config, *told), *("--device", "cpu", "-j", 1)]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """prior, fsa-t, distill-cache, fsa-s by cache and by teacher, on the sample data."""
    made = Chain(tmp_path_factory.mktemp("chain"), {})
    folder, runner = made.folder, CliRunner()

    def run(name: str, *arguments: object) -> None:
        done = runner.invoke(app, [str(a) for a in arguments], prog_name="uknowpan")
        assert done.exit_code == 0, done.output
        made.stdout[name] = done.stdout

    for name, network in CONFIGS.items():
        head = 'preset = "paper"\n' if name == "paper" else ""
        train = TRAIN
        if name == "paper":
            train = TRAIN.replace(f"iterations = {ITERATIONS}", "iterations = 4\nmilestones = []")
            train = train.replace("ema = 0.5", "ema = 0.5\nworkers = 0")
        (folder / f"{name}.toml").write_text(head + train + network)
    run("simulate", "simulate", "--sample", "-o", folder / "data")
    run("prior", *made.arguments("prior"), "--out", folder / "prior")
    run("fsa-t", *made.arguments("fsa-t"), "--out", folder / "fsa-t")
    run(
        *("cache", "distill-cache", "--teacher", folder / "fsa-t" / "best.safetensors"),
        *("--data", folder / "data" / "train.h5", "-o", folder / "cache.h5"),
        *("--device", "cpu", "-j", 1, "-q"),
    )
    for name in ("cached", "fsa-s", "paper"):
        run(name, *made.arguments(name), "--out", folder / name)
    return made


RUNS = ["prior", "fsa-t", "cached", "fsa-s", "paper"]
LOSSES = {
    "prior": ["nll"],
    "fsa-t": ["nll"],
    "cached": ["hard", "soft", "features", "variance"],
    "fsa-s": ["hard", "soft", "features", "variance"],
    "paper": ["hard", "soft", "features"],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_folder(chain: Chain, name: str) -> None:
    out = chain / name
    assert chain.stdout[name].endswith(f"{out / 'best.safetensors'}\n")
    found = {p.name for p in out.iterdir() if not p.name.startswith("events.")}
    assert found == {*("best.safetensors", "config.json", "last.safetensors", "log.jsonl"), *("pictures", "state.pt")}
    log, last = story(out), 4 if name == "paper" else ITERATIONS
    assert [entry["step"] for entry in log] == list(range(4, last + 1, 4))
    for entry in log:
        losses = [k for k in entry if k in ("nll", "hard", "soft", "features", "variance")]
        assert losses == LOSSES[name]
        assert all(np.isfinite(value) for value in entry.values())
    assert {"score", "sam", "ergas", "psnr", "q2n"} <= log[-1].keys()
    assert ("coverage_1_sigma" in log[-1]) == (name != "paper")
    configured = json.loads((out / "config.json").read_text())
    assert configured["stage"] == STAGE_OF.get(name, name)
    assert configured["train"]["iterations"] == last


@pytest.mark.parametrize("name", ["prior", "fsa-t", "cached", "fsa-s"])
def test_losses_fall(chain: Chain, name: str) -> None:
    first, *_, last = (sum(e[part] for part in LOSSES[name]) for e in story(chain / name))
    assert last < first - 0.02 * abs(first)


def test_the_cache_teaches_as_the_teacher_does(chain: Chain) -> None:
    """Nearly: its features have 16 bits."""
    for one, other in zip(story(chain / "cached"), story(chain / "fsa-s"), strict=True):
        for part in LOSSES["fsa-s"]:
            assert one[part] == pytest.approx(other[part], rel=0.02, abs=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_pictures_of_every_validation(chain: Chain, name: str) -> None:
    pictures = sorted((chain / name / "pictures").iterdir())
    steps = (4,) if name == "paper" else (8, 16)
    assert [p.name for p in pictures] == [f"step_{step:06d}.png" for step in steps]
    columns = 6 if name == "paper" else 7  # 1-sigma, of those that say one
    with rasterio.open(pictures[-1]) as picture:
        values = picture.read()
    assert pictures[-1].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    count, height, width = values.shape
    # Four patches of 64 pixels, three times as large, beneath their labels.
    assert count == 3 and values.dtype == np.uint8
    assert columns * 192 <= width <= columns * 192 + 64 and 4 * 192 <= height <= 4 * 240
    assert values.std() > 20


def test_checkpoints_load_as_what_they_are(chain: Chain) -> None:
    kinds = {
        "prior": PriorNet, "fsa-t": GuidedTeacher, "cached": FSAStudentLite,
        "fsa-s": FSAStudentLite, "paper": FSAStudent,
    }  # fmt: skip
    for name, kind in kinds.items():
        model, card = load_model(chain / name / "best.safetensors")
        assert type(model) is kind and card.name == name
        assert card.stage == STAGE_OF.get(name, name)
        assert card.ratios == [4] and card.max_value == 2047
        assert card.bands == (None if kind is FSAStudentLite else 4)
        assert str(chain.folder) not in json.dumps(card.__dict__)
        assert card.training["files"] == ["train.h5"]
        assert card.training["validation_files"] == ["valid.h5"]
        told = {"fsa-t": None, "prior": None}.get(name, "fsa-t")
        assert card.training.get("teacher") == told
    words = read_card(chain / "fsa-t" / "last.safetensors").training["command"]
    assert words.startswith("uknowpan train --stage fsa-t") and "--prior best.safetensors" in words


def test_test_files_are_never_opened(chain: Chain, uknowpan: Run, tmp_path: Path) -> None:
    """Without its test file a data set trains as well."""
    for split in ("train", "valid"):
        (tmp_path / f"{split}.h5").symlink_to(chain / "data" / f"{split}.h5")
    words = [tmp_path / "train.h5" if str(a).endswith("train.h5") else a for a in
             chain.arguments("prior")]  # fmt: skip
    done = uknowpan(*words, "--out", tmp_path / "prior", "-q")
    assert done.code == 0 and done.stderr == ""
    same = [p / "last.safetensors" for p in (tmp_path / "prior", chain / "prior")]
    assert same_weights(*same)


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = load_file(one), load_file(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("name", ["fsa-s", "cached", "paper"])
def test_a_student_sharpens_a_scene(
    chain: Chain, name: str, uknowpan: Run, make_pair: MakePair, tmp_path: Path
) -> None:
    pair, out = make_pair(noise=30), tmp_path / "out.tif"
    model = chain / name / "best.safetensors"
    outcome = uknowpan("sharpen", pair.pan, *pair.ms, "-o", out, "--model", model, "-j", 1)
    assert outcome.code == 0, outcome.stderr
    with rasterio.open(out) as sharp:
        assert (sharp.count, *sharp.shape) == (4, 96, 80)
        values = sharp.read().astype(float)
    coarse = values.reshape(4, 24, 4, 20, 4).mean((2, 4))
    assert np.abs(coarse - pair.ms_values).mean() < 0.1 * pair.ms_values.mean()


def test_a_teacher_does_not_sharpen(chain: Chain, uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    pair, model = make_pair(), chain / "fsa-t" / "best.safetensors"
    outcome = uknowpan("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "o.tif", "--model", model)
    assert outcome.code == 5 and "is a teacher (fsa-t)" in outcome.stderr


@pytest.mark.parametrize("name", CONFIGS)
def test_dry_run(chain: Chain, name: str, uknowpan: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    outcome = uknowpan(*chain.arguments(name), "--out", out, "--dry-run")
    assert (outcome.code, outcome.stderr) == (0, "")
    resolved = json.loads(outcome.stdout)
    model, _ = load_model(chain / name / "best.safetensors")
    frozen = model.prior_net.parameters() if isinstance(model, GuidedTeacher) else ()
    count = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in frozen)
    assert resolved.pop("parameters") == count
    configured = json.loads((chain / name / "config.json").read_text())
    assert configured.pop("data")["train"]["files"] == ["train.h5"]  # not known to a dry run
    assert resolved == configured
    assert not out.exists()


def test_tables_within_tables_and_presets(chain: Chain, uknowpan: Run, tmp_path: Path) -> None:
    config, out = tmp_path / "c.toml", tmp_path / "run"
    config.write_text(
        'preset = "paper"\n[network]\nraw_prior = true\n'
        "[network.teacher]\nmultipliers = [1, 2]\nattention_level = 1\ndead_prior = true\n"
    )
    words = [config if str(a).endswith(".toml") else a for a in chain.arguments("fsa-t")]
    outcome = uknowpan(*words, "--out", out, "--dry-run")
    assert outcome.code == 0, outcome.stderr
    network = json.loads(outcome.stdout)["network"]
    assert network["raw_prior"] and network["teacher"]["dead_prior"]
    assert network["teacher"]["multipliers"] == [1, 2] and network["teacher"]["width"] == 32
    assert network["prior"]["width"] == 64
    config.write_text('preset = "paper"\n')  # the command line has the last word
    outcome = uknowpan(*words, "--out", out, "--dry-run", "--preset", "lite")
    assert json.loads(outcome.stdout)["network"]["teacher"]["width"] == 8


WRONG = [
    ("fsa-t", "[network.teacher]\ndepth = 2", r"TeacherConfig has no field depth; valid are bands, .*dead_prior"),
    ("fsa-t", "[network.prior]\nbands = 3", r"\[network\]: the teacher takes 4 bands, its PriorNet 3; give both"),
    ("fsa-t", "[network]\nteacher = 3", r"\[network\.teacher\] is a table, not 3"),
    ("fsa-t", "[options]\nsoft_weight = 1.0", r"TeacherOptions has no field soft_weight; valid are .*beta"),
    ("fsa-t", "[network.teacher]\nheads = 3", r"\[network\]: .* do not divide into 3 attention heads"),
    ("fsa-t", "[network.teacher]\ndrop_path = 1.0", r"drop_path 1\.0 is not a probability below 1"),
    ("prior", "[options]\nsteps = 2", "PriorOptions has no field steps; valid are beta"),
    ("prior", "[network]\nwidth = 0", "width must be at least 1, not 0"),
    ("prior", "[network]\nhighpass_pan = 1", "highpass_pan takes bool, not 1"),
    ("prior", "[train]\nlearning_rate = nan", "learning_rate takes a finite number, not nan"),
    ("prior", "[train]\nema = 1.5", "ema must be at most 1, not 1.5"),
    ("prior", "[train]\nlearning_rate = 1e300", r"learning_rate must be at most 1, not 1e\+300"),
    ("prior", f"[train]\nseed = {10**20}", f"seed must be at most 2147483647, not {10**20}"),
    ("prior", f"[network]\nwidth = {10**30}", "width must be at most 2147483647"),
    ("prior", f"[train]\nmilestones = [{10**30}]", "milestones must be at most 2147483647"),
    ("prior", "[train]\nmilestones = [1.5]", r"milestones takes a list of whole numbers, not \[1\.5\]"),
    ("prior", "train = 3", r"\[train\] is a table, not 3"),
    ("prior", 'preset = "huge"', "There is no preset 'huge'; known are lite, paper"),
    ("prior", "preset = 3", "There is no preset 3; known are lite, paper"),
    ("prior", "presets = 'lite'", r"--config has preset and \[train\], \[network\], \[options\], not presets"),
    ("fsa-s", 'preset = "paper"\n[network]\nwidth = 5', r"\[network\]: .*its width 5 must be even"),
    ("fsa-s", 'preset = "paper"\n[network]\nmultipliers = []', "attention_level 3 is none of the 0 levels"),
    ("fsa-s", 'preset = "paper"\n[network]\nmultipliers = [1, 2, 2, 0]', "multipliers must be at least 1, not 0"),
    ("fsa-s", 'preset = "paper"\n[network]\ndropout = 1.5', "dropout must be at most 1"),
]


@pytest.mark.parametrize(("name", "text", "says"), WRONG)
def test_configurations_that_are_refused(
    chain: Chain, name: str, text: str, says: str, uknowpan: Run, tmp_path: Path
) -> None:
    config, out = tmp_path / "c.toml", tmp_path / "run"
    config.write_text(text)
    words = [config if str(a).endswith(".toml") else a for a in chain.arguments(name)]
    outcome = uknowpan(*words, "--out", out)
    refused(outcome, 2, says)
    assert not out.exists()


def refused(outcome: object, code: int, says: str) -> None:
    """One sentence, and nothing else."""
    assert (outcome.code, outcome.stdout) == (code, ""), outcome.stderr
    assert re.fullmatch(rf"uknowpan: error: .*{says}.*\.?\n", outcome.stderr), outcome.stderr


TERMINATED = """
import os, signal
from uknowpan.models.training import loop as training
take = training._Run.take
def stopping(self, batch):
    if self.step == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return take(self, batch)
training._Run.take = stopping
"""


def test_terminated_and_resumed(chain: Chain, uknowpan: Run, tmp_path: Path) -> None:
    """SIGTERM in the sixth step ends the process after it; --resume ends where the chain did."""
    out, words = tmp_path / "prior", chain.arguments("prior")
    done = spawn(*words, "--out", out, "-q", before=TERMINATED)
    refused(done, 130, "stopped after step 6; --resume goes on from there")
    assert torch.load(out / "state.pt", weights_only=True)["step"] == 6
    refused(uknowpan(*words, "--out", out), 4, "prior holds a run already; --resume goes on")
    resumed = uknowpan(*words, "--out", out, "-q", "--resume")
    assert (resumed.code, resumed.stderr) == (0, "")
    assert resumed.stdout == f"{out / 'best.safetensors'}\n"
    for name in ("best.safetensors", "last.safetensors"):
        assert same_weights(out / name, chain / "prior" / name)
    assert story(out) == story(chain / "prior")
    assert not list(out.glob(".*"))
    # There is nothing left to do.
    before = {p: p.read_bytes() for p in out.iterdir() if p.is_file()}
    again = uknowpan(*words, "--out", out, "-q", "--resume")
    assert (again.code, again.stdout) == (0, resumed.stdout)
    assert {p: p.read_bytes() for p in before} == before


def test_another_seed_is_another_run(chain: Chain, uknowpan: Run, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text((chain / "prior.toml").read_text().replace("[train]", "[train]\nseed = 3"))
    words = [config if str(a).endswith(".toml") else a for a in chain.arguments("prior")]
    before = {p: p.read_bytes() for p in (chain / "prior").iterdir() if p.is_file()}
    outcome = uknowpan(*words, "--out", chain / "prior", "--resume")
    refused(outcome, 2, r"was begun with train\.seed 0 \(here 3\); --resume needs the same")
    assert {p: p.read_bytes() for p in before} == before


def test_a_folder_that_another_run_is_in(chain: Chain, uknowpan: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with open(out / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        outcome = uknowpan(*chain.arguments("prior"), "--out", out)
        refused(outcome, 3, "Another run is training in .*run; wait for it, or choose another")
    assert [p.name for p in out.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_running_out_of_memory(
    chain: Chain, uknowpan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def take(self: object, batch: object) -> None:
        raise error

    monkeypatch.setattr(training._Run, "take", take)
    outcome = uknowpan(*chain.arguments("prior"), "--out", tmp_path / "run", "-q")
    refused(outcome, 6, "Memory ran out with a batch_size of 4; begin anew with a lower one")


def test_a_run_that_diverges(chain: Chain, uknowpan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "beta_nll", lambda error, log_sigma, beta: error.mean() / 0)
    outcome = uknowpan(*chain.arguments("prior"), "--out", tmp_path / "run", "-q")
    refused(outcome, 3, "step 1 has a loss of .*; begin anew with a lower learning_rate")


def typed(chain: Chain, stage: str, *more: object, data: object = None) -> list[object]:
    """`train` with another combination of files."""
    data = data or chain / "data" / "train.h5"
    return ["train", "--stage", stage, "--data", data, "--device", "cpu", "-j", 1, *more]


PRIOR, TEACHER = "prior/best.safetensors", "fsa-t/best.safetensors"
MISTYPED = [
    ("prior", ["--max-value", "inf"], 2, "--max-value: .* is no full scale"),
    ("prior", ["--max-value", "1e300"], 2, "--max-value: .* is no full scale"),
    ("fsa-t", [], 2, "The stage fsa-t needs --prior, a checkpoint of"),
    ("fsa-s", ["--prior", PRIOR], 2, "--prior is of the stage fsa-t, not of fsa-s"),
    ("prior", ["--teacher", TEACHER], 2, "--teacher is of the stage fsa-s, not of prior"),
    ("fsa-t", ["--prior", PRIOR, "--cache", "cache.h5"], 2, "--cache is of the stage fsa-s, not of fsa-t"),
    ("fsa-s", ["--teacher", TEACHER, "--cache", "cache.h5"], 2, "Give --teacher or --cache, not both"),
    ("prior", ["--valid", "data/valid.h5", "--valid", "data/valid.h5"], 2, "2 --valid for 1 --data; give one for each"),
    ("fsa-s", ["--cache", "cache.h5", "--cache", "cache.h5"], 2, "2 --cache for 1 --data; give one for each"),
    ("fsa-s", ["--teacher", PRIOR], 5, "of the architecture prior, which teaches nobody; give a teacher"),
    ("fsa-t", ["--prior", TEACHER], 5, r"best\.safetensors \(fsa-t\) is not the PriorNet that is configured"),
    ("fsa-t", ["--prior", PRIOR], 5, r"best\.safetensors \(prior\) is not the PriorNet that is configured"),
    ("fsa-t", ["--prior", "none.safetensors"], 5, "there is no checkpoint at .*none.safetensors"),
    ("fsa-s", ["--teacher", "data/train.h5"], 5, "train.h5 is not a whole safetensors file"),
    ("fsa-s", ["--cache", "data/valid.h5"], 3, "valid.h5 is no cache made by `uknowpan distill-cache`"),
    ("prior", ["--valid", "none.h5"], 3, "none.h5 does not exist"),
    ("prior", ["--valid", "cache.h5"], 3, "cache.h5 lacks pan and ms and lms"),
]


@pytest.mark.parametrize(("stage", "more", "code", "says"), MISTYPED)
def test_files_that_do_not_go_together(
    chain: Chain, stage: str, more: list[str], code: int, says: str, uknowpan: Run, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = [chain / word if "." in word else word for word in more]
    refused(uknowpan(*typed(chain, stage, *words, "--out", out)), code, says)
    assert not list(tmp_path.iterdir())


def test_values_out_of_range(chain: Chain, uknowpan: Run, tmp_path: Path) -> None:
    for more in (["--teacher-steps", 501], ["--max-value", 0], ["--preset", "huge"]):
        outcome = uknowpan(*typed(chain, "fsa-s", *more, "--out", tmp_path / "run"))
        assert (outcome.code, outcome.stdout) == (2, "")
        assert re.search(rf"Invalid value for '?{more[0]}", outcome.stderr), outcome.stderr
    assert not list(tmp_path.iterdir())


def write(path: Path, bands: int = 4, count: int = 9, size: int = 16, **changed: object) -> Path:
    """A file of random samples; a change of None leaves an entry out."""
    rng = np.random.default_rng(1)
    shapes = {"pan": (1, size), "ms": (bands, size // 4), "lms": (bands, size), "gt": (bands, size)}
    values = {k: rng.uniform(9, 900, (count, c, n, n)).astype("f4") for k, (c, n) in shapes.items()}
    with h5py.File(path, "w") as file:
        for name, array in (values | changed).items():
            if array is not None:
                file[name] = array
        if "max_value" not in changed:
            file.attrs["max_value"] = 1023.0
    return path


def broken_files(folder: Path) -> dict[str, tuple[Path, int, str]]:
    """Name -> training file, exit code, sentence."""
    text = folder / "text_train.h5"
    text.write_text("no data")
    nan = write(folder / "nan_train.h5")
    with h5py.File(nan, "r+") as file:
        file["ms"][0, 2, 1, 1] = np.nan
    odd = write(folder / "odd_train.h5", size=24)
    write(folder / "odd_valid.h5", size=24)
    few = write(folder / "few_train.h5", bands=3)
    write(folder / "few_valid.h5", bands=4)
    unscaled = write(folder / "unscaled_train.h5", max_value=None)
    write(folder / "unscaled_valid.h5")
    same = write(folder / "same_train.h5")
    write(folder / "same_valid.h5")
    with h5py.File(same, "r+") as file:
        file["gt"][:, 1] = file["lms"][:, 1]
    alone = write(folder / "alone_train.h5")
    blind = write(folder / "blind_train.h5")
    write(folder / "blind_valid.h5", gt=None)
    return {
        "text": (text, 3, r"text_train\.h5 is no HDF5 file"),
        "NaN": (nan, 3, r"ms of sample 0 holds NaN or infinite values; leave such samples out"),
        "no truth": (write(folder / "g_train.h5", gt=None), 3, "lacks gt .*no truth to learn from"),
        "no truth to validate": (blind, 3, r"blind_valid\.h5 lacks gt"),
        "no file": (folder / "none_train.h5", 3, r"none_train\.h5 does not exist"),
        "no valid": (alone, 3, r"alone_valid\.h5 does not exist"),
        "no name": (write(folder / "mine.h5"), 2, "--valid is missing: mine.h5 has no `train` in"),
        "bands": (few, 3, "The bands of .*few_train.h5 is 3, that of .*few_valid.h5 is 4"),
        "no scale": (unscaled, 3, "does not declare its full scale; give the maximal value"),
        "sizes": (odd, 5, "has patches of 24 x 24 pixels, but the network needs multiples of 16"),
        "no detail": (same, 3, "In band 2 of the training data truth and LMS are the same"),
    }  # fmt: skip


def test_data_that_cannot_be_used(chain: Chain, uknowpan: Run, tmp_path: Path) -> None:
    cases = broken_files(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    for data, code, message in cases.values():
        # The bands of the preset follow the training file's.
        words = typed(chain, "fsa-t", "--prior", chain / PRIOR, "--out", tmp_path / "run", data=data)
        refused(uknowpan(*words), code, message)
        assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_the_lite_student_needs_more_than_a_border(chain: Chain, uknowpan: Run, tmp_path: Path) -> None:
    data = write(tmp_path / "train.h5")
    write(tmp_path / "valid.h5")
    outcome = uknowpan(*typed(chain, "fsa-s", "--out", tmp_path / "run", data=data))
    refused(outcome, 5, "16 x 16 pixels, of which the lite student leaves out 8 along every edge")
    assert not (tmp_path / "run").exists()


def test_a_sample_that_only_training_meets(chain: Chain, uknowpan: Run, tmp_path: Path) -> None:
    """Opening looks into a few samples; a worker process that meets the others says it as well."""
    data, valid = write(tmp_path / "train.h5", count=40), write(tmp_path / "valid.h5")
    with h5py.File(data, "r+") as file:
        file["gt"][3, 0, 0, 0] = np.inf
    config = tmp_path / "c.toml"
    network = TRAIN.replace("[train]", "[train]\nworkers = 1") + CONFIGS["prior"]
    config.write_text(network)
    outcome = uknowpan(
        *typed(chain, "prior", "--config", config, "--out", tmp_path / "run", "-q", data=data), *("--valid", valid)
    )
    said = outcome.stderr.splitlines(keepends=True)[-1]  # torch warns of workers on one core
    assert outcome.code == 3 and "Traceback" not in outcome.stderr
    assert re.fullmatch(
        r"uknowpan: error: \S+train\.h5: gt of sample 3 holds NaN or infinite values; leave such "
        r"samples out\.\n",
        said,
    )


def test_a_scenes_file_is_of_one_stage(uknowpan: Run, tmp_path: Path, chain: Chain) -> None:
    scenes = tmp_path / "scenes.h5"
    with h5py.File(scenes, "w") as file:
        file.create_group("scene").attrs["split"] = "train"
    for stage, more in (
        ("prior", []),
        ("fsa-s", ["--preset", "paper"]),
        ("fsa-s", ["--valid", chain / "data" / "valid.h5"]),
    ):
        words = typed(chain, stage, *more, "--out", tmp_path / "run", data=scenes)
        refused(uknowpan(*words), 2, "A scenes file of `uknowpan pack` trains the presets lite and streams")
    words = typed(chain, "fsa-s", "--teacher", chain / TEACHER, "--out", tmp_path / "run", data=scenes)
    refused(uknowpan(*words), 5, r"architecture fsa-t, which cannot teach on whole scenes")
    assert not (tmp_path / "run").exists()


def test_weights_of_another_network_to_start_from(chain: Chain, uknowpan: Run, tmp_path: Path) -> None:
    tiny = write_tiny_model(tmp_path / "tiny.safetensors")
    words = [*chain.arguments("cached"), "--init", tiny, "--out", tmp_path / "run"]
    refused(uknowpan(*words), 5, r"tiny\.safetensors \(fsa-s-lite: width 4 \(here 8\)\) do not fit")
    assert not (tmp_path / "run").exists()


def test_events_are_written_and_refused_runs_have_none(
    chain: Chain, uknowpan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Mock] = []

    def opened(out: Path) -> Mock:
        """In place of TensorBoard's writer, which makes its folder when it is opened."""
        out.mkdir(parents=True, exist_ok=True)
        made.append(Mock())
        return made[-1]

    monkeypatch.setattr(train_show, "_tensorboard", opened)
    words = typed(chain, "fsa-t", "--prior", chain / TEACHER, "--out", tmp_path / "run")
    assert uknowpan(*words).code == 5
    assert not made and not (tmp_path / "run").exists()
    done = uknowpan(*chain.arguments("prior"), "--out", tmp_path / "run", "-q")
    assert done.code == 0, done.stderr
    (events,) = made
    scalars = [call.args for call in events.add_scalar.call_args_list]
    assert [step for name, _, step in scalars if name == "nll"] == [4, 8, 12, 16]
    assert [step for name, _, step in scalars if name == "ergas"] == [8, 16]
    assert all(np.isfinite(value) for _, value, _ in scalars)
    assert events.add_image.call_count == 2 and events.close.called


def test_pictures_that_cannot_be_written_end_no_run(chain: Chain, uknowpan: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "pictures").write_text("in the way")
    done = uknowpan(*chain.arguments("prior"), "--out", out)
    assert done.code == 0, done.stderr
    assert f"WARNING: no picture of step 8 in {out / 'pictures'}: File exists" in done.stderr


def test_a_reader_that_the_system_kills(chain: Chain, uknowpan: Run, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(TRAIN.replace("[train]", "[train]\nworkers = 1") + CONFIGS["prior"])
    outcome = spawn(*typed(chain, "prior", "--config", config, "--out", tmp_path / "run", "-q"), before=KILLED)
    said = outcome.stderr.splitlines()[-1]  # torch warns of workers on one core
    assert outcome.code == 3 and "Traceback" not in outcome.stderr
    assert said == (
        "uknowpan: error: A process that reads training data ahead was killed, perhaps for lack of "
        "memory; set fewer workers."
    )


KILLED = """
import os, signal
from torch.utils.data import get_worker_info
from uknowpan.models.pancollection.file import PanCollectionFile
read = PanCollectionFile.read
def killed(self, *arguments):
    if get_worker_info() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, *arguments)
PanCollectionFile.read = killed
"""
