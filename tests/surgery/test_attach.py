"""What an attached network computes, learns, saves, and survives."""

import copy
import io
import pickle
import socket
import sys
from functools import partial

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from small_networks import Concatenating, TinyResNet, plain, with_lively_norms
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import excite
from excite.errors import UsageError
from excite.surgery import units as unit_registry
from excite.surgery.hooks import attached_units

UNITS = ["se", "sk", "eca", "cbam"]
PLACES = ["branch", "before", "after", "identity", "conv3x3"]


def images(count=4, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def host(seed=0):
    torch.manual_seed(seed)
    return with_lively_norms(TinyResNet()).eval()


def drawn(network):
    """Random units, so that they do something."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, unit in attached_units(network):
            for parameter in unit.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return network


def gates_of(network, x):
    """What every gate says, by name."""
    seen = {}
    handles = [
        module.register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: output.detach().clone()})
        )
        for name, module in network.named_modules()
        if name.rpartition(".")[2] == "gate"
    ]
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()
    return seen


def two_steps(network, x, classes=5):
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(network(x), torch.arange(len(x)) % classes).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        optimizer.step()
    return network.eval()


# --- identity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS)
def test_the_identity_is_exact_and_gates_move(unit):
    network, x = host(), images()
    before = network(x)
    excite.attach(network, unit)
    assert torch.equal(network(x), before)
    start = gates_of(network, x)
    assert len(start) == (6 if unit == "cbam" else 3)
    after = gates_of(two_steps(network, x), x)
    assert all(not torch.allclose(after[name], start[name], rtol=0, atol=1e-6) for name in start)


@pytest.mark.parametrize("where", PLACES)
def test_the_identity_is_exact_at_every_place(where):
    network, x = host(), images()
    before = network(x)
    excite.attach(network, where=where)
    assert torch.equal(network(x), before)
    start = gates_of(network, x)
    assert all((gate == 1).all() for gate in start.values())
    after = gates_of(two_steps(network, x), x)
    assert all((after[name] != 1).any() for name in start)


@pytest.mark.parametrize(("build", "where"), [(Concatenating, "auto"), (plain, "auto"), (plain, "0.4")])
def test_networks_without_residual_branches(build, where):
    torch.manual_seed(0)
    network, x = build().eval(), images()
    before = network(x)
    excite.attach(network, where=where, example=x)
    assert torch.equal(network(x), before)
    two_steps(network, x)


@pytest.mark.parametrize("unit", UNITS)
def test_drawn_as_for_training_from_scratch_the_network_is_another(unit):
    network, x = host(), images()
    before = network(x)
    torch.manual_seed(0)
    excite.attach(network, unit, init="paper")
    assert not torch.allclose(network(x), before, rtol=1e-2)
    for name, tensor in network.state_dict().items():
        if name.endswith("factor"):
            assert tensor == 1
    if unit == "se":
        # He et al.: a normal of variance 2 / fan-in, and no bias.
        reduce = torch.cat(
            [unit.reduce.weight.flatten() * unit.reduce.in_features**0.5 for _, unit in attached_units(network)]
        )
        assert reduce.std().item() == pytest.approx(2**0.5, rel=0.15)
        assert all((unit.expand.bias == 0).all() for _, unit in attached_units(network))


# --- what the units compute, once they do ----------------------------------------------------------------------


def gate(unit, u):
    """Hu et al., Eq. 2–3, with the factor 2."""
    z = u.mean((2, 3))
    s = torch.sigmoid(
        torch.relu(z @ unit.reduce.weight.T + unit.reduce.bias) @ unit.expand.weight.T + unit.expand.bias
    )
    return 2 * s[:, :, None, None]


def block(network, x, place, unit):
    """The first block written out, with the unit at one place."""
    b = network.one
    identity = lambda u: u * gate(unit, u)  # noqa: E731
    at = {name: identity if name == place else (lambda u: u) for name in PLACES}
    u = at["conv3x3"](b.bn1(b.conv1(at["before"](x)))).relu()
    u = at["branch"](b.bn2(F.conv2d(u, b.conv2.weight, padding=1)))
    return at["after"]((u + at["identity"](x)).relu())


@pytest.mark.parametrize("place", PLACES)
def test_each_place_is_the_papers(place):
    network = host()
    x = torch.randn(2, 8, 12, 12)
    excite.attach(network, where=place)
    drawn(network)
    (unit,) = [unit for name, unit in attached_units(network) if name.startswith("one.")]
    bare = excite.detach(copy.deepcopy(network))
    with torch.no_grad():
        expected, found = block(bare, x, place, unit), network.one(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, bare.one(x), rtol=1e-2)


def test_selective_kernels_around_a_convolution():
    """Li et al., Eq. 1–6, over the convolution's output and the same kernel dilated by 2."""
    network = host()
    excite.attach(network, "sk")
    drawn(network)
    b, unit, x = network.two, network.two.conv2.sk, torch.randn(3, 8, 12, 12)
    with torch.no_grad():
        inner = b.bn1(b.conv1(x)).relu()
        maps = torch.stack(
            [
                F.conv2d(inner, b.conv2.weight, padding=1),
                F.conv2d(inner, unit.branches[0].weight, padding=2, dilation=2),
            ],
            1,
        )
        z = unit.norm(maps.sum(1).mean((2, 3)) @ unit.reduce.weight.T).relu()
        a = (z @ unit.expand.weight.T).view(3, 2, 16).softmax(1)
        expected = (b.bn2((2 * a[..., None, None] * maps).sum(1)) + b.project(x)).relu()
        torch.testing.assert_close(b(x), expected, rtol=1e-4, atol=1e-4)


# --- the host stays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("where", ["auto", "identity"])
def test_detach_gives_the_host_back(unit, where):
    if unit == "sk" and where == "identity":
        pytest.skip("kernel units have one kind of place")
    network, x = host(), images()
    names, classes = list(network.state_dict()), [type(module) for module in network.modules()]
    before = network(x)
    drawn(network) if excite.attach(network, unit, where=where) else None
    assert not torch.equal(network(x), before)
    assert [name for name in network.state_dict() if f".{unit}." not in name] == names
    assert excite.detach(network) is network
    assert torch.equal(network(x), before)
    assert list(network.state_dict()) == names
    assert [type(module) for module in network.modules()] == classes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    with pytest.raises(UsageError, match="no attached units"):
        excite.detach(network)


def test_other_hooks_of_the_user_stay():
    network, called = host(), []
    network.one.bn2.register_forward_hook(lambda *_: called.append(1))
    excite.attach(network)
    excite.detach(network)
    called.clear()
    network(images())
    assert len(called) == 1


def test_the_hosts_state_dict_loads_strictly_before_and_after():
    published, x = host(seed=3), images()
    for attach_first in (False, True):
        network = host()
        if attach_first:
            excite.attach(network)
        network.load_state_dict(published.state_dict(), strict=True)
        if not attach_first:
            excite.attach(network)
        assert torch.equal(network(x), published(x))
    incomplete = {name: tensor for name, tensor in network.state_dict().items() if name != "one.bn2.se.expand.bias"}
    with pytest.raises(RuntimeError, match=r"Missing key.*one\.bn2\.se\.expand\.bias"):
        network.load_state_dict(incomplete)


def test_attaching_touches_no_weights():
    network = host()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in network.state_dict().items()}
    excite.attach(network)
    after = network.state_dict()
    for name, (address, value) in before.items():
        assert after[name].data_ptr() == address
        assert torch.equal(after[name], value)


