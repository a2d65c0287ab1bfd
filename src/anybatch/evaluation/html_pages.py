"""HTML pages from the templates of a package."""

import base64
from typing import Any


def render(package: str, template: str, **values: Any) -> str:
    """A page, in which every value is escaped and none may be missing.

    The template is in the folder ``templates`` of the package; the style that all pages share is in
    this package's.

    Raises:
        ImportError: Without Jinja.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("a report needs Jinja: pip install 'anybatch[tools]'") from error
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(name) for name in (package, "anybatch.evaluation")]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def encoded(image: bytes) -> str:
    """The bytes of an image as a page holds them."""
    return base64.b64encode(image).decode("ascii")
