"""``optimize``: a network for inference, as fast as exact rewrites and the engines at hand make it."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from excite.deploy.choose import Choices, choose_forms, fastest
from excite.deploy.lower import lower
from excite.deploy.rewrite import rewrite
from excite.errors import UsageError

log = logging.getLogger(__name__)

Engine = Literal["torch", "torch-direct", "torch-compiled", "openvino", "onnx"]
ENGINES = ("torch", "torch-direct", "torch-compiled", "openvino", "onnx")
_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Optimized(nn.Module):
    """What :func:`optimize` makes: it takes float32 images (N, …) and answers in float32, without gradients.

    Attributes:
        report: what was done: ``engine``, ``dtype``, ``rewrites`` (made at how many places; refused, with the reason;
            the difference on the example), ``choices`` (of forms: which one, and what was measured).
        example_shape: (N, …) of the example. Other N are taken, too, perhaps less quickly; other sides are refused.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Any],
        prepare: Callable[[Tensor], Tensor],
        example_shape: torch.Size,
        report: dict[str, Any],
    ) -> None:
        super().__init__()
        self.network, self.prepare = network, prepare
        self.example_shape, self.report = example_shape, report
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        """(N, …) → what the original answers."""
        if images.shape[1:] != self.example_shape[1:]:
            wanted, given = tuple(self.example_shape[1:]), tuple(images.shape[1:])
            raise UsageError(f"This network was optimised for inputs of shape {wanted}, not {given}: do it anew.")
        answer = self.network(self.prepare(images))
        return tree_map_only(Tensor, lambda one: one.float() if one.is_floating_point() else one, answer)

    def train(self, mode: bool = True) -> Optimized:
        """It stays in evaluation mode.

        Raises:
            UsageError: training mode is asked for.
        """
        if mode:
            raise UsageError("An optimised network cannot be trained: train the original, then optimise it.")
        return self


def optimize(
    network: nn.Module, example: Tensor, *, dtype: torch.dtype | None = None, engine: Engine = "torch"
) -> Optimized:
    """A network for inference: the same answers, but for rounding, in less time.

    First come rewrites that are exact (:mod:`excite.deploy.rewrite`): batch norms folded, the squeeze moved before
    the last convolution of a bottleneck, softmaxes over two kernels as one gate, constant gates folded. They find
    units by what they do: excite's own, attached ones, timm's, torchvision's. Then the engine runs what is left. For
    ``torch`` on a CPU there are two ways: ``torch-direct``, convolutions with what follows them in one call of oneDNN
    and our own passes for the rest (:mod:`excite.deploy.lower`), and ``torch-compiled``, PyTorch's compiler. The one
    that is faster on the example is taken. So it is with the forms of single layers. What was measured is kept in the
    user's cache folder, so that a repeat makes the same choices, and written into ``report``.

    Args:
        network: in float32, on the device to run on. It is read, not changed.
        example: (N, …), such as random images of the size and number that will come.
        dtype: what to compute in: float32 (the default) or bfloat16, on an accelerator float16 too. Less than float32
            is no longer the same answer: look at the accuracy.
        engine: ``torch``, ``openvino`` or ``onnx``; ``torch-direct`` and ``torch-compiled`` to choose oneself.

    Returns:
        A module that takes and answers float32.

    Raises:
        UsageError: an unknown engine or type, a network that cannot be followed, a package that is not installed.
    """
    dtype = dtype or torch.float32
    if engine not in ENGINES:
        raise UsageError(f"engine is {engine!r}: choose one of {', '.join(ENGINES)}.")
    if dtype not in _PRECISIONS:
        raise UsageError(f"dtype is {dtype}: choose torch.float32 or torch.bfloat16 (torch.float16 on a GPU).")
    device = next((parameter.device for parameter in network.parameters()), example.device)
    if dtype == torch.float16 and device.type == "cpu":
        raise UsageError("dtype is torch.float16: CPUs compute in torch.float32 and torch.bfloat16.")
    example = example.detach().to(device, torch.float32)
    rewritten = rewrite(network, example)
    report: dict[str, Any] = {
        "engine": engine,
        "dtype": _PRECISIONS[dtype],
        "example": list(example.shape),
        "rewrites": rewritten.meta["rewritten"],
        "choices": {},
    }
    made: Callable[[Tensor], Any]
    prepare: Callable[[Tensor], Tensor]
    if engine in ("openvino", "onnx"):
        # Not laid out anew: PyTorch's threads would still spin, waiting for more, when the engine's begin.
        made, prepare = _other_engine(rewritten, example, engine, dtype, device), torch.Tensor.float
    else:
        prepare = partial(_for_maps, dtype=dtype)
        made = _by_torch(rewritten, prepare(example), engine, report)
    return Optimized(made, prepare, example.shape, report)


def _for_maps(images: Tensor, dtype: torch.dtype) -> Tensor:
    if images.dim() == 4:
        return images.to(dtype, memory_format=torch.channels_last)
    return images.to(dtype)


