"""What the build, the sources and the package must and must not hold."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import fastlstm
from fastlstm import _engine

ROOT = Path(__file__).parents[1]
C_SOURCES = sorted((ROOT / "src_c").glob("*.[ch]"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def code(path):
    """C without its comments."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)


def manifest():
    """Files that MANIFEST.in takes into the sdist."""
    files = set()
    for line in read("MANIFEST.in").splitlines():
        command, *words = line.split()
        if command == "include":
            for pattern in words:
                found = set(ROOT.glob(pattern))
                assert found, f"MANIFEST.in: no {pattern}"
                files |= found
        elif command == "recursive-include":
            files |= {path for pattern in words[1:] for path in (ROOT / words[0]).rglob(pattern)}
    return files


def test_version():
    assert PROJECT["project"]["version"] == fastlstm.__version__
    assert f"\n## {fastlstm.__version__}" in read("CHANGELOG.md")


def test_manifest_holds_the_sources():
    files = manifest()
    wanted = [*C_SOURCES, ROOT / "fastlstm" / "py.typed"]
    for folder, endings in (("fastlstm", "py pyx pxd pyi"), ("tests", "py"), ("benchmarks", "py")):
        wanted += [path for ending in endings.split() for path in (ROOT / folder).rglob(f"*.{ending}")]
    missing = [path.relative_to(ROOT).as_posix() for path in wanted if path not in files]
    assert not missing


def test_setup_names_all_sources():
    text = read("setup.py")
    for path in [*C_SOURCES, *(ROOT / "fastlstm").glob("*.pyx"), *(ROOT / "fastlstm").glob("*.pxd")]:
        assert f'"{path.relative_to(ROOT).as_posix()}"' in text


def test_no_forbidden_flags():
    strings = [
        node.value
        for node in ast.walk(ast.parse(read("setup.py")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    flags = [text for text in strings if re.fullmatch(r"-\S+", text)]
    assert "-O3" in flags
    for flag in flags:
        assert not re.match(r"-(march|mtune|mavx|mfma|Ofast|ffast|funsafe|fassociative|fno-math)", flag), flag


def test_no_fast_math_in_the_sources():
    for path in [*C_SOURCES, ROOT / "fastlstm" / "_engine.pyx"]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"fast-math|Ofast|_MM_SET_(FLUSH|DENORMALS)|_mm_setcsr", text), path.name


def test_target_attributes_in_kernels_only():
    for path in C_SOURCES:
        found = re.search(r"\btarget\s*\(", code(path))
        assert bool(found) == (path.name == "kernels.c"), path.name


def test_c_knows_neither_python_nor_openmp():
    for path in C_SOURCES:
        text = code(path)
        assert not re.search(r'#\s*include\s*[<"](Python|omp|numpy/)', text), path.name
        assert not re.search(r"#\s*pragma\s+omp|_OPENMP|\bomp_", text), path.name


def imported(path):
    """Top-level names of the modules that a file imports, "." for its own package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else node.module.split(".")[0]


def test_reference_imports_numpy_only():
    assert set(imported(ROOT / "fastlstm" / "reference.py")) - sys.stdlib_module_names == {"numpy"}


def test_what_is_imported_is_declared():
    names = {name for path in (ROOT / "fastlstm").glob("*.py") for name in imported(path)}
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    needed = project["dependencies"] + extras["mnist"] + extras["plot"]
    declared = {re.match(r"[A-Za-z0-9]+", text)[0] for text in needed}
    assert names - sys.stdlib_module_names - {".", "fastlstm"} == declared


def test_extension_is_small():
    assert Path(_engine.__file__).stat().st_size < 2_000_000


def test_package_is_typed():
    assert Path(fastlstm.__file__).with_name("py.typed").is_file()


def test_isas_of_the_source_are_those_of_the_build():
    names = re.findall(r'#define ISA_NAME "(\w+)"', read("src_c/kernels.c"))
    assert len(set(names)) == len(names)
    assert set(_engine.available_isas()) <= set(names)
    assert _engine.isa() in _engine.available_isas()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"])
def test_documents_are_plain_text(name):
    text = read(name)
    assert text.endswith("\n") and not text.endswith("\n\n")
    assert not re.search(r"[ \t]\n|\t|\r", text)
