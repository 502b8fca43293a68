from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from excite.data.crossmodal import CrossmodalSplit
from excite.data.crossmodal_pairs import Files
from excite.data.crossmodal_pictures import Pictures
from excite.data.draws import permutation
from excite.data.pairs import PairLoader
from excite.errors import ExciteError, UsageError
from excite.preprocessing import Preprocessing

Epoch = list[tuple[torch.Tensor, ...]]


def split_of(count: int = 53) -> CrossmodalSplit:
    """Pairs whose image, text and labels are told from their position."""
    place = torch.arange(count)
    return CrossmodalSplit(
        place[:, None].float() + torch.tensor([0.0, 0.5]),
        -place[:, None].float().repeat(1, 3),
        torch.stack([place % 2 == 0, place % 3 == 0], dim=1).float(),
        tuple(f"pair {i}" for i in range(count)),
    )


def picture_split(folder: Path, count: int = 12, refuse: bool = False) -> CrossmodalSplit:
    for i in range(count):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i}.png")
    names = tuple(f"{i}.png" for i in range(count))
    pictures = Pictures(Files(folder, names, np.arange(count)), Preprocessing(8, (0.0,) * 3, (1.0,) * 3), refuse)
    known = split_of(count)
    return CrossmodalSplit(pictures, known.texts, known.labels, names)


def epoch_of(loader: PairLoader, epoch: int = 0) -> Epoch:
    loader.set_epoch(epoch)
    return [(*pair, labels, index) for pair, labels, index in loader]  # type: ignore[misc]


def assert_same(first: Epoch, second: Epoch) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def numbers(epoch: Epoch) -> list[int]:
    return torch.cat([batch[3] for batch in epoch]).tolist() if epoch else []


def test_a_batch() -> None:
    split = split_of()
    loader = PairLoader(split, 10, seed=0)
    batches = list(loader)
    assert len(loader) == len(batches) == 6
    for pair, labels, index in batches:
        images, texts = pair
        assert (images.dtype, texts.dtype, labels.dtype, index.dtype) == (torch.float32,) * 3 + (torch.int64,)
        assert torch.equal(images[:, 0], index.float())
        assert torch.equal(texts[:, 2], -index.float())
        assert torch.equal(labels, split.labels[index])
    assert [len(batch[2]) for batch in batches] == [10, 10, 10, 10, 10, 3]


def test_every_epoch_has_its_own_order_of_all_pairs() -> None:
    loader = PairLoader(split_of(), 10, seed=4)
    orders = [numbers(epoch_of(loader, epoch)) for epoch in range(3)]
    for epoch, order in enumerate(orders):
        assert sorted(order) == list(range(53))
        assert order == permutation(4, epoch, 53).tolist()
    assert orders[0] != orders[1] != orders[2]
    assert numbers(epoch_of(PairLoader(split_of(), 10, seed=5))) != orders[0]
    assert numbers(epoch_of(PairLoader(split_of(), 10, seed=4, shuffle=False))) == list(range(53))


def test_a_batch_of_one_pair_is_never_made_in_training() -> None:
    assert [len(batch[3]) for batch in epoch_of(PairLoader(split_of(21), 10, seed=0))] == [10, 11]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_was_cut_goes_on_where_it_was(workers: int) -> None:
    split = split_of()
    whole = epoch_of(PairLoader(split, 10, seed=1), 2)
    cut = PairLoader(split, 10, seed=1)
    cut.set_epoch(2)
    steps = iter(cut)
    for _ in range(3):
        next(steps)
    state = cut.state_dict()
    resumed = PairLoader(split, 10, seed=1, workers=workers)
    resumed.load_state_dict(state)
    assert_same(epoch_of(resumed, 2), whole[3:])
    assert_same(epoch_of(resumed, 3), epoch_of(PairLoader(split, 10, seed=1), 3))


@pytest.mark.parametrize("change", [{"batch_size": 9}, {"seed": 2}, {"split": split_of(52)}, {"world_size": 2}])
def test_a_place_in_other_batches_is_refused(change: dict[str, Any]) -> None:
    given = {"split": split_of(), "batch_size": 10, "seed": 1, "world_size": 1}
    state = PairLoader(**given).state_dict()  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="The saved place in the data has"):
        PairLoader(**{**given, **change}).load_state_dict(state)  # type: ignore[arg-type]


def test_workers_make_the_same_batches(tmp_path: Path) -> None:
    split = picture_split(tmp_path)
    assert_same(epoch_of(PairLoader(split, 5, seed=0, workers=2)), epoch_of(PairLoader(split, 5, seed=0)))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_an_epoch(world_size: int) -> None:
    ranks = [
        epoch_of(PairLoader(split_of(), 6, seed=0, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert len({len(epoch) for epoch in ranks}) == 1
    seen = [number for epoch in ranks for number in numbers(epoch)]
    assert len(seen) == len(set(seen)) == 53 // world_size * world_size
    # Each step sees what one process with a batch as large as all theirs would see.
    whole = permutation(0, 0, 53).tolist()
    first = [number for epoch in ranks for number in epoch[0][3].tolist()]
    assert first == whole[: 6 * world_size]
    evaluated = [
        number
        for rank in range(world_size)
        for number in numbers(
            epoch_of(PairLoader(split_of(), 6, seed=0, shuffle=False, rank=rank, world_size=world_size))
        )
    ]
    assert sorted(evaluated) == list(range(53))


def test_a_pair_with_a_broken_picture_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    split = picture_split(tmp_path)
    (tmp_path / "7.png").write_bytes(b"")
    epoch = epoch_of(PairLoader(split, 5, seed=0))
    assert sorted(numbers(epoch)) == [i for i in range(12) if i != 7]
    for images, texts, labels, index in epoch:
        torch.testing.assert_close(255 * images[:, 0, 0, 0], index.float())
        assert torch.equal(texts[:, 0], -index.float())
        assert torch.equal(labels, split.labels[index])
    assert "1 image is broken and skipped: 7.png" in caplog.text
    refusing = picture_split(tmp_path, refuse=True)
    (tmp_path / "7.png").write_bytes(b"")
    with pytest.raises(ExciteError, match=r"7\.png"):
        epoch_of(PairLoader(refusing, 5, seed=0))


def test_too_few_pairs() -> None:
    with pytest.raises(UsageError, match="1 pairs on 1 processes"):
        PairLoader(split_of(1), 4, seed=0)
    with pytest.raises(UsageError, match="training needs at least 2 pairs"):
        PairLoader(split_of(), 1, seed=0)
