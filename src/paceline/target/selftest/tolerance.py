"""How far an engine may be from transformers: by the dtype of its states and the format of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Limits of one comparison, and what they are for."""

    name: str
    """What the engine computes with, e.g. "bfloat16" or "fp8 weights"."""
    relative: float
    """Largest |received - reference| / |reference| of a document (root mean square over its tokens)."""
    cosine: float
    """Lowest mean cosine of a document."""
    routed: bool = False
    """Whether rounding may send a token to other experts now and then, which may move its states by any distance.
    Where few tokens are judged, these are the typical ones, not the worst (`Comparison`)."""
    roundings: float = 2.0
    """How many of transformers' own roundings, in the data type of the states, are allowed where they are known. Two
    that compute in one data type differ from each other by 1.4."""
    widest: float = 0.2
    """Largest `relative` for their sake."""

    def allows(self, relative: float, cosine: float) -> bool:
        """Whether an engine may be so far away; false for NaN."""
        return relative <= self.relative and cosine >= self.cosine

    def widened(self, rounding: float) -> Tolerance:
        """For a target of which transformers' own rounding, in the same data type, is off by `rounding`.

        Random weights and some trained ones make more of a rounding than most do. NaN changes nothing.
        """
        relative = min(self.roundings * rounding, self.widest)
        if not relative > self.relative:
            return self
        # 1 - cosine grows with the square of the relative error.
        return replace(self, relative=relative, cosine=1 - (relative / self.relative) ** 2 * (1 - self.cosine))

    def __str__(self) -> str:
        return f"compared within {self.relative:.3g} and cosine {self.cosine:.6g}: {self.name}"


_DTYPES = {
    "float32": Tolerance("float32", 1e-3, 0.99999),
    "float16": Tolerance("float16", 1e-2, 0.9998),
    # Engines differ from fp32 by 0.9-1.6e-2 after 36 layers, transformers' own bf16 by 1.2-2.0e-2.
    "bfloat16": Tolerance("bfloat16", 3e-2, 0.999),
}
_EXPERTS = 2.0
"""Rounding sends a token to another expert now and then."""
_WEIGHT_BITS = {8: (0.2, 0.98), 4: (0.35, 0.93)}
"""Bits of a weight -> relative, cosine."""
_ACTIVATIONS = (0.3, 0.955)
"""At least so much where activations are rounded, too: fp8 is 20 % off after 8 layers of random weights, in torch
as in engines."""
_ROUNDINGS_OF_ACTIVATIONS, _WIDEST_OF_ACTIVATIONS = 16.0, 0.5
"""fp8 rounds 32 times as coarsely as bf16, but only what goes into matrix products: that is 12 to 14 times as much."""
_ROUND_ACTIVATIONS = re.compile("fp8|w8a8|w4a8|w4afp8|int8|mxfp|nvfp")
_BITS_OF_METHODS = {
    "fp8": 8,
    "mxfp8": 8,
    "w8a8_fp8": 8,
    "w8a8_int8": 8,
    "fbgemm_fp8": 8,
    "finegrained_fp8": 8,
    "int8": 8,
    "awq": 4,
    "gptq": 4,
    "mxfp4": 4,
    "nvfp4": 4,
}
"""Bits where the configuration does not say them."""


def choose_tolerance(
    dtype: str, quantization: Mapping[str, Any] | str | None = None, experts: bool = False
) -> Tolerance:
    """The limits for an engine whose states are of `dtype`.

    Args:
        dtype: "float32", "float16" or "bfloat16" (`TargetInfo.dtype`).
        quantization: a checkpoint's `quantization_config`, or the name of a format that the engine quantises to when
            it loads ("fp8", "awq", ...). A format that is not known is compared like 4 bits.
        experts: whether tokens are routed to experts.
    """
    plain = _DTYPES[dtype]
    if quantization is not None:
        name, bits = _describe(quantization)
        weights = Tolerance(f"{name} weights", *_WEIGHT_BITS[8 if bits >= 8 else 4], experts)
        return _with_activations(weights) if _rounds_activations(name, quantization) else weights
    if not experts:
        return plain
    # 1 - cosine grows with the square of the relative error.
    cosine = 1 - _EXPERTS**2 * (1 - plain.cosine)
    return Tolerance(f"{plain.name} with experts", _EXPERTS * plain.relative, cosine, routed=True)


def _with_activations(weights: Tolerance) -> Tolerance:
    relative, cosine = _ACTIVATIONS
    return replace(
        weights,
        relative=max(relative, weights.relative),
        cosine=min(cosine, weights.cosine),
        roundings=_ROUNDINGS_OF_ACTIVATIONS,
        widest=_WIDEST_OF_ACTIVATIONS,
    )


def _rounds_activations(name: str, quantization: Mapping[str, Any] | str) -> bool:
    """Whether a format rounds what is multiplied by weights, too."""
    if _ROUND_ACTIVATIONS.search(name) or isinstance(quantization, str):
        return _ROUND_ACTIVATIONS.search(name) is not None
    groups = (quantization.get("config_groups") or {}).values()
    return bool(quantization.get("load_in_8bit")) or any((group or {}).get("input_activations") for group in groups)


def _describe(quantization: Mapping[str, Any] | str) -> tuple[str, int]:
    """Name of a format and the bits of its weights."""
    if isinstance(quantization, str):
        name = quantization.lower()
        return name, _BITS_OF_METHODS.get(name, 4)
    method = str(quantization.get("quant_method") or quantization.get("quant_algo") or "unknown").lower()
    algorithm = str(quantization.get("quant_algo") or "").lower()  # modelopt: "FP8", "NVFP4", "W4A8_AWQ"
    if algorithm and algorithm != method:
        return f"{method} {algorithm}", 4 if "4" in algorithm.replace("w4a8", "4") else 8
    bits = _stated_bits(quantization)
    if bits is None:
        return method, _BITS_OF_METHODS.get(method, 4)
    return (method if method in _BITS_OF_METHODS else f"{method} {bits} bit"), bits


def _stated_bits(quantization: Mapping[str, Any]) -> int | None:
    """Bits as the formats write them; the fewest where groups of layers differ."""
    for key in ("bits", "w_bit", "num_bits", "weight_bits"):
        if isinstance(quantization.get(key), int):
            return int(quantization[key])
    if quantization.get("load_in_4bit") or quantization.get("_load_in_4bit"):
        return 4
    if quantization.get("load_in_8bit") or quantization.get("_load_in_8bit"):
        return 8
    groups = quantization.get("config_groups") or {}
    stated = [((group or {}).get("weights") or {}).get("num_bits") for group in groups.values()]
    return min((int(bits) for bits in stated if bits is not None), default=None)
