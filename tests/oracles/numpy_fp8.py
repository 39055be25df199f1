"""FP8 in NumPy, one tile and one group at a time: what `dsv3_jax/fp8` is compared with."""

import math

import ml_dtypes
import numpy as np

CASTS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def nearest(x, form):
    """float64 rounded to a format's mantissa, ties to even, after saturating."""
    x = np.clip(np.asarray(x, np.float64), -form.largest, form.largest)
    exponent = np.maximum(np.frexp(x)[1] - 1, form.least_exponent)
    unit = 2.0 ** (exponent - form.mantissa_bits)
    return np.rint(x / unit) * unit


def cast(x, form):
    """By the cast of ml_dtypes where it has the format."""
    if form.name not in CASTS:
        return nearest(x, form)
    return np.clip(np.asarray(x, np.float32), -form.largest, form.largest).astype(CASTS[form.name]).astype(np.float64)


def tiles(shape, tile):
    """((tile's row, column), slices of its values) for every tile of a matrix."""
    rows, columns = (side or max(size, 1) for side, size in zip(tile, shape, strict=True))
    for i, top in enumerate(range(0, shape[0], rows)):
        for j, left in enumerate(range(0, shape[1], columns)):
            yield (i, j), (slice(top, top + rows), slice(left, left + columns))


def quantise(x, how, scales=None):
    """-> values [M, K], scales [tiles, tiles], unless these are given; float64 that float32 holds: computed in float32."""
    x = np.asarray(x, np.float32)
    index = [place for place, _ in tiles(x.shape, how.tile)]
    values, new = np.zeros(x.shape), np.zeros([1 + max((i[axis] for i in index), default=-1) for axis in (0, 1)])
    for place, part in tiles(x.shape, how.tile):
        new[place] = scale_of(np.max(np.abs(x[part])), how) if scales is None else scales[place]
        values[part] = cast(x[part] / np.float32(new[place]), how.form)
    return values, new


def scale_of(amax, how):
    """Of one tile. XLA divides by a constant by multiplying with its reciprocal; where a tie follows, that unit decides it."""
    scale = np.maximum(np.float32(amax), np.float32(how.floor)) * (np.float32(1) / np.float32(how.form.largest))
    mantissa, exponent = np.frexp(scale)
    return np.float32(2.0 ** (int(exponent) - (mantissa == 0.5))) if how.power_of_two else scale


def spread(scales, shape, tile):
    """Each value's scale."""
    out = np.zeros(shape)
    for place, part in tiles(shape, tile):
        out[part] = scales[place]
    return out


def rounded(x, how):
    """x after rounding, the product of value and scale in float32; [M, K] or a stack."""
    x = np.asarray(x)
    if x.ndim > 2:
        return np.stack([rounded(matrix, how) for matrix in x])
    values, scales = quantise(x, how)
    return (values.astype(np.float32) * spread(scales, x.shape, how.tile).astype(np.float32)).astype(np.float64)


def error_bound(x, how):
    """Of each value: half a unit in the last place of a normal number, or of a subnormal one, in its tile's scale.

    Scales up to twice as large where they are powers of two; and some float32 roundings, of the scale, x / s and s q.
    """
    x = np.asarray(x, np.float64)
    bound = np.zeros(x.shape)
    for _, part in tiles(x.shape, how.tile):
        scale = max(np.max(np.abs(x[part])), how.floor) / how.form.largest * (2 if how.power_of_two else 1)
        least = 2.0 ** (how.form.least_exponent - how.form.mantissa_bits - 1) * scale
        bound[part] = np.maximum(2.0 ** -(how.form.mantissa_bits + 1) * np.abs(x[part]), least)
    return bound + 2.0**-22 * np.abs(x)


def tensor_core(a, b, start, reading):
    """start + a b: groups of 32 products, each cut to 14 bits below the group's largest exponent, towards zero.

    A product's exponent is the sum of its operands'. Aligned, the total is cut with them, and the new one to 14 bits again.
    """
    (m, k), n = a.shape, b.shape[1]
    total = np.array(start, np.float32)
    for i in range(m):
        for j in range(n):
            for first in range(0, k, 32):
                pairs = list(zip(a[i, first : first + 32].tolist(), b[first : first + 32, j].tolist(), strict=True))
                terms = [float(np.float32(x * y)) for x, y in pairs]
                exponents = [exponent(x) + exponent(y) for x, y in pairs if x * y]
                if reading == "aligned":
                    terms.append(float(total[i, j]))
                    exponents += [exponent(terms[-1])] if terms[-1] else []
                added = sum(cut_to(term, max(exponents, default=0)) for term in terms)
                total[i, j] = cut_to(added) if reading == "aligned" else total[i, j] + np.float32(added)
    return total


def exponent(x):
    """1 <= |x| / 2^exponent < 2."""
    return math.frexp(x)[1] - 1


def cut_to(x, largest=None):
    """x cut towards zero to 14 bits below an exponent, or its own."""
    unit = 2.0 ** ((exponent(x) if largest is None else largest) - 13)
    return math.trunc(x / unit) * unit
