"""Made-up deliveries, small, in the layouts that the vendors publish."""

import json
import re
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from rasters import ORIGIN, centres, ground, write_raster
from sensors import rpcs

OLI = {1: "coastal", 2: "blue", 3: "green", 4: "red", 5: "nir", 6: "swir 1", 7: "swir 2", 9: "cirrus"}


def image(count: int, shape: tuple[int, int], transform: Affine, fill: int = 0) -> np.ndarray:
    """(count, *shape) uint16: a landscape whose bands differ; the first `fill` columns are 0."""
    level = ground(*centres(transform, shape), 20)
    values = np.stack([level * (1 + 0.2 * band) for band in range(count)]).round().astype("uint16")
    values[..., :fill] = 0
    return values


def landsat(folder: Path, *, craft: int = 8, level: str = "L1TP", text: bool = False, size: int = 24) -> Path:
    """A Collection 2 folder: a file for each band, QA_PIXEL, MTL. The PAN begins half a PAN pixel before the MS."""
    stem = f"LC0{craft}_{level}_021039_20200411_20200822_02_T1"
    product = folder / stem
    product.mkdir()
    place = Affine.translation(*ORIGIN) @ Affine.scale(30, -30)
    pan_place = Affine.translation(ORIGIN[0] - 7.5, ORIGIN[1] + 7.5) @ Affine.scale(15, -15)
    ms = image(len(OLI), (size, size), place, fill=3)
    numbers = list(OLI) if craft > 7 else [1, 2, 3, 4, 5, 7]
    files = {number: f"{stem}_B{number}.TIF" for number in [*numbers, 8, 10]}
    for values, number in zip(ms, numbers, strict=False):
        write_raster(product / files[number], values[None], place)
    flags = np.full((1, size, size), 21824, "uint16")  # clear
    flags[:, :, size // 2 :] = 22280  # cloud, with high confidence
    write_raster(product / f"{stem}_QA_PIXEL.TIF", flags, place, nodata=1)
    write_raster(product / files[8], image(1, (2 * size + 1, 2 * size + 1), pan_place, fill=6), pan_place)
    if level.startswith("L2"):
        del files[8]
    contents = {"LANDSAT_PRODUCT_ID": stem, "PROCESSING_LEVEL": level, "COLLECTION_NUMBER": "02"}
    contents |= {f"FILE_NAME_BAND_{number}": file for number, file in files.items()}
    contents["FILE_NAME_QUALITY_L1_PIXEL"] = f"{stem}_QA_PIXEL.TIF"
    groups = {
        "PRODUCT_CONTENTS": contents,
        "IMAGE_ATTRIBUTES": {"SPACECRAFT_ID": f"LANDSAT_{craft}", "CLOUD_COVER": "3.06"},
        "LEVEL1_PROCESSING_RECORD": {"PROCESSING_LEVEL": "L1TP", "FILE_NAME_BAND_8": "other.TIF"},
    }
    lines = ["GROUP = LANDSAT_METADATA_FILE"]
    for group, facts in groups.items():
        inner = [f'    {key} = "{value}"' for key, value in facts.items()]
        lines += [f"  GROUP = {group}", *inner, f"  END_GROUP = {group}"]
    (product / f"{stem}_MTL.txt").write_text("\n".join([*lines, "END_GROUP = LANDSAT_METADATA_FILE", "END", ""]))
    if not text:
        (product / f"{stem}_MTL.json").write_text(json.dumps({"LANDSAT_METADATA_FILE": groups}, indent=2))
    return product


def airbus(folder: Path, *, indexed: bool = False, size: int = 24) -> Path:
    """A DIMAP V2 bundle: VOL_PHR.XML, and a folder with DIM_*.XML and tiles of the PAN and of the MS each."""
    product = folder / "SO18034613-4-01_DS_PHR1A_201202250025599"
    spectral = {"P": (1, 4, ["P"]), "MS": (4, 1, ["B2", "B1", "B0", "B3"])}
    for number, (code, (count, ratio, ids)) in enumerate(spectral.items(), 1):
        home = product / f"IMG_PHR1A_{code}_{number:03d}"
        home.mkdir(parents=True)
        name, side, res = f"PHR1A_{code}_201202250025599_ORT", size * ratio, 2 / ratio
        place = Affine.translation(*ORIGIN) @ Affine.scale(res, -res)
        values = image(count, (side, side), place, fill=2 * ratio)
        tile, hrefs = 2 * side // 3, []
        for row in (0, 1):
            for col in (0, 1):
                part = values[:, row * tile : (row + 1) * tile, col * tile : (col + 1) * tile]
                file = f"IMG_{name}_R{row + 1}C{col + 1}.TIF"
                write_raster(home / file, part, place @ Affine.translation(col * tile, row * tile))
                href = f'<DATA_FILE_PATH href="{file}"/>'
                hrefs.append(f'<Data_File tile_R="{row + 1}" tile_C="{col + 1}">{href}</Data_File>')
        items = [
            f"<Raster_Index><BAND_ID>{band}</BAND_ID><BAND_INDEX>{index}</BAND_INDEX></Raster_Index>"
            for index, band in enumerate(ids, 1)
        ]
        listed = f"<Raster_Index_List>{''.join(reversed(items))}</Raster_Index_List>" if indexed else ""
        colours = zip(("RED", "GREEN", "BLUE"), ids if count > 1 else "PPP", strict=False)
        shown = "".join(f"<{colour}_CHANNEL>{band}</{colour}_CHANNEL>" for colour, band in colours)
        measured = "".join(f"<Band_Radiance><BAND_ID>{band}</BAND_ID></Band_Radiance>" for band in sorted(ids))
        (home / f"DIM_{name}.XML").write_text(f"""<?xml version="1.0" encoding="UTF-8"?>
<Dimap_Document>
<Metadata_Identification><METADATA_FORMAT version="2.15">DIMAP</METADATA_FORMAT></Metadata_Identification>
<Coordinate_Reference_System><Projected_CRS>
<PROJECTED_CRS_CODE>urn:ogc:def:crs:EPSG::32631</PROJECTED_CRS_CODE></Projected_CRS></Coordinate_Reference_System>
<Geoposition><Geoposition_Insert><ULXMAP>{ORIGIN[0]}</ULXMAP><ULYMAP>{ORIGIN[1]}</ULYMAP>
<XDIM>{res}</XDIM><YDIM>{res}</YDIM></Geoposition_Insert></Geoposition>
<Processing_Information><Product_Settings><PROCESSING_LEVEL>ORTHO</PROCESSING_LEVEL>
<SPECTRAL_PROCESSING>{code}</SPECTRAL_PROCESSING></Product_Settings></Processing_Information>
<Raster_Data><Data_Access><DATA_FILE_TILES>true</DATA_FILE_TILES><Data_Files>{"".join(hrefs)}</Data_Files></Data_Access>
<Raster_Dimensions><NROWS>{side}</NROWS><NCOLS>{side}</NCOLS><NBANDS>{count}</NBANDS><Tile_Set><NTILES>4</NTILES>
<Regular_Tiling><NTILES_SIZE nrows="{tile}" ncols="{tile}"/><NTILES_COUNT ntiles_R="2" ntiles_C="2"/>
<OVERLAP_ROW>0</OVERLAP_ROW><OVERLAP_COL>0</OVERLAP_COL></Regular_Tiling></Tile_Set></Raster_Dimensions>
<Raster_Encoding><DATA_TYPE>INTEGER</DATA_TYPE><NBITS>12</NBITS><SIGN>UNSIGNED</SIGN></Raster_Encoding>
<Raster_Display>{listed}<Band_Display_Order>{shown}</Band_Display_Order><Special_Value>
<SPECIAL_VALUE_TEXT>NODATA</SPECIAL_VALUE_TEXT><SPECIAL_VALUE_COUNT>0</SPECIAL_VALUE_COUNT></Special_Value>
</Raster_Display></Raster_Data>
<Radiometric_Data>{measured}</Radiometric_Data>
<Dataset_Sources><Source_Identification><Strip_Source><MISSION>PHR</MISSION><MISSION_INDEX>1A</MISSION_INDEX>
</Strip_Source></Source_Identification></Dataset_Sources>
</Dimap_Document>
""")
    (product / "VOL_PHR.XML").write_text("<Dimap_Document/>")
    return product


def maxar(folder: Path, *, tiled: bool = True, part: str = "P001", size: int = 24) -> Path:
    """An ortho-ready delivery: folders _PAN and _MUL with IMD, TIL and tiles; WorldView-2, eight bands."""
    order = "052370638010_01"
    product = folder / order
    codes = {"PAN": (4, ["P"]), "MUL": (1, ["C", "B", "G", "Y", "R", "RE", "N", "N2"])}
    for kind, (ratio, ids) in codes.items():
        home = product / f"{order}_{part}_{kind}"
        home.mkdir(parents=True)
        side, res = size * ratio, 2 / ratio
        place = Affine.translation(*ORIGIN) @ Affine.scale(res, -res)
        values = image(len(ids), (side, side), place, fill=2 * ratio) // 2
        stem, end = f"12MAR28_{kind[0]}2AS", f"{order}_{part}"
        width = side // 2 if tiled else side
        groups = []
        for col in range(side // width):
            file = f"{stem}_R1C{col + 1}-{end}.TIF" if tiled else f"{stem}-{end}.TIF"
            where = place @ Affine.translation(col * width, 0)
            write_raster(home / file, values[:, :, col * width : (col + 1) * width], where)
            last, name = (col + 1) * width - 1, f"TILE_{col + 1}"
            corners = {"ULColOffset": col * width, "ULRowOffset": 0, "URColOffset": last, "URRowOffset": 0,
                       "LRColOffset": last, "LRRowOffset": side - 1, "LLColOffset": col * width,
                       "LLRowOffset": side - 1}  # fmt: skip
            lines = [f'\tfilename = "{file}";', *(f"\t{key} = {value};" for key, value in corners.items())]
            groups += [f"BEGIN_GROUP = {name}", *lines, f"END_GROUP = {name}"]
        tileset = ['bandId = "Multi";', f"numTiles = {side // width};", "tileSizeX = 0;", *groups, "END;", ""]
        if tiled:
            (home / f"{stem}-{end}.TIL").write_text("\n".join(tileset))
        head = ['version = "AA";', f"numRows = {side};", f"numColumns = {side};", 'productLevel = "LV2A";']
        head += [f'bandId = "{"P" if ids == ["P"] else "Multi"}";', 'panSharpenAlgorithm = "None";']
        head += ['radiometricEnhancement = "Off";', "bitsPerPixel = 16;"]
        for band in ids:
            head += [f"BEGIN_GROUP = BAND_{band}", "\tabsCalFactor = 1.0e-02;", f"END_GROUP = BAND_{band}"]
        corner = [f"\tULX = {ORIGIN[0] + res / 2};", f"\tULY = {ORIGIN[1] - res / 2};"]
        head += ["BEGIN_GROUP = MAP_PROJECTED_PRODUCT", *corner, "END_GROUP = MAP_PROJECTED_PRODUCT"]
        head += ["BEGIN_GROUP = IMAGE_1", '\tsatId = "WV02";', "END_GROUP = IMAGE_1", "END;", ""]
        (home / f"{stem}-{end}.IMD").write_text("\n".join(head))
    return product


def in_sensor_geometry(product: Path, size: int = 24) -> Path:
    """A Maxar order as level 1B: its rasters lose their places, and an RPB file beside each TIL has RPCs."""
    for path in product.rglob("*.TIF"):
        with rasterio.open(path) as data:
            values = data.read()
        path.unlink()
        write_raster(path, values, None, crs=None)
    for path in product.rglob("*.IMD"):
        text = path.read_text().replace("LV2A", "LV1B")
        path.write_text(re.sub("(?s)BEGIN_GROUP = MAP_PROJ.*END_GROUP = MAP_PROJECTED_PRODUCT\n", "", text))
        ratio = 4 if "_PAN" in path.parent.name else 1
        it = rpcs(size * ratio, 2 / ratio, (0.07 * ratio, -0.05 * ratio))
        lines = ["BEGIN_GROUP = IMAGE", "\terrBias = 1.0;", "\terrRand = 0.1;"]
        for key in ("line", "samp", "lat", "long", "height"):
            lines += [f"\t{key}{kind.title()} = {float(getattr(it, f'{key}_{kind}'))!r};" for kind in ("off", "scale")]
        for key in ("line_num", "line_den", "samp_num", "samp_den"):
            first, second = key.split("_")
            values = ",\n".join(f"\t\t{float(value)!r}" for value in getattr(it, f"{key}_coeff"))
            lines.append(f"\t{first}{second.title()}Coef = (\n{values});")
        text = "\n".join([*lines, "END_GROUP = IMAGE", "END;", ""]).replace("Off =", "Offset =")
        path.with_suffix(".RPB").write_text(text)
    return product


def stac(folder: Path, *, version: str = "1.0.0", stacked: bool = False, size: int = 24) -> Path:
    """An item beside its images: a PAN, and bands each by itself or in one file; thumbnail and visual are no MS."""
    folder = folder / "scene"
    folder.mkdir()
    pan_place, place = (Affine.translation(*ORIGIN) @ Affine.scale(res, -res) for res in (15, 30))
    names = ["coastal", "blue", "green", "red", "nir08", "lwir11"][1 if stacked else 0 : 5 if stacked else 6]
    ms = image(len(names), (size, size), place)
    write_raster(folder / "pan.tif", image(1, (2 * size, 2 * size), pan_place), pan_place)
    write_raster(folder / "visual.tif", ms[:3], place)

    def asset(file: str, bands: list[str], *roles: str) -> dict[str, object]:
        key, name = ("eo:bands", "common_name") if version < "1.1" else ("bands", "eo:common_name")
        listed = [{"name": f"B{number}", name: band} for number, band in enumerate(bands, 1)]
        kind = "image/tiff; application=geotiff; profile=cloud-optimized"
        return {"href": f"./{file}", "type": kind, "roles": list(roles), key: listed}

    assets = {"thumb": {"href": "thumb.jpg", "type": "image/jpeg", "roles": ["thumbnail"]},
              "pan": asset("pan.tif", ["pan"], "data"),
              "visual": asset("visual.tif", ["red", "green", "blue"], "visual")}  # fmt: skip
    if stacked:
        write_raster(folder / "ms.tif", ms, place)
        assets["analytic"] = asset("ms.tif", names, "data")
    else:
        for values, name in zip(ms, names, strict=True):
            write_raster(folder / f"{name}.tif", values[None], place)
            assets[name] = asset(f"{name}.tif", [name], "data", "reflectance")
    item = {"type": "Feature", "stac_version": version, "id": "scene-1", "assets": assets,
            "properties": {"platform": "landsat-8", "datetime": "2020-04-11T00:00:00Z"}}  # fmt: skip
    path = folder / "item.json"
    path.write_text(json.dumps(item))
    return path
