"""Export of a training checkpoint as a Hugging Face folder."""

from sdp_lightning.cli.export.checkpoints import MODEL_KEY, open_checkpoint
from sdp_lightning.cli.export.writing import DTYPES, Export, export_checkpoint

__all__ = ["DTYPES", "MODEL_KEY", "Export", "export_checkpoint", "open_checkpoint"]
