from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model import attention
from model.sit import SiT, SiTConfig, finer, patchify, sincos_2d, unpatchify
from tests import tiny

CONDITIONING = ("in_context", "cross_attention", "modulation")
KINDS = [(kind, shared) for kind in CONDITIONING for shared in (True, False)]


def awake(**changes):
    """A SiT whose zero-initialised maps have values, so that everything can matter."""
    torch.manual_seed(0)
    sit = SiT(tiny.sit_config(condition_width=32, **changes))
    with torch.no_grad():
        for parameter in sit.parameters():
            if parameter.abs().sum() == 0:
                parameter.normal_(std=0.1)
    return sit


def inputs(batch=3, tokens=5):
    random = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch, 4, 8, 8, generator=random)
    return x_t, torch.rand(batch, generator=random), torch.randn(batch, tokens, 32, generator=random)


@pytest.mark.parametrize(("kind", "shared"), KINDS)
def test_a_fresh_sit_predicts_zero_and_then_learns(kind, shared):
    sit = SiT(tiny.sit_config(condition_width=32, conditioning=kind, shared_modulation=shared))
    x_t, t, condition = inputs()
    assert (sit(x_t, t, condition).prediction == 0).all()
    optimizer = torch.optim.Adam(sit.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(sit(x_t, t, condition).prediction, x_t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(parameter.grad is not None for parameter in sit.parameters())


@pytest.mark.parametrize(("kind", "shared"), KINDS)
def test_rows_do_not_meet(kind, shared):
    sit, (x_t, t, condition) = awake(conditioning=kind, shared_modulation=shared), inputs()
    together = sit(x_t, t, condition).prediction
    for row in range(3):
        alone = sit(x_t[row : row + 1], t[row : row + 1], condition[row : row + 1]).prediction
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", CONDITIONING)
def test_time_and_conditioning_matter(kind):
    sit, (x_t, t, condition) = awake(conditioning=kind), inputs()
    out = sit(x_t, t, condition).prediction
    assert (sit(x_t, t + 0.1, condition).prediction - out).abs().max() > 1e-3
    assert (sit(x_t, t, condition.flip(0)).prediction - out).abs().max() > 1e-3


def test_the_hidden_tap_is_what_the_rest_starts_from():
    sit, (x_t, t, condition) = awake(), inputs()
    plain, tapped = sit(x_t, t, condition), sit(x_t, t, condition, hidden_at=sit.config.align_depth)
    assert plain.hidden is None
    assert torch.equal(plain.prediction, tapped.prediction)
    assert tapped.hidden is not None
    assert tapped.hidden.shape == (3, 16, 32)
    seen = []
    sit.blocks[0].register_forward_hook(lambda module, given, out: seen.append(out[:, -16:]))
    sit(x_t, t, condition)
    assert torch.equal(tapped.hidden, seen[0])


def test_checkpointed_gradients_are_the_same():
    gradients = []
    for activation_checkpointing in (False, True):
        sit = awake(activation_checkpointing=activation_checkpointing)
        sit(*inputs()).prediction.square().sum().backward()
        gradients.append([parameter.grad for parameter in sit.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_written_out_attention_equals_the_fused_kernel():
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    mask = torch.rand(2, 1, 1, 9) > 0.3
    mask[..., 0] = True
    written = attention.attend(q, k, v, mask)
    with attention.fused():
        torch.testing.assert_close(written, attention.attend(q, k, v, mask), atol=1e-6, rtol=1e-5)


def test_runs_in_bfloat16_and_predicts_float32():
    sit = awake()
    full = sit(*inputs()).prediction
    with torch.autocast("cpu", torch.bfloat16):
        half = sit(*inputs()).prediction
    whole = awake().bfloat16()(*inputs()).prediction
    assert half.dtype == whole.dtype == torch.float32
    assert (half - full).abs().max() < 0.05 * full.abs().max()
    assert (whole - full).abs().max() < 0.1 * full.abs().max()


def test_patches_return_to_their_places():
    x = torch.randn(2, 4, 8, 6)
    assert patchify(x, 2).shape == (2, 12, 16)
    assert torch.equal(unpatchify(patchify(x, 2), 2, x.shape), x)
    assert torch.equal(patchify(x, 2)[0, 1].reshape(4, 2, 2), x[0, :, 0:2, 2:4])


def test_positions_are_distinct_and_nearer_places_more_alike():
    position = sincos_2d(32, (8, 8), 8)
    likeness = (position @ position.T)[0].reshape(8, 8)
    assert likeness[0, 0] > likeness[0, 1] > likeness[0, 2]
    assert likeness[0, 1] == pytest.approx(float(likeness[1, 0]))
    assert len({tuple(row) for row in position.tolist()}) == 64


@pytest.mark.parametrize("qk_norm", [False, True])
def test_block_has_the_published_size(qk_norm):
    """adaLN-Zero blocks of DiT-XL: 18 D^2 + 15 D with biases; two qk norms of D / heads are ours."""
    shape: dict[str, Any] = dict(width=1152, depth=1, heads=16, shared_modulation=False, align_depth=1)
    with torch.device("meta"):
        sit = SiT(SiTConfig(4, 32, 2, qk_norm=qk_norm, **shape))
    count = sum(parameter.numel() for parameter in sit.blocks.parameters())
    assert count == 18 * 1152**2 + 15 * 1152 + 2 * 72 * qk_norm


def test_positions_of_another_grid_have_the_same_middle():
    """A wide picture goes on to the left and right of the square; its middle columns stand where the square's do."""
    square, wide = sincos_2d(32, (4, 4), 4).reshape(4, 4, 32), sincos_2d(32, (4, 8), 4).reshape(4, 8, 32)
    assert torch.equal(wide[:, 2:6], square)
    tall = sincos_2d(32, (8, 2), 4).reshape(8, 2, 32)
    assert torch.equal(tall[2:6], square[:, 1:3])


@pytest.mark.parametrize("kind", CONDITIONING)
def test_grids_of_any_shape(kind):
    """The middle of a wide picture is what a square is, but for what its tokens see besides."""
    sit, (_, t, condition) = awake(conditioning=kind), inputs()
    wide = torch.randn(3, 4, 8, 12)
    assert sit(wide, t, condition).prediction.shape == wide.shape
    embedded = sit.embed(patchify(wide, 2)) + sit._positions(wide)
    square = sit.embed(patchify(wide[..., 2:10], 2)) + sit.position
    torch.testing.assert_close(embedded.reshape(3, 4, 6, 32)[:, :, 1:5].flatten(1, 2), square)


def test_stored_positions_are_kept_and_do_not_stretch():
    sit, (_, t, condition) = awake(positions="stored"), inputs()
    assert "position" in sit.state_dict()
    assert all(name != "position" for name, _ in sit.named_parameters())
    with pytest.raises(ValueError, match="draws 4 x 4 tokens, not 4 x 6"):
        sit(torch.randn(3, 4, 8, 12), t, condition)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"patch": 3}, "patch"),
        ({"heads": 5}, "heads"),
        ({"align_depth": 9}, "align_depth"),
        ({"conditioning": "modulation"}, "condition_width"),
    ],
)
def test_impossible_shapes_are_refused(change, name):
    with pytest.raises(ValueError, match=f"sit.{name}"):
        SiT(tiny.sit_config(**change))


