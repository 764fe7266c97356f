"""fp32 and fp16: IEEE 754 binary32 and binary16, little-endian.

fp16 rounds to the nearest (ties to even), the same way every time: an error of at most half an
ulp (2⁻¹¹ of a value from 2⁻¹⁴ up, 2⁻²⁵ absolute below that), which does not average out over
clients or rounds. Deltas of LoRA factors are often below 2⁻²⁵ and then become 0: prefer int8,
whose blocks have scales.
"""

from __future__ import annotations

import numpy as np

from anabranch.protocols.codecs.codec import (
    Codec,
    Values,
    require_finite,
    require_size,
    require_values,
)
from anabranch.protocols.errors import ConfigError

FP16_MAX = 65504.0  # the largest binary16


def _encode_fp32(values: Values, rng: np.random.Generator | None) -> bytes:
    require_values(values)
    return values.astype("<f4", copy=False).tobytes()


def _decode_fp32(data: bytes | memoryview, count: int) -> Values:
    require_size(data, 4 * count)
    values = np.frombuffer(data, "<f4").astype(np.float32)
    require_finite(values)
    return values


def _encode_fp16(values: Values, rng: np.random.Generator | None) -> bytes:
    require_values(values)
    largest = float(np.abs(values).max())
    if largest > FP16_MAX:
        raise ConfigError(
            f'uplink.codec = "fp16" holds values up to {FP16_MAX:.0f}, got {largest:g}: take '
            '"int8" or "fp32"'
        )
    return values.astype("<f2").tobytes()


def _decode_fp16(data: bytes | memoryview, count: int) -> Values:
    require_size(data, 2 * count)
    values = np.frombuffer(data, "<f2").astype(np.float32)
    require_finite(values)
    return values


FP32 = Codec("fp32", _encode_fp32, _decode_fp32, lambda count: 4 * count)
FP16 = Codec("fp16", _encode_fp16, _decode_fp16, lambda count: 2 * count)
