"""PAN-Crafter: shapes, a second implementation, the flags, MARs, training and sharpening."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from patch_files import QUICK, assert_resumes, patch_data, run, stirred, story, write_patches
from textures import make_pair

from uknowpan.models.checkpoints import Card, load_model, read_card, save_checkpoint
from uknowpan.models.denoising import OnePassSharpener, load_network
from uknowpan.models.errors import CheckpointError, ModelMismatch
from uknowpan.models.pancollection.condition import image_sharpener
from uknowpan.models.pancollection.file import PanCollectionFile
from uknowpan.models.published.pan_crafter.network import (
    MS_MODE,
    PAN_MODE,
    NeighbourhoodAttention,
    PanCrafter,
    PanCrafterConfig,
    low_pan,
)
from uknowpan.models.published.pan_crafter.stage import PanCrafterOptions, PanCrafterStage
from uknowpan.models.published.stages import residual_std_of
from uknowpan.models.sharpeners import load_sharpener, sharpen_array
from uknowpan.models.training.loop import train
from uknowpan.models.training.presets import preset
from uknowpan.models.types import Condition

SMALL = PanCrafterConfig(
    2, widths=(8, 8, 16, 16), blocks=1, token_width=6, head_width=4, groups=2, expansion=2,
    dropout=0.0,
)  # fmt: skip
BOTH = torch.tensor([MS_MODE, PAN_MODE])


def network(config=SMALL, size=0.1):
    """Every layer has a say; untrained ones start at zero."""
    torch.manual_seed(4)
    return stirred(PanCrafter(config), size)


def inputs(config=SMALL, batch=2, size=(16, 24)):
    generator = torch.Generator().manual_seed(1)
    lms = torch.rand(batch, config.bands, *size, generator=generator)
    return Condition(lms, torch.rand(batch, 1, *size, generator=generator))


def answer(model, condition=None, mode=None):
    return model(None, None, condition or inputs(), mode).x0


@pytest.mark.parametrize("overwritten", [False, True])
@pytest.mark.parametrize(("bands", "count"), [(8, 9_968_808), (4, 9_902_756)])
def test_published_parameters(bands, count, overwritten):
    """Those that are dead in the release (P1) are there in it too."""
    with torch.device("meta"):
        model = PanCrafter(PanCrafterConfig(bands, overwritten_pan_keys=overwritten))
    assert sum(p.numel() for p in model.parameters()) == count
    keys = [p.numel() for name, p in model.named_parameters() if "key_pan" in name]
    assert sum(keys) == 611_584


def test_untrained_it_answers_with_the_lms():
    model = PanCrafter(SMALL).eval()
    assert not answer(model, mode=BOTH).any()


def slow_attention(query, key, value, heads):
    """(C, h, w) each: softmax over the pixel and its neighbours, zeros beyond the border."""
    channels, height, width = query.shape
    d, out = channels // heads, np.zeros_like(value)
    for head in range(heads):
        own = slice(head * d, (head + 1) * d)
        for y in range(height):
            for x in range(width):
                logits, values = [], []
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        inside = 0 <= y + dy < height and 0 <= x + dx < width
                        k = key[own, y + dy, x + dx] if inside else np.zeros(d)
                        v = value[own, y + dy, x + dx] if inside else np.zeros(d)
                        logits.append(query[own, y, x] @ k / np.sqrt(d))
                        values.append(v)
                weights = np.exp(logits - np.max(logits))
                out[own, y, x] = weights / weights.sum() @ np.array(values)
    return out


def test_attention_is_that_of_a_loop_over_neighbours():
    attention = NeighbourhoodAttention(4).double()
    q, k, v = torch.randn(3, 1, 8, 5, 6, generator=torch.Generator().manual_seed(2)).double()
    expected = slow_attention(*(x[0].numpy() for x in (3 * q, k, v)), heads=2)
    found = attention(3 * q, k, v).detach()
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-12)


def reference(state, config, lms, pan, mode):
    """The network once more: METHODS 2.3 with copies made by a convolution, in float64."""

    def conv(name, x, **options):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2, **options)

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        groups = x.reshape(len(x), config.groups, -1)
        centred = groups - groups.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        weight, bias = (state[f"{name}.{k}"].view(1, -1, 1, 1) for k in ("weight", "bias"))
        return scaled.reshape(x.shape) * weight + bias

    def layer_norm(x):
        centred = x - x.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()

    def silu(x):
        return x * torch.sigmoid(x)

    def resblock(name, x):
        h = conv(f"{name}.first.2", silu(norm(f"{name}.first.0", x)))
        gamma, beta = linear(f"{name}.modulation", silu(token))[:, :, None, None].chunk(2, 1)
        h = conv(f"{name}.second.2", silu(norm(f"{name}.norm", h) * (1 + gamma) + beta))
        return h + (conv(f"{name}.skip", x) if f"{name}.skip.weight" in state else x)

    def attention(name, q, k, v):
        d = config.head_width
        weight = state[f"{name}.weight"].reshape(9 * d, 1, 3, 3)

        def copies(x):
            heads = x.reshape(-1, d, *x.shape[-2:])
            made = F.conv2d(heads, weight, state[f"{name}.bias"].flatten(), padding=1, groups=d)
            return made.view(-1, d, 9, *x.shape[-2:])

        share = torch.einsum("ndhw,ndjhw->njhw", q.reshape(-1, d, *q.shape[-2:]), copies(k))
        share = torch.softmax(share / d**0.5, 1)
        return torch.einsum("njhw,ndjhw->ndhw", share, copies(v)).reshape(q.shape)

    def cm3a(name, x, ms, low, pan, wanted):
        seen = layer_norm(x)
        q = conv(f"{name}.query", torch.cat([seen, wanted], 1))
        k_pan = conv(f"{name}.key_pan", torch.cat([seen, low], 1))
        v_pan = conv(f"{name}.value_pan", torch.cat([seen, low, pan, pan - low], 1))
        k_ms, v_ms = conv(f"{name}.key_value_ms", torch.cat([seen, ms], 1)).chunk(2, 1)
        if config.scrambled_ms_keys:  # (h, w, channels) in memory, read as (channels, h, w)
            k_ms = torch.stack([torch.stack(list(k), -1).flatten().view(k.shape) for k in k_ms])
        if config.overwritten_pan_keys:
            k_pan = k_ms
        gates = linear(f"{name}.gates", silu(token))[:, :, None, None].chunk(2, 1)
        y_ms = conv(f"{name}.out_ms", attention(f"{name}.attention", q, k_ms, v_ms))
        y_pan = conv(f"{name}.out_pan", attention(f"{name}.attention", q, k_pan, v_pan))
        x = x + gates[0] * y_ms + gates[1] * y_pan
        h = F.gelu(conv(f"{name}.mlp.0", layer_norm(x)), approximate="tanh")
        return x + conv(f"{name}.mlp.2", h)

    def guides(level):
        def at(x):
            size = [n >> level for n in x.shape[-2:]]
            return F.interpolate(x, size, mode="bicubic", align_corners=False)

        wanted = torch.where((mode == MS_MODE).view(-1, 1, 1, 1), ms, low.expand_as(ms))
        return [at(x) for x in (ms, low, pan, wanted)]

    token = state["tokens"][mode]
    ms, pan = 2 * lms - 1, 2 * pan - 1
    low = low_pan(pan, config.ratio)
    h, skips = conv("entry", torch.cat([pan, ms, low, pan - low], 1)), []
    last = len(config.widths) - 1
    for k in range(last + 1):
        for i in range(config.blocks):
            h = resblock(f"encoder.{k}.blocks.{i}", h)
        if k >= config.attention_from:
            h = cm3a(f"encoder.{k}.attention", h, *guides(k))
        if k < last:
            skips.append(h)
            h = conv(f"downs.{k}", h, stride=2)
    for k in reversed(range(last)):
        up = (state[f"ups.{k}.weight"], state[f"ups.{k}.bias"])
        h = torch.cat([F.conv_transpose2d(h, *up, stride=2), skips[k]], 1)
        for i in range(config.blocks):
            h = resblock(f"decoder.{k}.blocks.{i}", h)
        if k >= config.attention_from:
            h = cm3a(f"decoder.{k}.attention", h, *guides(k))
    return conv("head.2", silu(norm("head.0", h)))


SHAPE = ("widths", "blocks", "token_width", "head_width", "groups", "expansion", "dropout")
RELEASE = replace(preset("release", "pan-crafter", 2).network, **{name: getattr(SMALL, name) for name in SHAPE})


@pytest.mark.parametrize(
    "config",
    [SMALL, replace(SMALL, blocks=2, random_shifts=True), replace(SMALL, attention_from=2, bands=3), RELEASE],
)
def test_forward_is_that_of_a_second_implementation(config):
    model, condition = network(config).double(), inputs(config).to(torch.float64)
    condition = replace(condition, ms=condition.lms[..., ::4, ::4])
    lms = base = condition.lms
    if config.bicubic_base:
        base = F.interpolate(condition.ms, scale_factor=4, mode="bicubic", align_corners=False)
    state = {name: x.detach() for name, x in model.state_dict().items()}
    expected = reference(state, config, base, condition.pan, BOTH)
    if config.bicubic_base:
        expected = expected / 2 + (base - lms) * (BOTH == MS_MODE).view(2, 1, 1, 1)
    found = answer(model, condition, BOTH).detach()
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


FLAGS = ("overwritten_pan_keys", "scrambled_ms_keys")


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_change_the_answer(flag):
    model, other = network(), PanCrafter(replace(SMALL, **{flag: True})).eval()
    other.load_state_dict(model.state_dict())
    assert (answer(model) - answer(other)).abs().max() > 1e-3


def test_random_shifts_are_no_neighbours():
    begins = [PanCrafter(replace(SMALL, random_shifts=flag)) for flag in (False, True)]
    for model, random in zip(begins, (False, True), strict=True):
        weight = model.encoder[1].attention.attention.weight
        assert torch.equal(weight, torch.eye(9).expand_as(weight)) != random
        assert weight.requires_grad and weight.abs().max() <= 1


@pytest.mark.parametrize("overwritten", [False, True])
def test_pan_keys_learn_unless_they_are_overwritten(overwritten):
    model = network(replace(SMALL, overwritten_pan_keys=overwritten))
    answer(model).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())  # DistributedDataParallel needs it
    for name, parameter in model.named_parameters():
        # A bias of all keys alike shifts all nine logits: the softmax does not see it.
        if "key_pan.weight" in name:
            assert bool(parameter.grad.any()) != overwritten
        elif "value_pan.weight" in name:
            assert parameter.grad.any()


def test_modes():
    model, condition = network(), inputs()
    both = answer(model, condition, BOTH)
    assert torch.equal(answer(model, condition)[0], both[0])  # the MS unless told
    assert (answer(model, condition) - both)[1].abs().max() > 1e-3
    noise = model(torch.randn(2, 2, 16, 24), torch.tensor([3, 400]), condition).x0
    assert torch.equal(noise, answer(model, condition))  # nothing is diffused


def test_what_does_not_fit_is_refused():
    model = network()
    for bad, says in [
        (Condition(torch.rand(1, 3, 16, 16), torch.rand(1, 1, 16, 16)), "lms has 3 bands, but"),
        (Condition(torch.rand(1, 2, 16, 16), torch.rand(1, 1, 8, 16)), "so pan must be"),
        (Condition(torch.rand(1, 2, 16, 12), torch.rand(1, 1, 16, 12)), "16 x 12 pixels, but"),
    ]:
        with pytest.raises(ValueError, match=says):
            answer(model, bad)
    for changes, says in [
        ({"groups": 3}, "groups 3 does not divide the width 8"),
        ({"head_width": 16}, "head_width 16 does not divide the width 8"),
        ({"attention_from": 4}, "attention_from 4 is none of the 4 scales"),
        ({"ratio": 1}, "a ratio of at least 2"),
        ({"bands": 0}, "bands must be at least 1"),
        ({"widths": (8,)}, "at least 2 widths"),
    ]:
        with pytest.raises(ValueError, match=says):
            replace(SMALL, **changes)


def test_low_pan_is_as_sharp_as_the_ms():
    even = torch.full((1, 1, 16, 16), 0.7)
    torch.testing.assert_close(low_pan(even, 4), even)
    # Of a wave at the MS's Nyquist frequency the MTF's gain is left, 0.3 at the samples' centres.
    wave = torch.cos(2 * np.pi * (torch.arange(192.0) - 1.5) / 8).expand(1, 1, 64, 192)
    inner = low_pan(wave, 4)[..., 33:-33]
    assert 0.25 < float(inner.abs().max()) < 0.31


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return (write_patches(folder / "train.h5", bands=2), write_patches(folder / "valid.h5", bands=2, seed=1))


def stage_of(files, options=None, config=SMALL, **data):
    made = patch_data([files[0]], [files[1]], **data)
    return PanCrafterStage(config, made, options or PanCrafterOptions(flips=False))


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("raw", [False, True])
def test_it_learns_ms_and_pan_by_their_distance(files, weight, raw):
    stage = stage_of(files, PanCrafterOptions(pan_weight=weight, raw_residual=raw))
    (batch,) = list(stage.batches(0, 1))
    model = network()
    found = stage.losses(model, batch, torch.Generator())
    assert list(found) == (["ms", "pan"] if weight else ["ms"])
    condition, mode = Condition(batch.lms, batch.pan), torch.full((4,), PAN_MODE)
    std = torch.ones(2) if raw else residual_std_of(stage.data.dataset)
    hrms = batch.lms + std.view(1, -1, 1, 1) * answer(model, condition)
    torch.testing.assert_close(
        found["ms"], ((hrms - batch.gt).abs() / std.view(1, -1, 1, 1)).mean(), rtol=1e-4, atol=1e-6
    )
    if weight:
        rebuilt = low_pan(batch.pan, 4) + stage.pan_std * answer(model, condition, mode)
        miss = (rebuilt - batch.pan.expand_as(rebuilt)).abs().mean() / stage.pan_std
        torch.testing.assert_close(found["pan"], weight * miss, rtol=1e-4, atol=1e-6)
        details = torch.cat([stage.data.dataset[i].pan for i in range(9)])
        details = details - low_pan(details, 4)
        expected = 1.0 if raw else float(details.square().mean().sqrt())
        assert stage.pan_std == pytest.approx(expected, rel=1e-5)


def test_losses_fall_and_the_card_is_whole(files, tmp_path):
    config = replace(QUICK, iterations=24, learning_rate=1e-2, warmup=4, validate_every=24)
    losses = run(stage_of(files), tmp_path / "run", config)
    for part in ("ms", "pan"):
        first, last = (np.mean([losses[i][part] for i in s]) for s in (range(1, 5), range(21, 25)))
        assert last < 0.8 * first
    model, card = load_model(tmp_path / "run" / "best.safetensors")
    assert type(model) is PanCrafter and model.config == SMALL
    assert (card.architecture, card.stage) == ("pan-crafter", "pan-crafter")
    assert (card.bands, card.ratios, card.steps, card.max_value) == (2, [4], 1, 2047)
    assert len(card.residual_std) == 2 and not card.self_conditioning
    assert {"ms", "pan", "score", "sam", "ergas", "psnr", "q2n"} <= story(tmp_path / "run")[-1].keys()


def test_resumed_equals_unbroken(files, tmp_path):
    config, options = replace(SMALL, dropout=0.2), PanCrafterOptions()
    assert_resumes(lambda: stage_of(files, options, config, flips=True), tmp_path)


def test_a_run_starts_from_another(files, tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", network(), CARD)
    still = replace(QUICK, iterations=1, learning_rate=0.0, ema=0.0, weight_decay=0.0)
    train(stage_of(files), still, tmp_path / "run", init=tmp_path / "a.safetensors")
    learnt, given = (load_model(tmp_path / p)[0] for p in ("run/last.safetensors", "a.safetensors"))
    kept, weights = learnt.state_dict(), given.state_dict()
    assert all(torch.equal(kept[name], weights[name]) for name in weights)
    wide = replace(SMALL, expansion=4)
    with pytest.raises(ModelMismatch, match=r"expansion 2 \(here 4\)"):
        train(stage_of(files, config=wide), QUICK, tmp_path / "b", init=tmp_path / "a.safetensors")


def test_files_that_it_cannot_learn_from(files, tmp_path):
    with pytest.raises(ModelMismatch, match="network takes 3 bands, the files hold 2"):
        stage_of(files, config=replace(SMALL, bands=3))
    with pytest.raises(ModelMismatch, match=r"takes the ratio 3, that of the files is 4; set"):
        stage_of(files, config=replace(SMALL, ratio=3))
    small = [write_patches(tmp_path / f"{n}.h5", bands=2, size=12) for n in ("train", "valid")]
    with pytest.raises(ModelMismatch, match="12 x 12 pixels, but the network needs multiples of 8"):
        stage_of(small)


def test_a_ratio_of_two(tmp_path):
    two = [write_patches(tmp_path / f"{n}.h5", bands=2, ratio=2) for n in ("train", "valid")]
    run(stage_of(two, config=replace(SMALL, ratio=2)), tmp_path / "run")
    assert read_card(tmp_path / "run" / "best.safetensors").ratios == [2]


CARD = Card(
    "pc", "pan-crafter", asdict(SMALL), "pan-crafter", bands=2, ratios=[4],
    residual_std=[0.02, 0.05],
)  # fmt: skip


def scene(size=(40, 32)):
    pair = make_pair(4, size, bands=2, seed=2)
    return pair.pan / 12, pair.ms / 12


def test_it_sharpens_arrays_of_any_size(tmp_path):
    path = tmp_path / "pc.safetensors"
    save_checkpoint(path, network(), CARD)
    tool = load_sharpener(str(path), seed=3)
    assert type(tool) is OnePassSharpener and not tool.local and not tool.has_uncertainty
    said = tool.provenance()
    assert (said["MODEL"], said["STEPS"]) == ("pc", "1") and "SEED" not in said
    for size in ((1, 1), (9, 6), (24, 16)):
        pan, ms = scene(size)
        done = sharpen_array(tool, pan, ms, max_value=1.0).hrms
        assert done.shape == (2, 4 * size[0], 4 * size[1]) and done.isfinite().all()
        other = sharpen_array(load_sharpener(str(path), seed=9), pan, ms, max_value=1.0).hrms
        assert torch.equal(done, other)
    plain = OnePassSharpener(PanCrafter(SMALL), CARD)
    pan, ms = scene((16, 16))
    lms = sharpen_array(plain, pan, ms, max_value=1.0).hrms
    assert (lms.view(2, 16, 4, 16, 4).mean((2, 4)) - ms).abs().mean() < 0.1 * ms.std()


def test_what_sharpening_refuses(tmp_path):
    tool = OnePassSharpener(network(), CARD, steps=1)
    with pytest.raises(ModelMismatch, match="MS has 4 bands, but model pc was trained for 2"):
        tool.check(4, 4)
    with pytest.raises(ModelMismatch, match="ratio is 3, but model pc serves 4"):
        tool.check(2, 3)
    with pytest.raises(ModelMismatch, match="answers in one pass, so 4 steps mean nothing"):
        OnePassSharpener(network(), CARD, steps=4)
    with pytest.raises(CheckpointError, match="residual_std of 1 bands"):
        OnePassSharpener(network(), replace(CARD, residual_std=[0.1]))


def test_it_sharpens_the_patches_of_a_file(files, tmp_path):
    """As validation does in training, which reads the same patches."""
    stage = stage_of(files)
    model = network(size=0.02)
    std = [float(v) for v in stage.residual_std]
    save_checkpoint(tmp_path / "pc.safetensors", model, replace(CARD, residual_std=std))
    file = PanCollectionFile(files[1])
    tool = load_network(str(tmp_path / "pc.safetensors"), needless=True, steps=4)
    assert tool.steps == 1
    patches = stage.data.valid[0]
    expected, sigma = stage.predict(model, patches, 0)
    assert sigma is None
    torch.testing.assert_close(image_sharpener(tool, file, 2047.0)(patches).hrms, expected.detach(), rtol=0, atol=1e-6)
