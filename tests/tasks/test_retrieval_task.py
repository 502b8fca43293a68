"""The three losses against the paper's equations written out with loops, and the scores against scikit-learn."""

import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import nn

from excite.create import create
from excite.data.crossmodal import CrossmodalSplit
from excite.data.crossmodal_pairs import Files
from excite.data.crossmodal_pictures import Pictures
from excite.errors import ExciteError, UsageError
from excite.preprocessing import Preprocessing
from excite.tasks.retrieval import (
    TASK,
    RetrievalTask,
    between_modalities,
    common_space,
    evaluation,
    expect,
    label_space,
    options,
    points,
    score,
)

SMALL = "dscmr:image_dim=7,text_dim=5,hidden=8,dim=4,dropout=0.3"


def drawn(count=6, dim=4, classes=3, seed=0, dtype=torch.float64):
    """u, v, Pᵀu, Pᵀv and multi-hot labels; every pair has a class."""
    generator = torch.Generator().manual_seed(seed)
    u, v, pu, pv = (
        torch.randn(count, size, generator=generator, dtype=dtype) for size in (dim, dim, classes, classes)
    )
    labels = (torch.rand(count, classes, generator=generator) < 0.4).to(dtype)
    labels[torch.arange(count), torch.arange(count) % classes] = 1
    return (u, v, pu, pv), labels


