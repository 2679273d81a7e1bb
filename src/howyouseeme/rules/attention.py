"""Attention: its weights are what this image fixed, and the evidence goes to the values.

That is the gate rule, for matrices: softmax(q kᵀ) says where to look, and is frozen; what is seen
there are the values (Ali et al., XAI for Transformers, 2022).
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ..links import BatchedMatrix
from ..tape import Call, Value
from .branches import contents
from .registry import Refusal, Step, rule_of

rule = rule_of("attention")


def _arguments(call: Call) -> dict[str, Any]:
    """The arguments of the call by name."""
    names = [argument.name for argument in call.op._schema.arguments]
    return dict(zip(names, call.args, strict=False)) | call.kwargs


@rule(
    "aten.scaled_dot_product_attention",
    "aten._scaled_dot_product_attention_math",
    "aten._scaled_dot_product_attention_math_for_mps",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_fused_attention_overrideable",
)
def attention(call: Call, output: Value) -> Step:
    """y = softmax(scale · q kᵀ + mask) v, with the softmax frozen"""
    given = _arguments(call)
    if given.get("dropout_p"):
        raise Refusal("attention with dropout is not supported")
    if output.output != 0:
        raise Refusal("only the output of attention is supported, not its weights")
    value = given["value"]
    if not isinstance(value, Value):
        return Step([], output.data)
    query, key = (contents(given[name], output.data) for name in ("query", "key"))
    shared = prod(query.shape[:-2]) // prod(value.shape[:-2])  # heads that share keys and values
    if key.shape[:-2] != value.shape[:-2] or query.shape[:-3] != key.shape[:-3]:
        raise Refusal("only queries, keys and values with the same batch are supported")
    mask = given.get("attn_mask")
    mask = given.get("attn_bias") if mask is None else mask
    mask = mask.data if isinstance(mask, Value) else mask

    def weight() -> Tensor:
        scale = given.get("scale")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        dtype = torch.promote_types(query.dtype, torch.float32)
        keys = key if shared == 1 else key.repeat_interleave(shared, -3)
        scores = (query.to(dtype) @ keys.to(dtype).mT) * scale
        if given.get("is_causal"):
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~causal, -torch.inf)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask
        weights = scores.softmax(-1).nan_to_num(0.0)  # a row that may look nowhere is 0
        length, seen = weights.shape[-2:]
        frozen: Tensor = weights.reshape(-1, shared * length, seen).to(output.dtype)
        return frozen

    link = BatchedMatrix(value.shape, output.shape, weight, columns=value.shape[-1])
    return Step([(value, link)])
