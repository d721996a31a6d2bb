"""The memory contract on a generated checkpoint of more than a gigabyte: peak of loading against packed size.

    python benchmarks/memory.py [--dialect modelopt|gptq] [--layers 10] [--hidden 4096] [--folder DIR] [--device cpu]

Writes an NVFP4 (ModelOpt layout) or 4-bit GPTQ checkpoint of a Llama with random codes, loads it in a fresh process and
prints: bytes in the file, predicted and measured bytes held, measured peak, and the contract's bound
(packed + temporaries of the largest layer + 256 MiB). Exit code 1 if the bound is broken.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

KV_HEADS, HEAD_DIM, VOCABULARY = 8, 128, 32000
MIB = 2**20


def shapes(hidden: int) -> dict[str, tuple[int, int]]:
    """[N, K] of a layer's matrices, in Llama's proportions."""
    wide, kv = hidden * 43 // 16 // 256 * 256, KV_HEADS * HEAD_DIM
    return {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }

LOAD = """
import json, sys
import torch
import anybit
from anybit.hosts.meter import anonymous_bytes
checkpoint = anybit.open(sys.argv[1])
import transformers, transformers.models.llama.modeling_llama
model = anybit.load(checkpoint, device=sys.argv[2], dtype="bfloat16" if sys.argv[2] != "cpu" else "float32")
info = model.anybit
with torch.inference_mode():
    logits = model(torch.arange(8, device=model.device)[None]).logits
print(json.dumps({"held": info.held_bytes, "peak": info.peak_bytes, "memory": info.plan.memory.to_dict(),
                  "stored": checkpoint.stored_bytes, "finite": bool(torch.isfinite(logits).all())}))
"""


def nvfp4(n: int, k: int) -> dict[str, object]:
    """One layer in ModelOpt's NVFP4 layout."""
    import torch

    return {
        "weight": torch.randint(0, 256, (n, k // 2), dtype=torch.uint8),
        "weight_scale": torch.randint(0x30, 0x50, (n, k // 16), dtype=torch.uint8).view(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(1e-3),
        "input_scale": torch.tensor(1e-2),
    }


def gptq(n: int, k: int) -> dict[str, object]:
    """One layer in GPTQ's 4-bit layout, groups of 128."""
    import torch

    return {
        "qweight": torch.randint(-(2**31), 2**31, (k // 8, n), dtype=torch.int64).to(torch.int32),
        "qzeros": torch.full((k // 128, n // 8), 0x77777777, dtype=torch.int32),
        "scales": (torch.rand(k // 128, n) * 0.01).half(),
        "g_idx": (torch.arange(k) // 128).to(torch.int32),
    }


CONFIGS = {
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False,
             "checkpoint_format": "gptq"},
}


def write(folder: Path, dialect: str, layers: int, hidden: int) -> None:
    """Write the checkpoint, a shard a layer."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "vocab_size": VOCABULARY,
        "intermediate_size": shapes(hidden)["mlp.up_proj"][0], "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "max_position_embeddings": 4096, "dtype": "bfloat16", "quantization_config": CONFIGS[dialect],
    }
    (folder / "config.json").write_text(json.dumps(config))
    make = nvfp4 if dialect == "modelopt" else gptq
    names: dict[str, str] = {}

    def shard(number: int, tensors: dict[str, object]) -> None:
        file = f"model-{number:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, folder / file)
        names.update(dict.fromkeys(tensors, file))

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    for layer in range(layers):
        start = f"model.layers.{layer}."
        tensors = {f"{start}{name}.{part}": t for name, shape in shapes(hidden).items()
                   for part, t in make(*shape).items()}
        shard(layer + 1, tensors | {f"{start}input_layernorm.weight": ones.clone(),
                                    f"{start}post_attention_layernorm.weight": ones.clone()})
    shard(layers + 1, {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, hidden).bfloat16(),
        "lm_head.weight": (torch.randn(VOCABULARY, hidden) * 0.01).bfloat16(),
        "model.norm.weight": ones.clone(),
    })
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def main() -> int:
    """Write, load, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dialect", choices=CONFIGS, default="modelopt")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.json").exists():
            write(folder, options.dialect, options.layers, options.hidden)
        command = [sys.executable, "-c", LOAD, str(folder), options.device]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    memory = found["memory"]
    predicted = memory["weights_bytes"] + memory["plain_bytes"]
    bound = found["stored"] + memory["loading_bytes"] + 256 * MIB
    print(f"{options.dialect}, {options.layers} layers, {options.device}: in the files {found['stored'] / MIB:.0f} MiB")
    print(f"held      predicted {predicted / MIB:.0f} MiB, measured {found['held'] / MIB:.0f} MiB "
          f"({found['held'] / predicted - 1:+.1%})")
    print(f"peak      measured {found['peak'] / MIB:.0f} MiB, bound {bound / MIB:.0f} MiB")
    print(f"logits    {'finite' if found['finite'] else 'NOT FINITE'}")
    return 0 if found["peak"] <= bound and found["finite"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
