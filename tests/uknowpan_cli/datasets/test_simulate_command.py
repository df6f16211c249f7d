"""`simulate`: patches, where they come from, and that no pixel serves two splits."""

import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import typer
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rasters import write_raster
from running import spawn

from uknowpan import __version__
from uknowpan.commands.simulate import simulate
from uknowpan.datasets import simulate as simulate_h5
from uknowpan.datasets.options import SimulationOptions
from uknowpan.datasets.simulate import (
    SPLITS,
    SceneFiles,
    simulate_files,
    simulate_sample,
    split_cells,
    split_paths,
)
from uknowpan.models.errors import DataError
from uknowpan.models.metrics.sensors import find_sensor
from uknowpan.models.metrics.toolbox import imresize
from uknowpan.models.pancollection.dataset import PanCollectionDataset, PatchBatches, PatchSampler
from uknowpan.models.pancollection.file import PanCollectionFile
from uknowpan.models.pancollection.protocol import wald_lms, wald_ms

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics"


def scene_of(pair):
    return SceneFiles(pair.pan, tuple(pair.ms))


def read(path):
    """Everything in a file."""
    with h5py.File(path) as file:
        return {name: file[name][()] for name in file}, dict(file.attrs)


@pytest.fixture
def command(capfd):
    """`command(*arguments)`: (exit code, stdout, stderr) of `uknowpan simulate`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(simulate)

    def run(*arguments):
        capfd.readouterr()
        try:
            app([str(a) for a in arguments])
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


# ------------------------------------------------------------------------------------- protocol


def test_reduction_of_a_pair_equals_the_toolbox(tmp_path):
    with np.load(GOLDEN / "wald.npz") as data:
        golden = dict(data)
    pixel = Affine.translation(5e5, 5e6) @ Affine.scale(0.5, -0.5)
    scene = SceneFiles(
        write_raster(tmp_path / "pan.tif", golden["pan"].reshape(1, 256, 256), pixel),
        (write_raster(tmp_path / "ms.tif", golden["gt"], pixel @ Affine.scale(4)),),
    )
    options = SimulationOptions("WV3", split=(100, 0, 0), max_value=65535)
    done = simulate_files([scene], tmp_path / "train.h5", options)
    assert list(done.files) == ["train"] and done.files["train"].patches == 1
    stored, attributes = read(tmp_path / "train.h5")
    np.testing.assert_array_equal(stored["gt"][0], golden["gt"])
    np.testing.assert_allclose(stored["ms"][0], golden["expected_ms_lr"], rtol=1e-7)
    np.testing.assert_allclose(stored["pan"][0], golden["expected_pan_lr"].reshape(1, 64, 64), rtol=1e-7)
    assert attributes["registration"] == "pancollection" and attributes["sensor"] == "WV3"
    assert attributes["code_version"] == __version__ and attributes["max_value"] == 65535
    assert json.loads(attributes["sources"]) == [str(scene)]
    np.testing.assert_array_equal(attributes["mtf_gains"], find_sensor("WV3").mtf_ms)


@pytest.mark.parametrize(("ratio", "registration"), [(2, "pancollection"), (3, "area"), (4, "pancollection")])
def test_patches_are_cut_from_the_reduced_scene(tmp_path, make_pair, ratio, registration):
    pair = make_pair(ratio=ratio, ms_shape=(84, 60), noise=40)
    options = SimulationOptions(patch=12, stride=12, test_patch=12)
    done = simulate_files([scene_of(pair)], tmp_path / "train.h5", options)
    assert done.ratio == ratio
    gt = torch.from_numpy(pair.ms_values.astype("f8"))
    ms = wald_ms(gt, (0.3,) * 4, ratio)
    whole = {"gt": gt, "ms": ms, "lms": wald_lms(ms, ratio)}
    whole["pan"] = imresize(torch.from_numpy(pair.pan_values.astype("f8"))[None], ratio)
    for split, file in done.files.items():
        stored, attributes = read(file.path)
        assert attributes["registration"] == registration and attributes["split"] == split
        assert all(stored[name].dtype == np.float32 for name in whole)
        for i, (source, row, column) in enumerate(stored["place"]):
            assert source == 0
            for name, image in whole.items():
                step = ratio if name == "ms" else 1
                y, x, n = row // step, column // step, 12 // step
                expected = image[:, y : y + n, x : x + n]
                np.testing.assert_allclose(stored[name][i], expected, rtol=1e-6)
        header = PanCollectionFile(file.path, needs_gt=True).header
        assert (header.ratio, header.bands, header.height) == (ratio, 4, 12)
    assert sum(f.patches for f in done.files.values()) == 7 * 5


def test_how_a_scene_is_cut_into_blocks_does_not_matter(tmp_path, make_pair, monkeypatch):
    scene = scene_of(make_pair(ms_shape=(200, 150), ratio=2, noise=40))
    options = SimulationOptions(patch=16, stride=12)
    results = []
    for block in (512, 64):
        monkeypatch.setattr(simulate_h5, "BLOCK", block)
        done = simulate_files([scene], tmp_path / f"train{block}.h5", options)
        results.append([read(file.path)[0] for file in done.files.values()])
    for whole, parts in zip(*results, strict=True):
        order = [np.lexsort(stored["place"].T) for stored in (whole, parts)]
        for name in whole:
            np.testing.assert_allclose(whole[name][order[0]], parts[name][order[1]], rtol=1e-6, err_msg=name)


def test_a_scene_without_pan_gets_one_of_its_bands(tmp_path, make_pair):
    pair = make_pair(ms_shape=(60, 48), bands=3, noise=40)
    weights = (0.2, 0.3, 0.5)
    options = SimulationOptions(patch=12, pan_weights=weights)
    done = simulate_files([SceneFiles(None, tuple(pair.ms))], tmp_path / "a.h5", options)
    assert done.ratio == 4
    stored, _ = read(tmp_path / "a_train.h5")
    np.testing.assert_allclose(stored["pan"][:, 0], np.einsum("c,ncyx->nyx", weights, stored["gt"]), rtol=1e-6)
    both = [scene_of(pair), SceneFiles(None, tuple(pair.ms))]
    done = simulate_files(both, tmp_path / "b.h5", options)
    stored, attributes = read(tmp_path / "b_train.h5")
    assert set(stored["place"][:, 0]) == {0, 1} and len(json.loads(attributes["sources"])) == 2


def test_gains_of_the_user_blur_as_they_say(tmp_path, make_pair):
    scene = scene_of(make_pair(ms_shape=(48, 36), noise=100))
    detail = []
    for gain in (0.1, 0.5):
        options = SimulationOptions(mtf=(gain,), patch=12)
        done = simulate_files([scene], tmp_path / "train.h5", options)
        assert done.gains == (gain,) * 4
        detail.append(np.diff(read(tmp_path / "train.h5")[0]["ms"]).std())
    assert detail[0] < detail[1]


# ---------------------------------------------------------------------------------------- splits

SHARES = st.tuples(*[st.integers(1, 90), st.integers(0, 30), st.integers(0, 30)])
GRIDS = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(lambda s: arrays(bool, s))


@given(GRIDS, SHARES)
def test_no_cell_is_in_two_splits_and_none_is_empty(valid, shares):
    parts = split_cells(valid, dict(zip(SPLITS, shares, strict=True)))
    if parts is None:
        return
    assert set(parts) == {name for name, share in zip(SPLITS, shares, strict=True) if share}
    taken = np.zeros(valid.shape, int)
    for (top, bottom), (left, right) in parts.values():
        assert valid[top:bottom, left:right].any()
        taken[top:bottom, left:right] += 1
    assert (taken == 1).all()


@given(st.integers(2, 12), st.integers(2, 12), st.tuples(*[st.integers(1, 90)] * 3))
def test_a_scene_without_holes_has_room_for_all_from_two_by_two_cells_on(rows, columns, shares):
    parts = split_cells(np.ones((rows, columns), bool), dict(zip(SPLITS, shares, strict=True)))
    assert parts is not None
    cut = parts["train"][0][1]
    off = [abs((rows - n) / rows - sum(shares[1:]) / sum(shares)) for n in range(1, rows)]
    assert off[cut - 1] == pytest.approx(min(off))
    (_, (left, right)), (_, (after, end)) = parts["valid"], parts["test"]
    assert (left, right, end) == (0, after, columns)
    wanted = shares[1] / sum(shares[1:]) * columns
    assert abs(right - wanted) <= 0.5 + 1e-9 or right in (1, columns - 1)


@pytest.mark.parametrize("shape", [(150, 130), (130, 161)])
def test_no_pixel_of_truth_is_in_two_files(tmp_path, make_pair, shape):
    holes = np.zeros(shape, bool)
    holes[:30, :50] = holes[70, 70] = True
    pair = make_pair(ms_shape=shape, holes=holes, nodata=0, noise=40)
    options = SimulationOptions(patch=16, stride=8)
    done = simulate_files([scene_of(pair)], tmp_path / "train.h5", options)
    assert done.left_out > 0
    owners = np.zeros((3, *shape), bool)
    for owner, (split, file) in zip(owners, done.files.items(), strict=True):
        stored, attributes = read(file.path)
        top, left, h, w = json.loads(attributes["areas"])[0]
        for patch, (_, row, column) in zip(stored["gt"], stored["place"], strict=True):
            n = file.size
            assert top <= row and row + n <= top + h and left <= column and column + n <= left + w
            window = (slice(row, row + n), slice(column, column + n))
            owner[window] = True
            np.testing.assert_array_equal(patch, pair.ms_values[(slice(None), *window)])
            assert not holes[window].any(), split
    assert (owners.sum(0) <= 1).all()
    share = owners[0].sum() / owners.sum()
    assert 0.65 < share < 0.9


def test_pan_nodata_is_left_out_too(tmp_path, make_pair):
    holes = np.zeros((384, 256), bool)
    holes[:130, 3] = True
    pair = make_pair(ms_shape=(96, 64), pan_holes=holes, pan_nodata=0)
    done = simulate_files([scene_of(pair)], tmp_path / "train.h5", SimulationOptions(patch=16, stride=16))
    places = read(done.files["train"].path)[0]["place"]
    assert not ((places[:, 1] < 33) & (places[:, 2] == 0)).any()
    assert ((places[:, 1] >= 48) & (places[:, 2] == 0)).any() and done.left_out == 3


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"patch": 30}, "A patch of 30 pixels is no multiple of the ratio 4"),
        ({"stride": 3}, "A stride of 3 pixels"),
        ({"patch": 64}, "no room for train and valid and test apart: 0 patches of 64 .* 48 x 36"),
        ({"test_patch": 40}, "No patch of 40 valid MS pixels is left for test"),
        (
            {"sensor": "WV3", "bidx": (1, 2, 3)},
            "WV3 has 8 bands, not 3; name another",
        ),
        ({"sensor": "GF2"}, "Values reach .*, beyond the 1023 of GF2; .* --max-value"),
        ({"mtf": (0.3, 0.2)}, "2 MTF gains were given for 4 bands"),
        ({"bidx": (7,)}, "MS band 7 does not exist"),
    ],
)
def test_what_does_not_fit_is_said_and_leaves_nothing(tmp_path, make_pair, changes, sentence):
    pair = make_pair(ms_shape=(48, 36), noise=10)
    before = sorted(tmp_path.iterdir())
    options = SimulationOptions(**{"patch": 12, **changes})
    with pytest.raises(Exception, match=sentence) as caught:
        simulate_files([scene_of(pair)], tmp_path / "train.h5", options)
    assert type(caught.value).__name__ in ("DataError", "IncompatiblePair")
    assert sorted(tmp_path.iterdir()) == before


def test_scenes_that_do_not_go_together(tmp_path, make_pair):
    a, b, c = (
        scene_of(make_pair(name=name, ms_shape=(48, 36), **changes))
        for name, changes in [("a", {}), ("b", {"bands": 3}), ("c", {"ratio": 2})]
    )
    options = SimulationOptions(patch=12)
    for other, sentence in [(b, "has 3 bands, .* has 4"), (c, "ratio of 2, other scenes have 4")]:
        with pytest.raises(DataError, match=sentence):
            simulate_files([a, other], tmp_path / "train.h5", options)
    with pytest.raises(DataError, match="2 PAN weights were given for the 4 bands"):
        simulate_files(
            [SceneFiles(None, a.ms)], tmp_path / "t.h5",
            SimulationOptions(patch=12, pan_weights=(1, 1)),
        )  # fmt: skip


def test_full_scale_is_the_smallest_bit_depth_that_holds_the_values(tmp_path, make_pair):
    for dtype, expected in [("uint16", 4095), ("uint8", 255)]:
        scene = scene_of(make_pair(name=dtype, ms_shape=(48, 36), dtype=dtype))
        options = SimulationOptions(patch=12)
        done = simulate_files([scene], tmp_path / "train.h5", options)
        assert done.max_value == expected
    scene = scene_of(make_pair(name="float", ms_shape=(48, 36), dtype="float32"))
    with pytest.raises(DataError, match=r"full scale .* is not known; give --max-value"):
        simulate_files([scene], tmp_path / "train.h5", options)


# --------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("typed", "valid"),
    [
        ("train.h5", "valid.h5"), ("wv3_train_v2.h5", "wv3_valid_v2.h5"),
        ("wv3.h5", "wv3_valid.h5"), ("trains/train.train.h5", "trains/train.valid.h5"),
        ("a", "a_valid"),
    ],
)  # fmt: skip
def test_names_of_the_files(typed, valid):
    paths = split_paths(Path(typed))
    assert list(paths) == list(SPLITS) and paths["valid"] == Path(valid)
    assert len(set(paths.values())) == 3
    assert list(split_paths(Path(typed), (90, 0, 10))) == ["train", "test"]


def test_sample_is_a_small_data_set_the_same_each_time(tmp_path):
    """The command's own run is in the next test; this one compares two."""
    first, again = (simulate_sample(tmp_path / name) for name in ("a", "b"))
    assert first.files.keys() == set(SPLITS) and first.max_value == 2047
    for split, file in first.files.items():
        assert Path(file.path).read_bytes() == Path(again.files[split].path).read_bytes()
        assert Path(file.path).stat().st_size < 20e6
    train = PanCollectionDataset([PanCollectionFile(tmp_path / "a" / "train.h5", needs_gt=True)])
    assert len(train) >= 32
    batch = next(PatchBatches(train, PatchSampler(len(train), batch_size=8, seed=0)).stream(0, 1))
    assert batch.gt.shape == (8, 4, 64, 64) and batch.ms.shape == (8, 4, 16, 16)
    assert 0 < float(batch.gt.mean()) < 1
    error = (batch.gt - batch.lms).square().mean().sqrt()
    assert 0.005 < float(error) < 0.1  # LMS lies on the truth, and lacks detail
    assert first.files["test"].size >= 64


