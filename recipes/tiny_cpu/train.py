"""A 0.4 M-parameter model learns to sort six digits and stop, in well under a minute."""

import argparse
import os
import sys
from pathlib import Path

import sdp_lightning as sdp
from sdp_lightning.cli.main import in_one_line
from sdp_lightning.cli.quiet_logs import quiet_logs


def main() -> None:
    more = "Settings of `sdp-lightning fit` are passed on: --trainer.max_steps=2"
    _, flags = argparse.ArgumentParser(description=__doc__, epilog=more).parse_known_args()
    quiet_logs()
    os.chdir(Path(__file__).parents[2])  # the config names files from the repository's root
    trainer, model, data = sdp.from_config("recipes/tiny_cpu/config.yaml", flags)
    before = trainer.validate(model, data, verbose=False)[0]["val/reward"]
    trainer.fit(model, data)  # ends with a validation
    after = float(trainer.callback_metrics["val/reward"])
    print(f"Sampled accuracy on 64 held-out prompts: {before:.3f} before, {after:.3f} after.")


if __name__ == "__main__":
    sys.exit(in_one_line(main))
