"""Networks that are written in ways which a unit could miss, double, or break."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_networks import Residual, TinyResNet, with_lively_norms
from torch import nn
from torch.utils.checkpoint import checkpoint

import excite
from excite.errors import UsageError
from excite.surgery import units as unit_registry
from excite.surgery.hooks import attached_units

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Host(nn.Module):
    """A stem, what is being tried, and a head; ``forward`` is the trial's."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        for name, part in parts.items():
            self.add_module(name, part)
        self.run = forward

    def forward(self, x):
        result = self.run(self, self.stem(x))
        return result.mean((2, 3)) if isinstance(result, torch.Tensor) else result


def conv(given=8, wanted=8, stride=1):
    return nn.Conv2d(given, wanted, 3, stride, 1)


def names(network):
    return [name for name, _ in attached_units(network)]


def differs(network, drawn=True):
    """Attach-and-draw must change the output: the units take part."""
    torch.manual_seed(1)
    for _, unit in attached_units(network):
        for parameter in unit.parameters():
            nn.init.normal_(parameter)
    return network


class InTurn(nn.Module):
    """Runs whatever children it has."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x):
        for layer in self.children():
            x = F.relu(layer(x))
        return x


def test_modules_that_run_their_children():
    # A unit as a child of the block would be run as one of its children, and by the hook once more.
    network = Host(lambda net, x: F.max_pool2d(net.body(x), 2), body=InTurn()).eval()
    before = network(X)
    excite.attach(network, example=X)
    count = []
    for _, unit in attached_units(network):
        unit.register_forward_hook(lambda *_: count.append(1))
    assert torch.equal(network(X), before)
    assert len(count) == 1
    assert names(network) == ["body.b.se"]
    assert not torch.equal(differs(network)(X), before)
    with pytest.raises(UsageError, match=r"body: (a unit there is not called as it is|no module of its own)"):
        excite.attach(excite.detach(network), where="body", example=X)


def test_an_activation_in_place_whose_output_nobody_takes():
    def forward(net, x):
        y = net.norm(net.conv(x))
        net.relu(y)
        return x + y

    network = Host(forward, conv=conv(), norm=nn.BatchNorm2d(8), relu=nn.ReLU(inplace=True)).eval()
    before = network(X)
    excite.attach(network, example=X)
    assert names(network) == ["norm.se"]
    assert torch.equal(network(X), before)
    assert not torch.equal(differs(network)(X), before)


def test_what_the_network_returns_is_used_there_too():
    def forward(net, x):
        first = F.relu(net.a(x))
        second = F.relu(net.b(F.max_pool2d(first, 2)))
        return [first, second]

    network = Host(forward, a=conv(), b=conv()).eval()
    before = network(X)
    excite.attach(network, example=X)
    assert torch.equal(network(X)[0], before[0])
    assert not torch.equal(differs(network)(X)[0], before[0])


def test_maps_that_are_written_part_by_part():
    def forward(net, x):
        y = net.a(x)
        whole = torch.zeros(y.shape, device=y.device)
        whole[:, :4] = y[:, :4]
        whole[:, 4:] = F.relu(y[:, 4:])
        return x + net.b(whole)

    network = Host(forward, a=conv(), b=conv()).eval()
    excite.attach(network, example=X)
    assert names(network) == ["b.se"]
    assert [unit.name for unit in excite.attach(network, "sk", example=X).units] == ["b.sk"]


def test_skips_around_skips():
    """EDSR: blocks with skips, and a skip around them all."""

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(conv(), nn.ReLU(), conv()) for _ in range(3))
            self.last = conv()

        def forward(self, x):
            for block in self.blocks:
                x = x + 0.1 * block(x)
            return self.last(x)

    network = Host(lambda net, x: x + net.body(x), body=Body())
    ends = [*(f"body.blocks.{i}.2" for i in range(3)), "body.last"]
    for unit in ("se", "sk"):
        assert [name.removesuffix(f".{unit}") for name in names(copy.deepcopy(network))] == []
        attached = excite.attach(copy.deepcopy(network), unit, example=X)
        assert [row.name.removesuffix(f".{unit}") for row in attached.units] == ends
    before = excite.attach(copy.deepcopy(network), where="before", example=X)
    assert [row.name for row in before.units] == [f"body.blocks.{i}.0.se" for i in range(3)]


def test_convolutions_after_an_enlargement_are_no_first_ones():
    """A decoder that interpolates: what comes after it sees features, too."""

    def forward(net, x):
        return net.up(F.interpolate(net.down(x), scale_factor=2.0))

    network = Host(forward, down=conv(8, 8, 2), up=conv())
    assert [unit.name for unit in excite.attach(network, "sk", example=X).units] == ["down.sk", "up.sk"]


def test_blocks_whose_branch_is_sometimes_skipped():
    class Sometimes(Residual):
        def forward(self, x):
            return x if self.training else super().forward(x)

    network = TinyResNet()
    network.three = Sometimes(16, 16)
    excite.attach(network, where="identity")
    network.train()
    network(X).sum().backward()
    twin = copy.deepcopy(network)  # would refuse to copy a tensor of the graph
    assert torch.equal(twin.eval()(X), network.eval()(X))


def test_a_failed_pass_leaves_no_activation_behind():
    network = TinyResNet()
    excite.attach(network, where="identity")
    broken = network.one.conv2.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        network(X)
    broken.remove()
    copy.deepcopy(network)
    assert not any(
        isinstance(value, torch.Tensor) for _, unit in attached_units(network) for value in vars(unit).values()
    )


def test_checkpoints_of_the_branch_alone():
    def forward(net, x):
        return F.relu(checkpoint(net.branch, x, use_reentrant=False) + x)

    def built():
        torch.manual_seed(0)
        return Host(lambda net, x: net.block(x), block=Block())

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(conv(), nn.ReLU(), conv())

        def forward(self, x):
            return forward(self, x)

    for where in ("branch", "before", "after", "conv3x3"):
        network = built()
        excite.attach(network, where=where, example=X)
        network(X).sum().backward()
        assert all(unit.expand.bias.grad is not None for _, unit in attached_units(network))
    network = built()
    excite.attach(network, where="identity", example=X)
    with pytest.raises(RuntimeError, match="checkpoint whole blocks"):
        network(X).sum().backward()


def test_a_sum_written_over_the_shortcut():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(nn.ReLU(), conv(), nn.ReLU(), conv())

        def forward(self, x):
            x += self.branch(x)
            return x

    network = Host(lambda net, x: net.block(x), block=Block())
    with pytest.raises(UsageError, match="the sum is written over its shortcut"):
        excite.attach(network, where="identity", example=X)
    excite.attach(network, example=X)
    network(X).sum().backward()


def test_convolutions_that_are_called_by_keyword():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(), conv()

        def forward(self, x):
            return x + self.b(input=F.relu(self.a(x)))

    network = Host(lambda net, x: net.two(net.one(x)), one=Residual(8, 8), two=Block())
    attached = excite.attach(network, "sk", example=X)
    assert [unit.name for unit in attached.units] == ["one.conv2.sk"]
    assert "two.b: it is not called with a feature map as its first argument" in attached.missed


def test_a_module_with_two_names(tmp_path):
    network = TinyResNet()
    network.alias = network.one
    file = tmp_path / "host.pth"
    torch.save(network.state_dict(), file)
    excite.attach(network)
    network.load_state_dict(torch.load(file))
    excite.load_weights(network, file)


def test_norms_converted_after_attaching_lose_the_units_but_can_be_detached():
    torch.manual_seed(0)
    network = with_lively_norms(TinyResNet()).eval()
    before = network(X)
    for where in ("branch", "identity"):
        attached = copy.deepcopy(network)
        excite.attach(attached, where=where)
        converted = excite.detach(nn.SyncBatchNorm.convert_sync_batchnorm(attached))
        assert list(converted.state_dict()) == list(network.state_dict())
        assert torch.allclose(converted(X), before)
        # The other way round everything stays.
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
        excite.attach(converted, where=where)
        assert not torch.allclose(differs(converted)(X), before)


def test_one_place_after_another():
    for first, second in (("identity", "branch"), ("branch", "identity"), ("after", "before")):
        network = TinyResNet().eval()
        before = network(X)
        assert len(excite.attach(network, where=first).units) == 3
        assert len(excite.attach(network, where=second).units) == 3
        assert torch.equal(network(X), before)
        assert not torch.equal(differs(network)(X), before)
        assert torch.equal(excite.detach(network)(X), before)


def test_the_costs_are_those_of_one_image():
    one, many = (excite.attach(TinyResNet(), "sk", example=torch.zeros(n, 3, 32, 32)).macs for n in (1, 8))
    assert one == many


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        ("se+sk", "'se\\+sk' are 2 units: attach one after the other"),
        (nn.Identity(), "A unit is a name"),
        (excite.SqueezeExcite, "A unit is a name"),
        (None, "A unit is a name"),
        (lambda site: nn.AdaptiveAvgPool2d(1), "no longer runs with units in it, and has none"),
        (lambda: nn.Identity(), "Cannot attach to one.bn2"),
    ],
)
def test_mistaken_units(unit, message):
    network = TinyResNet()
    with pytest.raises(UsageError, match=message):
        excite.attach(network, unit, init="paper")
    assert not names(network)


def test_a_unit_that_gives_another_shape_which_happens_to_fit():
    with pytest.raises(UsageError, match=r"gives \(1, 16, 1, 1\) for a map of \(1, 16, 112, 112\)"):
        excite.attach(TinyResNet(), lambda site: nn.AdaptiveAvgPool2d(1), init="paper", where="three")


def test_mistaken_networks_and_examples():
    for call in (excite.attach, excite.detach):
        with pytest.raises(UsageError, match=r"an nn\.Module, not (to|from) str"):
            call("resnet18")
    with pytest.raises(UsageError, match="does not run on an example that holds no tensor"):
        excite.attach(TinyResNet(), example=(1, 3, 32, 32))
    with pytest.raises(UsageError, match="within 1-2"):
        excite.attach(TinyResNet(), stages=[[1]])


def test_a_registered_name_with_a_dot(monkeypatch):
    monkeypatch.setattr(unit_registry, "_UNITS", dict(unit_registry._UNITS))
    excite.register_unit("my.unit", lambda site: nn.Identity())
    assert excite.attach(TinyResNet(), "my.unit", init="paper").units[0].name == "one.bn2.my_unit"
