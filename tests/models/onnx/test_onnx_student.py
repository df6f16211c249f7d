"""The student in ONNX Runtime against the same in PyTorch."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from test_geometry import field_of, scene
from textures import make_pair

from uknowpan.errors import is_out_of_memory
from uknowpan.models.checkpoints import Card, save_checkpoint
from uknowpan.models.errors import CheckpointError, ModelMismatch
from uknowpan.models.features import StreamsConfig
from uknowpan.models.resample import reflect
from uknowpan.models.sharpeners import load_sharpener, sharpen_array
from uknowpan.models.streams import StreamsStudent

FULL_SCALE = 10000.0
"""Digital numbers: those of a sensor of 14 bits."""
SMALL = StreamsConfig(pan_width=8, trunk_width=12, band_width=8, head_width=4, trunk_blocks=1, band_blocks=2)


@pytest.fixture
def small(tmp_path):
    """A checkpoint of other widths whose every layer has a say, and its card."""
    torch.manual_seed(1)
    network = StreamsStudent(SMALL)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    card = Card("small", "fsa-s-streams", asdict(SMALL), "fsa-s")

    def write(**changes):
        save_checkpoint(tmp_path / "small.safetensors", network, replace(card, **changes))
        return str(tmp_path / "small.safetensors")

    return write


@pytest.mark.parametrize(
    "ratio, bands, shift, softness, consistency",
    [(2, 3, (0, 0), None, 0), (4, 4, (0.6, -0.4), 0.25, 1), (4, 8, (0, 0), "ms", 0), (3, 1, (1, 0), 0.8, 0)],
)
@pytest.mark.parametrize("bundled", [True, False])
def test_both_engines_give_the_same_pixels(ratio, bands, shift, softness, consistency, bundled, small):
    pair = make_pair(ratio, (24, 28), bands=bands, shift=shift)
    low = float(min(pair.pan.min(), pair.ms.min()))
    unit = FULL_SCALE / (float(max(pair.pan.max(), pair.ms.max())) - low)
    pan, ms = ((unit * (x.numpy() - low)) for x in (pair.pan, pair.ms))
    made = [
        sharpen_array(
            load_sharpener(None if bundled else small(), engine=engine, softness=softness, consistency=consistency),
            *(pan, ms),
        )
        for engine in ("torch", "onnx")
    ]
    for name, most in (("hrms", 0.1), ("sigma", 0.1)):
        ours, theirs = (np.asarray(getattr(done, name)) for done in made)
        assert ours.dtype == np.float32
        assert abs(ours - theirs).max() < most  # of 10000


@pytest.mark.parametrize("ratio", [2, 3])
def test_displaced_bands_too(ratio):
    """A local displacement and shifts of the bands."""
    pan, ms, statistics = scene(ratio, field_of(ratio))
    pan, ms = pan[:, : 28 * ratio], ms[:, :28]  # windows are multiples of 4
    made = []
    for engine in ("torch", "onnx"):
        sharpener = load_sharpener(None, engine=engine)
        margin = sharpener.margin(statistics)
        wide = reflect(pan.numpy(), margin * ratio)[None], reflect(ms.numpy(), margin)[None]
        made.append(np.asarray(sharpener.sharpen(*wide, statistics, [(0, 0)]).hrms))
    assert abs(made[0] - made[1]).max() < 1e-4 * float(np.ptp(made[0]))


def test_full_memory_ends_as_pytorchs_does():
    """The runtime's own class of errors was none that a smaller tile follows."""
    pair = make_pair(2, (8, 8))
    sharpener = load_sharpener(None, engine="onnx")

    class Full:
        def run(self, *given):
            raise Exception("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc")

    sharpener.sessions = lambda threads: (Full(), Full())
    with pytest.raises(RuntimeError) as caught:
        sharpen_array(sharpener, pair.pan.numpy(), pair.ms.numpy())
    assert is_out_of_memory(caught.value)


def test_the_runtime_prints_nothing_and_keeps_no_memory(capfd):
    """Kinds of fault: coloured lines beside the error; memory of large tiles that NumPy lacked for smaller ones."""
    for session in load_sharpener(None, engine="onnx").sessions(1):
        odd = [np.zeros([5 if type(k) is str else k for k in x.shape], np.float32) for x in session.get_inputs()]
        with pytest.raises(Exception, match="Non-zero status"):
            session.run(None, {x.name: values for x, values in zip(session.get_inputs(), odd, strict=True)})
        assert not session.get_session_options().enable_cpu_mem_arena
    assert capfd.readouterr() == ("", "")


def test_what_the_engine_cannot_run(small):
    lite = small(architecture="fsa-s-lite")
    for model, steps, text in (("generic", 2, "one step, not 2"), (lite, None, "fsa-s-lite")):
        with pytest.raises(ModelMismatch, match=text):
            load_sharpener(model, engine="onnx", steps=steps)


@pytest.mark.parametrize(
    "change", [{"trunk_blocks": 3}, {"band_blocks": 1}, {"band_width": 9}, {"head_width": 3}, {"scene_features": 3}]
)
def test_weights_that_do_not_fit_their_card(small, change):
    """A card of other widths was an error of the runtime."""
    with pytest.raises(CheckpointError, match="do not fit its card"):
        load_sharpener(small(config=asdict(replace(SMALL, **change))), engine="onnx")
