"""
timers.py - how time is taken. All contenders of a row are timed in turn (A B C A B C ...), because a card that
throttles makes whoever comes second look slower; every figure is a list of samples, for a median.

Device time is that of a CUDA graph of many calls over rotating input sets: no host, no warm cache; of whole models,
that of one call which the host has queued before the device begins. Host time is the time until the call returns.
CPU time is wall time.
"""

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

Call = Callable[[], Any]
Scope = Callable[[], contextlib.AbstractContextManager]

CLOCKS_PER_US = 2_000  # no GPU's is higher by now; a slower one waits longer
# GPU clocks to wait before a queue of work, so that the host is ahead of the GPU from its first item on: about 0.5 ms,
# where the host needs some 10 us per launch.
HEAD_START_CLOCKS = 500 * CLOCKS_PER_US


@dataclasses.dataclass(frozen=True)
class Effort:
    rounds: int  # turns of every contender
    sample_us: float  # one sample should take about this long
    row_us: float  # all samples of a row; slow rows get fewer rounds

    def rounds_for(self, round_us: float) -> int:
        return max(min(5, self.rounds), min(self.rounds, int(self.row_us / round_us)))


FULL = Effort(rounds=31, sample_us=2_000, row_us=2_000_000)
QUICK = Effort(rounds=5, sample_us=500, row_us=200_000)


@dataclasses.dataclass(frozen=True)
class Graph:
    """A captured sequence of calls. It keeps what it reads and writes alive."""

    graph: Any
    calls: int
    keep: Any


def capture(calls: Sequence[Call], repeats: int, scope: Scope = contextlib.nullcontext) -> Graph:
    """One CUDA graph of all calls, `repeats` times over. The last len(calls) results stay alive, so that
    results rotate over as many buffers as the inputs do."""
    import torch

    with scope():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what a first call sets up does not belong in a capture
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        results: collections.deque = collections.deque(maxlen=len(calls))
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                for call in calls:
                    results.append(call())
    return Graph(graph, repeats * len(calls), (calls, results))


def replay_in_turn(graphs: dict[str, Graph], rounds: int) -> dict[str, list[float]]:
    """Microseconds per call, one sample per round and graph."""
    import torch

    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for round_index in range(rounds + 1):
        torch.cuda._sleep(HEAD_START_CLOCKS)
        events = {}
        for name, item in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            item.graph.replay()
            end.record()
            events[name] = start, end
        torch.cuda.synchronize()
        if round_index == 0:
            continue  # the first round brings the clocks up
        for name, (start, end) in events.items():
            samples[name].append(start.elapsed_time(end) * 1e3 / graphs[name].calls)
    return samples


def device_times(calls: dict[str, tuple[Sequence[Call], Scope]], effort: Effort) -> dict[str, list[float]]:
    """Device microseconds per call of several contenders, each given as one call per input set and a scope."""
    graphs = {}
    round_us = 0.0
    for name, (sets, scope) in calls.items():
        once = capture(sets, 1, scope)
        pass_us = min(replay_in_turn({name: once}, 2)[name]) * once.calls
        repeats = max(1, round(effort.sample_us / pass_us))
        if repeats > 1:
            once = None  # gives its memory back first
            once = capture(sets, repeats, scope)
        graphs[name] = once
        round_us += repeats * pass_us
    return replay_in_turn(graphs, effort.rounds_for(round_us))


