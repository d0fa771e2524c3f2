"""Rows of reasoning-gym's tasks, generated when they are read; equal settings give equal rows.

Importing reasoning-gym takes seconds, so it is imported with the first task.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any, overload

from sdp_lightning.config.import_path import require
from sdp_lightning.errors import ConfigError
from sdp_lightning.types import Row

ASK = "\nGive the final answer between <answer> and </answer>."


class ReasoningGymRows(Sequence[Row]):
    r"""The rows of one task of reasoning-gym.

    Each row has ``prompt``, ``answer``, ``id``, and ``metadata``, which
    :mod:`sdp_lightning.rewards.reasoning_gym` needs for the score. Row n depends on ``seed`` and n.

    With ``shots`` the prompt is ``Question: ..\nAnswer: ..`` for so many solved tasks, then the
    question of the row, for models without a chat template: score it with ``line_reward``. Without
    shots it is the question and a line that asks for ``<answer>`` tags: score it with ``reward``.

    Args:
        name: name of the task, such as ``chain_sum``.
        size: number of rows.
        seed: seed of the task; another seed gives other rows.
        shots: number of solved tasks before each question, the same for all rows and not among
            them.
        settings: settings of the task in reasoning-gym.

    Raises:
        ConfigError: if reasoning-gym is not installed, refuses name or settings, or has no answer
            to show in ``shots``.
    """

    def __init__(
        self, name: str, *, size: int = 500, seed: int = 0, shots: int = 0, **settings: Any
    ) -> None:
        require("reasoning_gym", "reasoning-gym", f"reasoning_gym:{name}")
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        if name not in DATASETS:
            near = difflib.get_close_matches(name, list(DATASETS), n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"reasoning-gym has no task {name!r}.{hint}")
        if size < 1 or shots < 0:
            raise ConfigError(f"size must be at least 1 and shots 0, got {size} and {shots}.")
        try:
            self._tasks: Any = reasoning_gym.create_dataset(
                name, size=size + shots, seed=seed, **settings
            )
        except (TypeError, AssertionError, ValueError) as error:
            raise ConfigError(f"reasoning-gym refuses {name} with {settings}: {error}.") from error
        self.name, self.size, self.shots = name, size, shots
        tasks = [self._tasks[size + shot] for shot in range(shots)]
        solved = [f"Question: {t['question']}\nAnswer: {self._answer_of(t)}\n\n" for t in tasks]
        self._solved = "".join(solved)

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        position = range(self.size)[index]
        if isinstance(position, range):
            return [self[each] for each in position]
        task = self._tasks[position]
        question = str(task["question"])
        prompt = f"{self._solved}Question: {question}\nAnswer:" if self.shots else question + ASK
        return {
            "id": f"{self.name}-{position}",
            "prompt": prompt,
            "question": question,
            "answer": task["answer"],
            "metadata": {"source_dataset": self.name, **task["metadata"]},
        }

    def _answer_of(self, task: Any) -> str:
        """A right answer, as text. Tasks with many have an example of one in their metadata."""
        if task["answer"] is not None:
            return str(task["answer"])
        examples = [value for key, value in task["metadata"].items() if key.endswith("answer")]
        for example in examples:
            text = example if isinstance(example, str) else json.dumps(example)
            if self._tasks.score_answer(text, task) == 1:
                return text
        raise ConfigError(
            f"reasoning-gym has no answer to {self.name} that solved examples could show: leave "
            "out shots, and score the text between <answer> tags with the reward named reward."
        )
