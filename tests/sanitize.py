"""The suite under AddressSanitizer and UndefinedBehaviorSanitizer, with gcc.

    python tests/sanitize.py                           the files below, on every instruction set of the machine
    FASTLSTM_ISA=avx2 python tests/sanitize.py tests/test_stream.py   others, on one

Builds a copy of the tree with both sanitizers in a temporary folder (four minutes of one core), and runs pytest there
with the sanitizer in the process from its start. Leaks are not looked for: the interpreter keeps much until its end.
Ends with exit status 1 if a test fails or a sanitizer speaks.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ["ladder", "exact", "arrays", "stream", "sequences", "memory", "errors", "products", "slstm", "composed"]
FILES += ["saturation", "tape", "stack", "layers", "vmath", "free_threading"]
# What changes with the allocator or in child processes says nothing here.
LEFT_OUT = "not memory_goes_back and not cycles and not bfloat16_keeps and not interrupted and not more_steps_than"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1"


def main(files):
    files = files or [f"tests/test_{name}.py" for name in FILES]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        known = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, known.split("\0")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        env = os.environ | {"CFLAGS": FLAGS, "LDFLAGS": FLAGS, "PYTHONPATH": str(copy)}
        text = (copy / "setup.py").read_text(encoding="utf-8")
        (copy / "setup.py").write_text(text.replace('"-O3"', '"-O1"').replace('"-g0"', '"-g1"'), encoding="utf-8")
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=copy, env=env, check=True, stderr=subprocess.DEVNULL)
        libraries = [
            subprocess.run(
                ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for name in ("libasan.so", "libubsan.so", "libstdc++.so")
        ]
        env |= {
            "LD_PRELOAD": ":".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:abort_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
            "PYTHONMALLOC": "malloc",
        }
        test = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", LEFT_OUT, *files]
        return subprocess.run(test, cwd=copy, env=env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
