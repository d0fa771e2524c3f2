"""Checks of a machine and of config files, with remedies."""

from sdp_lightning.cli.doctor.finding import Finding
from sdp_lightning.cli.doctor.machine import examine

__all__ = ["Finding", "examine"]
