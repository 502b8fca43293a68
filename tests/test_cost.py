import pytest
import timm
import torch
import torchvision
from torch import nn

from excite.cost import Cost, cost
from excite.create import create
from excite.errors import UsageError


def by_hand(module, shape):
    """MACs from each layer's own formula, with the output sizes seen in a real forward pass."""
    total = 0

    def count(layer, inputs, output):
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            per_output = layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
            total += output.numel() * per_output
        else:
            total += output.numel() * layer.in_features

    handles = [
        layer.register_forward_hook(count) for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        module.eval()(torch.randn(1, *shape))
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: create("resnet20+se+sk", 10), (3, 32, 32)),
        (lambda: create("sknet26:width=0.25+se", 10), (3, 96, 64)),
        (lambda: torchvision.models.mobilenet_v3_small(num_classes=7), (3, 64, 64)),
        (lambda: timm.create_model("convnext_atto"), (3, 64, 64)),
    ],
)
def test_counts_what_the_layers_formulas_give(build, shape):
    module = build()
    assert cost(module, shape).macs == by_hand(module, shape)
    assert cost(module, shape).parameters == sum(p.numel() for p in module.parameters())


def test_a_convolution_by_hand():
    layer = nn.Conv2d(6, 10, 3, stride=2, padding=1, groups=2)
    # 10 maps of 4 × 4 outputs, each the sum over 3 input channels of 9 products; a bias costs no multiplication.
    assert cost(layer, (6, 8, 8)) == Cost(parameters=10 * 3 * 9 + 10, macs=10 * 4 * 4 * 3 * 9)


def test_shared_parameters_count_once():
    layer = nn.Linear(8, 8, bias=False)
    assert cost(nn.Sequential(layer, nn.ReLU(), layer), (8,)) == Cost(parameters=64, macs=128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_module_stays_as_it_was(dtype):
    module = create("resnet20+se", 10).to(dtype)
    module.layer1.eval()
    before = {name: (tensor, tensor.clone()) for name, tensor in module.state_dict(keep_vars=True).items()}
    modes = [child.training for child in module.modules()]
    cost(module, (3, 32, 32))
    assert modes == [child.training for child in module.modules()]
    after = module.state_dict(keep_vars=True)
    for name, (tensor, values) in before.items():
        assert after[name] is tensor
        assert torch.equal(tensor, values)


class NeedsNumbers(nn.Module):
    """Looks at what its tensor holds, which a meta tensor cannot answer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 5)

    def forward(self, x):
        if x.sum().item() > 1e9:
            return x
        return self.linear(self.norm(x))


def test_a_network_that_cannot_run_without_numbers_runs_for_real():
    module = NeedsNumbers().train()
    assert cost(module, (4,)) == Cost(parameters=8 + 25, macs=20)
    assert module.training
    assert module.norm.training
    assert module.norm.num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_network_that_cannot_be_copied_runs_for_real():
    module = torch.nn.utils.weight_norm(nn.Conv2d(2, 3, 1))
    assert cost(module, (2, 4, 4)).macs == 2 * 3 * 16


def test_takes_no_memory_for_a_network_on_meta():
    with torch.device("meta"):
        module = nn.Linear(1_000_000, 1_000_000)
    assert cost(module, (1_000_000,)) == Cost(10**12 + 10**6, 10**12)


def test_compiled_networks_are_counted_and_not_compiled():
    def refuse(graph, inputs):
        raise AssertionError("compiled")

    module = torch.compile(nn.Linear(3, 4), backend=refuse)
    assert cost(module, (3,)) == Cost(16, 12)


@pytest.mark.parametrize("shape", [(), (3, 0, 32), (3, -1, 32)])
def test_shapes_that_are_none(shape):
    with pytest.raises(UsageError, match="positive"):
        cost(nn.ReLU(), shape)


def test_a_shape_that_does_not_fit():
    with pytest.raises(UsageError, match=r"does not run on an input of shape \(4, 32, 32\).*channels"):
        cost(create("resnet20"), (4, 32, 32))


def test_a_network_without_parameters_yet():
    with pytest.raises(UsageError, match="run it once"):
        cost(nn.LazyLinear(3), (4,))
