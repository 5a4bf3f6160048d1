import json
import re

import pytest
from jinja2 import UndefinedError

from mask2dit.reporting.pages import ENVIRONMENT, render


def test_every_template_can_be_read():
    names = ENVIRONMENT.list_templates()
    assert {"report.html", "study.html", "review.html", "card.md", "base.css"} <= set(names)
    for name in names:
        ENVIRONMENT.get_template(name)


def test_values_cannot_break_out_of_a_page():
    page = render("review.html", title="<i>", data={"b": "</script>", "a": "é"}, doubts=[])
    assert "<title>&lt;i&gt;</title>" in page
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page)[1]
    assert list(json.loads(data).items()) == [("b", "</script>"), ("a", "é")]
    assert "é" in data


def test_a_value_that_is_missing_is_an_error():
    with pytest.raises(UndefinedError, match="is undefined"):
        render("study.html", title="Study")
