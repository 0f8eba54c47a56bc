"""Viewers of one server at once, each with a video of its own; after three chunks they swap prompts.

Needs pip install '.[serve]', and a server in another terminal: swiftvideo serve

python samples/viewers.py localhost:50051 "a red circle moving right at night" "a blue cross bouncing at dawn"
"""

import asyncio
import sys

from swiftvideo.sdk.aio import Client


async def watch(client: Client, name: str, prompt: str, later: str) -> None:
    async with client.generate(prompt, seed=7, chunks=8) as video:
        async for chunk in video:
            print(f"{name}: chunk {chunk.index}, frames from {chunk.first_frame}  {chunk.mode}")
            if chunk.index == 2:
                await video.prompt(later)


async def main(address: str, prompts: list[str]) -> None:
    async with Client(address) as client, asyncio.TaskGroup() as viewers:
        for number, prompt in enumerate(prompts):
            viewers.create_task(watch(client, f"viewer {number}", prompt, prompts[number - 1]))


if __name__ == "__main__":
    address, *prompts = sys.argv[1:] or ["localhost:50051"]
    asyncio.run(
        main(address, prompts or ["a red circle moving right at night", "a blue cross bouncing at dawn"])
    )
