"""Tuned choices in the C library: classes, candidates, the table. No GPU is asked, nothing is timed but on the CPU."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import capi
import numpy as np
import pytest
from capi import BFLOAT16, BOOL, CAUSAL, CPU, FLOAT16, FLOAT32, INVALID, OK, OUT_OF_MEMORY, Device, Plan, Problem

import flashcore

KERNELS = [kernel.name for kernel in flashcore.kernels()]
HOPPER = capi.gpu_device(90)
AVX512 = capi.cpu_device(2)

needs_x86 = pytest.mark.skipif("cpu_avx2" not in KERNELS, reason="other CPUs have one kernel, and no choice")
needs_hopper_build = pytest.mark.skipif(
    not any(name.startswith("hopper_") for name in KERNELS), reason="this build has no kernels for sm_90a"
)


@pytest.fixture(autouse=True)
def _nothing_tuned() -> Iterator[None]:
    capi.library().fc_tuned_clear()
    yield
    capi.library().fc_tuned_clear()


def cpu(**fields: Any) -> Problem:
    return capi.shapes_only(device_type=CPU, **{"dtype": FLOAT32, **fields})


def name_of(plan: Plan) -> str:
    return KERNELS[plan.kernel]


def planned(problem: Problem, device: Device = AVX512) -> tuple[str, int]:
    status, plan = capi.plan(problem, device)
    assert status == OK, capi.last_error()
    return name_of(plan), plan.tuned


def with_tensor(problem: Problem, name: str, dtype: int = FLOAT32) -> Problem:
    setattr(problem, name, capi.Tensor(None, (ctypes.c_int64 * 4)(), dtype, 0))
    return problem


# Classes


WINDOW = {"flags": capi.WINDOW_LEFT | CAUSAL, "window_left": 63}


@pytest.mark.parametrize(
    "one,other",
    [
        ({"seqlen_q": 385}, {"seqlen_q": 512}),  # 384 < n <= 512
        ({"seqlen_q": 257}, {"seqlen_q": 384}),
        ({"seqlen_k": 1025}, {"seqlen_k": 1536}),
        ({"batch": 4, "num_heads_q": 4, "num_heads_kv": 4}, {}),  # as many heads in all
        ({"head_dim": 33, "head_dim_v": 64}, {}),
        ({"flags": CAUSAL}, {"flags": CAUSAL, "seqlen_q": 500, "seqlen_k": 500}),
        ({"flags": CAUSAL}, {"flags": CAUSAL | capi.LOWER_RIGHT}),  # the same where the lengths are
        ({"flags": CAUSAL, "seqlen_q": 1, "seqlen_k": 1}, {"seqlen_q": 1, "seqlen_k": 1}),  # hides nothing
        ({"flags": capi.SCALE, "scale": 3.0}, {}),
        ({"flags": capi.SCALE, "scale": 1e-300}, {"flags": capi.SCALE, "scale": 0.0}),  # the same in float32
        ({"flags": capi.DETERMINISTIC}, {}),
        ({"kernel": b"cpu"}, {}),
        (WINDOW, {**WINDOW, "window_left": 50}),
    ],
    ids=str,
)
def test_one_class(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert capi.shape_class(cpu(**one)) == capi.shape_class(cpu(**other))


DIFFERENT: list[dict[str, Any]] = [
    {},
    {"dtype": FLOAT16},
    {"dtype": BFLOAT16},
    {"flags": CAUSAL},
    {"flags": CAUSAL, "diagonal": -256},  # half the keys
    WINDOW,
    {**WINDOW, "window_left": 255},
    {"softcap": 5.0},
    {"flags": capi.SCALE, "scale": -1.0},
    {"dropout_p": 0.1},
    {"seqlen_q": 384},
    {"seqlen_k": 384},
    {"seqlen_q": 1},
    {"seqlen_q": 2},
    {"seqlen_k": 0},
    {"batch": 1},
    {"batch": 3},
    {"batch": 0},
    {"num_heads_kv": 1},
    {"num_heads_kv": 4},
    {"head_dim": 65},
    {"head_dim_v": 32},
    {"head_dim": 256, "head_dim_v": 256},
    {"seqlen_q": 2**48, "seqlen_k": 2**10},
    {"batch": 2**48, "num_heads_q": 2**48, "num_heads_kv": 2**48, "seqlen_q": 0, "seqlen_k": 0},  # empty
]


def test_other_classes() -> None:
    problems = [cpu(**fields) for fields in DIFFERENT]
    problems += [with_tensor(cpu(), "attn_mask", dtype) for dtype in (BOOL, FLOAT32)]
    problems += [with_tensor(cpu(), "alibi_slopes"), with_tensor(cpu(), "sinks")]
    problems.append(with_tensor(with_tensor(cpu(), "alibi_slopes"), "sinks"))
    classes = [capi.shape_class(problem) for problem in problems]
    assert len({number for number, _ in classes}) == len(classes)
    assert len({words for _, words in classes}) == len(classes), "the words leave out what makes the difference"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 25, 1000, 2**20 + 1, 3 * 2**40, 2**48])
def test_sizes_are_rounded_up_to_half_octaves(size: int) -> None:
    """Never down, by less than one half, and only to 2^n and 3 * 2^n."""
    words = capi.shape_class(cpu(seqlen_q=size))[1]
    rounded = int(words.partition(" queries")[0].split()[-1])
    assert size <= rounded < 1.5 * size
    while rounded % 2 == 0:
        rounded //= 2
    assert rounded in (1, 3)


def test_a_class_in_words() -> None:
    problem = with_tensor(cpu(**WINDOW, num_heads_kv=2, seqlen_q=500, head_dim=40, softcap=1.0), "attn_mask", BOOL)
    assert capi.shape_class(problem)[1] == (
        "float32, head_dim 64/64, up to 16 heads in groups of 4, 512 queries, 512 keys, window of 64 keys, with a bool "
        "mask, softcap"
    )
    assert capi.shape_class(cpu(flags=CAUSAL, batch=32))[1] == (
        "float32, head_dim 64/64, up to 256 heads in groups of 1, 512 queries, 512 keys, causal of 512 keys"
    )


def test_the_class_of_what_is_wrong() -> None:
    number = ctypes.c_uint64(7)
    problem = cpu(head_dim=0)
    assert capi.library().fc_attention_class(ctypes.byref(problem), ctypes.byref(number), None, 0) == INVALID
    assert number.value == 7
    assert capi.library().fc_attention_class(ctypes.byref(cpu()), None, None, 0) == INVALID


# Candidates


def kernels_of(plans: list[Plan]) -> list[str]:
    return [name_of(plan) for plan in plans]


@needs_x86
@pytest.mark.parametrize(
    "isa,names", [(0, ["baseline"]), (1, ["avx2", "baseline"]), (2, ["avx512", "avx2", "baseline"])]
)
def test_candidates_on_the_cpu(isa: int, names: list[str]) -> None:
    status, plans, count = capi.candidates(cpu(), capi.cpu_device(isa))
    assert (status, count) == (OK, len(names))
    assert kernels_of(plans) == [f"cpu_{name}" for name in names]
    assert all((plan.block_m, plan.block_n, plan.num_splits, plan.tuned) == (64, 128, 1, 0) for plan in plans)


@needs_hopper_build
@pytest.mark.parametrize(
    "fields",
    [{}, {"flags": CAUSAL}, {"softcap": 2.0}, {"head_dim": 128, "head_dim_v": 128}, {"dtype": FLOAT32}, {"batch": 0}],
    ids=str,
)
def test_candidates_on_hopper(fields: dict[str, Any]) -> None:
    """Exactly the kernels that the planner runs when they are forced, and the first is what it runs by itself."""
    problem = capi.shapes_only(**fields)
    status, plans, _ = capi.candidates(problem, HOPPER)
    assert status == OK
    assert kernels_of(plans)[0] == planned(problem, HOPPER)[0]
    forced = [name for name in KERNELS if capi.plan(capi.shapes_only(**fields, kernel=name.encode()), HOPPER)[0] == OK]
    assert sorted(kernels_of(plans)) == sorted(forced)
    assert len(plans) > 1
    for plan in plans:
        one = capi.shapes_only(**fields, kernel=KERNELS[plan.kernel].encode(), block_m=plan.block_m)
        status, again = capi.plan(one, HOPPER)
        assert status == OK
        assert (again.block_n, again.num_tiles, again.num_blocks) == (plan.block_n, plan.num_tiles, plan.num_blocks)


@needs_hopper_build
def test_candidates_among_what_is_forced() -> None:
    _, plans, _ = capi.candidates(capi.shapes_only(kernel=b"portable"), HOPPER)
    assert plans
    assert all(name.startswith("portable") for name in kernels_of(plans))
    _, plans, _ = capi.candidates(capi.shapes_only(block_m=32), HOPPER)
    assert {plan.block_m for plan in plans} == {32}


def test_candidates_of_what_nothing_serves() -> None:
    status, plans, count = capi.candidates(cpu(block_m=7), AVX512)
    assert (status, plans, count) == (INVALID, [], -1)
    assert "block_m=7" in capi.last_error()


@needs_x86
@pytest.mark.parametrize("capacity", [0, 1, 2])
def test_candidates_for_which_there_is_no_room(capacity: int) -> None:
    plans = (Plan * 3)(*[Plan(struct_size=ctypes.sizeof(Plan), num_tiles=123) for _ in range(3)])
    count = ctypes.c_int32()
    status = capi.library().fc_attention_candidates(
        ctypes.byref(cpu()), ctypes.byref(AVX512), plans, capacity, ctypes.byref(count)
    )
    assert (status, count.value) == (OK, 3)
    assert [plan.num_tiles == 123 for plan in plans] == [i >= capacity for i in range(3)]


def test_candidates_of_bad_arguments() -> None:
    count, none = ctypes.c_int32(), Plan()
    ask = capi.library().fc_attention_candidates
    for plans, capacity, where in ((None, 1, count), (None, -1, count), (None, 0, None), (none, 1, count)):
        given = [None if each is None else ctypes.byref(each) for each in (plans, where)]
        assert ask(ctypes.byref(cpu()), ctypes.byref(AVX512), given[0], capacity, given[1]) == INVALID


# The table


@needs_x86
def test_a_choice_is_followed_within_its_class() -> None:
    assert planned(cpu()) == ("cpu_avx512", 0)
    assert capi.add_tuned(AVX512, cpu(), b"cpu_avx2") == OK
    assert planned(cpu()) == ("cpu_avx2", 1)
    assert planned(cpu(seqlen_q=400)) == ("cpu_avx2", 1)
    assert planned(cpu(seqlen_q=300)) == ("cpu_avx512", 0)
    assert planned(cpu(dtype=FLOAT16)) == ("cpu_avx512", 0)
    assert capi.add_tuned(AVX512, cpu(), b"cpu_baseline") == OK
    assert planned(cpu()) == ("cpu_baseline", 1), "a later choice replaces an earlier one"
    capi.library().fc_tuned_clear()
    assert planned(cpu()) == ("cpu_avx512", 0)


@needs_x86
@pytest.mark.parametrize(
    "fields,chosen",
    [
        ({"flags": capi.DETERMINISTIC}, "cpu_avx512"),
        ({"kernel": b"cpu"}, "cpu_avx512"),
        ({"block_m": 64}, "cpu_avx512"),
        ({"block_n": 128}, "cpu_avx512"),
        ({"num_threads": 3}, "cpu_baseline"),
    ],
    ids=str,
)
def test_who_ignores_choices(fields: dict[str, Any], chosen: str) -> None:
    assert capi.add_tuned(AVX512, cpu(), b"cpu_baseline") == OK
    assert planned(cpu(**fields)) == (chosen, int(chosen == "cpu_baseline"))


@needs_x86
def test_candidates_do_not_know_what_is_tuned() -> None:
    before = kernels_of(capi.candidates(cpu(), AVX512)[1])
    assert capi.add_tuned(AVX512, cpu(), b"cpu_baseline") == OK
    assert kernels_of(capi.candidates(cpu(), AVX512)[1]) == before


@needs_x86
def test_a_choice_that_does_not_run_here() -> None:
    """By the same name, on a CPU without these instructions."""
    lesser = capi.cpu_device(1)
    assert capi.add_tuned(lesser, cpu(), b"cpu_avx512") == OK
    assert planned(cpu(), lesser) == ("cpu_avx2", 0)


@needs_hopper_build
@pytest.mark.parametrize(
    "field,value",
    [("name", b"another GPU"), ("name", b"a GPU by hanD"), ("name", b"x" * 64), ("num_sms", 114), ("isa", 1)],
)
def test_choices_are_of_one_kind_of_device(field: str, value: Any) -> None:
    other = capi.gpu_device(90)
    setattr(other, field, value)
    problem = capi.shapes_only()
    status, plan = capi.plan(capi.shapes_only(kernel=b"portable"), HOPPER)
    assert status == OK
    assert capi.add_tuned(other, problem, name_of(plan).encode()) == OK
    assert planned(problem, HOPPER)[1] == 0
    assert planned(problem, other) == (name_of(plan), 1)
    other.id, other.driver_version, other.l2_bytes = 3, 13010, 1
    assert planned(problem, other) == (name_of(plan), 1), "what makes no other kind of device"


@needs_hopper_build
def test_a_choice_that_serves_most_of_its_class() -> None:
    """Of a class that Hopper's kernels serve, one problem's rows begin at odd addresses, which they cannot read."""
    problem, odd = capi.shapes_only(), capi.shapes_only()
    odd.query.data = 0x10008
    assert capi.shape_class(problem) == capi.shape_class(odd)
    status, plan = capi.plan(problem, HOPPER)
    assert capi.add_tuned(HOPPER, problem, name_of(plan).encode()) == OK
    assert planned(problem, HOPPER) == (name_of(plan), 1)
    status, plan = capi.plan(odd, HOPPER)
    assert (status, plan.tuned, plan.slow) == (OK, 0, 1)
    assert name_of(plan).startswith("portable_float16_d64_any")


@needs_hopper_build
def test_what_was_measured_to_be_best_is_not_slow() -> None:
    problem = capi.shapes_only()
    portable, _ = planned(capi.shapes_only(kernel=b"portable"), HOPPER)
    assert capi.add_tuned(HOPPER, problem, portable.encode()) == OK
    status, plan = capi.plan(problem, HOPPER)
    assert (status, name_of(plan), plan.slow) == (OK, portable, 0)


@needs_x86
def test_words_for_a_choice() -> None:
    assert capi.add_tuned(AVX512, cpu(), b"cpu_avx2") == OK
    buffer = ctypes.create_string_buffer(512)
    describe = capi.library().fc_plan_describe
    describe(ctypes.byref(cpu()), ctypes.byref(AVX512), None, buffer, 512)
    assert b"chosen because it was measured to be the fastest here (flashcore.autotune)" in buffer.value
    describe(ctypes.byref(cpu(flags=capi.DETERMINISTIC)), ctypes.byref(AVX512), None, buffer, 512)
    assert b"it is the first that serves" in buffer.value


@pytest.mark.parametrize("name,word", [(b"cpu_avx1024", "'cpu_avx1024'"), (None, "''"), (b"cpu", "'cpu'")])
def test_choices_that_do_not_exist(name: bytes | None, word: str) -> None:
    assert capi.library().fc_tuned_add(ctypes.byref(AVX512), 1, name) == INVALID
    assert f"no kernel {word}" in capi.last_error()


def test_choices_for_no_device() -> None:
    add = capi.library().fc_tuned_add
    none, small = capi.cpu_device(), capi.cpu_device()
    none.type, small.struct_size = 0, 8
    for device in (ctypes.byref(none), ctypes.byref(small), None):
        assert add(device, 1, b"cpu_baseline") == INVALID
        assert "fc_device" in capi.last_error()


def test_a_full_table_says_so_and_keeps_what_it_has() -> None:
    add = capi.library().fc_tuned_add
    kept = []
    for number in range(1, 10_000):
        status = add(ctypes.byref(AVX512), number, b"cpu_baseline")
        if status != OK:
            break
        kept.append(number)
    assert status == OUT_OF_MEMORY
    assert "full" in capi.last_error()
    assert len(kept) > 2000
    for number in kept:
        assert add(ctypes.byref(AVX512), number, b"cpu_baseline") == OK, "what is there can be replaced"
    capi.library().fc_tuned_clear()
    assert add(ctypes.byref(AVX512), 10_000, b"cpu_baseline") == OK


@needs_x86
def test_a_thousand_choices_are_told_apart() -> None:
    """So many share slots."""
    problems = [cpu(seqlen_q=2**m, seqlen_k=2**n, batch=2**b) for m in range(10) for n in range(10) for b in range(10)]
    names = [f"cpu_{('avx2', 'baseline')[i * i % 3 == 1]}" for i in range(len(problems))]
    for problem, name in zip(problems, names, strict=True):
        assert capi.add_tuned(AVX512, problem, name.encode()) == OK
    assert [planned(problem) for problem in problems] == [(name, 1) for name in names]
    assert planned(cpu(seqlen_q=3)) == ("cpu_avx512", 0)


@needs_x86
def test_planning_while_others_tune() -> None:
    """ctypes lets go of the GIL, so the threads truly run at once."""
    problems = [cpu(seqlen_q=2**n) for n in range(1, 20)]
    seen: set[tuple[str, int]] = set()
    stop = threading.Event()

    def tune(kernel: bytes) -> None:
        while not stop.is_set():
            for problem in problems:
                assert capi.add_tuned(AVX512, problem, kernel) == OK

    def plan() -> None:
        while not stop.is_set():
            seen.update(planned(problem) for problem in problems)

    threads = [threading.Thread(target=tune, args=(name,)) for name in (b"cpu_avx2", b"cpu_baseline")]
    threads += [threading.Thread(target=plan) for _ in range(2)]
    for thread in threads:
        thread.start()
    stop.wait(0.3)
    stop.set()
    for thread in threads:
        thread.join()
    assert seen <= {("cpu_avx512", 0), ("cpu_avx2", 1), ("cpu_baseline", 1)}
    assert {planned(problem)[1] for problem in problems} == {1}


# Measuring


def arrays() -> tuple[Problem, Any]:
    rng = np.random.default_rng(42)
    q, k, v = (rng.standard_normal((1, 2, 100, 32)).astype(np.float32) for _ in range(3))
    out = np.full_like(q, np.nan)
    return capi.problem(q, k, v, out), (q, k, v, out)


def measure(problem: Problem, num_calls: int) -> tuple[int, float]:
    result = ctypes.c_double(-1.0)
    status = capi.library().fc_attention_measure(ctypes.byref(problem), None, 0, None, num_calls, ctypes.byref(result))
    return status, result.value


def test_measuring_computes_too() -> None:
    problem, (q, k, v, out) = arrays()
    status, us = measure(problem, 20)
    assert status == OK
    assert 0.1 < us < 1e5
    assert np.array_equal(out, flashcore.attention(q, k, v))


def test_measuring_is_per_call() -> None:
    problem, _keep = arrays()
    fastest = {calls: min(measure(problem, calls)[1] for _ in range(50)) for calls in (2, 40)}  # both soon over
    assert 0.2 < fastest[2] / fastest[40] < 5


@pytest.mark.parametrize("num_calls", [-1, 0, 10_001])
def test_calls_that_cannot_be_measured(num_calls: int) -> None:
    problem, _keep = arrays()
    assert measure(problem, num_calls) == (INVALID, -1.0)
    assert "allowed: 1 to 10000" in capi.last_error()


def test_measuring_what_is_wrong() -> None:
    problem, _keep = arrays()
    problem.head_dim = 0
    assert measure(problem, 1) == (INVALID, -1.0)
    problem, _keep = arrays()
    problem.device_type = 9
    assert measure(problem, 1)[0] == INVALID
    assert capi.library().fc_attention_measure(ctypes.byref(problem), None, 0, None, 1, None) == INVALID
    assert capi.library().fc_attention_measure(None, None, 0, None, 1, ctypes.byref(ctypes.c_double())) == INVALID


def test_the_revision_is_a_digest() -> None:
    revision = capi.library().fc_revision().decode()
    assert len(revision) == 12
    assert int(revision, 16) >= 0
