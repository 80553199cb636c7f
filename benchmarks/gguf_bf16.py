"""Write the demo's GGUF with its weights as bfloat16, for llama.cpp.

    python benchmarks/gguf_bf16.py IN.gguf OUT.gguf

llama.cpp then computes with exactly the numbers that the other engines read from safetensors.
Matrices become bf16; vectors stay float32, as llama.cpp wants its norms.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

sys.path.insert(0, str(Path(__file__).parent))
from common.report import command_line


def main(source: str, target: str) -> None:
    """Copy every metadata field and tensor, dequantised and rounded to bfloat16."""
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value, kind = field.contents(), field.types[0]
        if name == "general.file_type":
            value = 32  # LLAMA_FTYPE_MOSTLY_BF16
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, kind, inner)
    bf16 = GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        weights = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if weights.ndim == 1:
            writer.add_tensor(tensor.name, weights)
        else:
            writer.add_tensor(tensor.name, quantize(weights, bf16), raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("source", metavar="IN.gguf")
    parser.add_argument("target", metavar="OUT.gguf")
    args = parser.parse_args()
    main(args.source, args.target)
