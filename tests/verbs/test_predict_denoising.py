"""Picture files without their noise: what is written where, by which weights, and what is told of each."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import ExifTags, Image
from torch import nn

from excite.create import create
from excite.data.pictures import read_picture
from excite.errors import ExciteError, UsageError
from excite.files import sha256
from excite.report.side_by_side import WIDEST, side_by_side
from excite.verbs import noise_levels
from excite.verbs.noise_levels import Choice, choose, choose_nearest, estimate_sigma, is_far, levels_of
from excite.verbs.predict_denoising import denoise_files, denoises

SPEC = "dncnn_s:depth=3,channels=4"


def small(seed=0, channels=1, spec=SPEC):
    """A network whose answer differs from its input by about what noise does."""
    torch.manual_seed(seed)
    network = create(spec, in_channels=channels).eval()
    with torch.no_grad():
        answer = network.body(torch.rand(1, channels, 40, 40))
        network.conv3.weight.mul_(0.1 / answer.std())
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of weights: for two levels, for a range, and for colour."""
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("sigma15", "sigma25", "blind")):
        torch.save(small(seed).state_dict(), folder / f"{name}.pt")
    (folder / "notes.txt").write_text("no weights")
    torch.save(small(3, 3).state_dict(), folder.parent / f"{folder.name}-colour.pt")
    return folder


@pytest.fixture(scope="module")
def colour(weights):
    return weights.parent / f"{weights.name}-colour.pt"


@pytest.fixture
def one(weights):
    return weights / "sigma25.pt"


def picture(*shape, seed=0, sigma=0.0, dtype=np.uint8):
    """A smooth picture with noise."""
    draw = np.random.default_rng(seed)
    waves = np.sin(np.arange(shape[0]) / 9)[:, None] + np.cos(np.arange(shape[1]) / 13)
    white = np.iinfo(dtype).max
    values = 0.5 + 0.15 * waves[..., None] + draw.normal(0, sigma / 255, (*shape[:2], *(shape[2:] or (1,))))
    values = np.rint(white * values).clip(0, white).astype(dtype)
    return values if len(shape) > 2 else values[..., 0]


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def expected(network, pixels):
    """What the network says of (H, W) or (H, W, C), at once, as values of the same type."""
    white = np.iinfo(pixels.dtype).max
    image = torch.from_numpy(pixels.astype(np.float32) / white)
    image = image[None] if image.dim() == 2 else image.permute(2, 0, 1)
    with torch.no_grad():
        answer = network(image[None])[0].clamp(0, 1).numpy() * white
    return np.rint(answer[0] if pixels.ndim == 2 else answer.transpose(1, 2, 0))


def rows_by_name(rows):
    return {Path(row["file"]).name: row for row in rows}


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_folder_comes_out_as_it_went_in_without_the_noise(tmp_path, one) -> None:
    grey, deep = picture(40, 50, sigma=25), picture(41, 30, sigma=25, dtype=np.uint16)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    write(tmp_path / "in" / "grey.png", grey)
    write(tmp_path / "in" / "below" / "deep.png", deep)
    write(tmp_path / "in" / "photo.jpg", grey, exif=exif, quality=95)
    write(tmp_path / "in" / "alpha.png", np.stack((grey, 255 - grey), 2))
    (tmp_path / "in" / ".hidden.png").write_bytes(b"")
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    rows = list(denoise_files(SPEC, [tmp_path / "in"], tmp_path / "out", weights=one))
    assert [Path(row["file"]).name for row in rows] == ["alpha.png", "deep.png", "grey.png", "photo.jpg"]
    assert rows[0].keys() == {"file", "out", "width", "height", "seconds"}
    assert (rows[1]["width"], rows[1]["height"]) == (30, 41)
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {"grey.png", "below/deep.png", "photo.jpg", "alpha.png"}
    assert {row["out"] for row in rows} == {str(tmp_path / "out" / name) for name in written}
    network = small(1)
    for name, before in (("grey.png", grey), ("below/deep.png", deep)):
        back = np.asarray(Image.open(tmp_path / "out" / name))
        assert back.dtype == before.dtype
        assert np.abs(back.astype(int) - expected(network, before)).max() <= 1
        assert (back != before).mean() > 0.5
    alpha = read_picture(tmp_path / "out" / "alpha.png")
    np.testing.assert_array_equal(alpha.alpha, 255 - grey)
    np.testing.assert_array_equal(alpha.pixels[..., 0], np.asarray(Image.open(tmp_path / "out" / "grey.png")))
    with Image.open(tmp_path / "out" / "photo.jpg") as photo:
        assert (photo.format, photo.size, photo.getexif()[ExifTags.Base.Orientation]) == ("JPEG", (50, 40), 6)


