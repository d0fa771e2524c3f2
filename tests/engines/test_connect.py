import pytest

from sdp_lightning.engines.connect import connect_engine
from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.errors import ConfigError


def test_embedded_gives_an_engine_with_the_options():
    engine = connect_engine("embedded", model="some/model", max_slots=3)
    assert isinstance(engine, EmbeddedEngine)
    assert engine.version is None and engine.updates_in_flight


def test_an_engine_passes_through():
    engine = EmbeddedEngine("some/model")
    assert connect_engine(engine) is engine


def test_an_engine_with_options_is_refused_because_they_would_be_ignored():
    with pytest.raises(ConfigError, match="model, max_slots would be ignored"):
        connect_engine(EmbeddedEngine("some/model"), model="other", max_slots=3)


def test_embedded_without_a_model_is_refused():
    with pytest.raises(ConfigError, match="needs model="):
        connect_engine("embedded")


@pytest.mark.parametrize(
    ("url", "urls"),
    [
        ("vllm://localhost:8000", ["http://localhost:8000"]),
        ("vllm://127.0.0.1:8000/", ["http://127.0.0.1:8000"]),
        ("vllm://[::1]:1,localhost:2", ["http://[::1]:1", "http://localhost:2"]),
        ("vllm://localhost:1, 127.0.0.1:2 ,", ["http://localhost:1", "http://127.0.0.1:2"]),
        ("VLLM://LocalHost", ["http://localhost"]),
        ("vllms://localhost,[::1]/a/", ["https://localhost", "https://[::1]/a"]),
        ("sglang://https://localhost:1/team", ["https://localhost:1/team"]),
        ("vllm://http://localhost:8000/v1", ["http://localhost:8000"]),
        (" vllm://[0:0::1]:1/a/v1/,127.1.2.3", ["http://[::1]:1/a", "http://127.1.2.3"]),
    ],
)
def test_vllm_names_servers_that_run(url: str, urls: list[str]):
    engine = connect_engine(url, model="some/model", max_tries=3)
    assert isinstance(engine, RemoteInfEngine)
    assert engine.options.max_tries == 3
    assert engine._urls == urls


@pytest.mark.parametrize(
    "rest",
    ["", ",", " ", "h:x", "localhost:8000?replicas=2", "localhost:1,other:y", "https://h:x/a"],
)
def test_a_url_that_names_no_server_says_how_to(rest: str):
    with pytest.raises(ConfigError, match=r"does not name servers\. Write 'vllm://host:port"):
        connect_engine(f"vllm://{rest}", api_key="k")


@pytest.mark.parametrize(
    "rest",
    [
        *("localhost:1,localhost:1", "localhost:1,LOCALHOST:1/", "localhost:1,127.0.0.1:1"),
        *("[::1]:1,[0:0::1]:1", "localhost,localhost:80", "localhost:1/v1,localhost:1"),
    ],
)
def test_a_server_named_twice_is_refused(rest: str):
    with pytest.raises(ConfigError, match="is named twice"):
        connect_engine(f"vllm://{rest}")


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("vllm://::1:8000", r"An IPv6 address goes into brackets"),
        ("vllm://localhost:1;localhost:2", "Separate servers by commas"),
        ("vllm://localhost:1 localhost:2", "Separate servers by commas"),
        ("vllm://gateway/team:8000", "The port precedes the path"),
        ("vllm://0.0.0.0:8000", "name one, as 127.0.0.1"),
        ("sglang://[::]:8000", "name one, as 127.0.0.1"),
        ("vllm://8000", "is not the address of a server"),
        ("vllm://300.1.1.1:80", "is not the address of a server"),
        ("vllm://-h:80", "is not the address of a server"),
        ("vllm://ftp://h:80", "is not the address of a server"),
        ("vllm://launch:8000", r"its settings follow a '\?'"),
        ("vllms://http://h:80", "says https and http. Write 'vllm://"),
        ("https://host/v1", "Say the kind of server: 'vllm://https://"),
        ("vllm+https://host", "Say the kind of server"),
    ],
)
def test_a_form_that_is_not_understood_is_refused_as_such(url: str, remedy: str):
    with pytest.raises(ConfigError, match=remedy) as caught:
        connect_engine(url)  # without a key, which other hosts need
    assert "another host" not in str(caught.value)


def test_servers_on_other_hosts_need_a_key():
    with pytest.raises(ConfigError, match="far:8000 is on another host"):
        connect_engine("vllm://localhost:8000,far:8000")
    with pytest.raises(ConfigError, match="cannot see weights in this one's shared memory"):
        connect_engine("vllm://localhost:8000,far:8000", api_key="k")
    engine = connect_engine("vllm://localhost:8000,far:8000", api_key="k", transport="tcp")
    assert engine.version is None


def test_an_unknown_option_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"RemoteOptions has no max_slots. It has .*max_tries"):
        connect_engine("vllm://localhost:8000", max_slots=3)


def test_launch_gives_managed_servers_with_the_settings_of_the_url():
    url = "vllm://launch?replicas=2&max_model_len=512&gpu_memory_utilization=0.4&cores=0,1"
    engine = connect_engine(url, model="some/model", min_replicas=2)
    assert isinstance(engine, RemoteInfEngine) and engine._managed is not None
    config = engine._managed.config
    assert (config.model, config.replicas, config.max_model_len) == ("some/model", 2, 512)
    assert (config.gpu_memory_utilization, config.cores) == (0.4, ("0", "1"))


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("replicas=2", "needs a model"),
        ("model=m&replicas=two", "replicas='two' is no int"),
        ("model=m&gpus=2", "ServerConfig has no gpus"),
        ("model=m&replicas", "write name=value"),
        ("model=m&replicas=1&replicas=2", "replicas is given twice"),
    ],
)
def test_a_launch_that_makes_no_sense_is_refused(query: str, message: str):
    with pytest.raises(ConfigError, match=message):
        connect_engine(f"vllm://launch?{query}")


@pytest.mark.parametrize("url", ["", "embeded", "http://localhost", "tgi://localhost:30000"])
def test_an_unknown_url_names_the_known_ones(url: str):
    with pytest.raises(ConfigError, match="Known are 'embedded'"):
        connect_engine(url, model="some/model")


@pytest.mark.parametrize(
    "options",
    [{"max_slots": 0}, {"num_threads": 0}, {"max_length": 1}, {"kv_on_update": "maybe"}],
)
def test_options_out_of_range_are_refused(options: dict[str, object]):
    with pytest.raises(ConfigError, match=str(next(iter(options.values())))):
        connect_engine("embedded", model="some/model", **options)
