"""Model-local ONNX functions that compute on quantized weights, written in ONNX's own text form.

Activations are quantized where they are used, with one scale per row (token): the result of a token then depends
neither on its chunk nor on its batch, and loud tokens do not drown quiet ones. Rows are divided by their largest
magnitude, which makes the scale of the integers the constant 1/127, and multiplied by it again after the product. That
magnitude is 0 for a row of zeros: its integers then mean nothing, but 0 times their product is what it should be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from u2moe.runtime import contract

OPSET = 18
CONTRIB = "com.microsoft"
"""Operators of this domain are part of every onnxruntime build: no library of custom operators is needed."""

ACTIVATIONS = {
    "relu": "{y} = Relu({x})",
    "tanh": "{y} = Tanh({x})",
    "selu": "{y} = Selu({x})",
    "hardtanh": "{y}_low = Constant<value = float {{-1.0}}>() {y}_high = Constant<value = float {{1.0}}>() "
    "{y} = Clip({x}, {y}_low, {y}_high)",
    "swish": "{y}_gate = Sigmoid({x}) {y} = Mul({x}, {y}_gate)",
    "gelu": "{y}_root = Constant<value = float {{1.4142135623730951}}>() {y}_scaled = Div({x}, {y}_root) "
    "{y}_erf = Erf({y}_scaled) {y}_one = Constant<value = float {{1.0}}>() {y}_shifted = Add({y}_erf, {y}_one) "
    "{y}_half = Constant<value = float {{0.5}}>() {y}_left = Mul({x}, {y}_half) {y} = Mul({y}_left, {y}_shifted)",
}
"""Statements for y = activation(x)."""

CONSTANTS = """
    step = Constant<value = float {0.007874015748031496}>()
    middle = Constant<value = uint8 {128}>()
    last = Constant<value = int64[1] {-1}>()
    one = Constant<value = float {1.0}>()
