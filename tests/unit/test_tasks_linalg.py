import numpy
import pytest

from celery_app.tasks.linalg import matmul, pca, solve

random = numpy.random.default_rng(2)


def test_matmul_is_rows_times_columns():
    a, b = random.normal(size=(4, 3)).tolist(), random.normal(size=(3, 5)).tolist()
    expected = [[sum(a[i][k] * b[k][j] for k in range(3)) for j in range(5)] for i in range(4)]
    assert numpy.allclose(matmul(a, b), expected)
    assert type(matmul(a, b)[0][0]) is float


def test_solve_gives_the_x_of_a_x_equals_b():
    a, x = random.normal(size=(6, 6)), random.normal(size=6)
    assert solve(a.tolist(), (a @ x).tolist()) == pytest.approx(x.tolist())


@pytest.mark.parametrize("singular", [[[1, 2], [2, 4]], [[0, 0], [0, 0]], [[1, 1], [1, 1 + 1e-17]]])
def test_solve_refuses_a_singular_matrix(singular):
    with pytest.raises(ValueError, match="singular"):
        solve(singular, [1, 1])


def test_a_small_but_regular_matrix_is_solved():
    assert solve([[1e-30, 0], [0, 2e-30]], [1e-30, 1e-30]) == pytest.approx([1.0, 0.5])


def test_pca_is_the_eigenvectors_of_the_covariance():
    rows = random.normal(size=(200, 4)) @ numpy.diag([5.0, 2.0, 1.0, 0.1]) + [1, 2, 3, 4]
    result = pca(rows.tolist(), 3)
    variance, axes = numpy.linalg.eigh(numpy.cov(rows.T))
    strongest = numpy.argsort(variance)[::-1][:3]
    assert result["mean"] == pytest.approx(rows.mean(axis=0).tolist())
    assert result["variance"] == pytest.approx(variance[strongest].tolist())
    assert result["share"] == pytest.approx((variance[strongest] / variance.sum()).tolist())
    for component, expected in zip(result["components"], axes[:, strongest].T, strict=True):
        assert abs(numpy.dot(component, expected)) == pytest.approx(1)
        assert max(component, key=abs) > 0
    scores = (rows - rows.mean(axis=0)) @ numpy.transpose(result["components"])
    assert numpy.allclose(result["scores"], scores)


def test_pca_of_more_numbers_than_rows():
    result = pca([[1.0, 0.0, 0.0, 1.0], [3.0, 0.0, 0.0, 1.0]], 1)
    assert result["components"] == [pytest.approx([1, 0, 0, 0])]
    assert result["share"] == pytest.approx([1.0])


@pytest.mark.parametrize(
    ("task", "arguments", "reason"),
    [
        (matmul, ([], [[1]]), "a is empty"),
        (matmul, ([[1]], [[]]), "b is empty"),
        (matmul, ([[1, 2], [3]], [[1]]), "a has rows of different lengths: 1 to 2"),
        (matmul, ([[1, 2]], [[1, 2]]), "a is 1 x 2 and b is 1 x 2"),
        (solve, ([[1, 2]], [1]), "must be square"),
        (solve, ([[1, 0], [0, 1]], [1]), "b has 1 numbers"),
        (solve, ([[1]], []), "b is empty"),
        (pca, ([], 1), "rows is empty"),
        (pca, ([[1, 2]], 1), "at least 2"),
        (pca, ([[1, 2], [3, 4]], 3), "components must be 1 to 2"),
        (pca, ([[1, 2], [3, 4]], 0), "components must be 1 to 2"),
        (pca, ([[1, 2], [1, 2]], 1), "all equal"),
    ],
)
def test_what_does_not_fit_is_refused(task, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        task(*arguments)
