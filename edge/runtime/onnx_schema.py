"""The messages of onnx.proto (IR version 10) that a bundle's graphs are made of.

Field numbers and types are those of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto. What
is only passed over (documentation, metadata) stays a span of bytes.
"""

from __future__ import annotations

from anabranch.edge.runtime.protobuf import BYTES, FIXED32, FIXED64, VARINT, Kind, Schema


def _bytes(name: str) -> Kind:
    return Kind(name, BYTES)


def _many(name: str, wire: int = BYTES) -> Kind:
    return Kind(name, wire, repeated=True)


def _number(name: str) -> Kind:
    return Kind(name, VARINT)


MODEL: Schema = {
    1: _number("ir_version"),
    2: _bytes("producer_name"),
    3: _bytes("producer_version"),
    4: _bytes("domain"),
    5: _number("model_version"),
    6: _bytes("doc_string"),
    7: _bytes("graph"),
    8: _many("opset_import"),
    14: _many("metadata_props"),
    20: _many("training_info"),
    25: _many("functions"),
    26: _many("configuration"),
}
OPSET: Schema = {1: _bytes("domain"), 2: _number("version")}
GRAPH: Schema = {
    1: _many("node"),
    2: _bytes("name"),
    5: _many("initializer"),
    10: _bytes("doc_string"),
    11: _many("input"),
    12: _many("output"),
    13: _many("value_info"),
    14: _many("quantization_annotation"),
    15: _many("sparse_initializer"),
    16: _many("metadata_props"),
}
GRAPH_INITIALIZER, GRAPH_INPUT = 5, 11
NODE: Schema = {
    1: _many("input"),
    2: _many("output"),
    3: _bytes("name"),
    4: _bytes("op_type"),
    5: _many("attribute"),
    6: _bytes("doc_string"),
    7: _bytes("domain"),
    8: _bytes("overload"),
    9: _many("metadata_props"),
    10: _many("device_configurations"),
}
ATTRIBUTE: Schema = {
    1: _bytes("name"),
    2: Kind("f", FIXED32),
    3: _number("i"),
    4: _bytes("s"),
    5: _bytes("t"),
    6: _bytes("g"),
    7: _many("floats", FIXED32),
    8: _many("ints", VARINT),
    9: _many("strings"),
    10: _many("tensors"),
    11: _many("graphs"),
    13: _bytes("doc_string"),
    14: _bytes("tp"),
    15: _many("type_protos"),
    20: _number("type"),
    21: _bytes("ref_attr_name"),
    22: _bytes("sparse_tensor"),
    23: _many("sparse_tensors"),
}
TENSOR: Schema = {
    1: _many("dims", VARINT),
    2: _number("data_type"),
    3: _bytes("segment"),
    4: _many("float_data", FIXED32),
    5: _many("int32_data", VARINT),
    6: _many("string_data"),
    7: _many("int64_data", VARINT),
    8: _bytes("name"),
    9: _bytes("raw_data"),
    10: _many("double_data", FIXED64),
    11: _many("uint64_data", VARINT),
    12: _bytes("doc_string"),
    13: _many("external_data"),
    14: _number("data_location"),
    16: _many("metadata_props"),
}
TENSOR_DIMS, TENSOR_DATA_TYPE, TENSOR_NAME, TENSOR_RAW_DATA = 1, 2, 8, 9
ENTRY: Schema = {1: _bytes("key"), 2: _bytes("value")}
VALUE: Schema = {
    1: _bytes("name"),
    2: _bytes("type"),
    3: _bytes("doc_string"),
    4: _many("metadata_props"),
}
TYPE: Schema = {
    1: _bytes("tensor"),
    4: _bytes("sequence"),
    5: _bytes("map"),
    6: _bytes("denotation"),
    7: _bytes("opaque"),
    8: _bytes("sparse_tensor"),
    9: _bytes("optional"),
}
TENSOR_TYPE: Schema = {1: _number("elem_type"), 2: _bytes("shape")}
SHAPE: Schema = {1: _many("dim")}
DIMENSION: Schema = {1: _number("dim_value"), 2: _bytes("dim_param"), 3: _bytes("denotation")}

FLOAT, UINT8, INT64 = 1, 2, 7
SEQUENCE = 0  # in place of a type: a sequence of tensors
# Bits of one value by TensorProto.DataType; types that are missing here are in no bundle.
BITS = {
    1: 32,  # float
    2: 8,  # uint8
    3: 8,  # int8
    4: 16,  # uint16
    5: 16,  # int16
    6: 32,  # int32
    7: 64,  # int64
    9: 8,  # bool
    10: 16,  # float16
    11: 64,  # double
    12: 32,  # uint32
    13: 64,  # uint64
    16: 16,  # bfloat16
    21: 4,  # uint4
    22: 4,  # int4
}
# Where a tensor's values may be instead of raw_data: data types, bytes of one (None: varint).
TYPED_DATA: dict[str, tuple[frozenset[int], int | None]] = {
    "float_data": (frozenset({1}), 4),
    "int32_data": (frozenset({2, 3, 4, 5, 6, 9, 10, 16, 21, 22}), None),
    "int64_data": (frozenset({7}), None),
    "double_data": (frozenset({11}), 8),
    "uint64_data": (frozenset({12, 13}), None),
}
