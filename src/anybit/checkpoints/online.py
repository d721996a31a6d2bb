"""`--quantization`: layers quantized while loading, without calibration data, one at a time.

Torch-free until a weight comes: planning asks `scheme_of` from headers alone, the hosts call the quantizer with each
weight as it is read. What names mean stands in `online_schemes.py`, what rules mean in `online_rules.py`, how they are
written in `online_text.py`; here is which layers stay as they are, and the quantizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from anybit.checkpoints.online_rules import Match, Matcher, Online, is_expert, near_rules
from anybit.checkpoints.online_schemes import ALIASES, ONLINE, OnlineScheme, online_scheme
from anybit.checkpoints.online_text import Quantization, online, online_list
from anybit.errors import AnybitError, Unsupported
from anybit.schemes import Layer, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weights import Dense, QuantizedWeight

__all__ = [
    "ALIASES", "ONLINE", "Online", "OnlineQuantizer", "OnlineScheme", "Quantization", "applies_to", "online",
    "online_list", "quantize", "quantizer", "why_not",
]  # fmt: skip

# Layers that stay as they are: small, and what they decide is discrete (a token, an expert)
HEADS: Final = frozenset({"lm_head", "embed_out", "output_layer", "score"})
ROUTERS: Final = frozenset({"gate", "router", "wg", "shared_expert_gate"})


def _kept(layer: Layer) -> str | None:
    """What a layer is that stays unless a rule means it: an embedding, an output head, a router."""
    path = layer.name.removesuffix(".weight").split(".")
    if layer.kind == "embedding":
        return "an embedding"
    if path[-1] in HEADS:
        return "the output head"
    if not ROUTERS.isdisjoint(path[-2:]):  # mlp.gate, block_sparse_moe.router.layer
        return "a router"
    return None


def _means(match: Match, kept: str) -> bool:
    """True if a rule means a layer that otherwise stays: by its name; no pattern takes a router by chance."""
    by_chance = ("within", "pattern") if kept != "a router" else ("within", "pattern", "spelled")
    return match.by not in by_chance and not (match.by == "class" and kept != "an embedding")


def _unfit(layer: Layer, name: str) -> str | None:
    """Why the scheme called `name` cannot take the layer."""
    entry = online_scheme(name)
    if entry.experts_only and not is_expert(layer):
        return f"{name} is for experts alone"
    if layer.shape[-1] % entry.group_size:
        return f"K {layer.shape[-1]} is no multiple of the group size {entry.group_size}"
    return None


def why_not(layer: Layer, scheme_name: str) -> str | None:
    """Why `layer` stays as it is under --quantization NAME without rules; None if it is quantized.

    From headers alone. A layer that is quantized already is quantized again, from its reference weight. Embeddings,
    output heads and routers stay, and what the scheme's groups do not divide.
    """
    online_scheme(scheme_name)
    return _kept(layer) or _unfit(layer, scheme_name)


def applies_to(layer: Layer, scheme_name: str) -> bool:
    """True if --quantization NAME changes this layer."""
    return why_not(layer, scheme_name) is None


def quantize(weight: Dense, scheme_name: str) -> QuantizedWeight:
    """A dense weight [.., N, K] quantized; codes of 4 and 6 bits are packed.

    Raises Unsupported where K is no multiple of the group size, Damaged for NaN or infinity in the weight.
    """
    from anybit.numerics.packing import PackedCodes
    from anybit.numerics.quantize import quantize_weight
    from anybit.weights import QuantizedWeight

    entry = online_scheme(scheme_name)
    if weight.shape[-1] % entry.group_size:
        raise Unsupported(
            "the groups of the scheme do not divide the weight", found=f"K {weight.shape[-1]}",
            wanted=f"a multiple of {entry.group_size}", remedy="leave this layer as it is, or take fp8_per_channel",
        )
    bits, sign = entry.scheme.weight_bits, entry.scheme.element == "int4"
    result = quantize_weight(entry.rule, weight.tensor, _packing(bits) if bits < 8 else None)
    codes: Tensor | PackedCodes = result.codes
    if bits < 8:
        codes = PackedCodes(result.codes, bits, weight.shape[-1], sign="twos_complement" if sign else "unsigned")
    return QuantizedWeight(entry.scheme, weight.shape, codes, result.scales, result.zero_point, bias=weight.bias)


def _packing(bits: int) -> Callable[[Tensor], Tensor]:
    """Codes [.., N, K] of a slab to packed rows: so a whole layer's codes are never held unpacked."""
    import torch

    from anybit.numerics.packing import pack_stream

    def pack(codes: Tensor) -> Tensor:
        fields = codes.view(torch.uint8) & (2**bits - 1) if codes.dtype == torch.int8 else codes
        return pack_stream(fields, bits)

    return pack


