"""What ``bench`` times: one network, run in one way, in a process of its own.

Imports no torch at the top: the contestant's process sets the number of threads first.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from excite.allocator import give_back, keep_buffers
from excite.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from excite.timing import Call

INFERENCE_MODES = {
    "eager": "PyTorch as it comes: contiguous tensors, no compilation",
    "eager-cl": "PyTorch with channels-last tensors",
    "compiled": "torch.compile with freezing, channels-last",
    "onnx": "ONNX Runtime, converted by PyTorch's exporter",
    "openvino": "OpenVINO, converted from torch.export",
    "excite": "excite.optimize",
    "excite-onnx": "excite.optimize, run by ONNX Runtime",
    "excite-openvino": "excite.optimize, run by OpenVINO",
}
TRAINING_MODES = {
    "eager": "PyTorch as it comes: contiguous tensors, no compilation",
    "eager-cl": "PyTorch with channels-last tensors",
    "compiled": "torch.compile, channels-last",
    "excite": "as excite trains: channels-last, deterministic",
    "excite-compiled": "the same with trainer.compile",
}
MODES = {"inference": INFERENCE_MODES, "training": TRAINING_MODES}
PRECISIONS = ("fp32", "bf16", "int8")
_INT8 = ("onnx", "openvino", "excite-onnx", "excite-openvino")
_CALIBRATION_BATCHES = 4

Answer = Callable[["Tensor"], "Tensor"]


def refusal(what: str, mode: str, precision: str, batch: int) -> str | None:
    """Why such a contestant cannot be; None where it can."""
    if mode not in MODES[what]:
        return f"there is no {what} by {mode}"
    if what == "training" and precision == "int8":
        return "networks are not trained in int8"
    if what == "training" and batch < 2:
        return "a training batch has two images or more: batch norm has nothing to go by in one"
    if precision == "int8" and mode not in _INT8:
        return "int8 is run by OpenVINO and ONNX Runtime"
    if precision == "bf16" and mode in ("onnx", "excite-onnx"):
        return "ONNX Runtime has no bf16 convolutions for the CPU"
    return None


@dataclass(frozen=True)
class Contestant:
    """A network and how it is run; called, it builds that and gives the call to be timed.

    Args:
        spec: the network.
        mode: a name of ``MODES[what]``.
        precision: fp32, bf16 or int8.
        batch: images in one call.
        what: inference or training.
        shape: of one image, (C, H, W).
        classes: of the network; None for one without.
        threads: of the processor.
    """

    spec: str
    mode: str
    precision: str
    batch: int
    what: str
    shape: tuple[int, int, int]
    classes: int | None
    threads: int

    @property
    def name(self) -> str:
        """Among those of one batch and kind of work."""
        return f"{self.spec} {self.mode} {self.precision}"

    def __call__(self) -> Call:
        """Build it.

        Returns:
            The call. ``told`` has ``imported_bytes`` (resident memory before there was a network), ``ready_seconds``
            (from there to the first answer), ``difference`` (of the answers in inference from the plain network's,
            over the largest of these; None in training) and ``report`` (of ``excite.optimize``, else None).
        """
        # In this process alone: helpers of the compiler's would be part of what is suspended and ended.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        import torch

        from excite.create import create, for_window

        logging.getLogger("torch").setLevel(logging.ERROR)  # its advice on CUDA is of no use here
        self._import()
        torch.set_num_threads(self.threads)  # some measure or compile while they are built
        torch.manual_seed(0)
        imported = psutil.Process().memory_info().rss
        network = create(for_window(self.spec, self.shape[1]), self.classes, self.shape[0])
        _as_if_trained(network)
        images = torch.randn(self.batch, *self.shape, generator=torch.Generator().manual_seed(0))
        told: dict[str, Any] = {"imported_bytes": imported, "difference": None, "report": None}
        call = (self._training if self.what == "training" else self._inference)(network, images, told)
        del network, images
        gc.collect()
        give_back()  # what building left behind is not what running takes
        call.told = told  # type: ignore[attr-defined]
        return call

    def _import(self) -> None:
        """The packages of the mode, before memory is looked at."""
        from excite.deploy import engines

        if self.mode.endswith("openvino"):
            engines.import_openvino()
        if self.mode.endswith("onnx"):
            engines.import_onnx()
            engines.import_onnxruntime()

    # --- inference -------------------------------------------------------------------------------------------------

    def _inference(self, network: nn.Module, images: Tensor, told: dict[str, Any]) -> Call:
        import torch

        network.eval()
        with torch.no_grad():
            expected = network(images)
        begin = time.perf_counter()
        answer = self._answer(network, images, told)
        with torch.no_grad():
            given = answer(images).float()
        told["ready_seconds"] = time.perf_counter() - begin
        if isinstance(expected, torch.Tensor):
            difference = float((given - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
            if difference != difference:
                raise UsageError("its answers are not numbers")
            told["difference"] = difference
        if self.mode in ("eager", "eager-cl"):  # faster than no_grad; the others were compiled without it
            return _called(answer, images, torch.inference_mode)
        return _called(answer, images, torch.no_grad)

    def _answer(self, network: nn.Module, images: Tensor, told: dict[str, Any]) -> Answer:
        """From float32 images to the network's answers."""
        if self.mode == "eager":
            return self._eager(network)
        if self.mode == "eager-cl":
            return _channels_last(self._eager(network), network)
        if self.mode == "compiled":
            return self._compiled(network)
        if self.precision == "int8":
            return self._int8(network, images)
        if self.mode in ("onnx", "openvino"):
            from excite.deploy import engines

            make = engines.onnx_engine if self.mode == "onnx" else engines.openvino_engine
            return make(network, images, precision=self.precision, threads=self.threads)
        return self._optimized(network, images, told)

    def _eager(self, network: nn.Module) -> Answer:
        if self.precision == "fp32":
            return network
        import torch

        def answer(images: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return network(images)

        return answer

    def _compiled(self, network: nn.Module) -> Answer:
        import torch
        import torch._inductor.config

        torch._inductor.config.freezing = True
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        compiled = torch.compile(network.to(dtype))
        return _channels_last(lambda images: compiled(images.to(dtype)), network)

    def _int8(self, network: nn.Module, images: Tensor) -> Answer:
        import torch

        from excite.deploy import quantize

        if self.mode.startswith("excite"):
            from excite.deploy.rewrite import rewrite

            network = rewrite(network, images)
        random = torch.Generator().manual_seed(1)
        calibration = [torch.randn(images.shape, generator=random) for _ in range(_CALIBRATION_BATCHES)]
        make = quantize.int8_onnx if self.mode.endswith("onnx") else quantize.int8_openvino
        return make(network, images, calibration, threads=self.threads)

    def _optimized(self, network: nn.Module, images: Tensor, told: dict[str, Any]) -> Answer:
        import torch

        from excite.deploy.optimize import optimize

        engine: Any = self.mode.partition("-")[2] or "torch"
        dtype = torch.bfloat16 if self.precision == "bf16" else None
        optimized = optimize(network, images, dtype=dtype, engine=engine)
        told["report"] = getattr(optimized, "report", None)
        return optimized

    # --- training --------------------------------------------------------------------------------------------------

    def _training(self, network: nn.Module, images: Tensor, told: dict[str, Any]) -> Call:
        """A whole step: forward, cross-entropy, backward, SGD with momentum; always the same images."""
        import torch

        begin = time.perf_counter()
        network.train()
        trained: Any = network
        if self.mode != "eager":
            from excite.memory_format import to_channels_last

            to_channels_last(network)
            images = images.contiguous(memory_format=torch.channels_last)
        if self.mode.startswith("excite"):  # what fit sets
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        if self.mode.endswith("compiled"):
            trained = torch.compile(network)
        step = _step(trained, network, images, self.classes or 1, lowered=self.precision == "bf16")
        step()
        told["ready_seconds"] = time.perf_counter() - begin
        return step


@dataclass(frozen=True)
class Kept:
    """A contestant that is built with freed buffers kept."""

    contestant: Contestant

    def __call__(self) -> Call:
        """Build it."""
        keep()
        return self.contestant()


def keep() -> None:
    """Keep freed buffers in this process from now on."""
    if not keep_buffers():
        raise UsageError("this system's C library has no such allocator setting")


def _step(trained: Any, network: nn.Module, images: Tensor, classes: int, *, lowered: bool) -> Call:
    import torch
    import torch.nn.functional as F

    labels = torch.randint(classes, (len(images),), generator=torch.Generator().manual_seed(2))
    # So small a rate that the numbers stay ordinary ones, however many steps are timed.
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-5, momentum=0.9, weight_decay=1e-4)

    def step() -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            loss = F.cross_entropy(trained(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    return step


def _called(answer: Answer, images: Tensor, without_gradients: Callable[[], Any]) -> Call:
    def call() -> object:
        with without_gradients():
            return answer(images)

    return call


def _channels_last(answer: Answer, network: nn.Module) -> Answer:
    import torch

    from excite.memory_format import to_channels_last

    to_channels_last(network)
    return lambda images: answer(images.contiguous(memory_format=torch.channels_last))


def _as_if_trained(network: nn.Module) -> None:
    """Give batch norms other numbers than those they are made with, in place.

    A fresh network often ends its branches in a scale of zero: its maps would be empty, and whoever folds constants
    could leave half of it out.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    random = torch.Generator().manual_seed(3)

    def fill(tensor: torch.Tensor | None, low: float, high: float) -> None:
        if tensor is not None:
            tensor.copy_(torch.rand(tensor.shape, generator=random) * (high - low) + low)

    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                fill(module.weight, 0.5, 1.5)
                fill(module.bias, -0.1, 0.1)
                fill(module.running_mean, -0.1, 0.1)
                fill(module.running_var, 0.5, 1.5)
