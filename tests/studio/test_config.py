import socket

import pytest

from mask2dit.studio.config import StudioConfig
from mask2dit.studio.run import launch


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "::", "example.org"])
def test_another_address_needs_a_password(host, monkeypatch):
    with pytest.raises(ValueError, match=f"host={host} can be reached from other computers"):
        StudioConfig(host=host)
    with pytest.raises(ValueError, match="not set"):
        StudioConfig(host=host, password_env="PAGE_PASSWORD")
    monkeypatch.setenv("PAGE_PASSWORD", "x")
    assert not StudioConfig(host=host, password_env="PAGE_PASSWORD").is_local


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_this_computers_own_addresses_need_none(host):
    assert StudioConfig(host=host).is_local


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"port": 70000}, "port=70000"),
        ({"max_upload_mb": 0}, "max_upload_mb=0"),
        ({"writer_base_url": "http://localhost:8000/v1"}, "needs writer_model"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        StudioConfig(**settings)


def test_a_port_that_is_taken_is_told(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} .*choose another port"):
            launch(StudioConfig(projects=str(tmp_path), port=port))
