from pathlib import Path

import pytest

from anabranch.edge.generated import edge_pb2, make


@pytest.mark.parametrize("name", make.FILES)
def test_the_generated_code_is_that_of_the_proto(name: str) -> None:
    folder = Path(make.__file__).parent
    assert (folder / name).read_bytes() == make.generate()[name], "run `make proto`"


def test_the_modules_import_each_other_under_the_package_name() -> None:
    from anabranch.edge.generated import edge_pb2_grpc

    assert edge_pb2 in vars(edge_pb2_grpc).values()
