"""The library as a C program meets it: structs that grow, null pointers, words, symbols, and a compiled example."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import capi
import numpy as np
import pytest
import reference
from capi import INVALID, NO_DEVICE, OK

import flashcore

HEADER = Path(flashcore.include_path()) / "flashcore.h"
needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler named cc")


@pytest.fixture
def arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(42)
    made = [rng.standard_normal((2, 3, n, 16)).astype(np.float32) for n in (5, 7, 7)]
    return [*made, np.full((2, 3, 5, 16), np.nan, np.float32)]


def test_forward(arrays: list[np.ndarray]) -> None:
    lse = np.zeros((2, 3, 5), np.float32)
    assert capi.forward(capi.problem(*arrays, lse=lse, flags=capi.CAUSAL)) == OK
    reference.expect(*arrays[:3], is_causal=True).check(arrays[3], lse)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8, 1000])
def test_bits_do_not_depend_on_threads(num_threads: int) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((3, 4, 300, 64)).astype(np.float32) for _ in range(3))
    outs = [np.empty_like(q), np.empty_like(q)]
    assert capi.forward(capi.problem(q, k, v, outs[0], num_threads=1)) == OK
    assert capi.forward(capi.problem(q, k, v, outs[1], num_threads=num_threads)) == OK
    np.testing.assert_array_equal(*outs)


def test_small_calls_in_a_row_have_the_same_bits() -> None:
    """The first ones run alone; then, as they follow each other fast, the workers are woken and help."""
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((1, 8, 16, 64)).astype(np.float32) for _ in range(3))
    expected, out = np.empty_like(q), np.empty_like(q)
    assert capi.forward(capi.problem(q, k, v, expected, num_threads=1)) == OK
    problem = capi.problem(q, k, v, out, num_threads=2)
    for _ in range(1000):
        out[:] = np.nan
        assert capi.forward(problem) == OK
        np.testing.assert_array_equal(out, expected)
        for _ in range(10):
            assert capi.forward(problem) == OK


# Structs begin with their size


@needs_cc
def test_ctypes_structs_are_the_header(tmp_path: Path) -> None:
    structs = {
        "fc_tensor": capi.Tensor,
        "fc_attention_problem": capi.Problem,
        "fc_backward_problem": capi.BackwardProblem,
        "fc_device": capi.Device,
        "fc_plan": capi.Plan,
    }
    asserts = []
    for name, struct in structs.items():
        asserts.append(f'_Static_assert(sizeof({name}) == {ctypes.sizeof(struct)}, "{name}");')
        for field, *_ in struct._fields_:
            offset = getattr(struct, field).offset
            asserts.append(f'_Static_assert(offsetof({name}, {field}) == {offset}, "{name}.{field}");')
    source = tmp_path / "sizes.c"
    source.write_text('#include "flashcore.h"\n' + "\n".join(asserts) + "\n")
    _cc("-std=c11", "-fsyntax-only", f"-I{HEADER.parent}", source)


class Grown(ctypes.Structure):
    """A newer caller's problem."""

    _fields_ = [("known", capi.Problem), ("page_size", ctypes.c_int64), ("later", ctypes.c_int64)]


def _grown(arrays: list[np.ndarray], page_size: int) -> Grown:
    grown = Grown(known=capi.problem(*arrays), page_size=page_size)
    grown.known.struct_size = ctypes.sizeof(Grown)
    return grown


def test_a_newer_struct_with_a_zero_tail_works(arrays: list[np.ndarray]) -> None:
    grown = _grown(arrays, 0)
    assert capi.library().fc_attention_forward(ctypes.byref(grown), None, 0, None) == OK
    reference.assert_close(arrays[3], *arrays[:3])


def test_a_newer_struct_with_an_unknown_option_is_refused(arrays: list[np.ndarray]) -> None:
    grown = _grown(arrays, 16)
    assert capi.library().fc_attention_forward(ctypes.byref(grown), None, 0, None) == INVALID
    assert str(ctypes.sizeof(capi.Problem)) in capi.last_error()
    assert "does not know" in capi.last_error()
    assert np.isnan(arrays[3]).all(), "a refused call wrote"


@pytest.mark.parametrize("size", [0, 1, 8, ctypes.sizeof(capi.Problem) - 8, 2**31, 2**64 - 1])
def test_a_wrong_struct_size_is_refused(arrays: list[np.ndarray], size: int) -> None:
    made = capi.problem(*arrays, struct_size=size)
    assert capi.forward(made) == INVALID
    assert f"struct_size is {size}" in capi.last_error()
    assert "sizeof(fc_attention_problem)" in capi.last_error()


