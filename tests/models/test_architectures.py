"""The table of networks: every name is there, and a network is one entry and its own file."""

from dataclasses import asdict, dataclass, fields

import pytest
import torch
from testfiles import write_images
from textures import make_pair

from uknowpan.models.architectures import ARCHITECTURES, Architecture, architecture_of, resolve, stage_names
from uknowpan.models.checkpoints import Card, network_of, save_checkpoint
from uknowpan.models.denoising import UNetSharpener, load_network
from uknowpan.models.metrics.evaluation import evaluate_file
from uknowpan.models.metrics.sensors import SENSORS
from uknowpan.models.pancollection.condition import image_sharpener
from uknowpan.models.pancollection.file import PanCollectionFile
from uknowpan.models.sharpeners import load_sharpener, sharpen_array
from uknowpan.models.training.presets import SMALL, Settings, preset
from uknowpan.models.types import Denoised


@dataclass(frozen=True)
class ToyConfig:
    bands: int


class Toy(torch.nn.Module):
    """Injects the PAN's difference from its mean into every band."""

    pixel_multiple = 1

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gain = torch.nn.Parameter(torch.ones(()))

    def forward(self, x_t, t, condition):
        detail = condition.pan - condition.pan.mean((-2, -1), keepdim=True)
        return Denoised(self.gain * detail.expand_as(condition.lms))


def lite(bands):
    return Settings(SMALL, ToyConfig(bands), None)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A checkpoint of a network that only this file and one entry of the table describe."""
    entry = Architecture(
        network=f"{__name__}:Toy",
        config=f"{__name__}:ToyConfig",
        sharpener="uknowpan.models.denoising:UNetSharpener",
        stage="toy",
        trainer="",
        presets={"lite": f"{__name__}:lite"},
        option="--model",
    )
    monkeypatch.setitem(ARCHITECTURES, "toy", entry)
    config = preset("lite", "toy", 4).network
    card = Card("my toy", "toy", asdict(config), "toy", bands=4, ratios=[4], residual_std=[0.5] * 4)
    save_checkpoint(tmp_path / "toy.safetensors", network_of(config), card)
    return str(tmp_path / "toy.safetensors")


def test_a_new_network_loads_sharpens_and_is_evaluated(toy, tmp_path):
    assert "toy" in stage_names("--model")
    tool = load_sharpener(toy)
    assert type(tool) is UNetSharpener and tool.name == "my toy"
    pair = make_pair(4, (16, 16))
    plain = sharpen_array(load_sharpener(None, "bicubic"), pair.pan, pair.ms).hrms
    hrms = sharpen_array(tool, pair.pan, pair.ms).hrms
    assert (hrms - pair.gt).square().mean() != (plain - pair.gt).square().mean()
    with PanCollectionFile(write_images(tmp_path / "t.h5", count=1)) as file:
        sharpen = image_sharpener(load_network(toy), file, 2047.0)
        methods = {"toy": lambda images: sharpen(images).hrms}
        scores = evaluate_file(file, methods, scale=2047.0, sensor=SENSORS["generic"], cut=0).scores
    assert scores["toy"]["ergas"].isfinite().all() and not torch.equal(scores["toy"]["ergas"], scores["EXP"]["ergas"])


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_dotted_name_is_there(name):
    entry = ARCHITECTURES[name]
    for field in fields(entry):
        if field.name in ("network", "config", "sharpener", "trainer"):
            assert isinstance(resolve(getattr(entry, field.name)), type), field.name
    for preset_name in entry.presets:
        assert architecture_of(preset(preset_name, entry.stage, 4).network) is entry


def test_a_config_of_no_network():
    with pytest.raises(KeyError, match="ToyConfig"):
        architecture_of(ToyConfig(4))
