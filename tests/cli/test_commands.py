"""The other commands: help, models, info, demo, train."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import rasterio
from rasters import write_raster
from running import MakePair, Run
from safetensors.numpy import load_file

from uknowpan.models.network import FSAStudentLite, LiteConfig
from uknowpan.models.training.stages import GenericStudentStage

COMMANDS = ["sharpen", "info", "demo", "train", "pack", "models"]
MODEL_COMMANDS = ["list", "show", "verify"]


# Help ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [[], *([c] for c in COMMANDS), *(["models", c] for c in MODEL_COMMANDS)],
    ids=lambda words: " ".join(words) or "uknowpan",
)
def test_help(words: list[str], uknowpan: Run) -> None:
    outcome = uknowpan(*words, "--help")
    assert outcome.code == 0
    assert outcome.stderr == ""
    assert f"Usage: {' '.join(['uknowpan', *words])}" in outcome.stdout
    listed = {(): COMMANDS, ("models",): MODEL_COMMANDS}.get(tuple(words), [])
    for command in listed:
        assert re.search(rf"^[│ ] *{command} ", outcome.stdout, re.MULTILINE), command


def test_version_and_unknown_command(uknowpan: Run) -> None:
    assert re.fullmatch(r"uknowpan \d+\.\d+\.\d+\n", uknowpan("--version").stdout)
    outcome = uknowpan("blur")
    assert outcome.code == 2
    assert "No such command 'blur'" in outcome.stderr


# Models -------------------------------------------------------------------------------------------


def test_models_list(uknowpan: Run) -> None:
    outcome = uknowpan("models", "list")
    assert outcome.code == 0
    assert re.match(r"generic +fsa-s-lite, any bands, ratio 2 to 6, \d\.\d MB", outcome.stdout)
    entries = json.loads(uknowpan("models", "list", "--json").stdout)
    (generic,) = (entry for entry in entries if entry["name"] == "generic")
    assert generic["bytes"] > 10_000
    assert generic["card"]["architecture"] == "fsa-s-lite"


def test_models_show(uknowpan: Run, tiny_model: Path) -> None:
    shown = uknowpan("models", "show", tiny_model).stdout
    assert "name: tiny\n" in shown
    card = json.loads(uknowpan("models", "show", "generic", "--json").stdout)
    assert card["name"] == "generic"
    assert card["ratios"] == [2, 3, 4, 5, 6]


def test_models_verify(uknowpan: Run, tiny_model: Path) -> None:
    outcome = uknowpan("models", "verify", tiny_model, "--json")
    found = json.loads(outcome.stdout)
    weights = load_file(tiny_model)
    assert found["name"] == "tiny"
    assert found["parameters"] == sum(w.size for w in weights.values())
    plain = uknowpan("models", "verify", tiny_model).stdout
    assert plain == f"{found['sha256']}  tiny  {found['parameters']} parameters\n"


@pytest.mark.parametrize("command", ["show", "verify"])
def test_models_refuse(command: str, uknowpan: Run, tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(tiny_model.read_bytes()[:-10])
    for name, says in ((broken, "not a whole safetensors file"), ("nowhere", "no model 'nowhere'")):
        outcome = uknowpan("models", command, name)
        assert outcome.code == 5
        assert outcome.stdout == ""
        assert re.fullmatch(rf"uknowpan: error: .*{says}.*\n", outcome.stderr)


# Info ---------------------------------------------------------------------------------------------


def test_info_of_a_pair(uknowpan: Run, make_pair: MakePair, tiny_model: Path) -> None:
    pair = make_pair(ms_shape=(40, 36), descriptions=["blue", "green", "red", "nir"], nodata=0)
    arguments = ("info", pair.pan, *pair.ms, "--model", tiny_model)
    text = uknowpan(*arguments).stdout
    for words in (
        *("144 x 160 pixels, EPSG:32631", "ratio    4, MS nests", "4: blue, green, red, nir"),
        *("uint16 (PAN uint16), nodata 0", "with model tiny"),
    ):
        assert words in text
    facts = json.loads(uknowpan(*arguments, "--json").stdout, parse_constant=pytest.fail)
    assert (facts["width"], facts["height"], facts["bands"], facts["ratio"]) == (144, 160, 4, 4)
    assert facts["nested"] is True
    assert facts["bounds"] == [500000, 4999920, 500072, 5000000]
    assert facts["model"] == {"name": "tiny", "fits": True}
    assert facts["seconds"] > 0


def test_info_json_has_no_nan(uknowpan: Run, make_pair: MakePair, tiny_model: Path) -> None:
    """Strict readers refuse NaN, which nodata is in float rasters."""
    pair = make_pair(dtype="float32", nodata=float("nan"))
    outcome = uknowpan("info", pair.pan, *pair.ms, "--model", tiny_model, "--json")
    facts = json.loads(outcome.stdout, parse_constant=pytest.fail)
    assert facts["nodata"] is None
    assert facts["may_have_invalid"] is True


def test_info_of_a_pair_no_model_serves(uknowpan: Run, make_pair: MakePair, tiny_model: Path) -> None:
    pair = make_pair(ratio=8, ms_shape=(12, 12))
    outcome = uknowpan("info", pair.pan, *pair.ms, "--model", tiny_model)
    assert outcome.code == 0
    assert "ratio is 8, but model tiny serves 2 to 6" in outcome.stdout
    facts = json.loads(uknowpan("info", pair.pan, *pair.ms, "--model", tiny_model, "--json").stdout)
    assert facts["model"]["fits"] is False


def test_info_of_a_checkpoint(uknowpan: Run, tiny_model: Path) -> None:
    assert "architecture: fsa-s-lite" in uknowpan("info", tiny_model).stdout
    assert json.loads(uknowpan("info", "generic", "--json").stdout)["name"] == "generic"


def test_info_refuses(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair()
    for words, code, says in (
        ([pair.pan], 2, "neither a bundled model nor"),
        ([tmp_path / "none.safetensors"], 5, "no model"),
        ([pair.pan, tmp_path / "none.tif"], 3, "No such file"),
        ([*pair.ms, pair.pan], 3, "4 bands"),
    ):
        outcome = uknowpan("info", *words)
        assert outcome.code == code, words
        assert outcome.stdout == ""
        assert re.fullmatch(rf"uknowpan: error: .*{says}.*\n", outcome.stderr)


# Demo ---------------------------------------------------------------------------------------------


def test_demo(uknowpan: Run, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    outcome = uknowpan("demo", "--out", folder, "--size", 128, "--json", "-q")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr == ""
    found = json.loads(outcome.stdout, parse_constant=pytest.fail)
    assert {"bicubic", "uknowpan"} <= set(found["scores"])
    assert all(np.isfinite(v) for scores in found["scores"].values() for v in scores.values())
    assert Path(found["picture"]).stat().st_size > 1000
    with rasterio.open(folder / "uknowpan.tif") as dataset:
        assert dataset.shape == (128, 128)
        assert dataset.crs is not None


def test_demo_spares_what_no_demo_made(uknowpan: Run, tmp_path: Path) -> None:
    mine = tmp_path / "gsa.tif"
    mine.write_text("my result")
    (tmp_path / "notes.txt").write_text("harmless")
    arguments = ("demo", "--out", tmp_path, "--size", 128, "-q")
    outcome = uknowpan(*arguments)
    assert outcome.code == 4
    assert re.fullmatch(r"uknowpan: error: .*gsa\.tif exists .*--overwrite.*\n", outcome.stderr)
    assert {p.name for p in tmp_path.iterdir()} == {"gsa.tif", "notes.txt"}
    assert mine.read_text() == "my result"
    assert uknowpan(*arguments, "--overwrite").code == 0
    assert uknowpan(*arguments).code == 0  # its own folder now


def test_demo_where_a_file_is(uknowpan: Run, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    outcome = uknowpan("demo", "--out", taken, "--size", 128)
    assert outcome.code == 3
    assert re.fullmatch(r"uknowpan: error: .*taken.*\n", outcome.stderr)


# Train --------------------------------------------------------------------------------------------


CONFIG = """
[train]
iterations = 2
batch_size = 2
warmup = 1
amp = false

