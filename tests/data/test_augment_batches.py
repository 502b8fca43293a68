from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from excite.data.augment import Augmentation, ResizedWindows, crop_and_flip, erase, jitter, mix, randaugment, rotate
from excite.data.draws import uniform
from excite.errors import UsageError

RNG = np.random.default_rng(0)


def noise_images(count: int, size: int = 8, channels: int = 3) -> torch.Tensor:
    return torch.from_numpy(RNG.integers(1, 256, (count, channels, size, size), dtype=np.uint8))


def test_crop_and_flip_give_a_window_of_torchvisions_padded_image_and_all_are_equally_likely() -> None:
    count, padding = 6000, 2
    image = noise_images(1)[0]
    batch = image.expand(count, -1, -1, -1).contiguous()
    out = crop_and_flip(batch, Augmentation(crop="pad", padding=padding, flip=0.5), 0, 0, np.arange(count))

    padded = F.pad(image, [padding] * 4)
    windows = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            window = F.crop(padded, top, left, 8, 8)
            windows[window.numpy().tobytes()] = (top, left, 0)
            windows[F.horizontal_flip(window).numpy().tobytes()] = (top, left, 1)
    assert len(windows) == 50
    seen = [windows[one.numpy().tobytes()] for one in out]  # a KeyError is a window that torchvision does not know
    counts = np.unique([top * 100 + left * 10 + flip for top, left, flip in seen], return_counts=True)[1]
    assert len(counts) == 50
    assert stats.chisquare(counts).pvalue > 1e-4


def test_an_image_is_augmented_alike_in_any_batch_and_anew_in_each_epoch() -> None:
    images = noise_images(40)
    choice = Augmentation(crop="pad", flip=0.5)
    whole = crop_and_flip(images, choice, 3, 1, np.arange(40))
    part = np.array([30, 2, 11])
    assert torch.equal(crop_and_flip(images[part], choice, 3, 1, part), whole[part])
    assert not torch.equal(crop_and_flip(images, choice, 3, 2, np.arange(40)), whole)
    assert not torch.equal(crop_and_flip(images, choice, 4, 1, np.arange(40)), whole)


def test_the_input_is_left_as_it_is() -> None:
    images = noise_images(10)
    before = images.clone()
    crop_and_flip(images, Augmentation(flip=1.0), 0, 0, np.arange(10))
    assert torch.equal(images, before)
    assert torch.equal(crop_and_flip(images, Augmentation(), 0, 0, np.arange(10)), before)
    assert torch.equal(crop_and_flip(images, Augmentation(flip=1.0), 0, 0, np.arange(10)), before.flip(-1))


def windows_of(count: int, size: tuple[int, int], choice: Augmentation) -> np.ndarray:
    drawn = ResizedWindows(choice, 0, 0, np.arange(count))
    return np.array([drawn.window(number, *size) for number in range(count)])


def test_resized_windows_are_distributed_as_torchvisions() -> None:
    count, height, width = 4000, 120, 90
    mine = windows_of(count, (height, width), Augmentation(crop="resized"))
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(32)
    image = torch.empty(3, height, width)
    drawn = [transform.make_params([image]) for _ in range(count)]
    theirs = np.array([[one[key] for key in ("top", "left", "height", "width")] for one in drawn])

    assert (mine[:, :2] >= 0).all()
    assert (mine[:, 0] + mine[:, 2] <= height).all()
    assert (mine[:, 1] + mine[:, 3] <= width).all()
    for column in range(4):
        assert stats.ks_2samp(mine[:, column], theirs[:, column]).pvalue > 1e-4
    areas = [windows[:, 2] * windows[:, 3] for windows in (mine, theirs)]
    assert stats.ks_2samp(*areas).pvalue > 1e-4


@pytest.mark.parametrize("size", [(2000, 20), (20, 2000), (1, 1), (3, 2)])
def test_windows_of_extreme_images_are_central_or_fit(size: tuple[int, int]) -> None:
    height, width = size
    windows = windows_of(200, size, Augmentation(crop="resized", min_area=0.5))
    assert (windows[:, 2:] >= 1).all()
    assert (windows[:, :2] >= 0).all()
    assert (windows[:, 0] + windows[:, 2] <= height).all()
    assert (windows[:, 1] + windows[:, 3] <= width).all()
    if max(size) == 2000:  # half of the area never fits at 3/4 … 4/3: the centre is taken, as torchvision does
        assert (windows == windows[0]).all()
        theirs = v2.RandomResizedCrop(32, scale=(0.5, 1)).make_params([torch.empty(3, height, width)])
        assert windows[0].tolist() == [theirs[key] for key in ("top", "left", "height", "width")]


