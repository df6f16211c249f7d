"""Validation of the stages: scores, coverage, examples."""

import math

import h5py
import numpy as np
import pytest
import torch
from patch_files import (
    LITE,
    QUICK,
    guided_config,
    patch_data,
    prior_stage,
    run,
    stirred,
    story,
    student_stage,
    write_patches,
)

from uknowpan.models.pancollection.file import PanCollectionFile
from uknowpan.models.published.stages import patch_scores
from uknowpan.models.published.uknow.stages import PriorOptions, PriorStage
from uknowpan.models.training.loop import Interrupted, train
from uknowpan.models.training.run_folder import ConfigMismatch

GUIDED = guided_config()


def test_a_perfect_network_scores_perfectly(files, monkeypatch):
    stage = prior_stage(files)
    monkeypatch.setattr(stage, "predict", lambda model, patches, place: (patches.gt, None))
    scores = stage.validate(stage.build())
    assert scores["score"] == scores["ergas"] == 0
    assert scores["sam"] == pytest.approx(0, abs=1e-4)
    assert scores["q2n"] == pytest.approx(1) and scores["psnr"] > 100
    assert "coverage_1_sigma" not in scores


def darkened(tmp_path, dark, size=16):
    """A validation file of 36 patches, of which some are zero."""
    path = write_patches(tmp_path / "dark.h5", seed=1, size=size)
    with h5py.File(path, "r+") as file:
        for name in ("gt", "lms", "ms", "pan"):
            for i in dark:
                file[name][i] = 0
    return path


@pytest.mark.parametrize("miss", [0.0, 0.01])
def test_patches_of_zeros_are_left_out_of_scores(small, tmp_path, miss):
    """They have no angle, no relative error and, hit exactly, no finite PSNR."""
    paths = [darkened(tmp_path, [0, 5, 35])]
    dark = PriorStage(GUIDED.prior, patch_data(small.train, paths, samples=99), PriorOptions())
    full = prior_stage(small)
    dark.predict = lambda model, p, place: (p.lms + miss, None)
    scores = dark.validate(dark.build())
    assert all(math.isfinite(value) for value in scores.values())
    left = [full.data.valid[i] for i in range(36) if i not in (0, 5, 35)]
    each = [patch_scores(p.lms + miss, p, 2047.0) for p in left]
    sam, ergas, psnr = (sum(float(s[name]) for s in each) for name in ("sam", "ergas", "psnr"))
    assert scores["sam"] == pytest.approx(sam / 33)
    # A band of zeros that is hit exactly has an ERGAS of 0, and one that is missed a PSNR of 40.
    assert scores["ergas"] == pytest.approx(ergas / (33 if miss else 36))
    assert scores["psnr"] == pytest.approx((psnr + 3 * 40) / 36 if miss else psnr / 33)


def test_nothing_but_zeros_has_no_score(small, tmp_path):
    paths = [darkened(tmp_path, range(36))]
    stage = PriorStage(GUIDED.prior, patch_data(small.train, paths), PriorOptions())
    best = train(stage, QUICK, tmp_path / "run")
    assert best.name == "last.safetensors"
    value = story(tmp_path / "run")[-1]
    assert math.isnan(value["score"]) and math.isnan(value["sam"])


def test_a_result_that_is_no_number_is_not_left_out(small):
    stage = prior_stage(small)

    def predict(model, patches, place):
        hrms = patches.gt.clone()
        hrms[0, 0, 0, 0] = math.nan
        return hrms, None

    stage.predict = predict
    assert all(math.isnan(value) for value in stage.validate(stage.build()).values())


