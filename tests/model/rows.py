"""Rows of packed documents, for tests of attention and the model."""

import numpy as np


def packed(rows, length):
    """Positions and segments of documents one after the other, and padding to ``length``."""
    positions, segments = np.zeros((2, len(rows), length), np.int32)
    for row, lengths in enumerate(rows):
        ends = np.cumsum([0, *lengths])
        for index, size in enumerate(lengths):
            positions[row, ends[index] : ends[index + 1]] = np.arange(size)
            segments[row, ends[index] : ends[index + 1]] = index + 1
    return positions, segments
