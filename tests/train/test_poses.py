"""Images in poses, against SciPy's; pieces that share their pixels, against as many that do not."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform
from sklearn.datasets import load_digits
from torch import Tensor

from otad.fitting import train_cells
from otad.nn import CenteredFlatten
from otad.train import USUAL_POSES, DiagramRefinement, LearnedDiagram, Pose, Poses, refine_diagram


def digits(first: int, last: int) -> tuple[Tensor, Tensor]:
    X, y = load_digits(return_X_y=True)
    return torch.tensor(X[first:last] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(y[first:last])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 14)])
def test_poses_move_images_as_scipy_does(shape: tuple[int, int, int]) -> None:
    draws = torch.Generator().manual_seed(0)
    mean, images = torch.rand(shape, generator=draws), torch.rand(2, *shape, generator=draws)
    poses = [*USUAL_POSES, Pose(0.3, -0.4, 1.3, 0.2)]
    found = Poses(mean, poses).every(CenteredFlatten(mean)(images)).unflatten(0, (2, len(poses)))
    _, height, width = shape
    middle = np.array([(height - 1) / 2, (width - 1) / 2])
    for k, pose in enumerate(poses):
        c, s = math.cos(pose.turn), math.sin(pose.turn)
        # SciPy counts (row, column): from places in the moved image to those it is taken from.
        back = np.array([[c, s / pose.wide], [pose.slant - s, c / pose.wide]])
        offset = middle - back @ middle - np.array([0, pose.right * width])
        for image, moved in zip(images, found[:, k], strict=True):
            for channel, got in zip(image, moved.unflatten(0, shape) + mean, strict=True):
                padded = np.pad(channel, 4)  # beyond its sides SciPy does not interpolate with black
                start = offset + 4 - back @ np.full(2, 4.0)
                expected = affine_transform(padded, back, start, order=1)[4:-4, 4:-4]  # type: ignore[arg-type]
                np.testing.assert_allclose(got, expected, atol=1e-5)


def test_the_first_pose_leaves_images_alone_and_a_shift_moves_them_right() -> None:
    x, _ = digits(0, 5)
    stem = CenteredFlatten(x.mean(0))
    poses = Poses(stem.mean, [Pose(), Pose(right=1 / 8)])
    moved = stem.inverse(poses.every(stem(x))).unflatten(0, (5, 2))
    torch.testing.assert_close(moved[:, 0], x)
    torch.testing.assert_close(moved[:, 1, :, :, 1:], x[..., :-1])
    assert (moved[:, 1, :, :, 0].abs() < 1e-6).all()


@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
def test_pieces_in_poses_are_as_many_pieces(box: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same distances, same diagram; the gradient of a site is that of its copies, each taken back to it."""
    monkeypatch.setattr("otad.train.learned_diagram._coarse", lambda device: torch.float32)
    x, y = digits(0, 200)
    stem = CenteredFlatten(x.mean(0))
    poses = Poses(stem.mean)
    start = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    learned = LearnedDiagram(stem(x[start]), y[start], poses=poses)
    with torch.no_grad():
        learned.weights.copy_(0.1 * torch.randn(len(learned.weights), generator=torch.Generator().manual_seed(1)))
    sites = learned.sites.detach().clone().requires_grad_()
    every = poses.every(sites)
    apart = LearnedDiagram(every, learned.classes)
    assert torch.equal(apart.classes, learned.classes)
    apart.weights.data = learned.weights.data.clone()
    limits = None if box is None else stem.box(*box)
    distances = [diagram(stem(x), y, limits) for diagram in (learned, apart)]
    torch.testing.assert_close(*distances)
    for diagram, distance in zip((learned, apart), distances, strict=True):
        (0.3 - distance).relu().sum().backward()
        assert diagram.sites.grad is not None
    (expected,) = torch.autograd.grad(every, sites, apart.sites.grad)
    torch.testing.assert_close(learned.sites.grad, expected)
    torch.testing.assert_close(learned.weights.grad, apart.weights.grad)
    torch.testing.assert_close(learned.fixed().slopes, apart.fixed().slopes)
    torch.testing.assert_close(learned.fixed().intercepts, apart.fixed().intercepts)


