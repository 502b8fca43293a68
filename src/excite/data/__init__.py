"""Labelled images of every kind, from one data spec.

:func:`load_data` finds the images, their classes and their usual preprocessing; :class:`Loader` makes batches.
"""

from excite.data.augment import Augmentation
from excite.data.base import ImageData, Split
from excite.data.load import load_data
from excite.data.loader import Loader
from excite.data.own import from_datasets
from excite.preprocessing import Preprocessing

__all__ = ["Augmentation", "ImageData", "Loader", "Preprocessing", "Split", "from_datasets", "load_data"]
