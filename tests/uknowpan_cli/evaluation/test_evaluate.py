"""`uknowpan evaluate`: what is printed and written, what decides, and what is refused."""

import csv
import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import rasterio
import torch
from rasters import write_raster
from running import Run, spawn, write_tiny_model
from scipy.io import loadmat
from testfiles import draw_truth, write_images

from uknowpan.evaluation import h5 as evaluate_h5
from uknowpan.evaluation.pictures import evaluation_sheet
from uknowpan.evaluation.report import Report, index_label, known_exp, plain_words
from uknowpan.models.metrics.evaluation import FULL_INDICES, Results, Scored
from uknowpan.models.metrics.sensors import SENSORS
from uknowpan.models.types import PatchBatch

REDUCED = ["q2n", "q", "sam", "ergas", "scc", "psnr", "ssim"]
KNOWN = {"max_value": 2047.0, "sensor": "generic"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def reduced(folder) -> Path:
    return write_images(folder / "reduced.h5", **KNOWN)


@pytest.fixture(scope="module")
def full(folder) -> Path:
    return write_images(folder / "full.h5", gt=False, **KNOWN)


@pytest.fixture
def as_json(uknowpan: Run):
    def run(*arguments):
        outcome = uknowpan("evaluate", *arguments, "--json")
        assert outcome.code == 0, outcome.stderr
        return json.loads(outcome.stdout)

    return run


def results(rows, images=2):
    """Method -> index -> mean; the values lie 0.1 on either side."""
    scores = {
        method: {
            index: torch.tensor([mean - 0.1, mean + 0.1][:images], dtype=torch.float64) for index, mean in own.items()
        }
        for method, own in rows.items()
    }
    return Results("reduced" if "sam" in next(iter(rows.values())) else "full", images, scores)


# ---------------------------------------------------------------------------------- test files


def test_a_table_with_exp_first(uknowpan: Run, reduced, tiny_model) -> None:
    outcome = uknowpan("evaluate", reduced, "--cut", 0, "--model", tiny_model, "--baselines")
    assert outcome.code == 0 and outcome.stderr == ""
    lines = outcome.stdout.splitlines()
    assert lines[0] == ("reduced.h5, reduced resolution: 2 images of 4 x 64 x 64, border 0 cut, full scale 2047")
    rows = [line.split() for line in lines if "±" in line and not line.startswith("mean")]
    methods = ["EXP", "Brovey", "GSA", "MTF-GLP-FS", "MTF-GLP-HPM-R", "BDSD-PC", "tiny"]
    assert [row[0] for row in rows] == methods
    assert all(len(row) == 1 + 3 * len(REDUCED) for row in rows)
    assert "Q4" in outcome.stdout and "In words" not in outcome.stdout


def test_json_csv_latex_agree(uknowpan: Run, as_json, reduced, tiny_model, tmp_path) -> None:
    table, tex, output = tmp_path / "scores.csv", tmp_path / "table.tex", tmp_path / "scores.json"
    files = ["--csv", table, "--latex", tex, "-o", output]
    said = as_json(reduced, "--cut", 0, "-m", tiny_model, "--method", "gsa", "--seed", 5, *files)
    assert said == json.loads(output.read_text())
    assert said["kind"] == "reduced" and said["images"] == 2
    assert said["max_value"] == 2047 and said["cut"] == 0 and said["scored_size"] == [64, 64]
    assert said["models"]["tiny"]["seed"] == 5 and len(said["models"]["tiny"]["sha256"]) == 64
    assert list(said["scores"]) == ["EXP", "GSA", "tiny"]
    with open(table, newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [(row["method"], row["image"]) for row in rows[:3]] == [
        ("EXP", "0"), ("EXP", "1"), ("GSA", "0"),
    ]  # fmt: skip
    for method, own in said["scores"].items():
        assert list(own) == REDUCED
        for index, one in own.items():
            mine = [float(row[index]) for row in rows if row["method"] == method]
            assert mine == one["values"]
            assert one["mean"] == pytest.approx(np.mean(mine))
            assert one["std"] == pytest.approx(np.std(mine, ddof=1))
    sam = said["scores"]["tiny"]["sam"]
    shown = rf"{sam['mean']:.4f} \pm {sam['std']:.4f}"
    assert shown in tex.read_text()
    assert as_json(reduced, "--cut", 0, "-m", tiny_model, "--limit", 1)["images"] == 1


def test_softness_of_the_results(as_json, reduced) -> None:
    def scores(*words: object) -> dict:
        return as_json(reduced, "--cut", 0, "-m", "generic", "--limit", 1, *words)

    usual, same, soft = scores(), scores("--softness", 0.3), scores("--softness", 0.8)
    assert usual["scores"]["generic"] == same["scores"]["generic"] != soft["scores"]["generic"]
    assert soft["models"]["generic"]["softness"] == 0.8
    assert "softness" not in usual["models"]["generic"]


def test_full_resolution_in_words(uknowpan: Run, full, tiny_model) -> None:
    outcome = uknowpan("evaluate", full, "-m", tiny_model)
    assert outcome.code == 0 and outcome.stderr == ""
    assert "full resolution: 2 images of 4 x 64 x 64, generic MTF" in outcome.stdout
    *_, colour, detail, both, exp, last = outcome.stdout.strip().splitlines()
    assert re.match(r"D_lambda_K \d\.\d{3}: how far the colours, .* usual, this is \w+ that", colour)
    assert detail.startswith("D_s ") and both.startswith("HQNR ")
    assert exp.startswith("The MS merely enlarged (EXP) has ")
    assert "No truth stands behind these numbers" in last


def test_incomplete_tiles_and_few_digital_numbers_are_noted(uknowpan: Run, tmp_path, tiny_model) -> None:
    path = write_images(tmp_path / "t.h5", size=80, gt=False, count=1, max_value=1.0, sensor="generic")
    outcome = uknowpan("evaluate", path, "-m", tiny_model)
    assert "Only 64 x 64 of 80 x 80 pixels are scored" in outcome.stdout
    assert "full scale is only 1" in outcome.stdout
    assert "±" not in outcome.stdout.split("\n", 2)[2]  # one image has no deviation


def test_pictures(uknowpan: Run, reduced, full, tiny_model, tmp_path) -> None:
    for path, sheet_rows in ((reduced, 3), (full, 2)):
        where = tmp_path / path.stem / "deep"
        arguments = ["evaluate", path, "-m", tiny_model, "--cut", 0, "--pictures", where]
        arguments += ["--limit", 1, "-q"]
        assert uknowpan(*arguments).code == 0
        (picture,) = where.iterdir()
        assert picture.name == "image_000.png"
        with rasterio.open(picture) as opened:
            assert opened.count == 3
            assert opened.height > 256 * sheet_rows  # the legend comes on top
        again = uknowpan(*arguments)
        assert again.code == 4 and "image_000.png exists" in again.stderr
        assert uknowpan(*arguments, "--overwrite").code == 0
    outcome = uknowpan("evaluate", reduced, "--cut", 0, "--pictures", tiny_model)
    assert outcome.code == 3 and "is a file; name a folder" in outcome.stderr


def test_a_picture_shows_errors_at_one_scale() -> None:
    gt = draw_truth(0, size=128)[None]
    patch = PatchBatch(gt.mean(1, keepdim=True), gt[..., ::4, ::4], gt + 40, gt)
    fused = {"EXP": patch.lms, "same": gt, "half": gt + 20}
    sheet = evaluation_sheet(Scored(0, 1, patch, fused, {}), {"half": None}, SENSORS["generic"])
    assert sheet.dtype == np.uint8
    side, gap = 256, 8
    below = slice(-gap - side + 20, -gap - 20)  # the errors, without captions

    def brightness(column):
        left = gap + column * (side + gap)
        return sheet[:, below, left + 20 : left + side - 20].astype(float).mean()

    assert brightness(2) == 0  # "same" has no error
    assert brightness(1) > 1.5 * brightness(3) > 0
    assert sheet.shape[2] == 5 * (side + gap) + gap


# -------------------------------------------------------------------------- who says what counts


def test_full_scale_and_sensor_from_options_file_and_card(as_json, tmp_path) -> None:
    plain = write_images(tmp_path / "plain.h5", count=1, gt=False)
    said = write_images(tmp_path / "said.h5", count=1, gt=False, max_value=3000.0, sensor="QB")
    card = write_tiny_model(tmp_path / "m.safetensors", sensor="IKONOS", max_value=1500.0)

    def found(*arguments):
        about = as_json(*arguments, "--model", card)
        return about["max_value"], about["sensor"]

    assert found(plain) == (2047, "IKONOS")  # of the sensor
    assert found(said) == (3000, "QB")
    assert found(said, "--sensor", "GF2") == (3000, "GF2")
    assert found(plain, "--sensor", "GF2", "--max-value", 2047) == (2047, "GF2")
    assert found(plain, "--bit-depth", 12) == (4095, "IKONOS")
    trained = write_tiny_model(tmp_path / "n.safetensors", max_value=1500.0)
    about = as_json(plain, "--model", trained, "--sensor", "generic")
    assert about["max_value"] == 1500


def test_a_file_name_stands_for_its_sensor(uknowpan: Run, as_json, tmp_path, tiny_model) -> None:
    """Input of the field: PanCollection's files declare neither sensor nor full scale."""
    path = write_images(tmp_path / "test_qb_multiExm1.h5", count=1, gt=False)
    run = ("--model", tiny_model)
    about = as_json(path, *run)
    assert (about["max_value"], about["sensor"]) == (2047, "QB")
    assert about["notes"][0].startswith("By its name the file is of QB")
    assert as_json(path, *run, "--max-value", 4095)["max_value"] == 4095
    wrong = write_images(tmp_path / "test_gf2_multiExm1.h5", count=1, gt=False)
    uknowpan("evaluate", wrong, *run).fails(3, "above the full scale of 1023 that its name stands for")
    declared = write_images(tmp_path / "d.h5", count=1, gt=False, max_value=3000.0, sensor="QB")
    uknowpan("evaluate", declared, *run, "--max-value", 999).fails(3, "declares a full scale of 3000, not 999")


def test_sharp_images_for_the_toolbox(uknowpan: Run, reduced, tmp_path) -> None:
    run = ["evaluate", reduced, "--cut", 0, "--method", "brovey", "--limit", 1, "--save", tmp_path / "out"]
    assert uknowpan(*run).code == 0
    image = loadmat(tmp_path / "out" / "Brovey" / "output_mulExm_0.mat")["sr"]
    assert image.shape == (64, 64, 4) and image.dtype == "f8"
    for form in ("h5", "tif"):
        assert uknowpan(*run, "--save-as", form).code == 0
    with h5py.File(tmp_path / "out" / "Brovey" / "output_mulExm_0.h5") as file:
        assert np.array_equal(file["sr"][:], image.transpose(2, 0, 1).astype("f4"))
    with rasterio.open(tmp_path / "out" / "Brovey" / "output_mulExm_0.tif") as file:
        assert np.array_equal(file.read(), image.transpose(2, 0, 1).astype("f4"))
    uknowpan(*run).fails(4, "exists")


def test_gains_that_a_file_was_simulated_with(as_json, tmp_path, tiny_model) -> None:
    gains = [0.2, 0.25, 0.3, 0.35]
    path = write_images(tmp_path / "t.h5", count=1, mtf_gains=np.array(gains), **KNOWN)
    run = [path, "--cut", 0, "--method", "mtf-glp-fs"]
    own, others = as_json(*run), as_json(*run, "--sensor", "QB")
    assert own["mtf_gains"] == gains and own["sensor"] == "generic"
    assert others["mtf_gains"] == list(SENSORS["QB"].mtf_ms)
    methods = [said["scores"]["MTF-GLP-FS"] for said in (own, others)]
    assert methods[0] != methods[1]


def test_without_a_name_the_bundled_model_is_scored(as_json, reduced, monkeypatch, tmp_path):
    run = [reduced, "--cut", 0, "--limit", 1]
    assert list(as_json(*run)["scores"]) == ["EXP", "generic"]
    assert list(as_json(*run, "--method", "GSA")["scores"]) == ["EXP", "GSA"]
    model = write_tiny_model(tmp_path / "m.safetensors", name="mine")
    monkeypatch.setenv("UKNOWPAN_MODEL", str(model))
    assert list(as_json(*run)["scores"]) == ["EXP", "mine"]
    same = write_tiny_model(tmp_path / "n.safetensors", name="mine")
    both = as_json(*run, "-m", model, "-m", same)
    assert list(both["scores"]) == ["EXP", "mine", str(same)]


# ------------------------------------------------------------------------------------- rasters


def test_a_raster_against_its_truth(uknowpan: Run, as_json, tmp_path) -> None:
    truth = draw_truth(0).round().numpy().astype("u2")
    reference = write_raster(tmp_path / "gt.tif", truth, None)
    fused = write_raster(tmp_path / "result.tif", truth + np.uint16(10), None)
    run = [fused, "--reference", reference, "--cut", 0, "--max-value", 1023]
    said = as_json(*run)
    assert said["kind"] == "reduced" and said["reference"] == str(reference)
    assert said["scores"]["result"]["psnr"]["mean"] == pytest.approx(20 * np.log10(102.3))
    outcome = uknowpan("evaluate", *run, "--csv", tmp_path / "s.csv")
    assert "result.tif against gt.tif: border 0 cut, ratio 4" in outcome.stdout
    assert "In words" not in outcome.stdout
    assert (tmp_path / "s.csv").read_text().startswith("method,image,q2n,")
    for name in ("o.csv", "o.tex"):
        assert uknowpan("evaluate", *run, "-o", tmp_path / name).code == 0
    assert (tmp_path / "o.csv").read_text() == (tmp_path / "s.csv").read_text()
    assert (tmp_path / "o.tex").read_text().startswith(r"\begin{tabular}")


def test_a_raster_without_truth(uknowpan: Run, as_json, make_pair, tmp_path) -> None:
    pair = make_pair(ms_shape=(32, 32))
    with rasterio.open(pair.pan) as opened:
        place, crs = opened.transform, opened.crs
    values = pair.ms_values.repeat(4, 1).repeat(4, 2)
    fused = write_raster(tmp_path / "result.tif", values, place, crs=crs)
    run = [fused, "--pan", pair.pan, "--ms", *pair.ms]
    said = as_json(*run)
    assert said["kind"] == "full" and list(said["scores"]["result"]) == list(FULL_INDICES)
    assert "No --sensor is given" in said["notes"][0] and "HQNR" in said["in_words"]
    outcome = uknowpan("evaluate", *run, "--sensor", "QB", "--bidx", "1,2,3,4")
    assert outcome.code == 0
    assert "QB MTF" in outcome.stdout and "No --sensor" not in outcome.stdout
    assert "D_lambda_K" in outcome.stdout.splitlines()[-4]


# ------------------------------------------------------------------------------------- report


def test_latex_escapes_and_marks_the_best() -> None:
    found = results({"a_b": {"sam": 1.0, "psnr": 30.0}, "50%": {"sam": 2.0, "psnr": 31.0}})
    text = Report(found, "", None, {}).latex()
    assert r"a\_b & $\mathbf{1.0000 \pm 0.1414}$ & $30.000 \pm 0.141$ \\" in text
    assert r"50\% & $2.0000 \pm 0.1414$ & $\mathbf{31.000 \pm 0.141}$ \\" in text
    assert r"SAM ($^\circ$) $\downarrow$ & PSNR (dB) $\uparrow$" in text
    alone = Report(results({"a": {"sam": 1.0}}, images=1), "", None, {}).latex()
    assert "a & $0.9000$" in alone


def test_q2n_is_called_by_its_components() -> None:
    names = [index_label("q2n", bands) for bands in (1, 2, 3, 4, 5, 8, None)]
    assert names == ["Q2n", "Q2", "Q4", "Q4", "Q8", "Q8", "Q2n"]


def full_scores(d_lambda_k, d_s, hqnr):
    return {"d_lambda_k": d_lambda_k, "d_s": d_s, "hqnr": hqnr}


def test_words_are_about_the_best_and_compare_with_exp() -> None:
    rows = {
        "EXP": full_scores(0.01, 0.2, 0.8),
        "good": full_scores(0.03, 0.12, 0.96),
        "bad": full_scores(0.5, 0.5, 0.25),
    }
    words = plain_words(results(rows))
    assert words is not None and "for good" in words
    assert "D_lambda_K 0.030" in words and "D_s 0.120" in words
    judged = re.findall("this is (.*)\\.", words)
    assert judged == ["within that", "above that", "above that"]
    assert "has 0.800." in words
    rows["EXP"]["hqnr"] = 0.97
    assert "has 0.970, which is no worse" in (plain_words(results(rows)) or "")
    assert plain_words(results({"a": {"sam": 1.0}})) is None


@pytest.mark.parametrize(
    ("exp", "images", "sensor", "said"),
    [
        ((0.0232, 0.0813, 0.8975), 20, "WV3", "of the .mat files that papers use"),
        ((0.0456, 0.1201, 0.8399), 20, "WV3", "of the H5 files"),
        ((0.0456, 0.0813, 0.8399), 20, "WV3", "EXP is none of the published ones"),
        ((0.0232, 0.0813, 0.8975), 19, "WV3", None),
        ((0.0232, 0.0813, 0.8975), 20, "QB", None),
    ],
)
def test_exp_shows_which_file_it_is(exp, images, sensor, said) -> None:
    row = {index: torch.full((images,), value, dtype=torch.float64) for index, value in full_scores(*exp).items()}
    found = known_exp(Results("full", images, {"EXP": row}), sensor)
    assert found is None if said is None else said in found


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["r.tif", "-o", "o.txt"], 2, "--output o.txt must end in .json, .csv, .tex"),
        (["r.tif"], 2, "give either its truth with --reference, or both --pan and --ms"),
        (["r.tif", "--pan", "p.tif"], 2, "or both --pan and --ms"),
        (["r.tif", "--reference", "g.tif", "--pan", "p.tif", "--ms", "m.tif"], 2, "either its"),
        (["r.tif", "--reference", "g.tif", "--baselines"], 2, "--baselines goes with a test file"),
        (["r.tif", "--reference", "g.tif", "--bidx", "1"], 2, "--bidx goes with --pan and --ms"),
        (["r.tif", "--pan", "p.tif", "--ms", "m.tif", "--cut", "3"], 2, "--cut goes with --refer"),
        (["r.tif", "--pan", "p.tif", "--ms", "m.tif", "--bidx", "0"], 2, "band numbers from 1 on"),
        (["r.tif", "--reference", "g.tif"], 3, "r.tif"),
        (["t.h5"], 3, "t.h5 does not exist"),
        (["t.h5", "--reference", "g.tif"], 2, "--reference goes with a result raster, not t.h5"),
        (["t.h5", "--pan-bidx", "1"], 2, "--pan-bidx goes with a result raster"),
        (["{reduced}"], 3, "leave 23 x 23, fewer than one window of 32 x 32"),
        (["{reduced}", "--cut", "0", "--method", "magic"], 2, "no classical method is called"),
        (["{reduced}", "--cut", "0", "--sensor", "Hubble"], 2, "no sensor is called 'Hubble'"),
        (["{reduced}", "--max-value", "5", "--bit-depth", "3"], 2, "exclude each other"),
        (["{reduced}", "--max-value", "0"], 2, "--max-value: 0 is no full scale"),
        (["{reduced}", "--max-value", "1e300"], 2, "1e+300 is no full scale"),
        (["{reduced}", "--max-value", "1e-300"], 2, "1e-300 is no full scale"),
        (["{reduced}", "--cut", "0", "--model", "nobody"], 5, "no model 'nobody'"),
        (["{reduced}", "--cut", "0", "--steps", "501"], 2, "--steps: "),
        (["{reduced}", "--cut", "0", "--csv", "{reduced}"], 3, "is one of the inputs"),
        (["{reduced}", "--csv", "a.x", "--latex", "a.x"], 2, "name the same file"),
    ],
)
def test_what_is_refused(uknowpan: Run, reduced, full, tmp_path, monkeypatch, arguments, code, sentence) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = uknowpan("evaluate", *(a.format(reduced=reduced, full=full) for a in arguments))
    assert outcome.stdout == ""
    assert outcome.stderr.count("\n") == 1 and "Traceback" not in outcome.stderr
    assert sentence in outcome.stderr
    assert outcome.code == code