def test_command_writes_three_files_and_keeps_what_exists(tmp_path, make_pair, command):
    pairs = [make_pair(name=n, ms_shape=(48, 36), noise=30) for n in ("one", "two")]
    arguments = [
        *(pairs[0].pan, *pairs[0].ms, "--pair", ";".join([pairs[1].pan, *pairs[1].ms])),
        *("--ms-only", pairs[1].ms[0], "--pan-weights", "0.1,0.2,0.3,0.4", "--sensor", "wv3"),
        *("--mtf", "0.3,0.3,0.3,0.25", "--max-value", "4095", "--patch", "12"),
        *("--split", "70,15,15", "-o", tmp_path / "my_train.h5"),
    ]
    code, out, err = command(*arguments)
    assert code == 0, err
    paths = [str(tmp_path / f"my_{split}.h5") for split in SPLITS]
    assert out.split() == paths
    assert "12 px" in err and "full scale 4095" in err
    _, attributes = read(paths[0])
    assert attributes["sensor"] == "WV3" and len(json.loads(attributes["sources"])) == 3
    assert attributes["mtf_gains"].tolist() == [0.3, 0.3, 0.3, 0.25]
    code, out, err = command(*arguments)
    assert code == 4 and "exists" in err and out == ""
    code, out, err = command(*arguments, "--overwrite", "--json", "-q")
    assert code == 0 and err == ""
    assert json.loads(out)["files"]["valid"]["path"] == paths[1]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "-o is missing"),
        (["-o", "train.h5"], 2, "Give either scenes .* or --sample"),
        (["pan.tif", "-o", "train.h5"], 2, "A pair is PAN and MS; .* --ms-only"),
        (["p.tif", "m.tif", "--sample", "-o", "out"], 2, "either scenes"),
        (["--pair", "p.tif", "-o", "t.h5"], 2, "--pair takes PAN and MS with a semicolon"),
        (["p.tif", "m.tif", "-o", "t.h5", "--sensor", "S2"], 2, "'S2'; known are QB"),
        (["p.tif", "m.tif", "-o", "t.h5", "--split", "80,20"], 2, "--split takes 3 numbers"),
        (["p.tif", "m.tif", "-o", "t.h5", "--split", "0,50,50"], 2, "nothing to train on"),
        (["p.tif", "m.tif", "-o", "t.h5", "--mtf", "1.3"], 2, "between 0 and 1"),
        (["p.tif", "m.tif", "-o", "t.h5", "--bidx", "1.5"], 2, "--bidx takes band numbers"),
        (["p.tif", "m.tif", "-o", "t.h5", "--max-value", "0"], 2, "full scale of 0"),
        (["p.tif", "m.tif", "-o", "t.h5", "--max-value", "1e300"], 2, "full scale of 1e[+]300"),
        (["p.tif", "m.tif", "-o", "."], 3, "-o: . is a folder; name a file in it"),
        (["p.tif", "m.tif", "-o", ""], 3, "-o: . is a folder; name a file in it"),
        (["--ms-only", "", "-o", "t.h5"], 2, "--ms-only takes files with semicolons"),
        (["--ms-only", "m.tif;", "-o", "t.h5"], 2, "--ms-only takes files with semicolons"),
        (["--ms-only", "m", "-o", "t.h5", "--pan-weights", "0,0"], 2, "weights .* leave no PAN"),
        (["p.tif", "m.tif", "-o", "no/t.h5"], 3, "no does not exist; create it"),
        (["p.tif", "m.tif", "-o", "t.h5"], 3, "p.tif"),
    ],
)
def test_what_is_typed_wrong(tmp_path, command, monkeypatch, arguments, code, sentence):
    monkeypatch.chdir(tmp_path)
    found, out, err = command(*arguments)
    assert found == code and out == ""
    assert re.search(sentence, " ".join(err.split())), err
    assert "Traceback" not in err and not list(tmp_path.iterdir())


def test_weights_beyond_float32_leave_nothing(tmp_path, make_pair, command):
    ms = make_pair(ms_shape=(48, 36)).ms[0]
    arguments = ("--ms-only", ms, "--pan-weights", "1e300,0,0,0", "--patch", 12)
    code, _, err = command(*arguments, "-o", tmp_path / "t.h5", "--max-value", 2047)
    assert code == 3 and "pan would hold values that are not finite" in err
    assert not list(tmp_path.glob("*.h5")) and not list(tmp_path.glob(".*"))


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    """HDF5 would crash the process."""
    done = spawn("simulate", "--sample", "-o", tmp_path, file_limit=2_500_000)
    assert (done.code, done.stdout) == (3, "")
    assert re.fullmatch(r"uknowpan: error: \S+/train\.h5 cannot be written \(File too large\)\.\n", done.stderr)
    assert not list(tmp_path.iterdir())
