"""`uknowpan reproduce` from end to end, on files of PanCollection's layout."""

import json
import re

import h5py
import pytest
from patch_files import write_patches
from testfiles import write_images

from uknowpan.models.checkpoints import read_card

TRAIN = "iterations = 2\nbatch_size = 2\nvalidation_samples = 2\nworkers = 0\nlog_every = 1\n"
TINY = {
    "u-know": f"""
[prior.train]
{TRAIN}[prior.network]
width = 4
blocks = 1
[fsa-t.train]
{TRAIN}[fsa-t.network.teacher]
width = 4
heads = 2
blocks = 1
[fsa-t.network.prior]
width = 4
blocks = 1
[fsa-t.options]
steps = 2
[fsa-s.train]
{TRAIN}[fsa-s.network]
width = 4
heads = 2
blocks = 1
[fsa-s.options]
steps = 2
""",
    "pan-crafter": f"""
[pan-crafter.train]
{TRAIN}[pan-crafter.network]
widths = [8, 8]
blocks = 1
token_width = 8
groups = 4
head_width = 4
""",
    "ssdiff": f"""
[ssdiff.train]
{TRAIN}[ssdiff.network]
time_width = 4
patch = 32
[ssdiff.options]
steps = 2
""",
}


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """Files as PanCollection has them: no attribute declares anything."""
    folder = tmp_path_factory.mktemp("PanCollection")
    for name in ("training_data", "test_data"):
        (folder / name).mkdir()
    for seed, split in enumerate(("train", "valid")):
        path = write_patches(folder / "training_data" / f"{split}_qb.h5", seed=seed)
        with h5py.File(path, "r+") as file:
            for name in list(file.attrs):
                del file.attrs[name]
            del file["place"]
    write_images(folder / "test_data" / "test_qb_multiExm1.h5", size=96, count=1)
    write_images(folder / "test_data" / "test_qb_OrigScale_multiExm1.h5", size=64, count=1, gt=False)
    return folder


@pytest.mark.parametrize("system", TINY)
def test_a_short_run_of_each_system(uknowpan, collection, tmp_path, system):
    config, out = tmp_path / "tiny.toml", tmp_path / "runs"
    config.write_text(TINY[system])
    run = ["reproduce", system, "--data", collection, "--sensor", "qb", "-o", out, "--config", config, "-q", "-j", 1]
    plan = json.loads(uknowpan(*run, "--dry-run").stdout)
    assert plan["missing"] == [] and not out.exists()
    assert not any(step.get("done") for step in plan["steps"])
    assert all(step["hours"] >= 0 for step in plan["steps"] if "done" in step)
    outcome = uknowpan(*run)
    assert outcome.code == 0, outcome.stderr
    lines = outcome.stdout.splitlines()
    assert lines[0].split() == ["index", "EXP", "here", "published", "file"]
    assert {line.split()[0] for line in lines[1:]} > {"SAM,", "ERGAS", "HQNR", "D_s"}
    stored = json.loads((out / "scores.json").read_text())
    assert {row["file"] for row in stored["scores"]} == {"test_qb_multiExm1.h5", "test_qb_OrigScale_multiExm1.h5"}
    last = {"u-know": "fsa-s"}.get(system, system)
    card = read_card(out / last / "best.safetensors")
    assert (card.sensor, card.max_value) == ("QB", 2047)
    if system == "u-know":
        with h5py.File(out / "answers.h5") as cache:
            assert cache.attrs["steps"] == 2  # as the teacher declares
    # What is done is not done again.
    before = (out / last / "log.jsonl").read_text()
    assert all(step["done"] for step in json.loads(uknowpan(*run, "--dry-run").stdout)["steps"] if "done" in step)
    assert uknowpan(*run).stdout == outcome.stdout
    assert (out / last / "log.jsonl").read_text() == before
    if system == "ssdiff":  # kind of fault: the scores of another configuration, taken for those of this one
        config.write_text(TINY[system].replace("time_width = 4", "time_width = 8"))
        for words in ((), ("--dry-run",)):
            uknowpan(*run, *words).fails(5, r"was begun with network.time_width 4 \(here 8\)")


def test_the_log_has_a_first_line_and_a_pace(uknowpan, collection, tmp_path):
    config = tmp_path / "tiny.toml"
    config.write_text("[train]\niterations = 3\nbatch_size = 2\nlog_every = 2\nvalidation_samples = 1\n"
                      "[network]\nwidth = 4\nblocks = 1\n")  # fmt: skip
    data = collection / "training_data" / "train_qb.h5"
    outcome = uknowpan("train", "--stage", "prior", "--data", data, "-o", tmp_path / "run", "--config", config)
    lines = outcome.stderr.splitlines()
    assert lines[:2] == [f"{split}_qb.h5: QB by its name, full scale 2047" for split in ("train", "valid")]
    assert lines[2].startswith("step 1/3: nll ")
    assert re.search(r"step 2/3: .*, [\d.e+]+ it/s, \d:\d\d:\d\d left$", lines[3])


def test_what_is_missing_is_named(uknowpan, collection, tmp_path):
    run = ["reproduce", "ssdiff", "--data", tmp_path, "-o", tmp_path / "out"]
    outcome = uknowpan(*run, "--dry-run")
    assert outcome.code == 0 and "training_data/train_wv3.h5" in json.loads(outcome.stdout)["missing"][0]
    uknowpan(*run).fails(3, "train_wv3.h5 and .* are missing; --dry-run lists")
    uknowpan(*run, "--sensor", "generic").fails(2, "has no bands of its own")
    uknowpan(*run, "--sensor", "hubble").fails(2, "no sensor is called")
    config = tmp_path / "c.toml"
    config.write_text("[prior.train]\niterations = 2\n")
    uknowpan(*run, "--config", config).fails(2, r"--config of ssdiff has tables of ssdiff")


def test_paper_has_hours_and_memory(uknowpan, tmp_path):
    outcome = uknowpan("reproduce", "ssdiff", "--data", tmp_path, "-o", tmp_path / "out", "--dry-run")
    (step,) = (step for step in json.loads(outcome.stdout)["steps"] if "done" in step)
    assert step["iterations"] == 300_000 and step["hours"] > 0.5 and step["memory_gb"] > 0.5
