from __future__ import annotations

import pytest
import yaml

from excite.errors import UsageError
from excite.training import recipe as recipes
from excite.training.recipe import Recipe, load, parse, parse_settings, shipped


def test_shipped_recipes_load_and_have_a_description() -> None:
    assert {"digits", "cifar10", "default", "finetune"} <= set(shipped())
    for name, text in shipped().items():
        assert isinstance(load(name), Recipe)
        assert len(text) > 20


def test_a_written_recipe_reads_back_equal(tmp_path) -> None:
    recipe = load("cifar10").replace({"data.mean": (0.5, 0.5, 0.5), "task.class_weights": "balanced"})
    recipe.write(tmp_path / "recipe.yaml")
    assert load(tmp_path / "recipe.yaml") == recipe
    assert load(tmp_path) == recipe


@pytest.mark.parametrize(
    ("content", "path", "hint"),
    [
        ({"optimizer": {"learning_rate": 1}}, "optimizer.learning_rate", "optimizer."),
        ({"optimizer": {"Lr": 1}}, "optimizer.Lr", "optimizer.lr"),
        ({"optimiser": {"lr": 1}}, "optimiser", "optimizer."),
        ({"trainer": {"epochz": 1}}, "trainer.epochz", "trainer.epochs"),
        ({"trainer": {"epochs": "many"}}, "trainer.epochs", "integer"),
        ({"trainer": {"epochs": 0}}, "trainer.epochs", "greater than 0"),
        ({"optimizer": {"host_factor": 0}}, "optimizer.host_factor", "greater than 0"),
        ({"optimizer": {"host_factor": 1.5}}, "optimizer.host_factor", "less than or equal to 1"),
        ({"schedule": {"host_frozen_epochs": -1}}, "schedule.host_frozen_epochs", "greater than or equal to 0"),
        ({"schedule": {"name": "cosin"}}, "schedule.name", "'cosine'"),
        ({"task": {"class_weights": "equal"}}, "task.class_weights", "balanced"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"network": 5}, "network", "found 5"),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_its_path(content, path, hint) -> None:
    with pytest.raises(UsageError) as error:
        parse(content)
    assert f"'{path}'" in str(error.value)
    assert hint in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_are_typed_and_dotted() -> None:
    changes = parse_settings(
        ["trainer.epochs=3", "optimizer.lr=1e-3", "network=resnet32+se:reduction=8", "data.mean=[0.1,0.2,0.3]"]
    )
    recipe = Recipe().replace(changes)
    assert recipe.trainer.epochs == 3
    assert recipe.optimizer.lr == 1e-3
    assert recipe.network.spec == "resnet32+se:reduction=8"
    assert recipe.data.mean == (0.1, 0.2, 0.3)


def test_an_unknown_setting_names_the_nearest_key() -> None:
    with pytest.raises(UsageError, match=r"trainer\.batch_size"):
        Recipe().replace({"trainer.batchsize": 3})
    with pytest.raises(UsageError, match="unknown"):
        Recipe().replace({"nonsense.key": 3})
    with pytest.raises(UsageError, match="KEY=VALUE"):
        parse_settings(["trainer.epochs"])


def test_a_missing_or_broken_file_is_told_in_one_sentence(tmp_path) -> None:
    with pytest.raises(UsageError, match="'digits'"):
        load("digit")
    (tmp_path / "bad.yaml").write_text("a: [1, 2\nb: }")
    with pytest.raises(UsageError, match="not valid YAML"):
        load(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(UsageError, match="list"):
        load(tmp_path / "list.yaml")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(UsageError):
        load(tmp_path / "binary.yaml")


def test_a_recipe_cannot_make_python_objects(tmp_path) -> None:
    (tmp_path / "evil.yaml").write_text("!!python/object/apply:os.system ['touch /tmp/never']")
    with pytest.raises(UsageError, match="not valid YAML"):
        load(tmp_path / "evil.yaml")


def test_every_listed_key_is_a_key() -> None:
    content = yaml.safe_load(yaml.safe_dump(Recipe().model_dump(mode="json")))
    for key in recipes.all_keys():
        node = content
        for part in key.split("."):
            assert part in node
            node = node[part]
