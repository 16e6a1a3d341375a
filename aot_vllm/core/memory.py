"""What the greedy choices of anchors remember of earlier frames, so that frames contribute different content.

- `previous`: the tokens that the frame before keeps.
- `all`: the tokens that all earlier frames keep. Memory is that of the kept tokens. Work grows with the square of the
  number of frames: every token is compared with every token kept before.
- `carried`: for each position, how far its token is from what is kept, P numbers. In the next frame it is at most that
  far plus what has changed at the position, by the triangle inequality. So what an early frame keeps counts as long as
  its content stays in place, and fades where the content changes. The tokens that the frame before keeps count as they
  are. Work and launches are those of `previous`.

Dimensions: P positions of a frame, A anchors of a frame, k tokens kept, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from aot_vllm.config import Memory
from aot_vllm.core.distances import Frame, nearest_of

Choose = Callable[[int, Frame, Tensor | None], Tensor]
"""Return the anchors (A,) of a frame, given its index, the frame, and the squared distance from each of its tokens to
the nearest remembered token, (P,), or None if nothing is remembered."""


class Remembered(ABC):
    """What is remembered while a video is walked through."""

    @staticmethod
    def by(memory: Memory) -> "Remembered":
        """Return an empty memory of this kind."""
        kinds: dict[Memory, type[Remembered]] = {"previous": _Previous, "all": _All, "carried": _Carried}
        return kinds[memory]()

    @abstractmethod
    def near(self, frame: Frame) -> Tensor | None:
        """Return the squared distances from a frame's tokens to the nearest remembered token, (P,), or None."""

    @abstractmethod
    def add(self, frame: Frame, near_P: Tensor | None, kept_k: Tensor) -> None:
        """Remember that the frame keeps these positions; `near_P` is what `near` returned for it."""


class _Previous(Remembered):
    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None

    def near(self, frame: Frame) -> Tensor | None:
        return None if self.kept is None else nearest_of(*self.kept, frame)

    def add(self, frame: Frame, near_P: Tensor | None, kept_k: Tensor) -> None:
        self.kept = frame.scaled(kept_k) if len(kept_k) else None


class _All(_Previous):
    def add(self, frame: Frame, near_P: Tensor | None, kept_k: Tensor) -> None:
        rows = frame.scaled(kept_k)
        if len(kept_k):
            before = self.kept
            self.kept = rows if before is None else (torch.cat((before[0], rows[0])), torch.cat((before[1], rows[1])))


class _Carried(_Previous):
    def __init__(self) -> None:
        super().__init__()
        self.carried: tuple[Tensor, Tensor] | None = None
        """Scaled tokens of the previous frame, (P, D), and their squared distances to what is kept, (P,)."""

    def near(self, frame: Frame) -> Tensor | None:
        exact_P = super().near(frame)
        if self.carried is None:
            return exact_P
        tokens_PD, near_P = self.carried
        changed_P = torch.linalg.vector_norm(_scaled(frame) - tokens_PD, dim=1)
        carried_P = near_P.clamp_min(0).sqrt().add_(changed_P).square_().nan_to_num_(torch.inf, torch.inf)
        return carried_P if exact_P is None else torch.fmin(exact_P, carried_P)

    def add(self, frame: Frame, near_P: Tensor | None, kept_k: Tensor) -> None:
        super().add(frame, near_P, kept_k)
        if self.kept is not None:
            exact_P = nearest_of(*self.kept, frame).index_fill_(0, kept_k, 0)
            near_P = exact_P if near_P is None else torch.fmin(near_P, exact_P)
        self.carried = None if near_P is None else (_scaled(frame), near_P)


def _scaled(frame: Frame) -> Tensor:
    return frame.tokens * frame.scales.unsqueeze(1)


def walk(frames: Iterable[Frame], keep_per_frame: Sequence[int], choose: Choose, remembered: Remembered) -> Tensor:
    """Return the choices of all frames, (T, A), each made with what is remembered of the frames before it."""
    orders: list[Tensor] = []
    for index, (frame, keep) in enumerate(zip(frames, keep_per_frame, strict=True)):
        near_P = remembered.near(frame)
        orders.append(choose(index, frame, near_P))
        remembered.add(frame, near_P, orders[-1][:keep])
    return torch.stack(orders)