"""
"""The scale of integers made from values in [-1, 1], and their zero."""


def _function(name: str, parameters: Sequence[str], body: str, outputs: Sequence[str] = ("y",)) -> ir.Function:
    text = f"""<domain: "{contract.MOE_DOMAIN}", opset_import: ["": {OPSET}, "{CONTRIB}": 1]>
    {name} ({", ".join(parameters)}) => ({", ".join(outputs)}) {{ {body} }}"""
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


def int8_rows() -> ir.Function:
    """Rows of x [..., in] as uint8 and the largest magnitude of each [..., 1]: x = peak * (q - 128) / 127.

    Apart from `int8_matmul`, so that several products of one x quantize it once.
    """
    body = """
    size = Abs(x)
    peak = ReduceMax<keepdims = 1>(size, last)
    ratio = Div(x, peak)
    q = QuantizeLinear(ratio, step, middle)
    """
    return _function("Int8Rows", ("x",), CONSTANTS + body, ("q", "peak"))


def int8_matmul() -> ir.Function:
    """Y = x @ weight of quantized rows of x, see `int8_rows`, and weight int8 [in, out] with a scale per column."""
    body = """
    unit = com.microsoft.MatMulIntegerToFloat(q, weight, step, scale, middle)
    y = Mul(unit, peak)
    """
    return _function("Int8MatMul", ("q", "peak", "weight", "scale"), CONSTANTS + body)


def int8_embedding() -> ir.Function:
    """Rows of an int8 table [vocab, dim] with a scale per row [vocab, 1]."""
    body = """
    integers = Gather<axis = 0>(weight, tokens)
    row = Cast<to = 1>(integers)
    row_scale = Gather<axis = 0>(scale, tokens)
    y = Mul(row, row_scale)
    """
    return _function("Int8Embedding", ("weight", "scale", "tokens"), body)


def int8_convolution(kernel: int, stride: int) -> ir.Function:
    """Y = relu(conv(x)) over [batch, time, frequency, channels] of x >= 0, without padding, as one matrix product.

    `weight` is int8 [kernel * kernel * in, out] in the order (time, frequency, in). An output frame has one activation
    scale, the largest of all it looks at: frames are quantized after they are cut out in time, so that the scale of a
    frame does not depend on its chunk, and cut in frequency as bytes.
    """
    body = """
    step = Constant<value = float {0.00392156862745098}>()
    zero = Constant<value = uint8 {0}>()
    time = Constant<value = int64[1] {1}>()
    frequency = Constant<value = int64[1] {2}>()
    inner = Constant<value = int64[2] {2, 3}>()
    """
    body += f"stride = Constant<value = int64[1] {{{stride}}}>()\n"
    for index in range(kernel):
        end = index - kernel + 1 if index < kernel - 1 else 2**63 - 1
        body += f"""
        start{index} = Constant<value = int64[1] {{{index}}}>()
        end{index} = Constant<value = int64[1] {{{end}}}>()
        frames{index} = Slice(x, start{index}, end{index}, time, stride)
        largest{index} = ReduceMax<keepdims = 1>(frames{index}, inner)
        """
    body += f"peak = Max({', '.join(f'largest{index}' for index in range(kernel))})\n"
    for index in range(kernel):
        body += f"""
        ratio{index} = Div(frames{index}, peak)
        q{index} = QuantizeLinear(ratio{index}, step, zero)
        """
        for other in range(kernel):
            body += f"patch{index}_{other} = Slice(q{index}, start{other}, end{other}, frequency, stride)\n"
    patches = ", ".join(f"patch{index}_{other}" for index in range(kernel) for other in range(kernel))
    body += f"""
    patches = Concat<axis = -1>({patches})
    unit = com.microsoft.MatMulIntegerToFloat(patches, weight, step, scale, zero)
    product = Mul(unit, peak)
    sum = Add(product, bias)
    y = Relu(sum)
    """
    return _function(f"Int8Convolution_{kernel}x{kernel}_stride{stride}", ("x", "weight", "scale", "bias"), body)


@dataclass(frozen=True, kw_only=True)
class Int4Sizes:
    """What MatMulNBits must be told: layer sizes and how many rows share a scale."""

    dim: int
    hidden: int
    block_size: int


def moe_parameters(num_experts: int, *, has_bias: bool) -> list[str]:
    """Names of the inputs of a mixture of experts in 4 bits."""
    names = ["x", "gate"]
    for expert in range(num_experts):
        for part in ("w1", "w2"):
            names += [f"e{expert}_{part}", f"e{expert}_{part}_scale"]
            names += [f"e{expert}_{part}_bias"] if has_bias else []
    return names


def int8_moe_parameters(num_experts: int, *, has_bias: bool) -> list[str]:
    """Names of the inputs of a mixture of experts in int8; `w2_bias` is that of all experts [experts, dim]."""
    names = ["x", "gate", *(("w2_bias",) if has_bias else ())]
    for expert in range(num_experts):
        names += [f"e{expert}_w1", f"e{expert}_w1_scale", *((f"e{expert}_w1_bias",) if has_bias else ())]
        names += [f"e{expert}_w2", f"e{expert}_w2_scale"]
    return names


def int8_mixture_of_experts(
    num_experts: int, top_k: int, kind: str, *, has_bias: bool, skip_below: float = 0.0
) -> ir.Function:
    """The mixture of experts with int8 experts and a float32 router. Tokens are quantized once, before they are sorted.

    Hidden activations are computed expert by expert, in pieces that a cache holds, and quantized together. (That also
    spares onnxruntime before 1.32 the largest value of each row of an empty matrix, which it gives the wrong shape.)
    Their scales are part of the weights in the sum over a token's experts, and so are the biases of the second product.
    """
    body = CONSTANTS + _router(top_k, num_experts, skip_below) + _dispatch(num_experts, skip_below)
    body += _quantized_rows("tokens")
    body += """
    sorted_q = Gather<axis = 0>(tokens_q, token)
    sorted_scale = Gather<axis = 0>(tokens_scale, token)
    scale_columns = Unsqueeze(sorted_scale, last)
    """
    body += _split("sorted_q", num_experts) + _split("scale_columns", num_experts)
    for expert in range(num_experts):
        body += _int8_hidden(expert, kind, has_bias=has_bias)
    body += _concat("hidden", num_experts) + _quantized_rows("hidden") + _split("hidden_q", num_experts)
    for expert in range(num_experts):
        body += _int8_product(f"merged{expert}", f"hidden_q{expert}", f"e{expert}_w2")
    body += _concat("merged", num_experts) + _places(top_k, skip_below)
    body += """
    scales = Gather<axis = 0>(hidden_scale, places)
    factors = Mul(probabilities, scales)
    """
    if not has_bias:
        body += _weighted_sum("summed")
    else:
        body += _weighted_sum("unbiased")
        body += """
        logits_shape = Shape(logits)
        nothing = ConstantOfShape<value = float[1] {0.0}>(logits_shape)
        all_probabilities = ScatterElements<axis = 1>(nothing, experts, probabilities)
        summed = Gemm(all_probabilities, w2_bias, unbiased)
        """
    body += _in_shape_of_x()
    name = "Int8" + _moe_name(num_experts, top_k, kind, has_bias=has_bias, skip_below=skip_below)
    return _function(name, int8_moe_parameters(num_experts, has_bias=has_bias), body)


def _int8_hidden(expert: int, kind: str, *, has_bias: bool) -> str:
    """Statements for the hidden activations of one expert, of its rows of the quantized tokens."""
    body = _int8_product(f"unit{expert}", f"sorted_q{expert}", f"e{expert}_w1")
    inner = f"scaled{expert}"
    body += f"{inner} = Mul(unit{expert}, scale_columns{expert})\n"
    if has_bias:
        body += f"inner{expert} = Add({inner}, e{expert}_w1_bias)\n"
        inner = f"inner{expert}"
    return body + ACTIVATIONS[kind].format(x=inner, y=f"hidden{expert}") + "\n"


def _int8_product(y: str, x: str, weight: str) -> str:
    """Statement for y = (x - 128) @ weight times the scale of its columns: the scales of rows are left to others."""
    return f"{y} = com.microsoft.MatMulIntegerToFloat({x}, {weight}, one, {weight}_scale, middle)\n"


def _split(x: str, num_experts: int) -> str:
    """Statement for {x}0, {x}1, ...: the rows of each expert."""
    return f"{', '.join(f'{x}{expert}' for expert in range(num_experts))} = Split<axis = 0>({x}, counts)\n"


def _concat(x: str, num_experts: int) -> str:
    """Statement for x: the rows of all experts, {x}0, {x}1, ..."""
    return f"{x} = Concat<axis = 0>({', '.join(f'{x}{expert}' for expert in range(num_experts))})\n"


def _quantized_rows(x: str) -> str:
    """Statements for {x}_q (uint8) and {x}_scale [rows] with x = {x}_scale * ({x}_q - 128), of a matrix x."""
    return f"""
    {x}_highest = ReduceMax<keepdims = 0>({x}, last)
    {x}_lowest = ReduceMin<keepdims = 0>({x}, last)
    {x}_depth = Neg({x}_lowest)
    {x}_peak = Max({x}_highest, {x}_depth)
    {x}_scale = Mul({x}_peak, step)
    {x}_rows = Shape({x}_scale)
    {x}_middle = Expand(middle, {x}_rows)
    {x}_q = QuantizeLinear<axis = 0>({x}, {x}_scale, {x}_middle)
    """


def int4_mixture_of_experts(
    num_experts: int, top_k: int, kind: str, sizes: Int4Sizes, *, has_bias: bool, skip_below: float = 0.0
) -> ir.Function:
    """The mixture of experts with 4-bit experts; MatMulNBits quantizes the activations of each row itself, to int8."""
    parts = ", ".join(f"p{expert}" for expert in range(num_experts))
    outputs = ", ".join(f"o{expert}" for expert in range(num_experts))
    body = "last = Constant<value = int64[1] {-1}>()" + _router(top_k, num_experts, skip_below)
    body += _dispatch(num_experts, skip_below)
    body += f"""
    sorted = Gather<axis = 0>(tokens, token)
    {parts} = Split<axis = 0>(sorted, counts)
    """
    for expert in range(num_experts):
        hidden = f"h{expert}"
        body += _int4_product(f"{hidden}_sum", f"p{expert}", f"e{expert}_w1", sizes.dim, sizes.hidden, sizes)
        source = f"{hidden}_sum"
        if has_bias:
            body += f"{hidden}_in = Add({source}, e{expert}_w1_bias)\n"
            source = f"{hidden}_in"
        body += ACTIVATIONS[kind].format(x=source, y=hidden) + "\n"
        target = f"o{expert}_sum" if has_bias else f"o{expert}"
        body += _int4_product(target, hidden, f"e{expert}_w2", sizes.hidden, sizes.dim, sizes)
        body += f"o{expert} = Add({target}, e{expert}_w2_bias)\n" if has_bias else ""
    body += f"merged = Concat<axis = 0>({outputs})" + _combine(top_k, skip_below)
    name = "Int4" + _moe_name(num_experts, top_k, kind, has_bias=has_bias, skip_below=skip_below)
    name += f"_{sizes.dim}x{sizes.hidden}_block{sizes.block_size}"
    return _function(name, moe_parameters(num_experts, has_bias=has_bias), body)


def float_mixture_of_experts(
    num_experts: int, top_k: int, kind: str, *, has_bias: bool, skip_below: float = 0.0, half: bool = False
) -> ir.Function:
    """The mixture of experts in float32, or in half precision with the router's product and softmax in float32."""
    parts = ", ".join(f"p{expert}" for expert in range(num_experts))
    outputs = ", ".join(f"o{expert}" for expert in range(num_experts))
    body = "last = Constant<value = int64[1] {-1}>()" + _router(top_k, num_experts, skip_below, cast=half)
    body += _dispatch(num_experts, skip_below)
    body += f"""
    sorted = Gather<axis = 0>(tokens, token)
    {parts} = Split<axis = 0>(sorted, counts)
    """
    names = ["x", "gate"]
    for expert in range(num_experts):
        hidden, first, second = f"h{expert}", f"e{expert}_w1", f"e{expert}_w2"
        names += [first, f"{first}_bias", second, f"{second}_bias"] if has_bias else [first, second]
        source, target = f"{hidden}_sum", f"o{expert}_sum" if has_bias else f"o{expert}"
        body += f"{source} = MatMul(p{expert}, {first})\n"
        if has_bias:
            body += f"{hidden}_in = Add({source}, {first}_bias)\n"
            source = f"{hidden}_in"
        if half:  # constants of an activation are float32, and so is what it is computed in
            body += f"{hidden}_single = Cast<to = 1>({source})\n"
            body += ACTIVATIONS[kind].format(x=f"{hidden}_single", y=f"{hidden}_out") + "\n"
            body += f"{hidden} = Cast<to = 10>({hidden}_out)\n"
        else:
            body += ACTIVATIONS[kind].format(x=source, y=hidden) + "\n"
        body += f"{target} = MatMul({hidden}, {second})\n"
        body += f"o{expert} = Add({target}, {second}_bias)\n" if has_bias else ""
    body += f"merged = Concat<axis = 0>({outputs})" + _combine(top_k, skip_below)
    name = "Half" if half else "Float"
    name += _moe_name(num_experts, top_k, kind, has_bias=has_bias, skip_below=skip_below)
    return _function(name, names, body)