@pytest.mark.parametrize("transform", ["randaugment", "erasing"])
def test_torchvisions_transforms_are_drawn_per_image_and_leave_the_global_generator_alone(transform: str) -> None:
    images, index = noise_images(30, size=16), np.arange(30)
    if transform == "randaugment":
        choice = Augmentation(randaugment=2)

        def apply(x: torch.Tensor, i: np.ndarray, epoch: int = 0) -> torch.Tensor:
            return randaugment(x, choice, 0, epoch, i)
    else:
        images, choice = images.float(), Augmentation(erasing=0.5)

        def apply(x: torch.Tensor, i: np.ndarray, epoch: int = 0) -> torch.Tensor:
            return erase(x, choice, 0, epoch, i)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    whole = apply(images, index)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    part = np.array([20, 4])
    assert torch.equal(apply(images[part], part), whole[part])
    assert not torch.equal(apply(images, index, 1), whole)
    # The same image at another index is drawn anew.
    copies = images[:1].expand(30, -1, -1, -1).contiguous()
    assert len({one.numpy().tobytes() for one in apply(copies, index)}) > 5


def test_erasing_leaves_a_rectangle_of_the_mean_in_the_asked_share_of_images() -> None:
    images = noise_images(400, size=16).float()
    erased = erase(images, Augmentation(erasing=0.3), 0, 0, np.arange(400))
    changed = (erased != images).flatten(1).any(1)
    assert stats.binomtest(int(changed.sum()), 400, 0.3).pvalue > 1e-4
    for one in erased[changed][:20]:
        rows, columns = (one[0] == 0).nonzero(as_tuple=True)
        box = one[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box == 0).all()