def test_a_newer_plan_keeps_its_tail(arrays: list[np.ndarray]) -> None:
    class GrownPlan(ctypes.Structure):
        _fields_ = [("known", capi.Plan), ("later", ctypes.c_int64)]

    plan = GrownPlan(later=77)
    plan.known.struct_size = ctypes.sizeof(GrownPlan)
    made = capi.problem(*arrays)
    assert capi.library().fc_attention_plan(ctypes.byref(made), None, ctypes.byref(plan)) == OK
    assert plan.later == 77
    assert plan.known.struct_size == ctypes.sizeof(GrownPlan)
    assert plan.known.block_m > 0


# A plan that is made once


def test_a_plan_runs_again_on_other_arrays(arrays: list[np.ndarray]) -> None:
    status, plan = capi.plan(capi.problem(*arrays))
    assert status == OK
    rng = np.random.default_rng(43)
    for _ in range(2):
        arrays = [rng.standard_normal(x.shape).astype(x.dtype) for x in arrays]
        assert capi.run(capi.problem(*arrays), plan) == OK, capi.last_error()
        reference.assert_close(arrays[3], *arrays[:3])


def test_a_plan_is_followed(arrays: list[np.ndarray]) -> None:
    """Forced to another kernel, the problem no longer agrees with its plan."""
    made = capi.problem(*arrays)
    status, plan = capi.plan(made)
    assert status == OK
    made.kernel = b"cpu_baseline"
    status, other = capi.plan(made)
    assert status == OK
    assert other.kernel != plan.kernel or capi.library().fc_kernel_name(plan.kernel) == b"cpu_baseline"
    assert capi.run(made, other) == OK
    if other.kernel != plan.kernel:
        assert capi.run(made, plan) == INVALID
        assert "does not serve this problem" in capi.last_error()


@pytest.mark.parametrize("chosen", [-1, 2**31 - 1, "of another device"])
def test_a_plan_of_no_kernel_of_the_problem_is_refused(arrays: list[np.ndarray], chosen: Any) -> None:
    made = capi.problem(*arrays)
    status, plan = capi.plan(made)
    assert status == OK
    if chosen == "of another device":
        devices = [kernel.device for kernel in flashcore.kernels()]
        if "cuda" not in devices:
            pytest.skip("this build has the CPU's kernels alone")
        chosen = devices.index("cuda")
    plan.kernel = chosen
    assert capi.run(made, plan) == INVALID
    assert f"fc_plan.kernel is {chosen}" in capi.last_error()
    assert np.isnan(arrays[3]).all(), "a refused call wrote"


# Null pointers and other mistakes of C callers


def test_null_structs(arrays: list[np.ndarray]) -> None:
    lib = capi.library()
    made = capi.problem(*arrays)
    plan = capi.Plan(struct_size=ctypes.sizeof(capi.Plan))
    for status in (
        lib.fc_attention_forward(None, None, 0, None),
        lib.fc_attention_plan(None, None, ctypes.byref(plan)),
        lib.fc_attention_plan(ctypes.byref(made), None, None),
        lib.fc_attention_run(None, ctypes.byref(plan), None, 0, None),
        lib.fc_attention_run(ctypes.byref(made), None, None, 0, None),
        lib.fc_attention_backward(None, None, 0, None),
        lib.fc_attention_backward_plan(None, None, ctypes.byref(plan)),
        lib.fc_device_query(capi.CPU, 0, None),
        lib.fc_malloc(capi.CPU, 0, 8, None, None),
    ):
        assert status == INVALID
        assert "NULL" in capi.last_error()


@pytest.mark.parametrize("name", ["query", "key", "value", "out", "attn_mask", "sinks", "alibi_slopes", "lse"])
def test_null_data(arrays: list[np.ndarray], name: str) -> None:
    made = capi.problem(*arrays)
    getattr(made, name).data = None
    if getattr(made, name).dtype == capi.NONE:
        getattr(made, name).dtype = capi.FLOAT32
        getattr(made, name).strides[:] = (105, 35, 7, 1)
    assert capi.forward(made) == INVALID
    assert f"{name}.data is NULL" in capi.last_error()
    assert capi.plan(made)[0] == OK, "planning needs no data"


