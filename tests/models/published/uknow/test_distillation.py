"""The teacher's answers: on the fly, in a cache, after a stop and after a kill."""

import logging
import multiprocessing
import os
import signal
from dataclasses import asdict, replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from patch_files import guided_config, stirred

from uknowpan.models.checkpoints import Card, save_checkpoint
from uknowpan.models.diffusion import NoiseSchedule, ddim_sample, position_noise
from uknowpan.models.errors import CheckpointError, DataError, ModelMismatch
from uknowpan.models.pancollection.dataset import Draw, PanCollectionDataset
from uknowpan.models.pancollection.file import PanCollectionFile
from uknowpan.models.published.uknow import cache as cache_module
from uknowpan.models.published.uknow.cache import CachedDataset, CacheFile, bytes_per_sample, part_of, write_cache
from uknowpan.models.published.uknow.distillation import FrozenTeacher, TeacherAnswer, feature_shapes
from uknowpan.models.published.uknow.guided import GuidedTeacher
from uknowpan.models.published.uknow.prior import PriorNet
from uknowpan.models.types import Condition, PatchBatch

CONFIG = guided_config(patch=2)
CARD = Card(
    "tiny", "fsa-t", asdict(CONFIG), "fsa-t",
    bands=4, ratios=[4], residual_std=[0.02, 0.03, 0.04, 0.05],
)  # fmt: skip
KEYS = ["sr", "var_map", *(f"dist_feat{i}" for i in range(6))]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Forked processes have one, and two threads round otherwise than one."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = stirred(GuidedTeacher(CONFIG))
    made.residual_std.copy_(torch.tensor(CARD.residual_std))
    return made


@pytest.fixture(scope="module")
def make_teacher(model, tmp_path_factory):
    """`make_teacher(**changes of the card)`: a teacher from a checkpoint of its own."""

    def make(network=model, steps=1, seed=0, **changes):
        path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
        save_checkpoint(path, network, replace(CARD, **changes))
        return FrozenTeacher(path, steps=steps, seed=seed)

    return make


@pytest.fixture(scope="module")
def frozen(make_teacher):
    return make_teacher()


