"""The command line, called from a test."""

from u2moe.runtime import cli


def transcribe(bundle, *arguments):
    """Return the exit status of `u2moe transcribe` with the model of a bundle."""
    return cli.main(["transcribe", "--model", str(bundle.path), *map(str, arguments)])
