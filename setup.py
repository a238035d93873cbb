"""Build of the compiled part: the modules of fastlstm/engine/, one of them with src_c/.

No -march and no fast-math: src_c/kernels.c holds every instruction set, and the choice is made at run time.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
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
            if os.environ.get("FASTLSTM_REQUIRE_OPENMP", "") not in ("", "0"):
                stop(
                    f"{compiler[0]} has no OpenMP (-fopenmp fails), and FASTLSTM_REQUIRE_OPENMP asks for it.\n"
                    "Install libgomp (gcc) or libomp (clang)."
                )
            print(
                f"fastlstm: {compiler[0]} has no OpenMP (-fopenmp fails), so this build uses one thread,\n"
                "and fastlstm.show_config() says so. For more install libgomp (gcc) or libomp (clang)\n"
                "and build again.",
                file=sys.stderr,
            )
            openmp = []
        # Here, not at the top: who asks for metadata waits for no translation. Always anew and in the build folder:
        # C that another Cython left behind is never taken for ours.
        made = cythonize(
            self.extensions, force=True, quiet=True, build_dir=self.build_temp,
            compiler_directives={"freethreading_compatible": True},
        )  # fmt: skip
        for extension, translated in zip(self.extensions, made, strict=True):
            extension.sources = translated.sources
            extension.extra_compile_args += openmp
            extension.extra_link_args += openmp
        self.parallel = os.cpu_count()  # kernels.c takes as long as all the others
        super().build_extensions()


class BuildPackage(build_py):
    """Starts from an empty folder: what an earlier build left there must not get into the wheel."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


C_SOURCES = ["src_c/kernels.c", "src_c/cpu.c"]
MODULES = [path.stem for path in sorted(Path("fastlstm/engine").glob("*.pyx"))]


def module(name):
    """One module of the engine. Only `kernels` is linked with the kernels: the others reach them through its table."""
    return Extension(
        f"fastlstm.engine.{name}",
        [f"fastlstm/engine/{name}.pyx", *(C_SOURCES if name == "kernels" else [])],
        include_dirs=["src_c", np.get_include()],
        depends=[*map(str, Path("fastlstm/engine").glob("*.pxd")), *map(str, Path("src_c").rglob("*.h")), "setup.py"],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"), *STABLE, *EMULATED],
        py_limited_api=ABI3,
        # -ffp-contract=fast: multiply-adds are fused where the ISA can, under every compiler.
        # -fno-builtin-memset: gcc clears the arguments of a step with "rep stosq", 4 % of a step of 32 units slower
        # than the C library (peers.py --shapes 1000,1,1,32 --mode training, Zen 3).
        libraries=["m"] if name == "kernels" else [],
        # Without symbols; those of the kernels tell the tests which instruction set a function may use.
        extra_link_args=["-Wl,-s"] if sys.platform.startswith("linux") and name != "kernels" else [],
        extra_compile_args=[
            "-O3",
            "-std=gnu11",
            "-ffp-contract=fast",
            "-fno-builtin-memset",
            "-fvisibility=hidden",
            "-g0",
        ],  # fmt: skip
    )


# FASTLSTM_ABI3=1, for wheels: one binary for every Python from 3.11 on. Off for the Python at hand: a step of a stream
# of 8 units takes 0.26 us without and 0.32 with it. A free-threaded Python has no stable interface.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
ABI3 = os.environ.get("FASTLSTM_ABI3", "") not in ("", "0") and not FREE_THREADED
STABLE = [("Py_LIMITED_API", "0x030B0000")] if ABI3 else []

# FASTLSTM_EMULATE=avx512: a build for tests, whose avx512 kernels are the same code with the instructions of AVX2.
EMULATED = [("FL_EMULATE_AVX512", "1")] if os.environ.get("FASTLSTM_EMULATE") == "avx512" else []

setup(
    ext_modules=[module(name) for name in MODULES],
    cmdclass={"build_ext": BuildEngine, "build_py": BuildPackage},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if ABI3 else {},
)
