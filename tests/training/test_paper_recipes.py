"""The papers' recipes against the papers, by tables that are written here once more, in the papers' own terms."""

from __future__ import annotations

from importlib import resources

import pytest
import torch
import yaml

from excite.create import create
from excite.errors import UsageError
from excite.training.optimization import rate_factor
from excite.training.recipe import load
from excite.training.recipe_data import load_recipe_data

# Hu et al. (arXiv 1709.01507), Sect. 5 and appendix A; Li et al. (arXiv 1903.06586), Sect. 4.1; Xie et al.
# (arXiv 1611.05431), Sect. 5.3. Rates are listed by the epoch, counted from 0, from which on they hold.
PAPERS = {
    "senet-imagenet": {
        "network": "se_resnet50",
        "batch": 1024,
        "GPUs": 4 * 8,
        "rates": {0: 0.6, 30: 0.06, 60: 0.006, 90: 0.0006},
        "epochs": 100,
        "decay": 1e-4,
        "smoothing": 0.0,
        "balanced": True,
        "nesterov": False,
    },
    "senet154-imagenet": {
        "network": "senet154",
        "batch": 2048,
        "GPUs": 8 * 8,
        "rates": {0: 1.0, 30: 0.1, 60: 0.01, 90: 0.001},
        "epochs": 100,
        "decay": 1e-4,
        "smoothing": 0.1,
        "balanced": True,
        "nesterov": False,
    },
    "senet-places365": {
        "network": "se_resnet152",
        "batch": 1024,
        "GPUs": 4 * 8,
        "rates": {0: 0.6, 30: 0.06, 60: 0.006, 90: 0.0006},
        "epochs": 100,
        "decay": 1e-4,
        "smoothing": 0.0,
        "balanced": True,
        "nesterov": False,
    },
    "sknet-imagenet": {
        "network": "sknet50",
        "batch": 256,
        "GPUs": 8,
        "rates": {0: 0.1, 30: 0.01, 60: 0.001, 90: 0.0001},
        "epochs": 100,
        "decay": 1e-4,
        "smoothing": 0.1,
        "balanced": False,
        "nesterov": False,
    },
    "sknet-imagenet-small": {
        "network": "shufflenet_v2_x1_0+sk",
        "batch": 256,
        "GPUs": 8,
        "rates": {0: 0.1, 30: 0.01, 60: 0.001, 90: 0.0001},
        "epochs": 100,
        "decay": 4e-5,
        "smoothing": 0.1,
        "balanced": False,
        "nesterov": False,
    },
    "resnext-cifar": {
        "network": "resnext29_16x64d",
        "batch": 128,
        "GPUs": 8,
        "rates": {0: 0.1, 150: 0.01, 225: 0.001},
        "epochs": 300,
        "decay": 5e-4,
        "smoothing": 0.0,
        "balanced": False,
        "nesterov": True,
    },
    "sknet-cifar": {
        "network": "sknet29",
        "batch": 128,
        "GPUs": 8,
        "rates": {0: 0.1, 150: 0.01, 225: 0.001},
        "epochs": 300,
        "decay": 5e-4,
        "smoothing": 0.0,
        "balanced": False,
        "nesterov": True,
    },
}
ON_PHOTOS = [name for name in PAPERS if "cifar" not in name]
IMAGES = {"imagenet": 1_281_167, "places365": 8_026_628, "cifar": 50_000}


@pytest.mark.parametrize("name", PAPERS)
def test_the_values_are_the_papers(name) -> None:
    recipe, paper = load(name), PAPERS[name]
    assert recipe.network.spec == paper["network"]
    assert recipe.network.weights is None
    assert recipe.optimizer.name == "sgd"
    assert recipe.optimizer.momentum == 0.9
    assert recipe.optimizer.nesterov is paper["nesterov"]
    assert recipe.optimizer.weight_decay == paper["decay"]
    assert recipe.trainer.epochs == paper["epochs"]
    assert recipe.task.label_smoothing == paper["smoothing"]
    assert recipe.data.balanced is paper["balanced"]
    assert recipe.augment.flip == 0.5


