"""``optimize``: the same answers by every way, from any network, and nothing overwritten that is still needed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import excite
from excite.deploy.choose import Choices, fastest
from excite.deploy.lower import lower
from excite.deploy.lowered import (
    Gates,
    GroupedConvolution,
    Lowered,
    ScaledConvolutionAdd,
    SelectiveKernels,
    SelectTwo,
)
from excite.deploy.optimize import Optimized, optimize
from excite.deploy.rewrite import rewrite
from excite.errors import UsageError
from excite.native import build, passes
from excite.networks.catalog import CATALOG
from rewritten_networks import difference, images, randomised

CLOSE = 1e-4


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Choices of these tests are not the user's; what was compiled is, so that it is compiled once."""
    monkeypatch.setattr("excite.deploy.choose.cache_folder", lambda: tmp_path)
    return tmp_path


def kinds(network: nn.Module) -> list[type]:
    return [type(module) for module in network.modules()]


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        ("resnet20+se", torch.float32),
        ("se_resnext26_32x4d", torch.bfloat16),
        ("sknet26", torch.float32),
        ("sknet26", torch.bfloat16),
        ("resnet18+cbam", torch.float32),
        ("mobilenet_v2_cifar+se", torch.float32),
        ("shufflenet_v2_x0_5+eca", torch.bfloat16),
        ("timm:skresnet18", torch.float32),
        ("timm:mobilenetv3_small_050", torch.float32),
    ],
)
def test_answers_stay(spec: str, dtype: torch.dtype) -> None:
    network = randomised(excite.create(spec, 10))
    size = 32 if spec.startswith(("resnet20", "mobilenet_v2_cifar")) else 64
    optimized = optimize(network, images(2, size), engine="torch-direct", dtype=dtype)
    close = CLOSE if dtype == torch.float32 else 0.05
    assert difference(optimized, network, images(2, size, 3)) < close
    assert difference(optimized, network, images(5, size, 4)) < close  # another number of images
    assert optimized(images(1, size)).dtype == torch.float32


@pytest.mark.parametrize("spec", ["se_resnext26_32x4d", "sknet26", "resnet20+se"])
def test_every_form_of_every_layer_gives_the_same(spec: str) -> None:
    network = randomised(excite.create(spec, 10))
    given = images(3, 32 if spec.startswith("resnet20") else 64)
    lowered = lower(rewrite(network, given), torch.float32, len(given))
    layers = [layer for layer in lowered.modules() if isinstance(layer, Lowered)]
    forms = {form for layer in layers for form in layer.forms()}
    for form in forms:
        for layer in layers:
            layer.form = form if form in layer.forms() else layer.forms()[0]
        assert difference(lowered, network, given.contiguous(memory_format=torch.channels_last)) < CLOSE, form


def test_what_becomes_of_the_units() -> None:
    if not passes.available(torch.float32):
        pytest.skip("no compiler, or no AVX-512")
    given = images(2, 64)
    se = kinds(lower(rewrite(randomised(excite.create("se_resnext26_32x4d", 10)), given), torch.float32, 2))
    assert se.count(ScaledConvolutionAdd) == se.count(Gates) == 8
    assert se.count(GroupedConvolution) == 8
    sk = kinds(lower(rewrite(randomised(excite.create("sknet26", 10)), given), torch.float32, 2))
    assert sk.count(SelectiveKernels) == 8
    foreign = kinds(lower(rewrite(randomised(excite.create("timm:skresnet18", 10)), given), torch.float32, 2))
    assert foreign.count(SelectTwo) == foreign.count(Gates) == 8


def test_without_passes_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXCITE_NATIVE", "0")
    build.kernels.cache_clear()
    try:
        for spec in ("se_resnext26_32x4d", "sknet26"):
            network = randomised(excite.create(spec, 10))
            optimized = optimize(network, images(2, 64), engine="torch-direct")
            assert Gates not in kinds(optimized)
            assert difference(optimized, network, images(3, 64, 2)) < CLOSE
    finally:
        build.kernels.cache_clear()


# --- nothing is overwritten that somebody needs --------------------------------------------------------------------


