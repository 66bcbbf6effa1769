"""The installed C++ package, moved to another folder, shared and static: for C++, for C only, and without CMake. Other
languages call its shared library."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from compiled import CHECKS, EXAMPLES, NEEDED, ONNXRUNTIME, ONNXRUNTIME_FOLDER, ROOT, SOURCE, Library, cmake
from conformance import recognized

import u2moe

pytestmark = NEEDED
LIBRARIES = f"lib/{platform.machine()}-linux-gnu"
"""Library folder as in Debian: two levels deep."""
NOT_OPENED = b"U2MOE_BUNDLE_ERROR: /none/bundle.json: missing, or cannot be read\n"


@pytest.fixture(scope="module", params=[pytest.param("shared", marks=pytest.mark.endurance), "static"])
def prefix(request, tmp_path_factory):
    """Return the folder to which the installed library was moved, after its build tree was removed."""
    folder, shared = tmp_path_factory.mktemp("package"), Library(tmp_path_factory)
    kind = f"-DBUILD_SHARED_LIBS={'ON' if request.param == 'shared' else 'OFF'}"
    shared.install(folder, kind, f"-DCMAKE_INSTALL_LIBDIR={LIBRARIES}", objects=shared.folder)
    shutil.rmtree(folder / "library")
    return (folder / "prefix").rename(folder / "moved")


def assert_runs(program, prefix):
    """Check that a program runs and loads libraries only from the moved folder."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    done = subprocess.run([program], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, NOT_OPENED), done.stderr
    listed = subprocess.run(["ldd", program], env=environment, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"lib(?:u2moe|onnxruntime)\S* => (\S+)", listed)
    assert {Path(each).parent.resolve() for each in found} == {prefix / LIBRARIES}


