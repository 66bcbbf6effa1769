"""The npm package: its README and files, bundlers, package checkers, and the source of core.wasm."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from browsing import (
    BROWSER,
    ROOT,
    WEB,
    chromium,
    fake_microphone,
    host,
    needs_chromium,
    needs_node,
    needs_onnxruntime_web,
)
from language_models import random_arpa
from manifests import flipped

from u2moe.runtime.language.files import read_arpa, write_compact

pytestmark = needs_node
LARGEST_CORE = 300_000
"""Limit of the compressed core in bytes: pages wait for its download."""
TOOLS = ("publint@0.3.25", "@arethetypeswrong/cli@0.18.5", "vite@7.3.8")


def run(command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shown(title, language):
    """Return a code block of the README."""
    section = (WEB / "README.md").read_text(encoding="utf-8").partition(f"## {title}\n")[2]
    return section.partition(f"```{language}\n")[2].partition("```")[0]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The unpacked package that npm would publish."""
    folder = tmp_path_factory.mktemp("package")
    run(["npm", "pack", "--silent", WEB], folder)
    shutil.unpack_archive(next(folder.glob("*.tgz")), folder, filter="data")
    return folder / "package"


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """The folder where npm installed the checkers and the bundler."""
    folder = tmp_path_factory.mktemp("tools")
    install = ["npm", "install", "--no-audit", *TOOLS]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"npm cannot install {', '.join(TOOLS)}: {done.stderr[-200:]}")
    return folder / "node_modules" / ".bin"


@pytest.fixture(scope="module")
def browser(sound, tmp_path_factory):
    file = tmp_path_factory.mktemp("microphone") / "sound.wav"
    soundfile.write(file, np.tile(np.repeat(sound, 3), 3), 48_000)
    with chromium(*fake_microphone(file, again=True)) as browser:
        yield browser


def write_page(folder, change=str):
    page = f"<!doctype html>\n{shown('Captions in a page', 'html')}"
    (folder / "index.html").write_text(change(page), encoding="utf-8")
    (folder / "worker.js").write_text(change(shown("Captions in a page", "js")), encoding="utf-8")


def assert_shows_captions(new_page, folder):
    with host(folder) as url:
        page = new_page(url)
        page.click("button")
        page.wait_for_function("document.querySelector('p').textContent.length > 0")