def test_pieces_in_poses_resume_where_they_stopped(tmp_path: Path) -> None:
    x, y = digits(0, 300)
    stem = CenteredFlatten(x.mean(0))
    calls = 0

    def interrupted(images: Tensor, draws: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 30:  # in the third epoch, some steps after copies were made
            raise KeyboardInterrupt
        return images

    def run(folder: Path) -> DiagramRefinement:
        start = LearnedDiagram(stem(x[:60]), y[:60], poses=Poses(stem.mean))
        settings = {"target_radius": 0.4, "epochs": 5, "batch_size": 24, "augment": interrupted}
        return refine_diagram(start, stem, x, y, checkpoint=folder, resume=True, **settings)  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts")
    parts, whole = run(tmp_path / "parts"), run(tmp_path / "whole")
    assert torch.equal(parts.diagram.slopes, whole.diagram.slopes)
    again = run(tmp_path / "whole")  # no epoch is left, but what was reached is measured
    assert (again.before, again.after) == (whole.before, whole.after)
    assert whole.after["certified"] > whole.before["certified"]


def test_copies_are_searched_for_few_steps_and_one_device() -> None:
    x, y = digits(0, 60)
    stem = CenteredFlatten(x.mean(0))
    learned = LearnedDiagram(stem(x), y, poses=Poses(stem.mean))
    first = learned(stem(x), y)
    with torch.no_grad():
        learned.sites.copy_(learned.sites.roll(1, 0))  # the classes stay: other pieces are found
    moved = LearnedDiagram(learned.sites, y[y.argsort(stable=True)], poses=Poses(stem.mean))(stem(x), y)
    assert not torch.allclose(moved, first)
    steps = 1
    while not torch.equal(learned(stem(x), y), moved):
        steps += 1
        assert steps < 10
    learned(stem(x), y)
    assert learned.double()(stem(x).double(), y).dtype == torch.float64


def test_poses_lean_turn_and_widen_as_they_say() -> None:
    """A bright dot above the middle, or beside it, goes where the pose takes it."""
    dot = torch.zeros(1, 21, 21)

    def taken(pose: Pose, row: int, column: int) -> tuple[float, float]:
        image = dot.clone()
        image[0, row, column] = 1.0
        moved = Poses(dot, [Pose(), pose]).every(image.flatten()[None])[1].unflatten(0, (21, 21))
        rows, columns = torch.meshgrid(torch.arange(21.0), torch.arange(21.0), indexing="ij")
        return float((moved * rows).sum() / moved.sum()), float((moved * columns).sum() / moved.sum())

    above, right = (3, 10), (10, 15)
    assert taken(Pose(slant=0.4), *above)[1] > 11.5, "the top leans to the right"
    assert taken(Pose(turn=0.4), *right)[0] < 9, "against the clock"
    assert taken(Pose(wide=1.4), *right)[1] > 16.5
    assert taken(Pose(right=0.1), *right)[1] > 16.5


def test_cells_in_poses_start_at_the_samples_they_name() -> None:
    x, y = digits(0, 200)
    stem = CenteredFlatten(x.mean(0))
    settings = {"target_radius": 1e-6, "learning_rate": 1e-12, "epochs": 1}  # so they stay there
    _, found, pieces = train_cells(stem, x, y, torch.arange(200), y, most=50, seed=0, poses=3, **settings)
    assert len(pieces) == len(found.diagram.slopes)
    assert torch.equal(found.diagram.classes, y[pieces])
    torch.testing.assert_close(found.diagram.slopes[::3].float(), stem(x[pieces[::3]]))


def test_poses_need_images_and_no_encoder() -> None:
    x, y = digits(0, 50)
    stem, rows = CenteredFlatten(x.mean(0)), torch.arange(50)
    for inputs, encoder in ((x, "dense"), (x.flatten(1), None)):
        with pytest.raises(ValueError, match="poses are of images"):
            train_cells(stem, inputs, y, rows, y, most=50, seed=0, encoder=encoder, poses=9, target_radius=1.0)