@pytest.mark.parametrize(
    ("attributes", "bands", "words", "code", "sentence"),
    [
        ({}, 4, [], 3, "does not declare its full scale"),
        ({"max_value": 2047.0}, 4, [], 3, "does not declare its sensor, whose MTF gains"),
        ({"max_value": 2047.0, "sensor": "WV3"}, 5, [], 3, "WV3 has 8 bands, not 5"),
        ({"max_value": 2047.0, "sensor": "Hubble"}, 4, [], 3, "no sensor is called 'Hubble'"),
        ({"max_value": 2047.0, "sensor": "Hubble", "gt": True}, 5, [], 0, ""),  # a truth needs no sensor
        (KNOWN, 5, ["--sensor", "QB"], 2, "QB has 4 bands, not 5"),
        ({"without": "lms", "gt": True}, 4, [], 3, "t.h5 lacks lms; it holds gt, ms, pan"),
    ],
)
def test_files_that_lack_something(
    uknowpan: Run, tmp_path, tiny_model, attributes, bands, words, code, sentence
) -> None:
    known = {"gt": False} | attributes
    lacking = known.pop("without", None)
    path = write_images(tmp_path / "t.h5", count=1, bands=bands, **known)
    if lacking:
        with h5py.File(path, "a") as file:
            del file[lacking]
    outcome = uknowpan("evaluate", path, "-m", tiny_model, "--cut", 0, *words)
    assert outcome.code == code and sentence in outcome.stderr
    assert outcome.stderr.count("\n") == (1 if code else 0)


