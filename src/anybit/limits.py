"""Every limit that untrusted input meets, in one place; a refusal names the constant.

Reasons are beside the values: each is well above the largest genuine file known and well below what would hurt.
"""

from __future__ import annotations

from typing import Final

# safetensors
MAX_SAFETENSORS_HEADER: Final = 100_000_000  # bytes; the format's own limit
MAX_TENSORS_PER_FILE: Final = 500_000  # the largest known shard has about 70,000
MAX_TENSORS: Final = 4_000_000  # 512 experts x 60 layers x 3 x 4 tensors = 369,000 today
MAX_SHARDS: Final = 10_000  # 1,433 seen
MAX_RANK: Final = 8  # stacked experts have 3, convolutions 5
MAX_DIM: Final = 2**31 - 1  # a dimension above int32 is no weight
MAX_ELEMENTS: Final = 2**40  # products above int32 are real (65536 x 65536)
MAX_NAME_BYTES: Final = 512  # the longest genuine name seen has 68
MAX_METADATA_ENTRIES: Final = 100_000
MAX_METADATA_VALUE: Final = 16 * 2**20  # torchao writes one JSON string a tensor

# JSON
MAX_CONFIG_JSON: Final = 16 * 2**20  # ignore lists of 100,000 names
MAX_INDEX_JSON: Final = 256 * 2**20  # MAX_TENSORS names of 64 bytes
MAX_JSON_DEPTH: Final = 64  # serde_json stops at 128, Python at its recursion limit
MAX_INT_DIGITS: Final = 20  # a u64

# GGUF
MAX_GGUF_RANK: Final = 4  # GGML_MAX_DIMS
MAX_GGUF_KV: Final = 100_000
MAX_GGUF_STRING: Final = 16 * 2**20
MAX_GGUF_ARRAY: Final = 4_194_304  # the largest vocabulary has 262,144 tokens
MAX_GGUF_ALIGNMENT: Final = 2**20
MAX_GGUF_HEADER: Final = 512 * 2**20  # metadata and tensor list; a large vocabulary takes 10 MB
MAX_TOKEN_BYTES: Final = 65_536  # one token of a vocabulary

# HQQ's native pickles, read by opcodes
MAX_PICKLE: Final = 32 * 2**20  # bytes; a module takes about 800, so 40,000 modules
MAX_PICKLE_DEPTH: Final = 4  # module, key, meta, key of a nested meta
MAX_MARKS: Final = 1_000  # open at once; genuine files nest 4 deep
MAX_STACK: Final = 100_000  # values at once; picklers write items in batches of 1,000

# patterns
MAX_PATTERNS: Final = 100_000
MAX_PATTERN_CHARS: Final = 65_536
PATTERN_SECONDS: Final = 0.2  # one match; see checkpoints/patterns.py
PATTERN_SECONDS_IN_ALL: Final = 5.0

# model config
MAX_HIDDEN: Final = 2**20
MAX_LAYERS: Final = 10_000
MAX_VOCABULARY: Final = 2**24

# templates, prompts, terminal
MAX_TEMPLATE: Final = 2**20
MAX_PROMPT_BYTES: Final = 64 * 2**20
RENDER_SECONDS: Final = 10.0
RENDER_BYTES: Final = 64 * 2**20
SHOWN_CHARS: Final = 200
