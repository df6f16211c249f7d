import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uknowpan.models.published.uknow.blocks import SelfAttention, TimeEmbedding, box_highpass
from uknowpan.models.published.uknow.student import FSAStudent, StudentConfig
from uknowpan.models.types import Condition

GOLDEN = Path(__file__).parents[3] / "golden"


def _load_script():
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


make_golden = _load_script()
SMALL = StudentConfig(bands=2, width=8, heads=2)


def _student(config=SMALL, train=False):
    torch.manual_seed(0)
    return FSAStudent(config).train(train)


def _inputs(config=SMALL, batch=2, size=(16, 24)):
    generator = torch.Generator().manual_seed(1)
    x_t, lms = (torch.randn(batch, config.bands, *size, generator=generator) for _ in range(2))
    pan = torch.randn(batch, 1, *size, generator=generator)
    t = torch.randint(0, 500, (batch,), generator=generator)
    return x_t, t, Condition(lms, pan)


@pytest.mark.parametrize("case", make_golden.CASES)
def test_forward_equals_golden(case):
    golden = np.load(GOLDEN / "student.npz")
    config = make_golden.CASES[case]
    student = FSAStudent(config).eval()
    shapes = {k: v.shape for k, v in student.state_dict().items()}
    student.load_state_dict(make_golden.seeded_state(shapes))
    inputs = {k: v.float() for k, v in make_golden.seeded_inputs(config.bands).items()}
    if case == "ours":
        del inputs["self_cond"]
    x_t = inputs.pop("x_t")
    with torch.no_grad():
        out = student(x_t, torch.tensor(make_golden.TIMESTEPS), Condition(**inputs))
    # Float32 against a float64 reference; wrong wiring changes the output by about 1.
    assert np.abs(golden[f"{case}_x0"]).mean() > 0.1
    np.testing.assert_allclose(out.x0.numpy(), golden[f"{case}_x0"], atol=2e-4)
    rms = [float(f.square().mean().sqrt()) for f in out.features]
    np.testing.assert_allclose(rms, golden[f"{case}_features"], rtol=1e-4)


def test_gradient_reaches_every_parameter():
    student = _student(train=True)
    student(*_inputs()).x0.square().sum().backward()
    dead = [n for n, p in student.named_parameters() if p.grad is None or not p.grad.abs().max()]
    assert dead == []


@pytest.mark.parametrize("train", [True, False])
def test_features(train):
    out = _student(train=train)(*_inputs(size=(32, 16)))
    shapes = [tuple(f.shape[1:]) for f in out.features]
    assert shapes == [(8, 32, 16), (16, 16, 8), (16, 8, 4), (32, 4, 2), (16, 8, 4), (16, 16, 8)]
    assert out.x0.shape == (2, 2, 32, 16)
    assert out.log_sigma is None


def test_images_of_a_batch_do_not_mix():
    student = _student()
    x_t, t, c = _inputs()
    both = student(x_t, t, c).x0
    for i in range(2):
        alone = student(x_t[i : i + 1], t[i : i + 1], Condition(c.lms[i : i + 1], c.pan[i : i + 1]))
        torch.testing.assert_close(both[i : i + 1], alone.x0, atol=1e-5, rtol=1e-4)


def test_empty_slot_holds_x_t():
    student = _student()
    x_t, t, c = _inputs()
    empty = student(x_t, t, c).x0
    assert torch.equal(empty, student(x_t, t, replace(c, self_cond=x_t)).x0)
    assert not torch.allclose(empty, student(x_t, t, replace(c, self_cond=c.lms)).x0)


@pytest.mark.parametrize("highpass_pan", [True, False])
def test_only_the_release_is_blind_to_the_brightness_of_pan(highpass_pan):
    student = _student(replace(SMALL, highpass_pan=highpass_pan))
    x_t, t, c = _inputs()
    brighter = student(x_t, t, replace(c, pan=c.pan + 1)).x0
    assert torch.allclose(brighter, student(x_t, t, c).x0, atol=1e-4) == highpass_pan


def test_box_highpass_mirrors_without_the_edge():
    pan = torch.randn(1, 1, 7, 9, dtype=torch.float64)
    expected = pan[0, 0].numpy() - uniform_filter(pan[0, 0].numpy(), 5, mode="mirror")
    np.testing.assert_allclose(box_highpass(pan)[0, 0].numpy(), expected, atol=1e-12)


def test_attention_scale_is_the_full_width():
    attention = SelfAttention(8, 2)
    x = torch.randn(1, 8, 3, 5)
    tokens = attention.qkv(attention.norm(x)).reshape(2, 3, 4, 15)  # (head, qkv, d, HW)
    q, k, v = tokens.unbind(1)
    weights = torch.softmax(q.mT @ k / 8**0.5, dim=-1)
    expected = x + attention.out((v @ weights.mT).reshape(1, 8, 3, 5))
    torch.testing.assert_close(attention(x), expected)


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def test_attention_memory_grows_with_the_pixels_not_their_square():
    attention, x = SelfAttention(16, 2), torch.randn(1, 16, 32, 32, requires_grad=True)
    with _LargestTensor() as largest:
        attention(x).sum().backward()
    assert largest.numel == 3 * 16 * 32 * 32  # the projection; one head's scores: 1024 * 1024


def test_time_embedding_tells_neighbours_apart_in_bfloat16():
    embedding = TimeEmbedding(32).to(torch.bfloat16)
    a, b, between = embedding(torch.tensor([498, 499, 498.5]))
    assert a.dtype == torch.bfloat16
    assert not torch.equal(a, b)
    assert not torch.equal(a, between)


@pytest.mark.parametrize(("size", "message"), [((20, 16), "20 x 16 .* 24 x 16"), ((8, 9), "8 x 9 .* 8 x 16")])
def test_size_that_does_not_halve(size, message):
    with pytest.raises(ValueError, match=message):
        _student()(*_inputs(size=size))


def test_shapes_that_do_not_fit():
    student = _student()
    x_t, t, c = _inputs()
    with pytest.raises(ValueError, match="3 bands, but this student was built for 2"):
        student(torch.cat([x_t, x_t[:, :1]], 1), t, c)
    with pytest.raises(ValueError, match=r"pan must be \(2, 1, 16, 24\), not \(2, 1, 8, 24\)"):
        student(x_t, t, replace(c, pan=c.pan[:, :, :8]))
    with pytest.raises(ValueError, match="self_cond"):
        student(x_t, t, replace(c, self_cond=x_t[:, :1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bands": 0}, "bands must be at least 1, not 0"),
        ({"attention_level": 4}, "attention_level 4 .* 0 to 3"),
        ({"heads": 3}, "32 channels do not divide into 3"),
        ({"width": 7}, "width 7 must be even"),
    ],
)
def test_configurations_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        FSAStudent(replace(SMALL, **change))
