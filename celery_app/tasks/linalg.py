"""GPU tasks of linear algebra. All compute in float64."""

from typing import Annotated

from pydantic import Field

from bridge import Gpu, array_module
from celery_app.application import app
from celery_app.tasks.payloads import Matrix, Vector, matrix_of, vector_of

_SQUARE = [[2.0, 1.0], [1.0, 3.0]]  # at warm-up: also creates the handles of cuBLAS and cuSOLVER


@app.task(gpu=Gpu(example=(_SQUARE, _SQUARE)))
def matmul(a: Matrix, b: Matrix) -> Matrix:
    """The matrix product of `a` (n x m) and `b` (m x p): n rows of p numbers.

    Raises:
        ValueError: an empty matrix, rows of different lengths, or shapes that do not fit.
    """
    left, right = matrix_of(a, "a"), matrix_of(b, "b")
    if left.shape[1] != right.shape[0]:
        raise ValueError(f"a is {_size(left)} and b is {_size(right)}: a needs as many columns as b has rows")
    product: Matrix = (left @ right).tolist()
    return product


@app.task(gpu=Gpu(example=(_SQUARE, [1.0, 2.0])))
def solve(a: Matrix, b: Vector) -> Vector:
    """The x of a x = b, for a square `a` (n x n) and `b` of length n.

    Raises:
        ValueError: `a` is not square, is singular to float64's precision, or `b` has another length.
    """
    xp = array_module()
    matrix, right = matrix_of(a, "a"), vector_of(b, "b")
    if matrix.shape != (len(right), len(right)):
        raise ValueError(f"a is {_size(matrix)} and b has {len(right)} numbers: a must be square, b as long as a")
    # cuSOLVER gives numbers for a singular matrix too, where LAPACK raises: so ask the singular values on both.
    spread = xp.linalg.svd(matrix, compute_uv=False)
    if float(spread[-1]) <= float(spread[0]) * len(right) * float(xp.finfo(xp.float64).eps):
        raise ValueError("a is singular: there is no single solution")
    solution: Vector = xp.linalg.solve(matrix, right).tolist()
    return solution


@app.task(gpu=Gpu(example=([[1.0, 2.0], [3.0, 5.0], [4.0, 9.0]], 1)))
def pca(rows: Matrix, components: Annotated[int, Field(ge=1)] = 2) -> dict[str, Vector | Matrix]:
    """Principal components of `rows` (n observations of d numbers), by singular value decomposition.

    Returns:
        mean (d), components (k x d, unit length, the largest number of each positive), variance (k, with n - 1),
        share (k, of all variance) and scores (n x k), strongest component first.

    Raises:
        ValueError: fewer than 2 rows, rows that are all equal, or more components than min(n, d).
    """
    xp = array_module()
    matrix = matrix_of(rows, "rows")
    if len(matrix) < 2:
        raise ValueError("rows has 1 row: variance needs at least 2")
    if not 1 <= components <= min(matrix.shape):
        raise ValueError(f"components must be 1 to {min(matrix.shape)} for rows of {_size(matrix)}, got {components}")
    mean = matrix.mean(axis=0)
    left, spread, axes = xp.linalg.svd(matrix - mean, full_matrices=False)
    if float(spread[0]) == 0:
        raise ValueError("rows are all equal: there is no variance to explain")
    # A component's sign is arbitrary, and devices differ: fix it.
    largest = xp.abs(axes).argmax(axis=1)[:, None]
    signs = xp.sign(xp.take_along_axis(axes, largest, axis=1))
    variance = spread**2 / (len(matrix) - 1)
    return {
        "mean": mean.tolist(),
        "components": (axes * signs)[:components].tolist(),
        "variance": variance[:components].tolist(),
        "share": (variance / variance.sum())[:components].tolist(),
        "scores": (left * spread * signs[:, 0])[:, :components].tolist(),
    }


def _size(matrix: object) -> str:
    rows, columns = matrix.shape  # type: ignore[attr-defined]
    return f"{rows} x {columns}"
