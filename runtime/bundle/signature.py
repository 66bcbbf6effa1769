"""Ed25519 signatures of bundles. They cover the manifest and, through its digests, all files. They contain no date."""

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from u2moe.runtime.bundle.files import BundleFiles
from u2moe.runtime.errors import BundleError, SignatureError
from u2moe.runtime.installation import install_command
from u2moe.runtime.validation import checked_object, checked_text, refused_as, wrong

SIGNATURE_FILE = "bundle.sig"
PREFIX = b"u2moe bundle signature 1\n"  # Signed first: signatures of other data or versions are not valid
_FORMAT, _VERSION, _LIMIT = "u2moe-signature", 1, 1 << 20
_PEM = re.compile(r"\s*-----BEGIN PUBLIC KEY-----\s*MCowBQYDK2VwAyEA([A-Za-z0-9+/]{43}=)\s*-----END PUBLIC KEY-----\s*")
"""A public key: 12 bytes that are the same for all Ed25519 keys (RFC 8410), then the 32 bytes of the key."""


def public_key(text: str) -> bytes:
    """Return the 32 bytes of an Ed25519 public key given in PEM. Raises ValueError if `text` is anything else."""
    if isinstance(text, str) and (found := _PEM.fullmatch(text)):
        return base64.b64decode(found[1])
    shown = text.strip().partition("\n")[0] if isinstance(text, str) else text  # only one line: it may be a private key
    raise wrong("public key", "Ed25519 in PEM, as 'openssl pkey -pubout' writes it", shown)


def key_id(key: bytes) -> str:
    """Return the id of a public key, the first half of its SHA-256 in hexadecimal, for messages and signature files."""
    return hashlib.sha256(key).hexdigest()[:32]


def signed_text(manifest: bytes, private_keys: Mapping[str, bytes]) -> str:
    """Return the content of a signature file for the content of a manifest.

    `private_keys` are in PEM, by the names to use in messages. Raises ValueError if one is not an Ed25519 key or has a
    password, and ModuleNotFoundError if cryptography, of the extra [sign], is not installed.
    """
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 - an extra
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

    signatures = {}
    for name, pem in private_keys.items():
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: private key must be in PEM, without a password: {error}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise wrong(f"{name}: private key", "Ed25519", type(key).__name__)
        signatures[key_id(key.public_key().public_bytes_raw())] = base64.b64encode(key.sign(PREFIX + manifest)).decode()
    return json.dumps({"format": _FORMAT, "version": _VERSION, "signatures": signatures}, indent=1) + "\n"


def signatures_in(folder: Path) -> dict[str, bytes]:
    """Return a bundle's unverified signatures by key id. Raises SignatureError if their file is missing or damaged."""
    where = folder / SIGNATURE_FILE
    try:
        content = BundleFiles(folder).read(SIGNATURE_FILE, _LIMIT)
    except BundleError as error:
        raise SignatureError(f"{error}: the bundle must be signed") from error
    with refused_as(SignatureError, where):
        found = checked_object("", json.loads(content))
        for name, expected in (("format", _FORMAT), ("version", _VERSION)):
            if found.get(name) != expected:
                raise wrong(name, repr(expected), found.get(name))
        signatures = checked_object("signatures", found.get("signatures"))
        texts = {key: checked_text(f"signatures.{key}", text) for key, text in signatures.items()}
        return {key: base64.b64decode(text, validate=True) for key, text in texts.items()}


def signer(folder: Path, manifest: bytes, public_keys: Iterable[str]) -> str:
    """Return the id of the first of `public_keys` (PEM) that signed a manifest. Raises SignatureError, ValueError."""
    where, keys = folder / SIGNATURE_FILE, {key_id(key): key for key in map(public_key, public_keys)}
    if not keys:
        raise ValueError("public_keys must contain at least one key")
    try:
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - an extra
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415
    except ModuleNotFoundError as error:
        missing = f"cannot be verified without the package cryptography: {install_command('sign')}"
        raise SignatureError(f"{where}: {missing}") from error
    signatures = signatures_in(folder)
    reason = f"is signed by {', '.join(signatures) or 'nobody'}, expected {' or '.join(keys)}"
    for each in filter(signatures.__contains__, keys):
        with contextlib.suppress(InvalidSignature):
            Ed25519PublicKey.from_public_bytes(keys[each]).verify(signatures[each], PREFIX + manifest)
            return each
        reason = "does not match this bundle.json, which was changed or belongs to another bundle"
    raise SignatureError(f"{where}: {reason}")
