"""LlamaIndex's OpenAILike, which sends a video as a file."""

import asyncio
import base64
import gc

from llama_index.core.llms import ChatMessage, DocumentBlock, TextBlock
from llama_index.llms.openai_like import OpenAILike
from openai import BadRequestError
from report import ENDLESS, QUESTION, asked, wait_for_the_verdict

content = base64.b64decode(asked["clip_url"].partition(",")[2])
video = DocumentBlock(data=content, document_mimetype="video/mp4")
messages = [ChatMessage(blocks=[video, TextBlock(text=QUESTION)])]


def model(max_tokens, **extra_body):
    return OpenAILike(
        model="fast",
        api_base=asked["base_url"],
        api_key="unused",
        is_chat_model=True,
        temperature=0,
        max_tokens=max_tokens,
        max_retries=0,
        additional_kwargs={"extra_body": extra_body},
    )


async def whole_and_streamed():
    answer = await model(4).achat(messages)
    return answer, [chunk async for chunk in await model(4).astream_chat(messages)]


answer, chunks = asyncio.run(whole_and_streamed())
try:
    model(4, aot={"retention": 0.9}).chat(messages)
    raise AssertionError("0.9 is out of the alias's bounds")
except BadRequestError as exc:
    error = {"status": exc.status_code, "code": exc.code, "param": exc.param}

endless = model(ENDLESS, ignore_eos=True).stream_chat(messages)
next(endless)
del endless
gc.collect()  # LlamaIndex leaves a cycle of references around a stream
wait_for_the_verdict(
    text=answer.message.content,
    video_tokens=answer.raw.usage.video_tokens,
    streamed=chunks[-1].message.content,
    error=error,
)