def test_what_cannot_be_denoised_is_told_and_the_rest_goes_on(tmp_path, one) -> None:
    folder = tmp_path / "in"
    write(folder / "1.png", picture(40, 50))
    write(folder / "2-small.png", picture(5, 40))
    write(folder / "3-colour.png", picture(40, 50, 3, sigma=5))
    frames = [Image.fromarray(picture(20, 20, seed=i, sigma=9)) for i in range(3)]
    frames[0].save(folder / "4.gif", save_all=True, append_images=frames[1:])
    (folder / "5-cut.png").write_bytes((folder / "3-colour.png").read_bytes()[:2000])
    (folder / "6-empty.png").write_bytes(b"")
    write(folder / "7.png", picture(40, 50))
    (tmp_path / "out" / "7.png").mkdir(parents=True)
    write(folder / "8.png", picture(40, 50))
    rows = rows_by_name(denoise_files(SPEC, [folder], tmp_path / "out", weights=one))
    assert len(rows) == 8
    assert {name for name, row in rows.items() if "error" not in row} == {"1.png", "2-small.png", "8.png"}
    assert rows["2-small.png"]["warning"] == "the picture is smaller than the 7 × 7 pixels that the network looks at"
    assert "--by-channel" in rows["3-colour.png"]["error"]
    assert "3 frames" in rows["4.gif"]["error"]
    assert "cut off" in rows["5-cut.png"]["error"]
    assert rows["6-empty.png"] == {"file": str(folder / "6-empty.png"), "error": "the file is empty"}
    assert "Cannot write" in rows["7.png"]["error"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["1.png", "2-small.png", "7.png", "8.png"]


def test_colour_and_grey_through_networks_of_the_other_kind(tmp_path, one, colour) -> None:
    many, grey = picture(30, 40, 3, sigma=20), picture(30, 40, sigma=20)
    write(tmp_path / "many.png", many)
    write(tmp_path / "grey.png", grey)
    write(tmp_path / "same.png", np.repeat(grey[..., None], 3, 2))

    list(denoise_files(SPEC, [tmp_path / "many.png"], tmp_path / "a", weights=one, by_channel=True))
    found = np.asarray(Image.open(tmp_path / "a" / "many.png"))
    for channel in range(3):
        assert np.abs(found[..., channel] - expected(small(1), many[..., channel])).max() <= 1

    # Grey that is stored as colour needs no leave.
    list(denoise_files(SPEC, [tmp_path / "same.png"], tmp_path / "a", weights=one))
    found = np.asarray(Image.open(tmp_path / "a" / "same.png"))
    assert found.shape == (30, 40, 3)
    assert np.abs(found - expected(small(1), grey)[..., None]).max() <= 1

    of_colour = small(3, 3)
    rows = rows_by_name(denoise_files(SPEC, [tmp_path], tmp_path / "b", weights=colour))
    found = np.asarray(Image.open(tmp_path / "b" / "many.png"))
    assert np.abs(found - expected(of_colour, many)).max() <= 1
    assert "warning" not in rows["many.png"]
    found = np.asarray(Image.open(tmp_path / "b" / "grey.png"))
    answer = expected(of_colour, np.repeat(grey[..., None], 3, 2)).mean(2)
    assert found.shape == (30, 40)
    assert np.abs(found - answer).max() <= 1
    assert "mean" in rows["grey.png"]["warning"]


def test_a_run_and_a_module(tmp_path) -> None:
    grey = picture(30, 40, sigma=20)
    write(tmp_path / "grey.png", grey)
    run = finished_run(tmp_path / "run", small(7), "gaussian:25")
    assert denoises(run)
    for number, source in enumerate((run, small(7))):
        (row,) = denoise_files(source, [tmp_path / "grey.png"], tmp_path / str(number), precision="fp32")
        found = np.asarray(Image.open(row["out"]))
        assert np.abs(found - expected(small(7), grey)).max() <= 1
    with pytest.raises(UsageError, match=r"trained for noise of σ = 50: there is run .σ = 25."):
        list(denoise_files(run, [tmp_path / "grey.png"], tmp_path / "c", sigma=50))
    (row,) = denoise_files(nn.Identity(), [tmp_path / "grey.png"], tmp_path / "d", sigma=50)
    np.testing.assert_array_equal(np.asarray(Image.open(row["out"])), grey)


def finished_run(folder, network, degradation):
    folder.mkdir()
    (folder / "recipe.yaml").write_text("{}\n")
    safetensors.torch.save_file(network.state_dict(), folder / "model.safetensors")
    card = {
        "spec": SPEC, "task": "denoising", "classes": [], "in_channels": 1, "degradation": degradation,
        "preprocessing": {"size": 40, "mean": [0.0], "std": [1.0], "channels": 1},
        "sha256": sha256(folder / "model.safetensors"),
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(card))
    return folder


def test_what_denoises() -> None:
    assert [denoises(spec) for spec in ("dncnn_s", "dncnn_color+se", "dncnn_3:depth=5")] == [True] * 3
    others = ("resnet20", "torchvision:resnet18", "nothing", "no spec at all", "some/folder")
    assert [denoises(spec) for spec in others] == [False] * 5


# --- where files go ------------------------------------------------------------------------------------------------


def test_files_of_one_name_keep_their_folders(tmp_path, one) -> None:
    for place in ("a/1.png", "b/1.png", "b/2.png", "c/1.png"):
        write(tmp_path / place, picture(20, 20))
    rows = list(
        denoise_files(SPEC, [tmp_path / "a", tmp_path / "b", tmp_path / "c" / "1.png"], tmp_path / "out", weights=one)
    )
    placed = [str(Path(row["out"]).relative_to(tmp_path / "out")) for row in rows]
    assert placed == ["a/1.png", "b/1.png", "2.png", "c/1.png"]
    assert len(set(placed)) == 4
    # One file, named twice, is denoised once.
    assert (
        len(list(denoise_files(SPEC, [tmp_path / "a", tmp_path / "a" / "1.png"], tmp_path / "o", weights=one))) == 1
    )


def test_inputs_are_never_overwritten(tmp_path, one) -> None:
    source = write(tmp_path / "in" / "1.png", picture(20, 20))
    before = source.read_bytes()
    for folder in (tmp_path / "in", tmp_path / "in" / ".." / "in"):
        with pytest.raises(UsageError, match=r"1\.png would be overwritten: give another folder"):
            list(denoise_files(SPEC, [tmp_path / "in"], folder, weights=one))
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(UsageError, match="would be overwritten"):
        list(denoise_files(SPEC, [source], tmp_path / "link", weights=one))
    assert source.read_bytes() == before
    for place in ("x/p/1.png", "y/p/1.png"):
        write(tmp_path / place, picture(20, 20))
    with pytest.raises(UsageError, match="would both be written to"):
        list(denoise_files(SPEC, [tmp_path / "x" / "p", tmp_path / "y" / "p"], tmp_path / "out", weights=one))


def test_a_folder_for_the_results_inside_is_not_denoised_again(tmp_path, one) -> None:
    write(tmp_path / "1.png", picture(20, 20))
    for _ in range(2):
        (row,) = denoise_files(SPEC, [tmp_path], tmp_path / "clean", weights=one, side_by_side=True)
    assert sorted(path.name for path in (tmp_path / "clean").iterdir()) == ["1.png", "1.png.side.png"]
    assert row["side"] == str(tmp_path / "clean" / "1.png.side.png")


def test_what_is_wrong_is_told_before_anything_is_done(tmp_path, weights, one) -> None:
    write(tmp_path / "1.png", picture(20, 20))
    good = {"paths": [tmp_path / "1.png"], "out": tmp_path / "out", "weights": one}
    for changes, sentence in (
        ({"paths": [tmp_path / "none.png"]}, "does not exist"),
        ({"paths": [weights]}, "holds no pictures"),
        ({"weights": weights}, r"several weights .blind\.pt .σ = 0 to 55., sigma15.*choose by sigma, or by estimate"),
        ({"weights": None}, "is not a run"),
        ({"weights": tmp_path / "none.pt"}, "none.pt"),
        ({"weights": tmp_path}, "holds no weights"),
        ({"sigma": 50}, r"trained for noise of σ = 50: there is sigma25\.pt"),
        ({"sigma": 25, "estimate": True}, "leave one out"),
        ({"sigma": -1}, "standard deviation"),
        ({"precision": "fp8"}, "unknown precision"),
    ):
        with pytest.raises(UsageError, match=sentence):
            list(denoise_files(SPEC, **good | changes))
    with pytest.raises(UsageError, match="A module has weights of its own"):
        list(denoise_files(small(), **good))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExciteError, match="Cannot write"):
        list(denoise_files(SPEC, **good | {"out": tmp_path / "file" / "out"}))
    assert not (tmp_path / "out").exists()