def test_it_ships_what_it_needs(package):
    names = {file.name for file in package.iterdir()}
    sources = {file.name for file in WEB.iterdir() if file.suffix in (".js", ".ts", ".wasm")}
    assert names == {"README.md", "LICENSE", "package.json", *sources}
    assert (package / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert len(gzip.compress((package / "core.wasm").read_bytes())) < LARGEST_CORE


@needs_chromium
@needs_onnxruntime_web
def test_the_caption_page_of_the_readme(new_page, package, ort_bundle, tmp_path):
    assert len(shown("Captions in a page", "html").splitlines()) <= 15
    write_page(tmp_path)
    shutil.copytree(package, tmp_path / "u2moe")
    shutil.copytree(ort_bundle, tmp_path / "model")
    (tmp_path / "ort").mkdir()
    for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"):
        shutil.copy(BROWSER / "node_modules" / "onnxruntime-web" / "dist" / name, tmp_path / "ort")
    assert_shows_captions(new_page, tmp_path)


MINIFIED = {
    "page.js": """
        import * as u2moe from 'u2moe';
        import { Recognizer } from 'u2moe/worker';
        const load = (folder) => Recognizer.fromBundle(folder, { worker: new Worker('worker.js', { type: 'module' }) });
        const caught = (work) => Promise.resolve().then(work).catch((error) => error);
        globalThis.failures = (async () => {
          const recognizer = await load('model/'), languageModel = recognizer.languageModel(new Uint8Array(9));
          const stream = recognizer.createStream(), samples = new Float32Array(16000), found = {
            BundleError: await caught(() => load('none/')),
            IntegrityError: await caught(() => load('damaged/')),
            LanguageModelError: await caught(() => recognizer.transcribe(samples, 16000, { languageModel })),
            RangeError: await caught(() => recognizer.transcribe(samples, 16000, { hotwords: [['B', 'C']] })),
            AudioError: await caught(() => stream.acceptWaveform('16000', samples)),
          };
          await recognizer.release();
          found.StreamError = await caught(() => recognizer.createStream());
          const isRight = ([name, error]) => error.name === name && error instanceof (u2moe[name] ?? globalThis[name]);
          return Object.entries(found).map((each) => [isRight(each), each[1].message]);
        })();
        globalThis.isMinified = !u2moe.BundleError.toString().includes('class BundleError');""",
    "worker.js": """
        import * as ort from 'onnxruntime-web/wasm';
        import { serve } from 'u2moe/worker';
        ort.env.wasm.numThreads = 1;
        serve({ ort, cache: null });""",
}
"""A page and a worker that provoke errors."""


@needs_chromium
@needs_onnxruntime_web
@pytest.mark.slow
def test_errors_keep_their_class_and_name_in_a_minified_bundle(new_page, ort_bundle, tmp_path):
    """Errors also pass through a worker."""
    site, sources = tmp_path / "site", tmp_path / "sources"
    sources.mkdir()
    (sources / "node_modules").symlink_to(BROWSER / "node_modules")
    for name, content in MINIFIED.items():
        (sources / name).write_text(content, encoding="utf-8")
    esbuild = [BROWSER / "node_modules" / ".bin" / "esbuild", *MINIFIED, "--bundle", "--minify", "--format=esm"]
    run([*esbuild, "--log-level=error", f"--outdir={site}"], sources)
    for name in ("model", "damaged"):
        shutil.copytree(ort_bundle, site / name)
    flipped("ctc.ort")(site / "damaged")
    shutil.copy(WEB / "core.wasm", site)
    shutil.copy(BROWSER / "node_modules" / "onnxruntime-web" / "dist" / "ort-wasm-simd-threaded.wasm", site)
    (site / "index.html").write_text("<!doctype html><script type=module src=page.js></script>", encoding="utf-8")
    with host(site) as url:
        page = new_page(url)
        page.wait_for_function("globalThis.failures")
        found = page.evaluate("failures")
        assert page.evaluate("isMinified")
    assert [is_right for is_right, _ in found] == [True] * 6, found
    assert "not an ARPA file" in found[2][1]
    assert found[3][1] == "hotwords: 0: 1: found 'C', expected a number"


@pytest.mark.endurance
def test_checkers_of_packages_find_nothing(package, tools):
    run([tools / "publint", "run", ".", "--strict"], package)
    run([tools / "attw", "--pack", ".", "--profile", "esm-only", "--exclude-entrypoints", "core.wasm"], package)


@pytest.mark.endurance
@needs_chromium
@needs_onnxruntime_web
def test_vite_bundles_the_page(new_page, package, tools, ort_bundle, tmp_path):
    """The page imports the packages by name, as a project would."""

    def by_name(text):
        text = re.sub(r"'\./u2moe/(\w+)\.js'", r"'u2moe/\1'", text).replace(
            "'./ort/ort.wasm.bundle.min.mjs'", "'onnxruntime-web/wasm'"
        )
        return text.replace("new Worker('worker.js', ", "new Worker(new URL('./worker.js', import.meta.url), ")

    modules = tmp_path / "node_modules"
    modules.mkdir()
    shutil.copytree(package, modules / "u2moe")
    for name in ("onnxruntime-web", "onnxruntime-common"):
        (modules / name).symlink_to((BROWSER / "node_modules" / name).resolve())
    write_page(tmp_path, by_name)
    build = {"target": "es2022", "assetsInlineLimit": 0, "rollupOptions": {"input": "index.html"}}
    config = {"base": "./", "worker": {"format": "es"}, "build": build}
    (tmp_path / "vite.config.mjs").write_text(f"export default {json.dumps(config)};", encoding="utf-8")
    run([tools / "vite", "build"], tmp_path)
    shutil.copytree(ort_bundle, tmp_path / "dist" / "model")
    assert_shows_captions(new_page, tmp_path / "dist")


@pytest.mark.endurance
def test_the_core_is_that_of_its_source(tmp_path):
    """Compile it again in a new environment with the compiler."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    environment = {**os.environ, "PYTHON": str(tmp_path / "env" / "bin" / "python")}
    command = ["sh", ROOT / "runtime" / "cpp" / "wasm.sh", tmp_path / "core.wasm"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "No matching distribution" in done.stderr:
        pytest.skip(f"pip finds no compiler: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "core.wasm").read_bytes() == (WEB / "core.wasm").read_bytes()


@pytest.mark.endurance
@pytest.mark.timeout(2400)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: apt-get install g++")
def test_nothing_that_a_program_or_a_bundle_gives_to_the_core_does_more_than_fail(exported, tmp_path):
    """Any manifest, vocabulary, language model, option, audio or graph output returns a result or a u2moe error. The
    core is compiled with sanitizers instead of to WebAssembly."""
    cpp, checks = ROOT / "runtime" / "cpp", ROOT / "tests" / "cpp"
    core = re.search(r"(?ms)^set\(core(.*?)\)", (cpp / "CMakeLists.txt").read_text(encoding="utf-8"))[1].split()
    sources = [checks / "core_calls.cpp", checks / "cases.cpp", *map(cpp.joinpath, core)]
    flags = ["-std=c++17", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-attributes", "-g1", "-O1"]
    folders = [f"-I{cpp / 'source'}", f"-I{cpp / 'include'}"]
    run(["g++", *flags, *folders, *sources, "-o", tmp_path / "core_calls"], tmp_path)
    for name in ("bundle.json", "tokens.txt"):
        shutil.copy(exported("dense_tiny") / name, tmp_path)
    (tmp_path / "model.arpa").write_text(random_arpa(0, ("七", "A", "下"), 3), encoding="utf-8")
    write_compact(read_arpa(tmp_path / "model.arpa"), tmp_path / "model.lm")
    seed, most, seconds = "0", str(10**9), "600"
    num, refused = map(int, run([tmp_path / "core_calls", tmp_path, seed, most, seconds], tmp_path).split())
    assert 0 < refused < num
