"""What works on this machine, and what to do about what does not."""

from sdp_lightning.cli.doctor.finding import Finding
from sdp_lightning.cli.doctor.machine import examine

__all__ = ["Finding", "examine"]
