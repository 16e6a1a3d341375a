"""A conversation without its videos, for an engine that counts the tokens of the rest."""

from typing import Any

from server.aliases import Target
from server.requests.chat import ParsedChat

KEPT = ("messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
"""The fields of a chat request that decide how many tokens its prompt has."""


def text_prompt(request: ParsedChat, target: Target) -> list[bytes | memoryview]:
    """Return the body in which an engine is asked to tokenize a conversation without its videos, as JSON in pieces.

    The request is rewritten, and its content released. Raises InvalidRequest for a value that JSON can't represent.
    """
    videos = [part.part for part in request.media if part.kind == "video"]
    fields = {name: request.fields[name] for name in KEPT if request.fields.get(name) is not None}
    for message in fields["messages"]:
        if isinstance(message, dict) and isinstance(content := message.get("content"), list):
            message["content"] = [part for part in content if not _is_one_of(part, videos)]
    request.fields.clear()
    request.fields.update(fields, model=target.engine_model)
    body = request.serialise()
    request.forget_content()
    return body


def _is_one_of(part: Any, videos: list[dict[str, Any]]) -> bool:
    return any(part is video for video in videos)
