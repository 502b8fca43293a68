"""``predict`` for hyperspectral scenes: the class of every pixel, as a picture or a raster."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from excite.data.cube import INDIAN_PINES, Cube, open_cube, same_scene
from excite.data.ground_truth import GroundTruth, open_ground_truth
from excite.data.spectra import Spectra
from excite.deploy.scene_map import SceneMap, map_scene
from excite.errors import UsageError
from excite.files import check_writable
from excite.report.palette import UNLABELLED, class_colours, rgb
from excite.report.scene import false_colour, scene_picture, thinning
from excite.training.bars import bar
from excite.training.fit import pick_device
from excite.training.run import Run, Trained
from excite.verbs.files_of_maps import rasterio_package, write_array, write_picture, write_raster

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".npy", ".tif", ".tiff")

# What red, green and blue show, in nanometres: near infrared, red, green, in which plants are red.
_INFRARED = (860.0, 650.0, 550.0)
_INDIAN_PINES_BANDS = (49, 26, 16)  # the same of AVIRIS, whose file does not say


def predict_scene(
    run: str | Path,
    scene: str,
    out: str | Path | None = None,
    *,
    ground_truth: str | None = None,
    variable: str | None = None,
    device: str = "auto",
    passes: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Name the class of every pixel of a scene.

    Args:
        run: the folder of a finished run that was trained on a scene.
        scene: ``indian-pines`` or a file: .mat, .hdr (ENVI), .npy, .tif; of the sensor that the run was trained on.
        out: where the map goes. ``.png``: a picture beside a false-colour image and the ground truth, where there is
            one. ``.npy`` and ``.tif``: each pixel's class number, as in the ground truth that the run was trained on,
            (rows, cols) in 8 or 16 bits; a GeoTIFF keeps the scene's place on the earth. None: nothing is written.
        ground_truth: a file of labels; by default it is looked for beside the scene.
        variable: name of the cube in a ``.mat`` file of several.
        device: ``auto``, ``cpu``, ``cuda`` …
        passes: how often to ask with dropout left on, and take the mean; 0: once, without dropout.
        progress: show a bar on stderr.

    Returns:
        ``{"scene", "out", "rows", "cols", "dense", "seconds", "classes": [{"class", "number", "pixels", "share"}, …],
        "agreement", "labelled", "trained_here"}``: ``dense`` says whether the network was applied to whole tiles of
        the scene; ``agreement`` is the share, in percent, of the ``labelled`` pixels whose class the ground truth
        names likewise (None without one). Where ``trained_here``, the pixels that the network was trained on are
        among them, so that it is no test.

    Raises:
        UsageError: the run was not trained on a scene, the scene has other bands, or it is smaller than a window;
            ``out`` has another suffix.
        ExciteError: a file cannot be read or written.
    """
    opened = Run.open(run)
    trained = opened.load()
    if trained.spectra is None:
        raise UsageError(f"{run} was trained on images, and {scene} is a hyperspectral scene.")
    suffix = _suffix(out)
    settings = opened.recipe.data
    trained_here = same_scene(scene, settings.path)
    if trained_here:
        ground_truth, variable = ground_truth or settings.ground_truth, variable or settings.variable
    cube = open_cube(scene, variable, bands=trained.spectra.cube_bands)
    truth = open_ground_truth(scene, cube, ground_truth)
    if truth is not None:
        cube = cube.sized(truth.size) or cube
    window = trained.preprocessing.size
    trained.spectra.check(cube.bands, cube.name)
    if window > min(cube.rows, cube.cols):
        raise UsageError(f"A window of {window} pixels is larger than {cube.name}, which is {cube.rows}×{cube.cols}.")
    if out is not None:
        check_writable(out)
    with bar("mapping", progress) as step:
        mapped = map_scene(
            trained.network,
            cube,
            trained.spectra,
            window,
            device=pick_device(device),
            passes=passes,
            progress=step,
        )
    numbers = [int(number) for number in opened.card["scene"]["numbers"]]
    known = None if truth is None else _in_order(truth, trained.classes)
    result = _summary(mapped, trained.classes, numbers, known)
    result |= {"scene": scene, "out": None if out is None else str(out), "trained_here": trained_here}
    if out is None:
        pass
    elif suffix == ".png":
        write_picture(out, _picture(mapped, cube, trained, known, result))
    else:
        raster = np.array(numbers, np.uint8 if max(numbers) < 256 else np.uint16)[mapped.labels]
        if suffix == ".npy":
            write_array(out, raster)
        else:
            _write_geotiff(out, raster, trained.classes, numbers, cube)
    return result


