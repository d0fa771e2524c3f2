"""Completions that mean harm, made from a seed: pieces of every form that a parser looks for."""

from __future__ import annotations

import random

PIECES = (
    *(
        "<tool_call>",
        "</tool_call>",
        "<answer>",
        "</answer>",
        "<",
        ">",
        "</",
        "<tool_call",
        "answer>",
    ),
    *(
        '{"name": "add", "arguments": {"a": 1, "b": 2}}',
        '{"name": "add"',
        '"arguments": ',
        "{}",
        "[]",
    ),
    *('{"name": ["add"], "arguments": {}}', '{"name": {}, "arguments": {}}', '{"name": null}'),
    *('{"name": "say", "arguments": {"text": "\\ud800"}}', '{"name": "exit", "arguments": {}}'),
    *(
        '{"name": "\\ud800"}',
        '{"name": "add", "arguments": {"a": 1e999, "b": NaN}}',
        "\\u0000",
        "null",
    ),
    *("[", "]", "{", "}", "(", ")", '"', "'", "\\", ":", ",", "[[", '{"a":', '{"name":'),
    *("9" * 4301, "1e999", "1e-999", "1e99999999999999999999", "9**9**9**9", "nan", "inf", "-0"),
    *(
        "0",
        "1",
        "-",
        "+",
        ".",
        "e",
        "E",
        ",000",
        "1,234",
        "1.",
        ".5",
        "1e",
        "\u0663",
        "\u2212",
        "7/8",
    ),
    *("\x00", "\x1b[2J", "\r", "\n", "\t", " ", "\ud800", "\udfff", "\ud83d\ude00", "\U0010ffff"),
    *(
        "\u202e",
        "\u200b",
        "\u0301",
        "\ufeff",
        "\u0130",
        "\u00df",
        "na\u00efve",
        "\u6c34",
        "the answer is",
    ),
    *(
        "__import__('os')._exit(3)",
        "exit()",
        "\\boxed{",
        "}",
        "$",
        "####",
        "{observation}",
        "=",
        "{,}",
    ),
    *("<|im_end|>", "<|endoftext|>", "%s", "{0}", "{{", "$x^2$", "\\frac{", "\\left(", "^{"),
)


def completion(seed: int, *, longest_run: int = 200) -> str:
    """The completion of ``seed``: up to 12 runs, each of one to three pieces, repeated."""
    chance = random.Random(seed)
    runs: list[str] = []
    for _ in range(chance.randint(0, 12)):
        run = "".join(chance.choices(PIECES, k=chance.randint(1, 3)))
        times = chance.choice((1, 1, 1, 2, 5, chance.randint(1, longest_run)))
        runs.append(run * min(times, max(1, 20 * longest_run // len(run))))
    text = "".join(runs)
    form = chance.random()
    if form < 0.3:
        return f"<tool_call>{text}</tool_call>"
    if form < 0.5:
        return f"so <answer>{text}</answer>"
    return text
