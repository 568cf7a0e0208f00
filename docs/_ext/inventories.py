"""Links to the sites of others without the network: ``docs/_inventories`` lists what we link to.

A file has the address of a site in its first line, then lines "role name page". In a page "$" is
the name. What Sphinx calls an inventory is made of them when the site is built.
"""

import tempfile
import zlib
from pathlib import Path


def _compile(source, target):
    site, *entries = filter(None, source.read_text().split("\n"))
    lines = []
    for entry in entries:
        role, name, page = entry.replace("$", entry.split()[1]).split()
        lines.append(f"{name} py:{role} 1 {page} -\n")
    header = f"# Sphinx inventory version 2\n# Project: {source.stem}\n# Version: \n"
    header += "# The remainder of this file is compressed using zlib.\n"
    target.write_bytes(header.encode() + zlib.compress("".join(lines).encode()))
    return site


def make(app, config):
    folder = Path(tempfile.mkdtemp())
    mapping = {}
    for source in sorted(Path(app.confdir, "_inventories").glob("*.txt")):
        target = folder / f"{source.stem}.inv"
        mapping[source.stem] = (_compile(source, target), str(target))
    config.intersphinx_mapping = mapping


def setup(app):
    # Before intersphinx reads its setting.
    app.connect("config-inited", make, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
