"""A wheel with libgomp inside under its own name, and auditwheel's tag.

    python .ci/repair_wheel.py dist/fastlstm-*.whl wheelhouse

auditwheel would give the copy a name that nobody else has, and the process a second pool of threads beside PyTorch's.
The name libgomp.so.1 is PyTorch's, too: whichever comes first serves both. Needs patchelf, wheel and auditwheel.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAME = "libgomp.so.1"
NOTICE = """\
libgomp.so.1 is the OpenMP runtime of GCC, unchanged: GPL version 3 with the GCC Runtime Library Exception.
Its source is at https://gcc.gnu.org/.
"""


def run(*command, **options):
    return subprocess.run([str(word) for word in command], check=True, text=True, **options)


def library():
    """The compiler's libgomp."""
    found = Path(run("gcc", f"-print-file-name={NAME}", stdout=subprocess.PIPE).stdout.strip())
    if not found.is_absolute():
        sys.exit(f"{sys.argv[0]}: gcc knows no {NAME}")
    return found.resolve()


def main(wheel, folder):
    with tempfile.TemporaryDirectory() as place:
        run(sys.executable, "-m", "wheel", "unpack", wheel, "--dest", place)
        (root,) = Path(place).iterdir()
        libraries = root / "fastlstm.libs"
        libraries.mkdir()
        shutil.copy(library(), libraries / NAME)
        (libraries / "NOTICE.txt").write_text(NOTICE)
        for path in root.rglob("*.so"):
            if NAME in run("patchelf", "--print-needed", path, stdout=subprocess.PIPE).stdout.split():
                run("patchelf", "--set-rpath", "$ORIGIN/../../fastlstm.libs", path)
        run(sys.executable, "-m", "wheel", "pack", root, "--dest-dir", place)
        (packed,) = Path(place).glob("*.whl")
        run("auditwheel", "repair", "--strip", "--zip-compression-level", "9", packed, "--wheel-dir", folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
