import copy
import json

import pytest
import torch
from torch import nn

from excite.analysis.gates import find_gates
from excite.cost import cost
from excite.create import create
from excite.deploy.channels import Channels, TooNarrowError, widths
from excite.deploy.pruned import changed_widths, rebuild, widths_of
from excite.deploy.routes import replace_zero_padding
from excite.errors import ExciteError

pytest.importorskip("torch_pruning")

SPECS = [
    "resnet20:width=0.5",
    "resnet20:width=0.5+se",
    "resnet20:width=0.5+sk",
    "resnet20:width=0.5+cbam",
    "resnet20:width=0.5+se:init=identity",
    "resnet20:width=0.5+sk:init=identity",
    "resnet20:width=0.5+se:where=identity",
    "torchvision:mobilenet_v3_small",
]


def drawn(spec):
    """A network whose batch norms differ from each other, as those of a trained one."""
    torch.manual_seed(0)
    network = create(spec, 10).eval()
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    return network, torch.randn(2, 3, 32, 32)


def narrowed(network, example, share=0.6, seed=0):
    """Channels at random; returns what stayed, and the groups."""
    channels = Channels(network, example, find_gates(network, example))
    before = widths_of(network)
    counts = widths(channels.groups, channels.macs, share * sum(channels.macs.values()))
    generator = torch.Generator().manual_seed(seed)
    kept = {
        group.name: sorted(torch.randperm(group.size, generator=generator)[: counts[group.name]].tolist())
        for group in channels.groups
    }
    channels.keep(kept)
    record = {"routes": channels.routes, "units": [], "layers": changed_widths(before, widths_of(network))}
    return kept, channels.groups, record


@pytest.mark.parametrize("spec", SPECS)
def test_taking_channels_out_is_the_same_as_setting_their_maps_to_zero(spec):
    network, example = drawn(spec)
    masked = copy.deepcopy(network)
    kept, groups, _ = narrowed(network, example)
    with torch.no_grad():
        for group in groups:
            gone = torch.ones(group.size, dtype=torch.bool)
            gone[kept[group.name]] = False
            for part in group.parts:
                layer = masked.get_submodule(part.layer)
                if part.role != "input" and not part.of_gate:
                    for values in (layer.weight, layer.bias):
                        if values is not None:
                            values[part.places[gone[part.channels]]] = 0
                # What a shortcut brings from the stage before must not pass, either.
                stage = part.layer.partition(".")[0]
                if part.role == "norm" and stage.startswith("layer") and not part.layer.endswith("bn1"):
                    for block in masked.get_submodule(stage):
                        for module in (block, block.downsample):
                            module.register_forward_hook(
                                lambda *given, gone=gone: given[2] * ~gone[:, None, None], prepend=True
                            )
    if "cbam" in spec:  # its other half looks at the mean over all channels
        for net in (network, masked):
            for module in net.modules():
                if type(module).__name__ == "SpatialAttention":
                    nn.init.zeros_(module.convolution.weight)
    with torch.inference_mode():
        torch.testing.assert_close(network(example), masked(example), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_the_record_makes_the_same_of_a_new_network(spec):
    network, example = drawn(spec)
    _, _, record = narrowed(network, example)
    new = rebuild(create(spec, 10).eval(), json.loads(json.dumps(record)))
    new.load_state_dict(network.state_dict())
    with torch.inference_mode():
        assert torch.equal(new(example), network(example))
    assert widths_of(new) == widths_of(network)


def test_a_pruned_network_learns():
    network, example = drawn("resnet20:width=0.5+se")
    narrowed(network, example)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network.train()(example).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))


def test_the_multiply_adds_come_down_to_what_was_asked_for_and_no_further_than_needed():
    network, example = drawn("resnet20+se")
    full = cost(network, (3, 32, 32)).macs
    channels = Channels(network, example, find_gates(network, example))
    assert sum(channels.macs.values()) == full
    counts = widths(channels.groups, channels.macs, 0.7 * full)
    channels.keep({name: range(width) for name, width in counts.items()})
    assert 0.69 < cost(network, (3, 32, 32)).macs / full <= 0.7
    shares = [counts[group.name] / group.size for group in channels.groups]
    assert max(shares) - min(shares) < 1 / 16


def test_widths_are_multiples_where_they_are_to_be():
    network, example = drawn("resnet20+se")
    channels = Channels(network, example, find_gates(network, example))
    counts = widths(channels.groups, channels.macs, 0.5 * sum(channels.macs.values()), multiple=8)
    assert {width % 8 for width in counts.values()} == {0}


def test_what_cannot_be_reached_is_refused():
    network, example = drawn("resnet20+se")
    channels = Channels(network, example, find_gates(network, example))
    with pytest.raises(TooNarrowError, match="larger target"):
        widths(channels.groups, channels.macs, 1000)


def test_outputs_and_hidden_layers_of_gates_are_left_alone():
    network, example = drawn("resnet20+se")
    channels = Channels(network, example, find_gates(network, example))
    assert len(channels.groups) == 3 + 9  # a stage each, and the inside of each block
    written = {part.layer for group in channels.groups for part in group.parts if part.role == "output"}
    assert "fc" not in written
    assert not any(layer.endswith("reduce") for layer in written)


def test_routes_do_what_padding_with_zero_channels_did():
    network, example = drawn("resnet20:width=0.5")
    with torch.inference_mode():
        before = network(example)
        assert replace_zero_padding(network) == ["layer2.0.downsample", "layer3.0.downsample"]
        assert torch.equal(network(example), before)


def test_a_record_of_another_network_is_refused():
    network, example = drawn("resnet20:width=0.5+se")
    _, _, record = narrowed(network, example)
    with pytest.raises(ExciteError, match="another network"):
        rebuild(create("resnet20:width=0.5+se:stages=1", 10), record | {"units": [{"unit": "layer9"}]})
