"""Mixtures of experts as model-local ONNX functions, in float32 or half precision, 8 and 4 bits.

The assignments of tokens to experts are sorted by expert: every expert then has its tokens as one matrix, and the rows
of all of them go back to their tokens in one look-up.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from u2moe.quantize.functions import ACTIVATIONS, CONSTANTS, LOWEST, make_function, skipping


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

    Hidden activations are computed and searched for their largest values expert by expert, in pieces that a cache
    holds, but the scales of all of them together: there are few tokens in a chunk, and then starting an operator takes
    longer than what it does. These scales are part of the weights in the sum over a token's experts, and so are the
    biases of the second product.
    """
    body = CONSTANTS + "one = Constant<value = float {1.0}>()\n"
    body += _router(top_k, num_experts, skip_below) + _dispatch(num_experts, skip_below)
    body += """
    size = Abs(tokens)
    peak = ReduceMax<keepdims = 0>(size, last)
    """
    body += _scales("tokens", "peak")
    body += """
    q = QuantizeLinear<axis = 0>(tokens, tokens_scale, tokens_middle)
    sorted_q = Gather<axis = 0>(q, token)
    sorted_scale = Gather<axis = 0>(tokens_scale, token)
    scale_columns = Unsqueeze(sorted_scale, last)
    """
    body += _split("sorted_q", num_experts) + _split("scale_columns", num_experts)
    for expert in range(num_experts):
        body += _int8_hidden(expert, kind, has_bias=has_bias)
    body += _hidden_scales(num_experts, kind)
    for expert in range(num_experts):
        hidden = f"hidden{expert}"
        body += f"{hidden}_q = QuantizeLinear<axis = 0>({hidden}, hidden_scale{expert}, hidden_middle{expert})\n"
        body += _int8_product(f"merged{expert}", f"{hidden}_q", f"e{expert}_w2")
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
    return make_function(name, int8_moe_parameters(num_experts, has_bias=has_bias), body)


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


def _hidden_scales(num_experts: int, kind: str) -> str:
    """Statements for the scales and the zeros of the hidden activations, of all experts and of each.

    onnxruntime before 1.32 gives the largest values of each row of an empty matrix the shape of that matrix; to put
    them behind those of the others makes up for it, as nothing of them is left.
    """
    body = ""
    for expert in range(num_experts):
        rows = f"hidden{expert}"
        if kind not in LOWEST:
            body += f"size{expert} = Abs({rows})\n"
            rows = f"size{expert}"
        body += f"highest{expert} = ReduceMax<keepdims = 0>({rows}, last)\n"
    body += _concat("highest", num_experts)
    highest = "highest"
    if LOWEST.get(kind):
        body += f"lowest = Constant<value = float {{{LOWEST[kind]}}}>() hidden_peak = Max(highest, lowest)\n"
        highest = "hidden_peak"
    body += _scales("hidden", highest)
    return body + _split("hidden_scale", num_experts) + _split("hidden_middle", num_experts)


def _scales(x: str, peak: str) -> str:
    """Statements for {x}_scale and {x}_middle [rows] of a matrix x with the largest magnitudes `peak`.

    Then x = {x}_scale * (q - {x}_middle).
    """
    return f"""
    {x}_scale = Mul({peak}, step)
    {x}_rows = Shape({x}_scale)
    {x}_middle = Expand(middle, {x}_rows)
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
    return make_function(name, moe_parameters(num_experts, has_bias=has_bias), body)


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
    return make_function(name, names, body)


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
    body = f"""
    assignments = Reshape(assigned, last)
    num_assignments = Shape(assignments)
    sorted_experts, order = TopK<axis = 0, largest = 0>(assignments, num_assignments)
    second = Constant<value = int64[1] {{1}}>()
    num_experts = Constant<value = int64 {{{num_experts}}}>()
    off_on = Constant<value = int64[2] {{0, 1}}>()
    one_hot = OneHot<axis = 0>(assignments, num_experts, off_on)
    counts = ReduceSum<keepdims = 0>(one_hot, second)
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
    sorted_places, position = TopK<axis = 0, largest = 0>(order, num_assignments)
    choices = Constant<value = int64[2] {{-1, {top_k}}}>()
    """
    if not skip_below:
        return body + "places = Reshape(position, choices)\n"
    return (
        body
        + """
    all_places = Reshape(position, choices)
    last_place = Sub(num_kept, second)
    places = Min(all_places, last_place)
    """
    )


def _weighted_sum(y: str) -> str:
    """Statements for y [tokens, dim]: the rows of `merged` at the `places` of each token, times its `factors`.

    A product of a row and a matrix for each token: less work than multiplying, and then adding up, all of them.
    """
    return f"""
    chosen = Gather<axis = 0>(merged, places)
    factor_rows = Unsqueeze(factors, second)
    sums = MatMul(factor_rows, chosen)
    {y} = Squeeze(sums, second)
    """


def _in_shape_of_x() -> str:
    """Statements for the function's output: `summed` in the shape of its input."""
    return """
    x_shape = Shape(x)
    y = Reshape<allowzero = 1>(summed, x_shape)
    """
