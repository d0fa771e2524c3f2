"""From a checkpoint to a folder that transformers loads, by the command and by the function."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoTokenizer

import sdp_lightning as sdp
from sdp_lightning.cli.export import export_checkpoint
from sdp_lightning.cli.main import main
from sdp_lightning.testing import tiny_model, tiny_tokenizer
from support.exports import TIED, content, fit, load, names_in
from support.fork_server import ForkServer
from support.plain_forwards import logits
from support.rank_environment import free_port, rank_environment

# Trained by this package ------------------------------------------------------------


@pytest.mark.parametrize("trainable", [None, r"layers\.1\."], ids=["all trained", "one layer"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_exported_checkpoint_has_the_logits_of_the_policy_that_was_trained(
    tied: bool,
    trainable: str | None,
    model_folder: str,
    untied_folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    base = model_folder if tied else untied_folder
    checkpoint, expected = fit(base, tmp_path / "run", trainable=trainable)
    out = tmp_path / "deep" / "out"
    assert main(["export", str(checkpoint), str(out), "--model", base]) == 0
    assert f"wrote {out}: {20 + (not tied)} weights" in capsys.readouterr().out
    model = load(out)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(expected, logits(load(Path(base))))  # it was trained
    assert model.dtype == torch.float32
    assert (TIED in names_in(out)) is not tied
    assert set(content(out)) == set(content(Path(base)))
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # others may read it
    text = "12+3="
    assert AutoTokenizer.from_pretrained(out)(text) == tiny_tokenizer()(text)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_the_command_runs_in_a_process_of_its_own_without_lightning(
    trained: Path, model_folder: str, tmp_path: Path
):
    script = (
        "import sys\n"
        "from sdp_lightning.cli.main import main\n"
        "status = main()\n"
        "assert 'lightning' not in sys.modules\n"
        "sys.exit(status)\n"
    )
    command = [sys.executable, "-W", "error", "-c", script, "export", str(trained)]
    arguments = [str(tmp_path / "out"), "--model", model_folder, "--dtype", "bfloat16"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"wrote {tmp_path / 'out'}: 20 weights, 0.0 MB")
    state = torch.load(trained, weights_only=True)["state_dict"]
    model = load(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[f"policy.{name}"].bfloat16())


# Sharded ------------------------------------------------------------

TRAIN_SHARDED = """
import sys
import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

folder, out = sys.argv[1:]

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.policy = None

    def configure_model(self):
        if self.policy is None:
            self.policy = AutoModelForCausalLM.from_pretrained(folder).train()
            for part in (*self.policy.model.layers, self.policy):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.policy(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.policy.parameters(), lr=1e-2)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["sdp_model_id"] = folder

if __name__ == "__main__":
    torch.set_num_threads(1)
    strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.arange(3, 35).view(4, 8), 2))
    trainer.save_checkpoint(out)
"""


def train_sharded(server: ForkServer, base: str, place: Path) -> Path:
    """The folder that 2 processes write under FSDP2."""
    out, port = place / "shards", free_port()
    with (place / "errors").open("w") as errors:
        ranks = [
            server.start(
                TRAIN_SHARDED,
                *(base, str(out)),
                stderr=errors.fileno(),
                env=rank_environment(rank, 2, port),
            )
            for rank in range(2)
        ]
    try:
        assert [rank.wait(200.0) for rank in ranks] == [0, 0], (place / "errors").read_text()
    finally:
        for rank in ranks:
            rank.kill()
    assert len(list(out.glob("*.distcp"))) == 2
    return out


def test_a_sharded_checkpoint_has_the_logits_of_its_weights(
    fork_server: ForkServer, model_folder: str, tmp_path: Path
):
    """Read the other way, by torch's own converter."""
    shards = train_sharded(fork_server, model_folder, tmp_path)
    dcp_to_torch_save(shards, tmp_path / "all.pt")
    state = torch.load(tmp_path / "all.pt", weights_only=True)["state_dict"]
    reference = tiny_model()
    reference.load_state_dict({n.removeprefix("policy."): tensor for n, tensor in state.items()})
    reference.eval()
    assert not torch.equal(logits(reference), logits(load(Path(model_folder))))  # it was trained

    assert main(["export", str(shards), str(tmp_path / "out")]) == 0  # it names its model
    assert torch.equal(logits(load(tmp_path / "out")), logits(reference))
    assert TIED not in names_in(tmp_path / "out")

    assert main(["export", str(shards), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    half = load(tmp_path / "half").state_dict()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(half[name], tensor.bfloat16())

    next(shards.glob("__1_*.distcp")).unlink()
    with pytest.raises(
        sdp.ConfigError, match=r"cannot read all shards of .*shards: .*__1_0.distcp"
    ):
        export_checkpoint(shards, tmp_path / "none")
    assert not list(tmp_path.glob(".none*")) and not (tmp_path / "none").exists()
