"""`u2moe sign` and `u2moe verify`: sign bundles, and check their files and signatures. `u2moe push`: publish them."""

import argparse
from pathlib import Path
from typing import Any

from u2moe.runtime.bundle.files import BundleFiles
from u2moe.runtime.bundle.manifest import MANIFEST_FILE, Manifest
from u2moe.runtime.bundle.manifest_file import parse_manifest
from u2moe.runtime.bundle.signature import SIGNATURE_FILE, signatures_in, signed_text, signer
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_location import find_bundle, is_repository
from u2moe.runtime.cli.options import add_public_key, public_keys_in
from u2moe.runtime.cli.terminal import tell
from u2moe.runtime.errors import BundleError
from u2moe.runtime.installation import install_command
from u2moe.runtime.whole_file import write_text


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
    file = args.bundle / SIGNATURE_FILE
    write_text(file, signed_text(content, {str(key): key.read_bytes() for key in args.key}))
    tell(f"{file}: signed by {', '.join(signatures_in(args.bundle))}")
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
    content = BundleFiles(folder).read(MANIFEST_FILE, 64 << 20)
    digests = parse_manifest(content.decode(errors="replace"), folder / MANIFEST_FILE).files
    files = BundleFiles(folder, digests)
    for name in digests:
        files.verify(name)
    return content


CARD_FILE = "README.md"
_CARD = """\
---
library_name: u2moe
pipeline_tag: automatic-speech-recognition
tags: [wenet, u2++, onnx{tags}]
---

# {title}

A speech recognition model for u2moe: {encoder} with CTC{decoder}, {use}; {mb:.0f} MB, {form}.

```bash
# {install}
u2moe transcribe --model {name} talk.mp3
```

**To be completed by the author:** language, training data, word errors and test sets, limits, licence.

Written by {producer}.
"""


def add_push(parser: argparse.ArgumentParser) -> None:
    """Add `u2moe push`."""
    parser.description = (
        "Check a bundle and commit it to a repository of the Hugging Face hub. Add a model card if the "
        "repository has none. Uses the token in $HF_TOKEN, like all tools of the hub. Needs the package's extra 'hub'."
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="folder of a bundle; demo: the demo model")
    parser.add_argument("name", metavar="NAME", help="org/name or org/name@branch; created if missing")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.set_defaults(run=run_push)


def run_push(args: argparse.Namespace) -> int:
    """Publish a bundle, and report the URL of the commit."""
    if not is_repository(args.name):
        raise ValueError(f"{args.name!r} is not the name of a repository: use org/name or org/name@branch")
    tell(push_bundle(find_bundle(args.bundle), args.name, private=args.private))
    return 0


def push_bundle(folder: Path, name: str, *, private: bool = False) -> str:
    """Check and commit a bundle, with a model card if there is none. Return the commit's URL. Raise BundleError."""
    from huggingface_hub import CommitOperationAdd, HfApi  # noqa: PLC0415 - an extra

    bundle = Bundle.open(folder)
    repository, _, branch = name.partition("@")
    files = (*bundle.manifest.files, MANIFEST_FILE, *([SIGNATURE_FILE] if (folder / SIGNATURE_FILE).exists() else []))
    added: list[Any] = [CommitOperationAdd(file, str(folder / file)) for file in files]
    api = HfApi(library_name="u2moe")
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        if branch:
            api.create_branch(repository, branch=branch, exist_ok=True)
        if not api.file_exists(repository, CARD_FILE, revision=branch or None):
            card = folder / CARD_FILE
            content = card.read_bytes() if card.exists() else model_card(bundle.manifest, name)
            added.append(CommitOperationAdd(CARD_FILE, content))
        message = f"Bundle written by {bundle.manifest.producer}"
        return str(api.create_commit(repository, added, commit_message=message, revision=branch or None).commit_url)
    except Exception as error:  # the client's errors have no common base class
        message = str(error).strip().partition("\n")[0]
        raise BundleError(f"{name}: cannot be published: {message}") from error


def model_card(manifest: Manifest, name: str) -> bytes:
    """Return a model card in the hub's format, with facts from the bundle, and gaps for the author to fill in."""
    encoder = manifest.architecture.get("encoder", {})
    experts = encoder.get("feed_forward", {}).get("num_experts")
    kind = str(encoder.get("kind", "an encoder")).replace("_", "-")
    streaming = manifest.model.streaming
    return _CARD.format(
        tags=(", streaming" if streaming else "") + (", mixture-of-experts" if experts else ""),
        title=name.partition("@")[0].partition("/")[2],
        encoder=f"{kind} of {manifest.model.num_blocks} blocks" + (f" with {experts} experts" if experts else ""),
        decoder=f" and attention ({manifest.model.decoder})" if manifest.model.decoder else "",
        use="for streams and whole recordings" if streaming else "for whole recordings",
        mb=sum(file.size for file in manifest.files.values()) / 1e6,
        form=manifest.quantization.get("recipe", "float32"),
        name=name,
        install=install_command("cpu,hub"),
        producer=manifest.producer,
    ).encode()
