"""A medium in a request, and its place there."""

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["video", "image", "audio"]
Source = Literal["url", "base64", "upload"]


@dataclass
class MediaPart:
    """A medium in a message.

    `value` is its URL, base64 data or file id, found at `holder[key]` within the message's `part`. Errors name its
    place as `param`.
    """

    kind: Kind
    source: Source
    value: str = field(repr=False)
    param: str
    part: dict[str, Any] = field(repr=False)
    holder: dict[str, Any] = field(repr=False)
    key: str
    is_plain: bool = False  # whether `value` is known to be ASCII without any character that JSON escapes
    payload: memoryview | None = field(default=None, repr=False)
    """The base64 of a large data URL, unparsed. In `value`, a mark after the head stands in for it."""
    in_response: bool = False
    """Whether the part belongs to a request for a response, where engines know no parts for videos by their type."""

    @property
    def takes_base64_alone(self) -> bool:
        """Whether the engine takes base64 without a data URL's head at this place."""
        return self.kind == "audio" and self.source == "base64"

    def replace(self, url: str, *, uuid: str | None = None) -> None:
        """Replace the value by `url`, a URL made by the gateway. For a video, add `uuid`, its name in engines' caches.

        A payload stays if the mark that stands in for it is still at the end of `url`.
        Engines read a part with a `uuid` by its keys and not by its type. So all other keys are removed from the part.
        """
        if self.kind == "video" and self.in_response:
            self.part.clear()
            self.part.update(type="input_file", uuid=uuid)
            self.holder, self.key = self.part, "video_url"
        elif self.kind == "video":
            self.holder, self.key = {}, "url"
            self.part.clear()
            self.part.update(type="video_url", video_url=self.holder, uuid=uuid)
        if not url.endswith(self.value.rpartition(",")[2]):
            self.payload = None
        self.holder[self.key] = self.value = url
        self.is_plain = True
