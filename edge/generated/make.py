"""Write edge_pb2.py, edge_pb2.pyi and edge_pb2_grpc.py from protocols/edge.proto (`make proto`).

protoc maps the proto folder onto the package's name, so that the generated modules import
each other as `anabranch.edge.generated.…` and nothing is edited afterwards. grpcio-tools is
pinned in constraints.txt: the same version writes the same bytes, which a test checks.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

PACKAGE = "anabranch/edge/generated"
FILES = ("edge_pb2.py", "edge_pb2.pyi", "edge_pb2_grpc.py")
HERE = Path(__file__).resolve().parent


def generate() -> dict[str, bytes]:
    """Return the generated files by name; RuntimeError if protoc refuses the proto."""
    protos = HERE.parent.parent / "protocols"
    with tempfile.TemporaryDirectory() as out:
        status = protoc.main(
            [
                "protoc",
                f"--proto_path={PACKAGE}={protos}",
                f"--python_out={out}",
                f"--pyi_out={out}",
                f"--grpc_python_out={out}",
                f"{PACKAGE}/edge.proto",
            ]
        )
        if status != 0:
            raise RuntimeError(f"protoc ended with {status}: read its message above")
        return {name: (Path(out) / PACKAGE / name).read_bytes() for name in FILES}


def main() -> int:
    """Write the files that differ; return 0."""
    for name, data in generate().items():
        file = HERE / name
        if not file.exists() or file.read_bytes() != data:
            file.write_bytes(data)
            sys.stdout.write(f"wrote {file.name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
