"""A recipe: everything that a run depends on, in one checked YAML file.

Recipes come from a file, from the package by name, or from Python. Unknown keys and wrong types are refused
with the key's path and the nearest valid key, because a misspelt key that is silently ignored costs a day.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from excite.errors import UsageError, nearest
from excite.files import write_atomically

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A group of recipe keys; nothing beside the keys listed is accepted."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Data(Section):
    """Where the images, or the scene, come from and how they enter the network."""

    path: str = "digits"
    """A data spec: `digits`, `cifar10`, a folder or tar of class folders, `shards:DIR`, `indian-pines`,
    `photographs`, `denoising:FOLDER`, `digits-words`, `crossmodal:PATH`, `kind:PATH`."""
    test_path: str | None = None
    """The test images, where `path` does not hold them."""
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training images kept apart for validation; the choice does not depend on the run's seed."""
    image_size: Positive | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    broken: Literal["skip", "refuse"] = "skip"
    """What to do with files that cannot be decoded."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that decode, for sets too large for memory."""
    balanced: bool = False
    """Whether an epoch sees every class equally often, and not every image once."""
    cache_gb: Annotated[float, Field(gt=0)] | None = None
    """Of shards in object storage: how much of them may be kept on the local disk (10)."""
    # Of hyperspectral scenes. A key left empty takes its default, said in brackets.
    train_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of each class's pixels to train on (0.1)."""
    train_per_class: Positive | None = None
    """So many pixels of each class to train on, instead of a share."""
    split: Literal["random", "disjoint"] | None = None
    """`random`: training pixels anywhere, as most papers have it (this); `disjoint`: no window of a test pixel holds
    a training pixel."""
    split_seed: Annotated[int, Field(ge=0)] | None = None
    """Of the choice of the training pixels, or of the validation pairs, apart from the run's own seed (0)."""
    window: Positive | None = None
    """Side of the square around each pixel that the network sees, odd (25)."""
    components: Annotated[int, Field(ge=0)] | None = None
    """Principal components that the bands are reduced to (30); 0 keeps the bands, each standardised."""
    pca: Literal["scene", "train"] | None = None
    """Which spectra the components are computed from: all of the scene, as the papers do (this), or those of the
    training pixels alone."""
    whiten: bool | None = None
    """Whether every component is scaled to variance 1 (true)."""
    bands: Annotated[str, BeforeValidator(lambda given: str(given) if type(given) is int else given)] | None = None
    """Which bands to use, counted from 1, such as `1-103,109-149` (all)."""
    ground_truth: str | None = None
    """The file of the ground truth, where it is not found beside the scene or in its file."""
    variable: str | None = None
    """The scene's name in a `.mat` file of several arrays."""
    # Of images for denoising; likewise.
    degradation: str | None = None
    """What spoils the images (`gaussian:25`): `gaussian:SIGMA` on the scale of 0 … 255, `poisson:PEAK`,
    `jpeg:QUALITY`, `bicubic:FACTOR`, each with one value or a range `0-55`; several, with commas, take turns."""
    channels: Literal[1, 3] | None = None
    """Grey or colour (what the network was drawn for)."""
    patch: Positive | None = None
    """Side of the squares that are cut out for training (40)."""
    patches: Positive | None = None
    """How many of them make an epoch (as many as cover the images)."""
    scales: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None
    """The images are cut at these sizes, too (1, 0.9, 0.8, 0.7)."""
    noise_seed: Annotated[int, Field(ge=0)] | None = None
    """Of the noise in validation and test images, apart from the run's own seed (0)."""
    quantised: bool | None = None
    """Whether the noisy image is clipped and rounded to 8 bits, as a file would hold it (false)."""
    # Of pairs of images and texts; likewise.
    text: str | None = None
    """How strings become vectors: `tfidf`, `tfidf:N` with runs of up to N words, `sentence:MODEL` (tfidf)."""
    text_dim: Positive | None = None
    """The most terms that TF-IDF counts (5000)."""
    scaling: str | None = None
    """How vectors are scaled, centred by the training pairs: `each` number to variance 1, all `alike`, or `none`; two
    with a comma for images and texts (each; vectors of strings alike)."""


class Network(Section):
    """Which network, and what it starts from."""

    spec: str = "resnet20"
    weights: str | None = None
    """What to start from: `imagenet`, fetched from where it is published, or a file of weights."""
    image: str | None = None
    """For retrieval from pictures: the spec of the network that looks at them, in front of `spec`."""
    image_weights: str | None = None
    """What that one starts from."""


class Task(Section):
    """The loss; of denoising it has no settings."""

    label_smoothing: Fraction = 0.0
    class_weights: Literal["balanced"] | tuple[float, ...] | None = None
    """`balanced`: inversely proportional to the class's share of the training samples."""
    label: Annotated[float, Field(ge=0)] | None = None
    """Retrieval: the weight of the loss in the label space (1)."""
    alpha: Annotated[float, Field(ge=0)] | None = None
    """Retrieval: the weight of the loss in the common space."""
    beta: Annotated[float, Field(ge=0)] | None = None
    """Retrieval: the weight of the distance between a pair's image and text."""


