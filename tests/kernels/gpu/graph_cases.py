"""What must work in a process whatever was captured in it."""

import torch


def check_process():
    """Draws, the current stream, the allocator, the captures of others."""
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.randn(8, device="cuda")
    torch.randn(8).pin_memory().to("cuda", non_blocking=True)
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = torch.rand(8, device="cuda")
    graph.replay()
    first = drawn.clone()
    graph.replay()
    assert not torch.equal(first, drawn)
