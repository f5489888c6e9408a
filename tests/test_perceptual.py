"""How different two pictures look; and the discriminator."""

import pytest
import torch
import torch.nn.functional as F

from model.discriminator import Discriminator, DiscriminatorConfig
from model.perceptual import LPIPS, FeaturesConfig, LPIPSConfig, load_perceptual
from model.targets import TargetConfig
from tests.tiny_repae import dinov2_folder


def pictures(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def lpips_folder(tmp_path_factory):
    """VGG-16 and its weights under the names that torchvision and LPIPS give them, random."""
    folder = tmp_path_factory.mktemp("lpips")
    torch.manual_seed(0)
    trunk = {f"features.{name}": t for name, t in LPIPS().features.state_dict().items()}
    torch.save(trunk | {"classifier.0.weight": torch.zeros(1)}, folder / "vgg16-397923af.pth")
    channels = (64, 128, 256, 512, 512)
    torch.save({f"lin{n}.model.1.weight": torch.rand(1, c, 1, 1) for n, c in enumerate(channels)}, folder / "vgg.pth")
    return folder


def test_lpips_is_its_published_formula(lpips_folder):
    """Zhang et al. 2018, eq. 1, over the five relu layers of VGG-16, for pictures in [-1, 1] scaled once."""
    distance = load_perceptual(LPIPSConfig(str(lpips_folder)))
    trunk, linear = (torch.load(lpips_folder / name) for name in ("vgg16-397923af.pth", "vgg.pth"))
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = pictures(1), pictures(2)
    x, expected = torch.cat([a, b]), torch.zeros(2)
    x = (x - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1)
    for stage, layers in enumerate([(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]):
        x = F.max_pool2d(x, 2) if stage else x
        for layer in layers:
            x = F.conv2d(x, trunk[f"features.{layer}.weight"], trunk[f"features.{layer}.bias"], padding=1).relu()
        unit = x / x.norm(dim=1, keepdim=True)
        expected += (linear[f"lin{stage}.model.1.weight"] * (unit[:2] - unit[2:]).square()).sum(1).mean((1, 2))
    torch.testing.assert_close(distance(a, b), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["features", "lpips"])
def test_a_distance_is_zero_between_equals_and_pulls_the_first_alone(kind, lpips_folder, tmp_path):
    config = LPIPSConfig(str(lpips_folder))
    if kind == "features":
        config = FeaturesConfig(TargetConfig(str(dinov2_folder(tmp_path / "dinov2")), dtype="float32"))
    distance = load_perceptual(config)
    a, b = pictures(1).requires_grad_(), pictures(2).requires_grad_()
    torch.testing.assert_close(distance(a, a.detach()), torch.zeros(2), atol=1e-5, rtol=0)
    away = distance(a, b)
    assert (away > 1e-3).all()
    away.sum().backward()
    assert a.grad is not None
    assert b.grad is None


def test_missing_weights_say_what_to_put_where(tmp_path):
    with pytest.raises(ValueError, match=r"perceptual.path .* lacks vgg16-397923af.pth"):
        load_perceptual(LPIPSConfig(str(tmp_path)))


def test_the_discriminator_judges_patches():
    judge = Discriminator(DiscriminatorConfig(width=16, layers=3))
    logits = judge(pictures(1))
    assert logits.shape == (2, 1, 2, 2)
    changed = pictures(1)
    changed[0] = -changed[0]
    torch.testing.assert_close(judge(changed)[1], logits[1])  # group norm: a picture's verdict is its own
    batch = Discriminator(DiscriminatorConfig(width=16, layers=1, norm="batch"))
    assert not torch.allclose(batch(changed)[1], batch(pictures(1))[1])
    with pytest.raises(ValueError, match="multiple of 8"):
        DiscriminatorConfig(width=12)