def _other_engine(
    rewritten: fx.GraphModule, example: Tensor, engine: str, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor], Any]:
    from excite.deploy.engines import onnx_engine, openvino_engine

    if device.type != "cpu":
        raise UsageError(f"engine {engine} runs on the CPU here, and the network is on {device}: move it first.")
    make = openvino_engine if engine == "openvino" else onnx_engine
    return make(rewritten, example, precision=_PRECISIONS[dtype])


# --- by PyTorch ----------------------------------------------------------------------------------------------------


def _by_torch(
    rewritten: fx.GraphModule, example: Tensor, engine: str, report: dict[str, Any]
) -> Callable[[Tensor], Any]:
    choices = Choices()
    makers: dict[str, Callable[[], Callable[[Tensor], Any]]] = {}
    if engine != "torch-compiled":
        makers["torch-direct"] = lambda: _direct(rewritten, example, choices, report)
    if engine == "torch-compiled" or (engine == "torch" and _can_compile(example.device)):
        makers["torch-compiled"] = lambda: _compiled(rewritten, example)
    key = f"network {_fingerprint(rewritten, example)}"
    known = choices.known(key) if len(makers) > 1 else None
    if known is not None and known["form"] in makers:
        makers = {known["form"]: makers[known["form"]]}
        report["choices"]["network"] = known
    made = {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except Exception as error:
            # A compiler that fails is no reason to have nothing, unless it was what was asked for.
            if len(makers) == 1:
                raise
            told = str(error).strip().partition("\n")[0]
            log.warning("%s cannot be had for this network: %s", name, told)
            report["choices"].setdefault("refused", {})[name] = told
    if len(made) > 1:
        with torch.no_grad():
            choice = fastest({name: _call(one, example) for name, one in made.items()})
        choices.learn(key, choice)
        report["choices"]["network"] = choice
    choices.save()
    taken = report["choices"]["network"]["form"] if "network" in report["choices"] else next(iter(made))
    report["engine"] = taken
    log.info("Optimised: %s in %s, rewrites %s", taken, report["dtype"], report["rewrites"]["made"])
    return made[taken]


def _call(network: Callable[[Tensor], Any], example: Tensor) -> Callable[[], object]:
    return lambda: network(example)


def _fingerprint(rewritten: fx.GraphModule, example: Tensor) -> str:
    """What decides which way is faster: operators and shapes, not weights."""
    shapes = [f"{name} {tuple(value.shape)}" for name, value in sorted(rewritten.state_dict().items())]
    device = example.device.type if example.device.type == "cpu" else torch.cuda.get_device_name(example.device)
    told = "\n".join((rewritten.code, *shapes, str(tuple(example.shape)), str(example.dtype), device))
    return hashlib.sha256(told.encode()).hexdigest()[:24]


def _direct(
    rewritten: fx.GraphModule, example: Tensor, choices: Choices, report: dict[str, Any]
) -> Callable[[Tensor], Any]:
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if example.device.type != "cpu" or not has_onednn or example.dim() != 4:
        return _in_type(rewritten, example)
    lowered = lower(rewritten, example.dtype, len(example))
    report["choices"]["layers"] = choose_forms(lowered, example, choices)
    return lowered


def _in_type(rewritten: fx.GraphModule, example: Tensor) -> fx.GraphModule:
    network = copy.deepcopy(rewritten).to(example.dtype)
    return network.to(memory_format=torch.channels_last) if example.dim() == 4 else network


def _can_compile(device: torch.device) -> bool:
    """Whether PyTorch's compiler has what it needs, and is wanted (``EXCITE_COMPILE=0`` turns it off)."""
    if os.environ.get("EXCITE_COMPILE") == "0":
        return False
    if device.type != "cpu":
        from torch.utils._triton import has_triton

        return bool(has_triton())
    from shutil import which

    return which(os.environ.get("CXX") or "g++") is not None


def _compiled(rewritten: fx.GraphModule, example: Tensor) -> Callable[[Tensor], Any]:
    """By PyTorch's compiler, with the weights as constants; compiled at once, on the example.

    On a GPU the kernels are started together (CUDA graphs): those of a gate are so small that to start them takes
    longer than they do. Such a graph answers in the same memory each time, which is copied out.
    """
    on_gpu = example.device.type == "cuda"
    network = torch.compile(_in_type(rewritten, example), dynamic=False, mode="reduce-overhead" if on_gpu else None)
    with _frozen(), torch.no_grad():
        network(example)

    def run(images: Tensor) -> Any:
        # Compiled anew for another number of images.
        with _frozen() if len(images) != len(example) else contextlib.nullcontext():
            answer = network(images)
        return tree_map_only(Tensor, torch.clone, answer) if on_gpu else answer

    return run


@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    import torch._inductor.config as inductor

    with inductor.patch(freezing=True):
        yield
