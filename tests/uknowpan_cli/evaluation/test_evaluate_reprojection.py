"""`uknowpan evaluate --reprojection` on test files: the published tool's values, truths, and what is written."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from running import Run
from testfiles import store, write_images

GOLDEN = Path(__file__).parents[2] / "golden" / "fullres"
PRODUCTS = ("bicubic", "hpf")
KNOWN = {"max_value": 2047.0, "sensor": "generic"}


def test_a_test_file_has_the_published_tool_s_values(uknowpan: Run, tmp_path) -> None:
    """The stored lms of two images, called EXP, are the two products whose values are known."""
    with np.load(GOLDEN / "synth_4band.npz") as data:
        golden = {key: data[key].astype(float) for key in data if key != "sensor"}
        sensor = str(data["sensor"])
    images = {key: np.stack([golden[key]] * 2) for key in ("pan", "ms")}
    images["lms"] = np.stack([golden[f"fused_{product}"] for product in PRODUCTS])
    path = store(tmp_path / "t.h5", images, max_value=2047.0, sensor=sensor)
    outcome = uknowpan("evaluate", path, "--method", "brovey", "--reprojection", "--json")
    assert outcome.code == 0, outcome.stderr
    judged = json.loads(outcome.stdout)["reprojection"]
    assert list(judged) == ["published", "registered", "registered_nominal", "images"]
    phases = list(map(list, zip(golden["expected_r"], golden["expected_c"], strict=True)))
    assert [image["phases"] for image in judged["images"]] == [phases] * 2
    own = judged["published"]["EXP"]
    for number, product in enumerate(PRODUCTS):
        for index in ("r_q2n", "r_q", "r_sam", "r_ergas", "d_rho", "d_rho_thr", "d_sr", "rqnr_align"):
            expected = pytest.approx(float(golden[f"expected_{product}_{index}"]), rel=1e-9)
            assert own[index]["values"][number] == expected, (product, index)
    assert "d_rho_excess" not in own and "d_rho_excess" in judged["registered"]["EXP"]
    assert list(judged["registered"]) == ["EXP", "Brovey"] and "rqnr" in own


def test_a_truth_stands_beside_the_results(uknowpan: Run, tmp_path) -> None:
    path = write_images(tmp_path / "t.h5", size=128, count=1, **KNOWN)
    table = tmp_path / "t.csv"
    run = ("evaluate", path, "--cut", 0, "--method", "gsa", "--reprojection", "--csv", table)
    outcome = uknowpan(*run, "--json")
    assert outcome.code == 0, outcome.stderr
    said = json.loads(outcome.stdout)
    own = said["reprojection"]["registered_nominal"]
    assert list(own) == ["EXP", "GSA", "truth"] and list(said["scores"]) == ["EXP", "GSA"]
    assert own["truth"]["r_ergas"]["mean"] < 0.2 * own["EXP"]["r_ergas"]["mean"]
    assert "rqnr" not in own["EXP"]  # Khan's D_lambda is measured without a truth only
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["method"] for row in rows] == ["EXP", "GSA", "truth"]
    assert rows[2]["sam"] == "" and rows[0]["published:d_rho_excess"] == ""
    assert float(rows[2]["registered_nominal:r_ergas"]) == own["truth"]["r_ergas"]["mean"]
    text = uknowpan(*run, "--overwrite").stdout
    assert "registered, generic MTF" in text and "registered, own blur" in text


def test_images_that_are_too_small_are_refused(uknowpan: Run, tmp_path) -> None:
    path = write_images(tmp_path / "t.h5", count=1, **KNOWN)
    outcome = uknowpan("evaluate", path, "--cut", 0, "--reprojection")
    assert outcome.code == 3 and outcome.stderr.count("\n") == 1
    assert "--reprojection needs an MS of 32 x 32 pixels, and these images have 16 x 16" in outcome.stderr
