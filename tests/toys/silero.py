"""A network with silero VAD's inputs and outputs that detects speech by loudness."""

import onnx
import onnx.parser

VAD = """
<ir_version: 9, opset_import: ["" : 18]>
vad (float[windows, 576] input, {inputs}) => (float[windows, 1] output, float[a, b, c] next{outputs})
<int64[1] first = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] last = {{-1}}, int64[1] end = {{9999}},
 int64[1] seen = {{64}}, int64[1] body = {{512}}, float limit = {{0.001}}, float threshold = {{0.0001}},
 int64[3] cell = {{1, 1, 1}}, int64[3] copies = {{{copies}, 1, 128}}, int64[2] column = {{-1, 1}}>
{{
    context = Slice(input, first, seen, one)          context_sums = ReduceSum<keepdims = 1>(context, one)
    context_sum = Slice(context_sums, first, one, first)
    held = Slice({state}, first, one, two)            held_sums = Reshape(held, column)
    remembered = Slice(held_sums, first, one, first)  difference = Sub(context_sum, remembered)
    size = Abs(difference)                            follows = Less(size, limit)
    samples = Slice(input, seen, end, one)            squares = Mul(samples, samples)
    energy = ReduceMean<keepdims = 1>(squares, one)   loud = Greater(energy, threshold)
    speaks = And(loud, follows)                       output = Cast<to = 1>(speaks)
    tail = Slice(input, body, end, one)               tail_sums = ReduceSum<keepdims = 1>(tail, one)
    tail_sum = Slice(tail_sums, last, end, first)     summed = Reshape(tail_sum, cell)
    next = Expand(summed, copies)                     {further}
}}
"""
"""A window is speech if it is loud and its first 64 samples equal the last ones of the previous window in the state."""
WINDOWS = {"inputs": "float[2, b, 128] state, int64 sr", "outputs": "", "copies": 2, "state": "state", "further": ""}
SEQUENCES = {
    "inputs": "float[1, 1, 128] h, float[1, 1, 128] c", "outputs": ", float[1, 1, 128] cn", "copies": 1, "state": "h",
    "further": "cn = Identity(c)",
}  # fmt: skip
"""Like silero's file for many windows in one run, but only the first row is compared with the state."""


def write_vad(file, sequence=False):
    model = onnx.parser.parse_model(VAD.format(**(SEQUENCES if sequence else WINDOWS)))
    onnx.checker.check_model(model)
    onnx.save(model, file)
    return file