# --- which weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("matconvnet-sigma25.mat", (25, 25)),
        ("pytorch-dncnn-s-sigma25.pth", (25, 25)),
        ("sigma=12.5.pt", (12.5, 12.5)),
        ("s50.th", (50, 50)),
        ("dncnn_s-15", (15, 15)),
        ("Net_SIGMA_0-55.safetensors", (0, 55)),
        ("matconvnet-gray-blind.mat", (0, 55)),
        ("pytorch-dncnn-b.pth", (0, 55)),
        ("dncnn-s.pth", None),
        ("epochs25.pth", None),
        ("blinds.pth", None),
        ("sigma400.pth", None),
    ],
)
def test_levels_in_the_names_of_files(name, levels) -> None:
    assert levels_of(name) == levels


def test_levels_of_runs_and_of_blind_networks(tmp_path) -> None:
    for degradation, levels in (("gaussian:25", (25, 25)), ("gaussian:0-55", (0, 55)), ("jpeg:10", None)):
        run = finished_run(tmp_path / degradation.replace(":", "-"), small(), degradation)
        assert levels_of(run) == levels
    assert levels_of("weights.pt", "dncnn_b") == (0, 55)
    assert levels_of("weights.pt", "dncnn_s") is None


def choices(*levels):
    return [Choice(Path(str(number)), level and tuple(map(float, level))) for number, level in enumerate(levels)]


