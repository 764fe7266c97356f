"""The codec that [uplink] names."""

from __future__ import annotations

from typing import assert_never

from anabranch.protocols.codecs.blocks import int4, int8
from anabranch.protocols.codecs.codec import Codec, CodecName
from anabranch.protocols.codecs.floats import FP16, FP32
from anabranch.protocols.codecs.topk import top_k


def codec_for(name: CodecName, keep: float = 0.1) -> Codec:
    """Return the codec; `keep` is the share of the values that top-k sends."""
    match name:
        case "fp32":
            return FP32
        case "fp16":
            return FP16
        case "int8":
            return int8()
        case "int4":
            return int4()
        case "top-k":
            return top_k(keep)
        case _:
            assert_never(name)
