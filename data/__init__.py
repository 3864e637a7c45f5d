"""Data: bytes and points in named splits, the affine maps to model units, and the readers that bring them in.

digits = data.create("digits")
split = digits.split("test")              # split.x uint8 (N, 1, 8, 8), split.labels, split.ids
transform = digits.transform()            # Rescale(levels=17, low=-1, high=1)
x = transform(split.x + u)                # u in [0, 1): dequantised, in [-1, 1]
"""

from __future__ import annotations

from data.cache import mapped, save
from data.catalogue import DATASETS, available, create, options
from data.cifar import cifar10
from data.dataset import Dataset, Split, from_tensor
from data.densities import Checkerboard, Density, Gaussians, Moons, Pinwheel, Rings, Spirals, SwissRoll
from data.duplicates import Duplicates
from data.errors import DataError
from data.glyphs import glyphs
from data.idx import fashion_mnist, mnist, read_idx
from data.numpy_files import arrays, read_npy, read_npz
from data.picture_folder import image_folder
from data.pictures import PictureDecoder
from data.sklearn_digits import digits
from data.third_party import from_pictures, hugging_face, torchvision_dataset
from data.transforms import Rescale, Standardize, Transform
from data.two_dimensional import (
    checkerboard,
    from_density,
    gaussians,
    moons,
    pinwheel,
    rings,
    spirals,
    swiss_roll,
)

__all__ = [
    "Checkerboard",
    "DATASETS",
    "DataError",
    "Dataset",
    "PictureDecoder",
    "Density",
    "Duplicates",
    "Gaussians",
    "Moons",
    "Pinwheel",
    "Rescale",
    "Rings",
    "Spirals",
    "Split",
    "Standardize",
    "SwissRoll",
    "Transform",
    "arrays",
    "available",
    "checkerboard",
    "cifar10",
    "create",
    "digits",
    "fashion_mnist",
    "from_density",
    "from_pictures",
    "from_tensor",
    "gaussians",
    "glyphs",
    "hugging_face",
    "image_folder",
    "mapped",
    "mnist",
    "moons",
    "options",
    "pinwheel",
    "read_idx",
    "read_npy",
    "read_npz",
    "rings",
    "save",
    "spirals",
    "swiss_roll",
    "torchvision_dataset",
]
