"""Answers that are wrong, too much, or somebody else's: each is one error that names its server."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from typing import Any

import pytest

from sdp_lightning.engines.remote.responses import ServerError, describe, printable
from support.raw_server import Asker, asker, http
from support.vllm_answers import completion, recorded_token, span

__all__ = ["asker"]  # a fixture

GOOD = json.dumps(completion()).encode()


def logprob(value: Any) -> dict[str, Any]:
    """A completion whose second log-prob is ``value``."""
    answer = completion()
    answer["choices"][0]["logprobs"]["content"][1]["logprob"] = value
    return answer


def token(value: Any) -> dict[str, Any]:
    return completion(token_ids=[14, value, 50, 59])


def cut(num_tokens: int, reason: str) -> dict[str, Any]:
    """A completion of ``num_tokens`` tokens."""
    content = [recorded_token(14, -1.0) for _ in range(num_tokens)]
    return completion(
        token_ids=[14] * num_tokens,
        logprobs={"content": content},
        finish_reason=reason,
        weight_versions=[span("0", 0, num_tokens)],
    )


@pytest.mark.parametrize(
    ("packing", "body"),
    [
        ("gzip", gzip.compress(GOOD)),
        ("x-gzip", gzip.compress(GOOD)),
        ("deflate", zlib.compress(GOOD)),
        ("identity", GOOD),
    ],
)
def test_packed_answers_are_read(asker: Asker, packing: str, body: bytes):
    answer = asker.complete(http(body, f"Content-Encoding: {packing}"))
    assert answer.spans[0].token_ids == (14, 31, 50, 59)


def test_an_integer_is_a_log_prob_and_so_is_one_above_0_by_rounding(asker: Asker):
    for value in (-2, 0, 1e-4):
        assert asker.complete(http(logprob(value))).spans[0].logprobs[1] == value


ODD: dict[str, tuple[Any, str]] = {
    "deep list": (b"[" * 200_000, "nested too deeply"),
    "deep object": (b'{"a":' * 100_000, "nested too deeply"),
    "deep, and whole": (b"[" * 50_000 + b"]" * 50_000, "nested too deeply"),
    "5,000 digits": (GOOD.replace(b"-1.5", b"9" * 5000), "no JSON"),
    "a page": (b"<html>log in</html>", "no JSON.*log in"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "no JSON"),
    "no UTF-8": (b'{"\xff\xfe"}', "no JSON"),
    "null": (b"null", "without choices"),
    "nothing": (b"", "without choices"),
    "a list": ([completion()], "without choices"),
    "an error": ({"error": {"message": "boom"}}, "boom"),
    "a token beyond int64": (token(10**30), "not integers from 0 to 2147483647"),
    "a token of another vocabulary": (token(256), "token 256, but the model's vocabulary has 256"),
    "a token below 0": (token(-1), "not integers from 0 to"),
    "a token that is true": (token(True), "not all tokens are integers"),
    "a token that is 3.0": (token(3.0), "not all tokens are integers"),
    "a token that is a text": (token("3"), "not all tokens are integers"),
    "tokens that are a text": (completion(token_ids="3333"), "not all tokens are integers"),
    "NaN": (logprob(float("nan")), "nan as the log-prob"),
    "an infinity": (logprob(float("-inf")), "-inf as the log-prob"),
    "beyond float32": (logprob(-1e300), r"-1e\+300 as the log-prob"),
    "beyond float64": (logprob(-(10**400)), "without choices"),
    "above 0": (logprob(0.01), "0.01 as the log-prob"),
    "a log-prob that is true": (logprob(True), "not all log-probs are numbers"),
    "a log-prob that is a text": (logprob("-0.5"), "not all log-probs are numbers"),
    "fewer than asked": (cut(3, "length"), "3 tokens that end by 'length', of 4"),
    "more than asked": (cut(5, "length"), "5 tokens that end by 'length', of 4"),
    "more than asked, interrupted": (cut(5, "abort"), "5 tokens that end by 'abort', of 4"),
    "a stop at nothing": (cut(0, "stop"), "0 tokens that end by 'stop'"),
    "another reason": (completion(finish_reason="eos"), "without choices"),
    "a reason that is a list": (completion(finish_reason=["stop"]), "without choices"),
    "a version that is a number": (
        completion(weight_versions=[span(0, 0, 4)]),  # type: ignore[arg-type]
        "0 is no string",
    ),
    "a span from true": (
        completion(weight_versions=[span("0", False, 4)]),
        "False is no integer",
    ),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.fault("corrupted data", "generate")
def test_an_answer_that_cannot_be_is_an_error_of_its_server(asker: Asker, kind: str):
    body, message = ODD[kind]
    with pytest.raises(ServerError, match=rf"(?s)^{asker.url}.*{message}") as caught:
        asker.complete(http(body))
    assert not caught.value.is_refusal and len(str(caught.value)) < 1000


BOMB = zlib.compressobj(9, zlib.DEFLATED, 31)
BOMBED = b"".join([BOMB.compress(b"{" + b" " * 2**25), BOMB.flush()])  # 32 MiB in 32 KiB

RAW: dict[str, tuple[bytes, str]] = {
    "a bomb": (http(BOMBED, "Content-Encoding: gzip"), "more than .* bytes"),
    "a bomb, as zlib": (
        http(zlib.compress(b" " * 2**24), "Content-Encoding: deflate"),
        "more than .* bytes",
    ),
    "empty blocks without end": (
        http(b"\x78\x9c" + b"\x00\x00\x00\xff\xff" * 300_000, "Content-Encoding: deflate"),
        "more than .* bytes",
    ),
    "too much": (http(GOOD[:-1] + b', "x": "' + b"x" * 2**21 + b'"}'), "more than .* bytes"),
    "no gzip": (http(GOOD, "Content-Encoding: gzip"), "incorrect header check"),
    "half a gzip": (
        http(gzip.compress(GOOD)[:60], "Content-Encoding: gzip"),
        "ends too early or too late",
    ),
    "gzip, and more": (
        http(gzip.compress(GOOD) + b"x" * 99, "Content-Encoding: gzip"),
        "ends too early or too late",
    ),
    "another packing": (http(GOOD, "Content-Encoding: br, gzip"), "unknown encoding: br, gzip"),
    "half a body": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n{",
        "ContentLengthError|Payload",
    ),
    "a chunk of no length": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n",
        "Error",
    ),
    "two lengths": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
        "Error",
    ),
    "a header of 10 MB": (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 10**7 + b"\r\n\r\n", "Error"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n", "Error"),
    "nothing": (b"", "Disconnected"),
    "a redirect": (
        http(b"", "Location: http://127.0.0.1:9/x", status="307 Temporary Redirect"),
        "answered 307, and redirects are not followed: http://127.0.0.1:9/x",
    ),
    "a key is wanted": (http(b"who", status="401 Unauthorized"), "answered 401: who .*SDP_API_KEY"),
    "a key is refused": (http(b"no", status="403 Forbidden"), "answered 403: no .*SDP_API_KEY"),
    "an error of escapes": (http(b"\x1b[31m\x00", status="500 Odd"), "answered 500:  .31m $"),
    "an error of 1 GB": (
        b"HTTP/1.1 500 Odd\r\nContent-Length: 1000000000\r\n\r\n" + b"x" * 3000,
        "answered 500: x{300}$",
    ),
}


@pytest.mark.parametrize("kind", RAW)
@pytest.mark.fault("corrupted data", "generate")
def test_http_that_cannot_be_is_an_error_of_its_server(asker: Asker, kind: str):
    answer, message = RAW[kind]
    with pytest.raises(ServerError, match=f"^{asker.url}.*({message})") as caught:
        asker.complete(answer)
    assert not caught.value.is_refusal and str(caught.value).isprintable()


def test_a_bomb_is_never_unpacked_whole(asker: Asker):
    tracemalloc.start()
    try:
        with pytest.raises(ServerError, match="more than"):
            asker.complete(RAW["a bomb"][0])
        assert tracemalloc.get_traced_memory()[1] < 2**23  # of 32 MiB
    finally:
        tracemalloc.stop()


def test_no_cookie_is_kept_and_no_other_host_is_asked(asker: Asker):
    before = asker.server.num_requests
    with pytest.raises(ServerError, match="redirects are not followed"):
        asker.complete(http(b"", f"Location: {asker.url}/other", status="302 Found"))
    assert asker.server.num_requests == before + 1
    asker.complete(http(GOOD, "Set-Cookie: a=b"))
    asker.complete(http(GOOD))
    assert b"Cookie" not in asker.server.request


def test_the_size_that_is_allowed_grows_with_the_budget(asker: Asker):
    answer = completion() | {"pad": "x" * 1_060_000}
    with pytest.raises(ServerError, match="more than 1,056,864 bytes"):
        asker.complete(http(answer))
    assert asker.complete(http(cut(400, "length") | {"pad": "x" * 1_060_000}), budget=400).spans


# Streams ------------------------------------------------------------------------------------------


def events(*answers: Any) -> bytes:
    lines = [a if isinstance(a, bytes) else json.dumps(a).encode() for a in answers]
    return http(b"".join(b"data: " + line + b"\n\n" for line in lines))


PART = cut(2, "length") | {}
PART["choices"][0] |= {"finish_reason": None, "weight_versions": None}
LAST = cut(2, "length")
LAST["choices"][0]["weight_versions"] = [span("0", 0, 4)]


def test_a_stream_is_read_to_its_end(asker: Asker):
    read = asker.complete(events(PART, LAST, b"[DONE]"), stream=True)
    assert [len(part.token_ids) for part in read.spans] == [4]


ODD_STREAMS: dict[str, tuple[bytes, str]] = {
    "deep": (events(PART, b"[" * 100_000), "nested too deeply"),
    "a line without end": (http(b"data: " + b"x" * 2**21), "more than .* bytes"),
    "events without end": (events(*[PART] * 20), "goes on after the end"),
    "more after the last": (events(LAST, PART, b"[DONE]"), "goes on after the end"),
    "fewer than asked": (
        events(LAST | {"choices": cut(2, "length")["choices"]}, b"[DONE]"),
        "2 tokens that end by 'length', of 4",
    ),
    "a log-prob less": (
        events(completion(logprobs={"content": []}, finish_reason=None)),
        "4 tokens, 0 log-probs",
    ),
    "another vocabulary": (
        events(completion(token_ids=[14, 31, 50, 999], finish_reason=None)),
        "token 999",
    ),
    "cut off": (events(PART), "broke off"),
    "an error": (events(PART, {"error": {"message": "boom", "code": True}}), "boom"),
}


@pytest.mark.parametrize("kind", ODD_STREAMS)
@pytest.mark.fault("corrupted data", "generate")
def test_a_stream_that_cannot_be_is_an_error_of_its_server(asker: Asker, kind: str):
    answer, message = ODD_STREAMS[kind]
    with pytest.raises(ServerError, match=f"^{asker.url}.*{message}") as caught:
        asker.complete(answer, stream=True)
    assert caught.value.status is None


# What errors show ---------------------------------------------------------------------------------


def test_what_a_server_sent_is_shown_in_part_and_without_escapes():
    deep: Any = "x"
    for _ in range(900):
        deep = [deep, deep]
    for value in (deep, {"a": deep}, ["x" * 10**6], list(range(10**5)), "\x1b[2J\ud800\n"):
        assert len(describe(value)) <= 300 and describe(value).isprintable()
    assert printable("a\x1b[2J\nb\ud800") == "a [2J b "