@dataclass(frozen=True)
class Decision:
    """What becomes of a layer.

    name    the scheme's name, None: it stays
    rule    the rule that decided, "" for the recipe's own name or nobody
    reason  why it stays although a rule or the recipe's name asked for it
    """

    name: str | None
    rule: str = ""
    reason: str = ""


class OnlineQuantizer:
    """--quantization as the hosts use it: asked for schemes while planning, called with weights while loading."""

    def __init__(self, asked: Online) -> None:
        """Compile the rules; raises Unsupported for a pattern that does not compile."""
        self.online = asked
        self._names = dict(asked.targets)
        self._ignored, self._chosen = Matcher(asked.ignore), Matcher(self._names)
        self._decided: dict[tuple[str, tuple[int, ...]], Decision] = {}

    def __str__(self) -> str:
        return str(self.online)

    def decide(self, layer: Layer) -> Decision:
        """What becomes of the layer; from headers alone."""
        key = (layer.name, layer.shape)
        if key not in self._decided:
            self._decided[key] = self._decide(layer)
        return self._decided[key]

    def _decide(self, layer: Layer) -> Decision:
        ignored = self._ignored.matches(layer)
        if ignored:
            return Decision(None, ignored[0].rule)
        kept = _kept(layer)
        matches = [m for m in self._chosen.matches(layer) if kept is None or _means(m, kept)]
        rule = matches[0].rule if matches else ""
        name = self._names[rule] if rule else self.online.name
        if name is None or (kept and not rule):
            return Decision(None)
        reason = _unfit(layer, name)
        if reason and not rule and online_scheme(name).experts_only and not is_expert(layer):
            return Decision(None)  # nobody asked for this layer
        return Decision(None, rule, reason) if reason else Decision(name, rule)

    def scheme_of(self, layer: Layer) -> Scheme | None:
        """The scheme that the layer gets, None if it stays as it is; no tensor is read."""
        name = self.decide(layer).name
        return None if name is None else online_scheme(name).scheme

    def __call__(self, layer: Layer, weight: QuantizedWeight | Dense) -> QuantizedWeight | Dense:
        """The weight quantized, or itself where it stays; errors carry the layer's name."""
        from anybit.schemes import dense
        from anybit.weights import Dense

        name = self.decide(layer).name
        if name is None:
            return weight
        if not isinstance(weight, Dense):
            reference = weight.dequantize()
            if weight.pre_scale is not None:  # (x * p) W^T = x (W * p)^T: the new scheme has no place for p
                reference = reference * weight.pre_scale.float().unsqueeze(-2)
            weight = Dense(dense("float32"), reference, weight.bias)
        try:
            return quantize(weight, name)
        except AnybitError as error:
            error.where = error.where or layer.name
            raise

    def notes(self, layers: Iterable[Layer]) -> tuple[str, ...]:
        """What a user should know before it runs: rules without effect, layers that stay against the request."""
        listed = list(layers)
        decided = [(layer, self.decide(layer)) for layer in listed]
        found = [note for rule in (*self._names, *self.online.ignore) for note in self._note(rule, decided)]
        reasons = Counter(decision.reason for _, decision in decided if decision.reason)
        for reason, count in reasons.items():
            first = next(layer.name for layer, decision in decided if decision.reason == reason)
            others = f" and {count - 1:,} more layers stay" if count > 1 else " stays"
            found.append(f"{first}{others} unchanged: {reason}")
        if not any(decision.name for _, decision in decided):
            found.append(f"--quantization {self} quantizes nothing here")
        if self.online.name == "online":
            found.append("online without rules is fp8_per_tensor")
        return tuple(found)

    def _note(self, rule: str, decided: list[tuple[Layer, Decision]]) -> list[str]:
        """The remark about a rule that decides no layer."""
        if any(decision.rule == rule for _, decision in decided):
            return []
        matcher = Matcher([rule])
        taken = [layer for layer, _ in decided if matcher.matches(layer)]
        if not taken:
            near = near_rules(rule, (layer.name for layer, _ in decided))
            return [f"the rule {rule} takes no layer" + (f"; perhaps {near}" if near else "")]
        kept = _kept(taken[0])
        if kept is not None:
            return [f"the rule {rule} takes {kept} only, which stays unless named: {taken[0].name}={self._names[rule]}"]
        return [f"the rule {rule} decides nothing: more particular rules, or none, take its {len(taken):,} layers"]


def quantizer(quantization: Quantization) -> OnlineQuantizer:
    """The quantizer of a name in ONLINE, of text with rules, or of an Online; Unsupported for anything else."""
    asked = online(quantization)
    if asked is None:
        raise Unsupported("nothing would be quantized", where="--quantization", found=str(quantization),
                          wanted="a scheme", remedy="--quantization nvfp4, or leave it out")
    return OnlineQuantizer(asked)
