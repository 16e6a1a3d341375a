"""A worker extension that writes down which cells each tensor-parallel rank keeps."""


class RankProbe:
    def probe_kept_cells(self):
        """From now on, remember the kept cells of each video on this rank."""
        from aot_vllm.adapters import llava_onevision

        original = llava_onevision.reduce_video
        self.kept_cells = []

        def reduce_video(*args, **kwargs):
            reduced = original(*args, **kwargs)
            cells = zip(reduced.frames.tolist(), reduced.rows.tolist(), reduced.cols.tolist(), strict=True)
            self.kept_cells.append(list(cells))
            return reduced

        llava_onevision.reduce_video = reduce_video

    def read_kept_cells(self):
        return self.kept_cells
