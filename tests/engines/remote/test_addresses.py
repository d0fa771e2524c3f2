"""Addresses, keys and certificates: what cannot be is one error, which shows no secret."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from sdp_lightning.engines.connect import connect_engine
from sdp_lightning.engines.remote.addresses import redacted
from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.engines.remote.options import RemoteOptions
from sdp_lightning.engines.remote.vllm import VLLMBackend
from sdp_lightning.errors import ConfigError, EngineError
from support.fake_servers import QUICK, Server, assert_nothing_left, servers
from support.paths import TESTS
from support.remote_engines import generate, publish, request

CERTIFICATE = TESTS / "data" / "localhost.pem"  # of 127.0.0.1 and localhost, signed by itself


def make(*urls: str, **options: object) -> RemoteInfEngine:
    settings = RemoteOptions(**options)  # type: ignore[arg-type]
    return RemoteInfEngine(urls, VLLMBackend(), options=settings)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@localhost:8000",
        "http://hunter2@localhost:8000",
        "https://user:hun@hunter2@localhost:8000/x",
        "http://localhost:8000?key=hunter2",
        "http://user:hunter2@localhost:99999",
    ],
)
def test_an_address_with_a_secret_is_refused_without_it(url: str):
    with pytest.raises(ConfigError, match=r"localhost:\d+") as caught:
        make(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "engine",
    [
        "vllm://user:hunter2@localhost:8000",
        "sglang://localhost:1,user:hunter2@localhost:8000",
        "vllm://user:hunt,er2:hunter2@localhost:8000",
        "vllm://localhost:8000?api_key=hunter2",
        "vllms://user:hunter2@localhost:8000",
        "http://user:hunter2@localhost:8000",
        "tgi://user:hunter2@localhost:8000",
    ],
)
def test_an_engine_with_a_secret_in_its_name_is_refused_without_it(engine: str):
    with pytest.raises(ConfigError, match="localhost:8000") as caught:
        connect_engine(engine, model="m")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://localhost:80", "localhost:8000", "http://", "http://:80", "//localhost:80", ""),
        *("http://localhost:0", "http://localhost:65536", "http://localhost:-1"),
        *("http://localhost:x", "http://[::1:80", "http://local host:80", "http://localhost:80/\n"),
        *("http://localhost:80#x", "http://löcal:80", "http://localhost:80\r\nHost: x"),
        "file:///etc/passwd",
    ],
)
def test_an_address_that_is_none_is_refused_with_what_to_write(url: str):
    with pytest.raises(
        ConfigError, match=r"is not the address of a server\. Write http://host:port"
    ):
        make(url, api_key="k")


@pytest.mark.parametrize(
    "rest", ["localhost:0", "localhost:65536", "loc alhost:80", "x:1/\x1b[31m:2"]
)
def test_a_host_that_is_none_is_refused(rest: str):
    with pytest.raises(ConfigError, match="is not the address of a server") as caught:
        connect_engine(f"vllm://{rest}", api_key="k")
    assert str(caught.value).isprintable()


def test_addresses_with_a_path_or_https_are_taken():
    engine = make("http://localhost:80/gateway/", "https://localhost:81", "http://[::1]:82")
    assert engine.version is None
    assert connect_engine("vllms://localhost:1,[::1]:2").version is None
    assert connect_engine("sglangs://localhost:1").version is None


def test_launched_servers_speak_no_https():
    with pytest.raises(ConfigError, match=r"does not name servers.*'vllm://launch\?replicas=1'"):
        connect_engine("vllms://launch?replicas=2", model="m")


@pytest.mark.parametrize(
    "address",
    [
        "user:hunter2@localhost:80",
        "http://user:a://hunter2@localhost:80",
        "http://user:hunter2?@localhost:80",
        "http://user:hunter2#@localhost:80",
        "http://localhost:80?key=a@hunter2",
        "http://localhost:80#hunter2",
    ],
)
def test_no_way_to_write_a_secret_shows_it(address: str):
    assert "hunter2" not in redacted(address)
    with pytest.raises(ConfigError) as caught:
        make(address, api_key="k")
    assert "hunter2" not in str(caught.value)


def test_what_is_shown_of_an_address_has_no_escapes():
    assert redacted("vllm://a:b@h:1\x1b[2J") == "vllm://***@h:1?[2J"
    assert redacted("embeded") == "embeded"


@pytest.mark.parametrize(
    "key", ["hunter2\n", "hun\r\nHost: ter2", "hünter2", "hun ter2", "hunter\x7f2"]
)
def test_a_key_that_no_header_holds_is_refused_and_not_shown(
    key: str, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ConfigError, match=r"api_key has U\+\w{4} at place \d+ of \d+") as caught:
        RemoteOptions(api_key=key)
    assert "hun" not in str(caught.value)
    monkeypatch.setenv("SDP_API_KEY", key)
    with pytest.raises(ConfigError, match=r"SDP_API_KEY has U\+\w{4} at place") as caught:
        make("http://localhost:1")
    assert "hun" not in str(caught.value)


def test_a_key_of_another_type_is_refused_and_not_shown():
    with pytest.raises(ConfigError, match="api_key must be a text, got bytes") as caught:
        RemoteOptions(api_key=b"hunter2")  # type: ignore[arg-type]
    assert "hunter2" not in str(caught.value)


def test_a_key_in_a_file_is_checked_and_the_path_may_be_any(tmp_path: Path):
    path = tmp_path / "a key"
    path.write_text("hun ter2\n")
    setting = f"file:{path}"
    with pytest.raises(ConfigError, match=r"a key has U\+0020 at place 3 of 8") as caught:
        make("http://localhost:1", api_key=setting)
    assert "hun" not in str(caught.value)


# TLS ----------------------------------------------------------------------------------------------


def test_a_certificate_file_must_be_one_and_have_an_effect(tmp_path: Path):
    empty = tmp_path / "ca.pem"
    empty.write_text("no certificate")
    for path in (tmp_path / "missing.pem", empty):
        with pytest.raises(ConfigError, match=rf"{path}' holds no certificates in PEM"):
            make("https://localhost:1", ca_file=str(path))
    with pytest.raises(ConfigError, match="has no effect: no server has an https address"):
        make("http://localhost:1", ca_file=str(CERTIFICATE))


def test_a_server_is_believed_by_its_certificate_and_not_without_it():
    with servers(1, "--certificate", str(CERTIFICATE)) as [server]:
        engine = connect_engine(f"vllms://{server.host}", ca_file=str(CERTIFICATE), **QUICK)
        try:
            engine.start()
            publish(engine, 0, reset=True)
            assert [len(s) for s in generate(engine, request())] == [4]
        finally:
            engine.close()
        refused(
            server, f"https://{server.host}", "Name the certificate of its authority as ca_file"
        )
        refused(server, f"http://{server.host}", "/health: ")
    assert_nothing_left()


def refused(server: Server, url: str, message: str) -> None:
    assert ssl.create_default_context().verify_mode == ssl.CERT_REQUIRED
    engine = make(url, **QUICK)
    with pytest.raises(EngineError, match=f"{server.host}.*{message}"):
        engine.start()


# Where servers are --------------------------------------------------------------------------------


def test_a_server_on_ipv6_gets_its_weights_on_ipv6():
    with servers(1, "--host", "::1") as [server]:
        options = QUICK | {"transport": "tcp", "trainer_host": "[::1]"}
        for given in (options, QUICK | {"transport": "tcp"}):
            engine = connect_engine(f"vllm://{server.host}", **given)
            try:
                engine.start()
                publish(engine, 0, reset=True)
                assert server.do()["weights"] == {"a": 0.0, "b": 0.0}
                assert [len(s) for s in generate(engine, request())] == [4]
            finally:
                engine.close()
    assert_nothing_left()


def test_a_prefix_precedes_every_route(one: Server):
    engine = make(f"{one.url}/fake", **QUICK, api_key="k")
    with pytest.raises(EngineError, match=rf"{one.url}/fake/health answered 404"):
        engine.start()


def test_an_address_without_a_port_says_so_when_nobody_answers():
    with pytest.raises(EngineError, match="Without a port in its address it is http's own"):
        make("http://127.1.2.3", **QUICK).start()


def test_a_proxy_is_used_where_it_is_asked_for(one: Server, monkeypatch: pytest.MonkeyPatch):
    for name in ("no_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("http_proxy", one.host)  # it answers whatever host is asked for
    options = QUICK | {"api_key": "k", "transport": "tcp", "trainer_host": "127.0.0.1"}
    url = "http://sdp-server.invalid:8000"
    engine = make(url, **options, use_proxy=True)
    try:
        engine.start()
        publish(engine, 0, reset=True)
        assert [len(s) for s in generate(engine, request())] == [4]
    finally:
        engine.close()
    with pytest.raises(EngineError, match=r"invalid:8000/health: ClientConnector"):
        make(url, **options).start()
    with pytest.raises(ConfigError, match="use_proxy=True has no effect"):
        make(one.url, use_proxy=True)
    monkeypatch.setenv("no_proxy", "sdp-server.invalid")
    with pytest.raises(ConfigError, match="use_proxy=True has no effect"):
        make(url, **options, use_proxy=True)
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", "socks5://user:hunter2@h:1")
    with pytest.raises(ConfigError, match="is no http:// proxy") as caught:
        make(url, **options, use_proxy=True)
    assert "hunter2" not in str(caught.value)
