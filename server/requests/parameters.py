"""Checks which fields a client may set, and how large their values may be. Engines check few of these bounds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from server.errors import ForbiddenField, InvalidRequest

OPERATOR_FIELDS: Final = (
    # how media and prompts are processed: the model's alias decides this
    *("mm_processor_kwargs", "media_io_kwargs", "chat_template", "prompt_embeds"),
    # from where an engine loads caches, and what its extensions do: could reach other hosts and other tenants' prompts
    *("kv_transfer_params", "ec_transfer_params", "vllm_xargs"),
    # the order of requests, and their ids at the engine
    *("priority", "request_id", "session_id"),
    # responses that an engine would store, and return to any client
    *("previous_response_id", "previous_input_messages", "background"),
)

NOT_BESIDE_MEDIA: Final = ("truncate_prompt_tokens", "truncation_side")
"""Fields that cut a prompt at a token: engines can't cut a medium."""

INSTEAD: Final = {
    "mm_processor_kwargs": ": use aot.retention",
    "media_io_kwargs": ": use aot.frames or aot.fps",
    "request_id": ": use the header x-request-id",
}
"""What does the same as some of these, within the operator's bounds."""

MOST_ITEMS: Final = {
    "messages": 2048,
    "input": 2048,
    "tools": 128,
    "functions": 128,
    "documents": 128,
    "stop": 16,
    "stop_token_ids": 256,
    "bad_words": 128,
    "logit_bias": 1024,
    "allowed_token_ids": 1024,
    "logprob_token_ids": 128,
}
MOST_LOGPROBS: Final = 20
LOGPROBS: Final = ("logprobs", "top_logprobs", "prompt_logprobs")
MOST_CHARACTERS: Final = {
    "tools": 512 * 1024,
    "functions": 512 * 1024,
    "response_format": 64 * 1024,
    "structured_outputs": 64 * 1024,
    "text": 64 * 1024,
    "stop": 4096,
    "bad_words": 16 * 1024,
    "repetition_detection": 1024,
}
MOST_REGEX_CHARACTERS: Final = 4096
LONGEST_REPETITION: Final = 128
DEEPEST: Final = 32
CHOICES: Final = ("n", "best_of")
LENGTHS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")


@dataclass(frozen=True)
class Bounds:
    """The bounds that the operator sets."""

    max_choices: int
    """The largest number of choices (`n`, `best_of`) in one request."""
    max_output_tokens: int | None
    """The largest number of output tokens for one choice. None leaves the bound to the engine."""
    chat_template_kwargs: frozenset[str]
    """The keys of `chat_template_kwargs` that a request may set."""


def check_parameters(fields: Mapping[str, Any], bounds: Bounds) -> None:
    """Raise ForbiddenField for a field that only the operator may set, and InvalidRequest for a value beyond a bound.

    Types are not checked here, because the engine checks them. A value of the wrong type does not get around a bound.
    """
    for name in OPERATOR_FIELDS:
        if fields.get(name) is not None:
            raise ForbiddenField(f"{name} can't be set in a request{INSTEAD.get(name, '')}", param=name)
    _check_template(fields.get("chat_template_kwargs"), bounds.chat_template_kwargs)
    _check_sizes(fields)
    for names, least, most in (
        (LOGPROBS, 0, MOST_LOGPROBS),
        (CHOICES, 1, bounds.max_choices),
        (LENGTHS, 0, bounds.max_output_tokens),
    ):
        for name in names:
            _check_number(fields.get(name), name, least, most)
    _check_grammar(fields.get("structured_outputs"))
    repetition = fields.get("repetition_detection")
    if isinstance(repetition, dict):
        name = "max_pattern_size"
        _check_number(repetition.get(name), f"repetition_detection.{name}", 0, LONGEST_REPETITION)


def refuse_beside_media(fields: Mapping[str, Any]) -> None:
    """Raise InvalidRequest for a field that engines can't combine with videos, images or audio."""
    for name in NOT_BESIDE_MEDIA:
        if fields.get(name) is not None:
            raise InvalidRequest(
                f"{name} can't be combined with videos, images or audio: leave it out, or send text alone", param=name
            )


def _check_sizes(fields: Mapping[str, Any]) -> None:
    for name, most in MOST_ITEMS.items():
        value = fields.get(name)
        if isinstance(value, list | dict) and len(value) > most:
            raise InvalidRequest(f"{name} must have at most {most} items, got {len(value)}", param=name)
    for name, most in MOST_CHARACTERS.items():
        if fields.get(name) is not None:
            _check_size(fields[name], name, most)


def _check_template(switches: object, allowed: frozenset[str]) -> None:
    if switches is None:
        return
    if not isinstance(switches, dict):
        raise InvalidRequest("chat_template_kwargs must be an object", param="chat_template_kwargs")
    for switch in switches:
        if switch not in allowed:
            name = f"chat_template_kwargs.{switch}"[:200]
            raise ForbiddenField(f"{name} can't be set in a request", param=name)


def _check_number(value: object, name: str, least: int, most: int | None) -> None:
    if isinstance(value, bool) or value is None:
        return
    if not isinstance(value, int | float) or value < least:
        raise InvalidRequest(f"{name} must be a number of at least {least}", param=name)
    if most is not None and value > most:
        raise InvalidRequest(f"{name} must be at most {most}", param=name)


def _check_grammar(structured: object) -> None:
    if not isinstance(structured, dict):
        return
    for name in ("regex", "whitespace_pattern"):
        value = structured.get(name)
        if isinstance(value, str) and len(value) > MOST_REGEX_CHARACTERS:
            raise InvalidRequest(
                f"structured_outputs.{name} must have at most {MOST_REGEX_CHARACTERS} characters",
                param=f"structured_outputs.{name}",
            )


def _check_size(value: object, name: str, most_characters: int) -> None:
    """Raise InvalidRequest if `value` has more than `most_characters` characters or more than DEEPEST levels.

    The value is walked level by level. A container counts as two characters, any other value as at least one.
    """
    size, level = 0, [value]
    for _ in range(DEEPEST):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
                size += 2 + sum(len(key) for key in item)
            elif isinstance(item, list):
                below += item
                size += 2
            else:
                size += max(1, len(item)) if isinstance(item, str) else 1
        if size > most_characters:
            raise InvalidRequest(f"{name} must have at most {most_characters} characters", param=name)
        if not below:
            return
        level = below
    raise InvalidRequest(f"{name} must be nested at most {DEEPEST} levels deep", param=name)
