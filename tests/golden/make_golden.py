"""Make student.npz: what the published student must answer, without its code.

`reference_student` is the network of the paper written once more, as a plain function in float64
with explicit softmax attention; it shares only the names of the weights with `uknowpan.models`.
The weights are not stored: `seeded_state` makes them from the seed. Run this file to write the
golden file anew, only if the network is meant to change.

The files in metrics/ come from the DLPan toolbox itself, see the README there.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from uknowpan.models.published.uknow.student import FSAStudent, StudentConfig

SEED = 2025
SIZE = (16, 24)
TIMESTEPS = (3, 240)
CASES = {
    "published": StudentConfig(bands=3, width=8, heads=4, highpass_pan=True),
    "ours": StudentConfig(bands=3, width=8, heads=4),
}


def seeded_state(shapes):
    """Float64 weights by name: 1 + 0.1 N for scales, 0.1 N for biases, N / sqrt(fan-in) else."""
    rng, state = np.random.default_rng(SEED), {}
    for name in sorted(shapes):
        values = rng.standard_normal(tuple(shapes[name]))
        if name.endswith("bias"):
            values *= 0.1
        elif values.ndim == 1:
            values = 1 + 0.1 * values
        else:
            values /= np.sqrt(values[0].size)
        state[name] = torch.from_numpy(values)
    return state


def seeded_inputs(bands):
    """x_t, lms, pan and a slot of self-conditioning for two images, float64."""
    rng = np.random.default_rng(SEED + 1)
    shapes = {"x_t": bands, "lms": bands, "pan": 1, "self_cond": bands}
    return {k: torch.from_numpy(rng.standard_normal((2, c, *SIZE))) for k, c in shapes.items()}


def reference_student(state, config, x_t, lms, pan, self_cond=None):
    """x0 and the six features, for four levels with attention at the last."""

    def conv(name, x, stride=1):
        weight = state[f"{name}.weight"]
        pad = weight.shape[-1] // 2
        return F.conv2d(x, weight, state.get(f"{name}.bias"), stride=stride, padding=pad)

    def norm(name, x):
        centred = x - x.mean((1, 2, 3), keepdim=True)
        scaled = centred / (centred.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return scaled * weight[:, None, None] + bias[:, None, None]

    def swish(x):
        return x / (1 + torch.exp(-x))

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def resnet(name, x):
        h = conv(f"{name}.first.2", swish(norm(f"{name}.first.0", x)))
        h = h + linear(f"{name}.time", embedded)[:, :, None, None]
        h = conv(f"{name}.second.3", swish(norm(f"{name}.second.0", h)))
        return h + (conv(f"{name}.skip", x) if f"{name}.skip.weight" in state else x)

    def attention(name, x):
        b, c, height, width = x.shape
        heads = []
        per_head = conv(f"{name}.qkv", norm(f"{name}.norm", x)).flatten(2).chunk(config.heads, 1)
        for part in per_head:
            q, k, v = part.chunk(3, 1)  # (B, c / heads, HW)
            scores = torch.softmax(q.mT @ k / c**0.5, dim=-1)
            heads.append(v @ scores.mT)
        return x + conv(f"{name}.out", torch.cat(heads, 1).reshape(b, c, height, width))

    def chain(name, x, count, attend):
        for i in range(count):
            x = resnet(f"{name}.blocks.{i}", x)
        return attention(f"{name}.attention", x) if attend else x

    half = config.width // 2
    angles = torch.tensor(TIMESTEPS).double()[:, None] * 10000.0 ** (-torch.arange(half) / half)
    embedded = torch.cat([angles.sin(), angles.cos()], 1)
    embedded = linear("time.mlp.2", swish(linear("time.mlp.0", embedded)))

    mirrored = F.pad(pan, (2, 2, 2, 2), mode="reflect")
    local_mean = mirrored.unfold(2, 5, 1).unfold(3, 5, 1).mean((-1, -2))
    details = pan - local_mean
    pans = [details] if config.highpass_pan else [details, pan]
    slot = x_t if self_cond is None else self_cond

    h = conv("unet.entry", torch.cat([slot, lms, *pans, x_t], 1))
    skips, features = [h], []
    for level in range(4):
        for block in range(2):
            h = chain(f"unet.encoder.{level}.{block}", h, 2, level == 3)
            skips.append(h)
        if level < 3:
            features.append(h)
            h = conv(f"unet.downs.{level}.conv", h, stride=2)
            skips.append(h)
    h = chain("unet.middle.0", h, 2, True)
    h = chain("unet.middle.1", h, 2, False)
    for step in range(4):
        deepest = step == 0
        for block in range(3):
            h = torch.cat([h, skips.pop()], 1)
            h = chain(f"unet.decoder.{step}.{block}", h, 2 if deepest else 3, deepest)
        if step < 3:
            features.append(h)
            doubled = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            h = conv(f"unet.ups.{step}.conv", doubled)
    return conv("head.2", swish(norm("head.0", h))), features


def main():
    golden = {}
    for case, config in CASES.items():
        with torch.device("meta"):
            shapes = {k: v.shape for k, v in FSAStudent(config).state_dict().items()}
        inputs = seeded_inputs(config.bands)
        if case == "ours":
            del inputs["self_cond"]
        x0, features = reference_student(seeded_state(shapes), config, **inputs)
        golden[f"{case}_x0"] = x0.numpy()
        golden[f"{case}_features"] = np.array([f.square().mean().sqrt() for f in features])
    np.savez_compressed(Path(__file__).with_name("student.npz"), **golden)


if __name__ == "__main__":
    main()
