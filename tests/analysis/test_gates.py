"""Gates are found in anybody's network, and what is read is what multiplied the map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from excite.analysis.gates import find_gates, reading, require_gates
from excite.create import create
from excite.errors import UsageError


def example(size: int = 32, images: int = 3) -> Tensor:
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0))


def enliven(network: nn.Module) -> nn.Module:
    """Norms at 0, with which some networks begin, let nothing through to divide by."""
    torch.manual_seed(1)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return network.eval()


def seen_around(network: nn.Module, names: list[str], images: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """What units were given (a map and what is added to it, or 0) and what they answered."""
    given: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    handles = []
    for name in names:

        def before(_: nn.Module, arguments: tuple[Tensor, ...], key: str = name) -> None:
            added = arguments[1].clone() if len(arguments) > 1 else torch.zeros(())
            given[key] = (arguments[0].clone(), added, torch.zeros(()))

        def after(_: nn.Module, arguments: tuple[Tensor, ...], answer: Tensor, key: str = name) -> None:
            given[key] = (*given[key][:2], answer.clone())

        module = network.get_submodule(name)
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    return given


FOREIGN = {
    "timm:seresnet50": 16,
    "torchvision:mobilenet_v3_large": 8,
    "timm:efficientnet_b0": 16,
    "timm:ecaresnet26t": 8,
    "timm:ese_vovnet19b_dw": 4,
    "torchvision:regnet_y_400mf": 16,
    "torchvision:resnet18+se": 8,
}
OWN = {
    "resnet20+se": 9,
    "resnet20+se:init=identity": 9,
    "resnet20+se:where=identity": 9,
    "resnet20+se:gate=tanh": 9,
    "resnet20+eca": 9,
    "resnet20+cbam": 9,
}


@pytest.mark.parametrize(("spec", "units"), (FOREIGN | OWN).items())
def test_the_gate_is_what_the_unit_multiplies_by(spec, units) -> None:
    torch.manual_seed(0)
    network = enliven(create(spec, 10))
    images = example(32 if "resnet20" in spec else 64)
    gates = find_gates(network, images)
    assert len(gates) == units
    assert {gate.kind for gate in gates} == {"se"}
    assert all(gate.tap is None for gate in gates)
    with torch.inference_mode(), reading(network, gates) as values:
        network(images)
    around = seen_around(network, [gate.name for gate in gates], images)
    for gate in gates:
        given, added, answer = around[gate.name]
        assert values[gate.name].shape == (3, gate.channels)
        assert tuple(given.shape[2:]) == gate.size
        wanted = given * values[gate.name][:, :, None, None] + added
        torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-5)
        assert gate.range[0] <= values[gate.name].min()
        assert values[gate.name].max() <= gate.range[1]


@pytest.mark.parametrize(
    ("spec", "units", "kernels"),
    [
        ("resnet20+sk", 9, ["3×3", "3×3, dilation 2"]),
        ("resnet20+sk:branches=3-5-7", 9, ["3×3", "5×5", "7×7"]),
        ("resnet20+sk:init=identity", 9, ["3×3", "3×3, dilation 2"]),
        ("timm:skresnet18", 8, ["3×3", "3×3, dilation 2"]),
    ],
)
def test_the_attention_of_selective_kernels_is_found_with_its_kernels(spec, units, kernels) -> None:
    torch.manual_seed(0)
    network = create(spec, 10).eval()
    images = example(64 if ":" in spec.partition("+")[0] else 32)
    gates = find_gates(network, images)
    assert len(gates) == units
    with torch.inference_mode(), reading(network, gates) as values:
        network(images)
    for gate in gates:
        assert gate.kind == "sk"
        assert [kernel.name for kernel in gate.kernels] == kernels
        assert gate.branches == (0, len(kernels) - 1)
        assert values[gate.name].shape == (3, len(kernels), gate.channels)
        torch.testing.assert_close(values[gate.name].sum(1), torch.ones(3, gate.channels))


def test_units_of_both_kinds_are_in_the_order_in_which_they_run() -> None:
    gates = find_gates(create("resnet20+sk+se", 10), example())
    assert [gate.kind for gate in gates] == ["sk", "se"] * 9


@pytest.mark.parametrize("spec", ["resnet20", "timm:convnextv2_atto", "timm:resnest14d", "timm:densenet121"])
def test_what_is_no_gate_is_not_taken_for_one(spec) -> None:
    # convnextv2 has a norm that multiplies channels; resnest attends to parts of one convolution.
    with pytest.raises(UsageError, match="no attention unit that could be read"):
        require_gates(find_gates(create(spec, 10), example(64)))


def test_the_network_is_left_as_it_was() -> None:
    network = create("resnet20+se", 10)
    network.layer2.eval()  # type: ignore[operator]
    modes = [module.training for module in network.modules()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    gates = find_gates(network, example())
    with reading(network, gates):
        pass
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


# --- as people write them ------------------------------------------------------------------------------------------


class Gist(nn.Module):
    """A layer with everything in one Sequential."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, 4, bias=False), nn.ReLU(inplace=True), nn.Linear(4, channels), nn.Sigmoid()
        )

    def gate(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(x).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x).view(*x.shape[:2], 1, 1).expand_as(x)


