"""pydantic-ai's agent about an uploaded file, and with the subclass of docs/clients.md about bytes."""

import asyncio
import base64

from pydantic_ai import Agent, BinaryContent, ModelHTTPError, UploadedFile
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from report import ENDLESS, QUESTION, asked, wait_for_the_verdict

provider = OpenAIProvider(base_url=asked["base_url"], api_key="unused")
content = base64.b64decode(asked["clip_url"].partition(",")[2])


class VideoChatModel(OpenAIChatModel):
    _unsupported_file_inputs = frozenset()

    async def _map_binary_content_item(self, item):
        return {"type": "video_url", "video_url": {"url": item.data_uri}}


def settings(max_tokens, **extra_body):
    return {"temperature": 0, "max_tokens": max_tokens, "extra_body": extra_body}


async def main():
    file = await provider.client.files.create(file=("clip.mp4", content), purpose="user_data")
    uploaded = UploadedFile(file_id=file.id, provider_name="openai", media_type="video/mp4")
    as_released = Agent(OpenAIChatModel("fast", provider=provider))
    agent = Agent(VideoChatModel("fast", provider=provider))
    video = BinaryContent(content, media_type="video/mp4")
    of_file = await as_released.run([uploaded, QUESTION], model_settings=settings(4))
    answer = await agent.run([video, QUESTION], model_settings=settings(4))
    assert of_file.output == answer.output
    async with agent.run_stream([video, QUESTION], model_settings=settings(4)) as stream:
        streamed = await stream.get_output()
        usage = stream.usage
    try:
        await agent.run([video, QUESTION], model_settings=settings(4, aot={"retention": 0.9}))
        raise AssertionError("0.9 is out of the alias's bounds")
    except ModelHTTPError as exc:
        error = {"status": exc.status_code, **exc.body}

    async with agent.run_stream([video, QUESTION], model_settings=settings(ENDLESS, ignore_eos=True)) as endless:
        await anext(endless.stream_text(delta=True))
    await asyncio.to_thread(  # the loop closes the stream meanwhile
        wait_for_the_verdict,
        text=answer.output,
        prompt_tokens=answer.usage.input_tokens,
        streamed=streamed,
        streamed_prompt_tokens=usage.input_tokens,
        error=error,
        more=1,
    )


asyncio.run(main())
