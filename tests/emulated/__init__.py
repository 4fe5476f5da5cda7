"""A GPU that is not there: the code for CUDA runs whole on a CPU, with right values, and is refused what a GPU refuses.

    with emulated_gpu() as gpu:                             # in a process of its own, with TRITON_INTERPRET=1
        with LLM(folder, device="cuda") as llm: ...

device.py: tensors that say they are on cuda:0. queue.py: streams, events, graphs, copies under way, the host's waits.
memory.py: what tensors take. launches.py: Triton's kernels, interpreted. cuda.py: what stands in for torch.cuda.
What it cannot show: speed, races within a kernel, numbers of bf16 kernels, what a GPU's own libraries refuse.
"""
