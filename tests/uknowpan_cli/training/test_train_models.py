"""`train --model`: further models from the sample data to a sharpened scene."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from patch_files import story
from rasters import observed, textured
from running import MakePair, Run, read
from safetensors.torch import load_file

from uknowpan.models.checkpoints import load_model, read_card
from uknowpan.models.published.pan_crafter.network import PanCrafter
from uknowpan.models.published.ssdiff.network import SSDiff

ITERATIONS = 12
TRAIN = f"""
[train]
iterations = {ITERATIONS}
batch_size = 4
warmup = 2
learning_rate = RATE
validate_every = 6
validation_samples = 4
checkpoint_every = 6
log_every = 3
ema = 0.5
"""
NETWORK = {
    "pan-crafter": "[network]\nwidths = [8, 8, 16]\nhead_width = 4\ngroups = 2\ntoken_width = 8\n",
    "ssdiff": "[network]\nwidth = 16\ntime_width = 8\n[options]\nterminal_share = 1.0\n",
}
RATES = {"pan-crafter": "0.01", "ssdiff": "0.003"}
KINDS = {"pan-crafter": PanCrafter, "ssdiff": SSDiff}
LOSSES = {"pan-crafter": ["ms", "pan"], "ssdiff": ["l1"]}
MODELS = list(NETWORK)


class Trained:
    """The run folders of `train --model NAME`, made when a test first needs one."""

    def __init__(self, folder: Path, uknowpan: Run):
        self.folder, self.uknowpan = folder, uknowpan
        if not (folder / "data").exists():
            assert uknowpan("simulate", "--sample", "-o", folder / "data").code == 0

    def arguments(self, name: str) -> list[object]:
        """Arguments of `train` without --out."""
        config = self.folder / f"{name}.toml"
        config.write_text(TRAIN.replace("RATE", RATES[name]) + NETWORK[name])
        return [
            *("train", "--model", name, "--data", self.folder / "data" / "train.h5"),
            *("--config", config, "--device", "cpu", "-j", 1, "-q"),
        ]

    def __getitem__(self, name: str) -> Path:
        out = self.folder / name
        if not out.exists():
            done = self.uknowpan(*self.arguments(name), "--out", out)
            assert (done.code, done.stderr) == (0, "")
            assert done.stdout == f"{out / 'best.safetensors'}\n"
        return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def trained(folder: Path, uknowpan: Run) -> Trained:
    return Trained(folder, uknowpan)


@pytest.mark.parametrize("name", MODELS)
def test_a_run_folder(trained: Trained, name: str) -> None:
    out = trained[name]
    log = story(out)
    assert [entry["step"] for entry in log] == [3, 6, 9, 12]
    first, last = (sum(entry[part] for part in LOSSES[name]) for entry in (log[0], log[-1]))
    assert last < 0.98 * first
    model, card = load_model(out / "best.safetensors")
    assert type(model) is KINDS[name]
    assert (card.name, card.architecture, card.stage, card.bands) == (name, name, name, 4)
    words = card.training["command"]
    assert words.startswith(f"uknowpan train --model {name}") and "--stage" not in words
    assert str(trained.folder) not in json.dumps(card.__dict__)
    assert len(list((out / "pictures").iterdir())) == 2


@pytest.mark.parametrize("name", MODELS)
def test_dry_run_presets_and_init(trained: Trained, name: str, tmp_path: Path) -> None:
    words, out = trained.arguments(name), tmp_path / "run"
    done = trained.uknowpan(*words, "--out", out, "--dry-run")
    assert done.code == 0 and not out.exists()
    resolved, model = json.loads(done.stdout), load_model(trained[name] / "best.safetensors")[0]
    assert resolved.pop("parameters") == sum(p.numel() for p in model.parameters())
    configured = json.loads((trained[name] / "config.json").read_text())
    del configured["data"]
    assert resolved == configured and configured["stage"] == name
    plain = [w for w in words if w != "--config" and not str(w).endswith(".toml")]
    counts = {}
    for preset in ("lite", "paper"):
        done = trained.uknowpan(*plain, "--out", out, "--dry-run", "--preset", preset)
        counts[preset] = json.loads(done.stdout)["parameters"]
    assert counts["lite"] < 1_000_000 < counts["paper"]
    begun = [*words, "--out", out, "--init", trained[name] / "last.safetensors"]
    assert trained.uknowpan(*begun).code == 0
    assert read_card(out / "last.safetensors").training["started_from"]["iterations"] == ITERATIONS


@pytest.mark.parametrize("name", MODELS)
def test_a_finished_run_is_resumed_to_itself(trained: Trained, name: str) -> None:
    weights = load_file(trained[name] / "last.safetensors")
    words = [*trained.arguments(name), "--out", trained[name]]
    refused = trained.uknowpan(*words)
    assert refused.code == 4 and "holds a run already; --resume goes on" in refused.stderr
    assert trained.uknowpan(*words, "--resume").code == 0
    after = load_file(trained[name] / "last.safetensors")
    assert all(torch.equal(weights[k], after[k]) for k in weights)


@pytest.mark.parametrize("name", MODELS)
def test_from_file_to_file(trained: Trained, name: str, make_pair: MakePair, tmp_path: Path) -> None:
    """Several tiles, odd sizes, nodata: as for the student of the published form."""
    holes = np.zeros((35, 27), bool)
    holes[8:12, 3:9] = True
    pair, out = make_pair(ms_shape=(35, 27), noise=40, nodata=0, holes=holes), tmp_path / "o.tif"
    done = trained.uknowpan(
        *("sharpen", pair.pan, *pair.ms, "-o", out, "--tile", 64, "--coregister", "off"),
        *("--model", trained[name] / "best.safetensors", "-j", 1),
    )
    assert done.code == 0, done.stderr
    assert f"the result of model {name} depends on how the scene is cut" in done.stderr
    with rasterio.open(out) as made, rasterio.open(pair.pan) as pan:
        assert (made.crs, made.transform, made.shape) == (pan.crs, pan.transform, pan.shape)
        tags, values, masked = made.tags(), made.read().astype(float), made.read_masks() == 0
    assert tags["UKNOWPAN_MODEL"] == name and len(tags["UKNOWPAN_SHA256"]) == 64
    expected = holes.repeat(4, 0).repeat(4, 1)
    assert (masked == expected).all()
    near = pair.ms_values.astype(float).repeat(4, 1).repeat(4, 2)
    assert np.abs(values[:, ~expected] / near[:, ~expected] - 1).mean() < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_evaluate(trained: Trained, name: str) -> None:
    model, data = trained[name] / "best.safetensors", trained.folder / "data" / "test.h5"
    done = trained.uknowpan("evaluate", data, "--model", model, "--json", "--device", "cpu")
    assert done.code == 0, done.stderr
    assert name in done.stdout and "ergas" in done.stdout.lower()


def test_compare_shows_them_beside_the_bundled_model(trained: Trained, make_pair: MakePair, tmp_path: Path) -> None:
    pair, page = make_pair(ms_shape=(24, 24), noise=40), tmp_path / "c.html"
    models = ["generic", *(trained[name] / "best.safetensors" for name in MODELS)]
    words = [word for model in models for word in ("-m", model)]
    done = trained.uknowpan("compare", pair.pan, *pair.ms, "-o", page, *words, "--json", "-q", "-j", 1)
    assert done.code == 0, done.stderr
    scores = json.loads(done.stdout)["scores"]
    assert list(scores)[-4:] == ["awlp", "generic", *MODELS]
    assert all(0 < scores[name]["hqnr"] <= 1 for name in scores) and page.exists()


@pytest.mark.parametrize("name", MODELS)
def test_blended_tiles_show_no_seams(trained: Trained, name: str, tmp_path: Path) -> None:
    """The mean step across a border of tiles, beyond what one tile would show, is smaller than
    half of that without overlap (or than a thousandth of the contrast, 60: SSDiff sees windows
    only and hardly shows its tiles), and no larger than 1.5 times that elsewhere."""
    truth = textured(256)
    truth = np.concatenate([truth, truth[:1]])  # 4 bands
    truth[:, :, 128:] += 150  # tiles differ in their statistics
    pair = observed(truth, 4, tmp_path)
    images = {}
    for cut, words in {
        "whole": ("--tile", 256),
        "cut": ("--tile", 128, "--overlap", 0),
        "blended": ("--tile", 128),
    }.items():
        done = trained.uknowpan(
            *("sharpen", pair.pan, *pair.ms, "-o", tmp_path / f"{cut}.tif", "--coregister", "off", *words),
            *("--model", trained[name] / "best.safetensors", "--output-dtype", "float32"),
        )
        assert done.code == 0, done.stderr
        images[cut] = read(tmp_path / f"{cut}.tif").astype(float)

    def steps(cut: str) -> np.ndarray:
        """From each column to the next, but for the edges of the scene."""
        change = np.diff(images[cut] - images["whole"], axis=2)
        return np.abs(change.mean(1)).max(0)[8:-8]

    cut, blended = steps("cut"), steps("blended")
    borders = np.isin(np.arange(8, 247) + 1, [96, 128, 192, 224])
    assert 0 < blended[borders].max() < 1.5 * blended[~borders].max()
    assert blended.max() < max(cut.max() / 2, 0.06)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--model", "pan-crafter", "--stage", "fsa-s"), 2, "in one stage of its own; leave --st"),
        (("--model", "pan-crafter", "--teacher", "t.safetensors"), 2, "--teacher is of the stage"),
        (("--model", "panflow"), 2, "panflow"),
    ],
)
def test_bad_usage(trained: Trained, words: tuple, code: int, says: str, tmp_path: Path) -> None:
    data = trained.folder / "data" / "train.h5"
    done = trained.uknowpan("train", "--data", data, "--out", tmp_path / "run", *words)
    assert done.code == code and says in done.stderr
    assert not (tmp_path / "run").exists()


def test_configurations_and_scenes_that_are_refused(trained: Trained, make_pair: MakePair, tmp_path: Path) -> None:
    words = trained.arguments("pan-crafter")
    config, out = tmp_path / "c.toml", tmp_path / "run"
    words = [config if str(w).endswith(".toml") else w for w in words]
    for text, says in [
        ("[network]\nbands = 3", "network takes 3 bands, the files hold 4"),
        ("[network]\nratio = 2", "network takes the ratio 2, that of the files is 4; set ratio"),
        ("[network]\nwidths = [16, 0]", "widths must be at least 1, not 0"),
        ("[network]\ngroups = 5", r"\[network\]: groups 5 does not divide the width 16"),
        ("[options]\nsteps = 4", "PanCrafterOptions has no field steps; valid are pan_weight"),
    ]:
        config.write_text(text)
        done = trained.uknowpan(*words, "--out", out)
        assert done.code in (2, 5) and re.search(says, done.stderr), done.stderr
    model = trained["pan-crafter"] / "best.safetensors"
    for pair, extra, says in [
        (make_pair(name="three", bands=3), (), "MS has 3 bands, but model pan-crafter was trained for 4"),
        (make_pair(), ("--steps", 4), "answers in one pass, so 4 steps mean nothing"),
    ]:
        done = trained.uknowpan(*("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "o.tif", "--model", model, *extra))
        assert done.code == 5 and says in done.stderr, done.stderr
