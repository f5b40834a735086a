"""Templates to text.

Invariant: everything a template is given is escaped in HTML, but for the style sheet of ours.
"""

import functools
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup


@functools.cache
def environment() -> jinja2.Environment:
    """Jinja's, for the templates beside this file; a name that is not given is an error."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("compressor.pages", "templates"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = resources.files("compressor.pages").joinpath("templates", "style.css").read_text(encoding="utf-8")
    made.globals["style"] = Markup(style)  # noqa: S704 (a file of ours)
    return made


def render(template: str, **values: Any) -> str:
    """The text of a template."""
    return environment().get_template(template).render(**values)