@pytest.mark.parametrize(
    ("sigma", "right", "nearest"),
    [(25, 1, 1), (15, 0, 0), (21, 1, 1), (30, 1, 1), (20, 3, 3), (45, 2, 2), (33, 3, 3), (100, None, 2), (0, 3, 3)],
)
def test_the_nearest_level_within_a_fifth_goes_before_the_blind_network(sigma, right, nearest) -> None:
    there = choices((15, 15), (25, 25), (50, 50), (0, 55), None)
    if right is None:
        with pytest.raises(UsageError, match=r"σ = 100: there is 0 .σ = 15., 1 .σ = 25., .*σ unknown"):
            choose(there, sigma)
    else:
        assert choose(there, sigma) == there[right]
    # Where nothing fits, 55 is as near to 100 as any blind network comes; 50 lies further away.
    assert choose_nearest(there, sigma) == there[3 if right is None else nearest]
    assert choose_nearest(there[:3], 100) == there[2]


def test_what_is_far() -> None:
    for levels, sigma, far in (
        ((25, 25), 25, False), ((25, 25), 37, False), ((25, 25), 38, True), ((25, 25), 17, False),
        ((25, 25), 16, True), ((2, 2), 4.9, False), ((2, 2), 5.1, True), ((0, 55), 0.5, False), ((0, 55), 90, True),
        ((10, 20), 4, True), ((25, 25), 0, True),
    ):  # fmt: skip
        assert is_far(levels, sigma) == far, (levels, sigma)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_measured_noise_is_the_noise(dtype) -> None:
    for sigma in (5, 15, 40):
        for shape in ((200, 300, 1), (120, 130, 3)):
            pixels = picture(*shape, sigma=sigma, dtype=dtype)
            assert estimate_sigma(pixels, np.iinfo(dtype).max) == pytest.approx(sigma, rel=0.05)
    large = np.full((2100, 5000, 1), 7, np.uint8)
    large[:, 1476:3524] = picture(2100, 2048, 1, sigma=10)  # only the middle is looked at
    assert estimate_sigma(large, 255) == pytest.approx(10, rel=0.05)


def test_each_picture_gets_the_weights_for_its_noise(tmp_path, weights) -> None:
    pixels = {f"{sigma}.png": picture(120, 120, sigma=sigma) for sigma in (15, 26, 40)}
    for name, values in pixels.items():
        write(tmp_path / name, values)
    rows = rows_by_name(denoise_files(SPEC, [tmp_path], tmp_path / "out", weights=weights, estimate=True))
    for name, chosen, seed in (("15.png", "sigma15.pt", 0), ("26.png", "sigma25.pt", 1), ("40.png", "blind.pt", 2)):
        assert Path(rows[name]["weights"]).name == chosen
        assert rows[name]["sigma_estimated"] == pytest.approx(int(name[:2]), rel=0.1)
        assert "warning" not in rows[name]
        found = np.asarray(Image.open(rows[name]["out"]))
        assert np.abs(found - expected(small(seed), pixels[name])).max() <= 1
    (row,) = denoise_files(SPEC, [tmp_path / "40.png"], tmp_path / "out", weights=weights, sigma=16)
    assert Path(row["weights"]).name == "sigma15.pt"
    assert "sigma_estimated" not in row


