"""What tensor-parallel ranks are asked, and a worker extension that writes down which cells each of them keeps."""

from tests.e2e.engines import request, video
from tests.e2e.qwen import qwen_request


def requests_to(name):
    """Return questions about videos of several lengths to the model of a checkpoint."""
    if name.startswith("qwen"):
        return [qwen_request(video(frames, side=168, seed=frames)[:, :112], "?") for frames in (2, 9, 33)]
    return [request(video(frames, seed=frames)) for frames in (1, 8, 33)]


class RankProbe:
    def probe_kept_cells(self):
        """From now on, remember the kept cells of each video on this rank."""
        from aot_vllm.adapters import llava_onevision, qwen_vl

        self.kept_cells = []
        for adapter in (llava_onevision, qwen_vl):
            adapter.reduce_video = self._remembering(adapter.reduce_video)

    def _remembering(self, original):
        def reduce_video(*args, **kwargs):
            reduced = original(*args, **kwargs)
            cells = zip(reduced.frames.tolist(), reduced.rows.tolist(), reduced.cols.tolist(), strict=True)
            self.kept_cells.append(list(cells))
            return reduced

        return reduce_video

    def read_kept_cells(self):
        return self.kept_cells
