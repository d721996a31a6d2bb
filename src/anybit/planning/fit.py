"""Whether and how a planned model fits a device, and how fast a roofline says it would run. Torch-free.

Memory is what the plan predicts (weights in their layouts, plain tensors, workspace, key-value cache) against the
device's, less a reserve for the driver and fragmentation. Speed is the sum of the plan's prices over the layers, and
the cache read once a token: an upper limit, with its assumptions named in the answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from anybit.kernels.request import REGIMES
from anybit.planning.config_facts import number, text_facts
from anybit.planning.cuts import TensorParallel, kv_heads, tensor_parallel
from anybit.planning.memory import Memory
from anybit.planning.passes import expected_experts, experts_of, is_tied, multiplications
from anybit.planning.plan import Plan
from anybit.schemes import Layer

# share of a device's memory that a model may take
USABLE: Final = {"cpu": 0.85, "nvidia": 0.92, "amd": 0.92}
LINK_BYTES_PER_SECOND: Final = 25e9  # host to device, PCIe 4.0 x16 as measured by most users
# what a decoder block spends beside its products in a decode step: norms, rotation, attention of a short context.
# Measured on an H200 (captured steps of an 8 B model, `anybit bench model`) and on two cores of Zen 5, blocks shortened
# (hosts/blocks.py, hosts/blocks_gpu.py); AMD as a guess from that. transformers' own block takes 100 us on an H200.
BETWEEN_SECONDS: Final = {"cpu": 30e-6, "nvidia": 15e-6, "amd": 25e-6}
HOSTS_BETWEEN_SECONDS: Final = {"cpu": 30e-6, "nvidia": 100e-6, "amd": 100e-6}
_DEVICES: Final = (1, 2, 4, 8, 16)
_NO_LIMIT: Final = 2**31
_LARGEST: Final = 8


@dataclass(frozen=True)
class Largest:
    """One of the largest layers."""

    layers: tuple[str, ...]
    scheme: str
    shape: tuple[int, ...]
    bytes_each: int

    def to_dict(self) -> dict[str, Any]:
        """The layer as data."""
        return {"layers": list(self.layers), "scheme": self.scheme, "shape": list(self.shape),
                "bytes_each": self.bytes_each}


@dataclass(frozen=True)
class Offload:
    """Blocks or experts that stay in host memory where the device is too small.

    kind           "experts" or "blocks"
    count, of      how many decoder blocks are concerned, of how many
    host_bytes     held by the host, all sent over the link for a prompt
    bytes_a_token  sent over the link for one token: of experts as many as it chooses
    """

    kind: str
    count: int
    of: int
    host_bytes: int
    bytes_a_token: int

    def to_dict(self) -> dict[str, Any]:
        """The offload as data."""
        return {"kind": self.kind, "blocks": self.count, "of": self.of, "host_bytes": self.host_bytes,
                "bytes_sent_a_token": self.bytes_a_token,
                "seconds_a_token": self.bytes_a_token / LINK_BYTES_PER_SECOND}


@dataclass(frozen=True)
class Fit:
    """The answer for one platform, context and batch.

    needed           bytes with the whole cache
    available        bytes of the device that a model may take
    devices          how many of the device hold it, None if 16 do not
    most_context     tokens of context that fit on one device at this batch
    own_context      what the config says the model was made for, None where it says nothing
    decode, prefill  tokens a second by the roofline, all sequences of the batch together; None where one device cannot
                     run it, not even with its blocks on the host
    """

    plan: Plan
    context: int
    batch: int
    needed: int
    available: int
    devices: int | None
    most_context: int
    own_context: int | None
    offload: Offload | None
    decode: float | None
    prefill: float | None
    largest: tuple[Largest, ...]
    parallel: tuple[TensorParallel, ...]
    assumptions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """On one device."""
        return self.needed <= self.available

    def to_dict(self) -> dict[str, Any]:
        """The answer as data."""
        return {
            "platform": self.plan.platform.name, "arch": self.plan.platform.arch, "dtype": self.plan.dtype,
            "context": self.context, "batch": self.batch, "fits": self.fits, "needed_bytes": self.needed,
            "available_bytes": self.available, "devices": self.devices,
            "largest_context": self.most_context, "model_context": self.own_context,
            "offload": None if self.offload is None else self.offload.to_dict(),
            "decode_tokens_per_second": self.decode, "prefill_tokens_per_second": self.prefill,
            "largest_layers": [row.to_dict() for row in self.largest],
            "tensor_parallel": [row.to_dict() for row in self.parallel],
            "assumptions": list(self.assumptions), "memory": self.plan.memory.to_dict(),
        }


def fit(plan: Plan, layers: Mapping[str, Layer], config: Mapping[str, Any], context: int, batch: int) -> Fit:
    """The answer for a plan. `context` tokens for each of `batch` sequences."""
    memory, platform = plan.memory, plan.platform
    available = int(platform.memory_bytes * USABLE[platform.vendor])
    needed = memory.at(context, batch)
    # a CPU is the host: there is nowhere to move its blocks to
    offload = _offload(plan, config, needed - available) if needed > available and platform.vendor != "cpu" else None
    runs = needed <= available or offload is not None
    decode, prefill = speeds(plan, config, context, batch, offload) if runs else (None, None)
    parallel = tuple(tensor_parallel(layers.values(), config))
    return Fit(
        plan, context, batch, needed, available, _devices(plan, parallel, available, context, batch, config),
        _most_context(memory, available, batch), _own_context(config), offload, decode, prefill,
        tuple(_largest(plan)), parallel, tuple(_assumptions(plan, offload)),
    )


def _most_context(memory: Memory, available: int, batch: int) -> int:
    """The most tokens of each sequence that fit, by halving: windows make the cache grow less than evenly."""
    least, most = 0, _NO_LIMIT
    if memory.at(most, batch) <= available:
        return most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if memory.at(middle, batch) <= available else (least, middle)
    return least


def _own_context(config: Mapping[str, Any]) -> int | None:
    found = text_facts(config).get("max_position_embeddings")
    return found if isinstance(found, int) else None


def _devices(
    plan: Plan, parallel: tuple[TensorParallel, ...], available: int, context: int, batch: int,
    config: Mapping[str, Any],
) -> int | None:
    """The fewest devices that hold the model, of the sizes that divide it."""
    memory = plan.memory
    sizes = {row.size: row.divides for row in parallel}
    heads = kv_heads(config) or 1  # a device holds at least one head's keys and values: more devices share none
    for count in _DEVICES:
        if count > 1 and not sizes.get(count, False):
            continue
        cache = memory.cache(context, batch) / min(count, heads)
        if memory.weights / count + cache + memory.plain + memory.workspace <= available:
            return count
    return None


def speeds(
    plan: Plan, config: Mapping[str, Any], context: int, batch: int, offload: Offload | None = None
) -> tuple[float, float]:
    """(decode, prefill) in tokens a second by the prices of the plan and what an offload sends over the link."""
    bandwidth = max(plan.platform.bandwidth, 1e9)
    tokens = REGIMES["prefill"][1]
    step = _pass_seconds(plan, config, batch) + plan.memory.cache(context, batch) / bandwidth
    step += BETWEEN_SECONDS[plan.platform.vendor] * _blocks(config)
    prompt = _pass_seconds(plan, config, tokens)
    if offload is not None:
        step += _sent_bytes(offload, config, batch) / LINK_BYTES_PER_SECOND
        prompt += offload.host_bytes / LINK_BYTES_PER_SECOND
    return batch / max(step, 1e-9), tokens / max(prompt, 1e-9)


def _sent_bytes(offload: Offload, config: Mapping[str, Any], tokens: int) -> float:
    """What the host sends for one pass of a few tokens: of experts those that some token chooses."""
    experts, used = experts_of(config)
    if offload.kind != "experts" or not experts:
        return offload.host_bytes
    return offload.host_bytes * expected_experts(experts, used, tokens) / experts


def _blocks(config: Mapping[str, Any]) -> int:
    """Decoder blocks; 0 where the config does not say."""
    return number(text_facts(config), "num_hidden_layers", "n_layer")


def _pass_seconds(plan: Plan, config: Mapping[str, Any], tokens: int) -> float:
    """One pass of `tokens` through every layer; of experts those that run."""
    tied = is_tied(name for unit in plan.units for name in unit.layers)
    return sum(multiplications(unit.kind, unit.layers, unit.shape, config, tokens, tied=tied)
               * unit.choice.at(tokens).price.seconds
               for unit in plan.units)


def _block(name: str) -> str | None:
    """The decoder block that a layer belongs to: its name up to the first number."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if index is None else ".".join(parts[: index + 1])


