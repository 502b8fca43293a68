"""Rewrites: what they leave of a network's operators, and that its answers stay."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import excite
from excite.deploy import rewrite as rewriting
from excite.deploy.capture import Editor, aten, capture, shape
from excite.deploy.rewrite import rewrite
from excite.errors import ExciteError, UsageError
from rewritten_networks import difference, images, randomised


def operators(module: fx.GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in module.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize(
    "spec", ["resnet18+se", "sknet26", "timm:seresnet18", "timm:skresnet18", "torchvision:resnet18+se"]
)
def test_norms_go_and_answers_stay(spec: str) -> None:
    network = randomised(excite.create(spec, 10))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    rewritten = rewrite(network, images(size=64))
    assert not any("norm" in name for name in operators(rewritten))
    assert difference(rewritten, network, images(5, 64, seed=2)) < 1e-5
    assert rewritten.meta["rewritten"]["refused"] == {}
    after = network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_squeeze_of_a_bottleneck_reads_the_narrow_map() -> None:
    network = randomised(excite.create("resnet50+se:reduction=4", 10))
    rewritten = rewrite(network, images(size=64))
    means = [node for node in rewritten.graph.nodes if node.target is aten.mean.dim]
    squeezed = [shape(node.args[0])[1] for node in means]
    assert squeezed == [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3 + [2048]  # the last is the head's
    reduces = [node for node in rewritten.graph.nodes if node.target is aten.linear.default][::2]
    # W₁·W₃ in place of W₁ after W₃: 256/4 numbers from 64, and so on.
    sizes = [
        tuple(value.shape) for node in reduces[:-1] if (value := Editor(rewritten).constant(node.args[1])) is not None
    ]
    assert sizes[0] == (64, 64)
    assert sizes[-1] == (512, 512)


def test_selective_kernels_choose_by_one_sigmoid() -> None:
    for spec in ("sknet26", "timm:skresnet18", "resnet18+sk"):
        counted = operators(rewrite(randomised(excite.create(spec, 10)), images(size=64)))
        assert counted["aten.lerp.Tensor"] == counted["aten.sigmoid.default"] == 8
        assert not any("softmax" in name or "stack" in name for name in counted)


def test_three_branches_keep_their_softmax() -> None:
    unit = excite.SelectiveKernel(16, 16, branches=((3, 1), (3, 2), (3, 3)), groups=4).eval()
    network = nn.Sequential(nn.Conv2d(3, 16, 1), randomised(unit), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    rewritten = rewrite(network, images())
    assert operators(rewritten)["aten.softmax.int"] == 1
    assert difference(rewritten, network, images(3)) < 1e-5


class Split(nn.Module):
    """A bottleneck's first convolution, whose channels two branches share out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)
        self.left, self.right = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, two = F.relu(self.norm(self.first(x))).split((4, 8), dim=1)
        return self.left(one) + self.right(two)


def test_a_convolution_that_is_split_answers_in_parts() -> None:
    network = randomised(Split())
    rewritten = rewrite(network, images())
    assert not any("split" in name for name in operators(rewritten))
    assert difference(rewritten, network, images(3)) < 1e-5


def test_gates_that_are_constant_are_folded() -> None:
    network = excite.create("resnet20+se")
    for module in network.modules():
        if isinstance(module, excite.SqueezeExcite):
            nn.init.zeros_(module.expand.weight)
            nn.init.normal_(module.expand.bias)
    randomised(network)
    rewritten = rewrite(network, images())
    assert rewritten.meta["rewritten"]["made"]["constant gates folded"] == 9
    counted = operators(rewritten)
    assert counted["aten.sigmoid.default"] == counted["aten.mul.Tensor"] == counted["aten.addcmul.default"] == 0
    assert counted["aten.mean.dim"] == 1  # the head's
    assert difference(rewritten, network, images(3)) < 1e-5


def test_a_norm_of_which_the_input_goes_elsewhere_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            u = self.convolution(x)
            return self.norm(u) * u

    network = randomised(Twice())
    rewritten = rewrite(network, images())
    assert operators(rewritten)["aten.batch_norm.default"] == 1
    assert difference(rewritten, network, images(3)) < 1e-6


def test_a_wrong_rewrite_is_refused_and_the_others_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(editor: Editor) -> int:
        relus = list(editor.calls(aten.relu.default))
        for node in relus:
            editor.replace(node, editor.call(aten.tanh.default, node.args[0], before=node))
        return len(relus)

    monkeypatch.setitem(rewriting.REWRITES, "squeeze before projection", wrong)
    network = randomised(excite.create("resnet20+se"))
    rewritten = rewrite(network, images())
    done = rewritten.meta["rewritten"]
    assert list(done["refused"]) == ["squeeze before projection"]
    assert done["made"]["batch norm folded"] == 19
    assert difference(rewritten, network, images(3)) < 1e-5


def test_networks_that_answer_with_several_maps() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> dict[str, Any]:
            u = F.relu(self.one(x))
            return {"fine": u, "coarse": [self.two(u)]}

    network = Pyramid().eval()
    given = images(3)
    said, wanted = rewrite(network, images())(given), network(given)
    assert torch.allclose(said["fine"], wanted["fine"], atol=1e-6)
    assert torch.allclose(said["coarse"][0], wanted["coarse"][0], atol=1e-6)


def test_what_cannot_be_followed_is_said() -> None:
    class Depends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum().item() > 0 else x

    class Draws(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    with pytest.raises(UsageError, match="Depends cannot be followed operator by operator on an input of shape"):
        capture(Depends(), images())
    with pytest.raises(ExciteError, match="random numbers"):
        rewrite(Draws(), images())