@pytest.fixture(scope="module")
def make_data(tmp_path_factory):
    def make(count=7, size=16, seed=0, **attributes):
        rng = np.random.default_rng(seed)
        path = tmp_path_factory.mktemp("data") / "train.h5"
        shapes = {"pan": (1, size), "ms": (4, size // 4), "lms": (4, size), "gt": (4, size)}
        with h5py.File(path, "w") as file:
            for name, (bands, n) in shapes.items():
                values = rng.integers(0, 2047, (count, bands, n, n))
                file[name] = values.astype("f8")
            file.attrs.update({"max_value": 2047.0} | attributes)
        return PanCollectionFile(path)

    return make


@pytest.fixture(scope="module")
def data(make_data):
    return make_data()


@pytest.fixture(scope="module")
def cache(frozen, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "cache.h5"
    assert write_cache(frozen, data, 2047.0, path, batch_size=3) == 7
    return path


def patches_of(data, indices, scale=2047.0):
    return data.read(indices).map(lambda x: x / scale)


def tensors(answer):
    return [answer.sr, answer.variance, *answer.features]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def read(path):
    with h5py.File(path) as file:
        return {name: file[name][()] for name in file}, dict(file.attrs)


def equal_files(a, b):
    (there, about), (here, output) = read(a), read(b)
    assert about == output
    for name in KEYS:
        np.testing.assert_array_equal(here[name], there[name], err_msg=name)


@pytest.mark.parametrize("carried", [False, True])
def test_an_answer_is_what_the_teacher_samples(model, make_teacher, data, carried):
    asked = make_teacher(steps=2, seed=5, self_conditioning=carried)
    patches = patches_of(data, [0, 3])
    answer = asked.answer(patches)
    noise = position_noise(5, 0, 0, 16, 16, 4).expand(2, -1, -1, -1)
    schedule, condition = NoiseSchedule.cosine(), Condition(patches.lms, patches.pan)
    with torch.no_grad():
        output = ddim_sample(
            model, noise, schedule.respace(2), schedule, condition, self_conditioning=carried
        )  # fmt: skip
    unit = torch.tensor(CARD.residual_std).view(4, 1, 1)
    torch.testing.assert_close(answer.sr, patches.lms + unit * output.x0)
    torch.testing.assert_close(answer.variance, unit**2 * (2 * output.log_sigma).exp())
    assert len(answer) == 2 and not answer.sr.requires_grad
    torch.testing.assert_close(answer.features, output.features)


def test_an_answer_depends_on_nothing_but_the_patch(frozen, data):
    together = frozen.answer(patches_of(data, [0, 1, 2]))
    with torch.autocast("cpu", torch.bfloat16):
        alone = frozen.answer(patches_of(data, [1]))
    for many, one in zip(tensors(together), tensors(alone), strict=True):
        torch.testing.assert_close(many[1:2], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch", [1, 2])
def test_shapes_of_features_are_known_beforehand(make_teacher, patch):
    config = guided_config(patch=patch)
    asked = make_teacher(GuidedTeacher(config), config=asdict(config))
    batch = PatchBatch(*(torch.rand(1, c, n, m) for c, n, m in ((1, 32, 16), (4, 8, 4), (4, 32, 16))))
    shapes = [tuple(x.shape[1:]) for x in asked.answer(batch).features]
    assert feature_shapes(config.teacher, 32, 16) == shapes and len(shapes) == 6


def test_answers_are_turned_over_moved_and_joined():
    answer = TeacherAnswer(torch.rand(1, 2, 4, 6), torch.rand(1, 2, 4, 6), (torch.rand(1, 3, 2, 3),))
    turned = answer.flip([-2])
    for a, b in zip(tensors(answer), tensors(turned), strict=True):
        assert torch.equal(a[:, :, 0], b[:, :, -1])
    joined = TeacherAnswer.cat([answer, turned, answer])
    assert len(joined) == 3 and same(joined.map(lambda x: x[1:2]), turned)
    assert all(x.dtype == torch.float64 for x in tensors(answer.to(torch.float64)))


def test_who_is_no_teacher(make_teacher):
    with pytest.raises(ModelMismatch, match="tiny is of the architecture prior"):
        make_teacher(PriorNet(CONFIG.prior), architecture="prior", config=asdict(CONFIG.prior))
    with pytest.raises(CheckpointError, match="residual_std of 0 bands, but its network has 4"):
        make_teacher(residual_std=[])
    with pytest.raises(ValueError, match="steps must be 1 to 500, not 501"):
        make_teacher(steps=501)


def test_patches_that_it_cannot_take(frozen, data):
    patches = patches_of(data, [0])
    with pytest.raises(ValueError, match=r"3 bands, but this .* was built for 4"):
        frozen.answer(replace(patches, lms=patches.lms[:, :3]))
    header = data.header
    for change, sentence in (
        ({"bands": 3}, "tiny was trained for 4 bands, but data.h5 holds 3"),
        ({"height": 24}, "tiny takes multiples of 16 pixels, but .* have 24 x 16"),
        ({"ratio": 2}, "tiny serves the ratio 4, but that of data.h5 is 2"),
    ):
        with pytest.raises(ModelMismatch, match=sentence):
            frozen.check_serves(SimpleNamespace(header=replace(header, **change), path="data.h5"))


def test_a_cache_holds_the_answers(frozen, data, cache):
    stored, about = read(cache)
    assert sorted(stored) == sorted(KEYS)
    answers = [frozen.answer(patches_of(data, i)) for i in ([0, 1, 2], [3, 4, 5], [6])]
    expected = dict(zip(KEYS, tensors(TeacherAnswer.cat(answers)), strict=True))
    for name, values in stored.items():
        kind = np.float16 if "feat" in name else np.float32
        assert values.dtype == kind
        np.testing.assert_array_equal(values, expected[name].numpy().astype(kind))
    with h5py.File(cache) as file:
        assert all(file[name].chunks == (1, *file[name].shape[1:]) for name in KEYS)
    assert (about["teacher"], about["steps"], about["seed"]) == ("tiny", 1, 0)
    assert (about["count"], about["done"], about["scale"]) == (7, 7, 2047)
    assert about["data_file"] == "train.h5" and about["teacher_sha256"] == frozen.digest
    assert not part_of(cache).exists()
    each = bytes_per_sample(frozen, data.header)
    assert each == sum(values[0].nbytes for values in stored.values())
    assert 7 * each < cache.stat().st_size < 7 * each + 40_000


def test_a_stopped_run_goes_on_where_it_was(frozen, data, cache, tmp_path):
    out, seen = tmp_path / "cache.h5", []
    options = {"batch_size": 3, "on_progress": lambda *where: seen.append(where)}
    done = write_cache(frozen, data, 2047.0, out, should_stop=lambda: bool(seen), **options)
    assert done == 3 and seen == [(3, 7)] and not out.exists()
    with pytest.raises(DataError, match=r"part has 3 of 7 samples; let .* --resume. complete it"):
        CacheFile(part_of(out))
    assert write_cache(frozen, data, 2047.0, out, resume=True, **options) == 7
    assert seen == [(3, 7), (6, 7), (7, 7)]
    equal_files(out, cache)
    assert os.listdir(tmp_path) == ["cache.h5"]


def test_without_resume_a_run_begins_anew(frozen, data, cache, tmp_path):
    out, seen = tmp_path / "cache.h5", []
    write_cache(frozen, data, 2047.0, out, batch_size=1, should_stop=lambda: True)
    write_cache(frozen, data, 2047.0, out, batch_size=3, on_progress=lambda *x: seen.append(x))
    assert seen[0] == (3, 7)
    equal_files(out, cache)


def in_a_child(run):
    """A forked process, as data loaders have: it shares what was made here."""

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


@pytest.mark.parametrize("written", [0, 3, 8, 13])
def test_a_killed_run_goes_on(frozen, data, cache, tmp_path, monkeypatch, written):
    """Killed in the middle of a batch, after so many of its datasets (of 8 each)."""
    out, count, before = tmp_path / "cache.h5", [0], h5py.Dataset.__setitem__

    def deadly(self, place, values):
        if count[0] == written:
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1
        before(self, place, values)

    with monkeypatch.context() as patched:
        patched.setattr(h5py.Dataset, "__setitem__", deadly)
        process = in_a_child(lambda: write_cache(frozen, data, 2047.0, out, batch_size=3))
        process.join(60)
    assert process.exitcode == -signal.SIGKILL and part_of(out).exists() and not out.exists()
    seen = []
    write_cache(
        frozen, data, 2047.0, out, batch_size=3, resume=True,
        on_progress=lambda *where: seen.append(where),
    )  # fmt: skip
    assert seen[0] == ((3, 7) if written < 8 else (6, 7))
    equal_files(out, cache)


@pytest.mark.parametrize("cut", [0, 100, 3000])
def test_a_damaged_part_is_begun_anew(frozen, data, cache, tmp_path, monkeypatch, caplog, cut):
    out = tmp_path / "cache.h5"
    write_cache(frozen, data, 2047.0, out, batch_size=3, should_stop=lambda: True)
    os.truncate(part_of(out), cut)
    monkeypatch.setattr(cache_module.log, "propagate", True)
    caplog.set_level(logging.WARNING, "uknowpan")  # a command with -q in this process lowered it
    write_cache(frozen, data, 2047.0, out, batch_size=3, resume=True)
    assert "is begun anew" in caplog.text
    equal_files(out, cache)


@pytest.mark.parametrize("how", ["shape", "group", "none", "done"])
def test_a_part_with_other_datasets_is_begun_anew(frozen, data, cache, tmp_path, how):
    """Kind: a damaged part ends with exit code 1."""
    out = tmp_path / "cache.h5"
    write_cache(frozen, data, 2047.0, out, batch_size=3, should_stop=lambda: True)
    with h5py.File(part_of(out), "r+") as file:
        if how == "done":
            file.attrs["done"] = 2**62
        else:
            del file["dist_feat2"]
        if how == "shape":
            file["dist_feat2"] = np.zeros((7, 2))
        elif how == "group":
            file.create_group("dist_feat2")
    write_cache(frozen, data, 2047.0, out, batch_size=3, resume=True)
    equal_files(out, cache)


def test_a_link_at_the_place_of_a_part_is_not_followed(frozen, data, cache, tmp_path):
    """Kind: links planted at temporary names."""
    out, victim = tmp_path / "cache.h5", tmp_path / "victim"
    victim.write_bytes(b"mine")
    part_of(out).symlink_to(victim)
    write_cache(frozen, data, 2047.0, out, batch_size=3, resume=True)
    assert victim.read_bytes() == b"mine" and not out.is_symlink()
    equal_files(out, cache)


@pytest.mark.parametrize("shape", [(7, 0, 4, 4), (7, 4, 0, 4), (7, 4, 4, 0), (7, 4, 99, 99)])
def test_a_cache_with_features_of_no_size(cache, tmp_path, shape):
    """Kind: a damaged shape passes, and a student of that shape cannot be built."""
    path = tmp_path / "cache.h5"
    path.write_bytes(cache.read_bytes())
    with h5py.File(path, "r+") as file:
        del file["dist_feat3"]
        file["dist_feat3"] = np.zeros(shape, "f2")
    with pytest.raises(DataError, match="write the cache anew"):
        CacheFile(path)


def test_damaged_caches_are_refused_or_read(frozen, data, cache, tmp_path):
    """Kind: a damaged cache crashes the process. Thirty are cut, zeroed or flipped in headers and in samples."""
    whole, path = cache.read_bytes(), tmp_path / "cache.h5"

    def read_all():
        chance, refused = np.random.default_rng(0), 0
        for number in range(30):
            content = bytearray(whole)
            at = int(chance.integers(len(whole) if number % 2 else 4096))
            if number % 3 == 0:
                del content[at:]
            elif number % 3 == 1:
                content[at : at + 512] = bytes(len(content[at : at + 512]))
            else:
                content[at] ^= 1 << int(chance.integers(8))
            path.write_bytes(content)
            try:
                damaged = CacheFile(path)
                damaged.check_matches(data)
                damaged.read(range(7))
            except DataError as error:
                assert str(error).endswith("."), error
                refused += 1
        assert refused >= 15, refused

    process = in_a_child(read_all)
    process.join(60)
    assert process.exitcode == 0


def test_two_processes_do_not_write_one_cache(frozen, data, tmp_path):
    out, context = tmp_path / "cache.h5", multiprocessing.get_context("fork")
    holding, enough = context.Event(), context.Event()

    def stop():
        holding.set()
        return bool(enough.wait(60))

    process = in_a_child(lambda: write_cache(frozen, data, 2047.0, out, batch_size=3, should_stop=stop))
    try:
        assert holding.wait(60)
        for resume in (True, False):
            with pytest.raises(DataError, match="being written by another process"):
                write_cache(frozen, data, 2047.0, out, resume=resume)
    finally:
        enough.set()
        process.join(60)
    assert process.exitcode == 0
    assert write_cache(frozen, data, 2047.0, out, resume=True) == 7


def test_a_part_of_something_else_is_refused(make_teacher, frozen, data, make_data, tmp_path):
    out = tmp_path / "cache.h5"
    write_cache(frozen, data, 2047.0, out, batch_size=3, should_stop=lambda: True)
    stored = part_of(out).read_bytes()
    frozen_4, seeded, other = (make_teacher(**o) for o in ({"steps": 4}, {"seed": 1}, {"residual_std": [0.1] * 4}))
    for asked, file, scale, dtype, named in (
        (frozen_4, data, 2047.0, "float16", "steps 1, not 4"),
        (seeded, data, 2047.0, "float16", "seed 0, not 1"),
        (other, data, 2047.0, "float16", "teacher_sha256 "),
        (frozen, data, 1023.0, "float16", r"scale 2047\.0, not 1023\.0"),
        (frozen, data, 2047.0, "float32", "feature_dtype float16, not float32"),
        (frozen, make_data(seed=1), 2047.0, "float16", "data 7 x 4 x 16 x 16, ratio 4, crc "),
    ):
        with pytest.raises(DataError, match=f"was begun with {named}"):
            write_cache(asked, file, scale, out, dtype=dtype, resume=True)
    assert part_of(out).read_bytes() == stored


def test_features_beyond_float16(frozen, data, tmp_path, monkeypatch):
    out, answer, factor = tmp_path / "cache.h5", frozen.answer, 1e6

    def large(patches):
        output = answer(patches)
        return replace(output, features=(output.features[0] * factor, *output.features[1:]))

    monkeypatch.setattr(frozen, "answer", large)
    with pytest.raises(DataError, match=r"dist_feat0 of samples 0 to 6 .* use --dtype float32"):
        write_cache(frozen, data, 2047.0, out)
    assert write_cache(frozen, data, 2047.0, out, dtype="float32") == 7
    assert same(CacheFile(out).read(range(7)), large(patches_of(data, range(7))))
    factor = float("nan")
    with pytest.raises(DataError, match="is not finite in float32; train it anew"):
        write_cache(frozen, data, 2047.0, out, dtype="float32")


def test_samples_come_in_the_order_asked_for(frozen, data, cache):
    stored, _ = read(cache)
    with CacheFile(cache) as file:
        answer = file.read([4, 0, 4])
        assert len(file) == 7
        for name, tensor in zip(KEYS, tensors(answer), strict=True):
            assert tensor.dtype == torch.float32
            np.testing.assert_array_equal(tensor.numpy(), stored[name][[4, 0, 4]])
        for index in (7, -1):
            with pytest.raises(IndexError, match=f"samples 0 to 6, not {index}"):
                file.read([index])


def test_a_cache_belongs_to_its_data(cache, data, make_data):
    file = CacheFile(cache)
    file.check_matches(data)
    for other in (make_data(seed=1), make_data(count=6), make_data(size=32)):
        with pytest.raises(DataError, match=r"was made from train\.h5 \(7 x 4 x 16 x 16, ratio 4"):
            CachedDataset(PanCollectionDataset([other]), [file])
    plain = make_data(seed=0, max_value=1023.0)
    with pytest.raises(DataError, match=r"made at a full scale of 2047, but .* is used at 1023"):
        CachedDataset(PanCollectionDataset([plain]), [file])
    with pytest.raises(DataError, match="1 caches for 2 training files"):
        CachedDataset(PanCollectionDataset([data, data]), [file])


@pytest.fixture(scope="module")
def two(frozen, data, make_data, cache, tmp_path_factory):
    """A dataset of two files of 7 and 4 samples, and caches of both."""
    more = make_data(count=4, seed=2)
    out = tmp_path_factory.mktemp("two") / "more.h5"
    write_cache(frozen, more, 2047.0, out)
    return PanCollectionDataset([data, more]), [CacheFile(cache), CacheFile(out)]


def without(name):
    return lambda file: file.attrs.pop(name) if name in file.attrs else file.pop(name)


def shaped(name, shape, dtype="f4"):
    def change(file):
        del file[name]
        file[name] = np.zeros(shape, dtype)

    return change


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        *(([without(n)], f"lacks {n}; write the cache anew") for n in ("scale", "seed", "teacher", "dist_feat5")),
        ([without("format")], "is no cache made by"),
        ([shaped("dist_feat2", (3, 2, 2, 2))], r"dist_feat2 has the shape \(3, 2, 2, 2\), not .* of 7 samples"),
        ([shaped("var_map", (7, 3, 16, 16))], r"sr is \(7, 4, 16, 16\), var_map \(7, 3, 16, 16\)"),
        ([lambda file: file.attrs.modify("done", 6)], "has 6 of 7 samples"),
        ([lambda file: file.attrs.update(scale="x")], "lacks a scale"),
        ([lambda file: file.attrs.update(count="x")], "not .* of -1 samples"),
        ([shaped("sr", (7, 4, 16, 16), "S3")], "lacks sr"),
        ([lambda file: file.move("dist_feat0", "x"), lambda f: f.create_group("dist_feat0")],
         "lacks dist_feat0"),
        ([shaped(n, (7, 3, 16, 16)) for n in ("sr", "var_map")], "was made from train.h5"),
    ],
)  # fmt: skip
def test_a_cache_that_was_tampered_with(cache, data, tmp_path, changes, sentence):
    path = tmp_path / "c.h5"
    path.write_bytes(cache.read_bytes())
    with h5py.File(path, "r+") as file:
        for change in changes:
            change(file)
    with pytest.raises(DataError, match=sentence):
        CachedDataset(PanCollectionDataset([data]), [CacheFile(path)])


def test_an_answer_that_is_not_finite_is_named(cache, tmp_path):
    path = tmp_path / "c.h5"
    path.write_bytes(cache.read_bytes())
    with h5py.File(path, "r+") as file:
        file["var_map"][5, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="var_map of sample 5 holds NaN or infinite values"):
        CacheFile(path).read([1, 5])


def test_caches_of_different_teachers_are_not_mixed(two, make_teacher, data, tmp_path):
    dataset, (_, second) = two
    write_cache(make_teacher(steps=2), data, 2047.0, tmp_path / "c.h5")
    with pytest.raises(DataError, match="cannot be mixed: steps is 2 and 1"):
        CachedDataset(dataset, [CacheFile(tmp_path / "c.h5"), second])


def test_a_sample_and_its_answer_are_turned_alike(two, frozen):
    dataset, caches = two
    cached = CachedDataset(dataset, caches)
    assert len(cached) == 11
    for sample, rows, columns in [(0, True, False), (6, False, True), (7, True, True), (10, 0, 0)]:
        patch, answer = cached[Draw(sample, rows, columns)]
        plain = caches[sample // 7].read([sample % 7])
        axes = [axis for axis, turn in ((-2, rows), (-1, columns)) if turn]
        assert same(answer, plain.flip(axes))
        expected = frozen.answer(dataset[sample])
        torch.testing.assert_close(answer.sr, expected.sr.flip(axes), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(patch.gt, dataset[sample].gt.flip(axes))
    assert same(cached[8][1], caches[1].read([1]))
