"""Step and inference graphs over a frozen base in 8-bit or 4-bit weights; the adapter stays float.

    graph  precision  linear layer x·W                             embedding E[i]
    step   int8       x · DequantizeLinear(codes, per channel)     codes[i] · scale[i]
    step   int4       x · DequantizeLinear(codes, per block)       unpack(codes[i]) · scales[i]
    infer  int8       MatMulInteger(x as 8 bits, codes) · scales   as in the step
    infer  int4       MatMulNBits(x, codes, scales)                as in the step

A step computes loss and gradients in float32, exactly those of a base whose weights are the
dequantized ones (QLoRA's idea, Dettmers et al. 2023, arXiv:2305.14314). Every product has a
DequantizeLinear of its own: the float copy of a weight lives for one node.

Inference in int8 quantizes x when it runs, from x's own range: that of the whole batch or, with
`per_row`, of each row (per token in ZeroQuant, Yao et al. 2022, arXiv:2206.01861), which takes
about a quarter more time.

x86 without VNNI adds pairs of uint8 · int8 products in 16 bits, which 8-bit weights can overflow
(onnxruntime's guide to quantization). So codes of linear layers take 7 of the 8 bits; they are the
same in step and inference, and files can share their bytes (weights.py). With `per_row` they are
those of `codes.quantize_pairs`, finer and as safe. Embeddings take all 8 bits.

Quantized is what `frozen.find_weights` finds: float32 matrices that only feed linear layers, or
only embeddings. Everything else stays float: adapter, biases, norms, convolutions, other uses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import onnx
from onnx import TensorProto, helper

from anabranch.edge.export.frozen import NARROW, Weight, find_weights
from anabranch.edge.export.quantized import MICROSOFT, Writer
from anabranch.protocols.errors import BundleError

Rewrite = Callable[[onnx.NodeProto], None]

BLOCK = 128  # 4-bit codes that share a scale
SMALLEST = 1024  # elements of a matrix worth quantizing
MARK = "weights"  # model metadata: the precision
INT4_OPSET = 21  # uint4 and blocks in DequantizeLinear
CHANGED = {"DFT", "GridSample", "GroupNormalization"}  # mean something else in opset 21 than in 18
OLDEST, NEWEST_IR = "1.19", 10  # onnxruntime; it reads opset 21, uint4 and MatMulNBits


def quantize_step(
    model: onnx.ModelProto, precision: str, *, smallest: int = SMALLEST, block: int = BLOCK
) -> onnx.ModelProto:
    """Return a training step over the quantized base; inputs and outputs stay as they are.

    Matrices under `smallest` elements stay float; `block` is the largest block of 4-bit codes, a
    power of two of at least 16. A graph that has this precision already comes back as it is; the
    argument never changes; equal graphs give equal bytes.

    Raises BundleError for a graph in the other precision, with weights in other files or not
    finite, or (int4) with operators that opset 21 gave another meaning.
    """
    return _quantize(model, precision, step=True, smallest=smallest, block=block)


def quantize_infer(
    model: onnx.ModelProto,
    precision: str,
    *,
    smallest: int = SMALLEST,
    block: int = BLOCK,
    narrowest: int = NARROW,
    per_row: bool = False,
) -> onnx.ModelProto:
    """Return an inference graph over the quantized base, with logits near the float graph's.

    Guarantees and errors as `quantize_step`; the overridable defaults (the adapter) stay float, as
    do matrices with a side shorter than `narrowest`.

    In int8 the codes of x share the range of the whole batch, so the last digits of a record's
    logits depend on the other records; in int4 they do not. With `per_row` every row of x, which
    is a token or a record, has a range of its own: then no product depends on other rows, and for
    a row with least value l and largest h, and the dequantized weight W',
    |y - x·W'| ≤ (h - l) / 510 · Σ |W'| down each column, and float32's rounding. Raises ValueError
    for `per_row` in int4, which has ranges per block of a row anyway.
    """
    if per_row and precision == "int4":
        raise ValueError("per_row is for int8: in int4 every block of a row has its own range")
    return _quantize(
        model,
        precision,
        step=False,
        smallest=smallest,
        block=block,
        narrowest=narrowest,
        per_row=per_row,
    )


def oldest_onnxruntime(model: onnx.ModelProto) -> str:
    """Return the oldest onnxruntime that runs a graph of this package, as "major.minor".

    Raises BundleError for a graph that uses more than what is known to run there.
    """
    opset = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    foreign = {
        f"{n.domain}.{n.op_type}" for n in model.graph.node if n.domain not in ("", "ai.onnx")
    }
    if model.ir_version > NEWEST_IR or opset > INT4_OPSET:
        raise BundleError(
            f"graph in IR {model.ir_version} and opset {opset}: onnxruntime {OLDEST} reads IR "
            f"{NEWEST_IR} and opset {INT4_OPSET} at most; export with older ones"
        )
    if not foreign <= {f"{MICROSOFT}.MatMulNBits"}:
        raise BundleError(
            f"operators {', '.join(sorted(foreign))}: of those outside the standard, only "
            f"MatMulNBits is known to run in onnxruntime {OLDEST}"
        )
    return OLDEST


def _quantize(
    model: onnx.ModelProto,
    precision: str,
    *,
    step: bool,
    smallest: int,
    block: int,
    narrowest: int = NARROW,
    per_row: bool = False,
) -> onnx.ModelProto:
    if precision not in ("int8", "int4"):
        raise ValueError(f'expected precision "int8" or "int4", got {precision!r}')
    if block < 16 or block & (block - 1):
        raise ValueError(f"expected a block of 16, 32, 64 …, got {block}")
    result = onnx.ModelProto()
    result.CopyFrom(model)
    marks = {p.key: p.value for p in model.metadata_props}
    if marks.get(MARK) == precision:
        return result
    if MARK in marks:
        raise BundleError(
            f"the graph's weights are {marks[MARK]} already; make {precision} from the fp32 graph"
        )
    weights = find_weights(result.graph, smallest, one_way=not step, narrowest=narrowest)
    (standard,) = (o.version for o in result.opset_import if o.domain in ("", "ai.onnx"))
    writer = Writer(result.graph, opset=standard)
    four = block if precision == "int4" else 0
    _rewrite(result.graph, weights, writer, step=step, four=four, per_row=per_row)
    _declare(result)
    helper.set_model_props(result, marks | {MARK: precision})
    return result


def _rewrite(
    graph: onnx.GraphProto,
    weights: list[Weight],
    writer: Writer,
    *,
    step: bool,
    four: int,
    per_row: bool,
) -> None:
    """Replace the uses of `weights`; `four` is the block of 4-bit codes, 0 for 8 bits."""
    new: dict[str, Rewrite] = {}
    product = writer.nbits if four else writer.by_row if per_row else writer.integer
    for weight in weights:
        codes = (
            writer.blocks(weight, four, step=step)
            if four
            else writer.channels(weight, step=step, pairs=per_row)
        )
        for output in weight.lookups:
            new[output] = partial(writer.rows4 if four else writer.rows8, codes=codes)
        for output, transposed in weight.products.items():
            if step:
                new[output] = partial(writer.dequantized, codes=codes, transposed=transposed)
            else:
                new[output] = partial(product, codes=codes)
    gone = {name for weight in weights for name in (weight.name, *weight.transpositions)}
    for node in graph.node:
        write = new.get(node.output[0])
        if write:
            write(node)
        elif node.output[0] not in gone:
            writer.nodes.append(node)
    kept = [constant for constant in graph.initializer if constant.name not in gone]
    constants = {t.name: t for t in kept} | writer.constants
    nodes = list(writer.nodes)
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants.values())


def _declare(model: onnx.ModelProto) -> None:
    """Declare what the nodes need: opset 21 for 4-bit codes, and MatMulNBits' domain."""
    (standard,) = (o for o in model.opset_import if o.domain in ("", "ai.onnx"))
    uint4 = any(t.data_type == TensorProto.UINT4 for t in model.graph.initializer)
    if uint4 and standard.version < INT4_OPSET:
        changed = sorted(CHANGED & {node.op_type for node in model.graph.node})
        if changed:
            raise BundleError(
                f"{', '.join(changed)} means something else in opset {INT4_OPSET}, which 4-bit "
                "weights need; take int8 for this model"
            )
        standard.version = INT4_OPSET
    domains = {o.domain for o in model.opset_import}
    if MICROSOFT not in domains and any(n.domain == MICROSOFT for n in model.graph.node):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
