"""What a recipe says of its data, made into images, a scene or noisy pictures, and into training batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from excite.create import create, for_window
from excite.data import Augmentation, ImageData, Loader, load_data
from excite.data.crossmodal import CrossmodalData, is_crossmodal, load_crossmodal
from excite.data.cube import INDIAN_PINES, is_scene
from excite.data.denoising import DenoisingData, is_denoising, load_denoising
from excite.data.hyperspectral import SceneData, load_scene
from excite.data.loader import stay_bytes
from excite.data.pairs import PairLoader
from excite.data.patches import PatchLoader
from excite.data.remote import CACHE_GB, is_address
from excite.data.shards import is_shards
from excite.errors import UsageError, nearest
from excite.networks.catalog import CATALOG
from excite.networks.dscmr import DSCMR
from excite.networks.tables import DSCMRTable
from excite.processes import Processes
from excite.spec import parse_spec
from excite.tasks.base import ALONE
from excite.training.bars import bar
from excite.training.distributed_parts import Shares, check_divides
from excite.training.recipe import DENOISING_KEYS, PAIR_KEYS, SCENE_KEYS, Data, Recipe

AnyData = ImageData | DenoisingData | CrossmodalData
"""What a network can be trained on; scenes are a kind of images with classes."""

AnyLoader = Loader | PatchLoader | PairLoader

_OF_IMAGES = ("test_path", "image_size", "mean", "std")


def load_recipe_data(recipe: Recipe, progress: bool = False) -> AnyData:
    """What a recipe is to be trained on; ``progress`` shows a bar while it is read.

    Raises:
        UsageError: a key that is not for data of this kind.
    """
    settings = recipe.data
    pairs = is_crossmodal(settings.path)
    if not is_scene(settings.path):
        hint = nearest(settings.path, [INDIAN_PINES])
        keys = [key for key in SCENE_KEYS if not (pairs and key == "split_seed")]
        _refuse_keys(settings, keys, f"is for hyperspectral scenes, and {settings.path!r} is none", hint)
    if not pairs:
        why = f"is for pairs of images and texts, and {settings.path!r} has none"
        _refuse_keys(settings, PAIR_KEYS, why, "name the data crossmodal:PATH, or leave it out")
        for key in ("image", "image_weights"):
            if getattr(recipe.network, key) is not None:
                raise UsageError(f"key 'network.{key}' {why}: leave it out")
    if not is_denoising(settings.path):
        why = f"is for denoising, and {settings.path!r} is not"
        _refuse_keys(settings, DENOISING_KEYS, why, "name the data denoising:FOLDER, or leave it out")
    if not is_shards(settings.path):
        _refuse_keys(settings, ("cache_gb",), f"is for shards, and {settings.path!r} is none")
    if settings.balanced and (pairs or is_denoising(settings.path)):
        raise UsageError(f"key 'data.balanced' is for images with classes, and {settings.path!r} has none")
    if is_scene(settings.path):
        return load_recipe_scene(settings, progress)
    if is_denoising(settings.path):
        return load_recipe_pictures(recipe, progress)
    if pairs:
        return load_recipe_pairs(settings, progress)
    with bar("reading images", progress) as step:
        return load_data(
            settings.path,
            test=settings.test_path,
            val_fraction=settings.val_fraction,
            image_size=settings.image_size,
            mean=settings.mean,
            std=settings.std,
            broken=settings.broken,
            cache_gb=settings.cache_gb or CACHE_GB,
            progress=step,
        )


def load_recipe_scene(settings: Data, progress: bool = False, **trained: Any) -> SceneData:
    """The scene that a recipe names.

    Args:
        settings: the recipe's.
        progress: show a bar while it is read.
        trained: what a trained network wants of it, as :func:`excite.data.hyperspectral.load_scene` takes it.
    """
    _refuse_keys(settings, _OF_IMAGES, f"is for images, and {settings.path!r} is none")
    own = {key: getattr(settings, key) for key in SCENE_KEYS}
    with bar("reading the scene", progress) as step:
        return load_scene(settings.path, **own, val_fraction=settings.val_fraction, progress=step, **trained)


def load_recipe_pictures(recipe: Recipe, progress: bool = False) -> DenoisingData:
    """The pictures that a recipe names, grey or colour as its network was drawn for, and what spoils them."""
    settings = recipe.data
    _refuse_keys(settings, _OF_IMAGES[1:], f"is for images with classes, and {settings.path!r} has none")
    own = {key: value for key in DENOISING_KEYS if (value := getattr(settings, key)) is not None}
    own.setdefault("channels", drawn_channels(recipe.network.spec))
    with bar("reading pictures", progress) as step:
        return load_denoising(
            settings.path,
            test=settings.test_path,
            val_fraction=settings.val_fraction,
            broken=settings.broken,
            progress=step,
            **own,
        )


def load_recipe_pairs(settings: Data, progress: bool = False, **trained: Any) -> CrossmodalData:
    """The pairs of images and texts that a recipe names.

    Args:
        settings: the recipe's.
        progress: show a bar while pictures are read.
        trained: what a trained network wants of them, as :func:`excite.data.crossmodal.load_crossmodal` takes it.
    """
    _refuse_keys(settings, ("mean", "std"), f"is for images with classes, and {settings.path!r} has pairs")
    keys = (*PAIR_KEYS, "split_seed", "image_size")
    own = {key: value for key in keys if (value := getattr(settings, key)) is not None}
    with bar("reading pairs", progress) as step:
        return load_crossmodal(
            settings.path,
            test=settings.test_path,
            val_fraction=settings.val_fraction,
            broken=settings.broken,
            progress=step,
            **own,
            **trained,
        )


def spec_for(spec: str, data: AnyData) -> str:
    """The spec of a network that takes what this data gives: windows of its size, or vectors of its lengths.

    Raises:
        UsageError: the spec gives another size.
    """
    if not isinstance(data, CrossmodalData):
        return str(for_window(spec, data.preprocessing.size))
    parsed = parse_spec(spec)
    table = CATALOG[parsed.name].table if parsed.source is None and parsed.name in CATALOG else None
    if not isinstance(table, DSCMRTable):
        return spec
    arguments = dict(parsed.arguments)
    wanted = {"text_dim": data.text_dim}
    if len(data.image_shape) == 1:
        wanted["image_dim"] = data.image_shape[0]
    for key, length in wanted.items():
        if arguments.setdefault(key, str(length)) != str(length):
            raise UsageError(
                f"{spec!r} takes {key}={arguments[key]}, but in {data.name} it is {length}: leave {key}= out"
            )
    return str(dataclasses.replace(parsed, arguments=tuple(arguments.items())))


def with_backbone(network: nn.Module, image: str | None, weights: str | None = None) -> nn.Module:
    """The network with one in front of it that makes vectors of pictures.

    Args:
        network: DSCMR, changed in place.
        image: the spec of the network for pictures; None for vectors.
        weights: what that one starts from.

    Raises:
        UsageError: the network has no place for it.
    """
    if image is None:
        return network
    if not isinstance(network, DSCMR):
        raise UsageError("key 'network.image' is for dscmr: a network of your own brings its own")
    # Its classifier, with as many outputs as the branch takes, is the way into the branch.
    network.backbone = create(image, network.image_dim, weights=weights)
    network.input_shape = None
    return network


def drawn_channels(spec: str) -> int:
    """How many channels the images have that a network was drawn for."""
    parsed = parse_spec(spec)
    return CATALOG[parsed.name].in_channels if parsed.source is None and parsed.name in CATALOG else 3


def _refuse_keys(settings: Data, keys: Sequence[str], why: str, hint: str = "") -> None:
    for key in keys:
        if getattr(settings, key) is not None:
            raise UsageError(f"key 'data.{key}' {why}: {hint or 'leave it out'}")


def training_loader(
    recipe: Recipe, data: AnyData, processes: Processes = ALONE, device: torch.device | None = None
) -> AnyLoader:
    """The training batches of a recipe: for each step what this process has to do, see
    :data:`~excite.tasks.base.StepBatch`, with the index of its samples after it.

    An epoch's order and its steps are those of one process, however many share them. For a ``device`` other than the
    processor images come as bytes, which the loader's ``ready`` normalises.

    Raises:
        UsageError: the data has no training images, or the batch does not divide among the processes.
    """
    check_divides(recipe.trainer.batch_size, processes.count)
    loader = _whole_loader(recipe, data, pixels=device is not None and stay_bytes(device))
    loader.divide(lambda maker: Shares(maker, processes.count, processes.rank, recipe.trainer.micro_batch))
    return loader


def _whole_loader(recipe: Recipe, data: AnyData, pixels: bool) -> AnyLoader:
    if data.train is None:
        raise UsageError(f"'{data.name}' has no training images")
    if isinstance(data, DenoisingData):
        return PatchLoader(
            data.train,
            data.patch,
            data.patches,
            recipe.trainer.batch_size,
            seed=recipe.seed,
            scales=data.scales,
            workers=recipe.data.workers,
        )
    if isinstance(data, CrossmodalData):
        return PairLoader(data.train, recipe.trainer.batch_size, seed=recipe.seed, workers=recipe.data.workers)
    return Loader(
        data.train,
        data.preprocessing,
        recipe.trainer.batch_size,
        seed=recipe.seed,
        augment=augmentation(recipe, data),
        shuffle=True,
        workers=recipe.data.workers,
        balanced=recipe.data.balanced,
        pixels=pixels,
    )


def augmentation(recipe: Recipe, data: ImageData) -> Augmentation:
    """What the recipe asks for, over what suits the data.

    Raises:
        UsageError: it would move a window away from the pixel that it is the window of, or needs colours.
    """
    asked = dataclasses.replace(data.augmentation, **recipe.augment.model_dump(exclude_none=True))
    if isinstance(data, SceneData):
        for key, off in (("crop", "none"), ("rotate", 0), ("jitter", 0), ("randaugment", 0)):
            if getattr(asked, key) != off:
                raise UsageError(f"key 'augment.{key}' is for images: the windows of a scene keep their pixel inside")
    return asked


def resolved(recipe: Recipe, data: AnyData) -> Recipe:
    """The recipe with every choice written in that the data made for it, so that they are found again by it.

    Raises:
        UsageError: an augmentation that this data does not have.
    """
    chosen: dict[str, Any] = {}
    if isinstance(data, SceneData | DenoisingData | CrossmodalData):
        # What the functions that load call test is the test_path of a recipe.
        named = {"test_path" if key == "test" else key: value for key, value in data.options.items()}
        chosen = {f"data.{key}": value for key, value in ({"path": data.name} | named).items()}
    if is_shards(recipe.data.path) and is_address(recipe.data.path):
        chosen["data.cache_gb"] = recipe.data.cache_gb or CACHE_GB  # the order of the images hangs on it
    if isinstance(data, DenoisingData):
        chosen["data.patches"] = data.patches  # which may have been made to fit since
    if isinstance(data, ImageData):
        chosen["augment"] = dataclasses.asdict(augmentation(recipe, data))
    elif asked := recipe.augment.model_dump(exclude_none=True):
        alone = "patches of pictures are always turned and mirrored, and nothing else; pairs stay as they are"
        raise UsageError(f"key 'augment.{next(iter(asked))}' is for images with classes: {alone}")
    return recipe.replace(chosen)
