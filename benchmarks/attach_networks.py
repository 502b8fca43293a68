"""Attach SE and SK to many networks: do they compute what they computed, and do they learn?

    python benchmarks/attach_networks.py [NAME …] > table.md

Each network has random weights, with norms, layer scales and statistics as training leaves them (none at 0 or 1), for
a branch that puts out zero teaches a gate nothing. For each unit: the outputs before and after attaching (largest
difference over largest output), then two steps of SGD, after which every gate must have moved and all gradients have
been finite.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import excite
from excite.surgery.hooks import attached_units

CLASSES = 10
TORCHVISION = {
    "resnet18": 96,
    "resnet50": 96,
    "resnext50_32x4d": 96,
    "wide_resnet50_2": 96,
    "densenet121": 96,
    "mobilenet_v2": 96,
    "mobilenet_v3_small": 96,
    "mobilenet_v3_large": 96,
    "efficientnet_b0": 96,
    "efficientnet_v2_s": 96,
    "shufflenet_v2_x1_0": 96,
    "regnet_x_400mf": 96,
    "regnet_y_400mf": 96,
    "convnext_tiny": 96,
    "mnasnet1_0": 96,
    "googlenet": 96,
    "inception_v3": 299,
    "alexnet": 96,
    "vgg11": 96,
    "vgg11_bn": 96,
    "squeezenet1_0": 96,
    "squeezenet1_1": 96,
}
TIMM = {
    "resnet26d": 96,
    "resnet50_gn": 96,
    "resnetv2_50": 96,
    "resnetrs50": 96,
    "seresnet18": 96,
    "skresnet18": 96,
    "ecaresnet26t": 96,
    "res2net50_26w_4s": 96,
    "resnest14d": 96,
    "cspresnet50": 96,
    "cspdarknet53": 96,
    "darknet53": 96,
    "dla34": 96,
    "dpn68": 96,
    "densenet121": 96,
    "vovnet39a": 96,
    "ese_vovnet19b_dw": 96,
    "ghostnet_100": 96,
    "hrnet_w18_small": 96,
    "inception_v4": 128,
    "inception_resnet_v2": 128,
    "inception_next_tiny": 96,
    "xception41": 96,
    "nf_resnet26": 96,
    "regnetx_002": 96,
    "repvgg_a0": 96,
    "mobileone_s0": 96,
    "selecsls42": 96,
    "gernet_s": 96,
    "tf_efficientnet_b0": 96,
    "efficientnet_b0": 96,
    "mixnet_s": 96,
    "mobilenetv3_small_050": 96,
    "mobilenetv4_conv_small": 96,
    "mnasnet_small": 96,
    "fbnetc_100": 96,
    "lcnet_050": 96,
    "rexnet_100": 96,
    "tinynet_e": 96,
    "convnext_atto": 96,
    "convnextv2_atto": 96,
    "convmixer_768_32": 96,
    "edgenext_xx_small": 96,
    "fastvit_t8": 96,
    "poolformer_s12": 96,
    "starnet_s1": 96,
    "repghostnet_050": 96,
}


@dataclass(frozen=True)
class Subject:
    """A network, and how to ask it.

    Attributes:
        build: makes it.
        answer: its output in eval mode, as one tensor.
        loss: of one training batch.
        example: what to attach with.
    """

    build: Callable[[], nn.Module]
    answer: Callable[[nn.Module], Tensor]
    loss: Callable[[nn.Module], Tensor]
    example: Any


def classifier(spec: str, size: int) -> Subject:
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))

    def loss(network: nn.Module) -> Tensor:
        output = network(images)
        logits = output if isinstance(output, Tensor) else output[0]
        return F.cross_entropy(logits, torch.arange(4))

    return Subject(lambda: excite.create(spec, CLASSES), lambda network: network(images), loss, images[:1])


def detector() -> Subject:
    images = list(torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1)))
    boxes = torch.tensor([[10.0, 20.0, 90.0, 100.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1])}] * 2
    settings: dict[str, Any] = {"weights": None, "weights_backbone": None, "min_size": 128, "num_classes": 2}

    def answer(network: nn.Module) -> Tensor:
        maps = network.backbone(torch.stack(images))  # type: ignore[operator]
        found = network(images)
        return torch.cat([part.flatten() for part in [*maps.values(), *(item["boxes"] for item in found)]])

    return Subject(
        lambda: torchvision.models.get_model("fasterrcnn_resnet50_fpn", **settings),
        answer,
        lambda network: sum(network(images, targets).values()),
        (images,),
    )


def segmenter() -> Subject:
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 3}
    target = torch.arange(96 * 96).view(96, 96).expand(2, -1, -1) % 3
    return Subject(
        lambda: torchvision.models.get_model("deeplabv3_resnet50", **settings),
        lambda network: network(images)["out"],
        lambda network: F.cross_entropy(network(images)["out"], target),
        images[:1],
    )


def enliven(network: nn.Module) -> None:
    """Constants that training would have moved, moved."""
    for name, parameter in network.named_parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
            else:
                nn.init.uniform_(parameter, 0.5, 1.0)
    for module in network.modules():
        if isinstance(getattr(module, "running_var", None), Tensor):
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]


def gates(network: nn.Module, subject: Subject) -> dict[str, Tensor]:
    """What the gates of the attached units say."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, args, output, key=f"{name}.{path}": seen.update({key: output.clone()}))
        for name, unit in attached_units(network)
        for path, module in unit.named_modules()
        if path.rpartition(".")[2] == "gate"
    ]
    with torch.no_grad():
        subject.answer(network.eval())
    for handle in handles:
        handle.remove()
    return seen


