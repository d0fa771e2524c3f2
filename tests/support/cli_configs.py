"""The config of a fit of a second, as a user's file has it."""

from __future__ import annotations

from typing import Any

TASK = """
prompts = [{"prompt": f"{i}+{i}="} for i in range(8)]

def reward(completion, row):
    return len(set(completion)) / 10
"""


def small_config(model_folder: str, **trainer: Any) -> dict[str, Any]:
    """A config whose prompts and reward are in ``task.py``; ``trainer`` has further settings."""
    workflow = {"reward": "task.py:reward", "group_size": 2, "sampling": {"max_new_tokens": 4}}
    return {
        "trainer": {
            "max_steps": 2,
            "accelerator": "cpu",
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            **trainer,
        },
        "model": {"model": model_folder},
        "data": {
            "prompts": "task.py:prompts",
            "workflow": {"class_path": "sdp_lightning.RLVRWorkflow", "init_args": workflow},
            "rollout": {"batch_size": 2, "timeout_s": 60.0},
        },
    }
