"""Sharp images of a test file on disk, as the DLPan-Toolbox and other programs read them."""

import warnings
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning
from scipy.io import savemat

from uknowpan.models.metrics.evaluation import EXP, Scored

Form = Literal["mat", "h5", "tif"]
VARIABLE = "sr"
"""Name of the image in a file, as the DLPan-Toolbox loads it."""


def saved_path(folder: Path, method: str, number: int, form: Form) -> Path:
    """FOLDER/METHOD/output_mulExm_NUMBER.FORM; the toolbox counts from 0."""
    plain = "".join(c if c.isalnum() or c in "._- " else "_" for c in method)
    return folder / plain / f"output_mulExm_{number}.{form}"


def save_images(folder: Path, scored: Scored, form: Form) -> None:
    """Write the results of all methods for one image, in DN: float64 (H, W, C) in .mat, float32 (C, H, W) else.

    The folders of `saved_path` must exist.
    """
    for method, fused in scored.fused.items():
        if method == EXP:
            continue
        path, image = saved_path(folder, method, scored.number, form), fused[0].numpy()
        if form == "mat":
            savemat(path, {VARIABLE: image.transpose(1, 2, 0)}, do_compression=True)
        elif form == "h5":
            with h5py.File(path, "w") as file:
                file.create_dataset(VARIABLE, data=image.astype(np.float32), compression="gzip")
        else:
            _write_tif(path, image.astype(np.float32))


def _write_tif(path: Path, image: np.ndarray) -> None:
    bands, height, width = image.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # test images lie nowhere
        form = {"driver": "GTiff", "dtype": "float32", "compress": "deflate"}
        with rasterio.open(path, "w", count=bands, height=height, width=width, **form) as file:
            file.write(image)
