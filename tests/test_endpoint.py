import numpy as np
import pytest
from PIL import Image

from mask2dit.curation.stand_in import stand_in
from mask2dit.endpoint import Endpoint, EndpointError, image_part

pytest.importorskip("openai", reason="pip install mask2dit[evaluation]")


def test_an_answer_comes_with_its_tokens():
    asked = []
    with stand_in(lambda request: asked.append(request) or (200, "two words")) as url:
        content = [image_part(Image.fromarray(np.zeros((8, 8, 3), np.uint8)))]
        reply = Endpoint(url, "m", "NO_SUCH_KEY").ask([{"role": "user", "content": content}], temperature=0.5)
    assert (reply.text, reply.output_tokens) == ("two words", 2)
    assert (asked[0]["model"], asked[0]["temperature"]) == ("m", 0.5)
    assert asked[0]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")


def test_a_failure_tells_its_status_and_not_the_key(monkeypatch):
    monkeypatch.setenv("ENDPOINT_TEST_KEY", "sk-secret")
    with (
        stand_in(lambda request: (401, "wrong key sk-secret")) as url,
        pytest.raises(EndpointError, match="wrong key …") as error,
    ):
        Endpoint(url, "m", "ENDPOINT_TEST_KEY").ask([{"role": "user", "content": []}])
    assert error.value.status == 401 and error.value.__cause__ is None


def test_an_endpoint_that_is_not_there_has_no_status():
    with pytest.raises(EndpointError, match="Connection error") as error:
        Endpoint("http://127.0.0.1:9/v1", "m", "NO_SUCH_KEY", max_retries=0).ask([{"role": "user", "content": []}])
    assert error.value.status is None