class Reused(nn.Module):
    """Blocks whose maps are read again, later, by others, by views of them, and by the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = (nn.Conv2d(c, 16, 3, padding=1) for c in (3, 16, 16))
        self.unit = excite.SqueezeExcite(16, 4)
        self.head = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = F.relu(self.stem(x))
        half = a[:, :8]
        b = F.relu(self.one(a) + a)
        c = F.relu(self.unit(self.two(b), b))
        d = self.head(c) + half
        return a, b, d, F.relu(self.unit(d[:, [0, 1] * 8])) + c


class AddsTheInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unit = nn.Conv2d(3, 3, 3, padding=1), excite.SqueezeExcite(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.unit(self.layer(x), x)) + self.layer(x) + x


class PaddedShortcut(nn.Module):
    """The end of a bottleneck whose shortcut lies in memory in another order than its maps."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 1)
        self.unit = excite.SqueezeExcite(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.narrow(x))
        return F.relu(
            self.unit(self.wide(h), F.pad(h.flatten(2).contiguous().unflatten(2, (32, 32)), (0, 0, 0, 0, 8, 8)))
        )


@pytest.mark.parametrize("kind", [Reused, AddsTheInput])
def test_maps_that_are_read_again(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = kind().eval()
    optimized = optimize(network, images(), engine="torch-direct")
    given = images(4, seed=9).contiguous(memory_format=torch.channels_last)
    kept = given.clone()
    said, wanted = optimized(given), network(given)
    assert torch.equal(given, kept)
    pairs = zip(said, wanted, strict=True) if isinstance(said, tuple) else [(said, wanted)]
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in pairs)


def test_a_shortcut_in_another_order_of_memory() -> None:
    torch.manual_seed(0)
    network = PaddedShortcut().eval()
    given = images(5)
    lowered = lower(rewrite(network, given), torch.float32, len(given))
    (scaled,) = (layer for layer in lowered.modules() if isinstance(layer, ScaledConvolutionAdd))
    for form in scaled.forms():
        scaled.form = form
        assert difference(lowered, network, given.contiguous(memory_format=torch.channels_last)) < 1e-5, form


def test_the_original_and_earlier_answers_stay() -> None:
    network = randomised(excite.create("se_resnext26_32x4d", 10))
    network.layer1.train()
    state, modes = copy.deepcopy(network.state_dict()), [module.training for module in network.modules()]
    hooks = [len(module._forward_hooks) for module in network.modules()]
    optimized = optimize(network, images(2, 64), engine="torch-direct")
    first = optimized(images(2, 64))
    kept = first.clone()
    optimized(images(2, 64, 7))
    assert torch.equal(first, kept)
    assert [module.training for module in network.modules()] == modes
    assert [len(module._forward_hooks) for module in network.modules()] == hooks
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_a_repeat_gives_the_same_bits() -> None:
    network = randomised(excite.create("sknet26", 10))
    optimized = optimize(network, images(2, 64), engine="torch-direct")
    again = optimize(network, images(2, 64), engine="torch-direct")
    assert torch.equal(optimized(images(2, 64)), again(images(2, 64)))


# --- choices -------------------------------------------------------------------------------------------------------


def test_choices_are_written_down_and_made_again(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = randomised(excite.create("se_resnext26_32x4d", 10))
    first = optimize(network, images(2, 64), engine="torch-direct").report["choices"]["layers"]
    assert first
    (file,) = own_cache.glob("choices-*.json")
    kept = json.loads(file.read_text())
    assert {choice["form"] for choice in kept.values()} >= {choice["form"] for choice in first.values()}
    monkeypatch.setattr("excite.deploy.choose.fastest", lambda calls: pytest.fail("measured again"))
    second = optimize(network, images(2, 64), engine="torch-direct").report["choices"]["layers"]
    assert second == first
    # What is on record is obeyed.
    for key, choice in kept.items():
        kept[key] = choice | {"form": "weights" if "weights" in choice["seconds"] else choice["form"]}
    file.write_text(json.dumps(kept))
    optimized = optimize(network, images(2, 64), engine="torch-direct")
    scaled = [module for module in optimized.modules() if isinstance(module, ScaledConvolutionAdd)]
    assert any(module.form == "weights" for module in scaled)
    assert difference(optimized, network, images(2, 64, 2)) < CLOSE


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 3}', ""])
def test_a_damaged_file_of_choices_is_measured_anew(own_cache: Path, text: str) -> None:
    choices = Choices()
    choices.path.parent.mkdir(exist_ok=True)
    choices.path.write_text(text)
    assert choices.known("a") is None
    choices.learn("a", {"form": "x", "seconds": {}})
    choices.save()
    assert Choices().known("a") == {"form": "x", "seconds": {}}


def test_the_faster_call_is_taken_and_noise_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("excite.deploy.choose.time.perf_counter", lambda: now[0])

    def taking(seconds: float) -> object:
        return lambda: now.__setitem__(0, now[0] + seconds)

    slow, close, quick = taking(1.0), taking(0.99), taking(0.5)
    assert fastest({"slow": slow, "close": close})["form"] == "slow"  # type: ignore[dict-item]
    chosen = fastest({"slow": slow, "quick": quick})  # type: ignore[dict-item]
    assert chosen["form"] == "quick"
    assert chosen["seconds"] == pytest.approx({"slow": 1.0, "quick": 0.5})


