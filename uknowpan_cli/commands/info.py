"""`uknowpan info`: a scene pair or a checkpoint, described."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uknowpan.commands import shared as opt
from uknowpan.console import run_began, to_json
from uknowpan.errors import Error
from uknowpan.options import RUN, SharpenOptions

if TYPE_CHECKING:
    from uknowpan.models.sharpeners import Sharpener
    from uknowpan.tiling import ScenePair

OPTIONS = (
    *("bidx", "pan_bidx", "nodata", "ratio", "resampling", "bounds", "valid", "height", "dem"),
    *("model", "num_threads"),
)


@opt.shares(only=OPTIONS)
def info(
    ctx: typer.Context,
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PAN MS... | PRODUCT | CHECKPOINT", help="A scene pair, a product, or a checkpoint."),
    ],
    options: SharpenOptions,
    displacement: Annotated[
        str | None,
        opt.option("--displacement", RUN, "Write where the MS lies off the PAN: down and right, PAN pixels.", "FILE"),
    ] = None,
    as_json: opt.JsonOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """Describe a scene pair (grid, ratio, measured shift and blur, scale) or a checkpoint (its card).

    With --model: whether the model fits, its memory and time.

    Example: uknowpan info pan.tif ms.tif
    """
    from uknowpan.models.checkpoints import bundled_models

    if len(paths) == 1 and (paths[0] in bundled_models() or paths[0].endswith(".safetensors")):
        from uknowpan.commands.models import show

        show(paths[0], as_json=as_json)
        return
    began = run_began()
    from uknowpan.deliveries import understood
    from uknowpan.loading import load_for
    from uknowpan.scenes import open_scene
    from uknowpan.tiling.raster import bounded_gdal_cache

    delivery = understood(paths[0]) if len(paths) == 1 else None
    with bounded_gdal_cache(), open_scene(paths[0], paths[1:], options) as pair:
        sharpener = None if options.model is None else load_for(options)
        facts = _scene(pair, sharpener, options, began, displacement)
    if delivery is not None:
        bands: Any = options.bidx
        facts["product"] = {
            "kind": delivery.kind,
            "ms_bands": delivery.numbered(),
            "mtf_gains": delivery.gains(bands),
            "left_out": delivery.left_out,
        }
    typer.echo(to_json(facts) if as_json else _text(facts))


def _scene(
    pair: ScenePair, sharpener: Sharpener | None, options: SharpenOptions, began: float, field_file: str | None
) -> dict[str, Any]:
    from uknowpan.registering import in_words, write_field
    from uknowpan.surveying import survey

    overview = survey(pair, sharpener, coregister="auto", softness=True)
    lies = overview.displacement
    if field_file is not None and lies is not None:
        write_field(pair, lies, field_file)
    psf, grid = overview.measured, pair.grid
    facts: dict[str, Any] = {
        "width": grid.width,
        "height": grid.height,
        "crs": grid.crs.to_string() if grid.crs else None,
        "transform": list(grid.transform)[:6],
        "bounds": list(grid.bounds),
        "ratio": pair.ratio,
        "nested": pair.nested,
        "bands": pair.bands,
        "descriptions": list(pair.meta.descriptions),
        "dtype": pair.meta.dtype,
        "pan_dtype": pair.pan_meta.dtype,
        "nodata": pair.meta.nodata,
        "may_have_invalid": pair.may_have_invalid,
        "scale": asdict(overview.scale),
        "shift_pan_pixels": overview.shift,
        "displacement": None
        if lies is None or lies.model == "none"
        else {
            "model": lies.model,
            "own_bands": lies.own_bands,
            "largest_pan_pixels": round(lies.largest, 3),
            "windows_that_agree": round(lies.share, 3),
            "taken_out": overview.field is not None,
            "words": in_words(lies),
        },
        "blur_sigma_pan_pixels": None if psf is None else psf.sigma,
        "correlation": None if psf is None else psf.correlation,
        "softness_ms_pixels": overview.softness,
        "notes": list(pair.notes),
    }
    if sharpener is None:
        return facts
    from uknowpan.forecast import estimate
    from uknowpan.scenes import Scene, plan_scene

    try:
        sharpener.check(pair.bands, pair.ratio)
    except Error as error:
        facts["model"] = {"name": sharpener.name, "fits": False, "reason": str(error)}
        return facts
    plan = plan_scene(pair, sharpener, overview, options)
    forecast = asdict(estimate(Scene(pair, sharpener, options, "", overview, plan, 1, began)))
    facts["model"] = {"name": sharpener.name, "fits": True}
    facts |= {key: forecast[key] for key in ("memory_mb", "disk_mb", "seconds")}
    return facts


def _text(facts: dict[str, Any]) -> str:
    nodata = "none" if facts["nodata"] is None else f"{facts['nodata']:g}"
    names = [d or f"band {i}" for i, d in enumerate(facts["descriptions"], 1)]
    scale = facts["scale"]
    measured = "PAN and MS resemble each other too little to measure it"
    if facts["shift_pan_pixels"] is not None:
        dy, dx = facts["shift_pan_pixels"]
        measured = f"the MS lies {dy:+.2f} rows, {dx:+.2f} columns off the PAN (PAN pixels, + is down and right)"
    if facts["displacement"] is not None:
        taken = "taken out" if facts["displacement"]["taken_out"] else "left as it is"
        measured = f"{facts['displacement']['words']} off the PAN; by default it is {taken}"
    if facts["blur_sigma_pan_pixels"] is not None:
        measured += (
            f"; blur sigma {facts['blur_sigma_pan_pixels']:.2f} PAN pixels, correlation {facts['correlation']:.2f}"
        )
    rows = [
        ("output", f"{facts['width']} x {facts['height']} pixels, {facts['crs'] or 'no CRS'}"),
        ("bounds", ", ".join(f"{v:.10g}" for v in facts["bounds"])),
        ("ratio", f"{facts['ratio']}, MS {'nests' if facts['nested'] else 'is resampled'}"),
        ("bands", f"{facts['bands']}: {', '.join(names)}"),
        ("dtype", f"{facts['dtype']} (PAN {facts['pan_dtype']}), nodata {nodata}"),
        ("scale", f"PAN {scale['pan']:g}, MS {scale['ms']:g} ({scale['source']})"),
        ("shift", measured),
    ]
    if "product" in facts:
        rows.insert(0, ("product", facts["product"]["kind"]))
        rows.insert(1, ("--bidx", facts["product"]["ms_bands"]))
        gains = ", ".join(f"{name} {gain:g}" for name, gain in facts["product"]["mtf_gains"].items())
        if gains:
            rows.append(("optics", f"published MTF gains: {gains}"))
    if facts["softness_ms_pixels"] is not None:
        rows.append(("softness", f"the MS's own is {facts['softness_ms_pixels']:.2f} (sigma in its pixels)"))
    model = facts.get("model")
    if model is not None and model["fits"]:
        rows += [
            ("memory", f"about {facts['memory_mb']:.0f} MB"),
            ("disk", f"up to {facts['disk_mb']:.0f} MB while it runs"),
            ("time", f"about {facts['seconds']:.0f} s with model {model['name']}"),
        ]
    elif model is not None:
        rows.append(("model", model["reason"]))
    rows += [("note", note) for note in facts["notes"]]
    return "\n".join(f"{name:8s} {text}" for name, text in rows)