def _offload(plan: Plan, config: Mapping[str, Any], missing: int) -> Offload | None:
    """The fewest blocks whose experts, or else whose layers, stay on the host; None if even all do not suffice."""
    experts: dict[str, int] = {}
    blocks: dict[str, int] = {}
    for unit in plan.units:
        for name in unit.layers:
            block = _block(name)
            if block is None:
                continue
            blocks[block] = blocks.get(block, 0) + unit.stored_bytes
            if unit.kind == "experts" or ".experts." in name:
                experts[block] = experts.get(block, 0) + unit.stored_bytes
    count, used = experts_of(config)
    share = used / count if count and used else 1.0
    for kind, found, sent in (("experts", experts, share), ("blocks", blocks, 1.0)):
        if sum(found.values()) < missing:
            continue
        held = taken = 0
        for size in sorted(found.values(), reverse=True):
            if held >= missing:
                break
            held += size
            taken += 1
        return Offload(kind, taken, len(found), held, math.ceil(held * sent))
    return None


def _largest(plan: Plan) -> Iterator[Largest]:
    units = sorted(plan.units, key=lambda unit: -unit.stored_bytes)
    for unit in units[:_LARGEST]:
        yield Largest(unit.layers, str(unit.scheme), unit.shape, unit.stored_bytes)


def _assumptions(plan: Plan, offload: Offload | None) -> Iterator[str]:
    platform = plan.platform
    share = USABLE[platform.vendor]
    yield f"{share:.0%} of the device's {platform.memory_bytes / 2**30:.0f} GiB is usable"
    yield f"memory moves {platform.bandwidth / 1e9:.0f} GB/s; prices are " + _price_words(plan)
    between = BETWEEN_SECONDS[platform.vendor] * 1e6
    yield (f"attention reads the cache once a token; {between:.0f} µs a block beside its products in a decode step; "
           "sampling and the time to launch what is not captured are not counted")
    if any(".experts." in name or unit.kind == "experts" for unit in plan.units for name in unit.layers):
        yield "tokens choose experts evenly"
    if offload is not None:
        yield f"what stays on the host is sent at {LINK_BYTES_PER_SECOND / 1e9:.0f} GB/s"


def _price_words(plan: Plan) -> str:
    kinds = {chosen.price.source for unit in plan.units for chosen in unit.choice.kernels.values()}
    return " and ".join(sorted(kinds)) or "modelled"