def try_out(subject: Subject, unit: str) -> list[str]:
    """The cells of one unit: how many, parameters added, difference, gates that moved."""
    torch.manual_seed(0)
    network = subject.build()
    enliven(network)
    with torch.no_grad():
        before = subject.answer(network.eval())
    bare = sum(parameter.numel() for parameter in network.parameters())
    attached = excite.attach(network, unit, example=subject.example)
    with torch.no_grad():
        after = subject.answer(network.eval())
    difference = float((after - before).abs().max() / before.abs().max())
    start = gates(network, subject)
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    finite = True
    for _ in range(2):
        optimizer.zero_grad()
        subject.loss(network).backward()  # type: ignore[no-untyped-call]
        given = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        finite &= all(bool(gradient.isfinite().all()) for gradient in given)
        optimizer.step()
    end = gates(network, subject)
    moved = sum(bool((end[name] != start[name]).any()) for name in start)
    added = f"{len(attached.units)} (+{100 * attached.parameters / bare:.1f} %)"
    return [
        added,
        f"{difference:.0e}" if difference else "0",
        f"{moved} of {len(start)}" + ("" if finite else ", NaN"),
    ]


def main(only: list[str]) -> None:
    logging.disable(logging.WARNING)
    subjects = {f"torchvision:{name}": classifier(f"torchvision:{name}", size) for name, size in TORCHVISION.items()}
    subjects |= {"torchvision fasterrcnn_resnet50_fpn": detector(), "torchvision deeplabv3_resnet50": segmenter()}
    subjects |= {f"timm:{name}": classifier(f"timm:{name}", size) for name, size in TIMM.items()}
    columns = ["network"]
    for unit in ("SE", "SK"):
        columns += [f"{unit} units (parameters)", "difference", "gates moved"]
    print("| " + " | ".join(columns) + " |")
    print("|" + "|".join([" --- "] + [" ---: "] * 6) + "|")
    for name, subject in subjects.items():
        if only and not any(part in name for part in only):
            continue
        cells = [cell for unit in ("se", "sk") for cell in try_out(subject, unit)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
