"""The quantizer kernels to compile for each architecture: every recipe once, as products that take it launch it.

Torch-free. The recipes stand in kernels/triton/recipes.py. 8 bit integers are compiled beside the int8 product, all
others beside the fp8 product, although the weight-only kernels launch them as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from anybit.kernels.compiling import CompileCase
from anybit.kernels.triton import recipes
from anybit.kernels.triton.recipes import ARITHMETIC, can_fake_quantize
from anybit.schemes import ActivationSpec, ActivationGranularity

__all__ = ["quantizer_cases"]
