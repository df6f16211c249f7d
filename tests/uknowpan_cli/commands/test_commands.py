"""Help, and the commands models, info and demo."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import rasterio
from running import MakePair, Run
from safetensors.numpy import load_file

COMMANDS = ["sharpen", "info", "demo", "train", "pack", "models"]
MODEL_COMMANDS = ["list", "show", "verify"]


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


def test_models_list(uknowpan: Run) -> None:
    outcome = uknowpan("models", "list")
    assert outcome.code == 0
    assert re.match(r"generic +fsa-s-streams, any bands, ratio 2 to 6, \d\.\d MB", outcome.stdout)
    entries = json.loads(uknowpan("models", "list", "--json").stdout)
    (generic,) = (entry for entry in entries if entry["name"] == "generic")
    assert generic["bytes"] > 10_000
    assert generic["card"]["architecture"] == "fsa-s-streams"


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
        uknowpan("models", command, name).fails(5, says)


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
        ([pair.pan], 2, "alone is no product"),
        ([tmp_path / "none.safetensors"], 5, "no model"),
        ([pair.pan, tmp_path / "none.tif"], 3, "No such file"),
        ([*pair.ms, pair.pan], 3, "4 bands"),
    ):
        uknowpan("info", *words).fails(code, says)


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
