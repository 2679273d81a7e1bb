"""The stages of a network that tracking asks: told by their strides, and run no further than the last of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ModelError, first_line
from .folding import folded
from .models import Network
from .tape import refuse_training

__all__ = ["Stages"]


class _Enough(Exception):  # noqa: N818 - ends a pass early; never leaves the module
    pass


class Stages:
    """The stages of a network that are asked, run no further than the last of them.

    >>> stages = Stages(load_model("efficientnet-lite0"), 224, (4, 8, 16))
    >>> stages.names, stages(torch.rand(1, 3, 224, 224)).shape
    (['_blocks.2', '_blocks.4', '_blocks.10'], torch.Size([784, 176]))

    `side` is that of the input, in pixels, and `strides` are those of the stages; the cells of the second one
    are the nodes.

    Raises:
        ModelError: the network is in training mode, does not take such an input, or has no such stage.
    """

    def __init__(self, network: Network, side: int, strides: Sequence[int]) -> None:
        refuse_training(network.module)
        self.module, self.layout = network.module, torch.contiguous_format
        blank = network.like.new_zeros(1, _channels(network), side, side)
        sizes: list[tuple[str, int]] = []  # of square feature maps, in the order of the pass

        def note(name: str) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] > 1:
                    sizes.append((name, output.shape[2]))

            return hook

        hooks = {name: note(name) for name, _ in self.module.named_modules() if name}
        try:
            self._run(blank, hooks)
        except (RuntimeError, ValueError) as error:
            reason = first_line(error)
            raise ModelError(
                f"{network.name} can't run on an input of {side} x {side} pixels ({reason}); give the "
                "tracker's settings a side that it can take."
            ) from error
        self.names = [_stage(network.name, sizes, side / stride) for stride in strides]
        self.cells = next(size for name, size in sizes if name == self.names[1])
        self.widths = [part.shape[1] for part in self._maps(blank)]
        self._take_copy(blank)
        place = (torch.arange(self.cells, device=blank.device) + 0.5) / self.cells
        self.places = torch.cartesian_prod(place, place)  # [cells * cells, 2], of the window

    @torch.no_grad()
    def _take_copy(self, blank: Tensor) -> None:
        """Run a faster copy of the network from now on, if there is one that says the same."""
        given = self.module
        noise = torch.randn(
            blank.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu"
        ).to(blank)
        expected = self._maps(noise)
        try:
            self.module, self.layout = folded(given, blank), torch.channels_last
            found = self._maps(noise.contiguous(memory_format=self.layout))
            # Folding changes the rounding, which is coarse in half precision and in TF32.
            exact = blank.is_cpu and blank.dtype in {torch.float32, torch.float64}
            same = all(
                float((one - other).abs().max()) <= (1e-4 if exact else 2e-2) * other.abs().max()
                for one, other in zip(found, expected, strict=True)
            )
        except Exception:  # whatever keeps a module from being copied, or taking another layout
            same = False
        if not same:
            self.module, self.layout = given, torch.contiguous_format

    def __call__(self, batch: Tensor) -> Tensor:
        """The nodes of an input [1, channels, side, side]: [cells * cells, channels of all stages].

        Channels are standardised over the window, then each stage has the same say.
        """
        like = next(self.module.parameters())
        parts = []
        batch = batch.to(like).contiguous(memory_format=self.layout)
        for stage in self._maps(batch):
            if stage.shape[2] > self.cells:
                stage = F.adaptive_avg_pool2d(stage, self.cells)  # noqa: PLW2901
            elif stage.shape[2] < self.cells:
                stage = F.interpolate(stage, size=(self.cells,) * 2, mode="bilinear")  # noqa: PLW2901
            rows = stage[0].flatten(1).T.float()
            rows = (rows - rows.mean(0)) / (rows.std(0) + 1e-3)
            parts.append(F.normalize(rows, dim=1))
        return F.normalize(torch.cat(parts, 1), dim=1)

    def _maps(self, batch: Tensor) -> list[Tensor]:
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(_: nn.Module, __: Any, output: Tensor) -> None:
                found[name] = output
                if len(found) == len(self.names):
                    raise _Enough

            return hook

        self._run(batch, {name: keep(name) for name in self.names})
        return [found[name] for name in self.names]

    @torch.no_grad()
    def _run(self, batch: Tensor, hooks: dict[str, Any]) -> None:
        handles = [
            self.module.get_submodule(name).register_forward_hook(hook)
            for name, hook in hooks.items()
        ]
        try:
            self.module(batch)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()


def _stage(network: str, sizes: list[tuple[str, int]], wanted: float) -> str:
    """The module that ends the stage whose maps are about `wanted` cells wide.

    Of the modules with maps of that size, the last one of those that are nested least: a block, and
    not a layer inside of it.
    """
    near = [size for _, size in sizes if 0.7 < size / wanted < 1.4]
    if not near:
        raise ModelError(
            f"{network} has no stage whose maps are about {wanted:.0f} cells wide, as tracking needs."
        )
    size = min(near, key=lambda one: abs(math.log(one / wanted)))
    names = [name for name, one in sizes if one == size]
    depth = min(name.count(".") for name in names)
    return [name for name in names if name.count(".") == depth][-1]


def _channels(network: Network) -> int:
    return 1 if network.preprocess is not None and network.preprocess.channels == "grey" else 3
