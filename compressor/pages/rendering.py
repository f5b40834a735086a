"""Templates to text.

Invariant: everything a template is given is escaped in HTML, but for the style sheet of ours; in recipes the filters
`yaml` and `inline` keep text where it is put.
"""

import functools
from importlib import resources
from typing import Any

import jinja2
import yaml
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
    made.filters |= {"yaml": as_yaml, "inline": inline}
    made.globals["style"] = Markup(style)  # noqa: S704 (a file of ours)
    return made


def as_yaml(value: Any) -> str:
    """A value as YAML writes it, on one line."""
    text: str = yaml.safe_dump(value, allow_unicode=True, width=10_000, default_flow_style=True)
    return text.removesuffix("\n...\n").strip()


def inline(text: object) -> str:
    """Text for a comment: on one line, without what YAML refuses."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def render(template: str, **values: Any) -> str:
    """The text of a template."""
    return environment().get_template(template).render(**values)
