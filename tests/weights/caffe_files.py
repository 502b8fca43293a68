"""Caffe networks for tests: a small interpreter of Caffe's layers, the releases' graphs in it, and a writer of files.

Nothing of excite is used here: files are written by Google's protobuf from a description of the messages, and what a
network should answer is computed from its blobs, layer by layer, as the releases' prototxt files put them together.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# --- files -----------------------------------------------------------------------------------------------------

_KINDS = descriptor_pb2.FieldDescriptorProto
_INT32, _INT64, _FLOAT, _DOUBLE = _KINDS.TYPE_INT32, _KINDS.TYPE_INT64, _KINDS.TYPE_FLOAT, _KINDS.TYPE_DOUBLE
_STRING, _BOOL = _KINDS.TYPE_STRING, _KINDS.TYPE_BOOL
# caffe.proto as far as it matters here: message → name: (number, kind or message, whether repeated)
MESSAGES = {
    "BlobShape": {"dim": (1, _INT64, True)},
    "BlobProto": {
        "num": (1, _INT32, False),
        "channels": (2, _INT32, False),
        "height": (3, _INT32, False),
        "width": (4, _INT32, False),
        "data": (5, _FLOAT, True),
        "diff": (6, _FLOAT, True),
        "shape": (7, "BlobShape", False),
        "double_data": (8, _DOUBLE, True),
    },
    "NetState": {"phase": (1, _INT32, False)},
    "V1LayerParameter": {
        "bottom": (2, _STRING, True),
        "top": (3, _STRING, True),
        "name": (4, _STRING, False),
        "type": (5, _INT32, False),
        "blobs": (6, "BlobProto", True),
        "blobs_lr": (7, _FLOAT, True),
    },
    "LayerParameter": {
        "name": (1, _STRING, False),
        "type": (2, _STRING, False),
        "bottom": (3, _STRING, True),
        "top": (4, _STRING, True),
        "loss_weight": (5, _FLOAT, True),
        "blobs": (7, "BlobProto", True),
        "phase": (10, _INT32, False),
    },
    "NetParameter": {
        "name": (1, _STRING, False),
        "layers": (2, "V1LayerParameter", True),
        "input": (3, _STRING, True),
        "input_dim": (4, _INT32, True),
        "force_backward": (5, _BOOL, False),
        "state": (6, "NetState", False),
        "debug_info": (7, _BOOL, False),
        "input_shape": (8, "BlobShape", True),
        "layer": (100, "LayerParameter", True),
    },
}


@functools.cache
def net_parameter(packed=True):
    """The class of NetParameter messages."""
    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package="caffe", syntax="proto2")
    for message, fields in MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, (number, kind, repeated) in fields.items():
            field = described.field.add(name=name, number=number)
            field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if isinstance(kind, str):
                field.type, field.type_name = field.TYPE_MESSAGE, f".caffe.{kind}"
            else:
                field.type = kind
                field.options.packed = packed and name in ("dim", "data", "diff", "double_data")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("caffe.NetParameter"))


def caffemodel(blobs, *, old_layers=False, old_shapes=False, packed=True, double=False, diff=False, name="net"):
    """The bytes of a network, of {layer: [arrays]}, in one of the ways of Caffe's versions."""
    net = net_parameter(packed)(name=name)
    layers = net.layers if old_layers else net.layer
    for layer_name, arrays in blobs.items():
        layer = layers.add(name=layer_name, top=[layer_name], bottom=["data"])
        layer.type = 4 if old_layers else "Convolution"
        for array in arrays:
            array = np.asarray(array)
            blob = layer.blobs.add()
            if old_shapes:
                blob.num, blob.channels, blob.height, blob.width = (1,) * (4 - array.ndim) + array.shape
            else:
                blob.shape.dim.extend(array.shape)
            (blob.double_data if double else blob.data).extend(array.ravel().tolist())
            if diff:
                blob.diff.extend([0.5] * array.size)
    return net.SerializeToString()


# --- the interpreter -------------------------------------------------------------------------------------------


def _rounded(tensor):
    """In double precision, but a number that a file in single precision can hold."""
    return tensor.float().double()


