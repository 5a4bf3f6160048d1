"""Pages from the Jinja2 templates in `templates/`: HTML, in which values are escaped, and Markdown."""

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

ENVIRONMENT = Environment(
    loader=PackageLoader("mask2dit.reporting"),
    autoescape=select_autoescape(("html",)),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
ENVIRONMENT.policies["json.dumps_kwargs"] = {"ensure_ascii": False}  # readable text, keys in their own order


def render(template: str, **values) -> str:
    """Fills a template.

    Raises:
        jinja2.UndefinedError: if the template uses a value that is not given.
    """
    return ENVIRONMENT.get_template(template).render(**values)
