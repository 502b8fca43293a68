"""The records of published weights, each against the library that publishes the file."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from excite.errors import ExciteError, UsageError
from excite.networks.catalog import CATALOG
from excite.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from excite.spec import parse_spec
from excite.weights.published import (
    PUBLISHED,
    ByHand,
    Hub,
    Published,
    Url,
    find,
    imagenet_classes,
    imagenet_synsets,
    known_classes,
    known_preprocessing,
    require,
    tags,
)


def _id(record: Published) -> str:
    return f"{record.network}-{record.tag}"


def _of_timm(name: str) -> tuple[object, Preprocessing]:
    """timm's configuration, and what timm's own validation feeds the network."""
    timm_data, timm_models = pytest.importorskip("timm.data"), pytest.importorskip("timm.models")
    config = timm_models.get_pretrained_cfg(name)
    data = timm_data.resolve_data_config(pretrained_cfg=asdict(config), use_test_size=True)
    size = data["input_size"][-1]
    assert data["crop_mode"] == "center"
    resize = math.floor(size / data["crop_pct"])
    return config, Preprocessing(size, data["mean"], data["std"], resize, data["interpolation"])


def _of_torchvision(network: str, url: str) -> Preprocessing:
    from torchvision.models import get_model_weights

    (weights,) = (member for member in get_model_weights(network) if member.url == url)
    transforms = weights.transforms()
    assert transforms.antialias
    assert len(weights.meta["categories"]) == 1000
    return Preprocessing(
        transforms.crop_size[0],
        tuple(transforms.mean),
        tuple(transforms.std),
        transforms.resize_size[0],
        transforms.interpolation.value,
    )


@pytest.mark.parametrize("record", PUBLISHED, ids=_id)
def test_every_record_says_what_its_publisher_says(record) -> None:
    where = record.where
    if isinstance(where, Hub):
        config, expected = _of_timm(where.repo.removeprefix("timm/"))
        assert config.hf_hub_id == where.repo
        assert config.num_classes == 1000
        assert where.file == "model.safetensors"
        assert record.preprocessing == expected
        if where.repo.endswith((".tv_in1k", ".tv2_in1k")):  # torchvision's own file, told of by both
            assert record.preprocessing == _of_torchvision(record.network, config.url)
    elif isinstance(where, ByHand):
        # "mean_value: 104, 117, 123" at the top of the authors' prototxts; their README: 224 from 256.
        assert where.page.startswith("https://github.com/")
        assert [255 * value for value in record.preprocessing.mean] == pytest.approx([123, 117, 104])
        assert (record.preprocessing.size, record.preprocessing.resize) == (224, 256)
    elif "pytorch.org" in where.url:
        assert record.preprocessing == _of_torchvision(record.network, where.url)
    elif "lip6.fr" in where.url:
        bninception = pytest.importorskip("pretrainedmodels.models.bninception")
        settings = bninception.pretrained_settings["bninception"]["imagenet"]
        assert where.url == settings["url"]
        assert (settings["input_space"], settings["input_range"], settings["std"]) == ("BGR", [0, 255], [1, 1, 1])
        blue, green, red = settings["mean"]
        # excite's conversion puts the 255 into the first convolution.
        expected = Preprocessing(settings["input_size"][-1], (red / 255, green / 255, blue / 255), (1, 1, 1), 256)
        assert record.preprocessing == expected
    else:
        config, expected = _of_timm("legacy_" + record.network.replace("se_res", "seres"))
        assert (config.url, config.num_classes) == (where.url, 1000)
        assert record.preprocessing == expected


def test_every_network_is_one_of_excites_and_every_tag_is_given_once() -> None:
    assert {record.network for record in PUBLISHED} <= CATALOG.keys()
    keys = [(record.spec or record.network, record.tag) for record in PUBLISHED]
    assert len(set(keys)) == len(keys)
    for record in PUBLISHED:
        spec = record.spec or record.network
        assert parse_spec(spec).name == record.network
        assert find(spec, record.tag) is record
        assert record.tag in tags(spec)


def test_networks_of_the_papers_have_a_main_file() -> None:
    for network in ("resnet50", "se_resnet50", "se_resnext101_32x4d", "senet154", "sknet50", "mobilenet_v1"):
        assert tags(network)[0] == "imagenet"
    assert tags("resnet20") == []


def test_weights_are_for_exactly_the_network_that_was_trained() -> None:
    assert find("resnet50", "imagenet") is not None
    assert find("resnet50:stride_in=1x1", "imagenet") is None
    assert find("resnet50:stride_in=3x3", "imagenet") is find("resnet50", "imagenet"), "the same network"
    assert find("se_resnet18", "imagenet") is None
    assert find("se_resnet18:pool=ceil,branch=relu", "imagenet") is not None
    assert find("resnet50+se", "imagenet") is find("resnet50", "imagenet"), "its host's, and the units are new"
    assert find("sknet50", "imagenet-timm") is None
    assert find("sknet50:pool=padded", "imagenet-timm") is not None


@pytest.mark.parametrize(
    ("spec", "tag", "sentence"),
    [
        ("resnet50", "imagnet", "did you mean 'imagenet'"),
        ("resnet50:stride_in=1x1+se", "imagenet", "imagenet for resnet50,"),
        ("sknet50:pool=padded", "imagenet", "imagenet-timm"),
        ("resnet20", "imagenet", "none are known"),
        ("torchvision:resnet18", "imagenet2", "imagenet1k_v1"),
        ("torchvision:resnet1", "imagenet", "none are known"),
    ],
)
def test_what_is_not_published_is_told_with_what_there_is(spec, tag, sentence) -> None:
    assert find(spec, tag) is None
    with pytest.raises(UsageError, match=sentence):
        require(spec, tag)


def test_torchvisions_networks_have_torchvisions_files() -> None:
    from torchvision.models import ResNet50_Weights

    record = require("torchvision:resnet50", "imagenet")
    assert record.where == Url(ResNet50_Weights.DEFAULT.url)
    assert record.preprocessing == _of_torchvision("resnet50", ResNet50_Weights.DEFAULT.url)
    assert require("torchvision:resnet50", "imagenet1k_v1").where == Url(ResNet50_Weights.IMAGENET1K_V1.url)
    wide = require("torchvision:regnet_y_16gf", "imagenet1k_swag_e2e_v1")  # 384 pixels, bicubic
    assert wide.preprocessing == _of_torchvision("regnet_y_16gf", wide.where.url)
    assert wide.preprocessing.size == 384


def test_timms_networks_have_timms_files() -> None:
    models = pytest.importorskip("timm.models")
    record = require("timm:resnet50", "imagenet")
    assert record.where == Hub(models.get_pretrained_cfg("resnet50").hf_hub_id)
    assert record.preprocessing == _of_timm("resnet50")[1]
    assert tags("timm:resnet50.a3_in1k") == ["imagenet", "a3_in1k"]
    assert require("timm:resnet50", "a3_in1k").preprocessing == _of_timm("resnet50.a3_in1k")[1]
    legacy = require("timm:legacy_senet154", "imagenet")
    assert legacy.where == require("senet154", "imagenet").where


def test_what_timm_does_and_excite_does_not_is_left_open(caplog) -> None:
    pytest.importorskip("timm")
    squashed = require("timm:convnext_base", "fb_in22k_ft_in1k_384")
    assert squashed.preprocessing is None
    assert "convnext_base fb_in22k_ft_in1k_384 was fed" in caplog.text


def test_every_file_of_timms_can_be_found() -> None:
    timm = pytest.importorskip("timm")
    for name in {name.partition(".")[0] for name in timm.list_pretrained()}:
        assert tags(f"timm:{name}"), name


# --- local files ---------------------------------------------------------------------------------------------------

CONFIG = {
    "architecture": "resnet50",
    "num_classes": 1000,
    "pretrained_cfg": {
        "tag": "a1_in1k",
        "input_size": [3, 224, 224],
        "test_input_size": [3, 256, 256],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "test_crop_pct": 0.95,
        "crop_mode": "center",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
    },
}
AS_CONFIGURED = Preprocessing(256, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 269, "bicubic")


def _with_config(folder: Path, name: str = "model.safetensors", **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG["pretrained_cfg"] | changes
    (folder / "config.json").write_text(json.dumps(CONFIG | {"pretrained_cfg": config}))
    (folder / name).write_bytes(b"")
    return folder / name


def test_the_configuration_beside_a_file_counts(tmp_path) -> None:
    assert known_preprocessing(_with_config(tmp_path / "a")) == AS_CONFIGURED
    assert known_preprocessing(str(_with_config(tmp_path / "b", "pytorch_model.bin"))) == AS_CONFIGURED
    alone = _with_config(tmp_path / "c", "my.pth")
    assert known_preprocessing(alone) == AS_CONFIGURED
    (alone.parent / "other.pt").write_bytes(b"")
    assert known_preprocessing(alone) is None, "the configuration may be the other file's"
    train_size = _with_config(tmp_path / "d", test_input_size=None, test_crop_pct=None)
    assert known_preprocessing(train_size).size == 224
    assert known_preprocessing(train_size).resize == 248


@pytest.mark.parametrize(
    "changes",
    [
        {"test_input_size": [3, 224]},
        {"test_input_size": "many"},
        {"test_input_size": [3, 0, 0]},
        {"test_input_size": [3, 100_000, 100_000]},
        {"test_crop_pct": -1},
        {"test_crop_pct": 1e-9},
        {"test_crop_pct": [1]},
        {"mean": [0.5, 0.5]},
        {"mean": ["a", "b", "c"]},
        {"mean": [float("nan")] * 3},
        {"std": [0, 1, 1]},
        {"std": 1},
    ],
)
def test_a_configuration_that_makes_no_sense_is_told(tmp_path, changes) -> None:
    with pytest.raises(ExciteError, match=r"config\.json"):
        known_preprocessing(_with_config(tmp_path, **changes))


@pytest.mark.parametrize("changes", [{"crop_mode": "squash"}, {"interpolation": "lanczos"}])
def test_a_configuration_that_excite_cannot_follow_is_left_with_a_word(tmp_path, caplog, changes) -> None:
    assert known_preprocessing(_with_config(tmp_path, **changes)) is None
    assert "model.safetensors was fed" in caplog.text


def test_other_peoples_config_json_is_left_alone(tmp_path) -> None:
    path = _with_config(tmp_path)
    for content in ("[]", "{}", '{"pretrained_cfg": 3}', json.dumps({"model_type": "bert"}), "{" + " " * (1 << 21)):
        (tmp_path / "config.json").write_text(content)
        assert known_preprocessing(path) is None
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"input_si')
    with pytest.raises(ExciteError, match="not JSON"):
        known_preprocessing(path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ExciteError, match="not JSON"):
        known_preprocessing(path)


def test_excites_own_card_counts_for_its_own_file(tmp_path) -> None:
    mine = Preprocessing(32, (0.5,), (0.25,), 36, "bicubic", channels=1)
    (tmp_path / "model.json").write_text(json.dumps({"preprocessing": asdict(mine), "classes": ["a", "b"]}))
    assert known_preprocessing(tmp_path / "model.safetensors") == mine
    assert known_classes(tmp_path / "model.safetensors") == ("a", "b")
    assert known_preprocessing(tmp_path / "other.safetensors") is None
    assert known_classes(tmp_path / "other.safetensors") is None
    (tmp_path / "model.json").write_text(json.dumps({"preprocessing": {"size": 32, "colour": 1}}))
    with pytest.raises(ExciteError, match=r"model\.json"):
        known_preprocessing(tmp_path / "model.safetensors")


def test_the_name_of_a_published_file_says_what_it_expects(tmp_path) -> None:
    def named(name: str) -> Preprocessing | None:
        return known_preprocessing(tmp_path / name)

    assert named("resnet50-11ad3fa6.pth") == Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, 232)
    assert named("resnet50-0676ba61.pth") == Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, 256)
    assert named("inception_v3_google-0cc3c7bd.pth") == Preprocessing(299, IMAGENET_MEAN, IMAGENET_STD, 342)
    assert named("resnet50.pth") is None
    assert named("resnet50-00000000.pth") is None
    pytest.importorskip("timm")
    assert named("resnet50_a1_0-14fe96d1.pth") == _of_timm("resnet50.a1_in1k")[1]
    assert named("seresnext26_32x4d-65ebdb501.pth") == _of_timm("legacy_seresnext26_32x4d")[1]


def test_cadenes_names_say_what_he_says(tmp_path) -> None:
    senet = pytest.importorskip("pretrainedmodels.models.senet").pretrained_settings
    inception = pytest.importorskip("pretrainedmodels.models.inceptionresnetv2").pretrained_settings
    for settings in [*(senet[name]["imagenet"] for name in senet), inception["inceptionresnetv2"]["imagenet"]]:
        size = settings["input_size"][-1]
        assert (settings["input_space"], settings["input_range"]) == ("RGB", [0, 1])
        expected = Preprocessing(size, settings["mean"], settings["std"], math.floor(size / 0.875))
        assert known_preprocessing(tmp_path / Url(settings["url"]).file) == expected


# --- classes -------------------------------------------------------------------------------------------------------


def test_classes_and_wordnet_ids_are_in_the_same_order() -> None:
    timm_data = pytest.importorskip("timm.data")
    names, ids, info = imagenet_classes(), imagenet_synsets(), timm_data.ImageNetInfo("imagenet-1k")
    assert (len(names), len(ids)) == (1000, 1000)
    assert list(ids) == sorted(ids)
    assert (names[0], ids[0]) == ("tench", "n01440764")

    def plain(text: str) -> str:
        return "".join(filter(str.isalnum, text.lower()))

    described = [[plain(word) for word in info.label_name_to_description(name).split(",")] for name in ids]
    agree = [plain(name) in words for name, words in zip(names, described, strict=True)]
    assert sum(agree) > 950  # torchvision tells a few apart that WordNet calls the same


def test_the_records_are_read_without_torch() -> None:
    script = (
        "import sys\nfrom excite.weights.published import PUBLISHED, find, known_preprocessing\n"
        "assert find('resnet50', 'imagenet') and known_preprocessing('nowhere/x.pth') is None\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
