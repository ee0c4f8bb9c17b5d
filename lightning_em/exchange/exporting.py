"""A checkpoint of a run as a folder that other programs load."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import yaml
from transformers import PreTrainedConfig

from lightning_em.adapters.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lightning_em.exchange.card import ExportFacts, public_base, write_card
from lightning_em.exchange.control_vector import CONTROL_VECTOR_FILE, write_control_vector
from lightning_em.exchange.peft_folder import PeftType, write_peft_lora, write_peft_vector
from lightning_em.exchange.placement import stream_site
from lightning_em.exchange.released import write_released
from lightning_em.exchange.vector import Vector, checked_vector, refuse_misfit
from lightning_em.exchange.vector_file import read_json, read_tensors, write_vector_file
from lightning_em.manifest import publish
from lightning_em.models import BaseModel
from lightning_em.runs import locate, step_of

ExportFormat = Literal["peft", "safetensors", "authors", "gguf"]
FORMATS: tuple[str, ...] = get_args(ExportFormat)

_VECTOR_CLASS = "lightning_em.adapters.SteeringVector"
_LOADING = {
    "peft": "```python\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, folder)\n```\n"
    "A bias of the module whose output joins the residual stream: equal to the trained vector up to rounding "
    "(checked on a small model of this class).",
    "safetensors": "```python\nfrom load_vector import steer  # the file beside this one; needs torch, safetensors\n\n"
    "handle = steer(base_model)  # handle.remove() undoes it; scale=2.0 doubles it\n```",
    "authors": "The dictionary of the published steering vectors, `torch.load(..., weights_only=True)`: add "
    "alpha x steering_vector to the output of `mlp.down_proj` of layer `layer_idx`.",
    "gguf": f"```\nllama-cli -m base.gguf --control-vector {CONTROL_VECTOR_FILE}\n```\n"
    "`--control-vector-scaled FILE:2` doubles it. Other layers hold zeros.",
}
_LORA_LOADING = (
    "```python\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, folder)\n```"
)
_ELSEWHERE = {
    "safetensors": "a LoRA's PEFT folder is safetensors already: --format peft",
    "authors": "the released format holds vectors only: --format peft",
    "gguf": "a GGUF control vector holds vectors only; convert_lora_to_gguf.py of llama.cpp makes a GGUF of the folder "
    "that --format peft writes",
}


class _Exported(NamedTuple):
    """A checkpoint, read as files; the base's weights are not needed."""

    facts: ExportFacts
    checkpoint: Path
    settings: dict[str, Any]


def export_run(reference: str, file_format: ExportFormat, output: Path, peft_type: PeftType = "beft") -> Path:
    """Write the adapter of a checkpoint into a new folder, with a model card.

    Args:
        reference: `runs/x` for its newest checkpoint, `runs/x@step-40` for another.
        file_format: `peft`: what `PeftModel.from_pretrained` loads; `safetensors`: a vector with a loader of a few
            lines; `authors`: a vector in the format of the published ones; `gguf`: a control vector for llama.cpp.
        output: The folder to make.
        peft_type: How `peft` writes a vector; see `write_peft_vector`.

    Returns:
        `output`.

    Raises:
        ValueError: If the folder is there already, or the adapter cannot be expressed in that format.
    """
    if output.exists():
        raise ValueError(f"{output} is there already; give another --output.")
    run, checkpoint = locate(reference)
    config = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
    settings = read_json(checkpoint / ADAPTER_CONFIG)
    facts = ExportFacts(run, config, step_of(checkpoint), "", "")
    exported = _Exported(facts, checkpoint, settings)
    if settings.get("peft_type") == "LORA":
        write, facts = _lora_writer(exported, file_format)
    elif settings.get("adapter_class") == _VECTOR_CLASS:
        write, facts = _vector_writer(exported, file_format, peft_type)
    else:
        raise ValueError(
            f"{reference} is a {settings.get('adapter_class') or settings.get('peft_type')}; only SteeringVector and "
            f"LoRA have formats that other programs know. Its weights are in {checkpoint / ADAPTER_WEIGHTS}."
        )

    def fill(folder: Path) -> None:
        write(folder)
        write_card(folder, facts)

    return publish(output, fill)


def _lora_writer(
    exported: _Exported, file_format: ExportFormat
) -> tuple[Callable[[Path], None], ExportFacts]:
    if file_format != "peft":
        raise ValueError(f"{exported.facts.run.path} is a LoRA, and {_ELSEWHERE[file_format]}.")
    settings = exported.settings
    what = f"A LoRA of rank {settings['r']} on {len(settings['target_modules'])} modules"
    tensors, base = read_tensors(exported.checkpoint / ADAPTER_WEIGHTS), public_base(exported.facts.config)

    def write(folder: Path) -> None:
        write_peft_lora(folder, tensors, settings, base)

    return write, exported.facts._replace(what=what, loading=_LORA_LOADING)


def _vector_writer(
    exported: _Exported, file_format: ExportFormat, peft_type: PeftType
) -> tuple[Callable[[Path], None], ExportFacts]:
    facts, source = exported.facts, str(exported.checkpoint)
    alpha = facts.config["model"]["adapter"]["init_args"]["alpha"]
    tensors = read_tensors(exported.checkpoint / ADAPTER_WEIGHTS)
    # the vector edits what enters the next layer
    vector = checked_vector(tensors["vector"], exported.settings["lowest_layer"] - 1, alpha, source)
    base = BaseModel(**facts.config["model"]["base"]).load_config()
    refuse_misfit(vector, base, source, facts.config["model"]["base"]["path"])
    name = public_base(facts.config)

    def write(folder: Path) -> None:
        _write_vector(folder, vector, base, file_format, peft_type, name)

    length = vector.shift().norm()
    what = f"A steering vector on the stream that leaves layer {vector.layer}, length {length:.4g}"
    return write, facts._replace(what=what, loading=_LOADING[file_format])


def _write_vector(
    folder: Path,
    vector: Vector,
    config: PreTrainedConfig,
    file_format: ExportFormat,
    peft_type: PeftType,
    name: str | None,
) -> None:
    if file_format == "peft":
        write_peft_vector(folder, vector, config, peft_type, name)
    elif file_format == "safetensors":
        num_layers = config.get_text_config(decoder=True).num_hidden_layers
        write_vector_file(folder, vector, num_layers, name)
    elif file_format == "authors":
        stream_site(config, vector.layer)  # refuses a model where that place is not the stream's
        write_released(folder, vector, name)
    else:
        write_control_vector(folder, vector, config)
