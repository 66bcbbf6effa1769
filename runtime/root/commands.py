"""The commands of `u2moe` and their help. Imports nothing slow."""

DOCUMENTATION = "docs/index.md in the repository, or `make docs`"

GROUPS = {
    "Recognise": {
        "transcribe": ("u2moe.runtime.cli.transcribe", "add_transcribe", "recognise audio files"),
        "listen": ("u2moe.runtime.cli.transcribe", "add_listen", "recognise speech from a microphone"),
        "align": ("u2moe.runtime.cli.transcribe", "add_align", "find when each word of a text is spoken"),
        "corpus": ("u2moe.runtime.cli.corpus", "add_corpus", "recognise a corpus, each utterance exactly once"),
    },
    "Your own model": {
        "export": ("u2moe.export.cli", "add_export", "export a WeNet checkpoint to a bundle of ONNX graphs"),
        "quantize": ("u2moe.quantize.cli", "add_quantize", "make a smaller, faster bundle"),
        "inspect": ("u2moe.quantize.cli", "add_inspect", "show the content of a bundle"),
        "validate": ("u2moe.export.cli", "add_validate", "check a bundle, and its parity with a checkpoint"),
        "convert": ("u2moe.export.cli", "add_convert", "convert a bundle to fewer graphs or another format"),
        "sign": ("u2moe.runtime.cli.bundle", "add_sign", "sign a bundle, so that programs can check its origin"),
        "verify": ("u2moe.runtime.cli.bundle", "add_verify", "compare a bundle with its digests, and show its signers"),
        "push": ("u2moe.runtime.cli.bundle", "add_push", "publish a bundle on the Hugging Face hub"),
        "lm": ("u2moe.runtime.cli.lm", "add_lm", "make language models for a domain"),
    },
    "Measure": {
        "bench": ("u2moe.benchmarks.bench.cli", "add_bench", "measure bundles on this machine, or compare two"),
        "doctor": ("u2moe.benchmarks.bench.doctor", "add_doctor", "describe this installation, for bug reports"),
    },
    "Serve": {
        "serve": ("u2moe.runtime.cli.serve", "add_serve", "run a server for existing speech recognition clients")
    },
}
"""Groups of commands. Each command has a module, a function and a summary. The module is imported when its command
runs."""
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}

EXAMPLES = """\
  u2moe transcribe --stream talk.mp3                 the demo model, as if live
  u2moe export exp/u2pp_moe bundle                   a WeNet training directory
  u2moe transcribe --model bundle -o texts lectures  a folder of recordings"""


def help_text() -> str:
    """Return the help text that `u2moe` prints if no command is given."""
    groups = "\n".join(
        f"{title}:\n" + "".join(f"  {name:10}  {summary}\n" for name, (_, _, summary) in group.items())
        for title, group in GROUPS.items()
    )
    return (
        "usage: u2moe [--version] [--verbose] COMMAND ...\n\n"
        "Speech recognition with WeNet's U2++ models, dense or with a mixture of experts, on onnxruntime.\n\n"
        f"{groups}\nExamples:\n{EXAMPLES}\n\n"
        f"u2moe COMMAND --help describes a command. Documentation: {DOCUMENTATION}"
    )
