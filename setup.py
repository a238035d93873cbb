"""Build of the compiled part: src_c/ and fastlstm/_engine.pyx in one extension module.

No -march and no fast-math here: src_c/kernels.c holds every instruction set and the choice is made at run time.
"""
import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def compiles(compiler, flags):
    """Whether the compiler turns a small OpenMP program into a program."""
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "probe.c")
        with open(source, "w") as file:
            file.write("#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n")
        command = [*compiler, source, "-o", os.path.join(folder, "probe"), *flags]
        return subprocess.run(command, capture_output=True).returncode == 0


class Build(build_ext):
    def build_extensions(self):
        compiler = list(getattr(self.compiler, "compiler", None) or ["cc"])
        if not shutil.which(compiler[0]):
            sys.exit(f"fastlstm: building needs a C compiler, and {compiler[0]!r} was not found.\n"
                     "Install gcc (Debian, Ubuntu: apt install gcc; Fedora: dnf install gcc) or name one with CC=...")
        openmp = ["-fopenmp"]
        if not compiles(compiler, openmp):
            print("fastlstm: the compiler has no OpenMP (-fopenmp fails): this build runs on one thread.\n"
                  "With gcc install libgomp, with clang libomp, and build again for more.", file=sys.stderr)
            openmp = []
        for extension in self.extensions:
            extension.extra_compile_args += openmp
            extension.extra_link_args += openmp
        super().build_extensions()


engine = Extension(
    "fastlstm._engine",
    ["fastlstm/_engine.pyx", "src_c/kernels.c", "src_c/cpu.c"],
    include_dirs=["src_c", np.get_include()],
    depends=["src_c/fastlstm.h", "src_c/instantiate.h", "src_c/kernel_template.h", "src_c/vmath_template.h"],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
    # -ffp-contract=fast: multiply-adds are fused where the ISA can, under every compiler.
    extra_compile_args=["-O3", "-std=gnu11", "-ffp-contract=fast", "-fvisibility=hidden", "-g0"],
)

setup(ext_modules=cythonize([engine]), cmdclass={"build_ext": Build})