def mixed(choice: Augmentation, count: int = 3000, size: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Images of ones blended with images of zeros: what is left of the ones, by pixel and by target."""
    ones, zeros = torch.ones(count, 1, size, size), torch.zeros(count, 1, size, size)
    labels, partner_labels = torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.int64)
    x, y = mix(ones, labels, zeros, partner_labels, 3, choice, 0, 0, np.arange(count))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.sum(1), torch.ones(count))
    assert (y[:, 2] == 0).all()
    return x[:, 0].numpy(), y[:, 0].numpy()


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_blends_every_image_by_its_own_share(alpha: float) -> None:
    x, kept = mixed(Augmentation(mixup=alpha))
    np.testing.assert_allclose(x, np.broadcast_to(kept[:, None, None], x.shape), atol=1e-6)
    assert stats.kstest(kept, stats.beta(alpha, alpha).cdf).pvalue > 1e-4


def test_cutmix_pastes_a_box_and_counts_its_pixels() -> None:
    x, kept = mixed(Augmentation(cutmix=1.0))
    assert set(np.unique(x)) == {0.0, 1.0}
    np.testing.assert_allclose(x.mean((1, 2)), kept, atol=1e-6)
    for one in x[:200]:
        rows, columns = np.nonzero(one == 0)
        if len(rows):
            assert (one[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] == 0).all()
    # What is left is distributed as in torchvision, up to the rounding of the box to whole pixels, which hardly
    # counts in a larger image.
    _, kept = mixed(Augmentation(cutmix=1.0), count=1000, size=96)
    torch.manual_seed(0)
    theirs = v2.CutMix(alpha=1.0, num_classes=2)
    image = torch.zeros(2, 1, 96, 96)
    shares = [float(theirs(image, torch.tensor([0, 1]))[1][0, 0]) for _ in range(1000)]
    assert stats.ks_2samp(kept, shares).statistic < 0.1


def test_with_both_a_coin_decides_for_each_image() -> None:
    x, _ = mixed(Augmentation(mixup=1.0, cutmix=1.0))
    uneven = np.ptp(x.reshape(len(x), -1), axis=1) > 1e-5
    cut = uneven | (x[:, 0, 0] == 1)  # a box may be too small for a pixel
    assert 0.4 < cut.mean() < 0.6


def test_an_image_mixed_with_one_of_its_own_class_keeps_its_class() -> None:
    label = torch.ones(4, dtype=torch.int64)
    _, y = mix(
        torch.ones(4, 1, 4, 4), label, torch.zeros(4, 1, 4, 4), label, 2, Augmentation(mixup=1.0), 0, 0, np.arange(4)
    )
    torch.testing.assert_close(y, torch.tensor([[0.0, 1.0]] * 4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop": "padd"}, "did you mean 'pad'"),
        ({"flip": 1.5}, "flip is 1.5"),
        ({"erasing": -0.1}, "erasing is -0.1"),
        ({"mixup": -1.0}, "mixup is -1.0"),
        ({"cutmix": float("nan")}, "cutmix is nan"),
        ({"padding": -1}, "padding is -1"),
        ({"min_area": 0.0}, "min_area is 0.0"),
        ({"magnitude": 31}, "magnitude is 31"),
        ({"rotate": -10.0}, "rotate is -10.0"),
        ({"rotate": 181.0}, "rotate is 181.0"),
        ({"rotate": float("nan")}, "rotate is nan"),
        ({"jitter": -1}, "jitter is -1"),
        ({"jitter": 256}, "jitter is 256"),
        ({"jitter": 2.5}, "jitter is 2.5"),
    ],
)
def test_bad_choices(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Augmentation(**values)  # type: ignore[arg-type]


def test_quarter_turns_lay_a_square_in_all_eight_ways_and_each_as_often() -> None:
    square = np.arange(9, dtype=np.float32).reshape(1, 3, 3)
    ways = {np.rot90(side, k, (1, 2)).tobytes(): 0 for side in (square, square[..., ::-1]) for k in range(4)}
    assert len(ways) == 8
    count = 4000
    batch = torch.from_numpy(np.repeat(square[None], count, 0))
    for image in crop_and_flip(batch, Augmentation(flip=0.5, quarter_turns=1.0), 0, 0, np.arange(count)).numpy():
        ways[image.tobytes()] += 1  # a KeyError were it none of the eight
    expected = count / 8
    chi_squared = sum((found - expected) ** 2 / expected for found in ways.values())
    assert chi_squared < 24.3  # 0.999 quantile of chi-squared with 7 degrees of freedom


def test_quarter_turns_are_each_images_own_draw_and_for_squares_only() -> None:
    images = torch.rand(40, 2, 5, 5)
    choice = Augmentation(quarter_turns=0.5)
    whole = crop_and_flip(images, choice, 3, 1, np.arange(40))
    part = np.array([7, 3, 39])
    assert torch.equal(crop_and_flip(images[part], choice, 3, 1, part), whole[part])
    same = [torch.equal(one, other) for one, other in zip(images, whole, strict=True)]
    assert 15 <= sum(same) <= 35  # a half is not asked, and a quarter of the others is turned by none: 25 expected
    with pytest.raises(UsageError, match="square images, and these are 4×5"):
        crop_and_flip(images[..., :4, :], choice, 0, 0, np.arange(40))


MEAN = (0.485, 0.456, 0.406)


@pytest.mark.parametrize("shape", [(40, 40), (30, 47)])
def test_an_image_is_rotated_as_torchvision_rotates_it_by_the_same_angle(shape: tuple[int, int]) -> None:
    images = torch.from_numpy(RNG.integers(0, 256, (12, 3, *shape), dtype=np.uint8))
    index = np.arange(12)
    turned = rotate(images, Augmentation(rotate=60), MEAN, 3, 2, index)
    angles = (2 * uniform(3, 2, index, "rotate")[:, 0] - 1) * 60
    fill = [255 * value for value in MEAN]
    for image, mine, angle in zip(images, turned, angles, strict=True):
        # Framed in the bare colour beforehand: at the border torchvision's own fill weighs pixels twice.
        framed = F.pad(image.float(), [50] * 4, fill=fill)
        theirs = F.center_crop(F.rotate(framed, float(angle), InterpolationMode.BILINEAR), list(shape))
        # Theirs before it is rounded to whole numbers: so a half may be off, and the arithmetic by a little.
        assert (mine.float() - theirs).abs().max() < 0.55
    assert turned.dtype == torch.uint8
    assert turned[:, :, 0, 0].unique(dim=0).tolist().count([124, 116, 104]) == 1  # a bare corner


def test_angles_are_uniform_between_both_bounds() -> None:
    # A ramp over the columns, turned: its slope in the middle tells the angle.
    ramp = torch.arange(33).expand(33, 33).mul(7).to(torch.uint8)[None]
    count = 600
    batch = ramp.expand(count, 1, -1, -1).contiguous()
    turned = rotate(batch, Augmentation(rotate=10), (0.5,), 0, 0, np.arange(count))[:, 0].double()
    middle = slice(10, 23)
    down = turned[:, 11:24, middle] - turned[:, 9:22, middle]
    right = turned[:, middle, 11:24] - turned[:, middle, 9:22]
    angles = np.degrees(np.arctan2(-down.mean((1, 2)).numpy(), right.mean((1, 2)).numpy()))
    assert stats.kstest(angles, stats.uniform(-10, 20).cdf).pvalue > 1e-4
    assert abs(angles).max() < 10.1


def test_normalised_images_are_rotated_too_and_their_bare_corners_are_zero() -> None:
    images = torch.ones(3, 2, 9, 9)
    turned = rotate(images, Augmentation(rotate=45), (0.5, 0.5), 0, 0, np.arange(3))
    assert turned.dtype == torch.float32
    torch.testing.assert_close(turned[:, :, 4, 4], torch.ones(3, 2))
    assert turned[:, :, 0, 0].min() == 0


def test_jitter_adds_one_number_to_each_channel_and_clips() -> None:
    count = 3000
    # Every value there is, so that clipping shows at both ends.
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    batch = values.expand(count, 3, -1, -1).contiguous()
    out = jitter(batch, Augmentation(jitter=20), 0, 0, np.arange(count))
    added = out[:, :, 8, 0].int() - 128
    expected = (values.int() + added[:, :, None, None]).clamp(0, 255)
    assert torch.equal(out.int(), expected)
    offsets, counts = np.unique(added.numpy(), return_counts=True)
    assert offsets.tolist() == list(range(-20, 21))
    assert stats.chisquare(counts).pvalue > 1e-4
    pairs = np.corrcoef(added.numpy().T)[np.triu_indices(3, 1)]
    assert np.abs(pairs).max() < 0.08  # the channels are drawn apart: 4 standard errors of 3,000 pairs


def test_jitter_is_for_whole_numbers() -> None:
    with pytest.raises(UsageError, match="these are normalised"):
        jitter(torch.rand(2, 3, 4, 4), Augmentation(jitter=5), 0, 0, np.arange(2))


@pytest.mark.parametrize("largest", [0, 255])
def test_the_largest_jitter_there_is(largest: int) -> None:
    batch = noise_images(50)
    out = jitter(batch, Augmentation(jitter=largest), 0, 0, np.arange(50)).int()
    difference = (out - batch.int()).flatten(2)
    whole = torch.where((out == 0) | (out == 255), 0, 1).bool().flatten(2)
    for values, kept in zip(difference.flatten(0, 1), whole.flatten(0, 1), strict=True):
        assert len(values[kept].unique()) <= 1  # where nothing was clipped, the same was added
    assert (difference == 0).all() == (largest == 0)


@pytest.mark.parametrize("kind", ["rotate", "jitter", "flip"])
def test_turns_and_colours_are_drawn_per_image_and_the_layout_in_memory_is_kept(kind: str) -> None:
    images = noise_images(40, size=12)
    index = np.arange(40)

    def apply(x: torch.Tensor, i: np.ndarray, epoch: int = 1) -> torch.Tensor:
        if kind == "rotate":
            return rotate(x, Augmentation(rotate=30), MEAN, 3, epoch, i)
        if kind == "jitter":
            return jitter(x, Augmentation(jitter=30), 3, epoch, i)
        return crop_and_flip(x, Augmentation(flip=0.5), 3, epoch, i)

    before = images.clone()
    whole = apply(images, index)
    assert torch.equal(images, before)
    assert whole.is_contiguous()
    part = np.array([30, 2, 11])
    assert torch.equal(apply(images[part], part), whole[part])
    assert not torch.equal(apply(images, index, 2), whole)
    last = images.contiguous(memory_format=torch.channels_last)
    turned = apply(last, index)
    assert torch.equal(turned, whole)
    assert turned.is_contiguous(memory_format=torch.channels_last)
