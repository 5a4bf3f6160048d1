"""What is done with features, whichever encoder they are from."""

import numpy as np


def normalise(features: np.ndarray) -> np.ndarray:
    """Features (S, E) at length 1, in float64.

    Raises:
        ValueError: if one is not finite or has no length, as a model gives whose numbers overflowed.
    """
    features = np.asarray(features, dtype=np.float64)
    lengths = np.linalg.norm(features, axis=-1, keepdims=True)
    if not np.isfinite(lengths).all() or not lengths.all():
        raise ValueError("a feature is not finite or is zero: the extractor's weights or the video are damaged")
    return features / lengths
