"""Signatures of bundles: Python signs; Python, C, JavaScript and openssl verify."""

import shutil
import subprocess

import pytest
from browsing import needs_node, run_module
from manifests import edit_manifest, flipped, written_key

from u2moe.runtime import Bundle, BundleWriter, IntegrityError, Recognizer, SessionSettings, SignatureError
from u2moe.runtime.bundle.signature import PREFIX, key_id, public_key, signatures_in
from u2moe.runtime.cli import main


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return {name: written_key(folder, name) for name in ("old", "new", "other")} | {"folder": folder}


@pytest.fixture(scope="module")
def signed(bundle, keys, tmp_path_factory):
    folder = shutil.copytree(bundle.path, tmp_path_factory.mktemp("signed") / "bundle")
    assert main(["sign", str(folder), *[f"--key={keys['folder'] / name}" for name in ("old", "new")]]) == 0
    return folder


def with_signatures(change):
    return lambda folder: edit_manifest(folder, lambda content: change(content["signatures"]), "bundle.sig")


WRONG = [
    (lambda folder: (folder / "bundle.sig").unlink(), ["old"], "bundle.sig: "),
    (lambda folder: (folder / "bundle.sig").write_bytes(b"{"), ["old"], "bundle.sig: "),
    (lambda folder: (folder / "bundle.sig").write_bytes(b"\xff"), ["old"], "bundle.sig: "),
    (lambda folder: (folder / "bundle.sig").write_text("[]"), ["old"], "bundle.sig: "),
    (lambda folder: edit_manifest(folder, lambda content: content.update(version=2), "bundle.sig"), ["old"],
     "bundle.sig: version must be 1, got 2"),
    (lambda folder: edit_manifest(folder, lambda content: content.update(signatures=[]), "bundle.sig"), ["old"],
     "bundle.sig: signatures must be"),
    (with_signatures(lambda given: given.update(zip(given, [*given.values()][::-1], strict=True))), ["old", "new"],
     "bundle.sig: does not match this bundle.json"),
    (with_signatures(lambda given: given.clear()), ["old"], "bundle.sig: is signed by nobody, exp"),
    (with_signatures(lambda given: given.update(dict.fromkeys(given, "AAAA"))), ["new"],
     "bundle.sig: does not match this bundle.json"),
    (lambda folder: edit_manifest(folder, lambda manifest: manifest.update(producer="me")), ["old"],
     "bundle.sig: does not match this bundle.json"),
    # The content does not matter, because an unsigned manifest is not parsed.
    (lambda folder: (folder / "bundle.json").write_bytes(b"{"), ["old"], "bundle.sig: does not match this bundle.json"),
    (lambda folder: None, ["other"], "bundle.sig: is signed by "),
]  # fmt: skip
"""Change of a signed bundle, the keys that a program requires, and the error that it gets."""


@pytest.fixture(scope="module")
def damaged(signed, tmp_path_factory):
    folders = [shutil.copytree(signed, tmp_path_factory.mktemp("damaged") / "bundle") for _ in WRONG]
    for folder, (damage, _, _) in zip(folders, WRONG, strict=True):
        damage(folder)
    return folders


@pytest.mark.slow
def test_a_demanded_key_must_have_signed(signed, keys, damaged, tmp_path):
    for names in (["old"], ["new"], ["other", "new"]):  # programs with an older key, a newer key, and several keys
        bundle = Bundle.open(signed, public_keys=[keys[name] for name in names])
        assert bundle.signer == key_id(public_key(keys[names[-1]]))
    for folder, (_, names, message) in zip(damaged, WRONG, strict=True):
        with pytest.raises(SignatureError) as caught:
            Bundle.open(folder, public_keys=[keys[name] for name in names])
        assert message in str(caught.value)
    with pytest.raises(SignatureError, match="is signed by"):
        Recognizer.load(signed, SessionSettings(public_keys=[keys["other"]]))
    Recognizer.from_pretrained(signed, public_keys=[keys["old"]])
    flipped("ctc.onnx")(folder := shutil.copytree(signed, tmp_path / "flipped"))
    with pytest.raises(IntegrityError, match=r"ctc\.onnx: sha256 is"):  # its digest is signed
        Bundle.open(folder, public_keys=[keys["old"]])
    with pytest.raises(ValueError, match="public_keys must contain at least one key"):
        Bundle.open(signed, public_keys=[])
    secret = (keys["folder"] / "old").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="public key must be Ed25519") as refused:
        Bundle.open(signed, public_keys=[secret])
    assert secret.splitlines()[1] not in str(refused.value)


def test_openssl_verifies_it_unless_it_is_written_anew(signed, keys, tmp_path):
    """The signed content is the prefix and the manifest, in a standard format."""
    (tmp_path / "message").write_bytes(PREFIX + (signed / "bundle.json").read_bytes())
    key = keys["folder"] / "new.pub"
    (tmp_path / "signature").write_bytes(signatures_in(signed)[key_id(public_key(keys["new"]))])
    files = ["-in", tmp_path / "message", "-sigfile", tmp_path / "signature"]
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", key, "-rawin", *files]
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    assert b"Verified Successfully" in subprocess.run(command, check=True, capture_output=True).stdout
    # The signature belongs to the old content
    bundle = Bundle.open(signed)
    with BundleWriter(tmp_path / "bundle") as staging:
        for name in (*bundle.manifest.files, "bundle.sig"):
            staging.add(name, signed / name)
        written = staging.finish(bundle.manifest)
    assert "bundle.sig" not in written.manifest.files


