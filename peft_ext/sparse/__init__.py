r"""The sparse delta: k values at k indices of a weight, and nothing of the weight's size kept for it.

A delta on a weight W of n entries is a vector of values `(k,)` and their sorted flat indices `(k,)`:

    W' = W + S,    S.view(-1)[indices] = values,    d values = (dL/dW').view(-1)[indices]

- `encode` / `decode`: the indices in `encoded_size(k, n)` bytes, a number that follows from k and n alone;
- `sparse_apply`: the module with its weight so changed; for the backward it keeps the input, the values and the indices;
- `top_indices`: those of the largest scores, exact and the same on every machine.

**Which product is used.** Measured on one thread of an AVX-512 CPU (Linear(1024, 1024), 1 % density, the dense product
of 64, 512 and 2,048 rows being 1): writing the delta into the weight and putting the kept originals back adds 0.03,
0.01 and 0.01; a product with S alone, in CSR, costs 0.06, 0.06 and 0.08; the gradient of the values by a sampled
product costs 0.08, 0.07 and 0.13, by the dense product 1. Hence: the weight is written to where nothing is lost by
adding to it (a plain dense weight in the precision that is computed in), and otherwise (half precision, autocast,
quantised, offloaded) the base runs as it is and the product with S is added in fp32. On CUDA, where sparse products
are slow, the dense product of one layer, which lives only until its entries are read, gives the gradient.
"""

from .codec import decode, decode_alone, decode_unchecked, encode, encoded_size, index_dtype, pack_bits, unpack_bits
from .operations import (
    Conv2dOperation,
    EmbeddingOperation,
    Gradient,
    LinearOperation,
    Operation,
    csr,
    operation_of,
)
from .product import Observer, SparseProduct, add_product, can_be_written, sparse_apply
from .selection import CHUNK, check_spread, drawn_keys, is_in, random_indices, top_indices


__all__ = [
    "CHUNK",
    "Conv2dOperation",
    "EmbeddingOperation",
    "Gradient",
    "LinearOperation",
    "Observer",
    "Operation",
    "SparseProduct",
    "add_product",
    "can_be_written",
    "check_spread",
    "csr",
    "decode",
    "decode_alone",
    "decode_unchecked",
    "drawn_keys",
    "encode",
    "encoded_size",
    "index_dtype",
    "is_in",
    "operation_of",
    "pack_bits",
    "random_indices",
    "sparse_apply",
    "top_indices",
    "unpack_bits",
]
