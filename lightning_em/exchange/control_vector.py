"""Control vectors as llama.cpp reads them: one GGUF file with a direction for each layer.

Tensor `direction.N` is added to the output of block N, blocks counted from 0; block 0 has none.
"""

import importlib
from pathlib import Path

import numpy as np
from transformers import PreTrainedConfig

from lightning_em.exchange.vector import Vector

CONTROL_VECTOR_FILE = "steering_vector.gguf"
# Where llama.cpp's name of an architecture is not transformers' own.
_NAMES = {"gpt_neox": "gptneox", "mistral": "llama", "phi": "phi2", "gemma3_text": "gemma3"}


def write_control_vector(folder: Path, vector: Vector, config: PreTrainedConfig) -> None:
    """Write the vector in its layer, and zeros in the others: some readers stop at the first gap.

    Args:
        folder: An existing one.
        vector: The vector; its alpha is multiplied in, so that strength 1 is the trained one.
        config: Of its base model.

    Raises:
        ValueError: If it steers layer 0.
    """
    if vector.layer == 0:
        raise ValueError(
            "a control vector cannot act on the output of layer 0: llama.cpp counts directions from layer 1. "
            "Use --format safetensors."
        )
    gguf = importlib.import_module("gguf")  # an extra
    text = config.get_text_config(decoder=True)
    writer = gguf.GGUFWriter(str(folder / CONTROL_VECTOR_FILE), "controlvector")
    writer.add_string("controlvector.model_hint", _NAMES.get(text.model_type, text.model_type))
    writer.add_uint32("controlvector.layer_count", text.num_hidden_layers - 1)
    shift = vector.shift().numpy().astype(np.float32)
    for layer in range(1, text.num_hidden_layers):
        writer.add_tensor(f"direction.{layer}", shift if layer == vector.layer else np.zeros_like(shift))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
