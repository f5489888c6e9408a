import pytest
import torch
from torch import Tensor

from sample.guidance import Branch, guided, rescaled
from sample.settings import Guidance

X, T = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5] * 3)
NULL, IMAGE, FULL = (torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(i)) for i in (1, 2, 3))


class Model:
    """A prediction that depends on all it is given; remembers the batch sizes of its calls."""

    def __init__(self):
        self.calls: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        assert x.shape[0] == t.shape[0] == condition.shape[0]
        self.calls.append(len(x))
        return x * condition.mean((1, 2)).reshape(-1, 1, 1, 1) + t.reshape(-1, 1, 1, 1)


def branches(guidance: Guidance, with_images: bool) -> list[Branch]:
    weights = guidance.weights(with_images)
    return [Branch(w, c) for w, c in zip(weights, (NULL, IMAGE, FULL), strict=True)]


def run(guidance: Guidance, with_images: bool = False, t: Tensor = T) -> tuple[Tensor, list[int]]:
    model = Model()
    return guided(model, branches(guidance, with_images), guidance)(X, t), model.calls


def test_text_guidance_is_its_equation():
    null, full = Model()(X, T, NULL), Model()(X, T, FULL)
    prediction, calls = run(Guidance(text=3.0))
    assert torch.allclose(prediction, null + 3.0 * (full - null), atol=1e-6)
    assert calls == [6]


def test_scale_one_skips_the_null_branch():
    prediction, calls = run(Guidance(text=1.0))
    assert torch.equal(prediction, Model()(X, T, FULL))
    assert calls == [3]


def test_scale_zero_is_the_null_branch_alone():
    prediction, calls = run(Guidance(text=0.0))
    assert torch.equal(prediction, Model()(X, T, NULL))
    assert calls == [3]


@pytest.mark.parametrize(("text", "image", "rows"), [(3.0, 1.5, 9), (3.0, 1.0, 6), (2.0, 2.0, 6), (1.0, 1.0, 3)])
def test_image_and_text_guidance_is_its_equation_without_idle_branches(text, image, rows):
    u, i, c = (Model()(X, T, condition) for condition in (NULL, IMAGE, FULL))
    prediction, calls = run(Guidance(text=text, image=image), with_images=True)
    assert torch.allclose(prediction, u + image * (i - u) + text * (c - i), atol=1e-5)
    assert calls == [rows]


def test_outside_the_interval_only_the_full_condition_runs():
    guidance = Guidance(text=3.0, start=0.2, end=0.8)
    assert run(guidance)[1] == [6]
    for time in (0.1, 0.9):
        t = torch.full((3,), time)
        prediction, calls = run(guidance, t=t)
        assert torch.equal(prediction, Model()(X, t, FULL))
        assert calls == [3]


def test_outside_the_interval_the_prompt_alone_decides_at_scale_zero_too():
    guidance = Guidance(text=0.0, start=0.4)
    for time, condition in ((0.5, NULL), (0.1, FULL)):
        t = torch.full((3,), time)
        assert torch.equal(run(guidance, t=t)[0], Model()(X, t, condition))
    with pytest.raises(ValueError, match="rescale has nothing to pull back to at guidance 0"):
        Guidance(text=0.0, rescale=0.5)


def test_rescale_restores_the_deviation():
    wide, narrow = 4 * X, X
    deviations = [rescaled(wide, narrow, share).std((1, 2, 3)) for share in (0.0, 0.5, 1.0)]
    for deviation, factor in zip(deviations, (4.0, 2.5, 1.0), strict=True):
        assert torch.allclose(deviation, factor * X.std((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("fields", [{"start": 0.8, "end": 0.2}, {"end": 1.5}, {"rescale": 2.0}])
def test_impossible_settings_are_refused(fields):
    with pytest.raises(ValueError, match="guidance: "):
        Guidance(**fields)