def test_null_data_of_an_empty_array() -> None:
    made = capi.shapes_only(device_type=capi.CPU, dtype=capi.FLOAT32, batch=0)
    assert capi.forward(made) == OK


def test_data_without_a_dtype(arrays: list[np.ndarray]) -> None:
    made = capi.problem(*arrays, attn_mask=np.zeros((2, 3, 5, 7), np.float32))
    made.attn_mask.dtype = capi.NONE
    assert capi.forward(made) == INVALID
    assert "attn_mask.dtype" in capi.last_error()


def test_unaligned_data(arrays: list[np.ndarray]) -> None:
    made = capi.problem(*arrays)
    made.key.data += 2
    assert capi.forward(made) == INVALID
    assert re.search(r"key.data is .*aligned.*4-byte float32", capi.last_error())


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"device_type": 0}, "device_type is 0; allowed: 1"),
    ({"device_type": 9}, "device_type is 9; allowed: 1"),
    ({"batch": -1}, "batch is -1; allowed: 0"),
    ({"seqlen_k": 2**60}, "seqlen_k is 1152921504606846976; allowed"),
    ({"head_dim": 0}, "head_dim is 0; allowed: 1 to 256"),
    ({"num_heads_kv": 2}, "multiple"),
    ({"num_heads_kv": 0}, "multiple"),
    ({"flags": 1 << 20}, "flags holds 0x100000"),
    ({"flags": capi.SCALE, "scale": float("inf")}, "scale is inf"),
    ({"softcap": -2.0}, "softcap is -2"),
    ({"flags": capi.WINDOW_LEFT, "window_left": -1}, "left side is -1"),
    ({"flags": capi.WINDOW_RIGHT, "window_right": -3}, "right side is -3"),
    ({"flags": capi.LOWER_RIGHT, "diagonal": 1}, "diagonal is 1"),
    ({"diagonal": 2**62}, "diagonal is 4611686018427387904"),
    ({"diagonal": -(2**62)}, "diagonal is -4611686018427387904"),
    ({"block_m": -1}, "block_m is -1"),
    ({"num_threads": -1}, "num_threads is -1"),
    ({"kernel": b"warp_drive"}, "'warp_drive'"),
]


