"""The SuperLink's process: python -m anabranch.server.coordinator.superlink_server SOCKET DB."""

from __future__ import annotations

import sys
from pathlib import Path

from anabranch.server.coordinator.child import end_with_parent
from anabranch.server.superlink import serve

if __name__ == "__main__":
    end_with_parent()
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