def test_a_second_gate_is_warned_about(caplog):
    excite.attach(torchvision.models.resnet18())
    assert not caplog.records
    excite.attach(torchvision.models.efficientnet_b0())
    assert "gates its channels already, in 16 places" in caplog.text


def test_twice_is_two_units():
    network, x = host(), images()
    before = network(x)
    excite.attach(network)
    assert next(unit.name for unit in excite.attach(network).units) == "one.bn2.se_2"
    assert torch.equal(network(x), before)
    excite.detach(network)
    assert torch.equal(network(x), before)


# --- what users do with networks -------------------------------------------------------------------------------


@pytest.fixture(params=[("se", "branch"), ("se", "identity"), ("se", "before"), ("cbam", "after"), ("sk", "auto")])
def attached(request):
    unit, where = request.param
    network = host()
    excite.attach(network, unit, where=where)
    return drawn(network), partial(excite.attach, unit=unit, where=where)


def test_deep_copies_share_nothing(attached):
    network, _ = attached
    x, twin = images(), copy.deepcopy(network)
    before = network(x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for _, unit in attached_units(twin):
            for parameter in unit.parameters():
                parameter.zero_()
    assert not torch.equal(twin(x), before)
    assert torch.equal(network(x), before)
    assert {p.data_ptr() for p in network.parameters()}.isdisjoint(p.data_ptr() for p in twin.parameters())


def test_state_dicts_go_round(attached, tmp_path):
    network, attach = attached
    x, file = images(), tmp_path / "network.safetensors"
    safetensors.torch.save_model(network, str(file))
    other = host(seed=5)
    attach(other)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x), network(x))
    third = host(seed=6)
    attach(third)
    safetensors.torch.load_model(third, str(file))
    assert torch.equal(third(x), network(x))
    whole = pickle.loads(pickle.dumps(network))
    assert torch.equal(whole(x), network(x))


