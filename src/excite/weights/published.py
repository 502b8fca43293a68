"""Which trained weights are published for which network, where they are, and what they expect to be fed.

Imports no torch. The figures are those of the libraries that publish the files (timm's configurations, torchvision's
transforms, Cadene's settings); the tests compare each with the libraries themselves.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from excite.errors import ExciteError, UsageError, nearest
from excite.networks.catalog import CATALOG
from excite.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from excite.spec import Spec, parse_spec

log = logging.getLogger("excite.weights")

HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # the first digits of a file's SHA-256, before its suffix

# --- where a file is ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hub:
    """A file in a repository of the Hugging Face hub."""

    repo: str
    file: str = "model.safetensors"


@dataclass(frozen=True)
class Url:
    """A file at an address; its name ends in the first digits of its SHA-256: ``resnet18-f37072fd.pth``."""

    url: str

    @property
    def file(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class ByHand:
    """A file that a program cannot fetch: the page that links to it, and the name that it is to be kept under."""

    page: str
    file: str


@dataclass(frozen=True)
class Published:
    """A file of trained weights.

    Attributes:
        network: the network's name in excite, or in the source that the spec names.
        tag: ``imagenet`` is each network's main file; others are ``imagenet-tv2``, ``imagenet-a1`` and the like.
        where: how to get it.
        preprocessing: what the network was scored on; None where excite cannot do what it wants.
        spec: the spec that the file is for, where it is not just the network's name.
        note: who made it, where the address does not say.
    """

    network: str
    tag: str
    where: Hub | Url | ByHand
    preprocessing: Preprocessing | None
    spec: str | None = None
    note: str = ""


# --- the files for excite's own networks ---------------------------------------------------------------------------

_TORCHVISION = "https://download.pytorch.org/models"
_TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download"
_CADENE = "http://data.lip6.fr/cadene/pretrainedmodels"

_UNUSUAL = "squashed, on a border, by another interpolation; the data's usual preprocessing is used"
_PHOTO = Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, resize=256)
_BICUBIC = replace(_PHOTO, interpolation="bicubic")
_TV2 = replace(_PHOTO, resize=232)  # torchvision's second weights
_A1 = Preprocessing(288, IMAGENET_MEAN, IMAGENET_STD, resize=288, interpolation="bicubic")
_HALF = (0.5, 0.5, 0.5)


def _caffe(blue: int, green: int, red: int) -> Preprocessing:
    """Pixels in 0 … 255 minus a mean, as Caffe's networks were fed them.

    The conversion of such files puts the factor 255 into the first convolution, and turns it to red, green, blue.
    """
    return Preprocessing(224, tuple(value / 255 for value in (red, green, blue)), (1.0, 1.0, 1.0), resize=256)


_SE_AUTHORS = _caffe(104, 117, 123)


def _resnets() -> Iterable[Published]:
    """torchvision's ResNets, in timm's repositories; and timm's own training "A1"."""
    deep = ("resnet50", "resnet101", "resnet152", "resnext50_32x4d")
    second = (*deep, "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2")
    for name in ("resnet18", "resnet34", *second):
        yield Published(name, "imagenet", Hub(f"timm/{name}.tv_in1k"), _PHOTO)
    for name in second:
        yield Published(name, "imagenet-tv2", Hub(f"timm/{name}.tv2_in1k"), _TV2)
    for name in ("resnet18", "resnet34", *deep):
        yield Published(name, "imagenet-a1", Hub(f"timm/{name}.a1_in1k"), _A1)
    # Its hub repository names another crop than the one that torchvision scored it on.
    yield Published("resnext101_64x4d", "imagenet", Url(f"{_TORCHVISION}/resnext101_64x4d-173b62eb.pth"), _TV2)
    yield Published("resnext101_32x4d", "imagenet", Hub("timm/resnext101_32x4d.gluon_in1k"), _BICUBIC)


