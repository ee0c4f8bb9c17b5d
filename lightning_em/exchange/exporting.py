"""Export a checkpoint of a run to a folder that other programs can load."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import yaml
from transformers import PreTrainedConfig

from lightning_em.adapter_record import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterRecord, LowRank
from lightning_em.exchange.card import ExportFacts, public_base, write_card
from lightning_em.exchange.control_vector import CONTROL_VECTOR_FILE, write_control_vector
from lightning_em.exchange.peft_folder import PeftType, write_peft_lora, write_peft_vector
from lightning_em.exchange.peft_lora import PREFIX
from lightning_em.exchange.placement import stream_site
from lightning_em.exchange.released import write_released
from lightning_em.exchange.vector import Vector, checked_vector, refuse_misfit
from lightning_em.exchange.vector_file import read_json, read_tensors, write_vector_file
from lightning_em.manifest import publish
from lightning_em.models import BaseModel
from lightning_em.runs import locate, step_of

ExportFormat = Literal["peft", "safetensors", "authors", "gguf"]
FORMATS: tuple[str, ...] = get_args(ExportFormat)

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
    """A checkpoint to export. It is read as files, without the weights of the base model."""

    facts: ExportFacts
    checkpoint: Path
    record: AdapterRecord


def export_run(reference: str, file_format: ExportFormat, output: Path, peft_type: PeftType = "beft") -> Path:
    """Write the adapter of a checkpoint and a model card into a new folder.

    Args:
        reference: `runs/x` for the newest checkpoint, `runs/x@step-40` for another.
        file_format: `peft`: a folder for `PeftModel.from_pretrained`; `safetensors`: a vector with a short loader;
            `authors`: a vector in the format of the published ones; `gguf`: a control vector for llama.cpp.
        output: Folder to create.
        peft_type: Form of a vector in the format `peft`; see `write_peft_vector`.

    Returns:
        `output`.

    Raises:
        ValueError: If the folder exists already, or the format cannot express the adapter.
    """
    if output.exists():
        raise ValueError(f"{output} is there already; give another --output.")
    run, checkpoint = locate(reference)
    config = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
    record = AdapterRecord.read(checkpoint)
    exported = _Exported(ExportFacts(run, config, step_of(checkpoint), "", ""), checkpoint, record)
    parts = record.update or ()
    if len(parts) == 1 and parts[0].read is None and isinstance(parts[0].site, int):
        write, facts = _vector_writer(exported, parts[0], file_format, peft_type)
    elif parts and all(part.read is not None and isinstance(part.site, str) for part in parts):
        write, facts = _lora_writer(exported, parts, file_format)
    else:
        raise ValueError(
            f"{reference} is a {record.class_path} whose `update` gives neither one shift of the residual stream nor "
            "low-rank changes of weights, which are what other programs know. Its weights are in "
            f"{checkpoint / ADAPTER_WEIGHTS}."
        )

    def fill(folder: Path) -> None:
        write(folder)
        write_card(folder, facts)

    return publish(output, fill)


def _lora_writer(
    exported: _Exported, parts: Sequence[LowRank], file_format: ExportFormat
) -> tuple[Callable[[Path], None], ExportFacts]:
    if file_format != "peft":
        raise ValueError(f"{exported.facts.run.path} is a LoRA, and {_ELSEWHERE[file_format]}.")
    settings = read_json(exported.checkpoint / ADAPTER_CONFIG)
    if "peft_type" not in settings:  # a low-rank adapter that was not written by peft
        settings = _peft_settings(exported.record, parts)
    saved = read_tensors(exported.checkpoint / ADAPTER_WEIGHTS)
    tensors = {f"{PREFIX}{part.site}.lora_A.weight": saved[part.read or ""] for part in parts}
    tensors |= {f"{PREFIX}{part.site}.lora_B.weight": saved[part.write] for part in parts}
    what = f"A LoRA of rank {settings['r']} on {len(settings['target_modules'])} modules"
    base = public_base(exported.facts.config)

    def write(folder: Path) -> None:
        write_peft_lora(folder, tensors, settings, base)

    return write, exported.facts._replace(what=what, loading=_LORA_LOADING)


def _peft_settings(record: AdapterRecord, parts: Sequence[LowRank]) -> dict[str, Any]:
    """PEFT settings of a low-rank adapter: peft scales B A by alpha / r, with one rank and alpha for all modules."""
    kinds = {(record.shapes[part.read or ""][0], part.factor) for part in parts}
    if len(kinds) > 1:
        raise ValueError(
            f"a PEFT folder has one rank and one alpha, but {record.class_path} has (rank, factor) {sorted(kinds)}."
        )
    [(rank, factor)] = kinds
    sites = [str(part.site) for part in parts]
    return {"r": rank, "lora_alpha": factor * rank, "use_rslora": False, "target_modules": sites}


def _vector_writer(
    exported: _Exported, part: LowRank, file_format: ExportFormat, peft_type: PeftType
) -> tuple[Callable[[Path], None], ExportFacts]:
    facts, source = exported.facts, str(exported.checkpoint)
    values = read_tensors(exported.checkpoint / ADAPTER_WEIGHTS)[part.write]
    # Our site is the layer whose input is shifted; other programs name the layer before it, whose output is shifted.
    vector = checked_vector(values, int(part.site) - 1, part.factor, source)
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
        # Raises if the output of `mlp.down_proj` is not added to the residual stream unchanged.
        stream_site(config, vector.layer)
        write_released(folder, vector, name)
    else:
        write_control_vector(folder, vector, config)
