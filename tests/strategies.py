"""What hypothesis draws from: problems over the whole argument space."""

from __future__ import annotations

from typing import Any

import cases
from cases import Case
from hypothesis import strategies as st

# Most tiles' edges are within a few of these; hypothesis picks the offset.
LENGTHS = st.one_of(
    st.integers(0, 20), st.builds(lambda tile, by: tile + by, st.sampled_from((32, 64, 128)), st.integers(-2, 2))
)
HEAD_DIMS = st.one_of(st.integers(1, 256), st.sampled_from((32, 64, 128)))
EDGE = st.one_of(st.none(), st.just(-1), st.integers(0, 150), st.just(2**62))


def draw_band(draw: st.DrawFn, one_in: int, edge: st.SearchStrategy[Any], reach: int) -> dict[str, Any]:
    """Options of which keys are visible, and scale, each in one of so many draws; diagonals up to `reach` away."""
    options: dict[str, Any] = {}

    def maybe(name: str, values: st.SearchStrategy[Any]) -> None:
        maybe_draw(draw, options, one_in, name, values)

    maybe("is_causal", st.sampled_from((True, "lower_right")))
    maybe("window", st.tuples(edge, edge))
    if options.get("is_causal") != "lower_right":
        maybe("diagonal", st.one_of(st.just("lower_right"), st.integers(-reach, reach)))
    maybe("scale", st.floats(-2, 2, width=32))
    return options


def maybe_draw(
    draw: st.DrawFn, options: dict[str, Any], one_in: int, name: str, values: st.SearchStrategy[Any]
) -> None:
    if draw(st.integers(0, one_in - 1)) == 0:
        options[name] = draw(values)


@st.composite
def problems(draw: st.DrawFn) -> Case:
    num_heads_kv = draw(st.integers(1, 3))
    options = draw_band(draw, 4, EDGE, 150)
    maybe_draw(draw, options, 4, "softcap", st.floats(0.5, 50, width=32))
    maybe_draw(draw, options, 4, "layout", st.just("bshd"))
    strides = st.sampled_from(list(cases.STRIDES))
    return Case(
        name=f"property_{draw(st.integers(0, 2**32))}",
        batch=draw(st.integers(0, 3)),
        num_heads_q=num_heads_kv * draw(st.integers(1, 4)),
        num_heads_kv=num_heads_kv,
        seqlen_q=draw(LENGTHS),
        seqlen_k=draw(LENGTHS),
        head_dim=draw(HEAD_DIMS),
        head_dim_v=draw(HEAD_DIMS),
        mask=draw(st.sampled_from(["", "", "", *cases.MASKS])),
        alibi=draw(st.booleans()),
        sinks=draw(st.booleans()),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.3))),
        small_float32=draw(st.booleans()),
        options=options,
        strides_q=draw(strides),
        strides_kv=draw(strides),
    )