def split_of(count=600, classes=3, seed=0):
    """Pairs whose image and text both tell the class, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.eye(classes)[torch.arange(count) % classes]
    images, texts = (
        labels @ torch.randn(classes, size, generator=torch.Generator().manual_seed(size))
        + torch.randn(count, size, generator=generator)
        for size in (7, 5)
    )
    return CrossmodalSplit(images, texts, labels, tuple(map(str, range(count))))


# --- the losses -----------------------------------------------------------------------------------------------------


def frobenius(rows):
    return math.sqrt(sum(float(value) ** 2 for row in rows for value in row))


def half_cosine(one, other):
    dot = sum(float(a) * float(b) for a, b in zip(one, other, strict=True))
    return 0.5 * dot / (frobenius([one]) * frobenius([other]))


@pytest.mark.parametrize("seed", range(3))
def test_the_papers_equations(seed):
    (u, v, pu, pv), labels = drawn(seed=seed)
    n = len(labels)
    first = frobenius(pu - labels) / n + frobenius(pv - labels) / n
    second = 0.0
    for one, other in ((u, v), (u, u), (v, v)):
        for i in range(n):
            for j in range(n):
                shared = any(labels[i, c] and labels[j, c] for c in range(labels.shape[1]))
                theta = half_cosine(one[i], other[j])
                second += (math.log(1 + math.exp(theta)) - shared * theta) / n**2
    third = frobenius(u - v) / n
    assert label_space(pu, pv, labels).item() == pytest.approx(first, rel=1e-12)
    assert common_space(u, v, labels).item() == pytest.approx(second, rel=1e-12)
    assert between_modalities(u, v).item() == pytest.approx(third, rel=1e-12)
    for label, alpha, beta in ((1, 0.5, 0.1), (0, 2, 3), (2, 0, 3), (2, 3, 0)):
        task = RetrievalTask(nn.Identity(), label=label, alpha=alpha, beta=beta)
        expected = label * first + alpha * second + beta * third
        assert task.loss((u, v, pu, pv), labels).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", ["label_space", "common_space", "between_modalities"])
def test_gradients_are_those_of_finite_differences(loss):
    (u, v, pu, pv), labels = drawn()
    given = {"label_space": (pu, pv), "common_space": (u, v), "between_modalities": (u, v)}[loss]
    function = {
        "label_space": lambda one, other: label_space(one, other, labels),
        "common_space": lambda one, other: common_space(one, other, labels),
        "between_modalities": between_modalities,
    }[loss]
    assert torch.autograd.gradcheck(function, tuple(part.clone().requires_grad_() for part in given))


def test_gradients_are_finite_where_a_norm_is_zero():
    labels = torch.eye(3)
    u, v, pu, pv = (part.requires_grad_() for part in (torch.zeros(3, 4), torch.zeros(3, 4), labels + 0, labels + 0))
    RetrievalTask(nn.Identity()).loss((u, v, pu, pv), labels).backward()
    assert all(part.grad.isfinite().all() for part in (u, v, pu, pv))


def test_the_loss_is_reckoned_in_single_precision():
    output, labels = drawn(dtype=torch.float32)
    halves = tuple(part.bfloat16() for part in output)
    task = RetrievalTask(nn.Identity(), label=1, alpha=1, beta=1)
    loss = task.loss(halves, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(task.loss(tuple(half.float() for half in halves), labels).item(), rel=1e-6)


@pytest.mark.parametrize("weights", [(-1, 1, 1), (1, -0.1, 1), (1, 1, -2), (0, 0, 0)])
def test_weights_that_are_refused(weights):
    label, alpha, beta = weights
    with pytest.raises(UsageError, match=r"task\.label, task\.alpha and task\.beta .* not all 0"):
        RetrievalTask(nn.Identity(), label=label, alpha=alpha, beta=beta)


def test_a_step_has_a_loss_and_no_score():
    network = create(SMALL, 3).eval()
    split = split_of(20)
    inputs, labels = split.batch(range(20))
    step = RetrievalTask(network).one_batch((inputs, labels, torch.arange(20)))
    assert set(step) == {"loss"}
    assert step["loss"].item() == pytest.approx(RetrievalTask(network).loss(network(inputs), labels).item())
    assert step["loss"].requires_grad


def test_learning_finds_the_classes():
    torch.manual_seed(0)
    network, split, unseen = create(SMALL, 3), split_of(240), split_of(240, seed=1)
    task = RetrievalTask(network, lambda module: torch.optim.Adam(module.parameters(), 1e-2), alpha=0.3, beta=0.03)
    optimizer = task.configure_optimizers()
    before = score(network, unseen).metrics["map"]
    for _ in range(60):
        loss = task.one_batch((*split.batch(range(240)), torch.arange(240)))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = score(network, unseen).metrics["map"]
    assert before < 50
    assert after > 65  # chance is 33


# --- the scores -----------------------------------------------------------------------------------------------------


def test_the_scores_are_those_of_scikit_learn():
    (u, v, _, _), labels = drawn(40)
    found = evaluation(u, v, labels)
    match = ((labels @ labels.T) > 0).numpy()
    cosine = (nn.functional.normalize(u) @ nn.functional.normalize(v).T).numpy()
    to_text = [average_precision_score(match[i], cosine[i]) for i in range(40)]
    to_image = [average_precision_score(match[i], cosine[:, i]) for i in range(40)]
    assert found.metrics["image_to_text"] == pytest.approx(100 * np.mean(to_text))
    assert found.metrics["text_to_image"] == pytest.approx(100 * np.mean(to_image))
    assert found.metrics["map"] == pytest.approx(50 * (np.mean(to_text) + np.mean(to_image)))
    np.testing.assert_allclose(found.scores, np.mean([to_text, to_image], axis=0), rtol=1e-6)
    assert TASK.metric.factor * found.scores.mean() == pytest.approx(found.metrics[TASK.metric.name], rel=1e-6)
    np.testing.assert_allclose(found.details["text_to_image"].per_query, to_image)
    assert list(found.details["image_to_text"].at_k) == [1, 5, 10, 50]
    assert found.count == 40


def test_pairs_without_a_class_are_not_scored():
    (u, v, _, _), labels = drawn(12)
    labels[3] = 0
    found = evaluation(u, v, labels)
    assert found.count == 11
    assert found.details["image_to_text"].without_match == found.details["text_to_image"].without_match == 1
    assert found.metrics["map"] == pytest.approx(
        (found.metrics["image_to_text"] + found.metrics["text_to_image"]) / 2
    )


def test_a_network_is_scored_in_evaluation_mode_and_left_as_it_was():
    network, split = create(SMALL, 3).train(), split_of()
    seen = []
    first = score(network, split, None, step=lambda done, total: seen.append((done, total)))
    assert network.training
    assert seen == [(256, 600), (512, 600), (600, 600)]
    np.testing.assert_array_equal(first.scores, score(network, split).scores)
    u, v, labels = points(network, split)
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(u, network.embed_images(split.images))
        torch.testing.assert_close(v, network.embed_texts(split.texts))
    assert torch.equal(labels, split.labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_are_prepared_by_the_workers_asked_for(workers, tmp_path):
    names = tuple(f"{i}.png" for i in range(40))
    for i, name in enumerate(names):
        Image.fromarray(np.full((4, 4, 3), 6 * i, np.uint8)).save(tmp_path / name)
    pictures = Pictures(Files(tmp_path, names, np.arange(40)), Preprocessing(4, (0.0,) * 3, (1.0,) * 3), False)
    known, here = split_of(40), set()
    split = CrossmodalSplit(pictures, known.texts, known.labels, names)
    network = create(SMALL, 3)
    network.backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 7))
    read = pictures.read
    pictures.read = lambda indices: (here.add(os.getpid()), read(indices))[1]
    seen = []
    found = score(network, split, None, workers=workers, step=lambda done, total: seen.append((done, total)))
    assert seen == [(32, 40), (40, 40)]
    assert bool(here) == (workers == 0), "this process has read pictures"
    pictures.read = read
    np.testing.assert_array_equal(found.scores, score(network, split).scores)
    (tmp_path / "7.png").write_bytes(b"")
    with pytest.raises(ExciteError, match=r"7\.png"):  # though the data let broken ones be skipped in training
        score(network, split, None, workers=workers)


def test_what_cannot_be_scored():
    network = create(SMALL, 3)
    empty = split_of(0)
    with pytest.raises(ExciteError, match="no pairs to evaluate on"):
        score(network, empty)
    with torch.no_grad():
        network.shared.bias.fill_(float("nan"))
    with pytest.raises(ExciteError, match="points are not finite"):
        score(network, split_of(10))


# --- the task -------------------------------------------------------------------------------------------------------

DATA = SimpleNamespace(name="crossmodal:a", classes=("x", "y", "z"))


def test_the_weights_of_a_recipe():
    empty = {"label_smoothing": 0.0, "class_weights": None}
    assert options(empty, DATA) == {}
    assert options(empty | {"label": 0.0, "alpha": None, "beta": 2.0}, DATA) == {"label": 0.0, "beta": 2.0}
    for key, value in (("label_smoothing", 0.1), ("class_weights", "balanced")):
        with pytest.raises(UsageError, match=rf"task\.{key}' is for classification"):
            options(empty | {key: value}, DATA)


def test_networks_of_another_output_are_refused():
    inputs, _ = split_of(4).batch(range(4))
    with torch.no_grad():
        expect(DATA, inputs, create(SMALL, 3)(inputs))
        with pytest.raises(UsageError, match=r"\(4, 5\).*scores of the 3 classes"):
            expect(DATA, inputs, create(SMALL, 5)(inputs))
    points = torch.zeros(4, 6)
    classes = torch.zeros(4, 3)
    for output in (points, (points, points), (points, classes, classes, classes), (points[0], points[0], 1, 2)):
        with pytest.raises(UsageError, match="take dscmr"):
            expect(DATA, inputs, output)