[network]
width = 4
deep_width = 4
blocks = 1
deep_blocks = 1
"""


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """A scenes file with one scene for training and one for validation."""
    path = tmp_path / "scenes.h5"
    rng = np.random.default_rng(2)
    with h5py.File(path, "w") as file:
        for split in ("train", "valid"):
            blocks = rng.uniform(100, 900, (6, 24, 24)).repeat(4, 1).repeat(4, 2)
            gt = blocks + rng.normal(0, 20, blocks.shape)
            group = file.create_group(f"scene-{split}")
            group.attrs.update(sensor="made up", licence="none", split=split, weight=1.0)
            group.create_dataset("gt", data=gt.astype("uint16"))
            group.create_dataset("pan", data=gt.mean(0, keepdims=True).astype("float32"))
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG)
    return path


def test_train_dry_run(uknowpan: Run, tmp_path: Path, config: Path, scenes: Path) -> None:
    out = tmp_path / "run"
    outcome = uknowpan("train", "--data", scenes, "--out", out, "--config", config, "--dry-run")
    assert outcome.code == 0, outcome.stderr
    resolved = json.loads(outcome.stdout)
    assert resolved["stage"] == "fsa-s"
    assert resolved["train"]["iterations"] == 2
    assert resolved["train"]["ema"] == 0.999
    assert resolved["network"]["width"] == 4
    network = FSAStudentLite(LiteConfig(**resolved["network"]))
    assert resolved["parameters"] == sum(p.numel() for p in network.parameters())
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[train]\niteration = 2", "no field iteration; valid are iterations"),
        ("[network]\ndepth = 2", "no field depth"),
        ("[trian]\niterations = 2", "not trian"),
        ("[train]\niterations = 'many'", "iterations takes int, not 'many'"),
        ("[train]\nbatch_size = 0", "batch_size must be at least 1"),
        ("[train]\nvalidate_every = 0", "validate_every must be at least 1"),
        ("[train", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_train_refuses_configs(text: str | None, says: str, uknowpan: Run, tmp_path: Path, scenes: Path) -> None:
    path = tmp_path / "config.toml"
    if text is not None:
        path.write_text(text)
    out = tmp_path / "run"
    outcome = uknowpan("train", "--data", scenes, "--out", out, "--config", path)
    assert outcome.code == 2
    assert re.fullmatch(rf"uknowpan: error: .*{says}.*\n", outcome.stderr)
    assert not out.exists()


def test_train_refuses_data(uknowpan: Run, tmp_path: Path, config: Path, scenes: Path) -> None:
    text = tmp_path / "text.h5"
    text.write_text("no scenes")
    only_train = tmp_path / "train.h5"
    with h5py.File(scenes) as source, h5py.File(only_train, "w") as file:
        source.copy("scene-train", file)
    for path, says in (
        (tmp_path / "none.h5", "none.h5 does not exist"),
        (text, "text.h5 is no HDF5 file"),
        (only_train, "no scene of the split 'valid'"),
    ):
        outcome = uknowpan("train", "--data", path, "--out", tmp_path / "run", "--config", config)
        assert outcome.code == 3
        assert re.fullmatch(rf"uknowpan: error: .*{says}.*\n", outcome.stderr)


def test_train_interrupted_and_resumed(
    uknowpan: Run, tmp_path: Path, config: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM after the first step: exit 130, and --resume ends where an unbroken run does."""
    monkeypatch.setattr(GenericStudentStage.__init__, "__kwdefaults__", {
        **(GenericStudentStage.__init__.__kwdefaults__ or {}), "validation_batches": 1,
    })  # fmt: skip
    common = ("train", "--data", scenes, "--config", config, "-q", "-j", 1)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert uknowpan(*common, "--out", unbroken).code == 0

    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    batch = GenericStudentStage.batch

    def interrupted(stage: GenericStudentStage, step: int) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return batch(stage, step)

    with monkeypatch.context() as patch:
        patch.setattr(GenericStudentStage, "batch", interrupted)
        outcome = uknowpan(*common, "--out", broken)
    assert outcome.code == 130
    assert outcome.stdout == ""
    assert re.fullmatch(r"uknowpan: error: stopped after step 1; --resume goes on from there\n", outcome.stderr)
    assert not (broken / "best.safetensors").exists()
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers

    again = uknowpan(*common, "--out", broken)
    assert again.code == 4
    assert "holds a run already; --resume" in again.stderr

    resumed = uknowpan(*common, "--out", broken, "--resume")
    assert resumed.code == 0, resumed.stderr
    assert resumed.stdout == f"{broken / 'best.safetensors'}\n"
    wanted, found = (load_file(folder / "last.safetensors") for folder in (unbroken, broken))
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        assert (weight == found[name]).all(), name
    assert not list(broken.glob(".*"))
    # What it made is a model like any other.
    assert uknowpan("models", "verify", broken / "best.safetensors").code == 0


