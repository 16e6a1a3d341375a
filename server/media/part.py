"""A medium as it stands in a request."""

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["video", "image", "audio"]
Source = Literal["url", "base64", "upload"]


@dataclass
class MediaPart:
    """A medium in a message: `value`, which stands at `holder[key]` in the message's `part`, says where it is.

    `param` is how an error names the place.
    """

    kind: Kind
    source: Source
    value: str = field(repr=False)
    param: str
    part: dict[str, Any] = field(repr=False)
    holder: dict[str, Any] = field(repr=False)
    key: str
    is_plain: bool = False  # verified to be ASCII without a character that JSON escapes
    payload: memoryview | None = field(default=None, repr=False)
    """The base64 of a large data URL, as it came; in `value` there is a mark in its place."""

    def replace(self, url: str, *, uuid: str | None = None) -> None:
        """Put a URL made by the gateway in the place; a video's with the name that engines know its content by.

        Engines read a part with a `uuid` by its keys and not by its type, so nothing else is left in it.
        """
        if self.kind == "video":
            self.holder, self.key = {}, "url"
            self.part.clear()
            self.part.update(type="video_url", video_url=self.holder, uuid=uuid)
        if url != self.value:
            self.payload = None
        self.holder[self.key] = self.value = url
        self.is_plain = True
