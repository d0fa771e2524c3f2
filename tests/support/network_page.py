"""The table of docs/reference/network.md, and whether sockets are those that it names."""

from __future__ import annotations

from collections.abc import Iterable

from support.paths import ROOT

PAGE = ROOT / "docs" / "reference" / "network.md"
ALL = ("0.0.0.0", "::")


def places(run: str, process: str, when: str = "always") -> list[str]:
    """``ADDRESS:PORT`` of every place where ``process`` listens in ``run``, as the page says.

    Raises:
        KeyError: if the page has no such row.
    """
    rows = [
        [c.strip(" `") for c in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines()
    ]
    mine = [row for row in rows if len(row) == 6 and run in row[0] and row[1] == process]
    if not mine:
        raise KeyError(f"{run}: {process}")
    return [row[2] for row in mine if row[3] == when and row[2] != "nothing"]


def check(sockets: Iterable[tuple[str, int]], named: Iterable[str], **names: object) -> None:
    """Assert that every one of ``sockets`` is at a place that is named, and each place is taken.

    Args:
        sockets: address and port of what a process listens on.
        named: places, in which ``names`` stand for what is given: an address, or a port.
    """
    found = set(sockets)
    missing = set(named)
    for address, port in found:
        of_this = {
            place
            for place in named
            if _is_address(address, place.rpartition(":")[0], names)
            and place.rpartition(":")[2] in ("any", *(n for n, v in names.items() if v == port))
        }
        assert of_this, f"{address}:{port} is not on the page"
        missing -= of_this
    assert not missing, f"{missing} is on the page, but nobody listens there: {found}"


def _is_address(address: str, word: str, names: dict[str, object]) -> bool:
    if word == "all":
        return address in ALL
    return address not in ALL if word == "host" else address == names.get(word, word)
