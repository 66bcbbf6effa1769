"""Recognise 16-bit mono samples with ctypes: transcribe.py LIBRARY BUNDLE RATE < samples.

In Python, the package u2moe is simpler.
"""

import ctypes
import json
import sys

Handle = ctypes.c_void_p


def main(library: str, bundle: str, rate: str) -> None:
    lib = ctypes.CDLL(library)
    lib.u2moe_error_message.restype = ctypes.c_char_p

    def call(name: str, *arguments: object) -> None:
        if getattr(lib, name)(*arguments):
            raise SystemExit(f"{name}: {lib.u2moe_error_message().decode()}")

    recognizer, stream, result = Handle(), Handle(), Handle()
    text = ctypes.c_char_p()
    call("u2moe_recognizer_open", bundle.encode(), None, ctypes.byref(recognizer))
    call("u2moe_stream_create", recognizer, None, ctypes.byref(stream))
    samples = sys.stdin.buffer.read()
    second = 2 * int(rate)
    for begin in range(0, len(samples), second):  # another thread could feed while this one decodes
        part = samples[begin : begin + second]
        call("u2moe_stream_feed_int16", stream, int(rate), part, ctypes.c_size_t(len(part) // 2))
        call("u2moe_decode_streams", ctypes.byref(stream), ctypes.c_size_t(1))
    call("u2moe_stream_feed_finished", stream)
    call("u2moe_decode_streams", ctypes.byref(stream), ctypes.c_size_t(1))
    while True:
        call("u2moe_stream_take_segment", stream, ctypes.byref(result))
        if not result:
            break
        call("u2moe_result_json", result, ctypes.byref(text))
        segment = json.loads(text.value or b"")
        print(f"{segment['start']:.2f} {segment['end']:.2f} {segment['text']}")
        call("u2moe_result_free", result)
    call("u2moe_stream_free", stream)
    call("u2moe_recognizer_free", recognizer)


if __name__ == "__main__":
    main(*sys.argv[1:])
