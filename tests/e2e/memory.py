"""How much memory a call needs, counted allocation by allocation: the same number on every run and every machine."""

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call):
    """Return the most bytes of tensors that were there at a time and came up during `call`, and what it returned."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        returned = call()
    events = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    assert changes
    live = peak = 0
    for _, change in sorted(changes, key=lambda timed: timed[0]):
        live += change
        peak = max(peak, live)
    return peak, returned
