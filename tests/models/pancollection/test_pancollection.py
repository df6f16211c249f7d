"""PanCollection's h5 files: what is read, drawn and refused."""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from scipy.io import savemat

from uknowpan.models.errors import DataError
from uknowpan.models.metrics.sensors import find_sensor
from uknowpan.models.metrics.toolbox import interp23tap, mtf_filter
from uknowpan.models.pancollection.dataset import PanCollectionDataset, PatchBatches, PatchSampler
from uknowpan.models.pancollection.file import PanCollectionFile
from uknowpan.models.pancollection.protocol import registration_of, wald_lms, wald_ms
from uknowpan.models.pancollection.writer import PanCollectionWriter
from uknowpan.models.types import PatchBatch

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics"


def arrays(count=6, bands=4, size=16, ratio=4, dtype="f8", seed=0):
    """Random DN; every sample has its number in one corner of all of its images."""
    rng = np.random.default_rng(seed)
    shapes = {
        "pan": (count, 1, size, size),
        "ms": (count, bands, size // ratio, size // ratio),
        "lms": (count, bands, size, size),
        "gt": (count, bands, size, size),
    }
    made = {name: rng.integers(0, 2047, shape).astype(dtype) for name, shape in shapes.items()}
    for values in made.values():
        values[:, :, 0, 0] = np.arange(count)[:, None]
    return made


def write(path, contents, **attributes):
    with h5py.File(path, "w") as file:
        for name, values in contents.items():
            file[name] = values
        file.attrs.update(attributes)
    return path


def batches_of(paths, **options):
    dataset = PanCollectionDataset([PanCollectionFile(p) for p in paths], max_value=2047)
    return PatchBatches(dataset, PatchSampler(len(dataset), **options))


def same(a: PatchBatch, b: PatchBatch) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("pan", "ms", "lms", "gt"))


@pytest.mark.parametrize("dtype", ["f8", "f4", "u2", ">f4", "i4"])
def test_samples_come_as_they_are_stored(tmp_path, dtype):
    stored = arrays(dtype=dtype)
    with PanCollectionFile(write(tmp_path / "a.h5", stored)) as file:
        batch = file.read([4, 0, 4])
        assert len(file) == 6 and len(batch) == 3
        for name, values in stored.items():
            found = getattr(batch, name)
            assert found.dtype == torch.float32
            np.testing.assert_array_equal(found.numpy(), values[[4, 0, 4]])
        assert file.read([1], torch.float64).gt.dtype == torch.float64
        header = file.header
    assert (header.count, header.bands, header.ratio, header.height, header.width) == (6, 4, 4, 16, 16)
    assert header.has_gt and header.max_value is None and header.sensor is None
    assert header.registration == "pancollection"


def test_full_resolution_has_no_truth_and_other_entries_are_passed_over(tmp_path):
    stored = arrays(size=32, ratio=2)
    del stored["gt"]
    path = write(tmp_path / "full.h5", stored | {"lpan": np.zeros(3)}, max_value=[1023.0])
    file = PanCollectionFile(path)
    assert not file.header.has_gt and file.header.max_value == 1023 and file.header.ratio == 2
    batch = PanCollectionDataset([file])[2]
    assert batch.gt is None
    torch.testing.assert_close(batch.pan[0], torch.from_numpy(stored["pan"][2] / 1023).float())
    with pytest.raises(DataError, match=r"lacks gt \(a full-resolution file has no truth"):
        PanCollectionFile(path, needs_gt=True)


def test_a_sample_that_is_not_there(tmp_path):
    file = PanCollectionFile(write(tmp_path / "a.h5", arrays()))
    for index in (6, -1):
        with pytest.raises(IndexError, match=f"samples 0 to 5, not {index}"):
            file.read([index])


def with_nan(contents):
    contents["lms"][3, 1, 5, 5] = np.nan
    return contents


