"""Shared parts of the tests of transcribers: options with short utterances, and the results of a stream."""

from u2moe.runtime import DecodingOptions, EndpointConfig, EndpointRule

OPTIONS = DecodingOptions(
    chunk_size=8,
    num_left_chunks=2,
    endpoint=EndpointConfig(rule1=None, rule2=None, rule3=EndpointRule(min_utterance_length=1.2)),
)


def feed_each(transcriber, blocks):
    for block in blocks:
        transcriber.feed(16_000, block)


def results_of(recognizer, blocks):
    """Return the texts of changing partial results, and the segments, of a stream."""
    stream, shown, partial, segments = recognizer.create_stream(OPTIONS), "", [], []
    for block in blocks:
        stream.accept_waveform(16_000, block)
        recognizer.decode_streams([stream])
        new = stream.take_segments()
        shown = "" if new else shown
        segments += new
        if stream.get_result().text != shown:
            shown = stream.get_result().text
            partial.append((stream.get_result().segment, shown))
    stream.input_finished()
    recognizer.decode_streams([stream])
    return partial, segments + stream.take_segments()


def fail_at(recognizer, number, error):
    """Make the recogniser fail after its `number`th decoding."""
    calls, decode = [], recognizer.decode_streams

    def decode_streams(streams):
        calls.append(streams)
        decode(streams)
        if len(calls) == number:
            raise error

    recognizer.decode_streams = decode_streams
