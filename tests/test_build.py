"""What the build, the sources and the package must and must not hold."""

import ast
import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import faults
import numpy as np
import pytest

import fastlstm
from fastlstm import engine

ROOT = Path(__file__).parents[1]
C_SOURCES = sorted((ROOT / "src_c").rglob("*.[ch]"))
CYTHON = sorted((ROOT / "fastlstm" / "engine").glob("*.py[xd]"))
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


def test_every_module_of_the_engine_is_built():
    sources = {path.stem for path in (ROOT / "fastlstm" / "engine").glob("*.pyx")}
    built = {path.name.split(".")[0] for path in Path(fastlstm.engine.__file__).parent.glob("*.so")}
    assert sources and built == sources


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
    for path in [*C_SOURCES, *CYTHON]:
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
    files = list((ROOT / "fastlstm" / "reference").glob("*.py"))
    found = {name for path in files for name in imported(path)}
    assert len(files) > 1 and found - sys.stdlib_module_names == {".", "numpy"}
    assert not re.search(r"from \.\.", "".join(path.read_text(encoding="utf-8") for path in files))


def test_what_is_imported_is_declared():
    sources = list((ROOT / "fastlstm").rglob("*.py"))
    names = {name for path in sources for name in imported(path)}
    for path in sources:  # by name, when they are needed
        names |= set(re.findall(r'\blibrary\("(\w+)', path.read_text(encoding="utf-8")))
    for path in CYTHON:
        names |= set(re.findall(r"^\s*from (\w+)[\w.]* import", path.read_text(encoding="utf-8"), re.MULTILINE))
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    needed = list(project["dependencies"])
    for name in ("mnist", "plot", "files", "keras", "onnx", "torch", "blas", "sklearn", "table", "parity"):
        needed += [text for text in extras[name] if not text.startswith("fastlstm[")]
    declared = {re.match(r"[A-Za-z0-9]+", text.replace("scikit-learn", "sklearn"))[0] for text in needed}
    # typing_extensions is for type checkers alone, which bring it
    assert names - sys.stdlib_module_names - {".", "fastlstm", "typing_extensions"} == declared


def test_without_onnx_the_module_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if re.match(r"fastlstm\._?onnx", name)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"fastlstm\.onnx needs onnx: python -m pip install onnx"):
        importlib.import_module("fastlstm.onnx")


def test_new_compilers_take_the_translation(tmp_path):
    """What gcc 14 refuses where older ones warn: pointers of other types, integers as pointers, a function that was not
    declared; and a const that is lost."""
    build = pytest.importorskip("Cython.Build")
    compiler = (sysconfig.get_config_var("CC") or "gcc").split()
    if not shutil.which(compiler[0]):
        pytest.skip("needs a compiler")
    modules = [str(path.relative_to(ROOT)) for path in CYTHON if path.suffix == ".pyx"]
    old = Path.cwd()
    os.chdir(ROOT)  # cythonize finds the package from here
    try:
        made = build.cythonize(modules, force=True, quiet=True, build_dir=str(tmp_path))
    finally:
        os.chdir(old)
    names = ("incompatible-pointer-types", "int-conversion", "implicit-function-declaration", "discarded-qualifiers")
    if "clang" in compiler[0]:
        names = names[:-1] + ("incompatible-pointer-types-discards-qualifiers",)
    folders = [ROOT / "src_c", ROOT / "fastlstm" / "engine", np.get_include(), sysconfig.get_path("include")]
    flags = ["-std=gnu11", *(f"-Werror={name}" for name in names), *(f"-I{folder}" for folder in folders)]
    assert len(made) == len(modules)
    for module in made:
        source = Path(module.sources[0])
        command = [*compiler, "-fsyntax-only", "-DNPY_NO_DEPRECATED_API=NPY_2_0_API_VERSION", *flags, str(source)]
        got = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert got.returncode == 0, f"{source.name}: {got.stderr}"


def test_extensions_are_small():
    sizes = [path.stat().st_size for path in Path(fastlstm.engine.__file__).parent.glob("*.so")]
    assert sizes and sum(sizes) < 3_000_000  # the wheel stays below 1.5 MB, see .ci/run


def test_the_engine_knows_no_cell_by_name():
    """What a cell is stands on its page in src_c/cells; the engine loops over its terms."""
    names = re.findall(r"CELL\((\w+)\)", read("src_c/cells.h").split("CELLS(CELL)")[1])
    assert {"LSTM", "GRU"} <= set(names)
    for path in [*CYTHON, *(ROOT / "fastlstm").glob("*.py")]:
        found = re.search(rf"FL_({'|'.join(names)}|LINEAR)\b", path.read_text(encoding="utf-8"))
        assert not found, f"{path.name}: {found and found[0]}"
    for path in CYTHON:
        text = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        found = re.search(rf"""["']({"|".join(names)})["']""", text, re.IGNORECASE)
        assert not found, f"{path.name}: {found and found[0]}"


