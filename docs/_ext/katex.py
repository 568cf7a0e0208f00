"""Formulas by KaTeX, which lies in ``_static/katex``: the site needs nothing from elsewhere.

The files are those of the npm package ``katex`` 0.19.1 (MIT), of its fonts those in woff2 alone.
"""

from docutils import nodes
from sphinx.util.math import get_node_equation_number


def _aligned(text):
    """KaTeX asks for an environment where a formula has several lines."""
    parts = [part.strip() for part in text.split("\n\n") if part.strip()]
    rows = [
        rf"\begin{{aligned}}{part}\end{{aligned}}"
        if (r"\\" in part or "&" in part) and r"\begin" not in part
        else part
        for part in parts
    ]
    if len(rows) == 1:
        return rows[0]
    return r"\begin{gathered}" + r"\\".join(rows) + r"\end{gathered}"


def _inline(self, node):
    self.body.append(self.starttag(node, "span", "", CLASS="math notranslate"))
    self.body.append(self.encode(node.astext()) + "</span>")
    raise nodes.SkipNode


def _display(self, node):
    self.body.append(self.starttag(node, "div", CLASS="math notranslate", tabindex="0"))
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append(f"<span>{self.encode(_aligned(node.astext()))}</span></div>\n")
    raise nodes.SkipNode


def _only_where_needed(app, pagename, templatename, context, doctree):
    """Pages without a formula load nothing."""
    if doctree and any(doctree.findall(lambda n: isinstance(n, nodes.math | nodes.math_block))):
        app.add_css_file("katex/katex.min.css")
        app.add_js_file("katex/katex.min.js", loading_method="defer")
        app.add_js_file("formulas.js", loading_method="defer")


def setup(app):
    app.add_html_math_renderer("katex", (_inline, None), (_display, None))
    app.connect("html-page-context", _only_where_needed)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
