"""Build of the compiled part: src_c/ and fastlstm/_engine.pyx in one extension module.

No -march and no fast-math: src_c/kernels.c holds every instruction set, and the choice is made at run time.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

OPENMP = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"
HEADERS = "#include <Python.h>\nint main(void) { return 0; }\n"
VECTORS = "typedef int v __attribute__((vector_size(16)));\nint main(void) { v a = {0}; return a[0]; }\n"
GET_COMPILER = "Install gcc (Debian, Ubuntu: apt install gcc; Fedora: dnf install gcc) or name one with CC=..."


def compiles(compiler, program, flags=()):
    """Whether the compiler turns this C program into an executable."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text(program)
        command = [*compiler, str(source), "-o", str(Path(folder, "probe")), *flags]
        return subprocess.run(command, capture_output=True).returncode == 0


def stop(why):
    sys.exit(f"\nfastlstm cannot be built: {why}\n")


class BuildEngine(build_ext):
    """Looks at the compiler first, and says what it lacks."""

    def build_extensions(self):
        compiler = list(getattr(self.compiler, "compiler", None) or [])
        if not compiler:
            stop(f"it needs gcc or clang, and this is {type(self.compiler).__name__}. On Windows use WSL.")
        if not shutil.which(compiler[0]):
            stop(f"it needs a C compiler, and {compiler[0]!r} was not found.\n{GET_COMPILER}")
        if not compiles(compiler, VECTORS):
            stop(f"{' '.join(compiler)!r} does not compile a program with vector types.\n{GET_COMPILER}")
        if not compiles(compiler, HEADERS, [f"-I{path}" for path in self.compiler.include_dirs]):
            where = sysconfig.get_path("include")
            stop(
                f"Python.h was not found in {where}.\n"
                "Install Python's headers (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)."
            )
        openmp = ["-fopenmp"]
        if not compiles(compiler, OPENMP, openmp):
            print(
                f"fastlstm: {compiler[0]} has no OpenMP (-fopenmp fails), so this build uses one thread,\n"
                "and fastlstm.show_config() says so. For more install libgomp (gcc) or libomp (clang)\n"
                "and build again.",
                file=sys.stderr,
            )
            openmp = []
        for extension in self.extensions:
            extension.extra_compile_args += openmp
            extension.extra_link_args += openmp

        compile_files = self.compiler.compile

        def compile_each(sources, **options):
            """One file per thread: kernels.c and _engine.c take their time."""
            with ThreadPoolExecutor() as pool:
                objects = pool.map(lambda source: compile_files([source], **options), sources)
            return [name for names in objects for name in names]

        self.compiler.compile = compile_each
        super().build_extensions()

    def build_extension(self, extension):
        # Here, not at the top: who asks for metadata waits for no translation. Always anew and in the build
        # folder: C that another Cython left behind is never taken for ours.
        made = cythonize([extension], force=True, quiet=True, build_dir=self.build_temp)[0]
        extension.sources = made.sources
        super().build_extension(extension)


class BuildPackage(build_py):
    """Starts from an empty folder: what an earlier build left there must not get into the wheel."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


engine = Extension(
    "fastlstm._engine",
    ["fastlstm/_engine.pyx", "src_c/kernels.c", "src_c/cpu.c"],
    include_dirs=["src_c", np.get_include()],
    depends=[
        "fastlstm/_kernels.pxd",
        "src_c/fastlstm.h",
        "src_c/instantiate.h",
        "src_c/kernel_template.h",
        "src_c/vmath_template.h",
        "setup.py",
    ],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
    # -ffp-contract=fast: multiply-adds are fused where the ISA can, under every compiler.
    extra_compile_args=["-O3", "-std=gnu11", "-ffp-contract=fast", "-fvisibility=hidden", "-g0"],
)

setup(ext_modules=[engine], cmdclass={"build_ext": BuildEngine, "build_py": BuildPackage})
