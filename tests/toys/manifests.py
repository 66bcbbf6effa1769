"""Manifests of bundles, changed as no program of ours would."""

import json
import sys


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
