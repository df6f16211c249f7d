"""Where an MS raster lies on the PAN: ratio, nesting, displacement, resampling, and what is refused."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil, floor, hypot, isfinite, sqrt

from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.warp import transform as transform_points
from rasterio.warp import transform_bounds

from uknowpan.tiling.enlarged import interpolated_by, pixel_repeats
from uknowpan.tiling.errors import IncompatiblePair
from uknowpan.tiling.globe import Bounds, beside
from uknowpan.tiling.raster import GDAL_ERRORS, Raster, Remarks, Source, warped
from uknowpan.tiling.rpcs import AT_OFFSET, SensorMap, Surface, curved, map_by_rpcs
from uknowpan.tiling.window import Box, Frame, Grid, Window, crs_name, same_crs

MAX_RATIO = 8
_NEST_TOLERANCE = 0.01
"""PAN pixels; offsets and drift over the scene below it count as nested."""
_CONTEXT = 64
"""MS pixels around the frame up to which a resampled MS is looked at."""


@dataclass(frozen=True)
class Placement:
    """Where an MS raster lies, in PAN pixels of the whole PAN."""

    scale: tuple[float, float]
    """PAN pixels per MS pixel (y, x), positive"""
    box: Box
    affine: Affine | None
    """MS (col, row) -> PAN (col, row); None if the CRS differ"""
    transform: Affine
    """of the MS, as read or as assumed"""
    way: SensorMap | None = None
    """between MS and PAN, where RPCs place both"""

    def nested_offset(self, ms: Raster, ratio: int) -> tuple[int, int] | None:
        """(oy, ox) of the full frame under which the MS needs no resampling, or None."""
        a = self.affine
        if a is None:
            return None
        drift = max(abs(a.a - ratio) * ms.dataset.width, abs(a.e - ratio) * ms.dataset.height)
        off = max(abs(a.f - round(a.f)), abs(a.c - round(a.c)))
        if drift > _NEST_TOLERANCE or off > _NEST_TOLERANCE:
            return None
        return -round(a.f) % ratio, -round(a.c) % ratio

    def phase(self, ms: Raster, ratio: int) -> tuple[int, int]:
        """(oy, ox) of the full frame under which a resampled MS in sensor geometry is blurred least in its middle."""
        if self.way is None:
            return 0, 0
        x, y = self.way.affine @ (ms.dataset.width // 2, ms.dataset.height // 2)
        return -round(y) % ratio, -round(x) % ratio


def refuse_unplaced(pan: Raster, ms: Sequence[Raster]) -> None:
    """Refuse rasters placed by control points, and placing by RPCs or by a geotransform of one side only."""
    rasters = [pan, *ms]
    mapped = [raster for raster in rasters if raster.grid.rpcs is None]
    for raster in rasters:
        data = raster.dataset
        if data.transform.is_degenerate or not all(isfinite(v) for v in data.transform):
            raise IncompatiblePair(
                f"{raster.path} has a geotransform whose pixels have no area; give it one: gdal_edit.py -a_ullr."
            )
        if not data.transform.is_identity:
            continue
        points = len(data.gcps[0])
        if mapped and raster.grid.rpcs is not None:
            raise IncompatiblePair(
                f"{raster.path} is placed by RPCs and {mapped[0].path} is not; "
                "orthorectify it first: gdalwarp -rpc IN OUT."
            )
        if mapped and points:
            raise IncompatiblePair(
                f"{raster.path} is placed by {points} ground control points only; "
                "orthorectify it first: gdalwarp -tps IN OUT."
            )
    lost = [raster.path for raster in mapped if not raster.grid.is_placed]
    if lost and len(lost) <= len(ms):
        raise IncompatiblePair(
            f"{lost[0]} has no georeferencing but the other raster has; "
            "give it one: gdal_edit.py -a_srs CRS -a_ullr LEFT TOP RIGHT BOTTOM."
        )


def place_on_pan(whole: Grid, pan: Raster, ms: Raster, remarks: Remarks, surface: Surface = AT_OFFSET) -> Placement:
    """Find an MS raster on the whole PAN, of a pair in sensor geometry over a surface.

    Raises InputUnreadable, IncompatiblePair.
    """
    grid = ms.grid
    if whole.rpcs is not None:
        return _place_by_rpcs(whole, pan, ms, surface, remarks)
    if surface != AT_OFFSET:
        remarks.note(f"PAN and {ms.path} are no pair in sensor geometry: no height is needed.")
    if not grid.is_placed:
        return _place_by_size(whole, ms, remarks)
    if not same_crs(whole.crs, grid.crs):
        return _place_by_crs(whole, pan, ms, remarks)
    if whole.crs is None and grid.crs is None:
        remarks.assume(f"Neither the PAN nor {ms.path} names a CRS; one and the same is assumed.")
    elif whole.crs is None or grid.crs is None:
        lost, other = (pan, ms) if whole.crs is None else (ms, pan)
        remarks.assume(f"{lost.path} names no CRS; that of {other.path} is assumed.")
    turn = beside(grid.bounds, grid.crs, whole.bounds)[0] - grid.bounds[0]
    transform = Affine.translation(turn, 0) @ grid.transform
    affine = ~whole.transform @ transform
    skew = max(abs(affine.b) * grid.height, abs(affine.d) * grid.width)
    if skew > _NEST_TOLERANCE:
        raise IncompatiblePair(
            f"PAN and {ms.path} are rotated against each other ({skew:.2f} PAN pixels over the scene); "
            "warp both to a north-up grid first: gdalwarp IN OUT."
        )
    return Placement((abs(affine.e), abs(affine.a)), _outline(affine, grid.shape), affine, transform)


def _place_by_rpcs(whole: Grid, pan: Raster, ms: Raster, surface: Surface, remarks: Remarks) -> Placement:
    """Sensor geometry: the RPCs of PAN and MS, and the ground."""
    way = map_by_rpcs(pan, ms, surface)
    affine, (height, width) = way.affine, ms.grid.shape
    ground = f"the heights of {surface.dem}" if surface.dem else f"a height of {surface.at(pan):.10g} m"
    remarks.note(f"{ms.path} is placed on the PAN by the RPCs of both, at {ground}.")
    xs, ys = zip(*(affine @ (x, y) for x in (0, width) for y in (0, height)), strict=True)
    scale = hypot(affine.b, affine.e), hypot(affine.a, affine.d)
    slack = (way.left + 1) * max(scale)
    box = Box(min(ys) - slack, min(xs) - slack, max(ys) + slack, max(xs) + slack)
    if box.bottom <= 0 or box.right <= 0 or box.top >= whole.height or box.left >= whole.width:
        raise IncompatiblePair(
            f"PAN and {ms.path} do not overlap by their RPCs: the MS begins at row {min(ys):.0f}, column {min(xs):.0f} "
            "of the PAN; check that they show the same place."
        )
    bent = max(abs(affine.b) * height, abs(affine.d) * width, way.left * max(scale))
    return Placement(scale, box, affine if bent <= _NEST_TOLERANCE else None, affine, way)


def _place_by_size(whole: Grid, ms: Raster, remarks: Remarks) -> Placement:
    """No georeferencing at all: the same corner, if the sizes are exact multiples."""
    height, width = ms.grid.shape
    ry, rx = whole.height / height, whole.width / width
    if ry != rx or ry != int(ry):
        raise IncompatiblePair(
            f"Neither raster is georeferenced and the PAN's {whole.width} x {whole.height} pixels are "
            f"no exact multiple of the MS's {width} x {height}; georeference both."
        )
    remarks.assume(f"Neither raster is georeferenced: the same corner and a ratio of {int(ry)} are assumed.")
    affine = Affine.scale(ry)
    return Placement((ry, rx), _outline(affine, (height, width)), affine, affine)


def _outline(affine: Affine, shape: tuple[int, int]) -> Box:
    (x0, y0), (x1, y1) = affine @ (0, 0), affine @ (shape[1], shape[0])
    return Box(min(y0, y1), min(x0, x1), max(y0, y1), max(x0, x1))


def _place_by_crs(whole: Grid, pan: Raster, ms: Raster, remarks: Remarks) -> Placement:
    """Outline and pixel size of an MS in another CRS, through the inverse PAN transform."""
    grid, names = ms.grid, (crs_name(ms.grid.crs), crs_name(whole.crs))
    for raster in (pan, ms):
        transform = raster.dataset.transform
        if abs(transform.b) + abs(transform.d) > 1e-9 * raster.dataset.res[0]:
            raise IncompatiblePair(
                f"{raster.path} is rotated and the CRS differ; warp it to a north-up grid first: gdalwarp IN OUT."
            )
    remarks.note(f"{ms.path} is in {names[0]}, the PAN in {names[1]}: the MS is resampled to the PAN's.")
    try:
        back = beside(transform_bounds(whole.crs, grid.crs, *whole.bounds), grid.crs, ms.dataset.bounds)
        west, south, east, north = _common(back, ms.dataset.bounds)
        x, y = (west + east) / 2, (south + north) / 2
        xs, ys = transform_points(grid.crs, whole.crs, [x, x + grid.transform.a, x], [y, y, y + grid.transform.e])
        xs = [beside((x, 0, x, 0), whole.crs, whole.bounds)[0] for x in xs]
        box = beside(transform_bounds(grid.crs, whole.crs, west, south, east, north), whole.crs, whole.bounds)
    except GDAL_ERRORS as error:
        raise IncompatiblePair(
            f"{ms.path} in {names[0]} cannot be transformed to the PAN's {names[1]}; warp it first: gdalwarp -t_srs."
        ) from error
    (x0, y0), (xa, ya), (xb, yb) = cells = [~whole.transform @ p for p in zip(xs, ys, strict=True)]
    (x1, y1), (x2, y2) = corners = [~whole.transform @ p for p in [(box[0], box[3]), (box[2], box[1])]]
    if not all(isfinite(v) for p in [*cells, *corners] for v in p):
        raise _apart(whole, ms)
    scale = hypot(xb - x0, yb - y0), hypot(xa - x0, ya - y0)
    return Placement(scale, Box(min(y1, y2), min(x1, x2), max(y1, y2), max(x1, x2)), None, grid.transform)


def _common(a: Bounds, b: Bounds) -> Bounds:
    """Intersection of two bounds, or `b` where there is none (refused later, with numbers)."""
    west, south, east, north = (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return (west, south, east, north) if west < east and south < north else b


def choose_ratio(placement: Placement, ms: Raster, wanted: int | None, remarks: Remarks) -> int:
    """PAN pixels per MS pixel to work at: the wanted ratio, else the measured one. Raises IncompatiblePair."""
    ry, rx = placement.scale
    mean = sqrt(ry * rx)
    size = f"{ms.path}: an MS pixel is {ry:.4g} x {rx:.4g} PAN pixels"
    if mean < 0.75:
        raise IncompatiblePair(f"{size}; the MS is finer than the PAN: are the two files swapped?")
    if wanted is not None:
        if round(mean) != wanted:
            remarks.note(f"{size}; it is resampled to the given ratio {wanted}.")
        return wanted
    if round(ry) != round(rx) and placement.affine is not None:
        raise IncompatiblePair(
            f"{size}, which differs between rows and columns; resample the MS to square pixels or give the ratio "
            "to work at."
        )
    ratio = round(mean)
    repeats = pixel_repeats(ms)
    if repeats > 1 and 1 < ratio * repeats <= MAX_RATIO:
        remarks.assume(
            f"{ms.path} was enlarged by repeating every pixel {repeats} times; it is averaged "
            f"back to ratio {ratio * repeats}, give the true ratio if it is another."
        )
        return ratio * repeats
    if ratio > MAX_RATIO:
        raise IncompatiblePair(f"{size}; ratios up to {MAX_RATIO} are supported, give a ratio to resample to.")
    if ratio > 1:
        return ratio
    if abs(mean - 1) > 0.1:
        raise IncompatiblePair(f"{size}, so the MS is hardly coarser; give the ratio to work at: --ratio 2.")
    factor = interpolated_by(ms)
    if factor is None:
        raise IncompatiblePair(
            f"{ms.path} lies on the PAN grid already, and its own pixel size cannot be measured; "
            "give the ratio of the original pixels: --ratio N."
        )
    remarks.assume(
        f"{ms.path} lies on the PAN grid already; its pixels show that it was enlarged by {factor}, and it is "
        f"averaged back to ratio {factor}, give the true ratio if it is another."
    )
    return factor


@dataclass(frozen=True)
class Target:
    """The full scene's frame as a grid that MS rasters are put on."""

    pan: Grid
    frame: Frame
    """of the full scene"""
    resampling: str

    def sources(
        self, closing: ExitStack, ms: Raster, place: Placement, nested: bool, each: bool, remarks: Remarks
    ) -> list[Source]:
        """The MS on the frame, as it is where it nests, else resampled; band by band if `each`.

        Raises IncompatiblePair.
        """
        parts = ms.single_bands() if each or (not nested and ms.may_have_holes) else [ms]
        return [self._source(closing, part, place, nested, remarks) for part in parts]

    def _source(self, closing: ExitStack, ms: Raster, place: Placement, nested: bool, remarks: Remarks) -> Source:
        top, left, bottom, right = place.box
        if bottom <= 0 or right <= 0 or top >= self.pan.height or left >= self.pan.width:
            raise _apart(self.pan, ms)
        if nested:
            assert place.affine is not None
            (oy, ox), ratio = self.frame.offset, self.frame.ratio
            return Source.native(ms, round((place.affine.f + oy) / ratio), round((place.affine.c + ox) / ratio))
        return self._resampled(closing, ms, place, remarks)

    def _resampled(self, closing: ExitStack, ms: Raster, place: Placement, remarks: Remarks) -> Source:
        ratio, offset = self.frame.ratio, self.frame.offset
        top, bottom = ((v + offset[0]) / ratio for v in (place.box.top, place.box.bottom))
        left, right = ((v + offset[1]) / ratio for v in (place.box.left, place.box.right))
        if place.affine is not None and place.way is None:
            # Pixels whose centres lie inside: outside of them GDAL gives nothing.
            t, b = ceil(top - 0.5 + 1e-6), floor(bottom - 0.5 - 1e-6) + 1
            l_, r = ceil(left - 0.5 + 1e-6), floor(right - 0.5 - 1e-6) + 1
        else:
            t, b, l_, r = floor(top), ceil(bottom), floor(left), ceil(right)
        t, b = max(t, -_CONTEXT), min(b, self.frame.shape[0] + _CONTEXT)
        l_, r = max(l_, -_CONTEXT), min(r, self.frame.shape[1] + _CONTEXT)
        if b <= t or r <= l_:
            raise _apart(self.pan, ms)
        scale = (place.scale[0] / ratio, place.scale[1] / ratio)
        finer = sqrt(scale[0] * scale[1]) < 0.75
        method = Resampling.average if finer else Resampling[self.resampling]
        corner = Affine.translation(l_ * ratio - offset[1], t * ratio - offset[0])
        crs = self.pan.crs or ms.dataset.crs
        grid = Grid(crs, self.pan.transform @ corner @ Affine.scale(ratio), r - l_, b - t)
        same = place.affine is not None
        view = (
            warped(closing, ms, grid, src_transform=place.transform, same_crs=same, scale=scale, resampling=method)
            if place.way is None
            else curved(closing, ms, grid, place.way, scale, method)
        )
        if place.way is None:
            remarks.note(
                f"{ms.path} is resampled ({method.name}) to nest in the PAN grid: "
                f"{place.scale[0]:.4f} x {place.scale[1]:.4f} PAN pixels large, at offset "
                f"({place.box.top:.2f}, {place.box.left:.2f})."
            )
        if place.affine is None or place.way is not None:  # the outline is only roughly known
            points = () if place.way is None else place.way.points
            return Source(view, t, l_, Box(t, l_, b, r), may_have_holes=True, warped=True, points=points)
        extent = Box(top - 0.5, left - 0.5, bottom + 0.5, right + 0.5)
        return Source(view, t, l_, extent, ms.may_have_holes, warped=True)


