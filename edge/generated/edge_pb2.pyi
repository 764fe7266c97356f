from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EnrollRequest(_message.Message):
    __slots__ = ("token", "certificate_request", "platform")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    PLATFORM_FIELD_NUMBER: _ClassVar[int]
    token: str
    certificate_request: bytes
    platform: str
    def __init__(self, token: _Optional[str] = ..., certificate_request: _Optional[bytes] = ..., platform: _Optional[str] = ...) -> None: ...

class EnrollReply(_message.Message):
    __slots__ = ("device", "certificate", "authority", "bundle_keys", "gateway")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    AUTHORITY_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_KEYS_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    device: str
    certificate: bytes
    authority: bytes
    bundle_keys: _containers.RepeatedScalarFieldContainer[bytes]
    gateway: str
    def __init__(self, device: _Optional[str] = ..., certificate: _Optional[bytes] = ..., authority: _Optional[bytes] = ..., bundle_keys: _Optional[_Iterable[bytes]] = ..., gateway: _Optional[str] = ...) -> None: ...

class Capabilities(_message.Message):
    __slots__ = ("runtime", "onnxruntime", "engines", "memory_bytes", "disk_bytes", "examples", "bundles")
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    ONNXRUNTIME_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    runtime: str
    onnxruntime: str
    engines: _containers.RepeatedScalarFieldContainer[str]
    memory_bytes: int
    disk_bytes: int
    examples: int
    bundles: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, runtime: _Optional[str] = ..., onnxruntime: _Optional[str] = ..., engines: _Optional[_Iterable[str]] = ..., memory_bytes: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., examples: _Optional[int] = ..., bundles: _Optional[_Iterable[str]] = ...) -> None: ...

class CheckInRequest(_message.Message):
    __slots__ = ("capabilities", "resume_task", "peer_key", "peer_proof")
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    RESUME_TASK_FIELD_NUMBER: _ClassVar[int]
    PEER_KEY_FIELD_NUMBER: _ClassVar[int]
    PEER_PROOF_FIELD_NUMBER: _ClassVar[int]
    capabilities: Capabilities
    resume_task: str
    peer_key: bytes
    peer_proof: bytes
    def __init__(self, capabilities: _Optional[_Union[Capabilities, _Mapping]] = ..., resume_task: _Optional[str] = ..., peer_key: _Optional[bytes] = ..., peer_proof: _Optional[bytes] = ...) -> None: ...

