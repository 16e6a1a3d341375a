"""What a reduction asks of a device, counted on tensors without data: launches, bytes, and waits of the host."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WITHOUT_LAUNCH = {
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "_unsafe_view",
    "_reshape_alias",
}
"""Operations that start nothing, beside views."""


class Operations(TorchDispatchMode):
    """Records the operations that start something on a device, and the largest sum of bytes of living tensors."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.living = {}
        self.bytes = 0
        self.most_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in WITHOUT_LAUNCH:
            self.names.append(name)
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return made

    def _follow(self, storage):
        from torch.multiprocessing.reductions import StorageWeakRef

        reference = StorageWeakRef(storage)
        if reference.cdata in self.living:
            return
        self.living[reference.cdata] = (reference, storage.nbytes())
        self.bytes += storage.nbytes()
        if self.bytes > self.most_bytes:  # with those that are gone; to drop them each time would take long
            self.living = {key: kept for key, kept in self.living.items() if not kept[0].expired()}
            self.bytes = sum(size for _, size in self.living.values())
            self.most_bytes = max(self.most_bytes, self.bytes)


class Waits(TorchFunctionMode):
    """Records every call by which a host waits for a device, or sends it data that were not pinned."""

    READS = ("item", "tolist", "nonzero", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "unique")
    DATA = ("tensor", "as_tensor", "from_numpy", "asarray", "scalar_tensor")

    def __init__(self):
        super().__init__()
        self.found = []
        self.copies = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in self.READS:
            self.found.append(name)
        on_host = torch.device(kwargs.get("device") or "cpu").type == "cpu"
        if name in self.DATA and not (name == "tensor" and on_host):
            self.found.append(name)
        if name in ("to", "copy_", "cuda") and self._crosses(args, kwargs):
            if kwargs.get("non_blocking"):
                self.copies += 1
            else:
                self.found.append(name)
        if name == "__getitem__" and not isinstance(args[1], torch.Tensor):
            lists = [part for part in (args[1] if isinstance(args[1], tuple) else [args[1]]) if isinstance(part, list)]
            self.found += ["index of a list"] * len(lists)
        return func(*args, **kwargs)

    @staticmethod
    def _crosses(args, kwargs):
        targets = [part for part in (*args[1:], *kwargs.values()) if isinstance(part, (torch.device, torch.Tensor))]
        devices = {part if isinstance(part, torch.device) else part.device for part in targets}
        return any(device.type != args[0].device.type for device in devices)