def _apart(whole: Grid, ms: Raster) -> IncompatiblePair:
    def show(values: Sequence[float], crs: CRS | None) -> str:
        return "(" + ", ".join(f"{v:.10g}" for v in values) + f") in {crs_name(crs)}"

    return IncompatiblePair(
        f"PAN and {ms.path} do not overlap: bounds {show(whole.bounds, whole.crs)} "
        f"and {show(ms.dataset.bounds, ms.dataset.crs)}; check that they show the same place."
    )


def bounds_window(whole: Grid, bounds: Bounds) -> Window:
    """PAN pixels under bounds, widened to whole pixels and cut to the PAN. Raises IncompatiblePair."""
    left, bottom, right, top = bounds
    if not (left < right and bottom < top):
        raise IncompatiblePair(
            f"Bounds {left:g} {bottom:g} {right:g} {top:g} are empty; the order is left bottom right top."
        )
    corners = [~whole.transform @ (x, y) for x in (left, right) for y in (bottom, top)]
    xs, ys = zip(*corners, strict=True)
    c0, c1 = max(0, floor(min(xs) + 1e-6)), min(whole.width, ceil(max(xs) - 1e-6))
    r0, r1 = max(0, floor(min(ys) + 1e-6)), min(whole.height, ceil(max(ys) - 1e-6))
    if c0 >= c1 or r0 >= r1:
        raise IncompatiblePair(
            f"Bounds {left:.10g} {bottom:.10g} {right:.10g} {top:.10g} lie outside of the PAN "
            "({:.10g} {:.10g} {:.10g} {:.10g}); give them in the PAN's CRS.".format(*whole.bounds)
        )
    return Window(r0, c0, r1 - r0, c1 - c0)
