"""Make teacher.npz: what PriorNet and the published teacher must answer, without their code.

As in make_golden.py: the networks once more as plain functions in float64, with PyWavelets for
the wavelets and numpy for the Fourier transform; only the names of the weights are shared.
"""

from pathlib import Path

import numpy as np
import pywt
import torch
import torch.nn.functional as F
from make_golden import SEED, TIMESTEPS, seeded_state

from uknowpan.models.published.uknow.prior import PriorConfig, PriorNet
from uknowpan.models.published.uknow.teacher import FSATeacher, TeacherConfig

SIZE = (16, 32)
PRIOR_CASES = {
    "published": PriorConfig(bands=3, width=8, blocks=2, highpass_pan=True, variance_floor=0),
    "ours": PriorConfig(bands=3, width=8, blocks=2),
}
SHAPE = {"bands": 3, "width": 8, "heads": 4, "blocks": 1}
TEACHER_CASES = {
    "published": TeacherConfig(**SHAPE, highpass_pan=True, variance_floor=0, dead_prior=True),
    "folded": TeacherConfig(**SHAPE, patch=2),
}


def seeded_inputs(bands):
    """x_t, lms, pan, self_cond, prior_mean and prior_variance for two images, float64."""
    rng = np.random.default_rng(SEED + 2)
    names = {"x_t": bands, "lms": bands, "pan": 1, "self_cond": bands, "prior_mean": bands}
    inputs = {k: torch.from_numpy(rng.standard_normal((2, c, *SIZE))) for k, c in names.items()}
    inputs["prior_variance"] = torch.from_numpy(rng.random((2, bands, *SIZE)))
    return inputs


def softplus(x):
    return torch.log1p(torch.exp(x))


def swish(x):
    return x / (1 + torch.exp(-x))


def highpass(pan):
    mirrored = F.pad(pan, (2, 2, 2, 2), mode="reflect")
    return pan - mirrored.unfold(2, 5, 1).unfold(3, 5, 1).mean((-1, -2))


