"""The linear maps that calls are made of, once a forward pass has frozen them.

On one image every call is an affine map of its inputs, `output = sum of link(input) + bias`: a
convolution is one already, a ReLU multiplies by a constant that this image fixed, a max-pool
selects. A `Link` is the linear map J from one input to the output. It can do three things:

- `forward(x)`: J x, dense;
- `edges(nodes)`: the rows of J for a few elements of the output, sparse: which inputs, what weight;
- `transposed()`: the link from the output to the input with the map Jᵀ.

`positive()` and `negative()` split J by the sign of its entries, J = J⁺ + J⁻; None stands for zero.
Elements are addressed by their flat, row-major index.
"""

from __future__ import annotations

from .base import Edges, Link
from .convolution import Convolution
from .diagonal import Diagonal
from .matrices import BatchedMatrix, Matrix, Separable, Sparse
from .moves import Moves, Pad, Permutation, Selection, Spread

__all__ = [
    "BatchedMatrix",
    "Convolution",
    "Diagonal",
    "Edges",
    "Link",
    "Matrix",
    "Moves",
    "Pad",
    "Permutation",
    "Selection",
    "Separable",
    "Sparse",
    "Spread",
]
