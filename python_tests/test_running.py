"""Ways to run a model: each computes the same, or says why it cannot be had."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_vit

from diffrate_ext import running
from diffrate_ext.running import captured, compiled, in_way, summary

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.compiler.reset()
    return tiny_vit().eval()


@pytest.mark.parametrize("way", ["eager", "compiled"])
@torch.inference_mode()
def test_the_model_and_its_compiled_form_compute_the_same(way, model):
    call, reason = in_way(way, model, IMAGES)
    assert reason is None
    torch.testing.assert_close(call(IMAGES), model(IMAGES))


def test_what_cannot_be_compiled_says_why():
    def prints(x):
        print("a break in the graph")
        return 2 * x

    torch.compiler.reset()
    call, reason = compiled(prints, (torch.ones(2),))
    assert call is None
    assert reason.startswith("Unsupported: ")


def test_there_are_no_graphs_on_a_cpu(model):
    if torch.cuda.is_available():
        pytest.skip("a GPU")
    assert captured(lambda: None) == (None, "no GPU")
    assert in_way("graph", model, IMAGES) == (None, "no GPU")


def test_a_graph_reads_each_call_from_where_it_was_captured(model, monkeypatch):
    """In place of a graph: what repeats the call that was captured."""
    monkeypatch.setattr(running, "captured", lambda call: (call, None))
    images = IMAGES.clone()
    call, _ = in_way("graph", model, images)
    other = IMAGES.flip(0)
    with torch.inference_mode():
        torch.testing.assert_close(call(other), model(other))
        assert torch.equal(images, IMAGES)


def test_a_cuda_graph_computes_the_same(model):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    model, images = model.cuda(), IMAGES.cuda()
    with torch.inference_mode():
        call, reason = in_way("graph", model, images)
        assert reason is None
        for one in (images, images.flip(0)):
            torch.testing.assert_close(call(one).clone(), model(one))


def test_summaries_are_short():
    assert summary(ValueError("one\ntwo")) == "ValueError: one"
    assert summary(ValueError()) == "ValueError"
    assert len(summary(ValueError("x" * 1000))) < 250