def test_train_goes_on_only_as_configured(uknowpan: Run, tmp_path: Path, config: Path, scenes: Path) -> None:
    out = tmp_path / "my model"
    common = ("train", "--data", scenes, "--out", out, "-q", "-j", 1, "--config", config)
    assert uknowpan(*common, "--device", "cpu").code == 0
    config.write_text(CONFIG.replace("warmup = 1", "warmup = 2"))
    outcome = uknowpan(*common, "--resume")
    assert outcome.code == 2
    assert re.fullmatch(
        r"uknowpan: error: .*my model was begun with train\.warmup 1 \(here 2\); --resume.*\n",
        outcome.stderr,
    )
    # A card tells where its weights come from, and not where this machine keeps them.
    card = json.loads(uknowpan("models", "show", out / "best.safetensors", "--json").stdout)
    assert card["name"] == "my model"
    training = card["training"]
    assert training["seed"] == 0
    assert training["command"] == ("uknowpan train --stage fsa-s --data scenes.h5 --out 'my model' --config tiny.toml")
    assert training["scenes_by_licence"] == {"none": ["scene-train"]}
    assert training["validation_scenes_by_licence"] == {"none": ["scene-valid"]}
    assert training["code_version"] in uknowpan("--version").stdout
    assert str(tmp_path) not in json.dumps(card)


