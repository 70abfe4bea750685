"""Settings come from BRIDGE_* and what means nothing is named."""

import pytest
from pydantic import ValidationError

from bridge.errors import ConfigurationInvalid
from bridge.settings import Settings, settings


@pytest.fixture(autouse=True)
def fresh():
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.fixture
def environment(monkeypatch):
    def set_all(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_without_variables_there_are_defaults():
    found = settings()
    assert found.gpu_tasks == []
    assert found.device == "auto"
    assert found.gpu_slots is None
    assert found.max_crashes == 2


def test_every_knob_has_a_default_a_description_and_a_unit_in_its_name():
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert not field.is_required(), name
        if field.annotation is float and name != "actor_cpus":
            assert name.endswith("_s"), name


def test_each_type_is_read(environment):
    environment(
        BRIDGE_GPU_TASKS='["legacy.images.*", "legacy.other"]',
        BRIDGE_GPU_SLOTS="7",
        BRIDGE_LEASE_S="2.5",
        BRIDGE_DEVICE="cpu",
        BRIDGE_VALIDATE_CONFIGURED="true",
        BRIDGE_RAY_ADDRESS="10.0.0.1:6379",
        BRIDGE_CALL_BUDGET_S="0.01",
    )
    found = settings()
    assert found.gpu_tasks == ["legacy.images.*", "legacy.other"]
    assert (found.gpu_slots, found.lease_s, found.device) == (7, 2.5, "cpu")
    assert found.validate_configured is True
    assert (found.ray_address, found.call_budget_s) == ("10.0.0.1:6379", 0.01)


@pytest.mark.parametrize("word", ["auto", ""])
def test_words_for_the_cluster_of_this_host(environment, word):
    environment(BRIDGE_RAY_ADDRESS=word)
    assert settings().ray_address is None


def test_they_are_read_once(environment):
    first = settings()
    environment(BRIDGE_GPU_SLOTS="9")
    assert settings() is first


def test_nobody_changes_them():
    with pytest.raises(Exception, match="frozen"):
        settings().gpu_slots = 3


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("BRIDGE_GPU_SLOTS", "many", "integer"),
        ("BRIDGE_GPU_SLOTS", "0", "greater than or equal to 1"),
        ("BRIDGE_DEVICE", "gpu", "'cuda'"),
        ("BRIDGE_LEASE_S", "-1", "greater than 0"),
        ("BRIDGE_CALL_TASKS", "5000", "4096"),
        ("BRIDGE_CALLS_OUTSTANDING", "9", "4"),
        ("BRIDGE_GPU_TASKS", "{}", "list"),
        ("BRIDGE_GPU_TASKS", "[1]", "string"),
        ("BRIDGE_GPU_TASKS", "shop.images.*", "JSON"),
        ("BRIDGE_GPU_TASKS", "['shop']", "JSON"),
        ("BRIDGE_GPU_TASKS", "", "JSON"),
        ("BRIDGE_VALIDATE_CONFIGURED", "perhaps", "boolean"),
        ("BRIDGE_RAY_ADDRESS", "ray://head:10001", "host:port"),
        ("BRIDGE_RAY_ADDRESS", "local", "host:port"),
        ("BRIDGE_RAY_ADDRESS", "6379", "host:port"),
        ("BRIDGE_RAY_ADDRESS", "head:70000", "host:port"),
    ],
)
def test_a_value_that_means_nothing_is_named(environment, name, value, says):
    environment(**{name: value})
    with pytest.raises(ConfigurationInvalid) as caught:
        settings()
    assert name in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bounds_of_the_fleet_that_contradict_each_other_are_refused(environment):
    environment(BRIDGE_MIN_ACTORS="3", BRIDGE_MAX_ACTORS="2")
    with pytest.raises(ConfigurationInvalid, match="BRIDGE_MIN_ACTORS is larger than BRIDGE_MAX_ACTORS"):
        settings()


def test_all_wrong_values_are_named_at_once(environment):
    environment(BRIDGE_GPU_SLOTS="x", BRIDGE_GRACE_S="y")
    with pytest.raises(ConfigurationInvalid, match=r"BRIDGE_GPU_SLOTS.*BRIDGE_GRACE_S"):
        settings()


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("8080", ("127.0.0.1", 8080)),
        (":8080", ("127.0.0.1", 8080)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("[::1]:9", ("::1", 9)),
    ],
)
def test_a_health_address_is_on_loopback_unless_it_names_a_host(address, place):
    assert Settings(health_address=address).health_place == place


@pytest.mark.parametrize("address", ["", "localhost", "localhost:", "h:0", "h:70000", "h:-1"])
def test_a_health_address_that_means_nothing(address):
    with pytest.raises(ValidationError, match="write host:port"):
        Settings(health_address=address)


@pytest.mark.parametrize(
    "url", ["redis://:p@h:1/0", "rediss://h", "unix:///s", "file:///mnt/shared", "s3://bucket/prefix/"]
)
def test_a_store_for_large_data(url):
    assert Settings(data_url=url).stores.url == url


@pytest.mark.parametrize(
    "url", ["file:///", "file://", "/mnt", "", "local:///mnt", "https://h/x", "s3://u:geheim@b", "a::s3://b"]
)
def test_a_store_that_means_nothing(environment, url):
    environment(BRIDGE_DATA_URL=url)
    with pytest.raises(ConfigurationInvalid, match=r"BRIDGE_DATA_URL: (write a root|web servers)") as caught:
        settings()
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    "root", ["file:///", "/mnt", "https://h/?a", "https://h/%20", "https://u@h/", "zip::https://h/"]
)
def test_a_root_that_means_nothing(root):
    with pytest.raises(ValidationError, match="write a root such as"):
        Settings(data_roots=["https://h/x", root])
