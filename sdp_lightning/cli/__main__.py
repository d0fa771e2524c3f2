"""``python -m sdp_lightning.cli`` is the command ``sdp-lightning``."""

from __future__ import annotations

import sys

from sdp_lightning.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
