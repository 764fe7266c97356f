"""Serve the page on this machine: python serve.py BUNDLE KEY.pub RECORDS.tsv

BUNDLE is a bundle's folder, KEY.pub the public key (hex) that signed it, RECORDS.tsv lines of
label, tab, text. onnxruntime-web comes from node_modules: run `npm ci --ignore-scripts` here
first. Only this machine can reach the server.
"""

from __future__ import annotations

import functools
import http.server
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ORT = Path("node_modules/onnxruntime-web/dist")


class Pages(http.server.SimpleHTTPRequestHandler):
    """The page, the bundle under bundle/, onnxruntime-web under ort/."""

    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *args: object, places: dict[str, Path], **more: object) -> None:
        self.places = places
        super().__init__(*args, directory=str(HERE), **more)  # type: ignore[arg-type]

    def translate_path(self, path: str) -> str:
        """Return the file for a URL: one of the known places, or the page's own folder."""
        name = path.partition("?")[0].lstrip("/")
        for prefix, place in self.places.items():
            if name == prefix:
                return str(place)
            if prefix.endswith("/") and name.startswith(prefix) and "/" not in name[len(prefix) :]:
                return str(place / name[len(prefix) :])
        return super().translate_path(path)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing for each request."""


def server(
    bundle: Path, key: Path, records: Path, *, packages: Path = HERE, port: int = 0
) -> http.server.ThreadingHTTPServer:
    """Return a server on the loopback address; `packages` holds node_modules."""
    places = {
        "bundle/": bundle,
        "ort/": packages / ORT,
        "trusted.txt": key,
        "records.tsv": records,
    }
    handler = functools.partial(Pages, places=places)
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    running = server(*map(Path, sys.argv[1:]), port=8000)
    sys.stdout.write("http://127.0.0.1:8000/  (Ctrl-C to stop)\n")
    running.serve_forever()
