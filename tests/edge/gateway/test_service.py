from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from anabranch.edge.gateway import limits
from anabranch.edge.gateway.authority import make_authority
from anabranch.edge.gateway.config import Limits
from anabranch.edge.gateway.operator import invite, revoke
from anabranch.edge.generated import edge_pb2, edge_pb2_grpc
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from benchmarks.edge.gateway_devices import HOST, Device, enrol_many, request_of
from benchmarks.edge.gateway_load import delta_of
from tests.gateway_cases import ended, open_round, row_of

Fleet = Callable[..., Any]
Code = grpc.StatusCode


def refused(work: Callable[[], Any], code: grpc.StatusCode, words: str = "") -> str:
    with pytest.raises(grpc.RpcError) as error:
        work()
    details: str = error.value.details()
    assert (error.value.code(), words in details) == (code, True), details
    return details


def test_a_round_ends_with_the_devices_mean(fleet: Fleet, adapter: Adapter) -> None:
    gateway, devices = fleet(3)
    row = open_round(gateway.opener, adapter)
    deltas = []
    for seed, device in enumerate(devices):
        assert device.check_in().WhichOneof("outcome") == "task"
        assert wire.decode_adapter(device.fetch(device.task.adapter.sha256)).spec == adapter.spec
        deltas.append(delta_of(adapter.spec, seed))
        assert device.send(wire.encode(deltas[-1])).accepted
    row = ended(gateway.parts.store, row)
    frame = (gateway.folder.results / row["result"]).read_bytes()
    mean = wire.decode_delta(frame, adapter.spec)
    for name, array in mean.arrays.items():
        expected = np.mean([d.arrays[name] for d in deltas], axis=0, dtype=np.float64)
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-7)
    assert (row["examples"], row["clients"], mean.num_examples) == (30, 3, 30)
    gateway.closer.recover()
    assert not list(gateway.folder.spool.iterdir())
    assert devices[0].send(wire.encode(deltas[0])).accepted  # the answer may have been lost


def test_the_bundle_is_fetched_whole_and_from_the_middle(fleet: Fleet, adapter: Adapter) -> None:
    gateway, (device,) = fleet(1, min_cohort=1, limits=Limits(chunk_bytes=1024))
    open_round(gateway.opener, adapter)
    device.check_in()
    for reference in (device.task.manifest, device.task.signature, device.task.adapter):
        data = device.fetch(reference.sha256)
        assert (len(data), hashlib.sha256(data).digest()) == (reference.size, reference.sha256)
        assert device.fetch(reference.sha256, offset=len(data) // 2) == data[len(data) // 2 :]
    refused(lambda: device.fetch(bytes(32)), Code.NOT_FOUND, "none with this SHA-256")
    refused(lambda: device.fetch(b"short"), Code.INVALID_ARGUMENT, "32 bytes")
    sha, size = device.task.adapter.sha256, device.task.adapter.size
    refused(lambda: device.fetch(sha, size + 1), Code.INVALID_ARGUMENT, "beyond")


def test_tokens_are_good_once(serving: Any) -> None:
    gateway = serving()
    authority = gateway.parts.authority.pem
    (text,) = invite(gateway.folder.folder)

    def enrol(_: int) -> Any:
        try:
            return Device.enrol(text, gateway.enroll_port, gateway.port, authority=authority)
        except grpc.RpcError as error:
            return error.code()

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(enrol, range(8)))
    got = [one for one in answers if isinstance(one, Device)]
    assert (len(got), answers.count(Code.PERMISSION_DENIED)) == (1, 7)
    got[0].check_in()
    got[0].hang_up()


def test_the_enrolment_port_serves_enrolment_alone(serving: Any) -> None:
    gateway = serving()
    credentials = grpc.ssl_channel_credentials(gateway.parts.authority.pem)
    with grpc.secure_channel(f"{HOST}:{gateway.enroll_port}", credentials) as channel:
        stub = edge_pb2_grpc.EdgeGatewayStub(channel)
        refused(lambda: stub.CheckIn(edge_pb2.CheckInRequest(), timeout=10), Code.UNIMPLEMENTED)
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_no_certificate_and_a_strangers_certificate_do_not_connect(
    fleet: Fleet, tmp_path: Any
) -> None:
    gateway, (device,) = fleet(1)
    other = make_authority(tmp_path / "other", "north")
    pem = other.issue(request_of(device.key), device.name, 10)
    from cryptography.hazmat.primitives.serialization import Encoding

    device.hang_up()
    device.certificate = pem.public_bytes(Encoding.PEM)
    refused(device.check_in, Code.UNAVAILABLE)
    credentials = grpc.ssl_channel_credentials(gateway.parts.authority.pem)
    with grpc.secure_channel(f"{HOST}:{gateway.port}", credentials) as channel:
        stub = edge_pb2_grpc.EdgeGatewayStub(channel)
        refused(lambda: stub.CheckIn(edge_pb2.CheckInRequest(), timeout=10), Code.UNAVAILABLE)