def test_train_from_other_weights(uknowpan: Run, tmp_path: Path, config: Path, scenes: Path, tiny_model: Path) -> None:
    out = tmp_path / "run"
    outcome = uknowpan(*("train", "--data", scenes, "--out", out, "--config", config, "--init", tiny_model))
    assert outcome.code == 5
    assert re.fullmatch(
        r"uknowpan: error: the weights of .* deep_width 8 \(here 4\)\) do not fit.*\n",
        outcome.stderr,
    )
    assert not out.exists()


@pytest.mark.parametrize(("device", "says"), [("tpu", "takes auto, cpu, cuda"), ("cuda:99", "PyTorch sees")])
def test_train_refuses_devices(
    device: str, says: str, uknowpan: Run, tmp_path: Path, config: Path, scenes: Path
) -> None:
    outcome = uknowpan(
        *("train", "--data", scenes, "--out", tmp_path / "run", "--config", config),
        *("--device", device),
    )
    assert outcome.code == 2
    assert re.fullmatch(rf"uknowpan: error: --device .*{says}.*\n", outcome.stderr)


# Pack ---------------------------------------------------------------------------------------------


HEADER = "name,kind,pan,ms,sensor,licence,split,weight\n"


def test_pack_makes_what_train_reads(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    from uknowpan.models.training.scenes import read_scenes

    make_pair(ms_shape=(48, 40))
    recipe, output = tmp_path / "recipe.csv", tmp_path / "scenes.h5"
    recipe.write_text(
        HEADER
        + "a,pair,scene_pan.tif,scene_ms.tif,made up,none,train,2\n"
        + "b,ms,,scene_ms.tif,made up,none,valid,1\n"
        + "c,ms,,not_there.tif,made up,none,skip,1\n"
    )
    outcome = uknowpan("pack", recipe, "-o", output, "--root", tmp_path, "-q")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout == f"{output}\n"
    (scene,) = read_scenes(output, "train")
    assert (scene.name, scene.weight, tuple(scene.gt.shape)) == ("a", 2.0, (4, 48, 40))
    assert scene.pan is not None and tuple(scene.pan.shape) == (1, 48, 40)
    assert read_scenes(output, "valid")[0].pan is None
    again = uknowpan("pack", recipe, "-o", output, "--root", tmp_path)
    assert again.code == 4
    assert uknowpan("pack", recipe, "-o", output, "--root", tmp_path, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must hold scenes"),
        ("name,kind\na,pair\n", "is no recipe.*'pan'"),
        (HEADER + "a,ms,,scene_ms.tif,s,l,train,heavy\n", "is no recipe.*heavy"),
        (HEADER + "a,ms\n", "is no recipe"),
        (HEADER + "a,triplet,,scene_ms.tif,s,l,train,1\n", "kind of scene 'a' is 'triplet'"),
        (HEADER + "a,ms,,scene_ms.tif,s,l,test,1\n", "split of scene 'a' is 'test'"),
        (HEADER + 2 * "a,ms,,scene_ms.tif,s,l,train,1\n", "a name of its own"),
        (HEADER + "a,ms,,none.tif,s,l,train,1\n", "none.tif"),
        (HEADER + "a,pair,scene_ms.tif,scene_pan.tif,s,l,train,1\n", "4 bands"),
        (b"\xff\xfe\x00", "is no recipe"),
    ],
)
def test_pack_refuses(text: str | bytes, says: str, uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    make_pair()
    recipe = tmp_path / "recipe.csv"
    recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
    outcome = uknowpan("pack", recipe, "-o", tmp_path / "scenes.h5", "--root", tmp_path)
    assert outcome.code == 3
    assert outcome.stdout == ""
    assert re.fullmatch(rf"uknowpan: error: .*{says}.*\n", outcome.stderr)
    assert {p.name for p in tmp_path.iterdir()} == {"recipe.csv", "scene_pan.tif", "scene_ms.tif"}


PackOne = Callable[..., tuple[np.ndarray, np.ndarray | None, str]]


@pytest.fixture
def pack_one(uknowpan: Run, tmp_path: Path) -> PackOne:
    """`pack_one(kind, pan, ms)`: (gt, pan or None, note) of a recipe of one scene."""

    def pack(kind: str, pan: str, ms: str) -> tuple[np.ndarray, np.ndarray | None, str]:
        recipe, output = tmp_path / "one.csv", tmp_path / "one.h5"
        recipe.write_text(f"{HEADER}a,{kind},{pan},{ms},s,l,train,1\n")
        outcome = uknowpan("pack", recipe, "-o", output, "--root", tmp_path, "--overwrite", "-q")
        assert outcome.code == 0, outcome.stderr
        with h5py.File(output) as file:
            group = file["a"]
            pan_values = group["pan"][()] if "pan" in group else None
            return group["gt"][()], pan_values, group.attrs["note"]

    return pack


@pytest.mark.parametrize("offset", [(32, 24), (-32, -24), (30, -25), (-3, 7)])
def test_pack_where_the_pan_sticks_out(offset: tuple[int, int], pack_one: PackOne, make_pair: MakePair) -> None:
    """On every side, MS pixels that the PAN covers wholly are the truth, and PAN lies on them."""
    pair = make_pair(ms_shape=(48, 40), pan_shape=(192, 160), offset=offset)
    gt, pan, _ = pack_one("pair", "scene_pan.tif", "scene_ms.tif")
    spans = []
    for start, (count, pan_count) in zip(offset, [(48, 192), (40, 160)], strict=True):
        first = -(start // 4) if start < 0 else 0  # whole MS pixels inside the PAN
        spans.append(slice(first, min(count, (pan_count - start) // 4)))
    assert np.array_equal(gt, pair.ms_values[:, spans[0], spans[1]])
    assert pan is not None and pan.shape[1:] == gt.shape[1:]
    # Both show the same smooth landscape, the first band with a gain of 1.
    assert np.abs(pan[0] - gt[0])[2:-2, 2:-2].max() < 20 < 0.1 * np.ptp(gt[0])


@pytest.mark.parametrize("mask", [None, "mask", "alpha"])
@pytest.mark.parametrize("kind", ["pair", "ms"])
def test_pack_leaves_invalid_pixels_out(kind: str, mask: str | None, pack_one: PackOne, make_pair: MakePair) -> None:
    holes = np.zeros((48, 40), bool)
    holes[20, 3] = holes[:, 38:] = True
    pan_holes = np.zeros((192, 160), bool)
    pan_holes[190, 50] = True  # in MS row 47
    pair = make_pair(
        ms_shape=(48, 40), holes=holes, nodata=0 if mask is None else None, mask=mask,
        pan_holes=pan_holes, pan_nodata=0,
    )  # fmt: skip
    gt, pan, note = pack_one(kind, "scene_pan.tif" if kind == "pair" else "", "scene_ms.tif")
    rows = slice(0, 47) if kind == "pair" else slice(0, 48)
    assert np.array_equal(gt, pair.ms_values[:, rows, 4:38])
    share = f"{gt[0].size / 1920:.1%} of it without invalid pixels"
    assert note.endswith(share)
    assert (pan is None) == (kind == "ms")


def test_pack_with_a_nodata_value_that_the_files_do_not_say(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    holes = np.zeros((48, 40), bool)
    holes[40:] = True
    pair = make_pair(ms_shape=(48, 40), holes=holes, nodata=0)
    with rasterio.open(tmp_path / "scene_ms.tif", "r+") as file:
        file.nodata = None
    found = {}
    for value in ("", "0"):
        recipe, output = tmp_path / "one.csv", tmp_path / f"one{value}.h5"
        row = f"a,pair,scene_pan.tif,scene_ms.tif,s,l,train,1,{value}\n"
        recipe.write_text(HEADER.replace("weight", "weight,nodata") + row)
        outcome = uknowpan("pack", recipe, "-o", output, "--root", tmp_path, "-q")
        assert outcome.code == 0, outcome.stderr
        with h5py.File(output) as file:
            found[value] = file["a/gt"][()]
    assert found[""].shape[1:] == (48, 40)
    assert np.array_equal(found["0"], pair.ms_values[:, :40])


@pytest.mark.parametrize("kind", ["reduced", "ms"])
def test_pack_takes_bands_in_files_of_their_own(kind: str, pack_one: PackOne, make_pair: MakePair) -> None:
    holes = np.zeros((40, 32), bool)
    holes[:5] = True
    pair = make_pair(ratio=1, ms_shape=(40, 32), bands=3, separate=True, holes=holes, nodata=0)
    names = ";".join(Path(path).name for path in pair.ms)
    gt, pan, _ = pack_one(kind, "scene_pan.tif" if kind == "reduced" else "", names)
    assert gt.dtype == np.uint16
    assert np.array_equal(gt, pair.ms_values[:, 5:])
    if kind == "reduced":
        assert pan is not None
        assert np.abs(pan[0] - pair.pan_values[5:])[2:-2, 2:-2].max() < 20


def test_pack_refuses_scenes(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    holes = np.ones((40, 32), bool)
    holes[:16, :15] = False
    make_pair(name="holes", ms_shape=(40, 32), holes=holes, nodata=0)
    make_pair(name="fine", ms_shape=(40, 32))
    make_pair(name="other", ms_shape=(20, 16), ratio=8)
    noise = np.random.default_rng(3).integers(1, 999, (1, 160, 128)).astype("uint16")
    small = noise[:, :40, :32]
    for name, values, like in (("noise", noise, "fine_pan"), ("small", small, "fine_ms")):
        with rasterio.open(tmp_path / f"{like}.tif") as source:
            place = {"crs": source.crs, "transform": source.transform}
        write_raster(tmp_path / f"{name}.tif", values, **place)
    for row, says in (
        ("pair,holes_pan.tif,holes_ms.tif", "'a' 18.8% of 40 x 32 MS pixels are valid.*16 x 16"),
        ("ms,,holes_ms.tif", "'a' 18.8% of 40 x 32 MS pixels are valid"),
        ("pair,noise.tif,fine_ms.tif", "PAN and MS of scene 'a' do not resemble each other"),
        ("reduced,small.tif,fine_ms.tif", "PAN and MS of scene 'a' do not resemble each other"),
        ("reduced,fine_pan.tif,fine_ms.tif", r"'a' \(kind reduced\) do not lie on one grid"),
        ("ms,,fine_ms.tif;other_ms.tif", r"'a' \(kind ms\) do not lie on one grid"),
    ):
        recipe, output = tmp_path / "recipe.csv", tmp_path / "scenes.h5"
        recipe.write_text(f"{HEADER}a,{row},s,l,train,1\n")
        outcome = uknowpan("pack", recipe, "-o", output, "--root", tmp_path)
        assert outcome.code == 3, row
        assert re.fullmatch(rf"uknowpan: error: .*{says}.*\n", outcome.stderr), outcome.stderr
        assert not output.exists()


def test_pack_spares_its_inputs(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair()
    recipe = tmp_path / "recipe.csv"
    recipe.write_text(HEADER + "a,ms,,scene_ms.tif,s,l,train,1\n")
    for target in (Path(pair.ms[0]), recipe):
        before = target.read_bytes()
        outcome = uknowpan("pack", recipe, "-o", target, "--root", tmp_path, "--overwrite")
        assert outcome.code == 3
        assert "one of the inputs" in outcome.stderr
        assert target.read_bytes() == before