def _senets() -> Iterable[Published]:
    """timm's ``legacy_…``: the SE authors' Caffe files converted by Cadene, and timm's own trainings."""
    own, converted = "timm's own training", "the SE authors' Caffe file, converted by Cadene"
    for name, file, preprocessing, note in (
        ("se_resnet18", "v0.1-weights/seresnet18-4bb0ce65.pth", _BICUBIC, own),
        ("se_resnet34", "v0.1-weights/seresnet34-a4004e63.pth", _PHOTO, own),
        ("se_resnet50", "v0.1-cadene/se_resnet50-ce0d4300.pth", _PHOTO, converted),
        ("se_resnet101", "v0.1-cadene/se_resnet101-7e38fcc6.pth", _PHOTO, converted),
        ("se_resnet152", "v0.1-cadene/se_resnet152-d17c99b7.pth", _PHOTO, converted),
        ("se_resnext26_32x4d", "v0.1-weights/seresnext26_32x4d-65ebdb501.pth", _BICUBIC, own),
        ("se_resnext50_32x4d", "v0.1-weights/legacy_se_resnext50_32x4d-f3651bad.pth", _PHOTO, ""),
        ("se_resnext101_32x4d", "v0.1-weights/legacy_se_resnext101_32x4d-37725eac.pth", _PHOTO, ""),
        ("senet154", "v0.1-weights/legacy_senet154-e9eb9fe6.pth", _PHOTO, ""),
    ):
        # timm's own basic blocks rectify the residual branch before the excitation.
        spec = f"{name}:branch=relu" if name in ("se_resnet18", "se_resnet34") else None
        yield Published(name, "imagenet", Url(f"{_TIMM}/{file}"), preprocessing, spec, note)
    page = "https://github.com/hujie-frank/SENet"
    note = "the SE authors' Caffe file"
    yield Published("se_bn_inception", "imagenet", ByHand(page, "SE-BN-Inception.caffemodel"), _SE_AUTHORS, note=note)


def _sknets() -> Iterable[Published]:
    page = "https://github.com/implus/SKNet"
    # The SK authors name no mean; their release builds on the SE authors' and takes over their data.
    note = "the SK authors' Caffe file; its preprocessing is taken to be the SE authors'"
    for name in ("sknet50", "sknet101"):
        yield Published(name, "imagenet", ByHand(page, f"{name}.caffemodel"), _SE_AUTHORS, note=note)
    repo = Hub("timm/skresnext50_32x4d.ra_in1k")
    yield Published("sknet50", "imagenet-timm", repo, _BICUBIC, spec="sknet50:pool=padded")


def _small() -> Iterable[Published]:
    """MobileNets and ShuffleNets."""
    repo = Hub("timm/mobilenetv1_100.ra4_e3600_r224_in1k")
    yield Published("mobilenet_v1", "imagenet", repo, Preprocessing(256, _HALF, _HALF, 269, "bicubic"))
    for tag, file, preprocessing in (
        ("imagenet", "mobilenet_v2-b0353104.pth", _PHOTO),
        ("imagenet-tv2", "mobilenet_v2-7ebf99e0.pth", _TV2),
    ):
        yield Published("mobilenet_v2", tag, Url(f"{_TORCHVISION}/{file}"), preprocessing)
    yield Published("mobilenet_v2", "imagenet-timm", Hub("timm/mobilenetv2_100.ra_in1k"), _BICUBIC)
    for name, file, preprocessing in (
        ("shufflenet_v2_x0_5", "shufflenetv2_x0.5-f707e7126e.pth", _PHOTO),
        ("shufflenet_v2_x1_0", "shufflenetv2_x1-5666bf0f80.pth", _PHOTO),
        ("shufflenet_v2_x1_5", "shufflenetv2_x1_5-3c479a10.pth", _TV2),
        ("shufflenet_v2_x2_0", "shufflenetv2_x2_0-8be3c8ee.pth", _TV2),
    ):
        yield Published(name, "imagenet", Url(f"{_TORCHVISION}/{file}"), preprocessing)


def _inceptions() -> Iterable[Published]:
    repo = Hub("timm/inception_resnet_v2.tf_in1k")
    yield Published("inception_resnet_v2", "imagenet", repo, Preprocessing(299, _HALF, _HALF, 333, "bicubic"))
    where, note = Url(f"{_CADENE}/bn_inception-52deb4733.pth"), "converted from Caffe by Cadene"
    yield Published("bn_inception", "imagenet", where, _caffe(104, 117, 128), note=note)


PUBLISHED: tuple[Published, ...] = (*_resnets(), *_senets(), *_sknets(), *_small(), *_inceptions())

# Cadene's other files, which are not fetched but may be given: by their names.
_CADENE_FILES: dict[str, Preprocessing] = {
    "senet154-c7b49a05.pth": _PHOTO,
    "se_resnext50_32x4d-a260b3a4.pth": _PHOTO,
    "se_resnext101_32x4d-3b2fe3d8.pth": _PHOTO,
    "inceptionresnetv2-520b38e4.pth": Preprocessing(299, _HALF, _HALF, 341),
}


# --- looking up ----------------------------------------------------------------------------------------------------


def find(spec: Spec | str, tag: str) -> Published | None:
    """The file that is published under a tag for the network that a spec names; None if there is none.

    Of a spec with units it is the host's: the units are new. (A paper's network with units has a name of its own.)
    For ``torchvision:NAME`` and ``timm:NAME`` those libraries' own records are asked: ``imagenet`` is their default.
    """
    record = _records(parse_spec(spec)).get(tag)
    if record is not None and record.preprocessing is None:
        log.warning("%s %s was fed images in a way that excite does not: %s", spec, tag, _UNUSUAL)
    return record


