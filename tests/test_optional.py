import sys

import pytest

from mask2dit.inference.write import WriteConfig, write_stories
from mask2dit.optional import import_optional


def test_a_package_that_is_missing_comes_with_the_command_that_installs_it():
    with pytest.raises(ValueError, match=r"'no_such_package' is missing: pip install 'mask2dit\[curation\]'"):
        import_optional("no_such_package", "curation")


def test_stories_are_not_written_without_the_client_of_endpoints(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    output = str(tmp_path / "story.yaml")
    with pytest.raises(ValueError, match=r"'openai' is missing: pip install 'mask2dit\[evaluation\]'"):
        write_stories(WriteConfig(base_url="http://127.0.0.1:9/v1", model="m", idea="a fox", output=output))
