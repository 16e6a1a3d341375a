"""LiteLLM's Python SDK, by its provider for vLLM servers."""

import asyncio
import base64

import litellm
from report import ENDLESS, QUESTION, VIDEO, asked, wait_for_the_verdict

messages = [{"role": "user", "content": [VIDEO, {"type": "text", "text": QUESTION}]}]
common = {
    "model": "hosted_vllm/fast",
    "api_base": asked["base_url"],
    "api_key": "unused",
    "messages": messages,
    "temperature": 0,
    "max_tokens": 4,
    "num_retries": 0,
}


async def main():
    answer = await litellm.acompletion(**common)
    stream = await litellm.acompletion(**common, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    try:
        await litellm.acompletion(**common, extra_body={"aot": {"retention": 0.9}})
        raise AssertionError("0.9 is out of the alias's bounds")
    except litellm.BadRequestError as exc:
        error = {"status": exc.status_code, "message": str(exc)}
    content = base64.b64decode(asked["clip_url"].partition(",")[2])
    file = await litellm.acreate_file(
        file=("clip.mp4", content),
        purpose="user_data",
        custom_llm_provider="openai",
        api_base=asked["base_url"],
        api_key="unused",
    )
    assert file.purpose == "user_data"
    uploaded = {"type": "file", "file": {"file_id": file.id}}
    about_file = [{"role": "user", "content": [uploaded, {"type": "text", "text": QUESTION}]}]
    of_file = await litellm.acompletion(**{**common, "messages": about_file})
    assert of_file.choices[0].message.content == answer.choices[0].message.content
    usage = next(chunk.usage for chunk in reversed(chunks) if getattr(chunk, "usage", None))

    endless = await litellm.acompletion(
        **{**common, "max_tokens": ENDLESS}, stream=True, extra_body={"ignore_eos": True}
    )
    await anext(aiter(endless))
    await endless.aclose()
    await asyncio.to_thread(  # the loop closes the stream meanwhile
        wait_for_the_verdict,
        text=answer.choices[0].message.content,
        prompt_tokens=answer.usage.prompt_tokens,
        streamed="".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
        streamed_prompt_tokens=usage.prompt_tokens,
        error=error,
        more=1,
    )


asyncio.run(main())