def test_compiled(attached):
    network, _ = attached
    torch._dynamo.reset()
    x = images()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x), rtol=1e-5, atol=1e-5)
    network.train()
    F.cross_entropy(compiled(x), torch.arange(4)).backward()
    assert all(p.grad is not None for _, unit in attached_units(network) for p in unit.parameters())


def test_exported(attached):
    network, _ = attached
    x = images()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(images(6)), network(images(6)), rtol=1e-5, atol=1e-5)


def test_traced(attached):
    network, _ = attached
    x = images()
    torch.testing.assert_close(torch.jit.trace(network, x)(images(6)), network(images(6)), rtol=1e-5, atol=1e-5)
    taken_apart = torch.fx.symbolic_trace(network)
    if any(hook.__class__.__name__ == "KeepShortcut" for hook in network.one._forward_pre_hooks.values()):
        # Nothing then calls the block, so that nobody knows its input.
        with pytest.raises(RuntimeError, match="takes blocks apart"):
            taken_apart(x)
    else:
        torch.testing.assert_close(taken_apart(x), network(x), rtol=1e-5, atol=1e-5)


def test_autocast(attached):
    network, _ = attached
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        low = network(x)
    torch.testing.assert_close(low.float(), network(x), rtol=0.1, atol=0.1)
    half = copy.deepcopy(network).to(torch.float64)
    torch.testing.assert_close(half(x.double()).float(), network(x), rtol=1e-4, atol=1e-4)


def test_modes_and_devices_follow(attached):
    network, _ = attached
    network.train()
    assert all(module.training for _, unit in attached_units(network) for module in unit.modules())
    network.eval()
    assert not any(module.training for _, unit in attached_units(network) for module in unit.modules())
    meta = copy.deepcopy(network).to("meta")
    assert all(p.device.type == "meta" for _, unit in attached_units(meta) for p in unit.parameters())
    for training in (True, False):
        fresh = host().train(training).to(torch.float64)
        excite.attach(fresh)
        for _, unit in attached_units(fresh):
            assert unit.training is training
            assert unit.reduce.weight.dtype == torch.float64


def test_activation_checkpoints(attached):
    network, _ = attached
    x, block = torch.randn(2, 8, 12, 12), network.one
    plain_output = block(x)
    x.requires_grad_()
    again = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    assert torch.equal(again, plain_output)
    again.sum().backward()
    assert x.grad.isfinite().all()


def test_a_failed_forward_pass_leaves_nothing_behind():
    network = host()
    excite.attach(network, where="identity")
    broken = network.one.conv2.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        network(images())
    broken.remove()
    assert torch.equal(network(images()), host()(images()))