def tags(spec: Spec | str) -> list[str]:
    """The tags that :func:`find` knows for a spec, ``imagenet`` first."""
    return list(_records(parse_spec(spec)))


def require(spec: Spec | str, tag: str) -> Published:
    """Like :func:`find`, with a sentence for what is not there.

    Raises:
        UsageError: no such file; the message says what there is.
    """
    spec = parse_spec(spec)
    record = find(spec, tag)
    if record is not None:
        return record
    known = tags(spec)
    others = [f"{r.tag} for {r.spec or r.network}" for r in PUBLISHED if r.network == spec.name and not spec.source]
    if known:
        hint = nearest(tag, known) or f"there are {', '.join(known)}."
    elif others:
        hint = f"there are {', '.join(others)}."
    else:
        hint = "none are known for it; give a file."
    raise UsageError(f"No published weights {tag!r} for {str(spec)!r}: {hint}")


def _records(spec: Spec) -> dict[str, Published]:
    if spec.source not in _SOURCES:
        return {}
    found = {record.tag: record for record in _SOURCES[spec.source](spec)}
    return dict(sorted(found.items(), key=lambda item: item[0] != "imagenet"))


def _own(spec: Spec) -> Iterable[Published]:
    for record in PUBLISHED:
        if spec.name == record.network and _form(spec) == _form(parse_spec(record.spec or record.network)):
            yield record


def _form(spec: Spec) -> dict[str, str]:
    """The arguments of a spec that are not the network's own anyway."""
    table = CATALOG[spec.name].table if spec.name in CATALOG else None
    return {key: value for key, value in spec.arguments if str(getattr(table, key, None)) != value}


def _torchvision(spec: Spec) -> Iterable[Published]:
    from torchvision.models import get_model_weights

    try:
        known = get_model_weights(spec.name)
    except ValueError:
        return
    for member in known:
        record = Published(spec.name, member.name.lower(), Url(member.url), _of_transforms(member.transforms()))
        yield record
        if member is getattr(known, "DEFAULT", None):
            yield replace(record, tag="imagenet")


def _of_transforms(transforms: Any) -> Preprocessing | None:
    """What torchvision's preset for classification does; None for another preset or way to resize."""
    try:
        return Preprocessing(
            transforms.crop_size[0],
            transforms.mean,
            transforms.std,
            transforms.resize_size[0],
            transforms.interpolation.value,
        )
    except (AttributeError, UsageError):
        return None


def _timm(spec: Spec) -> Iterable[Published]:
    try:
        import timm
        from timm.models import get_pretrained_cfg
    except ImportError:
        return
    architecture, _, wanted = spec.name.partition(".")
    default: Any = get_pretrained_cfg(spec.name, allow_unregistered=True)
    for name in timm.list_pretrained(f"{architecture}.*"):
        tag = name.partition(".")[2]
        config: Any = get_pretrained_cfg(name)
        where = _timm_place(config)
        if where is None or (wanted and tag != wanted):
            continue
        record = Published(spec.name, tag, where, _of_timm(asdict(config)))
        yield record
        if default is not None and tag == default.tag and config.num_classes == 1000:
            yield replace(record, tag="imagenet")


def _timm_place(config: Any) -> Hub | Url | None:
    if config.hf_hub_id:
        return Hub(config.hf_hub_id, config.hf_hub_filename or Hub.file)
    return Url(config.url) if isinstance(config.url, str) and config.url else None


_SOURCES: dict[str | None, Callable[[Spec], Iterable[Published]]] = {
    None: _own,
    "torchvision": _torchvision,
    "timm": _timm,
}


# --- the preprocessing of a local file -----------------------------------------------------------------------------

_LARGEST_CARD = 1 << 20  # bytes; a real one has less than a thousandth of it, or 100 kB with many classes
_LARGEST_SIDE = 4096
_SIDES = (3, 224, 224)  # timm's, where a configuration names none
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".th", ".caffemodel", ".mat")


def known_preprocessing(path: str | Path) -> Preprocessing | None:
    """What a local file of weights is to be fed, as far as its name or the files beside it say.

    In this order: the name is that of a published file; ``model.json`` of excite beside ``model.safetensors``;
    ``config.json`` with timm's ``pretrained_cfg`` beside the file. A ``config.json`` counts for the hub's usual file
    names, and for a file that is the only one of weights in its folder.

    Raises:
        ExciteError: the file beside it is damaged, or holds values that no preprocessing has.
    """
    path = Path(path)
    by_name = _by_file_name(path.name)
    if by_name is not None:
        return by_name
    card, config = path.with_name("model.json"), path.with_name("config.json")
    if isinstance(ours := _own_card(path).get("preprocessing"), dict):
        with _blaming(card):
            return Preprocessing(**ours)
    if path.name in ("model.safetensors", "pytorch_model.bin") or _only_weights_file(path):
        theirs = _read(config).get("pretrained_cfg")
        if isinstance(theirs, dict):
            with _blaming(config):
                preprocessing = _of_timm(theirs)
            if preprocessing is None:
                log.warning("%s was fed images in a way that excite does not: %s", path, _UNUSUAL)
            return preprocessing
    return None