def test_the_command_line(signed, keys, ort_bundle, capsys, tmp_path):
    folder = shutil.copytree(ort_bundle, tmp_path / "bundle")  # Python cannot load it
    assert main(["verify", str(folder)]) == 0
    assert main(["sign", str(folder), f"--key={keys['folder'] / 'new'}"]) == 0
    by_new, by_other = (f"--public-key={keys['folder'] / name}.pub" for name in ("new", "other"))
    assert main(["verify", str(folder)]) == main(["verify", str(folder), by_new]) == 0
    told, key = capsys.readouterr().err, key_id(public_key(keys["new"]))
    for words in ("nobody\n", f"{key}\n", f"{key} (not verified: see --public-key)\n"):
        assert f"is complete, and signed by {words}" in told
    for command in (["verify", str(folder)], ["transcribe", "--model", str(signed), str(tmp_path)]):
        assert main([*command, by_other]) == 1
        assert "bundle.sig: is signed by" in capsys.readouterr().err
    flipped("ctc.ort")(folder)
    for command in (["verify"], ["sign", f"--key={keys['folder'] / 'new'}"]):
        assert main([*command, str(folder)]) == 1
        assert "ctc.ort: sha256 is" in capsys.readouterr().err
    none = tmp_path / "none"
    none.write_text("-----BEGIN PUBLIC KEY-----\nMFww\n-----END PUBLIC KEY-----\n", encoding="utf-8")
    for command, kind in (["verify", f"--public-key={none}"], "public"), (["sign", f"--key={none}"], "private"):
        assert main([*command, str(signed)]) == 1
        assert f"{none}: {kind} key must be" in capsys.readouterr().err


@needs_node
def test_javascript_demands_the_same(signed, keys, damaged):
    """It verifies before it reads other files. If WebCrypto cannot verify, it calls a function of the program."""
    demanded = [(str(signed), ["old"]), (str(signed), ["other", "new"])]
    demanded += [(str(folder), names) for folder, (_, names, _) in zip(damaged, WRONG, strict=True)]
    found = run_module(
        """
        const { readFile } = await import('node:fs/promises');
        const { Recognizer, SignatureError } = await part('index.js');
        const ort = { InferenceSession: { create() { throw new Error('it is loaded'); } } };
        const told = async (folder, options) => {
          const names = [], read = (name) => names.push(name) && readFile(`${folder}/${name}`);
          const error = await Recognizer.fromBundle({ read }, { ort, ...options }).catch((error) => error);
          return [error instanceof SignatureError, error.name, error.message, names.slice(0, 3).join()];
        };
        const { verify } = crypto.subtle, given = [], keysOf = (names) => names.map((name) => input.keys[name]);
        const counted = (answer) => (signed) => {
          given.push(Object.values(signed).map(({ length }) => length));
          return answer;
        };
        const found = [];
        for (const [folder, names] of input.demanded) found.push(await told(folder, { publicKeys: keysOf(names) }));
        const publicKeys = keysOf(['old']), [folder] = input.demanded[0];
        crypto.subtle.importKey = async () => { throw new Error('no Ed25519'); };
        for (const options of [
          { publicKeys }, { publicKeys, verify: counted(1) }, { publicKeys, verify: counted(Promise.resolve(true)) },
          { publicKeys: [] }, { publicKeys: [5] }, { publicKeys: publicKeys[0] }, { publicKeys: '' },
          { publicKeys: [input.secret] },
        ]) found.push(await told(folder, options));
        console.log(JSON.stringify([found, given]));
        """,
        {"demanded": demanded, "keys": keys | {"folder": ""}, "secret": (keys["folder"] / "old").read_text()},
    )
    (first, second, *refused), given = found
    wrong, others = refused[: len(WRONG)], refused[len(WRONG) :]
    assert all(each[2].endswith("it is loaded") for each in (first, second, others[2]))
    for (is_typed, name, message, read), (_, _, expected) in zip(wrong, WRONG, strict=True):
        assert (is_typed, name, read) == (True, "SignatureError", "bundle.json,bundle.sig")
        assert message.startswith("bundle.sig: "), message
        if expected.startswith("bundle.sig: is "):
            assert message.startswith(expected)
    assert others[0][2] == "bundle.sig: WebCrypto does not support Ed25519 here: pass the option verify"
    assert others[1][0]  # 1 is not true
    assert given == [[32, len((signed / "bundle.json").read_bytes()) + len(PREFIX), 64]] * 2
    assert [name for _, name, _, _ in others[3:]] == ["RangeError"] * 5
    assert not any(keys["old"].split("\n")[1] in message for _, _, message, _ in others)
