"""``sdp-lightning init``: folders that are the recipes, in a checkout and from a wheel."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdp_lightning.cli.init import TEMPLATES
from sdp_lightning.cli.main import main
from sdp_lightning.config.import_path import load_object
from support.paths import ROOT

# Lightning calls functions of jsonargparse by their old names; Python shows that to nobody else.
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)
NAMED = re.compile(r"[\w/]+\.py:\w+")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def texts_of(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        parts: Any = value.values() if isinstance(value, dict) else value
        return [text for part in parts for text in texts_of(part)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_task_is_the_recipe_with_its_files_beside_its_config(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "2nd task", "--from", name]) == 0
    out = capsys.readouterr().out
    template, folder = TEMPLATES[name], Path("2nd task")
    assert template.needs in out and "cd '2nd task'" in out
    read = (folder / "README.md").read_text()
    assert out.count("sdp-lightning ") == read.count("\nsdp-lightning ") == 3
    commands = re.findall(r"^sdp-lightning .*", read, re.MULTILINE)
    assert len({line.index("#") for line in commands}) == 1
    assert {"task.py", "config.yaml", "README.md"} <= {path.name for path in folder.iterdir()}
    for source, copy in template.configs:
        original = (ROOT / "recipes" / template.recipe / source).read_text()
        expected = re.sub(r"recipes/\w+/", "", original)
        expected = expected.replace(f"name: {template.recipe}", "name: 2nd_task")
        expected = expected.replace(f"runs/{template.recipe}/", "runs/2nd_task/")
        written = yaml.safe_load((folder / copy).read_text())
        if written["trainer"].get("accelerator") == "cpu":  # its summary shows before and after
            assert written["trainer"].pop("num_sanity_val_steps") == -1
        assert written == yaml.safe_load(expected)
        for text in texts_of(yaml.safe_load(original)):
            for file in re.findall(r"recipes/\w+/\w+\.py", text):
                assert (folder / Path(file).name).read_bytes() == (ROOT / file).read_bytes()
    monkeypatch.chdir(folder)
    for text in texts_of(yaml.safe_load(Path("config.yaml").read_text())):
        if NAMED.fullmatch(text) and (name != "reasoning_gym" or "reward" not in text):
            assert load_object(text) is not None


def test_a_new_task_runs_dry_with_two_rewards_as_its_readme_says(
    model_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "123"]) == 0
    monkeypatch.chdir("123")
    snippet = re.search(r"```yaml\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    assert snippet is not None
    settings = yaml.safe_load(Path("config.yaml").read_text())
    arguments = settings["data"]["workflow"]["init_args"]
    del arguments["reward"]
    arguments |= yaml.safe_load(snippet[1])
    settings["model"]["model"] = model_folder
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    with Path("task.py").open("a") as file:
        file.write("\n\ndef correct(completion, row):\n    return 1.0\n\n\n")
        file.write("def form(completion, row):\n    return 1.0\n")
    capsys.readouterr()
    assert main(["fit", "--config=config.yaml", "--dry-run"]) == 0
    assert "mean reward of 1.200" in capsys.readouterr().out


def test_what_is_there_is_not_overwritten_and_a_template_is_one_of_those(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("mine").mkdir()
    Path("mine/task.py").write_text("mine")
    assert main(["init", "mine"]) == 2
    assert "mine is there and not empty" in capsys.readouterr().err
    assert Path("mine/task.py").read_text() == "mine"
    assert main(["init", "new", "--from", "gsm"]) == 2
    assert "no template 'gsm'. Take one of sorting, arithmetic" in capsys.readouterr().err
    assert not Path("new").exists()
    Path("empty").mkdir()
    assert main(["init", "empty"]) == 0


def test_a_wheel_has_the_recipes_and_links_that_work_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q"]
    built = tmp_path / "built"
    commands = ["build_py", "--build-lib", str(built), "dist_info", "--output-dir", str(tmp_path)]
    done = subprocess.run([*command, *commands], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script = (
        "from sdp_lightning.cli.init import TEMPLATES, write_task\n"
        "from sdp_lightning.cli.init.folder import recipes_folder\n"
        f"assert recipes_folder().is_relative_to({str(built)!r})\n"
        "for name in TEMPLATES: write_task(f'from_wheel/{name}', name)\n"
    )
    environment = {"PYTHONPATH": str(built), "PATH": "/usr/bin"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    for name in TEMPLATES:
        assert main(["init", f"from_checkout/{name}", "--from", name]) == 0
    wheel, checkout = Path("from_wheel"), Path("from_checkout")
    files = [path.relative_to(wheel) for path in wheel.rglob("*.*")]
    assert len(files) > 15
    for file in files:
        assert (wheel / file).read_bytes() == (checkout / file).read_bytes(), file
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    text = metadata.read_text()
    assert "Project-URL: Source, https://" in text and "\nAuthor: " in text
    links = re.findall(r'(?:\]\(|src=")([^)"]+)', text)
    assert len(links) > 30 and all(re.match(r"https://|#", link) for link in links)
    assert all("/raw/" in link for link in links if link.endswith((".png", ".svg")))


@pytest.mark.slow
def test_the_example_of_the_readme_learns_as_it_is_written() -> None:
    assert main(["init", "my_task"]) == 0
    text = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"^```py\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    judge = "\nprint(float(model.trainer.callback_metrics['train/reward']))\n"
    Path("example.py").write_text(example + judge)
    done = subprocess.run(
        [sys.executable, "example.py"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0.4  # it begins at about 0.2