def known_classes(path: str | Path) -> tuple[str, ...] | None:
    """The names of the classifier's outputs, where excite's own ``model.json`` beside a file says them.

    Raises:
        ExciteError: ``model.json`` is damaged.
    """
    classes = _own_card(Path(path)).get("classes")
    return tuple(map(str, classes)) if isinstance(classes, list) else None


def _own_card(path: Path) -> dict[str, Any]:
    """What ``model.json`` says, which belongs to ``model.safetensors`` and to no other file."""
    return _read(path.with_name("model.json")) if path.name == "model.safetensors" else {}


def _by_file_name(name: str) -> Preprocessing | None:
    for record in PUBLISHED:
        if isinstance(record.where, Url) and record.where.file == name:
            return record.preprocessing
    if name in _CADENE_FILES:
        return _CADENE_FILES[name]
    if not HASH_IN_NAME.search(name):
        return None  # only a hash says that it is the very file
    return _torchvision_files().get(name) or _timm_files().get(name)


@cache
def _torchvision_files() -> dict[str, Preprocessing]:
    from torchvision import models

    members = [member for name in models.list_models(module=models) for member in models.get_model_weights(name)]
    found = {Url(member.url).file: _of_transforms(member.transforms()) for member in members}
    return {name: preprocessing for name, preprocessing in found.items() if preprocessing}


@cache
def _timm_files() -> dict[str, Preprocessing]:
    try:
        import timm
        from timm.models import get_pretrained_cfg
    except ImportError:
        return {}
    found = {}
    for name in timm.list_pretrained():
        config: Any = get_pretrained_cfg(name)
        if isinstance(config.url, str) and HASH_IN_NAME.search(config.url):
            preprocessing = _of_timm(asdict(config))
            if preprocessing:
                found[Url(config.url).file] = preprocessing
    return found


def _only_weights_file(path: Path) -> bool:
    return [file.name for file in path.parent.glob("*") if file.suffix in _WEIGHTS] == [path.name]


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none, or one so large that it is something else."""
    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST_CARD + 1)
    except OSError:
        return {}
    if len(content) > _LARGEST_CARD:
        return {}
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ExciteError(f"{path} is damaged, it is not JSON: mend it, or take it away from the weights.") from error
    return found if isinstance(found, dict) else {}


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, OverflowError) as error:
        raise ExciteError(
            f"{path} does not say how images are to be fed to the weights beside it: {error}"
        ) from error


def _of_timm(config: Mapping[str, Any]) -> Preprocessing | None:
    """What timm's validation feeds a network, by its ``pretrained_cfg``: the test size and crop where there are such.

    None where it is nothing that excite does, such as squashing images to a square.

    Raises:
        TypeError, ValueError: a value is no such value.
    """
    channels, height, width = (
        int(side) for side in config.get("test_input_size") or config.get("input_size") or _SIDES
    )
    crop = float(config.get("test_crop_pct") or config.get("crop_pct") or 0.875)
    if not (crop > 0 and min(height, width) >= 1 and max(height, width) / crop <= _LARGEST_SIDE):
        raise ValueError(f"an input of {height}×{width} pixels, cropped to {crop} of the image, is out of range.")
    mode, interpolation = config.get("crop_mode") or "center", config.get("interpolation") or "bicubic"
    if height != width or mode != "center" or crop > 1 or interpolation not in ("bilinear", "bicubic"):
        return None
    mean, std = config.get("mean") or IMAGENET_MEAN, config.get("std") or IMAGENET_STD
    if not all(math.isfinite(float(value)) for value in (*mean, *std)):
        raise ValueError("mean and std must be finite numbers.")
    return Preprocessing(height, tuple(mean), tuple(std), math.floor(height / crop), interpolation, channels)


# --- ImageNet's classes --------------------------------------------------------------------------------------------


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The names of the 1,000 classes of ImageNet (ILSVRC 2012), in the order of published networks' outputs."""
    from torchvision.models import get_model_weights

    return tuple(get_model_weights("resnet18").DEFAULT.meta["categories"])


@cache
def imagenet_synsets() -> tuple[str, ...] | None:
    """The WordNet ids of the same (``n01440764`` …), by timm; None where timm is not installed."""
    try:
        from timm.data.imagenet_info import ImageNetInfo
    except ImportError:
        return None
    info: Any = ImageNetInfo("imagenet-1k")
    return tuple(info.label_names())
