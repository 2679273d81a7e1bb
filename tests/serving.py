"""Networks that the servers of the tests are started with: `--model serving:squeezenet`."""

from __future__ import annotations

import networks

import howyouseeme as hysm


def squeezenet() -> hysm.Network:
    """SqueezeNet, trained on ImageNet, for photos."""
    mean = (103.939, 116.779, 123.68)
    prepare = hysm.Preprocess((227, 227), mean=mean, scale=1.0, channels="bgr")
    classes = hysm.load_model().classes
    return hysm.Network("squeezenet", networks.squeezenet(), prepare, classes)