class RetryWindow(_message.Message):
    __slots__ = ("min_seconds", "max_seconds", "reason")
    MIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MAX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    min_seconds: int
    max_seconds: int
    reason: str
    def __init__(self, min_seconds: _Optional[int] = ..., max_seconds: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class FileRef(_message.Message):
    __slots__ = ("name", "sha256", "size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: bytes
    size: int
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[bytes] = ..., size: _Optional[int] = ...) -> None: ...

class RecordPrivacy(_message.Message):
    __slots__ = ("noise_multiplier", "sample_rate", "clipping_norm", "delta")
    NOISE_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_RATE_FIELD_NUMBER: _ClassVar[int]
    CLIPPING_NORM_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    noise_multiplier: float
    sample_rate: float
    clipping_norm: float
    delta: float
    def __init__(self, noise_multiplier: _Optional[float] = ..., sample_rate: _Optional[float] = ..., clipping_norm: _Optional[float] = ..., delta: _Optional[float] = ...) -> None: ...

class SecureSum(_message.Message):
    __slots__ = ("minimum", "threshold", "range", "roster", "roster_signature", "weighting", "colluding")
    MINIMUM_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    RANGE_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    ROSTER_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTING_FIELD_NUMBER: _ClassVar[int]
    COLLUDING_FIELD_NUMBER: _ClassVar[int]
    minimum: int
    threshold: float
    range: float
    roster: bytes
    roster_signature: bytes
    weighting: str
    colluding: float
    def __init__(self, minimum: _Optional[int] = ..., threshold: _Optional[float] = ..., range: _Optional[float] = ..., roster: _Optional[bytes] = ..., roster_signature: _Optional[bytes] = ..., weighting: _Optional[str] = ..., colluding: _Optional[float] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("id", "run", "round", "bundle", "bundle_version", "manifest", "signature", "adapter", "training", "part", "uplink", "proximal_mu", "seed", "privacy", "deadline_unix", "chunk_bytes", "max_upload_bytes", "secure")
    ID_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    UPLINK_FIELD_NUMBER: _ClassVar[int]
    PROXIMAL_MU_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_UPLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECURE_FIELD_NUMBER: _ClassVar[int]
    id: str
    run: str
    round: int
    bundle: str
    bundle_version: int
    manifest: FileRef
    signature: FileRef
    adapter: FileRef
    training: bytes
    part: bytes
    uplink: bytes
    proximal_mu: float
    seed: int
    privacy: RecordPrivacy
    deadline_unix: int
    chunk_bytes: int
    max_upload_bytes: int
    secure: SecureSum
    def __init__(self, id: _Optional[str] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., bundle: _Optional[str] = ..., bundle_version: _Optional[int] = ..., manifest: _Optional[_Union[FileRef, _Mapping]] = ..., signature: _Optional[_Union[FileRef, _Mapping]] = ..., adapter: _Optional[_Union[FileRef, _Mapping]] = ..., training: _Optional[bytes] = ..., part: _Optional[bytes] = ..., uplink: _Optional[bytes] = ..., proximal_mu: _Optional[float] = ..., seed: _Optional[int] = ..., privacy: _Optional[_Union[RecordPrivacy, _Mapping]] = ..., deadline_unix: _Optional[int] = ..., chunk_bytes: _Optional[int] = ..., max_upload_bytes: _Optional[int] = ..., secure: _Optional[_Union[SecureSum, _Mapping]] = ...) -> None: ...

class CheckInReply(_message.Message):
    __slots__ = ("task", "retry")
    TASK_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    task: Task
    retry: RetryWindow
    def __init__(self, task: _Optional[_Union[Task, _Mapping]] = ..., retry: _Optional[_Union[RetryWindow, _Mapping]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("sha256", "offset")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    sha256: bytes
    offset: int
    def __init__(self, sha256: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("offset", "data", "crc32")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    crc32: int
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ..., crc32: _Optional[int] = ...) -> None: ...

class BeginUploadRequest(_message.Message):
    __slots__ = ("task", "sha256", "size")
    TASK_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    task: str
    sha256: bytes
    size: int
    def __init__(self, task: _Optional[str] = ..., sha256: _Optional[bytes] = ..., size: _Optional[int] = ...) -> None: ...

class UploadChunk(_message.Message):
    __slots__ = ("upload", "offset", "data", "crc32")
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    upload: str
    offset: int
    data: bytes
    crc32: int
    def __init__(self, upload: _Optional[str] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., crc32: _Optional[int] = ...) -> None: ...

class UploadStatus(_message.Message):
    __slots__ = ("upload", "committed", "state", "chunk_bytes", "reason")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[UploadStatus.State]
        OPEN: _ClassVar[UploadStatus.State]
        COMPLETE: _ClassVar[UploadStatus.State]
        NOT_WANTED: _ClassVar[UploadStatus.State]
    STATE_UNSPECIFIED: UploadStatus.State
    OPEN: UploadStatus.State
    COMPLETE: UploadStatus.State
    NOT_WANTED: UploadStatus.State
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    upload: str
    committed: int
    state: UploadStatus.State
    chunk_bytes: int
    reason: str
    def __init__(self, upload: _Optional[str] = ..., committed: _Optional[int] = ..., state: _Optional[_Union[UploadStatus.State, str]] = ..., chunk_bytes: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("upload", "task", "sha256", "examples", "steps")
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    upload: str
    task: str
    sha256: bytes
    examples: int
    steps: int
    def __init__(self, upload: _Optional[str] = ..., task: _Optional[str] = ..., sha256: _Optional[bytes] = ..., examples: _Optional[int] = ..., steps: _Optional[int] = ...) -> None: ...

class CommitReply(_message.Message):
    __slots__ = ("accepted", "reason", "next")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    reason: str
    next: RetryWindow
    def __init__(self, accepted: _Optional[bool] = ..., reason: _Optional[str] = ..., next: _Optional[_Union[RetryWindow, _Mapping]] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("task", "reason")
    TASK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    task: str
    reason: str
    def __init__(self, task: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class AbortReply(_message.Message):
    __slots__ = ("next",)
    NEXT_FIELD_NUMBER: _ClassVar[int]
    next: RetryWindow
    def __init__(self, next: _Optional[_Union[RetryWindow, _Mapping]] = ...) -> None: ...

class StageRequest(_message.Message):
    __slots__ = ("task", "stage", "reply", "sha256")
    TASK_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    task: str
    stage: str
    reply: bytes
    sha256: bytes
    def __init__(self, task: _Optional[str] = ..., stage: _Optional[str] = ..., reply: _Optional[bytes] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class SumRequest(_message.Message):
    __slots__ = ("stage", "content")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    stage: str
    content: bytes
    def __init__(self, stage: _Optional[str] = ..., content: _Optional[bytes] = ...) -> None: ...

class SumEnd(_message.Message):
    __slots__ = ("counted", "reason", "next")
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    counted: bool
    reason: str
    next: RetryWindow
    def __init__(self, counted: _Optional[bool] = ..., reason: _Optional[str] = ..., next: _Optional[_Union[RetryWindow, _Mapping]] = ...) -> None: ...

class StageReply(_message.Message):
    __slots__ = ("request", "wait", "ended")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    request: SumRequest
    wait: RetryWindow
    ended: SumEnd
    def __init__(self, request: _Optional[_Union[SumRequest, _Mapping]] = ..., wait: _Optional[_Union[RetryWindow, _Mapping]] = ..., ended: _Optional[_Union[SumEnd, _Mapping]] = ...) -> None: ...
