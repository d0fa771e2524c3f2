"""Chat templates of many families in words of our own, and tokenizers of three kinds for them.

Each template does what is peculiar to its family: where it writes BOS and the end of a turn, which
roles it leaves out or refuses, what it does with a system message, with tools and with thoughts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FOR, END = "{% for m in messages %}", "{% endfor %}"
ALTERNATES = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
)
AFTER_THOUGHT = "{{ m.content.split('</think>')[-1].lstrip() }}"


def prompt(text: str) -> str:
    return "{% if add_generation_prompt %}" + text + "{% endif %}"


@dataclass(frozen=True)
class Family:
    """A chat template and its tokens.

    ``end`` ends a turn of the assistant; ``has_system`` says that a message of the system stays
    where it was said, in all turns.
    """

    template: str
    specials: tuple[str, ...]
    end: str
    has_system: bool = True


def chatml(first: str = "", said: str = "{{ m.content }}") -> str:
    tool = "<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    return (
        f"{first}{FOR}{{% if m.role == 'tool' %}}{tool}{{% else %}}"
        f"<|im_start|>{{{{ m.role }}}}\n{said}<|im_end|>\n{{% endif %}}{END}"
        + prompt("<|im_start|>assistant\n")
    )


CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
QWEN25 = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n{% endif %}# Tools\n{% for t in tools %}{{ t | tojson }}\n"
    "{% endfor %}<|im_end|>\n{% elif messages[0].role != 'system' %}<|im_start|>system\n"
    "You help.<|im_end|>\n{% endif %}"
)
FAMILIES = {
    "llama 3": Family(
        "{{ bos_token }}" + FOR + "{% if m.role == 'tool' %}<|start|>ipython<|over|>\n\n"
        "{{ m.content | tojson }}<|eot|>{% elif 'tool_calls' in m %}<|start|>assistant<|over|>\n\n"
        "{% set f = m.tool_calls[0].function %}"
        '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}<|eot|>'
        "{% else %}<|start|>{{ m.role }}<|over|>\n\n{{ m.content | trim }}<|eot|>{% endif %}"
        + END
        + prompt("<|start|>assistant<|over|>\n\n"),
        ("<|bos|>", "<|start|>", "<|over|>", "<|eot|>"),
        "<|eot|>",
    ),
    "llama 2": Family(
        "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + "
        "'\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}{% else %}{% set s = '' %}"
        "{% set rest = messages %}{% endif %}{% for m in rest %}" + ALTERNATES + "{% if m.role == "
        "'user' %}{{ bos_token }}[INST] {{ (s if loop.first else '') + m.content }} [/INST]"
        "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        "</s>",
    ),
    "qwen 2.5": Family(chatml(QWEN25), CHATML, "<|im_end|>"),
    "qwen 3": Family(
        chatml(
            "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
            "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
            "{% endfor %}{% set ns = namespace(last=-1) %}{% for m in messages %}"
            "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}",
            "{% if m.role == 'assistant' %}{% if loop.index0 > ns.last and loop.last and "
            "'</think>' not in m.content %}<think>\n\n</think>\n\n{{ m.content }}{% elif "
            "loop.index0 > ns.last %}{{ m.content }}{% else %}"
            + AFTER_THOUGHT
            + "{% endif %}{% elif m.content is string %}{{ m.content }}{% endif %}",
        )
        + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
        "<think>\n\n</think>\n\n{% endif %}",
        CHATML,
        "<|im_end|>",
    ),
    "gemma 2": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}" + FOR + ALTERNATES + "<sot>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<eot>\n"
        + END
        + prompt("<sot>model\n"),
        ("<bos>", "<eos>", "<sot>", "<eot>"),
        "<eot>",
        has_system=False,
    ),
    "gemma 4": Family(  # a result is shown in the turn that called for it
        "{{ bos_token }}" + FOR + "{% if m.role != 'tool' %}<|turn>{{ 'model' if m.role == "
        "'assistant' else m.role }}\n{% for c in m.tool_calls or [] %}<|call>call:"
        "{{ c.function.name }}{{ c.function.arguments | tojson }}<call|>{% endfor %}"
        "{{ m.content | trim }}{% if m.tool_calls and not loop.last %}"
        "{% for r in messages[loop.index:] if r.role == 'tool' %}<|result>{{ r.content }}<result|>"
        "{% endfor %}{% else %}<turn|>\n{% endif %}{% endif %}" + END + "{% if "
        "add_generation_prompt and messages[-1].role != 'tool' %}<|turn>model\n{% endif %}",
        ("<bos>", "<|turn>", "<turn|>", "<|call>", "<call|>", "<|result>", "<result|>"),
        "<turn|>",
    ),
    "phi 3": Family(
        FOR + "{% if m.role in ['system', 'user', 'assistant'] %}<|{{ m.role }}|>\n{{ m.content }}"
        "<|end|>\n{% endif %}" + END + prompt("<|assistant|>\n"),
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|end|>",
    ),
    "mistral 1": Family(
        "{{ bos_token }}" + FOR + ALTERNATES + "{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}" + END,
        ("<s>", "</s>"),
        "</s>",
        has_system=False,
    ),
    "mistral 3": Family(  # tools and the system's message stand before the last of the user's
        "{{ bos_token }}{% set ns = namespace(n=0, s='') %}" + FOR + "{% if m.role == 'user' or "
        "(m.role == 'assistant' and 'tool_calls' not in m) %}{% if (m.role == 'user') != "
        "(ns.n % 2 == 0) %}{{ raise_exception('roles must alternate user and assistant') }}"
        "{% endif %}{% set ns.n = ns.n + 1 %}{% endif %}{% if m.role == 'system' %}"
        "{% set ns.s = m.content + '\n\n' %}{% endif %}" + END + FOR + "{% if m.role == 'user' %}"
        "{% if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]"
        "{% endif %}[INST]{{ (ns.s if loop.last else '') + m.content }}[/INST]{% elif "
        "'tool_calls' in m %}[TOOL_CALLS]{{ m.tool_calls | tojson }}{{ eos_token }}{% elif m.role "
        "== 'assistant' %}{{ m.content }}{{ eos_token }}{% elif m.role == 'tool' %}{% if "
        "m.tool_call_id is not defined or m.tool_call_id | length != 9 %}"
        "{{ raise_exception('ids must have length 9') }}{% endif %}[TOOL_RESULTS]{{ m.content }}"
        "[/TOOL_RESULTS]{% endif %}" + END,
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        "</s>",
        has_system=False,
    ),
    "deepseek": Family(
        "{{ bos_token }}{% set ns = namespace(s='') %}" + FOR + "{% if m.role == 'system' %}"
        "{% set ns.s = m.content %}{% endif %}" + END + "{{ ns.s }}" + FOR + "{% if m.role == "
        "'user' %}<|User|>{{ m.content }}{% elif m.role == 'assistant' and 'tool_calls' in m %}"
        "<|Assistant|>{{ m.tool_calls[0].function.name + '(' + "
        "m.tool_calls[0].function.arguments + ')' }}<|eos|>{% elif m.role == 'assistant' %}"
        "<|Assistant|>" + AFTER_THOUGHT + "<|eos|>{% elif m.role == 'tool' %}<|output|>"
        "{{ m.content }}<|/output|>{% endif %}" + END + prompt("<|Assistant|>"),
        ("<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>", "<|output|>", "<|/output|>"),
        "<|eos|>",
    ),
    "cohere 2": Family(
        "{{ bos_token }}" + FOR + "{% if m.role in ['system', 'user', 'assistant'] %}<|SOT|>"
        "<|{{ m.role | upper }}|>{% if m.role == 'assistant' %}<|RESPONSE|>{{ m.content }}"
        "<|/RESPONSE|>{% else %}{{ m.content }}{% endif %}<|EOT|>{% endif %}"
        + END
        + prompt("<|SOT|><|ASSISTANT|>"),
        (
            *("<BOS>", "<|SOT|>", "<|EOT|>", "<|SYSTEM|>", "<|USER|>", "<|ASSISTANT|>"),
            *("<|RESPONSE|>", "<|/RESPONSE|>", "<|EOS|>"),
        ),
        "<|EOT|>",
    ),
    "gpt-oss": Family(  # a last turn ends with another token than earlier ones
        "{% set ns = namespace(call='') %}" + FOR + "{% if m.role == 'tool' %}{% if not ns.call %}"
        "{{ raise_exception('Message has tool role, but there was no previous assistant message "
        "with a tool call!') }}{% endif %}<|start|>functions.{{ ns.call }} to=assistant<|channel|>"
        "commentary<|message|>{{ m.content | tojson }}<|end|>{% elif m.tool_calls %}"
        "{% set ns.call = m.tool_calls[0].function.name %}<|start|>assistant to=functions."
        "{{ ns.call }}<|channel|>commentary json<|message|>"
        "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% elif m.role == 'assistant' %}"
        "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% else %}"
        "<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}"
        + END
        + prompt("<|start|>assistant"),
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
        "<|end|>",
    ),
    "glm 4": Family(  # the next speaker's token is what ends a turn
        "[gMASK]<sop>" + FOR + "<|{{ 'observation' if m.role == 'tool' else m.role }}|>\n"
        "{{ m.content }}" + END + prompt("<|assistant|>\n"),
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        "<|user|>",
    ),
    "zephyr": Family(
        FOR + "<|{{ m.role }}|>\n{{ m.content + eos_token }}\n" + END + prompt("<|assistant|>\n"),
        ("<s>", "</s>"),
        "</s>",
    ),
    "smollm": Family(
        chatml(
            "{% if messages[0].role != 'system' %}<|im_start|>system\nHi.<|im_end|>\n{% endif %}"
        ),
        CHATML,
        "<|im_end|>",
    ),
    "olmo": Family(  # BOS and EOS are one token, which does not end the last turn
        "{{ bos_token }}"
        + FOR
        + "<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' and "
        "not loop.last %}{{ eos_token }}{% endif %}\n" + END + prompt("<|assistant|>\n"),
        ("<|endoftext|>",),
        "<|endoftext|>",
    ),
    "granite": Family(
        FOR + "<|sr|>{{ 'tool_response' if m.role == 'tool' else m.role }}<|er|>{{ m.content }}"
        "<|eot|>\n" + END + prompt("<|sr|>assistant<|er|>"),
        ("<|sr|>", "<|er|>", "<|eot|>"),
        "<|eot|>",
    ),
    "vision": Family(
        "<s>" + FOR + "{{ m.role | capitalize }}: {% for p in m.content %}{% if p.type == 'text' %}"
        "{{ p.text }}{% endif %}{% endfor %}<eou>\n" + END + prompt("Assistant:"),
        ("<s>", "</s>", "<eou>"),
        "<eou>",
    ),
    "rounds": Family(  # counts, as ChatGLM 2 does
        FOR + "{% if m.role == 'user' %}[Round {{ loop.index0 // 2 + 1 }}]\nQ: {{ m.content }}\n"
        "A:{% else %}{{ m.content }}{{ eos_token }}{% endif %}" + END,
        ("<s>", "</s>"),
        "</s>",
        has_system=False,
    ),
}
TEXT = "".join(map(chr, range(32, 127))) + "\n"
MERGES = [("i", "n"), ("o", "k"), ("u", "s"), ("s", "e"), ("\n", "\n"), ("a", "t"), ("us", "e")]


def _byte_level() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ") if pair == ("\n", "\n") else pair for pair in MERGES]
    vocab = dict.fromkeys([*letters, *map("".join, merges)])
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges))
    words = pre_tokenizers.Split(Regex(r"\s*\n+| ?\w+| ?[^\w\s]+|\s"), behavior="isolated")
    letter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([words, letter])
    core.decoder = decoders.ByteLevel()
    return core


def _sentencepiece(scheme: str) -> Tokenizer:
    letters = [*TEXT.replace(" ", ""), "▁"]
    merges = [*MERGES, ("▁", "ok"), ("▁", "▁")]
    vocab = {token: i for i, token in enumerate(["<unk>", *letters, *map("".join, merges)])}
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return core


def _wordpiece() -> Tokenizer:
    words = ["[UNK]", *TEXT, *(f"##{c}" for c in TEXT), "ok", "##in", "user", "model"]
    core = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s"), behavior="isolated"),
            pre_tokenizers.Punctuation(),
        ]
    )
    core.decoder = decoders.Sequence([decoders.Replace("##", ""), decoders.Fuse()])
    return core


KINDS: dict[str, Any] = {
    "byte-level": _byte_level,
    "sentencepiece": lambda: _sentencepiece("first"),
    "sentencepiece, legacy": lambda: _sentencepiece("always"),
    "wordpiece": _wordpiece,
}


@functools.cache
def tokenizer_of(family: str, kind: str = "byte-level") -> Any:
    """A tokenizer with the template and the special tokens of a family."""
    f = FAMILIES[family]
    bos = f.specials[0] if "bos_token" in f.template else None
    made = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](), bos_token=bos, eos_token=f.end, pad_token="<pad>"
    )
    made.add_special_tokens({"additional_special_tokens": list(f.specials)})
    made.chat_template = f.template
    return made
