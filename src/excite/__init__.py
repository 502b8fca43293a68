"""Channel and kernel attention for any convolutional network.

The names below are the public ones; they are imported when they are first used, so that ``import excite`` is quick.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from excite.cost import cost as cost
    from excite.create import create as create
    from excite.create import networks as networks
    from excite.create import register_network as register_network
    from excite.deploy.optimize import optimize as optimize
    from excite.surgery.attach import attach as attach
    from excite.surgery.attach import detach as detach
    from excite.surgery.units import register_unit as register_unit
    from excite.training.fit import fit as fit
    from excite.units.selective_kernel import SelectiveKernel as SelectiveKernel
    from excite.units.squeeze_excite import SqueezeExcite as SqueezeExcite
    from excite.verbs.ablate import ablate as ablate
    from excite.verbs.bench import bench as bench
    from excite.verbs.compare import compare as compare
    from excite.verbs.evaluate import evaluate as evaluate
    from excite.verbs.explain import explain as explain
    from excite.verbs.export import export as export
    from excite.verbs.index import index as index
    from excite.verbs.plan import plan as plan
    from excite.verbs.predict import predict as predict
    from excite.verbs.prune import prune as prune
    from excite.verbs.search import search as search
    from excite.verbs.train import train as train
    from excite.weights.load import load_weights as load_weights

_PUBLIC = {
    "SelectiveKernel": "excite.units.selective_kernel",
    "SqueezeExcite": "excite.units.squeeze_excite",
    "ablate": "excite.verbs.ablate",
    "attach": "excite.surgery.attach",
    "bench": "excite.verbs.bench",
    "compare": "excite.verbs.compare",
    "cost": "excite.cost",
    "create": "excite.create",
    "detach": "excite.surgery.attach",
    "evaluate": "excite.verbs.evaluate",
    "explain": "excite.verbs.explain",
    "export": "excite.verbs.export",
    "fit": "excite.training.fit",
    "index": "excite.verbs.index",
    "load_weights": "excite.weights.load",
    "networks": "excite.create",
    "optimize": "excite.deploy.optimize",
    "plan": "excite.verbs.plan",
    "predict": "excite.verbs.predict",
    "prune": "excite.verbs.prune",
    "register_network": "excite.create",
    "register_unit": "excite.surgery.units",
    "search": "excite.verbs.search",
    "train": "excite.verbs.train",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


class _Package(ModuleType):
    """The package, whose functions ``create``, ``cost`` and ``networks`` share their names with modules of it."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Python binds each submodule as it is imported; where a public function has the name, the function stays.
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module 'excite' has no attribute {name!r}")
        value = getattr(import_module(_PUBLIC[name]), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_PUBLIC})


sys.modules[__name__].__class__ = _Package