def single_call_times(calls: dict[str, tuple[Sequence[Call], Scope]], samples: int) -> dict[str, list[float]]:
    """Device microseconds of graphs of one call each, in batches in turn: for percentiles. The launch of a graph and
    the two events are inside, the same for all."""
    import torch

    # The host takes up to 40 us for a graph and its two events. Where it falls behind the GPU, the wait for it counts
    # as a graph's time, and one such batch in a hundred is the P99.
    batch, head_start = 10, 4 * HEAD_START_CLOCKS
    graphs = {name: [capture([call], 1, scope) for call in sets] for name, (sets, scope) in calls.items()}
    result: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(-(-samples // batch)):
        for name, items in graphs.items():
            torch.cuda._sleep(head_start)
            events = []
            for item in itertools.islice(itertools.cycle(items), batch):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                item.graph.replay()
                end.record()
                events.append((start, end))
            torch.cuda.synchronize()
            result[name] += [start.elapsed_time(end) * 1e3 for start, end in events]
    return {name: times[:samples] for name, times in result.items()}


def host_times(calls: dict[str, tuple[Call, Scope]], bursts: int, burst: int = 20) -> dict[str, list[float]]:
    """Host microseconds until a call returns: bursts of calls, each after a synchronization, so that the GPU's queue
    never pushes back."""
    import torch

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    result: dict[str, list[float]] = {name: [] for name in calls}
    for burst_index in range(bursts + 3):
        for name, (call, scope) in calls.items():
            with scope():
                synchronize()
                begin = time.perf_counter_ns()
                for _ in range(burst):
                    call()
                elapsed = time.perf_counter_ns() - begin
            if burst_index >= 3:  # the first bursts warm up
                result[name].append(elapsed / burst / 1e3)
    return result


def in_turn(calls: dict[str, tuple[Call, Scope]], rounds: int, sample: Callable[[str, Call], float]) -> dict:
    """What `sample` gives for each contender, once a round."""
    result: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call, scope) in calls.items():
            with scope():
                result[name].append(sample(name, call))
    return result


def called_times(calls: dict[str, tuple[Call, Scope]], effort: Effort) -> dict[str, list[float]]:
    """Microseconds from a call to the GPU's end of it, the GPU idle before: what a caller waits for the result."""
    import torch

    def sample(name, call):
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        call()
        torch.cuda.synchronize()
        return (time.perf_counter_ns() - begin) / 1e3

    round_us = sum(samples[-1] for samples in in_turn(calls, 2, sample).values())  # the first warms up
    return in_turn(calls, effort.rounds_for(round_us), sample)


def queued_times(calls: dict[str, tuple[Call, Scope]], effort: Effort) -> dict[str, list[float]]:
    """Device microseconds of calls that launch many kernels and cannot be captured as they are, a model's say. Each
    waits on the device until the host, which takes longer than most of its kernels, has queued it."""
    import torch

    host_us = dict.fromkeys(calls, 0.0)

    def sample(name, call):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START_CLOCKS + int(1.5 * host_us[name] * CLOCKS_PER_US))
        begin = time.perf_counter_ns()
        start.record()
        call()
        end.record()
        host_us[name] = (time.perf_counter_ns() - begin) / 1e3
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3

    round_us = sum(samples[-1] for samples in in_turn(calls, 3, sample).values())  # the first ones learn host_us
    return in_turn(calls, effort.rounds_for(round_us + 2.5 * sum(host_us.values())), sample)


def wall_times(calls: dict[str, tuple[Call, Scope]], effort: Effort) -> dict[str, list[float]]:
    """CPU microseconds per call. Before each turn a pause lets the previous contender's threads go to sleep: an OpenMP
    thread spins for some milliseconds when it has no work, on a core that the next contender needs. An untimed call
    then wakes this contender's own."""
    pause_s = 0.020

    def sample(call, count):
        time.sleep(pause_s)
        call()
        begin = time.perf_counter_ns()
        for _ in range(count):
            call()
        return (time.perf_counter_ns() - begin) / count / 1e3

    counts = {}
    round_us = 0.0
    for name, (call, scope) in calls.items():
        with scope():
            once_us = min(sample(call, 1) for _ in range(2))
        counts[name] = max(1, round(effort.sample_us / once_us))
        round_us += once_us * (counts[name] + 1) + pause_s * 1e6
    result: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(effort.rounds_for(round_us)):
        for name, (call, scope) in calls.items():
            with scope():
                result[name].append(sample(call, counts[name]))
    return result


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that at least `percent` of all do not exceed (nearest rank)."""
    ordered = sorted(samples)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]