BAD = {
    "missing": (lambda a: {k: a[k] for k in ("ms", "pan")}, "lacks lms; it holds ms, pan"),
    "empty": (lambda a: {}, "lacks pan and ms and lms; it holds nothing"),
    "counts": (lambda a: a | {"ms": a["ms"][:4]}, "samples: 6 of pan, 4 of ms, 6 of lms"),
    "rank": (lambda a: a | {"ms": a["ms"][:, 0]}, r"ms has 3 axes \(6, 4, 4\)"),
    "no sample": (lambda a: {k: v[:0] for k, v in a.items()}, r"is empty: ms is \(0, 4, 4, 4\)"),
    "axes": (
        lambda a: {k: np.moveaxis(v, 0, 2) for k, v in a.items()},
        "different numbers of samples: 1 of pan, 4 of ms",
    ),
    "bands": (lambda a: a | {"ms": a["ms"][:, :3]}, "ms has 3 bands, lms has 4"),
    "sizes": (lambda a: a | {"gt": a["gt"][..., :12]}, "gt is 16 x 12 pixels, pan is 16 x 16"),
    "ratio": (lambda a: a | {"ms": a["ms"][..., :3]}, "pan is 16 x 16 pixels, ms is 4 x 3"),
    "ratio 1": (lambda a: a | {"ms": a["lms"]}, "ratio is no whole number from 2 on"),
    "dtype": (lambda a: a | {"gt": a["gt"].astype(complex)}, "gt holds complex128"),
    "nan": (with_nan, "lms of sample 3 holds NaN"),
    "infinite": (lambda a: a | {"pan": a["pan"] / 0.0}, "pan of sample 0 holds NaN or infinite"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_what_is_wrong_is_named(tmp_path, case):
    spoil, sentence = BAD[case]
    path = write(tmp_path / "bad.h5", spoil(arrays()))
    with pytest.raises(DataError, match=sentence) as caught:
        PanCollectionFile(path)
    assert str(caught.value).startswith(str(path)) and str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path):
    whole = write(tmp_path / "whole.h5", arrays(40)).read_bytes()
    cut = tmp_path / "cut.h5"
    cut.write_bytes(whole[: len(whole) // 2])
    text = tmp_path / "text.h5"
    text.write_text("<html>404</html>")
    for path, sentence in [
        (cut, f"is truncated: {len(whole) // 2} of {len(whole)} bytes are there"),
        (text, "is no HDF5 file"),
        (tmp_path / "gone.h5", "does not exist"),
        (tmp_path, "cannot be opened|is no HDF5 file"),
    ]:
        with pytest.raises(DataError, match=sentence):
            PanCollectionFile(path)
    with pytest.raises(DataError, match="max_value is -1"):
        PanCollectionFile(write(tmp_path / "scale.h5", arrays(), max_value=-1.0))


def test_nan_that_opening_did_not_see_is_found_when_read(tmp_path):
    contents = arrays(50)
    contents["gt"][1, 0, 2, 2] = np.inf
    file = PanCollectionFile(write(tmp_path / "a.h5", contents))
    with pytest.raises(DataError, match="gt of sample 1 holds"):
        file.read([0, 1])


def test_a_damaged_chunk_is_named(tmp_path):
    contents = arrays(50, size=64)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        for name, values in contents.items():
            file.create_dataset(name, data=values, chunks=(1, *values.shape[1:]), compression="gzip")
        place = file["gt"].id.get_chunk_info_by_coord((1, 0, 0, 0))
    with open(path, "r+b") as raw:
        raw.seek(place.byte_offset)
        raw.write(b"\xff" * place.size)
    file = PanCollectionFile(path)
    with pytest.raises(DataError, match=r"is damaged, samples \[1\] cannot be read"):
        file.read([1])


def test_values_are_divided_by_each_file_s_own_full_scale(tmp_path):
    first, second = arrays(2), arrays(3, seed=1)
    paths = [write(tmp_path / "1.h5", first, max_value=1023.0), write(tmp_path / "2.h5", second)]
    dataset = PanCollectionDataset([PanCollectionFile(p) for p in paths], max_value=2047)
    assert len(dataset) == 5
    for index, stored, scale in [(1, first["gt"][1], 1023), (3, second["gt"][1], 2047)]:
        torch.testing.assert_close(dataset[index].gt[0], torch.from_numpy(stored / scale).float())
    with pytest.raises(DataError, match=r"2\.h5 does not declare its full scale; give .* 2047"):
        PanCollectionDataset([PanCollectionFile(p) for p in paths])
    with pytest.raises(DataError, match="No training file"):
        PanCollectionDataset([])


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (arrays(bands=3), "bands is 4 and 3"),
        (arrays(ratio=2), "ratio is 4 and 2"),
        (arrays(size=32), "height is 16 and 32"),
    ],
)
def test_files_that_do_not_go_together(tmp_path, other, sentence):
    paths = [write(tmp_path / "1.h5", arrays()), write(tmp_path / "2.h5", other)]
    with pytest.raises(DataError, match=f"cannot be mixed: {sentence}"):
        PanCollectionDataset([PanCollectionFile(p) for p in paths], max_value=2047)


@pytest.mark.parametrize(("count", "batch", "world"), [(10, 4, 1), (7, 3, 2), (5, 8, 1), (6, 2, 3)])
def test_every_epoch_has_every_sample_once(count, batch, world):
    samplers = [PatchSampler(count, batch_size=batch, seed=3, rank=rank, world=world) for rank in range(world)]
    steps = count * 2  # several epochs, ending with one: batch * world * steps is a multiple
    row = [d.sample for step in range(steps) for s in samplers for d in s.draws(step)]
    epochs = [row[i : i + count] for i in range(0, len(row), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    other = PatchSampler(count, batch_size=batch * world, seed=4)
    assert [d.sample for step in range(steps) for d in other.draws(step)] != row


def test_a_step_does_not_depend_on_the_steps_before():
    options = {"batch_size": 4, "seed": 1, "flips": True}
    sampler = PatchSampler(10, **options)
    row = [sampler.draws(step) for step in range(40)]
    for step in (39, 0, 17):
        assert PatchSampler(10, **options).draws(step) == row[step]
    turns = {(d.flip_rows, d.flip_columns) for draws in row for d in draws}
    assert turns == {(a, b) for a in (False, True) for b in (False, True)}
    with pytest.raises(ValueError, match="process 2 of 2"):
        PatchSampler(10, batch_size=1, seed=0, rank=2, world=2)


def test_flips_turn_all_images_of_a_sample_alike(tmp_path):
    path = write(tmp_path / "a.h5", arrays(12))
    plain, turned = (batches_of([path], batch_size=12, seed=0, flips=flips) for flips in (False, True))
    batch, other = (next(each.stream(0, 1)) for each in (plain, turned))
    draws = turned.sampler.draws(0)
    assert any(d.flip_rows != d.flip_columns for d in draws)
    for i, draw in enumerate(draws):
        axes = [-2] * draw.flip_rows + [-1] * draw.flip_columns
        for name in ("pan", "ms", "lms", "gt"):
            assert torch.equal(getattr(batch, name)[i].flip(axes), getattr(other, name)[i])


def matlab_order(values):
    """MATLAB's (H, W, C, N), without the last axis where there is one image, and PAN without bands."""
    turned = values.transpose(2, 3, 1, 0)
    turned = turned[..., 0, :] if turned.shape[2] == 1 else turned
    return turned[..., 0] if turned.shape[-1] == 1 else turned


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("form", ["nhwc", "matlab 5", "matlab 7.3", "toolbox", "big-endian"])
def test_other_layouts_are_the_same_images(tmp_path, form, count):
    """Input of the field: sets from MATLAB and from TensorFlow, with other orders of axes and bytes."""
    wanted = arrays(count)
    path = tmp_path / ("test_gf2.h5" if form in ("nhwc", "big-endian") else "test_gf2.mat")
    if form in ("matlab 5", "toolbox"):
        names = {"pan": "I_PAN", "ms": "I_MS_LR", "lms": "I_MS", "gt": "I_GT"} if form == "toolbox" else {}
        savemat(path, {names.get(k, k): matlab_order(v) for k, v in wanted.items()})
    else:
        with h5py.File(path, "w", userblock_size=512 if form == "matlab 7.3" else 0) as file:
            for name, values in wanted.items():
                if form == "nhwc":
                    values = values.transpose(0, 2, 3, 1)
                elif form == "matlab 7.3":
                    values = matlab_order(values).transpose()
                file[name] = values.astype(">f4") if form == "big-endian" else values
                if form == "matlab 7.3":
                    file[name].attrs["MATLAB_class"] = np.bytes_("double")
    with PanCollectionFile(path) as file:
        batch = file.read(range(count), torch.float64)
        assert (file.header.sensor, file.header.max_value, file.header.by_name) == ("GF2", 1023, True)
    for name, values in wanted.items():
        assert np.array_equal(getattr(batch, name).numpy(), values), name


def test_a_damaged_matlab_file_is_named(tmp_path):
    path = tmp_path / "a.mat"
    path.write_bytes(b"MATLAB 5.0 MAT-file" + bytes(400))
    with pytest.raises(DataError, match=r"is no MATLAB file that can be read|lacks"):
        PanCollectionFile(path)


def test_a_full_scale_that_the_file_contradicts_is_refused(tmp_path):
    with pytest.raises(DataError, match="values up to 2046, above the full scale of 1023 that its name stands for"):
        PanCollectionDataset([PanCollectionFile(write(tmp_path / "train_gf2.h5", arrays()))])
    declared = PanCollectionFile(write(tmp_path / "b.h5", arrays(), max_value=2047.0))
    with pytest.raises(DataError, match="declares a full scale of 2047, not 1023"):
        PanCollectionDataset([declared], max_value=1023)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.filterwarnings("error:This DataLoader will create")
def test_workers_read_what_one_process_reads(tmp_path, workers):
    """Kind of fault: PyTorch's warning of too many workers, since `paper` and `release` take four on any machine."""
    paths = [write(tmp_path / "1.h5", arrays(7)), write(tmp_path / "2.h5", arrays(4, seed=9))]
    batches = batches_of(paths, batch_size=3, seed=5, flips=True)
    alone = list(batches.stream(2, 9))  # leaves the files open in this process
    together = list(batches.stream(2, 9, workers=workers))
    assert len(together) == 7
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))
    assert not same(alone[0], alone[1])


def test_an_error_in_a_worker_is_the_sentence(tmp_path):
    contents = arrays(50)
    contents["gt"][1, 0, 2, 2] = np.inf
    batches = batches_of([write(tmp_path / "a.h5", contents)], batch_size=50, seed=0)
    with pytest.raises(DataError, match="gt of sample 1 holds"):
        list(batches.stream(0, 1, workers=1))


STREAM = """
import json, resource, sys
from uknowpan.models.pancollection.dataset import *
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def run(path, steps):
    dataset = PanCollectionDataset([PanCollectionFile(path)], max_value=2047)
    batches = PatchBatches(dataset, PatchSampler(len(dataset), batch_size=16, seed=0))
    return sum(float(batch.gt.sum()) for batch in batches.stream(0, steps))
run(sys.argv[1], 2)  # what libraries take for themselves
before = peak()
total = run(sys.argv[2], 25)
print(json.dumps([before, peak(), total]))
"""


def test_a_file_larger_than_memory_streams(tmp_path):
    """600 MB of samples; 400 are read, drawn at random, by a process that grows by a few MB."""
    count, paths = 4000, []
    for name, n in (("small.h5", 40), ("large.h5", count)):
        paths.append(tmp_path / name)
        with h5py.File(paths[-1], "w") as file:
            for key, shape in {
                "pan": (1, 64, 64), "ms": (4, 16, 16), "lms": (4, 64, 64), "gt": (4, 64, 64),
            }.items():  # fmt: skip
                # Chunks that were never written hold the fill value.
                file.create_dataset(key, (n, *shape), "f4", chunks=(1, *shape), fillvalue=100.0, compression="gzip")
            logical = sum(file[key].nbytes for key in file)
    assert logical > 590e6
    done = subprocess.run([sys.executable, "-c", STREAM, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after, total = json.loads(done.stdout)
    assert total == pytest.approx(400 * 4 * 64 * 64 * 100 / 2047, rel=1e-5)
    assert after - before < 60


def test_a_file_appears_when_it_is_published(tmp_path):
    path = tmp_path / "out.h5"
    patches = PatchBatch(**{k: torch.from_numpy(v) for k, v in arrays(3).items()})
    with PanCollectionWriter(path) as writer:
        for part in (slice(0, 1), slice(1, 3)):
            writer.append(patches.map(lambda x, part=part: x[part]), np.zeros((3, 3))[part])
        writer.finish({"sensor": "WV3", "max_value": 2047.0, "registration": "area"})
        assert not path.exists()
        writer.publish()
    assert [p.name for p in tmp_path.iterdir()] == ["out.h5"]
    file = PanCollectionFile(path)
    assert same(file.read([0, 1, 2]), patches.to(torch.float32))
    header = file.header
    assert (header.sensor, header.max_value, header.registration) == ("WV3", 2047, "area")
    with h5py.File(path) as raw:
        assert raw["gt"].chunks == (1, 4, 16, 16) and raw["gt"].compression == "gzip"


def test_nothing_is_left_of_a_file_that_failed(tmp_path):
    patches = PatchBatch(**{k: torch.from_numpy(v) for k, v in arrays(3).items()})
    with pytest.raises(RuntimeError, match="stop"), PanCollectionWriter(tmp_path / "o.h5") as out:
        out.append(patches, np.zeros((3, 3)))
        raise RuntimeError("stop")
    assert not list(tmp_path.iterdir())
    lost = PanCollectionWriter(tmp_path / "no folder" / "o.h5")
    with lost, pytest.raises(DataError, match=r"o\.h5 cannot be written"):
        lost.append(patches, np.zeros((3, 3)))


def test_reduction_equals_the_toolbox():
    with np.load(GOLDEN / "wald.npz") as data:
        gt, expected = torch.from_numpy(data["gt"].astype("f8")), data["expected_ms_lr"]
    ms = wald_ms(gt, find_sensor("WV3").mtf_ms, 4)
    np.testing.assert_allclose(ms.numpy(), expected, rtol=1e-9)
    # At the borders the toolbox wraps around, which is not followed.
    reach = 9 * 4
    inner = (..., slice(reach, -reach), slice(reach, -reach))
    wide = torch.cat([torch.cat([ms, ms], -1)] * 2, -2)
    np.testing.assert_allclose(wald_lms(wide, 4)[inner], interp23tap(wide, 4)[inner], rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("ratio", [2, 3, 4, 5, 6, 8])
def test_the_enlarged_ms_lies_on_the_truth(ratio):
    """On a plane, blur and interpolation change nothing if both agree where samples lie."""
    n = 40 * ratio
    y, x = torch.meshgrid(*[torch.arange(n, dtype=torch.float64)] * 2, indexing="ij")
    gt = torch.stack([0.3 * y - 0.2 * x, 0.4 * x])
    lms = wald_lms(wald_ms(gt, (0.3, 0.3), ratio), ratio)
    if registration_of(ratio) == "pancollection":  # the toolbox's kernels do not sum to 1
        gt = gt * float(mtf_filter(torch.ones(1, 41, 41), [0.3], ratio)[0, 20, 20])
    inner = (..., slice(15 * ratio, -15 * ratio), slice(15 * ratio, -15 * ratio))
    assert float((lms - gt)[inner].abs().max()) < 1e-4


def test_a_folder_and_attributes_that_are_none(tmp_path):
    with pytest.raises(DataError, match=r" cannot be opened \(Is a directory\)\.$"):
        PanCollectionFile(tmp_path)
    for attributes, sentence in (
        ({"registration": "odd"}, "its registration is 'odd', not area or pancollection"),
        ({"max_value": 1e300}, r"its max_value is 1e\+300, which is no full scale"),
    ):
        with pytest.raises(DataError, match=sentence):
            PanCollectionFile(write(tmp_path / "a.h5", arrays(), **attributes))
    file = PanCollectionFile(write(tmp_path / "b.h5", arrays()))
    with pytest.raises(DataError, match="1e-300 is no full scale"):
        PanCollectionDataset([file], max_value=1e-300)
