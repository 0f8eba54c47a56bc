"""The gRPC service: sessions over one engine, with admission, credits, resume, snapshots, drain and metrics.

    config.py    what can be set               session.py   one session as the event loop sees it
    engine.py    the engine's thread           manager.py   all sessions: admission, reattach, snapshots, drain
    payload.py   frames to bytes               service.py   the four calls
    auth.py      tokens, TLS                   server.py    puts it together and runs it
    store.py     snapshots on disk             metrics.py, logs.py, status.py

A session's state belongs to the event loop. The engine's thread owns the runtime's sessions while it makes a chunk; a
worker thread packs frames, another reads prompts. Docs: docs/service.md.
"""
