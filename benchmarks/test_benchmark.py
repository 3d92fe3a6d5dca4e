"""
test_benchmark.py - flashcore.attention beside PyTorch's SDPA under pytest-benchmark, for its history and comparisons:

    pytest benchmarks/test_benchmark.py --benchmark-autosave --benchmark-compare

Wall time, the GPU synchronized inside; for device time and verdicts use the questions beside this file.
"""

import contenders as who
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pytest_benchmark")
pytest.importorskip("flashcore", exc_type=ImportError)

PROBLEMS = {
    "cpu": [
        who.Problem(1, 8, 16, 64, False, "float32"),
        who.Problem(1, 8, 512, 64, False, "float32"),
        who.Problem(1, 8, 512, 64, True, "float32"),
        who.Problem(1, 8, 512, 64, True, "bfloat16"),
    ],
    "cuda": [
        who.Problem(1, 8, 128, 64),
        who.Problem(8, 16, 2_048, 128, False),
        who.Problem(8, 16, 2_048, 128, True),
    ],
}


@pytest.mark.parametrize("contender", [who.sdpa("sdpa", None), who.flashcore()], ids=lambda contender: contender.name)
@pytest.mark.parametrize(
    ("device", "problem"),
    [(device, problem) for device, problems in PROBLEMS.items() for problem in problems],
    ids=lambda value: value if isinstance(value, str) else value.name.replace(" ", "-"),
)
def test_attention(benchmark, device, problem, contender):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU that PyTorch can use")
    call = contender.prepare(problem.make(device, 1)[0])

    def run():
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.group = f"{device} {problem.name}"
    assert benchmark(run).shape == (problem.batch, problem.num_heads_q, problem.seqlen, problem.head_dim)
