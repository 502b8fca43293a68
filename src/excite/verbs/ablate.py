"""``ablate``: a comparison over a grid, in the shape of the papers' tables."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from excite.errors import UsageError
from excite.files import write_atomically, write_json
from excite.report.ablate import ablate_page
from excite.training.recipe import Recipe
from excite.training.recipe_data import AnyData, load_recipe_data, spec_for
from excite.verbs.ablate_grid import Point, Values, host_of, label, points
from excite.verbs.ablate_rows import Group, table
from excite.verbs.ablate_same import same_networks
from excite.verbs.compare import compare, default_recipe


def ablate(
    grid: Mapping[str, Values],
    network: str = "resnet20+se",
    data: str | AnyData | None = None,
    *,
    test: str | None = None,
    seeds: int | Sequence[int] = 3,
    recipe: Recipe | None = None,
    epochs: int | None = None,
    minutes: float | None = None,
    weights: str | Path | None = None,
    out: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Train a network at every point of a grid, from the same seeds, beside its host without units.

    Args:
        grid: keys with their values, as a sequence or as text with commas. A key is an argument of the network's unit
            (``reduction``, ``stages``, ``where``, …; ``se.reduction`` where several units have it), of the network
            itself (``width``), or a recipe key (``optimizer.lr``). Several keys make the product of their values.
        network: the spec whose arguments vary.
        data: a data spec, or images of the user's own; by default the recipe's.
        test: a data spec of the test images, where ``data`` does not hold them.
        seeds: how many (0, 1, …), or which. Three are the fewest that allow a verdict.
        recipe: how to train, as :func:`excite.verbs.compare.compare` takes it. Where a recipe key varies, host and
            network are both trained under each of its values.
        epochs: overrides the recipe's.
        minutes: choose the epochs so that all trainings together take about so long.
        weights: what every network starts from: ``imagenet``, or a file of weights.
        out: the folder; by default one below ``excite-runs/`` named after data, recipe and keys. Called again with
            the same folder, finished runs are kept, and values can be added.
        progress: show bars on stderr.

    Returns:
        What ``ablate.json`` holds: ``network``, ``host``, ``grid``, ``data``, ``seeds``, ``metric``, ``summary``,
        ``rows``, ``between``, ``samples`` and their ``count``, ``epochs``, ``recipe``, ``environment``, ``notes``,
        ``comparisons`` (folders with a ``compare.json`` each), and with them ``folder``. A row is what
        ``compare.json`` says of a network, with ``setting`` (key → value; only the recipe keys for the host),
        ``label``, ``group`` (of rows under one recipe), ``original`` (whether it is the host), ``mebibytes`` (of fp32
        weights) and ``same_as`` (the label of an earlier row that is the same network, trained once, else None).
        Accuracies called top-1 and top-5 are turned into errors, as the papers have them. ``between`` lists the
        paired differences between the settings themselves, with p-values corrected by Holm's method.

    Raises:
        UsageError: grid, network, data and folder do not fit together; told before anything is trained.
        ExciteError: a training failed; everything finished stays.
    """
    grid_points = points(grid, network)
    host = host_of(network)
    recipe = recipe or default_recipe(data if isinstance(data, str) else None, weights)
    changes: dict[str, Any] = {"network.spec": host, "seed": 0}
    if isinstance(data, str):
        changes |= {"data.path": data, "data.test_path": test}
    recipe = recipe.replace(changes)
    varied = [key for key in grid if key in grid_points[0].recipe]
    for given, key in ((epochs, "trainer.epochs"), (minutes, "trainer.epochs"), (minutes, "data.patches")):
        if given is not None and key in varied:
            raise UsageError(f"{key} is varied by the grid: leave out --epochs and --minutes, or the key")
    if not (data is None or isinstance(data, str)) and (fixed := [key for key in varied if key.startswith("data.")]):
        raise UsageError(f"{fixed[0]}: images of your own are taken as they are; leave the key out")
    folder = Path(out) if out else _default_folder(recipe, data, [epochs, minutes, weights, network, *grid])
    groups = _grouped(grid_points, host, recipe, folder, None if isinstance(data, str) else data, weights, progress)

    comparisons: list[dict[str, Any]] = []
    for group in groups:
        specs = dict.fromkeys([group.host, *(point.spec for point in group.points)])
        wanted, time = group.recipe, None if minutes is None else minutes / len(groups)
        if minutes is not None and comparisons:
            # Measured once: a second measurement might come out otherwise, and so many epochs are part of a recipe.
            wanted = wanted.replace({"data.patches": comparisons[0]["recipe"]["data"]["patches"]})
            epochs, time = comparisons[0]["epochs"], None
        comparison = compare(
            [spec for spec in specs if spec not in group.same],
            group.images,
            seeds=seeds,
            recipe=wanted,
            epochs=epochs,
            minutes=time,
            weights=weights,
            out=group.folder,
            progress=progress,
        )
        comparisons.append(comparison)
    result = table(grid_points, network, groups, comparisons, folder)
    write_json(folder / "ablate.json", result)
    write_atomically(folder / "reports" / "ablate.html", ablate_page(result))
    return result | {"folder": str(folder)}


def _default_folder(recipe: Recipe, data: str | AnyData | None, asked: list[Any]) -> Path:
    name = recipe.data.path if data is None or isinstance(data, str) else data.name
    text = json.dumps([recipe.model_dump(mode="json"), *map(str, asked)], sort_keys=True)
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(name).name)
    return Path("excite-runs") / f"ablate-{safe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _grouped(
    grid_points: list[Point],
    host: str,
    recipe: Recipe,
    folder: Path,
    given: AnyData | None,
    weights: str | Path | None,
    progress: bool,
) -> list[Group]:
    """The points by the recipe that they are trained under, with everything checked that can be before training."""
    found: dict[str, list[Point]] = {}
    for point in grid_points:
        found.setdefault(label(_varied(point)), []).append(point)
    recipes = {name: recipe.replace(members[0].recipe) for name, members in found.items()}
    groups: list[Group] = []
    for name, members in found.items():
        own = recipes[name]
        images = next((group.images for group in groups if group.recipe.data == own.data), given)
        if images is None:
            images = load_recipe_data(own, progress)
        if images.test is None:
            raise UsageError(f"'{images.name}' has no test images; give them with --test-data")
        members = [Point(point.setting, spec_for(point.spec, images), point.recipe) for point in members]
        twin = next((group for group in groups if group.images is images), None)
        bare = spec_for(host, images)
        specs = [bare, *(point.spec for point in members)]
        same = twin.same if twin else same_networks(specs, images, weights or recipe.network.weights)
        safe = "".join(c if c.isalnum() or c in "-_.=," else "-" for c in name)
        place = folder / "recipes" / safe if name else folder
        groups.append(Group(_varied(members[0]), own, place, images, bare, members, same))
    return groups


def _varied(point: Point) -> dict[str, str]:
    """The recipe keys of a point with their values."""
    return {key: value for key, value in point.setting.items() if key in point.recipe}
