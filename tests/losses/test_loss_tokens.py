"""The shift, the mask and the log-probabilities."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hf_unlearn.losses import sequence_log_probs, shift, token_log_probs


def test_shift_pairs_every_position_with_the_next_label() -> None:
    logits = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    labels = torch.tensor([[-100, 2, 1, -100], [0, -100, -100, 1]])
    shifted, targets, mask = shift(logits, labels)
    assert torch.equal(shifted, logits[:, :3])
    assert torch.equal(targets, torch.tensor([[2, 1, 0], [0, 0, 1]]))
    assert torch.equal(mask, torch.tensor([[True, True, False], [False, False, True]]))


def test_log_probs_equal_a_log_softmax_of_the_whole_batch() -> None:
    logits = torch.randn(3, 6, 8, dtype=torch.float64)
    labels = torch.randint(8, (3, 6))
    labels[0, :4], labels[1] = -100, -100
    logp, mask = token_log_probs(logits, labels)
    full = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = torch.where(labels[:, 1:] != -100, full, 0.0)
    torch.testing.assert_close(logp, expected)
    sums, counts = sequence_log_probs(logits, labels)
    torch.testing.assert_close(sums, expected.sum(-1))
    assert counts.tolist() == [2, 0, 5]
    assert torch.equal(mask.sum(-1), counts)


def test_log_probs_of_half_logits_are_float32() -> None:
    logits = 4 * torch.randn(1, 5, 300)
    labels = torch.tensor([[-100, 3, 7, 299, 0]])
    logp, _ = token_log_probs(logits.bfloat16(), labels)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, token_log_probs(logits.bfloat16().float(), labels)[0])


def test_a_length_of_one_predicts_nothing() -> None:
    sums, counts = sequence_log_probs(torch.randn(2, 1, 4), torch.zeros(2, 1, dtype=torch.long))
    assert sums.tolist() == [0, 0]
    assert counts.tolist() == [0, 0]


def test_one_gradient_of_the_size_of_the_logits_reaches_the_model() -> None:
    """Response positions are gathered first: no other (B, T, V) tensor is kept for the backward pass."""
    logits = torch.randn(2, 50, 64, requires_grad=True)
    labels = torch.full((2, 50), -100)
    labels[:, -3:] = 1
    saved: list[int] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        token_log_probs(logits, labels)
    assert max(saved) <= 6 * 64


@pytest.mark.parametrize(
    "labels", [torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 4, 1)], ids=["short", "1d", "3d"]
)
def test_shapes_that_do_not_fit_are_refused(labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="without shifting"):
        shift(torch.zeros(2, 4, 5), labels.long())


def test_importing_the_losses_needs_torch_only() -> None:
    code = "import sys, hf_unlearn.losses; print([m for m in ('transformers', 'trl', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
