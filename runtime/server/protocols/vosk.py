"""Protocol of vosk-server: a configuration, then int16 audio, each message with an answer, then `{"eof": 1}`."""

from typing import Any

from u2moe.runtime.result import Result
from u2moe.runtime.server.connection import Connection, Protocol, int16_samples, parse_object
from u2moe.runtime.server.errors import RequestError, refusing
from u2moe.runtime.text.vocabulary import join_texts
from u2moe.runtime.validation import checked_number, checked_object

_PART_S = 2.0  # seconds of audio per part of a long message; final results are taken after each part
_DEFAULT: dict[str, Any] = {"sample_rate": 8000, "words": True, "max_alternatives": 0, "phrase_list": [], "model": None}


async def run(connection: Connection) -> None:
    """Serve streams until "eof". After "reset", a new stream begins.

    The sample rate, model and phrases of a configuration apply to the next stream. Other settings apply immediately.
    """
    config, restricted, stream = _DEFAULT, None, None
    while True:
        finals: list[Result] = []
        message = await connection.receive()
        command = None if isinstance(message, bytes) else parse_object(message)
        if command is not None and "config" in command:
            config = _read_config(command["config"], config)
            if config["model"]:
                connection.slot.model = connection.service.model(config["model"])
            restricted = await connection.slot.model.restricted(config["phrase_list"])
            continue
        if stream is None:
            stream = connection.slot.open_stream(config["sample_rate"], restricted)
        if command is None:
            samples = int16_samples(message)  # type: ignore[arg-type]
            size = max(round(_PART_S * stream.sample_rate), 1)
            for start in range(0, len(samples), size):
                await stream.feed(samples[start : start + size])
                finals += stream.take_finals()
        elif "eof" in command or "reset" in command:
            stream.finish()
        else:
            raise RequestError("expected audio or one of 'config', 'reset' and 'eof'")
        await stream.settle()
        finals += stream.take_finals()
        await connection.send(_final(finals, config) if finals or stream.is_over else {"partial": stream.partial_text})
        if stream.is_over:
            if command is None or "eof" in command:
                return
            stream = None
        elif finals and connection.slot.is_drained:  # the current utterance is finished
            return


@refusing()
def _read_config(value: Any, before: dict[str, Any]) -> dict[str, Any]:
    """Read a configuration. Omitted settings keep their values from `before`. Numbers may be strings, as in vosk."""
    given = checked_object("config", value)
    config = before | {name: given[name] for name in before if name in given}
    phrases = config["phrase_list"] = config["phrase_list"] or []
    if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
        raise RequestError("phrase_list must be a list of phrases", "phrase_list")
    for name in ("sample_rate", "max_alternatives"):
        config[name] = checked_number(name, config[name], least=0, from_text=True)
    return config


def _final(finals: list[Result], config: dict[str, Any]) -> dict[str, Any]:
    text = join_texts([final.text for final in finals])
    spoken = (word for final in finals for word in final.words)
    words = [{"conf": word.confidence, "end": word.end, "start": word.start, "word": word.word} for word in spoken]
    result = {"result": words} if config["words"] and words else {}
    if not (num_alternatives := int(config["max_alternatives"])):
        return {**result, "text": text}
    others = finals[0].nbest[1:num_alternatives] if len(finals) == 1 else []
    best = {"confidence": finals[0].score if finals else 0.0, **result, "text": text}
    return {"alternatives": [best, *({"confidence": other.score, "text": other.text} for other in others)]}


PROTOCOL = Protocol(
    name="vosk", path="/vosk", run=run, may_have_port=True, tell_error=lambda error: {"error": str(error)}
)