class CaffeNet:
    """Runs a graph of Caffe layers on an image, and makes up the blobs of each layer on the way.

    The statistics of batch norms are those of the numbers that pass, a little off, so that a network of any depth
    stays in range.

    All is computed in double precision, with blobs that single precision can hold.

    Args:
        seed: None makes networks of shapes only: all blobs zero, no memory, images on the device ``meta``.
        bn: "caffe" for BatchNorm (statistics times a factor) and Scale, "cudnn" for CuDNNBatchNorm.
    """

    def __init__(self, seed, bn="caffe"):
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.bn = bn
        self.blobs: dict[str, list[torch.Tensor]] = {}

    def random(self, *shape, scale=1.0, around=0.0):
        if self.generator is None:
            return torch.zeros(1).expand(shape)
        return _rounded(torch.randn(shape, generator=self.generator) * scale + around)

    def conv(self, name, x, outputs, kernel=1, stride=1, pad=0, group=1, dilation=1, bias=False):
        inputs = x.shape[1] // group
        blobs = [self.random(outputs, inputs, kernel, kernel, scale=(inputs * kernel**2) ** -0.5)]
        if bias:
            blobs.append(self.random(outputs, scale=0.5))
        self.blobs[name] = blobs
        weight, shift = [*blobs, None][:2] if self.generator else (blobs[0].to("meta"), None)
        return F.conv2d(x, weight, shift, stride, pad, dilation, group)

    def norm(self, name, x, scale_name):
        channels = x.shape[1]
        if self.generator is None:
            mean = variance = torch.zeros(1).expand(channels)
        else:
            mean = x.mean((0, 2, 3)) + self.random(channels, scale=0.1)
            variance = x.var((0, 2, 3), correction=0) * (1.2 + self.random(channels, scale=0.1)).abs() + 0.05
        gamma, beta = self.random(channels, scale=0.2, around=1.0), self.random(channels, scale=0.2)
        if self.bn == "cudnn":
            mean, variance = _rounded(mean), _rounded(variance)
            self.blobs[name] = [blob.reshape(1, channels, 1, 1) for blob in (gamma, beta, mean, variance)]
        else:
            factor = _rounded(torch.tensor([999.982]))
            sums = [_rounded(mean * factor), _rounded(variance * factor)]
            mean, variance = (total / factor for total in sums)
            self.blobs[name] = [*sums, factor]
            self.blobs[scale_name] = [gamma, beta]
        if self.generator is None:
            return x
        column = (slice(None), None, None)
        return (x - mean[column]) / (variance[column] + 1e-5).sqrt() * gamma[column] + beta[column]

    def linear(self, name, x, outputs):
        x = x.flatten(1)
        self.blobs[name] = [
            self.random(outputs, x.shape[1], scale=x.shape[1] ** -0.5),
            self.random(outputs, scale=0.1),
        ]
        return F.linear(x, *self.blobs[name]) if self.generator else x


def max_pool(x, kernel=3, stride=2):
    """Caffe rounds up: the last window may hang over the edge."""
    return F.max_pool2d(x, kernel, stride, ceil_mode=True)


def global_pool(x):
    return x.mean((2, 3), keepdim=True)


def caffe_image(image, mean=(104.0, 117.0, 123.0)):
    """What the releases feed their networks, from an RGB image in 0..1: BGR, 0..255, less a mean."""
    return image.double().flip(1) * 255 - torch.tensor(mean).double()[:, None, None]


# --- the releases' graphs ----------------------------------------------------------------------------------------


def _conv_bn(net, name, x, *args, relu=True, **kwargs):
    x = net.norm(f"{name}/bn", net.conv(name, x, *args, **kwargs), f"{name}/bn/scale")
    return F.relu(x) if relu else x