def test_the_servers_own_certificate_is_no_devices(serving: Any) -> None:
    gateway = serving()
    key, certificate = gateway.parts.authority.server_credentials(gateway.file.hosts)
    credentials = grpc.ssl_channel_credentials(gateway.parts.authority.pem, key, certificate)
    with grpc.secure_channel(f"{HOST}:{gateway.port}", credentials) as channel:
        stub = edge_pb2_grpc.EdgeGatewayStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            stub.CheckIn(edge_pb2.CheckInRequest(), timeout=10)
    assert error.value.code() in (Code.PERMISSION_DENIED, Code.UNAVAILABLE)


def test_a_revoked_device_is_refused_in_every_call_and_its_delta_is_not_counted(
    fleet: Fleet, adapter: Adapter
) -> None:
    gateway, devices = fleet(2)
    row = open_round(gateway.opener, adapter)
    frame = wire.encode(delta_of(adapter.spec, 0))
    for device in devices:
        device.check_in()
        assert device.send(frame).accepted
    revoke(gateway.folder.folder, devices[0].name)
    refused(devices[0].check_in, Code.PERMISSION_DENIED, "revoked")
    refused(lambda: devices[0].begin(frame), Code.PERMISSION_DENIED, "revoked")
    refused(lambda: devices[0].fetch(bytes(32)), Code.PERMISSION_DENIED, "revoked")
    gateway.closer.due(now=row["deadline"])
    assert (
        row_of(gateway.parts.store, row)["state"] == "refused"
    )  # one delta is left, min_cohort is 2


def test_a_device_renews_its_certificate_without_a_token(fleet: Fleet) -> None:
    _, (device,) = fleet(1)
    request = edge_pb2.EnrollRequest(certificate_request=request_of(device.key))
    reply = device.stub.Enroll(request, timeout=10)
    assert (reply.device, reply.certificate == device.certificate) == (device.name, False)
    device.hang_up()
    device.certificate = reply.certificate
    device.check_in()
    request.token = "x"
    refused(lambda: device.stub.Enroll(request, timeout=10), Code.INVALID_ARGUMENT, "empty here")


def test_one_device_has_nothing_to_say_about_anothers_task(fleet: Fleet, adapter: Adapter) -> None:
    gateway, (one, two) = fleet(2)
    open_round(gateway.opener, adapter)
    one.check_in()
    frame = wire.encode(delta_of(adapter.spec, 0))
    one.upload(frame)
    two.task = one.task
    refused(lambda: two.begin(frame), Code.NOT_FOUND, "for this device")
    refused(lambda: two.commit(frame), Code.NOT_FOUND, "for this device")
    abort = edge_pb2.AbortRequest(task=one.task.id)
    refused(lambda: two.stub.Abort(abort, timeout=10), Code.NOT_FOUND)
    chunk = edge_pb2.UploadChunk(upload=one.begin(frame).upload, data=b"x", crc32=0)
    refused(lambda: two.stub.Upload(iter([chunk]), timeout=10), Code.NOT_FOUND)


def test_calls_without_a_sensible_deadline_are_refused(fleet: Fleet) -> None:
    _, (device,) = fleet(1)
    request = edge_pb2.CheckInRequest()
    refused(lambda: device.stub.CheckIn(request), Code.INVALID_ARGUMENT, "deadline")
    refused(
        lambda: device.stub.CheckIn(request, timeout=5000), Code.INVALID_ARGUMENT, "at most 600"
    )


