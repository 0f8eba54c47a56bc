"""Clients against a real server: Python, sync and async, and the command line."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_type_hints

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner

from swiftvideo.runtime.errors import ClosedError, SettingsError, UsageError
from swiftvideo.runtime.geometry import Mode, Policy, PolicySettings
from swiftvideo.sdk import aio, cli, remote
from swiftvideo.sdk.client import Client, Video
from swiftvideo.sdk.generate import generate as local_generate
from swiftvideo.sdk.generate_remote import generate_on
from swiftvideo.sdk.story import Cue, Story
from swiftvideo.v1 import generation_pb2 as pb
from tests.interrupting import interrupted

from .harness import METHOD, ServerProcess, heard, proxied, reference


def test_frames_are_those_of_the_runtime_and_prompts_take_over(server: ServerProcess, pipeline: Any) -> None:
    made, modes, begin, took = [], {}, time.monotonic(), 0.0
    with Client(server.address) as client, client.generate("w1 w2", seed=7) as video:
        for chunk in video:
            frames = np.asarray(chunk.frames)
            assert frames.dtype == np.uint8 and frames.shape[1:] == (chunk.height, chunk.width, 3)
            made.append(frames.tobytes())
            took += chunk.timings["engine"]
            if chunk.index == 2:
                id = video.prompt("w8 w9")
            if chunk.mode:
                modes[chunk.prompt_id] = (chunk.mode, chunk.rho)
            if chunk.index == 9:
                break
        assert video.state.applied[id] > 2 and set(modes) == {id} and 0 <= modes[id][1] <= 1
        assert {"queue", "engine", "encode", "denoise", "decode"} <= set(chunk.timings)
        assert 0 < took < time.monotonic() - begin, "seconds"
        prompts = list(heard(video.state).values())
    assert made == reference(pipeline, 7, 10, prompts)
    with pytest.raises(ClosedError):
        video.prompt("w1")


def test_a_prompt_that_cannot_be_read_is_rejected_and_the_video_goes_on(server: ServerProcess) -> None:
    with Client(server.address) as client, client.generate("w1") as video:
        id = video.prompt("nonsense")
        for chunk in video:
            if video.state.rejected and chunk.index > 3:
                break
        assert "does not know 'nonsense'" in video.state.rejected[id]


def test_pause_stops_the_making_and_resume_goes_on(server: ServerProcess) -> None:
    with Client(server.address) as client, Client(server.address) as operator:
        with client.generate("w1", credits=2) as video:
            next(video)
            video.pause()
            while not operator.sessions()[0].paused:
                pass
            at = operator.sessions()[0].chunks
            for _ in range(3):
                assert operator.sessions()[0].chunks <= at + 1  # one may have been in the making
            video.resume()
            for chunk in video:
                if chunk.index > at + 3:
                    break


def test_no_more_is_made_than_credits_allow(server: ServerProcess) -> None:
    with Client(server.address) as client, client.generate("w1", credits=3) as video:
        first = next(video)
        assert first.index == 0
        while client.sessions()[0].credits_left:
            pass
        assert client.sessions()[0].chunks == 3


def test_jpeg_and_h264_are_what_they_say(server: ServerProcess) -> None:
    from PIL import Image

    av = pytest.importorskip("av")
    with Client(server.address) as client:
        raw = [np.asarray(chunk.frames) for chunk in client.generate("w1", seed=3, chunks=3)]
        jpeg = list(client.generate("w1", seed=3, chunks=3, encoding="jpeg"))
        h264 = list(client.generate("w1", seed=3, chunks=3, encoding="h264"))
    for chunk, frames in zip(jpeg, raw, strict=True):
        assert len(chunk.payloads) == chunk.frame_count == len(frames)
        image = np.asarray(Image.open(io.BytesIO(chunk.payloads[0])))
        assert image.shape == frames[0].shape and np.abs(image.astype(int) - frames[0]).mean() < 40
        with pytest.raises(SettingsError, match="jpeg"):
            _ = chunk.frames
    stream = b"".join(payload for chunk in h264 for payload in chunk.payloads)
    with av.open(io.BytesIO(stream), format="h264") as container:
        assert sum(1 for _ in container.decode(video=0)) == sum(map(len, raw))


def test_no_server_is_an_error_and_not_a_wait_for_ever() -> None:
    with Client("127.0.0.1:1", timeout=0.5) as client:
        with pytest.raises(remote.UnavailableError):
            client.describe()
        with pytest.raises(remote.UnavailableError), client.generate("w1") as video:
            next(video)


@pytest.mark.parametrize(
    "fields,text",
    [
        ({"encoding": "png"}, "encoding is 'png'"),
        ({"policy": "x"}, "policy is 'x'"),
        (
            {"policy": PolicySettings()},
            r"policy is a swiftvideo\.runtime\.geometry\.PolicySettings: give the name of one",
        ),
        ({"prompt": None}, "the prompt is None: give a text"),
        ({"seed": -1}, "start: seed is -1"),
        ({"chunks": 1.5}, r"start: chunks is 1\.5"),
        ({"prompt": "w1 \ud800"}, r"prompt is 'w1 \\ud800'"),
        ({"linger": math.inf}, "linger is inf"),
        ({"linger": math.nan}, "linger is nan"),
        ({"linger": "3"}, "linger is '3': use 0 to"),
        ({"linger": None}, "linger is None"),
        ({"deadline": "3"}, "deadline is '3'"),
        ({"deadline": -1}, "deadline is -1"),
        ({"prompt": "ä" * 3000}, "the prompt has 6000 bytes: use at most 4096"),
    ],
)
def test_impossible_values_are_refused_before_any_call(fields: dict[str, Any], text: str) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(SettingsError, match=text):
        client.generate(**{"prompt": "w1", **fields})


def test_names_of_modes_and_policies_are_types() -> None:
    """So a type checker sees a misspelt one."""
    for client in (Client, aio.Client):
        assert get_type_hints(client.generate)["policy"] == pb.PolicySettings | Policy | None
    assert get_type_hints(remote.RemoteChunk)["mode"] == Mode | Literal[""]


@pytest.mark.parametrize("timeout", [-1, math.nan, "10"])
def test_a_timeout_that_is_none_is_refused(timeout: Any) -> None:
    with pytest.raises(SettingsError, match=f"timeout is {timeout!r}"):
        Client("127.0.0.1:1", timeout=timeout)


def test_an_answer_that_does_not_come_in_time_is_said_so() -> None:
    over = threading.Event()
    describe = grpc.unary_unary_rpc_method_handler(lambda *_: over.wait(60) and b"")
    slow = grpc.server(ThreadPoolExecutor(1))
    name = METHOD.strip("/")
    slow.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Describe": describe}),))
    port = slow.add_insecure_port("127.0.0.1:0")
    slow.start()
    with Client(f"127.0.0.1:{port}", timeout=0.5) as client:
        with pytest.raises(remote.DeadlineError, match="did not answer in time"):
            client.describe()
    over.set()
    slow.stop(0).wait(20)


def test_what_cannot_be_sent_is_said_and_changes_nothing(server: ServerProcess) -> None:
    with Client(server.address) as client, client.generate("w1") as video:
        for text, at_chunk, message in (
            ("w1", -1, "at_chunk is -1"),
            ("w1", 1 << 70, "at_chunk is 1180591620717411303424"),
            ("\ud800", 0, r"text is '\\ud800'"),
            ("w1 " * 40_000, 0, "has 120000 bytes: use at most 4096"),  # gRPC would end the session for it
        ):
            with pytest.raises(SettingsError, match=message):
                video.prompt(text, at_chunk)
        with pytest.raises(SettingsError, match="session_id"):
            client.stop_session("\ud800")
        assert not video.state.prompts and next(video).index == 0


def test_a_client_that_was_closed_says_so(server: ServerProcess) -> None:
    client = Client(server.address)
    video = client.generate("w1", credits=1, linger=0)
    next(video)
    client.close()
    for call in (client.describe, client.sessions, lambda: client.generate("w1"), lambda: next(video)):
        with pytest.raises(ClosedError, match=f"the client of {server.address} was closed"):
            call()
    video.close()

    async def run() -> None:
        client = aio.Client(server.address)
        video = client.generate("w1", credits=1, linger=0)
        await anext(video)
        waiting = asyncio.create_task(anext(video))
        await asyncio.sleep(0)
        await client.close()
        with contextlib.suppress(StopAsyncIteration):  # as `Video.close`, or the chunk came before
            assert (await waiting).index == 1
        for call in (client.describe(), client.sessions(), anext(video)):
            with pytest.raises(ClosedError, match=f"the client of {server.address} was closed"):
                await call
        with pytest.raises(ClosedError):
            client.generate("w1")
        await video.close()
        with socket.create_server(("127.0.0.1", 0)) as silent:
            client = aio.Client(f"127.0.0.1:{silent.getsockname()[1]}")
            describing = asyncio.create_task(client.describe())
            await asyncio.sleep(0.1)
            await client.close()
            with pytest.raises(ClosedError):
                await describing

    asyncio.run(run())


def test_the_sync_client_resumes_after_cuts(server: ServerProcess, pipeline: Any) -> None:
    made = []
    with (
        proxied(server.port) as (address, proxy, loop),
        Client(address, timeout=30) as client,
        client.generate("w1 w2", seed=11, credits=1) as video,
    ):
        for chunk in video:
            made.append(bytes(chunk.frames))
            if chunk.index in (1, 4, 5):
                loop.call_soon_threadsafe(proxy.cut)
            if chunk.index == 9:
                break
    assert proxy.cuts >= 3 and made == reference(pipeline, 11, 10, [])


def test_the_async_client_does_the_same(server: ServerProcess, pipeline: Any) -> None:
    async def run() -> tuple[list[bytes], str]:
        made = []
        async with aio.Client(server.address) as client:
            engine = (await client.describe()).engine
            async with client.generate("w1 w2", seed=4, chunks=5) as video:
                await video.pause()
                await video.resume()
                async for chunk in video:
                    made.append(bytes(chunk.frames))
            with pytest.raises(ClosedError):
                await video.prompt("w1")
        return made, engine

    made, engine = asyncio.run(run())
    assert made == reference(pipeline, 4, 5, []) and engine == "onnxruntime"


def test_another_client_takes_a_session_up(server: ServerProcess, pipeline: Any) -> None:
    with Client(server.address) as client, client.generate("w1 w2", seed=4, credits=2) as video:
        assert video.resume_token == ""
        made = [bytes(next(video).frames)]
        id = video.prompt("w8 w9", at_chunk=5)
        made += [bytes(next(video).frames) for _ in range(2)]
        heard_at = list(heard(video.state).values())
        with Client(server.address) as second, second.reattach(video.resume_token, 3) as taken:
            chunks = [next(taken) for _ in range(2)]
            assert taken.session_id == video.session_id and taken.resume_token == video.resume_token
            with pytest.raises(remote.SessionLostError, match="another call reattached"):
                for chunk in video:  # what had come before the end is there yet
                    assert chunk.index < 5

            async def run() -> None:
                async with aio.Client(server.address) as third:
                    with pytest.raises(remote.RefusedError, match="first that is kept"):
                        await anext(third.reattach(video.resume_token))
                    async with third.reattach(video.resume_token, 5) as last:
                        chunks.extend([await anext(last) for _ in range(2)])
                        assert last.session_id == video.session_id
                    assert await third.sessions() == []
                    with pytest.raises(remote.SessionLostError, match="no session has this resume token"):
                        await anext(third.reattach(video.resume_token, 7))
                    for token, index, text in (
                        (None, 0, "the resume token is None"),
                        ("t", -1, "next_chunk is -1"),
                    ):
                        for reattach in (client.reattach, third.reattach):
                            with pytest.raises(SettingsError, match=text):
                                reattach(token, index)  # type: ignore[arg-type]

            asyncio.run(run())
    assert [chunk.index for chunk in chunks] == [3, 4, 5, 6]
    assert [chunk.prompt_id for chunk in chunks] == ["", "", id, id]
    made += [bytes(chunk.frames) for chunk in chunks]
    assert made == reference(pipeline, 4, 7, heard_at)


def test_policy_settings_reach_the_runtime(server: ServerProcess) -> None:
    policy = pb.PolicySettings(
        kind=pb.POLICY_KIND_RECACHE, window=pb.Window(enabled=False), bridge=pb.Bridge(recent=1)
    )
    with Client(server.address) as client, client.generate("w1", policy=policy) as video:
        video.prompt("w5", at_chunk=3)
        modes = [next(video).mode for _ in range(5)]
    assert modes == ["", "", "", "full-recache", ""]


def test_the_command_makes_a_video_on_a_server(server: ServerProcess, tmp_path: Path) -> None:
    out, sheet = tmp_path / "x.mp4", tmp_path / "x.png"
    command = [sys.executable, "-c", "from swiftvideo.sdk.cli import main; main()", "generate"]
    command += ["--server", server.address, "--out", str(out), "--seconds", "6s", "--json"]
    command += ["--contact-sheet", str(sheet)]
    command += ["--prompt", "w1 w2", "--at", "3s", "--prompt", "w3 w4"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["frames"] == report["frames_planned"] == 30 and out.stat().st_size > 500
    assert (report["server"], report["seed"], report["seconds"]) == (server.address, 0, 6.0)
    assert sheet.stat().st_size > 500 and report["contact_sheet"] == str(sheet)
    assert [switch["prompt"] for switch in report["switches"]] == ["w3 w4"]
    refused = subprocess.run(
        [*command, "--prompt", "nonsense", "--at", "4s"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2 and "nonsense" in refused.stderr and "Traceback" not in refused.stderr
    first = [*command[: command.index("--prompt")], "--prompt", "nonsense"]
    refused = subprocess.run(first, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "nonsense" in json.loads(refused.stdout)["error"]["message"]
    late = subprocess.run(
        [*command, "--prompt", "w5", "--at", "5.9s"], capture_output=True, text=True, check=False
    )
    assert late.returncode == 2 and "would take effect at" in late.stderr


@pytest.mark.parametrize(
    "times",
    [
        pytest.param((13.1,), id="within a chunk"),
        pytest.param((0.7, 0.8, 0.9, 9.9), id="several within one"),
        pytest.param(tuple(1.3 * number for number in range(1, 80)), id="more than may wait"),
    ],
)
def test_a_server_makes_the_same_video_of_a_story(
    server: ServerProcess,
    pipeline: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    times: tuple[float, ...],
) -> None:
    """Also where the server has made all that it may before it hears a prompt."""
    send = Video.prompt

    def late(video: Video, text: str, at_chunk: int = 0) -> str:
        while not (found := operator.sessions()) or found[0].credits_left:
            pass
        return send(video, text, at_chunk)

    monkeypatch.setattr(Video, "prompt", late)
    cues = tuple(Cue(f"w{number % 40}", time) for number, time in enumerate((0.0, *times)))
    story = Story(cues, times[-1] + 3.2, seed=7)
    here = local_generate(pipeline, story, tmp_path / "here.mp4")
    with Client(server.address) as client, Client(server.address) as operator:
        there = generate_on(client, story, tmp_path / "there.mp4")
    assert there.windows == here.windows and there.switches == here.switches
    assert len(here.switches) == len(times) and len(set(here.windows)) > 1
    assert (tmp_path / "there.mp4").read_bytes() == (tmp_path / "here.mp4").read_bytes()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--server", "localhost:1", "--engine", "torch"], "do not go with --server"),
        (["--root", "absent.pem"], "belong to --server"),
        (["--tls"], "belong to --server"),
    ],
)
def test_options_of_the_other_way_are_refused(tmp_path: Path, flags: list[str], words: str) -> None:
    given = ["generate", "--out", str(tmp_path / "x.mp4"), "--prompt", "w1", *flags]
    result = CliRunner().invoke(cli.app, given)
    assert isinstance(result.exception, UsageError) and words in str(result.exception)


def test_an_interrupted_video_of_a_server_is_kept(server: ServerProcess, tmp_path: Path) -> None:
    out = tmp_path / "x.mp4"
    given = ["--server", server.address, "--out", str(out), "--seconds", "9999", "--json", "--prompt", "w1"]
    program = "from swiftvideo.sdk.cli import main; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", program, "generate", *given], stdout=subprocess.PIPE, text=True
    )
    told, _ = interrupted(
        child, signal.SIGTERM, lambda: out.exists() and out.stat().st_size > 2000, within=120, ends=60
    )
    report = json.loads(told)
    assert child.returncode == 128 + signal.SIGTERM and report["interrupted"] and report["frames"] > 0


def test_the_sample_of_viewers(server: ServerProcess) -> None:
    sample = Path(__file__).parents[2] / "samples" / "viewers.py"
    command = [sys.executable, str(sample), server.address, "w1 w2", "w3 w4", "w5 w6"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for number in range(3):
        modes = [line.split("  ")[1] for line in told if line.startswith(f"viewer {number}: ")]
        assert len(modes) == 8 and [mode != "" for mode in modes].count(True) == 1 and not any(modes[:3])
