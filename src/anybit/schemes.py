"""What a layer *is*: descriptions without tensors, hashable, torch-free.

A weight is evaluated in float32 in this order (W is [N, K]; every step rounds once, as float32 does):

    v = value(code)                                  exact
    v = v - zero_point          (Offset "zero_point": integer or float)
    s = level 0 (*|/) level 1 (*|/) ...               order "scales_first": scales meet each other before the code
    v = v * s
    v = v + minimum  or  v - minimum                  (Offset "minimum")
    v = round_to(v)                                   (only where the format itself rounds)

With order "code_first" each level meets the value in turn: ((v * level 0) * level 1) ... . The order is part of a
format; where two orders are both exact the dialect takes scales_first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

from anybit.numerics.formats import WIDE_FLOATS, number_format

Block = tuple[int, int]

CHANNEL: Final[Block] = (1, 0)  # one scale for a row; 0 stands for the whole dimension
TENSOR: Final[Block] = (0, 0)  # one scale for the matrix (for stacked experts: one for each expert)


def group(size: int) -> Block:
    """The block of `size` consecutive inputs of one row."""
    return (1, size)


Placement = Literal["grid", "gathered", "flat", "strided"]
"""Which scale a weight [n, k] uses.

grid      block (n // rows, k // cols); the last block may be short
gathered  (n // rows, group_map[k]): act-order, the columns of a group are scattered
flat      element n*K + k of the flattened matrix // cols (bitsandbytes, HQQ axis 1 with ragged rows)
strided   element n*K + k of the flattened matrix % count (HQQ axis 0)
"""

Granularity = Literal["tensor", "token", "group"]
LayerKind = Literal["linear", "embedding", "experts"]


@dataclass(frozen=True)
class ScaleLevel:
    """One level of scales: how it is stored, whom it serves, how it acts.

    format     number format of the stored scale ("bfloat16", "fp8_e4m3fn", "e8m0", "uint6", ...)
    block      (rows, cols) that share a scale, 0 = the whole dimension
    divide     the level divides instead of multiplying
    """

    format: str
    block: Block
    divide: bool = False
    placement: Placement = "grid"

    def __str__(self) -> str:
        return _SHORT.get(self.format, self.format) + ("-divisor" if self.divide else "")


@dataclass(frozen=True)
class Offset:
    """What is added to or subtracted from a weight beside its scale.

    kind       "zero_point": subtracted from the code before scaling; "minimum": added after scaling
    format     stored number format: an integer for classic zero points, a float for HQQ's
    block      as in ScaleLevel
    levels     scales of a minimum that is itself quantized (GGUF K types: float16 x uint6)
    subtract   a minimum that is subtracted (GGUF K types)
    """

    kind: Literal["zero_point", "minimum"]
    format: str
    block: Block
    levels: tuple[ScaleLevel, ...] = ()
    subtract: bool = False
    placement: Placement = "grid"


@dataclass(frozen=True)
class ActivationSpec:
    """How a layer quantizes its input (or output) before the product.

    element      number format of the codes
    dynamic      scale from the data; otherwise from the file
    granularity  who shares a scale: tensor, token (a row of x), group (`group_size` inputs of a token)
    symmetric    without a zero point
    recipe       the exact arithmetic, a name in `numerics.activations.RECIPES`
    bound        recipe's own constant: FBGEMM's bound on the row maximum, LLM.int8's outlier threshold
    """

    element: str
    dynamic: bool
    granularity: Granularity
    recipe: str
    group_size: int = 0
    symmetric: bool = True
    bound: float | None = None

    def __str__(self) -> str:
        where = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        words = [self.element, "dynamic" if self.dynamic else "static", where]
        return " ".join(words if self.symmetric else [*words, "asymmetric"])


@dataclass(frozen=True)
class Scheme:
    """What a layer is, whatever dialect it came from: equal Schemes run on the same kernels.

    element     number format of the codes; a wide float for an unquantized layer
    scales      finest level first
    act_order   columns use the scale of group_map[k]; a kernel may sort the columns and permute x
    pre_scale   the input is multiplied by a vector [K] first
    activation  quantization of the input, None = weight-only
    output      fake quantization of the output (compressed-tensors' output_activations)
    """

    element: str
    scales: tuple[ScaleLevel, ...] = ()
    order: Literal["scales_first", "code_first"] = "scales_first"
    offset: Offset | None = None
    round_to: str | None = None
    act_order: bool = False
    pre_scale: bool = False
    activation: ActivationSpec | None = None
    output: ActivationSpec | None = None

    @property
    def is_quantized(self) -> bool:
        """False for a layer stored in a wide float."""
        return self.element not in WIDE_FLOATS

    @property
    def weight_bits(self) -> int:
        """Bits of one code, scales not counted."""
        return number_format(self.element).bits

    @property
    def granularity(self) -> str:
        """The finest level's block in the field's words: g128, channel, tensor, 128x128, none."""
        if not self.scales:
            return "none"
        level = self.scales[0]
        if level.placement in ("flat", "strided"):
            return f"{level.placement}{level.block[1]}"
        return _block_name(level.block)

    @property
    def wxay(self) -> str:
        """The short W4A16 form."""
        act = number_format(self.activation.element).bits if self.activation else 16
        return f"W{self.weight_bits}A{act}"

    def weight_only(self) -> Scheme:
        """This scheme without activation quantization."""
        return Scheme(self.element, self.scales, self.order, self.offset, self.round_to, self.act_order, self.pre_scale)

    def weight_name(self) -> str:
        """The weight half of the printed name."""
        if not self.is_quantized:
            return _SHORT.get(self.element, self.element)
        words = [_mx_name(self), self.granularity, *(str(level) for level in self.scales[:1])]
        words += [f"{level}-global" for level in self.scales[1:]]
        if self.offset is not None:
            words.append("zp" if self.offset.kind == "zero_point" else "min")
        if self.act_order:
            words.append("act-order")
        if self.pre_scale:
            words.append("pre-scale")
        return "·".join(w for w in words if w)

    def __str__(self) -> str:
        name = self.weight_name()
        if self.activation is not None:
            name += f" | a: {self.activation}"
        if self.output is not None:
            name += f" | y: {self.output}"
        return name


_SHORT: Final = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def _block_name(block: Block) -> str:
    rows, cols = block
    if block == TENSOR:
        return "tensor"
    if block == CHANNEL:
        return "channel"
    return f"g{cols}" if rows == 1 else f"{rows}x{cols}"


def _mx_name(scheme: Scheme) -> str:
    if scheme.element == "fp4_e2m1" and scheme.scales and scheme.scales[0].format == "fp8_e4m3fn":
        return "nvfp4"
    if scheme.scales and scheme.scales[0].format == "e8m0" and scheme.scales[0].block == (1, 32):
        return {"fp4_e2m1": "mxfp4", "fp6_e2m3": "mxfp6_e2m3", "fp6_e3m2": "mxfp6_e3m2", "fp8_e4m3fn": "mxfp8"}.get(
            scheme.element, scheme.element
        )
    return scheme.element


def dense(element: str) -> Scheme:
    """The scheme of an unquantized layer stored as `element`."""
    return Scheme(element)


def _empty() -> Mapping[str, object]:
    return MappingProxyType({})


def _no_tensors() -> Mapping[str, str]:
    return MappingProxyType({})


@dataclass(frozen=True)
class Layer:
    """One weight of a checkpoint, known from headers alone.

    name     module name in the checkpoint (for GGUF: the Hugging Face name), without ".weight"
    shape    (N, K) out x in, or (E, N, K) for stacked experts
    tensors  role -> tensor name in the files; the roles are the dialect's ("weight", "weight_scale", "bias", ...)
    storage  the dialect's own facts that `canonicalize` needs (packing, bits, version ...)
    stored_bytes  bytes of those tensors in the files
    notes    remarks for a reader of `inspect` ("zero points differ from 8 although sym is set")
    """

    name: str
    kind: LayerKind
    shape: tuple[int, ...]
    scheme: Scheme
    tensors: Mapping[str, str] = field(default_factory=_no_tensors)
    storage: Mapping[str, object] = field(default_factory=_empty)
    stored_bytes: int = 0
    notes: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        """Number of weights."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def has_bias(self) -> bool:
        """True if the files hold a bias for it."""
        return "bias" in self.tensors


@dataclass(frozen=True)
class KVCacheSpec:
    """A quantized key-value cache that a checkpoint declares: keys after the rotary embedding, and values.

    element      number format of the cached codes
    scales       module name of the attention -> (k tensor, v tensor), "" where the scale is missing (then 1.0)
    dynamic      scales from the data of each call; otherwise from the file
    granularity  who shares a scale of an attention: tensor (all its heads) or head
    latent       attentions whose keys and values come out of one projection, `kv_b_proj`, whose output the scale is of
    """

    element: str
    scales: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    dynamic: bool = False
    granularity: Literal["tensor", "head"] = "tensor"
    latent: frozenset[str] = frozenset()

    @property
    def activation(self) -> ActivationSpec:
        """The arithmetic for a key or value [.., tokens, head_dim], by the recipe of the element."""
        recipe, group_size = KV_CACHE_RECIPES[self.element]
        return ActivationSpec(self.element, self.dynamic, "group" if group_size else "tensor", recipe, group_size)

    def row_bytes(self, width: int) -> int:
        """Bytes of one token's key or value of one head, `width` numbers: codes, then scales of the token's own."""
        group_size = KV_CACHE_RECIPES[self.element][1]
        codes = -(-width * number_format(self.element).bits // 8)
        return codes + (-(-width // group_size) if group_size else 0) + (4 if self.dynamic else 0)

    def __str__(self) -> str:
        return f"{self.element} {'dynamic' if self.dynamic else 'static'} {self.granularity}"


# element of a cache -> recipe in numerics.activations.RECIPES, values that share an e4m3 block scale (0: none)
KV_CACHE_RECIPES: Final = {
    "fp8_e4m3fn": ("fp8_static_divide", 0),  # docs/formats/compressed_tensors.md §8: e4m3(x / scale)
    "fp4_e2m1": ("nvfp4_reciprocal", 16),  # docs/formats/modelopt.md §8: the stored value is the global scale
}
