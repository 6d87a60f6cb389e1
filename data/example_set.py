"""What the generators of this folder share: a stream of random numbers that is the same everywhere, and the writer of example
sets for train_sessa: safetensors files with `inputs` and `targets` (N,T), -1 where a position has no target. Needs numpy.
"""
import bisect
import itertools
import json
import os
import struct
import sys

import numpy as np

DTYPES = {np.uint8: "U8", np.int8: "I8", np.int16: "I16", np.int32: "I32"}


class Stream:
    """Uniform numbers of a seed, drawn one by one; and what is made of them. Only PCG64's doubles are used, whose order numpy
    keeps from version to version."""

    def __init__(self, seed):
        generator = np.random.Generator(np.random.PCG64(seed))
        self.uniform = itertools.chain.from_iterable(iter(lambda: generator.random(1 << 16).tolist(), None)).__next__

    def integer(self, low, high):
        """low ≤ n ≤ high, all equally likely"""
        return low + int(self.uniform() * (high - low + 1))

    def weighted(self, sums):
        """An index, by weights whose running sums are given."""
        return bisect.bisect_right(sums, self.uniform() * sums[-1])

    def shuffle(self, items):
        """Puts the list into random order (Fisher and Yates)."""
        for i in range(len(items) - 1, 0, -1):
            j = self.integer(0, i)
            items[i], items[j] = items[j], items[i]


def padded(rows, width, filler):
    """Lists of integers as one array (N,width), filled up at their ends."""
    out = np.full((len(rows), width), filler, dtype=np.int32)
    for i, row in enumerate(rows):
        out[i, :len(row)] = row
    return out


def write_examples(path, metadata, **tensors):
    """A safetensors file of integer arrays, each in the narrowest type that holds it. Goes to a temporary file first."""
    header, offset, parts = {"__metadata__": {key: str(value) for key, value in metadata.items()}}, 0, []
    for name, array in sorted(tensors.items()):
        dtype = next(t for t in DTYPES if np.iinfo(t).min <= array.min() and array.max() <= np.iinfo(t).max)
        data = array.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
        header[name] = {"dtype": DTYPES[dtype], "shape": list(array.shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
        parts.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(path + ".part", "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text + b"".join(parts))
        os.replace(path + ".part", path)
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}")
