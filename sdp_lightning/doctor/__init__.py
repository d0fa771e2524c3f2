"""What works on this machine, and what to do about what does not."""

from sdp_lightning.doctor.finding import Finding
from sdp_lightning.doctor.machine import examine

__all__ = ["Finding", "examine"]