class Layers:
    """Layers by the names of their weights."""

    def __init__(self, state):
        self.state = state

    def __contains__(self, name):
        return f"{name}.weight" in self.state

    def conv(self, name, x, stride=1, groups=1):
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=groups)

    def norm(self, name, x):
        centred = x - x.mean((1, 2, 3), keepdim=True)
        scaled = centred / (centred.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return scaled * weight[:, None, None] + bias[:, None, None]

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state.get(f"{name}.bias", 0)

    def separable(self, name, x):
        return self.conv(f"{name}.1", self.conv(f"{name}.0", x, groups=x.shape[1]))


def reference_prior(state, config, lms, pan):
    """Mean and variance."""
    net = Layers(state)
    pans = [highpass(pan)] if config.highpass_pan else [highpass(pan), pan]
    h = net.conv("entry", torch.cat([lms, *pans], 1)).clamp(min=0)
    for block in range(config.blocks):
        inner = h
        for i in range(3):
            inner = net.conv(f"blocks.{block}.{i}.0", inner).clamp(min=0)
        h = h + inner
    out = net.conv("head", h)
    c = config.bands
    return lms + out[:, :c], softplus(out[:, c:]) + config.variance_floor


def reference_wavelets(lms, pan):
    ll = np.stack([[pywt.swt2(b.numpy(), "db1", 1)[0][0] for b in image] for image in lms])
    details = []
    for image in pan:
        _, (horizontal, vertical, diagonal) = pywt.swt2(image[0].numpy(), "db1", 1)[0]
        details.append([horizontal, diagonal, vertical])
    return torch.from_numpy(np.concatenate([ll, np.array(details)], 1))


def reference_teacher(state, config, x_t, lms, pan, self_cond, prior_mean, prior_variance):
    """x0, log_sigma and the six features, for four levels with attention at the last."""
    net = Layers(state)
    heads, keep = config.heads, config.bands

    def leaky(name, x):
        x = net.conv(f"{name}.0", x)
        return torch.where(x > 0, x, 0.1 * x)

    def resnet(name, x):
        h = net.conv(f"{name}.first.2", swish(net.norm(f"{name}.first.0", x)))
        h = h + net.linear(f"{name}.time", embedded)[:, :, None, None]
        h = net.conv(f"{name}.second.3", swish(net.norm(f"{name}.second.0", h)))
        return h + (net.conv(f"{name}.skip", x) if f"{name}.skip" in net else x)

    def self_attention(name, x):
        b, c, height, width = x.shape
        parts = []
        qkv = net.conv(f"{name}.qkv", net.norm(f"{name}.norm", x)).flatten(2)
        for part in qkv.chunk(heads, 1):
            q, k, v = part.chunk(3, 1)
            parts.append(v @ torch.softmax(q.mT @ k / c**0.5, -1).mT)
        return x + net.conv(f"{name}.out", torch.cat(parts, 1).reshape(b, c, height, width))

    def feed_forward(name, x):
        h = net.conv(f"{name}.branch.2", swish(net.conv(f"{name}.branch.0", x)))
        return x + net.conv(f"{name}.branch.3", h)

    def inject(name, x):
        shift, scale = net.linear(f"{name}.modulate.1", swish(prior))[..., None, None].chunk(2, 1)
        u = x * (1 + scale) + shift
        gate = net.separable(f"{name}.gate", u)
        gate = gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
        return net.conv(f"{name}.out", net.separable(f"{name}.value", u) * gate + x)

    def half_spectrum(x):
        """(B, heads, d, rows, cols) complex, by the whole transform; phases of real bins 0, pi."""
        height, width = x.shape[-2:]
        x = x / x.square().sum(1, keepdim=True).sqrt()
        z = np.fft.fft2(x.numpy(), norm="ortho")[..., : width // 2 + 1]
        for row in (0, height // 2):
            for col in (0, width // 2):
                z[..., row, col] = z[..., row, col].real
        return z.reshape(len(z), heads, -1, *z.shape[-2:])

    def frequency(name, x):
        b, c, height, width = x.shape
        x = net.norm(f"{name}.norm", x)
        q, k, v = (half_spectrum(part) for part in net.separable(f"{name}.qkv", x).chunk(3, 1))
        polar = []
        for part in (np.abs, np.angle):
            scores = np.einsum("bhdrc,bherc->bhde", part(q), part(k)) / (c / heads) ** 0.5
            weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            polar.append(np.einsum("bhde,bherc->bhdrc", weights, part(v)))
        mixed = (polar[0] * np.exp(1j * polar[1])).reshape(b, c, height, -1)
        back = torch.from_numpy(np.fft.irfft2(mixed, (height, width), norm="ortho"))
        return feed_forward(f"{name}.feed_forward", net.conv(f"{name}.out", back) + x)

    def cross(name, x, wavelets, order):
        b, c, height, width = x.shape
        x = net.norm(f"{name}.norm", x)
        first, second = net.separable(f"{name}.wavelets", wavelets).chunk(2, 1)
        q, k, v = order(net.separable(f"{name}.features", x), first, second)
        k = torch.exp(k) / torch.exp(k).sum(2, keepdim=True)
        v = torch.exp(v) / torch.exp(v).sum(3, keepdim=True) / (c / heads) ** 0.5
        q, k, v = (part.reshape(b, heads, -1, height, width) for part in (q, k, v))
        between = torch.einsum("bhdyx,bheyx->bhde", q, k)
        mixed = torch.einsum("bhde,bhdyx->bheyx", between, v).reshape(b, c, height, width)
        skip = net.conv(f"{name}.skip", x) if f"{name}.skip" in net else x
        return feed_forward(f"{name}.feed_forward", net.conv(f"{name}.out", mixed) + skip)

    def fold(x):
        """Each square of patch x patch pixels to channels, its rows and columns within a band."""
        p = config.patch
        b, c, height, width = x.shape
        x = x.reshape(b, c, height // p, p, width // p, p).permute(0, 1, 3, 5, 2, 4)
        return x.reshape(b, c * p * p, height // p, width // p)

    half = config.width // 2
    angles = torch.tensor(TIMESTEPS).double()[:, None] * 10000.0 ** (-torch.arange(half) / half)
    embedded = torch.cat([angles.sin(), angles.cos()], 1)
    embedded = net.linear("time.mlp.2", swish(net.linear("time.mlp.0", embedded)))

    h = leaky("prior.entry", fold(torch.cat([prior_mean, prior_variance], 1)))
    for block in range(3):
        inner = net.conv(f"prior.blocks.{block}.0", h).clamp(min=0)
        h = h + net.conv(f"prior.blocks.{block}.2", inner).clamp(min=0)
    for i in range(3):
        h = leaky(f"prior.exit.{i}", h)
    prior = net.linear("prior.project.1", swish(h.mean((2, 3))))

    wavelets = reference_wavelets(lms, pan)
    pans = [highpass(pan)] if config.highpass_pan else [highpass(pan), pan]
    h = net.conv("unet.entry", fold(torch.cat([self_cond, lms, *pans, x_t], 1)))
    skips, features = [h], []
    for level in range(4):
        for block in range(config.blocks):
            name = f"unet.encoder.{level}.{block}"
            h = resnet(f"{name}.resnet", inject(f"{name}.inject", h))
            if level == 3:
                h = self_attention(f"{name}.attention", h)
            skips.append(h)
        if level < 3:
            features.append(h)
            h = net.conv(f"unet.downs.{level}.conv", h, stride=2)
            skips.append(h)
    h = self_attention("unet.middle.0.attention", resnet("unet.middle.0.blocks.0", h))
    h = resnet("unet.middle.1.blocks.0", h)
    for step in range(4):
        shrunk = F.interpolate(wavelets, h.shape[-2:], mode="bilinear", align_corners=False)
        for block in range(config.blocks + 1):
            name = f"unet.decoder.{step}.{block}"
            h = torch.cat([h, skips.pop()], 1)
            if step == 0:
                h = resnet(f"{name}.blocks.1", resnet(f"{name}.blocks.0", h))
                h = self_attention(f"{name}.attention", h)
            else:
                skip = net.conv(f"{name}.skip", h)
                h = frequency(f"{name}.frequency", resnet(f"{name}.first", h))
                h = cross(f"{name}.from_wavelets", h, shrunk, lambda x, a, b: (a, b, x))
                h = cross(f"{name}.to_wavelets", h, shrunk, lambda x, a, b: (x, a, b))
                h = resnet(f"{name}.second", h + skip)
        if step < 3:
            features.append(h)
            doubled = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            h = net.conv(f"unet.ups.{step}.conv", doubled)
    h = net.conv("head.2", swish(net.norm("head.0", h)))
    b, c, height, width = h.shape
    p = config.patch
    h = h.reshape(b, c // p**2, p, p, height, width).permute(0, 1, 4, 2, 5, 3)
    h = h.reshape(b, c // p**2, height * p, width * p)
    variance = softplus(h[:, keep:]) + config.variance_floor
    return h[:, :keep], 0.5 * torch.log(variance), features


def shapes_of(network, config):
    with torch.device("meta"):
        return {k: v.shape for k, v in network(config).state_dict().items()}


def main():
    golden = {}
    for case, config in PRIOR_CASES.items():
        inputs = seeded_inputs(config.bands)
        state = seeded_state(shapes_of(PriorNet, config))
        said = reference_prior(state, config, inputs["lms"], inputs["pan"])
        for name, values in zip(("mean", "variance"), said, strict=True):
            golden[f"prior_{case}_{name}"] = values.numpy().astype(np.float32)
    for case, config in TEACHER_CASES.items():
        state = seeded_state(shapes_of(FSATeacher, config))
        x0, log_sigma, features = reference_teacher(state, config, **seeded_inputs(config.bands))
        golden[f"{case}_x0"] = x0.numpy().astype(np.float32)
        golden[f"{case}_log_sigma"] = log_sigma.numpy().astype(np.float32)
        golden[f"{case}_features"] = np.array([f.square().mean().sqrt() for f in features])
    np.savez_compressed(Path(__file__).with_name("teacher.npz"), **golden)


if __name__ == "__main__":
    main()