def test_noise_far_from_what_the_network_was_trained_for_is_told(tmp_path, one) -> None:
    for sigma in (8, 24, 45):
        write(tmp_path / f"{sigma:02}.png", picture(120, 120, sigma=sigma))
    rows = rows_by_name(denoise_files(SPEC, [tmp_path], tmp_path / "out", weights=one, estimate=True))
    assert "warning" not in rows["24.png"]
    for name in ("08.png", "45.png"):
        assert "the network was trained for σ = 25" in rows[name]["warning"]
        assert Path(rows[name]["out"]).is_file()
    # Too few pixels to measure anything.
    write(tmp_path / "thin" / "a.png", picture(1, 40))
    (row,) = denoise_files(SPEC, [tmp_path / "thin"], tmp_path / "o", weights=one, estimate=True)
    assert "cannot be measured" in row["error"]


def test_without_scikit_image_the_package_is_named(tmp_path, monkeypatch, one) -> None:
    write(tmp_path / "1.png", picture(20, 20))
    monkeypatch.setitem(sys.modules, "pywt", None)
    with pytest.raises(UsageError, match=r"pip install 'excite\[denoising\]'"):
        list(denoise_files(SPEC, [tmp_path], tmp_path / "out", weights=one, estimate=True))


def test_the_published_weights_are_told_apart_by_their_names(shared_data) -> None:
    there = noise_levels.choices(shared_data / "dncnn-weights")
    assert {choice.path.name: choice.levels for choice in there} == {
        "matconvnet-gray-blind.mat": (0, 55),
        "matconvnet-sigma15.mat": (15, 15),
        "matconvnet-sigma25.mat": (25, 25),
        "matconvnet-sigma50.mat": (50, 50),
        "pytorch-dncnn-b.pth": (0, 55),
        "pytorch-dncnn-s-sigma25.pth": (25, 25),
    }


# --- side by side --------------------------------------------------------------------------------------------------


def test_before_after_and_difference_lie_side_by_side() -> None:
    before, after = picture(300, 400, 1, sigma=25), picture(300, 400, 1)
    drawn = np.asarray(side_by_side(before, after, 255))
    top = drawn.shape[0] - 300
    assert 0 < top < 40
    np.testing.assert_array_equal(drawn[top:, :400, 1], before[..., 0])
    np.testing.assert_array_equal(drawn[top:, 408:808, 1], after[..., 0])
    # Amplified twice: three standard deviations of 25 fill the range then.
    amplified = (127.5 + 2 * (before.astype(int) - after)).clip(0, 255)[..., 0]
    assert np.abs(drawn[top:, 816:, 1] - amplified).max() <= 1
    assert (drawn[:top] < 100).any()  # captions


def test_a_large_picture_is_reduced_and_its_middle_shown_at_full_size() -> None:
    before, after = picture(900, 2000, 1, sigma=25), picture(900, 2000, 1)
    drawn = np.asarray(side_by_side(before, after, 255))
    assert drawn.shape[1] <= WIDEST
    side = (WIDEST - 16) // 3
    top, left = (900 - side) // 2, (2000 - side) // 2
    np.testing.assert_array_equal(drawn[-side:, :side, :1], before[top : top + side, left : left + side])
    # Reduced, the noise is averaged away; at full size it is there.
    noise = np.abs(np.diff(drawn[..., 1].astype(int), axis=1))
    assert noise[-side:, :side].mean() > 2 * noise[30 : 30 + side // 3, :side].mean()


def test_a_picture_that_was_taken_upright_is_shown_upright(tmp_path) -> None:
    pixels = picture(240, 320, 1, sigma=9)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    write(tmp_path / "a.png", pixels[..., 0], exif=exif)
    shown = side_by_side(pixels, pixels, 255, read_picture(tmp_path / "a.png").orientation)
    assert shown.width == 3 * 240 + 16
    np.testing.assert_array_equal(np.asarray(shown)[-320:, :240, 0], np.rot90(pixels[..., 0], -1))


def test_a_tiny_picture_is_enlarged() -> None:
    shown = side_by_side(picture(2, 3, 3), picture(2, 3, 3), 255)
    assert shown.width == 3 * 240 + 16