def test_full_memory_is_one_sentence(uknowpan: Run, reduced, tiny_model, monkeypatch) -> None:
    def full(patches):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluate_h5, "_keeping_sigma", lambda *_: full)
    outcome = uknowpan("evaluate", reduced, "--cut", 0, "-m", tiny_model)
    assert outcome.code == 6
    assert "Memory ran out with one image of 4 x 64 x 64" in outcome.stderr


@pytest.mark.parametrize("gains", [0.2, "odd", np.full(3, 0.2), np.full((1, 4), 0.2)])
def test_gains_that_are_not_one_number_per_band(uknowpan: Run, reduced, tmp_path, tiny_model, gains) -> None:
    path = write_images(tmp_path / "t.h5", count=1, mtf_gains=gains, **KNOWN)
    outcome = uknowpan("evaluate", path, "--cut", 0, "-m", tiny_model, "--json")
    assert outcome.code == 0, outcome.stderr
    used = 0.2 if np.size(gains) == 4 else 0.3  # the sensor's own
    assert json.loads(outcome.stdout)["mtf_gains"] == [used] * 4


def test_a_full_disk_is_named_with_the_file(uknowpan: Run, reduced, tiny_model, tmp_path) -> None:
    wanted = tmp_path / "a.csv"
    outcome = spawn(*("evaluate", reduced, "--cut", 0, "-m", tiny_model, "--csv", wanted, "-j", 1), file_limit=50)
    assert outcome.code == 3 and outcome.stdout == ""
    assert outcome.stderr == f"uknowpan: error: {wanted}: File too large.\n"
    assert not list(tmp_path.iterdir())


def test_a_model_twice(uknowpan: Run, reduced, tmp_path) -> None:
    one, other = (write_tiny_model(tmp_path / f"{n}.safetensors", name="m") for n in "ab")
    outcome = uknowpan("evaluate", reduced, "--cut", 0, "-m", one, "-m", other, "-m", other)
    assert outcome.code == 2 and "b.safetensors is given twice" in outcome.stderr
