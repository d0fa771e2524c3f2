import pytest

from sdp_lightning.engines.connect import connect_engine
from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.errors import ConfigError


def test_embedded_gives_an_engine_with_the_options():
    engine = connect_engine("embedded", model="some/model", max_slots=3)
    assert isinstance(engine, EmbeddedEngine)
    assert engine.version is None and engine.in_process


def test_an_engine_passes_through():
    engine = EmbeddedEngine("some/model")
    assert connect_engine(engine) is engine


def test_an_engine_with_options_is_refused_because_they_would_be_ignored():
    with pytest.raises(ConfigError, match="model, max_slots would be ignored"):
        connect_engine(EmbeddedEngine("some/model"), model="other", max_slots=3)


def test_embedded_without_a_model_is_refused():
    with pytest.raises(ConfigError, match="needs model="):
        connect_engine("embedded")


@pytest.mark.parametrize("url", ["vllm://localhost:8000", "sglang://localhost:30000"])
def test_servers_are_refused_with_what_works_instead(url: str):
    with pytest.raises(ConfigError, match="engine='embedded'"):
        connect_engine(url, model="some/model")


@pytest.mark.parametrize("url", ["", "embeded", "http://localhost"])
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