def imports_of(path):
    """Modules of the package that a module of it imports, at whatever place."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parent.name
            if node.level == 1 and folder in FOLDERS:
                continue  # within one room
            for alias in node.names:
                yield (node.module or alias.name).split(".")[0]


FOLDERS = ("jobs", "nn", "plot", "torch")


# Who may call whom: a module only those behind it.
ORDER = [
    "__main__", "__init__", "jobs", "datasets", "plot", "gradcheck", "forecast", "sklearn", "_estimators", "_samples",
    "torch", "keras", "onnx", "_keras_files", "_onnx_write", "_onnx_graph", "_onnx_activations", "files", "checkpoint",
    "stack", "nn", "_progress", "layers", "_layer", "stream", "tape", "_batch", "_places", "sequences", "_weights",
    "_saved", "_parameters", "threads", "_activations", "_checks", "_habits", "_types", "engine", "reference",
    "_version", "_interrupt",
]  # fmt: skip


def test_no_import_runs_against_an_arrow():
    files = [path for folder in ("", *FOLDERS) for path in (ROOT / "fastlstm" / folder).glob("*.py")]
    for path in files:
        name = path.parent.name if path.parent.name in FOLDERS else path.stem
        for other in imports_of(path):
            if path.stem in ("tape", "stream", "_batch") and other == "_layer" or path.stem == "_types":
                continue  # for the type checker alone
            if name == "__main__" and other in ("__version__",) or name == "__init__":
                continue
            assert other in ORDER and ORDER.index(name) < ORDER.index(other), f"{path.name} imports {other}"


def test_one_module_for_torch_knows_the_inside_of_a_layer():
    for path in (ROOT / "fastlstm" / "torch").glob("*.py"):
        found = re.search(r"\b(layer|bound|_flat|tape|batch)\._[a-z]\w*", path.read_text(encoding="utf-8"))
        assert not found or path.name == "_carry.py", f"{path.name}: {found[0]}"


def test_no_file_is_too_large():
    """A room holds one subject: no module above 450 lines, no module of the engine above 350."""
    for path in [*(ROOT / "fastlstm").rglob("*.py"), *CYTHON]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= (350 if path in CYTHON else 450), f"{path.name}: {lines} lines"


def test_no_function_is_too_long():
    for path in (ROOT / "fastlstm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                doc = node.body[0] if ast.get_docstring(node) else None
                lines = node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)
                assert lines <= 60, f"{path.name}: {node.name} has {lines} lines without its docstring"


def test_package_is_typed():
    assert Path(fastlstm.__file__).with_name("py.typed").is_file()


def test_isas_of_the_source_are_those_of_the_build():
    names = re.findall(r'#define ISA_NAME "(\w+)"', read("src_c/kernels.c"))
    assert len(set(names)) == len(names)
    assert set(engine.available_isas()) <= set(names)
    assert engine.isa() in engine.available_isas()


PAGES = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE", "mkdocs.yml", *PAGES]
)
def test_documents_are_plain_text(name):
    text = read(name)
    assert text.endswith("\n") and not text.endswith("\n\n")
    assert not re.search(r"[ \t]\n|\t|\r", text)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
def test_no_instruction_stands_where_the_machine_may_lack_it():
    """AVX only in functions whose name ends with their instruction set, AVX-512 only in those of avx512."""
    if not shutil.which("objdump"):
        pytest.skip("needs objdump")
    allowed = {"avx2": set(), "avx512": set()}
    seen = 0
    for path in Path(fastlstm.engine.__file__).parent.glob("*.so"):
        command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
        function, kind = "", ""
        for line in text.splitlines():
            if line.endswith(">:"):
                function = line.split("<")[1][:-2]
                found = re.search(r"_(avx2|avx512)(\.|$)", function)
                kind = found[1] if found else ""
                continue
            place, _, instruction = line.partition(":\t")
            if not instruction:
                continue
            seen += 1
            if re.match(r"v(?!err|erw|mcall|mrun)\w", instruction) or re.search(r"%[yz]mm|%k[0-7]", instruction):
                assert kind, f"{path.name}: {function}: {line.strip()}"
                allowed[kind].add(function)
                if kind == "avx2":
                    assert not re.search(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])", instruction), f"{function}: {line}"
    assert seen > 50_000
    if not allowed["avx2"]:
        pytest.skip("built without symbols")
    assert len(allowed["avx2"]) > 50 and len(allowed["avx512"]) > 50


def test_modules_are_of_one_kind():
    """All for this Python, or all with the stable interface, which a free-threaded Python has not."""
    names = [path.name for path in Path(fastlstm.engine.__file__).parent.glob("*.so")]
    own = sysconfig.get_config_var("EXT_SUFFIX")
    kinds = {name[name.index(".") :] for name in names}
    assert len(kinds) == 1 and kinds <= {own, ".abi3.so"}
    assert kinds == {own} or not sysconfig.get_config_var("Py_GIL_DISABLED")


def test_every_planted_fault_has_its_place():
    """tests/faults.py runs by hand: what it replaces stands in the code, once."""
    for place, text, *_ in faults.FAULTS:
        assert (ROOT / place).read_text(encoding="utf-8").count(text) == 1, f"{place}: {text!r}"