@pytest.mark.parametrize(
    ("said", "rule"),
    [
        (edge_pb2.Capabilities(runtime="x" * 300), "capabilities.runtime: 300"),
        (edge_pb2.Capabilities(bundles=["x"] * 65), "capabilities.bundles: 65"),
        (edge_pb2.Capabilities(engines=["x" * 300]), "capabilities.engines: 300"),
        (edge_pb2.Capabilities(examples=1 << 60), "capabilities.examples"),
    ],
)
def test_oversized_fields_are_refused_with_their_name(fleet: Fleet, said: Any, rule: str) -> None:
    _, (device,) = fleet(1)
    request = edge_pb2.CheckInRequest(capabilities=said)
    refused(lambda: device.stub.CheckIn(request, timeout=10), Code.INVALID_ARGUMENT, rule)


def test_an_oversized_message_is_refused(fleet: Fleet) -> None:
    _, (device,) = fleet(1)
    request = edge_pb2.CheckInRequest(resume_task="x" * (2 << 20))
    refused(lambda: device.stub.CheckIn(request, timeout=10), Code.RESOURCE_EXHAUSTED)


def test_the_bytes_of_a_day_are_limited(
    fleet: Fleet, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "today", lambda: 20_000)  # and stays
    gateway, (device, other) = fleet(2, limits=Limits(bytes_a_day=5000, chunk_bytes=1024))
    open_round(gateway.opener, adapter)
    device.check_in()
    sha = device.task.manifest.sha256
    most = 1 + 5000 // device.task.manifest.size
    words = "come back after midnight"
    refused(lambda: [device.fetch(sha) for _ in range(most + 1)], Code.RESOURCE_EXHAUSTED, words)
    frame = wire.encode(delta_of(adapter.spec, 0))
    refused(lambda: device.begin(frame), Code.RESOURCE_EXHAUSTED, words)
    other.check_in()  # a quota is one device's
    other.fetch(sha)


def test_the_calls_of_a_minute_are_limited(fleet: Fleet) -> None:
    _, (device, other) = fleet(2, limits=Limits(calls_a_minute=4))
    for _ in range(3):
        device.check_in()
    refused(device.check_in, Code.RESOURCE_EXHAUSTED, "4 a minute")
    other.check_in()


def test_enrolments_are_limited_whoever_tries(serving: Any) -> None:
    gateway = serving(limits=Limits(enrolments_a_minute=2))
    credentials = grpc.ssl_channel_credentials(gateway.parts.authority.pem)
    with grpc.secure_channel(f"{HOST}:{gateway.enroll_port}", credentials) as channel:
        stub = edge_pb2_grpc.EdgeGatewayStub(channel)
        request = edge_pb2.EnrollRequest(token="guess")
        for _ in range(2):
            refused(lambda: stub.Enroll(request, timeout=10), Code.INVALID_ARGUMENT)
        refused(lambda: stub.Enroll(request, timeout=10), Code.RESOURCE_EXHAUSTED, "2 a minute")


def test_an_unforeseen_error_keeps_its_text(fleet: Fleet, monkeypatch: Any) -> None:
    gateway, (device,) = fleet(1)

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a patient's name")

    monkeypatch.setattr(gateway.parts.rounds, "check_in", broken)
    details = refused(device.check_in, Code.INTERNAL)
    assert details == "KeyError in CheckIn: see the gateway's log"


def test_a_second_gateway_on_the_port_is_refused(serving: Any) -> None:
    gateway = serving()
    from anabranch.edge.gateway.server import start
    from anabranch.protocols.errors import ConfigError

    with pytest.raises(ConfigError, match="cannot be listened on"):
        start(gateway.folder.folder)


def test_too_many_calls_at_once_are_refused_not_queued(serving: Any) -> None:
    gateway = serving(limits=Limits(calls_at_once=1))
    (device,) = enrol_many(gateway.folder, gateway, 1)
    device.check_in()
    with gateway.parts.quotas.call(device.name):
        refused(device.check_in, Code.RESOURCE_EXHAUSTED, "1 at once")
    device.check_in()
    device.hang_up()


@pytest.mark.parametrize("on", [False, True])
def test_reflection_is_off_unless_asked_for(fleet: Fleet, on: bool) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    _, (device,) = fleet(1, **({"reflection": True} if on else {}))
    stub = reflection_pb2_grpc.ServerReflectionStub(device.channels[0])
    request = reflection_pb2.ServerReflectionRequest(list_services="")

    def ask() -> list[str]:
        (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=10)
        return [one.name for one in answer.list_services_response.service]

    if on:
        assert "anabranch.edge.v1.EdgeGateway" in ask()
    else:
        refused(ask, Code.UNIMPLEMENTED)