@pytest.mark.parametrize("name", PAPERS)
def test_the_batch_is_the_papers_on_any_number_of_devices(name) -> None:
    # The batch is that of all processes together, and each has a GPU of the paper's share in work at once.
    recipe, paper = load(name), PAPERS[name]
    assert recipe.trainer.batch_size == recipe.optimizer.lr_batch == paper["batch"]
    assert recipe.trainer.micro_batch * paper["GPUs"] == paper["batch"]
    assert recipe.trainer.sync_batch_norm is False
    for devices in (1, 2, 4, 8, paper["GPUs"]):
        of_one = recipe.trainer.batch_size // devices
        assert of_one % min(recipe.trainer.micro_batch, of_one) == 0


@pytest.mark.parametrize("name", PAPERS)
def test_the_rate_of_every_epoch_is_the_papers(name) -> None:
    recipe, paper = load(name), PAPERS[name]
    images = next(count for data, count in IMAGES.items() if data in name)
    steps = images // paper["batch"]
    expected = None
    for epoch in range(paper["epochs"]):
        expected = paper["rates"].get(epoch, expected)
        for step in (epoch * steps, epoch * steps + steps // 2, (epoch + 1) * steps - 1):
            rate = recipe.optimizer.lr * rate_factor(recipe.schedule, step, paper["epochs"] * steps, steps)
            # The shares of the run are not whole steps in binary: one step at a border may be either's.
            if step % steps == 0 and epoch in paper["rates"]:
                continue
            assert rate == pytest.approx(expected), epoch


@pytest.mark.parametrize("name", ON_PHOTOS)
def test_augmentation_is_that_of_the_release(name) -> None:
    recipe = load(name)
    augment = recipe.augment
    assert augment.crop == "resized"
    assert augment.min_area == (0.08 if "small" not in name else 0.25)
    assert (augment.rotate, augment.jitter) == (10, 20)
    assert not any((augment.mixup, augment.cutmix, augment.randaugment, augment.erasing, augment.quarter_turns))
    # SE-ResNet-50.prototxt of the release: "mean_value: 104, 117, 123", blue first, on pixels of 0 … 255.
    assert [round(255 * value) for value in recipe.data.mean] == [123, 117, 104]
    assert recipe.data.std == (1, 1, 1)
    assert recipe.data.image_size == 224


def test_what_sets_senet_154_apart() -> None:
    recipe = load("senet154-imagenet")
    with torch.device("meta"):
        network = create(recipe.network.spec, 1000)
    assert [m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)] == [0.2]
    assert 0 < recipe.trainer.frozen_norm_epochs < 10
    others = [load(name) for name in PAPERS if name != "senet154-imagenet"]
    assert all(other.trainer.frozen_norm_epochs == 0 for other in others)


@pytest.mark.parametrize("name", PAPERS)
def test_every_network_of_a_recipe_can_be_made(name) -> None:
    with torch.device("meta"):
        create(load(name).network.spec, 10)


@pytest.mark.parametrize("name", PAPERS)
def test_every_value_has_its_source_beside_it(name) -> None:
    text = (resources.files("excite.training") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    bare = []
    nothing_more = ("quarter_turns", "jitter", "randaugment", "erasing", "mixup", "cutmix")  # "as what follows"
    for line in text.splitlines():
        key, _, rest = line.partition(":")
        value, _, comment = rest.partition("  # ")
        if key.startswith("#") or not value.strip() or key.strip() in nothing_more:
            continue
        if len(comment) < 7:
            bare.append(key.strip())
    assert not bare
    given = yaml.safe_load(text)
    for section in ("optimizer", "schedule", "augment", "trainer"):
        assert len(given[section]) >= 4


@pytest.mark.parametrize("name", ON_PHOTOS)
def test_without_the_users_data_it_is_said_which_is_missing(name) -> None:
    recipe = load(name)
    with pytest.raises(UsageError, match=r"no folder or file /path/to/(imagenet|places365)"):
        load_recipe_data(recipe)
