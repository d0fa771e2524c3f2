"""``sdp-lightning init``: a folder with a task that trains, made from a recipe."""

from __future__ import annotations

from sdp_lightning.cli.init.folder import TEMPLATES as TEMPLATES, write_task as write_task