class Functional(Gist):
    """No module answers with the gate."""

    def gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc[2](F.relu(self.fc[0](x.mean((2, 3))))))


class Maximum(Gist):
    """Two squeezes through the same layers, in place."""

    def gate(self, x: Tensor) -> Tensor:
        pooled = (F.avg_pool2d(x, x.shape[2:]), F.max_pool2d(x, x.shape[2:]))
        return sum(self.fc[2](self.fc[1](self.fc[0](one.flatten(1)))) for one in pooled).sigmoid_()


class OnePlus(Gist):
    """A gate that can only strengthen."""

    def gate(self, x: Tensor) -> Tensor:
        return 1 + super().gate(x)


class HardInParts(Gist):
    """A hard sigmoid as it was written before there was one."""

    def gate(self, x: Tensor) -> Tensor:
        return F.relu6(self.fc[2](F.relu(self.fc[0](x.mean((2, 3))))) + 3) / 6


class InBlock(Gist):
    """The whole block is one module: convolution, gate and shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        u = self.conv(x)
        u = u * F.sigmoid(self.fc[2](F.relu(self.fc[0](u.mean((2, 3)))))).unsqueeze(-1).unsqueeze(-1)
        return F.relu(u + x)


class Twice(Gist):
    """Two gates in one module, by one Sigmoid."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class ChannelsLast(Gist):
    """Maps are (N, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        gate = self.fc[3](self.fc[2](F.relu(self.fc[0](x.mean((1, 2), keepdim=True)))))
        return (x * gate).permute(0, 3, 1, 2)


class Around(nn.Module):
    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.unit = unit
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.unit(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "range", "read_from"),
    [
        (Gist, (0, 1), "unit.fc.3"),
        (Functional, (0, 1), "unit"),
        (Maximum, (0, 1), "unit"),
        (OnePlus, (1, 2), "unit"),
        (HardInParts, (0, 1), "unit"),
        (ChannelsLast, (0, 1), "unit.fc.3"),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gates_are_read_however_they_are_written(kind, range, read_from, mode) -> None:
    torch.manual_seed(0)
    network = Around(kind(8)).eval()
    images = example(8)
    (gate,) = find_gates(network, images)
    assert (gate.name, gate.unit, gate.path, gate.channels) == ("unit", "unit", read_from, 8)
    assert gate.range == pytest.approx(range)
    assert (gate.tap is None) == (read_from != "unit")
    with mode(), reading(network, [gate]) as values:
        network(images)
    with torch.no_grad():
        given = network.stem(images)
        wanted = (network.unit(given) / given).flatten(2).median(2).values
    assert not values["unit"].requires_grad
    torch.testing.assert_close(values["unit"], wanted, rtol=1e-4, atol=1e-5)


def test_a_gate_inside_a_block_is_found_and_read() -> None:
    torch.manual_seed(0)
    network = Around(InBlock(8)).eval()
    images = example(8)
    (gate,) = find_gates(network, images)
    assert gate.size == (8, 8)
    with torch.no_grad(), reading(network, [gate]) as values:
        network(images)
        block = network.unit
        u = block.conv(network.stem(images))
        wanted = torch.sigmoid(block.fc[2](F.relu(block.fc[0](u.mean((2, 3))))))
    torch.testing.assert_close(values["unit"], wanted)


def test_two_gates_of_one_module_are_told_apart() -> None:
    torch.manual_seed(0)
    network = Around(Twice(8)).eval()
    images = example(8)
    gates = find_gates(network, images)
    assert [gate.name for gate in gates] == ["unit", "unit (2)"]
    with torch.no_grad(), reading(network, gates) as values:
        network(images)
        first = network.unit.gate(given := network.stem(images))
        second = network.unit.gate(given * first[:, :, None, None])
    torch.testing.assert_close(values["unit"], first)
    torch.testing.assert_close(values["unit (2)"], second)


def test_a_unit_that_runs_again_is_named_once() -> None:
    network = Around(nn.Sequential(shared := Gist(8), nn.ReLU(), shared)).eval()
    assert [gate.name for gate in find_gates(network, example(8))] == ["unit.0"]


def test_one_activation_for_all_units_is_not_mistaken_for_their_gate() -> None:
    torch.manual_seed(0)
    first, second = Gist(8), Gist(8)
    second.fc[3] = first.fc[3]
    network = Around(nn.Sequential(first, second)).eval()
    images = example(8)
    gates = find_gates(network, images)
    assert [gate.name for gate in gates] == ["unit.0", "unit.1"]
    with torch.no_grad(), reading(network, gates) as values:
        network(images)
        wanted = first.gate(given := network.stem(images))
        after = second.gate(first(given))
    torch.testing.assert_close(values["unit.0"], wanted)
    torch.testing.assert_close(values["unit.1"], after)


def test_a_map_of_one_position_has_a_gate_like_any_other() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), Gist(8), nn.Conv2d(8, 8, 1), Gist(8)).eval()
    assert [(gate.name, gate.size) for gate in find_gates(network, example(4))] == [("1", (1, 1)), ("3", (1, 1))]


def test_dead_maps_hide_no_gate() -> None:
    # Division would find nothing here.
    network = Around(Gist(8)).eval()
    nn.init.zeros_(network.stem.weight)
    nn.init.zeros_(network.stem.bias)
    assert len(find_gates(network, torch.zeros(2, 3, 8, 8))) == 1


class Branches(nn.Module):
    """Selective kernels in one of several ways that people write them."""

    def __init__(self, way: str, channels: int = 8) -> None:
        super().__init__()
        self.way = way
        self.small = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.large = nn.Sequential(
            nn.Conv2d(channels, channels, 5, padding=2, groups=channels),
            nn.Conv2d(channels, channels, 1),
            nn.ReLU(),
        )
        self.fc = nn.Linear(channels, 2 * channels)

    def attention(self, maps: list[Tensor]) -> Tensor:
        z = sum(maps).mean((2, 3))
        return F.softmax(self.fc(z).view(len(z), 2, -1), 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.small(x), self.large(x)]
        attention = self.attention(maps)
        if self.way == "chunks":
            a, b = attention.chunk(2, dim=1)
            return maps[0] * a.reshape(*x.shape[:2], 1, 1) + maps[1] * b.reshape(*x.shape[:2], 1, 1)
        if self.way == "indices":
            return sum(maps[i] * attention[:, i, :, None, None].expand_as(x) for i in (1, 0))
        if self.way == "stack":
            return (torch.stack(maps, 1) * attention[..., None, None]).sum(1)
        if self.way == "cat":
            joined = torch.cat([one.unsqueeze(1) for one in maps], 1)
            return (joined * attention.unsqueeze(-1).unsqueeze(-1)).sum(1)
        z = sum(maps).mean((2, 3))  # "first": the branches come before the images
        weights = torch.stack(self.fc(z).chunk(2, 1), 0)
        return (F.softmax(weights, dim=0)[..., None, None] * torch.stack(maps, 0)).sum(0)


@pytest.mark.parametrize("way", ["chunks", "indices", "stack", "cat", "first"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_selective_kernels_are_found_however_they_are_written(way, mode) -> None:
    torch.manual_seed(0)
    network = Around(Branches(way)).eval()
    images = example(8)
    (gate,) = find_gates(network, images)
    assert (gate.kind, gate.channels, gate.size) == ("sk", 8, (8, 8))
    assert [(kernel.name, kernel.span) for kernel in gate.kernels] == [("3×3", 3), ("5×5", 5)]
    with mode(), reading(network, [gate]) as values:
        network(images)
    with torch.no_grad():
        unit, given = network.unit, network.stem(images)
        wanted = unit.attention([unit.small(given), unit.large(given)])
    torch.testing.assert_close(values["unit"], wanted)


def test_maps_of_one_and_three_dimensions_have_gates() -> None:
    for dimensions, convolution in ((1, nn.Conv1d), (3, nn.Conv3d)):
        from excite.units import SqueezeExcite

        network = nn.Sequential(convolution(3, 8, 3), SqueezeExcite(8)).eval()
        (gate,) = find_gates(network, torch.randn(2, 3, *[6] * dimensions))
        assert (gate.name, gate.size) == ("1", (4,) * dimensions)


def test_kernels_of_three_dimensions_are_named_as_they_are_dilated() -> None:
    from excite.units import SelectiveKernel

    unit = SelectiveKernel(4, 4, groups=1, branches=(((3, 3, 3), (1, 1, 1)), ((3, 3, 3), (2, 2, 2))))
    (gate,) = find_gates(nn.Sequential(unit), torch.randn(2, 4, 6, 6, 6))
    assert [kernel.name for kernel in gate.kernels] == ["3×3×3", "3×3×3, dilation 2"]


def test_a_gate_that_is_changed_in_place_later_was_read_before() -> None:
    class Spoils(Gist):
        def forward(self, x: Tensor) -> Tensor:
            gate = self.gate(x)
            answer = x * gate[:, :, None, None]
            gate.zero_()
            return answer

    network = Around(Spoils(8)).eval()
    images = example(8)
    gates = find_gates(network, images)
    with torch.no_grad(), reading(network, gates) as values:
        network(images)
    assert values["unit"].min() > 0
