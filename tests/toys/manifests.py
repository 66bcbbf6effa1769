"""Manifests of bundles with changes that our programs do not make, and keys for signing bundles."""

import copy
import dataclasses
import json
import shutil
import sys

import onnx_ir as ir
import pytest

from u2moe.runtime import BundleWriter
from u2moe.runtime.bundle.manifest import Calibration


def adjusted(bundle, folder, target):
    """Return a bundle with settings chosen after its export, and a copy of `folder`, another form of it, with the same.
    The settings are a calibration of confidences, and silence around cut audio."""
    scale, bias, padding_s = 0.7, -0.4, 0.3
    shutil.copytree(folder, target)
    edit_manifest(target, lambda manifest: manifest.update(calibration={"scale": scale, "bias": bias}))
    edited("decoding", padding_s=padding_s)(target)
    bundle = copy.copy(bundle)
    bundle.manifest = dataclasses.replace(
        with_decoding(bundle.manifest, padding_s=padding_s), calibration=Calibration(scale=scale, bias=bias)
    )
    return bundle, target


def with_decoding(manifest, **changes):
    """Return a manifest with other defaults of decoding."""
    return dataclasses.replace(manifest, decoding=dataclasses.replace(manifest.decoding, **changes))


def edit_manifest(folder, change, name="bundle.json"):
    """Let `change` alter the content of a bundle's manifest in place; integers may have any number of digits."""
    file = folder / name
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        file.write_text(json.dumps(content), encoding="utf-8")
    finally:
        sys.set_int_max_str_digits(digits)


def edited(section, **values):
    """Return a function that changes fields of a section of a bundle's manifest, or top-level fields."""
    return lambda folder: edit_manifest(folder, lambda manifest: manifest.get(section, manifest).update(values))


def without(section, field):
    """Return a function that removes a field from a section."""
    return lambda folder: edit_manifest(folder, lambda manifest: manifest.get(section, manifest).pop(field))


LATER = "u2moe 9.9"
LATER_FIELD, LOST = "pace", "words come at their usual pace"


def of_later_version(section, *, harmless):
    """Return a function that adds a field of a later version to a section, or at the top level."""

    def add(manifest):
        part = manifest.get(section, manifest)
        part |= {LATER_FIELD: 0.5, "harmless": {LATER_FIELD: LOST} if harmless else {}}
        manifest["producer"] = LATER

    return lambda folder: edit_manifest(folder, add)


def flipped(name):
    """Return a function that changes a bit of a file in a bundle."""

    def flip(folder):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)

    return flip


def with_activation(bundle, name, target):
    """Return a copy of an int8 bundle whose experts have an activation of this name; its functions ignore it."""
    model = ir.load(bundle.path / "encoder.onnx")
    for node in model.graph:
        if node.op_type == "Int8MixtureOfExperts":
            node.attributes["activation"] = ir.AttrString("activation", name)
    with BundleWriter(target) as staging:
        for file in bundle.manifest.files:
            staging.add(file, bundle.path / file)
        staging.add("encoder.onnx", ir.to_proto(model).SerializeToString())
        return staging.finish(bundle.manifest)


def written_key(folder, name):
    """Return files of a private and a public key, as written by openssl, and the text of the public one."""
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    key = ed25519.Ed25519PrivateKey.from_private_bytes(name.ljust(32).encode())
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / name).write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)
    return public.decode()
