"""Manifests of bundles, changed as no program of ours would."""

import copy
import dataclasses
import json
import shutil
import sys

import onnx_ir as ir

from u2moe.runtime import BundleWriter
from u2moe.runtime.bundle.manifest import Calibration


def adjusted(bundle, folder, target):
    """A bundle with what is chosen after its export, and a copy of `folder`, another form of it, with the same.

    That is a calibration of confidences, and silence around audio that is cut in a sound.
    """
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
    """A manifest with other defaults of decoding."""
    return dataclasses.replace(manifest, decoding=dataclasses.replace(manifest.decoding, **changes))


def edit_manifest(folder, change):
    """Let `change` alter the content of a bundle's manifest in place; integers may have any number of digits."""
    file = folder / "bundle.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        file.write_text(json.dumps(content), encoding="utf-8")
    finally:
        sys.set_int_max_str_digits(digits)


def edited(section, **values):
    """A function that changes fields of a section of a bundle's manifest, or of the manifest for no section."""
    return lambda folder: edit_manifest(folder, lambda manifest: manifest.get(section, manifest).update(values))


def without(section, field):
    """A function that takes a field out of a section."""
    return lambda folder: edit_manifest(folder, lambda manifest: manifest.get(section, manifest).pop(field))


LATER = "u2moe 9.9"
LATER_FIELD, LOST = "pace", "words come at their usual pace"


def of_later_version(section, *, harmless):
    """A function that adds a field of a later version to a section, or to the manifest for no section."""

    def add(manifest):
        part = manifest.get(section, manifest)
        part |= {LATER_FIELD: 0.5, "harmless": {LATER_FIELD: LOST} if harmless else {}}
        manifest["producer"] = LATER

    return lambda folder: edit_manifest(folder, add)


def flipped(name):
    """A function that changes a bit of a file in a bundle."""

    def flip(folder):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)

    return flip


def with_activation(bundle, name, target):
    """A copy of a bundle in int8 whose experts have an activation of this name, which its functions do not look at."""
    model = ir.load(bundle.path / "encoder.onnx")
    for node in model.graph:
        if node.op_type == "Int8MixtureOfExperts":
            node.attributes["activation"] = ir.AttrString("activation", name)
    with BundleWriter(target) as staging:
        for file in bundle.manifest.files:
            staging.add(file, bundle.path / file)
        staging.add("encoder.onnx", ir.to_proto(model).SerializeToString())
        return staging.finish(bundle.manifest)
