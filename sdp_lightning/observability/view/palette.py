"""Colors of policy versions, for eyes that see colors differently, on light and dark ground.

The hues are those of Okabe and Ito (2008), https://jfly.uni-koeln.de/color/, which stay apart under
the common color deficiencies. A version keeps its hue wherever it is shown, and neighbors differ.
Each is also underlined in a style of its own and labeled where it begins: color is never the only
cue.
"""

from __future__ import annotations

from dataclasses import dataclass

# Sky blue, orange, bluish green, blue, yellow, vermilion, reddish purple: of all orders the one in
# which neighbors, and those next to them, stay furthest apart without red or green cones.
HUES = ("#56B4E9", "#E69F00", "#009E73", "#0072B2", "#F0E442", "#D55E00", "#CC79A7")
UNDERLINES = ("solid", "dashed", "dotted", "double")


@dataclass(frozen=True)
class Theme:
    """Colors for one background, as ``#rrggbb``.

    Args:
        ground: background of everything.
        text: text of sampled tokens.
        muted: text of prompts, tool output and notes.
        panel: background of prompts and tool output.
        line: borders.
        share: share of a hue in its tint; the rest is the ground.
    """

    ground: str
    text: str
    muted: str
    panel: str
    line: str
    share: float

    @property
    def tints(self) -> tuple[str, ...]:
        """Backgrounds of the tokens of each hue."""
        return tuple(mix(hue, self.ground, self.share) for hue in HUES)


LIGHT = Theme("#ffffff", "#16181d", "#5a6070", "#f4f5f7", "#d9dce3", share=0.38)
DARK = Theme("#16181d", "#f1f2f5", "#a4abba", "#1f232b", "#3a3f4b", share=0.4)
TERMINAL = Theme("#ffffff", "#101216", "#5a6070", "#f4f5f7", "#d9dce3", share=0.55)


def hue_of(version: int) -> int:
    """Index of a version's hue in :data:`HUES`."""
    return version % len(HUES)


def underline_of(version: int) -> str:
    """Underline style of a version, which tells versions of one hue apart."""
    return UNDERLINES[version % len(UNDERLINES)]


def mix(color: str, ground: str, share: float) -> str:
    """A color over a ground, mixed with ``share`` of it.

    >>> mix("#ff0000", "#ffffff", 0.5)
    '#ff8080'
    """
    pairs = zip(channels(color), channels(ground), strict=True)
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)


def channels(color: str) -> tuple[int, int, int]:
    """Red, green and blue of ``#rrggbb``, 0 to 255."""
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return red, green, blue
