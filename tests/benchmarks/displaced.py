"""Sharpening of an MS that does not lie on its PAN: displacements planted in truths, scene by scene.

    python tests/benchmarks/displaced.py --imagery FOLDER [--only SCENES] [--cases CASES] [--methods generic,gsa]

A truth (MS of a real pair, or a reduced scene) has its PAN degraded onto its grid, the pair's own displacement taken
out. The low MS is the truth blurred (gain 0.3 at its Nyquist frequency) and sampled at displaced places. Prints, for
each case, ERGAS over that of the same pixels without displacement, by `--coregister` off, global and auto, geometric
mean over the scenes. With --field it prints the rms error of the measured field instead, in PAN pixels, and with
--unlike what pairs of unlike content give.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio
from scipy.ndimage import binary_dilation, gaussian_filter, map_coordinates

import uknowpan
from uknowpan.models.registration import Registration, gain_to_sigma, register

RIM = 16
"""PAN pixels along the border that do not count."""
SCENES = (
    *("gf2_4", "quickbird_0", "pleiades_urban", "spot6_cropland", "vhr_melbourne_2", "vhr_melbourne_3"),
    *("wv3_shanghai", "landsat7_01", "landsat7_38", "vhr_rural_u8_1"),
)

CASES = {
    "nothing": ("", "nothing"),
    "global 5": ("", "global 5"),
    "linear 3": ("", "linear 3"),
    "smooth 2.5": ("", "smooth 2.5"),
    "step 1.5": ("", "step 1.5"),
    "bands 1.2": ("", "bands 1.2"),
    "cloud": ("cloud", "nothing"),
    "objects": ("objects", "nothing"),
    "noise": ("noise", "global 2"),
    "flat ground": ("noise, flat", "nothing"),
}
"""Name -> what disturbs, and the displacement of the ground."""

Field = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as dataset:
        return dataset.read().astype(np.float64)


def scene(imagery: Path, name: str) -> tuple[np.ndarray, np.ndarray, int]:
    """PAN (H, W), truth (C, H, W) on its grid, ratio."""
    pair = imagery / "pairs" / f"{name}_pan.tif"
    reduced = not pair.exists()
    folder, truths = ("reduced", "gt") if reduced else ("pairs", "ms")
    pan, truth = (read(imagery / folder / f"{name}_{kind}.tif") for kind in ("pan", truths))
    pan, ratio = pan[0], pan.shape[1] // truth.shape[1]
    own = register(pan, truth, ratio, least=0.0)
    print(f"{name}: own displacement {own.measured} {np.round(own.shift, 2)}, residual {own.residual:.2f}")
    grid = np.stack(np.meshgrid(*(np.arange(n) * 1.0 for n in truth.shape[1:]), indexing="ij"))
    place = own.pan_places(*(grid * ratio + (ratio - 1) / 2))
    # About as sharp as pixels of that size can be.
    low = map_coordinates(pan if reduced else gaussian_filter(pan, 0.45 * ratio), place, order=3, mode="nearest")
    beyond = (grid + shift.reshape(2, 1, 1) / ratio for shift in own.bands)
    truth = np.stack([map_coordinates(t, at, order=3, mode="nearest") for t, at in zip(truth, beyond, strict=True)])
    ratio = 4 if reduced else ratio
    side = [n // ratio * ratio for n in low.shape]
    return low[: side[0], : side[1]], truth[:, : side[0], : side[1]], ratio


def fields(h: int, w: int, bands: int) -> dict[str, Field]:
    u = lambda r: (r - (h - 1) / 2) / (h / 2)  # noqa: E731
    v = lambda c: (c - (w - 1) / 2) / (w / 2)  # noqa: E731
    off = np.random.default_rng(3).uniform(-1.2, 1.2, (bands, 2))

    def flat(dy: float, dx: float) -> Field:
        return lambda r, c, b: np.stack([dy + 0 * (r + c), dx + 0 * (r + c)])

    return {
        "nothing": flat(0, 0),
        "global 0.7": flat(0.5, -0.5),
        "global 2": flat(-1.2, 1.6),
        "global 5": flat(3.3, -3.75),
        "linear 3": lambda r, c, b: np.stack([0.5 + 2 * u(r) - 0.9 * v(c), -0.3 + 1.2 * u(r) + 1.5 * v(c)]),
        "smooth 2.5": lambda r, c, b: np.stack(
            [1.7 * np.sin(2.2 * u(r) + 0.6) * np.cos(1.7 * v(c)), 1.8 * np.cos(1.9 * u(r)) * np.sin(2.4 * v(c) - 0.4)]
        ),
        "step 1.5": lambda r, c, b: np.stack([np.where(v(c) + 0.3 * u(r) > 0.1, 1.5, 0.0), 0.0 * (r + c)]),
        "bands 1.2": lambda r, c, b: np.stack([off[b, 0] + 0 * (r + c), off[b, 1] + 0 * (r + c)]),
    }


def displaced(truth: np.ndarray, ratio: int, field: Field) -> np.ndarray:
    """Low MS whose content lies off by the field."""
    sigma = gain_to_sigma(0.3, ratio)
    h, w = truth.shape[1] // ratio, truth.shape[2] // ratio
    y = np.stack(np.meshgrid(*(np.arange(n) * ratio + (ratio - 1) / 2 for n in (h, w)), indexing="ij"))
    bands = []
    for b, plane in enumerate(truth):
        x = y.copy()
        for _ in range(8):
            x = y - field(x[0], x[1], b)
        bands.append(map_coordinates(gaussian_filter(plane, sigma, truncate=4), x, order=3, mode="nearest"))
    return np.stack(bands)


def cloud(
    pan: np.ndarray, ms: np.ndarray, ratio: int, shift: tuple[float, float], share: float = 0.25
) -> tuple[np.ndarray, ...]:
    """A bright cloud over a share of the scene, `shift` off in the MS. Returns PAN, MS and the PAN's cloudy pixels."""
    h, w = pan.shape
    rng = np.random.default_rng(1)
    noise = sum(gaussian_filter(rng.standard_normal((h, w)), s, mode="wrap") * s**1.7 for s in (2, 5, 12, 30))
    rows, cols = np.mgrid[:h, :w]
    blob = noise / noise.std() * 0.5 - (((rows - 0.3 * h) / (0.3 * h)) ** 2 + ((cols - 0.35 * w) / (0.3 * w)) ** 2)
    # Pixels of more than 5 % cover make up the share, the soft rim included.
    alpha = 1 / (1 + np.exp(-3 * (blob - np.quantile(blob, 1 - share)) - np.log(0.05 / 0.95)))
    texture = 1 + 0.08 * noise / noise.std()
    white = [np.percentile(x, 99) * 1.5 for x in (pan, *ms)]
    covered = pan * (1 - alpha) + alpha * white[0] * texture
    field = lambda r, c, b: np.stack([shift[0] + 0 * r, shift[1] + 0 * r])  # noqa: E731
    low_alpha, low_light = displaced(np.stack([alpha, alpha * texture]), ratio, field)
    veiled = np.stack([m * (1 - low_alpha) + wb * low_light for m, wb in zip(ms, white[1:], strict=True)])
    return covered, veiled, alpha > 0.05