def test_a_compiler_that_fails_leaves_the_direct_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(rewritten: fx.GraphModule, example: Tensor) -> None:
        raise RuntimeError("no such compiler\nand much more")

    monkeypatch.setattr("excite.deploy.optimize._compiled", fails)
    network = randomised(excite.create("resnet20+se"))
    optimized = optimize(network, images())
    assert optimized.report["engine"] == "torch-direct"
    assert optimized.report["choices"]["refused"] == {"torch-compiled": "no such compiler"}
    with pytest.raises(RuntimeError):
        optimize(network, images(), engine="torch-compiled")


@pytest.mark.slow
def test_compiled_and_chosen_by_measuring() -> None:
    network = randomised(excite.create("resnet20+se"))
    optimized = optimize(network, images())
    choice = optimized.report["choices"]["network"]
    assert set(choice["seconds"]) == {"torch-direct", "torch-compiled"}
    assert choice["form"] == optimized.report["engine"]
    compiled = optimize(network, images(), engine="torch-compiled")
    assert difference(compiled, network, images(2, seed=3)) < CLOSE
    assert difference(compiled, network, images(5, seed=3)) < CLOSE


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_other_engines(engine: str) -> None:
    pytest.importorskip("openvino" if engine == "openvino" else "onnxruntime")
    network = randomised(excite.create("resnet20+se"))
    optimized = optimize(network, images(), engine=engine)  # type: ignore[arg-type]
    assert optimized.report["rewrites"]["made"]["batch norm folded"] == 19
    assert difference(optimized, network, images(2, seed=3)) < CLOSE


# --- wrong use -----------------------------------------------------------------------------------------------------


def test_wrong_use_gets_one_sentence() -> None:
    network = excite.create("resnet20+se").eval()
    with pytest.raises(UsageError, match="engine is 'tensorrt': choose one of torch,"):
        optimize(network, images(), engine="tensorrt")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"dtype is torch\.int8"):
        optimize(network, images(), dtype=torch.int8)
    with pytest.raises(UsageError, match=r"CPUs compute in torch\.float32"):
        optimize(network, images(), dtype=torch.float16)
    with pytest.raises(UsageError, match="cannot be followed"):
        optimize(network, torch.zeros(2, 4, 32, 32))
    optimized = optimize(network, images(), engine="torch-direct")
    with pytest.raises(UsageError, match=r"inputs of shape \(3, 32, 32\), not \(3, 40, 32\)"):
        optimized(torch.zeros(1, 3, 40, 32))
    with pytest.raises(UsageError, match="train the original"):
        optimized.train()
    assert not optimized(images().requires_grad_()).requires_grad


# --- all of them ---------------------------------------------------------------------------------------------------

FOREIGN = """
    legacy_seresnet18 legacy_seresnet50 legacy_seresnext26_32x4d seresnet18 seresnet34 seresnet50 seresnet50t
    seresnet33ts seresnetaa50d seresnext26t_32x4d seresnext26ts seresnext50_32x4d semnasnet_100 sedarknet21
    mobilenetv3_small_100 efficientnet_b1 regnety_004 skresnet18 skresnet34 skresnet50 skresnet50d skresnext50_32x4d
""".split()  # noqa: SIM905
"""Of timm's, with SE or SK."""


@pytest.mark.slow
@pytest.mark.parametrize("spec", [*CATALOG, *(f"timm:{name}" for name in FOREIGN)])
def test_every_network_answers_as_before(spec: str) -> None:
    network = randomised(excite.create(spec))
    channels, size = 3, 224
    if spec in CATALOG:
        channels, size = CATALOG[spec].in_channels, CATALOG[spec].input_size
    shape: tuple[int, ...] = getattr(network, "input_shape", None) or (channels, size, size)
    draw = torch.Generator().manual_seed(0)
    optimized = optimize(network, torch.randn(2, *shape, generator=draw), engine="torch-direct")
    given = torch.randn(3, *shape, generator=draw)
    with torch.no_grad():
        said, wanted = optimized(given), network(given)
    pairs = zip(said, wanted, strict=True) if isinstance(said, tuple) else [(said, wanted)]
    assert all(float((one - two).abs().max() / two.abs().max()) < CLOSE for one, two in pairs)
    assert isinstance(optimized, Optimized)