def _squeeze_excite(net, name, x, reduction=16):
    """Global pooling, two 1×1 convolutions with bias, sigmoid."""
    s = F.relu(net.conv(f"{name}_1x1_down", global_pool(x), x.shape[1] // reduction, bias=True))
    return torch.sigmoid(net.conv(f"{name}_1x1_up", s, x.shape[1], bias=True))


def _stages(depths):
    for stage, depth in enumerate(depths):
        for block in range(depth):
            yield stage, f"conv{stage + 2}_{block + 1}", 2 if stage and not block else 1, block == 0


def senet(net, x, depths=(3, 4, 6, 3), inner=64, group=1, deep=False):
    """SE-ResNet, SE-ResNeXt (group 32, inner 128) and SENet-154 (deep, group 64, inner 256)."""
    if deep:
        x = _conv_bn(net, "conv1_1/3x3_s2", x, 64, kernel=3, stride=2, pad=1)
        x = _conv_bn(net, "conv1_2/3x3", x, 64, kernel=3, pad=1)
        x = _conv_bn(net, "conv1_3/3x3", x, 128, kernel=3, pad=1)
    else:
        x = _conv_bn(net, "conv1/7x7_s2", x, 64, kernel=7, stride=2, pad=3)
    x = max_pool(x)
    for stage, name, stride, first in _stages(depths):
        width, outputs = inner << stage, 256 << stage
        stride1, stride2 = (stride, 1) if group == 1 else (1, stride)
        u = _conv_bn(net, f"{name}_1x1_reduce", x, width // 2 if deep else width, stride=stride1)
        u = _conv_bn(net, f"{name}_3x3", u, width, kernel=3, stride=stride2, pad=1, group=group)
        u = _conv_bn(net, f"{name}_1x1_increase", u, outputs, relu=False)
        s = _squeeze_excite(net, name, u)
        if first:
            kernel = 3 if deep and stage else 1
            shape = {"kernel": kernel, "stride": stride, "pad": kernel // 2}
            x = _conv_bn(net, f"{name}_1x1_proj", x, outputs, relu=False, **shape)
        x = F.relu(s * u + x)
    return net.linear("classifier", global_pool(x), 1000)


def sknet(net, x, depths=(3, 4, 6, 3)):
    x = max_pool(_conv_bn(net, "conv1/7x7_s2", x, 64, kernel=7, stride=2, pad=3))
    for stage, name, stride, first in _stages(depths):
        width, outputs = 128 << stage, 256 << stage
        u = _conv_bn(net, f"{name}/1x1_reduce", x, width)
        near = _conv_bn(net, f"{name}/3x3g32", u, width, kernel=3, stride=stride, pad=1, group=32)
        far = _conv_bn(net, f"{name}/3x3g32d2", u, width, kernel=3, stride=stride, pad=2, group=32, dilation=2)
        z = _conv_bn(net, f"{name}/B_fc1", global_pool(near + far), max(width // 16, 32))
        logits = net.conv(f"{name}/B_fc2", z, 2 * width)
        weights = F.softmax(logits.reshape(len(x), 2, width, 1), dim=1)
        u = weights[:, 0, :, :, None] * near + weights[:, 1, :, :, None] * far
        u = _conv_bn(net, f"{name}/1x1_increase", u, outputs, relu=False)
        if first:
            x = _conv_bn(net, f"{name}/1x1_proj", x, outputs, stride=stride, relu=False)
        x = F.relu(u + x)
    return net.linear("classifier", global_pool(x), 1000)


def resnet(net, x, depths=(3, 4, 6, 3), bias=True):
    """He et al.'s; the first convolution of their ResNet-50 has a bias."""

    def conv_bn(name, x, *args, relu=True, **kwargs):
        rest = name[3:] if name.startswith("res") else f"_{name}"
        x = net.norm(f"bn{rest}", net.conv(name, x, *args, **kwargs), f"scale{rest}")
        return F.relu(x) if relu else x

    x = max_pool(conv_bn("conv1", x, 64, kernel=7, stride=2, pad=3, bias=bias))
    for stage, depth in enumerate(depths):
        for block in range(depth):
            long = depth > 6 or (stage == 1 and depths[2] > 6)  # the long stages of ResNet-101 and -152
            letter = f"b{block}" if long and block else "abcdef"[block]
            name, stride = f"res{stage + 2}{letter}_branch", 2 if stage and not block else 1
            u = conv_bn(f"{name}2a", x, 64 << stage, stride=stride)
            u = conv_bn(f"{name}2b", u, 64 << stage, kernel=3, pad=1)
            u = conv_bn(f"{name}2c", u, 256 << stage, relu=False)
            x = F.relu(u + (x if block else conv_bn(f"{name}1", x, 256 << stage, stride=stride, relu=False)))
    return net.linear("fc1000", global_pool(x), 1000)


# 1×1; 3×3 reduce and 3×3; double 3×3 reduce and double 3×3; after pooling. None: stride 2, the pooled input as it is.
_INCEPTION = {
    "3a": (64, (64, 64), (64, 96), 32),
    "3b": (64, (64, 96), (64, 96), 64),
    "3c": (None, (128, 160), (64, 96), None),
    "4a": (224, (64, 96), (96, 128), 128),
    "4b": (192, (96, 128), (96, 128), 128),
    "4c": (160, (128, 160), (128, 160), 128),
    "4d": (96, (128, 192), (160, 192), 128),
    "4e": (None, (128, 192), (192, 256), None),
    "5a": (352, (192, 320), (160, 224), 128),
    "5b": (352, (192, 320), (192, 224), 128),
}


def bn_inception(net, x, squeeze_excite=True):
    x = max_pool(_conv_bn(net, "conv1/7x7_s2", x, 64, kernel=7, stride=2, pad=3))
    x = _conv_bn(net, "conv2/3x3_reduce", x, 64)
    x = max_pool(_conv_bn(net, "conv2/3x3", x, 192, kernel=3, pad=1))
    for module, (plain, (reduce, inner), (double_reduce, double), pooled) in _INCEPTION.items():
        name = f"inception_{module}"
        stride = 2 if pooled is None else 1
        shape = {"kernel": 3, "stride": stride, "pad": 1}
        parts = [_conv_bn(net, f"{name}/1x1", x, plain)] if plain else []
        u = _conv_bn(net, f"{name}/3x3_reduce", x, reduce)
        parts.append(_conv_bn(net, f"{name}/3x3", u, inner, **shape))
        u = _conv_bn(net, f"{name}/double3x3_reduce", x, double_reduce)
        u = _conv_bn(net, f"{name}/double3x3a", u, double, kernel=3, pad=1)
        parts.append(_conv_bn(net, f"{name}/double3x3b", u, double, **shape))
        if pooled is None:
            parts.append(max_pool(x))
        else:
            pool = F.max_pool2d(x, 3, 1, 1) if module == "5b" else F.avg_pool2d(x, 3, 1, 1)
            parts.append(_conv_bn(net, f"{name}/pool_proj", pool, pooled))
        x = torch.cat(parts, 1)
        if squeeze_excite:
            x = _squeeze_excite(net, name, x) * x
    return net.linear("classifier", global_pool(x), 1000)
