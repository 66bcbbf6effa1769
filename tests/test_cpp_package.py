"""The installed C++ package, moved to another folder, shared and static: for C++, for C only, and without CMake."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import compiled
import pytest
from compiled import CHECKS, NEEDED, ONNXRUNTIME, ONNXRUNTIME_FOLDER, ROOT, cmake

import u2moe

pytestmark = NEEDED
LIBRARIES = f"lib/{platform.machine()}-linux-gnu"
"""Library folder as in Debian: two levels deep."""
NOT_OPENED = b"U2MOE_BUNDLE_ERROR: /none/bundle.json: missing, or cannot be read\n"


@pytest.fixture(scope="module", params=[pytest.param("shared", marks=pytest.mark.endurance), "static"])
def prefix(request, tmp_path_factory):
    """Return the folder to which the installed library was moved, after its build tree was removed."""
    folder = tmp_path_factory.mktemp("package")
    kind = f"-DBUILD_SHARED_LIBS={'ON' if request.param == 'shared' else 'OFF'}"
    settings, flags = [f"-DU2MOE_KERNELS={compiled.built_kernels()}", compiled.SIGNATURES], "-O1"
    shared = compiled.shared_library(tmp_path_factory, *settings, flags=flags)  # as test_cpp
    place = f"-DCMAKE_INSTALL_LIBDIR={LIBRARIES}"
    installed = compiled.installed_library(folder, kind, place, *settings, flags=flags, compiled=shared)
    shutil.rmtree(folder / "library")
    return installed.rename(folder / "moved")


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
