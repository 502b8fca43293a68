"""Small networks whose places for units can be read off their code."""

import torch
from torch import nn


class Residual(nn.Module):
    """A ResNet block in the style of torchvision: one activation for all, and no module on a plain shortcut."""

    def __init__(self, given, wanted, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(given, wanted, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wanted)
        self.conv2 = nn.Conv2d(wanted, wanted, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wanted)
        self.relu = nn.ReLU(inplace=True)
        self.project = None
        if stride > 1 or given != wanted:
            self.project = nn.Sequential(nn.Conv2d(given, wanted, 1, stride, bias=False), nn.BatchNorm2d(wanted))

    def forward(self, x):
        u = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        u += x if self.project is None else self.project(x)
        return self.relu(u)


class TinyResNet(nn.Module):
    """A stem and three blocks, the second of which halves the side."""

    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.one, self.two, self.three = Residual(8, 8), Residual(8, 16, 2), Residual(16, 16)
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        x = self.three(self.two(self.one(self.stem(x).relu())))
        return self.head(x.mean((2, 3)))


class Wide(nn.Module):
    """An Inception-like module: the concatenation of a 1×1 and a 3×3 convolution."""

    def __init__(self, given):
        super().__init__()
        self.small = nn.Conv2d(given, 4, 1)
        self.large = nn.Conv2d(given, 8, 3, padding=1)

    def forward(self, x):
        return torch.cat([self.small(x), self.large(x)], 1)


class Concatenating(nn.Module):
    """Two Inception-like modules."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = Wide(3), Wide(12), nn.Linear(12, 5)

    def forward(self, x):
        x = torch.max_pool2d(self.first(x), 2)
        return self.head(self.second(x).mean((2, 3)))


def plain():
    """Three resolutions, as a VGG has them."""
    layers = []
    for given, wanted in ((3, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(given, wanted, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(16 * 16, 5))


def with_lively_norms(network):
    """The network with norms as training leaves them: no scale at 0 or 1, no mean at 0."""
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network
