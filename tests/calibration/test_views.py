"""Views of calibration images."""
import torch

from calibration.views import view_of


def test_views_follow_from_the_seed_alone():
    images, state = torch.randn(6, 3, 32, 32), torch.get_rng_state()
    one, other = view_of(images, 1), view_of(images, 2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(view_of(images, 1), one) and not torch.equal(one, other)
    assert one.shape == images.shape


def test_a_view_shows_half_of_the_image_or_more():
    """Coordinates as pixels: the corners of a view say which part it shows, and whether it is mirrored."""
    rows, columns = torch.meshgrid(torch.arange(64.), torch.arange(64.), indexing='ij')
    mirrored = 0
    for seed in range(40):
        (tall, wide), = view_of(torch.stack([rows, columns])[None], seed)
        height, width = tall[-1, 0] - tall[0, 0], wide[0, -1] - wide[0, 0]
        mirrored += bool(width < 0)
        assert 0.45 < height * width.abs() / 63 ** 2 <= 1 and 0.7 < height / width.abs() < 1.4
    assert 8 < mirrored < 32