def maps_scenes(source: str | Path) -> bool:
    """Whether this is the folder of a run that was trained on a hyperspectral scene.

    Raises:
        UsageError: it is the folder of a run that is not finished.
    """
    return (Path(source) / "recipe.yaml").is_file() and Run(source).card["task"] == "hyperspectral"


def _suffix(out: str | Path | None) -> str | None:
    """The suffix of a file that can be written here: better said before the work than after it."""
    if out is None:
        return None
    suffix = Path(out).suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{out}: a map is written as .png (a picture), .npy or .tif (class numbers).")
    if suffix in (".tif", ".tiff"):
        rasterio_package()
    return suffix


def _in_order(truth: GroundTruth, classes: tuple[str, ...]) -> npt.NDArray[np.int64] | None:
    """The ground truth by the network's classes, −1 where it is unlabelled or of a class that the network lacks."""
    places = np.full(len(truth.classes) + 1, -1)
    for number, name in enumerate(truth.classes, start=1):
        if name in classes:
            places[number] = classes.index(name)
    labels: npt.NDArray[np.int64] = places[truth.labels]
    if (labels < 0).all():
        log.warning(
            "%s names none of the network's classes (%s, …): the map is not compared with it",
            truth.origin,
            ", ".join(classes[:3]),
        )
        return None
    return labels


def _summary(
    mapped: SceneMap, classes: tuple[str, ...], numbers: list[int], known: npt.NDArray[np.int64] | None
) -> dict[str, Any]:
    rows, cols = mapped.labels.shape
    counts = np.bincount(mapped.labels.ravel(), minlength=len(classes)).tolist()
    labelled = None if known is None else known >= 0
    right = None if labelled is None else mapped.labels[labelled] == known[labelled]  # type: ignore[index]
    return {
        "rows": rows,
        "cols": cols,
        "dense": mapped.dense,
        "seconds": mapped.seconds,
        "classes": [
            {"class": name, "number": number, "pixels": count, "share": count / (rows * cols)}
            for name, number, count in zip(classes, numbers, counts, strict=True)
        ],
        "agreement": None if right is None else 100 * float(right.mean()),
        "labelled": 0 if right is None else len(right),
    }


def _picture(
    mapped: SceneMap, cube: Cube, trained: Trained, known: npt.NDArray[np.int64] | None, result: dict[str, Any]
) -> Any:
    assert trained.spectra is not None
    note = f"{cube.rows:,} x {cube.cols:,} pixels"
    if result["agreement"] is not None:
        note += f"; {result['agreement']:.2f} % of {result['labelled']:,} labelled pixels as in the ground truth"
        note += ", those trained on included" if result["trained_here"] else ""
    title = f"{trained.spec} on {Path(result['scene']).name}"
    return scene_picture(
        mapped.labels, trained.classes, _false_colour(cube, trained.spectra), known, title, note, mapped.entropy
    )


def _false_colour(cube: Cube, spectra: Spectra) -> npt.NDArray[np.uint8]:
    """Near infrared, red and green where the bands are known, else the first three channels; thinned out."""
    step = thinning((cube.rows, cube.cols))
    bands: list[int] | None = None
    if cube.wavelengths is not None:
        bands = [int(np.abs(np.array(cube.wavelengths) - wanted).argmin()) for wanted in _INFRARED]
    elif cube.name == INDIAN_PINES:
        bands = list(_INDIAN_PINES_BANDS)
    parts = []
    for top, bottom in cube.strips():
        block = cube.read(top, bottom)[:, -top % step :: step, ::step]
        if bands is not None:
            parts.append(block[bands])
        else:
            channels = spectra.apply(block, cube.name)
            parts.append(channels[np.minimum(np.arange(3), len(channels) - 1)])
    return false_colour(np.concatenate(parts, axis=1))


def _write_geotiff(
    out: str | Path, raster: npt.NDArray[Any], classes: tuple[str, ...], numbers: list[int], cube: Cube
) -> None:
    colours = [rgb(UNLABELLED)] * (max(numbers) + 1)
    names = ["unlabelled", *[""] * max(numbers)]
    palette = class_colours(len(classes)).tolist()
    for number, name, colour in zip(numbers, classes, palette, strict=True):
        colours[number], names[number] = tuple(colour), name
    write_raster(out, raster, colours, names, cube.georeference)
