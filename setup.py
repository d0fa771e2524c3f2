"""What pyproject.toml cannot say: recipes in the wheel, and a README whose links work at PyPI."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
NOT_IN_THE_WHEEL = ("__pycache__", "benchmarks", "vllm_local")
LINK = re.compile(r'(\]\(|src=")(?![a-z]+:|#)')


class BuildWithRecipes(build_py):
    """Copies ``recipes/`` to ``sdp_lightning/recipes/``; an editable install reads the original."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "sdp_lightning", "recipes")
            shutil.rmtree(target, ignore_errors=True)
            ignored = shutil.ignore_patterns(*NOT_IN_THE_WHEEL)
            shutil.copytree(ROOT / "recipes", target, ignore=ignored)


def readme() -> str:
    """README.md with absolute links to the project's pages, and to the images themselves."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
    text = (ROOT / "README.md").read_text("utf-8")
    absolute = LINK.sub(lambda link: f"{link[1]}{urls['Source']}/blob/main/", text)
    image = re.compile(rf'({re.escape(urls["Source"])})/blob/(main/[^)"\s]+\.(?:png|svg))')
    return image.sub(r"\1/raw/\2", absolute)


setup(
    cmdclass={"build_py": BuildWithRecipes},
    long_description=readme(),
    long_description_content_type="text/markdown",
)
