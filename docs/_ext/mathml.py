"""Formulas as MathML, which browsers draw by themselves: the site needs no script from elsewhere.

The converter is the one of docutils (``docutils.utils.math.latex2mathml``).
"""

import re

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

logger = logging.getLogger(__name__)

# What the converter does not know, in words that it knows.
REPLACEMENTS = {
    r"\\dots\b": r"\\ldots",
    r"\\t?frac(\d)(\w)": r"\\frac{\1}{\2}",  # it would read 12 in \frac12
    r"\\tfrac\b": r"\\frac",
    r"\\bigl?r?\b": "",
}

FUNCTION = re.compile(r"(<mi>(?:log|exp|sin|cos)</mi>)(?!\s*<mo[^>]*>\()")


def _convert(node, as_block):
    text = node.astext()
    for pattern, replacement in REPLACEMENTS.items():
        text = re.sub(pattern, replacement, text)
    try:
        # Browsers set "log q" as "logq".
        return FUNCTION.sub(r'\1<mspace width="0.17em"/>', latex2mathml.tex2mathml(text, as_block))
    except MathError as error:
        logger.warning("formula not understood: %s (%s)", text, error, location=node)
        return ""


def _inline(self, node):
    self.body.append(_convert(node, as_block=False))
    raise nodes.SkipNode


def _display(self, node):
    self.body.append(self.starttag(node, "div", CLASS="math"))
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append(_convert(node, as_block=True))
    self.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
