"""Images of every kind, from one data spec.

:func:`load_data` finds labelled images, their classes and their usual preprocessing; :class:`Loader` makes batches.
:func:`load_denoising` finds clean images and says how they are degraded; :class:`PatchLoader` makes batches.
"""

from excite.data.augment import Augmentation
from excite.data.base import ImageData, Split
from excite.data.degrade import Degradation
from excite.data.denoising import DenoisingData, DenoisingSplit, load_denoising
from excite.data.load import load_data
from excite.data.loader import Loader
from excite.data.own import from_datasets
from excite.data.patches import PatchLoader
from excite.preprocessing import Preprocessing

__all__ = [
    "Augmentation",
    "Degradation",
    "DenoisingData",
    "DenoisingSplit",
    "ImageData",
    "Loader",
    "PatchLoader",
    "Preprocessing",
    "Split",
    "from_datasets",
    "load_data",
    "load_denoising",
]
