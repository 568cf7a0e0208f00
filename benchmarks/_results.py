"""Results on disk: one JSON object, one entry per run, written after every run."""

import json
import os
from pathlib import Path


def load(paths):
    """Entries of several files together; a file that is not there counts as empty."""
    entries = {}
    for path in map(Path, paths):
        if path.exists():
            entries.update(json.loads(path.read_text()))
    return entries


def add(path, key, entry):
    """Append one entry and replace the file in one step, so that a kill never truncates it."""
    entries = load([path])
    entries[key] = entry
    partial = Path(f"{path}.part")
    partial.write_text(json.dumps(entries, indent=1))
    os.replace(partial, path)
