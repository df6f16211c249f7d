"""Tiny georeferenced rasters for tests; `conftest.make_pair` puts them together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.warp import transform as transform_points

from uknowpan.tiling import Grid, MsMeta, encode

UTM = "EPSG:32631"
ORIGIN = (500_000.0, 5_000_000.0)


@dataclass(frozen=True)
class RasterPair:
    """Paths of a written pair and the values in it."""

    pan: str
    ms: list[str]
    pan_values: np.ndarray
    """(H, W)"""
    ms_values: np.ndarray
    """(C, h, w)"""
    ratio: int


def ground(x: np.ndarray, y: np.ndarray, res: float) -> np.ndarray:
    """A smooth landscape as a function of map position, so that a misplaced pixel shows."""
    u, v = (x - ORIGIN[0]) / res, (y - ORIGIN[1]) / res
    return 1000 + 300 * np.sin(u / 9) + 200 * np.cos(v / 11) + u


def gain(band: int) -> float:
    return 1 + 0.25 * band


def centres(transform: Affine, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    rows, cols = np.mgrid[: shape[0], : shape[1]] + 0.5
    return (
        transform.a * cols + transform.b * rows + transform.c,
        transform.d * cols + transform.e * rows + transform.f,
    )


def write_raster(
    path: Path,
    values: np.ndarray,
    transform: Affine | None,
    *,
    crs: str | None = UTM,
    nodata: float | None = None,
    descriptions: Sequence[str] | None = None,
    colorinterp: Sequence[ColorInterp] | None = None,
    mask: np.ndarray | None = None,
    tags: dict[str, str] | None = None,
    **creation: object,
) -> str:
    """Write (C, H, W) values as a GeoTIFF and return its path."""
    place = (
        {"transform": transform, "crs": crs} if transform is not None else {"crs": crs} if "gcps" in creation else {}
    )
    count, height, width = values.shape
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(
            path, "w", driver="GTiff", count=count, height=height, width=width,
            dtype=values.dtype, nodata=nodata, **place, **creation,
        ) as dataset,
    ):  # fmt: skip
        if descriptions:
            dataset.descriptions = descriptions
        if colorinterp:  # before the pixels: a GeoTIFF fixes its extra samples then
            dataset.colorinterp = colorinterp
        dataset.write(values)
        if mask is not None:
            dataset.write_mask(mask)
        if tags:
            dataset.update_tags(**tags)
    return str(path)


def write_vrt(path: Path, source: str) -> str:
    """Write a VRT of all bands of a raster and return its path."""
    with rasterio.open(source) as data:
        bands = "".join(
            f'<VRTRasterBand dataType="UInt16" band="{b}"><SimpleSource><SourceFilename>{source}</SourceFilename>'
            f"<SourceBand>{b}</SourceBand></SimpleSource></VRTRasterBand>"
            for b in data.indexes
        )
        place = ", ".join(map(str, data.transform.to_gdal()))
        path.write_text(
            f'<VRTDataset rasterXSize="{data.width}" rasterYSize="{data.height}"><SRS>{data.crs}</SRS>'
            f"<GeoTransform>{place}</GeoTransform>{bands}</VRTDataset>"
        )
    return str(path)


def reproject_transform(transform: Affine, crs: str | None, to: str, res: float) -> Affine:
    """A north-up grid in another CRS with the same corner, pixels about as large."""
    step = 100 * res
    xs, ys = transform_points(crs, to, [transform.c, transform.c + step], [transform.f, transform.f])
    size = np.hypot(xs[1] - xs[0], ys[1] - ys[0]) / 100
    return Affine.translation(xs[0], ys[0]) @ Affine.scale(size, -size)


def plain_grid(height: int = 70, width: int = 50, **changes: str) -> Grid:
    return Grid(CRS.from_epsg(32631), Affine(0.5, 0, ORIGIN[0], 0, -0.5, ORIGIN[1]), width, height, **changes)


def plain_meta(bands: int = 4, dtype: str = "uint16", nodata: float | None = None, **changes: object) -> MsMeta:
    """Metadata of an MS that declares nothing but what is given."""
    none, grey = (None,) * bands, (ColorInterp.gray,) + (ColorInterp.undefined,) * (bands - 1)
    values = {"descriptions": none, "colorinterp": grey, "scales": (1.0,) * bands, "offsets": (0.0,) * bands,
              "units": none, "band_tags": ({},) * bands, "tags": {}, "nbits": None}  # fmt: skip
    return MsMeta(dtype=dtype, nodata=nodata, **{**values, **changes})


def typed(values: np.ndarray, to: np.dtype) -> np.ndarray:
    """Values as another dtype; 8 bits get a sixteenth of them."""
    if to.itemsize == 1:
        values = values / 16
    return (np.rint(values) if to.kind in "iu" else values).astype(to)


def with_alpha(values: np.ndarray, flags: np.ndarray | None) -> np.ndarray:
    """MS values (C, h, w) and an alpha band, which is 0 where the flags are."""
    top = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 255
    alpha = (flags if flags is not None else np.full(values.shape[1:], 255)) > 0
    return np.concatenate([values, (alpha * top)[None].astype(values.dtype)])


def write_pair(
    folder: Path,
    *,
    name: str = "scene",
    ratio: float = 4,
    ms_shape: tuple[int, int] = (24, 20),
    pan_shape: tuple[int, int] | None = None,
    bands: int = 4,
    dtype: str = "uint16",
    pan_dtype: str | None = None,
    nodata: float | None = None,
    pan_nodata: float | None = None,
    holes: np.ndarray | None = None,
    pan_holes: np.ndarray | None = None,
    mask: str | None = None,
    offset: tuple[float, float] = (0, 0),
    res: float = 0.5,
    crs: str | None = UTM,
    ms_crs: str | None = None,
    rotation: float = 0,
    georeferenced: tuple[bool, bool] = (True, True),
    noise: float = 0,
    **files: object,
) -> RasterPair:
    """Write NAME_pan.tif and NAME_ms.tif.

    offset: PAN pixels (dy, dx) from the PAN's corner to the MS's. holes: (h, w) bool, set to
    nodata, or with mask="mask"|"alpha" marked there. georeferenced: (PAN, MS). files: see `write_ms`.
    """
    kind, pan_kind = np.dtype(dtype), np.dtype(pan_dtype or dtype)
    if pan_shape is None:
        pan_shape = (round(ms_shape[0] * ratio), round(ms_shape[1] * ratio))
    pan_place = Affine.translation(*ORIGIN) @ Affine.rotation(rotation) @ Affine.scale(res, -res)
    ms_place = pan_place @ Affine.translation(offset[1], offset[0]) @ Affine.scale(ratio)
    if ms_crs:
        ms_place = reproject_transform(ms_place, crs, ms_crs, res * ratio)
    rng = np.random.default_rng(0)

    def sample(transform: Affine, shape: tuple[int, int], own_crs: str | None) -> np.ndarray:
        x, y = centres(transform, shape)
        if own_crs != crs:
            xs, ys = transform_points(own_crs, crs, x.ravel(), y.ravel())
            x, y = np.reshape(xs, shape), np.reshape(ys, shape)
        return ground(x, y, res) + noise * rng.normal(size=shape)

    pan = typed(sample(pan_place, pan_shape, crs), pan_kind)
    level = sample(ms_place, ms_shape, ms_crs or crs)
    ms = np.stack([typed(gain(b) * level, kind) for b in range(bands)])
    if pan_holes is not None:
        pan[pan_holes] = pan_nodata
    flags = np.where(holes, 0, 255).astype("uint8") if holes is not None and mask else None
    if holes is not None and not mask:
        ms[:, holes] = nodata
    places = [place if known else None for place, known in zip((pan_place, ms_place), georeferenced, strict=True)]
    pan_path = write_raster(folder / f"{name}_pan.tif", pan[None], places[0], crs=crs, nodata=pan_nodata)
    files |= {"mask": mask, "flags": flags, "crs": ms_crs or crs, "nodata": nodata}
    return RasterPair(pan_path, write_ms(folder / f"{name}_ms", ms, places[1], **files), pan, ms, round(ratio))


def write_ms(
    stem: Path,
    values: np.ndarray,
    place: Affine | None,
    *,
    separate: bool = False,
    mask: str | None = None,
    flags: np.ndarray | None = None,
    descriptions: Sequence[str] | None = None,
    colorinterp: Sequence[ColorInterp] | None = None,
    **common: object,
) -> list[str]:
    """Write STEM.tif, or STEM1.tif and so on if separate; return the paths."""
    if separate:
        return [
            write_raster(stem.with_name(f"{stem.name}{b + 1}.tif"), values[b : b + 1], place, **common)
            for b in range(len(values))
        ]
    if mask == "alpha":
        colorinterp = [ColorInterp.gray] + [ColorInterp.undefined] * (len(values) - 1) + [ColorInterp.alpha]
        values = with_alpha(values, flags)
    marks = {"descriptions": descriptions, "colorinterp": colorinterp, "mask": flags if mask == "mask" else None}
    return [write_raster(stem.with_name(f"{stem.name}.tif"), values, place, **marks, **common)]


def textured(size: int, seed: int = 3) -> np.ndarray:
    """(3, size, size) float64 around 600: 1/f noise with roofs, in bands that differ."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1

    def field() -> np.ndarray:
        values = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(size, size))) / frequency**1.2)
        return values / values.std()

    shared = field()
    scene = np.stack([shared + 0.4 * field() for _ in range(3)])
    for _ in range(60):
        (row, col), (height, width) = rng.integers(size, size=2), rng.integers(3, 24, size=2)
        scene[:, row : row + height, col : col + width] += 2 * rng.normal()
    return 600 + 60 * scene


def observed(truth: np.ndarray, ratio: int, folder: Path, shift: tuple[int, int] = (0, 0)) -> RasterPair:
    """Write PAN and MS of a truth; the MS content lies `shift` PAN pixels too far down and right."""
    pan = truth.mean(0, keepdims=True).round().astype("uint16")
    h, w = (n // ratio for n in truth.shape[1:])
    ms = np.roll(truth, shift, (1, 2)).reshape(-1, h, ratio, w, ratio).mean((2, 4)).round().astype("uint16")
    corner = Affine.translation(*ORIGIN)
    pan_path = write_raster(folder / "t_pan.tif", pan, corner @ Affine.scale(1, -1))
    ms_path = write_raster(folder / "t_ms.tif", ms, corner @ Affine.scale(ratio, -ratio))
    return RasterPair(pan_path, [ms_path], pan[0], ms, ratio)


def write_rows(writer, row, values, valid):
    """Encode and write rows (C, n, W) with validity (n, W), beginning at output row `row`."""
    writer.write_encoded(row, encode(values, valid, writer.encoding))
