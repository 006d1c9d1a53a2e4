"""The EL2N score of a training example."""

import numpy as np


def el2n(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """L2 norm of the error vectors: ||p - y||, y one-hot (paper, Definition 2.1, for one network).

    Args:
        probabilities: Softmax outputs, shape (N, classes).
        labels: Class of each example, shape (N,).

    Returns:
        Shape (N,), of the probabilities' type; 0 (certain and right) to sqrt(2) (certain and wrong).
    """
    errors = probabilities.copy()
    errors[np.arange(len(labels)), labels] -= 1
    return np.linalg.norm(errors, axis=1)