def test_a_finer_sit_says_of_an_even_latent_what_the_coarse_one_says():
    """Where all parts of a large patch are alike, weights included, four small ones are the large one four times."""
    coarse = awake(patch=4, conditioning="cross_attention")
    parts = (4, 2, 2, 2, 2)  # channels, then (which small patch, row in it), (which, column)
    with torch.no_grad():
        for weight, axis in ((coarse.embed.weight, 1), (coarse.unembed.weight, 0), (coarse.unembed.bias, 0)):
            by_part = weight.unflatten(axis, parts)
            which = (axis + 1, axis + 3)
            weight.copy_(by_part.mean(which, keepdim=True).expand_as(by_part).reshape(weight.shape))
    fine = finer(coarse, replace(coarse.config, patch=2, spacing=0.5))
    with torch.no_grad():
        coarse.embed.weight /= 2  # it sums four times the values, and the fine one starts with twice the weight
        coarse.get_buffer("position").zero_()
        fine.get_buffer("position").zero_()
    flat = torch.randn(1, 4, 1, 1).expand(1, 4, 8, 8)
    rest = (torch.tensor([0.5]), torch.randn(1, 5, 32))
    torch.testing.assert_close(fine(flat, *rest).prediction, coarse(flat, *rest).prediction)


def test_half_the_spacing_keeps_places():
    """A large patch lies in the middle of its four small ones, at what their positions turn around."""
    coarse, fine = (sincos_2d(32, (4, 4), 4).reshape(4, 4, 32), sincos_2d(32, (8, 8), 8, 0.5).reshape(8, 8, 32))
    torch.testing.assert_close(sincos_2d(32, (4, 4), 4, 1.0), sincos_2d(32, (4, 4), 4))
    likeness = torch.einsum("ijd,hwd->ijhw", coarse, fine)  # of each large patch to each small one
    for row, column in ((0, 0), (1, 2), (3, 3)):
        nearest = likeness[row, column].flatten().topk(4).indices
        assert {divmod(int(n), 8) for n in nearest} == {(2 * row + a, 2 * column + b) for a in (0, 1) for b in (0, 1)}


def test_a_finer_sit_of_another_width_is_refused():
    sit = awake(patch=4)
    assert finer(sit, sit.config) is sit
    with pytest.raises(ValueError, match="only a patch that divides 4"):
        finer(sit, replace(sit.config, patch=2, depth=1))
    with pytest.raises(ValueError, match="only a patch that divides 4"):
        finer(sit, replace(sit.config, patch=8))
