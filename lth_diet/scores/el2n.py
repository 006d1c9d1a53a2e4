"""The EL2N score of training examples."""

import numpy as np


def el2n(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """EL2N scores by one network: ||p - y||₂ with one-hot y (paper, Definition 2.1).

    Args:
        probabilities: Softmax outputs, shape (N, classes).
        labels: Class of each example, 0 to classes - 1, shape (N,).

    Returns:
        Scores of shape (N,) and of the same type as `probabilities`, from 0 (certain and correct) to sqrt(2) (certain
        and incorrect).
    """
    errors = probabilities.copy()
    errors[np.arange(len(labels)), labels] -= 1
    return np.linalg.norm(errors, axis=1)
