"""Operations on features of any encoder."""

import numpy as np


def normalise(features: np.ndarray) -> np.ndarray:
    """Scales features (S, E) to length 1, in float64.

    Raises:
        ValueError: if a feature is not finite or is zero, as after an overflow in the model.
    """
    features = np.asarray(features, dtype=np.float64)
    lengths = np.linalg.norm(features, axis=-1, keepdims=True)
    if not np.isfinite(lengths).all() or not lengths.all():
        raise ValueError("a feature is not finite or is zero: the extractor's weights or the video are damaged")
    return features / lengths
