from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODING_UNSPECIFIED: _ClassVar[Encoding]
    ENCODING_RAW: _ClassVar[Encoding]
    ENCODING_JPEG: _ClassVar[Encoding]
    ENCODING_H264: _ClassVar[Encoding]

class PolicyKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POLICY_KIND_UNSPECIFIED: _ClassVar[PolicyKind]
    POLICY_KIND_SWIFT: _ClassVar[PolicyKind]
    POLICY_KIND_RECACHE: _ClassVar[PolicyKind]
    POLICY_KIND_KEEP: _ClassVar[PolicyKind]
    POLICY_KIND_CUT: _ClassVar[PolicyKind]
ENCODING_UNSPECIFIED: Encoding
ENCODING_RAW: Encoding
ENCODING_JPEG: Encoding
ENCODING_H264: Encoding
POLICY_KIND_UNSPECIFIED: PolicyKind
POLICY_KIND_SWIFT: PolicyKind
POLICY_KIND_RECACHE: PolicyKind
POLICY_KIND_KEEP: PolicyKind
POLICY_KIND_CUT: PolicyKind

class GenerateRequest(_message.Message):
    __slots__ = ("start", "reattach", "prompt", "credit", "pause", "resume", "stop")
    START_FIELD_NUMBER: _ClassVar[int]
    REATTACH_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    PAUSE_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    start: Start
    reattach: Reattach
    prompt: Prompt
    credit: Credit
    pause: Pause
    resume: Resume
    stop: Stop
    def __init__(self, start: _Optional[_Union[Start, _Mapping]] = ..., reattach: _Optional[_Union[Reattach, _Mapping]] = ..., prompt: _Optional[_Union[Prompt, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., pause: _Optional[_Union[Pause, _Mapping]] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("started", "chunk", "prompt_accepted", "prompt_applied", "prompt_rejected", "notice", "ended")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    PROMPT_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_APPLIED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_REJECTED_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    started: Started
    chunk: Chunk
    prompt_accepted: PromptAccepted
    prompt_applied: PromptApplied
    prompt_rejected: PromptRejected
    notice: Notice
    ended: Ended
    def __init__(self, started: _Optional[_Union[Started, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., prompt_accepted: _Optional[_Union[PromptAccepted, _Mapping]] = ..., prompt_applied: _Optional[_Union[PromptApplied, _Mapping]] = ..., prompt_rejected: _Optional[_Union[PromptRejected, _Mapping]] = ..., notice: _Optional[_Union[Notice, _Mapping]] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("prompt", "seed", "credits", "encoding", "policy", "linger_ms", "chunks", "prompts")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    LINGER_MS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    seed: int
    credits: int
    encoding: Encoding
    policy: PolicySettings
    linger_ms: int
    chunks: int
    prompts: _containers.RepeatedCompositeFieldContainer[Prompt]
    def __init__(self, prompt: _Optional[str] = ..., seed: _Optional[int] = ..., credits: _Optional[int] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., policy: _Optional[_Union[PolicySettings, _Mapping]] = ..., linger_ms: _Optional[int] = ..., chunks: _Optional[int] = ..., prompts: _Optional[_Iterable[_Union[Prompt, _Mapping]]] = ...) -> None: ...

class Reattach(_message.Message):
    __slots__ = ("resume_token", "next_chunk", "prompts")
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NEXT_CHUNK_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    resume_token: str
    next_chunk: int
    prompts: _containers.RepeatedCompositeFieldContainer[Prompt]
    def __init__(self, resume_token: _Optional[str] = ..., next_chunk: _Optional[int] = ..., prompts: _Optional[_Iterable[_Union[Prompt, _Mapping]]] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("id", "text", "at_chunk", "heard_chunk")
    ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    AT_CHUNK_FIELD_NUMBER: _ClassVar[int]
    HEARD_CHUNK_FIELD_NUMBER: _ClassVar[int]
    id: str
    text: str
    at_chunk: int
    heard_chunk: int
    def __init__(self, id: _Optional[str] = ..., text: _Optional[str] = ..., at_chunk: _Optional[int] = ..., heard_chunk: _Optional[int] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("presented_chunk",)
    PRESENTED_CHUNK_FIELD_NUMBER: _ClassVar[int]
    presented_chunk: int
    def __init__(self, presented_chunk: _Optional[int] = ...) -> None: ...

class Pause(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Resume(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Stop(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Started(_message.Message):
    __slots__ = ("session_id", "resume_token", "geometry", "next_chunk", "credits", "linger_ms", "encoding", "resumed")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    NEXT_CHUNK_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    LINGER_MS_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    resume_token: str
    geometry: Geometry
    next_chunk: int
    credits: int
    linger_ms: int
    encoding: Encoding
    resumed: bool
    def __init__(self, session_id: _Optional[str] = ..., resume_token: _Optional[str] = ..., geometry: _Optional[_Union[Geometry, _Mapping]] = ..., next_chunk: _Optional[int] = ..., credits: _Optional[int] = ..., linger_ms: _Optional[int] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., resumed: _Optional[bool] = ...) -> None: ...

class Geometry(_message.Message):
    __slots__ = ("width", "height", "fps", "chunk_frames", "first_chunk_frames")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FRAMES_FIELD_NUMBER: _ClassVar[int]
    FIRST_CHUNK_FRAMES_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    fps: int
    chunk_frames: int
    first_chunk_frames: int
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ..., fps: _Optional[int] = ..., chunk_frames: _Optional[int] = ..., first_chunk_frames: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("index", "first_frame", "frame_count", "payloads", "prompt_id", "window", "mode", "timings")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    FIRST_FRAME_FIELD_NUMBER: _ClassVar[int]
    FRAME_COUNT_FIELD_NUMBER: _ClassVar[int]
    PAYLOADS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_ID_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    index: int
    first_frame: int
    frame_count: int
    payloads: _containers.RepeatedScalarFieldContainer[bytes]
    prompt_id: str
    window: int
    mode: str
    timings: Timings
    def __init__(self, index: _Optional[int] = ..., first_frame: _Optional[int] = ..., frame_count: _Optional[int] = ..., payloads: _Optional[_Iterable[bytes]] = ..., prompt_id: _Optional[str] = ..., window: _Optional[int] = ..., mode: _Optional[str] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_ms", "engine_ms", "encode_ms", "stages_ms")
    class StagesMsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_MS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_MS_FIELD_NUMBER: _ClassVar[int]
    STAGES_MS_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    engine_ms: float
    encode_ms: float
    stages_ms: _containers.ScalarMap[str, float]
    def __init__(self, queue_ms: _Optional[float] = ..., engine_ms: _Optional[float] = ..., encode_ms: _Optional[float] = ..., stages_ms: _Optional[_Mapping[str, float]] = ...) -> None: ...

class PromptAccepted(_message.Message):
    __slots__ = ("id", "number", "heard_chunk")
    ID_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    HEARD_CHUNK_FIELD_NUMBER: _ClassVar[int]
    id: str
    number: int
    heard_chunk: int
    def __init__(self, id: _Optional[str] = ..., number: _Optional[int] = ..., heard_chunk: _Optional[int] = ...) -> None: ...

class PromptApplied(_message.Message):
    __slots__ = ("id", "chunk_index", "rho", "mode")
    ID_FIELD_NUMBER: _ClassVar[int]
    CHUNK_INDEX_FIELD_NUMBER: _ClassVar[int]
    RHO_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    id: str
    chunk_index: int
    rho: float
    mode: str
    def __init__(self, id: _Optional[str] = ..., chunk_index: _Optional[int] = ..., rho: _Optional[float] = ..., mode: _Optional[str] = ...) -> None: ...

class PromptRejected(_message.Message):
    __slots__ = ("id", "reason")
    ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    id: str
    reason: str
    def __init__(self, id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Notice(_message.Message):
    __slots__ = ("kind", "text", "milliseconds")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Notice.Kind]
        KIND_DRAINING: _ClassVar[Notice.Kind]
        KIND_THROTTLED: _ClassVar[Notice.Kind]
    KIND_UNSPECIFIED: Notice.Kind
    KIND_DRAINING: Notice.Kind
    KIND_THROTTLED: Notice.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MILLISECONDS_FIELD_NUMBER: _ClassVar[int]
    kind: Notice.Kind
    text: str
    milliseconds: int
    def __init__(self, kind: _Optional[_Union[Notice.Kind, str]] = ..., text: _Optional[str] = ..., milliseconds: _Optional[int] = ...) -> None: ...

class Ended(_message.Message):
    __slots__ = ("reason", "text", "resumable")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REASON_UNSPECIFIED: _ClassVar[Ended.Reason]
        REASON_STOPPED: _ClassVar[Ended.Reason]
        REASON_COMPLETED: _ClassVar[Ended.Reason]
        REASON_OPERATOR: _ClassVar[Ended.Reason]
        REASON_DRAINED: _ClassVar[Ended.Reason]
        REASON_TAKEN_OVER: _ClassVar[Ended.Reason]
    REASON_UNSPECIFIED: Ended.Reason
    REASON_STOPPED: Ended.Reason
    REASON_COMPLETED: Ended.Reason
    REASON_OPERATOR: Ended.Reason
    REASON_DRAINED: Ended.Reason
    REASON_TAKEN_OVER: Ended.Reason
    REASON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    RESUMABLE_FIELD_NUMBER: _ClassVar[int]
    reason: Ended.Reason
    text: str
    resumable: bool
    def __init__(self, reason: _Optional[_Union[Ended.Reason, str]] = ..., text: _Optional[str] = ..., resumable: _Optional[bool] = ...) -> None: ...

class PolicySettings(_message.Message):
    __slots__ = ("kind", "global_sink", "bridge", "window", "anchors")
    KIND_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_SINK_FIELD_NUMBER: _ClassVar[int]
    BRIDGE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    ANCHORS_FIELD_NUMBER: _ClassVar[int]
    kind: PolicyKind
    global_sink: bool
    bridge: Bridge
    window: Window
    anchors: Anchors
    def __init__(self, kind: _Optional[_Union[PolicyKind, str]] = ..., global_sink: _Optional[bool] = ..., bridge: _Optional[_Union[Bridge, _Mapping]] = ..., window: _Optional[_Union[Window, _Mapping]] = ..., anchors: _Optional[_Union[Anchors, _Mapping]] = ...) -> None: ...

class Bridge(_message.Message):
    __slots__ = ("enabled", "recent", "micro", "tau_low", "tau_high", "scale", "decay")
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    MICRO_FIELD_NUMBER: _ClassVar[int]
    TAU_LOW_FIELD_NUMBER: _ClassVar[int]
    TAU_HIGH_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    DECAY_FIELD_NUMBER: _ClassVar[int]
    enabled: bool
    recent: int
    micro: int
    tau_low: float
    tau_high: float
    scale: float
    decay: float
    def __init__(self, enabled: _Optional[bool] = ..., recent: _Optional[int] = ..., micro: _Optional[int] = ..., tau_low: _Optional[float] = ..., tau_high: _Optional[float] = ..., scale: _Optional[float] = ..., decay: _Optional[float] = ...) -> None: ...

class Window(_message.Message):
    __slots__ = ("enabled", "min_size", "tau_post", "tau_pre")
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    MIN_SIZE_FIELD_NUMBER: _ClassVar[int]
    TAU_POST_FIELD_NUMBER: _ClassVar[int]
    TAU_PRE_FIELD_NUMBER: _ClassVar[int]
    enabled: bool
    min_size: int
    tau_post: float
    tau_pre: float
    def __init__(self, enabled: _Optional[bool] = ..., min_size: _Optional[int] = ..., tau_post: _Optional[float] = ..., tau_pre: _Optional[float] = ...) -> None: ...

class Anchors(_message.Message):
    __slots__ = ("enabled", "recent", "max", "mix", "scale")
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    MIX_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    enabled: bool
    recent: int
    max: int
    mix: float
    scale: float
    def __init__(self, enabled: _Optional[bool] = ..., recent: _Optional[int] = ..., max: _Optional[int] = ..., mix: _Optional[float] = ..., scale: _Optional[float] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("version", "geometry", "engine", "words", "max_credits", "max_sessions", "max_sessions_per_client", "max_linger_ms", "encodings", "chunk_seconds")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    MAX_CREDITS_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_PER_CLIENT_FIELD_NUMBER: _ClassVar[int]
    MAX_LINGER_MS_FIELD_NUMBER: _ClassVar[int]
    ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_SECONDS_FIELD_NUMBER: _ClassVar[int]
    version: str
    geometry: Geometry
    engine: str
    words: _containers.RepeatedScalarFieldContainer[str]
    max_credits: int
    max_sessions: int
    max_sessions_per_client: int
    max_linger_ms: int
    encodings: _containers.RepeatedScalarFieldContainer[Encoding]
    chunk_seconds: float
    def __init__(self, version: _Optional[str] = ..., geometry: _Optional[_Union[Geometry, _Mapping]] = ..., engine: _Optional[str] = ..., words: _Optional[_Iterable[str]] = ..., max_credits: _Optional[int] = ..., max_sessions: _Optional[int] = ..., max_sessions_per_client: _Optional[int] = ..., max_linger_ms: _Optional[int] = ..., encodings: _Optional[_Iterable[_Union[Encoding, str]]] = ..., chunk_seconds: _Optional[float] = ...) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions",)
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionInfo]
    def __init__(self, sessions: _Optional[_Iterable[_Union[SessionInfo, _Mapping]]] = ...) -> None: ...

class SessionInfo(_message.Message):
    __slots__ = ("session_id", "client", "seconds", "chunks", "credits_left", "attached", "paused")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    CREDITS_LEFT_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    client: str
    seconds: float
    chunks: int
    credits_left: int
    attached: bool
    paused: bool
    def __init__(self, session_id: _Optional[str] = ..., client: _Optional[str] = ..., seconds: _Optional[float] = ..., chunks: _Optional[int] = ..., credits_left: _Optional[int] = ..., attached: _Optional[bool] = ..., paused: _Optional[bool] = ...) -> None: ...

class StopSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class StopSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