def objects(pan: np.ndarray, ms: np.ndarray, ratio: int) -> tuple[np.ndarray, np.ndarray]:
    """Thirty bright and dark cars of 3 x 7 PAN pixels, moved by 4 to 8 pixels between PAN and MS."""
    rng = np.random.default_rng(5)
    before, after = np.zeros_like(pan), np.zeros_like(pan)
    for _ in range(30):
        r, c = (int(rng.integers(12, n - 24)) for n in pan.shape)
        size = (3, 7) if rng.random() < 0.5 else (7, 3)
        jump, sign = int(rng.integers(4, 9)), rng.choice([-1.0, 1.0])
        before[r : r + size[0], c : c + size[1]] = sign
        r, c = (r, c + jump) if size[1] > size[0] else (r + jump, c)
        after[r : r + size[0], c : c + size[1]] = sign
    low = displaced(after[None], ratio, lambda r, c, b: np.stack([0 * r, 0 * c]))[0]
    contrast = [2.5 * x.std() for x in (pan, *ms)]
    return pan + before * contrast[0], np.stack([m + low * k for m, k in zip(ms, contrast[1:], strict=True)])


def error(found: Registration, field: Field, pan: np.ndarray, bands: int, keep: np.ndarray | None = None) -> float:
    rows, cols = np.arange(pan.shape[0])[:, None] * 1.0, np.arange(pan.shape[1])[None, :] * 1.0
    squares = []
    for b in range(bands):
        off = found.at(rows, cols, b) - np.broadcast_arrays(field(rows, cols, b), np.zeros((2, *pan.shape)))[0]
        squares.append((off**2).sum(0)[... if keep is None else keep].mean())
    return float(np.sqrt(np.mean(squares)))


