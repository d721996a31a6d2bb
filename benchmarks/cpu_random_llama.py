"""A GGUF file of 1.1 B Llama shapes with random weights that anybit and llama.cpp both run (`cpu_model.py --model`).

    python benchmarks/cpu_random_llama.py FILE.gguf [--type Q4_0] [--layers 22]

Blocks are random bytes with scales that keep activations finite; written by gguf-py. No tokenizer: engines are asked
for tokens by number.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np

HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 32, 4, 32000
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "attn_v": (HIDDEN * KV_HEADS // HEADS, HIDDEN), "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
}  # fmt: skip
HALVES = {"Q4_0": (0,), "Q4_1": (0, 1), "Q8_0": (0,), "Q4_K": (0, 1), "Q5_K": (0, 1), "Q6_K": (104,)}  # of a block


def random_blocks(kind: str, shape: tuple[int, int], made: np.random.Generator) -> np.ndarray:
    """Rows [N, bytes of a row] uint8 of one ggml type; each float16 of a block is about a thousandth."""
    columns, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = made.integers(0, 256, (shape[0], shape[1] // columns, size), dtype=np.uint8)
    for place in HALVES[kind]:
        scale = (made.random(blocks.shape[:2]) * 1e-3 + 1e-4).astype(np.float16)
        blocks.view()[..., 2 * place : 2 * place + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def main() -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--type", default="Q4_0", choices=sorted(HALVES))
    parser.add_argument("--layers", type=int, default=22)
    options = parser.parse_args()
    kind, made = gguf.GGMLQuantizationType[options.type], np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(options.file), "llama")
    writer.add_block_count(options.layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", random_blocks(options.type, (VOCABULARY, HIDDEN), made), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for layer in range(options.layers):
        for name, shape in SHAPES.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", random_blocks(options.type, shape, made), raw_dtype=kind)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
