"""The gRPC service: sessions over one engine, with admission, credits, resume, snapshots, drain and metrics.

    config.py    what can be set               session.py   one session as the event loop sees it
    engine.py    the engine's thread           manager.py   all sessions: start, attach, detach, end
    payload.py   frames to bytes               reattach.py  sessions that are taken up after a cut
    auth.py      tokens, TLS                   recovery.py  snapshots of sessions, and sessions from snapshots
    store.py     snapshots on disk             drain.py     the end of a server
    admission.py whether there is room         service.py   the four calls
    endpoint.py  /metrics, /healthz            server.py    puts it together and runs it
    health.py, metrics.py, logs.py, tracing.py, status.py, settings.py

A session's state belongs to the event loop. The engine's thread owns the runtime's sessions while it makes a chunk; a
worker thread packs frames, another reads prompts. Docs: docs/service.md.
"""