def skipping(skip_below: float) -> str:
    """What the name of a function says of it, behind all else that those of the exporter say; "" if it skips none."""
    return f"_skip{skip_below:g}".replace(".", "_") if skip_below else ""


def _moe_name(num_experts: int, top_k: int, kind: str, *, has_bias: bool, skip_below: float) -> str:
    name = f"MixtureOfExperts_top{top_k}of{num_experts}_{kind}" + ("" if has_bias else "_no_bias")
    return name + skipping(skip_below)


def _int4_product(y: str, x: str, weight: str, rows: int, columns: int, sizes: Int4Sizes) -> str:
    return f"""
    {y} = com.microsoft.MatMulNBits<K = {rows}, N = {columns}, bits = 4, block_size = {sizes.block_size},
        accuracy_level = 4>({x}, {weight}, {weight}_scale)
    """


def _router(top_k: int, num_experts: int, skip_below: float, *, cast: bool = False) -> str:
    """Statements for the experts and weights of each token; the router's product is in float32, whatever x is.

    An expert whose weight is below `skip_below` is left out, but never the likeliest of a token; the weights of the
    others then sum to 1 again, which is the softmax over those that are left. `assigned` is no expert where one is
    left out.
    """
    product = "single = Cast<to = 1>(tokens) logits = MatMul(single, gate)" if cast else "logits = MatMul(tokens, gate)"
    body = f"""
    tokens = Flatten<axis = -1>(x)
    {product}
    k = Constant<value = int64[1] {{{top_k}}}>()
    first = Constant<value = int64[1] {{0}}>()
    values, experts = TopK<axis = -1>(logits, k)
    """
    if skip_below:
        body += f"""
        all_shares = Softmax<axis = -1>(values)
        limit = Constant<value = float {{{skip_below:.9g}}}>()
        no_expert = Constant<value = int64 {{{num_experts}}}>()
        largest_share = Gather<axis = 1>(all_shares, first)
        least = Min(largest_share, limit)
        is_kept = GreaterOrEqual(all_shares, least)
        kept = Cast<to = 1>(is_kept)
        kept_shares = Mul(all_shares, kept)
        kept_sum = ReduceSum<keepdims = 1>(kept_shares, last)
        shares = Div(kept_shares, kept_sum)
        assigned = Where(is_kept, experts, no_expert)
        """
    else:
        body += "shares = Softmax<axis = -1>(values) assigned = Identity(experts)\n"
    return body + f"probabilities = {'Cast<to = 10>(shares)' if cast else 'Identity(shares)'}\n"