def unlike(scenes: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """PAN of one scene with the MS of another, turned; all cloud; all water."""
    rng = np.random.default_rng(4)
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for a, b in ((a, b) for a in scenes for b in scenes if a != b):
        h, w = (min(x, 4 * y) for x, y in zip(scenes[a][0].shape, scenes[b][1].shape[1:], strict=True))
        pairs[f"{a} / {b}"] = scenes[a][0][:h, :w], scenes[b][1][:, : h // 4, : w // 4]
    for k in range(4):
        puffs = [sum(gaussian_filter(rng.standard_normal((256, 256)), s) * s**1.5 for s in (2, 6, 15)) for _ in "pm"]
        bands = np.stack([puffs[1][1::4, 1::4] * g for g in (1.0, 0.9, 1.1, 1.0)])
        pairs[f"cloud {k}"] = puffs[0], bands + 0.02 * rng.standard_normal(bands.shape)
        waves = gaussian_filter(rng.standard_normal((256, 256)), (0.7, 2 + k))
        bands = rng.standard_normal((4, 64, 64)) + 2 * rng.standard_normal((64, 64))
        pairs[f"water {k}"] = waves, bands
    for name, (pan, ms) in pairs.items():
        found = register(pan, ms, 4)
        print(f"| {name} | {found.model} | {found.share:.2f} | {found.windows}/{found.voters} |", flush=True)


def spoiled(
    case: str, pan: np.ndarray, truth: np.ndarray, ratio: int, field: Field, *, still: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """PAN, MS and truth of a case, with what disturbs it; the truth is NaN where nothing can be right.

    `still`: clouds and objects do not move.
    """
    ms, rng = displaced(truth, ratio, field), np.random.default_rng(2)
    if case.startswith("cloud"):
        pan, ms, over = cloud(pan, ms, ratio, (0.0, 0.0) if still else (-3.0, 2.5))
        # Beside the cloud too, as far as its soft rim and its displacement reach.
        truth = np.where(binary_dilation(over, iterations=2 * ratio), np.nan, truth)
    if case.startswith("noise"):
        flat = 0.15 if case == "noise, flat" else 1.0
        pan = pan.mean() + flat * (pan - pan.mean()) + 0.1 * pan.std() * rng.standard_normal(pan.shape)
        level = truth.mean((1, 2), keepdims=True)
        noise = 0.05 * truth.std((1, 2))[:, None, None] * rng.standard_normal(ms.shape)
        ms, truth = level + flat * (ms - level) + noise, level + flat * (truth - level)
    if case == "objects":
        before = ms
        seen, ms = objects(pan, ms, ratio)
        moved = np.abs(ms - before).max(0) + np.abs(seen - pan).reshape(*before.shape[1:], -1).max(-1) > 0
        if still:
            seen, ms = pan, before
        pan, truth = seen, np.where(binary_dilation(moved.repeat(ratio, 0).repeat(ratio, 1)), np.nan, truth)
    return pan, ms, truth


def ergas(result: np.ndarray, truth: np.ndarray, ratio: int) -> float:
    """ERGAS where the truth is known, without the border."""
    inner = (slice(None), slice(RIM, -RIM), slice(RIM, -RIM))
    result, truth = result[inner], truth[inner]
    keep = np.isfinite(truth).all(0)
    errors = ((result - truth)[:, keep] ** 2).mean(1) / truth[:, keep].mean(1) ** 2
    return float(100 / ratio * np.sqrt(errors.mean()))


def compare(options: argparse.Namespace) -> None:
    """The table of ERGAS over that without displacement."""
    modes = options.modes.split(",")
    rows: dict[tuple[str, str], list[list[float]]] = {}
    for name in options.only.split(","):
        pan, truth, ratio = scene(options.imagery, name)
        pan, truth = (x[..., : options.size, : options.size] for x in (pan, truth))
        planted = fields(*pan.shape, len(truth))
        bases: dict[tuple[str, str], float] = {}
        for case, (kind, on) in CASES.items():
            if options.cases and case not in options.cases.split(","):
                continue
            seen, ms, right = spoiled(kind, pan, truth, ratio, planted[on])
            for method in options.methods.split(","):
                words = {} if method == "generic" else {"method": method}
                if (kind, method) not in bases:
                    good, low, _ = spoiled(kind, pan, truth, ratio, planted["nothing"], still=True)
                    done = uknowpan.sharpen_array(good, low, coregister="off", **words)
                    bases[kind, method] = ergas(done, right, ratio)
                scores = []
                for mode in modes:
                    done = uknowpan.sharpen_array(seen, ms, coregister=mode, **words)
                    scores.append(ergas(done, right, ratio) / bases[kind, method])
                rows.setdefault((case, method), []).append(scores)
                print(f"| {name} | {case} | {method} | {' | '.join(f'{s:.3f}' for s in scores)} |", flush=True)
    print(f"| case | method | {' | '.join(modes)} | scenes |")
    for (case, method), scores in rows.items():
        means = np.exp(np.log(scores).mean(0))
        print(f"| {case} | {method} | {' | '.join(f'{m:.3f}' for m in means)} | {len(scores)} |")


def measure(options: argparse.Namespace) -> None:
    """The table of errors of the measured field."""
    for name in options.only.split(","):
        pan, truth, ratio = scene(options.imagery, name)
        planted = fields(*pan.shape, len(truth))
        for case, (kind, on) in CASES.items():
            if options.cases and case not in options.cases.split(","):
                continue
            seen, ms, right = spoiled(kind, pan, truth, ratio, planted[on])
            start = time.process_time()
            found = register(seen, ms, ratio)
            seconds = time.process_time() - start
            print(
                f"| {name} | {case} | {error(found, planted[on], pan, len(truth), np.isfinite(right[0])):.2f} |"
                f" {found.model}{' and bands' if found.own_bands else ''} | {found.measured} | {found.share:.2f} |"
                f" {found.windows}/{found.voters} | {found.residual:.2f} | {seconds:.1f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imagery", type=Path, required=True)
    parser.add_argument("--only", default=",".join(SCENES))
    parser.add_argument("--cases", default="")
    parser.add_argument("--methods", default="generic,gsa")
    parser.add_argument("--modes", default="off,global,auto")
    parser.add_argument("--size", type=int, default=512, help="PAN pixels of a scene's side")
    parser.add_argument("--field", action="store_true")
    parser.add_argument("--unlike", action="store_true")
    options = parser.parse_args()
    if options.unlike:
        names = [n for n in options.only.split(",") if not n.startswith("landsat7")]
        chosen = {n: scene(options.imagery, n) for n in names[:4]}
        none = lambda r, c, b: np.stack([0 * r, 0 * r])  # noqa: E731
        unlike({n: (pan, displaced(truth[:4], 4, none)) for n, (pan, truth, _) in chosen.items()})
    elif options.field:
        measure(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