def refusal(*arguments):
    """Return the error message of cmake."""
    done = subprocess.run(["cmake", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    return " ".join(done.stderr.split())


@pytest.mark.parametrize("language", ["consumer", "consumer_c"])
def test_projects_find_the_package_of_their_version_and_its_onnxruntime(prefix, tmp_path, language):
    """Projects do not use another onnxruntime where CMake looks, such as the system's."""
    (tmp_path / "system" / "lib").mkdir(parents=True)
    (tmp_path / "system" / "lib" / "libonnxruntime.so").write_bytes(b"of another version")
    project = ["-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix};{tmp_path / 'system'}", CHECKS / language]
    cmake(*project, f"-DVERSION={u2moe.__version__}")
    cmake("--build", tmp_path / "build")
    assert_runs(tmp_path / "build" / "consumer", prefix)
    if language == "consumer":
        assert f"version: {u2moe.__version__}" in refusal(*project, "-DVERSION=0.0.9")


@pytest.mark.endurance
def test_other_projects_fetch_the_repository(tmp_path):
    """A static library with kernels, without a unity build, which would hide a missing include."""
    cmake("-B", tmp_path, f"-DFOLDER={ROOT}", ONNXRUNTIME, CHECKS / "consumer")
    cmake("--build", tmp_path)
    assert subprocess.run([tmp_path / "consumer"], capture_output=True, check=True).stdout == NOT_OPENED


@pytest.mark.skipif(shutil.which("pkg-config") is None, reason="needs pkg-config")
@pytest.mark.parametrize("static", [[], ["--static"]], ids=["", "static"])
def test_pkg_config_gives_all_that_a_compiler_for_c_needs(prefix, tmp_path, static):
    environment = {**os.environ, "PKG_CONFIG_PATH": str(prefix / LIBRARIES / "pkgconfig")}
    ask = ["pkg-config", "--cflags", "--libs", *static, "u2moe"]
    flags = subprocess.run(ask, env=environment, capture_output=True, text=True, check=True).stdout.split()
    main = CHECKS / "consumer_c" / "main.c"
    subprocess.run(["cc", "-std=c99", "-Werror", main, "-o", tmp_path / "consumer", *flags], check=True)
    assert_runs(tmp_path / "consumer", prefix)


def test_nothing_names_the_machine_that_built_it(prefix):
    texts = [*prefix.rglob("*.cmake"), *prefix.rglob("*.pc")]
    assert len(texts) == 5
    for file in texts:
        content = file.read_text(encoding="utf-8")
        assert str(prefix.parent) not in content
        assert str(ONNXRUNTIME_FOLDER) not in content


def test_a_static_library_without_its_onnxruntime_is_refused_by_its_name(prefix, tmp_path):
    if not any(prefix.rglob("libu2moe.a")):
        pytest.skip("a shared library needs it only when it is loaded")
    shutil.copytree(prefix, tmp_path / "package", symlinks=True)
    (onnxruntime,) = (tmp_path / "package").rglob("libonnxruntime.so.*")
    onnxruntime.unlink()
    told = refusal("-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'package'}", CHECKS / "consumer_c")
    assert f"u2moe needs onnxruntime, which is not at '{onnxruntime}'" in told


# ---- other languages ----


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Return the shared library."""
    return Library(tmp_path_factory).prefix / "lib" / "libu2moe.so"


def test_the_shared_library_shows_the_c_interface_and_nothing_else(library):
    listed = (SOURCE / "u2moe.symbols").read_text(encoding="utf-8").split()
    header = (SOURCE / "include" / "u2moe.h").read_text(encoding="utf-8")
    assert listed == sorted(re.findall(r"^U2MOE_API [\w *]*?\b(u2moe_\w+)\(", header, re.MULTILINE))
    done = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    assert {line.split()[-1] for line in done.stdout.splitlines() if line.split()[1] not in "Aw"} == set(listed)
    assert library.resolve().name == f"libu2moe.so.{u2moe.__version__}"
    assert library.with_name(f"libu2moe.so.{u2moe.__version__.rpartition('.')[0]}").is_file()


def built_program(language, library, folder, environment):
    """Return the command of an example in another language. Skips the test if the toolchain is missing."""
    packages = folder / "packages"  # built outside the repository
    if language in ("Rust", "Go"):
        shutil.copytree(EXAMPLES, packages)
    java = ["java", "--enable-native-access=ALL-UNNAMED", EXAMPLES / "Transcribe.java", library]
    compile_c = f"cc -std=c99 -pedantic -Wall -Wextra -Werror {EXAMPLES / 'transcribe.c'} -o {folder / 'a'}"
    # a transcriber of the crate may be dropped by its own callback
    rust = "cargo build --offline --example transcribe && cargo test --offline --test dropped"
    tools, build, command = {
        "C": (["pkg-config"], ["sh", "-c", f"{compile_c} $(pkg-config --cflags --libs u2moe)"], [folder / "a"]),
        "Python": ([], ["true"], [sys.executable, EXAMPLES / "transcribe.py", library]),
        "C#": (
            ["mcs", "mono"], ["mcs", "-warnaserror", f"-out:{folder}/a.exe", *(EXAMPLES / "dotnet").glob("*.cs")],
            ["mono", folder / "a.exe"],
        ),
        "Rust": (
            ["cargo"], ["sh", "-c", f"cd {packages / 'rust'} && {rust}"],
            [packages / "rust" / "target" / "debug" / "examples" / "transcribe"],
        ),
        "Go": (
            ["go", "pkg-config"], ["go", "build", "-C", packages / "go", "-o", folder / "a", "./transcribe"],
            [folder / "a"],
        ),
        "Java": (["javac"], ["javac", "--release", "22", "-d", folder, EXAMPLES / "Transcribe.java"], java),
    }[language]  # fmt: skip
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    done = subprocess.run(build, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if language == "Java" and "release" in done.stderr:
        pytest.skip("needs Java 22 or newer, whose foreign functions are final")
    assert done.returncode == 0, done.stdout + done.stderr
    assert language != "Rust" or "1 passed" in done.stdout
    return command


@pytest.mark.parametrize(
    "language",
    ["C", "Python", "C#", "Rust", *(pytest.param(name, marks=pytest.mark.endurance) for name in ("Go", "Java"))],
)
def test_other_languages_call_it(library, bundle, model, talk, tmp_path, monkeypatch, language):
    samples, rate = soundfile.read(talk, dtype="int16")
    samples.tofile(tmp_path / "talk.raw")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library.parent))
    found = {"PKG_CONFIG_PATH": str(library.parent / "pkgconfig"), "GOCACHE": str(tmp_path / "go")}
    given = {"BUNDLE": str(bundle.path), "SAMPLES": str(tmp_path / "talk.raw")}
    flags = {"CGO_LDFLAGS_ALLOW": ".*", "RUSTFLAGS": "-Dwarnings"}
    command = built_program(language, library, tmp_path, {**os.environ, **found, **given, **flags})
    done = subprocess.run([*command, bundle.path, str(rate)], input=samples.tobytes(), capture_output=True, check=True)
    expected = recognized(bundle, model, samples, num_left_chunks=-1)
    found = [line for line in done.stdout.decode().splitlines() if not line.startswith("  ")]  # C also prints words
    assert found == [f"{each.start:.2f} {each.end:.2f} {each.text}" for each in expected]
    failed = subprocess.run([*command, "/none", str(rate)], input=bytes(2), capture_output=True, check=False)
    assert b"/none/bundle.json: missing" in failed.stderr


def test_the_sketch_for_kotlin_compiles():
    include = Path(shutil.which("javac") or "/none").resolve().parents[1] / "include"
    if not (include / "jni.h").is_file():
        pytest.skip("needs a JDK with its headers")
    folders = [SOURCE / "include", include, include / "linux"]
    command = ["cc", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", EXAMPLES / "jni.c"]
    subprocess.run([*command, *(f"-I{folder}" for folder in folders)], check=True)