def _dispatch(num_experts: int, skip_below: float) -> str:
    """Statements for the order of the assignments by expert, the token of each, and the number of each expert.

    Assignments to no expert come last in `order`; `token` leaves them out.
    """
    ids = ", ".join(str(expert) for expert in range(num_experts))
    body = f"""
    assignments = Reshape(assigned, last)
    num_assignments = Shape(assignments)
    sorted_experts, order = TopK<axis = 0, largest = 0>(assignments, num_assignments)
    second = Constant<value = int64[1] {{1}}>()
    ids = Constant<value = int64[{num_experts}, 1] {{{ids}}}>()
    row = Unsqueeze(assignments, first)
    one_hot = Equal(row, ids)
    ones = Cast<to = 7>(one_hot)
    counts = ReduceSum<keepdims = 0>(ones, second)
    """
    if not skip_below:
        return body + "token = Div(order, k)\n"
    return (
        body
        + """
    num_kept = ReduceSum<keepdims = 1>(counts, first)
    kept_order = Slice(order, first, num_kept)
    token = Div(kept_order, k)
    """
    )


def _combine(top_k: int, skip_below: float) -> str:
    """Statements for the weighted sum of what the experts of each token say, in the order of the tokens."""
    body = _places(top_k, skip_below) + "factors = Identity(probabilities)\n"
    return body + _weighted_sum("summed") + _in_shape_of_x()


