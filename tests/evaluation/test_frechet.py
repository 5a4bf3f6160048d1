import numpy as np
import pytest

from mask2dit.evaluation.frechet import (
    FeatureStatistics,
    frechet_distance,
    frechet_distance_of_features,
    kernel_distance,
)


def gaussian(mean, covariance, count=10):
    return FeatureStatistics(count, np.array(mean, dtype=float), np.array(covariance, dtype=float) * (count - 1))


def test_gaussians_with_diagonal_covariances_have_the_closed_form():
    distance = frechet_distance(gaussian([0, 0], np.diag([4, 9])), gaussian([3, 4], np.diag([1, 16])))
    assert distance == pytest.approx(25 + (2 - 1) ** 2 + (3 - 4) ** 2)


def test_covariances_that_do_not_commute_have_the_known_distance():
    a, b = np.array([[2.0, 1], [1, 2]]), np.diag([1.0, 3])
    # The root of a 2x2 product has the trace (tr + 2 det^½)^½.
    trace = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    assert frechet_distance(gaussian([0, 0], a), gaussian([0, 0], b)) == pytest.approx(4 + 4 - 2 * trace)


@pytest.mark.parametrize("shape", [(12, 40), (90, 20)], ids=["fewer samples than dimensions", "more"])
def test_identical_sets_have_no_distance_and_a_shift_has_its_square(shape):
    features = np.random.default_rng(0).normal(size=shape)
    assert frechet_distance_of_features(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance_of_features(features, features + 2) == pytest.approx(4 * shape[1], rel=1e-6)


@pytest.mark.parametrize("shape", [(12, 40), (90, 20)], ids=["fewer samples than dimensions", "more"])
def test_features_and_their_statistics_give_the_root_of_the_covariances(shape):
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is the reference")
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=shape), rng.normal(1, 2, size=shape) @ rng.normal(size=(shape[1],) * 2)
    c1, c2 = np.cov(x.T), np.cov(y.T)
    offset = 1e-9 * np.eye(shape[1])  # sqrtm fails on singular matrices
    root = linalg.sqrtm((c1 + offset) @ (c2 + offset)).real
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(c1 + c2 - 2 * root)
    assert frechet_distance_of_features(x, y) == pytest.approx(expected, rel=1e-5)
    statistics = [FeatureStatistics.of([features]) for features in (x, y)]
    assert frechet_distance(*statistics) == pytest.approx(expected, rel=1e-5)


def test_streamed_statistics_equal_those_of_all_at_once_far_from_the_origin():
    features = np.random.default_rng(2).normal(1e6, 1, size=(101, 5))
    statistics = FeatureStatistics.of(np.array_split(features, 9))
    np.testing.assert_allclose(statistics.covariance, np.cov(features.T), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(statistics.mean, features.mean(axis=0))


@pytest.mark.parametrize("distance", [frechet_distance_of_features, kernel_distance])
def test_sets_of_different_size_are_compared_only_when_asked_to(distance):
    x = np.random.default_rng(3).normal(size=(8, 4))
    with pytest.raises(ValueError, match=r"8 and 5 samples.*allow_different_sizes=true"):
        distance(x, x[:5])
    assert np.isfinite(distance(x, x[:5], allow_different_sizes=True))


def test_features_of_different_extractors_are_refused():
    with pytest.raises(ValueError, match="4 and 5 dimensions"):
        frechet_distance_of_features(np.ones((3, 4)), np.ones((3, 5)))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance_of_features(np.full((3, 4), np.nan), np.ones((3, 4)))


def test_the_kernel_distance_is_unbiased_where_the_frechet_distance_is_not():
    rng = np.random.default_rng(4)
    pairs = [(rng.normal(size=(10, 16)), rng.normal(size=(10, 16))) for _ in range(200)]
    kernel = [kernel_distance(x, y) for x, y in pairs]
    assert abs(np.mean(kernel)) < 3 * np.std(kernel) / np.sqrt(len(kernel))
    assert np.mean([frechet_distance_of_features(x, y) for x, y in pairs]) > 5  # of the same distribution


def test_the_kernel_distance_of_points_is_known_by_hand():
    x, y = np.array([[1.0], [1.0]]), np.array([[0.0], [0.0]])
    assert kernel_distance(x, y) == pytest.approx(8 + 1 - 2 * 1)
