"""OpenAI's Python SDK, versions 2 and 3."""

from openai import BadRequestError, OpenAI
from report import ENDLESS, QUESTION, VIDEO, asked, wait_for_the_verdict

client = OpenAI(base_url=asked["base_url"], api_key="unused", max_retries=0, timeout=60)
messages = [{"role": "user", "content": [VIDEO, {"type": "text", "text": QUESTION}]}]
common = {"model": "fast", "messages": messages, "temperature": 0, "max_tokens": 4}

answer = client.chat.completions.create(**common)
with client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True}) as stream:
    chunks = list(stream)
try:
    client.chat.completions.create(**common, extra_body={"aot": {"retention": 0.9}})
    raise AssertionError("0.9 is out of the alias's bounds")
except BadRequestError as exc:
    error = {"status": exc.status_code, "code": exc.code, "param": exc.param}

endless = client.chat.completions.create(
    **{**common, "max_tokens": ENDLESS}, stream=True, extra_body={"ignore_eos": True}
)
next(iter(endless))
endless.close()
wait_for_the_verdict(
    text=answer.choices[0].message.content,
    video_tokens=answer.usage.video_tokens,
    streamed="".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
    streamed_video_tokens=chunks[-1].usage.video_tokens,
    error=error,
)
