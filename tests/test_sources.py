"""Rules on the C sources that no compiler checks."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import variants

ROOT = Path(__file__).parent.parent
HEADER = ROOT / "include" / "flashcore.h"
C_FILES = sorted([*ROOT.glob("csrc/**/*.[ch]"), *ROOT.glob("include/*.h"), *ROOT.glob("kernels/*.h")])
KERNEL_FILES = sorted([*ROOT.glob("kernels/*/*.cu"), *ROOT.glob("kernels/*/*.cuh"), *ROOT.glob("kernels/*/*.h")])
LIBRARY_FILES = [path for path in C_FILES if path.suffix == ".c" and path.parent.name != "python"]
ALL = C_FILES + KERNEL_FILES

pytestmark = pytest.mark.skipif(not HEADER.exists(), reason="needs the source tree")


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_of(path: Path) -> str:
    """Without comments and the contents of strings, line for line."""
    text = path.read_text()
    text = re.sub(r'"(?:\\.|[^"\\\n])*"', '""', text)
    text = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.DOTALL)
    return re.sub(r"//.*", "", text)


def declared() -> list[str]:
    return re.findall(r"^FC_API [^;(]*?\b(fc_\w+)\(", HEADER.read_text(), re.MULTILINE)


def defined(path: Path) -> list[str]:
    """Functions with external linkage: their definitions begin a line, without `static`."""
    pattern = (
        r"^(?!static|typedef|extern|return|else|case|enum|struct|#)[A-Za-z_][\w \*]*?\b(\w+)\((?:[^;{}]|\n)*?\)\s*\{"
    )
    return re.findall(pattern, code_of(path), re.MULTILINE)


@pytest.mark.parametrize("path", ALL, ids=ids)
def test_a_file_opens_by_saying_what_it_is(path: Path) -> None:
    first = path.read_text()[:400]
    assert re.match(rf"(/\*|//)[\s*/]*{re.escape(path.name)} - \w", first), (
        f"expected '{path.name} - ...' in a comment at the top"
    )


@pytest.mark.parametrize("path", ALL, ids=ids)
def test_a_library_neither_prints_nor_exits(path: Path) -> None:
    banned = r"\b(printf|fprintf|vprintf|puts|putchar|perror|exit|_exit|abort|assert|system|longjmp|signal)\s*\("
    found = re.findall(banned, code_of(path))
    assert not found, f"{found} in {ids(path)}: return a status, the caller decides"


@pytest.mark.parametrize("path", [path for path in ALL if path.parent.name != "python"], ids=ids)
def test_the_library_knows_no_python(path: Path) -> None:
    assert not re.search(r"Python\.h|\bPy[A-Z]\w*|torch", code_of(path))


@pytest.mark.parametrize("path", [path for path in C_FILES if path.parent.name != "python"], ids=ids)
def test_the_library_reads_no_environment(path: Path) -> None:
    """Except the thread count: what the front ends read, they pass on."""
    given = re.findall(r"getenv\(\s*\"(\w+)\"", path.read_text())
    assert set(given) <= {"OMP_NUM_THREADS"}


def test_every_declared_function_is_defined_once() -> None:
    every = [name for path in LIBRARY_FILES for name in set(defined(path))]
    assert len(declared()) > 10
    for name in declared():
        assert every.count(name) == 1, f"{name} is defined in {every.count(name)} files"


@pytest.mark.parametrize("path", [path for path in C_FILES if path.suffix == ".c"], ids=ids)
def test_external_names_have_the_prefix(path: Path) -> None:
    foreign = [name for name in defined(path) if not name.startswith(("fc_", "FC_", "PyInit_"))]
    assert not foreign, f"{foreign} in {ids(path)}: make it static, or call it fc_..."


def test_exported_functions_are_documented() -> None:
    """A comment stands above each prototype, or above the group it is in."""
    lines = HEADER.read_text().splitlines()
    for at, line in enumerate(lines):
        if line.startswith("FC_API"):
            above = at
            while lines[above - 1].startswith("FC_API"):
                above -= 1
            assert lines[above - 1].endswith("*/"), f"line {at + 1}: {line}"


def test_public_names_have_the_prefix() -> None:
    text = code_of(HEADER)
    for macro in re.findall(r"^#define (\w+)", text, re.MULTILINE):
        assert macro.startswith(("FC_", "FLASHCORE_H")), macro
    for name in re.findall(r"^\} (\w+);", text, re.MULTILINE):
        assert name.startswith("fc_"), name
    for name in re.findall(r"^    ([A-Z]\w+) = ", text, re.MULTILINE):
        assert name.startswith("FC_"), name


@pytest.mark.parametrize("path", sorted(ROOT.glob("csrc/python/*.c")), ids=ids)
def test_the_gil_comes_back(path: Path) -> None:
    code = code_of(path)
    assert code.count("Py_BEGIN_ALLOW_THREADS") == code.count("Py_END_ALLOW_THREADS")
    for block in re.findall(r"Py_BEGIN_ALLOW_THREADS(.*?)Py_END_ALLOW_THREADS", code, re.DOTALL):
        assert not re.search(r"\b(return|goto)\b", block), "a way out without the GIL"
        assert not re.search(r"\bPy_?[A-Z]\w*\(", block), "a Python call without the GIL"


@pytest.mark.parametrize("path", ALL, ids=ids)
def test_layout(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert "\t" not in line, f"{ids(path)}:{number}: a tab"
        assert line == line.rstrip(), f"{ids(path)}:{number}: blanks at the end"
    assert path.read_text().endswith("\n")


def test_words_of_unfinished_work() -> None:
    for path in ALL:
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text()), ids(path)


def test_variants_are_distinct_and_have_sources() -> None:
    for op in ("forward", "backward"):
        rows = variants.read(op)
        assert rows
        assert len({row.name for row in rows}) == len(rows), "two rows make one kernel"
        for row in rows:
            assert (ROOT / "kernels" / row.family / f"{op}.cu").exists()
            assert row.dtype in ("float16", "bfloat16", "float32")
            assert 1 <= row.head_dim <= 256
            assert row.mask in ("any", "full", "band", "unbiased", "biased", "general")
            assert row.block_m % 8 == row.block_n % 8 == row.threads % 32 == 0
            assert re.fullmatch(r"\d{2,3}a?", row.arch)


def test_packaged_header_is_the_header() -> None:
    import flashcore

    assert (Path(flashcore.include_path()) / "flashcore.h").read_text() == HEADER.read_text()


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler named cc")
@pytest.mark.parametrize("standard", ["c11", "c17", "c++11", "c++20"])
@pytest.mark.parametrize("header", [HEADER, ROOT / "kernels" / "kernels.h"], ids=ids)
def test_headers_compile_alone(header: Path, standard: str, tmp_path: Path) -> None:
    source = tmp_path / "alone.c"
    source.write_text(f'#include "{header}"\n#include "{header}"\nint main(void) {{ return 0; }}\n')
    language = ["-x", "c++"] if "++" in standard else []
    command = ["cc", f"-std={standard}", *language, "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    command += [f"-I{ROOT / 'include'}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