class Optimizer(Section):
    """How a gradient becomes a step."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.1
    """The peak learning rate, for `lr_batch` images a step, or for as many as there are."""
    lr_batch: Positive | None = None
    """With another `trainer.batch_size` than this the rate is scaled in proportion, after a gradual warm-up."""
    host_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor on `lr` for the parameters that came from `network.weights`. Left empty it is 0.1 where others are new
    (an added unit's, a classifier's for other classes), else 1."""
    momentum: Fraction = 0.9
    nesterov: bool = True
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    decay_norm_and_bias: bool = False
    """Whether weight decay also pulls on batch norms and biases, as in the first papers."""


class Schedule(Section):
    """The learning rate over the run, as a factor on `optimizer.lr`."""

    name: Literal["onecycle", "cosine", "exponential", "step", "constant"] = "onecycle"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Linear warm-up before all but one-cycle."""
    warmup_from: Fraction = 0.0
    """The factor from which the warm-up rises to 1."""
    host_frozen_epochs: Annotated[float, Field(ge=0)] = 0.0
    """For so long only the new parameters learn; those that came from `network.weights`, and the statistics of their
    batch norms, stay as they are."""
    peak_at: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """One-cycle: the share of the run after which the rate peaks."""
    milestones: tuple[Fraction, ...] = (0.5, 0.75)
    """Step: the shares of the run at which the rate drops."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Step: the factor of each drop."""
    final: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    """Exponential: the factor at the end of the run."""


class Augment(Section):
    """What happens to a training image; every draw is one image's own. A key left empty takes what suits the data."""

    crop: Literal["none", "pad", "resized"] | None = None
    """`pad`: a frame of `padding` pixels and a random crop; `resized`: a random area and aspect, resized."""
    padding: Annotated[int, Field(ge=0)] | None = None
    min_area: Annotated[float, Field(gt=0, le=1)] | None = None
    """The smallest share of the image that `resized` cuts out."""
    flip: Fraction | None = None
    """Probability of a mirror image."""
    quarter_turns: Fraction | None = None
    """Probability of a turn by 0, 1, 2 or 3 right angles."""
    randaugment: Annotated[int, Field(ge=0)] | None = None
    """RandAugment's number of operations."""
    magnitude: Annotated[int, Field(ge=0, le=30)] | None = None
    rotate: Annotated[float, Field(ge=0, le=180)] | None = None
    """Turned by an angle of up to so many degrees, either way."""
    jitter: Annotated[int, Field(ge=0, le=255)] | None = None
    """So much, of 255, may be added to or taken from each colour of an image."""
    erasing: Fraction | None = None
    """Probability of random erasing."""
    mixup: Annotated[float, Field(ge=0)] | None = None
    """α of mixup's Beta(α, α); 0 is off."""
    cutmix: Annotated[float, Field(ge=0)] | None = None


