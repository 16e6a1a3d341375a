"""LangChain's ChatOpenAI."""

import asyncio

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from openai import BadRequestError
from report import ENDLESS, QUESTION, VIDEO, asked, wait_for_the_verdict

messages = [HumanMessage(content=[VIDEO, {"type": "text", "text": QUESTION}])]
common = {
    "model": "fast",
    "base_url": asked["base_url"],
    "api_key": "unused",
    "temperature": 0,
    "max_retries": 0,
    "stream_usage": True,
}


async def main():
    chat = ChatOpenAI(**common, max_tokens=4)
    answer = await chat.ainvoke(messages)
    chunks = [chunk async for chunk in chat.astream(messages)]
    try:
        await ChatOpenAI(**common, max_tokens=4, extra_body={"aot": {"retention": 0.9}}).ainvoke(messages)
        raise AssertionError("0.9 is out of the alias's bounds")
    except BadRequestError as exc:
        error = {"status": exc.status_code, "code": exc.code, "param": exc.param}

    endless = ChatOpenAI(**common, max_tokens=ENDLESS, extra_body={"ignore_eos": True}).astream(messages)
    await anext(endless)
    await endless.aclose()
    await asyncio.to_thread(  # the loop closes the stream meanwhile
        wait_for_the_verdict,
        text=answer.content,
        video_tokens=answer.response_metadata["token_usage"].get("video_tokens"),
        streamed="".join(chunk.content for chunk in chunks),
        streamed_prompt_tokens=next(chunk.usage_metadata for chunk in chunks if chunk.usage_metadata)["input_tokens"],
        prompt_tokens=answer.usage_metadata["input_tokens"],
        error=error,
    )


asyncio.run(main())