def _places(top_k: int, skip_below: float) -> str:
    """Statements for `places` [tokens, k]: where the rows of each token are in the order by expert.

    Where an expert was left out it is any row: its weight is 0.
    """
    body = f"""
    origin = Constant<value = int64 {{0}}>()
    stride = Constant<value = int64 {{1}}>()
    end = Squeeze(num_assignments)
    sorted_places = Range(origin, end, stride)
    position = ScatterElements<axis = 0>(order, order, sorted_places)
    choices = Constant<value = int64[2] {{-1, {top_k}}}>()
    """
    if not skip_below:
        return body + "places = Reshape(position, choices)\n"
    return (
        body
        + """
    all_places = Reshape(position, choices)
    last_place = Sub(num_kept, stride)
    places = Min(all_places, last_place)
    """
    )


def _weighted_sum(y: str) -> str:
    """Statements for y [tokens, dim]: the rows of `merged` at the `places` of each token, times its `factors`."""
    return f"""
    chosen = Gather<axis = 0>(merged, places)
    factor_columns = Unsqueeze(factors, last)
    weighted = Mul(chosen, factor_columns)
    {y} = ReduceSum<keepdims = 0>(weighted, second)
    """


def _in_shape_of_x() -> str:
    """Statements for the function's output: `summed` in the shape of its input."""
    return """
    x_shape = Shape(x)
    y = Reshape<allowzero = 1>(summed, x_shape)
    """
