"""The operators that a bundle's graphs may use: (domain, name), "" for the domain ai.onnx.

Left out of the standard ones: loops (may never end), what draws random numbers, sequences,
optionals, maps, strings and pictures (formats of their own to parse). Of onnxruntime's own domain
only what the quantized inference graphs need; for onnxruntime-training's artifacts also what its
gradient builder writes. Operators that run code from elsewhere (PythonOp, ATen) are in no list.
"""

from __future__ import annotations

Operators = frozenset[tuple[str, str]]

MICROSOFT = "com.microsoft"

_STANDARD = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization
BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu Clip Compress Concat
Constant ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh CumSum DepthToSpace
DequantizeLinear Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike
Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater
GreaterOrEqual GroupNormalization HardSigmoid HardSwish Hardmax Identity If InstanceNormalization
IsInf IsNaN LRN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization
MatMul MatMulInteger Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg
NegativeLogLikelihoodLoss NonZero Not OneHot Or PRelu Pad Pow QLinearConv QLinearMatMul
QuantizeLinear Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize Round
ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax
SoftmaxCrossEntropyLoss Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh
ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Where Xor
"""
_QUANTIZED = "MatMulNBits"  # onnxruntime >= 1.19
_TRAINING = """
AdamWOptimizer AveragePoolGrad BatchNormalizationGrad BiasFastGeluGrad_dX BiasGelu
BiasGeluGrad_dX BroadcastGradientArgs ConcatTraining ConvGrad ConvTransposeGrad DivGrad FastGelu
FastGeluGrad FusedGemm FusedMatMul GatherElementsGrad GatherGrad GatherNDGrad Gelu GeluGrad
InPlaceAccumulator InPlaceAccumulatorV2 InplaceClipGradNorm InvertibleLayerNormalizationGrad
LayerNormalizationGrad LeakyReluGrad LogSoftmaxGrad LogSoftmaxGrad_13 MaxPoolGrad PadAndUnflatten
QuickGelu QuickGeluGrad ReduceSumTraining ReluGrad ResizeGrad Scale ScaledSum SGDOptimizerV2
SigmoidGrad SimplifiedLayerNormalization SimplifiedLayerNormalizationGrad SinGrad SliceGrad
SoftmaxCrossEntropyLossGrad SoftmaxCrossEntropyLossInternal SoftmaxCrossEntropyLossInternalGrad
SoftmaxGrad SoftmaxGrad_13 SplitTraining TanhGrad
"""


def _of(domain: str, names: str) -> Operators:
    return frozenset((domain, name) for name in names.split())


STEP: Operators = _of("", _STANDARD)
INFER: Operators = STEP | _of(MICROSOFT, _QUANTIZED)
# The gradient builder registers the gradients of pooling in the standard domain.
TRAINING: Operators = (
    STEP | _of(MICROSOFT, _TRAINING) | _of("", "AveragePoolGrad MaxPoolGrad")
)  # fmt: skip
# What takes a sequence of tensors as an input of the graph.
SEQUENCES: Operators = _of(MICROSOFT, "AdamWOptimizer InplaceClipGradNorm SGDOptimizerV2")