def _train_two(rank, address, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    network = host().train()
    excite.attach(network, where="identity")
    parallel = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        half = images(8)[4 * rank : 4 * rank + 4]
        F.cross_entropy(parallel(half), torch.arange(4)).backward()
        optimizer.step()
    results[rank] = {name: p.detach().clone() for name, p in network.named_parameters() if ".se." in name}
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over TCP on one machine")
def test_distributed_data_parallel():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        workers = [context.Process(target=_train_two, args=(rank, address, results)) for rank in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
        assert [worker.exitcode for worker in workers] == [0, 0]
        first, second = results[0], results[1]
    assert first.keys() == second.keys()
    assert len(first) == 12
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        if "expand" in name:
            assert value.abs().max() > 0, name


def test_onnx(attached, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    network, _ = attached
    file, x = tmp_path / "network.onnx", images()
    torch.onnx.export(network, (x,), file, dynamo=True)
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), network(x), rtol=1e-4, atol=1e-4)


# --- units of the user's own -----------------------------------------------------------------------------------


class Shift(nn.Module):
    """Adds one number to each channel."""

    def __init__(self, channels):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, u):
        return u + self.shift

    def start_as_identity(self):
        nn.init.zeros_(self.shift)


def test_a_function_that_makes_units():
    network, x = host(), images()
    before = network(x)
    excite.attach(network, lambda site: Shift(site.out_channels))
    assert torch.equal(network(x), before)
    drawn(network)
    assert not torch.equal(network(x), before)


def test_registered_units(monkeypatch):
    monkeypatch.setattr(unit_registry, "_UNITS", dict(unit_registry._UNITS))
    excite.register_unit("shift", lambda site, *, scale: Shift(site.out_channels))
    network = host()
    with pytest.raises(UsageError, match="unknown argument 'size'"):
        excite.attach(network, "shift:size=2")
    names = [unit.name for unit in excite.attach(network, "shift:scale=2").units]
    assert names == ["one.bn2.shift", "two.bn2.shift", "three.bn2.shift"]

    excite.register_unit("same", lambda site: nn.Identity())
    with pytest.raises(UsageError, match=r"Cannot attach to one\.bn2: Identity has no start_as_identity"):
        excite.attach(host(), "same")
    assert len(excite.attach(host(), "same", init="paper").units) == 3

    excite.register_unit("instead", lambda site: nn.Identity(), place="convolution")
    with pytest.raises(UsageError, match="cannot keep a trained one"):
        excite.attach(host(), "instead")


def test_a_unit_that_breaks_the_network_is_taken_out_again():
    network, x = host(), images()
    before = network(x)
    with pytest.raises(UsageError, match="TinyResNet no longer runs with units in it, and has none"):
        excite.attach(network, lambda site: nn.Conv2d(site.out_channels, 3, 1), init="paper")
    assert torch.equal(network(x), before)
    assert not list(attached_units(network))


# --- the table -------------------------------------------------------------------------------------------------


def test_the_table_adds_up():
    bare = excite.cost(host(), (3, 32, 32))
    network = host()
    attached = excite.attach(network, "se:reduction=4", example=images(1))
    whole = excite.cost(network, (3, 32, 32))
    assert attached.parameters == whole.parameters - bare.parameters
    assert attached.macs == whole.macs - bare.macs
    # C/r = 2, but at least 4: 8·4 + 4 and 4·8 + 8; with 16 channels 16·4 + 4 and 4·16 + 16.
    assert [unit.parameters for unit in attached.units] == [76, 148, 148]
    assert [unit.macs for unit in attached.units] == [64, 128, 128]
    assert [unit.reduction for unit in attached.units] == [2, 4, 4]
    text = str(attached)
    assert "one.bn2.se" in text
    assert "2 in stage 2" in text
    assert text.splitlines()[-1].split() == ["3", "in", "all", "372", "320"]


@pytest.mark.parametrize("unit", UNITS)
def test_what_a_unit_adds_is_what_the_whole_costs_more(unit):
    bare = excite.cost(host(), (3, 32, 32))
    network = host()
    attached = excite.attach(network, unit, example=images(1))
    whole = excite.cost(network, (3, 32, 32))
    assert attached.parameters == whole.parameters - bare.parameters
    assert attached.macs == whole.macs - bare.macs


def test_a_network_saved_whole(tmp_path):
    network, buffer = host(), io.BytesIO()
    excite.attach(network)
    torch.save(network, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(images()), network(images()))
