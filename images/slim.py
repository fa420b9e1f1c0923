"""Remove from an environment what no stage reads: `python images/slim.py SITE_PACKAGES`, while an image is built.

Tests, static libraries, sources and symbol tables of extension modules, and parts of large packages that nothing here
imports: the descriptions of 400 AWS services but those that an object store needs, Arrow's RPC server, copies of Arrow's
and onnxruntime's libraries, SciPy's file formats and signal processing, NumPy's builder of extensions, torchao's own models
and MX formats. Code and data that stay are untouched, so results are those of the whole packages.
"""

from __future__ import annotations

import shutil
import struct
import sys
from pathlib import Path

# Patterns below site-packages; a `**/` is any depth.
DROP = (
    "**/tests",
    "**/*.a",
    "**/*.pxd",
    "**/*.pxi",
    "**/*.pyi",
    "**/*.pyx",
    "numpy/**/*.h",
    "numpy/_core/include",
    "numpy/distutils",
    "onnx/backend/test",
    "onnxruntime/capi/libonnxruntime.so*",
    "onnxruntime/datasets",
    "onnxruntime/tools",
    "onnxruntime/transformers/[!_fo]*",
    "optuna/testing",
    "pyarrow/_azurefs.*",
    "pyarrow/_dataset_orc.*",
    "pyarrow/_flight.*",
    "pyarrow/_gcsfs.*",
    "pyarrow/_hdfs.*",
    "pyarrow/_orc.*",
    "pyarrow/_pyarrow_cpp_tests.*",
    "pyarrow/_substrait.*",
    "pyarrow/include",
    "pyarrow/libarrow_flight.so*",
    "pyarrow/libarrow_python.so",
    "pyarrow/libarrow_python.so.*.*",
    "pyarrow/libarrow_python_flight.so*",
    "pyarrow/src",
    "pydantic/v1",
    "scipy/**/*.h",
    "scipy/cluster",
    "scipy/datasets",
    "scipy/fftpack",
    "scipy/io",
    "scipy/misc",
    "scipy/odr",
    "scipy/signal",
    "sklearn/datasets/data",
    "sklearn/datasets/descr",
    "sklearn/datasets/images",
    "sklearn/svm/src",
    "test",
    "torchao/_C_mxfp8.*",
    "torchao/_models",
    "torchao/csrc",
    "torchao/experimental",
    "torchao/prototype/moe_training",
    "wrapt/*.c",
)
AWS_SERVICES = frozenset({"s3", "sso", "sso-oidc", "sts"})
# Their symbols stay, for the traces of crashes; elsewhere symbol tables go, which only debuggers read.
UNSTRIPPED = frozenset({"cuda", "nvidia", "torch", "triton"})

ELF64 = b"\x7fELF\x02\x01"
HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
SEGMENT = struct.Struct("<IIQQQQQQ")


def unneeded(site: Path) -> list[Path]:
    """Files and folders to remove; none lies within another."""
    found = {path for pattern in DROP for path in site.glob(pattern)}
    found |= {path for path in site.glob("botocore/data/*") if path.is_dir() and path.name not in AWS_SERVICES}
    return sorted(path for path in found if not found.intersection(path.parents))


def libraries(site: Path) -> list[Path]:
    """Shared objects to strip."""
    found = (path for path in site.rglob("*.so*") if path.is_file() and not path.is_symlink())
    return sorted(path for path in found if path.relative_to(site).parts[0] not in UNSTRIPPED)


def strip(content: bytes) -> bytes:
    """A shared object without what comes after its last segment: sections that are never loaded, and their table.

    The loader reads the program header only (System V ABI, chapter 5). Other files come back as they are.
    """
    if not content.startswith(ELF64):
        return content
    fields = list(HEADER.unpack_from(content))
    offset, size, count = fields[5], fields[9], fields[10]
    segments = [SEGMENT.unpack_from(content, offset + i * size) for i in range(count)]
    end = max(offset + size * count, *(segment[2] + segment[5] for segment in segments))
    fields[6] = fields[12] = fields[13] = 0  # offset of the sections' table, their number, and that of their names
    return HEADER.pack(*fields) + content[HEADER.size : end]


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [path] if not path.is_dir() else [each for each in path.rglob("*") if not each.is_dir()]
    return sum(each.lstat().st_size for each in files)


def main(site: Path) -> None:
    """Remove and strip, and print how much that was."""
    before = size(site)
    for path in unneeded(site):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for path in libraries(site):
        path.write_bytes(strip(path.read_bytes()))
    print(f"{site}: {before / 1e6:.0f} MB, {size(site) / 1e6:.0f} MB without what no stage reads")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