class Trainer(Section):
    """How long, how many at once, on what."""

    epochs: Positive = 12
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Train for about so long: replaces `epochs`, which is then measured and written in."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Images in one step of the optimiser, those of all processes together."""
    micro_batch: Annotated[int, Field(ge=2)] | None = None
    """The most images that a process has in work at once; a step of more adds up gradients."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: each holds the whole network, or a share of its parameters."""
    sync_batch_norm: bool = True
    """With several processes: batch norm's statistics are those of all images that are in work, or of each process's
    own."""
    frozen_norm_epochs: Annotated[float, Field(ge=0)] = 0.0
    """In so many epochs at the end batch norm keeps its running statistics, and uses them."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """`bf16`: autocast to bfloat16; the weights stay in fp32. `auto`: that, where the device has instructions for it
    and a step is measured to be quicker; what it came to is written in."""
    compile: Literal["auto"] | bool = "auto"
    """Whether the step goes through `torch.compile`. `auto`: where the run is long enough for it, a step is measured
    with and without, and what is quicker on the whole is written in."""
    channels_last: bool = True
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the weights, and evaluate and save that."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient."""
    device: str = "auto"
    threads: Positive | None = None
    """CPU threads; sums are ordered by them, so a repeat needs the same number."""
    checkpoint_steps: Positive | None = None
    """Steps between checkpoints; without it one at the end of each epoch, and every `checkpoint_minutes`."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 5.0
    keep_checkpoints: Positive = 2
    patience: Positive | None = None
    """Stop after so many epochs without a better score on the validation split, and keep the best weights."""
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()


class Recipe(Section):
    """Everything a run depends on."""

    data: Data = Data()
    network: Network = Network()
    task: Task = Task()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    augment: Augment = Augment()
    trainer: Trainer = Trainer()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, content: Any) -> Any:
        # `network: resnet20` and `data: digits` read better than a section of one key.
        if isinstance(content, dict):
            content = dict(content)
            for section, key in (("network", "spec"), ("data", "path")):
                if isinstance(content.get(section), str):
                    content[section] = {key: content[section]}
        return content

    def replace(self, changes: Mapping[str, Any]) -> Recipe:
        """A checked copy with dotted keys set: ``recipe.replace({"trainer.epochs": 5})``."""
        content = self.model_dump()
        for key, value in changes.items():
            _set(content, key, value)
        return parse(content)

    def write(self, path: Path) -> None:
        """Write the recipe as YAML, atomically."""
        write_atomically(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def parse(content: Any, where: str = "recipe") -> Recipe:
    """Check a nested dictionary.

    Raises:
        UsageError: names the key's path, what was expected, and for an unknown key the nearest valid one.
    """
    if not isinstance(content, dict):
        raise UsageError(f"{where}: expected keys and values, found {type(content).__name__}")
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{where}: " + "; ".join(_explain(item) for item in error.errors())) from None


def load(name_or_path: str | Path) -> Recipe:
    """Read a recipe file, or one that ships with excite by its name.

    Raises:
        UsageError: no such file or name, not YAML, or a key or value that does not fit.
    """
    path = Path(name_or_path)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    if path.is_file():
        text, where = path.read_text(encoding="utf-8", errors="replace"), str(path)
    elif str(name_or_path) in shipped():
        text, where = _folder().joinpath(f"{name_or_path}.yaml").read_text(encoding="utf-8"), str(name_or_path)
    else:
        hint = nearest(str(name_or_path), list(shipped()))
        raise UsageError(f"no recipe file or shipped recipe '{name_or_path}'; {hint or 'see: excite recipes'}")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    return parse(content if content is not None else {}, where)


def shipped() -> dict[str, str]:
    """The recipes that come with excite: name → its one-line description."""
    found = {}
    for file in sorted(_folder().iterdir(), key=lambda item: item.name):
        if file.name.endswith(".yaml"):
            first = file.read_text(encoding="utf-8").partition("\n")[0]
            found[file.name.removesuffix(".yaml")] = first.lstrip("# ").rstrip()
    return found


SCENE_KEYS = (
    "train_ratio",
    "train_per_class",
    "split",
    "split_seed",
    "window",
    "components",
    "pca",
    "whiten",
    "bands",
    "ground_truth",
    "variable",
)
"""The keys of :class:`Data` that are for hyperspectral scenes alone."""

DENOISING_KEYS = ("degradation", "channels", "patch", "patches", "scales", "noise_seed", "quantised")
"""The keys of :class:`Data` that are for denoising alone."""

PAIR_KEYS = ("text", "text_dim", "scaling")
"""The keys of :class:`Data` that are for pairs of images and texts alone."""


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Turn ``["trainer.epochs=5", …]`` (the command line's ``--set``) into dotted keys and typed values."""
    parsed: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting!r}: expected KEY=VALUE, for example trainer.epochs=5")
        try:
            parsed[key.strip()] = yaml.safe_load(value) if value else ""
        except yaml.YAMLError:
            raise UsageError(f"--set {setting!r}: the value is not valid YAML") from None
    return parsed


def all_keys() -> list[str]:
    """Every dotted key of a recipe."""
    return [
        f"{section}.{key}" if fields else section
        for section, fields in ((name, _fields(name)) for name in Recipe.model_fields)
        for key in (fields or [""])
    ]


def _fields(section: str) -> list[str]:
    annotation = Recipe.model_fields[section].annotation
    is_section = isinstance(annotation, type) and issubclass(annotation, Section)
    return list(annotation.model_fields) if is_section else []  # type: ignore[union-attr]


def _folder() -> Any:
    return resources.files("excite.training") / "recipes"


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    section, dot, rest = key.partition(".")
    if dot and isinstance(content.get(section), dict):
        _set(content[section], rest, value)
    elif dot and section not in content:
        raise UsageError(f"recipe key '{key}' is unknown; {nearest(key, all_keys()) or 'see: excite recipes'}")
    else:
        content[section] = value


def _explain(error: Any) -> str:
    # Union and literal members appear in pydantic's location; only the part that the user wrote is wanted.
    known = {part for key in all_keys() for part in key.split(".")}
    steps = [str(step) for step in error["loc"]]
    if error["type"] == "extra_forbidden":
        path = ".".join(steps)
        return (
            f"key '{path}' is unknown; {nearest(path, all_keys()) or 'valid keys: ' + ', '.join(_fields_at(steps))}"
        )
    path = ".".join(step for step in steps if step in known or step.isdigit())
    message = error["msg"].removeprefix("Value error, ")
    return f"key '{path}': {message[0].lower()}{message[1:]}, found {error['input']!r}"


def _fields_at(steps: list[str]) -> list[str]:
    return _fields(steps[0]) if len(steps) > 1 and steps[0] in Recipe.model_fields else list(Recipe.model_fields)