@pytest.mark.parametrize("fields,words", MISTAKES, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_mistakes(arrays: list[np.ndarray], fields: dict[str, Any], words: str) -> None:
    made = capi.problem(*arrays, **fields)
    assert capi.forward(made) == INVALID
    assert words in capi.last_error()
    assert capi.plan(made)[0] == INVALID
    assert np.isnan(arrays[3]).all(), "a refused call wrote"


def test_a_head_dim_that_no_kernel_serves(arrays: list[np.ndarray]) -> None:
    for name in ("head_dim", "head_dim_v"):
        made = capi.problem(*arrays, **{name: 257})
        assert capi.forward(made) == capi.plan(made)[0] == capi.UNSUPPORTED
        assert f"{name} is 257; allowed: 1 to 256" in capi.last_error()


@pytest.mark.parametrize(
    "options", [{"scale": 1e39}, {"softcap": 1e-50}, {"softcap": 1e39}, {"scale": 1e20, "softcap": 1e-20}]
)
def test_options_that_float32_does_not_hold(options: dict[str, float]) -> None:
    """Of float64 arrays they are served; of others they would be infinite or zero."""
    rng = np.random.default_rng(7)
    for dtype, status in ((np.float64, OK), (np.float32, INVALID)):
        q, k, v = (rng.standard_normal((1, 1, 4, 8)).astype(dtype) for _ in range(3))
        made = capi.problem(q, k, v, np.empty_like(q), flags=capi.SCALE, **{"scale": 0.5, **options})
        assert capi.forward(made) == status
    assert re.search(r"float32", capi.last_error())


def test_what_is_reserved_must_be_zero(arrays: list[np.ndarray]) -> None:
    """Or a later version could not give it a meaning."""
    made = capi.problem(*arrays)
    made.value.reserved = 7
    assert capi.forward(made) == INVALID
    assert "value.reserved is 7; set it to 0" in capi.last_error()


@pytest.mark.parametrize("name", ["query", "key", "value", "out"])
@pytest.mark.parametrize("dtype", [capi.NONE, capi.BOOL, 77, -1])
def test_dtypes(arrays: list[np.ndarray], name: str, dtype: int) -> None:
    made = capi.problem(*arrays)
    getattr(made, name).dtype = dtype
    assert capi.forward(made) == INVALID
    assert "dtype" in capi.last_error()


@pytest.mark.parametrize("stride", [2**63 - 1, -(2**63), 2**61])
@pytest.mark.parametrize("name", ["query", "value", "out"])
def test_strides_beyond_the_address_space(arrays: list[np.ndarray], name: str, stride: int) -> None:
    made = capi.problem(*arrays)
    getattr(made, name).strides[1] = stride
    assert capi.forward(made) == INVALID
    assert name in capi.last_error()
    assert "64-bit" in capi.last_error()


def test_more_elements_than_an_address_space_has() -> None:
    """Of repeated keys, which no stride tells of."""
    made = capi.shapes_only(batch=2**10, seqlen_k=2**42, device_type=capi.CPU)
    made.key.strides[:] = made.value.strides[:] = (0, 0, 0, 1)
    assert capi.plan(made)[0] == INVALID
    assert "64-bit" in capi.last_error()


def test_out_that_overlaps_itself(arrays: list[np.ndarray]) -> None:
    made = capi.problem(*arrays)
    made.out.strides[2] = 15
    assert capi.forward(made) == INVALID
    assert "out" in capi.last_error()
    assert "one address" in capi.last_error()
    made = capi.problem(*arrays, lse=np.zeros((2, 3, 5), np.float32))
    made.lse.strides[1] = 0
    assert capi.forward(made) == INVALID
    assert "lse" in capi.last_error()


# Words


def test_status_names_and_version() -> None:
    lib = capi.library()
    assert [lib.fc_status_name(i).decode() for i in range(6)] == list(capi.STATUS_NAMES)
    assert lib.fc_status_name(99) is not None
    assert lib.fc_version().decode() == flashcore.__version__
    assert f'#define FC_VERSION "{flashcore.__version__}"' in HEADER.read_text()


def test_errors_are_per_thread(arrays: list[np.ndarray]) -> None:
    import threading

    capi.forward(capi.problem(*arrays, softcap=-2.0))
    seen = []
    thread = threading.Thread(target=lambda: seen.append(capi.last_error()))
    thread.start()
    thread.join()
    assert seen == [""]
    assert "softcap" in capi.last_error()


def test_kernel_names() -> None:
    lib = capi.library()
    names = [lib.fc_kernel_name(i).decode() for i in range(lib.fc_kernel_count())]
    assert names == [kernel.name for kernel in flashcore.kernels()]
    assert "cpu_baseline" in names
    assert lib.fc_kernel_name(-1) is None
    assert lib.fc_kernel_name(len(names)) is None


def test_describe(arrays: list[np.ndarray]) -> None:
    made = capi.problem(*arrays)
    _, plan = capi.plan(made)
    describe = capi.library().fc_plan_describe
    length = describe(ctypes.byref(made), None, ctypes.byref(plan), None, 0)
    assert length > 40
    buffer = ctypes.create_string_buffer(length + 1)
    assert describe(ctypes.byref(made), None, ctypes.byref(plan), buffer, length + 1) == length
    assert len(buffer.value) == length
    assert flashcore.kernels()[plan.kernel].name in buffer.value.decode()
    short = ctypes.create_string_buffer(b"x" * 20)
    assert describe(ctypes.byref(made), None, ctypes.byref(plan), short, 10) == length
    assert short.raw[9] == 0
    assert short.raw[10:11] == b"x"
    made.softcap = -1
    assert describe(ctypes.byref(made), None, ctypes.byref(plan), None, 0) == 0
    assert describe(ctypes.byref(made), None, ctypes.byref(plan), buffer, length + 1) == 0
    assert buffer.value == b""


# Devices


def test_device_query() -> None:
    lib = capi.library()
    device = capi.Device(struct_size=ctypes.sizeof(capi.Device))
    assert lib.fc_device_query(capi.CPU, 0, ctypes.byref(device)) == OK
    assert device.type == capi.CPU
    assert device.num_threads >= 1
    assert device.isa in (0, 1, 2)
    assert lib.fc_device_query(capi.CPU, 1, ctypes.byref(device)) == NO_DEVICE
    assert lib.fc_device_query(5, 0, ctypes.byref(device)) == INVALID
    device.struct_size = 4
    assert lib.fc_device_query(capi.CPU, 0, ctypes.byref(device)) == INVALID


def test_a_newer_device_keeps_its_tail() -> None:
    class GrownDevice(ctypes.Structure):
        _fields_ = [("known", capi.Device), ("later", ctypes.c_int64)]

    size = ctypes.sizeof(GrownDevice)
    device = GrownDevice(known=capi.Device(struct_size=size), later=77)
    assert capi.library().fc_device_query(capi.CPU, 0, ctypes.byref(device)) == OK
    assert (device.known.struct_size, device.known.type, device.later) == (size, capi.CPU, 77)


def test_no_gpu_says_why() -> None:
    lib = capi.library()
    if lib.fc_cuda_device_count() > 0:
        pytest.skip("there is a GPU")
    words = capi.last_error()
    assert re.search(r"GPU|CUDA|driver|nvcc", words), words
    device = capi.Device(struct_size=ctypes.sizeof(capi.Device))
    assert lib.fc_device_query(capi.CUDA, 0, ctypes.byref(device)) == NO_DEVICE
    assert capi.forward(capi.shapes_only(batch=0)) == NO_DEVICE


def test_malloc() -> None:
    lib = capi.library()
    data = ctypes.c_void_p(1)
    assert lib.fc_malloc(capi.CPU, 0, 1000, None, ctypes.byref(data)) == OK
    assert data.value is not None
    assert data.value % 64 == 0
    ctypes.memset(data, 1, 1000)
    assert lib.fc_free(capi.CPU, 0, data, None) == OK
    assert lib.fc_malloc(capi.CPU, 0, 0, None, ctypes.byref(data)) == OK
    assert lib.fc_free(capi.CPU, 0, None, None) == OK
    for size in (2**64 - 1, 2**63, 2**62):
        assert lib.fc_malloc(capi.CPU, 0, size, None, ctypes.byref(data)) == capi.OUT_OF_MEMORY
        assert str(size) in capi.last_error()
        assert data.value is None
    assert lib.fc_malloc(7, 0, 8, None, ctypes.byref(data)) == INVALID


# The file


def _run(*command: Any, **options: Any) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return done.stdout


def _cc(*arguments: Any) -> None:
    _run("cc", "-Wall", "-Wextra", "-Werror", *arguments)


def declared() -> set[str]:
    return set(re.findall(r"^FC_API [^;(]*?\b(fc_\w+)\(", HEADER.read_text(), re.MULTILINE))


@pytest.mark.uninstrumented
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_exports_what_the_header_declares_and_nothing_else() -> None:
    symbols = {
        line.split()[-1].partition("@")[0]
        for line in _run("nm", "-D", "--defined-only", flashcore.library_path()).splitlines()
        if line.split()[-2] not in "Aa"
    }
    assert symbols == declared()
    assert len(symbols) > 10


@pytest.mark.uninstrumented
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_extension_exports_only_its_init_function() -> None:
    from flashcore import _C

    lines = _run("nm", "-D", "--defined-only", _C.__file__).splitlines()
    assert {line.split()[-1].partition("@")[0] for line in lines if line.split()[-2] not in "Aa"} == {"PyInit__C"}


@pytest.mark.uninstrumented
@pytest.mark.skipif(shutil.which("ldd") is None, reason="needs ldd")
def test_needs_no_framework_and_no_driver() -> None:
    from flashcore import _C

    for path in (flashcore.library_path(), _C.__file__):
        needed = re.sub(r"0x\w+", "", _run("ldd", path))  # an address may have "c10" in it
        assert not re.search(r"torch|c10|libcuda|cudart|gomp|libpython|not found", needed), needed


@needs_cc
def test_header_alone_is_c_and_cxx(tmp_path: Path) -> None:
    source = tmp_path / "alone.c"
    source.write_text('#include "flashcore.h"\nint main(void) { return fc_version() == 0; }\n')
    for language in ("c11", "c17", "c++11", "c++17"):
        _cc(
            f"-std={language}",
            "-pedantic",
            *(("-x", "c++") if "++" in language else ()),
            "-fsyntax-only",
            f"-I{HEADER.parent}",
            source,
        )


EXAMPLE = Path(__file__).parent.parent / "examples" / "attention.c"


@pytest.mark.uninstrumented
@needs_cc
@pytest.mark.skipif(not EXAMPLE.exists(), reason="examples/attention.c is not beside the tests")
def test_example_compiles_against_the_installed_paths(tmp_path: Path) -> None:
    library = Path(flashcore.library_path())
    program = tmp_path / "attention"
    _cc("-std=c11", EXAMPLE, f"-I{HEADER.parent}", library, f"-Wl,-rpath,{library.parent}", "-lm", "-o", program)
    assert _run(program).strip()
