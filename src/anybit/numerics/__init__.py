"""Number formats, rounding, scale recipes, packing: pure functions on tensors, independent of any checkpoint.

`formats` is a torch-free table; everything else here imports torch. Definitions and every rounding variant with its
source: docs/formats/numerics.md.
"""
