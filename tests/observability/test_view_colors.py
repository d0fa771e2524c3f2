"""Colors of a view: contrast, dark pages, and color deficiencies."""

from __future__ import annotations

import re

import numpy as np
import pytest

from sdp_lightning.observability.view import STYLE
from sdp_lightning.observability.view.palette import (
    DARK,
    HUES,
    LIGHT,
    TERMINAL,
    channels,
    hue_of,
    underline_of,
)

WCAG_AA = 4.5  # for text


def contrast(first: str, second: str) -> float:
    """Contrast of two colors, 1 to 21, as WCAG 2 defines it."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def luminance(color: str) -> float:
    """Relative luminance of ``#rrggbb``, 0 to 1."""
    parts = [part / 255 for part in channels(color)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def themes_in_style() -> list[dict[str, str]]:
    """The variables of every rule of the style that sets them."""
    blocks = re.findall(r"\{([^{}]*--sdp-ground:[^{}]*)\}", STYLE)
    return [dict(re.findall(r"--sdp-(\w+):(#[0-9a-f]{6})", block)) for block in blocks]


def test_every_text_on_every_ground_has_the_contrast_of_wcag_aa() -> None:
    found = themes_in_style()
    assert len(found) == 4, "light, dark by preference, dark and light by the host's theme"
    assert {theme["ground"] for theme in found} == {LIGHT.ground, DARK.ground}
    for theme in found:
        for i in range(len(HUES)):
            assert contrast(theme["text"], theme[f"t{i}"]) >= WCAG_AA
        for ground in ("ground", "panel"):
            assert contrast(theme["text"], theme[ground]) >= WCAG_AA
            assert contrast(theme["muted"], theme[ground]) >= WCAG_AA
    assert all(contrast(TERMINAL.text, tint) >= WCAG_AA for tint in TERMINAL.tints)


@pytest.mark.parametrize(
    "host",
    [
        '[data-jp-theme-light="false"]',
        ".vscode-dark",
        "html[theme=dark]",
        '[data-md-color-scheme="slate"]',
    ],
)
def test_dark_hosts_get_the_dark_colors_whatever_the_system_prefers(host: str) -> None:
    rule = STYLE[STYLE.index(f"{host} .sdp-view") :]
    assert rule[rule.index("{") :].startswith(f"{{--sdp-t0:{DARK.tints[0]}")


# Linear maps of sRGB under complete protanopia and deuteranopia: Viénot, Brettel, Mollon 1999.
BLIND = {
    "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    "nobody": np.eye(3).tolist(),
}


@pytest.mark.parametrize("kind", BLIND)
def test_neighboring_versions_stay_apart_for_color_blind_eyes_and_in_black_and_white(
    kind: str,
) -> None:
    for theme in (LIGHT, DARK, TERMINAL):
        linear = np.array([channels(tint) for tint in theme.tints]) / 255
        seen = np.clip((linear**2.2) @ np.array(BLIND[kind]).T, 0, 1) ** (1 / 2.2) * 255
        for version in range(len(HUES)):
            for lag in (1, 2, 3):
                one, other = seen[hue_of(version)], seen[hue_of(version + lag)]
                assert lag == 3 or np.abs(one - other).max() >= 20
                assert underline_of(version) != underline_of(version + lag)