@pytest.mark.parametrize("change", ["name", "count", "full scale"])
def test_a_run_goes_on_only_on_its_data(small, tmp_path, change):
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(prior_stage(small), out, should_stop=lambda: True)
    name = "other.h5" if change == "name" else "train.h5"
    path = tmp_path / "elsewhere" / name
    path.parent.mkdir()
    size = {"count": 32}.get(change, 16)
    write_patches(path, size=size, full_scale=1023.0 if change == "full scale" else 2047.0)
    stage = PriorStage(GUIDED.prior, patch_data([path], small.valid), PriorOptions())
    difference = {
        "name": r"files \['train\.h5'\] \(here \['other\.h5'\]\)",
        "count": r"samples \[36\] \(here \[9\]\)",
        "full scale": r"full_scales \[2047\.0\] \(here \[1023\.0\]\)",
    }[change]
    with pytest.raises(ConfigMismatch, match=rf"was begun with data\.train\.{difference}; --resume"):
        train(stage, QUICK, out, resume=True)
    assert str(small.folder) not in (out / "config.json").read_text()


def test_each_file_is_scored_at_its_own_full_scale(tmp_path, files):
    """Digital numbers of 10 bits are no part of those of 11."""
    paths = [
        write_patches(tmp_path / "ten.h5", full_scale=1023.0, seed=2),
        write_patches(tmp_path / "eleven.h5", full_scale=2047.0, seed=3),
    ]
    stage = PriorStage(files.config.prior, patch_data(files.train, paths, samples=99), PriorOptions())
    seen = []

    def predict(model, patches, place):
        seen.append(patches)
        return patches.lms, None

    stage.predict = predict
    scores = stage.validate(stage.build())
    assert [len(p) for p in seen] == [9, 9]
    values = []
    for path, batch in zip(paths, seen, strict=True):
        with h5py.File(path) as file:
            gt, lms = (file[name][()].astype("f8") for name in ("gt", "lms"))
            top = file.attrs["max_value"]
        np.testing.assert_allclose(batch.gt.numpy() * top, gt, rtol=1e-5)
        rmse = np.sqrt(((lms - gt) ** 2).mean((2, 3)))
        values += list(25 * np.sqrt(((rmse / gt.mean((2, 3))) ** 2).mean(1)))
    assert scores["ergas"] == pytest.approx(np.mean(values), rel=1e-4)


def test_coverage_counts_errors_below_the_sigma(files):
    stage = prior_stage(files, samples=9)
    stage.predict = lambda model, p, place: (p.lms, torch.full_like(p.lms, 0.02))
    with h5py.File(files.valid[0]) as file:
        miss = np.abs(file["gt"][()].astype("f8") - file["lms"][()]) / 2047
    value = stage.validate(stage.build())["coverage_1_sigma"]
    assert value == pytest.approx((miss < 0.02).mean(), abs=1e-3)
    assert 0.1 < value < 0.99


@pytest.mark.parametrize("samples", [1, 5, 99])
def test_validation_reads_so_many_patches(small, monkeypatch, samples):
    stage, read = prior_stage(small, samples=samples), []
    whole = PanCollectionFile.read
    monkeypatch.setattr(
        PanCollectionFile,
        "read",
        lambda self, indices: (read.extend((self.path, i) for i in indices), whole(self, indices))[1],
    )
    stage.validate(stage.build())
    assert len(read) == len(set(read)) == min(samples, 36)
    assert {path for path, _ in read} == {str(small.valid[0])}


def test_the_lite_student_validates_by_the_validation_scenes(files):
    """Statistics are those of the patches at hand; training goes on with its own."""
    stage = student_stage(files, config=LITE)
    model, used = stirred(stage.build(), 0.02), []
    ours, theirs = stage.conditioner, stage.valid_conditioner
    assert repr(ours.statistics) != repr(theirs.statistics)
    for conditioner in (ours, theirs):
        whole = conditioner.condition
        conditioner.condition = lambda p, c=conditioner, w=whole: (used.append(c), w(p))[1]
    stage.validate(model)
    assert set(used) == {theirs} and stage.conditioner is ours


def test_examples_are_a_few_validation_patches(files):
    stage = prior_stage(files)
    shown = stage.examples(stage.build())
    first = stage.data.valid[0]
    assert shown.pan.shape == (4, 1, 32, 32) and shown.hrms.shape == (4, 4, 32, 32)
    assert torch.equal(shown.gt[:1], first.gt) and (shown.sigma > 0).all()
