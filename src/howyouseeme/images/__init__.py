"""Pictures in, model inputs out, and the way back from input pixels to the picture's own."""

from .geometry import Geometry
from .preprocess import Preprocess
from .reading import Source, load_image, sample_photo

__all__ = ["Geometry", "Preprocess", "Source", "load_image", "sample_photo"]
