"""`u2moe sign` and `u2moe verify`: sign bundles, and check their files and signatures. Graphs may have any format."""

import argparse
from pathlib import Path

from u2moe.runtime.bundle.files import BundleFiles
from u2moe.runtime.bundle.manifest import MANIFEST_FILE
from u2moe.runtime.bundle.manifest_file import parse_manifest
from u2moe.runtime.bundle.signature import SIGNATURE_FILE, signatures_in, signed_text, signer
from u2moe.runtime.bundle_location import find_bundle
from u2moe.runtime.cli.options import add_public_key, public_keys_in
from u2moe.runtime.cli.terminal import tell
from u2moe.runtime.whole_file import write_text

_MANIFEST_LIMIT = 64 << 20


def add_sign(parser: argparse.ArgumentParser) -> None:
    """Add `u2moe sign`."""
    parser.description = (
        "Sign the manifest of a bundle with Ed25519, and thereby all files that it lists. Replaces "
        f"{SIGNATURE_FILE} in the bundle. To make a key, use 'openssl genpkey -algorithm ed25519 -out private.pem'; "
        "for its public part, use 'openssl pkey -in private.pem -pubout -out public.pem'. Needs the extra [sign]."
    )
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder of a bundle")
    about = "private key in PEM; may be repeated if some programs trust only an older or a newer key"
    parser.add_argument("--key", metavar="FILE", type=Path, action="append", required=True, help=about)
    parser.set_defaults(run=run_sign)


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Add `u2moe verify`."""
    parser.description = "Compare the files of a bundle with their digests, and show who signed it. Loads no graph."
    parser.add_argument("bundle", metavar="BUNDLE", help="folder of a bundle; demo: the demo model")
    add_public_key(parser)
    parser.set_defaults(run=run_verify)


def run_sign(args: argparse.Namespace) -> int:
    """Sign a complete bundle, and report the key ids."""
    content = _whole(args.bundle)
    keys = {str(file): file.read_bytes() for file in args.key}
    write_text(args.bundle / SIGNATURE_FILE, signed_text(content, keys))
    tell(f"{args.bundle / SIGNATURE_FILE}: signed by {', '.join(signatures_in(args.bundle))}")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Compare the files of a bundle with their digests, and report who signed it."""
    folder, keys = find_bundle(args.bundle), public_keys_in(args)
    content = _whole(folder)
    signatures = signatures_in(folder) if keys or (folder / SIGNATURE_FILE).exists() else {}
    unverified = ", ".join(f"{key} (not verified: see --public-key)" for key in signatures)
    tell(f"{folder}: is complete, and signed by {signer(folder, content, keys) if keys else unverified or 'nobody'}")
    return 0


def _whole(folder: Path) -> bytes:
    """Return the manifest of a bundle. Raise BundleError or IntegrityError if a file is missing or damaged."""
    content = BundleFiles(folder).read(MANIFEST_FILE, _MANIFEST_LIMIT)
    digests = parse_manifest(content.decode(errors="replace"), folder / MANIFEST_FILE).files
    files = BundleFiles(folder, digests)
    for name in digests:
        files.verify(name)
    return content
